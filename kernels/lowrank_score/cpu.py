"""lowrank_score on a CPU: each key is read once for all queries of its group."""

import torch
from numba import prange
from torch import Tensor

from topkbench.kernels.addresses import bound_address, check_cache
from topkbench.kernels.compiled import entry_point
from topkbench.kernels.rows import score_span, scored_span, span_work

# Tokens per task: few enough to occupy all cores at batch size 1, many enough that scheduling
# takes no noticeable time.
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
    tasks = batch_size * num_heads * -(-num_slots // _BLOCK)
    work = torch.empty(tasks * span_work(group), dtype=torch.uint8)
    _score(
        query.data_ptr(), keys.data_ptr(), keys.stride()[:3], out.data_ptr(),
        work.data_ptr(), sizes, start, end, narrow,
    )  # fmt: skip
    return out


@entry_point
def _score(
    query: int,
    keys: int,
    strides: tuple[int, int, int],
    out: int,
    work: int,
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
        last = min(first + _BLOCK, num_slots)
        scores = out + 4 * head_index * group * num_slots
        begin, finish = scored_span(scores, group, num_slots, batch, start, end, first, last)
        score_span(
            query + 4 * head_index * group * rank,
            keys + item * (batch * strides[0] + head * strides[1]),
            item * strides[2],
            begin,
            finish,
            rank,
            group,
            narrow,
            scores,
            num_slots,
            work + task * span_work(group),
        )
