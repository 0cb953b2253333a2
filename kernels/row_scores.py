"""Dot products of all cached rows with the queries of their group, on a CPU.

They are all that ``lowrank_score`` and ``page_score`` compute. Each row is read once for all
queries of its group.
"""

import torch
from numba import prange
from torch import Tensor

from topkbench.kernels.addresses import bound_address
from topkbench.kernels.compiled import entry_point
from topkbench.kernels.rows import score_span, scored_span, span_work


def row_scores(
    query: Tensor,
    rows: Tensor,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
    block: int,
    low_query: Tensor | None = None,
    low_rows: Tensor | None = None,
) -> Tensor:
    """Return ``query @ rows``, plus ``low_query @ low_rows`` if these are given.

    Args:
        query: ``[B, Hkv, G, r]`` float32, contiguous.
        rows: ``[B, Hkv, n, r]`` float32 or bfloat16 with a contiguous last axis.
        kv_start: ``[B]`` int32 first valid row, or None for 0.
        kv_len: ``[B]`` int32 end of the valid rows, or None for ``n``.
        block: Rows per task: few enough to occupy all cores at batch size 1, many enough that
            scheduling takes no noticeable time.
        low_query: Like ``query``, or None.
        low_rows: Like ``rows`` and of its dtype, or None.

    Returns:
        ``[B, Hkv, G, n]`` float32; -inf outside the valid range.
    """
    batch_size, num_heads, num_slots, size = rows.shape
    group = query.shape[2]
    out = torch.empty(batch_size, num_heads, group, num_slots)
    start, _start = bound_address(kv_start)
    end, _end = bound_address(kv_len)
    low_queries, lows, low_strides = 0, 0, None
    if low_query is not None and low_rows is not None:
        low_queries, lows = low_query.data_ptr(), low_rows.data_ptr()
        low_strides = low_rows.stride()[:3]
    tasks = batch_size * num_heads * -(-num_slots // block)
    work = torch.empty(tasks * span_work(group), dtype=torch.uint8)
    _score(
        query.data_ptr(), rows.data_ptr(), rows.stride()[:3], low_queries, lows, low_strides,
        out.data_ptr(), work.data_ptr(), (batch_size, num_heads, group, num_slots, size), block,
        start, end, rows.dtype == torch.bfloat16,
    )  # fmt: skip
    return out


@entry_point
def _score(
    query: int,
    rows: int,
    strides: tuple[int, int, int],
    low_query: int,
    low_rows: int,
    low_strides: tuple[int, int, int] | None,
    out: int,
    work: int,
    sizes: tuple[int, int, int, int, int],
    block: int,
    start: int,
    end: int,
    narrow: bool,
) -> None:
    batch_size, num_heads, group, num_slots, size = sizes
    item = 2 if narrow else 4
    num_blocks = (num_slots + block - 1) // block
    for task in prange(batch_size * num_heads * num_blocks):
        head_index = task // num_blocks
        batch, head = head_index // num_heads, head_index % num_heads
        first = task % num_blocks * block
        last = min(first + block, num_slots)
        scores = out + 4 * head_index * group * num_slots
        begin, finish = scored_span(scores, group, num_slots, batch, start, end, first, last)
        queries = 4 * head_index * group * size
        products = (
            query + queries, rows + item * (batch * strides[0] + head * strides[1]),
            item * strides[2], begin, finish, size, group, narrow, scores, num_slots,
            work + task * span_work(group),
        )  # fmt: skip
        # Numba compiles one of these, for the type of `low_strides`: tested in the loop over the
        # rows instead, an absent second product would make the first slower by a quarter.
        if low_strides is None:
            score_span(*products)
        else:
            lows = low_rows + item * (batch * low_strides[0] + head * low_strides[1])
            score_span(*products, low_query + queries, lows, item * low_strides[2])
