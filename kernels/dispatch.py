"""Which implementation of an operator runs, and numba's one-time set-up."""

import os
import threading
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import torch

Impl = Literal["auto", "reference", "cpu", "triton"]

OPERATORS = (
    "hash_encode",
    "hamming_score",
    "page_score",
    "lowrank_score",
    "channel_score",
    "code_score",
    "group_softmax",
    "topk_select",
    "sparse_attention",
)
"""The operators that have implementations to choose from; full attention's choice is a backend."""

# The file that holds each implementation, inside the operator's folder.
_FILES = {"reference": "reference.py", "cpu": "cpu.py", "triton": "fused.py"}

# How many threads numba was last told to use, for each Python thread, as numba keeps it.
_told = threading.local()


def resolve(op: str, impl: Impl, device: torch.device) -> str:
    """Say which implementation of an operator runs on a device.

    ``auto`` takes the fastest one that is there: ``cpu`` on a CPU, ``triton`` on a CUDA device
    where Triton is installed, else ``reference``. A word that names one is obeyed or refused, never
    replaced. On a CPU ``triton`` is obeyed in Triton's interpreter alone, which serves to test.

    Args:
        op: The operator's folder name, such as ``"hamming_score"``.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.
        device: Where the operator's tensors are.

    Returns:
        ``"reference"``, ``"cpu"`` or ``"triton"``.

    Raises:
        ValueError: If the word is unknown, the operator has no such implementation, what it is
            written in is not installed, or the device cannot run it.
    """
    chosen = _choose(op, impl, device.type, interpreted())
    if chosen == "cpu" and torch.get_num_threads() != getattr(_told, "threads", 0):
        _prepare_numba()
    return chosen


@cache
def _choose(op: str, impl: str, device_type: str, interpreted: bool) -> str:
    """Return the implementation for a device type; the answer never changes in one process."""
    words = get_args(Impl)
    if impl not in words:
        raise ValueError(f"impl must be one of {', '.join(words)}, got {impl!r} for {op}.")
    if impl == "auto":
        wanted = {"cpu": "cpu", "cuda": "triton"}.get(device_type, "reference")
        there = _exists(op, wanted) and (wanted != "triton" or has_triton())
        return wanted if there else "reference"
    if not _exists(op, impl):
        raise ValueError(
            f"impl={impl!r} needs {_FILES[impl]}, which is not there for {op}; use impl='auto'."
        )
    needed = {"cpu": "cpu", "triton": "cuda"}.get(impl, device_type)
    if impl == "triton" and interpreted and device_type == "cpu":
        needed = "cpu"
    if device_type != needed:
        raise ValueError(
            f"impl={impl!r} of {op} needs tensors on a {needed} device, got {device_type}; "
            "use impl='auto'."
        )
    if impl == "triton" and not has_triton():
        raise ValueError(
            f"impl='triton' of {op} needs the package triton, which is not installed; "
            "install topkbench[gpu] or use impl='auto'."
        )
    return impl


def _exists(op: str, impl: str) -> bool:
    return (Path(__file__).parent / op / _FILES[impl]).is_file()


def has_triton() -> bool:
    """Say whether Triton is installed, without importing it."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Say whether Triton's kernels run in its interpreter, which serves to test them on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _prepare_numba() -> None:
    """Set numba's threading layer and match torch's number of threads.

    OpenMP's layer starts a parallel region in a few microseconds and may be entered from several
    Python threads; the others are taken where numba was built without it. A process that has made
    a CPU call must not fork: spawn instead.
    """
    import numba

    # Numba tries these in order at its first parallel call and takes the first that loads.
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    _told.threads = torch.get_num_threads()
    most: int = vars(numba.config)["NUMBA_NUM_THREADS"]
    numba.set_num_threads(min(_told.threads, most))
    # Starting numba's OpenMP threads sets the process's default, which is torch's count as well.
    torch.set_num_threads(_told.threads)
