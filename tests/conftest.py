"""What every test runs under: no network, whatever the machine has, and Triton without a GPU."""

import os

import torch

# Read when huggingface_hub is imported, so it is set before any test is.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read when triton is imported, and when a kernel is decorated: they then run in Python on a CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
