"""Numbers that look random and depend on what they are drawn for, and on nothing else."""

import torch
from torch import Tensor

_SHIFTS_AND_FACTORS = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))
_STEP = -0x61C8864680B583EB


def draw(seed: Tensor | int, number: Tensor) -> Tensor:
    """Return int64 numbers, uniform over all of int64, one for each pair of seed and number.

    A stream of numbers that is drawn one after the other would depend on how many were drawn
    before: on a row's neighbours, and on whether an index was appended to or built anew.

    Args:
        seed: int64, broadcast with ``number``; what an earlier call returned is a good seed.
        number: Whole numbers.

    Source:
        The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    mixed = seed + (number.long() + 1) * _STEP
    for shift, factor in _SHIFTS_AND_FACTORS:
        mixed = (mixed ^ _shifted(mixed, shift)) * factor
    return mixed ^ _shifted(mixed, 31)


def draw_tokens(
    seed: int, layer: int, num_heads: int, n: int, start: Tensor, end: Tensor
) -> Tensor:
    """Draw a number for each token, by its place in its row, and by the row's length.

    Args:
        seed: Of the draws.
        layer: Index of the layer.
        num_heads: Heads that draw apart.
        n: Slots.
        start: ``[B]`` first slot of each row.
        end: ``[B]`` end of each row's slots.

    Returns:
        int64 ``[B, num_heads, n]``.
    """
    heads = torch.arange(num_heads, device=start.device)
    seeds = draw(draw(seed, torch.tensor(layer, device=start.device)), heads)
    seeds = draw(seeds, (end - start)[:, None])
    places = torch.arange(n, device=start.device) - start[:, None]
    return draw(seeds[..., None], places[:, None])


def _shifted(numbers: Tensor, by: int) -> Tensor:
    """Shift right and fill with zeros; int64's own shift repeats the sign."""
    return torch.bitwise_and(numbers >> by, (1 << (64 - by)) - 1)
