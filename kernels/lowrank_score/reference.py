"""Specification of lowrank_score."""

import torch
from torch import Tensor

from topkbench.kernels.shapes import valid_slots


def lowrank_score(
    query: Tensor, keys: Tensor, kv_start: Tensor | None, kv_len: Tensor | None
) -> Tensor:
    """Return ``[B, Hkv, G, n]`` float32 dot products (float64 when the inputs are)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    score = query.to(wide) @ keys.to(wide).transpose(-1, -2)
    valid = valid_slots(kv_start, kv_len, keys.shape[2], keys.device)
    return score.masked_fill(~valid[:, None, None], -torch.inf)
