"""Answers side by side: full attention's and each method's to one prompt, what differs marked."""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from topkbench.analysis.comparison.configurations import Comparison
from topkbench.analysis.console import visible
from topkbench.analysis.record.kept_file import read_kept_file
from topkbench.analysis.record.store import CellStore, Sweep, kept_of
from topkbench.analysis.tables.table import setting

MOST_CHARACTERS = 4_000
"""Characters of a text that are shown; how many are left out is said in their place."""

MOST_STEPS = 1_500_000
"""Steps, of about 0.1 microseconds, in which the words of two answers are compared one by one."""

Only = Literal["wrong", "lost"]
"""Which answers are asked for: where full attention is right and the method is wrong (right: a
score of 100; wrong: less), or all that score lower than full attention's."""

Kind = Literal["same", "missing", "other"]
"""What part of an answer is: as in full attention's answer, only in that one, only in this one."""


@dataclass(frozen=True)
class Answer:
    """One configuration's answer to a prompt.

    Attributes:
        label: The configuration's name in tables.
        method: Name of the method.
        k: Its budget, and
        rbit: its hash bits; None if it has none.
        run_id: The cell.
        score: 0 to 100.
        text: The answer, long ones cut, control characters as escapes.
        parts: The answer as pieces of text that are the same as, missing from, or other than full
            attention's answer; empty for full attention's own, and where that is not known.
    """

    label: str
    method: str
    k: int | None
    rbit: int | None
    run_id: str
    score: float
    text: str
    parts: tuple[tuple[Kind, str], ...] = ()

    @property
    def name(self) -> str:
        """The label with budget and hash bits."""
        numbers = [f"{name}={value}" for name, value in (("k", self.k), ("rbit", self.rbit))]
        shown = [one for one in numbers if not one.endswith("None")]
        return ", ".join([in_one_line(self.label), *shown])


@dataclass(frozen=True)
class Prompt:
    """One prompt with all answers to it.

    Attributes:
        setting: Model, task, length and whatever else all answers share, in words.
        seed: The seed of the prompts; None if it was not recorded.
        subtask: The sub-task.
        sample_id: The prompt's name within the sub-task and seed.
        question: The question, long ones without their beginning; None if it was not recorded.
        references: What a correct answer contains.
        full: Full attention's answer; None if it is not among the results.
        answers: Those of the other configurations, in the order of tables.
    """

    setting: str
    seed: int | None
    subtask: str
    sample_id: str
    question: str | None
    references: tuple[str, ...]
    full: Answer | None
    answers: tuple[Answer, ...]

    def is_same(self, answer: Answer) -> bool:
        """Return whether an answer of this prompt is full attention's to the last character."""
        return self.full is not None and all(kind == "same" for kind, _ in answer.parts)

    def is_lost(self, answer: Answer) -> bool:
        """Return whether full attention's answer scores higher than one of this prompt."""
        return self.full is not None and answer.score < self.full.score

    def is_wrong(self, answer: Answer) -> bool:
        """Return whether full attention is right, at a score of 100, and one of these is not."""
        return self.full is not None and answer.score < self.full.score == 100

    def counts(self, answer: Answer, only: Only | None) -> bool:
        """Return whether an answer of this prompt is among those that are asked for."""
        tests = {"wrong": self.is_wrong, "lost": self.is_lost}
        return only is None or tests[only](answer)

    @property
    def differs(self) -> bool:
        """Whether some answer is another one than full attention's."""
        return self.full is not None and not all(map(self.is_same, self.answers))


