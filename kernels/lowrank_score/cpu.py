"""lowrank_score on a CPU: each key is read once for all queries of its group."""

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from topkbench.kernels.addresses import bound_address, check_cache
from topkbench.kernels.intrinsics import store_float32
from topkbench.kernels.rows import clipped, dot_1, dot_2, dot_4

# Tokens in one piece of work: small enough to occupy all cores at batch 1, large enough that
# handing it out costs nothing.
_BLOCK = 512


def lowrank_score(
    query: Tensor, keys: Tensor, kv_start: Tensor | None, kv_len: Tensor | None
) -> Tensor:
    """Return ``[B, Hkv, G, n]`` float32; see the api."""
    narrow = check_cache("keys", keys)
    query = query.float().contiguous()
    batch_size, num_heads, num_slots, rank = keys.shape
    group = query.shape[2]
    out = torch.empty(batch_size, num_heads, group, num_slots)
    start, _start = bound_address(kv_start)
    end, _end = bound_address(kv_len)
    sizes = (batch_size, num_heads, group, num_slots, rank)
    _score(
        query.data_ptr(), keys.data_ptr(), keys.stride()[:3], out.data_ptr(), sizes,
        start, end, narrow,
    )  # fmt: skip
    return out


@njit(parallel=True, cache=True, nogil=True)
def _score(
    query: int,
    keys: int,
    strides: tuple[int, int, int],
    out: int,
    sizes: tuple[int, int, int, int, int],
    start: int,
    end: int,
    narrow: bool,
) -> None:
    batch_size, num_heads, group, num_slots, rank = sizes
    item = 2 if narrow else 4
    num_blocks = (num_slots + _BLOCK - 1) // _BLOCK
    for task in prange(batch_size * num_heads * num_blocks):
        head_index = task // num_blocks
        batch, head = head_index // num_heads, head_index % num_heads
        first = task % num_blocks * _BLOCK
        base = keys + item * (batch * strides[0] + head * strides[1])
        _score_block(
            query + 4 * head_index * group * rank,
            base,
            item * strides[2],
            out + 4 * head_index * group * num_slots,
            group,
            num_slots,
            rank,
            first,
            min(first + _BLOCK, num_slots),
            clipped(start, batch, num_slots, 0),
            clipped(end, batch, num_slots, num_slots),
            narrow,
        )


@njit(nogil=True)
def _score_block(
    query: int,
    keys: int,
    key_bytes: int,
    out: int,
    group: int,
    num_slots: int,
    rank: int,
    first: int,
    last: int,
    start: int,
    end: int,
    narrow: bool,
) -> None:
    """Score the slots ``first`` to ``last`` of one head."""
    for slot in range(first, last):
        if slot < start or slot >= end:
            for g in range(group):
                store_float32(out, g * num_slots + slot, -np.inf)
            continue
        row = keys + slot * key_bytes
        g = 0
        while g + 4 <= group:
            dot0, dot1, dot2, dot3 = dot_4(query + 4 * g * rank, rank, row, rank, narrow)
            store_float32(out, g * num_slots + slot, dot0)
            store_float32(out, (g + 1) * num_slots + slot, dot1)
            store_float32(out, (g + 2) * num_slots + slot, dot2)
            store_float32(out, (g + 3) * num_slots + slot, dot3)
            g += 4
        if g + 2 <= group:
            dot0, dot1 = dot_2(query + 4 * g * rank, rank, row, rank, narrow)
            store_float32(out, g * num_slots + slot, dot0)
            store_float32(out, (g + 1) * num_slots + slot, dot1)
            g += 2
        if g < group:
            store_float32(out, g * num_slots + slot, dot_1(query + 4 * g * rank, row, rank, narrow))
