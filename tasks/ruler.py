"""RULER: retrieval, tracing and aggregation at any length, generated or from official files."""

import codecs
import functools
import hashlib
import json
import random
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from topkbench.harness.decoding import Question
from topkbench.harness.evaluation import GenerationTask
from topkbench.harness.sources import code_digest
from topkbench.harness.task import Sample, TaskDoesNotFit, samples_digest
from topkbench.methods.base import check_whole
from topkbench.models.digests import tokenizer_digest
from topkbench.models.load import LoadedModel
from topkbench.tasks.ruler_prompts import SUBTASKS, Prompt, make_prompt
from topkbench.tasks.words import TEST_NAMES, word_pools

# Called with rng, budget and count; see ``make_prompt``.
WritePrompt = Callable[..., Prompt]

# Tokens that RULER lets a model generate, by the family that a sub-task's name begins with.
NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
# A model that ends its answers itself gets the reference answer's length and a few tokens more.
SPARE_TOKENS = 8
# A sub-task in the name of an official file or of its folder, whatever else stands there.
OFFICIAL_SUBTASK = re.compile(
    r"(?<![a-z0-9])"
    r"(niah(?:_(?:single|multikey)(?:_\d)?|_multivalue|_multiquery)?|vt|cwe|fwe|qa(?:_\d)?)"
    r"(?![a-z0-9])"
)
# Where the question begins in the prompts of NVIDIA's generator: the last line that opens so.
QUESTION_STEM = re.compile(r"\n(?=(?:What|Which|Question:|Answer the question)[^\n]*)")

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(kw_only=True)
class Ruler(GenerationTask):
    """The seven synthetic sub-tasks of RULER (arXiv:2404.06654), one row each and their mean.

    Attributes:
        length: Tokens of a prompt with its answer, in the model's own tokens.
        num_samples: Samples of each sub-task.
        seed: Of the samples; sample ``i`` is the same whatever ``num_samples`` is.
        subtasks: Which sub-tasks.
        source: A file or folder of JSON lines from RULER's own generator, instead of ours; see
            ``read_official``. ``length``, ``seed``, ``subtasks`` and ``example`` play no part.
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
    _official: list[Sample] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.subtasks if name not in SUBTASKS]
        if unknown and self.source is None:
            raise ValueError(
                f"task.subtasks must be among {', '.join(SUBTASKS)}, got {unknown[0]!r}."
            )
        for knob in ("length", "num_samples"):
            check_whole(knob, getattr(self, knob))
        if self.source is not None:  # now, since a bad file is to be refused before a model loads
            self._official = read_official(
                Path(self.source), self.num_samples, self.question, self.question_tokens
            )

    def inputs_digest(self, loaded: LoadedModel) -> str:
        return samples_digest(self.samples(loaded))

    def samples(self, loaded: LoadedModel) -> list[Sample]:
        """Return the samples for a model, from the cache if they were made before."""
        if self.source is not None:
            return self._official
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
            "code": code_digest([type(self).__module__], folders=("tasks",)),
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

    A file has one JSON object a line, in UTF-8: ``input``, the prompt; ``outputs``, the references;
    and ``answer_prefix``, with which the answer begins, where it is not in the prompt. The other
    keys are not read: ``index`` is an offset that repeats, and ``length`` counts the tokens of the
    generator's tokenizer. A sample is named by its file and line.

    The sub-task, which sets the score and the tokens that may be generated, stands in the file's
    name or, where it does not, in its folder's: ``qa_1/validation.jsonl`` as the generator writes
    them, ``qa_1.jsonl``, ``qa_1-4096.jsonl``, ``4096/qa_1.jsonl``.

    Args:
        path: A file of JSON lines, or a folder with one such ``.jsonl`` file for each sub-task.
        num_samples: At most so many of each file, its first.
        question: With ``"sparse"`` the question is split off where its beginning is found.
        question_tokens: Splits by count where it is not.

    Raises:
        ValueError: If there are no files, a file has no sample, its sub-task cannot be told or is
            another file's too, a line is not as described, a reference is empty, or a question is
            wanted apart and cannot be found.
    """
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(
            f"task.source must be a JSON lines file or a folder of them, found none at {path}."
        )
    samples: list[Sample] = []
    file_of: dict[str, Path] = {}
    for file in files:
        prompts = list(_read_lines(file, num_samples))
        if not prompts:
            raise ValueError(
                f"task.source must hold at least one sample in each file, found none in {file}."
            )
        subtask, name = _official_subtask(file)
        if subtask in file_of:
            raise ValueError(
                f"task.source must hold one file of each sub-task, found {file_of[subtask]} and"
                f" {file}, both of {subtask}; give the folder of one length."
            )
        file_of[subtask] = file
        for number, text, answer_prefix, answers in prompts:
            sample = Sample(
                sample_id=f"{name}:{number}",
                subtask=subtask,
                context=text,
                question="",
                answer_prefix=answer_prefix,
                answers=answers,
                max_new_tokens=NEW_TOKENS[subtask.split("_")[0]],
                length=None,
                as_is=True,
            )
            samples.append(_split(sample, question, question_tokens))
    return samples


