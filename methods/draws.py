"""Counter-based random numbers: each depends only on its seed and its number."""

import torch
from torch import Tensor

_SHIFTS_AND_FACTORS = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))
_STEP = -0x61C8864680B583EB


def draw(seed: Tensor | int, number: Tensor) -> Tensor:
    """Return an int64, uniform over all of int64, for each pair of seed and number.

    A sequential generator would make draws depend on how many were made before: on the other rows
    of the batch, and on whether an index was appended to or rebuilt.

    Args:
        seed: int64, broadcast with ``number``; a result of this function is a good seed.
        number: Whole numbers.

    Source:
        The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    mixed = seed + (number.long() + 1) * _STEP
    for shift, factor in _SHIFTS_AND_FACTORS:
        mixed = (mixed ^ _logical_shift(mixed, shift)) * factor
    return mixed ^ _logical_shift(mixed, 31)


def draw_tokens(
    seed: int, layer: int, num_heads: int, n: int, start: Tensor, end: Tensor
) -> Tensor:
    """Draw a number for each token, from its position in its row and the row's length.

    Args:
        seed: Seed of the draws.
        layer: Index of the layer.
        num_heads: Number of heads, each with draws of its own.
        n: Number of slots.
        start: ``[B]`` first slot of each row.
        end: ``[B]`` end of each row's slots.

    Returns:
        int64 ``[B, num_heads, n]``.
    """
    heads = torch.arange(num_heads, device=start.device)
    seeds = draw(draw(seed, torch.tensor(layer, device=start.device)), heads)
    seeds = draw(seeds, (end - start)[:, None])
    positions = torch.arange(n, device=start.device) - start[:, None]
    return draw(seeds[..., None], positions[:, None])


def _logical_shift(numbers: Tensor, by: int) -> Tensor:
    """Shift right and fill with zeros, as int64's own shift repeats the sign."""
    return torch.bitwise_and(numbers >> by, (1 << (64 - by)) - 1)
