"""Shared by the Triton attention kernels: the soft cap's tanh, and split-K's parts."""

import triton
import triton.language as tl
from torch import Tensor

from topkbench.kernels.tiles import on_device_of, padded


def merge(
    means: Tensor,
    part_lse: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    together: int = 8,
) -> None:
    """Merge the parts of each query into ``out`` and ``lse``.

    Args:
        means: ``[parts, B, Hq, dv]`` float32, each part's weighted mean of the values.
        part_lse: ``[parts, B, Hq]`` float32, each part's log-sum-exp; -inf for an empty part.
        sinks: ``[Hq]`` logits without a value, added to the denominators; None for none.
        out: ``[B, Hq, dv]``, written; zeros where all parts are empty.
        lse: ``[B, Hq]`` float32, written.
        together: Number of parts read at a time, a power of two.
    """
    parts, batch_size, num_heads, value_dim = means.shape
    with on_device_of(out):
        _merge_parts[(batch_size * num_heads,)](
            means, part_lse, None if sinks is None else sinks.contiguous(), out, lse, parts,
            batch_size * num_heads, num_heads,
            VALUE_DIM=value_dim, PADDED_DIM=padded(value_dim), MERGED=together, num_warps=4,
        )  # fmt: skip


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """Return the hyperbolic tangent to float32's precision, also of small numbers.

    Near zero it uses the continued fraction
    ``x / (1 + x^2 / (3 + x^2 / (5 + x^2 / (7 + x^2 / 9))))``, multiplied out; elsewhere the
    exponential, which near zero would lose digits to cancellation.
    """
    square = x * x
    above = 945.0 + square * (105.0 + square)
    below = 945.0 + square * (420.0 + square * 15.0)
    decay = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.5, x * above / below, tl.where(x < 0, -large, large))


@triton.jit
def store_part(
    means: tl.tensor,
    lse: tl.tensor,
    place: tl.tensor,
    is_query: tl.tensor,
    dims: tl.tensor,
    maximum: tl.tensor,
    denominator: tl.tensor,
    sums: tl.tensor,
    VALUE_DIM: tl.constexpr,
) -> None:
    """Write the online softmax of one part, for a tile of queries, as ``merge`` reads it.

    Args:
        means: ``[parts, B, Hq, dv]``, of which row ``place`` is written for each query.
        lse: ``[parts, B, Hq]``.
        place: ``[PADDED_GROUP]`` each query's row in them.
        is_query: ``[PADDED_GROUP]`` whether it is a query or padding.
        dims: ``[PADDED_DIM]`` channels of the values from 0.
        maximum: ``[PADDED_GROUP]`` largest logit.
        denominator: ``[PADDED_GROUP]`` sum of the exponentials of logits minus the maximum.
        sums: ``[PADDED_GROUP, PADDED_DIM]`` values, weighted by these exponentials.
        VALUE_DIM: Number of channels of the values.
    """
    counted = denominator > 0
    divisor = tl.where(counted, denominator, 1.0)
    part_lse = tl.where(counted, maximum + tl.log(divisor), float("-inf"))
    tl.store(lse + place, part_lse, mask=is_query)
    tl.store(
        means + place[:, None] * VALUE_DIM + dims[None, :],
        sums / divisor[:, None],
        mask=is_query[:, None] & (dims < VALUE_DIM)[None, :],
    )


@triton.jit(do_not_specialize=["parts", "num_queries", "num_heads"])
def _merge_parts(
    means: tl.tensor,
    part_lse: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    parts: tl.tensor,
    num_queries: tl.tensor,
    num_heads: tl.tensor,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    MERGED: tl.constexpr,
) -> None:
    """Merge the parts of one query, weighted by their shares of the softmax's denominator."""
    query = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, PADDED_DIM)
    maximum = float("-inf")
    for first in range(0, parts, MERGED):
        part = first + tl.arange(0, MERGED)
        logs = tl.load(
            part_lse + part.to(tl.int64) * num_queries + query,
            mask=part < parts,
            other=float("-inf"),
        )
        maximum = tl.maximum(maximum, tl.max(logs, axis=0))
    sink = float("-inf")
    if sinks is not None:
        sink = tl.load(sinks + query % num_heads).to(tl.float32)
        maximum = tl.maximum(maximum, sink)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = 0.0
    merged = tl.zeros([PADDED_DIM], tl.float32)
    for first in range(0, parts, MERGED):
        part = first + tl.arange(0, MERGED)
        place = part.to(tl.int64) * num_queries + query
        logs = tl.load(part_lse + place, mask=part < parts, other=float("-inf"))
        shares = tl.exp(logs - shift)
        part_means = tl.load(
            means + place[:, None] * VALUE_DIM + dims[None, :],
            mask=(part < parts)[:, None] & (dims < VALUE_DIM)[None, :],
            other=0.0,
        )
        total += tl.sum(shares, axis=0)
        merged += tl.sum(shares[:, None] * part_means, axis=0)
    if sinks is not None:
        total += tl.exp(sink - shift)
    counted = total > 0
    divisor = tl.where(counted, total, 1.0)
    tl.store(out + query * VALUE_DIM + dims, merged / divisor, mask=dims < VALUE_DIM)
    tl.store(lse + query, tl.where(counted, shift + tl.log(divisor), float("-inf")))
