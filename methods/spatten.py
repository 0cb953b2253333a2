"""SpAtten: cascade pruning of the tokens and heads that mattered least so far."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from topkbench.kernels.topk_select.api import topk_select
from topkbench.methods.base import (
    FollowsAttention,
    Geometry,
    Index,
    Policy,
    PrefillInputs,
    QueryIndependentMethod,
    Selection,
    StepContext,
    StepResult,
    Traits,
    key_bytes,
    value_bytes,
)
from topkbench.methods.four_bits import bytes_per_token, dequantise, quantise
from topkbench.methods.sinks import softmax
from topkbench.methods.softcap import capped
from topkbench.methods.states import at_slots


@dataclass
class Cascade:
    """State shared by the layers of one cache.

    Attributes:
        importance: float32 ``[B, 1, capacity]`` attention that each token received so far, from all
            queries of all heads and layers.
        head_importance: float32 ``[B, Hq]`` sum of each head's absolute outputs so far.
        layer: The layer that selected last; -1 before any.
        tokens: bool ``[B, 1, capacity]`` tokens that this layer kept.
        heads: bool ``[B, Hq]`` heads that this layer kept.
    """

    importance: Tensor
    head_importance: Tensor
    layer: int
    tokens: Tensor
    heads: Tensor

    def grow(self, capacity: int) -> None:
        """Pad to a larger capacity; called once for all layers."""
        padding = (0, capacity - self.importance.shape[2])
        self.importance, self.tokens = pad(self.importance, padding), pad(self.tokens, padding)

    def take_rows(self, rows: Tensor) -> None:
        """Let row ``b`` become the present row ``rows[b]``; called once for all layers."""
        for name in ("importance", "head_importance", "tokens", "heads"):
            value = getattr(self, name)
            setattr(self, name, value.index_select(0, rows.to(value.device)))


@dataclass(kw_only=True)
class SpAttenIndex(Index):
    """One layer's part of the cascade.

    Attributes:
        cascade: The state shared by the layers.
        importance: The cascade's importance, ``[B, 1, capacity]``, the same tensor.
        pruned: bool ``[B, 1, capacity]`` tokens that this layer dropped at some step.
        pruned_heads: bool ``[B, Hq]`` heads that this layer dropped at some step.
        depth: Relative depth of the layer, 0 for the first to 1 for the last.
        layer: Index of the layer.
        num_kv_heads: KV heads of the layer.
        codes: uint8 ``[B, Hkv, capacity, d / 2]`` 4-bit keys, packed by ``quantise``; None without
            ``requantise_below``.
        ranges: float16 ``[B, Hkv, capacity, 2]`` their lowest channel and step; None likewise.
    """

    cascade: Cascade
    importance: Tensor
    pruned: Tensor
    pruned_heads: Tensor
    depth: float
    layer: int
    num_kv_heads: int
    codes: Tensor | None = None
    ranges: Tensor | None = None

    without_rows: ClassVar[frozenset[str]] = frozenset({"importance"})

    def grow(self, capacity: int) -> None:
        if self.cascade.importance.shape[2] < capacity:
            self.cascade.grow(capacity)
        super().grow(capacity)
        self.importance = self.cascade.importance  # the shared tensor, not a padded copy

    def take_rows(self, rows: Tensor) -> None:
        super().take_rows(rows)
        self.importance = self.cascade.importance  # which took its rows before


@dataclass
class RoundedSelection(Selection):
    """A selection to attend to with 4-bit keys first.

    Attributes:
        codes: uint8 ``[B, Hkv, capacity, d / 2]`` the 4-bit keys of all tokens.
        ranges: float16 ``[B, Hkv, capacity, 2]``.
        probabilities: float32 ``[B, Hq, m]`` attention's softmax, set by ``attend``.
    """

    codes: Tensor = field(kw_only=True)
    ranges: Tensor = field(kw_only=True)
    probabilities: Tensor | None = field(default=None, kw_only=True)


@dataclass(kw_only=True)
class SpAtten(QueryIndependentMethod[SpAttenIndex], FollowsAttention[SpAttenIndex]):
    """Keep the tokens with the most attention so far; dropped tokens never return.

    A token's importance is the attention that it received from all queries of the prompt and of the
    decoded steps, summed over heads and over the layers so far. All heads of a layer keep the same
    tokens. They are chosen among those that the previous layer kept in this step and that this
    layer has never dropped, so the kept sets are nested over layers, and dropped tokens do not
    return. A head's importance is the sum of its absolute outputs; pruned heads output zeros, and
    the sets of kept heads are nested in the same way.

    Attributes:
        last_keep: Share of ``k`` that the last layer keeps, above 0 and at most 1; the first keeps
            ``k``, with linear interpolation between. Sinks and recents are kept in every layer.
        last_heads: Share of the heads that the last layer keeps; the first keeps all, with linear
            interpolation between.
        requantise_below: Attend with 4-bit keys, and again with full-precision keys where a head's
            largest probability is below this; None attends with full-precision keys only. The
            4-bit keys are kept beside the cache, ``d / 2 + 4`` bytes each.

    Source:
        SpAtten (arXiv:2012.09852), sections 3.1, 3.2 and 3.4. Implemented: cascade token and head
        pruning, importance shared by layers, heads and steps, progressive quantisation by the
        largest probability. Not implemented: local value pruning (it saves reading a value but no
        key); ratios tuned for each task, which ``last_keep`` and ``last_heads`` replace, by default
        the same in all layers, so that ``k`` means the same as elsewhere; 12-bit fixed point, for
        whose high bits 4 bits between each token's lowest and highest channel are used here, and
        for whose low bits the cached keys themselves. Layers that the policy keeps dense do not
        take part. The released ``spatten_llm`` is another method (raw logits of the last forward,
        no cascade, no heads, no quantisation) and is not followed.

    Compared with the authors' code:
        None to compare with: the released ``spatten_llm`` (mit-han-lab/spatten-llm) is another
        method, and the other code is of a hardware simulator. Written from the paper.

    The bytes counted are the importance and the pruned flags of all tokens in each layer, and a
    second read of the selected keys to compute the probabilities that are added to importance. With
    ``requantise_below`` attention itself yields these, and the reads are the selected 4-bit keys,
    their values, and the full-precision keys of each KV head with a query head below the threshold,
    counted at every step. Where nothing was counted, all are assumed to be read.
    """

    name: ClassVar[str] = "spatten"
    traits: ClassVar[Traits] = Traits(
        needs=frozenset({"column_sums"}),
        index="history",
        variable_budget=True,
        across_layers=True,  # importance, and the tokens and heads that a step has pruned so far
    )

    last_keep: float = 1.0
    last_heads: float = 1.0
    requantise_below: float | None = None

    def __post_init__(self) -> None:
        for setting in ("last_keep", "last_heads"):
            if not 0 < getattr(self, setting) <= 1:
                raise ValueError(
                    f"{setting} must be above 0 and at most 1, got {getattr(self, setting)}."
                )
        if self.requantise_below is not None and not 0 < self.requantise_below <= 1:
            raise ValueError(
                "requantise_below must be above 0 and at most 1, or None, "
                f"got {self.requantise_below}."
            )

    def unsupported_reason(self, geometry: Geometry, policy: Policy | None = None) -> str | None:
        if self.requantise_below is not None and geometry.head_dim % 2:
            return (
                f"head_dim must be even for spatten's 4-bit keys, got {geometry.head_dim}; set "
                "method.requantise_below=null."
            )
        return super().unsupported_reason(geometry, policy)

    def build_index(self, prefill: PrefillInputs) -> SpAttenIndex:
        keys, sums = prefill.key_states, prefill.column_sums
        if sums is None:
            raise ValueError("spatten needs the prompt's column sums, got none.")
        shape = (len(keys), 1, prefill.capacity)
        if "cascade" not in prefill.shared:
            prefill.shared["cascade"] = Cascade(
                importance=torch.zeros(shape, device=keys.device),
                head_importance=torch.zeros(sums.shape[:2], device=keys.device),
                layer=-1,
                tokens=torch.ones(shape, dtype=torch.bool, device=keys.device),
                heads=torch.ones(sums.shape[:2], dtype=torch.bool, device=keys.device),
            )
        cascade = prefill.shared["cascade"]
        assert isinstance(cascade, Cascade)
        if cascade.importance.device != keys.device:
            raise ValueError(
                "spatten's layers must be on one device, since they share the tokens' importance, "
                f"got {cascade.importance.device} and {keys.device}."
            )
        cascade.importance[:, 0, : prefill.n] += sums.sum(1)
        index = SpAttenIndex(
            cascade=cascade,
            importance=cascade.importance,
            pruned=torch.zeros(shape, dtype=torch.bool, device=keys.device),
            pruned_heads=torch.zeros_like(cascade.heads),
            depth=prefill.layer / max(prefill.num_layers - 1, 1),
            layer=prefill.layer,
            num_kv_heads=keys.shape[1],
            **Index.counts(prefill),
        )
        if self.requantise_below is not None:
            padding = (0, 0, 0, prefill.capacity - prefill.n)
            index.codes, index.ranges = (pad(one, padding) for one in quantise(keys))
        return index

    def append(self, index: SpAttenIndex, key_states: Tensor, value_states: Tensor) -> None:
        slot = index.advance()
        if index.codes is not None and index.ranges is not None:
            codes, ranges = quantise(key_states[:, :, 0])
            index.put(index.codes, slot, codes)
            index.put(index.ranges, slot, ranges)

    def select(self, index: SpAttenIndex, context: StepContext) -> Selection:
        policy, cascade, n = context.policy, index.cascade, index.length
        if index.layer <= cascade.layer:  # a step begins
            cascade.tokens = torch.ones_like(cascade.tokens)
            cascade.heads = torch.ones_like(cascade.heads)
        cascade.layer = index.layer
        start, end = index.row_bounds(len(context.query_states), context.cache.device)
        is_short = (end - start <= policy.k)[:, None]  # rows of which every token is kept

        keep = round(policy.k * (1 - index.depth * (1 - self.last_keep)))
        keep = max(keep, policy.num_sink + policy.num_recent, 1)
        candidates = (cascade.tokens & ~index.pruned)[..., :n]
        kept = topk_select(
            index.importance[..., :n].masked_fill(~candidates, -torch.inf),
            keep,
            policy.num_sink,
            policy.num_recent,
            index.kv_start,
            index.kv_len,
            impl=self.impl_for("topk_select"),
        )
        tokens = torch.zeros(
            *candidates.shape[:2], n + 1, dtype=torch.bool, device=candidates.device
        )
        tokens.scatter_(-1, kept.long().where(kept >= 0, n), True)
        cascade.tokens = torch.zeros_like(cascade.tokens)
        cascade.tokens[..., :n] = tokens[..., :n] | is_short[..., None]
        slots = torch.arange(n, device=candidates.device)
        index.pruned[..., :n] |= ~cascade.tokens[..., :n] & (slots < end[:, None, None])

        indices = kept.expand(-1, index.num_kv_heads, -1).contiguous()
        num_heads = cascade.heads.shape[1]
        heads = max(round(num_heads * (1 - index.depth * (1 - self.last_heads))), 1)
        if heads == num_heads:
            return self._selection(indices, index)
        alive = cascade.heads & ~index.pruned_heads
        ranked = cascade.head_importance.masked_fill(~alive, -torch.inf)
        best = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :heads]
        chosen = torch.zeros_like(alive).scatter_(-1, best, True) & alive
        # Before the first step no head has an output, so none is pruned.
        is_new = cascade.head_importance.amax(-1, keepdim=True) == 0
        cascade.heads = torch.where(is_short | is_new, alive, chosen)
        index.pruned_heads |= ~cascade.heads
        return self._selection(indices, index, cascade.heads.float())

    def _selection(
        self, indices: Tensor, index: SpAttenIndex, head_weight: Tensor | None = None
    ) -> Selection:
        """Return the selection, with the 4-bit keys if the index has them."""
        if index.codes is None or index.ranges is None:
            return Selection(indices, head_weight=head_weight)
        return RoundedSelection(
            indices,
            head_weight=head_weight,
            codes=index.codes,
            ranges=index.ranges,
        )

    def attend(self, context: StepContext, selection: Selection) -> tuple[Tensor, Tensor | None]:
        if not isinstance(selection, RoundedSelection):
            return super().attend(context, selection)
        assert self.requantise_below is not None
        query_states, cache = context.query_states, context.cache
        slots, group = selection.indices.long(), query_states.shape[2]
        rounded = dequantise(at_slots(selection.codes, slots), at_slots(selection.ranges, slots))
        logits = logits_of(context, rounded, slots)
        unsure = _probabilities(logits, context).amax(-1) < self.requantise_below
        if selection.head_weight is not None:
            unsure &= selection.head_weight > 0
        # A row with every token selected must equal full attention, so it uses exact keys.
        start, end = cache.bounds()
        has_all = (slots >= 0).sum(-1) == (end - start)[:, None]
        unsure |= has_all.repeat_interleave(group, 1)
        fetched = unsure.unflatten(1, (-1, group)).any(2)
        # Heads that fetch nothing read slot 0, which avoids waiting for the GPU to learn which.
        keys = at_slots(cache.key_states, slots.where(fetched[..., None], 0))
        exact = logits_of(context, keys, slots)
        logits = exact.where(unsure[..., None], logits)
        selection.scanned = (slots >= 0).sum(-1) * fetched
        selection.probabilities = _probabilities(logits, context)
        values = at_slots(cache.value_states, slots).float()
        out = (selection.probabilities.unflatten(1, (-1, group)) @ values).flatten(1, 2)
        if selection.head_weight is not None:
            out = out * selection.head_weight[..., None]
        lse = logits.logsumexp(-1)
        if context.sinks is not None:
            lse = torch.logaddexp(lse, context.sinks.to(lse))
        return out.to(query_states.dtype), lse

    def update_after_step(
        self, result: StepResult, index: SpAttenIndex, context: StepContext
    ) -> None:
        selection = result.selection
        assert selection is not None
        if isinstance(selection, RoundedSelection):
            assert selection.probabilities is not None
            probabilities = selection.probabilities
        else:
            assert result.lse is not None
            slots = selection.indices.long()
            logits = logits_of(context, at_slots(context.cache.key_states, slots), slots)
            probabilities = (logits - result.lse[..., None]).exp()
        if selection.head_weight is not None:
            probabilities = probabilities * selection.head_weight[..., None]
        per_token = probabilities.unflatten(1, (selection.indices.shape[1], -1)).sum(2).flatten(1)
        slots = selection.indices.long().clamp_min(0).flatten(1)
        index.importance[:, 0].scatter_add_(1, slots, per_token)
        index.cascade.head_importance += result.out.float().abs().sum(-1)

    def index_bytes_per_token(self, geometry: Geometry) -> float:
        return 4.0 + 1.0 + self._rounded_bytes(geometry)

    def bytes_read(self, geometry: Geometry, n: int, read: int, scanned: int | None = None) -> int:
        side, values = n * (4 + 1), value_bytes(geometry, read)
        scanned = read if scanned is None else scanned
        if self.requantise_below is None:
            return side + values + 2 * key_bytes(geometry, read)
        rounded = read * self._rounded_bytes(geometry)
        return side + values + rounded + key_bytes(geometry, scanned)

    def _rounded_bytes(self, geometry: Geometry) -> int:
        """Return the bytes of one token's 4-bit keys, over all KV heads."""
        if self.requantise_below is None:
            return 0
        return geometry.num_kv_heads * bytes_per_token(geometry.head_dim)


def logits_of(context: StepContext, keys: Tensor, slots: Tensor) -> Tensor:
    """Return attention's logits before the softmax.

    Args:
        context: The step, with its queries.
        keys: ``[B, Hkv, m, d]``.
        slots: ``[B, Hkv, m]`` the keys' slots, negative for padding.

    Returns:
        float32 ``[B, Hq, m]``, minus infinity for padding.
    """
    products = context.query_states.float() @ keys.float().mT
    logits = capped(products * context.scale, context.softcap)
    return logits.masked_fill((slots < 0)[:, :, None], -torch.inf).flatten(1, 2)


def _probabilities(logits: Tensor, context: StepContext) -> Tensor:
    """Return the attention's weights ``[B, Hq, m]`` from its logits."""
    return softmax(logits[:, :, None], context.sinks)[:, :, 0]
