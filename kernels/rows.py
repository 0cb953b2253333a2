"""Products of cached rows with the queries of their group, shared by the CPU operators.

Compiled by numba; addresses and counts are as in ``intrinsics``. Work is done in blocks of sixteen
sums that stay in registers, so that each value read from a row serves several queries, and each
value read from a query several rows. A group is processed four queries at a time, then two, then
one.
"""

from collections.abc import Callable

import numpy as np
from numba import njit

from topkbench.kernels.intrinsics import (
    LANES,
    WIDE_REGISTERS,
    empty_sums,
    load_bfloat16,
    load_float32,
    load_int32,
    load_int64,
    load_sums,
    prefetch,
    store_float32,
    store_int64,
    store_row_sums,
    store_sums,
    sums_of_rows,
    weighted_sums,
)

# Vectors of channels that one pass over the rows adds up for each query, and whether it does so for
# four queries: sums that do not stay in registers cost several times more.
_VECTORS = 4 if WIDE_REGISTERS else 2
_FOUR = WIDE_REGISTERS


@njit(nogil=True)
def clipped(address: int, row: int, size: int, missing: int) -> int:
    """Return entry ``row`` of an int32 bound, clipped to the axis; ``missing`` if address is 0."""
    if address == 0:
        return missing
    return min(max(int(load_int32(address, row)), 0), size)


@njit(nogil=True)
def scored_span(
    scores: int, group: int, size: int, row: int, start: int, end: int, first: int, last: int
) -> tuple[int, int]:
    """Return the valid part of the units ``first`` to ``last``; write -inf scores for the rest.

    Args:
        scores: ``[group, size]`` float32.
        group: Number of queries.
        size: Units of the whole axis.
        row: Row of the batch.
        start: Address of the int32 first valid unit of each row, or 0.
        end: Address of the int32 end of each row's valid units, or 0.
        first: First unit of the span.
        last: End of the span.
    """
    begin = min(max(first, clipped(start, row, size, 0)), last)
    finish = max(min(last, clipped(end, row, size, size)), begin)
    for g in range(group):
        for unit in range(first, begin):
            store_float32(scores, g * size + unit, -np.inf)
        for unit in range(finish, last):
            store_float32(scores, g * size + unit, -np.inf)
    return begin, finish


@njit(nogil=True)
def widen(states: int, count: int, wide: int) -> int:
    """Write ``count`` bfloat16 as float32 to ``wide``, and return ``wide``.

    This is done within a kernel because converting a decode step's few states in torch would take
    longer than using them.
    """
    for i in range(count):
        store_float32(wide, i, load_bfloat16(states, i))
    return wide


@njit(nogil=True)
def prefetch_rows(rows: int, count: int, row_bytes: int) -> None:
    """Prefetch whole rows, whose ``count`` addresses are stored at ``rows``."""
    for place in range(count):
        row = load_int64(rows, place)
        for line in range(0, row_bytes, 64):
            prefetch(row + line)


def _scorer(num_queries: int, narrow: bool) -> Callable[..., None]:
    """Compile the dot products of sixteen rows with ``num_queries`` queries."""
    step, store = sums_of_rows(num_queries, narrow), store_row_sums(num_queries)
    load = load_bfloat16 if narrow else load_float32
    height = LANES // num_queries

    @njit(nogil=True)
    def score(
        query: int, rows: int, size: int, out: int, stride: int, low_query: int, low_rows: int,
        soon: int, later: int,
    ) -> None:  # fmt: skip
        whole = size - size % LANES
        if soon == 0:  # rows that are read anyway
            soon = rows
        if later == 0:
            later = rows
        for first in range(0, LANES, height):
            block, own = empty_sums(), rows + 8 * first
            near, far = soon + 8 * first, later + 8 * first
            # Each of two products prefetches as much as it reads.
            beside = far if low_rows == 0 else own
            block = step(block, query, size, own, whole, near, beside)
            if low_rows != 0:
                low = low_rows + 8 * first
                block = step(block, low_query, size, low, whole, far, low)
            store(block, out + 4 * first, stride)
        if whole < size:
            for place in range(LANES):
                row = load_int64(rows, place)
                for q in range(num_queries):
                    total = load_float32(out, q * stride + place)
                    for i in range(whole, size):
                        total += load_float32(query, q * size + i) * load(row, i)
                    if low_rows != 0:
                        low_row = load_int64(low_rows, place)
                        for i in range(whole, size):
                            total += load_float32(low_query, q * size + i) * load(low_row, i)
                    store_float32(out, q * stride + place, total)

    return score


