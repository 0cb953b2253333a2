"""4-bit quantisation of keys, per token."""

import torch
from torch import Tensor


def bytes_per_token(head_dim: int) -> int:
    """Return the bytes of one head's quantised key; ``head_dim`` must be even."""
    return head_dim // 2 + 4


def quantise(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Round keys ``[..., d]`` to 16 levels between each token's lowest and highest channel.

    Returns:
        uint8 ``[..., d / 2]``, with channel ``j`` in the low half of byte ``j`` and channel
        ``j + d / 2`` in its high half; and float16 ``[..., 2]``, the lowest channel's value and the
        step between two levels.
    """
    wide = keys.float()
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    ranges = torch.cat((low, (high - low) / 15), -1).half()
    low, step = ranges.float().split(1, -1)
    levels = ((wide - low) / step.clamp_min(torch.finfo(torch.float16).tiny)).round()
    first, second = levels.clamp(0, 15).to(torch.uint8).chunk(2, -1)
    return first | second << 4, ranges


def dequantise(codes: Tensor, ranges: Tensor) -> Tensor:
    """Return float32 keys ``[..., d]`` from the two results of ``quantise``."""
    low, step = ranges.float().split(1, -1)
    return torch.cat((codes & 15, codes >> 4), -1) * step + low
