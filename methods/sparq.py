"""SparQ: keys ranked by the few channels in which the query is largest, the rest by its mean."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from topkbench.kernels.channel_score.api import channel_score
from topkbench.kernels.group_softmax.api import group_softmax
from topkbench.methods.base import (
    Geometry,
    Index,
    Policy,
    PrefillInputs,
    Remainder,
    Selection,
    TopKMethod,
    check_whole,
    kv_bytes,
)


@dataclass(kw_only=True)
class SparQIndex(Index):
    """The keys once more, channel by channel, and the sum of the values.

    Attributes:
        channel_keys: ``[B, Hkv, d, capacity]`` in the keys' dtype, so that a few channels of all
            tokens are read without the others.
        value_sum: float32 ``[B, Hkv, d]`` over the valid tokens.
        scale: The attention's factor on dot products.
        softcap: As in attention, or None.
        taken_back: Tokens that were taken back and come again: their values are in the sum.
    """

    channel_keys: Tensor
    value_sum: Tensor
    scale: float
    softcap: float | None
    taken_back: int = 0

    def undo_append(self) -> None:
        super().undo_append()
        self.taken_back += 1


@dataclass
class SparQQuery:
    """A step's queries in the channels that were chosen for it.

    Attributes:
        query: float32 ``[B, Hkv, G, r]``, so large that a dot product over the channels stands for
            the whole one.
        channels: int64 ``[B, Hkv, r]``.
        scores: float32 ``[B, Hkv, G, n]`` as ``score`` left them.
    """

    query: Tensor
    channels: Tensor
    scores: Tensor | None = None


@dataclass(kw_only=True)
class SparQ(TopKMethod):
    """Rank keys by the ``rank`` channels in which the group's queries are largest.

    The channels are those of the largest ``sum over the group of |q|``, chosen anew at each step.
    A dot product over them stands for a whole one, divided by ``sqrt(d |q_r|_1 / |q|_1)`` where
    attention divides by ``sqrt(d)``. What the chosen tokens lack of the softmax of these
    approximate logits, over all tokens, goes to the mean of all cached values: with alpha the share
    of the chosen ones the output is ``alpha * attention + (1 - alpha) * mean value``.

    Attributes:
        rank: Channels scored; None for a quarter of ``head_dim``.
        mean_value: Give the missing share to the mean value; without it, attention's output stands.
        local_share: Share of ``k`` that is the last tokens, under the native protocol alone: there
            it takes the place of ``num_recent``, which is a number of tokens.

    Source:
        SparQ Attention (arXiv:2312.04985), section 3 and algorithm 1. As in the released code,
        queries of a group choose channels together and, natively, tokens by the plain sum of their
        approximate logits; the unified policy sums their softmax. In that code the current token is
        beside the budget and the window of ``k / 4`` inside it; here both are inside, the current
        token being the last of the window. The mean is over all cached values, the chosen ones too.
        Side information is a second copy of the keys, ``d`` values a token, channel by channel:
        rows of whole keys would be read almost whole for a few channels. The mean is kept as one
        float32 sum for each KV head.

    Compared with the authors' code:
        ``llminference/methods/ann_attention.py`` (graphcore-research/llm-inference-research): run
        on the same tensors it agrees. Differs: the current token is inside ``k``, there beside it.
    """

    name: ClassVar[str] = "sparq"
    score_kind: ClassVar[Literal["logit", "count"]] = "logit"

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

    def unsupported(self, geometry: Geometry) -> str | None:
        if self.channels(geometry.head_dim) > geometry.head_dim:
            return f"rank must be at most head_dim={geometry.head_dim}, got {self.rank}."
        return None

    def effective_policy(self, policy: Policy) -> Policy:
        policy = super().effective_policy(policy)
        if policy.protocol == "native":
            recent = min(int(self.local_share * policy.k), policy.k - policy.num_sink)
            policy = replace(policy, num_recent=recent)
        return policy

    def build_index(self, prefill: PrefillInputs) -> SparQIndex:
        keys, values = prefill.key_states, prefill.value_states
        batch_size, num_kv_heads, n, head_dim = keys.shape
        channel_keys = keys.new_zeros(batch_size, num_kv_heads, head_dim, prefill.capacity)
        channel_keys[..., :n] = keys.mT
        valid = prefill.valid_slots()[:, None, :, None]
        return SparQIndex(
            channel_keys=channel_keys,
            value_sum=values.masked_fill(~valid, 0).sum(2, dtype=torch.float32),
            scale=prefill.logit_scale,
            softcap=prefill.softcap,
            **Index.counts(prefill),
        )

    def append(self, index: SparQIndex, key_states: Tensor, value_states: Tensor) -> None:
        slot = index.advance()
        index.put(index.channel_keys.mT, slot, key_states[:, :, 0])
        if index.taken_back:
            index.taken_back -= 1
        else:
            index.value_sum += value_states[:, :, 0]

    def encode(self, query_states: Tensor, index: SparQIndex) -> SparQQuery:
        size = query_states.float().abs()
        rank = self.channels(query_states.shape[3])
        channels = size.sum(2).topk(rank, dim=-1).indices
        shared = channels[:, :, None].expand(-1, -1, size.shape[2], -1)
        covered = size.gather(3, shared).sum(3, keepdim=True)
        # 1 / sqrt(|q_r|_1 / |q|_1), taken into the few channels of the query instead of the scores
        # of all tokens; a query of zeros has zeros for scores anyhow.
        tiny = torch.finfo(torch.float32).tiny
        temper = (size.sum(3, keepdim=True) / covered.clamp_min(tiny)).sqrt()
        tempered = (query_states.gather(3, shared) * temper).to(query_states.dtype)
        return SparQQuery(tempered, channels)

    def score(self, encoded: SparQQuery, index: SparQIndex) -> Tensor:
        keys = index.channel_keys[..., : index.length]
        bounds = (index.kv_start, index.kv_len)
        impl = self.impl_for("channel_score")
        encoded.scores = channel_score(encoded.query, keys, encoded.channels, *bounds, impl=impl)
        return encoded.scores

    def select(
        self, scores: Tensor | None, encoded: SparQQuery, index: SparQIndex, policy: Policy
    ) -> Selection:
        selection = super().select(scores, encoded, index, policy)
        if self.mean_value:
            selection.remainder = self._remainder(selection.indices, encoded, index)
        return selection

    def _remainder(self, indices: Tensor, encoded: SparQQuery, index: SparQIndex) -> Remainder:
        """Return the mean value, and what the chosen tokens lack of the approximate softmax."""
        assert encoded.scores is not None  # select comes after score
        batch_size, num_kv_heads, group, _ = encoded.scores.shape
        alone = encoded.scores.flatten(1, 2)[:, :, None]  # each query a group of its own
        impl = self.impl_for("group_softmax")
        weights = group_softmax(alone, index.scale, softcap=index.softcap, impl=impl)
        chosen = indices.long().unflatten(1, (num_kv_heads, -1)).expand(-1, -1, group, -1)
        # A short row names its first token again; an empty one has no weights.
        chosen = torch.where(chosen < 0, chosen[..., :1].clamp_min(0), chosen)
        lacking = weights.scatter_(2, chosen.flatten(1, 2), 0).sum(2)
        start, end = index.row_bounds(batch_size, weights.device)
        mean = index.value_sum / (end - start)[:, None, None]
        return Remainder(mean, lacking.clamp(max=1))

    def index_bytes_per_token(self, geometry: Geometry) -> float:
        return float(geometry.num_kv_heads * geometry.head_dim * geometry.dtype_bytes)

    def bytes_read_per_step(self, geometry: Geometry, n: int, k: int) -> int:
        rank = self.channels(geometry.head_dim)
        channels = n * geometry.num_kv_heads * rank * geometry.dtype_bytes
        mean = 4 * geometry.num_kv_heads * geometry.head_dim if self.mean_value else 0
        return channels + mean + kv_bytes(geometry, min(k, n))
