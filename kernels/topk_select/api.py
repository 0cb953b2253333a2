"""The k best units of each head; ties go to the lower index, sinks and recent units are forced."""

import torch
from torch import Tensor

from topkbench.kernels.dispatch import Impl, implementation
from topkbench.kernels.shapes import check_dtype, check_range, check_shape
from topkbench.kernels.topk_select import reference


def topk_select(
    scores: Tensor,
    k: int,
    num_sink: int = 0,
    num_recent: int = 0,
    kv_start: Tensor | None = None,
    kv_len: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Select the ``k`` highest scores of each head; among equal scores the lower index wins.

    The first ``num_sink`` and last ``num_recent`` units of a row's valid range are selected
    whatever they score, and count towards ``k``. A score of -inf, or an integer dtype's lowest
    value, marks an absent unit, which is never selected unless it is forced.

    Args:
        scores: ``[B, H, U]`` float32, bfloat16, float16, float64, int16 or int32, without NaN.
        k: Number of units to select per head, at least 1.
        num_sink: Units forced at the start of the valid range.
        num_recent: Units forced at its end.
        kv_start: ``[B]`` int32 first valid unit of each row, or None for 0.
        kv_len: ``[B]`` int32 end of each row's valid units, or None for ``U``.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``; never falls back.

    Returns:
        ``[B, H, min(k, U)]`` int32, ascending; short rows are padded with -1 at the end.

    Raises:
        ValueError: If a shape does not fit, ``k < 1``, or more units are forced than ``k``.
        TypeError: If the scores have another dtype.
    """
    check_shape("scores", scores, "[B, H, U]", None, None, None)
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    check_dtype("scores", scores, torch.int16, torch.int32, *floats)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    if num_sink < 0 or num_recent < 0 or num_sink + num_recent > k:
        raise ValueError(
            f"num_sink + num_recent must lie between 0 and k={k}, got {num_sink} + {num_recent}."
        )
    check_range(kv_start, kv_len, scores.shape[0], scores.device)
    run = implementation(reference.topk_select, impl, scores.device)
    return run(scores, k, num_sink, num_recent, kv_start, kv_len)
