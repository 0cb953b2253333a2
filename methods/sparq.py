"""SparQ: keys ranked by the query's largest channels; the mean value stands for the rest."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from topkbench.kernels.channel_score.api import channel_score
from topkbench.kernels.group_softmax.api import group_softmax
from topkbench.methods.base import (
    Geometry,
    Index,
    Policy,
    PrefillInputs,
    Ranking,
    Remainder,
    ScoreKind,
    ScoringMethod,
    Selection,
    StepContext,
    Traits,
    check_whole,
    kv_bytes,
)


@dataclass(kw_only=True)
class SparQIndex(Index):
    """A channel-major copy of the keys, and the sum of the values.

    Attributes:
        channel_keys: ``[B, Hkv, d, capacity]`` in the keys' dtype, so that a few channels of all
            tokens can be read without the others.
        value_sum: float32 ``[B, Hkv, d]`` over the valid tokens.
        undone: Tokens removed by ``undo_append`` and not appended again yet; their values are still
            in the sum.
    """

    channel_keys: Tensor
    value_sum: Tensor
    undone: int = 0

    def undo_append(self) -> None:
        super().undo_append()
        self.undone += 1


@dataclass
class SparQQuery:
    """A step's queries in the channels selected for it.

    Attributes:
        query: ``[B, Hkv, G, r]``, scaled up so that a dot product over these channels approximates
            the full one.
        channels: int64 ``[B, Hkv, r]``.
    """

    query: Tensor
    channels: Tensor


@dataclass(kw_only=True)
class SparQ(ScoringMethod[SparQIndex, SparQQuery]):
    """Rank keys by the ``rank`` channels in which the group's queries are largest.

    These are the channels with the largest ``sum over the group of |q|``, selected again at each
    step. A dot product over them approximates the full one; it is divided by
    ``sqrt(d |q_r|_1 / |q|_1)`` where attention divides by ``sqrt(d)``. Let alpha be the selected
    tokens' share of the softmax of these approximate logits over all tokens. The output is
    ``alpha * attention + (1 - alpha) * mean value``, with the mean over all cached values. What a
    head's learned sink takes of the softmax is part of alpha.

    Attributes:
        rank: Channels scored; None for a quarter of ``head_dim``.
        mean_value: Add the mean value with the weight that the selected tokens lack; if False, the
            output is that of attention over the selected tokens.
        local_share: Share of ``k`` for the last tokens, used under the native protocol only, where
            it replaces ``num_recent``.

    Source:
        SparQ Attention (arXiv:2312.04985), section 3 and algorithm 1. As in the released code, the
        queries of a group select channels together and, natively, tokens by the plain sum of their
        approximate logits; the unified policy sums their softmax. In that code the current token is
        additional to the budget, and the window of ``k / 4`` counts towards it; here both count
        towards it, the current token being the last of the window. The mean is over all cached
        values, including the selected ones. Side information is a second, channel-major copy of
        the keys, ``d`` values per token: from the row-major keys a few channels could not be read
        without reading almost everything. The mean is kept as one float32 sum per KV head.

    Compared with the authors' code:
        ``llminference/methods/ann_attention.py`` (graphcore-research/llm-inference-research):
        results agree when run on the same tensors. Difference: the current token counts towards
        ``k``, there it is additional.
    """

    name: ClassVar[str] = "sparq"
    score_kind: ClassVar[ScoreKind] = "logit"
    traits: ClassVar[Traits] = Traits(index="running")  # the sum of the values

    rank: int | None = None
    mean_value: bool = True
    local_share: float = 0.25

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_whole("rank", self.rank)
        if not 0 <= self.local_share <= 1:
            raise ValueError(f"local_share must be a share from 0 to 1, got {self.local_share}.")

    def channels(self, head_dim: int) -> int:
        """Return the number of channels scored for a head of ``head_dim``."""
        return max(1, head_dim // 4) if self.rank is None else self.rank

    def unsupported_reason(self, geometry: Geometry, policy: Policy | None = None) -> str | None:
        if self.channels(geometry.head_dim) > geometry.head_dim:
            return f"rank must be at most head_dim={geometry.head_dim}, got {self.rank}."
        return super().unsupported_reason(geometry, policy)

    def native_policy(self, policy: Policy) -> Policy:
        policy = super().native_policy(policy)
        recent = min(int(self.local_share * policy.k), policy.k - policy.num_sink)
        return replace(policy, num_recent=recent)

    def build_index(self, prefill: PrefillInputs) -> SparQIndex:
        keys, values = prefill.key_states, prefill.value_states
        batch_size, num_kv_heads, n, head_dim = keys.shape
        channel_keys = keys.new_zeros(batch_size, num_kv_heads, head_dim, prefill.capacity)
        channel_keys[..., :n] = keys.mT
        valid = prefill.valid_slots()[:, None, :, None]
        return SparQIndex(
            channel_keys=channel_keys,
            value_sum=values.masked_fill(~valid, 0).sum(2, dtype=torch.float32),
            **Index.counts(prefill),
        )

    def append(self, index: SparQIndex, key_states: Tensor, value_states: Tensor) -> None:
        slot = index.advance()
        index.put(index.channel_keys.mT, slot, key_states[:, :, 0])
        if index.undone:
            index.undone -= 1
        else:
            index.value_sum += value_states[:, :, 0]

    def encode(self, index: SparQIndex, context: StepContext) -> SparQQuery:
        query_states = context.query_states
        size = query_states.float().abs()
        rank = self.channels(query_states.shape[3])
        channels = size.sum(2).topk(rank, dim=-1).indices
        shared = channels[:, :, None].expand(-1, -1, size.shape[2], -1)
        covered = size.gather(3, shared).sum(3, keepdim=True)
        # The factor 1 / sqrt(|q_r|_1 / |q|_1) is applied to the query's few channels instead of all
        # tokens' scores; a query of zeros scores zero in any case.
        tiny = torch.finfo(torch.float32).tiny
        factor = (size.sum(3, keepdim=True) / covered.clamp_min(tiny)).sqrt()
        scaled = (query_states.gather(3, shared) * factor).to(query_states.dtype)
        return SparQQuery(scaled, channels)

    def score(self, encoded: SparQQuery, index: SparQIndex, context: StepContext) -> Tensor:
        keys = index.channel_keys[..., : index.length]
        bounds = (index.kv_start, index.kv_len)
        impl = self.impl_for("channel_score")
        return channel_score(encoded.query, keys, encoded.channels, *bounds, impl=impl)

    def select(
        self, ranking: Ranking[SparQQuery], index: SparQIndex, context: StepContext
    ) -> Selection:
        selection = super().select(ranking, index, context)
        if self.mean_value:
            logits = ranking.raw_scores
            selection.remainder = self._remainder(selection.indices, logits, index, context)
            selection.complete = False  # a row of which all tokens are kept has no remainder
        return selection

    def _remainder(
        self, indices: Tensor, logits: Tensor, index: SparQIndex, context: StepContext
    ) -> Remainder:
        """Return the mean value and its weight: the softmax mass of the tokens not selected."""
        batch_size, num_kv_heads, group, _ = logits.shape
        per_query = logits.flatten(1, 2)[:, :, None]  # each query is a group of one
        impl = self.impl_for("group_softmax")
        shape = (context.softcap, context.sinks)
        weights = group_softmax(per_query, context.scale, "sum", *shape, impl)
        chosen = indices.long().unflatten(1, (num_kv_heads, -1)).expand(-1, -1, group, -1)
        # Padding repeats the row's first selected token; an empty row has no weights.
        chosen = torch.where(chosen < 0, chosen[..., :1].clamp_min(0), chosen)
        remaining = weights.scatter_(2, chosen.flatten(1, 2), 0).sum(2)
        start, end = index.row_bounds(batch_size, weights.device)
        mean = index.value_sum / (end - start)[:, None, None]
        return Remainder(mean, remaining.clamp(max=1))

    def index_bytes_per_token(self, geometry: Geometry) -> float:
        return float(geometry.num_kv_heads * geometry.head_dim * geometry.dtype_bytes)

    def bytes_read(self, geometry: Geometry, n: int, read: int, scanned: int | None = None) -> int:
        rank = self.channels(geometry.head_dim)
        channels = n * geometry.num_kv_heads * rank * geometry.dtype_bytes
        mean = 4 * geometry.num_kv_heads * geometry.value_width if self.mean_value else 0
        return channels + mean + kv_bytes(geometry, read)
