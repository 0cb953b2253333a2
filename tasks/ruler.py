"""RULER: retrieval, tracing and aggregation at any length, generated or from official files."""

import codecs
import functools
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from topkbench.harness.caching import write_cached
from topkbench.harness.decoding import Question
from topkbench.harness.generation import GenerationTask
from topkbench.harness.samples import Sample, TaskDoesNotFit, samples_digest
from topkbench.harness.sources import code_digest
from topkbench.methods.base import check_list, check_whole
from topkbench.models.digests import tokenizer_digest
from topkbench.models.load import LoadedModel, ModelShape
from topkbench.tasks.ruler_prompts import SUBTASKS, Prompt, make_prompt
from topkbench.tasks.words import TEST_NAMES, word_pools

# Called with rng, budget and count; see ``make_prompt``.
WritePrompt = Callable[..., Prompt]

# Tokens that RULER lets a model generate, by the prefix of the sub-task's name.
NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
# A model trained to end its answers may generate this many tokens more than the reference answer.
SPARE_TOKENS = 8
# The name of a sub-task within the name of an official file or of its folder.
OFFICIAL_SUBTASK = re.compile(
    r"(?<![a-z0-9])"
    r"(niah(?:_(?:single|multikey)(?:_\d)?|_multivalue|_multiquery)?|vt|cwe|fwe|qa(?:_\d)?)"
    r"(?![a-z0-9])"
)
# In prompts of NVIDIA's generator the question is the last line that begins with one of these.
QUESTION_STEM = re.compile(r"\n(?=(?:What|Which|Question:|Answer the question)[^\n]*)")

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(kw_only=True)
class Ruler(GenerationTask):
    """The seven synthetic sub-tasks of RULER (arXiv:2404.06654), one row each and their mean.

    Attributes:
        length: Tokens of prompt and answer together, in the model's own tokens.
        num_samples: Samples per sub-task.
        seed: Seed of the samples; sample ``i`` does not depend on ``num_samples``.
        subtasks: The sub-tasks to run.
        source: A file or folder of JSON lines from RULER's own generator, used instead of generated
            prompts; see ``read_official``. ``length``, ``seed``, ``subtasks`` and ``example`` are
            then ignored.
        question_tokens: With ``source``: the number of last tokens of a prompt that are the
            question; 0 finds the question by its first words.
        example: Whether a solved example precedes the prompt where RULER has one (vt, cwe); None
            shows it to all models except those trained on prompts without it, as the shipped one.
        cache_dir: Folder in which generated samples are cached.
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
    _longest: ClassVar[str] = "task.length"
    """The setting that says how long the longest prompt is."""
    _official: list[Sample] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.subtasks if name not in SUBTASKS]
        if unknown and self.source is None:
            raise ValueError(
                f"task.subtasks must be among {', '.join(SUBTASKS)}, got {unknown[0]!r}."
            )
        check_list("task.subtasks", self.subtasks)
        for knob in ("length", "num_samples"):
            check_whole(knob, getattr(self, knob))
        for knob in ("seed", "question_tokens"):
            check_whole(knob, getattr(self, knob), least=0)
        if self.source is not None:  # read now, so that a bad file fails before a model is loaded
            self._official = read_official(
                Path(self.source), self.num_samples, self.question, self.question_tokens
            )

    def check_model(self, shape: ModelShape) -> None:
        super().check_model(shape)
        if self.source is None:
            self._check_window(shape.name, shape.window)

    def _check_window(self, name: str, window: int) -> None:
        if self.length > window:
            raise TaskDoesNotFit(
                f"{self._longest} must be at most the window of {window} tokens of {name}, got"
                f" {self.length}; model.window=TOKENS sets another window."
            )

    def inputs_digest(self, loaded: LoadedModel) -> str:
        return samples_digest(self.samples(loaded))

    def samples(self, loaded: LoadedModel) -> list[Sample]:
        """Return the samples for a model, from the cache if they are there."""
        if self.source is not None:
            return self._official
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
        """Return the settings of the subclass that the samples depend on."""
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
        # The needle task's sub-tasks, such as "4096 x 50%", have no prefix: they count as niah.
        official = NEW_TOKENS.get(subtask.split("_")[0], NEW_TOKENS["niah"])
        reserved = SPARE_TOKENS if loaded.short_answers else official
        prompt = write(rng=rng, budget=length - wrapping - reserved, count=count)
        new_tokens = count(prompt.reference) + reserved if loaded.short_answers else reserved
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


def read_official(
    path: Path, num_samples: int, question: Question, question_tokens: int
) -> list[Sample]:
    """Read prompts written by NVIDIA's generator, including any chat template that it added.

    A file has one JSON object per line, in UTF-8: ``input``, the prompt; ``outputs``, the
    references; and optionally ``answer_prefix``, the beginning of the answer, if the prompt does
    not end with it. Other keys are ignored: ``index`` is an offset that repeats, and ``length``
    counts tokens of the generator's tokenizer. A sample is identified by its file and line.

    The sub-task, which determines the score and the number of tokens to generate, is taken from the
    file's name or else from its folder's: ``qa_1/validation.jsonl`` as the generator writes them,
    ``qa_1.jsonl``, ``qa_1-4096.jsonl``, ``4096/qa_1.jsonl``.

    Args:
        path: A file of JSON lines, or a folder with one such ``.jsonl`` file for each sub-task.
        num_samples: At most this many samples are read from the beginning of each file.
        question: With ``"sparse"`` the question is split off where its first words are found.
        question_tokens: If not 0, this many last tokens are split off as the question instead.

    Raises:
        ValueError: If there are no files, a file has no sample, its sub-task is unknown or the same
            as another file's, a line is not as described, a reference is empty, or a question is to
            be split off and cannot be found.
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
        subtask, file_id = _official_subtask(file)
        if subtask in file_of:
            raise ValueError(
                f"task.source must hold one file of each sub-task, found {file_of[subtask]} and"
                f" {file}, both of {subtask}; give the folder of one length."
            )
        file_of[subtask] = file
        for number, text, answer_prefix, answers in prompts:
            sample = Sample(
                sample_id=f"{file_id}:{number}",
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
    """Return a file's sub-task, and the part of its path that contains it, to identify samples."""
    path = file.absolute()  # a symbolic link counts by its own name, not by its target's
    for name, file_id in (
        (path.stem, path.name),
        (path.parent.name, f"{path.parent.name}/{path.name}"),
    ):
        subtasks = set(OFFICIAL_SUBTASK.findall(name.lower().replace("-", "_")))
        if len(subtasks) == 1:
            return subtasks.pop(), file_id
        if subtasks:
            break
    raise ValueError(
        "task.source must name each file or its folder after one sub-task of RULER (niah_single_1,"
        f" ..., vt, cwe, fwe, qa_1, qa_2), got {file}; rename it, as in qa_1/validation.jsonl."
    )


def _read_lines(file: Path, num_samples: int) -> Iterator[tuple[int, str, str, tuple[str, ...]]]:
    """Yield the line number, prompt, answer prefix and references of a file's first samples."""
    count = 0
    with file.open("rb") as lines:  # in binary mode, lines end at "\n" only
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            yield number, *_parse_line(line, f"line {number} of {file}")
            count += 1
            if count == num_samples:
                return


def _parse_line(line: bytes, location: str) -> tuple[str, str, tuple[str, ...]]:
    """Return the prompt, answer prefix and references of one line.

    Raises:
        ValueError: If the line is malformed; the message begins with ``location``.
    """

    def malformed(requirement: str, value: object) -> ValueError:
        return ValueError(
            f"{location} must be a JSON object with input and outputs, as RULER writes it:"
            f" {requirement}, got {json.dumps(value)[:60]}."
        )

    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{location} must be UTF-8, got byte 0x{line[error.start]:02x} at {error.start};"
            " convert the file, for example with iconv -t utf-8."
        ) from None
    try:
        entry = json.loads(text)
    except ValueError:
        raise malformed("it must be JSON", text.strip()) from None
    if not isinstance(entry, dict):
        raise malformed("it must be an object", entry)
    prompt, outputs = entry.get("input"), entry.get("outputs")
    prefix = entry.get("answer_prefix")
    prefix = "" if prefix is None else prefix
    if not isinstance(prompt, str) or not prompt.strip():
        raise malformed("input must be a text and not empty", prompt)
    if not isinstance(outputs, list) or not outputs:
        raise malformed("outputs must be a list of references", outputs)
    for answer in outputs:
        # An empty reference would match every prediction.
        if not isinstance(answer, str) or not answer.strip():
            raise malformed("a reference in outputs must be a text and not empty", answer)
    if not isinstance(prefix, str):
        raise malformed("answer_prefix must be a text", prefix)
    for value in (prompt, prefix, *outputs):
        if _SURROGATE.search(value):  # JSON allows lone surrogates, but tokenizers do not
            raise malformed("its texts must be Unicode without lone surrogates", value)
    return prompt, prefix, tuple(outputs)


def _split(sample: Sample, question: Question, question_tokens: int) -> Sample:
    if question == "dense":
        return sample
    if question_tokens:
        return replace(sample, question_tokens=question_tokens)
    starts = [match.start() for match in QUESTION_STEM.finditer(sample.context)]
    if not starts or not sample.context[: starts[-1]].strip():
        raise ValueError(
            f"question=sparse needs the question's beginning after a context, and none was found in"
            f" sample {sample.sample_id}; set task.question_tokens or question=dense."
        )
    cut = starts[-1]
    return replace(sample, context=sample.context[:cut], question=sample.context[cut:])
