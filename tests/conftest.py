"""What every test runs under: no network, whatever the machine has, and Triton without a GPU."""

import os
from pathlib import Path

import torch

# Read when huggingface_hub is imported, so it is set before any test is.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read when numba is imported: tests run commands with empty caches, and kernels compile for minutes.
_cache = os.path.expanduser(os.environ.get("TOPKBENCH_CACHE") or "~/.cache/topkbench")
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(_cache) / "numba"))
# Read when triton is imported, and when a kernel is decorated: they then run in Python on a CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
