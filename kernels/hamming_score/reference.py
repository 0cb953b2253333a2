"""Specification of hamming_score."""

import torch
from torch import Tensor

from topkbench.kernels.shapes import count_dtype, valid_slots


def hamming_score(
    query_codes: Tensor,
    key_codes: Tensor,
    key_norms: Tensor | None,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
) -> Tensor:
    """Return ``[B, Hkv, n]`` int16 or int32 agreement, or float32 agreement times norm."""
    _, _, group, words = query_codes.shape
    num_slots = key_codes.shape[2]
    rbit = 32 * words
    # One query at a time: the [B, Hkv, G, n, W] result for all would be the largest tensor here.
    distance = torch.zeros(key_codes.shape[:3], dtype=torch.int32, device=key_codes.device)
    for query in range(group):
        distance += _popcount(query_codes[:, :, query, None] ^ key_codes).sum(-1).int()
    score = group * rbit - 2 * distance
    invalid = ~valid_slots(kv_start, kv_len, num_slots, key_codes.device)[:, None]
    if key_norms is None:
        dtype = count_dtype(group, words)
        return score.to(dtype).masked_fill(invalid, torch.iinfo(dtype).min)
    return (score.float() / rbit * key_norms).masked_fill(invalid, -torch.inf)


def _popcount(words: Tensor) -> Tensor:
    """Count the set bits of each int32 by adding neighbours of 1, 2, 4, 8 and 16 bits."""
    # int64 and a mask, because >> on int32 extends the sign.
    count = words.long() & 0xFFFFFFFF
    count = (count & 0x55555555) + (count >> 1 & 0x55555555)
    count = (count & 0x33333333) + (count >> 2 & 0x33333333)
    count = (count & 0x0F0F0F0F) + (count >> 4 & 0x0F0F0F0F)
    count = (count & 0x00FF00FF) + (count >> 8 & 0x00FF00FF)
    return (count & 0xFFFF) + (count >> 16)
