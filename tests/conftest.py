"""What every test runs under: no network, whatever the machine has."""

import os

# Read when huggingface_hub is imported, so it is set before any test is.
os.environ["HF_HUB_OFFLINE"] = "1"
