"""SpAtten: tokens and heads that got little so far are pruned, for good and in all later layers."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from topkbench.kernels.topk_select.api import topk_select
from topkbench.methods.base import (
    CacheView,
    Geometry,
    Index,
    Policy,
    PrefillInputs,
    Selection,
    StepResult,
    TopKMethod,
    kv_bytes,
)
from topkbench.methods.states import row_bounds


@dataclass
class Cascade:
    """What the layers of one cache share.

    Attributes:
        importance: float32 ``[B, 1, capacity]`` attention that each token got so far, from all
            queries of all heads and layers.
        head_importance: float32 ``[B, Hq]`` sum of each head's absolute outputs so far.
        layer: The layer that selected last; -1 before any.
        tokens: bool ``[B, 1, capacity]`` what that layer kept.
        heads: bool ``[B, Hq]`` the heads that it kept.
    """

    importance: Tensor
    head_importance: Tensor
    layer: int
    tokens: Tensor
    heads: Tensor

    def grow(self, capacity: int) -> None:
        """Make room for more slots, once for all layers."""
        missing = (0, capacity - self.importance.shape[2])
        self.importance, self.tokens = pad(self.importance, missing), pad(self.tokens, missing)


@dataclass(kw_only=True)
class SpAttenIndex(Index):
    """One layer's part in the cascade.

    Attributes:
        cascade: What the layers share.
        importance: The cascade's, ``[B, 1, capacity]``.
        pruned: bool ``[B, 1, capacity]`` tokens that this layer dropped at some step.
        pruned_heads: bool ``[B, Hq]``.
        depth: Where the layer is, 0 for the first to 1 for the last.
        layer: Index of the layer.
        num_kv_heads: KV heads of the layer.
    """

    cascade: Cascade
    importance: Tensor
    pruned: Tensor
    pruned_heads: Tensor
    depth: float
    layer: int
    num_kv_heads: int

    def grow(self, capacity: int) -> None:
        if self.cascade.importance.shape[2] < capacity:
            self.cascade.grow(capacity)
        super().grow(capacity)
        self.importance = self.cascade.importance  # the layers' own, not a copy of it


@dataclass(kw_only=True)
class SpAtten(TopKMethod):
    """Keep the tokens with the most attention so far; what a layer drops, no later one sees again.

    A token's importance is the attention that it got from all queries of the prompt and of the
    decoded steps, summed over heads and over all layers up to now. All heads of a layer keep the
    same tokens, out of those that the layer before kept in this step and that this layer has never
    dropped; so the kept sets are nested over layers, and what is dropped does not come back. A
    head's importance is the sum of its absolute outputs; pruned heads give zeros, nested likewise.

    Attributes:
        last_keep: Share of ``k`` that the last layer keeps, above 0 and at most 1; the first keeps
            ``k``, those between fall on a line. Sinks and recents stay everywhere.
        last_heads: Share of the heads that the last layer keeps, on a line from all of them.
        requantise_below: Attend with keys in 4 bits, and anew with whole keys where a head's
            largest probability is below this; None attends with whole keys alone.

    Source:
        SpAtten (arXiv:2012.09852), sections 3.1, 3.2 and 3.4. Followed: cascade token and head
        pruning, importance shared by layers, heads and steps, progressive quantisation by the
        largest probability. Not followed: local value pruning (it saves a value's read and
        no key's); ratios tuned for each task, of which these two lines stand in place, by default
        flat, so that ``k`` means the same as elsewhere; 12-bit fixed point, whose low bits are
        here the cached keys themselves. The layers that the policy keeps dense take no part. The
        released ``spatten_llm`` is another method (raw logits of the last forward, no cascade, no
        heads, no quantisation) and is not followed.

    Charged: importance and the pruned marks of all tokens in each layer, and the chosen keys a
    second time for the probabilities that importance adds up. With ``requantise_below`` no fewer
    bytes are counted, since how many heads need whole keys depends on the data: it shows what
    the 4 bits cost in answers.
    """

    name: ClassVar[str] = "spatten"
    needs: ClassVar[frozenset[str]] = frozenset({"column_sums"})
    adaptive: ClassVar[bool] = True
    ragged: ClassVar[bool] = True

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
        cascade: Cascade = prefill.shared["cascade"]
        cascade.importance[:, 0, : prefill.n] += sums.sum(1)
        return SpAttenIndex(
            cascade=cascade,
            importance=cascade.importance,
            pruned=torch.zeros(shape, dtype=torch.bool, device=keys.device),
            pruned_heads=torch.zeros_like(cascade.heads),
            depth=prefill.layer / max(prefill.num_layers - 1, 1),
            layer=prefill.layer,
            num_kv_heads=keys.shape[1],
            **Index.counts(prefill),
        )

    def append(self, index: SpAttenIndex, key_states: Tensor, value_states: Tensor) -> None:
        index.advance()

    def score(self, encoded: Tensor, index: SpAttenIndex) -> None:
        return None

    def select(
        self, scores: Tensor | None, encoded: Tensor, index: SpAttenIndex, policy: Policy
    ) -> Selection:
        cascade, n = index.cascade, index.length
        if index.layer <= cascade.layer:  # a step begins
            cascade.tokens = torch.ones_like(cascade.tokens)
            cascade.heads = torch.ones_like(cascade.heads)
        cascade.layer = index.layer
        start, end = row_bounds(n, len(encoded), encoded.device, index.kv_start, index.kv_len)
        is_short = (end - start <= policy.k)[:, None]  # such a row is kept whole

        keep = round(policy.k * (1 - index.depth * (1 - self.last_keep)))
        keep = max(keep, policy.num_sink + policy.num_recent, 1)
        left = (cascade.tokens & ~index.pruned)[..., :n]
        kept = topk_select(
            index.importance[..., :n].masked_fill(~left, -torch.inf),
            keep,
            policy.num_sink,
            policy.num_recent,
            index.kv_start,
            index.kv_len,
            impl=self.impl_for("topk_select"),
        )
        tokens = torch.zeros(*left.shape[:2], n + 1, dtype=torch.bool, device=left.device)
        tokens.scatter_(-1, kept.long().where(kept >= 0, n), True)
        cascade.tokens = torch.zeros_like(cascade.tokens)
        cascade.tokens[..., :n] = tokens[..., :n] | is_short[..., None]
        slots = torch.arange(n, device=left.device)
        index.pruned[..., :n] |= ~cascade.tokens[..., :n] & (slots < end[:, None, None])

        indices = kept.expand(-1, index.num_kv_heads, -1).contiguous()
        num_heads = cascade.heads.shape[1]
        heads = max(round(num_heads * (1 - index.depth * (1 - self.last_heads))), 1)
        if heads == num_heads:
            return Selection(indices)
        alive = cascade.heads & ~index.pruned_heads
        ranked = cascade.head_importance.masked_fill(~alive, -torch.inf)
        best = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :heads]
        chosen = torch.zeros_like(alive).scatter_(-1, best, True) & alive
        # Before a first step no head has an output, and none is less than the others.
        is_new = cascade.head_importance.amax(-1, keepdim=True) == 0
        cascade.heads = torch.where(is_short | is_new, alive, chosen)
        index.pruned_heads |= ~cascade.heads
        return Selection(indices, head_weight=cascade.heads.float())

    def attend(
        self,
        query_states: Tensor,
        cache: CacheView,
        selection: Selection,
        scale: float,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = super().attend(query_states, cache, selection, scale, softcap)
        if self.requantise_below is None:
            return out, lse
        coarse = CacheView(
            in_four_bits(cache.key_states), cache.value_states, cache.kv_start, cache.kv_len
        )
        by_few, lse_by_few = super().attend(query_states, coarse, selection, scale, softcap)
        assert lse is not None
        assert lse_by_few is not None
        found = probabilities(query_states, coarse, selection, lse_by_few, scale, softcap)
        sure = found.amax(-1) >= self.requantise_below
        return torch.where(sure[..., None], by_few, out), torch.where(sure, lse_by_few, lse)

    def feedback(
        self,
        result: StepResult,
        query_states: Tensor,
        index: SpAttenIndex,
        cache: CacheView,
        policy: Policy,
        scale: float,
        softcap: float | None = None,
    ) -> None:
        selection = result.selection
        assert selection is not None
        assert result.lse is not None
        found = probabilities(query_states, cache, selection, result.lse, scale, softcap)
        if selection.head_weight is not None:
            found = found * selection.head_weight[..., None]
        got = found.unflatten(1, (selection.indices.shape[1], -1)).sum(2).flatten(1)
        slots = selection.indices.long().clamp_min(0).flatten(1)
        index.importance[:, 0].scatter_add_(1, slots, got)
        index.cascade.head_importance += result.out.float().abs().sum(-1)

    def index_bytes_per_token(self, geometry: Geometry) -> float:
        return 4.0 + 1.0

    def bytes_read_per_step(self, geometry: Geometry, n: int, k: int) -> int:
        chosen = kv_bytes(geometry, min(k, n))
        return round(n * self.index_bytes_per_token(geometry)) + chosen + chosen // 2


def in_four_bits(keys: Tensor) -> Tensor:
    """Round keys ``[..., d]`` to the 15 levels of a signed 4-bit number, scaled for each token."""
    largest = keys.float().abs().amax(-1, keepdim=True)
    step = (largest / 7).clamp_min(torch.finfo(torch.float32).tiny)
    return ((keys.float() / step).round() * step).to(keys.dtype)


def probabilities(
    query_states: Tensor,
    cache: CacheView,
    selection: Selection,
    lse: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Return the softmax that attention took over a selection of tokens.

    Args:
        query_states: ``[B, Hkv, G, d]``.
        cache: The keys.
        selection: ``[B, Hkv, m]`` slots.
        lse: ``[B, Hq]`` log of the softmax's denominator.
        scale: The attention's factor on dot products.
        softcap: As in attention, or None.

    Returns:
        float32 ``[B, Hq, m]``, 0 where there is no token.
    """
    slots = selection.indices.long()
    head_dim = query_states.shape[3]
    at = slots.clamp_min(0)[..., None].expand(-1, -1, -1, head_dim)
    logits = query_states.float() @ cache.key_states.gather(2, at).float().mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill((slots < 0)[:, :, None], -torch.inf)
    return (logits.flatten(1, 2) - lse[..., None]).exp()
