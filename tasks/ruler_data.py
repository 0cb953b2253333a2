"""The texts that RULER's prompts are made of besides its own: essays, SQuAD, HotpotQA, a word list.

Each is a file that the user names, or a data set of the hub; only an essay has a default.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nltk.tokenize.punkt import PunktSentenceTokenizer

from topkbench.harness.texts import python_prose
from topkbench.tasks.hub import PREFIX, hub_rows, parse_hub
from topkbench.tasks.words import all_listed_words

T = TypeVar("T")


@dataclass(frozen=True)
class Essay:
    """A text in which needles are hidden.

    Attributes:
        name: Where it comes from.
        text: The text, its words separated by single spaces.
    """

    name: str
    text: str

    @functools.cached_property
    def label(self) -> str:
        """Name and digest."""
        return f"{self.name} {digest(self.text)}"

    @functools.cached_property
    def words(self) -> list[str]:
        """Its words."""
        return self.text.split(" ")

    def sentences(self, num_words: int) -> list[str]:
        """Return the sentences of the first words; a shorter text is repeated."""
        if num_words not in self._split:
            times = -(-num_words // len(self.words))
            text = " ".join((self.words * times)[:num_words])
            self._split[num_words] = list(self._splitter.tokenize(text))
        return self._split[num_words]

    @functools.cached_property
    def _split(self) -> dict[int, list[str]]:
        """The sentences of the numbers of words that were asked for: all samples ask for few."""
        return {}

    @functools.cached_property
    def _splitter(self) -> PunktSentenceTokenizer:
        # It learns the abbreviations of this text; NLTK's model of English would be a download.
        return PunktSentenceTokenizer(self.text)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about documents.

    Attributes:
        query: The question.
        answers: The answers that count.
        gold: Numbers of the documents that belong to it.
        related: Numbers of the other documents of the same article.
    """

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """Questions and the documents that they are asked about.

    Attributes:
        name: Where they come from.
        questions: The questions, in the order of the data set.
        documents: The distinct documents, sorted.
    """

    name: str
    questions: list[Question]
    documents: list[str]

    @functools.cached_property
    def label(self) -> str:
        """Name and digest."""
        content = [[one.query, *one.answers] for one in self.questions]
        return f"{self.name} {digest(json.dumps([content, self.documents]))}"


def digest(text: str) -> str:
    """Return 8 hex digits of a text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_essay(value: str | None) -> Essay:
    """Return the essay that ``task.haystack`` names.

    Args:
        value: A file of text; RULER's ``PaulGrahamEssays.json``; a data set of the hub with a
            column ``text``; None for the prose in the second half of Python's documentation topics,
            on whose first half methods may be fitted.

    Raises:
        ValueError: If it cannot be read, or holds no word.
    """
    return _read_essay(value, None if value is None else _state(value))


# All that is read is read once by a process, since each cell of a sweep has a task of its own.
@functools.lru_cache(maxsize=4)
def _read_essay(value: str | None, state: tuple[int, int] | None) -> Essay:
    setting = "task.haystack"
    if value is None:
        return Essay("Python's documentation", _spaced(python_prose("second")))
    if value.startswith(PREFIX):
        dataset = parse_hub(setting, value)
        rows = hub_rows(setting, dataset, ("train",))
        name = str(dataset)
        text = _checked(setting, value, lambda: " ".join(_text(row["text"]) for row in rows))
    else:
        name, text = Path(value).name, _read(setting, value)
        if name.endswith((".json", ".jsonl")):
            text = _field(setting, value, text, lambda content: _text(content["text"]))
    if not text.split():
        raise ValueError(f"{setting} must hold a text, found no word in {value}.")
    return Essay(name, _spaced(text))


def read_squad(value: str) -> QuestionSet:
    """Return the answerable questions of SQuAD 2.0 (arXiv:1806.03822) that ``task.squad`` names.

    Args:
        value: The file ``dev-v2.0.json``, or a data set of the hub such as ``rajpurkar/squad_v2``.

    Raises:
        ValueError: If it cannot be read, or is not as described.
    """
    return _read_questions("task.squad", value, _state(value), _squad_of_hub, _squad_of_file)


def _squad_of_file(name: str, content: Any) -> QuestionSet:
    articles = [
        [
            (
                paragraph["context"],
                one["question"],
                [] if one["is_impossible"] else [answer["text"] for answer in one["answers"]],
            )
            for paragraph in article["paragraphs"]
            for one in paragraph["qas"]
        ]
        for article in content["data"]
    ]
    return _squad(name, articles)


def _squad_of_hub(name: str, rows: Any) -> QuestionSet:
    """Return SQuAD's questions from the hub's form: each has its paragraph and article's title."""
    articles: dict[str, list[tuple[str, str, list[str]]]] = {}
    for row in rows:
        entry = (row["context"], row["question"], list(row["answers"]["text"]))
        articles.setdefault(row["title"], []).append(entry)
    return _squad(name, list(articles.values()))


