"""Tasks whose samples are questions with known answers.

On each batch of prompts a cell generates and scores the answers, times decode steps (one prompt at
a time, full attention and the method in turn), and measures the quality of the selections
(untimed). Each of these parts is stored under its own key, so it is measured again only if
something that it depends on has changed.
"""

import json
import math
import statistics
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from topkbench.analysis.record.kept_file import packed
from topkbench.harness.decoding import (
    Decoder,
    Prompt,
    Question,
    known_tokens,
    spread_over_subtasks,
    tokenise_all,
)
from topkbench.harness.quality import MEASURES, PARTS, SelectionMeter
from topkbench.harness.reads import (
    ReadCount,
    ReadCounter,
    Reads,
    accounting,
    density_of_all_layers,
    no_sparse_step_reason,
)
from topkbench.harness.samples import Sample, string_match_all, string_match_part
from topkbench.harness.speed import rounds_of, speed_of, time_prompt, turn_steps
from topkbench.harness.sweep import Plan, PromptTask, Record, Steps, decode_steps
from topkbench.harness.task import Context, Outcome, TaskRow
from topkbench.methods.base import check_whole
from topkbench.models.encoding import token_texts
from topkbench.models.load import LoadedModel, ModelNotAvailable, ModelShape, needs_text

_JUDGED = frozenset({"judged_prompts", "judged_tokens", "judged_answer", "kept_prompts"})
"""Settings of what is judged, of which answers and times do not depend."""


