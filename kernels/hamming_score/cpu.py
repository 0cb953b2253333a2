"""hamming_score on a CPU, by majority codes and bit planes.

If ``c`` of a group's ``G`` queries have a bit set, a key's bit adds ``G - c`` to the distance if it
is set and ``c`` if not. That is ``min(c, G - c)`` in either case, plus ``|G - 2c|`` if the key's
bit differs from the majority's. So

    sum_g ham_g = base + sum_j 2^j * popcount((key ^ majority) & plane_j) * (1 if G is odd else 2)

where ``plane_j`` holds the j-th binary digit of the weights ``|G - 2c|`` (halved if ``G`` is even,
since they are then even). Four queries take two popcounts per word instead of four, eight take
three.
"""

from collections.abc import Callable

import numpy as np
import torch
from numba import config, get_thread_id, njit, prange
from torch import Tensor

from topkbench.kernels.addresses import bound_address, check_rows
from topkbench.kernels.compiled import entry_point
from topkbench.kernels.intrinsics import (
    KEYS,
    load_float32,
    load_int32,
    load_int64,
    popcount,
    store_float32,
    store_int16,
    store_int32,
    weighed_distances,
)
from topkbench.kernels.rows import clipped
from topkbench.kernels.shapes import count_dtype

# Tokens per task: the scores of a block stay in the first-level cache until they are narrowed, or
# weighted by the norms.
_BLOCK = 4096