def _squad(name: str, articles: Sequence[Sequence[tuple[str, str, list[str]]]]) -> QuestionSet:
    """Return SQuAD's questions from its articles: paragraph, question and answers of each."""
    documents = sorted({_text(paragraph) for article in articles for paragraph, _, _ in article})
    number = {text: place for place, text in enumerate(documents)}
    questions = []
    for article in articles:
        of_article = list(dict.fromkeys(number[paragraph] for paragraph, _, _ in article))
        for paragraph, query, answers in article:
            if answers:  # a question without is one that the paragraph does not answer
                gold = number[paragraph]
                related = tuple(place for place in of_article if place != gold)
                questions.append(
                    Question(
                        query=_text(query),
                        answers=tuple(map(_text, answers)),
                        gold=(gold,),
                        related=related,
                    )
                )
    return QuestionSet(name, questions, documents)


def read_hotpotqa(value: str) -> QuestionSet:
    """Return the questions of HotpotQA (arXiv:1809.09600) that ``task.hotpotqa`` names.

    Args:
        value: The file ``hotpot_dev_distractor_v1.json``, or a data set of the hub such as
            ``hotpotqa/hotpot_qa/distractor``.

    Raises:
        ValueError: If it cannot be read, or is not as described.
    """
    return _read_questions(
        "task.hotpotqa", value, _state(value), _hotpotqa_of_hub, _hotpotqa_of_file
    )


def _hotpotqa_of_file(name: str, content: Any) -> QuestionSet:
    return _hotpotqa(name, [(row, row["context"]) for row in content])


def _hotpotqa_of_hub(name: str, rows: Any) -> QuestionSet:
    pairs = [
        (row, zip(row["context"]["title"], row["context"]["sentences"], strict=True))
        for row in rows
    ]
    return _hotpotqa(name, pairs)


def _hotpotqa(name: str, rows: Sequence[tuple[dict[str, Any], Any]]) -> QuestionSet:
    """Return HotpotQA's questions from rows and their paragraphs' titles and sentences."""
    texts = [
        (row, [_text(f"{title}\n{''.join(sentences)}") for title, sentences in paragraphs])
        for row, paragraphs in rows
    ]
    documents = sorted({one for _, paragraphs in texts for one in paragraphs})
    number = {text: place for place, text in enumerate(documents)}
    questions = [
        Question(
            query=_text(row["question"]),
            answers=(_text(row["answer"]),),
            gold=tuple(number[one] for one in paragraphs),
        )
        for row, paragraphs in texts
    ]
    return QuestionSet(name, questions, documents)


@functools.lru_cache(maxsize=4)
def _read_questions(
    setting: str,
    value: str,
    state: tuple[int, int] | None,
    of_hub: Callable[[str, Any], QuestionSet],
    of_file: Callable[[str, Any], QuestionSet],
) -> QuestionSet:
    """Return the questions of a data set of the hub or of a file.

    Args:
        setting: The setting that names it, for messages.
        value: Its value.
        state: What `_state` returns of it.
        of_hub: Called with a name and the rows of the hub's data set.
        of_file: Called with a name and the content of a JSON file.
    """
    if value.startswith(PREFIX):
        dataset = parse_hub(setting, value)
        rows = hub_rows(setting, dataset, ("validation",))
        return _checked(setting, value, lambda: of_hub(str(dataset), rows))
    text = _read(setting, value)
    return _field(setting, value, text, lambda content: of_file(Path(value).name, content))


def read_english_words(value: str) -> tuple[str, ...]:
    """Return the words of RULER's ``english_words.json``, for lists longer than wonderwords'.

    Raises:
        ValueError: If the file cannot be read, or is not as described.
    """
    setting = "task.english_words"
    text = _read(setting, value)
    words = _field(
        setting, value, text, lambda content: tuple(dict.fromkeys(map(_text, content.values())))
    )
    if len(words) <= len(all_listed_words()):
        raise ValueError(
            f"{setting} must have more than the {len(all_listed_words()):,} words that cwe has"
            f" without it, but {value} has {len(words):,}."
        )
    return words


def _text(value: Any) -> str:
    """Return a value that must be a text with something in it.

    Raises:
        TypeError: If it is not.
        UnicodeEncodeError: If it has lone surrogates, which JSON allows and tokenizers do not.
    """
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"a text must not be empty, got {value!r}")
    value.encode()
    return value


def _spaced(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _state(value: str) -> tuple[int, int] | None:
    """Return time of the last change and size of a file, so that a changed one is read again."""
    try:
        found = Path(value).expanduser().stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _read(setting: str, value: str) -> str:
    try:
        text = Path(value).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{setting} must be a file that can be read as UTF-8, or hub:OWNER/NAME: {error}."
        ) from None
    if text.startswith("version https://git-lfs"):
        raise ValueError(
            f"{setting} must be the file itself, but {value} is what Git LFS keeps in its place;"
            " git lfs pull fetches it."
        )
    return text


def _field(setting: str, value: str, text: str, take: Callable[[Any], T]) -> T:
    """Return what ``take`` finds in a JSON text."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{setting} must be JSON, but {value} is not: {error}.") from None
    return _checked(setting, value, lambda: take(content))


def _checked(setting: str, value: str, take: Callable[[], T]) -> T:
    try:
        return take()
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{setting} must have the fields of the data set that it is for, but {value} has not:"
            f" {type(error).__name__} {error}."
        ) from None
