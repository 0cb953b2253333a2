"""code_score on a CPU: one lookup per code fetches the products of four queries.

The tables are transposed so that a centroid's products with four queries are adjacent: a code is
read once for the four, and sixteen keys' sums stay in registers until they are transposed back.
"""

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from topkbench.kernels.addresses import bound_address, check_rows
from topkbench.kernels.compiled import entry_point
from topkbench.kernels.intrinsics import (
    LANES,
    load_float32,
    load_uint8,
    looked_up_sums,
    store_float32,
)
from topkbench.kernels.rows import scored_span

_BLOCK = 2048  # tokens per task
_QUERIES = 4


def code_score(
    tables: Tensor, key_codes: Tensor, kv_start: Tensor | None, kv_len: Tensor | None
) -> Tensor:
    """Return ``[B, Hkv, G, n]`` float32; see the api."""
    check_rows("key_codes", key_codes)
    tables = tables.contiguous()
    batch_size, num_heads, parts, group, count = tables.shape
    num_slots = key_codes.shape[2]
    out = torch.empty(batch_size, num_heads, group, num_slots)
    start, _start = bound_address(kv_start)
    end, _end = bound_address(kv_len)
    fours = -(-group // _QUERIES)
    # Written by the kernel; results of the queries that pad the last four are never stored.
    turned = torch.empty(batch_size * num_heads, fours, parts, count, _QUERIES)
    sizes = (batch_size, num_heads, parts, group, count, num_slots)
    _score(
        tables.data_ptr(), turned.data_ptr(), key_codes.data_ptr(), key_codes.stride()[:3],
        out.data_ptr(), sizes, start, end,
    )  # fmt: skip
    return out


@entry_point
def _score(
    tables: int,
    turned: int,
    codes: int,
    strides: tuple[int, int, int],
    out: int,
    sizes: tuple[int, int, int, int, int, int],
    start: int,
    end: int,
) -> None:
    batch_size, num_heads, parts, group, count, num_slots = sizes
    fours = (group + _QUERIES - 1) // _QUERIES
    four = parts * count * _QUERIES  # elements of the tables of four queries
    for head_index in prange(batch_size * num_heads):
        table = tables + 4 * head_index * parts * group * count
        _turn(table, turned + 4 * head_index * fours * four, parts, group, count)
    num_blocks = (num_slots + _BLOCK - 1) // _BLOCK
    for task in prange(batch_size * num_heads * num_blocks):
        head_index = task // num_blocks
        batch, head = head_index // num_heads, head_index % num_heads
        first = task % num_blocks * _BLOCK
        last = min(first + _BLOCK, num_slots)
        scores = out + 4 * head_index * group * num_slots
        begin, finish = scored_span(scores, group, num_slots, batch, start, end, first, last)
        keys = codes + batch * strides[0] + head * strides[1]
        whole = finish - (finish - begin) % LANES
        for g in range(0, group, _QUERIES):
            table = turned + 4 * (head_index * fours * four + g * parts * count)
            sums = scores + 4 * g * num_slots
            queries = min(_QUERIES, group - g)
            for slot in range(begin, whole, LANES):
                row = keys + slot * strides[2]
                looked_up_sums(
                    table, row, strides[2], parts, count, sums + 4 * slot, num_slots, queries
                )
            for slot in range(whole, finish):
                for q in range(queries):
                    total = np.float32(0.0)
                    for part in range(parts):
                        code = load_uint8(keys, slot * strides[2] + part)
                        total += load_float32(table, (part * count + code) * _QUERIES + q)
                    store_float32(sums, q * num_slots + slot, total)


@njit(nogil=True)
def _turn(table: int, turned: int, parts: int, group: int, count: int) -> None:
    """Write ``[parts, group, count]`` as ``[fours of queries, parts, count, 4]``."""
    for g in range(group):
        place = g // _QUERIES * parts * count * _QUERIES + g % _QUERIES
        for part in range(parts):
            for code in range(count):
                product = load_float32(table, (part * group + g) * count + code)
                store_float32(turned, place + (part * count + code) * _QUERIES, product)