def prompts(compared: Comparison, samples: pd.DataFrame) -> list[Prompt]:
    """Return the prompts with their answers, by setting, seed and sub-task.

    Args:
        compared: The configurations, which name the cells.
        samples: What `build.load` returned; samples without an answer in words are left out.
    """
    if "prediction" not in samples:
        return []
    known = samples[samples["prediction"].notna() & samples["score"].notna()]
    of_cell: dict[str, list[dict[str, Any]]] = {
        str(cell): part.to_dict("records")  # type: ignore[misc]
        for cell, part in known.groupby("run_id")
    }
    seeds = compared.rows.drop_duplicates("run_id").set_index("run_id")["seed"].to_dict()
    found: list[Prompt] = []
    for key, configurations in compared.by_setting():
        top = configurations[configurations.index.isin(compared.overall.index)]
        given: dict[tuple[Any, str, str], list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
        named: list[dict[str, Any]] = top.to_dict("records")  # type: ignore[assignment]
        for configuration in named:
            for cell in configuration["run_ids"]:
                seed = seeds.get(cell)
                seed = None if pd.isna(seed) else int(seed)
                for sample in of_cell.get(cell, ()):
                    name = (seed, str(sample["subtask"]), str(sample["sample_id"]))
                    given.setdefault(name, []).append((configuration, sample))
        for (seed, subtask, sample_id), answers in given.items():
            found.append(_prompt(in_one_line(setting(key)), seed, subtask, sample_id, answers))
    return found


def _prompt(
    words: str,
    seed: int | None,
    subtask: str,
    sample_id: str,
    given: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> Prompt:
    """Return a prompt from each configuration's sample of it."""
    full = next((one for one in given if one[0]["method"] == "full"), None)
    baseline = None if full is None else str(full[1]["prediction"])
    answers = [_answer(*one, baseline) for one in given if one[0]["method"] != "full"]
    questions = [one.get("question_text") for _, one in given]
    references = given[0][1].get("references")
    return Prompt(
        words,
        seed,
        in_one_line(subtask),
        in_one_line(sample_id),
        next((end_of(one) for one in questions if isinstance(one, str)), None),
        tuple(beginning_of(str(one)) for one in references)
        if isinstance(references, list | tuple)
        else (),
        None if full is None else _answer(*full),
        tuple(answers),
    )


def _answer(
    configuration: Mapping[str, Any], sample: Mapping[str, Any], baseline: str | None = None
) -> Answer:
    text = str(sample["prediction"])
    k, rbit = (configuration[name] for name in ("k", "rbit"))
    return Answer(
        str(configuration["label"]),
        str(configuration["method"]),
        None if pd.isna(k) else int(k),
        None if pd.isna(rbit) else int(rbit),
        str(sample["run_id"]),
        float(sample["score"]),
        beginning_of(text),
        () if baseline is None else marked(baseline, text),
    )


def in_one_line(name: str) -> str:
    """Return a name to show: control characters and line breaks as escapes."""
    return visible(name).replace("\n", "\\n")


def beginning_of(text: str) -> str:
    """Return a text to show: its beginning if it is long, control characters as escapes."""
    left = len(text) - MOST_CHARACTERS
    return visible(text) if left <= 0 else f"{visible(text[:-left])} […{left:,} more characters]"


def end_of(text: str) -> str:
    """Return a text to show: its end if it is long, control characters as escapes."""
    left = len(text) - MOST_CHARACTERS
    return visible(text) if left <= 0 else f"[{left:,} more characters…] {visible(text[left:])}"


def marked(full: str, text: str) -> tuple[tuple[Kind, str], ...]:
    """Return what is shown of a text, as pieces that are in full attention's answer or not.

    Where two texts differ only in what is not shown of them, the last piece says so.
    """
    shown = beginning_of(full), beginning_of(text)
    parts = differences(*shown)
    if full == text or shown[0] != shown[1]:
        return parts
    is_late = full[:MOST_CHARACTERS] == text[:MOST_CHARACTERS]
    where = f"after {MOST_CHARACTERS:,} characters" if is_late else "in control characters"
    return (*parts, ("other", f" [differs {where}]"))


class _Matcher(difflib.SequenceMatcher[str]):
    """Finds what two lists of words have in common in about ``MOST_STEPS`` steps.

    A step looks at a word, or at a pair of equal words. Repeated words make so many pairs that to
    find all matches could take minutes. When the steps are used up, only the beginnings and ends of
    what is left are compared.
    """

    steps_left = MOST_STEPS
    a: Sequence[str]
    b: Sequence[str]
    b2j: dict[str, list[int]]

    def find_longest_match(
        self, alo: int = 0, ahi: int | None = None, blo: int = 0, bhi: int | None = None
    ) -> difflib.Match:
        """Return the longest match of two ranges, or that of their beginnings or ends."""
        one, other = self.a[alo:ahi], self.b[blo:bhi]
        self.steps_left -= sum(1 + len(self.b2j.get(word, ())) for word in one)
        if self.steps_left >= 0:
            return super().find_longest_match(alo, ahi, blo, bhi)
        if size := _in_common(one, other):
            return difflib.Match(alo, blo, size)
        size = _in_common(one[::-1], other[::-1])
        return difflib.Match(alo + len(one) - size, blo + len(other) - size, size)


def _in_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many words two lists have in common at their beginning."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


@functools.lru_cache(maxsize=4096)  # many methods give the same answer
def differences(full: str, text: str) -> tuple[tuple[Kind, str], ...]:
    """Return a text as pieces that are in full attention's answer, or only in one of the two.

    Whole words, runs of blanks and single signs are compared; if that takes too many steps, words
    and signs together with the blanks after them, as there are far fewer pairs of these.
    """
    for pattern in (r"\s+|\w+|[^\w\s]", r"\s+|\w+\s*|[^\w\s]\s*"):
        one, other = (re.findall(pattern, each) for each in (full, text))
        matcher = _Matcher(None, one, other, autojunk=False)
        opcodes = matcher.get_opcodes()
        if matcher.steps_left >= 0:
            break
    changes: list[tuple[bool, str, str]] = []
    for kind, i, j, m, n in opcodes:
        pieces = "".join(one[i:j]), "".join(other[m:n])
        # Blanks between two changed words belong to the change.
        is_same = kind == "equal" and not (changes and i and j < len(one) and pieces[0].isspace())
        if changes and not is_same and not changes[-1][0]:
            _, missing, added = changes.pop()
            pieces = missing + pieces[0], added + pieces[1]
        changes.append((is_same, *pieces))
    parts: list[tuple[Kind, str]] = []
    for is_same, missing, added in changes:
        if is_same:
            parts.append(("same", added))
            continue
        parts += [("missing", missing)] if missing else []
        parts += [("other", added)] if added else []
    return tuple(parts)


def chosen(
    given: Sequence[Prompt],
    method: str | None = None,
    subtask: str | None = None,
    sample_id: str | None = None,
    only: Only | None = None,
) -> Iterator[Prompt]:
    """Yield the prompts, with the answers, that are asked for.

    Args:
        given: All prompts.
        method: Name of the only method beside full attention.
        subtask: Name of the only sub-task.
        sample_id: Name of the only prompt.
        only: The only answers beside full attention's; None for all.
    """
    for prompt in given:
        if subtask not in (None, prompt.subtask) or sample_id not in (None, prompt.sample_id):
            continue
        answers = tuple(
            one
            for one in prompt.answers
            if method in (None, one.method) and prompt.counts(one, only)
        )
        if answers or not (only or prompt.answers):
            yield replace(prompt, answers=answers)


def load_kept(path: str | Path) -> pd.DataFrame:
    """Return which tokens the heads kept, of what `build.load` reads; empty if nothing did.

    Args:
        path: As in `build.load`.

    Raises:
        RecordError: If a file of them is damaged.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if (folder / "cells.json").is_file() and (sweep := Sweep.open(folder)).store.folder.is_dir():
        return kept_of(sweep.cells())
    if (folder / "cells").is_dir():
        return kept_of(CellStore(folder).cells())
    return read_kept_file(folder / "kept.parquet")