def _official_subtask(file: Path) -> tuple[str, str]:
    """Return a file's sub-task, and the part of its path that tells it."""
    whole = file.absolute()  # a link's own name counts, not its target's
    for told_by, name in (
        (whole.stem, whole.name),
        (whole.parent.name, f"{whole.parent.name}/{whole.name}"),
    ):
        found = set(OFFICIAL_SUBTASK.findall(told_by.lower().replace("-", "_")))
        if len(found) == 1:
            return found.pop(), name
        if found:
            break
    raise ValueError(
        "task.source must name each file or its folder after one sub-task of RULER (niah_single_1,"
        f" ..., vt, cwe, fwe, qa_1, qa_2), got {file}; rename it, as in qa_1/validation.jsonl."
    )


def _read_lines(file: Path, num_samples: int) -> Iterator[tuple[int, str, str, tuple[str, ...]]]:
    """Yield the number, prompt, answer prefix and references of a file's first samples."""
    count = 0
    with file.open("rb") as lines:  # as bytes, lines end at "\n" and at no other character
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            yield number, *_parse_line(line, f"line {number} of {file}")
            count += 1
            if count == num_samples:
                return


def _parse_line(line: bytes, place: str) -> tuple[str, str, tuple[str, ...]]:
    """Return the prompt, answer prefix and references of one line.

    Raises:
        ValueError: If there is no such thing in it; the sentence begins with ``place``.
    """

    def refuse(wanted: str, found: object) -> ValueError:
        return ValueError(
            f"{place} must be a JSON object with input and outputs, as RULER writes it: {wanted},"
            f" got {json.dumps(found)[:60]}."
        )

    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place} must be UTF-8, got byte 0x{line[error.start]:02x} at {error.start};"
            " convert the file, for example with iconv -t utf-8."
        ) from None
    try:
        entry = json.loads(text)
    except ValueError:
        raise refuse("it must be JSON", text.strip()) from None
    if not isinstance(entry, dict):
        raise refuse("it must be an object", entry)
    prompt, outputs = entry.get("input"), entry.get("outputs")
    prefix = entry.get("answer_prefix")
    prefix = "" if prefix is None else prefix
    if not isinstance(prompt, str) or not prompt.strip():
        raise refuse("input must be a text and not empty", prompt)
    if not isinstance(outputs, list) or not outputs:
        raise refuse("outputs must be a list of references", outputs)
    for answer in outputs:
        # Every prediction has an empty one in it.
        if not isinstance(answer, str) or not answer.strip():
            raise refuse("a reference in outputs must be a text and not empty", answer)
    if not isinstance(prefix, str):
        raise refuse("answer_prefix must be a text", prefix)
    for value in (prompt, prefix, *outputs):
        if _SURROGATE.search(value):  # JSON can write half of a pair, which no tokenizer takes
            raise refuse("its texts must be Unicode without lone surrogates", value)
    return prompt, prefix, tuple(outputs)


def _split(sample: Sample, question: Question, question_tokens: int) -> Sample:
    if question == "dense":
        return sample
    if question_tokens:
        return replace(sample, question_tokens=question_tokens)
    begins = [match.start() for match in QUESTION_STEM.finditer(sample.context)]
    if not begins or not sample.context[: begins[-1]].strip():
        raise ValueError(
            f"question=sparse needs the question's beginning after a context, and none was found in"
            f" sample {sample.sample_id}; set task.question_tokens or question=dense."
        )
    cut = begins[-1]
    return replace(sample, context=sample.context[:cut], question=sample.context[cut:])
