"""Several questions about one text: one prefill, each turn after the reference of those before."""

import copy
import functools
import hashlib
import json
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pandas as pd
import pytest

from topkbench.analysis.comparison.stats import paired_columns, paired_interval
from topkbench.analysis.record.store import PartStore
from topkbench.harness.cell import run_cell
from topkbench.harness.parts import MeasuredPart
from topkbench.harness.runner import JournaledCell
from topkbench.harness.samples import TaskDoesNotFit
from topkbench.harness.sweep import PromptCell, run_by_prompts
from topkbench.harness.task import Context, Outcome
from topkbench.harness.work import PlannedCell, Work
from topkbench.methods.base import AnyMethod, Policy
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.snapkv import SnapKV
from topkbench.models.encoding import encode
from topkbench.models.load import LoadedModel, load_model
from topkbench.models.prefill_store import PrefillStore
from topkbench.tasks.multi_turn import MultiTurn
from topkbench.tasks.multi_turn_documents import VERSION, Wording, asking_order

CONVERSATION = (
    "{% for one in messages %}<{{ one.role }}>{{ one.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make(**settings: Any) -> MultiTurn:
    given = {"length": 300, "num_samples": 3, "timed_prompts": 0, "judged_prompts": 0}
    return MultiTurn(**{**given, **settings})


def context(loaded: LoadedModel, method: AnyMethod, k: int, store: PrefillStore) -> Context:
    policy = Policy(k=k, num_sink=4, num_recent=8, dense_layers=0)
    return Context(loaded, store, method, policy, FullAttention())


def run(
    task: MultiTurn, loaded: LoadedModel, method: AnyMethod | None = None, k: int = 64
) -> Outcome:
    store = PrefillStore(loaded.model)
    found = run_cell(context(loaded, method or FullAttention(), k, store), task)
    assert [row.status for row in found.rows] == ["ok"] * len(found.rows), found.rows
    return found


def scores(found: Outcome, turn: int) -> list[float]:
    return [one["score"] for one in found.samples if one["turn"] == turn]


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("tiny", "tiny", short_answers=True)


# Documents that are written here ------------------------------------------------------------------


def test_each_turn_stands_after_the_reference_of_those_before(loaded: LoadedModel) -> None:
    prompts = make(num_samples=1).tokenised(loaded)
    samples = [one.sample for one in prompts]
    assert [one.subtask for one in samples] == ["turn_1", "turn_2", "turn_3"]
    assert {one.document for one in samples} == {"300-0-0"}
    assert [one.sample_id for one in samples] == [f"300-0-0 turn {turn}" for turn in (1, 2, 3)]
    text = ""
    for sample, prompt in zip(samples, prompts, strict=True):
        text += sample.question + sample.answer_prefix
        given = (*prompt.prefill_ids, *prompt.decode_ids)
        assert given == tuple(encode(loaded.tokenizer, sample.context + text))
        text += f" {sample.answers[0]}."
        assert sample.context.count(f"{sample.answer_prefix} {sample.answers[0]}.") == 1
    assert len({one.answers for one in samples}) == 3
    longest = prompts[-1].num_tokens + samples[-1].max_new_tokens
    assert 250 < longest <= 300
    assert {one.length for one in samples} == {longest}


@pytest.mark.parametrize("question", ["sparse", "dense"])
def test_one_prefill_serves_all_turns_unless_the_history_is_prefilled(
    loaded: LoadedModel, question: Any
) -> None:
    first, second, third = make(num_samples=1, question=question).tokenised(loaded)
    assert first.prefill_ids == second.prefill_ids == third.prefill_ids
    assert second.decode_ids[: len(first.decode_ids)] == first.decode_ids
    assert (first.decode_ids == ()) == (question == "dense")
    apart = make(num_samples=1, question=question, prefill_history=True).tokenised(loaded)
    assert apart[0] == first
    for one, other in zip((first, second, third), apart, strict=True):
        assert one.prefill_ids + one.decode_ids == other.prefill_ids + other.decode_ids
    # Of its own tokens only the question is decoded.
    assert len(apart[2].decode_ids) == len(apart[0].decode_ids)


def test_at_each_turn_every_place_is_asked_for_equally_often(loaded: LoadedModel) -> None:
    """A turn's score would otherwise be that of the places of its needles."""
    places: dict[str, list[int]] = {}
    for sample in make(num_samples=6).samples(loaded):
        needles = sample.context.split("The secret words: ")[1:]
        value = f" {sample.answers[0]}."
        (place,) = [i for i, text in enumerate(needles) if value in text.partition(".")[0] + "."]
        places.setdefault(sample.subtask, []).append(place)
    assert {turn: sorted(found) for turn, found in places.items()} == {
        f"turn_{turn}": [0, 0, 1, 1, 2, 2] for turn in (1, 2, 3)
    }
    orders = {tuple(asking_order(seed, 0, 3)) for seed in range(20)}
    assert len(orders) == 6


def test_a_document_does_not_depend_on_the_number_of_documents(loaded: LoadedModel) -> None:
    few, more = (make(num_samples=number).tokenised(loaded) for number in (1, 2))
    assert more[:3] == few
    assert make(num_samples=1, seed=1).inputs_digest(loaded) != make(num_samples=1).inputs_digest(
        loaded
    )


def test_other_models_than_the_shipped_one_get_rulers_wording(loaded: LoadedModel) -> None:
    other = replace(loaded, short_answers=False, window=4096)
    task = make(length=3000, num_samples=1)
    samples = task.samples(other)
    assert task.prompts(other) == "topkbench 1, RULER's wording"
    assert task.prompts(loaded) == "topkbench 1"
    for sample in samples:
        (value,) = sample.answers
        key = sample.question.removeprefix("\nWhat is the special magic number for ").split()[0]
        needle = f"\nOne of the special magic numbers for {key} is: {value}.\n"
        assert sample.context.count(needle.rstrip("\n")) == 1
        assert sample.answer_prefix.startswith(f" The special magic number for {key} mentioned")
    wide = replace(loaded, window=4096)
    asked = make(length=3000, num_samples=1, wording="ruler").samples(wide)
    assert [one.context for one in asked] == [one.context for one in samples]


def test_the_prompts_of_a_version_stay_the_same(loaded: LoadedModel) -> None:
    """Prompts that change need another ``VERSION``, so that rows of both are not compared."""
    samples = [
        one
        for wording in get_args(Wording)
        for one in make(length=1000, num_samples=2, wording=wording).samples(loaded)
    ]
    text = "".join(
        "".join([one.context, one.question, one.answer_prefix, *one.answers]) for one in samples
    )
    digests = {1: "162b064b3a709765"}
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digests[VERSION]


def test_in_a_chat_template_turns_are_messages(loaded: LoadedModel) -> None:
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = CONVERSATION
    wrapped = replace(loaded, tokenizer=tokenizer, chat=True)
    prompts = make(num_samples=1).tokenised(wrapped)
    messages = []
    for prompt in prompts:
        sample = prompt.sample
        asked = sample.question.strip() if messages else sample.context + sample.question
        messages.append({"role": "user", "content": asked})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text + sample.answer_prefix, add_special_tokens=False)
        assert prompt.prefill_ids + prompt.decode_ids == tuple(ids)
        answer = f"{sample.answer_prefix} {sample.answers[0]}."
        messages.append({"role": "assistant", "content": answer})
    tokenizer.chat_template = "<user>{{ messages[0].content }}<end><assistant>"
    with pytest.raises(ValueError, match="several questions need a chat template that takes a con"):
        make(num_samples=1, seed=3).tokenised(wrapped)


