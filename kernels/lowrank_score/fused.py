"""lowrank_score in Triton: each key is read once, in place, for all queries of its group."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topkbench.kernels.tiles import (
    check_readable,
    on_device_of,
    padded,
    product_dtype,
    valid_range,
)

# Keys and channels per matrix product: for 16-bit numbers, in the matrix units; for float32, which
# are kept in registers and would not all fit.
_NARROW, _FLOAT32 = (128, 64), (64, 32)


def lowrank_score(
    query: Tensor, keys: Tensor, kv_start: Tensor | None, kv_len: Tensor | None
) -> Tensor:
    """Return ``[B, Hkv, G, n]`` float32; see the api."""
    check_readable("query", query)
    check_readable("keys", keys)
    batch_size, num_heads, num_slots, rank = keys.shape
    group = query.shape[2]
    out = torch.empty(batch_size, num_heads, group, num_slots, device=keys.device)
    if out.numel() == 0:
        return out
    product = product_dtype(query, keys)
    tile, channels = _FLOAT32 if product == tl.float32 else _NARROW
    with on_device_of(out):
        _score[(triton.cdiv(num_slots, tile), batch_size * num_heads)](
            query.contiguous(), keys, out, kv_start, kv_len, *keys.stride(), num_heads, num_slots,
            GROUP=group, RANK=rank, PADDED_GROUP=padded(group), KEYS=tile,
            CHANNELS=min(channels, padded(rank)), PRODUCT=product,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_slots"])
def _score(
    queries: tl.tensor,
    keys: tl.tensor,
    out: tl.tensor,
    kv_start: tl.tensor,
    kv_len: tl.tensor,
    batch_stride: tl.tensor,
    head_stride: tl.tensor,
    slot_stride: tl.tensor,
    channel_stride: tl.tensor,
    num_heads: tl.tensor,
    num_slots: tl.tensor,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRODUCT: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // num_heads, row % num_heads
    start, end = valid_range(kv_start, kv_len, batch, num_slots)
    slots = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    valid = (slots >= start) & (slots < end)
    offsets = slots.to(tl.int64)
    query = tl.arange(0, PADDED_GROUP)
    head_keys = keys + batch * batch_stride + head * head_stride
    scores = tl.zeros([PADDED_GROUP, KEYS], tl.float32)
    for first in tl.static_range(0, RANK, CHANNELS):
        channels = first + tl.arange(0, CHANNELS)
        key_tile = tl.load(
            head_keys + offsets[:, None] * slot_stride + channels[None, :] * channel_stride,
            mask=valid[:, None] & (channels < RANK)[None, :],
            other=0.0,
        ).to(PRODUCT)
        query_tile = tl.load(
            queries + (row * GROUP + query[:, None]) * RANK + channels[None, :],
            mask=(query < GROUP)[:, None] & (channels < RANK)[None, :],
            other=0.0,
        ).to(PRODUCT)
        scores = tl.dot(query_tile, tl.trans(key_tile), scores, input_precision="ieee")
    tl.store(
        out + (row * GROUP + query[:, None]) * num_slots + offsets[None, :],
        tl.where(valid[None, :], scores, float("-inf")),
        mask=(query < GROUP)[:, None] & (slots < num_slots)[None, :],
    )
