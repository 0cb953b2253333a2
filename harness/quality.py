"""Selection quality: recall of the exact top-k, attention mass, and error of the output."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from topkbench.harness.decoding import NotFiniteError
from topkbench.kernels.topk_select.api import topk_select
from topkbench.methods.base import (
    AnyMethod,
    Index,
    Observer,
    Policy,
    Selection,
    SharedState,
    StepContext,
    StepResult,
)
from topkbench.methods.captured import Captured
from topkbench.methods.sinks import softmax
from topkbench.methods.softcap import capped


@dataclass
class DenseReference:
    """Full attention at one decode step of one layer, in float32.

    Attributes:
        weights: ``[B, Hkv, G, n]`` softmax of full attention over the tokens alone, which sums to
            1 where a head has a learned sink, too; 0 outside a row's valid slots.
        group_weights: ``[B, Hkv, n]`` attention's own weights, the sinks in their denominators,
            summed over the group; -1 outside the valid slots, so that they are never among the
            top k.
        out: ``[B, Hkv, G, dv]`` output of full attention.
    """

    weights: Tensor
    group_weights: Tensor
    out: Tensor

    @classmethod
    def of(cls, context: StepContext) -> "DenseReference":
        """Compute full attention of a step's queries over its cache."""
        cache = context.cache
        valid = cache.valid_slots()[:, None, None]
        products = _product(context.query_states.float(), cache.key_states.mT)
        logits = capped(products * context.scale, context.softcap)
        logits = logits.masked_fill(~valid, -torch.inf)
        weights = own = logits.softmax(-1)
        if context.sinks is not None:
            own = softmax(logits, context.sinks)
        grouped = own.sum(2).masked_fill(~valid[:, :, 0], -1.0)
        return cls(weights, grouped, _product(own, cache.value_states))

    def exact(self, k: int) -> Tensor:
        """Return the exact top ``k`` by the group's summed weights, as bool ``[B, Hkv, n]``."""
        indices = topk_select(self.group_weights, k, impl="auto")
        chosen = torch.zeros_like(self.group_weights, dtype=torch.bool)
        chosen.scatter_(-1, indices.long(), True)
        return chosen & (self.group_weights >= 0)


def _product(rows: Tensor, states: Tensor) -> Tensor:
    """Multiply ``[B, Hkv, G, m]`` by ``[B, Hkv, m, c]`` in float32; the latter is not repeated.

    Where the rows of ``states`` are one and the same, as for known tokens, it is read once.
    """
    if states.stride(0) or len(states) == 1:
        return torch.matmul(rows, states.float())
    batch_size, num_heads, group, _ = rows.shape
    together = rows.transpose(0, 1).reshape(num_heads, batch_size * group, -1)
    product = torch.matmul(together, states[0].float())
    return product.view(num_heads, batch_size, group, -1).transpose(0, 1)


@dataclass(frozen=True)
class Quality:
    """Quality of the selection at one decode step of one layer, ``[B, Hkv]`` each.

    Attributes:
        recall_at_k: Share of the exact top-k that was selected.
        attention_mass: Softmax mass of full attention on the selected tokens, as a share of its
            mass on all tokens: 1 if all are selected. What a learned sink takes is not part of it.
        output_rel_error: Norm of the output's error over the norm of full attention's output.
        tokens: Distinct tokens that the group's queries read together.
        exact_tokens: Tokens of the exact top-k, and
        found_tokens: how many of them were selected.
        exact_generated: As ``exact_tokens``, of those alone that were generated after the prompt,
            and
        found_generated: as ``found_tokens``, of these.
    """

    recall_at_k: Tensor
    attention_mass: Tensor
    output_rel_error: Tensor
    tokens: Tensor
    exact_tokens: Tensor
    found_tokens: Tensor
    exact_generated: Tensor
    found_generated: Tensor

    def row(self, row: int) -> "Quality":
        """Return the quality in one row, ``[Hkv]`` each."""
        return Quality(*(getattr(self, one.name)[row] for one in fields(self)))


