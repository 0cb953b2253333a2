"""Specification of code_score."""

import torch
from torch import Tensor

from topkbench.kernels.shapes import valid_slots


def code_score(
    tables: Tensor, key_codes: Tensor, kv_start: Tensor | None, kv_len: Tensor | None
) -> Tensor:
    """Return ``[B, Hkv, G, n]`` float32 sums of looked-up products."""
    batch_size, num_heads, parts, group, _ = tables.shape
    num_slots = key_codes.shape[2]
    invalid = ~valid_slots(kv_start, kv_len, num_slots, tables.device)[:, None, None]
    score = tables.new_zeros(batch_size, num_heads, group, num_slots)
    for part in range(parts):
        codes = key_codes[:, :, None, :, part].long()
        # Codes outside the valid range may not be indices of centroids.
        codes = codes.masked_fill(invalid, 0).expand(-1, -1, group, -1)
        score += tables[:, :, part].gather(3, codes)
    return score.masked_fill(invalid, -torch.inf)
