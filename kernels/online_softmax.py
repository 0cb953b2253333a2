"""Softmax over parts of a row, shared by the CPU operators that attend.

Each part has, one after another, the weighted sums of its values ``[G, dv]``, the maxima of its
logits ``[G]`` and its denominators ``[G]``, float32. Source: online softmax (arXiv:1805.02867).
"""

import math

import numpy as np
import torch
from numba import njit

from topkbench.kernels.intrinsics import (
    load_float32,
    load_int32,
    store_bfloat16,
    store_float32,
)
from topkbench.kernels.softmax import exp, larger, largest, scale_and_cap, total

_LOWEST, _TINY = np.finfo(np.float32).min, np.finfo(np.float32).tiny


def num_parts(num_tasks: int, num_tokens: int, least: int) -> int:
    """Return the number of parts of each head's tokens, so that all cores have work.

    Args:
        num_tasks: Heads of all rows of the batch.
        num_tokens: Tokens of a head.
        least: Least number of tokens per part.
    """
    threads = torch.get_num_threads()
    if num_tasks == 0 or num_tasks % threads == 0 or num_tasks >= 4 * threads:
        return 1
    parts = -(-4 * threads // num_tasks)
    return max(1, min(parts, num_tokens // least))


@njit(nogil=True)
def empty_part(work: int, group: int, value_dim: int) -> None:
    """Write a part without any token."""
    sums = group * value_dim
    for i in range(sums):
        store_float32(work, i, np.float32(0.0))
    for g in range(group):
        store_float32(work, sums + g, np.float32(-np.inf))
        store_float32(work, sums + group + g, np.float32(0.0))


@njit(nogil=True)
def soften(
    logits: int,
    filled: int,
    maximum: int,
    denominator: int,
    sums: int,
    value_dim: int,
    scale: float,
    softcap: float,
    weights: int,
    entries: int,
) -> None:
    """Turn one query's dot products into softmax weights, rescaling its sums to a new maximum."""
    zero = np.float32(0.0)
    scale_and_cap(logits, logits, filled, scale, softcap)
    if weights != 0:
        for place in range(filled):
            weight = load_float32(weights, np.int64(load_int32(entries, place)))
            store_float32(logits, place, load_float32(logits, place) + weight)
    old = load_float32(maximum, 0)
    new = larger(old, largest(logits, filled))
    if new == np.float32(-np.inf):  # all log weights so far are -inf
        for place in range(filled):
            store_float32(logits, place, zero)
        return
    if new > old:
        shrink = exp(old - new)
        store_float32(maximum, 0, new)
        store_float32(denominator, 0, load_float32(denominator, 0) * shrink)
        for i in range(value_dim):
            store_float32(sums, i, load_float32(sums, i) * shrink)
    for place in range(filled):
        store_float32(logits, place, exp(load_float32(logits, place) - new))
    store_float32(denominator, 0, load_float32(denominator, 0) + total(logits, filled))


@njit(nogil=True)
def merge(
    work: int,
    part_size: int,
    parts: int,
    sinks: int,
    out: int,
    lse: int,
    group: int,
    value_dim: int,
    narrow: bool,
) -> None:
    """Merge the parts of one index head into its first part, and write its outputs."""
    for g in range(group):
        maximum = np.float32(-np.inf)
        for part in range(parts):
            base = work + 4 * part * part_size
            maximum = max(maximum, load_float32(base, group * value_dim + g))
        if sinks != 0:
            maximum = max(maximum, load_float32(sinks, g))
        level = max(maximum, _LOWEST)  # finite, so that all shares are 0 if nothing is selected
        denominator = np.float32(0.0)
        for part in range(parts):
            base = work + 4 * part * part_size
            share = exp(load_float32(base, group * value_dim + g) - level)
            denominator += share * load_float32(base, group * (value_dim + 1) + g)
        if sinks != 0:
            denominator += exp(load_float32(sinks, g) - level)
        if denominator < _TINY:  # false for NaN, which stays
            denominator = _TINY
        for part in range(parts):
            base = work + 4 * part * part_size
            share = exp(load_float32(base, group * value_dim + g) - level) / denominator
            for i in range(g * value_dim, (g + 1) * value_dim):
                before = load_float32(work, i) if part > 0 else np.float32(0.0)
                store_float32(work, i, before + share * load_float32(base, i))
        for i in range(g * value_dim, (g + 1) * value_dim):
            if narrow:
                store_bfloat16(out, i, load_float32(work, i))
            else:
                store_float32(out, i, load_float32(work, i))
        store_float32(lse, g, maximum + np.float32(math.log(denominator)))
