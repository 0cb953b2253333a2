"""The ruler task: generated samples, the same for all methods, and NVIDIA's official files."""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from topkbench.harness.decoding import tokenise
from topkbench.harness.samples import TaskDoesNotFit, samples_digest
from topkbench.models.load import LoadedModel
from topkbench.tasks import generated
from topkbench.tasks.needle import Needle
from topkbench.tasks.ruler_words import RulerWords
from topkbench.tasks.ruler_words_prompts import SUBTASKS, VERSION

MakeTask = Callable[..., RulerWords]


@pytest.fixture
def make(tmp_path: Path) -> MakeTask:
    def make_task(**knobs: Any) -> RulerWords:
        return RulerWords(**{"length": 300, "num_samples": 1, "cache_dir": str(tmp_path), **knobs})

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


def test_what_is_null_is_the_same_cell_as_the_value_that_is_used(tmp_path: Path) -> None:
    expected = {"length": 4096, "subtasks": list(SUBTASKS), "batch_size": 25}
    assert RulerWords().decided() == expected
    assert RulerWords(length=4096, subtasks=SUBTASKS).decided() == expected
    found = RulerWords(length=300, subtasks=["vt"], batch_size=4).decided()
    assert found == {"length": 300, "subtasks": ["vt"], "batch_size": 4}


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


def test_a_prompt_never_exceeds_its_length(loaded: LoadedModel, make: MakeTask) -> None:
    """Apart, the parts of a text may have fewer tokens than together, or more."""
    joined = copy.deepcopy(loaded.tokenizer)
    rules = joined.backend_tokenizer
    rules.normalizer = normalizers.Replace(
        ".\n", ".\n" + "~" * 9
    )  # where context and question meet
    of_llama_2 = copy.deepcopy(loaded.tokenizer)
    of_llama_2.backend_tokenizer.normalizer = normalizers.Prepend("~")
    chat = copy.deepcopy(loaded.tokenizer)
    chat.chat_template = "{{ bos_token }}Read the text: {{ messages[0].content }} Answer:"
    for tokenizer, wrapped in ((joined, False), (of_llama_2, False), (chat, True)):
        reader = replace(loaded, tokenizer=tokenizer, chat=wrapped)
        for sample in make(length=400, num_samples=2).samples(reader):
            prompt = tokenise(reader, sample, "sparse")
            assert prompt.num_tokens + sample.max_new_tokens == sample.length
            assert 250 < sample.length <= 400


def test_the_prompts_of_a_version_stay_the_same(loaded: LoadedModel, make: MakeTask) -> None:
    """Prompts that change need another ``VERSION``, so that rows of both are not compared."""
    tasks = (make(num_samples=2), Needle(lengths=(300,), cache_dir=make().cache_dir))
    text = "".join(
        "".join([one.context, one.question, one.answer_prefix, *one.answers])
        for task in tasks
        for one in task.samples(loaded)
    )
    digests = {1: "bd6fce093b630698"}
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digests[VERSION]


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
    generated._READ.clear()  # as another process begins
    read = make(subtasks=("cwe", "fwe")).samples(loaded)
    assert read == made
    assert set(read) == set(made)  # task=selection hashes them
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
    message = r"task\.length must be at most the window of 1024 tokens of random, got 1025; model"
    with pytest.raises(TaskDoesNotFit, match=message):
        make(length=1025).samples(loaded)


def test_a_length_that_is_too_short_is_refused(loaded: LoadedModel, make: MakeTask) -> None:
    with pytest.raises(TaskDoesNotFit, match=r"use a larger task\.length\.$"):
        make(length=40).samples(loaded)