def hamming_score(
    query_codes: Tensor,
    key_codes: Tensor,
    key_norms: Tensor | None,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
) -> Tensor:
    """Return ``[B, Hkv, n]`` int16 or int32, or float32 with norms; see the api."""
    check_rows("key_codes", key_codes)
    query_codes = query_codes.contiguous()
    batch_size, num_heads, num_slots, words = key_codes.shape
    group = query_codes.shape[2]
    dtype = count_dtype(group, words) if key_norms is None else torch.float32
    out = torch.empty(batch_size, num_heads, num_slots, dtype=dtype)
    threads: int = vars(config)["NUMBA_NUM_THREADS"]
    blocks = torch.empty(threads, _BLOCK, dtype=torch.int32)
    start, _start = bound_address(kv_start)
    end, _end = bound_address(kv_len)
    norms, norm_strides = 0, key_codes.stride()[:3]
    if key_norms is not None:
        norms, norm_strides = key_norms.data_ptr(), key_norms.stride()
    num_planes = (group if group % 2 else group // 2).bit_length()
    # The base, majority code and planes of each head, written by the kernel.
    tables = torch.empty(batch_size * num_heads, 2 + words * (1 + num_planes), dtype=torch.int32)
    sizes = (batch_size, num_heads, group, num_slots, words, num_planes)
    _score(
        query_codes.data_ptr(), key_codes.data_ptr(), key_codes.stride()[:3], norms, norm_strides,
        tables.data_ptr(), blocks.data_ptr(), out.data_ptr(), dtype.itemsize, sizes, start, end,
    )  # fmt: skip
    return out


@entry_point
def _score(
    queries: int,
    keys: int,
    strides: tuple[int, int, int],
    norms: int,
    norm_strides: tuple[int, int, int],
    tables: int,
    blocks: int,
    out: int,
    item: int,
    sizes: tuple[int, int, int, int, int, int],
    start: int,
    end: int,
) -> None:
    batch_size, num_heads, group, num_slots, words, num_planes = sizes
    table_bytes = 4 * (2 + words * (1 + num_planes))
    for head_index in range(batch_size * num_heads):
        codes = queries + 4 * head_index * group * words
        _fill_table(codes, tables + head_index * table_bytes, group, words, num_planes)
    num_blocks = (num_slots + _BLOCK - 1) // _BLOCK
    for task in prange(batch_size * num_heads * num_blocks):
        head_index = task // num_blocks
        batch, head = head_index // num_heads, head_index % num_heads
        first = task % num_blocks * _BLOCK
        last = min(first + _BLOCK, num_slots)
        begin = min(max(first, clipped(start, batch, num_slots, 0)), last)
        finish = max(min(last, clipped(end, batch, num_slots, num_slots)), begin)
        counts = blocks + 4 * _BLOCK * get_thread_id()
        _score_block(
            keys + 4 * (batch * strides[0] + head * strides[1] + begin * strides[2]),
            strides[2],
            tables + head_index * table_bytes,
            counts,
            finish - begin,
            group,
            words,
            num_planes,
        )
        scores = out + item * head_index * num_slots
        if norms != 0:
            rbit = np.float32(32 * words)
            row = norms + 4 * (batch * norm_strides[0] + head * norm_strides[1])
            for slot in range(begin, finish):
                share = np.float32(load_int32(counts, slot - begin)) / rbit
                store_float32(scores, slot, share * load_float32(row, slot * norm_strides[2]))
            for slot in range(first, begin):
                store_float32(scores, slot, -np.inf)
            for slot in range(finish, last):
                store_float32(scores, slot, -np.inf)
        elif item == 2:
            for slot in range(begin, finish):
                store_int16(scores, slot, np.int16(load_int32(counts, slot - begin)))
            for slot in range(first, begin):
                store_int16(scores, slot, np.int16(-(2**15)))
            for slot in range(finish, last):
                store_int16(scores, slot, np.int16(-(2**15)))
        else:
            for slot in range(begin, finish):
                store_int32(scores, slot, load_int32(counts, slot - begin))
            for slot in range(first, begin):
                store_int32(scores, slot, np.int32(-(2**31)))
            for slot in range(finish, last):
                store_int32(scores, slot, np.int32(-(2**31)))


@njit(nogil=True)
def _fill_table(codes: int, table: int, group: int, words: int, num_planes: int) -> None:
    """Write a head's base, majority code and bit planes: ``[base, -, majority, plane_0, ...]``."""
    base = 0
    for word in range(words):
        for item in range(1 + num_planes):
            store_int32(table, 2 + item * words + word, 0)
        for bit in range(32):
            ones = 0
            for query in range(group):
                ones += load_int32(codes, query * words + word) >> bit & 1
            base += min(ones, group - ones)
            weight = abs(group - 2 * ones)
            if group % 2 == 0:
                weight //= 2
            if 2 * ones > group:
                _set_bit(table, 2 + word, bit)
            for plane in range(num_planes):
                if weight >> plane & 1:
                    _set_bit(table, 2 + (1 + plane) * words + word, bit)
    store_int32(table, 0, base)


@njit(nogil=True)
def _set_bit(table: int, index: int, bit: int) -> None:
    store_int32(table, index, np.int32(load_int32(table, index) | 1 << bit))


def _specialised(pairs: int, num_planes: int) -> Callable[..., None]:
    """Compile the scoring loop for fixed numbers of 64-bit words and planes, unrolled by LLVM."""
    score_keys = weighed_distances(pairs, num_planes)

    @njit(nogil=True)
    def score(
        keys: int, stride: int, table: int, out: int, count: int, best: int, double: int
    ) -> None:
        whole = count - count % KEYS if stride == 2 * pairs else 0
        for slot in range(0, whole, KEYS):
            score_keys(keys + 8 * pairs * slot, table + 8, out + 4 * slot, best, double)
        for slot in range(whole, count):
            distance = 0
            for pair in range(pairs):
                key = load_int64(keys + 4 * slot * stride, pair) ^ load_int64(table, 1 + pair)
                for plane in range(num_planes):
                    mask = load_int64(table, 1 + (1 + plane) * pairs + pair)
                    distance += popcount(key & mask) << plane
            store_int32(out, slot, np.int32(best - (distance << double)))

    return score


_score_1_1, _score_1_2, _score_1_3 = (_specialised(1, planes) for planes in (1, 2, 3))
_score_2_1, _score_2_2, _score_2_3 = (_specialised(2, planes) for planes in (1, 2, 3))
_score_4_1, _score_4_2, _score_4_3 = (_specialised(4, planes) for planes in (1, 2, 3))


@njit(nogil=True)
def _score_any(
    keys: int,
    stride: int,
    table: int,
    out: int,
    count: int,
    best: int,
    double: int,
    words: int,
    num_planes: int,
) -> None:
    """Score with any number of 32-bit words and planes."""
    for slot in range(count):
        distance = 0
        for word in range(words):
            key = load_int32(keys, slot * stride + word) ^ load_int32(table, 2 + word)
            for plane in range(num_planes):
                mask = load_int32(table, 2 + (1 + plane) * words + word)
                distance += popcount(np.int32(key & mask)) << plane
        store_int32(out, slot, np.int32(best - (distance << double)))


@njit(nogil=True)
def _score_block(
    keys: int,
    stride: int,
    table: int,
    out: int,
    count: int,
    group: int,
    words: int,
    num_planes: int,
) -> None:
    """Write the int32 scores of ``count`` keys, starting at the address ``keys``."""
    best = group * 32 * words - 2 * load_int32(table, 0)
    # The distance counts twice in the score, and weights are halved if the group is even.
    double = 2 - group % 2
    case = 10 * words + num_planes
    if case == 21:
        _score_1_1(keys, stride, table, out, count, best, double)
    elif case == 22:
        _score_1_2(keys, stride, table, out, count, best, double)
    elif case == 23:
        _score_1_3(keys, stride, table, out, count, best, double)
    elif case == 41:
        _score_2_1(keys, stride, table, out, count, best, double)
    elif case == 42:
        _score_2_2(keys, stride, table, out, count, best, double)
    elif case == 43:
        _score_2_3(keys, stride, table, out, count, best, double)
    elif case == 81:
        _score_4_1(keys, stride, table, out, count, best, double)
    elif case == 82:
        _score_4_2(keys, stride, table, out, count, best, double)
    elif case == 83:
        _score_4_3(keys, stride, table, out, count, best, double)
    else:
        _score_any(keys, stride, table, out, count, best, double, words, num_planes)
