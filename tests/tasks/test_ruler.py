"""The ruler task: generated samples, the same for all methods, and NVIDIA's official files."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from topkbench.harness.cell import run_cell
from topkbench.harness.decoding import tokenise
from topkbench.harness.samples import TaskDoesNotFit, samples_digest
from topkbench.harness.task import Context
from topkbench.methods.base import Policy
from topkbench.methods.full import FullAttention
from topkbench.models.load import LoadedModel
from topkbench.models.prefill import PrefillStore
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


def test_a_sample_does_not_depend_on_the_number_of_samples(
    loaded: LoadedModel, make: MakeTask
) -> None:
    few = make(num_samples=1).samples(loaded)
    more = make(num_samples=3).samples(loaded)
    assert [sample.subtask for sample in few] == list(SUBTASKS)
    assert [sample for sample in more if sample.sample_id.endswith("-0")] == few
    assert len({sample.sample_id for sample in more}) == 21
    alone = make(subtasks=("vt",), num_samples=2).samples(loaded)
    assert alone == [sample for sample in more if sample.subtask == "vt"][:2]


def test_seed_and_length_change_the_samples(loaded: LoadedModel, make: MakeTask) -> None:
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


def test_a_model_trained_to_end_its_answers_gets_8_extra_tokens(
    loaded: LoadedModel, make: MakeTask
) -> None:
    (sample,) = make(subtasks=("niah_single",)).samples(loaded)
    assert sample.max_new_tokens == 3 + 8  # two words, a full stop
    other = replace(loaded, short_answers=False)
    expected = {"niah_single": 128, "vt": 30, "cwe": 120, "fwe": 50}
    samples = make(length=1000, subtasks=tuple(expected)).samples(other)
    assert {one.subtask: one.max_new_tokens for one in samples} == expected
    # It was not trained on these prompts, so they begin with an example where RULER's do.
    with_example = {one.subtask for one in samples if one.context.count("\n\n")}
    assert with_example == {"vt", "cwe"}


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
def test_a_damaged_cache_is_generated_again(
    loaded: LoadedModel, make: MakeTask, tmp_path: Path, damage: Callable[[list[str]], list[str]]
) -> None:
    task = make(subtasks=("vt",), num_samples=3, seed=11)
    made = task.samples(loaded)
    (path,) = (tmp_path / "samples").glob("*.jsonl")
    whole = path.read_text()
    # In another folder, since a process reads each file once.
    task = make(subtasks=("vt",), num_samples=3, seed=11, cache_dir=str(tmp_path / "other"))
    path = tmp_path / "other" / "samples" / path.name
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"{line}\n" for line in damage(whole.splitlines())))
    assert path.read_text() != whole
    assert task.samples(loaded) == made
    assert path.read_text() == whole
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left


def test_a_length_above_the_window_is_refused(loaded: LoadedModel, make: MakeTask) -> None:
    message = (
        r"task\.length must be at most the window of 1024 tokens of random, got 1025; model\.window"
    )
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
    assert (sample.sample_id, sample.subtask) == ("niah_single_1.jsonl:1", "niah_single_1")
    assert (sample.context, sample.question) == (CONTEXT, STEM)
    assert (sample.answer_prefix, sample.answers) == (prefix, ("blue",))
    assert (sample.max_new_tokens, sample.length) == (128, None)


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


def test_a_folder_contains_one_file_per_subtask(tmp_path: Path) -> None:
    # RULER's index is an offset that may repeat.
    write(tmp_path / "qa_1" / "validation.jsonl", entry(5), entry(5), entry(6))
    write(tmp_path / "cwe.jsonl", entry(0))
    samples = read_official(tmp_path, 2, "dense", 0)
    expected = [
        ("cwe.jsonl:1", "cwe", 120),
        ("qa_1/validation.jsonl:1", "qa_1", 32),
        ("qa_1/validation.jsonl:2", "qa_1", 32),
    ]
    assert [(one.sample_id, one.subtask, one.max_new_tokens) for one in samples] == expected
    assert {one.question for one in samples} == {""}
    alone = read_official(tmp_path / "qa_1" / "validation.jsonl", 2, "dense", 0)
    assert alone == samples[1:] == read_official(tmp_path / "qa_1", 2, "dense", 0)


@pytest.mark.parametrize(
    ("place", "subtask", "new_tokens"),
    [
        ("niah_single_1/validation.jsonl", "niah_single_1", 128),
        ("niah_multikey_3.jsonl", "niah_multikey_3", 128),
        ("niah_multivalue-4096.jsonl", "niah_multivalue", 128),
        ("NIAH-MultiQuery_8k.jsonl", "niah_multiquery", 128),
        ("niah.jsonl", "niah", 128),
        ("4096/vt.jsonl", "vt", 30),
        ("vt/4096.jsonl", "vt", 30),
        ("llama3_vt_4096.jsonl", "vt", 30),
        ("cwe-4096/test.jsonl", "cwe", 120),
        ("fwe.4096.jsonl", "fwe", 50),
        ("qa-1.jsonl", "qa_1", 32),
        ("qa_2-131072.jsonl", "qa_2", 32),
        ("qa_4096.jsonl", "qa", 32),
        ("vt/qa_1.jsonl", "qa_1", 32),  # the file's own name takes precedence
    ],
)
def test_the_subtask_comes_from_the_name_of_the_file_or_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, subtask: str, new_tokens: int
) -> None:
    path = write(tmp_path / "data" / place, entry())
    (sample,) = read_official(tmp_path / "data", 1, "dense", 0)
    assert (sample.subtask, sample.max_new_tokens) == (subtask, new_tokens)
    monkeypatch.chdir(path.parent)
    assert read_official(Path(path.name), 1, "dense", 0) == [sample]
    assert read_official(Path(), 1, "dense", 0) == [sample]


@pytest.mark.parametrize(
    "place",
    ["validation.jsonl", "squad.jsonl", "vt_and_cwe.jsonl", "vtx.jsonl", "vt/cwe_fwe.jsonl"],
)
def test_a_file_without_exactly_one_subtask_in_its_name_is_refused(
    tmp_path: Path, place: str
) -> None:
    path = write(tmp_path / "data" / place, entry())
    with pytest.raises(
        ValueError, match=r"must name each file or its folder after one sub-task"
    ) as error:
        read_official(path, 1, "dense", 0)
    assert str(path) in str(error.value)


def test_qa_needs_one_reference_and_other_subtasks_need_all(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    def scores(*outputs: str) -> dict[str, float]:
        for place in ("qa_1/validation.jsonl", "vt-4096.jsonl"):
            write(tmp_path / place, entry(input=CONTEXT * 5 + STEM, outputs=outputs))
        task = Ruler(source=str(tmp_path), timed_prompts=1, judged_prompts=1)
        full = FullAttention()
        outcome = run_cell(Context(loaded, store, full, Policy(k=24), full), task)
        predictions.update({one["subtask"]: one["prediction"] for one in outcome.samples})
        return {row.subtask: row.values["score"] for row in outcome.rows}

    predictions: dict[str, str] = {}
    absent = "an answer that nobody gives"
    assert scores(absent) == {"qa_1": 0.0, "vt": 0.0, "mean": 0.0}
    # The prompts are the same, so both predictions begin with the same word.
    predicted = predictions["vt"].split()[0]
    assert scores(predicted, absent) == {"qa_1": 100.0, "vt": 50.0, "mean": 75.0}


def test_without_a_stem_the_question_is_split_by_count(loaded: LoadedModel, tmp_path: Path) -> None:
    path = write(tmp_path / "fwe.jsonl", entry(input="one two three four. Say which"))
    with pytest.raises(
        ValueError, match=r"in sample fwe\.jsonl:1; set task\.question_tokens or question="
    ):
        read_official(path, 1, "sparse", 0)
    (sample,) = read_official(path, 1, "sparse", 2)
    whole = loaded.tokenizer.encode("one two three four. Say which")
    prompt = tokenise(loaded, sample, "sparse")
    assert prompt.prefill_ids == tuple(whole[:-2])
    assert prompt.decode_ids == tuple(whole[-2:])
    (dense,) = read_official(path, 1, "dense", 0)
    assert tokenise(loaded, dense, "dense").prefill_ids == tuple(whole)


def test_more_question_tokens_than_prompt_tokens_are_refused(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    path = write(tmp_path / "fwe.jsonl", entry(input="one two three"))
    (sample,) = read_official(path, 1, "sparse", 5000)
    with pytest.raises(ValueError, match=r"task\.question_tokens must leave a context, got 5000"):
        tokenise(loaded, sample, "sparse")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("not json", r'it must be JSON, got "not json"'),
        ("[1, 2]", r"it must be an object, got \[1, 2\]"),
        ("null", r"it must be an object, got null"),
        ('{"outputs": ["x"]}', r"input must be a text and not empty, got null"),
        ('{"input": 3, "outputs": ["x"]}', r"input must be a text and not empty, got 3"),
        ('{"input": " \\n", "outputs": ["x"]}', r'input must be a text and not empty, got " \\n"'),
        ('{"input": "x", "outputs": ["\\ud800"]}', r'its texts must be Unicode .*, got "\\ud800"'),
        ('{"input": "x"}', r"outputs must be a list of references, got null"),
        ('{"input": "x", "outputs": []}', r"outputs must be a list of references, got \[\]"),
        ('{"input": "x", "outputs": "red"}', r'outputs must be a list of references, got "red"'),
        ('{"input": "x", "outputs": [""]}', r'a reference in outputs must be a text .*, got ""'),
        ('{"input": "x", "outputs": ["a", " "]}', r'a reference in outputs .*, got " "'),
        ('{"input": "x", "outputs": ["a", null]}', r"a reference in outputs .*, got null"),
        ('{"input": "x", "outputs": [7]}', r"a reference in outputs .*, got 7"),
        ('{"input": "x", "outputs": [["a"]]}', r'a reference in outputs .*, got \["a"\]'),
        (
            '{"input": "x", "outputs": ["a"], "answer_prefix": 0}',
            r"answer_prefix must be a text, got 0",
        ),
    ],
)
def test_a_malformed_line_is_refused_before_a_model_is_loaded(
    loaded: LoadedModel, tmp_path: Path, line: str, problem: str
) -> None:
    path = tmp_path / "vt.jsonl"
    path.write_text(f"{json.dumps(entry())}\n\n{line}\n")
    beginning = r"^line 3 of .*vt\.jsonl must be a JSON object with input and outputs, as RULER"
    with pytest.raises(ValueError, match=f"{beginning} writes it: {problem}\\.$"):
        Ruler(source=str(path), question="dense")
    # Lines beyond num_samples are not read.
    first = Ruler(source=str(path), question="dense", num_samples=1)
    assert len(first.samples(loaded)) == 1


@pytest.mark.parametrize(
    ("encoding", "byte", "line"),
    [("latin-1", "0xf6", 2), ("cp1252", "0xf6", 2), ("utf-16", "0xff", 1)],
)
def test_an_encoding_other_than_utf8_is_refused_in_one_line(
    tmp_path: Path, encoding: str, byte: str, line: int
) -> None:
    path = tmp_path / "vt.jsonl"
    text = json.dumps(entry()) + "\n" + json.dumps(entry(outputs=["dör"]), ensure_ascii=False)
    path.write_bytes(text.encode(encoding))
    message = rf"^line {line} of .*vt\.jsonl must be UTF-8, got byte {byte} at \d+; convert"
    with pytest.raises(ValueError, match=message):
        read_official(path, 10, "dense", 0)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\r", "ö"])
def test_a_line_ends_at_a_line_feed_and_at_no_other_character(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "vt.jsonl"
    line = json.dumps(entry(input=f"one{mark}two\nWhich?"), ensure_ascii=False)
    path.write_bytes(f"{line}\n{line}\n".encode())
    samples = read_official(path, 10, "sparse", 0)
    assert [one.context for one in samples] == [f"one{mark}two"] * 2


@pytest.mark.parametrize(
    ("content", "numbers"),
    [
        ("{0}\n{0}\n", [1, 2]),  # two equal lines are two samples
        ("{0}\n{0}", [1, 2]),
        ("{0}\r\n{0}\r\n", [1, 2]),
        ("\n{0}\n  \n\r\n{0}\n\n", [2, 5]),
        ("\ufeff{0}\n{0}\n", [1, 2]),
        ("\ufeff\n{0}\n", [2]),
    ],
)
def test_samples_are_identified_by_their_line_numbers(
    tmp_path: Path, content: str, numbers: list[int]
) -> None:
    path = tmp_path / "vt.jsonl"
    path.write_bytes(content.format(json.dumps(entry())).encode())
    samples = read_official(path, 10, "dense", 0)
    assert [one.sample_id for one in samples] == [f"vt.jsonl:{number}" for number in numbers]
    assert {one.context for one in samples} == {CONTEXT + STEM}


def test_an_answer_prefix_that_is_null_or_missing_is_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "vt.jsonl", entry(answer_prefix=None), entry(answer_prefix=" A: "))
    samples = [*read_official(path, 2, "dense", 0), *read_official(path, 1, "sparse", 0)]
    assert [one.answer_prefix for one in samples] == ["", " A: ", ""]


def test_a_question_without_a_context_before_it_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "vt.jsonl", entry(input="\nWhat is it?"))
    with pytest.raises(ValueError, match=r"needs the question's beginning after a context"):
        read_official(path, 1, "sparse", 0)


def test_missing_or_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.source must be a JSON lines file or a folder"):
        read_official(tmp_path / "none", 1, "dense", 0)
    write(tmp_path / "vt.jsonl", entry())
    (tmp_path / "cwe.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"at least one sample in each file, found none in .*cwe"):
        read_official(tmp_path, 1, "dense", 0)


@pytest.mark.parametrize(
    "places",
    [
        ("4096/vt/validation.jsonl", "8192/vt/validation.jsonl"),
        ("vt-4096.jsonl", "vt-8192.jsonl"),
        ("vt/4096.jsonl", "vt/8192.jsonl"),
        ("data/vt/validation.jsonl", "pred/vt.jsonl"),
    ],
)
def test_two_files_of_one_subtask_are_refused(tmp_path: Path, places: tuple[str, str]) -> None:
    paths = [write(tmp_path / place, entry()) for place in places]
    message = r"one file of each sub-task, found .*, both of vt; give the folder of one length\.$"
    with pytest.raises(ValueError, match=message) as error:
        read_official(tmp_path, 1, "dense", 0)
    assert all(str(path) in str(error.value) for path in paths)


def test_an_official_prompt_beyond_the_window_names_the_setting(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    path = write(tmp_path / "vt.jsonl", entry(), entry(input="one two " * 600 + "\nWhat?"))
    short, long = read_official(path, 2, "sparse", 0)
    assert tokenise(loaded, short, "sparse").sample == short
    message = (
        r"fit the window of 1024 tokens of random, got \d+ in sample vt\.jsonl:2; use shorter pro"
    )
    with pytest.raises(TaskDoesNotFit, match=message):
        tokenise(loaded, long, "sparse")


def test_the_task_reads_an_official_file(loaded: LoadedModel, tmp_path: Path) -> None:
    path = write(tmp_path / "niah_single_1.jsonl", entry(0))
    task = Ruler(source=str(path), subtasks=("niah_single",), question="sparse")
    (sample,) = task.samples(loaded)
    assert sample.subtask == "niah_single_1"
