"""Documents about which several questions are asked: written here, or with SCBench's columns."""

import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from topkbench.tasks.hub import PREFIX, HubDataset, hub_rows, parse_hub
from topkbench.tasks.ruler_files import SURROGATE, BadLine, columns_of, entries, is_invisible
from topkbench.tasks.ruler_prompts import NOISE, ONE_VALUE, distinct, drawn_text
from topkbench.tasks.ruler_prompts import needle as ruler_needle
from topkbench.tasks.ruler_words_prompts import (
    FACTS,
    CountTokens,
    ask_one,
    fill,
    filler,
    halves,
    needle,
    scatter,
)
from topkbench.tasks.words import word_pools

Wording = Literal["words", "ruler"]

VERSION = 1
"""Counts the changes of the documents that are written here: rows of different ones are not
compared."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question and its answer.

    Attributes:
        question: The question, which directly follows what stands before it.
        answer_prefix: The beginning of the answer, given to the model.
        reference: The rest of the answer, as it stands before the next question.
        answers: Strings that a correct answer contains.
    """

    question: str
    answer_prefix: str
    reference: str
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text and the questions about it, in the order in which they are asked.

    Attributes:
        name: Unique among the documents, stable between runs.
        context: The text.
        turns: The questions.
    """

    name: str
    context: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Documents:
    """What was read from a file.

    Attributes:
        documents: The first ones, as many as were asked for.
        count: Number of documents in the file.
        skipped: Number of lines that were left out because they are not as described.
        label: Where they come from: the file's or data set's name and 8 hex digits of its content.
    """

    documents: tuple[Document, ...]
    count: int
    skipped: int
    label: str


# Written here -------------------------------------------------------------------------------------


def asking_order(seed: int, index: int, num_turns: int) -> list[int]:
    """Return which needle each question asks for, by their order in the document.

    Of ``num_turns`` documents in a row each asks for another needle first, and likewise at every
    later turn: what a turn scores says nothing of where its needle is.
    """
    block, shift = divmod(index, num_turns)
    order = list(range(num_turns))
    random.Random(f"{seed}-multi_turn-order-{block}").shuffle(order)
    return order[shift:] + order[:shift]


@dataclass(frozen=True)
class _Material:
    """What a document is made of.

    Attributes:
        before: The text before the haystack.
        needles: The needles, and
        turns: the question about each of them.
        filler: Returns a piece of the haystack.
    """

    before: str
    needles: list[str]
    turns: list[Turn]
    filler: Callable[[], str]


def write_document(
    name: str,
    rng: random.Random,
    order: list[int],
    budget: int,
    count: CountTokens,
    wording: Wording,
) -> Document:
    """Return a document that hides one needle for each question.

    Args:
        name: Its name.
        rng: Its randomness.
        order: Which needle each question asks for, by their order in the document.
        budget: Tokens of document, questions and answers together.
        count: Returns the number of tokens of a text.
        wording: Of what it is made.

    Raises:
        TaskDoesNotFit: If a haystack has no room.
    """
    make = _of_words if wording == "words" else _of_ruler
    made = make(rng, len(order))
    texts = [text for one in made.turns for text in (one.question, one.answer_prefix)]
    texts += [one.reference for one in made.turns]
    left = budget - sum(map(count, (made.before, *made.needles, *texts)))
    haystack = fill(left, count, made.filler)
    context = made.before + scatter(rng, haystack, made.needles, ordered=True)
    turns = tuple(made.turns[place] for place in order)
    return Document(name=name, context=context.rstrip("\n"), turns=turns)


def _of_words(rng: random.Random, num_turns: int) -> _Material:
    """Return random words, in the wording on which the shipped model is trained."""
    words = word_pools()[0]
    key_words, value_words = halves(words)
    keys = rng.sample(key_words, num_turns)
    # No word is in two values: an answer tells which needle was found.
    drawn = rng.sample(value_words, 2 * num_turns)
    values = [f"{first} {second}" for first, second in zip(drawn[::2], drawn[1::2], strict=True)]
    turns = []
    for key, value in zip(keys, values, strict=True):
        question, prefix, reference = ask_one(key, value)
        turns.append(
            Turn(question=question, answer_prefix=prefix, reference=reference, answers=(value,))
        )
    others = [word for word in words if word not in keys]
    needles = [needle(key, value) for key, value in zip(keys, values, strict=True)]
    return _Material(FACTS, needles, turns, lambda: filler(rng, others))


def _of_ruler(rng: random.Random, num_turns: int) -> _Material:
    """Return RULER's needles, numbers under two words each, in its noise."""
    keys = distinct(lambda: drawn_text(rng, "word"), num_turns)
    values = distinct(lambda: drawn_text(rng, "number"), num_turns)
    turns = []
    for key, value in zip(keys, values, strict=True):
        asked = ONE_VALUE.around("", (value,), value="number", query=key)
        turns.append(
            Turn(
                question=asked.question,
                answer_prefix=asked.answer_prefix,
                reference=f" {value}.",
                answers=asked.answers,
            )
        )
    needles = [
        f"{ruler_needle('number', key, value)}\n" for key, value in zip(keys, values, strict=True)
    ]
    before = ONE_VALUE.before.format(value="number")
    return _Material(before, needles, turns, lambda: f"{NOISE}\n")


