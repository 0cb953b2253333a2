"""Hash codes of keys and queries: the sign bits of a projection, 32 per word."""

import torch
from torch import Tensor

from topkbench.kernels.dispatch import Impl, implementation
from topkbench.kernels.hash_encode import reference
from topkbench.kernels.shapes import (
    check_device,
    check_dtype,
    check_floating,
    check_range,
    check_shape,
)


def hash_encode(states: Tensor, hash_weight: Tensor, impl: Impl = "auto") -> Tensor:
    """Encode states as the signs of their projections.

    Bit ``j`` of word ``w`` is ``(states @ hash_weight)[32 * w + j] > 0``, accumulated in float32.
    Another order of summation may flip a bit whose projection is zero up to rounding.

    Args:
        states: ``[B, Hkv, n, d]`` keys, or ``[B, Hkv, G, d]`` queries; any floating dtype.
        hash_weight: ``[Hkv, d, rbit]``, ``rbit`` a multiple of 32.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``; never falls back.

    Returns:
        ``[B, Hkv, n, rbit // 32]`` int32.

    Raises:
        ValueError: If a shape does not fit, or ``rbit`` is not a multiple of 32.
        TypeError: If an argument is not floating point.

    Source:
        HATA (arXiv:2506.02572), section 3.
    """
    check_shape("states", states, "[B, Hkv, n, d]", None, None, None, None)
    _, num_heads, _, head_dim = states.shape
    _check_weight(hash_weight, num_heads, head_dim)
    check_floating("states", states)
    check_floating("hash_weight", hash_weight)
    check_device("hash_weight", hash_weight, states.device)
    run = implementation(reference.hash_encode, impl, states.device)
    return run(states, hash_weight)


def encode_step(
    query_states: Tensor,
    key_states: Tensor,
    hash_weight: Tensor,
    key_codes: Tensor,
    kv_len: Tensor | None = None,
    key_norms: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Encode a decode step's queries, and write its new key's code and norm into the cache.

    The new key belongs to slot ``kv_len[b] - 1`` of row ``b``, so ``kv_len`` already counts it.
    ``cpu`` and ``triton`` do everything in one kernel; nothing is read back to the host. With no
    query, ``G = 0``, only the key is appended.

    Args:
        query_states: ``[B, Hkv, G, d]``.
        key_states: ``[B, Hkv, 1, d]``.
        hash_weight: ``[Hkv, d, rbit]``, ``rbit`` a multiple of 32.
        key_codes: ``[B, Hkv, N, rbit // 32]`` int32, written in place; may be a strided view.
        kv_len: ``[B]`` int32, from 1 to ``N``, or None for ``N``.
        key_norms: ``[B, Hkv, N]`` float32, written in place, or None.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``; never falls back.

    Returns:
        The queries' codes, ``[B, Hkv, G, rbit // 32]`` int32.

    Raises:
        ValueError: If a shape or device does not fit, or ``rbit`` is not a multiple of 32.
        TypeError: If a dtype is wrong.

    Source:
        HATA (arXiv:2506.02572), section 4 and algorithm 3.
    """
    check_shape("query_states", query_states, "[B, Hkv, G, d]", None, None, None, None)
    batch_size, num_heads, _, head_dim = query_states.shape
    check_shape("key_states", key_states, "[B, Hkv, 1, d]", batch_size, num_heads, 1, head_dim)
    _check_weight(hash_weight, num_heads, head_dim)
    words = hash_weight.shape[2] // 32
    check_shape("key_codes", key_codes, "[B, Hkv, N, W]", batch_size, num_heads, None, words)
    check_dtype("key_codes", key_codes, torch.int32)
    for argument, tensor in (
        ("query_states", query_states),
        ("key_states", key_states),
        ("hash_weight", hash_weight),
    ):
        check_floating(argument, tensor)
    device = query_states.device
    for argument, tensor in (
        ("key_states", key_states),
        ("hash_weight", hash_weight),
        ("key_codes", key_codes),
    ):
        check_device(argument, tensor, device)
    check_range(None, kv_len, batch_size, device)
    if key_norms is not None:
        capacity = key_codes.shape[2]
        check_shape("key_norms", key_norms, "[B, Hkv, N]", batch_size, num_heads, capacity)
        check_dtype("key_norms", key_norms, torch.float32)
        check_device("key_norms", key_norms, device)
    run = implementation(reference.encode_step, impl, device)
    return run(query_states, key_states, hash_weight, key_codes, key_norms, kv_len)


def _check_weight(hash_weight: Tensor, num_heads: int, head_dim: int) -> None:
    check_shape("hash_weight", hash_weight, "[Hkv, d, rbit]", num_heads, head_dim, None)
    rbit = hash_weight.shape[2]
    if rbit == 0 or rbit % 32:
        raise ValueError(f"hash_weight must have rbit, a positive multiple of 32, got {rbit}.")
