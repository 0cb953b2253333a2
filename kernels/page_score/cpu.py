"""page_score on a CPU.

``max(q * low, q * high)`` is ``q * high`` for a positive ``q`` and ``q * low`` for a negative one,
so the bound is two dot products: the positive part of the query with the maxima and the negative
part with the minima.
"""

import torch
from numba import prange
from torch import Tensor

from topkbench.kernels.addresses import bound_address, check_cache
from topkbench.kernels.compiled import entry_point
from topkbench.kernels.rows import score_span, scored_span, span_work

# Pages per task.
_BLOCK = 256


def page_score(
    query_states: Tensor,
    page_min: Tensor,
    page_max: Tensor,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
) -> Tensor:
    """Return ``[B, Hkv, G, P]`` float32; see the api."""
    narrow = check_cache("page_min", page_min)
    if check_cache("page_max", page_max) != narrow:
        raise TypeError(
            f"page_max must have page_min's dtype {page_min.dtype}, got {page_max.dtype}."
        )
    query = query_states.float().contiguous()
    above, below = query.clamp(min=0.0), query.clamp(max=0.0)
    batch_size, num_heads, num_pages, head_dim = page_min.shape
    group = query.shape[2]
    out = torch.empty(batch_size, num_heads, group, num_pages)
    start, _start = bound_address(kv_start)
    end, _end = bound_address(kv_len)
    sizes = (batch_size, num_heads, group, num_pages, head_dim)
    tasks = batch_size * num_heads * -(-num_pages // _BLOCK)
    work = torch.empty(tasks * span_work(group), dtype=torch.uint8)
    _score(
        above.data_ptr(), below.data_ptr(), page_min.data_ptr(), page_min.stride()[:3],
        page_max.data_ptr(), page_max.stride()[:3], out.data_ptr(), work.data_ptr(), sizes, start,
        end, narrow,
    )  # fmt: skip
    return out


@entry_point
def _score(
    above: int,
    below: int,
    page_min: int,
    min_strides: tuple[int, int, int],
    page_max: int,
    max_strides: tuple[int, int, int],
    out: int,
    work: int,
    sizes: tuple[int, int, int, int, int],
    start: int,
    end: int,
    narrow: bool,
) -> None:
    batch_size, num_heads, group, num_pages, head_dim = sizes
    item = 2 if narrow else 4
    num_blocks = (num_pages + _BLOCK - 1) // _BLOCK
    for task in prange(batch_size * num_heads * num_blocks):
        head_index = task // num_blocks
        batch, head = head_index // num_heads, head_index % num_heads
        first = task % num_blocks * _BLOCK
        queries = 4 * head_index * group * head_dim
        low = page_min + item * (batch * min_strides[0] + head * min_strides[1])
        high = page_max + item * (batch * max_strides[0] + head * max_strides[1])
        scores = out + 4 * head_index * group * num_pages
        last = min(first + _BLOCK, num_pages)
        begin, finish = scored_span(scores, group, num_pages, batch, start, end, first, last)
        score_span(
            above + queries,
            high,
            item * max_strides[2],
            begin,
            finish,
            head_dim,
            group,
            narrow,
            scores,
            num_pages,
            work + task * span_work(group),
            below + queries,
            low,
            item * min_strides[2],
        )
