"""RULER's prompts: ours of an official sample's draws are that sample, byte for byte."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from topkbench.tasks.ruler_data import Essay
from topkbench.tasks.ruler_files import read_official
from topkbench.tasks.ruler_prompts import (
    COMMON,
    DEPTHS,
    DOCUMENTS,
    FREQUENT,
    MANY_VALUES,
    NOISE,
    ONE_VALUE,
    VARIABLES,
    FrequentWords,
    Prompt,
    between_lines,
    between_sentences,
    chain,
    common_words,
    documents,
    needle,
)

OFFICIAL = Path(__file__).parent / "ruler_official"
"""One sample of each sub-task, as NVIDIA's generator wrote them (commit c3f5e3b) for 2,048 tokens.

The essay and the documents were given to it: prose of Python's documentation, and two questions.
"""
NEEDLE = re.compile(r"One of the special magic (\w+)s for ([\w-]+) is: ([\w-]+)\.")


def official(subtask: str) -> tuple[str, list[str]]:
    """Return an official sample's text, with its answer prefix, and its references."""
    line = json.loads((OFFICIAL / f"{subtask}.jsonl").read_text(encoding="utf-8"))
    return line["input"] + line["answer_prefix"], line["outputs"]


def niah_in_lines(text: str, answers: list[str]) -> Prompt:
    """Written anew from its lines, needles and their places."""
    value, query = re.findall(r"the special magic (\w+?)s? for (.+?) mentioned", text)[0]
    lines = text.split("\n")[1:-1]
    places = [place for place, line in enumerate(lines) if f" {query} is: " in line]
    needles = [needle(value, query, answer) for answer in answers]
    for place in reversed(places):
        del lines[place]
    places = [place - before for before, place in enumerate(places)]
    haystack = between_lines(lines, needles, places)
    return ONE_VALUE.around(haystack, answers, value=value, query=query)


def niah_in_essay(text: str, answers: list[str]) -> Prompt:
    """Written anew from its essay, needles and their depths, of which each is one of RULER's."""
    value, query = re.findall(r"the special magic (\w+?)s? for (.+?) mentioned", text)[0]
    body = text.split("\n")[1]
    needles = [needle(*found) for found in NEEDLE.findall(body)]
    parts = [part.strip(" ") for part in NEEDLE.sub("\n", body).split("\n")]
    essay = Essay("test", " ".join(part for part in parts if part))
    sentences = essay.sentences(len(essay.words))
    assert len(sentences) > 20
    depths, so_far = [], ""
    for part in parts[:-1]:
        so_far = f"{so_far} {part}".strip(" ")
        (before,) = [n for n in range(len(sentences) + 1) if " ".join(sentences[:n]) == so_far]
        depths.append(next(one for one in DEPTHS if int(len(sentences) * (one / 100)) == before))
    wording = ONE_VALUE if len(answers) == 1 else MANY_VALUES
    haystack = between_sentences(sentences, needles, depths)
    return wording.around(haystack, answers, value=value, query=query)


def variable_tracking(text: str, answers: list[str]) -> Prompt:
    """Written anew from names, values and places of the example and of the sample."""
    parts = []
    for part in text.split(VARIABLES.before)[1:]:
        lines, after = part.split("\nQuestion: ")[0].split("\n"), part.split("\nQuestion: ")[1]
        places = [place for place, line in enumerate(lines) if line.startswith("VAR ")]
        names = [lines[place].split()[1] for place in places]
        value = lines[places[0]].split()[-1]
        places = [place - before for before, place in enumerate(places)]
        noise = [line for line in lines if not line.startswith("VAR ")]
        assert set(noise) == {NOISE}
        haystack = between_lines(noise, chain(names, value), places)
        parts.append(VARIABLES.around(haystack, names, value=value, count=len(names)))
        if len(parts) == 1:
            assert after.split(": ")[-1].split() == names
    example, prompt = parts
    assert prompt.answers == tuple(answers)
    return Prompt(
        context=f"{example.text} {' '.join(example.answers)}\n\n{prompt.context}",
        question=prompt.question,
        answer_prefix=prompt.answer_prefix,
        answers=prompt.answers,
    )


def common(text: str, answers: list[str]) -> Prompt:
    """Written anew from the two lists and the example's solution."""
    example, words = [
        re.findall(r"\d+\. (\S+)", part.split("\nQuestion")[0])
        for part in text.split(COMMON.before)[1:]
    ]
    solution = re.findall(r"\d+\. (\S+)", text.split(COMMON.answer_prefix)[1].split("\n")[0])
    assert len(solution) == len(answers) == 10
    return COMMON.around(common_words(example, solution, words), answers)


def frequent(text: str, answers: list[str]) -> Prompt:
    return FREQUENT.around(text[len(FREQUENT.before) :].split("\nQuestion")[0], answers)


def question(text: str, answers: list[str]) -> Prompt:
    body = text[len(DOCUMENTS.before) :].rsplit("\n\nAnswer the question", 1)[0]
    texts = re.split(r"\n\nDocument \d+:\n", "\n\n" + body)[1:]
    query = text.rsplit("\nQuestion: ", 1)[1].removesuffix(DOCUMENTS.answer_prefix)
    assert len(texts) > 3
    return DOCUMENTS.around(documents(texts), answers, query=query)


WRITTEN_ANEW: dict[str, Callable[[str, list[str]], Prompt]] = {
    "niah_single_1": niah_in_lines,
    "niah_single_2": niah_in_essay,
    "niah_single_3": niah_in_essay,
    "niah_multikey_1": niah_in_essay,
    "niah_multikey_2": niah_in_lines,
    "niah_multikey_3": niah_in_lines,
    "niah_multivalue": niah_in_essay,
    "niah_multiquery": niah_in_essay,
    "vt": variable_tracking,
    "cwe": common,
    "fwe": frequent,
    "qa_1": question,
    "qa_2": question,
}


@pytest.mark.parametrize("subtask", WRITTEN_ANEW)
def test_an_official_samples_draws_give_its_text(subtask: str) -> None:
    text, answers = official(subtask)
    prompt = WRITTEN_ANEW[subtask](text, answers)
    assert prompt.text == text
    # The question is split off as in prompts that are read from RULER's files.
    (read,) = read_official(str(OFFICIAL / f"{subtask}.jsonl"), 1, "sparse").samples
    assert (prompt.context, prompt.question) == (read.context, read.question)
    assert (prompt.answer_prefix, prompt.answers) == (read.answer_prefix, read.answers)


def test_an_official_samples_frequencies_are_ours() -> None:
    text, answers = official("fwe")
    words = text[len(FREQUENT.before) :].split("\nQuestion")[0].split()
    counts = Counter(words)
    found = [count for _, count in counts.most_common()]
    assert counts.most_common(1)[0][0] == "..."
    assert [word for word, _ in counts.most_common(4)[1:]] == answers
    drawn = []
    for size in range(len(words), 2 * len(words)):
        prompt = FrequentWords(limit=2048 - 50).draw(random.Random(0), size, 0)
        ours = Counter(prompt.context[len(FREQUENT.before) :].split())
        drawn.append([count for _, count in ours.most_common()])
    assert found in drawn
