"""Scores from product-quantised codes: for each key, a sum of table entries."""

import torch
from torch import Tensor

from topkbench.kernels.code_score import reference
from topkbench.kernels.dispatch import Impl, implementation
from topkbench.kernels.shapes import check_device, check_dtype, check_range, check_shape

_MOST_CODES = 256  # of a byte


def code_score(
    tables: Tensor,
    key_codes: Tensor,
    kv_start: Tensor | None = None,
    kv_len: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Score each key for each query by the sum, over its parts, of the code's table entry.

    Args:
        tables: ``[B, Hkv, m, G, C]`` float32: for each of ``m`` parts, each query's product with
            each of ``C`` centroids, at most 256.
        key_codes: ``[B, Hkv, n, m]`` uint8, each below ``C`` within the valid range; may be a
            strided view of a larger cache.
        kv_start: ``[B]`` int32 first valid slot of each row, or None for 0.
        kv_len: ``[B]`` int32 end of each row's valid slots, or None for ``n``.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``; never falls back.

    Returns:
        ``[B, Hkv, G, n]`` float32, the parts added in order, so that all implementations round
        equally; -inf outside the valid range.

    Raises:
        ValueError: If a shape or device does not fit, or there are more than 256 centroids.
        TypeError: If tables are not float32 or codes not uint8.

    Source:
        PQCache (arXiv:2407.12820), section 3.
    """
    check_shape("tables", tables, "[B, Hkv, m, G, C]", None, None, None, None, None)
    batch_size, num_heads, parts, _, count = tables.shape
    check_shape("key_codes", key_codes, "[B, Hkv, n, m]", batch_size, num_heads, None, parts)
    check_dtype("tables", tables, torch.float32)
    check_dtype("key_codes", key_codes, torch.uint8)
    if not 1 <= count <= _MOST_CODES:
        raise ValueError(f"tables must have 1 to 256 centroids, as a code is a byte, got {count}.")
    device = tables.device
    check_device("key_codes", key_codes, device)
    check_range(kv_start, kv_len, batch_size, device)
    run = implementation(reference.code_score, impl, device)
    return run(tables, key_codes, kv_start, kv_len)
