"""Specification of channel_score."""

import torch
from torch import Tensor

from topkbench.kernels.shapes import valid_slots


def channel_score(
    query: Tensor,
    channel_keys: Tensor,
    channels: Tensor,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
) -> Tensor:
    """Return ``[B, Hkv, G, n]`` float32 dot products (float64 when the inputs are)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    num_slots = channel_keys.shape[3]
    rows = channels.long()[..., None].expand(-1, -1, -1, num_slots)
    score = query.to(wide) @ channel_keys.gather(2, rows).to(wide)
    valid = valid_slots(kv_start, kv_len, num_slots, channel_keys.device)
    return score.masked_fill(~valid[:, None, None], -torch.inf)
