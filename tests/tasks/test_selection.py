"""The selection task: all budgets in one pass, measured on full attention's states."""

from pathlib import Path

import pytest

from topkbench.harness.task import Context
from topkbench.methods.base import AnyMethod, Policy
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.streaming_llm import StreamingLLM
from topkbench.models.load import LoadedModel
from topkbench.models.prefill_store import PrefillStore
from topkbench.tasks.selection import SelectionTask

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
