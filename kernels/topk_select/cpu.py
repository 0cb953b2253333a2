"""topk_select on a CPU, without sorting, sixteen units at a time.

The threshold, the k-th largest score, is found by bisection: the range of scores is halved
repeatedly, each time counting how many scores reach its middle. To avoid counting all units each
time, candidates are found first: the k-th largest of the maxima of every sixteen units is at most
the threshold, so all units that reach it, a few times k, are collected, and the threshold is
searched among them. A last pass writes, in ascending order, all units above the threshold and as
many equal to it as are left.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from topkbench.kernels.addresses import bound_address, check_rows
from topkbench.kernels.compiled import entry_point
from topkbench.kernels.intrinsics import (
    LANES,
    Kind,
    bits_float,
    column_maxima,
    load_float32,
    load_int16,
    load_int32,
    lowest_bit,
    marks,
    popcount,
    store_float32,
    store_int32,
)
from topkbench.kernels.rows import clipped

_COLUMNS = LANES * LANES  # units whose sixteen maxima are found at a time


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
            "scores must be int16, int32, float32, bfloat16 or float16 for impl='cpu', got float64;"
            " use impl='reference'."
        )
    if scores.is_floating_point():
        scores = scores.float()
    check_rows("scores", scores)
    batch_size, num_heads, num_units = scores.shape
    kept = min(k, num_units)
    out = torch.empty(batch_size, num_heads, kept, dtype=torch.int32)
    start, _start = bound_address(kv_start)
    end, _end = bound_address(kv_len)
    # For each head: maxima and then the vectors that hold a candidate, candidates and their units,
    # the last two padded to a whole vector.
    room = num_units + LANES
    work = torch.empty(batch_size * num_heads, 3 * room, dtype=torch.int32)
    kind = {torch.int16: 0, torch.int32: 1, torch.float32: 2}[scores.dtype]
    sizes = (batch_size, num_heads, num_units, kept)
    _select(
        scores.data_ptr(), scores.stride()[:2], kind, out.data_ptr(), work.data_ptr(), room, sizes,
        num_sink, num_recent, start, end,
    )  # fmt: skip
    return out


@njit(nogil=True)
def _as_int16(key: int) -> Any:
    return np.int16(key)


@njit(nogil=True)
def _as_int32(key: int) -> Any:
    return np.int32(key)


@njit(nogil=True)
def _as_float32(key: int) -> Any:
    """Return the float32 at a position in the order of all float32; position 0 is 0.0."""
    bits = np.int32(key)
    return bits_float(bits if bits >= 0 else np.int32(bits ^ np.int32(2**31 - 1)))


_FLOAT_KEYS = 0x7F800000  # infinity's position in that order

# For each kind: the function from key to score, the keys of the lowest present score and of the
# highest, the functions that load and store a score, and the kind of a candidate.
_KINDS: dict[Kind, tuple[Any, ...]] = {
    "int16": (_as_int16, 1 - 2**15, 2**15 - 1, load_int16, store_int32, "int32"),
    "int32": (_as_int32, 1 - 2**31, 2**31 - 1, load_int32, store_int32, "int32"),
    "float32": (_as_float32, -_FLOAT_KEYS, _FLOAT_KEYS, load_float32, store_float32, "float32"),
}


def _seeker(kind: Kind) -> Callable[..., int]:
    """Compile the search for a threshold."""
    as_kind, lowest, highest, load = _KINDS[kind][:4]
    at_least = marks(kind, ">=")

    @njit(nogil=True)
    def threshold(scores: int, first: int, last: int, wanted: int) -> int:
        """Return the key of the ``wanted``-th largest score; the lowest if there are fewer."""
        low, high = lowest, highest
        whole = last - (last - first) % LANES
        while low < high:
            middle = low + (high - low + 1) // 2
            bound = as_kind(middle)
            count = 0
            for place in range(first, whole, LANES):
                count += popcount(at_least(scores, place, bound))
            for place in range(whole, last):
                if load(scores, place) >= bound:
                    count += 1
            if count >= wanted:
                low = middle
            else:
                high = middle - 1
        return low

    return threshold


_threshold = {kind: _seeker(kind) for kind in _KINDS}


def _chooser(kind: Kind) -> Callable[..., int]:
    """Compile the selection among scores of one kind."""
    as_kind, lowest, _, load, store, found_kind = _KINDS[kind]
    as_found, lowest_found, *_ = _KINDS[found_kind]
    item = 2 if kind == "int16" else 4
    at_least, maxima_of = marks(kind, ">="), column_maxima(kind)
    reaches, exceeds = marks(found_kind, ">="), marks(found_kind, ">")
    seek, seek_found = _threshold[kind], _threshold[found_kind]

    @njit(nogil=True)
    def choose(
        scores: int, first: int, last: int, wanted: int, work: int, room: int, out: int
    ) -> int:
        """Write the ``wanted`` largest units of a range in ascending order; return how many."""
        candidates = work + 4 * room
        units = candidates + 4 * room
        columns = (last - first) // _COLUMNS
        for column in range(columns):
            maxima_of(scores, first + _COLUMNS * column, work + item * LANES * column)
        least = as_kind(lowest)
        if LANES * columns >= wanted:
            least = as_kind(seek(work, 0, LANES * columns, wanted))

        # First the vectors that have a candidate, without a branch: it could not be predicted.
        hits, found = 0, 0
        whole = last - (last - first) % LANES
        for place in range(first, whole, LANES):
            store_int32(work, hits, np.int32(place))
            hits += 1 if at_least(scores, place, least) != 0 else 0
        for hit in range(hits):
            place = int(load_int32(work, hit))
            marked = at_least(scores, place, least)
            while marked != 0:
                unit = place + lowest_bit(marked)
                store(candidates, found, as_found(0) + load(scores, unit))
                store_int32(units, found, np.int32(unit))
                found += 1
                marked = marked & (marked - np.int32(1))
        for place in range(whole, last):
            score = load(scores, place)
            if score >= least:
                store(candidates, found, as_found(0) + score)
                store_int32(units, found, np.int32(place))
                found += 1
        # Pad to a whole vector with a value below any threshold.
        for place in range(found, found + LANES):
            store(candidates, place, as_found(lowest_found - 1))

        bound = as_found(seek_found(candidates, 0, found, wanted))
        above = 0
        for place in range(0, found, LANES):
            above += popcount(exceeds(candidates, place, bound))
        equal = wanted - above
        done = 0
        for place in range(0, found, LANES):
            marked = reaches(candidates, place, bound)
            ties = marked ^ exceeds(candidates, place, bound)
            while marked != 0:
                bit = marked & -marked
                if ties & bit != 0:  # the lower index wins
                    equal -= 1
                if ties & bit == 0 or equal >= 0:
                    store_int32(out, done, load_int32(units, place + lowest_bit(marked)))
                    done += 1
                marked = marked ^ bit
        return done

    return choose


_choose_int16, _choose_int32, _choose_float32 = (_chooser(kind) for kind in _KINDS)


@entry_point
def _select(
    scores: int,
    strides: tuple[int, int],
    kind: int,
    out: int,
    work: int,
    room: int,
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
        own_work = work + 4 * task * 3 * room
        row = scores + (2 if kind == 0 else 4) * (batch * strides[0] + head * strides[1])
        # Units before `middle` and from `late` on are forced; the api allows at most k of them.
        middle = min(first + num_sink, last)
        late = max(middle, last - num_recent)
        done = 0
        for unit in range(first, middle):
            store_int32(chosen, done, unit)
            done += 1
        wanted = kept - done - (last - late)
        if wanted > 0:
            rest = chosen + 4 * done
            if kind == 0:
                done += _choose_int16(row, middle, late, wanted, own_work, room, rest)
            elif kind == 1:
                done += _choose_int32(row, middle, late, wanted, own_work, room, rest)
            else:
                done += _choose_float32(row, middle, late, wanted, own_work, room, rest)
        for unit in range(late, last):
            store_int32(chosen, done, unit)
            done += 1
        for place in range(done, kept):
            store_int32(chosen, place, -1)
