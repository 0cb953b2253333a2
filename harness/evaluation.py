"""The interface of a task, and the question-answering tasks built on it.

A cell of a question-answering task makes three passes over its prompts: it generates and scores the
answers (in batches), times decode steps (one prompt at a time, full attention and the method in
turn), and measures the quality of the selections (untimed). Each result is stored under its own
key, so a pass runs again only if something that it depends on has changed.
"""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch

from topkbench.harness.artifact import Artifact
from topkbench.harness.decoding import (
    Decoder,
    Prompt,
    Question,
    batches,
    tokenise,
)
from topkbench.harness.quality import SelectionMeter, check_finite
from topkbench.harness.task import Sample, string_match_all, string_match_part
from topkbench.kernels.timing import LEAST_PAIRS, OtherLoad, Stages, speed_columns
from topkbench.methods.base import (
    CacheView,
    Geometry,
    Observer,
    Policy,
    StepResult,
    TopKMethod,
    check_whole,
    kv_bytes,
)
from topkbench.models.attach import Session, attach, geometry_of
from topkbench.models.compat import partial_layers
from topkbench.models.load import LoadedModel
from topkbench.models.prefill import PrefillStore
from topkbench.models.step_count import StepCount

T = TypeVar("T")
Track = Callable[[Sequence[Any], str], Iterable[Any]]
Keep = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]
"""Takes the name of a part of a cell and a function that computes it; returns the stored or
computed result."""

TIMED_ROUNDS = 3
TIMED_STEPS = 8
WARM_UP_STEPS = 2
STAGES = ("encode", "append", "score", "select", "attend")


def no_progress(items: Sequence[Any], label: str) -> Iterable[Any]:
    """Return the items without showing progress."""
    return items