def quality(
    reference: DenseReference,
    context: StepContext,
    result: StepResult,
    prompt_tokens: int | None = None,
) -> Quality:
    """Compare one step with full attention on the same states.

    If each query head has its own selection, each is compared with the group's exact top-k and the
    mean over the group is returned; ``tokens`` counts those that the heads read together.

    Args:
        reference: Full attention on the step's states.
        context: The step.
        result: What the method did.
        prompt_tokens: Cached tokens of the prompt; those after them were generated. None if none
            was.
    """
    cache, k = context.cache, context.policy.k
    batch, kv_heads, group = reference.out.shape[:3]
    selection = result.selection or Selection.everything(cache)
    per_query = selection.slots(cache).view(batch, kv_heads, -1, cache.n).expand(-1, -1, group, -1)
    exact = reference.exact(k)[:, :, None]
    found = per_query & exact
    hits = found.sum(-1).float() / exact.sum(-1).clamp_min(1)
    mass = (reference.weights * per_query).sum(-1)
    out = result.out.float().view_as(reference.out)
    error = (out - reference.out).norm(dim=-1) / reference.out.norm(dim=-1).clamp_min(1e-12)
    tokens = selection.tokens_read(cache).float()
    begin = cache.n if prompt_tokens is None else prompt_tokens
    counts = [
        chosen[..., first:].sum(-1).float().mean(-1)
        for first in (0, begin)
        for chosen in (exact.expand_as(found), found)
    ]
    return Quality(hits.mean(-1), mass.mean(-1), error.mean(-1), tokens, *counts)


def check_finite(result: StepResult, layer: int) -> None:
    """Check that a step's scores and output are finite; slots without a token may score -inf.

    Raises:
        NotFiniteError: If they are not.
    """
    ranking = result.ranking
    for scores in () if ranking is None else (ranking.raw_scores, ranking.scores):
        if not bool((scores.isnan() | scores.isposinf()).any()):
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


MEASURES = ("recall_at_k", "attention_mass", "output_rel_error")
"""The measures of selection quality that rows have."""

PARTS = ("exact_tokens", "found_tokens", "exact_generated", "found_generated")
"""The counts behind recall over the prompt's and over the generated tokens apart."""


@dataclass
class SelectionMeter(Observer):
    """Measures selection quality at an attached method's steps over more than ``k`` tokens.

    Attributes:
        judged: The steps that are measured, each named by its number of cached tokens; None for
            all.
        measured: The quality of each measured step, by its number of cached tokens, in order of
            layers. The rows of a step that decodes a token of each row are measured together.
        prompt_tokens: Cached tokens of the prompt; those after them were generated.
        keeps: Whether the tokens that were kept are noted, of one row.
        kept: Which tokens each KV head kept at the last measured step, by layer, bool
            ``[Hkv, n]``; where its query heads select apart, what some of them kept.
    """

    judged: frozenset[int] | None = None
    measured: dict[int, list[Quality]] = field(default_factory=dict)
    prompt_tokens: int | None = None
    keeps: bool = False
    kept: dict[int, Tensor] = field(default_factory=dict)

    def on_step(self, context: StepContext, result: StepResult) -> None:
        check_finite(result, context.layer)
        cache = context.cache
        if cache.key_states.stride(0):  # one token of each row
            if self._is_judged(cache.n, context):
                found = quality(DenseReference.of(context), context, result, self.prompt_tokens)
                self.measured.setdefault(cache.n, []).append(found)
                self._note_kept(context, result, cache.n)
            return
        ends = cache.bounds()[1].tolist()
        rows = [row for row, n in enumerate(ends) if self._is_judged(n, context)]
        if not rows:
            return
        context, result = context.take_rows(rows), result.take_rows(rows)
        found = quality(DenseReference.of(context), context, result, self.prompt_tokens)
        for row, place in enumerate(rows):
            self.measured.setdefault(ends[place], []).append(found.row(row))
        self._note_kept(context, result, ends[rows[-1]])

    def _note_kept(self, context: StepContext, result: StepResult, n: int) -> None:
        """Note what the last row's heads kept of its ``n`` cached tokens."""
        if not self.keeps:
            return
        cache = context.cache
        selection = result.selection or Selection.everything(cache)
        slots = selection.slots(cache)[-1, :, :n]
        self.kept[context.layer] = slots.view(cache.key_states.shape[1], -1, n).any(1).cpu()

    def _is_judged(self, n: int, context: StepContext) -> bool:
        # With at most k tokens all are attended to without calling the method.
        return n > context.policy.k and (self.judged is None or n in self.judged)

    def values(self) -> dict[str, list[list[float]]]:
        """Return each measure and count by step and layer, its mean over rows and heads."""
        return {
            name: [
                [getattr(one, name).mean().item() for one in layers]
                for _, layers in sorted(self.measured.items())
            ]
            for name in (*MEASURES, *PARTS)
        }


