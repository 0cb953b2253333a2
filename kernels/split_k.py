"""Shared by the Triton attention kernels: the soft cap's tanh, and split-K's parts."""

import triton
import triton.language as tl
from torch import Tensor

from topkbench.kernels.tiles import on_device_of, padded


def merge(means: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, together: int = 8) -> None:
    """Merge the parts of each query into ``out`` and ``lse``.

    Args:
        means: ``[parts, B, Hq, d]`` float32, each part's weighted mean of the values.
        part_lse: ``[parts, B, Hq]`` float32, each part's log-sum-exp; -inf for an empty part.
        out: ``[B, Hq, d]``, written; zeros where all parts are empty.
        lse: ``[B, Hq]`` float32, written.
        together: Number of parts read at a time, a power of two.
    """
    parts, batch_size, num_heads, head_dim = means.shape
    with on_device_of(out):
        _merge_parts[(batch_size * num_heads,)](
            means, part_lse, out, lse, parts, batch_size * num_heads,
            HEAD_DIM=head_dim, PADDED_DIM=padded(head_dim), MERGED=together, num_warps=4,
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
    HEAD_DIM: tl.constexpr,
) -> None:
    """Write the online softmax of one part, for a tile of queries, as ``merge`` reads it.

    Args:
        means: ``[parts, B, Hq, d]``, of which row ``place`` is written for each query.
        lse: ``[parts, B, Hq]``.
        place: ``[PADDED_GROUP]`` each query's row in them.
        is_query: ``[PADDED_GROUP]`` whether it is a query or padding.
        dims: ``[PADDED_DIM]`` channels from 0.
        maximum: ``[PADDED_GROUP]`` largest logit.
        denominator: ``[PADDED_GROUP]`` sum of the exponentials of logits minus the maximum.
        sums: ``[PADDED_GROUP, PADDED_DIM]`` values, weighted by these exponentials.
        HEAD_DIM: Number of channels.
    """
    counted = denominator > 0
    divisor = tl.where(counted, denominator, 1.0)
    part_lse = tl.where(counted, maximum + tl.log(divisor), float("-inf"))
    tl.store(lse + place, part_lse, mask=is_query)
    tl.store(
        means + place[:, None] * HEAD_DIM + dims[None, :],
        sums / divisor[:, None],
        mask=is_query[:, None] & (dims < HEAD_DIM)[None, :],
    )


@triton.jit(do_not_specialize=["parts", "num_queries"])
def _merge_parts(
    means: tl.tensor,
    part_lse: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    parts: tl.tensor,
    num_queries: tl.tensor,
    HEAD_DIM: tl.constexpr,
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
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = 0.0
    merged = tl.zeros([PADDED_DIM], tl.float32)
    for first in range(0, parts, MERGED):
        part = first + tl.arange(0, MERGED)
        place = part.to(tl.int64) * num_queries + query
        logs = tl.load(part_lse + place, mask=part < parts, other=float("-inf"))
        shares = tl.exp(logs - shift)
        part_means = tl.load(
            means + place[:, None] * HEAD_DIM + dims[None, :],
            mask=(part < parts)[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        total += tl.sum(shares, axis=0)
        merged += tl.sum(shares[:, None] * part_means, axis=0)
    counted = total > 0
    divisor = tl.where(counted, total, 1.0)
    tl.store(out + query * HEAD_DIM + dims, merged / divisor, mask=dims < HEAD_DIM)
    tl.store(lse + query, tl.where(counted, shift + tl.log(divisor), float("-inf")))
