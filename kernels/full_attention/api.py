"""One decode step of attention over the whole cache, with which every method is compared."""

from typing import Literal, get_args

from torch import Tensor

from topkbench.kernels.dispatch import interpreted, missing
from topkbench.kernels.shapes import check_device, check_floating, check_range, check_shape

Backend = Literal["sdpa", "triton", "flash_attn", "flash_attn_3", "flashinfer"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def missing_for(backend: Backend, device_type: str) -> str | None:
    """Return what a backend needs that is not there, up to the way out; None if nothing.

    Whether a library can be imported is left to the backend.

    Args:
        backend: The backend.
        device_type: ``"cpu"`` or ``"cuda"``.
    """
    if backend == "triton":
        return missing("triton", device_type, interpreted())
    if backend != "sdpa" and device_type != "cuda":
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
    backend: Backend = "sdpa",
) -> Tensor:
    """Attend from one query per head to every valid slot of the cache.

    Args:
        query_states: ``[B, Hq, d]``.
        key_states: ``[B, Hkv, n, d]``; may be a strided view of a larger cache.
        value_states: ``[B, Hkv, n, d]``.
        scale: Factor on the dot products.
        kv_start: ``[B]`` int32 first valid slot of each row, or None for 0.
        kv_len: ``[B]`` int32 end of each row's valid slots, or None for ``n``.
        softcap: Logits become ``softcap * tanh(logits / softcap)``; None for no cap.
        backend: ``"sdpa"`` (torch, any device), or on CUDA ``"triton"`` (our own split-K),
            ``"flash_attn"``, ``"flash_attn_3"`` or ``"flashinfer"``; never falls back.

    Returns:
        ``[B, Hq, d]`` in the query's dtype; a row without a valid slot gives zeros.

    Raises:
        ValueError: If a shape or device does not fit, or the backend is unknown, not installed or
            cannot run on the tensors' device.
        TypeError: If the states are not floating point.
    """
    check_shape("query_states", query_states, "[B, Hq, d]", None, None, None)
    batch_size, num_heads, head_dim = query_states.shape
    notation = "[B, Hkv, n, d]"
    check_shape("key_states", key_states, notation, batch_size, None, None, head_dim)
    check_shape("value_states", value_states, notation, *key_states.shape)
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
    check_range(kv_start, kv_len, batch_size, device)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")

    arguments = (query_states, key_states, value_states, scale, kv_start, kv_len, softcap)
    if backend == "sdpa":
        from topkbench.kernels.full_attention import reference

        return reference.full_attention(*arguments)
    needed = missing_for(backend, device.type)
    if needed is not None:
        raise ValueError(f"backend={backend!r} needs {needed} use backend='sdpa'.")
    if backend == "triton":
        from topkbench.kernels.full_attention import fused

        return fused.full_attention(*arguments)
    from topkbench.kernels.full_attention import libraries

    if backend == "flash_attn":
        return libraries.flash_attn(*arguments)
    if backend == "flash_attn_3":
        return libraries.flash_attn_3(*arguments)
    return libraries.flashinfer(*arguments)