@dataclass
class StepRecorder(Observer):
    """Keeps the decode steps of an attached method, whose cache must outlive them unchanged.

    Attributes:
        steps: Each layer's steps, in order.
    """

    needs: frozenset[str] = frozenset()
    steps: dict[int, list[StepContext]] = field(default_factory=dict)

    def on_step(self, context: StepContext, result: StepResult) -> None:
        self.steps.setdefault(context.layer, []).append(context)


def off_policy_quality(
    resolved: Sequence[tuple[AnyMethod, Policy]],
    recorded: Mapping[int, Sequence[StepContext]],
    capacity: int,
    captured: Callable[[int], Captured | None],
    judged: frozenset[int] | None = None,
) -> Iterator[tuple[int, int, int, Quality]]:
    """Measure a method's selections on recorded steps of full attention, at all budgets.

    One index and one scoring of a step serve all budgets, since only the selection depends on
    ``k``. If a method's state depends on earlier selections, each budget has its own index. Layers
    that the policies keep dense are not measured.

    Args:
        resolved: The method and the policy of each budget, as ``TopKMethod.resolve`` returned them.
        recorded: Each layer's steps, each over one token more than the one before.
        capacity: Slots of the indices.
        captured: Returns what was captured of a layer's prompt.
        judged: The steps that are measured, each named by its number of cached tokens; None for
            all.

    Yields:
        The budget, the layer, the number of the step, and the quality, step by step.
    """
    if not recorded:
        return
    has_history = resolved[0][0].traits.index == "history"
    groups = [[one] for one in resolved] if has_history else [list(resolved)]
    shared: list[dict[str, SharedState]] = [{} for _ in groups]
    indices: dict[tuple[int, int], Index] = {}
    num_layers = next(iter(recorded.values()))[0].num_layers
    dense = resolved[0][1].resolve_dense_layers(num_layers)
    layers = [steps for layer, steps in sorted(recorded.items()) if layer not in dense]
    # In the order of decoding, as a layer's index may build on that of the layer before.
    for number, of_layers in enumerate(zip(*layers, strict=True)):
        for context in of_layers:
            layer, n = context.layer, context.cache.n
            is_judged = judged is None or n in judged
            reference = DenseReference.of(context) if is_judged else None
            for place, group in enumerate(groups):
                if (layer, place) not in indices:
                    found = captured(layer)
                    inputs = {} if found is None else found.inputs(n - 1)
                    method = group[0][0]
                    indices[layer, place] = method.index_prompt(
                        context, capacity, inputs, shared[place]
                    )
                index, ranking = indices[layer, place], None
                group[0][0].append(index, *context.cache.newest())
                for method, policy in group:
                    # All tokens are then attended to without calling the method.
                    is_dense = policy.k >= n
                    if not has_history and (is_dense or reference is None):
                        continue
                    own = replace(context, policy=policy)
                    outcome = method.step(index, own, given=ranking)
                    ranking = outcome.ranking or ranking
                    if is_dense or reference is None:
                        continue
                    check_finite(outcome, layer)
                    yield policy.k, layer, number, quality(reference, own, outcome)