# Read from files ----------------------------------------------------------------------------------


def read_documents(source: str, num_samples: int, num_turns: int, skip_bad: bool) -> Documents:
    """Read documents with SCBench's columns (arXiv:2412.10319).

    A line or row has ``context`` (or ``input``), the text, and ``multi_turns``, a list of mappings
    with ``input``, the question, and ``answer``: a text, a number or a list of them. Other columns
    are ignored. A document is identified by its line.

    Args:
        source: A file of JSON lines or Parquet, or ``hub:OWNER/NAME[/CONFIG][@REVISION]``.
        num_samples: At most this many documents are returned, those that come first.
        num_turns: The first questions of each, of which it must have as many.
        skip_bad: Leave out lines that are not as described.

    Raises:
        ValueError: If there is no such file, it has no document, or a line is not as described.
    """
    if source.startswith(PREFIX):
        return _read_dataset(parse_hub("task.source", source), num_samples, num_turns, skip_bad)
    file = Path(source)
    if not file.is_file():
        raise ValueError(
            "task.source must be a file of JSON lines or Parquet, or hub:OWNER/NAME, found no file"
            f" at {file}."
        )
    stat = file.stat()
    state = (str(file.absolute()), stat.st_mtime_ns, stat.st_size)
    return _read_file(file, state, num_samples, num_turns, skip_bad)


# Read once by a process, since all cells of a sweep use the same file.
@functools.lru_cache(maxsize=8)
def _read_file(
    file: Path, state: tuple[str, int, int], num_samples: int, num_turns: int, skip_bad: bool
) -> Documents:
    """Read a file; ``state`` is its path, time and size, so that a changed one is read again."""
    with file.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    label = f"{file.name} {sha256[:8]}"
    return _read(str(file), entries(file), label, num_samples, num_turns, skip_bad)


@functools.lru_cache(maxsize=8)
def _read_dataset(
    dataset: HubDataset, num_samples: int, num_turns: int, skip_bad: bool
) -> Documents:
    rows = hub_rows("task.source", dataset, ("test",))
    sha256 = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
    given = enumerate(rows, start=1)
    return _read(str(dataset), given, f"{dataset} {sha256[:8]}", num_samples, num_turns, skip_bad)


def _read(
    place: str,
    given: Iterable[tuple[int, bytes | dict[str, Any]]],
    label: str,
    num_samples: int,
    num_turns: int,
    skip_bad: bool,
) -> Documents:
    """Return the first documents of what was opened, which is read to its end."""
    documents: list[Document] = []
    count = skipped = 0
    for number, entry in given:
        try:
            document = _parse(entry, number, f"line {number} of {place}", num_turns)
        except BadLine:
            if not skip_bad:
                raise
            skipped += 1
            continue
        count += 1
        if count <= num_samples:
            documents.append(document)
    if not documents:
        raise ValueError(
            f"task.source must hold at least one document with {num_turns} questions, found none in"
            f" {place}."
        )
    return Documents(tuple(documents), count, skipped, label)


def _parse(entry: bytes | dict[str, Any], number: int, location: str, num_turns: int) -> Document:
    """Return one line's document.

    Raises:
        BadLine: If it is not as described; the message begins with ``location``.
    """

    def bad(requirement: str, value: object) -> BadLine:
        return BadLine(
            f"{location} must be a JSON object with context and multi_turns, as SCBench has them:"
            f" {requirement}, got {json.dumps(value, default=str)[:60]};"
            " task.skip_bad=true leaves such lines out."
        )

    values = columns_of(entry, location, bad)
    name = "input" if "input" in values and "context" not in values else "context"
    context = _text(values.get(name), name, bad)
    turns = values.get("multi_turns")
    if not isinstance(turns, list) or len(turns) < num_turns:
        raise bad(f"multi_turns must list at least task.num_turns={num_turns} questions", turns)
    read = [_turn(turn, f"multi_turns[{place}]", bad) for place, turn in enumerate(turns)]
    return Document(name=f"line-{number}", context=context, turns=tuple(read[:num_turns]))


def _turn(turn: object, name: str, bad: Callable[[str, object], BadLine]) -> Turn:
    if not isinstance(turn, Mapping):
        raise bad(f"{name} must be an object with input and answer", turn)
    if turn.get("options"):
        raise bad(f"{name} must ask for a text, as choices are not supported", turn["options"])
    question = _text(turn.get("input"), f"{name}.input", bad)
    given = turn.get("answer")
    listed = given if isinstance(given, list) else [given]
    if not listed:
        raise bad(f"{name}.answer must not be empty", given)
    answers = tuple(
        _text(
            str(one) if isinstance(one, int | float) and not isinstance(one, bool) else one,
            f"{name}.answer",
            bad,
        ).strip()
        for one in listed
    )
    blank = "" if question[-1].isspace() else " "
    return Turn(
        question=f"\n\n{question}",
        answer_prefix="",
        reference=blank + ", ".join(answers),
        answers=answers,
    )


def _text(value: object, name: str, bad: Callable[[str, object], BadLine]) -> str:
    if not isinstance(value, str) or is_invisible(value):
        raise bad(f"{name} must be a text and not empty", value)
    if SURROGATE.search(value):  # JSON allows lone surrogates, but tokenizers do not
        raise bad(f"{name} must be Unicode without lone surrogates", value)
    return value
