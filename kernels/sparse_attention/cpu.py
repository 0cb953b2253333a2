"""sparse_attention on a CPU: one fused pass over the selected rows of the cache.

Work is split over index heads and, if these do not occupy all cores, over parts of a head's
selection. Each part keeps a running maximum, denominator and weighted sum (online softmax); parts
are merged by their log-sum-exp. Rows are read in place, once for all queries that share them, and
the next ones are prefetched, since no hardware prefetcher can follow the selection.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from topkbench.kernels.addresses import bound_address, check_cache
from topkbench.kernels.compiled import entry_point
from topkbench.kernels.intrinsics import (
    LANES,
    load_int32,
    store_int32,
    store_int64,
)
from topkbench.kernels.online_softmax import empty_part, merge, num_parts, soften
from topkbench.kernels.rows import add_rows, clipped, score_rows, widen

# Tokens whose logits are computed before they enter the sum; their values stay in the first cache.
_TILE = 32
# Least number of tokens per part.
_PART = 128


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
    narrow = check_cache("key_states", key_states)
    check_cache("value_states", value_states)
    query = query_states.contiguous()
    indices = indices.contiguous()
    batch_size, num_heads, head_dim = query.shape
    _, num_kv_heads, num_slots, value_dim = value_states.shape
    _, num_index_heads, num_units = indices.shape
    group = num_heads // num_index_heads
    parts = num_parts(batch_size * num_index_heads, num_units * unit_size, _PART)

    out = torch.empty(batch_size, num_heads, value_dim, dtype=query.dtype)
    lse = torch.empty(batch_size, num_heads)
    # For each part: sums, maxima, denominators, a tile's logits and the addresses of its rows (keys
    # of two tiles), the queries as float32, then the tokens' slots and entries.
    tokens = -(-num_units // parts) * unit_size
    part_size = group * (value_dim + head_dim + 2 + _TILE) + 2 * 3 * _TILE + 2 * tokens
    part_size += part_size % 2
    work = torch.empty(batch_size * num_index_heads * parts, part_size)
    start, _start = bound_address(kv_start)
    end, _end = bound_address(kv_len)
    counts, _counts = bound_address(count)
    weights, _weights = bound_address(log_weight)
    sink_logits, _sinks = bound_address(None if sinks is None else sinks.float())
    sizes = (
        batch_size, num_heads, num_kv_heads, num_index_heads, num_slots, head_dim, value_dim,
    )  # fmt: skip
    _attend(
        query.data_ptr(), key_states.data_ptr(), key_states.stride()[:3],
        value_states.data_ptr(), value_states.stride()[:3], indices.data_ptr(), counts, weights,
        sink_logits, out.data_ptr(), lse.data_ptr(), work.data_ptr(), part_size, sizes, num_units,
        unit_size, parts, float(scale), float(softcap or 0.0), start, end, narrow,
    )  # fmt: skip
    return out, lse


@entry_point
def _attend(
    query: int,
    keys: int,
    key_strides: tuple[int, int, int],
    values: int,
    value_strides: tuple[int, int, int],
    indices: int,
    counts: int,
    weights: int,
    sinks: int,
    out: int,
    lse: int,
    work: int,
    part_size: int,
    sizes: tuple[int, int, int, int, int, int, int],
    num_units: int,
    unit_size: int,
    parts: int,
    scale: float,
    softcap: float,
    start: int,
    end: int,
    narrow: bool,
) -> None:
    batch_size, num_heads, num_kv_heads, num_index_heads, num_slots, head_dim, value_dim = sizes
    item = 2 if narrow else 4
    group = num_heads // num_index_heads
    num_tasks = batch_size * num_index_heads
    for task in prange(num_tasks * parts):
        row, part = task // parts, task % parts
        batch, index_head = row // num_index_heads, row % num_index_heads
        kv_head = index_head * num_kv_heads // num_index_heads
        used = clipped(counts, row, num_units, num_units)
        weight_rows = 0 if weights == 0 else weights + 4 * row * group * num_units
        head_sinks = 0 if sinks == 0 else sinks + 4 * index_head * group
        _attend_part(
            query + item * row * group * head_dim,
            keys + item * (batch * key_strides[0] + kv_head * key_strides[1]),
            item * key_strides[2],
            values + item * (batch * value_strides[0] + kv_head * value_strides[1]),
            item * value_strides[2],
            indices + 4 * row * num_units,
            weight_rows,
            work + 4 * task * part_size,
            part * used // parts,
            (part + 1) * used // parts,
            num_units,
            unit_size,
            clipped(start, batch, num_slots, 0),
            clipped(end, batch, num_slots, num_slots),
            group,
            head_dim,
            value_dim,
            np.float32(scale),
            np.float32(softcap),
            narrow,
        )
        if parts == 1:
            merge(
                work + 4 * task * part_size, part_size, 1, head_sinks,
                out + item * row * group * value_dim, lse + 4 * row * group, group, value_dim,
                narrow,
            )  # fmt: skip
    if parts > 1:
        for row in range(num_tasks):
            head_sinks = 0 if sinks == 0 else sinks + 4 * (row % num_index_heads) * group
            merge(
                work + 4 * row * parts * part_size, part_size, parts, head_sinks,
                out + item * row * group * value_dim, lse + 4 * row * group, group, value_dim,
                narrow,
            )  # fmt: skip


@njit(nogil=True)
def _attend_part(
    query: int,
    keys: int,
    key_bytes: int,
    values: int,
    value_bytes: int,
    indices: int,
    weights: int,
    work: int,
    first_unit: int,
    last_unit: int,
    num_units: int,
    unit_size: int,
    start: int,
    end: int,
    group: int,
    head_dim: int,
    value_dim: int,
    scale: float,
    softcap: float,
    narrow: bool,
) -> None:
    """Sum up some units of one index head into ``work``."""
    maxima = work + 4 * group * value_dim
    denominators = maxima + 4 * group
    logits = denominators + 4 * group
    key_rows = logits + 4 * group * _TILE
    value_rows = key_rows + 2 * 8 * _TILE
    wide = value_rows + 8 * _TILE
    if narrow:
        query = widen(query, group * head_dim, wide)
    slots = wide + 4 * group * head_dim
    entries = slots + 4 * (last_unit - first_unit) * unit_size
    empty_part(work, group, value_dim)
    origin = start if unit_size > 1 else 0
    tokens = 0
    for entry in range(first_unit, last_unit):
        unit = np.int64(load_int32(indices, entry))
        if unit < 0:
            continue
        first: Any = unit * unit_size + origin
        last: Any = min(first + unit_size, end)
        for slot in range(max(first, start), last):
            store_int32(slots, tokens, np.int32(slot))
            if weights != 0:
                store_int32(entries, tokens, np.int32(entry))
            tokens += 1
    _fill_rows(key_rows, keys, key_bytes, slots, 0, tokens)
    for place in range(0, tokens, _TILE):
        filled = min(_TILE, tokens - place)
        half = place // _TILE % 2 * 8 * _TILE
        now, later = key_rows + half, 0
        _fill_rows(value_rows, values, value_bytes, slots, place, tokens)
        if place + _TILE < tokens:
            later = key_rows + (8 * _TILE - half)
            _fill_rows(later, keys, key_bytes, slots, place + _TILE, tokens)
        # No hardware prefetcher can follow the selection: a tile's values and the next tile's keys
        # are prefetched while its keys are scored.
        for first in range(0, filled, LANES):
            score_rows(
                query, now + 8 * first, head_dim, group, narrow, logits + 4 * first, _TILE, 0, 0,
                value_rows + 8 * first, 0 if later == 0 else later + 8 * first,
            )  # fmt: skip
        for g in range(group):
            soften(
                logits + 4 * g * _TILE, filled, maxima + 4 * g, denominators + 4 * g,
                work + 4 * g * value_dim, value_dim, scale, softcap,
                0 if weights == 0 else weights + 4 * g * num_units, entries + 4 * place,
            )  # fmt: skip
        add_rows(work, value_dim, logits, _TILE, value_rows, filled, value_dim, group, narrow)


@njit(nogil=True)
def _fill_rows(rows: int, states: int, row_bytes: int, slots: int, place: int, tokens: int) -> None:
    """Write the addresses of a tile's rows; after the last token its row is repeated."""
    for lane in range(_TILE):
        slot = np.int64(load_int32(slots, min(place + lane, tokens - 1)))
        store_int64(rows, lane, states + row_bytes * slot)
