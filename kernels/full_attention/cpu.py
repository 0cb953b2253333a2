"""full_attention on a CPU: one fused pass over all cached rows.

Work is split over KV heads and parts of the context, so that all cores have equal shares. Rows are
read in place, in order, once for all queries of their group. Each part keeps a running maximum,
denominator and weighted sum (online softmax); parts are merged by their log-sum-exp.
"""

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from topkbench.kernels.addresses import bound_address, check_cache
from topkbench.kernels.compiled import entry_point
from topkbench.kernels.dispatch import set_threads
from topkbench.kernels.intrinsics import LANES, store_int64
from topkbench.kernels.online_softmax import empty_part, merge, num_parts, soften
from topkbench.kernels.rows import add_rows, clipped, score_rows, widen

# Tokens whose logits are computed before they enter the sum; their values stay in the first cache.
_TILE = 32
# Least number of tokens per part.
_PART = 256


def full_attention(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    scale: float,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return ``[B, Hq, dv]``; see the api."""
    set_threads()
    narrow = check_cache("key_states", key_states)
    check_cache("value_states", value_states)
    query = query_states.contiguous()
    batch_size, num_heads, head_dim = query.shape
    _, num_kv_heads, num_slots, value_dim = value_states.shape
    group = num_heads // num_kv_heads
    parts = num_parts(batch_size * num_kv_heads, num_slots, _PART)
    out = torch.empty(batch_size, num_heads, value_dim, dtype=query.dtype)
    # For each part: sums, maxima, denominators, a tile's logits, the addresses of its rows (keys of
    # two tiles), and the queries as float32.
    part_size = group * (value_dim + head_dim + 2 + _TILE) + 2 * 3 * _TILE
    part_size += part_size % 2
    work = torch.empty(batch_size * num_kv_heads * parts, part_size)
    lse = torch.empty(batch_size, num_heads)
    start, _start = bound_address(kv_start)
    end, _end = bound_address(kv_len)
    sink_logits, _sinks = bound_address(None if sinks is None else sinks.float())
    _attend(
        query.data_ptr(), key_states.data_ptr(), key_states.stride()[:3],
        value_states.data_ptr(), value_states.stride()[:3], sink_logits, out.data_ptr(),
        lse.data_ptr(), work.data_ptr(), part_size,
        (batch_size, num_heads, num_kv_heads, num_slots, head_dim, value_dim), parts,
        float(scale), float(softcap or 0.0), start, end, narrow,
    )  # fmt: skip
    return out


@entry_point
def _attend(
    query: int,
    keys: int,
    key_strides: tuple[int, int, int],
    values: int,
    value_strides: tuple[int, int, int],
    sinks: int,
    out: int,
    lse: int,
    work: int,
    part_size: int,
    sizes: tuple[int, int, int, int, int, int],
    parts: int,
    scale: float,
    softcap: float,
    start: int,
    end: int,
    narrow: bool,
) -> None:
    batch_size, num_heads, num_kv_heads, num_slots, head_dim, value_dim = sizes
    item = 2 if narrow else 4
    group = num_heads // num_kv_heads
    num_tasks = batch_size * num_kv_heads
    for task in prange(num_tasks * parts):
        row, part = task // parts, task % parts
        batch, head = row // num_kv_heads, row % num_kv_heads
        begin = clipped(start, batch, num_slots, 0)
        finish = max(clipped(end, batch, num_slots, num_slots), begin)
        own = work + 4 * task * part_size
        _attend_part(
            query + item * row * group * head_dim,
            keys + item * (batch * key_strides[0] + head * key_strides[1]),
            item * key_strides[2],
            values + item * (batch * value_strides[0] + head * value_strides[1]),
            item * value_strides[2],
            own,
            begin + part * (finish - begin) // parts,
            begin + (part + 1) * (finish - begin) // parts,
            group,
            head_dim,
            value_dim,
            np.float32(scale),
            np.float32(softcap),
            narrow,
        )
        if parts == 1:
            head_sinks = 0 if sinks == 0 else sinks + 4 * head * group
            merge(
                own, part_size, 1, head_sinks, out + item * row * group * value_dim,
                lse + 4 * row * group, group, value_dim, narrow,
            )  # fmt: skip
    if parts > 1:
        for row in range(num_tasks):
            head_sinks = 0 if sinks == 0 else sinks + 4 * (row % num_kv_heads) * group
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
    work: int,
    first_slot: int,
    last_slot: int,
    group: int,
    head_dim: int,
    value_dim: int,
    scale: float,
    softcap: float,
    narrow: bool,
) -> None:
    """Sum up neighbouring slots of one KV head into ``work``."""
    maxima = work + 4 * group * value_dim
    denominators = maxima + 4 * group
    logits = denominators + 4 * group
    key_rows = logits + 4 * group * _TILE
    value_rows = key_rows + 2 * 8 * _TILE
    wide = value_rows + 8 * _TILE
    if narrow:
        query = widen(query, group * head_dim, wide)
    empty_part(work, group, value_dim)
    if first_slot >= last_slot:
        return
    _fill_rows(key_rows, keys, key_bytes, first_slot, last_slot)
    for place in range(first_slot, last_slot, _TILE):
        filled = min(_TILE, last_slot - place)
        half = (place - first_slot) // _TILE % 2 * 8 * _TILE
        now, later = key_rows + half, 0
        _fill_rows(value_rows, values, value_bytes, place, last_slot)
        if place + _TILE < last_slot:
            later = key_rows + (8 * _TILE - half)
            _fill_rows(later, keys, key_bytes, place + _TILE, last_slot)
        # A tile's values and the next tile's keys are prefetched while its keys are scored: the
        # hardware's prefetchers end at each page.
        for first in range(0, filled, LANES):
            score_rows(
                query, now + 8 * first, head_dim, group, narrow, logits + 4 * first, _TILE, 0, 0,
                value_rows + 8 * first, 0,
            )  # fmt: skip
        for g in range(group):
            soften(
                logits + 4 * g * _TILE, filled, maxima + 4 * g, denominators + 4 * g,
                work + 4 * g * value_dim, value_dim, scale, softcap, 0, 0,
            )  # fmt: skip
        add_rows(
            work, value_dim, logits, _TILE, value_rows, filled, value_dim, group, narrow, later
        )  # fmt: skip


@njit(nogil=True)
def _fill_rows(rows: int, states: int, row_bytes: int, place: int, last: int) -> None:
    """Write the addresses of a tile's rows; after the last slot its row is repeated."""
    for lane in range(_TILE):
        store_int64(rows, lane, states + row_bytes * min(place + lane, last - 1))