# Decoding -----------------------------------------------------------------------------------------


def test_a_sweep_prefills_each_document_once_and_a_batch_answers_as_its_prompts_do(
    loaded: LoadedModel,
) -> None:
    few = {"length": 160, "new_tokens": 2}
    task, store = make(**few, batch_size=2), PrefillStore(loaded.model)
    prompts = task.tokenised(loaded)
    methods = (FullAttention(), ExactTopK(), SnapKV())
    cells = [PromptCell.of(context(loaded, one, 32, store), task, prompts) for one in methods]
    assert [len(batch) for batch in cells[0].batches] == [6, 3]
    run_by_prompts(cells, store)
    assert store.forwards == 3
    for method, cell in zip(methods, cells, strict=True):
        found = cell.result()
        assert [row.subtask for row in found.rows] == ["turn_1", "turn_2", "turn_3", "mean"]
        assert {row.values["prompts_per_batch"] for row in found.rows} == {2}
        assert [one["document"] for one in found.samples[::3]] == ["160-0-0", "160-0-1", "160-0-2"]
        assert [one["turn"] for one in found.samples] == [1, 2, 3] * 3
        alone = run(make(**few, batch_size=1), loaded, method, 32)
        assert [one["tokens"] for one in found.samples] == [one["tokens"] for one in alone.samples]


