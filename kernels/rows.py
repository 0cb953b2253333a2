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
