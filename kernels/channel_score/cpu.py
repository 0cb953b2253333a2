"""channel_score on a CPU: vectors along the tokens, a few channels at a time.

The sums of a block of tokens stay in the first-level cache while channels are added, eight at a
time: a channel is read in long runs, and a sum is loaded and stored once per eight products.
Meanwhile the next eight channels, which may be anywhere, are prefetched.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from topkbench.kernels.addresses import bound_address, check_cache
from topkbench.kernels.compiled import entry_point
from topkbench.kernels.intrinsics import load_int64, store_float32, store_int64
from topkbench.kernels.rows import add_rows, prefetch_rows, scored_span

_BLOCK = 1024  # tokens in one piece of work: the sums of four queries are 16 KiB
_CHANNELS_AT_ONCE = 8


def channel_score(
    query: Tensor,
    channel_keys: Tensor,
    channels: Tensor,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
) -> Tensor:
    """Return ``[B, Hkv, G, n]`` float32; see the api."""
    is_bfloat16 = check_cache("channel_keys", channel_keys)
    query, channels = query.float().contiguous(), channels.long().contiguous()
    batch_size, num_heads, group, rank = query.shape
    num_slots = channel_keys.shape[3]
    out = torch.empty(batch_size, num_heads, group, num_slots)
    start, _start = bound_address(kv_start)
    end, _end = bound_address(kv_len)
    sizes = (batch_size, num_heads, group, num_slots, rank)
    tasks = batch_size * num_heads * -(-num_slots // _BLOCK)
    rows = torch.empty(tasks, rank, dtype=torch.int64)
    _score(
        query.data_ptr(), channel_keys.data_ptr(), channel_keys.stride()[:3], channels.data_ptr(),
        out.data_ptr(), rows.data_ptr(), sizes, start, end, is_bfloat16,
    )  # fmt: skip
    return out


@entry_point
def _score(
    query: int,
    keys: int,
    strides: tuple[int, int, int],
    channels: int,
    out: int,
    work: int,
    sizes: tuple[int, int, int, int, int],
    start: int,
    end: int,
    is_bfloat16: bool,
) -> None:
    batch_size, num_heads, group, num_slots, rank = sizes
    element_bytes = 2 if is_bfloat16 else 4
    num_blocks = (num_slots + _BLOCK - 1) // _BLOCK
    for task in prange(batch_size * num_heads * num_blocks):
        head_index = task // num_blocks
        batch, head = head_index // num_heads, head_index % num_heads
        first = task % num_blocks * _BLOCK
        last = min(first + _BLOCK, num_slots)
        scores = out + 4 * head_index * group * num_slots
        begin, finish = scored_span(scores, group, num_slots, batch, start, end, first, last)
        for g in range(group):
            for slot in range(begin, finish):
                store_float32(scores, g * num_slots + slot, np.float32(0.0))
        tokens = keys + element_bytes * (batch * strides[0] + head * strides[1] + begin)
        rows = work + 8 * task * rank
        for channel_index in range(rank):
            channel = load_int64(channels, head_index * rank + channel_index)
            store_int64(rows, channel_index, tokens + element_bytes * strides[2] * channel)
        size = finish - begin
        for channel_index in range(0, rank, _CHANNELS_AT_ONCE):
            count = min(_CHANNELS_AT_ONCE, rank - channel_index)
            num_prefetched = min(_CHANNELS_AT_ONCE, rank - channel_index - count)
            prefetch_rows(rows + 8 * (channel_index + count), num_prefetched, element_bytes * size)
            weights = query + 4 * (head_index * group * rank + channel_index)
            sums = scores + 4 * begin
            add_rows(
                sums, num_slots, weights, rank, rows + 8 * channel_index, count, size, group,
                is_bfloat16,
            )  # fmt: skip