def test_a_plan_counts_a_documents_prefill_once(loaded: LoadedModel) -> None:
    task = make(batch_size=2)
    own = context(loaded, ExactTopK(), 32, PrefillStore(loaded.model))
    cell = PlannedCell(SimpleNamespace(), None, "exact", False)  # type: ignore[arg-type]
    cell.measured = JournaledCell.of(own, task, task.tokenised(loaded))
    work = Work([cell])
    assert [len(one) for one in work.batches] == [6, 3]
    assert [len(one) for one in work.prefills] == [2, 1]
    # The documents of a batch decode together, one turn after the other.
    assert [len(one.prompts) for one in work.parts()] == [2, 2, 2, 1, 1, 1]


def test_a_killed_sweep_goes_on(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make(length=160, new_tokens=2, num_samples=2, batch_size=1)
    store = PrefillStore(loaded.model)

    def opened() -> JournaledCell:
        cell = JournaledCell.of(
            context(loaded, ExactTopK(), 32, store), task, task.tokenised(loaded)
        )
        run_settings = SimpleNamespace(settings={"force": False}, keys={"answers": "1"})
        stored = SimpleNamespace(
            is_worker=False,
            part=lambda name, key, force: MeasuredPart(PartStore(tmp_path), name, key, force),
        )
        cell.open(run_settings, stored)  # type: ignore[arg-type]
        return cell

    killed, measure, calls = opened(), MultiTurn.measure, 0

    def dies(self: Any, *given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:  # between two turns of the second document
            raise KeyboardInterrupt
        return measure(self, *given)

    monkeypatch.setattr(MultiTurn, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        run_by_prompts([killed], store)
    again = opened()
    assert list(again.records["answers"]) == [0]
    run_by_prompts([again], store)
    assert calls == 5 + 3
    wanted = run(task, loaded, ExactTopK(), 32)
    assert [one["tokens"] for one in again.result().samples] == [
        one["tokens"] for one in wanted.samples
    ]


@pytest.mark.parametrize("question", ["sparse", "dense"])
def test_later_turns_of_full_attention_equal_those_after_a_fresh_prefill(
    tiny: LoadedModel, question: Any
) -> None:
    found, fresh = (
        run(make(length=220, num_samples=2, question=question, prefill_history=apart), tiny)
        for apart in (False, True)
    )
    assert [one["tokens"] for one in found.samples] == [one["tokens"] for one in fresh.samples]
    assert scores(found, 1) == scores(found, 2) == scores(found, 3) == [100.0] * 2


def test_the_exact_top_k_loses_nothing_from_turn_to_turn_and_snapkv_does(
    tiny: LoadedModel,
) -> None:
    """SnapKV keeps what the first question needs, which is prefilled, and drops the rest."""
    ask = functools.partial(make, length=220, num_samples=9, question="dense")
    exact, fresh = (run(ask(prefill_history=apart), tiny, ExactTopK()) for apart in (False, True))
    second = paired_interval(scores(exact, 2), scores(fresh, 2))
    assert second.low <= 0 <= second.high
    snapkv = run(ask(), tiny, SnapKV())
    changes = {
        name: paired_columns(found.samples, None)["turn_2"]
        for name, found in (("exact", exact), ("snapkv", snapkv))
    }
    assert changes["exact"]["turn_change"] == 0.0
    assert changes["snapkv"]["turn_change_ci_high"] < 0
    assert statistics.fmean(scores(snapkv, 1)) > 80


# Intervals ----------------------------------------------------------------------------------------


def test_a_document_counts_once_however_many_questions_it_has() -> None:
    given = {"a": (100, 100, 0), "b": (100, 100, 100), "c": (100, 0, 0), "d": (100, 0, 100)}
    samples = [
        {
            **{
                "sample_id": f"{name} turn {turn}",
                "subtask": f"turn_{turn}",
                "score": float(score),
            },
            **{"document": name, "turn": turn, "references": ["x"]},
        }
        for name, of_document in given.items()
        for turn, score in enumerate(of_document, start=1)
    ]
    full = [{**one, "score": 100.0} for one in samples]
    found = paired_columns(samples, full)
    second = paired_interval([100, 100, 0, 0], [100, 100, 100, 100])
    names = ("turn_change", "turn_change_ci_low", "turn_change_ci_high")
    assert [found["turn_2"][name] for name in names] == [-50.0, second.low, second.high]
    assert found["turn_3"]["turn_change"] == -50.0
    assert found["turn_1"]["turn_change"] is found["mean"]["turn_change"] is None
    # The means of the documents are 66.7, 100, 33.3 and 66.7.
    mean = paired_interval([200 / 3, 100, 100 / 3, 200 / 3], [100] * 4)
    ends = [found["mean"][name] for name in ("delta_full", "delta_ci_low", "delta_ci_high")]
    assert ends == pytest.approx([mean.estimate, mean.low, mean.high])
    assert found["mean"]["score"] == pytest.approx(200 / 3)
    together = [{**one, "score": 100.0 * (one["document"] == "a")} for one in samples]
    ends = [paired_columns(together, None)["mean"][name] for name in ("score_ci_low", "score")]
    of_four = paired_columns(together[::3], None)["turn_1"]
    assert ends == [of_four["score_ci_low"], 25.0]


# Files with SCBench's columns ---------------------------------------------------------------------


def line(number: int, turns: int = 3) -> dict[str, Any]:
    words = " ".join(f"word {place}" for place in range(20))
    return {
        "id": number,
        "context": f"Read the text. {words} The secret of {number} is five.",
        "multi_turns": [
            {"input": f"What is the secret of {number} in {turn}?", "answer": answer}
            for turn, answer in enumerate(["five", 7, ["a b", "c"], "no"][:turns])
        ],
    }


def written(folder: Path, *lines: Any, name: str = "kv.jsonl") -> str:
    path = folder / name
    if name.endswith("parquet"):
        pd.DataFrame(list(lines)).to_parquet(path)
    else:
        texts = [one if isinstance(one, str) else json.dumps(one) for one in lines]
        path.write_text("\n".join(texts) + "\n")
    return str(path)


def from_file(source: str, **settings: Any) -> MultiTurn:
    return make(**{"length": None, "source": source, **settings})


def test_a_file_has_scbenchs_columns(loaded: LoadedModel, tmp_path: Path) -> None:
    task = from_file(written(tmp_path, *map(line, range(4))), num_samples=2)
    prompts = task.tokenised(loaded)
    assert [one.sample.sample_id for one in prompts][::3] == ["line-1 turn 1", "line-2 turn 1"]
    first, second, third = (one.sample for one in prompts[:3])
    assert first.question == "\n\nWhat is the secret of 0 in 0?"
    assert (first.answers, second.answers, third.answers) == (("five",), ("7",), ("a b", "c"))
    text = first.context + first.question + " five" + second.question + " 7" + third.question
    given = prompts[2].prefill_ids + prompts[2].decode_ids
    assert given == tuple(encode(loaded.tokenizer, text))
    assert task.score(third, "c, then A B") == 100.0
    assert task.score(third, "c") == 50.0
    assert task.sample_counts("turn_2") == {"wanted_samples": 2, "source_samples": 4}
    assert task.sample_counts("mean") == {
        **{"wanted_samples": 6, "source_samples": 12},
        "skipped_samples": 0,
    }
    label = task.prompts(loaded)
    assert label.startswith("files kv.jsonl ")
    assert label.endswith(" (raw)")
    assert from_file(task.source or "", seed=1).prompts(loaded) == label


def test_parquet_holds_the_same_documents(loaded: LoadedModel, tmp_path: Path) -> None:
    lines = [line(number, turns=1) for number in range(2)]  # columns of one type
    for one in lines:
        one["multi_turns"] *= 2
    found = [
        from_file(written(tmp_path, *lines, name=name), num_turns=2, num_samples=2).samples(loaded)
        for name in ("kv.jsonl", "kv.parquet")
    ]
    assert found[0] == found[1]


def test_rows_of_a_data_set_of_the_hub_are_read(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "topkbench.tasks.multi_turn_documents.hub_rows", lambda *given: [line(5), line(6)]
    )
    task = from_file("hub:owner/name/kv@abc", num_samples=1)
    assert task.samples(loaded)[0].context == line(5)["context"]
    assert task.prompts(loaded).startswith("files owner/name/kv@abc ")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "it must be JSON"),
        ("[1]", "it must be an object"),
        ({"multi_turns": []}, "context must be a text and not empty, got null"),
        ({**line(0), "context": " \n"}, "context must be a text and not empty"),
        ({**line(0), "context": "a\ud800"}, "context must be Unicode without lone surrogates"),
        (line(0, turns=2), "multi_turns must list at least task.num_turns=3 questions"),
        ({**line(0), "multi_turns": [7] * 3}, r"multi_turns\[0\] must be an object with input and"),
        (
            {**line(0), "multi_turns": [{"input": "", "answer": "a"}] * 3},
            r"multi_turns\[0\].input must be a text and not empty",
        ),
        (
            {**line(0), "multi_turns": [{"input": "a", "answer": ""}] * 3},
            r"multi_turns\[0\].answer must be a text and not empty",
        ),
        (
            {**line(0), "multi_turns": [{"input": "a", "answer": []}] * 3},
            r"multi_turns\[0\].answer must not be empty",
        ),
        (
            {**line(0), "multi_turns": [{"input": "a", "answer": "b", "options": ["b", "c"]}] * 3},
            r"multi_turns\[0\] must ask for a text, as choices are not supported",
        ),
    ],
)
def test_a_bad_line_is_refused_in_one_sentence_or_left_out(
    loaded: LoadedModel, tmp_path: Path, bad: Any, message: str
) -> None:
    source = written(tmp_path, line(1), bad, line(2))
    with pytest.raises(ValueError, match=rf"line 2 of .*kv.jsonl must be .*{message}"):
        from_file(source)
    task = from_file(source, skip_bad=True)
    assert [one.document for one in task.samples(loaded)[::3]] == ["line-1", "line-3"]
    assert task.sample_counts("mean")["skipped_samples"] == 1


