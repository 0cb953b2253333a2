"""Pieces of a softmax that LLVM turns into vectors, shared by the CPU operators."""

import math
from typing import Any

import numpy as np
from numba import njit

from topkbench.kernels.intrinsics import bits_float, load_float32, load_int32, store_float32

# Additions may be reordered, so that LLVM can use vectors.
_ANY_ORDER = {"reassoc", "nsz"}


@njit(nogil=True, fastmath={"contract"})  # a product and its addition round once
def exp(x: Any) -> Any:
    """Return e to a power of at most 0, within 2 units in the last place; below e^-87, 0.

    NaN stays NaN, since every comparison with it is false.

    It is written out because LLVM can vectorise it, but not a call of a library. The power is split
    as ``2^whole * e^rest`` with ``|rest| <= ln(2) / 2``, and the series of ``e^rest`` is truncated
    where its next term, ``rest^8 / 8!``, is below float32's precision.
    """
    floor = np.float32(-87.0)
    bounded: Any = floor if x < floor else x
    whole = np.int32(bounded * np.float32(1.4426950408889634) - np.float32(0.5))
    steps = np.float32(whole)
    # ln(2) in two parts, the first with few bits, so that the subtraction is exact.
    rest = (bounded - steps * np.float32(0.693359375)) - steps * np.float32(-2.12194440054690583e-4)
    series = np.float32(1.0 / 5040.0)
    series = series * rest + np.float32(1.0 / 720.0)
    series = series * rest + np.float32(1.0 / 120.0)
    series = series * rest + np.float32(1.0 / 24.0)
    series = series * rest + np.float32(1.0 / 6.0)
    series = series * rest + np.float32(0.5)
    series = series * rest + np.float32(1.0)
    series = series * rest + np.float32(1.0)
    power = series * bits_float(np.int32((whole + np.int32(127)) << np.int32(23)))
    return np.float32(0.0) if x < floor else power


@njit(nogil=True)
def scale_and_cap(products: int, logits: int, count: int, scale: float, softcap: float) -> None:
    """Turn ``count`` dot products into logits: scaled, and capped unless the cap is 0."""
    for place in range(count):
        store_float32(logits, place, load_float32(products, place) * scale)
    if softcap > np.float32(0.0):
        for place in range(count):
            logit = load_float32(logits, place)
            if logit > np.float32(-np.inf):  # -inf marks an absent unit
                store_float32(logits, place, softcap * np.float32(math.tanh(logit / softcap)))


@njit(nogil=True)
def largest(values: int, count: int) -> Any:
    """Return the largest of ``count`` float32, -inf if there is none.

    Bits are compared as integers in the same order as the floats, because LLVM vectorises that, but
    not a maximum of floats (measured: 0.03 instead of 0.53 ns per value).
    """
    found = _ordered(np.int32(-8388608))  # the bits of -inf
    for place in range(count):
        found = max(found, _ordered(load_int32(values, place)))
    return bits_float(_ordered(found))


@njit(nogil=True)
def _ordered(bits: Any) -> Any:
    """Map a float32's bits to an int32 with the same order, or back: it is its own inverse.

    Any NaN becomes a positive one, above all numbers.
    """
    turned = np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    is_nan = (bits & np.int32(0x7FFFFFFF)) > np.int32(0x7F800000)
    return np.int32(0x7FC00000) if is_nan else turned


@njit(nogil=True)
def larger(one: Any, other: Any) -> Any:
    """Return the larger of two float32, ``other`` where it is NaN."""
    return one if one >= other else other


@njit(nogil=True, fastmath=_ANY_ORDER)
def total(values: int, count: int) -> Any:
    """Add up ``count`` float32."""
    found = np.float32(0.0)
    for place in range(count):
        found += load_float32(values, place)
    return found
