"""One decode step of attention over the whole cache, with which every method is compared."""

from typing import Literal, get_args

import torch
from torch import Tensor

from topkbench.kernels.dispatch import interpreted, missing
from topkbench.kernels.shapes import (
    check_device,
    check_floating,
    check_range,
    check_shape,
    check_sinks,
)

Backend = Literal["auto", "sdpa", "cpu", "triton", "flash_attn", "flash_attn_3", "flashinfer"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def resolve_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> Backend:
    """Return the backend that runs: ``auto`` takes the fastest that was measured on such a device.

    That is ``cpu`` on a CPU, in the dtypes that it reads: it was faster than torch's at every shape
    of ``experiment=dense_kernels`` (kernels/README.md). It is ``sdpa`` elsewhere: on CUDA none of
    the others has been measured yet, so name one of them. A named backend is returned as it is.

    Args:
        backend: The backend, or ``"auto"``.
        device: Device of the states.
        dtype: Their dtype.
    """
    if backend != "auto":
        return backend
    is_fast = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    return "cpu" if is_fast else "sdpa"


def missing_for(backend: Backend, device_type: str) -> str | None:
    """Return what a backend needs that is not there, up to the way out; None if nothing.

    Whether a library can be imported is left to the backend.

    Args:
        backend: The backend.
        device_type: ``"cpu"`` or ``"cuda"``.
    """
    if backend == "triton":
        return missing("triton", device_type, interpreted())
    if backend == "cpu":
        return missing("cpu", device_type, False)
    if backend not in ("auto", "sdpa") and device_type != "cuda":
        return f"tensors on a cuda device, got {device_type};"
    return None


def full_attention(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    scale: float,
    kv_start: Tensor | None = None,
    kv_len: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: Backend = "sdpa",
) -> Tensor:
    """Attend from one query per head to every valid slot of the cache.

    Args:
        query_states: ``[B, Hq, d]``.
        key_states: ``[B, Hkv, n, d]``; may be a strided view of a larger cache.
        value_states: ``[B, Hkv, n, dv]``.
        scale: Factor on the dot products.
        kv_start: ``[B]`` int32 first valid slot of each row, or None for 0.
        kv_len: ``[B]`` int32 end of each row's valid slots, or None for ``n``.
        softcap: Logits become ``softcap * tanh(logits / softcap)``; None for no cap.
        sinks: ``[Hq]`` floating point, the logit of each query head's learned sink, which has no
            key and no value: its exponential is in the softmax's denominator, unscaled and
            uncapped. None for no sinks; the CUDA libraries take none.
        backend: ``"auto"`` (as `resolve_backend` chooses), ``"sdpa"`` (torch, any device),
            ``"cpu"`` (our own, on a CPU), or on CUDA ``"triton"`` (our own split-K),
            ``"flash_attn"``, ``"flash_attn_3"`` or ``"flashinfer"``, which take values of the keys'
            width only; never falls back.

    Returns:
        ``[B, Hq, dv]`` in the query's dtype; a row without a valid slot gives zeros.

    Raises:
        ValueError: If a shape or device does not fit, or the backend is unknown, not installed or
            cannot run on the tensors' device, or with sinks or values of another width.
        TypeError: If the states or sinks are not floating point.

    Source:
        Learned sinks: gpt-oss (arXiv:2508.10925), section 2; the idea of a token that takes up
        attention: StreamingLLM (arXiv:2309.17453).
    """
    check_shape("query_states", query_states, "[B, Hq, d]", None, None, None)
    batch_size, num_heads, head_dim = query_states.shape
    check_shape("key_states", key_states, "[B, Hkv, n, d]", batch_size, None, None, head_dim)
    check_shape("value_states", value_states, "[B, Hkv, n, dv]", *key_states.shape[:3], None)
    num_kv_heads = key_states.shape[1]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"query_states must have Hq, a multiple of Hkv = {num_kv_heads}, got {num_heads}."
        )
    check_floating("query_states", query_states)
    device = query_states.device
    check_device("key_states", key_states, device)
    check_device("value_states", value_states, device)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}.")
    check_sinks(sinks, num_heads, device)
    check_range(kv_start, kv_len, batch_size, device)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    backend = resolve_backend(backend, device, key_states.dtype)

    value_dim = value_states.shape[3]
    if backend not in ("sdpa", "cpu", "triton") and (sinks is not None or value_dim != head_dim):
        found = "sinks" if sinks is not None else f"keys of {head_dim} and values of {value_dim}"
        raise ValueError(
            f"backend={backend!r} needs keys and values of one width and no sinks, got {found}; "
            "use backend='triton' or 'sdpa'."
        )

    arguments = (query_states, key_states, value_states, scale, kv_start, kv_len, softcap)
    if backend == "sdpa":
        from topkbench.kernels.full_attention import reference

        return reference.full_attention(*arguments, sinks)
    needed = missing_for(backend, device.type)
    if needed is not None:
        raise ValueError(f"backend={backend!r} needs {needed} use backend='sdpa'.")
    if backend == "cpu":
        from topkbench.kernels.full_attention import cpu

        return cpu.full_attention(*arguments, sinks)
    if backend == "triton":
        from topkbench.kernels.full_attention import fused

        return fused.full_attention(*arguments, sinks)
    from topkbench.kernels.full_attention import libraries

    if backend == "flash_attn":
        return libraries.flash_attn(*arguments)
    if backend == "flash_attn_3":
        return libraries.flash_attn_3(*arguments)
    return libraries.flashinfer(*arguments)
