"""Specification of hash_encode."""

import torch
from torch import Tensor


def hash_encode(states: Tensor, hash_weight: Tensor) -> Tensor:
    """Encode ``[B, Hkv, n, d]`` states as ``[B, Hkv, n, rbit // 32]`` int32 sign bits."""
    wide = torch.promote_types(states.dtype, torch.float32)
    bits = states.to(wide) @ hash_weight.to(wide) > 0
    # int64 while shifting, since bit 31 is the sign bit of an int32.
    shifts = torch.arange(32, device=states.device)
    words = bits.unflatten(-1, (-1, 32)).long() << shifts
    return words.sum(-1).to(torch.int32)
