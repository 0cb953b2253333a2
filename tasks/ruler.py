"""RULER: retrieval, tracing and aggregation at any length, generated or from official files."""

import functools
import hashlib
import json
import random
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from topkbench.methods.base import check_whole
from topkbench.models.digests import tokenizer_digest
from topkbench.models.load import LoadedModel
from topkbench.tasks.base import Sample, TaskDoesNotFit, samples_digest
from topkbench.tasks.decoding import Question
from topkbench.tasks.evaluation import GenerationTask
from topkbench.tasks.ruler_prompts import SUBTASKS, Prompt, make_prompt
from topkbench.tasks.sources import code_digest
from topkbench.tasks.words import TEST_NAMES, word_pools

# Called with rng, budget and count; see ``make_prompt``.
WritePrompt = Callable[..., Prompt]

# Tokens that RULER lets a model generate, by the beginning of the sub-task's name.
NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
# A model that ends its answers itself gets the reference answer's length and a few tokens more.
SPARE_TOKENS = 8
# Where the question begins in the prompts of NVIDIA's generator: the last line that opens so.
QUESTION_STEM = re.compile(r"\n(?=(?:What|Which|Question:|Answer the question)[^\n]*)")


@dataclass(kw_only=True)
class Ruler(GenerationTask):
    """The seven synthetic sub-tasks of RULER (arXiv:2404.06654), one row each and their mean.

    Attributes:
        length: Tokens of a prompt with its answer, in the model's own tokens.
        num_samples: Samples of each sub-task.
        seed: Of the samples; sample ``i`` is the same whatever ``num_samples`` is.
        subtasks: Which sub-tasks.
        source: A file or folder of JSON lines from RULER's own generator, instead of ours.
        question_tokens: With ``source``: how many last tokens of a prompt are the question, where
            its beginning cannot be found.
        example: Show a solved example first where RULER does (vt, cwe); None shows it to every
            model but one that was trained on the prompts without, the shipped one.
        cache_dir: Where generated samples are kept.
    """

    name: str = "ruler"
    length: int = 4096
    num_samples: int = 25
    seed: int = 0
    subtasks: Sequence[str] = SUBTASKS
    source: str | None = None
    question_tokens: int = 0
    example: bool | None = None
    cache_dir: str = "~/.cache/topkbench"

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.subtasks if name not in SUBTASKS]
        if unknown and self.source is None:
            raise ValueError(
                f"task.subtasks must be among {', '.join(SUBTASKS)}, got {unknown[0]!r}."
            )
        for knob in ("length", "num_samples"):
            check_whole(knob, getattr(self, knob))

    def inputs_digest(self, loaded: LoadedModel) -> str:
        return samples_digest(self.samples(loaded))

    def samples(self, loaded: LoadedModel) -> list[Sample]:
        """Return the samples for a model, from the cache if they were made before."""
        if self.source is not None:
            return read_official(
                Path(self.source), self.num_samples, self.question, self.question_tokens
            )
        if self.length > loaded.window:
            raise TaskDoesNotFit(
                f"task.length must be at most the window of {loaded.window} tokens of"
                f" {loaded.name}, got {self.length}."
            )
        # An index of its own for each sample: more samples never change the first ones.
        path = self._cache_file(loaded)
        found = _read_cache(path)
        if found is None:
            found = _READ[path] = self._draw(loaded)
            _write_cache(path, found)
        return found

    def _draw(self, loaded: LoadedModel) -> list[Sample]:
        """Make the samples, those of a sub-task together."""
        samples = []
        for subtask in self.subtasks:
            write = functools.partial(
                make_prompt,
                subtask,
                words=word_pools()[0],
                share=TEST_NAMES,
                example=self._example(loaded),
            )
            for index in range(self.num_samples):
                samples.append(self._make(loaded, subtask, self.length, index, write))
        return samples

    def _content(self) -> dict[str, Any]:
        """Return the settings that tell these samples from those of other settings."""
        return {"subtasks": list(self.subtasks), "length": self.length}

    def _cache_file(self, loaded: LoadedModel) -> Path:
        settings = {
            "code": code_digest([type(self).__module__], rooms=("tasks",)),
            **self._content(),
            "num_samples": self.num_samples,
            "seed": self.seed,
            "chat": loaded.chat,
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
        rng = random.Random(f"{self.seed}-{subtask}-{length}-{index}")

        def count(text: str) -> int:
            return len(loaded.tokenizer.encode(text, add_special_tokens=False))

        wrapping = len(loaded.tokenizer.encode("", add_special_tokens=True))
        if loaded.chat:
            text = loaded.tokenizer.apply_chat_template(
                [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True
            )
            wrapping = count(str(text))
        # A sub-task of no family of its own is a needle in a haystack.
        family = NEW_TOKENS.get(subtask.split("_")[0], NEW_TOKENS["niah"])
        allowed = SPARE_TOKENS if loaded.short_answers else family
        prompt = write(rng=rng, budget=length - wrapping - allowed, count=count)
        new_tokens = count(prompt.reference) + allowed if loaded.short_answers else allowed
        parts = (prompt.context, prompt.question + prompt.answer_prefix)
        return Sample(
            sample_id=f"{subtask}-{length}-{self.seed}-{index}",
            subtask=subtask,
            context=prompt.context,
            question=prompt.question,
            answer_prefix=prompt.answer_prefix,
            answers=prompt.answers,
            max_new_tokens=new_tokens,
            length=wrapping + sum(map(count, parts)) + new_tokens,
        )


# What this process has read, since every cell of a sweep asks for the same samples.
_READ: dict[Path, list[Sample]] = {}


def _read_cache(path: Path) -> list[Sample] | None:
    """Return the samples of a file that is whole, else None."""
    if path not in _READ:
        try:
            head, *lines = path.read_text(encoding="utf-8").splitlines()
            if json.loads(head) != _head(lines):
                return None
            found = [json.loads(line) for line in lines]
            _READ[path] = [
                Sample(**{**entry, "answers": tuple(entry["answers"])}) for entry in found
            ]
        except (OSError, ValueError, TypeError, KeyError):
            return None
    return _READ[path]


def _write_cache(path: Path, samples: Sequence[Sample]) -> None:
    """Write samples, one a line, below a line that tells whether all are there as they were."""
    lines = [json.dumps(asdict(sample)) for sample in samples]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    unfinished.write_text("\n".join([json.dumps(_head(lines)), *lines]) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _head(lines: Sequence[str]) -> dict[str, Any]:
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return {"samples": len(lines), "sha256": digest}


def read_official(
    path: Path, num_samples: int, question: Question, question_tokens: int
) -> list[Sample]:
    """Read prompts that NVIDIA's generator wrote, with the template it was told to write.

    Args:
        path: A ``.jsonl`` file, or a folder of them; a sub-task is named after the file, or after
            its folder where the file has the generator's own name ``validation.jsonl``.
        num_samples: At most so many of each file.
        question: With ``"sparse"`` the question is split off where its beginning is found.
        question_tokens: Splits by count where it is not.

    Raises:
        ValueError: If there are no files, a line has no ``input`` and ``outputs``, or a question
            is wanted apart and cannot be found.
    """
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(
            f"task.source must be a JSON lines file or a folder of them, found none at {path}."
        )
    samples: list[Sample] = []
    for file in files:
        subtask = file.parent.name if file.stem == "validation" else file.stem
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        for number, line in enumerate(lines[:num_samples], start=1):
            try:
                entry = json.loads(line)
                text, outputs = str(entry["input"]), [str(one) for one in entry["outputs"]]
                if not outputs or isinstance(entry["outputs"], str):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"line {number} of {file} must be a JSON object with input and outputs, as"
                    f" RULER writes it, got {line[:60]!r}."
                ) from None
            family = subtask.split("_")[0]
            sample = Sample(
                sample_id=f"{subtask}-{entry.get('index', number - 1)}",
                subtask=subtask,
                context=text,
                question="",
                answer_prefix=str(entry.get("answer_prefix", "")),
                answers=tuple(outputs),
                max_new_tokens=NEW_TOKENS.get(family, NEW_TOKENS["niah"]),
                length=int(entry.get("length", 0)),
                as_is=True,
            )
            samples.append(_split(sample, question, question_tokens))
    if not samples:
        raise ValueError(f"task.source must hold at least one sample, found none at {path}.")
    names = [sample.sample_id for sample in samples]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"task.source must hold every sample once, found {twice} twice at {path}; give the"
            " folder of one length."
        )
    return samples


def _split(sample: Sample, question: Question, question_tokens: int) -> Sample:
    if question == "dense":
        return sample
    if question_tokens:
        return replace(sample, question_tokens=question_tokens)
    begins = [match.start() for match in QUESTION_STEM.finditer(sample.context)]
    if not begins:
        raise ValueError(
            f"question=sparse needs the question's beginning, and none was found in sample"
            f" {sample.sample_id}; set task.question_tokens or question=dense."
        )
    cut = begins[-1]
    return replace(sample, context=sample.context[:cut], question=sample.context[cut:])
