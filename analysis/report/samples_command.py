"""``topkbench samples RESULTS``: questions and answers side by side on the terminal."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence

import pandas as pd

from topkbench.analysis import style
from topkbench.analysis.comparison.configurations import compare
from topkbench.analysis.console import console, say, say_error
from topkbench.analysis.record.row import Status
from topkbench.analysis.record.store import RecordError
from topkbench.analysis.report.build import load
from topkbench.analysis.report.samples import Answer, Kind, Only, Prompt, chosen, prompts

_QUESTION_CHARACTERS = 400
"""Characters of a question's end that are printed; the web page shows more."""

WHAT: dict[Only, str] = {
    "wrong": " where full attention is right and a method is wrong",
    "lost": " with an answer that scores lower than full attention's",
}
"""What prompts have of which some answers alone are asked for."""

Mark = Callable[[Kind, str], str]


def in_words(kind: Kind, text: str) -> str:
    """Mark a part of an answer where there are no colours, as ``wdiff`` does."""
    return {"same": text, "missing": f"[-{text}-]", "other": f"{{+{text}+}}"}[kind]


def in_colour(kind: Kind, text: str) -> str:
    """Mark a part of an answer for a terminal: what is missing struck out, what is other bold."""
    return {
        "same": text,
        "missing": f"\x1b[31;9m{text}\x1b[0m",
        "other": f"\x1b[32;1m{text}\x1b[0m",
    }[kind]


def text_of(prompt: Prompt, mark: Mark = in_words) -> str:
    """Return a prompt and its answers as text.

    Args:
        prompt: The prompt.
        mark: Marks the parts of an answer that differ from full attention's.
    """
    seed = "" if prompt.seed is None else f", seed {prompt.seed}"
    lines = [f"{prompt.subtask} / {prompt.sample_id}{seed}   ({prompt.setting})"]
    question = prompt.question
    if question is not None and len(question) > _QUESTION_CHARACTERS:
        left = len(question) - _QUESTION_CHARACTERS
        question = f"[{left:,} more characters…] {question[-_QUESTION_CHARACTERS:]}"
    lines += _field("question", "not recorded" if question is None else question)
    lines += _field("references", " | ".join(prompt.references) or "not recorded")
    if prompt.full is None:
        lines += _field("full attention", "not among these results")
    else:
        lines += _field(prompt.full.name, _with_score(prompt.full, prompt.full.text, ""))
    for answer in prompt.answers:
        text = "".join(itertools.starmap(mark, answer.parts)) if answer.parts else answer.text
        word = "  lost" if prompt.is_lost(answer) else ""
        if prompt.is_same(answer):
            text = "the same"
        lines += _field(answer.name, _with_score(answer, text, word))
    return "\n".join(lines)


def _with_score(answer: Answer, text: str, word: str) -> str:
    return f"{round(answer.score, 1):g}{word}  {text or '(empty)'}"


def _field(name: str, text: str) -> list[str]:
    """Return a named text as lines that are indented, so that none looks like another field."""
    first, *others = text.split("\n")
    return [f"  {name}: {first}", *(f"      {line}" for line in others)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the answers that the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="topkbench samples",
        description="Show each prompt's question and references, full attention's answer and each"
        " method's, with the score (0 to 100) and what differs from full attention's answer marked:"
        " [-missing-] and {+other+}, on a terminal in colours.",
    )
    parser.add_argument("results", metavar="RESULTS", help="sweep folder or rows file")
    parser.add_argument("--method", metavar="M", help="this method alone, such as hata")
    parser.add_argument("--subtask", metavar="S", help="this sub-task alone, such as niah_single")
    parser.add_argument("--id", metavar="ID", help="the prompt of this sample_id alone")
    parser.add_argument(
        "--only",
        choices=list(WHAT),
        help="wrong: answers of less than 100 where full attention's scores 100;"
        " lost: answers that score lower than full attention's",
    )
    parser.add_argument(
        "--limit", metavar="N", type=int, default=20, help="at most N prompts (default: 20)"
    )
    options = parser.parse_args(arguments)
    with console():
        return _show(options)


def _show(options: argparse.Namespace) -> int:
    """Print the prompts; return the exit status."""
    if options.limit < 1:
        say_error(f"--limit must be at least 1, got {options.limit}.")
        return 2
    try:
        rows, samples = load(options.results)
    except RecordError as error:
        say_error(error)
        return 2
    with style.recorded(rows):
        # Without samples nothing is resampled for intervals, which are not shown here.
        every = prompts(compare(rows), samples)
    unfinished = _unfinished(rows)
    if not every:
        reason = f": {unfinished}" if unfinished else ""
        say_error(f"{options.results} must hold answers in words, but holds none{reason}.")
        return 2
    wanted = [
        ("method", options.method, {one.method for prompt in every for one in prompt.answers}),
        ("subtask", options.subtask, {prompt.subtask for prompt in every}),
        ("id", options.id, {prompt.sample_id for prompt in every}),
    ]
    for name, given, known in wanted:
        if given is not None and given not in known:
            few = ", ".join(sorted(known)[:20]) + (", …" if len(known) > 20 else "")
            say_error(f"--{name} must be one of {few}, got {given!r}.")
            return 2
    found = list(chosen(every, options.method, options.subtask, options.id, options.only))
    mark = in_colour if sys.stdout.isatty() else in_words
    for prompt in found[: options.limit]:
        say(f"{text_of(prompt, mark)}\n", is_visible=True)
    shown = min(len(found), options.limit)
    what = WHAT.get(options.only, "")
    more = "; --limit=N shows more" if shown < len(found) else ""
    say(f"{shown} of {len(found)} prompts{what}{more}.")
    if unfinished:
        say(f"These results are incomplete: {unfinished}.")
    return 0


def _unfinished(rows: pd.DataFrame) -> str:
    """Return in words how many cells have no answers yet; nothing if all have finished."""
    is_unfinished = rows["status"].eq(Status.INTERRUPTED.value)
    number = rows.loc[is_unfinished, "run_id"].nunique()
    return f"{number} of {rows['run_id'].nunique()} cells have not finished" if number else ""
