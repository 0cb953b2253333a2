"""topk_select in Triton, without sorting: a radix threshold, then compaction in index order.

Scores become uint32 keys of the same order, 0 for an absent unit. Four passes find the threshold,
the key of the last selected unit, eight bits (a digit) each from the top. In each pass, one program
per tile of units counts the next digit of the keys that share the digits found so far. Each program
of the following pass reads the row's 256 counts and finds the digit itself, which takes less time
than a separate kernel. Of the units equal to the threshold, as many are selected as are left,
lowest index first: tiles count their units above and at the threshold, and each then writes its
selected units after those of the tiles before it. Forced units count as selected from the start.
The atomic additions are deterministic, since integers are added.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topkbench.kernels.tiles import check_readable, on_device_of, valid_range

# Units per program: few enough to occupy the GPU with one sequence's heads, many enough that adding
# its 256 counts takes little time compared with reading them.
_TILE = 2048
# Arguments that change from step to step, including the strides of scores without spare capacity.
_GROWING = ("batch_stride", "head_stride", "num_units", "kept", "num_sink", "num_recent")


def topk_select(
    scores: Tensor,
    k: int,
    num_sink: int,
    num_recent: int,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
) -> Tensor:
    """Return ``[B, H, min(k, U)]`` int32; see the api."""
    if scores.is_floating_point():
        check_readable("scores", scores)
    batch_size, num_heads, num_units = scores.shape
    kept, rows, device = min(k, num_units), batch_size * num_heads, scores.device
    # Short rows keep the -1.
    out = torch.full((batch_size, num_heads, kept), -1, dtype=torch.int32, device=device)
    if out.numel() == 0:
        return out
    tiles = triton.cdiv(num_units, _TILE)
    histograms = torch.zeros(rows, 4, 256, dtype=torch.int32, device=device)
    # Before each pass: the digits found so far, and the number of units still to be selected.
    states = torch.empty(rows, 4, 2, dtype=torch.int32, device=device)
    # For each tile: the units selected independently of ties, and those at the threshold.
    counts = torch.empty(rows, 2, tiles, dtype=torch.int32, device=device)
    where = (kv_start, kv_len, *scores.stride(), num_heads, num_units, kept, num_sink, num_recent)
    grid = (tiles, rows)
    with on_device_of(scores):
        for digit in range(4):
            _count_digits[grid](scores, histograms, states, *where, DIGIT=digit, TILE=_TILE)
        _count_chosen[grid](scores, histograms, states, counts, *where, TILE=_TILE)
        _write_chosen[grid](scores, histograms, states, counts, out, *where, TILE=_TILE)
    return out


@triton.jit
def _split(
    kv_start: tl.tensor,
    kv_len: tl.tensor,
    batch: tl.tensor,
    num_units: tl.tensor,
    num_sink: tl.tensor,
    num_recent: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return a row's start, the end of its sinks, the first of its recent units, and its end."""
    start, end = valid_range(kv_start, kv_len, batch, num_units)
    middle = tl.minimum(start + num_sink, end)
    return start, middle, tl.maximum(middle, end - num_recent), end


@triton.jit
def _ordered_keys(pointers: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Load scores as uint32 keys of the same order; absent and masked units are 0."""
    values = tl.load(pointers, mask=mask, other=0)
    if values.dtype == tl.int32:
        keys = values.to(tl.uint32, bitcast=True) ^ 0x80000000
    elif values.dtype == tl.int16:
        keys = (values.to(tl.int32) + 2**15).to(tl.uint32)
    else:
        wide = values.to(tl.float32)
        bits = wide.to(tl.uint32, bitcast=True)
        bits = tl.where(bits == 0x80000000, 0, bits)  # -0.0 equals 0.0
        keys = tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
        keys = tl.where(wide == float("-inf"), 0, keys)
    return tl.where(mask, keys, 0).to(tl.uint32)


@triton.jit
def _after(
    histograms: tl.tensor, states: tl.tensor, place: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Return the threshold's digits after a pass, and the units with these digits left to select.

    The pass's digit is the smallest one for which fewer units have a larger digit than are still to
    be selected. If none are left to select there is no such digit, and 255 excludes all units.
    """
    prefix = tl.load(states + 2 * place).to(tl.uint32, bitcast=True)
    remaining = tl.load(states + 2 * place + 1)
    digits = tl.arange(0, 256)
    counts = tl.load(histograms + 256 * place + digits)
    larger = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)
    digit = tl.minimum(tl.sum((larger >= remaining).to(tl.int32), axis=0), 255)
    remaining -= tl.sum(tl.where(digits > digit, counts, 0), axis=0)
    return (prefix << 8) | digit.to(tl.uint32), remaining