@dataclass(kw_only=True)
class GenerationTask(PromptTask):
    """A task whose samples are questions with known answers, scored by string match.

    Attributes:
        question: ``"sparse"`` decodes the question with the method, ``"dense"`` prefills it.
        batch_size: At most this many prompts decode together; ``"auto"`` as many as half of the
            memory holds, at most 32, chosen once for a model and its prompts.
        timed_prompts: Number of prompts on which speed is measured; 0 measures none.
        judged_prompts: Number of prompts on which selection quality is measured; 0 measures none.
        judged_tokens: Decode steps of each of them at which it is measured, spread evenly over the
            question and the answer; None for all steps of both.
        judged_answer: ``"begin"`` judges that many tokens of the answer's beginning; ``"whole"``
            spreads the judged steps over the question and the whole answer.
        kept_prompts: Number of these prompts of which it is recorded which tokens each head kept,
            at the last of these steps; 0 for none.
    """

    name: str = "generation"
    question: Question = "sparse"
    batch_size: int | Literal["auto"] = 25
    timed_prompts: int = 3
    judged_prompts: int = 8
    judged_tokens: int | None = 16
    judged_answer: Literal["begin", "whole"] = "begin"
    kept_prompts: int = 3
    parts: ClassVar[Mapping[str, frozenset[str]]] = {
        "answers": frozenset({"timed_prompts", *_JUDGED}),
        "selections": frozenset({"timed_prompts"}),
        # bandwidth_fraction uses the bytes counted in the answers, so it depends on their settings.
        "speed": _JUDGED,
    }
    together: ClassVar[frozenset[str]] = frozenset({"answers"})

    def __post_init__(self) -> None:
        if self.question not in ("sparse", "dense"):
            raise ValueError(f"question must be sparse or dense, got {self.question!r}.")
        self.check_batch_size()
        for knob in ("timed_prompts", "judged_prompts", "kept_prompts"):
            check_whole(f"task.{knob}", getattr(self, knob), least=0)
        if self.judged_tokens is not None:
            check_whole("task.judged_tokens", self.judged_tokens)
        if self.judged_answer not in ("begin", "whole"):
            raise ValueError(
                f"task.judged_answer must be begin or whole, got {self.judged_answer!r}."
            )

    def check_model(self, shape: ModelShape) -> None:
        if not shape.has_tokenizer:
            raise ModelNotAvailable(needs_text(shape.name))

    @abstractmethod
    def samples(self, loaded: LoadedModel) -> list[Sample]:
        """Return the samples for a model; the same for every method."""

    def tokenised(self, loaded: LoadedModel) -> list[Prompt]:
        return tokenise_all(loaded, self.samples(loaded), self.question)

    def score(self, sample: Sample, prediction: str) -> float:
        """Return a prediction's score, 0 to 100."""
        return score_of(sample, prediction)

    def plan(self, context: Context, prompts: Sequence[Prompt]) -> Plan | Outcome:
        k, selects = context.effective_policy.k, context.method.selects
        # A step over at most k tokens selects nothing, so it is neither timed nor judged.
        sparse = [prompt for prompt in prompts if prompt.most_cached > k or not selects]
        if not sparse:
            longest = max(prompt.most_cached for prompt in prompts)
            return Outcome([TaskRow("mean", {}, "skipped", no_sparse_step_reason(k, longest))], [])
        parts: dict[str, Sequence[Prompt]] = {"answers": prompts}
        kept: Sequence[Prompt] = ()
        timed = [prompt for prompt in sparse if prompt.num_tokens >= k or not selects]
        if self.timed_prompts and timed:
            parts["speed"] = spread_over_subtasks(timed, self.timed_prompts)
        # A method that frees tokens cannot be compared with full attention over all of them.
        if self.judged_prompts and selects and not context.method.compacts:
            parts["selections"] = spread_over_subtasks(sparse, self.judged_prompts)
            kept = parts["selections"][: self.kept_prompts]
        return Plan(
            {
                part: frozenset(prompt.sample.sample_id for prompt in chosen)
                for part, chosen in parts.items()
            },
            frozenset(prompt.sample.sample_id for prompt in kept),
        )

    def measure(self, context: Context, plan: Plan, part: str, prompts: Sequence[Prompt]) -> Record:
        if part == "answers":
            return answer(replace(context, method=context.answering), prompts, self.score)
        if part == "speed":
            rounds = rounds_of(len(plan.parts[part]))
            return {"prompts": [time_prompt(context, prompt, rounds) for prompt in prompts]}
        measured = [
            measure_selection(
                context,
                prompt,
                self.judged_tokens,
                self._judged_answer,
                prompt.sample.sample_id in plan.kept,
            )
            for prompt in prompts
        ]
        return {"prompts": measured}

    def steps(self, context: Context, plan: Plan, part: str, prompts: Sequence[Prompt]) -> Steps:
        questions = [len(prompt.decode_ids) for prompt in prompts]
        answers = [prompt.sample.max_new_tokens for prompt in prompts]
        if part == "answers":
            known = known_tokens(context.loaded, context.answering, questions)
            return decode_steps(known, questions, answers)
        if part == "speed":
            turns = turn_steps() * rounds_of(len(plan.parts[part])) * len(prompts)
            return Steps(3 * turns + sum(map(bool, questions)), 2 * turns, turns + sum(questions))
        # All tokens of full attention's answer are fed back here, and so known beforehand.
        most = max(answers) if self._judged_answer is None else self._judged_answer
        given = [
            question + min(answer, most)
            for question, answer in zip(questions, answers, strict=True)
        ]
        each = [
            decode_steps(known_tokens(context.loaded, context.method, [one]), [one], [0])
            for one in given
        ]
        return Steps(sum(one.forwards for one in each), sum(one.own for one in each))

    @property
    def _judged_answer(self) -> int | None:
        """How many tokens of an answer the judged steps are spread over; None for all."""
        return self.judged_tokens if self.judged_answer == "begin" else None

    def trial(
        self, context: Context, plan: Plan, part: str, prompts: Sequence[Prompt]
    ) -> tuple[Record, float]:
        if part != "speed":
            return super().trial(context, plan, part, prompts)
        record = {"prompts": [time_prompt(context, prompt, 1) for prompt in prompts]}
        return record, float(rounds_of(len(plan.parts[part])))

    def outcome(
        self,
        context: Context,
        plan: Plan,
        prompts: Sequence[Prompt],
        records: Mapping[str, Sequence[Record]],
    ) -> Outcome:
        selects, k = context.method.selects, context.effective_policy.k
        samples = [sample for record in records["answers"] for sample in record["samples"]]
        order = {prompt.sample.sample_id: position for position, prompt in enumerate(prompts)}
        samples.sort(key=lambda one: order[one["sample_id"]])
        asked = {prompt.sample.sample_id: prompt.sample.question.strip() for prompt in prompts}
        samples = [{**one, "question_text": asked[one["sample_id"]] or None} for one in samples]
        counts: dict[str, ReadCount] = {}
        for record in records["answers"]:
            counts.setdefault(record["subtask"], ReadCount()).add(ReadCount(**record["count"]))
        if selects and not any(one.taken for one in counts.values()):
            reason = no_sparse_step_reason(k, max(one.longest for one in counts.values()))
            return Outcome([TaskRow("mean", {}, "skipped", reason)], [])
        rows = []
        # In a sub-task without a step over more than k tokens the method did nothing: the sub-task
        # is skipped, and the mean is over the others.
        for subtask in [name for name, one in counts.items() if selects and not one.taken]:
            reason = no_sparse_step_reason(k, counts.pop(subtask).longest)
            rows.append(TaskRow(subtask, {}, "skipped", reason))
        prompts = [one for one in prompts if one.sample.subtask in counts]
        samples = [one for one in samples if one["subtask"] in counts]
        densities = [one.density for one in counts.values() if one.density is not None]
        density = statistics.fmean(densities) if densities else None
        reads = [one.step_reads for one in counts.values() if one.step_reads is not None]
        shared: dict[str, Any] = {"batch_size": 1, "density": density}
        assert self.batch_size != "auto", "it is chosen before"
        in_subtask = Counter(one.sample.subtask for one in prompts)
        per_batch = {name: min(self.batch_size, in_subtask[name]) for name in counts}
        for record in records["answers"]:
            if "share" in record and record["subtask"] in counts:
                per_batch[record["subtask"]] = min(per_batch[record["subtask"]], record["share"])
        shared["prompts_per_batch"] = min(per_batch.values())
        known = {record["known_tokens"] for record in records["answers"]} - {None}
        shared["known_tokens"] = ", ".join(sorted(known)) or None
        if selects:
            taken = [one.share_taken for one in counts.values() if one.share_taken is not None]
            shared["sparse_step_share"] = statistics.fmean(taken)
        mean_length = statistics.fmean(prompt.num_tokens for prompt in prompts)
        shared |= accounting(context, round(mean_length), Reads.mean(reads))
        # At the steps over which the density was counted, those of the answers included.
        cached = [one.mean_cached(shared["kv_len"]) for one in counts.values()]
        n = round(statistics.fmean(cached)) if cached else shared["kv_len"]
        shared["density_all"] = density_of_all_layers(context, n, density)
        if records.get("speed"):
            timed = [one for record in records["speed"] for one in record["prompts"]]
            shared |= speed_of(context, timed, shared["bytes_read_per_step"])
            shared["timed_prompts"] = len(timed)
        if records.get("selections"):
            judged = [one for record in records["selections"] for one in record["prompts"]]
            shared |= selection_means(judged) | recall_by_part(judged)
            # A prompt whose answer ended before a step over more than k tokens shows no selection.
            shared["judged_prompts"] = sum(bool(one[MEASURES[0]]) for one in judged) or None
            shared["judged_tokens"] = sum(len(one[MEASURES[0]]) for one in judged) or None
        scored = []
        for subtask, count in counts.items():
            scores = [one["score"] for one in samples if one["subtask"] == subtask]
            values: dict[str, Any] = {
                "score": statistics.fmean(scores),
                "num_samples": len(scores),
            }
            # Columns that identify a configuration are in all rows of a cell.
            identifying = ("batch_size", "kv_len", "full_backend")
            values |= {name: shared[name] for name in identifying if name in shared}
            values["prompts_per_batch"] = per_batch[subtask]
            values["density"] = count.density
            if selects:
                values["sparse_step_share"] = count.share_taken
            scored.append(TaskRow(subtask, values))
        mean = statistics.fmean(row.values["score"] for row in scored)
        scored.append(TaskRow("mean", {"score": mean, "num_samples": len(samples), **shared}))
        return Outcome([*rows, *scored], samples, kept_tokens(context, prompts, records))


