"""Prompts that are written for a model's tokenizer, and kept in the cache folder."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from topkbench.harness.caching import write_cached
from topkbench.harness.generation import GenerationTask
from topkbench.harness.samples import Sample, TaskDoesNotFit, check_window, samples_digest
from topkbench.harness.sources import code_digest
from topkbench.methods.base import check_list, check_whole
from topkbench.models.digests import tokenizer_digest
from topkbench.models.encoding import template_around
from topkbench.models.load import LoadedModel, ModelShape

DEFAULT_LENGTH = 4096
# Tokens that RULER lets a model generate, by the prefix of the sub-task's name.
NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
SPARE_TOKENS = 8
"""Tokens that a model which is trained to end its answers may generate beside the reference."""


@dataclass(frozen=True)
class Drawn:
    """What was written for a model.

    Attributes:
        samples: The samples, sub-task by sub-task.
        skipped: The sub-tasks whose prompts cannot be written, and why.
    """

    samples: list[Sample]
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class GeneratedPrompts(GenerationTask):
    """A task that writes its prompts to fill a length in the model's own tokens.

    Attributes:
        length: Tokens of prompt and answer together; None for 4,096.
        num_samples: Samples per sub-task.
        seed: Seed of the samples; sample ``i`` does not depend on ``num_samples``.
        subtasks: The sub-tasks to run; None for all.
        cache_dir: Folder in which generated samples are cached.
    """

    length: int | None = None
    num_samples: int = 25
    seed: int = 0
    subtasks: Sequence[str] | None = None
    cache_dir: str = "~/.cache/topkbench"
    all_subtasks: ClassVar[Sequence[str]] = ()
    _longest: ClassVar[str] = "task.length"
    """The setting that says how long the longest prompt is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("num_samples", self.num_samples)
        check_whole("seed", self.seed, least=0)
        check_whole("length", self.prompt_length)
        if self.subtasks is not None:
            check_list("task.subtasks", self.subtasks)

    def check_subtasks(self) -> None:
        """Check that the chosen sub-tasks exist."""
        unknown = [name for name in self.chosen_subtasks if name not in self.all_subtasks]
        if unknown:
            raise ValueError(
                f"task.subtasks must be among {', '.join(self.all_subtasks)}, got {unknown[0]!r}."
            )

    @property
    def prompt_length(self) -> int:
        """Tokens of a generated prompt and its answer."""
        return DEFAULT_LENGTH if self.length is None else self.length

    @property
    def shortest(self) -> int:
        """Tokens of the shortest prompt and its answer."""
        return self.prompt_length

    @property
    def chosen_subtasks(self) -> Sequence[str]:
        """The sub-tasks of generated prompts."""
        return self.all_subtasks if self.subtasks is None else self.subtasks

    def decided(self) -> dict[str, Any]:
        return {
            **super().decided(),
            "length": self.prompt_length,
            "subtasks": list(self.chosen_subtasks),
        }

    def check_model(self, shape: ModelShape) -> None:
        super().check_model(shape)
        check_window(self._longest, self.prompt_length, shape.name, shape.window)
        answers = max(reserved(one, shape.short_answers) for one in self.chosen_subtasks)
        if self.shortest <= answers:
            raise TaskDoesNotFit(
                f"{self._longest} must be more than the {answers} tokens kept for an answer, got"
                f" {self.shortest}."
            )

    def inputs_digest(self, loaded: LoadedModel) -> str:
        return samples_digest(self.samples(loaded))

    def samples(self, loaded: LoadedModel) -> list[Sample]:
        """Return the samples for a model, from the cache if they are there."""
        return self.drawn(loaded).samples

    def drawn(self, loaded: LoadedModel) -> Drawn:
        """Return what was written for a model, from the cache if it is there."""
        check_window(self._longest, self.prompt_length, loaded.name, loaded.window)
        path = self._cache_file(loaded)
        found = _read_cache(path)
        if found is None:
            found = _READ[path] = self.draw(loaded)
            _write_cache(path, found)
        return found

    @abstractmethod
    def draw(self, loaded: LoadedModel) -> Drawn:
        """Return newly generated samples, sub-task by sub-task.

        Each sample's randomness depends on its index, so more samples never change the first ones.
        """

    @abstractmethod
    def content(self, loaded: LoadedModel) -> dict[str, Any]:
        """Return what the samples depend on besides seed, code and tokenizer."""

    def around(self, loaded: LoadedModel) -> list[str]:
        """Return what the chat template writes around a prompt; nothing without one."""
        if not loaded.chat:
            return []
        return template_around(loaded.tokenizer, loaded.chat_template_kwargs)

    def _cache_file(self, loaded: LoadedModel) -> Path:
        settings = {
            "code": code_digest([type(self).__module__], folders=("tasks",)),
            **self.content(loaded),
            "num_samples": self.num_samples,
            "seed": self.seed,
            "around prompts": self.around(loaded),
            "tokenizer": tokenizer_digest(loaded.tokenizer),
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return Path(self.cache_dir).expanduser() / "samples" / f"{self.name}-{digest}.jsonl"


def reserved(subtask: str, short_answers: bool) -> int:
    """Return the tokens kept for an answer: besides the reference's, if answers are short."""
    # The needle task's sub-tasks, such as "4096 x 50%", have no prefix: they count as niah.
    official = NEW_TOKENS.get(subtask.split("_")[0], NEW_TOKENS["niah"])
    return SPARE_TOKENS if short_answers else official


# Samples that this process has read or made, since all cells of a sweep use the same ones.
_READ: dict[Path, Drawn] = {}


def _read_cache(path: Path) -> Drawn | None:
    """Return what a cache file holds, or None if it is missing or damaged."""
    if path not in _READ:
        try:
            first, *lines = path.read_text(encoding="utf-8").splitlines()
            head = json.loads(first)
            if head != _head(lines, head["skipped"]):
                return None
            entries = [json.loads(line) for line in lines]
            _READ[path] = Drawn(
                [Sample(**_with_tuples(entry)) for entry in entries],
                dict(head["skipped"]),
            )
        except (OSError, ValueError, TypeError, KeyError):
            return None
    return _READ[path]


def _with_tuples(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what JSON has of a sample with tuples for lists: samples are hashed."""
    return {name: tuple(one) if isinstance(one, list) else one for name, one in entry.items()}


def _write_cache(path: Path, drawn: Drawn) -> None:
    """Write samples, one per line, after a first line with their number and a sha256."""
    lines = [json.dumps(asdict(sample)) for sample in drawn.samples]
    head = json.dumps(_head(lines, drawn.skipped))
    write_cached(path, ("\n".join([head, *lines]) + "\n").encode())


def _head(lines: Sequence[str], skipped: dict[str, str]) -> dict[str, Any]:
    content = "\n".join([json.dumps(skipped), *lines])
    digest = hashlib.sha256(content.encode()).hexdigest()
    return {"samples": len(lines), "skipped": skipped, "sha256": digest}
