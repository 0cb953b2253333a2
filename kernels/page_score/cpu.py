"""page_score on a CPU.

``max(q * low, q * high)`` is ``q * high`` for a positive ``q`` and ``q * low`` for a negative one,
so the bound is two dot products: the positive part of the query with the maxima and the negative
part with the minima.
"""

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from topkbench.kernels.addresses import bound_address, check_cache
from topkbench.kernels.intrinsics import store_float32
from topkbench.kernels.rows import clipped, dot_1, dot_2, dot_4

# Pages in one piece of work.
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
    _score(
        above.data_ptr(), below.data_ptr(), page_min.data_ptr(), page_min.stride()[:3],
        page_max.data_ptr(), page_max.stride()[:3], out.data_ptr(), sizes, start, end, narrow,
    )  # fmt: skip
    return out


@njit(parallel=True, cache=True, nogil=True)
def _score(
    above: int,
    below: int,
    page_min: int,
    min_strides: tuple[int, int, int],
    page_max: int,
    max_strides: tuple[int, int, int],
    out: int,
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
        first_valid = clipped(start, batch, num_pages, 0)
        end_valid = clipped(end, batch, num_pages, num_pages)
        for page in range(first, min(first + _BLOCK, num_pages)):
            if page < first_valid or page >= end_valid:
                for g in range(group):
                    store_float32(scores, g * num_pages + page, -np.inf)
            else:
                _score_page(
                    above + queries,
                    below + queries,
                    low + item * page * min_strides[2],
                    high + item * page * max_strides[2],
                    scores + 4 * page,
                    group,
                    num_pages,
                    head_dim,
                    narrow,
                )


@njit(nogil=True)
def _score_page(
    above: int,
    below: int,
    low: int,
    high: int,
    out: int,
    group: int,
    out_stride: int,
    size: int,
    narrow: bool,
) -> None:
    """Bound one page for all queries of its group."""
    g = 0
    while g + 4 <= group:
        skip = 4 * g * size
        high0, high1, high2, high3 = dot_4(above + skip, size, high, size, narrow)
        low0, low1, low2, low3 = dot_4(below + skip, size, low, size, narrow)
        store_float32(out, g * out_stride, high0 + low0)
        store_float32(out, (g + 1) * out_stride, high1 + low1)
        store_float32(out, (g + 2) * out_stride, high2 + low2)
        store_float32(out, (g + 3) * out_stride, high3 + low3)
        g += 4
    if g + 2 <= group:
        skip = 4 * g * size
        high0, high1 = dot_2(above + skip, size, high, size, narrow)
        low0, low1 = dot_2(below + skip, size, low, size, narrow)
        store_float32(out, g * out_stride, high0 + low0)
        store_float32(out, (g + 1) * out_stride, high1 + low1)
        g += 2
    if g < group:
        skip = 4 * g * size
        bound = dot_1(above + skip, high, size, narrow) + dot_1(below + skip, low, size, narrow)
        store_float32(out, g * out_stride, bound)