def always_compute(part: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Compute a part of a cell, ignoring stored results."""
    return compute()


@dataclass
class Context:
    """What a task needs to run one cell.

    Attributes:
        loaded: The model.
        store: Stores the model's prefills.
        method: The method, its artifact loaded.
        policy: Budget and rules.
        full: Full attention, the baseline for answers and time.
        full_answers: Full attention's answer tokens by sample id; None if this cell is full
            attention.
        bandwidth: Measured memory bandwidth of the machine in bytes per second; None if unknown.
        track: Shows progress over a sequence.
        artifact: What the method has learned; None if it learns nothing or the task fits it.
        keep: Returns parts of the cell that are stored; computes and stores the others.
    """

    loaded: LoadedModel
    store: PrefillStore
    method: TopKMethod
    policy: Policy
    full: TopKMethod
    full_answers: Mapping[str, Sequence[int]] | None = None
    bandwidth: float | None = None
    track: Track = no_progress
    artifact: Artifact | None = None
    keep: Keep = always_compute

    @property
    def geometry(self) -> Geometry:
        """The model's shape."""
        return geometry_of(self.loaded.model, self.loaded.digest)

    def full_answer(self, prompt: Prompt) -> list[int]:
        """Return full attention's answer tokens, decoded here if no full-attention cell has run."""
        answer = (self.full_answers or {}).get(prompt.sample.sample_id)
        if answer is not None:
            return list(answer)
        decoder = Decoder(self.loaded, self.store, [prompt], prompt.sample.max_new_tokens + 1)
        with self.attached(decoder, self.full.for_answers()):
            return decoder.generate()[0]

    @contextmanager
    def attached(
        self, decoder: Decoder, method: TopKMethod, observer: Observer | None = None
    ) -> Iterator[Session]:
        """Attach a method while a decoder runs, and check that every step went through the method.

        Args:
            decoder: Counts the steps that are run inside the block.
            method: The method.
            observer: Called at each stage and step.

        Raises:
            MethodBypassedError: When the block ends, if steps did not go through the method.
        """
        steps_before = len(decoder.lengths)
        with attach(self.loaded.model, method, self.policy, observer) as session:
            yield session
        session.require_steps(decoder.steps_over(session.policy.k, steps_before))


@dataclass
class TaskRow:
    """The columns of a row that the task fills in; the others come from the configuration."""

    subtask: str
    values: dict[str, Any] = field(default_factory=dict)
    status: str = "ok"
    reason: str = ""


@dataclass
class Outcome:
    """What a task returns.

    Attributes:
        rows: One row per sub-task, and their mean.
        samples: One mapping per sample, for paired statistics and re-scoring.
    """

    rows: list[TaskRow]
    samples: list[dict[str, Any]]


class Task(ABC):
    """What a cell runs.

    Attributes:
        name: The task's name in rows.
        all_budgets: Whether one cell covers every budget, so that ``k`` is not swept.
        needs_full: Whether full attention's answers are needed, to compare with or to force.
        uses_model: Whether the result depends on the model's weights.
        fits_methods: Whether a method that learns is fitted on the model before the task runs;
            otherwise the task fits it.
        refits: Whether ``force=true`` also fits the method again.
        subject: Shown in the row's model column if ``uses_model`` is false.
        parts: The parts of a cell that are stored separately (``answers``, ``selections``,
            ``speed``), each with the task settings that it does not depend on. Only ``speed``
            depends on the machine and on full attention's backend.
    """

    name: str
    all_budgets: bool = False
    needs_full: ClassVar[bool] = True
    uses_model: bool = True
    fits_methods: ClassVar[bool] = True
    refits: ClassVar[bool] = False
    subject: str = ""
    parts: ClassVar[Mapping[str, frozenset[str]]] = {"answers": frozenset()}

    def inputs_digest(self, loaded: LoadedModel) -> str:
        """Return a digest of all inputs that the configuration does not contain."""
        return ""

    @abstractmethod
    def run(self, context: Context) -> Outcome:
        """Run one cell."""


@dataclass(frozen=True)
class Reads:
    """What a KV head reads in one step of one sparse layer, on average.

    Attributes:
        tokens: Distinct cached tokens.
        scanned: Index entries; None if their number does not depend on the data.
    """

    tokens: float
    scanned: float | None = None

    @classmethod
    def mean(cls, reads: Sequence["Reads"]) -> "Reads | None":
        """Return the mean, or None for an empty sequence."""
        if not reads:
            return None
        scanned = [one.scanned for one in reads if one.scanned is not None]
        tokens = statistics.fmean(one.tokens for one in reads)
        return cls(tokens, statistics.fmean(scanned) if scanned else None)


class ReadCounter(Observer):
    """Counts what a KV head reads in the sparse layers of decode steps.

    Attributes:
        steps: Decode steps by layer, those that went through the method and those that did not; the
            caller adds the session's.
        longest: Most cached tokens at any step; the caller takes them from the decoder.
    """

    def __init__(self) -> None:
        self.steps = StepCount()
        self.longest = 0
        self.layer_steps = 0  # each step counts once per layer
        self.read = 0.0
        self.scanned: float | None = None
        self.cached = 0.0

    def on_step(
        self,
        layer: int,
        query_states: torch.Tensor,
        cache: CacheView,
        result: StepResult,
        scale: float,
        softcap: float | None,
    ) -> None:
        check_finite(result, layer)
        start, end = cache.bounds()
        cached = (end - start).double().mean().item()
        if cache.freed is not None:
            cached += cache.freed.double().mean().item()
        self.layer_steps += 1
        self.cached += cached
        if result.selection is None:
            self.read += cached
        else:
            self.read += result.selection.tokens_read(cache).double().mean().item()
            if result.selection.scanned is not None:
                scanned = result.selection.scanned.double().mean().item()
                self.scanned = scanned + (self.scanned or 0.0)

    @property
    def density(self) -> float | None:
        """Share of the cached tokens that were read, 0 to 1; None before the first step."""
        return self.read / self.cached if self.cached else None

    @property
    def step_reads(self) -> "Reads | None":
        """What a KV head read per step, on average; None before the first step."""
        if not self.layer_steps:
            return None
        return Reads(
            self.read / self.layer_steps,
            None if self.scanned is None else self.scanned / self.layer_steps,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as plain values that JSON can hold."""
        reads = self.step_reads
        return {
            "density": self.density,
            "reads": None if reads is None else asdict(reads),
            "steps_taken": self.steps.taken.total(),
            "sparse_step_share": self.steps.share_taken,
            "longest": self.longest,
        }


class StageTimes(Observer):
    """Times the stages of decode steps."""

    def __init__(self, device: torch.device) -> None:
        self.stages = Stages(device)

    def stage(self, name: str, layer: int) -> Any:
        return self.stages(name)


def compact_unsupported_reason(task: str) -> str:
    """Return why a task does not support a method that frees tokens (``mode=compact``)."""
    return (
        f"task={task} needs all tokens in the cache at every step, and mode=compact frees some; "
        "use mode=masked, which selects the same tokens."
    )


def tokenise_all(
    loaded: LoadedModel, samples: Sequence[Sample], question: Question
) -> list[Prompt]:
    """Encode samples for a model."""
    return [tokenise(loaded, sample, question) for sample in samples]


def spread_over_subtasks(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """Return at most ``limit`` prompts, taken from the sub-tasks in turn; deterministic."""
    remaining: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        remaining.setdefault(prompt.sample.subtask, []).append(prompt)
    chosen: list[Prompt] = []
    while remaining and len(chosen) < limit:
        for subtask in list(remaining):
            chosen.append(remaining[subtask].pop(0))
            if not remaining[subtask]:
                del remaining[subtask]
    return chosen[:limit]


@dataclass(kw_only=True)
class GenerationTask(Task):
    """A task whose samples are questions with known answers, scored by string match.

    Attributes:
        question: ``"sparse"`` decodes the question with the method, ``"dense"`` prefills it.
        batch_size: At most this many prompts decode together.
        timed_prompts: Number of prompts on which speed is measured.
        judged_prompts: Number of prompts on which selection quality is measured.
    """

    name: str = "generation"
    question: Question = "sparse"
    batch_size: int = 25
    timed_prompts: int = 3
    judged_prompts: int = 8
    parts: ClassVar[Mapping[str, frozenset[str]]] = {
        "answers": frozenset({"timed_prompts", "judged_prompts"}),
        "selections": frozenset({"timed_prompts"}),
        # bandwidth_fraction uses the bytes counted in the answers, so it depends on their settings.
        "speed": frozenset({"judged_prompts"}),
    }

    def __post_init__(self) -> None:
        if self.question not in ("sparse", "dense"):
            raise ValueError(f"question must be sparse or dense, got {self.question!r}.")
        for knob in ("batch_size", "timed_prompts", "judged_prompts"):
            check_whole(f"task.{knob}", getattr(self, knob))

    @abstractmethod
    def samples(self, loaded: LoadedModel) -> list[Sample]:
        """Return the samples for a model; the same for every method."""

    def run(self, context: Context) -> Outcome:
        prompts = tokenise_all(context.loaded, self.samples(context.loaded), self.question)
        k = context.method.effective_policy(context.policy).k
        sparse_prompts = prompts
        if context.method.selects:
            sparse_prompts = [prompt for prompt in prompts if prompt.most_cached > k]
            if not sparse_prompts:
                longest = max(prompt.most_cached for prompt in prompts)
                reason = no_sparse_step_reason(k, longest)
                return Outcome([TaskRow("mean", {}, "skipped", reason)], [])
        answered = context.keep("answers", lambda: self._answer(context, prompts))
        samples, counts = answered["samples"], answered["subtasks"]
        if context.full_answers is None and not context.method.selects:
            context.full_answers = {one["sample_id"]: one["tokens"] for one in samples}
        if context.method.selects and not any(one["steps_taken"] for one in counts.values()):
            longest = max(one["longest"] for one in counts.values())
            reason = no_sparse_step_reason(k, longest)
            return Outcome([TaskRow("mean", {}, "skipped", reason)], [])
        prompts, samples = list(prompts), list(samples)
        rows = []
        # In a sub-task without a step over more than k tokens the method did nothing: the sub-task
        # is skipped, and the mean is over the others.
        for subtask, count in counts.items() if context.method.selects else ():
            if not count["steps_taken"]:
                reason = no_sparse_step_reason(k, count["longest"])
                rows.append(TaskRow(subtask, {}, "skipped", reason))
                prompts = [one for one in prompts if one.sample.subtask != subtask]
                samples = [one for one in samples if one["subtask"] != subtask]
        counts = {one["subtask"]: counts[one["subtask"]] for one in samples}
        densities = [one["density"] for one in counts.values() if one["density"] is not None]
        density = statistics.fmean(densities) if densities else None
        reads = [Reads(**one["reads"]) for one in counts.values() if one["reads"] is not None]
        shared: dict[str, Any] = {"batch_size": 1, "density": density}
        if context.method.selects:
            shared["sparse_step_share"] = statistics.fmean(
                one["sparse_step_share"] for one in counts.values()
            )
        lengths = (len(prompt.prefill_ids) + len(prompt.decode_ids) for prompt in prompts)
        shared |= accounting(context, round(statistics.fmean(lengths)), Reads.mean(reads))
        shared["density_all"] = density_of_all_layers(context, shared["kv_len"], density)
        # A step over at most k tokens selects nothing, so it is not timed or measured.
        timed = [prompt for prompt in sparse_prompts if prompt.num_tokens >= k]
        if timed or not context.method.selects:
            timed = spread_over_subtasks(timed or prompts, self.timed_prompts)
            bytes_read = shared["bytes_read_per_step"]
            shared |= context.keep("speed", lambda: speed(context, timed, bytes_read))
        # A method that frees tokens cannot be compared with full attention over all of them.
        if context.method.selects and not context.method.compacts:
            measured = spread_over_subtasks(sparse_prompts, self.judged_prompts)
            shared |= context.keep("selections", lambda: measure_selection(context, measured))
        scored = []
        for subtask in counts:
            scores = [one["score"] for one in samples if one["subtask"] == subtask]
            values: dict[str, Any] = {
                "score": statistics.fmean(scores),
                "num_samples": len(scores),
            }
            # Columns that identify a configuration are in all rows of a cell.
            values |= {name: shared.get(name) for name in ("batch_size", "kv_len", "full_backend")}
            values["density"] = counts[subtask]["density"]
            if context.method.selects:
                values["sparse_step_share"] = counts[subtask]["sparse_step_share"]
            scored.append(TaskRow(subtask, values))
        mean = statistics.fmean(row.values["score"] for row in scored)
        scored.append(TaskRow("mean", {"score": mean, "num_samples": len(samples), **shared}))
        return Outcome([*rows, *scored], samples)

    def _answer(self, context: Context, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Decode all prompts; return scored samples and each sub-task's counts, as plain values.

        Full attention always answers with the same kernel, whatever backend it is timed with.
        """
        context = replace(context, method=context.method.for_answers())
        for prompt in context.track(prompts, "prefill"):
            context.store.get(prompt.prefill_ids, context.method.needs)
        tokenizer = context.loaded.tokenizer
        counters: dict[str, ReadCounter] = {}
        samples = []
        label = context.method.name
        for batch in context.track(batches(prompts, self.batch_size), label):
            most_new = max(prompt.sample.max_new_tokens for prompt in batch)
            needs = context.method.needs
            decoder = Decoder(context.loaded, context.store, batch, most_new + 1, needs)
            counter = counters.setdefault(batch[0].sample.subtask, ReadCounter())
            with context.attached(decoder, context.method, counter) as session:
                answers = decoder.generate()
            counter.steps.add(session.count)
            counter.longest = max(counter.longest, *decoder.lengths, 0)
            for prompt, tokens, milliseconds in zip(
                batch, answers, decoder.prefill_ms, strict=True
            ):
                sample = prompt.sample
                prediction = str(tokenizer.decode(tokens, skip_special_tokens=True))
                match = string_match_part if sample.subtask.startswith("qa") else string_match_all
                samples.append(
                    {
                        "sample_id": sample.sample_id,
                        "subtask": sample.subtask,
                        "length": len(prompt.prefill_ids) + len(prompt.decode_ids),
                        "score": match(prediction, sample.answers),
                        "prediction": prediction,
                        "references": list(sample.answers),
                        "num_generated": len(tokens),
                        "tokens": tokens,
                        "prefill_ms": milliseconds,
                    }
                )
        order = {prompt.sample.sample_id: position for position, prompt in enumerate(prompts)}
        samples.sort(key=lambda one: order[one["sample_id"]])
        return {
            "samples": samples,
            "subtasks": {subtask: counter.as_dict() for subtask, counter in counters.items()},
        }


def accounting(context: Context, n: int, reads: Reads | None) -> dict[str, Any]:
    """Return the columns for the bytes read by a decode step, from the method's own cost model.

    Args:
        context: The cell's context.
        n: Cached tokens.
        reads: Counted reads; None if no step was counted.
    """
    geometry, method = context.geometry, context.method
    k = method.effective_policy(context.policy).k
    sparse, dense = layers_read(context, n)
    layer_bytes = layer_bytes_read(method, geometry, n, k, reads)
    total = sparse * layer_bytes + sum(kv_bytes(geometry, tokens) for tokens in dense)
    return {
        "kv_len": n,
        "bytes_read_per_step": float(total),
        "index_bytes_per_token": float(sparse * method.index_bytes_per_token(geometry)),
    }


def layers_read(context: Context, n: int) -> tuple[int, list[int]]:
    """Return the number of sparse layers, and how many of ``n`` tokens each dense layer reads.

    A layer is dense if the policy or the model's design keeps it dense; a sliding-window layer
    reads no more than its window.
    """
    num_layers, method = context.geometry.num_layers, context.method
    dense: dict[int, int] = {}
    if method.selects:
        policy = method.effective_policy(context.policy)
        dense = dict.fromkeys(policy.resolve_dense_layers(num_layers), n)
    partial = partial_layers(context.loaded.model)
    dense |= {layer: kind.tokens_read(n) for layer, kind in partial.items()}
    return num_layers - len(dense), list(dense.values())


def density_of_all_layers(context: Context, n: int, density: float | None) -> float | None:
    """Return the share of ``n`` cached tokens read by all layers, given that of the sparse layers.

    Args:
        context: The cell's context.
        n: Cached tokens.
        density: Share read by the sparse layers; None if it was not counted.
    """
    sparse, dense = layers_read(context, n)
    if sparse and density is None:
        return None
    return (sparse * (density or 0.0) + sum(dense) / n) / (sparse + len(dense))


def no_sparse_step_reason(k: int, longest: int) -> str:
    """Return why a cell is skipped in which no decode step had more than ``k`` cached tokens."""
    return (
        f"a method acts at decode steps over more than k tokens, and no step had more than k={k} "
        f"(at most {longest} were cached), so it would equal full attention; use a smaller k or "
        "longer prompts."
    )


def layer_bytes_read(
    method: TopKMethod, geometry: Geometry, n: int, k: int, reads: Reads | None
) -> int:
    """Return the bytes that one decode step of one sparse layer reads, for one batch row.

    If ``k >= n`` a step reads all keys and values and no index. Otherwise the counted reads are
    charged, which differ from ``k`` if query heads select separately, if fewer tokens are enough,
    if a page is partly filled, or if generated tokens are kept on top of the budget.

    Args:
        method: The method.
        geometry: The model's geometry.
        n: Cached tokens.
        k: The budget.
        reads: Counted reads; if None, the budget is charged.
    """
    if not method.selects or k >= n:
        return kv_bytes(geometry, n)
    if reads is None:
        return method.bytes_read_per_step(geometry, n, k)
    scanned = None if reads.scanned is None else round(reads.scanned)
    return method.bytes_read_by(geometry, n, round(reads.tokens), scanned)


def speed(context: Context, prompts: Sequence[Prompt], bytes_read: float) -> dict[str, Any]:
    """Time decode steps of single prompts, full attention and the method in turn.

    Times are medians over steps. The first steps of each turn build the index and are discarded as
    warm-up. With few prompts, each takes more turns, to give enough pairs for a confidence
    interval. Stages are timed in separate turns, since timers inside a step cost time.
    """
    device = context.loaded.model.device
    load = OtherLoad(device)
    rounds = max(TIMED_ROUNDS, math.ceil(LEAST_PAIRS / len(prompts)))
    per_round = 3 * (WARM_UP_STEPS + TIMED_STEPS)
    turn_ms: dict[str, list[list[float]]] = {"full": [], "method": []}
    stages: dict[str, list[float]] = {}
    prefill_ms = []
    cache_bytes: list[int] = []
    new_tokens = rounds * per_round + 1
    for prompt in context.track(prompts, "speed"):
        decoder = decoder_after_question(context, prompt, new_tokens)
        prefill_ms += decoder.prefill_ms
        # Every step decodes the same token, since only the time matters.
        token = decoder.first_logits.argmax(-1)
        turns = {"full": context.full, "method": context.method}
        for _ in range(rounds):
            for name, method in turns.items():
                used = decoder
                if method.compacts:  # it frees tokens that the next turn needs, so use a fresh one
                    used = decoder_after_question(context, prompt, new_tokens)
                turn_ms[name].append(_timed_steps(context, used, method, token, Observer()))
                if name == "method":
                    cache_bytes.append(used.cache.num_bytes)
            observer = StageTimes(device)
            if context.method.compacts:
                used = decoder_after_question(context, prompt, new_tokens)
            _timed_steps(context, used, context.method, token, observer)
            steps = WARM_UP_STEPS + TIMED_STEPS
            for stage, milliseconds in observer.stages.times().items():
                if stage == "build":
                    # The time to capture what the method needs at prefill counts as build time.
                    build_ms = sum(milliseconds) + decoder.needs_ms[0]
                    stages.setdefault(stage, []).append(build_ms)
                    continue
                layers = len(milliseconds) // steps  # the layers that have this stage
                per_step = [
                    sum(milliseconds[step * layers : (step + 1) * layers])
                    for step in range(WARM_UP_STEPS, steps)
                ]
                stages.setdefault(stage, []).extend(per_step)
    full = turn_ms["full"] if context.method.selects else None
    timed = speed_columns(turn_ms["method"], full, load.share())
    columns: dict[str, Any] = {
        "speedup_vs_full": None,
        **timed,
        "prefill_ms": statistics.median(prefill_ms),
        "tokens_per_s": 1e3 / timed["decode_ms_p50"],
        "full_backend": getattr(context.full, "backend", None),
        "kv_cache_mib": statistics.fmean(cache_bytes) / 2**20,
    }
    for stage in ("build", *STAGES):
        columns[f"{stage}_ms"] = statistics.median(stages[stage]) if stage in stages else None
    if not context.method.selects and "full" in stages:
        columns["attend_ms"] = statistics.median(stages["full"])
    attention = sum(columns[f"{stage}_ms"] or 0.0 for stage in STAGES)
    if context.method.selects and "full" in stages:  # the layers that the policy keeps dense
        attention += statistics.median(stages["full"])
    if context.bandwidth and attention:
        columns["bandwidth_fraction"] = bytes_read / (attention * 1e-3) / context.bandwidth
    return columns


def decoder_after_question(context: Context, prompt: Prompt, new_tokens: int) -> Decoder:
    """Return a decoder that has read a prompt and its question with dense attention."""
    decoder = Decoder(context.loaded, context.store, [prompt], new_tokens, context.method.needs)
    decoder.read_question()
    return decoder


def _timed_steps(
    context: Context, decoder: Decoder, method: TopKMethod, token: torch.Tensor, observer: Observer
) -> list[float]:
    """Run one turn; return the milliseconds of each step after the warm-up."""
    stages = Stages(decoder.device)
    with context.attached(decoder, method, observer):
        for _ in range(WARM_UP_STEPS + TIMED_STEPS):
            with stages("step"):
                logits = decoder.step(token)
    decoder.check(logits)  # NaN and infinity persist, so checking the last step is enough
    return stages.times()["step"][WARM_UP_STEPS:]


def measure_selection(context: Context, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Measure the quality of the method's selections while it decodes full attention's answers."""
    meter = SelectionMeter(context.method.effective_policy(context.policy).k)
    for prompt in context.track(prompts, "selections"):
        answer = context.full_answer(prompt)
        needs = context.method.needs
        decoder = Decoder(context.loaded, context.store, [prompt], len(answer) + 1, needs)
        with context.attached(decoder, context.method, meter):
            decoder.teacher_force([answer])
    return dict(meter.means())
