"""Scores by the number of hash bits that a key shares with the queries of its group."""

import torch
from torch import Tensor

from topkbench.kernels.dispatch import Impl, implementation
from topkbench.kernels.hamming_score import reference
from topkbench.kernels.shapes import check_device, check_dtype, check_range, check_shape


def hamming_score(
    query_codes: Tensor,
    key_codes: Tensor,
    key_norms: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_len: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Score keys by the hash bits they share with the group's queries, summed over the group.

    Without norms: ``sum_g (rbit - 2 * ham_g)``, in int16, or in int32 if ``G * rbit`` is at least
    2**15. With norms: float32 ``sum_g (rbit - 2 * ham_g) / rbit * norm``, rounded in that order by
    every implementation, so that all of them rank equally.

    Args:
        query_codes: ``[B, Hkv, G, W]`` int32, ``W = rbit // 32``.
        key_codes: ``[B, Hkv, n, W]`` int32; may be a strided view of a larger cache.
        key_norms: ``[B, Hkv, n]`` float32, or None.
        kv_start: ``[B]`` int32 first valid slot of each row, or None for 0.
        kv_len: ``[B]`` int32 end of each row's valid slots, or None for ``n``.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``; never falls back.

    Returns:
        ``[B, Hkv, n]``, higher is more similar; the dtype's lowest value outside the valid range.

    Raises:
        ValueError: If a shape or device does not fit.
        TypeError: If codes are not int32 or norms not float32.

    Source:
        HATA (arXiv:2506.02572), section 3; the norm as in its released code.
    """
    check_shape("query_codes", query_codes, "[B, Hkv, G, W]", None, None, None, None)
    batch_size, num_heads, _, words = query_codes.shape
    check_shape("key_codes", key_codes, "[B, Hkv, n, W]", batch_size, num_heads, None, words)
    check_dtype("query_codes", query_codes, torch.int32)
    check_dtype("key_codes", key_codes, torch.int32)
    device = query_codes.device
    check_device("key_codes", key_codes, device)
    if key_norms is not None:
        kv_size = key_codes.shape[2]
        check_shape("key_norms", key_norms, "[B, Hkv, n]", batch_size, num_heads, kv_size)
        check_dtype("key_norms", key_norms, torch.float32)
        check_device("key_norms", key_norms, device)
    check_range(kv_start, kv_len, batch_size, device)
    run = implementation(reference.hamming_score, impl, device)
    return run(query_codes, key_codes, key_norms, kv_start, kv_len)
