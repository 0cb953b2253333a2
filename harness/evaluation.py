"""What every task is handed and returns, and how a task of questions and answers is run.

A cell of such a task makes three passes over its prompts: answers and their scores (batched),
speed (alone, full attention and the method in turn), and the quality of the selections (untimed).
What each gives is kept under a key of its own, so that it is computed again only when it must be.
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
"""Given the name of a part of a cell and how to compute it, returns it, found or computed."""

TIMED_ROUNDS = 3
TIMED_STEPS = 8
WARM_UP_STEPS = 2
STAGES = ("encode", "append", "score", "select", "attend")


def untracked(items: Sequence[Any], label: str) -> Iterable[Any]:
    """Show no progress."""
    return items


def unkept(part: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Compute a part of a cell, whatever was computed before."""
    return compute()


@dataclass
class Context:
    """What a task needs to run one cell.

    Attributes:
        loaded: The model.
        store: The model's prefills.
        method: The method, its artifact loaded.
        policy: Budget and rules.
        full: Full attention, to compare and to time against.
        full_answers: Full attention's tokens by sample id; None where this cell is full attention.
        bandwidth: Measured memory bandwidth of the machine in bytes a second; None where unknown.
        track: Shows progress over a sequence.
        artifact: What the method has learned; None if nothing, or if the task fits it.
        keep: Finds the parts of the cell that were computed before, and keeps the others.
    """

    loaded: LoadedModel
    store: PrefillStore
    method: TopKMethod
    policy: Policy
    full: TopKMethod
    full_answers: Mapping[str, Sequence[int]] | None = None
    bandwidth: float | None = None
    track: Track = untracked
    artifact: Artifact | None = None
    keep: Keep = unkept

    @property
    def geometry(self) -> Geometry:
        """The model's shape."""
        return geometry_of(self.loaded.model, self.loaded.digest)

    def full_answer(self, prompt: Prompt) -> list[int]:
        """Return full attention's tokens for a prompt, decoding them if no cell has."""
        known = (self.full_answers or {}).get(prompt.sample.sample_id)
        if known is not None:
            return list(known)
        decoder = Decoder(self.loaded, self.store, [prompt], prompt.sample.max_new_tokens + 1)
        with self.attached(decoder, self.full.answering()):
            return decoder.generate()[0]

    @contextmanager
    def attached(
        self, decoder: Decoder, method: TopKMethod, observer: Observer | None = None
    ) -> Iterator[Session]:
        """Attach a method while a decoder runs, and make sure that it took the decoder's steps.

        Args:
            decoder: Counts the steps that are run inside the block.
            method: The method.
            observer: Watches stages and steps.

        Raises:
            MethodBypassedError: When the block ends, if steps did not go through the method.
        """
        before = len(decoder.lengths)
        with attach(self.loaded.model, method, self.policy, observer) as session:
            yield session
        session.require_steps(decoder.steps_over(session.policy.k, before))


@dataclass
class TaskRow:
    """The columns of a row that the task knows; the others come from the configuration."""

    subtask: str
    values: dict[str, Any] = field(default_factory=dict)
    status: str = "ok"
    reason: str = ""


@dataclass
class Outcome:
    """What a task returns.

    Attributes:
        rows: One a sub-task, and the mean.
        samples: One mapping a sample, for paired statistics and re-scoring.
    """

    rows: list[TaskRow]
    samples: list[dict[str, Any]]


