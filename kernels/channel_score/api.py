"""Dot products of queries with a few channels of the keys, which are stored channel by channel."""

import torch
from torch import Tensor

from topkbench.kernels.channel_score import reference
from topkbench.kernels.dispatch import Impl, implementation
from topkbench.kernels.shapes import (
    check_device,
    check_dtype,
    check_floating,
    check_range,
    check_shape,
)


def channel_score(
    query: Tensor,
    channel_keys: Tensor,
    channels: Tensor,
    kv_start: Tensor | None = None,
    kv_len: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Score each key by its dot product with each query over selected channels, in float32.

    Only the selected channels are read.

    Args:
        query: ``[B, Hkv, G, r]`` the queries in these channels.
        channel_keys: ``[B, Hkv, d, n]``; may be a strided view of a larger cache.
        channels: ``[B, Hkv, r]`` int64 or int32, each from 0 to ``d - 1``.
        kv_start: ``[B]`` int32 first valid slot of each row, or None for 0.
        kv_len: ``[B]`` int32 end of each row's valid slots, or None for ``n``.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``; never falls back.

    Returns:
        ``[B, Hkv, G, n]`` float32, unscaled; -inf outside the valid range.

    Raises:
        ValueError: If a shape or device does not fit.
        TypeError: If queries or keys are not floating point, or channels not whole numbers.

    Source:
        SparQ (arXiv:2312.04985), step 1.
    """
    check_shape("query", query, "[B, Hkv, G, r]", None, None, None, None)
    batch_size, num_heads, _, rank = query.shape
    heads = (batch_size, num_heads)
    check_shape("channel_keys", channel_keys, "[B, Hkv, d, n]", *heads, None, None)
    check_shape("channels", channels, "[B, Hkv, r]", *heads, rank)
    check_floating("query", query)
    check_floating("channel_keys", channel_keys)
    check_dtype("channels", channels, torch.int64, torch.int32)
    device = query.device
    check_device("channel_keys", channel_keys, device)
    check_device("channels", channels, device)
    check_range(kv_start, kv_len, batch_size, device)
    run = implementation(reference.channel_score, impl, device, channel_keys)
    return run(query, channel_keys, channels, kv_start, kv_len)
