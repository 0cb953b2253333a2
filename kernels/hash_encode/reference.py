"""Specification of hash_encode and encode_step."""

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


def encode_step(
    query_states: Tensor,
    key_states: Tensor,
    hash_weight: Tensor,
    key_codes: Tensor,
    key_norms: Tensor | None,
    kv_len: Tensor | None,
) -> Tensor:
    """Return the queries' codes, and write the new key's code and norm into the cache."""
    rows = torch.arange(len(key_states), device=key_states.device)
    slots = (key_codes.shape[2] if kv_len is None else kv_len.long()) - 1
    key_codes[rows, :, slots] = hash_encode(key_states, hash_weight)[:, :, 0]
    if key_norms is not None:
        norm = torch.linalg.vector_norm(key_states[:, :, 0], dim=-1, dtype=torch.float32)
        key_norms[rows, :, slots] = norm
    return hash_encode(query_states, hash_weight)
