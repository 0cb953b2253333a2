"""How long parts of a sweep take: a few steps are measured, and extended to all of them.

What is measured is what the sweep itself runs, on one or two of its prompts. A batch is decoded as
copies of one prompt, so that it takes one prefill.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

import torch

from topkbench.harness.calibration import Calibration, CalibrationTexts
from topkbench.harness.decoding import Prompt
from topkbench.harness.sweep import PromptCell
from topkbench.harness.task import Context, Task
from topkbench.methods.learning import AnyLearningMethod
from topkbench.models.load import LoadedModel

P = ParamSpec("P")
T = TypeVar("T")

FEW_TOKENS, MORE_TOKENS = 4, 12
"""Lengths of the answers from whose times that of a step follows."""
SIMILAR = 0.8
"""Prompts of at least this share of the longest count as equally long."""
FIT_STEPS = 8
"""Training steps that are measured."""


@dataclass(frozen=True)
class Cost:
    """What something takes.

    Attributes:
        cpu_s: Processor seconds of this process, over all its threads.
        wall_s: Seconds by the clock.
    """

    cpu_s: float = 0.0
    wall_s: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.cpu_s + other.cpu_s, self.wall_s + other.wall_s)

    def __sub__(self, other: "Cost") -> "Cost":
        return self + -1.0 * other

    def __rmul__(self, factor: float) -> "Cost":
        return Cost(factor * self.cpu_s, factor * self.wall_s)

    def at_least_nothing(self) -> "Cost":
        """Return the cost without what is below zero, which a difference of two may be."""
        return Cost(max(0.0, self.cpu_s), max(0.0, self.wall_s))


def total(costs: Sequence[Cost]) -> Cost:
    """Return the sum of some costs."""
    return Cost(sum(one.cpu_s for one in costs), sum(one.wall_s for one in costs))


def timed(
    device: torch.device, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> tuple[Cost, T]:
    """Call a function; return what the call took, and its result."""
    _wait(device)
    processor, clock = time.process_time(), time.perf_counter()
    result = function(*args, **kwargs)
    _wait(device)
    return Cost(time.process_time() - processor, time.perf_counter() - clock), result


def _wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def counted_forwards(model: torch.nn.Module) -> Iterator[list[None]]:
    """Yield a list that grows by one item with each forward of a model."""
    forwards: list[None] = []
    handle = model.register_forward_pre_hook(lambda *_: forwards.append(None))
    try:
        yield forwards
    finally:
        handle.remove()


@dataclass(frozen=True)
class PrefillTimes:
    """The time of a prefill, by its tokens: a linear and a quadratic part.

    Attributes:
        measured: Prefilled tokens of some prompts, and what each prefill took.
    """

    measured: Sequence[tuple[int, Cost]]

    def of(self, tokens: int) -> Cost:
        """Return what the prefill of a prompt takes."""
        ordered = sorted(self.measured, key=lambda one: one[0])
        (short, of_short), (long, of_long) = ordered[0], ordered[-1]
        per_token = [(1 / n) * cost for n, cost in ordered]
        if short < SIMILAR * long:
            growth = (1 / (long - short)) * ((1 / long) * of_long - (1 / short) * of_short)
            linear = (1 / short) * of_short - short * growth
            parts = (growth.cpu_s, growth.wall_s, linear.cpu_s, linear.wall_s)
            if min(parts) >= 0:
                return tokens * linear + tokens**2 * growth
        return (tokens / len(per_token)) * total(per_token)


@dataclass(frozen=True)
class Trial:
    """What a part of a cell takes on copies of one prompt.

    Attributes:
        tokens: Prefilled tokens of the prompt.
        rows: Copies of it.
        cost: What the whole part takes on them; of parts that decode answers, with the answers
            that were decoded.
        forwards: Forwards of the model in it.
        per_forward: What each further forward takes.
        num_bytes: Size of the part's record.
    """

    tokens: int
    rows: int
    cost: Cost
    forwards: int
    per_forward: Cost
    num_bytes: float


def try_part(cell: PromptCell, part: str, prompt: Prompt, rows: int) -> Trial:
    """Measure a part of a cell in short, on copies of one prompt.

    Args:
        cell: The cell.
        part: The part.
        prompt: The prompt, prefilled already.
        rows: How many copies decode together, or are measured one by one.
    """
    task, context, plan = cell.task, cell.context, cell.plan
    model = context.loaded.model

    def run(answer: int | None) -> tuple[Cost, int, float]:
        batch = copies(prompt, rows, answer)
        with counted_forwards(model) as forwards:
            cost, (record, factor) = timed(model.device, task.trial, context, plan, part, batch)
        return factor * cost, len(forwards), factor * len(json.dumps(record))

    if part not in task.together or not prompt.sample.max_new_tokens:
        cost, forwards, num_bytes = run(None)
        return Trial(len(prompt.prefill_ids), rows, cost, forwards, Cost(), num_bytes)
    few, few_forwards, _ = run(FEW_TOKENS)
    more, forwards, num_bytes = run(MORE_TOKENS)
    per_forward = (1 / max(1, few_forwards)) * few  # of answers that end at once
    if forwards > few_forwards:
        per_forward = (1 / (forwards - few_forwards)) * (more - few).at_least_nothing()
    return Trial(len(prompt.prefill_ids), rows, more, forwards, per_forward, num_bytes)


def copies(prompt: Prompt, rows: int, answer: int | None = None) -> list[Prompt]:
    """Return copies of a prompt.

    Args:
        prompt: The prompt.
        rows: Their number.
        answer: At most this many tokens of an answer; None for as many as the prompt has.
    """
    sample = prompt.sample
    tokens = sample.max_new_tokens if answer is None else min(answer, sample.max_new_tokens)
    if rows == 1:
        return [replace(prompt, sample=replace(sample, max_new_tokens=tokens))]
    return [
        replace(
            prompt,
            sample=replace(
                sample, sample_id=f"{sample.sample_id} copy {row}", max_new_tokens=tokens
            ),
        )
        for row in range(rows)
    ]


def at_length(trials: Sequence[Trial], tokens: float) -> Trial:
    """Return what a part takes at another length, on a straight line through two measured ones."""
    first, last = trials[0], trials[-1]
    if first.tokens == last.tokens:
        return last
    place = (tokens - first.tokens) / (last.tokens - first.tokens)
    return replace(
        last,
        cost=((1 - place) * first.cost + place * last.cost).at_least_nothing(),
        per_forward=((1 - place) * first.per_forward + place * last.per_forward).at_least_nothing(),
    )


def alone(context: Context, pilots: Sequence[tuple[Task, float]]) -> Cost:
    """Return what a cell takes that is not measured prompt by prompt.

    Args:
        context: The cell's, its method fitted.
        pilots: As the task's ``pilots`` returned them.
    """
    device = context.loaded.model.device
    parts = [weight * timed(device, one.run, context)[0] for one, weight in pilots]
    return total(parts).at_least_nothing()


class _EnoughError(Exception):
    """Enough training steps have been measured."""


def fit(
    loaded: LoadedModel,
    method: AnyLearningMethod,
    texts: CalibrationTexts,
    memory_limit: int | None,
    layers: Sequence[int],
) -> Cost:
    """Return what fitting a method takes, from a part of one layer's fit.

    Args:
        loaded: The model.
        method: The method; it is not changed.
        texts: The texts that it is fitted on.
        memory_limit: As in ``Calibration.draw``.
        layers: The layers to fit.
    """
    whole = Calibration.draw(loaded, method, texts, memory_limit, layers)
    one, device = replace(whole, prompts=whole.prompts[:1]), loaded.model.device
    chosen = whole.layers[0]
    reading, captured = timed(device, one.capture, [chosen])
    states = [(queries.to(device), keys.to(device)) for queries, keys in captured[chosen]]
    began = time.process_time(), time.perf_counter()
    taken: list[tuple[int, int, Cost]] = []

    def report(step: int, steps: int, loss: float) -> None:
        now = Cost(time.process_time() - began[0], time.perf_counter() - began[1])
        taken.append((step, steps, now))
        if len(taken) > FIT_STEPS:
            raise _EnoughError

    def fit_layer() -> None:
        try:
            method.fit_layer(chosen, states, report)
        except _EnoughError:
            return

    layer, _ = timed(device, fit_layer)
    if len(taken) > 1:
        (first, steps, before), (last, _, after) = taken[0], taken[-1]
        per_step = (1 / (last - first)) * (after - before)
        # What comes before the first step goes through all texts.
        prepared = (before - per_step).at_least_nothing()
        layer = len(whole.prompts) * prepared + steps * per_step
    else:
        layer = len(whole.prompts) * layer
    return (len(whole.groups()) * len(whole.prompts)) * reading + len(whole.layers) * layer
