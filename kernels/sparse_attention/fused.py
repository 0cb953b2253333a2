"""sparse_attention in Triton: split-K attention that gathers keys and values itself.

One program processes a part of an index head's selection. It reads keys and values in place, once
for all the queries that share them, which form one tile of at least 16 rows, and keeps a running
maximum, denominator and weighted sum (online softmax). A second kernel merges the parts by their
log-sum-exp. The selection, of the length in ``count``, is divided into parts on the device: the
host never knows the lengths.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topkbench.kernels.dispatch import MOST_CHANNELS
from topkbench.kernels.split_k import merge, store_part, tanh
from topkbench.kernels.tiles import (
    check_readable,
    on_device_of,
    padded,
    product_dtype,
    valid_range,
)

# Programs that occupy a large GPU: about four on each of its multiprocessors.
_PROGRAMS = 512
# Least number of tokens per part.
_PART = 128
_MOST_PARTS = 128


def sparse_attention(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    indices: Tensor,
    scale: float,
    count: Tensor | None,
    log_weight: Tensor | None,
    unit_size: int,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, Hq, dv]`` and the log-sum-exp ``[B, Hq]``; see the api."""
    check_readable("query_states", query_states)
    batch_size, num_heads, head_dim = query_states.shape
    widest = max(head_dim, value_states.shape[3])
    if widest > MOST_CHANNELS:
        raise ValueError(
            f"head_dim must be at most {MOST_CHANNELS} for impl='triton', got {widest};"
            " use impl='reference'."
        )
    _, num_kv_heads, num_slots, _ = key_states.shape
    _, num_index_heads, num_units = indices.shape
    device, rows = query_states.device, batch_size * num_index_heads
    value_dim = value_states.shape[3]
    out = query_states.new_empty(batch_size, num_heads, value_dim)
    lse = torch.empty(batch_size, num_heads, device=device)
    if out.numel() == 0:
        return out, lse
    group = num_heads // num_index_heads
    parts = _num_parts(rows, num_units * unit_size)
    # For each part: every query's weighted mean of the values, then their log-sum-exps.
    means = torch.empty(parts, batch_size, num_heads, value_dim, device=device)
    part_lse = torch.empty(parts, batch_size, num_heads, device=device)
    padded_dim = padded(head_dim)
    weight_strides = (0, 0, 0) if log_weight is None else log_weight.stride()
    with on_device_of(out):
        _attend_part[(parts, rows)](
            query_states.contiguous(), key_states, value_states, indices.contiguous(),
            None if count is None else count.contiguous(), log_weight, means, part_lse, kv_start,
            kv_len, float(scale), float(softcap or 0.0), *key_states.stride(),
            *value_states.stride(), *weight_strides, num_index_heads,
            num_index_heads // num_kv_heads, num_slots, num_units, rows * group,
            GROUP=group, HEAD_DIM=head_dim, VALUE_DIM=value_dim, UNIT=unit_size,
            SOFTCAP=softcap is not None, PADDED_GROUP=padded(group), PADDED_DIM=padded_dim,
            PADDED_VALUE_DIM=padded(value_dim), TILE=_tile(padded(widest), query_states.dtype),
            PRODUCT=product_dtype(query_states), num_warps=4, num_stages=3,
        )  # fmt: skip
        merge(means, part_lse, sinks, out, lse)
    return out, lse