_score_4, _score_2, _score_1 = (_scorer(queries, False) for queries in (4, 2, 1))
_score_4_narrow, _score_2_narrow, _score_1_narrow = (_scorer(q, True) for q in (4, 2, 1))


@njit(nogil=True)
def score_rows(
    query: int,
    rows: int,
    size: int,
    group: int,
    narrow: bool,
    out: int,
    stride: int,
    low_query: int = 0,
    low_rows: int = 0,
    soon: int = 0,
    later: int = 0,
) -> None:
    """Write the dot products of sixteen rows with all queries of a group.

    Args:
        query: ``[group, size]`` float32.
        rows: Sixteen int64 addresses of rows of ``size`` channels; they may repeat.
        size: Channels.
        group: Queries.
        narrow: The rows are bfloat16, not float32.
        out: A row of sixteen float32 for each query, ``stride`` elements apart.
        stride: See ``out``.
        low_query: Address of queries whose products with ``low_rows`` are added, or 0.
        low_rows: See ``low_query``.
        soon: Sixteen addresses of rows to prefetch meanwhile, or 0.
        later: Sixteen more, those of ``low_query`` if there is one, or 0.
    """
    g = 0
    while g < group:
        queries, sums = query + 4 * g * size, out + 4 * g * stride
        lows = low_query + 4 * g * size
        if group - g >= 4:
            if narrow:
                _score_4_narrow(
                    queries, rows, size, sums, stride, lows, low_rows, soon, later
                )  # fmt: skip
            else:
                _score_4(queries, rows, size, sums, stride, lows, low_rows, soon, later)
            g += 4
        elif group - g >= 2:
            if narrow:
                _score_2_narrow(queries, rows, size, sums, stride, lows, low_rows, soon, later)
            else:
                _score_2(queries, rows, size, sums, stride, lows, low_rows, soon, later)
            g += 2
        else:
            if narrow:
                _score_1_narrow(queries, rows, size, sums, stride, lows, low_rows, soon, later)
            else:
                _score_1(queries, rows, size, sums, stride, lows, low_rows, soon, later)
            g += 1
        soon = later = 0


@njit(nogil=True)
def score_span(
    query: int,
    rows: int,
    row_bytes: int,
    first: int,
    last: int,
    size: int,
    group: int,
    narrow: bool,
    out: int,
    stride: int,
    work: int,
    low_query: int = 0,
    low_rows: int = 0,
    low_bytes: int = 0,
) -> None:
    """Write the dot products of neighbouring rows with all queries of a group.

    Args:
        query: As in ``score_rows``, as are ``size``, ``group``, ``narrow`` and ``low_query``.
        rows: Address of row 0; rows are ``row_bytes`` apart.
        row_bytes: See ``rows``.
        first: The first row to score.
        last: End of the rows to score.
        size: Channels.
        group: Queries.
        narrow: The rows are bfloat16, not float32.
        out: Address of the first query's score of row 0; queries are ``stride`` elements apart.
        stride: See ``out``.
        work: Address of ``span_work(group)`` bytes of scratch memory.
        low_query: See ``score_rows``.
        low_rows: Address of row 0 of the rows for ``low_query``, ``low_bytes`` apart, or 0.
        low_bytes: See ``low_rows``.
    """
    lows, soon = work + 8 * LANES, work + 16 * LANES
    low_soon, spare = work + 24 * LANES, work + 32 * LANES
    for begin in range(first, last, LANES):
        # The last sixteen rows overlap those before; if there are fewer, the last one is repeated.
        place = max(min(begin, last - LANES), first)
        for lane in range(LANES):
            row = min(place + lane, last - 1)
            store_int64(work, lane, rows + row_bytes * row)
            store_int64(lows, lane, low_rows + low_bytes * row)
            ahead = min(row + LANES, last - 1)
            store_int64(soon, lane, rows + row_bytes * ahead)
            store_int64(low_soon, lane, low_rows + low_bytes * ahead)
        # Fewer than sixteen scores go to the scratch memory first. It is one call for both cases:
        # numba would compile all that it calls once for each.
        few = last - first < LANES
        scores = spare if few else out + 4 * place
        apart = LANES if few else stride
        other, later = (lows, low_soon) if low_rows != 0 else (0, 0)
        score_rows(query, work, size, group, narrow, scores, apart, low_query, other, soon, later)
        if few:
            for g in range(group):
                for lane in range(last - first):
                    score = load_float32(spare, g * LANES + lane)
                    store_float32(out, g * stride + place + lane, score)


