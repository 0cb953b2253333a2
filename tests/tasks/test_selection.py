"""The selection task: all budgets in one pass, measured on full attention's states."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from topkbench.harness.pilot import counted_forwards
from topkbench.harness.sweep import Plan
from topkbench.harness.task import Context
from topkbench.methods.base import AnyMethod, Policy
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.h2o import H2O
from topkbench.methods.streaming_llm import StreamingLLM
from topkbench.models.load import LoadedModel
from topkbench.models.prefill_store import PrefillStore
from topkbench.tasks.selection import SelectionTask
from topkbench.tasks.selection_text import TextSelection

BARE = Policy(k=16, num_sink=0, num_recent=0)


def context(loaded: LoadedModel, store: PrefillStore, method: AnyMethod, policy: Policy) -> Context:
    return Context(loaded, store, method, policy, FullAttention())


def task(tmp_path: Path, **knobs: object) -> SelectionTask:
    settings = {"length": 200, "num_samples": 1, "subtasks": ("niah_single", "vt")}
    return SelectionTask(**{**settings, "cache_dir": str(tmp_path), "budgets": (16, 64), **knobs})  # type: ignore[arg-type]


def test_exact_top_k_recalls_everything(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    outcome = task(tmp_path).run(context(loaded, store, ExactTopK(), BARE))
    assert [(row.subtask, row.values["k"], row.status) for row in outcome.rows] == [
        ("mean", 16, "ok"),
        ("mean", 64, "ok"),
    ]
    for row in outcome.rows:
        assert row.values["recall_at_k"] == pytest.approx(1.0)
        assert row.values["num_samples"] == row.values["judged_prompts"] == 2
    few, many = (row.values for row in outcome.rows)
    assert few["attention_mass"] < many["attention_mass"] < 1
    assert few["output_rel_error"] > many["output_rel_error"] > 0
    assert store.forwards == 2  # one per prompt, for all budgets
    first = outcome.samples[0]
    assert {one["layer"] for one in outcome.samples} == {0, 1}
    assert {one["kv_head"] for one in outcome.samples} == {0, 1}
    assert first["density"] == pytest.approx(16 / 190, abs=0.02)


def test_a_dense_layer_is_not_measured(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    policy = Policy(k=16, dense_layers=1)
    outcome = task(tmp_path).run(context(loaded, store, StreamingLLM(), policy))
    assert {one["layer"] for one in outcome.samples} == {1}


def test_sinks_and_recents_recall_less(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    cell = context(loaded, store, StreamingLLM(), Policy(k=16))
    for row in task(tmp_path).run(cell).rows:
        assert 0 < row.values["recall_at_k"] < 0.9


def test_a_budget_of_all_tokens_is_a_skipped_row(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    cell = context(loaded, store, ExactTopK(), BARE)
    rows = task(tmp_path, budgets=(16, 500)).run(cell).rows
    assert [row.status for row in rows] == ["ok", "skipped"]
    assert rows[1].values == {"k": 500}
    longest = max(prompt.most_cached for prompt in task(tmp_path).tokenised(loaded))
    assert rows[1].reason == (
        f"k=500 must be below the number of cached tokens, which was at most {longest}; use longer "
        "prompts, or leave 500 out of task.budgets."
    )


def test_full_attention_is_skipped_since_it_selects_nothing(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    (row,) = task(tmp_path).run(context(loaded, store, FullAttention(), BARE)).rows
    assert row.status == "skipped"
    assert row.reason.startswith("task=selection needs a method that selects")


def test_the_density_of_a_step_is_relative_to_the_tokens_cached_at_it(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    chosen = task(tmp_path, subtasks=("vt",), budgets=(16,))
    outcome = chosen.run(context(loaded, store, ExactTopK(), BARE))
    (prompt,) = chosen.tokenised(loaded)
    begin = len(prompt.prefill_ids)
    assert len({one["step"] for one in outcome.samples}) > len(prompt.decode_ids)
    for one in outcome.samples:
        assert one["density"] == pytest.approx(16 / (begin + one["step"] + 1))


def test_measured_steps_are_spread_over_question_and_answer(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    chosen = task(tmp_path, subtasks=("vt",), budgets=(16,))
    whole = chosen.run(context(loaded, store, ExactTopK(), BARE))
    few = task(tmp_path, subtasks=("vt",), budgets=(16,), judged_tokens=4)
    outcome = few.run(context(loaded, store, ExactTopK(), BARE))
    (prompt,) = chosen.tokenised(loaded)
    count = len(prompt.decode_ids) + 4  # as many of the answer as are measured
    expected = [(place + 1) * count // 4 - 1 for place in range(4)]
    assert sorted({one["step"] for one in outcome.samples}) == expected
    assert outcome.rows[0].values["judged_tokens"] == 4
    steps = [one for one in whole.samples if one["step"] in expected]
    assert outcome.samples == steps


def test_a_method_with_a_history_sees_the_steps_that_are_not_measured(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"subtasks": ("vt",), "budgets": (16, 64)}
    whole = task(tmp_path, **settings).run(context(loaded, store, H2O(), BARE))
    few = task(tmp_path, **settings, judged_tokens=3).run(context(loaded, store, H2O(), BARE))
    measured = {one["step"] for one in few.samples}
    assert len(measured) == 3
    assert few.samples == [one for one in whole.samples if one["step"] in measured]


def test_full_attention_decodes_a_prompt_once_for_all_methods(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    chosen = task(tmp_path)
    prompts = chosen.tokenised(loaded)
    first = context(loaded, store, ExactTopK(), BARE)
    second = context(loaded, store, StreamingLLM(), BARE)
    second.full_answers = first.full_answers
    plan = chosen.plan(first, prompts)
    assert isinstance(plan, Plan)
    chosen.measure(first, plan, "selections", prompts)
    with counted_forwards(loaded.model) as forwards:
        record = chosen.measure(second, plan, "selections", prompts)
    assert len(forwards) == 0
    alone = chosen.run(context(loaded, PrefillStore(loaded.model), StreamingLLM(), BARE))
    assert record["samples"] == alone.samples


def test_a_prompt_without_decode_steps_measures_nothing(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    chosen = task(tmp_path, subtasks=("vt", "niah_single"), budgets=(16,), question="dense")
    cell = context(loaded, store, ExactTopK(), BARE)
    first, second = chosen.tokenised(loaded)
    cell.full_answers = {first.sample.sample_id: [], second.sample.sample_id: [5, 6, 7]}
    (row,) = chosen.run(cell).rows
    assert (row.status, row.values["judged_prompts"]) == ("ok", 1)
    samples = chosen.run(cell).samples
    assert {one["sample_id"] for one in samples} == {second.sample.sample_id}


def test_selections_are_measured_on_text(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    book = tmp_path / "book.txt"
    book.write_text(" the secret of every word list" * 80)
    chosen = TextSelection(
        length=100, windows=2, scored_tokens=12, judged_tokens=6, budgets=(8,), files=[str(book)]
    )
    outcome = chosen.run(context(loaded, store, ExactTopK(), replace(BARE, k=8)))
    (row,) = outcome.rows
    assert (row.status, row.values["k"], row.values["num_samples"]) == ("ok", 8, 2)
    assert (row.values["judged_tokens"], row.values["length"]) == (2 * 6, 100)
    assert row.values["recall_at_k"] == pytest.approx(1.0)
    # 87 tokens are prefilled and 13 decoded.
    assert sorted({one["step"] for one in outcome.samples}) == [1, 3, 5, 7, 9, 12]
    assert outcome.samples[0]["density"] == pytest.approx(8 / 89)
    assert {one["subtask"] for one in outcome.samples} == {"mean"}
