"""How good a selection is: recall of the exact top-k, attention kept, error of the output."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from topkbench.harness.decoding import NotFiniteError
from topkbench.kernels.topk_select.api import topk_select
from topkbench.methods.base import (
    CacheView,
    Observer,
    Policy,
    PrefillInputs,
    Selection,
    StepResult,
    TopKMethod,
)
from topkbench.models.capture import Captured


@dataclass
class DenseReference:
    """Full attention at one decode step of one layer, in float32.

    Attributes:
        weights: ``[B, Hkv, G, n]`` softmax of full attention; 0 outside a row's valid slots.
        group_weights: ``[B, Hkv, n]``, summed over the group; -1 outside, so never among the top.
        out: ``[B, Hkv, G, d]``.
    """

    weights: Tensor
    group_weights: Tensor
    out: Tensor

    @classmethod
    def of(
        cls, query_states: Tensor, cache: CacheView, scale: float, softcap: float | None = None
    ) -> "DenseReference":
        """Compute full attention from ``query_states [B, Hkv, G, d]``."""
        valid = cache.valid_slots()[:, None, None]
        logits = torch.matmul(query_states.float(), cache.key_states.float().mT) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        weights = logits.masked_fill(~valid, -torch.inf).softmax(-1)
        grouped = weights.sum(2).masked_fill(~valid[:, :, 0], -1.0)
        return cls(weights, grouped, torch.matmul(weights, cache.value_states.float()))

    def exact(self, k: int) -> Tensor:
        """Return bool ``[B, Hkv, n]``: the top ``k`` of the group's summed weights."""
        indices = topk_select(self.group_weights, k, impl="auto")
        chosen = torch.zeros_like(self.group_weights, dtype=torch.bool)
        chosen.scatter_(-1, indices.long(), True)
        return chosen & (self.group_weights >= 0)


@dataclass(frozen=True)
class Quality:
    """What one decode step of one layer kept, ``[B, Hkv]`` each.

    Attributes:
        recall_at_k: Share of the exact top-k that was chosen.
        attention_mass: Softmax mass of full attention on what was chosen.
        output_rel_error: Norm of the output's error over the norm of full attention's output.
        tokens: Different tokens that the group's queries read together.
    """

    recall_at_k: Tensor
    attention_mass: Tensor
    output_rel_error: Tensor
    tokens: Tensor


def quality(truth: DenseReference, cache: CacheView, result: StepResult, k: int) -> Quality:
    """Compare one step with full attention on the same states.

    A selection per query head is judged for each head, against the group's exact top-k, and the
    mean over the group is returned; its tokens are those that the heads read together.
    """
    batch, kv_heads, group = truth.out.shape[:3]
    selection = result.selection or Selection.everything(cache)
    per_query = selection.slots(cache).view(batch, kv_heads, -1, cache.n).expand(-1, -1, group, -1)
    exact = truth.exact(k)[:, :, None]
    hits = (per_query & exact).sum(-1).float() / exact.sum(-1).clamp_min(1)
    mass = (truth.weights * per_query).sum(-1)
    out = result.out.float().view_as(truth.out)
    error = (out - truth.out).norm(dim=-1) / truth.out.norm(dim=-1).clamp_min(1e-12)
    tokens = selection.tokens_read(cache).float()
    return Quality(hits.mean(-1), mass.mean(-1), error.mean(-1), tokens)


def check_finite(result: StepResult, layer: int) -> None:
    """Refuse a step's scores and output that are not finite; a slot without a token scores -inf.

    Raises:
        NotFiniteError: In one sentence.
    """
    for scores in (result.raw_scores, result.scores):
        if scores is None or not bool((scores.isnan() | scores.isposinf()).any()):
            continue
        raise NotFiniteError(
            f"a method's scores must be finite, got infinity or NaN in layer {layer}; use "
            "dtype=float32, or check the weights."
        )
    if not result.out.isfinite().all():
        raise NotFiniteError(
            f"the attention's output must be finite, got infinity or NaN in layer {layer}; use "
            "dtype=float32, or check the weights."
        )


