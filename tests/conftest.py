"""What every test runs under: no network, whatever the machine has, and Triton without a GPU."""

import os
from pathlib import Path

import torch

# Read when huggingface_hub is imported, so it is set before any test is.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read when numba is imported: commands with empty caches would compile every kernel anew.
_cache = Path(os.environ.get("TOPKBENCH_CACHE") or "~/.cache/topkbench").expanduser()
os.environ.setdefault("NUMBA_CACHE_DIR", str(_cache / "numba"))
# Read when triton is imported, and when a kernel is decorated: they then run in Python on a CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
