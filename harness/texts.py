"""Calibration texts from files: Python's own documentation, or files that the user names."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

from topkbench.methods.base import check_list, check_whole
from topkbench.models.encoding import encode
from topkbench.models.load import LoadedModel


@cache
def python_topics(half: Literal["first", "second"]) -> str:
    """Return half of the topics of Python's own documentation, as ``help()`` shows them.

    Methods are fitted on the first half; haystacks and test texts use the second. Topics are sorted
    by name and not divided: those that begin before half of all characters are the first half.
    """
    ordered = [topics[name] for name in sorted(topics)]
    half_length = sum(map(len, ordered)) / 2
    position, halves = 0, {"first": "", "second": ""}
    for text in ordered:
        halves["first" if position < half_length else "second"] += text
        position += len(text)
    return halves[half]


@cache
def python_prose(half: Literal["first", "second"]) -> str:
    """Return the paragraphs of prose in a half of the topics, once each, one paragraph a line.

    Left out are code, lists, headings and grammar: paragraphs with an indented line, of fewer than
    12 words, or that do not end with a full stop.
    """
    found: dict[str, None] = {}
    for paragraph in re.split(r"\n\s*\n", python_topics(half)):
        words = paragraph.split()
        indented = any(line[:1].isspace() for line in paragraph.split("\n"))
        if not indented and len(words) >= 12 and words[-1].endswith("."):
            found[" ".join(words)] = None
    return "\n".join(found)


@dataclass(kw_only=True)
class TextFiles:
    """Calibration texts from files; by default the first half of Python's documentation topics.

    The files are read as UTF-8 and joined, and texts are taken from them at even distances; if
    there are fewer tokens than requested, neighbouring texts overlap.

    Attributes:
        files: Paths; None for Python's documentation topics.
        num_sequences: Number of texts.
        max_length: Tokens per text, at most; no more than the model's window.
    """

    files: Sequence[str] | None = None
    num_sequences: int = 14
    max_length: int = 4096

    name = "text"
    seed = None

    def __post_init__(self) -> None:
        check_whole("calibration.num_sequences", self.num_sequences)
        check_whole("calibration.max_length", self.max_length, least=2)
        if self.files is not None:
            check_list("calibration.files", self.files)
            for file in self.files:
                if not Path(file).is_file():
                    raise ValueError(f"calibration.files must be files, found none at {file!r}.")

    def sequences(self, loaded: LoadedModel, length: int, count: int) -> list[list[int]]:
        """Return the token ids of ``count`` texts of at most ``length`` tokens each.

        Raises:
            ValueError: If a file cannot be read, or the files contain fewer than 2 tokens.
        """
        ids = encode(loaded.tokenizer, self._text())
        if len(ids) < 2:
            raise ValueError(
                f"calibration.files must hold a text, got {len(ids)} tokens in {self.files}."
            )
        last = max(0, len(ids) - length)
        starts = [round(last * index / max(1, count - 1)) for index in range(count)]
        return [ids[start : start + length] for start in starts]

    def describe(self, length: int, count: int) -> str:
        """Return a description of the texts, with a digest of their content."""
        text = self._text()
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        source = "Python's documentation topics, first half"
        if self.files is not None:
            source = ", ".join(Path(file).name for file in self.files)
        return f"{count} texts of at most {length} tokens of {source} ({digest})"

    def _text(self) -> str:
        if self.files is None:
            return python_topics("first")
        try:
            return "\n".join(Path(file).read_text(encoding="utf-8") for file in self.files)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"calibration.files must be readable texts in UTF-8: {error}."
            ) from None
