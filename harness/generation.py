"""Tasks whose samples are questions with known answers.

A cell makes three passes over its prompts: it generates and scores the answers (in batches), times
decode steps (one prompt at a time, full attention and the method in turn), and measures the quality
of the selections (untimed). Each result is stored under its own key, so a pass runs again only if
something that it depends on has changed.
"""

import statistics
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from topkbench.harness.decoding import (
    Decoder,
    Prompt,
    Question,
    batches,
    spread_over_subtasks,
    tokenise_all,
)
from topkbench.harness.quality import SelectionMeter
from topkbench.harness.reads import (
    ReadCounter,
    Reads,
    accounting,
    density_of_all_layers,
    no_sparse_step_reason,
)
from topkbench.harness.samples import Sample, string_match_all, string_match_part
from topkbench.harness.speed import speed
from topkbench.harness.task import Context, Outcome, Task, TaskRow
from topkbench.methods.base import check_whole
from topkbench.models.load import LoadedModel, ModelNotAvailable, ModelShape, needs_text


@dataclass(kw_only=True)
class GenerationTask(Task):
    """A task whose samples are questions with known answers, scored by string match.

    Attributes:
        question: ``"sparse"`` decodes the question with the method, ``"dense"`` prefills it.
        batch_size: At most this many prompts decode together.
        timed_prompts: Number of prompts on which speed is measured; 0 measures none.
        judged_prompts: Number of prompts on which selection quality is measured; 0 measures none.
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
        check_whole("task.batch_size", self.batch_size)
        for knob in ("timed_prompts", "judged_prompts"):
            check_whole(f"task.{knob}", getattr(self, knob), least=0)

    def check_model(self, shape: ModelShape) -> None:
        if not shape.has_tokenizer:
            raise ModelNotAvailable(needs_text(shape.name))

    @abstractmethod
    def samples(self, loaded: LoadedModel) -> list[Sample]:
        """Return the samples for a model; the same for every method."""

    def run(self, context: Context) -> Outcome:
        prompts = tokenise_all(context.loaded, self.samples(context.loaded), self.question)
        k = context.effective_policy.k
        sparse_prompts = prompts
        if context.method.selects:
            sparse_prompts = [prompt for prompt in prompts if prompt.most_cached > k]
            if not sparse_prompts:
                longest = max(prompt.most_cached for prompt in prompts)
                reason = no_sparse_step_reason(k, longest)
                return Outcome([TaskRow("mean", {}, "skipped", reason)], [])
        answered = context.keep("answers", lambda: self._answer(context, prompts))
        samples, counts = answered["samples"], answered["subtasks"]
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
        if self.timed_prompts and (timed or not context.method.selects):
            timed = spread_over_subtasks(timed or prompts, self.timed_prompts)
            bytes_read = shared["bytes_read_per_step"]
            shared |= context.keep("speed", lambda: speed(context, timed, bytes_read))
        # A method that frees tokens cannot be compared with full attention over all of them.
        if self.judged_prompts and context.method.selects and not context.method.compacts:
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
        context = replace(context, method=context.answering)
        for prompt in context.track(prompts, "prefill"):
            context.store.get(prompt.prefill_ids, context.method.traits.needs)
        tokenizer = context.loaded.tokenizer
        counters: dict[str, ReadCounter] = {}
        samples = []
        label = context.method.name
        for batch in context.track(batches(prompts, self.batch_size), label):
            most_new = max(prompt.sample.max_new_tokens for prompt in batch)
            needs = context.method.traits.needs
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


def measure_selection(context: Context, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Measure the quality of the method's selections while it decodes full attention's answers."""
    meter = SelectionMeter()
    for prompt in context.track(prompts, "selections"):
        answer = context.full_answer(prompt)
        needs = context.method.traits.needs
        decoder = Decoder(context.loaded, context.store, [prompt], len(answer) + 1, needs)
        with context.attached(decoder, context.method, meter):
            decoder.teacher_force([answer])
    return dict(meter.means())
