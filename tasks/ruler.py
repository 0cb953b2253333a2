"""RULER: retrieval, tracing and aggregation at any length, generated or from official files."""

import functools
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from topkbench.harness.caching import write_cached
from topkbench.harness.decoding import count_tokens, is_wrapped
from topkbench.harness.generation import GenerationTask
from topkbench.harness.samples import Sample, TaskDoesNotFit, check_window, samples_digest
from topkbench.harness.sources import code_digest
from topkbench.methods.base import check_list, check_whole
from topkbench.models.digests import tokenizer_digest
from topkbench.models.encoding import beginning, template_around
from topkbench.models.load import LoadedModel, ModelShape
from topkbench.tasks.ruler_files import NEW_TOKENS, RulerFiles, read_official
from topkbench.tasks.ruler_prompts import SUBTASKS, VERSION, Prompt, make_prompt
from topkbench.tasks.words import TEST_NAMES, word_pools

# Called with rng, budget and count; see ``make_prompt``.
WritePrompt = Callable[..., Prompt]

DEFAULT_LENGTH = 4096
# A model trained to end its answers may generate this many tokens more than the reference answer.
SPARE_TOKENS = 8


@dataclass(kw_only=True)
class Ruler(GenerationTask):
    """The seven synthetic sub-tasks of RULER (arXiv:2404.06654), one row each and their mean.

    Attributes:
        length: Tokens of prompt and answer together, in the model's own tokens; None for 4,096.
        num_samples: Samples per sub-task.
        seed: Seed of the samples; sample ``i`` does not depend on ``num_samples``.
        subtasks: The sub-tasks to run; None for all.
        source: A file or folder of files that RULER's own generator wrote, used instead of
            generated prompts; see ``read_official``. ``length`` and ``example``, which the files
            have settled, must then be None.
        question_tokens: With ``source``: the number of last tokens of a prompt that are the
            question; 0 finds the question by its first words.
        skip_bad: With ``source``: leave out lines that are not as described instead of refusing
            their file.
        example: Whether a solved example precedes the prompt where RULER has one (vt, cwe); None
            shows it to all models except those trained on prompts without it, as the shipped one.
        cache_dir: Folder in which generated samples are cached.
    """

    name: str = "ruler"
    length: int | None = None
    num_samples: int = 25
    seed: int = 0
    subtasks: Sequence[str] | None = None
    source: str | None = None
    question_tokens: int = 0
    skip_bad: bool = False
    example: bool | None = None
    cache_dir: str = "~/.cache/topkbench"
    _longest: ClassVar[str] = "task.length"
    """The setting that says how long the longest prompt is."""
    _official: RulerFiles | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("num_samples", self.num_samples)
        for knob in ("seed", "question_tokens"):
            check_whole(knob, getattr(self, knob), least=0)
        if self.subtasks is not None:
            check_list("task.subtasks", self.subtasks)
        if self.source is None:
            self._check_generated()
            return
        for setting in ("length", "example"):
            if getattr(self, setting) is not None:
                raise ValueError(
                    f"task.{setting} must be null with task.source, whose prompts are written"
                    f" already, got {getattr(self, setting)!r}; use task.{setting}=null."
                )
        # Read now, so that a bad file fails before a model is loaded.
        self._official = read_official(
            Path(self.source),
            self.num_samples,
            self.question,
            self.question_tokens,
            self.subtasks,
            self.skip_bad,
        )

    def _check_generated(self) -> None:
        check_whole("length", self.prompt_length)
        for setting in ("question_tokens", "skip_bad"):
            if getattr(self, setting):
                raise ValueError(
                    f"task.{setting} is a setting of task.source, got {getattr(self, setting)!r}"
                    " without one; set task.source, or leave it out."
                )
        unknown = [name for name in self.chosen_subtasks if name not in SUBTASKS]
        if unknown:
            raise ValueError(
                f"task.subtasks must be among {', '.join(SUBTASKS)}, got {unknown[0]!r}."
            )

    @property
    def prompt_length(self) -> int:
        """Tokens of a generated prompt and its answer."""
        return DEFAULT_LENGTH if self.length is None else self.length

    @property
    def _shortest(self) -> int:
        """Tokens of the shortest prompt and its answer."""
        return self.prompt_length

    @property
    def chosen_subtasks(self) -> Sequence[str]:
        """The sub-tasks of generated prompts."""
        return SUBTASKS if self.subtasks is None else self.subtasks

    def decided(self) -> dict[str, Any]:
        decided = super().decided()
        if self.source is not None:
            return decided
        return {
            **decided,
            "length": self.prompt_length,
            "subtasks": list(self.chosen_subtasks),
        }

    def prompts(self, loaded: LoadedModel) -> str:
        if self._official is None:
            return f"topkbench {VERSION}"
        wrapped = {is_wrapped(loaded, sample) for sample in self._official.samples}
        how = "partly raw" if len(wrapped) > 1 else "chat template" if True in wrapped else "raw"
        return f"RULER {self._official.digest} ({how})"

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
        super().check_model(shape)
        if self.source is not None:
            return
        self._check_window(shape.name, shape.window)
        answers = max(_reserved(one, shape.short_answers) for one in self.chosen_subtasks)
        if self._shortest <= answers:
            raise TaskDoesNotFit(
                f"{self._longest} must be more than the {answers} tokens kept for an answer, got"
                f" {self._shortest}."
            )

    def _check_window(self, name: str, window: int) -> None:
        check_window(self._longest, self.prompt_length, name, window)

    def inputs_digest(self, loaded: LoadedModel) -> str:
        return samples_digest(self.samples(loaded))

    def samples(self, loaded: LoadedModel) -> list[Sample]:
        """Return the samples for a model, from the cache if they are there."""
        if self._official is not None:
            return self._official.samples
        self._check_window(loaded.name, loaded.window)
        path = self._cache_file(loaded)
        samples = _read_cache(path)
        if samples is None:
            samples = _READ[path] = self._draw(loaded)
            _write_cache(path, samples)
        return samples

    def _draw(self, loaded: LoadedModel) -> list[Sample]:
        """Return newly generated samples, sub-task by sub-task.

        Each sample's randomness depends on its index, so more samples never change the first ones.
        """
        samples = []
        for subtask in self.chosen_subtasks:
            write = functools.partial(
                make_prompt,
                subtask,
                words=word_pools()[0],
                share=TEST_NAMES,
                example=self._example(loaded),
            )
            for index in range(self.num_samples):
                samples.append(self._make(loaded, subtask, self.prompt_length, index, write))
        return samples

    def _content(self) -> dict[str, Any]:
        """Return the settings of the subclass that the samples depend on."""
        return {"subtasks": list(self.chosen_subtasks), "length": self.prompt_length}

    def _cache_file(self, loaded: LoadedModel) -> Path:
        settings = {
            "code": code_digest([type(self).__module__], folders=("tasks",)),
            **self._content(),
            "num_samples": self.num_samples,
            "seed": self.seed,
            "around prompts": self._around(loaded),
            "short_answers": loaded.short_answers,
            "example": self._example(loaded),
            "tokenizer": tokenizer_digest(loaded.tokenizer),
            "words": hashlib.sha256(" ".join(word_pools()[0]).encode()).hexdigest(),
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return Path(self.cache_dir).expanduser() / "samples" / f"ruler-{digest}.jsonl"

    def _example(self, loaded: LoadedModel) -> bool:
        return not loaded.short_answers if self.example is None else self.example

    def _make(
        self, loaded: LoadedModel, subtask: str, length: int, index: int, write: WritePrompt
    ) -> Sample:
        """Return one sample of at most ``length`` tokens, its prompt written by ``write``."""

        def count(text: str) -> int:
            return len(loaded.tokenizer.encode(text, add_special_tokens=False))

        wrapping = sum(map(count, self._around(loaded)))
        if not loaded.chat:
            wrapping = len(beginning(loaded.tokenizer))
        reserved = _reserved(subtask, loaded.short_answers)
        budget = length - wrapping - reserved
        while True:
            rng = random.Random(f"{self.seed}-{subtask}-{length}-{index}")
            prompt = write(rng=rng, budget=budget, count=count)
            new_tokens = count(prompt.reference) + reserved if loaded.short_answers else reserved
            sample = Sample(
                sample_id=f"{subtask}-{length}-{self.seed}-{index}",
                subtask=subtask,
                context=prompt.context,
                question=prompt.question,
                answer_prefix=prompt.answer_prefix,
                answers=prompt.answers,
                max_new_tokens=new_tokens,
                length=None,
            )
            used = count_tokens(loaded, sample) + new_tokens
            if used <= length:
                return replace(sample, length=used)
            # Pieces of a text may have fewer tokens apart than together.
            budget -= used - length

    def _around(self, loaded: LoadedModel) -> list[str]:
        """Return what the chat template writes around a prompt; nothing without one."""
        if not loaded.chat:
            return []
        return template_around(loaded.tokenizer, loaded.chat_template_kwargs)


def _reserved(subtask: str, short_answers: bool) -> int:
    """Return the tokens kept for an answer: besides the reference's, if answers are short."""
    # The needle task's sub-tasks, such as "4096 x 50%", have no prefix: they count as niah.
    official = NEW_TOKENS.get(subtask.split("_")[0], NEW_TOKENS["niah"])
    return SPARE_TOKENS if short_answers else official


# Samples that this process has read or made, since all cells of a sweep use the same ones.
_READ: dict[Path, list[Sample]] = {}


def _read_cache(path: Path) -> list[Sample] | None:
    """Return the samples of a cache file, or None if it is missing or damaged."""
    if path not in _READ:
        try:
            head, *lines = path.read_text(encoding="utf-8").splitlines()
            if json.loads(head) != _head(lines):
                return None
            entries = [json.loads(line) for line in lines]
            _READ[path] = [
                Sample(**{**entry, "answers": tuple(entry["answers"])}) for entry in entries
            ]
        except (OSError, ValueError, TypeError, KeyError):
            return None
    return _READ[path]


def _write_cache(path: Path, samples: Sequence[Sample]) -> None:
    """Write samples, one per line, after a first line with their number and sha256."""
    lines = [json.dumps(asdict(sample)) for sample in samples]
    write_cached(path, ("\n".join([json.dumps(_head(lines)), *lines]) + "\n").encode())


def _head(lines: Sequence[str]) -> dict[str, Any]:
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return {"samples": len(lines), "sha256": digest}