class Task(ABC):
    """What a cell runs.

    Attributes:
        name: What rows call the task.
        all_budgets: One cell covers every budget, so ``k`` is no axis of the task.
        needs_full: Full attention's answers are compared with, or forced.
        uses_model: The model's weights matter to the result.
        fits_methods: A method that learns comes fitted on the model; else the task fits it.
        refits: Running finished cells again fits again, too.
        subject: What rows name in the model's place where they do not.
        parts: The parts of a cell that are kept apart (``answers``, ``selections``, ``speed``) and,
            of each, the settings of the task that it does not depend on. Only ``speed`` depends on
            the machine and on full attention's backend.
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
        """Return a digest of everything that is read beyond the configuration."""
        return ""

    @abstractmethod
    def run(self, context: Context) -> Outcome:
        """Run one cell."""


@dataclass(frozen=True)
class Reads:
    """What a KV head reads in one step of one sparse layer, on average.

    Attributes:
        tokens: Different cached tokens.
        scanned: Entries of side information; None where their number does not depend on the data.
    """

    tokens: float
    scanned: float | None = None

    @classmethod
    def mean(cls, counted: Sequence["Reads"]) -> "Reads | None":
        """Return the mean; None of nothing."""
        if not counted:
            return None
        scanned = [one.scanned for one in counted if one.scanned is not None]
        tokens = statistics.fmean(one.tokens for one in counted)
        return cls(tokens, statistics.fmean(scanned) if scanned else None)


class Counter(Observer):
    """Counts what a KV head reads in the sparse layers of decode steps.

    Attributes:
        steps: Decode steps that the method took, and did not, by layer; a caller adds a session's.
        longest: Most cached tokens at a step; a caller adds a decoder's.
    """

    def __init__(self) -> None:
        self.steps = StepCount()
        self.longest = 0
        self.seen = 0  # steps of single layers
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
        self.seen += 1
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
        """Share of the cached tokens that was read, 0 to 1; None before the first step."""
        return self.read / self.cached if self.cached else None

    @property
    def step_reads(self) -> "Reads | None":
        """What a KV head read in a step, on average; None before the first step."""
        if not self.seen:
            return None
        return Reads(
            self.read / self.seen, None if self.scanned is None else self.scanned / self.seen
        )

    def told(self) -> dict[str, Any]:
        """Return what was counted, as plain values."""
        reads = self.step_reads
        return {
            "density": self.density,
            "reads": None if reads is None else asdict(reads),
            "steps_taken": self.steps.taken.total(),
            "sparse_step_share": self.steps.share_taken,
            "longest": self.longest,
        }


class StageWatch(Observer):
    """Times the stages of decode steps with the common stopwatch."""

    def __init__(self, device: torch.device) -> None:
        self.stages = Stages(device)

    def stage(self, name: str, layer: int) -> Any:
        return self.stages(name)


def needs_all_tokens(task: str) -> str:
    """Return the sentence with which a task refuses a method that frees tokens."""
    return (
        f"task={task} needs all tokens in the cache at every step, and mode=compact frees some; "
        "mode=masked selects the same."
    )


def tokenised(loaded: LoadedModel, samples: Sequence[Sample], question: Question) -> list[Prompt]:
    """Encode samples for a model."""
    return [tokenise(loaded, sample, question) for sample in samples]


def spread(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """Return at most ``most`` prompts, of as many sub-tasks as there are, the same every time."""
    waiting: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        waiting.setdefault(prompt.sample.subtask, []).append(prompt)
    chosen: list[Prompt] = []
    while waiting and len(chosen) < most:
        for subtask in list(waiting):
            chosen.append(waiting[subtask].pop(0))
            if not waiting[subtask]:
                del waiting[subtask]
    return chosen[:most]


@dataclass(kw_only=True)
class GenerationTask(Task):
    """A task whose samples are questions with known answers, scored by string match.

    Attributes:
        question: ``"sparse"`` decodes the question with the method, ``"dense"`` prefills it.
        batch_size: Most prompts that decode together.
        timed_prompts: Prompts that the speed is measured on.
        judged_prompts: Prompts that the quality of the selections is measured on.
    """

    name: str = "generation"
    question: Question = "sparse"
    batch_size: int = 25
    timed_prompts: int = 3
    judged_prompts: int = 8
    parts: ClassVar[Mapping[str, frozenset[str]]] = {
        "answers": frozenset({"timed_prompts", "judged_prompts"}),
        "selections": frozenset({"timed_prompts"}),
        "speed": frozenset({"judged_prompts"}),  # its bandwidth is of the bytes that answers read
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
        prompts = tokenised(context.loaded, self.samples(context.loaded), self.question)
        k = context.method.effective_policy(context.policy).k
        choosing = prompts
        if context.method.selects:
            choosing = [prompt for prompt in prompts if prompt.most_cached > k]
            if not choosing:
                most = max(prompt.most_cached for prompt in prompts)
                return Outcome([TaskRow("mean", {}, "skipped", never_more_than(k, most))], [])
        answered = context.keep("answers", lambda: self._answer(context, prompts))
        samples, counted = answered["samples"], answered["subtasks"]
        if context.full_answers is None and not context.method.selects:
            context.full_answers = {one["sample_id"]: one["tokens"] for one in samples}
        if context.method.selects and not any(one["steps_taken"] for one in counted.values()):
            most = max(one["longest"] for one in counted.values())
            return Outcome([TaskRow("mean", {}, "skipped", never_more_than(k, most))], [])
        prompts, samples = list(prompts), list(samples)
        rows = []
        # Where no step of a sub-task had more than k tokens the method did not act: no number of it
        # stands anywhere, and the mean is of the others.
        for subtask, told in counted.items() if context.method.selects else ():
            if not told["steps_taken"]:
                reason = never_more_than(k, told["longest"])
                rows.append(TaskRow(subtask, {}, "skipped", reason))
                prompts = [one for one in prompts if one.sample.subtask != subtask]
                samples = [one for one in samples if one["subtask"] != subtask]
        counted = {one["subtask"]: counted[one["subtask"]] for one in samples}
        read = [one["density"] for one in counted.values() if one["density"] is not None]
        density = statistics.fmean(read) if read else None
        reads = [Reads(**one["reads"]) for one in counted.values() if one["reads"] is not None]
        shared: dict[str, Any] = {"batch_size": 1, "density": density}
        if context.method.selects:
            shared["sparse_step_share"] = statistics.fmean(
                one["sparse_step_share"] for one in counted.values()
            )
        lengths = (len(prompt.prefill_ids) + len(prompt.decode_ids) for prompt in prompts)
        shared |= accounting(context, round(statistics.fmean(lengths)), Reads.mean(reads))
        shared["density_all"] = density_of_all_layers(context, shared["kv_len"], density)
        # A step that keeps everything says nothing of how fast or how good a selection is.
        timed = [prompt for prompt in choosing if prompt.num_tokens >= k]
        if timed or not context.method.selects:
            timed = spread(timed or prompts, self.timed_prompts)
            bytes_read = shared["bytes_read_per_step"]
            shared |= context.keep("speed", lambda: speed(context, timed, bytes_read))
        # What was freed cannot be compared with what full attention chose.
        if context.method.selects and not context.method.compacts:
            judged = spread(choosing, self.judged_prompts)
            shared |= context.keep("selections", lambda: measure_selection(context, judged))
        scored = []
        for subtask in counted:
            scores = [one["score"] for one in samples if one["subtask"] == subtask]
            values: dict[str, Any] = {
                "score": statistics.fmean(scores),
                "num_samples": len(scores),
            }
            # What tells configurations apart stands in all rows of a cell.
            values |= {name: shared.get(name) for name in ("batch_size", "kv_len", "full_backend")}
            values["density"] = counted[subtask]["density"]
            if context.method.selects:
                values["sparse_step_share"] = counted[subtask]["sparse_step_share"]
            scored.append(TaskRow(subtask, values))
        mean = statistics.fmean(row.values["score"] for row in scored)
        scored.append(TaskRow("mean", {"score": mean, "num_samples": len(samples), **shared}))
        return Outcome([*rows, *scored], samples)

    def _answer(self, context: Context, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Decode all prompts; return scored samples and what each sub-task read, as plain values.

        Full attention answers by one kernel, whatever it is timed with.
        """
        context = replace(context, method=context.method.answering())
        for prompt in context.track(prompts, "prefill"):
            context.store.get(prompt.prefill_ids, context.method.needs)
        tokenizer = context.loaded.tokenizer
        counters: dict[str, Counter] = {}
        samples = []
        label = context.method.name
        for batch in context.track(batches(prompts, self.batch_size), label):
            most = max(prompt.sample.max_new_tokens for prompt in batch)
            needs = context.method.needs
            decoder = Decoder(context.loaded, context.store, batch, most + 1, needs)
            counter = counters.setdefault(batch[0].sample.subtask, Counter())
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
        order = {prompt.sample.sample_id: place for place, prompt in enumerate(prompts)}
        samples.sort(key=lambda one: order[one["sample_id"]])
        return {
            "samples": samples,
            "subtasks": {subtask: counter.told() for subtask, counter in counters.items()},
        }


