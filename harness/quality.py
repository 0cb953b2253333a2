"""Selection quality: recall of the exact top-k, attention mass, and error of the output."""

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
        group_weights: ``[B, Hkv, n]``, summed over the group; -1 outside the valid slots, so that
            they are never among the top k.
        out: ``[B, Hkv, G, d]`` output of full attention.
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
        """Return the exact top ``k`` by the group's summed weights, as bool ``[B, Hkv, n]``."""
        indices = topk_select(self.group_weights, k, impl="auto")
        chosen = torch.zeros_like(self.group_weights, dtype=torch.bool)
        chosen.scatter_(-1, indices.long(), True)
        return chosen & (self.group_weights >= 0)


@dataclass(frozen=True)
class Quality:
    """Quality of the selection at one decode step of one layer, ``[B, Hkv]`` each.

    Attributes:
        recall_at_k: Share of the exact top-k that was selected.
        attention_mass: Softmax mass of full attention on the selected tokens.
        output_rel_error: Norm of the output's error over the norm of full attention's output.
        tokens: Distinct tokens that the group's queries read together.
    """

    recall_at_k: Tensor
    attention_mass: Tensor
    output_rel_error: Tensor
    tokens: Tensor


def quality(reference: DenseReference, cache: CacheView, result: StepResult, k: int) -> Quality:
    """Compare one step with full attention on the same states.

    If each query head has its own selection, each is compared with the group's exact top-k and the
    mean over the group is returned; ``tokens`` counts those that the heads read together.
    """
    batch, kv_heads, group = reference.out.shape[:3]
    selection = result.selection or Selection.everything(cache)
    per_query = selection.slots(cache).view(batch, kv_heads, -1, cache.n).expand(-1, -1, group, -1)
    exact = reference.exact(k)[:, :, None]
    hits = (per_query & exact).sum(-1).float() / exact.sum(-1).clamp_min(1)
    mass = (reference.weights * per_query).sum(-1)
    out = result.out.float().view_as(reference.out)
    error = (out - reference.out).norm(dim=-1) / reference.out.norm(dim=-1).clamp_min(1e-12)
    tokens = selection.tokens_read(cache).float()
    return Quality(hits.mean(-1), mass.mean(-1), error.mean(-1), tokens)


def check_finite(result: StepResult, layer: int) -> None:
    """Check that a step's scores and output are finite; slots without a token may score -inf.

    Raises:
        NotFiniteError: If they are not.
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
    """Measures selection quality at an attached method's steps over more than ``k`` tokens."""

    k: int
    measured: list[tuple[int, Quality]] = field(default_factory=list)

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
            return  # all tokens are attended to without calling the method
        reference = DenseReference.of(query_states, cache, scale, softcap)
        self.measured.append((layer, quality(reference, cache, result, self.k)))

    def means(self) -> dict[str, float | None]:
        """Return each measure's mean over steps, layers and heads; None without steps."""
        names = ("recall_at_k", "attention_mass", "output_rel_error")
        if not self.measured:
            return dict.fromkeys(names)
        return {
            name: torch.stack([getattr(one, name).mean() for _, one in self.measured]).mean().item()
            for name in names
        }


class OffPolicyObserver(Observer):
    """Measures a method's selections on full attention's states, at all budgets in one pass.

    The model decodes with full attention; at each step the method selects on the same queries and
    cache. One index and one scoring per step serve all budgets, since only the selection depends on
    ``k``. If a method's state depends on earlier selections, each budget has its own index. Layers
    that the policies keep dense are not measured.
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
        single = [[policy] for policy in policies]
        self.policy_groups = single if method.history_dependent else [list(policies)]
        self.shared: list[dict[str, Any]] = [{} for _ in self.policy_groups]
        self.indices: dict[tuple[int, int], Any] = {}
        self.measured: list[tuple[int, int, int, Quality]] = []
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
        reference = DenseReference.of(query_states, cache, scale, softcap)
        for policy_group, policies in enumerate(self.policy_groups):
            index = self._index(layer, policy_group, cache, scale, softcap)
            steps = self._step_each if self.method.history_dependent else self._score_once
            for policy, outcome in steps(query_states, index, cache, policies, scale, softcap):
                check_finite(outcome, layer)
                measures = quality(reference, cache, outcome, policy.k)
                self.measured.append((policy.k, layer, self.steps[layer], measures))

    def _index(
        self, layer: int, policy_group: int, cache: CacheView, scale: float, softcap: float | None
    ) -> Any:
        """Return a layer's index with the current token appended."""
        method = self.method
        _, end = cache.bounds()
        if (layer, policy_group) not in self.indices:
            captured = self.captured(layer)
            prefill = PrefillInputs(
                key_states=cache.key_states[:, :, :-1],
                value_states=cache.value_states[:, :, :-1],
                capacity=self.capacity,
                layer=layer,
                num_layers=self.num_layers,
                kv_len=end - 1,
                shared=self.shared[policy_group],
                scale=scale,
                softcap=softcap,
                **({} if captured is None else captured.inputs(cache.n - 1)),
            )
            self.indices[layer, policy_group] = method.build_index(prefill)
        index = self.indices[layer, policy_group]
        rows = torch.arange(len(end), device=cache.device)
        newest = end.long() - 1
        method.append(
            index,
            cache.key_states[rows, :, newest, None],
            cache.value_states[rows, :, newest, None],
        )
        return index

    def _score_once(
        self,
        query_states: Tensor,
        index: Any,
        cache: CacheView,
        policies: Sequence[Policy],
        scale: float,
        softcap: float | None,
    ) -> Iterator[tuple[Policy, StepResult]]:
        """Yield each budget's result, computed from the same scores."""
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

    def _step_each(
        self,
        query_states: Tensor,
        index: Any,
        cache: CacheView,
        policies: Sequence[Policy],
        scale: float,
        softcap: float | None,
    ) -> Iterator[tuple[Policy, StepResult]]:
        """Yield each budget's result, from a complete step that updates that budget's index."""
        for policy in policies:
            result = self.method.step(query_states, index, cache, policy, scale, softcap)
            if policy.k < cache.n:
                yield policy, result
