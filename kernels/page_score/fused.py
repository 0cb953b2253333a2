"""page_score in Triton.

``max(q * low, q * high)`` is ``q * high`` for a positive ``q`` and ``q * low`` for a negative one,
so the bound is two matrix products: of the queries' positive parts with the pages' maxima and of
their negative parts with the minima. The queries of a group share one tile, so a page is read once.
"""

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

# Pages per matrix product, and channels: for 16-bit numbers, in the matrix units; for float32,
# which are kept in registers and would not all fit.
_PAGES, _CHANNELS, _FLOAT32_CHANNELS = 64, 128, 32


def page_score(
    query_states: Tensor,
    page_min: Tensor,
    page_max: Tensor,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
    sum_group: bool,
) -> Tensor:
    """Return ``[B, Hkv, G, P]`` float32, or ``[B, Hkv, P]``; see the api."""
    for argument, tensor in (
        ("query_states", query_states),
        ("page_min", page_min),
        ("page_max", page_max),
    ):
        check_readable(argument, tensor)
    batch_size, num_heads, num_pages, head_dim = page_min.shape
    group = query_states.shape[2]
    out = torch.empty(batch_size, num_heads, group, num_pages, device=page_min.device)
    if out.numel() == 0:
        return out.sum(2) if sum_group else out
    product = product_dtype(query_states, page_min, page_max)
    channels = _FLOAT32_CHANNELS if product == tl.float32 else _CHANNELS
    with on_device_of(out):
        _score[(triton.cdiv(num_pages, _PAGES), batch_size * num_heads)](
            query_states.contiguous(), page_min, page_max, out, kv_start, kv_len,
            *page_min.stride(), *page_max.stride(), num_heads, num_pages,
            GROUP=group, HEAD_DIM=head_dim, PADDED_GROUP=padded(group), PAGES=_PAGES,
            CHANNELS=min(channels, padded(head_dim)), PRODUCT=product,
        )  # fmt: skip
    return out.sum(2) if sum_group else out


@triton.jit(do_not_specialize=["num_pages"])
def _score(
    queries: tl.tensor,
    page_min: tl.tensor,
    page_max: tl.tensor,
    out: tl.tensor,
    kv_start: tl.tensor,
    kv_len: tl.tensor,
    min_batch_stride: tl.tensor,
    min_head_stride: tl.tensor,
    min_page_stride: tl.tensor,
    min_dim_stride: tl.tensor,
    max_batch_stride: tl.tensor,
    max_head_stride: tl.tensor,
    max_page_stride: tl.tensor,
    max_dim_stride: tl.tensor,
    num_heads: tl.tensor,
    num_pages: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PAGES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRODUCT: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // num_heads, row % num_heads
    start, end = valid_range(kv_start, kv_len, batch, num_pages)
    pages = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    valid = (pages >= start) & (pages < end)
    offsets = pages.to(tl.int64)
    query = tl.arange(0, PADDED_GROUP)
    low = page_min + batch * min_batch_stride + head * min_head_stride
    high = page_max + batch * max_batch_stride + head * max_head_stride
    bounds = tl.zeros([PADDED_GROUP, PAGES], tl.float32)
    for first in tl.static_range(0, HEAD_DIM, CHANNELS):
        dims = first + tl.arange(0, CHANNELS)
        is_read = valid[:, None] & (dims < HEAD_DIM)[None, :]
        minima = tl.load(
            low + offsets[:, None] * min_page_stride + dims[None, :] * min_dim_stride,
            mask=is_read,
            other=0.0,
        ).to(PRODUCT)
        maxima = tl.load(
            high + offsets[:, None] * max_page_stride + dims[None, :] * max_dim_stride,
            mask=is_read,
            other=0.0,
        ).to(PRODUCT)
        states = tl.load(
            queries + (row * GROUP + query[:, None]) * HEAD_DIM + dims[None, :],
            mask=(query < GROUP)[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        ).to(PRODUCT)
        positive = tl.where(states > 0, states, 0.0).to(PRODUCT)
        negative = tl.where(states < 0, states, 0.0).to(PRODUCT)
        bounds = tl.dot(positive, tl.trans(maxima), bounds, input_precision="ieee")
        bounds = tl.dot(negative, tl.trans(minima), bounds, input_precision="ieee")
    tl.store(
        out + (row * GROUP + query[:, None]) * num_pages + offsets[None, :],
        tl.where(valid[None, :], bounds, float("-inf")),
        mask=(query < GROUP)[:, None] & (pages < num_pages)[None, :],
    )
