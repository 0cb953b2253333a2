"""RULER's prompts from files: what a line may hold, what is refused, what the row says of them."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from topkbench.analysis.record.row import same_under_each_seed
from topkbench.harness.cell import run_cell
from topkbench.harness.decoding import Question, tokenise
from topkbench.harness.samples import Sample, TaskDoesNotFit
from topkbench.harness.task import Context
from topkbench.methods.base import Policy
from topkbench.methods.full import FullAttention
from topkbench.models.load import LoadedModel
from topkbench.models.prefill_store import PrefillStore
from topkbench.tasks.ruler import Ruler
from topkbench.tasks.ruler_files import read_official
from topkbench.tasks.ruler_words import RulerWords

CONTEXT = "Some special magic words are hidden.\nA magic word for cat is blue.\nWhat a day it was."
STEM = "\nWhat is the special magic word for cat mentioned in the provided text?"


def read(
    path: Path, num_samples: int, question: Question, question_tokens: int = 0
) -> list[Sample]:
    return read_official(path, num_samples, question, question_tokens).samples


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
    (sample,) = read(path, 10, "sparse", 0)
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
    (sample,) = read(path, 1, "sparse", 0)
    assert (sample.question, sample.max_new_tokens) == (stem, 30)


def test_a_folder_contains_one_file_per_subtask(tmp_path: Path) -> None:
    # RULER's index is an offset that may repeat.
    write(tmp_path / "qa_1" / "validation.jsonl", entry(5), entry(5), entry(6))
    write(tmp_path / "cwe.jsonl", entry(0))
    samples = read(tmp_path, 2, "dense", 0)
    expected = [
        ("cwe.jsonl:1", "cwe", 120),
        ("qa_1/validation.jsonl:1", "qa_1", 32),
        ("qa_1/validation.jsonl:2", "qa_1", 32),
    ]
    assert [(one.sample_id, one.subtask, one.max_new_tokens) for one in samples] == expected
    assert {one.question for one in samples} == {""}
    alone = read(tmp_path / "qa_1" / "validation.jsonl", 2, "dense", 0)
    assert alone == samples[1:] == read(tmp_path / "qa_1", 2, "dense", 0)


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
    (sample,) = read(tmp_path / "data", 1, "dense", 0)
    assert (sample.subtask, sample.max_new_tokens) == (subtask, new_tokens)
    monkeypatch.chdir(path.parent)
    assert read(Path(path.name), 1, "dense", 0) == [sample]
    assert read(Path(), 1, "dense", 0) == [sample]


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
        read(path, 1, "dense", 0)
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
        read(path, 1, "sparse", 0)
    (sample,) = read(path, 1, "sparse", 2)
    whole = loaded.tokenizer.encode("one two three four. Say which")
    prompt = tokenise(loaded, sample, "sparse")
    assert prompt.prefill_ids == tuple(whole[:-2])
    assert prompt.decode_ids == tuple(whole[-2:])
    (dense,) = read(path, 1, "dense", 0)
    assert tokenise(loaded, dense, "dense").prefill_ids == tuple(whole)


def test_more_question_tokens_than_prompt_tokens_are_refused(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    path = write(tmp_path / "fwe.jsonl", entry(input="one two three"))
    (sample,) = read(path, 1, "sparse", 5000)
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
        # Nothing to see, though str.strip leaves it.
        (r'{"input": "x", "outputs": ["\u200b"]}', r'a reference in outputs .*, got "\\u200b"'),
        (r'{"input": "x", "outputs": ["\u200d \ufe0f"]}', r"a reference in outputs .*, got .*"),
        (r'{"input": "x", "outputs": ["\u2800\u3164"]}', r"a reference in outputs .*, got .*"),
        (r'{"input": "x", "outputs": ["\ufeff\u0007"]}', r"a reference in outputs .*, got .*"),
        (r'{"input": "\u200b", "outputs": ["x"]}', r"input must be a text and not empty, got .*"),
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
    tmp_path: Path, line: str, problem: str
) -> None:
    path = tmp_path / "vt.jsonl"
    path.write_text(f"{json.dumps(entry())}\n\n{line}\n")
    beginning = r"^line 3 of .*vt\.jsonl must be a JSON object with input and outputs, as RULER"
    with pytest.raises(ValueError, match=f"{beginning} writes it: {problem}\\.$"):
        Ruler(source=str(path), question="dense")
    # A file is read to its end, however many samples are asked for.
    with pytest.raises(ValueError, match=beginning):
        Ruler(source=str(path), question="dense", num_samples=1)


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
        read(path, 10, "dense", 0)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\r", "ö"])
def test_a_line_ends_at_a_line_feed_and_at_no_other_character(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "vt.jsonl"
    line = json.dumps(entry(input=f"one{mark}two\nWhich?"), ensure_ascii=False)
    path.write_bytes(f"{line}\n{line}\n".encode())
    samples = read(path, 10, "sparse", 0)
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
    samples = read(path, 10, "dense", 0)
    assert [one.sample_id for one in samples] == [f"vt.jsonl:{number}" for number in numbers]
    assert {one.context for one in samples} == {CONTEXT + STEM}


def test_an_answer_prefix_that_is_null_or_missing_is_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "vt.jsonl", entry(answer_prefix=None), entry(answer_prefix=" A: "))
    samples = [*read(path, 2, "dense", 0), *read(path, 1, "sparse", 0)]
    assert [one.answer_prefix for one in samples] == ["", " A: ", ""]


def test_a_question_without_a_context_before_it_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "vt.jsonl", entry(input="\nWhat is it?"))
    with pytest.raises(ValueError, match=r"needs the question's beginning after a context"):
        read(path, 1, "sparse", 0)


def test_missing_or_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.source must be a file of JSON lines or Parquet"):
        read(tmp_path / "none", 1, "dense", 0)
    write(tmp_path / "vt.jsonl", entry())
    (tmp_path / "cwe.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"at least one sample in each file, found none in .*cwe"):
        read(tmp_path, 1, "dense", 0)


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
        read(tmp_path, 1, "dense", 0)
    assert all(str(path) in str(error.value) for path in paths)


def test_an_official_prompt_beyond_the_window_names_the_setting(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    path = write(tmp_path / "vt.jsonl", entry(), entry(input="one two " * 600 + "\nWhat?"))
    short, long = read(path, 2, "sparse", 0)
    assert tokenise(loaded, short, "sparse").sample == short
    message = (
        r"fit the window of 1024 tokens of random, got \d+ in sample vt\.jsonl:2; use shorter pro"
    )
    with pytest.raises(TaskDoesNotFit, match=message):
        tokenise(loaded, long, "sparse")


HUB = {
    "context": "One of the magic words for cat is blue.\n",
    "question": "Say the magic word for cat.\n",
    "answer_prefix": "The word is",
    "answer": ["blue"],
    "task": "niah_single_1",
    "max_new_tokens": 7,
}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_hubs_columns_are_read(tmp_path: Path, ending: str) -> None:
    lines = [HUB, {**HUB, "task": "vt"}, HUB, {**HUB, "task": "qa_1", "answer": ["a", "b"]}]
    path = tmp_path / f"test.{ending}"
    if ending == "jsonl":
        write(path, *lines)
    else:
        pd.DataFrame(lines).to_parquet(path)
    found = read_official(tmp_path, 1, "sparse")
    assert found.counts == {"niah_single_1": 2, "vt": 1, "qa_1": 1}
    first = found.samples[0]
    assert (first.sample_id, first.subtask) == (f"test.{ending}:1", "niah_single_1")
    assert (first.context, first.question) == (HUB["context"], HUB["question"])
    assert (first.answer_prefix, first.answers, first.max_new_tokens) == (
        "The word is",
        ("blue",),
        7,
    )
    assert [one.subtask for one in found.samples] == ["niah_single_1", "vt", "qa_1"]
    assert found.samples[2].answers == ("a", "b")
    (vt,) = read_official(tmp_path, 9, "dense", subtasks=["vt"]).samples
    assert vt.subtask == "vt"


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vt.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(
        ValueError, match=r"task\.source must hold readable Parquet, got .*vt\.parq"
    ):
        read_official(tmp_path, 1, "dense")


def test_a_question_beside_the_input_is_where_it_is_cut(tmp_path: Path) -> None:
    text = "Say it. One two three. Say it."
    path = write(
        tmp_path / "vt.jsonl", entry(input=text, question=" Say it."), entry(question=None)
    )
    named, found = read(path, 2, "sparse")
    assert (named.context, named.question) == ("Say it. One two three. ", "Say it.")
    assert (found.context, found.question) == (CONTEXT, STEM)
    with pytest.raises(
        ValueError, match=r"^task\.question_tokens must be 0 where a file separates"
    ):
        read(path, 2, "sparse", 3)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (entry(question="Why?"), r'question must stand in input after a context, got "Why\?"'),
        (entry(question=7), r"question must be a text, got 7"),
        (entry(context="x"), r'it must have one of input and context, got \["index", "input"'),
        (entry(answer="x"), r"it must have one of outputs and answer, got"),
        ({**HUB, "context": " "}, r'context must be a text and not empty, got " "'),
        (
            {**HUB, "answer": [None]},
            r"a reference in answer must be a text and not empty, got null",
        ),
        ({**HUB, "answer": ""}, r'a reference in answer must be a text and not empty, got ""'),
        ({**HUB, "task": "sums"}, r"task must be a sub-task of RULER .*, got \"sums\""),
        ({**HUB, "max_new_tokens": 0}, r"max_new_tokens must be a whole number .*, got 0"),
        ({**HUB, "max_new_tokens": True}, r"max_new_tokens must be a whole number .*, got true"),
    ],
)
def test_columns_that_contradict_are_refused(
    tmp_path: Path, line: dict[str, object], problem: str
) -> None:
    path = write(tmp_path / "vt.jsonl", entry(), line)
    with pytest.raises(ValueError, match=rf"^line 2 of .*vt\.jsonl must be .*: {problem}"):
        read_official(path, 1, "dense")


@pytest.mark.parametrize(
    "answer", ["\u2764\ufe0f", "-", "\u0e34", "a\u200b", "\ue000", "\U0001fae9"]
)
def test_a_reference_of_any_visible_sign_is_read(tmp_path: Path, answer: str) -> None:
    path = write(tmp_path / "vt.jsonl", entry(outputs=[answer]))
    (sample,) = read(path, 1, "dense", 0)
    assert sample.answers == (answer,)


def test_bad_lines_are_left_out_and_counted_if_asked(loaded: LoadedModel, tmp_path: Path) -> None:
    write(tmp_path / "vt.jsonl", entry(outputs=[""]), entry(), "no object", entry(), entry())
    write(tmp_path / "cwe.jsonl", entry(outputs=[None]), entry())
    task = Ruler(source=str(tmp_path), num_samples=2, skip_bad=True)
    names = [one.sample_id for one in task.samples(loaded)]
    assert names == ["cwe.jsonl:2", "vt.jsonl:2", "vt.jsonl:4"]
    assert task.sample_counts("vt") == {"wanted_samples": 2, "source_samples": 3}
    mean = {"wanted_samples": 4, "source_samples": 4, "skipped_samples": 3}
    assert task.sample_counts("mean") == mean
    write(tmp_path / "fwe.jsonl", entry(outputs=[""]))
    with pytest.raises(ValueError, match=r"at least one sample in each file, found none in .*fwe"):
        Ruler(source=str(tmp_path), skip_bad=True)


def test_only_files_of_the_chosen_subtasks_are_read(loaded: LoadedModel, tmp_path: Path) -> None:
    write(tmp_path / "vt.jsonl", entry())
    write(tmp_path / "niah_single_1" / "validation.jsonl", entry())
    write(tmp_path / "cwe.jsonl", entry(outputs=[""]))
    task = Ruler(source=str(tmp_path), subtasks=["niah_single_1"])
    assert [one.subtask for one in task.samples(loaded)] == ["niah_single_1"]
    message = (
        r"^task\.subtasks must be among those in task\.source, cwe, niah_single_1, vt, got 'fwe'"
    )
    with pytest.raises(ValueError, match=message):
        Ruler(source=str(tmp_path), subtasks=["vt", "fwe"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"length": 4096},
            "task.length must be null with task.source, .* got 4096; use task.length=null",
        ),
        ({"squad": "a"}, "task.squad must be null with task.source, .* got 'a'; use task"),
        ({"question_tokens": -1}, "question_tokens must be at least 0, got -1"),
        ({"source": None, "skip_bad": True}, "task.skip_bad is a setting of task.source, got True"),
        (
            {"source": None, "question_tokens": 3},
            "task.question_tokens is a setting of task.source",
        ),
    ],
)
def test_settings_that_would_have_no_effect_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "vt.jsonl", entry())
    with pytest.raises(ValueError, match=message):
        Ruler(**{"source": str(path), **settings})


def test_the_prompts_are_named_by_the_files_and_how_they_reach_the_model(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    assert RulerWords().prompts(loaded) == "topkbench 1"
    written = Ruler().prompts(loaded)
    assert re.fullmatch(
        r"RULER written by topkbench 1, Python's documentation [0-9a-f]{8} \(raw\)", written
    )
    assert not same_under_each_seed(written)
    path = write(tmp_path / "a" / "vt.jsonl", entry(), entry())
    name = Ruler(source=str(path), num_samples=1).prompts(loaded)
    assert name.startswith("RULER ")
    assert name.endswith(" (raw)")
    # Neither the place nor the number of samples counts, but every byte does.
    elsewhere = write(tmp_path / "b" / "vt.jsonl", entry(), entry())
    assert Ruler(source=str(elsewhere.parent)).prompts(loaded) == name
    write(elsewhere, entry(), entry(outputs=["grey"]))
    assert Ruler(source=str(elsewhere)).prompts(loaded) != name

    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.chat_template = "<|user|>{{ messages[0].content }}"
    plain = replace(loaded, tokenizer=tokenizer)
    chat = replace(plain, chat=True)
    assert Ruler(source=str(path)).prompts(chat) == name.replace("raw", "chat template")
    write(path, entry(), entry(input=f"<|user|>{CONTEXT}{STEM}"))
    assert Ruler(source=str(path)).prompts(plain).endswith(" (partly raw)")
    assert Ruler(source=str(path)).prompts(chat).endswith(" (chat template)")