def test_a_document_that_exceeds_the_window_is_refused_or_left_out(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    long = {**line(1), "context": "word " * 1020}
    source = written(tmp_path, long, line(2))
    sentence = "a document and its turns must fit the window of 1024 tokens of random, got"
    with pytest.raises(TaskDoesNotFit, match=sentence):
        from_file(source).samples(loaded)
    task = from_file(source, skip_bad=True)
    assert len(task.samples(loaded)) == 3
    assert task.sample_counts("mean")["skipped_samples"] == 1
    with pytest.raises(TaskDoesNotFit, match="but none does"):
        from_file(written(tmp_path, long), skip_bad=True).samples(loaded)


def test_a_file_without_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"task\.source must hold readable Parquet, got"):
        from_file(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match="found no file at /no/such"):
        from_file("/no/such")
    with pytest.raises(ValueError, match="must hold at least one document with 3 questions"):
        from_file(written(tmp_path, ""))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_turns": 1}, "task.num_turns must be at least 2, got 1"),
        ({"wording": "own"}, "task.wording must be words, ruler or null, got 'own'"),
        ({"new_tokens": 0}, "task.new_tokens must be at least 1, got 0"),
        ({"skip_bad": True}, "task.skip_bad is a setting of task.source, got True without one"),
        ({"source": "a.jsonl"}, "task.length must be null with task.source"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_a_length_that_does_not_fit_is_refused(loaded: LoadedModel) -> None:
    # A first draft of this length has more tokens than the window.
    assert len(make(length=1024, num_samples=2).samples(loaded)) == 6
    with pytest.raises(TaskDoesNotFit, match=r"task\.length must be at most the window of 1024"):
        make(length=1025, num_samples=1).samples(loaded)
    with pytest.raises(TaskDoesNotFit, match=r"use a larger task\.length"):
        make(length=60, num_samples=1).samples(loaded)
