"""group_softmax in Triton: one kernel for each tile's maximum and sum, one for the weights.

Each program of the second kernel merges the tiles' sums of its head's queries itself, which takes
less time than a third kernel in between.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topkbench.kernels.tiles import check_readable, on_device_of

_TILE = 1024


def group_softmax(
    scores: Tensor, scale: float, rule: str, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Return ``[B, Hkv, U]`` float32; see the api."""
    check_readable("scores", scores)
    scores = scores.contiguous()
    batch_size, num_heads, group, num_units = scores.shape
    out = torch.empty(batch_size, num_heads, num_units, device=scores.device)
    if out.numel() == 0:
        return out
    heads, tiles = batch_size * num_heads, triton.cdiv(num_units, _TILE)
    # The largest logit of each tile, and its sum of exponentials.
    parts = torch.empty(heads * group, 2, tiles, device=scores.device)
    factors = (float(scale), float(softcap or 1.0))
    with on_device_of(out):
        _sum_tiles[(tiles, heads * group)](
            scores, parts, *factors, num_units, CAPPED=softcap is not None, TILE=_TILE
        )
        _add_weights[(tiles, heads)](
            scores, parts, out, None if sinks is None else sinks.contiguous(), *factors, num_units,
            num_heads, GROUP=group, CAPPED=softcap is not None, ADDS=rule == "sum", TILE=_TILE,
        )  # fmt: skip
    return out


@triton.jit
def _logits(
    row: tl.tensor,
    units: tl.tensor,
    num_units: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    CAPPED: tl.constexpr,
) -> tl.tensor:
    """Read a tile's logits as float32; -inf where there is no unit."""
    products = tl.load(row + units, mask=units < num_units, other=float("-inf")).to(tl.float32)
    logits = products * scale
    if CAPPED:  # tanh(x) is 2 sigmoid(2 x) - 1
        capped = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
        logits = tl.where(logits == float("-inf"), logits, capped)
    return logits


@triton.jit(do_not_specialize=["num_units"])
def _sum_tiles(
    scores: tl.tensor,
    parts: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    num_units: tl.tensor,
    CAPPED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Write one tile's largest logit and sum of exponentials."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    units = tile * TILE + tl.arange(0, TILE)
    logits = _logits(scores + row * num_units, units, num_units, scale, softcap, CAPPED)
    largest = tl.max(logits, axis=0)
    level = tl.where(largest == float("-inf"), 0.0, largest)
    tiles = tl.num_programs(0)
    tl.store(parts + row * 2 * tiles + tile, largest)
    tl.store(parts + (row * 2 + 1) * tiles + tile, tl.sum(tl.exp(logits - level), axis=0))


@triton.jit(do_not_specialize=["num_units", "num_heads"])
def _add_weights(
    scores: tl.tensor,
    parts: tl.tensor,
    out: tl.tensor,
    sinks: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    num_units: tl.tensor,
    num_heads: tl.tensor,
    GROUP: tl.constexpr,
    CAPPED: tl.constexpr,
    ADDS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Write one tile's weights, summed or maximised over the group."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0)
    units = tile * TILE + tl.arange(0, TILE)
    found = tl.zeros([TILE], tl.float32)
    for query in range(GROUP):
        row = head * GROUP + query
        largest = float("-inf")
        for first in range(0, tiles, 256):
            others = first + tl.arange(0, 256)
            maxima = tl.load(
                parts + row * 2 * tiles + others, mask=others < tiles, other=float("-inf")
            )
            largest = tl.maximum(largest, tl.max(maxima, axis=0))
        sink = float("-inf")
        if sinks is not None:
            sink = tl.load(sinks + head % num_heads * GROUP + query).to(tl.float32)
            largest = tl.maximum(largest, sink)
        level = tl.where(largest == float("-inf"), 0.0, largest)
        whole = 0.0
        for first in range(0, tiles, 256):
            others = first + tl.arange(0, 256)
            here = parts + row * 2 * tiles + others
            maxima = tl.load(here, mask=others < tiles, other=float("-inf"))
            sums = tl.load(here + tiles, mask=others < tiles, other=0.0)
            whole += tl.sum(sums * tl.exp(maxima - level), axis=0)
        if sinks is not None:
            whole += tl.exp(sink - level)
        logits = _logits(scores + row * num_units, units, num_units, scale, softcap, CAPPED)
        weights = tl.exp(logits - level) / tl.where(whole > 0, whole, 1.0)
        found = found + weights if ADDS else tl.maximum(found, weights)
    tl.store(out + head * num_units + units, found, mask=units < num_units)
