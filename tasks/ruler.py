"""RULER: its 13 sub-tasks written for a model's tokenizer, or read from files or the hub."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from topkbench.harness.decoding import Prompt, count_tokens, is_wrapped
from topkbench.harness.generation import GenerationTask
from topkbench.harness.samples import Sample, TaskDoesNotFit
from topkbench.harness.sweep import Plan, Record
from topkbench.harness.task import Context, Outcome, TaskRow
from topkbench.methods.base import check_whole
from topkbench.models.load import LoadedModel, ModelShape
from topkbench.tasks import ruler_prompts
from topkbench.tasks.generated import NEW_TOKENS, Drawn, GeneratedPrompts
from topkbench.tasks.ruler_data import (
    Essay,
    QuestionSet,
    digest,
    read_english_words,
    read_essay,
    read_hotpotqa,
    read_squad,
)
from topkbench.tasks.ruler_files import RulerFiles, read_official
from topkbench.tasks.ruler_prompts import (
    VERSION,
    CommonWords,
    FrequentWords,
    Niah,
    QuestionAnswering,
    Subtask,
    VariableTracking,
)
from topkbench.tasks.words import all_listed_words

SUBTASKS = (
    *("niah_single_1", "niah_single_2", "niah_single_3"),
    *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
_FROM_SOURCE = ("question_tokens", "skip_bad")
_GENERATED = ("length", "haystack", "squad", "hotpotqa", "english_words")
# The setting that names a sub-task's questions, whose they are, and what reads them.
_QA = {
    "qa_1": ("squad", "SQuAD 2.0", read_squad),
    "qa_2": ("hotpotqa", "HotpotQA", read_hotpotqa),
}


@dataclass(kw_only=True)
class Ruler(GeneratedPrompts):
    """RULER (arXiv:2404.06654), one row for each of its 13 sub-tasks and one for their mean.

    The prompts are written as NVIDIA's generator writes them, in the model's own tokens and chat
    template, or come from files of that generator or a data set of the hub.

    Attributes:
        haystack: The essay for the sub-tasks that hide needles in one: a file, RULER's
            ``PaulGrahamEssays.json``, or a data set of the hub; see ``read_essay``.
        squad: SQuAD's file, or a data set of the hub, for qa_1, which is skipped without.
        hotpotqa: HotpotQA's file, or a data set of the hub, for qa_2, which is skipped without.
        english_words: RULER's ``english_words.json``, which cwe needs above about 100,000 tokens.
        source: Prompts that are written already: a file or folder of RULER's own generator, or a
            data set of the hub; see ``read_official``. Its settings of generation must be None.
        question_tokens: With ``source``: the number of last tokens of a prompt that are the
            question; 0 finds the question by its first words.
        skip_bad: With ``source``: leave out lines that are not as described instead of refusing
            their file.
    """

    name: str = "ruler"
    haystack: str | None = None
    squad: str | None = None
    hotpotqa: str | None = None
    english_words: str | None = None
    source: str | None = None
    question_tokens: int = 0
    skip_bad: bool = False
    all_subtasks: ClassVar[Sequence[str]] = SUBTASKS
    # What is read is read at once, so that a bad file fails before a model is loaded.
    _official: RulerFiles | None = field(default=None, init=False, repr=False, compare=False)
    _essay: Essay = field(init=False, repr=False, compare=False)
    _english_words: Sequence[str] = field(init=False, repr=False, compare=False)
    _questions: dict[str, QuestionSet] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("question_tokens", self.question_tokens, least=0)
        if self.source is None:
            self._read_texts()
            return
        for setting in _GENERATED:
            if getattr(self, setting) is not None:
                raise ValueError(
                    f"task.{setting} must be null with task.source, whose prompts are written"
                    f" already, got {getattr(self, setting)!r}; use task.{setting}=null."
                )
        self._official = read_official(
            self.source,
            self.num_samples,
            self.question,
            self.question_tokens,
            self.subtasks,
            self.skip_bad,
        )

    def _read_texts(self) -> None:
        """Check the settings of prompts that are written here, and read what they are made of."""
        for setting in _FROM_SOURCE:
            if getattr(self, setting):
                raise ValueError(
                    f"task.{setting} is a setting of task.source, got {getattr(self, setting)!r}"
                    " without one; set task.source, or leave it out."
                )
        self.check_subtasks()
        if not self._to_write:
            raise TaskDoesNotFit(" ".join(self.skipped.values()))
        self._essay, self._english_words, self._questions = read_essay(self.haystack), (), {}
        if self.english_words is not None:
            self._english_words = read_english_words(self.english_words)
        for subtask, (setting, _, read) in _QA.items():
            if subtask not in self._to_write:
                continue
            questions = self._questions[subtask] = read(getattr(self, setting))
            if self.num_samples > len(questions.questions):
                raise ValueError(
                    f"num_samples must be at most the {len(questions.questions):,} questions of"
                    f" task.{setting}, got {self.num_samples}."
                )

    @property
    def skipped(self) -> dict[str, str]:
        """The chosen sub-tasks whose prompts cannot be written, and why."""
        return {
            subtask: f"{subtask} needs the questions of {name}: set task.{setting} to their file or"
            " to hub:OWNER/NAME."
            for subtask, (setting, name, _) in _QA.items()
            if subtask in self.chosen_subtasks and getattr(self, setting) is None
        }

    @property
    def _to_write(self) -> list[str]:
        """The chosen sub-tasks whose texts are there."""
        skipped = self.skipped
        return [name for name in self.chosen_subtasks if name not in skipped]

    def decided(self) -> dict[str, Any]:
        if self.source is None:
            return super().decided()
        return GenerationTask.decided(self)

    def prompts(self, loaded: LoadedModel) -> str:
        if self._official is not None:
            wrapped = {is_wrapped(loaded, sample) for sample in self._official.samples}
            how = (
                "partly raw" if len(wrapped) > 1 else "chat template" if True in wrapped else "raw"
            )
            return f"RULER {self._official.label} ({how})"
        how = "chat template" if loaded.chat else "raw"
        parts = [f"RULER written by topkbench {VERSION}", self._essay.label]
        parts += [one.label for one in self._questions.values()]
        if self.english_words is not None:
            words = digest(json.dumps(self._english_words))
            parts.append(f"{Path(self.english_words).name} {words}")
        return f"{', '.join(parts)} ({how})"

    def sample_counts(self, subtask: str) -> dict[str, Any]:
        if self._official is None:
            return {}
        counts = self._official.counts
        if subtask != "mean":
            return {"wanted_samples": self.num_samples, "source_samples": counts[subtask]}
        return {
            "wanted_samples": self.num_samples * len(counts),
            "source_samples": sum(counts.values()),
            "skipped_samples": self._official.skipped,
        }

    def check_model(self, shape: ModelShape) -> None:
        if self.source is None:
            super().check_model(shape)
        else:
            GenerationTask.check_model(self, shape)

    def samples(self, loaded: LoadedModel) -> list[Sample]:
        return super().samples(loaded) if self._official is None else self._official.samples

    def content(self, loaded: LoadedModel) -> dict[str, Any]:
        return {
            "subtasks": self._to_write,
            "length": self.prompt_length,
            "prompts": self.prompts(loaded),
            "words": digest(json.dumps(all_listed_words())),
        }

    def draw(self, loaded: LoadedModel) -> Drawn:
        drawn = Drawn([], self.skipped)
        for name in self._to_write:
            try:
                drawn.samples.extend(self._written(loaded, name))
            except TaskDoesNotFit as error:
                drawn.skipped[name] = f"{name} does not fit: {error}"
        if not drawn.samples:
            raise TaskDoesNotFit(" ".join(drawn.skipped.values()))
        return drawn

    def _written(self, loaded: LoadedModel, name: str) -> list[Sample]:
        """Return the samples of a sub-task."""
        subtask, length = self._subtask(loaded, name), self.prompt_length
        tokens = functools.partial(self._tokens, loaded, name)
        seed = f"{self.seed}-{name}-{length}"
        size = subtask.largest(f"{seed}-size", length, tokens)
        samples = []
        for index in range(self.num_samples):
            prompt, used = subtask.fitted(f"{seed}-{index}", size, index, length, tokens)
            samples.append(self._sample(name, index, prompt, used))
        return samples

    def _subtask(self, loaded: LoadedModel, name: str) -> Subtask:
        essay, seed = self._essay, self.seed

        def count(text: str) -> int:
            return len(loaded.tokenizer.encode(text, add_special_tokens=False))

        match name:
            case "niah_single_1":
                return Niah(haystack="noise")
            case "niah_single_2":
                return Niah(haystack=essay)
            case "niah_single_3":
                return Niah(haystack=essay, value="uuid")
            case "niah_multikey_1":
                return Niah(haystack=essay, num_keys=4)
            case "niah_multikey_2":
                return Niah(haystack="needles")
            case "niah_multikey_3":
                return Niah(haystack="needles", key="uuid", value="uuid")
            case "niah_multivalue":
                return Niah(haystack=essay, num_values=4)
            case "niah_multiquery":
                return Niah(haystack=essay, num_keys=4, num_queries=4)
            case "vt":
                return VariableTracking(count=count, seed=seed)
            case "cwe":
                words, more = all_listed_words(), self._english_words
                return CommonWords(words=words, more_words=more, length=self.prompt_length)
            case "fwe":
                around = sum(map(count, self.around(loaded)))
                return FrequentWords(limit=self.prompt_length - around - NEW_TOKENS["fwe"])
        return QuestionAnswering(questions=self._questions[name], seed=seed)

    def _tokens(self, loaded: LoadedModel, name: str, prompt: ruler_prompts.Prompt) -> int:
        """Return the number of tokens of a prompt, in its chat template, and its answer."""
        sample = self._sample(name, 0, prompt, 0)
        return count_tokens(loaded, sample) + sample.max_new_tokens

    def _sample(self, name: str, index: int, prompt: ruler_prompts.Prompt, length: int) -> Sample:
        return Sample(
            sample_id=f"{name}-{self.prompt_length}-{self.seed}-{index}",
            subtask=name,
            context=prompt.context,
            question=prompt.question,
            answer_prefix=prompt.answer_prefix,
            answers=prompt.answers,
            max_new_tokens=NEW_TOKENS[name.split("_")[0]],
            length=length,
        )

    def outcome(
        self,
        context: Context,
        plan: Plan,
        prompts: Sequence[Prompt],
        records: Mapping[str, Sequence[Record]],
    ) -> Outcome:
        found = super().outcome(context, plan, prompts, records)
        if self.source is not None:
            return found
        skipped = self.drawn(context.loaded).skipped
        rows = [TaskRow(name, {}, "skipped", reason) for name, reason in skipped.items()]
        return Outcome([*rows, *found.rows], found.samples)
