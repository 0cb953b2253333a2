"""Twilight: the fewest tokens of another method's selection that hold most of the attention."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from topkbench.methods.base import (
    AnyMethod,
    FollowsAttention,
    Geometry,
    Index,
    Policy,
    PrefillInputs,
    Ranking,
    Selection,
    StageTimer,
    StepContext,
    TopKMethod,
    Traits,
    check_whole,
    kv_bytes,
)
from topkbench.methods.four_bits import bytes_per_token, dequantise, quantise
from topkbench.methods.learning import (
    ArtifactSpec,
    LayerStates,
    LearningMethod,
    LossReport,
    artifact_spec,
)
from topkbench.methods.softcap import capped
from topkbench.methods.states import at_slots


@dataclass(kw_only=True)
class TwilightIndex(Index):
    """The base method's index, and the 4-bit keys.

    Attributes:
        base: The base method's index.
        codes: uint8 ``[B, Hkv, capacity, d / 2]``, channel ``j`` in the low half of byte ``j`` and
            channel ``j + d / 2`` in its high half.
        ranges: float16 ``[B, Hkv, capacity, 2]`` each token's lowest channel and step.
    """

    base: Index
    codes: Tensor
    ranges: Tensor


@dataclass(kw_only=True)
class Twilight(LearningMethod[TwilightIndex, object]):
    """Let another method select ``base_k`` times ``k`` tokens; keep the fewest with mass ``p``.

    The attention weights of the base's tokens are estimated from 4-bit keys, by a softmax over
    these tokens only. The smallest set with a mass of at least ``p`` is kept: sinks and recents
    first, then by falling weight. Under the unified protocol it has at most ``k`` tokens; natively
    only the base's budget limits it, and the base selects by its own native policy. Where a KV head
    selects for its group, the weights are the group's mean; with ``head_scope="query_head"`` each
    query head keeps its own set.

    Attributes:
        base: The method that selects first, such as ``method@method.base=loki``: any that neither
            updates its index by attention, as h2o and spatten do, nor frees memory, as
            ``mode=compact`` does. Its artifact is fitted, stored and found as without Twilight. A
            base that ranks per KV head only, such as hata, does so even if each query head keeps
            its own set.
        base_k: The base's budget, in multiples of ``k``.
        p: Share of the base's tokens' mass to keep, above 0 and at most 1.

    Source:
        Twilight (arXiv:2502.02770), section 4. As in its released code: keys quantised per token
        between their lowest and highest channel, mass relative to the base's selection, p of 0.85.
        Differences: the base's budget is a multiple of ``k``, there 8192 tokens or a quarter of the
        context; the set is found by sorting, where its kernel searches for a threshold. Recents
        that only the base selects are kept if they weigh enough. Log weights and remainders of a
        base's selection are ignored, and for a base whose own reads depend on the data, such as
        MagicPIG, the expected reads are counted.

    Compared with the authors' code:
        ``twilight/pyimpl`` (tsinghua-ideal/Twilight): results agree when run on the same tensors.
        Differences: the base's budget is a multiple of ``k``; the set is found by sorting, there by
        a threshold.

    A token's 4-bit key costs ``d / 2 + 4`` bytes in addition to the base's index, and is read only
    for tokens that the base selected.
    """

    name: ClassVar[str] = "twilight"

    base: AnyMethod
    base_k: int = 4
    p: float = 0.85

    def __post_init__(self) -> None:
        check_whole("base_k", self.base_k)
        if not 0 < self.p <= 1:
            raise ValueError(f"p must be above 0 and at most 1, got {self.p}.")
        if not isinstance(self.base, TopKMethod):
            raise ValueError(
                f"base must be a method, got {self.base!r}; name one by method@method.base=quest."
            )
        if not self.base.selects or isinstance(self.base, Twilight):
            raise ValueError(
                f"base must be another method that selects, got {self.base.name}; give "
                "method@method.base=quest, for one."
            )
        if isinstance(self.base, FollowsAttention):
            raise ValueError(
                f"base must not update its index by attention, as {self.base.name} does, since "
                "twilight attends to fewer tokens than the base selects; give "
                "method@method.base=quest, for one."
            )
        if self.base.compacts:
            raise ValueError(
                f"base must leave all tokens in the cache, and {self.base.name} with mode=compact "
                "frees some; mode=masked selects the same."
            )

    @property
    def traits(self) -> Traits:
        return replace(self.base.traits, variable_budget=True, per_kv_head=False)

    def resolve(self, policy: Policy) -> tuple[Self, Policy]:
        method, policy = super().resolve(policy)
        base, _ = self.base.resolve(self._wider(policy))
        if base is not self.base:
            method = copy.copy(self)
            method.base = base
        return method, policy

    # Fitting, by the base -----------------------------------------------------------------------

    def unsupported_reason(self, geometry: Geometry, policy: Policy | None = None) -> str | None:
        if geometry.head_dim % 2:
            return f"head_dim must be even for twilight, got {geometry.head_dim}."
        return self.base.unsupported_reason(geometry)

    def artifact_spec(self, geometry: Geometry) -> ArtifactSpec | None:
        return artifact_spec(self.base, geometry)

    def artifact_layout(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        if not isinstance(self.base, LearningMethod):
            return {}
        return self.base.artifact_layout(geometry)

    def query_positions(self, layer: int, lengths: Sequence[int]) -> list[list[int]]:
        return self._learning_base.query_positions(layer, lengths)

    def fit_layer(
        self, layer: int, states: LayerStates, report: LossReport | None = None
    ) -> dict[str, Tensor]:
        return self._learning_base.fit_layer(layer, states, report)

    def load_artifact(self, tensors: dict[str, Tensor], digest: str = "") -> None:
        self._learning_base.load_artifact(tensors, digest)
        super().load_artifact(tensors, digest)

    @property
    def _learning_base(self) -> LearningMethod[Index, object]:
        if not isinstance(self.base, LearningMethod):
            raise ValueError(f"{self.base.name} learns nothing, so it has no fit.")
        return self.base

    # Decode -------------------------------------------------------------------------------------

    def build_index(self, prefill: PrefillInputs) -> TwilightIndex:
        keys = prefill.key_states
        shape = (*keys.shape[:2], prefill.capacity)
        codes = torch.zeros(*shape, keys.shape[3] // 2, dtype=torch.uint8, device=keys.device)
        ranges = torch.zeros(*shape, 2, dtype=torch.float16, device=keys.device)
        codes[:, :, : prefill.n], ranges[:, :, : prefill.n] = quantise(keys)
        base = self.base.build_index(prefill)
        return TwilightIndex(base=base, codes=codes, ranges=ranges, **Index.counts(prefill))

    def append(self, index: TwilightIndex, key_states: Tensor, value_states: Tensor) -> None:
        self.base.append(index.base, key_states, value_states)
        slot = index.advance()
        codes, ranges = quantise(key_states[:, :, 0])
        index.put(index.codes, slot, codes)
        index.put(index.ranges, slot, ranges)

    def choose(
        self,
        index: TwilightIndex,
        context: StepContext,
        watch: StageTimer,
        given: Ranking[object] | None = None,
    ) -> tuple[Selection, Ranking[object] | None]:
        """Let the base choose as in a step of its own, and keep the fewest of its tokens."""
        wider = replace(context, policy=self._wider(context.policy))
        candidates, ranking = self.base.choose(index.base, wider, watch, given)
        if wider.policy.k >= context.cache.n:  # the base has been asked, and its reads are counted
            candidates = Selection.everything(context.cache)
        with watch("select"):
            selection = self.prune(candidates, index, context)
            return selection.with_all_of_short_rows(context.cache, context.policy.k), ranking

    def _wider(self, policy: Policy) -> Policy:
        """Return the policy by which the base selects."""
        wider = self.base.resolve(replace(policy, k=self.base_k * policy.k))[1]
        return replace(wider, head_scope="kv_head") if self.base.traits.per_kv_head else wider

    def prune(self, candidates: Selection, index: TwilightIndex, context: StepContext) -> Selection:
        """Return the smallest part of the base's selection that holds the mass ``p``."""
        cache, policy = context.cache, context.policy
        chosen = candidates.slots(cache)
        n = cache.n
        width = min(n, candidates.indices.shape[2] * candidates.unit_size)
        slots = torch.arange(n, device=chosen.device).where(chosen, n)
        slots = slots.topk(width, largest=False).values
        is_token = slots < n
        slots = slots.where(is_token, 0)
        weights = self.estimate(context, index, slots, is_token)
        group = weights.shape[2]
        budget = width if policy.protocol == "native" else policy.k
        if policy.head_scope == "query_head":
            weights = weights.flatten(1, 2)
            if weights.shape[1] != slots.shape[1]:  # the base selects per KV head nevertheless
                slots, is_token = (
                    slots.repeat_interleave(group, 1),
                    is_token.repeat_interleave(group, 1),
                )
        elif slots.shape[1] == weights.shape[1]:
            weights = weights.mean(2)
        else:  # the base selects per query head nevertheless; they share the group's budget
            weights = weights.flatten(1, 2)
            budget = budget if policy.protocol == "native" else budget // group
        start, end = (bound[:, None, None] for bound in cache.bounds())
        forced = is_token & ((slots < start + policy.num_sink) | (slots >= end - policy.num_recent))
        kept = smallest_set(weights, is_token, forced, self.p, budget)
        kept_slots = slots.where(kept, n).sort(-1).values[..., :budget]
        indices = kept_slots.where(kept_slots < n, -1)
        return Selection(indices.to(torch.int32), scanned=candidates.tokens_read(cache))

    def estimate(
        self, context: StepContext, index: TwilightIndex, slots: Tensor, is_token: Tensor
    ) -> Tensor:
        """Estimate each query's softmax over some tokens from their 4-bit keys.

        It is that of these tokens alone: what a head's learned sink takes is not part of the mass.

        Args:
            context: The step, with its queries.
            index: The index, with the 4-bit keys.
            slots: int64 ``[B, H, m]``, of KV heads or query heads.
            is_token: bool ``[B, H, m]``, False for padding.

        Returns:
            float32 ``[B, Hkv, G, m]``.
        """
        query_states = context.query_states
        num_kv_heads = query_states.shape[1]
        at = slots.unflatten(1, (num_kv_heads, -1))  # [B, Hkv, 1 or G, m]
        flat = at.flatten(2)
        keys = dequantise(at_slots(index.codes, flat), at_slots(index.ranges, flat))
        keys = keys.unflatten(2, at.shape[2:])
        logits = (keys @ query_states.float()[..., None])[..., 0] * context.scale
        logits = capped(logits, context.softcap)
        absent = ~is_token.unflatten(1, (num_kv_heads, -1))
        return logits.masked_fill(absent, -torch.inf).softmax(-1).nan_to_num(0.0)

    def index_bytes_per_token(self, geometry: Geometry) -> float:
        rounded_keys = geometry.num_kv_heads * bytes_per_token(geometry.head_dim)
        return self.base.index_bytes_per_token(geometry) + rounded_keys

    def bytes_read(self, geometry: Geometry, n: int, read: int, scanned: int | None = None) -> int:
        scanned = min(self.base_k * read, n) if scanned is None else scanned
        # What the base reads to select, the 4-bit keys of its selection, and the kept tokens.
        scoring = self.base.bytes_read(geometry, n, scanned) - kv_bytes(geometry, scanned)
        rounded_keys = scanned * geometry.num_kv_heads * bytes_per_token(geometry.head_dim)
        return scoring + rounded_keys + kv_bytes(geometry, read)


def smallest_set(weights: Tensor, is_token: Tensor, forced: Tensor, p: float, k: int) -> Tensor:
    """Return the fewest tokens whose weights add up to at least ``p``, and at most ``k`` tokens.

    Args:
        weights: ``[B, H, m]``, with sum 1.
        is_token: bool ``[B, H, m]``, False for padding.
        forced: bool ``[B, H, m]``, tokens that are in the set regardless of weight.
        p: Mass to reach.
        k: Tokens to keep, at most.

    Returns:
        bool ``[B, H, m]``. Of equal weights the first is kept.
    """
    ranked = weights.masked_fill(forced, torch.inf).masked_fill(~is_token, -torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    sorted_weights = weights.gather(-1, order)
    mass_before = sorted_weights.cumsum(-1) - sorted_weights
    is_kept = (mass_before < p) | forced.gather(-1, order)
    is_kept &= is_token.gather(-1, order)
    is_kept[..., k:] = False
    return torch.zeros_like(is_token).scatter_(-1, order, is_kept)
