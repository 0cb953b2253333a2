"""Dot products of queries with keys, whole or reduced to a few channels."""

from torch import Tensor

from topkbench.kernels.dispatch import Impl, implementation
from topkbench.kernels.lowrank_score import reference
from topkbench.kernels.shapes import check_device, check_floating, check_range, check_shape


def lowrank_score(
    query: Tensor,
    keys: Tensor,
    kv_start: Tensor | None = None,
    kv_len: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Score each key by its dot product with each query, accumulated in float32.

    Args:
        query: ``[B, Hkv, G, r]``; with all channels the scores are the exact logits.
        keys: ``[B, Hkv, n, r]``; may be a strided view of a larger cache.
        kv_start: ``[B]`` int32 first valid slot of each row, or None for 0.
        kv_len: ``[B]`` int32 end of each row's valid slots, or None for ``n``.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``; never falls back.

    Returns:
        ``[B, Hkv, G, n]`` float32, unscaled; -inf outside the valid range.

    Raises:
        ValueError: If a shape or device does not fit.
        TypeError: If an argument is not floating point.

    Source:
        Loki (arXiv:2406.02542), algorithm 1; SparQ (arXiv:2312.04985), step 1.
    """
    check_shape("query", query, "[B, Hkv, G, r]", None, None, None, None)
    batch_size, num_heads, _, rank = query.shape
    check_shape("keys", keys, "[B, Hkv, n, r]", batch_size, num_heads, None, rank)
    check_floating("query", query)
    check_floating("keys", keys)
    device = query.device
    check_device("keys", keys, device)
    check_range(kv_start, kv_len, batch_size, device)
    run = implementation(reference.lowrank_score, impl, device, keys)
    return run(query, keys, kv_start, kv_len)
