"""Choose the implementation of an operator, and set numba up once."""

import os
import threading
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar, get_args

import torch

Impl = Literal["auto", "reference", "cpu", "triton"]
Function = TypeVar("Function", bound=Callable[..., Any])

Operator = Literal[
    "hash_encode",
    "hamming_score",
    "page_score",
    "lowrank_score",
    "channel_score",
    "code_score",
    "group_softmax",
    "topk_select",
    "sparse_attention",
]
OPERATORS: tuple[Operator, ...] = get_args(Operator)
"""The operators with several implementations; full attention has backends instead."""

# The module that holds each implementation, inside the operator's folder.
_MODULES = {"reference": "reference", "cpu": "cpu", "triton": "fused"}

# Operators that read the cached states themselves, and the dtypes in which the compiled ones do.
_READ_STATES = ("page_score", "lowrank_score", "channel_score", "sparse_attention")
_READABLE = {
    "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
MOST_CHANNELS = 256
"""Channels of a head that sparse attention in Triton has room for."""

# The number of threads last set in numba, which numba stores per Python thread.
_numba_threads = threading.local()


def implementation(
    reference: Function, impl: Impl, device: torch.device, states: torch.Tensor | None = None
) -> Function:
    """Return the implementation of an operator that runs on a device, as ``resolve`` chooses it.

    Args:
        reference: The function in the operator's ``reference.py``. The other implementations are
            functions of the same name and parameters, in ``cpu.py`` and ``fused.py`` beside it.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.
        device: Device of the operator's tensors.
        states: The cached states of an operator that reads them, channels last if it attends.

    Raises:
        ValueError: If ``impl`` cannot be used; see ``resolve``.
    """
    folder = reference.__module__.rpartition(".")[0]
    dtype, channels = (None, None) if states is None else (states.dtype, states.shape[-1])
    chosen = resolve(folder.rpartition(".")[2], impl, device, dtype, channels)
    if chosen == "reference":
        return reference
    function: Function = getattr(_module(folder, chosen), reference.__name__)
    return function


@cache
def _module(folder: str, chosen: str) -> ModuleType:
    """Import an implementation when it is first called: only then is its compiler needed."""
    return import_module(f"{folder}.{_MODULES[chosen]}")


def resolve(
    op: str,
    impl: Impl,
    device: torch.device,
    dtype: torch.dtype | None = None,
    channels: int | None = None,
) -> str:
    """Return the implementation of an operator that runs on a device.

    ``auto`` takes the fastest available: ``cpu`` on a CPU, ``triton`` on a CUDA device if Triton is
    installed. It takes ``reference`` elsewhere, and where the fastest cannot read the states, such
    as float16 on a CPU. A named implementation is used or refused, never replaced. On a CPU
    ``triton`` is possible only in Triton's interpreter, which is meant for tests.

    Args:
        op: The operator's folder name, such as ``"hamming_score"``.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.
        device: Device of the operator's tensors.
        dtype: Dtype of the cached states; None for any.
        channels: Channels of a head; None for any.

    Returns:
        ``"reference"``, ``"cpu"`` or ``"triton"``.

    Raises:
        ValueError: If the name is unknown, the operator has no such implementation, the package
            that it needs is not installed, or the device cannot run it.
    """
    # The environment is read only if it matters: that takes longer than the rest.
    chosen = choose(op, impl, device.type, impl == "triton" and interpreted(), dtype, channels)
    if chosen == "cpu":
        set_threads()
    return chosen


def set_threads() -> None:
    """Let numba use as many threads as torch, before a compiled kernel runs."""
    if torch.get_num_threads() != getattr(_numba_threads, "count", 0):
        _prepare_numba()


@cache
def choose(
    op: str,
    impl: str,
    device_type: str,
    interpreted: bool,
    dtype: torch.dtype | None = None,
    channels: int | None = None,
) -> str:
    """Return the implementation for a device type; cached, as it never changes in a process."""
    words = get_args(Impl)
    if impl not in words:
        raise ValueError(f"impl must be one of {', '.join(words)}, got {impl!r} for {op}.")
    if impl == "auto":
        fastest = {"cpu": "cpu", "cuda": "triton"}.get(device_type, "reference")
        available = _exists(op, fastest) and (fastest != "triton" or has_triton())
        available = available and _reads(op, fastest, dtype, channels)
        return fastest if available else "reference"
    if not _exists(op, impl):
        raise ValueError(
            f"impl={impl!r} needs {_MODULES[impl]}.py, which {op} does not have; use impl='auto'."
        )
    needed = missing(impl, device_type, interpreted)
    if needed is not None:
        raise ValueError(f"impl={impl!r} of {op} needs {needed} use impl='auto'.")
    return impl


def missing(impl: str, device_type: str, interpreted: bool) -> str | None:
    """Return what an implementation needs that is not there, up to the way out; None if nothing.

    Args:
        impl: Any implementation, or ``"auto"``, which needs nothing.
        device_type: ``"cpu"`` or ``"cuda"``.
        interpreted: Whether Triton's kernels run in its interpreter.
    """
    needed = {"cpu": "cpu", "triton": "cuda"}.get(impl, device_type)
    if impl == "triton" and interpreted and device_type == "cpu":
        needed = "cpu"
    if device_type != needed:
        return f"tensors on a {needed} device, got {device_type};"
    if impl == "triton" and not has_triton():
        return "the package triton, which is not installed; install topkbench[gpu] or"
    return None


def _exists(op: str, impl: str) -> bool:
    return (Path(__file__).parent / op / f"{_MODULES[impl]}.py").is_file()


def _reads(op: str, impl: str, dtype: torch.dtype | None, channels: int | None) -> bool:
    """Return whether an implementation can read states of a dtype and a number of channels."""
    if op not in _READ_STATES or impl not in _READABLE:
        return True
    if impl == "triton" and op == "sparse_attention" and (channels or 0) > MOST_CHANNELS:
        return False
    return dtype is None or dtype in _READABLE[impl]


def has_triton() -> bool:
    """Return whether Triton is installed, without importing it."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Return whether Triton's kernels run in its interpreter, which tests them on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _prepare_numba() -> None:
    """Set numba's threading layer, and its number of threads to torch's.

    OpenMP's layer starts a parallel region in a few microseconds and may be entered from several
    Python threads; the others are used if numba was built without it. A process that has called a
    CPU operator must not fork: spawn instead.
    """
    import numba

    # Numba tries these in order at its first parallel call and takes the first that loads.
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    _numba_threads.count = torch.get_num_threads()
    most: int = vars(numba.config)["NUMBA_NUM_THREADS"]
    numba.set_num_threads(min(_numba_threads.count, most))
    # Starting numba's OpenMP threads changes the process's default, which torch uses as well.
    torch.set_num_threads(_numba_threads.count)
