"""One decode step of attention over the selected tokens or pages."""

import torch
from torch import Tensor

from topkbench.kernels.dispatch import Impl, implementation
from topkbench.kernels.shapes import (
    check_device,
    check_dtype,
    check_floating,
    check_range,
    check_shape,
    check_sinks,
)
from topkbench.kernels.sparse_attention import reference


def sparse_attention(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    indices: Tensor,
    scale: float,
    count: Tensor | None = None,
    log_weight: Tensor | None = None,
    unit_size: int = 1,
    kv_start: Tensor | None = None,
    kv_len: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend from one query per head to the selected slots of the cache.

    With ``unit_size == 1`` an index is a cache slot. Otherwise unit ``u`` of row ``b`` begins at
    slot ``kv_start[b] + u * unit_size``, so that a left-padded row has the same pages as an
    unpadded one. Slots outside the valid range and negative indices are skipped.

    Args:
        query_states: ``[B, Hq, d]``.
        key_states: ``[B, Hkv, n, d]``; may be a strided view of a larger cache.
        value_states: ``[B, Hkv, n, dv]``.
        indices: ``[B, H, m]`` int32, ``H`` being ``Hkv`` (one selection for a group) or ``Hq``;
            query head ``h`` belongs to KV head ``h // (Hq // Hkv)``.
        scale: Factor on the dot products, before ``softcap`` and ``log_weight``.
        count: ``[B, H]`` int32, number of leading entries of ``indices`` to use, or None for all.
        log_weight: ``[B, Hq, m]`` float32 added to the logits of a unit's tokens, or None.
        unit_size: Tokens in a unit, at least 1.
        kv_start: ``[B]`` int32 first valid slot of each row, or None for 0.
        kv_len: ``[B]`` int32 end of each row's valid slots, or None for ``n``.
        softcap: Logits become ``softcap * tanh(logits / softcap)``; None for no cap.
        sinks: ``[Hq]`` floating point, the logit of each query head's learned sink, which has no
            key and no value: its exponential is in the softmax's denominator, unscaled and
            uncapped. None for no sinks.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``; never falls back.

    Returns:
        The output ``[B, Hq, dv]`` in the query's dtype and the natural log of the softmax's
        denominator ``[B, Hq]`` float32, the sink included. A row with nothing selected gives zeros
        and -inf, or the sink.

    Raises:
        ValueError: If a shape or device does not fit, or a number is out of its range.
        TypeError: If a dtype is wrong.

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
    check_shape("indices", indices, "[B, H, m]", batch_size, None, None)
    _, num_index_heads, num_units = indices.shape
    if num_index_heads not in (num_kv_heads, num_heads):
        raise ValueError(
            f"indices must have Hkv = {num_kv_heads} or Hq = {num_heads} heads, "
            f"got {num_index_heads}."
        )
    check_dtype("indices", indices, torch.int32)
    device = query_states.device
    check_floating("query_states", query_states)
    check_dtype("key_states", key_states, query_states.dtype)
    check_dtype("value_states", value_states, query_states.dtype)
    check_device("key_states", key_states, device)
    check_device("value_states", value_states, device)
    check_device("indices", indices, device)
    if count is not None:
        check_shape("count", count, "[B, H]", batch_size, num_index_heads)
        check_dtype("count", count, torch.int32)
        check_device("count", count, device)
    if log_weight is not None:
        check_shape("log_weight", log_weight, "[B, Hq, m]", batch_size, num_heads, num_units)
        check_dtype("log_weight", log_weight, torch.float32)
        check_device("log_weight", log_weight, device)
    if unit_size < 1:
        raise ValueError(f"unit_size must be at least 1, got {unit_size}.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}.")
    check_sinks(sinks, num_heads, device)
    check_range(kv_start, kv_len, batch_size, device)
    wider = max(key_states, value_states, key=lambda states: states.shape[3])
    run = implementation(reference.sparse_attention, impl, device, wider)
    return run(
        query_states, key_states, value_states, indices, scale, count, log_weight, unit_size,
        kv_start, kv_len, softcap, sinks,
    )  # fmt: skip
