"""group_softmax on a CPU: two passes over the scores, in blocks that fit the first-level cache.

The first computes each query's log-sum-exp, the second sums ``exp(logit - lse)`` over the group.
Computing every exponential twice takes less time than storing them.
"""

import math
from typing import Any

import numpy as np
import torch
from numba import config, get_thread_id, njit, prange
from torch import Tensor

from topkbench.kernels.addresses import bound_address
from topkbench.kernels.compiled import entry_point
from topkbench.kernels.intrinsics import load_float32, store_float32
from topkbench.kernels.softmax import exp, largest, scale_and_cap, total

_BLOCK = 2048


def group_softmax(
    scores: Tensor, scale: float, rule: str, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Return ``[B, Hkv, U]`` float32; see the api."""
    if scores.dtype == torch.float64:
        raise TypeError(
            "scores must be float32, bfloat16 or float16 for impl='cpu', got float64; use "
            "impl='reference'."
        )
    scores = scores.float().contiguous()
    batch_size, num_heads, group, num_units = scores.shape
    out = torch.empty(batch_size, num_heads, num_units)
    threads: int = vars(config)["NUMBA_NUM_THREADS"]
    blocks = torch.empty(threads, _BLOCK)
    lse = torch.empty(batch_size * num_heads * group)
    sink_logits, _sinks = bound_address(None if sinks is None else sinks.float())
    _reduce(
        scores.data_ptr(), out.data_ptr(), blocks.data_ptr(), lse.data_ptr(), sink_logits,
        (batch_size, num_heads, group, num_units), float(scale), float(softcap or 0.0),
        rule == "sum",
    )  # fmt: skip
    return out


@entry_point
def _reduce(
    scores: int,
    out: int,
    blocks: int,
    lse: int,
    sinks: int,
    sizes: tuple[int, int, int, int],
    scale: float,
    softcap: float,
    adds: bool,
) -> None:
    batch_size, num_heads, group, num_units = sizes
    factor, cap = np.float32(scale), np.float32(softcap)
    for row in prange(batch_size * num_heads * group):
        logits = blocks + 4 * _BLOCK * get_thread_id()
        sink = np.float32(-np.inf)
        if sinks != 0:
            sink = load_float32(sinks, row % (num_heads * group))
        value = _log_sum_exp(scores + 4 * row * num_units, num_units, factor, cap, sink, logits)
        store_float32(lse, row, value)
    num_blocks = (num_units + _BLOCK - 1) // _BLOCK
    for task in prange(batch_size * num_heads * num_blocks):
        head, first = task // num_blocks, task % num_blocks * _BLOCK
        count = min(_BLOCK, num_units - first)
        logits = blocks + 4 * _BLOCK * get_thread_id()
        sums = out + 4 * (head * num_units + first)
        for place in range(count):
            store_float32(sums, place, np.float32(0.0))
        for query in range(group):
            row = head * group + query
            whole = load_float32(lse, row)
            if whole == np.float32(-np.inf):
                continue
            scale_and_cap(
                scores + 4 * (row * num_units + first), logits, count, factor, cap
            )  # fmt: skip
            # The log-sum-exp is rounded, so that a logit may exceed it slightly.
            if adds:
                for place in range(count):
                    weight = exp(min(load_float32(logits, place) - whole, np.float32(0.0)))
                    store_float32(sums, place, load_float32(sums, place) + weight)
            else:
                for place in range(count):
                    weight = exp(min(load_float32(logits, place) - whole, np.float32(0.0)))
                    store_float32(sums, place, max(load_float32(sums, place), weight))


@njit(nogil=True)
def _log_sum_exp(
    row: int, count: int, scale: float, softcap: float, sink: float, logits: int
) -> Any:
    """Return the log-sum-exp of a row's logits and the sink, -inf if all are -inf."""
    maximum = np.float32(sink)
    denominator = np.float32(0.0 if sink == np.float32(-np.inf) else 1.0)
    for first in range(0, count, _BLOCK):
        size = min(_BLOCK, count - first)
        scale_and_cap(row + 4 * first, logits, size, scale, softcap)
        new = max(maximum, largest(logits, size))
        if new == np.float32(-np.inf):
            continue
        for place in range(size):
            store_float32(logits, place, exp(load_float32(logits, place) - new))
        shrunk = denominator * exp(maximum - new)
        denominator = shrunk + total(logits, size)
        maximum = new
    if maximum == np.float32(-np.inf):
        return maximum
    return maximum + np.float32(math.log(denominator))