@triton.jit(do_not_specialize=_GROWING)
def _count_digits(
    scores: tl.tensor,
    histograms: tl.tensor,
    states: tl.tensor,
    kv_start: tl.tensor,
    kv_len: tl.tensor,
    batch_stride: tl.tensor,
    head_stride: tl.tensor,
    unit_stride: tl.tensor,
    num_heads: tl.tensor,
    num_units: tl.tensor,
    kept: tl.tensor,
    num_sink: tl.tensor,
    num_recent: tl.tensor,
    DIGIT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Count digit number DIGIT, from the top, of the keys that share the digits found before it."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // num_heads, row % num_heads
    start, middle, late, end = _split(kv_start, kv_len, batch, num_units, num_sink, num_recent)
    place = row * 4 + DIGIT
    if DIGIT == 0:
        prefix = 0
        remaining = kept - (middle - start) - (end - late)
    else:
        prefix, remaining = _after(histograms, states, place - 1)
    if tile == 0:
        tl.store(states + 2 * place, prefix)
        tl.store(states + 2 * place + 1, remaining)

    first = tile * TILE
    if (first < late) & (first + TILE > middle):  # otherwise the tile has no unit to select from
        units = first + tl.arange(0, TILE)
        free = (units >= middle) & (units < late)
        offsets = batch * batch_stride + head * head_stride + units.to(tl.int64) * unit_stride
        keys = _ordered_keys(scores + offsets, free)
        counted = keys != 0
        if DIGIT > 0:
            counted = counted & ((keys >> (32 - 8 * DIGIT)) == prefix)
        digit = ((keys >> (24 - 8 * DIGIT)) & 255).to(tl.int32)
        # The histogram counts every unit: subtract those that do not count from their bin, 0.
        digits = tl.arange(0, 256)
        counts = tl.histogram(tl.where(counted, digit, 0), 256)
        left_out = TILE - tl.sum(counted.to(tl.int32), axis=0)
        counts -= tl.where(digits == 0, left_out, 0)
        tl.atomic_add(histograms + 256 * place + digits, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _chosen(
    scores: tl.tensor,
    threshold: tl.tensor,
    units: tl.tensor,
    start: tl.tensor,
    middle: tl.tensor,
    late: tl.tensor,
    end: tl.tensor,
    unit_stride: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Return masks of the units that are forced or above the threshold, and of those at it."""
    free = (units >= middle) & (units < late)
    forced = (units >= start) & (units < end) & ((units < middle) | (units >= late))
    keys = _ordered_keys(scores + units.to(tl.int64) * unit_stride, free)
    return forced | (keys > threshold), (keys == threshold) & (keys != 0)


@triton.jit(do_not_specialize=_GROWING)
def _count_chosen(
    scores: tl.tensor,
    histograms: tl.tensor,
    states: tl.tensor,
    counts: tl.tensor,
    kv_start: tl.tensor,
    kv_len: tl.tensor,
    batch_stride: tl.tensor,
    head_stride: tl.tensor,
    unit_stride: tl.tensor,
    num_heads: tl.tensor,
    num_units: tl.tensor,
    kept: tl.tensor,
    num_sink: tl.tensor,
    num_recent: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Count each tile's units that are forced or above the threshold, and those at it."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // num_heads, row % num_heads
    start, middle, late, end = _split(kv_start, kv_len, batch, num_units, num_sink, num_recent)
    threshold, _ = _after(histograms, states, row * 4 + 3)
    units = tile * TILE + tl.arange(0, TILE)
    row_scores = scores + batch * batch_stride + head * head_stride
    sure, equal = _chosen(row_scores, threshold, units, start, middle, late, end, unit_stride)
    tiles = tl.num_programs(0)
    tl.store(counts + row * 2 * tiles + tile, tl.sum(sure.to(tl.int32), axis=0))
    tl.store(counts + (row * 2 + 1) * tiles + tile, tl.sum(equal.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=_GROWING)
def _write_chosen(
    scores: tl.tensor,
    histograms: tl.tensor,
    states: tl.tensor,
    counts: tl.tensor,
    out: tl.tensor,
    kv_start: tl.tensor,
    kv_len: tl.tensor,
    batch_stride: tl.tensor,
    head_stride: tl.tensor,
    unit_stride: tl.tensor,
    num_heads: tl.tensor,
    num_units: tl.tensor,
    kept: tl.tensor,
    num_sink: tl.tensor,
    num_recent: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Write each tile's selected units after those of the tiles before it."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // num_heads, row % num_heads
    start, middle, late, end = _split(kv_start, kv_len, batch, num_units, num_sink, num_recent)
    if (tile * TILE < end) & ((tile + 1) * TILE > start):
        threshold, quota = _after(histograms, states, row * 4 + 3)
        units = tile * TILE + tl.arange(0, TILE)
        row_scores = scores + batch * batch_stride + head * head_stride
        sure, equal = _chosen(row_scores, threshold, units, start, middle, late, end, unit_stride)

        tiles = tl.num_programs(0)
        sure_before = tl.zeros([256], tl.int32)
        equal_before = tl.zeros([256], tl.int32)
        for first in range(0, tile, 256):
            earlier = first + tl.arange(0, 256)
            tile_counts = counts + row * 2 * tiles + earlier
            sure_before += tl.load(tile_counts, mask=earlier < tile, other=0)
            equal_before += tl.load(tile_counts + tiles, mask=earlier < tile, other=0)
        num_sure = tl.sum(sure_before, axis=0)
        num_equal = tl.sum(equal_before, axis=0)

        ties = equal.to(tl.int32)
        rank = num_equal + tl.cumsum(ties, axis=0) - ties
        taken = sure | (equal & (rank < quota))
        count = taken.to(tl.int32)
        place = num_sure + tl.minimum(num_equal, quota) + tl.cumsum(count, axis=0) - count
        tl.store(out + row * kept + place, units, mask=taken)
