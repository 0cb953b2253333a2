"""Dot products of one cached row with the queries of its group, shared by the CPU operators.

Compiled by numba; addresses and counts as in ``intrinsics``.
"""

from numba import njit

from topkbench.kernels.intrinsics import (
    LANES,
    lane_sum,
    load_bfloat16,
    load_float32,
    load_int32,
    load_vector,
    load_vector_bfloat16,
    multiply_add,
    splat,
    store_float32,
    store_vector,
)


@njit(nogil=True)
def dot_4(
    query: int, query_stride: int, row: int, size: int, narrow: bool
) -> tuple[float, float, float, float]:
    """Return the dot products of a row with four queries ``query_stride`` elements apart."""
    q0 = query
    q1 = q0 + 4 * query_stride
    q2 = q1 + 4 * query_stride
    q3 = q2 + 4 * query_stride
    sum0 = sum1 = sum2 = sum3 = splat(0.0)
    whole = size - size % LANES
    if narrow:
        for i in range(0, whole, LANES):
            values = load_vector_bfloat16(row, i)
            sum0 = multiply_add(load_vector(q0, i), values, sum0)
            sum1 = multiply_add(load_vector(q1, i), values, sum1)
            sum2 = multiply_add(load_vector(q2, i), values, sum2)
            sum3 = multiply_add(load_vector(q3, i), values, sum3)
    else:
        for i in range(0, whole, LANES):
            values = load_vector(row, i)
            sum0 = multiply_add(load_vector(q0, i), values, sum0)
            sum1 = multiply_add(load_vector(q1, i), values, sum1)
            sum2 = multiply_add(load_vector(q2, i), values, sum2)
            sum3 = multiply_add(load_vector(q3, i), values, sum3)
    dot0, dot1, dot2, dot3 = lane_sum(sum0), lane_sum(sum1), lane_sum(sum2), lane_sum(sum3)
    for i in range(whole, size):
        value = load_bfloat16(row, i) if narrow else load_float32(row, i)
        dot0 += load_float32(q0, i) * value
        dot1 += load_float32(q1, i) * value
        dot2 += load_float32(q2, i) * value
        dot3 += load_float32(q3, i) * value
    return dot0, dot1, dot2, dot3


@njit(nogil=True)
def dot_2(query: int, query_stride: int, row: int, size: int, narrow: bool) -> tuple[float, float]:
    """Return the dot products of a row with two queries."""
    q0 = query
    q1 = q0 + 4 * query_stride
    sum0 = sum1 = splat(0.0)
    whole = size - size % LANES
    if narrow:
        for i in range(0, whole, LANES):
            values = load_vector_bfloat16(row, i)
            sum0 = multiply_add(load_vector(q0, i), values, sum0)
            sum1 = multiply_add(load_vector(q1, i), values, sum1)
    else:
        for i in range(0, whole, LANES):
            values = load_vector(row, i)
            sum0 = multiply_add(load_vector(q0, i), values, sum0)
            sum1 = multiply_add(load_vector(q1, i), values, sum1)
    dot0, dot1 = lane_sum(sum0), lane_sum(sum1)
    for i in range(whole, size):
        value = load_bfloat16(row, i) if narrow else load_float32(row, i)
        dot0 += load_float32(q0, i) * value
        dot1 += load_float32(q1, i) * value
    return dot0, dot1


@njit(nogil=True)
def dot_1(query: int, row: int, size: int, narrow: bool) -> float:
    """Return the dot product of a row with one query."""
    total = splat(0.0)
    whole = size - size % LANES
    if narrow:
        for i in range(0, whole, LANES):
            total = multiply_add(load_vector(query, i), load_vector_bfloat16(row, i), total)
    else:
        for i in range(0, whole, LANES):
            total = multiply_add(load_vector(query, i), load_vector(row, i), total)
    dot = lane_sum(total)
    for i in range(whole, size):
        value = load_bfloat16(row, i) if narrow else load_float32(row, i)
        dot += load_float32(query, i) * value
    return dot


@njit(nogil=True)
def clipped(address: int, row: int, size: int, missing: int) -> int:
    """Return entry ``row`` of an int32 bound, clipped to the axis; ``missing`` at address 0."""
    if address == 0:
        return missing
    return min(max(int(load_int32(address, row)), 0), size)


