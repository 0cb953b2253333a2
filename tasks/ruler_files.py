"""RULER's prompts from files: as NVIDIA's generator writes them, or as the hub's data sets do."""

import codecs
import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from topkbench.harness.decoding import Question
from topkbench.harness.samples import Sample
from topkbench.tasks.generated import NEW_TOKENS
from topkbench.tasks.hub import PREFIX, HubDataset, hub_rows, parse_hub

# The name of a sub-task, alone and within the name of a file or of its folder.
SUBTASK = re.compile(
    r"niah(?:_(?:single|multikey)(?:_\d)?|_multivalue|_multiquery)?|vt|cwe|fwe|qa(?:_\d)?"
)
WITHIN_NAME = re.compile(rf"(?<![a-z0-9])(?:{SUBTASK.pattern})(?![a-z0-9])")
# In prompts of NVIDIA's generator the question is the last line that begins with one of these.
QUESTION_STEM = re.compile(r"\n(?=(?:What|Which|Question:|Answer the question)[^\n]*)")

# Signs that show nothing, though Unicode counts them as letters, marks or symbols.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
SURROGATE = re.compile("[\ud800-\udfff]")


class BadLine(ValueError):
    """A line of a file of prompts that is not as described."""


@dataclass(frozen=True)
class RulerFiles:
    """What was read from files of prompts.

    Attributes:
        samples: The samples, at most as many of each sub-task as were asked for.
        counts: For each sub-task, the number of samples in the files.
        skipped: Number of lines that were left out because they are not as described.
        label: Where they come from: 8 hex digits of the files' names and bytes, after the id of a
            data set of the hub.
    """

    samples: list[Sample]
    counts: dict[str, int]
    skipped: int
    label: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a file. What is None does not stand in it.

    ``question`` is the end of the prompt, and ``context`` the part before it or the whole prompt.
    """

    number: int
    context: str
    question: str | None
    answer_prefix: str
    answers: tuple[str, ...]
    subtask: str | None
    max_new_tokens: int | None


@dataclass(frozen=True)
class File:
    """The lines of one file.

    Attributes:
        lines: The first lines of each sub-task.
        counts: For each sub-task, its number of lines.
        skipped: Number of lines that were left out because they are not as described.
        sha256: Digest of the file's bytes.
    """

    lines: dict[str, list[Line]]
    counts: dict[str, int]
    skipped: int
    sha256: str


def read_official(
    source: str | Path,
    num_samples: int,
    question: Question,
    question_tokens: int = 0,
    subtasks: Sequence[str] | None = None,
    skip_bad: bool = False,
) -> RulerFiles:
    r"""Read prompts that were written by NVIDIA's generator, with any chat template it added.

    A file has one JSON object per line, in UTF-8 with or without a byte order mark; a line ends at
    ``\n`` alone. The generator writes ``input``, the prompt; ``outputs``, the references; and
    ``answer_prefix``, the beginning of the answer, if the prompt does not end with it. Data sets on
    the hub have ``context`` and ``question`` for ``input``, ``answer`` for ``outputs``, and also
    ``task`` and ``max_new_tokens``; they may be Parquet files. A ``question`` beside ``input`` is
    the prompt's end. Other keys are ignored: ``index`` is an offset that repeats, and ``length``
    counts tokens of the generator's tokenizer. A sample is identified by its file and line.

    The sub-task, which determines the score and the number of tokens to generate, is the line's
    ``task``, or is taken from the file's name or else from its folder's: ``qa_1/validation.jsonl``
    as the generator writes them, ``qa_1.jsonl``, ``qa_1-4096.jsonl``, ``4096/qa_1.jsonl``.

    Files are read to their end, so that a bad line is found however many samples are asked for.

    Args:
        source: A file; a folder with ``.jsonl`` or ``.parquet`` files; or a data set of the hub,
            ``hub:OWNER/NAME[/CONFIG][@REVISION]``.
        num_samples: At most this many samples of each sub-task are returned, those that come first.
        question: With ``"sparse"`` the question is split off, where the line separates it or else
            where its first words are found.
        question_tokens: If not 0, this many last tokens are split off as the question instead.
        subtasks: Only these sub-tasks are read; None for all.
        skip_bad: Leave out lines that are not as described.

    Raises:
        ValueError: If there are no files, a file has no sample, its sub-task is unknown or also in
            another file, a sub-task that is asked for is in no file, a line is not as described, a
            reference is empty, or a question is to be split off and cannot be found.
    """
    samples: list[Sample] = []
    counts: dict[str, int] = {}
    place_of: dict[str, str] = {}
    digests: list[tuple[str, str]] = []
    skipped = 0
    for place, file_id, named, read_lines in _places(str(source)):
        if named is not None and subtasks is not None and named not in subtasks:
            place_of.setdefault(named, place)
            continue
        read = read_lines(named, num_samples, skip_bad)
        skipped += read.skipped
        digests.append((file_id, read.sha256))
        for subtask, lines in read.lines.items():
            if subtask in place_of:
                raise ValueError(
                    f"task.source must hold one file of each sub-task, found {place_of[subtask]}"
                    f" and {place}, both of {subtask}; give the folder of one length."
                )
            place_of[subtask] = place
            if subtasks is None or subtask in subtasks:
                counts[subtask] = read.counts[subtask]
                samples += [
                    _split(_sample(line, subtask, file_id), line, question, question_tokens)
                    for line in lines
                ]
    for subtask in subtasks or ():
        if subtask not in counts:
            raise ValueError(
                f"task.subtasks must be among those in task.source, {', '.join(sorted(place_of))},"
                f" got {subtask!r}."
            )
    label = hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()[:8]
    if str(source).startswith(PREFIX):
        label = f"{str(source).removeprefix(PREFIX)} {label}"
    return RulerFiles(samples, counts, skipped, label)


# Called with the sub-task of lines that do not name one, the number of lines of each sub-task to
# return, and whether bad lines are left out.
ReadLines = Callable[[str | None, int, bool], "File"]


def _places(source: str) -> Iterator[tuple[str, str, str | None, ReadLines]]:
    """Yield each file of a source: its path, a shorter name, its sub-task, and how it is read.

    The sub-task is None where neither the file's name nor its folder's is of exactly one.
    """
    if source.startswith(PREFIX):
        dataset = parse_hub("task.source", source)
        name = str(dataset).partition("@")[0]
        yield source, name, _one_subtask(name), functools.partial(_read_dataset, dataset)
        return
    path = Path(source)
    files = [path]
    if path.is_dir():
        files = sorted([*path.rglob("*.jsonl"), *path.rglob("*.parquet")])
    if not files or not all(file.is_file() for file in files):
        raise ValueError(
            "task.source must be a file of JSON lines or Parquet, a folder of them, or"
            f" hub:OWNER/NAME, found none at {path}."
        )
    for file in files:
        named, file_id = _named_subtask(file)
        stat = file.stat()
        state = (str(file.absolute()), stat.st_mtime_ns, stat.st_size)
        yield str(file), file_id, named, functools.partial(_read_file, file, state)


def _named_subtask(file: Path) -> tuple[str | None, str]:
    """Return the sub-task that a file is named after, and the part of its path to identify it by.

    The sub-task is None if neither the file's name nor its folder's contains exactly one.
    """
    path = file.absolute()  # a symbolic link counts by its own name, not by its target's
    for name, file_id in (
        (path.stem, path.name),
        (path.parent.name, f"{path.parent.name}/{path.name}"),
    ):
        subtasks = _subtasks_within(name)
        if len(subtasks) == 1:
            return subtasks.pop(), file_id
        if subtasks:
            break
    return None, path.name


def _subtasks_within(name: str) -> set[str]:
    return set(WITHIN_NAME.findall(name.lower().replace("-", "_")))


def _one_subtask(name: str) -> str | None:
    found = _subtasks_within(name)
    return found.pop() if len(found) == 1 else None


# Read once by a process, since all cells of a sweep use the same files.
@functools.lru_cache(maxsize=64)
def _read_file(
    file: Path, state: tuple[str, int, int], named: str | None, num_samples: int, skip_bad: bool
) -> File:
    """Return the first lines of each sub-task of a file.

    Args:
        file: The file.
        state: Absolute path, time of the last change and size: a changed file is read again.
        named: The sub-task of lines that do not name one.
        num_samples: Lines of each sub-task to return.
        skip_bad: Leave out lines that are not as described.

    Raises:
        ValueError: As ``read_official``.
    """
    with file.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    return _read(str(file), entries(file), sha256, named, num_samples, skip_bad)


@functools.lru_cache(maxsize=64)
def _read_dataset(dataset: HubDataset, named: str | None, num_samples: int, skip_bad: bool) -> File:
    """Return the first rows of each sub-task of a data set; see ``_read_file``."""
    rows = hub_rows("task.source", dataset, ("test",), SUBTASK)
    sha256 = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
    return _read(str(dataset), enumerate(rows, start=1), sha256, named, num_samples, skip_bad)


def _read(
    place: str,
    given: Iterable[tuple[int, bytes | dict[str, Any]]],
    sha256: str,
    named: str | None,
    num_samples: int,
    skip_bad: bool,
) -> File:
    """Return the first lines of each sub-task of what was opened, which is read to its end."""
    lines: dict[str, list[Line]] = {}
    counts: Counter[str] = Counter()
    skipped = 0
    for number, entry in given:
        location = f"{'row' if isinstance(entry, dict) else 'line'} {number} of {place}"
        try:
            line = _parse(entry, number, location)
        except BadLine:
            if not skip_bad:
                raise
            skipped += 1
            continue
        subtask = line.subtask or named
        if subtask is None:
            raise ValueError(
                "task.source must name each file or its folder after one sub-task of RULER"
                f" (niah_single_1, ..., vt, cwe, fwe, qa_1, qa_2), got {place}; rename it, as in"
                " qa_1/validation.jsonl."
            )
        counts[subtask] += 1
        if counts[subtask] <= num_samples:
            lines.setdefault(subtask, []).append(line)
    if not lines:
        raise ValueError(
            f"task.source must hold at least one sample in each file, found none in {place}."
        )
    return File(lines, dict(counts), skipped, sha256)


def entries(file: Path) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """Yield the number and content of each line that is not blank, or of each row of Parquet."""
    if file.suffix == ".parquet":
        try:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=16)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
        except pyarrow.ArrowException as error:
            raise ValueError(
                f"task.source must hold readable Parquet, got {file}: {error}."
            ) from None
        return
    with file.open("rb") as lines:  # in binary mode, lines end at "\n" only
        for number, line in enumerate(lines, start=1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if content.strip():
                yield number, content


def _parse(entry: bytes | dict[str, Any], number: int, location: str) -> Line:
    """Return one line's content.

    Raises:
        BadLine: If it is not as described; the message begins with ``location``.
    """

    def bad(requirement: str, value: object) -> BadLine:
        return BadLine(
            f"{location} must be a JSON object with input and outputs, as RULER writes it:"
            f" {requirement}, got {json.dumps(value, default=str)[:60]}."
        )

    values = columns_of(entry, location, bad)
    for names in (("input", "context"), ("outputs", "answer")):
        if all(name in values for name in names):
            raise bad(f"it must have one of {' and '.join(names)}", list(values))
    prompt = "context" if "context" in values else "input"
    context, question = values.get(prompt), values.get("question", "")
    if not isinstance(context, str) or is_invisible(context):
        raise bad(f"{prompt} must be a text and not empty", context)
    if not isinstance(question, str):
        raise bad("question must be a text", question)
    if question.strip() and prompt == "input":
        context, found, rest = context.rpartition(question.strip())
        if not found or not context.strip():
            raise bad("question must stand in input after a context", question)
        question = found + rest
    if isinstance(values.get("answer"), str):
        values["answer"] = [values["answer"]]
    references = "answer" if "answer" in values else "outputs"
    answers = values.get(references)
    if not isinstance(answers, list) or not answers:
        raise bad(f"{references} must be a list of references", answers)
    for answer in answers:
        # An empty reference would match every prediction, an invisible one none.
        if not isinstance(answer, str) or is_invisible(answer):
            raise bad(f"a reference in {references} must be a text and not empty", answer)
    prefix = values.get("answer_prefix", "")
    if not isinstance(prefix, str):
        raise bad("answer_prefix must be a text", prefix)
    for value in (context, question, prefix, *answers):
        if SURROGATE.search(value):  # JSON allows lone surrogates, but tokenizers do not
            raise bad("its texts must be Unicode without lone surrogates", value)
    subtask, new_tokens = values.get("task"), values.get("max_new_tokens")
    if isinstance(new_tokens, float) and new_tokens.is_integer():  # as a column with nulls has it
        new_tokens = int(new_tokens)
    if subtask is not None and not (isinstance(subtask, str) and SUBTASK.fullmatch(subtask)):
        raise bad("task must be a sub-task of RULER (niah_single_1, ..., qa_2)", subtask)
    if new_tokens is not None and (type(new_tokens) is not int or new_tokens < 1):
        raise bad("max_new_tokens must be a whole number of at least 1", new_tokens)
    return Line(
        number=number,
        context=context,
        question=question if question.strip() else None,
        answer_prefix=prefix,
        answers=tuple(answers),
        subtask=subtask,
        max_new_tokens=new_tokens,
    )


def columns_of(
    entry: bytes | dict[str, Any], location: str, bad: Callable[[str, object], BadLine]
) -> dict[str, Any]:
    """Return the columns of a line or row that are not null.

    Args:
        entry: What ``entries`` yielded.
        location: Names it.
        bad: Returns the error of a line, given what must hold and what was found.

    Raises:
        BadLine: If it is no JSON object in UTF-8.
    """
    if isinstance(entry, bytes):
        try:
            text = entry.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadLine(
                f"{location} must be UTF-8, got byte 0x{entry[error.start]:02x} at {error.start};"
                " convert the file, for example with iconv -t utf-8."
            ) from None
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError):
            raise bad("it must be JSON", text.strip()) from None
    if not isinstance(entry, dict):
        raise bad("it must be an object", entry)
    return {name: value for name, value in entry.items() if value is not None}


def is_invisible(text: str) -> bool:
    """Return whether a text has nothing to see: it is empty, or of spaces and control signs."""
    return all(
        sign.isspace() or unicodedata.category(sign) in ("Cc", "Cf") or _BLANK.match(sign)
        for sign in text
    )


def _sample(line: Line, subtask: str, file_id: str) -> Sample:
    return Sample(
        sample_id=f"{file_id}:{line.number}",
        subtask=subtask,
        context=line.context,
        question=line.question or "",
        answer_prefix=line.answer_prefix,
        answers=line.answers,
        max_new_tokens=line.max_new_tokens or NEW_TOKENS[subtask.split("_")[0]],
        length=None,
        official=True,
    )


def _split(sample: Sample, line: Line, question: Question, question_tokens: int) -> Sample:
    """Split the question off a sample, if it is to be decoded and the line does not do it."""
    if line.question is not None and question_tokens:
        raise ValueError(
            "task.question_tokens must be 0 where a file separates the question itself, got"
            f" {question_tokens} at sample {sample.sample_id}."
        )
    if question == "dense" or line.question is not None:
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