@njit(nogil=True)
def span_work(group: int) -> int:
    """Return the bytes of scratch memory that ``score_span`` needs."""
    return 4 * 8 * LANES + 4 * group * LANES


def _adder(num_queries: int, narrow: bool) -> Callable[..., None]:
    """Compile the weighted sum of rows for ``num_queries`` queries."""
    vectors, row_item = _VECTORS, 2 if narrow else 4
    wide_step = weighted_sums(num_queries, vectors, narrow)
    wide_load = load_sums(num_queries, vectors)
    wide_store = store_sums(num_queries, vectors)
    step = weighted_sums(num_queries, 1, narrow)
    one_load, one_store = load_sums(num_queries, 1), store_sums(num_queries, 1)
    load = load_bfloat16 if narrow else load_float32

    @njit(nogil=True)
    def add(
        sums: int, apart: int, weights: int, stride: int, rows: int, count: int, size: int,
        soon: int,
    ) -> None:  # fmt: skip
        i = 0
        while i + LANES * vectors <= size:
            block = wide_load(sums + 4 * i, apart)
            for place in range(count):
                row = load_int64(rows, place)
                if soon != 0:
                    ahead = load_int64(soon, place) + row_item * i
                    for line in range(0, row_item * LANES * vectors, 64):
                        prefetch(ahead + line)
                block = wide_step(block, weights + 4 * place, stride, row, i)
            wide_store(block, sums + 4 * i, apart)
            i += LANES * vectors
        while i + LANES <= size:
            block = one_load(sums + 4 * i, apart)
            for place in range(count):
                block = step(block, weights + 4 * place, stride, load_int64(rows, place), i)
            one_store(block, sums + 4 * i, apart)
            i += LANES
        if i < size:
            for q in range(num_queries):
                for place in range(count):
                    row, weight = load_int64(rows, place), load_float32(weights, q * stride + place)
                    for channel in range(i, size):
                        total = load_float32(sums, q * apart + channel)
                        store_float32(
                            sums, q * apart + channel, total + weight * load(row, channel)
                        )

    return add


_add_4, _add_2, _add_1 = (_adder(queries, False) for queries in (4, 2, 1))
_add_4_narrow, _add_2_narrow, _add_1_narrow = (_adder(queries, True) for queries in (4, 2, 1))


@njit(nogil=True)
def add_rows(
    sums: int,
    apart: int,
    weights: int,
    stride: int,
    rows: int,
    count: int,
    size: int,
    group: int,
    narrow: bool,
    soon: int = 0,
) -> None:
    """Add weighted rows to the sums of all queries of a group.

    Args:
        sums: ``size`` float32 for each query, ``apart`` elements apart.
        apart: See ``sums``.
        weights: ``count`` float32 for each query, ``stride`` elements apart.
        stride: See ``weights``.
        rows: ``count`` int64 addresses of rows of ``size`` channels.
        count: Number of rows to add.
        size: Channels.
        group: Queries.
        narrow: The rows are bfloat16, not float32.
        soon: ``count`` addresses of rows to prefetch meanwhile, or 0.
    """
    g = 0
    while g < group:
        own, own_weights = sums + 4 * g * apart, weights + 4 * g * stride
        if _FOUR and group - g >= 4:
            if narrow:
                _add_4_narrow(own, apart, own_weights, stride, rows, count, size, soon)
            else:
                _add_4(own, apart, own_weights, stride, rows, count, size, soon)
            g += 4
        elif group - g >= 2:
            if narrow:
                _add_2_narrow(own, apart, own_weights, stride, rows, count, size, soon)
            else:
                _add_2(own, apart, own_weights, stride, rows, count, size, soon)
            g += 2
        else:
            if narrow:
                _add_1_narrow(own, apart, own_weights, stride, rows, count, size, soon)
            else:
                _add_1(own, apart, own_weights, stride, rows, count, size, soon)
            g += 1
        soon = 0