@njit(nogil=True)
def accumulate_4(
    sums: int,
    weights: int,
    weight_stride: int,
    values: int,
    value_bytes: int,
    slots: int,
    count: int,
    size: int,
    narrow: bool,
) -> None:
    """Add weighted rows to four queries' sums, sixteen channels at a time over all rows.

    Args:
        sums: ``[4, size]`` float32.
        weights: Four rows of ``count`` float32, ``weight_stride`` elements apart.
        weight_stride: See ``weights``.
        values: Slot 0 of the cache, its rows ``value_bytes`` apart.
        value_bytes: See ``values``.
        slots: ``count`` int32.
        count: Number of rows to add.
        size: Channels.
        narrow: The cache is bfloat16, not float32.
    """
    s1, s2, s3 = sums + 4 * size, sums + 8 * size, sums + 12 * size
    w1, w2, w3 = weight_stride, 2 * weight_stride, 3 * weight_stride
    whole = size - size % LANES
    for i in range(0, whole, LANES):
        sum0, sum1 = load_vector(sums, i), load_vector(s1, i)
        sum2, sum3 = load_vector(s2, i), load_vector(s3, i)
        for place in range(count):
            row = values + value_bytes * int(load_int32(slots, place))
            value = load_vector_bfloat16(row, i) if narrow else load_vector(row, i)
            sum0 = multiply_add(splat(load_float32(weights, place)), value, sum0)
            sum1 = multiply_add(splat(load_float32(weights, w1 + place)), value, sum1)
            sum2 = multiply_add(splat(load_float32(weights, w2 + place)), value, sum2)
            sum3 = multiply_add(splat(load_float32(weights, w3 + place)), value, sum3)
        store_vector(sums, i, sum0)
        store_vector(s1, i, sum1)
        store_vector(s2, i, sum2)
        store_vector(s3, i, sum3)
    if whole < size:
        for query in range(4):
            row_weights = weights + 4 * query * weight_stride
            _accumulate_tail(
                sums + 4 * query * size, row_weights, values, value_bytes, slots, count, whole,
                size, narrow,
            )  # fmt: skip


@njit(nogil=True)
def accumulate_2(
    sums: int,
    weights: int,
    weight_stride: int,
    values: int,
    value_bytes: int,
    slots: int,
    count: int,
    size: int,
    narrow: bool,
) -> None:
    """Add weighted rows to two queries' sums; arguments as in ``accumulate_4``."""
    s1 = sums + 4 * size
    whole = size - size % LANES
    for i in range(0, whole, LANES):
        sum0, sum1 = load_vector(sums, i), load_vector(s1, i)
        for place in range(count):
            row = values + value_bytes * int(load_int32(slots, place))
            value = load_vector_bfloat16(row, i) if narrow else load_vector(row, i)
            sum0 = multiply_add(splat(load_float32(weights, place)), value, sum0)
            sum1 = multiply_add(splat(load_float32(weights, weight_stride + place)), value, sum1)
        store_vector(sums, i, sum0)
        store_vector(s1, i, sum1)
    if whole < size:
        for query in range(2):
            row_weights = weights + 4 * query * weight_stride
            _accumulate_tail(
                sums + 4 * query * size, row_weights, values, value_bytes, slots, count, whole,
                size, narrow,
            )  # fmt: skip


@njit(nogil=True)
def accumulate_1(
    sums: int,
    weights: int,
    values: int,
    value_bytes: int,
    slots: int,
    count: int,
    size: int,
    narrow: bool,
) -> None:
    """Add weighted rows to one query's sums; arguments as in ``accumulate_4``."""
    whole = size - size % LANES
    for i in range(0, whole, LANES):
        total = load_vector(sums, i)
        for place in range(count):
            row = values + value_bytes * int(load_int32(slots, place))
            value = load_vector_bfloat16(row, i) if narrow else load_vector(row, i)
            total = multiply_add(splat(load_float32(weights, place)), value, total)
        store_vector(sums, i, total)
    if whole < size:
        _accumulate_tail(sums, weights, values, value_bytes, slots, count, whole, size, narrow)


@njit(nogil=True)
def _accumulate_tail(
    sums: int,
    weights: int,
    values: int,
    value_bytes: int,
    slots: int,
    count: int,
    whole: int,
    size: int,
    narrow: bool,
) -> None:
    """Add the channels after the last whole vector."""
    for place in range(count):
        row = values + value_bytes * int(load_int32(slots, place))
        weight = load_float32(weights, place)
        for i in range(whole, size):
            value = load_bfloat16(row, i) if narrow else load_float32(row, i)
            store_float32(sums, i, load_float32(sums, i) + weight * value)