def score_of(sample: Sample, prediction: str) -> float:
    """Return a prediction's score, 0 to 100, by the rule of the sample's sub-task."""
    match = string_match_part if sample.subtask.startswith("qa") else string_match_all
    return match(prediction, sample.answers)


def answer(
    context: Context,
    prompts: Sequence[Prompt],
    score: Callable[[Sample, str], float] = score_of,
) -> Record:
    """Decode a batch of one sub-task; return its scored samples and what its steps read.

    Full attention always answers with the same kernel, whatever backend it is timed with: the
    context's method is the one that answers.

    Args:
        context: The cell's context.
        prompts: The batch.
        score: Returns a prediction's score, 0 to 100.
    """
    tokenizer = context.loaded.tokenizer
    most_new = max(prompt.sample.max_new_tokens for prompt in prompts)
    needs = context.method.traits.needs
    decoder = Decoder(context.loaded, context.store, prompts, most_new + 1, needs)
    counter = ReadCounter()
    counts = [len(prompt.decode_ids) for prompt in prompts]
    known = known_tokens(context.loaded, context.method, counts)
    with context.attached(decoder, context.method, counter) as session:
        answers = decoder.generate(known)
    counter.add_steps(session.count, decoder.lengths)
    samples = []
    for prompt, tokens, milliseconds in zip(prompts, answers, decoder.prefill_ms, strict=True):
        sample = prompt.sample
        text = str(tokenizer.decode(tokens, skip_special_tokens=True))
        prediction = sample.answer_of(text)
        samples.append(
            {
                "sample_id": sample.sample_id,
                "subtask": sample.subtask,
                "length": prompt.num_tokens,
                "score": score(sample, prediction),
                "prediction": prediction,
                "references": list(sample.answers),
                "num_generated": len(tokens),
                "is_cut": decoder.is_cut(sample, tokens),
                "tokens": tokens,
                "prefill_ms": milliseconds,
            }
        )
    subtask = prompts[0].sample.subtask
    record = {"subtask": subtask, "samples": samples, "count": asdict(counter.count)}
    is_sparse = context.method.selects and any(prompt.decode_ids for prompt in prompts)
    return {**record, "known_tokens": known if is_sparse else None}