def accounting(context: Context, n: int, reads: Reads | None) -> dict[str, Any]:
    """Return the bytes that a decode step over ``n`` tokens reads, from each method's own model.

    Args:
        context: The cell's.
        n: Cached tokens.
        reads: What was counted; None if no step was.
    """
    geometry, method = context.geometry, context.method
    k = method.effective_policy(context.policy).k
    sparse, dense = layers_read(context, n)
    in_layer = layer_bytes_read(method, geometry, n, k, reads)
    read = sparse * in_layer + sum(kv_bytes(geometry, tokens) for tokens in dense)
    return {
        "kv_len": n,
        "bytes_read_per_step": float(read),
        "index_bytes_per_token": float(sparse * method.index_bytes_per_token(geometry)),
    }


def layers_read(context: Context, n: int) -> tuple[int, list[int]]:
    """Return how many layers are left to the method, and the tokens of ``n`` that each other reads.

    A layer is not left to it if the policy keeps it dense, or the model's design does: one that
    slides reads no more than its window.
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
    """Return the share of ``n`` cached tokens that all layers read, from that of the sparse ones.

    Args:
        context: The cell's.
        n: Cached tokens.
        density: Share that the layers read that are left to the method; None if nobody counted.
    """
    sparse, dense = layers_read(context, n)
    if sparse and density is None:
        return None
    return (sparse * (density or 0.0) + sum(dense) / n) / (sparse + len(dense))


def never_more_than(k: int, most: int) -> str:
    """Return the sentence of a cell in which no decode step had more than ``k`` cached tokens."""
    return (
        f"a method acts at decode steps over more than k tokens, and no step had more than k={k} "
        f"(at most {most} were cached), where it would equal full attention; use a smaller k or "
        "longer prompts."
    )


def layer_bytes_read(
    method: TopKMethod, geometry: Geometry, n: int, k: int, reads: Reads | None
) -> int:
    """Return the bytes of one decode step of one sparse layer, for one batch row.

    With room for everything a step reads everything and asks no index. Else it reads what was
    counted: a budget is not what a step reads where heads choose apart, where fewer are enough,
    where a page is half full, or where what was generated comes on top.

    Args:
        method: The method.
        geometry: The model's.
        n: Cached tokens.
        k: The budget.
        reads: What was counted; None if no step was, and the budget stands for it.
    """
    if not method.selects or k >= n:
        return kv_bytes(geometry, n)
    if reads is None:
        return method.bytes_read_per_step(geometry, n, k)
    scanned = None if reads.scanned is None else round(reads.scanned)
    return method.bytes_read_by(geometry, n, round(reads.tokens), scanned)


def speed(context: Context, prompts: Sequence[Prompt], bytes_read: float) -> dict[str, Any]:
    """Time decode steps of single prompts, full attention and the method in turn.

    Medians over steps; the first steps of each turn, which build the index, warm up. Few prompts
    take more turns, as many as an interval needs. The stages are timed in turns of their own, since
    a stopwatch in a step also costs time.
    """
    device = context.loaded.model.device
    load = OtherLoad(device)
    rounds = max(TIMED_ROUNDS, math.ceil(LEAST_PAIRS / len(prompts)))
    per_round = 3 * (WARM_UP_STEPS + TIMED_STEPS)
    took: dict[str, list[list[float]]] = {"full": [], "method": []}
    stages: dict[str, list[float]] = {}
    prefill_ms = []
    held: list[int] = []
    room = rounds * per_round + 1
    for prompt in context.track(prompts, "speed"):
        decoder = decoder_after_question(context, prompt, room)
        prefill_ms += decoder.prefill_ms
        # The same token at every step: nothing but time is looked at.
        token = decoder.first_logits.argmax(-1)
        turns = {"full": context.full, "method": context.method}
        for _ in range(rounds):
            for name, method in turns.items():
                # A method that frees memory leaves nothing for the next turn.
                used = decoder_after_question(context, prompt, room) if method.compacts else decoder
                took[name].append(_timed_steps(context, used, method, token, Observer()))
                if name == "method":
                    held.append(used.cache.num_bytes)
            watch = StageWatch(device)
            if context.method.compacts:
                used = decoder_after_question(context, prompt, room)
            _timed_steps(context, used, context.method, token, watch)
            steps = WARM_UP_STEPS + TIMED_STEPS
            for stage, milliseconds in watch.stages.times().items():
                if stage == "build":
                    # What was captured for the method at prefill is part of building its index.
                    built = sum(milliseconds) + decoder.needs_ms[0]
                    stages.setdefault(stage, []).append(built)
                    continue
                layers = len(milliseconds) // steps  # the layers that go through this stage
                per_step = [
                    sum(milliseconds[step * layers : (step + 1) * layers])
                    for step in range(WARM_UP_STEPS, steps)
                ]
                stages.setdefault(stage, []).extend(per_step)
    full = took["full"] if context.method.selects else None
    timed = speed_columns(took["method"], full, load.share())
    columns: dict[str, Any] = {
        "speedup_vs_full": None,
        **timed,
        "prefill_ms": statistics.median(prefill_ms),
        "tokens_per_s": 1e3 / timed["decode_ms_p50"],
        "full_backend": getattr(context.full, "backend", None),
        "kv_cache_mib": statistics.fmean(held) / 2**20,
    }
    for stage in ("build", *STAGES):
        columns[f"{stage}_ms"] = statistics.median(stages[stage]) if stage in stages else None
    if not context.method.selects and "full" in stages:
        columns["attend_ms"] = statistics.median(stages["full"])
    attention = sum(columns[f"{stage}_ms"] or 0.0 for stage in STAGES)
    if context.method.selects and "full" in stages:  # the layers that the policy leaves dense
        attention += statistics.median(stages["full"])
    if context.bandwidth and attention:
        columns["bandwidth_fraction"] = bytes_read / (attention * 1e-3) / context.bandwidth
    return columns


def decoder_after_question(context: Context, prompt: Prompt, room: int) -> Decoder:
    """Return a decoder that has read a prompt and its question, densely."""
    decoder = Decoder(context.loaded, context.store, [prompt], room, context.method.needs)
    decoder.read_question()
    return decoder


def _timed_steps(
    context: Context, decoder: Decoder, method: TopKMethod, token: torch.Tensor, watch: Observer
) -> list[float]:
    """Run one turn; return the milliseconds of its steps after the warm-up."""
    stages = Stages(decoder.device)
    with context.attached(decoder, method, watch):
        for _ in range(WARM_UP_STEPS + TIMED_STEPS):
            with stages("step"):
                logits = decoder.step(token)
    decoder.check(logits)  # what is no number stays none, so the last step tells of all
    return stages.times()["step"][WARM_UP_STEPS:]


def measure_selection(context: Context, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Judge the method's selections over the prompts, full attention's answers forced."""
    meter = SelectionMeter(context.method.effective_policy(context.policy).k)
    for prompt in context.track(prompts, "selections"):
        answer = context.full_answer(prompt)
        needs = context.method.needs
        decoder = Decoder(context.loaded, context.store, [prompt], len(answer) + 1, needs)
        with context.attached(decoder, context.method, meter):
            decoder.follow([answer])
    return dict(meter.means())