def _num_parts(num_rows: int, num_tokens: int) -> int:
    """Return the number of parts of each selection, so that the GPU is occupied."""
    parts = -(-_PROGRAMS // num_rows)
    return max(1, min(parts, -(-num_tokens // _PART), _MOST_PARTS))


def _tile(padded_dim: int, dtype: torch.dtype) -> int:
    """Return how many tokens to read at a time: 16 KiB of keys and as much of values."""
    return max(16, min(128, 2**14 // (padded_dim * dtype.itemsize)))


@triton.jit(
    do_not_specialize=(
        "num_slots",
        "num_units",
        "num_queries",
        "weight_batch_stride",
        "weight_head_stride",
    )
)
def _attend_part(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    indices: tl.tensor,
    counts: tl.tensor,
    log_weights: tl.tensor,
    means: tl.tensor,
    lse: tl.tensor,
    kv_start: tl.tensor,
    kv_len: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    key_batch_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_slot_stride: tl.tensor,
    key_dim_stride: tl.tensor,
    value_batch_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_slot_stride: tl.tensor,
    value_dim_stride: tl.tensor,
    weight_batch_stride: tl.tensor,
    weight_head_stride: tl.tensor,
    weight_unit_stride: tl.tensor,
    num_index_heads: tl.tensor,
    index_heads_per_kv_head: tl.tensor,
    num_slots: tl.tensor,
    num_units: tl.tensor,
    num_queries: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    UNIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    TILE: tl.constexpr,
    PRODUCT: tl.constexpr,
) -> None:
    """Attend from the queries of one index head to one part of its selection."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, index_head = row // num_index_heads, row % num_index_heads
    kv_head = index_head // index_heads_per_kv_head
    start, end = valid_range(kv_start, kv_len, batch, num_slots)
    num_tokens = num_units * UNIT
    if counts is not None:
        num_tokens = tl.minimum(tl.maximum(tl.load(counts + row), 0), num_units) * UNIT
    # Whole tiles for every part.
    length = tl.cdiv(tl.cdiv(num_tokens, tl.num_programs(0)), TILE) * TILE
    first_token = part * length
    last_token = tl.minimum(first_token + length, num_tokens)

    query = tl.arange(0, PADDED_GROUP)
    dims, value_dims = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_VALUE_DIM)
    is_query, is_dim = query < GROUP, dims < HEAD_DIM
    query_tile = tl.load(
        queries + (row * GROUP + query[:, None]) * HEAD_DIM + dims[None, :],
        mask=is_query[:, None] & is_dim[None, :],
        other=0.0,
    ).to(PRODUCT)
    head_keys = keys + batch * key_batch_stride + kv_head * key_head_stride
    head_values = values + batch * value_batch_stride + kv_head * value_head_stride

    maximum = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    denominator = tl.zeros([PADDED_GROUP], tl.float32)
    sums = tl.zeros([PADDED_GROUP, PADDED_VALUE_DIM], tl.float32)
    for first in range(first_token, last_token, TILE):
        tokens = first + tl.arange(0, TILE)
        entries = tokens // UNIT
        is_token = tokens < last_token
        unit = tl.load(indices + row * num_units + entries, mask=is_token, other=0)
        slots = unit.to(tl.int64)
        if UNIT > 1:
            slots = slots * UNIT + start + tokens % UNIT
        kept = is_token & (unit >= 0) & (slots >= start) & (slots < end)
        is_read = kept[:, None] & is_dim[None, :]
        is_value = kept[:, None] & (value_dims < VALUE_DIM)[None, :]
        key_tile = tl.load(
            head_keys + slots[:, None] * key_slot_stride + dims[None, :] * key_dim_stride,
            mask=is_read,
            other=0.0,
        ).to(PRODUCT)
        value_tile = tl.load(
            head_values
            + slots[:, None] * value_slot_stride
            + value_dims[None, :] * value_dim_stride,
            mask=is_value,
            other=0.0,
        ).to(PRODUCT)

        logits = tl.dot(query_tile, tl.trans(key_tile), input_precision="ieee") * scale
        if SOFTCAP:
            logits = softcap * tanh(logits / softcap)
        if log_weights is not None:
            heads = index_head * GROUP + query
            logits += tl.load(
                log_weights
                + batch * weight_batch_stride
                + heads[:, None] * weight_head_stride
                + entries[None, :].to(tl.int64) * weight_unit_stride,
                mask=is_query[:, None] & kept[None, :],
                other=0.0,
            )
        logits = tl.where(kept[None, :], logits, float("-inf"))

        raised = tl.maximum(maximum, tl.max(logits, axis=1))
        # Until a token counts, the maximum is -inf, and subtracting it would give NaN.
        shift = tl.where(raised == float("-inf"), 0.0, raised)
        weights = tl.exp(logits - shift[:, None])
        shrink = tl.exp(maximum - shift)
        denominator = denominator * shrink + tl.sum(weights, axis=1)
        sums = sums * shrink[:, None]
        sums = tl.dot(weights.to(PRODUCT), value_tile, sums, input_precision="ieee")
        maximum = raised

    # Parts are ordered [part, B, Hq], which is [part, row, GROUP].
    place = part.to(tl.int64) * num_queries + row * GROUP + query
    store_part(means, lse, place, is_query, value_dims, maximum, denominator, sums, VALUE_DIM)
