"""topk_select on a CPU, without sorting.

Float scores become int32 keys of the same order; int32 scores are their own keys. The threshold,
the k-th largest key, is found by histograms over ever narrower ranges; a pass in ascending order
then emits everything above it and, lowest first, as many equal to it as are left. Where k is small
against the number of units, only blocks of units whose maximum reaches the k-th largest maximum are
looked at: at least k units are as large as that, so the threshold is no lower.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from topkbench.kernels.addresses import bound_address, check_rows
from topkbench.kernels.intrinsics import (
    LANES,
    float_bits,
    load_float32,
    load_int32,
    maximum_of_block,
    store_int32,
)
from topkbench.kernels.rows import clipped

_BLOCK = LANES  # units that share a maximum
_BIN_BITS = 11
_BINS = 2**_BIN_BITS

# The key of a unit that is not there.
_ABSENT = np.int32(-(2**31))
_HIGHEST = np.int32(2**31 - 1)


def topk_select(
    scores: Tensor,
    k: int,
    num_sink: int,
    num_recent: int,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
) -> Tensor:
    """Return ``[B, H, min(k, U)]`` int32; see the api."""
    if scores.dtype == torch.float64:
        raise TypeError(
            "scores must be int32, float32, bfloat16 or float16 for impl='cpu', got float64; "
            "use impl='reference'."
        )
    floating = scores.dtype != torch.int32
    if floating:
        scores = scores.float()
    check_rows("scores", scores)
    batch_size, num_heads, num_units = scores.shape
    kept = min(k, num_units)
    out = torch.empty(batch_size, num_heads, kept, dtype=torch.int32)
    start, _start = bound_address(kv_start)
    end, _end = bound_address(kv_len)
    # For each head: a histogram, keys, block maxima (fewer than units), candidate keys and units.
    work = torch.empty(batch_size * num_heads, _BINS + 4 * num_units, dtype=torch.int32)
    sizes = (batch_size, num_heads, num_units, kept)
    _select(
        scores.data_ptr(), scores.stride()[:2], floating, out.data_ptr(), work.data_ptr(), sizes,
        num_sink, num_recent, start, end,
    )  # fmt: skip
    return out


@njit(parallel=True, cache=True, nogil=True)
def _select(
    scores: int,
    strides: tuple[int, int],
    floating: bool,
    out: int,
    work: int,
    sizes: tuple[int, int, int, int],
    num_sink: int,
    num_recent: int,
    start: int,
    end: int,
) -> None:
    batch_size, num_heads, num_units, kept = sizes
    for task in prange(batch_size * num_heads):
        batch, head = task // num_heads, task % num_heads
        first = clipped(start, batch, num_units, 0)
        last = max(first, clipped(end, batch, num_units, num_units))
        chosen = out + 4 * task * kept
        bins = work + 4 * task * (_BINS + 4 * num_units)
        keys = scores + 4 * (batch * strides[0] + head * strides[1])
        # Units before `middle` and from `late` on are forced; api allows k at most.
        middle = min(first + num_sink, last)
        late = max(middle, last - num_recent)
        done = 0
        for unit in range(first, middle):
            store_int32(chosen, done, unit)
            done += 1
        wanted = kept - done - (last - late)
        if wanted > 0:
            if floating:
                ordered = bins + 4 * _BINS
                _order(keys, ordered, middle, late)
                keys = ordered
            done = _choose(
                keys, middle, late, wanted, bins, bins + 4 * (_BINS + num_units), num_units,
                chosen, done,
            )  # fmt: skip
        for unit in range(late, last):
            store_int32(chosen, done, unit)
            done += 1
        for place in range(done, kept):
            store_int32(chosen, place, -1)


@njit(nogil=True)
def _order(scores: int, keys: int, first: int, last: int) -> None:
    """Write float scores as int32 keys of the same order; -inf and NaN become absent."""
    for unit in range(first, last):
        # Adding zero turns -0.0 into 0.0, which is equal to it.
        value = load_float32(scores, unit) + np.float32(0.0)
        bits = float_bits(value)
        key = bits if bits >= 0 else np.int32(bits ^ _HIGHEST)
        store_int32(keys, unit, key if value > np.float32(-np.inf) else _ABSENT)


@njit(nogil=True)
def _choose(
    keys: int,
    first: int,
    last: int,
    wanted: int,
    bins: int,
    spare: int,
    num_units: int,
    chosen: int,
    done: int,
) -> int:
    """Emit the ``wanted`` largest units of a range in ascending order; return the new count."""
    num_blocks = (last - first) // _BLOCK
    if num_blocks < 4 * wanted:
        threshold, equal = _threshold(keys, first, last, wanted, bins)
        for unit in range(first, last):
            key = load_int32(keys, unit)
            if key >= threshold and key != _ABSENT:
                if key == threshold:
                    if equal == 0:
                        continue
                    equal -= 1
                store_int32(chosen, done, unit)
                done += 1
        return done

    maxima, found_keys, found_units = spare, spare + 4 * num_units, spare + 8 * num_units
    present = 0
    for block in range(num_blocks):
        maximum = maximum_of_block(keys, first + block * _BLOCK)
        store_int32(maxima, block, maximum)
        if maximum != _ABSENT:
            present += 1
    # The wanted-th largest maximum bounds the answer from below only where there are so many.
    least = np.int32(_ABSENT + 1)
    if present >= wanted:
        least, _ = _threshold(maxima, 0, num_blocks, wanted, bins)
    found = 0
    # The units after the last whole block are candidates like those of a block that reaches it.
    for block in range(num_blocks + 1):
        if block == num_blocks or load_int32(maxima, block) >= least:
            base = first + block * _BLOCK
            for unit in range(base, min(base + _BLOCK, last)):
                key = load_int32(keys, unit)
                if key >= least and key != _ABSENT:
                    store_int32(found_keys, found, key)
                    store_int32(found_units, found, unit)
                    found += 1
    threshold, equal = _threshold(found_keys, 0, found, wanted, bins)
    for place in range(found):
        key = load_int32(found_keys, place)
        if key >= threshold:
            if key == threshold:
                if equal == 0:
                    continue
                equal -= 1
            store_int32(chosen, done, load_int32(found_units, place))
            done += 1
    return done


@njit(nogil=True)
def _threshold(keys: int, first: int, last: int, wanted: int, bins: int) -> tuple[Any, int]:
    """Return the ``wanted``-th largest key that is not absent, and how many of it to take.

    When there are fewer keys, return the smallest one and take all of it.
    """
    low32, high32 = _HIGHEST, _ABSENT
    for place in range(first, last):
        key = load_int32(keys, place)
        high32 = max(high32, key)
        low32 = min(low32, key if key != _ABSENT else _HIGHEST)
    low: Any = np.int64(low32)
    high: Any = np.int64(high32)
    if high32 == _ABSENT:
        return low, 0
    while low < high:
        shift = 0
        while (high - low) >> shift >= _BINS:
            shift += 1
        num_bins = ((high - low) >> shift) + 1
        for item in range(num_bins):
            store_int32(bins, item, 0)
        for place in range(first, last):
            key64 = np.int64(load_int32(keys, place))
            if low <= key64 <= high:
                item = (key64 - low) >> shift
                store_int32(bins, item, np.int32(load_int32(bins, item) + 1))
        item = num_bins - 1
        while item > 0 and load_int32(bins, item) < wanted:
            wanted -= load_int32(bins, item)
            item -= 1
        low += item << shift
        high = min(high, low + (1 << shift) - 1)
    return low, wanted