@dataclass
class SelectionMeter(Observer):
    """Judges an attached method's steps over more than ``k`` tokens, on the states it runs on."""

    k: int
    seen: list[tuple[int, Quality]] = field(default_factory=list)

    def on_step(
        self,
        layer: int,
        query_states: Tensor,
        cache: CacheView,
        result: StepResult,
        scale: float,
        softcap: float | None,
    ) -> None:
        check_finite(result, layer)
        if self.k >= cache.n:
            return  # everything was kept, before the method was asked
        truth = DenseReference.of(query_states, cache, scale, softcap)
        self.seen.append((layer, quality(truth, cache, result, self.k)))

    def means(self) -> dict[str, float | None]:
        """Return the mean over steps, layers and heads of each measure."""
        names = ("recall_at_k", "attention_mass", "output_rel_error")
        if not self.seen:
            return dict.fromkeys(names)
        return {
            name: torch.stack([getattr(one, name).mean() for _, one in self.seen]).mean().item()
            for name in names
        }


class OffPolicyObserver(Observer):
    """Runs a method beside full attention, on full attention's states, at every budget at once.

    One index and one scoring a step serve all budgets: only the selection depends on ``k``. Where a
    selection depends on what was attended to before, each budget has an index of its own. Layers
    that the policies leave dense select nothing, and are not judged.
    """

    def __init__(
        self,
        method: TopKMethod,
        policies: Sequence[Policy],
        num_layers: int,
        capacity: int,
        captured: Callable[[int], Captured | None],
    ) -> None:
        self.method = method
        self.needs = method.needs
        self.num_layers = num_layers
        self.capacity = capacity
        self.captured = captured
        self.dense = policies[0].resolve_dense_layers(num_layers)
        apart = [[policy] for policy in policies]
        self.groups = apart if method.history_dependent else [list(policies)]
        self.shared: list[dict[str, Any]] = [{} for _ in self.groups]
        self.indices: dict[tuple[int, int], Any] = {}
        self.seen: list[tuple[int, int, int, Quality]] = []
        self.steps: dict[int, int] = {}

    def on_step(
        self,
        layer: int,
        query_states: Tensor,
        cache: CacheView,
        result: StepResult,
        scale: float,
        softcap: float | None,
    ) -> None:
        if layer in self.dense:
            return
        self.steps[layer] = self.steps.get(layer, -1) + 1
        truth = DenseReference.of(query_states, cache, scale, softcap)
        for place, policies in enumerate(self.groups):
            index = self._index(layer, place, cache, scale, softcap)
            steps = self._history_dependent if self.method.history_dependent else self._together
            for policy, outcome in steps(query_states, index, cache, policies, scale, softcap):
                check_finite(outcome, layer)
                found = quality(truth, cache, outcome, policy.k)
                self.seen.append((policy.k, layer, self.steps[layer], found))

    def _index(
        self, layer: int, place: int, cache: CacheView, scale: float, softcap: float | None
    ) -> Any:
        """Return a layer's index with the current token in it."""
        method = self.method
        _, end = cache.bounds()
        if (layer, place) not in self.indices:
            captured = self.captured(layer)
            before = PrefillInputs(
                key_states=cache.key_states[:, :, :-1],
                value_states=cache.value_states[:, :, :-1],
                capacity=self.capacity,
                layer=layer,
                num_layers=self.num_layers,
                kv_len=end - 1,
                shared=self.shared[place],
                scale=scale,
                softcap=softcap,
                **({} if captured is None else captured.inputs(cache.n - 1)),
            )
            self.indices[layer, place] = method.build_index(before)
        index = self.indices[layer, place]
        rows = torch.arange(len(end), device=cache.device)
        newest = end.long() - 1
        method.append(
            index,
            cache.key_states[rows, :, newest, None],
            cache.value_states[rows, :, newest, None],
        )
        return index

    def _together(
        self,
        query_states: Tensor,
        index: Any,
        cache: CacheView,
        policies: Sequence[Policy],
        scale: float,
        softcap: float | None,
    ) -> Iterator[tuple[Policy, StepResult]]:
        """Yield what each budget gives, from one scoring."""
        method = self.method
        method.bind(index, cache)
        encoded = method.encode(query_states, index)
        raw = method.score(encoded, index)
        for policy in policies:
            if policy.k < cache.n:
                scores = method.aggregate_over_group(raw, policy, scale, softcap)
                chosen = method.select(scores, encoded, index, policy)
                out, lse = method.attend(query_states, cache, chosen, scale, softcap)
                yield policy, StepResult(out, lse, chosen, scores, raw)

    def _history_dependent(
        self,
        query_states: Tensor,
        index: Any,
        cache: CacheView,
        policies: Sequence[Policy],
        scale: float,
        softcap: float | None,
    ) -> Iterator[tuple[Policy, StepResult]]:
        """Yield what each budget gives by whole steps, after which the index has learned."""
        for policy in policies:
            result = self.method.step(query_states, index, cache, policy, scale, softcap)
            if policy.k < cache.n:
                yield policy, result