def measure_selection(
    context: Context,
    prompt: Prompt,
    num_judged: int | None = None,
    num_answered: int | None = None,
    keeps: bool = False,
) -> dict[str, Any]:
    """Measure the method's selections, by step and layer, while it decodes full's answer.

    Args:
        context: The cell's context.
        prompt: The prompt.
        num_judged: How many steps are measured, spread evenly over those of the question and of the
            answer; None for all.
        num_answered: How many tokens of the answer they are spread over; None for all.
        keeps: Whether to record which tokens the heads kept at the last of them.

    Returns:
        Each measure by step and layer, and ``kept``: what ``kept_tokens`` makes a row of.
    """
    answer = context.full_answer(prompt)[:num_answered]
    given = [*prompt.decode_ids, *answer]
    method, begin = context.method, len(prompt.prefill_ids)
    steps = range(begin + 1, begin + len(given) + 1)
    sparse = [n for n in steps if n > context.effective_policy.k]
    judged = None if num_judged is None else frozenset(spread(sparse, num_judged))
    meter = SelectionMeter(judged, prompt_tokens=prompt.num_tokens, keeps=keeps)
    needs = method.traits.needs
    if not sparse:
        return meter.values()
    decoder = Decoder(context.loaded, context.store, [prompt], len(given) + 1, needs)
    with context.attached(decoder, method, meter):
        if known_tokens(context.loaded, method, [len(given)]) == "one by one":
            decoder.teacher_force([answer])
        else:
            decoder.forward([given])
    record: dict[str, Any] = {**meter.values()}
    if meter.kept:
        layers, slots = zip(*sorted(meter.kept.items()), strict=True)
        record["kept"] = {
            "sample_id": prompt.sample.sample_id,
            "subtask": prompt.sample.subtask,
            "cached": slots[0].shape[-1],
            "layers": list(layers),
            "heads": [len(one) for one in slots],
            "answer": answer,
            "kept": packed(torch.cat(slots)),
        }
    return record


def kept_tokens(
    context: Context, prompts: Sequence[Prompt], records: Mapping[str, Sequence[Record]]
) -> list[dict[str, Any]]:
    """Return which tokens the heads kept, with the tokens' texts, as ``record.kept_file`` says."""
    by_id = {prompt.sample.sample_id: prompt for prompt in prompts}
    rows = []
    for record in records.get("selections", ()):
        for one in record["prompts"]:
            if "kept" not in one or one["kept"]["sample_id"] not in by_id:
                continue
            row = {**one["kept"]}
            prompt = by_id[row["sample_id"]]
            ids = (*prompt.prefill_ids, *prompt.decode_ids, *row.pop("answer"))
            texts = token_texts(context.loaded.tokenizer, ids[: row["cached"]])
            rows.append({**row, "texts": json.dumps(texts)})
    return rows


def spread(items: Sequence[int], limit: int) -> list[int]:
    """Return at most ``limit`` items, spread evenly, the last one included."""
    count = min(limit, len(items))
    return [items[(place + 1) * len(items) // count - 1] for place in range(count)]


def selection_means(
    judged: Sequence[Mapping[str, Sequence[Sequence[float]]]],
) -> dict[str, float | None]:
    """Return the mean of each measure of selection quality over steps and layers of all prompts."""
    means: dict[str, float | None] = {}
    for name in MEASURES:
        values = [value for one in judged for layers in one[name] for value in layers]
        means[name] = torch.tensor(values).mean().item() if values else None
    return means


def recall_by_part(
    judged: Sequence[Mapping[str, Sequence[Sequence[float]]]],
) -> dict[str, float | None]:
    """Return the share found of the exact top-k's tokens: of the prompt's, and of the generated.

    Both are None if no generated token is among the exact top-k, as where answers are short.
    """
    exact, found, exact_generated, found_generated = (
        math.fsum(value for one in judged for layers in one.get(name, ()) for value in layers)
        for name in PARTS
    )
    if not exact_generated:
        return {"recall_prompt": None, "recall_generated": None}
    of_prompt = exact - exact_generated
    return {
        "recall_prompt": (found - found_generated) / of_prompt if of_prompt > 0 else None,
        "recall_generated": found_generated / exact_generated,
    }
