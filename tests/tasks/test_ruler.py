"""The ruler task: samples that are the same for all, and NVIDIA's own files."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from topkbench.models.load import LoadedModel
from topkbench.tasks.base import TaskDoesNotFit, samples_digest
from topkbench.tasks.decoding import tokenise
from topkbench.tasks.ruler import Ruler, read_official
from topkbench.tasks.ruler_prompts import SUBTASKS

MakeTask = Callable[..., Ruler]
CONTEXT = "Some special magic words are hidden.\nA magic word for cat is blue.\nWhat a day it was."
STEM = "\nWhat is the special magic word for cat mentioned in the provided text?"


@pytest.fixture
def make(tmp_path: Path) -> MakeTask:
    def make_task(**knobs: Any) -> Ruler:
        return Ruler(**{"length": 300, "num_samples": 1, "cache_dir": str(tmp_path), **knobs})

    return make_task


def test_a_sample_does_not_depend_on_how_many_there_are(
    loaded: LoadedModel, make: MakeTask
) -> None:
    few = make(num_samples=1).samples(loaded)
    more = make(num_samples=3).samples(loaded)
    assert [sample.subtask for sample in few] == list(SUBTASKS)
    assert [sample for sample in more if sample.sample_id.endswith("-0")] == few
    assert len({sample.sample_id for sample in more}) == 21
    alone = make(subtasks=("vt",), num_samples=2).samples(loaded)
    assert alone == [sample for sample in more if sample.subtask == "vt"][:2]


def test_seed_and_length_make_other_samples(loaded: LoadedModel, make: MakeTask) -> None:
    digests = {
        make(subtasks=("vt",), **knobs).inputs_digest(loaded)
        for knobs in ({}, {"seed": 1}, {"length": 310})
    }
    assert len(digests) == 3


def test_prompt_and_answer_fill_the_length_exactly_as_stated(
    loaded: LoadedModel, make: MakeTask
) -> None:
    for sample in make(length=512).samples(loaded):
        prompt = tokenise(loaded, sample, "sparse")
        used = len(prompt.prefill_ids) + len(prompt.decode_ids) + sample.max_new_tokens
        assert used == sample.length
        assert 400 < used <= 512
        dense = tokenise(loaded, sample, "dense")
        assert dense.prefill_ids == prompt.prefill_ids + prompt.decode_ids
        assert dense.decode_ids == ()


def test_a_model_that_ends_its_answers_gets_8_tokens_more(
    loaded: LoadedModel, make: MakeTask
) -> None:
    (sample,) = make(subtasks=("niah_single",)).samples(loaded)
    assert sample.max_new_tokens == 3 + 8  # two words, a full stop
    other = replace(loaded, short_answers=False)
    expected = {"niah_single": 128, "vt": 30, "cwe": 120, "fwe": 50}
    samples = make(length=1000, subtasks=tuple(expected)).samples(other)
    assert {one.subtask: one.max_new_tokens for one in samples} == expected
    # It was not trained on these prompts, so it is shown an example where RULER shows one.
    shown = {one.subtask for one in samples if one.context.count("\n\n")}
    assert shown == {"vt", "cwe"}


def test_values_are_two_tokens_so_that_one_is_decoded(loaded: LoadedModel, make: MakeTask) -> None:
    (sample,) = make(subtasks=("niah_single",)).samples(loaded)
    assert len(loaded.tokenizer.encode(f" {sample.answers[0]}", add_special_tokens=False)) == 2


def test_samples_are_read_from_the_cache(
    loaded: LoadedModel, make: MakeTask, tmp_path: Path
) -> None:
    task = make(subtasks=("cwe", "fwe"))
    made = task.samples(loaded)
    (path,) = (tmp_path / "samples").glob("*.jsonl")
    head, *lines = path.read_text().splitlines()
    assert json.loads(head)["samples"] == len(lines) == 2
    assert make(subtasks=("cwe", "fwe")).samples(loaded) == made
    assert samples_digest(made) == task.inputs_digest(loaded)


DAMAGES: dict[str, Callable[[list[str]], list[str]]] = {
    "half a line": lambda lines: ['{"sample_id": "vt'],
    "a sample less": lambda lines: lines[:-1],
    "half a sample less": lambda lines: [*lines[:-1], lines[-1][:-40]],
    "no samples": lambda lines: lines[:1],
    "nothing": lambda lines: [],
    "no head": lambda lines: lines[1:],
    "another answer": lambda lines: [
        lines[0],
        lines[1].replace('"answers": ["', '"answers": ["x'),
        *lines[2:],
    ],
    "another order": lambda lines: [lines[0], *reversed(lines[1:])],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_made_anew(
    loaded: LoadedModel, make: MakeTask, tmp_path: Path, damage: Callable[[list[str]], list[str]]
) -> None:
    task = make(subtasks=("vt",), num_samples=3, seed=11)
    made = task.samples(loaded)
    (path,) = (tmp_path / "samples").glob("*.jsonl")
    whole = path.read_text()
    # Elsewhere, since a process reads a file once.
    task = make(subtasks=("vt",), num_samples=3, seed=11, cache_dir=str(tmp_path / "other"))
    path = tmp_path / "other" / "samples" / path.name
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"{line}\n" for line in damage(whole.splitlines())))
    assert path.read_text() != whole
    assert task.samples(loaded) == made
    assert path.read_text() == whole
    assert list(path.parent.iterdir()) == [path]  # nothing unfinished is left


def test_a_length_above_the_window_is_refused(loaded: LoadedModel, make: MakeTask) -> None:
    message = r"task\.length must be at most the window of 1024 tokens of random, got 1025\.$"
    with pytest.raises(TaskDoesNotFit, match=message):
        make(length=1025).samples(loaded)


def test_a_length_that_is_too_short_is_refused(loaded: LoadedModel, make: MakeTask) -> None:
    with pytest.raises(TaskDoesNotFit, match=r"use a larger task\.length\.$"):
        make(length=40).samples(loaded)


# Official files -------------------------------------------------------------------------------


def write(path: Path, *entries: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return path


def entry(index: int = 0, **changes: object) -> dict[str, object]:
    return {
        "index": index,
        "input": CONTEXT + STEM,
        "outputs": ["blue"],
        "length": 60,
        **changes,
    }


def test_an_official_file_is_split_at_the_last_stem(tmp_path: Path) -> None:
    prefix = " The special magic word for cat is"
    path = write(tmp_path / "niah_single_1.jsonl", entry(7, answer_prefix=prefix))
    (sample,) = read_official(path, 10, "sparse", 0)
    assert (sample.sample_id, sample.subtask) == ("niah_single_1-7", "niah_single_1")
    assert (sample.context, sample.question) == (CONTEXT, STEM)
    assert (sample.answer_prefix, sample.answers) == (prefix, ("blue",))
    assert (sample.max_new_tokens, sample.length) == (128, 60)


@pytest.mark.parametrize(
    "stem",
    [
        "\nQuestion: Find all variables that are assigned the value 123 in the text above.",
        "\nQuestion: What are the 10 most common words in the above list?",
        "\nWhat are all the special magic numbers for cat and dog mentioned in the text?",
    ],
)
def test_the_stems_of_the_generator_are_found(tmp_path: Path, stem: str) -> None:
    path = write(tmp_path / "vt.jsonl", entry(input=f"Memorize this.\n\n VAR A = 123 {stem}"))
    (sample,) = read_official(path, 1, "sparse", 0)
    assert (sample.question, sample.max_new_tokens) == (stem, 30)


def test_a_folder_holds_a_file_a_subtask(tmp_path: Path) -> None:
    write(tmp_path / "qa_1" / "validation.jsonl", entry(0), entry(1), entry(2))
    write(tmp_path / "cwe.jsonl", entry(0))
    samples = read_official(tmp_path, 2, "dense", 0)
    expected = [("cwe-0", 120), ("qa_1-0", 32), ("qa_1-1", 32)]
    assert [(one.sample_id, one.max_new_tokens) for one in samples] == expected
    assert {one.question for one in samples} == {""}


def test_without_a_stem_the_question_is_split_by_count(loaded: LoadedModel, tmp_path: Path) -> None:
    path = write(tmp_path / "fwe.jsonl", entry(input="one two three four. Say which"))
    with pytest.raises(
        ValueError, match=r"in sample fwe-0; set task\.question_tokens or question="
    ):
        read_official(path, 1, "sparse", 0)
    (sample,) = read_official(path, 1, "sparse", 2)
    whole = loaded.tokenizer.encode("one two three four. Say which")
    prompt = tokenise(loaded, sample, "sparse")
    assert prompt.prefill_ids == tuple(whole[:-2])
    assert prompt.decode_ids == tuple(whole[-2:])
    (dense,) = read_official(path, 1, "dense", 0)
    assert tokenise(loaded, dense, "dense").prefill_ids == tuple(whole)


def test_more_question_than_prompt_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    path = write(tmp_path / "fwe.jsonl", entry(input="one two three"))
    (sample,) = read_official(path, 1, "sparse", 5000)
    with pytest.raises(ValueError, match=r"task\.question_tokens must leave a context, got 5000"):
        tokenise(loaded, sample, "sparse")


@pytest.mark.parametrize(
    "line",
    ["not json", "[1, 2]", '{"input": "x"}', '{"input": "x", "outputs": []}', '{"outputs": ["x"]}'],
)
def test_a_bad_line_is_one_sentence(tmp_path: Path, line: str) -> None:
    path = tmp_path / "vt.jsonl"
    path.write_text(f"{json.dumps(entry())}\n{line}\n")
    with pytest.raises(ValueError, match=r"line 2 of .*vt\.jsonl must be a JSON object with input"):
        read_official(path, 10, "dense", 0)


def test_files_that_are_not_there_or_empty_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.source must be a JSON lines file or a folder"):
        read_official(tmp_path / "none", 1, "dense", 0)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"task\.source must hold at least one sample"):
        read_official(tmp_path, 1, "dense", 0)


def test_one_sample_twice_is_refused(tmp_path: Path) -> None:
    for length in ("4096", "8192"):
        write(tmp_path / length / "vt" / "validation.jsonl", entry(0))
    with pytest.raises(ValueError, match=r"must hold every sample once, found vt-0 twice"):
        read_official(tmp_path, 1, "dense", 0)


def test_an_official_file_is_run_through_the_task(loaded: LoadedModel, tmp_path: Path) -> None:
    path = write(tmp_path / "niah_single_1.jsonl", entry(0))
    task = Ruler(source=str(path), subtasks=("niah_single",), question="sparse")
    (sample,) = task.samples(loaded)
    assert sample.subtask == "niah_single_1"
