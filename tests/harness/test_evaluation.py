"""A question-answering cell: its rows, its samples, and the bytes and times of each pass."""

from pathlib import Path
from typing import Any

import pytest
import torch

from topkbench.harness.cell import prepare_method, run_cell
from topkbench.harness.decoding import Prompt
from topkbench.harness.evaluation import (
    Context,
    Outcome,
    TaskRow,
    spread_over_subtasks,
    tokenise_all,
)
from topkbench.harness.task import Sample
from topkbench.methods.base import Policy, TopKMethod
from topkbench.methods.double_sparsity import DoubleSparsity
from topkbench.methods.eviction import Mode
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.h2o import H2O
from topkbench.methods.quest import Quest
from topkbench.methods.snapkv import SnapKV
from topkbench.methods.streaming_llm import StreamingLLM
from topkbench.methods.twilight import Twilight
from topkbench.models.attach import attach
from topkbench.models.load import LoadedModel
from topkbench.models.prefill import PrefillStore
from topkbench.tasks.decode_latency import DecodeLatency
from topkbench.tasks.decode_throughput import DecodeThroughput
from topkbench.tasks.ruler import Ruler
from topkbench.tasks.ruler_prompts import CalibrationPrompts
from topkbench.tasks.selection import SelectionTask

QUALITY = ("recall_at_k", "attention_mass", "output_rel_error")


def run(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path, method: TopKMethod, **knobs: Any
) -> Outcome:
    settings = {"length": 200, "num_samples": 2, "subtasks": ("niah_single", "vt")}
    task = Ruler(**{**settings, "cache_dir": str(tmp_path), **knobs})  # type: ignore[arg-type]
    policy = Policy(k=24, num_sink=0, num_recent=0)
    return run_cell(Context(loaded, store, method, policy, FullAttention(), None, 1e9), task)


def test_a_cell_has_a_row_per_subtask_and_their_mean(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    outcome = run(loaded, store, tmp_path, ExactTopK())
    names = [(row.subtask, row.values["num_samples"], row.status) for row in outcome.rows]
    assert names == [("niah_single", 2, "ok"), ("vt", 2, "ok"), ("mean", 4, "ok")]
    mean = outcome.rows[-1].values
    scores = [one["score"] for one in outcome.samples]
    assert mean["score"] == pytest.approx(sum(scores) / 4)
    assert mean["recall_at_k"] == pytest.approx(1.0)
    assert 0 < mean["attention_mass"] < 1
    # About 190 tokens are cached, of which 24 are read.
    assert mean["density"] == pytest.approx(24 / 190, abs=0.02)
    for column in ("prefill_ms", "build_ms", "decode_ms_p50", "score_ms", "select_ms", "attend_ms"):
        assert mean[column] > 0
    assert mean["decode_ms_p20"] <= mean["decode_ms_p50"] <= mean["decode_ms_p80"]
    assert mean["tokens_per_s"] == pytest.approx(1e3 / mean["decode_ms_p50"])
    assert mean["speedup_vs_full"] == mean["full_ms_p50"] / mean["decode_ms_p50"]
    # Even if few prompts are timed, there are enough pairs of turns for an interval.
    assert mean["speedup_ci_low"] <= mean["speedup_vs_full"] <= mean["speedup_ci_high"]
    # 2 layers; each reads every key to score (2 heads of 16 channels of 4 bytes), then 24 tokens.
    n = mean["kv_len"]
    assert mean["bytes_read_per_step"] == 2 * (n * 2 * 16 * 4 + 24 * 2 * 2 * 16 * 4)
    stages = ("encode_ms", "append_ms", "score_ms", "select_ms", "attend_ms")
    attention = sum(mean[stage] or 0.0 for stage in stages) * 1e-3
    assert mean["bandwidth_fraction"] == pytest.approx(
        mean["bytes_read_per_step"] / attention / 1e9  # the context's bandwidth
    )
    assert store.forwards == 4


def test_freeing_tokens_changes_no_answer_and_reduces_the_reported_cache(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    masked = run(loaded, store, tmp_path, H2O())
    compact = run(loaded, store, tmp_path, H2O(mode="compact"))
    answers = [[one["tokens"] for one in outcome.samples] for outcome in (masked, compact)]
    assert answers[0] == answers[1]
    masked_row, compact_row = masked.rows[-1].values, compact.rows[-1].values
    assert compact_row["density"] == pytest.approx(masked_row["density"])
    # 2 layers of 2 heads of 16 channels: 24 tokens, and 32 slots that are filled until tokens are
    # freed again.
    assert compact_row["kv_cache_mib"] == 2 * 2 * 2 * 16 * 4 * (24 + 32) / 2**20
    assert masked_row["kv_cache_mib"] > 4 * compact_row["kv_cache_mib"]
    assert {"recall_at_k": 0.5, **compact_row}["recall_at_k"] == 0.5  # the row has no recall
    assert masked_row["recall_at_k"] > 0


@pytest.mark.parametrize("task", [SelectionTask, DecodeLatency, DecodeThroughput])
def test_tasks_that_need_all_tokens_skip_a_method_that_frees_some(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path, task: Any
) -> None:
    made = task(cache_dir=str(tmp_path)) if task is not DecodeThroughput else task()
    context = Context(loaded, store, H2O(mode="compact"), Policy(k=24), FullAttention())
    for row in run_cell(context, made).rows:
        assert row.status == "skipped"
        assert f"task={made.name} needs all tokens in the cache at every step" in row.reason


@pytest.mark.parametrize("method", [SnapKV, StreamingLLM, H2O])
def test_a_method_that_frees_tokens_is_skipped_for_a_policy_per_query_head(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path, method: Any
) -> None:
    made = method(mode="compact", native={"head_scope": "query_head"})
    policy = Policy(k=24, num_sink=0, num_recent=0, protocol="native")
    task = Ruler(length=200, num_samples=1, cache_dir=str(tmp_path))
    outcome = run_cell(Context(loaded, store, made, policy, FullAttention()), task)
    ((status, reason),) = ((row.status, row.reason) for row in outcome.rows)
    assert status == "skipped"
    assert reason.startswith(f"head_scope must be kv_head for {made.name}")
    assert store.forwards == 0
    with (
        pytest.raises(ValueError, match="head_scope must be kv_head for"),
        attach(loaded.model, made, policy),
    ):
        pass


def test_query_heads_that_select_separately_are_charged_for_all_tokens_read(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    native = {"head_scope": "query_head"}
    policy = Policy(k=24, num_sink=0, num_recent=0, protocol="native")
    settings = {"length": 200, "num_samples": 1, "subtasks": ("vt",), "cache_dir": str(tmp_path)}
    task = Ruler(**settings)  # type: ignore[arg-type]
    context = Context(loaded, store, ExactTopK(native=native), policy, FullAttention(), None, 1e9)
    mean = run_cell(context, task).rows[-1].values
    tokens = (mean["bytes_read_per_step"] / 2 - mean["kv_len"] * 2 * 16 * 4) / (2 * 2 * 16 * 4)
    assert tokens == round(tokens)
    assert 24 < tokens <= 48  # two queries of each KV head
    assert tokens == pytest.approx(mean["density"] * mean["kv_len"], rel=0.05)


@pytest.mark.parametrize("mode", ["masked", "compact"])
def test_tokens_kept_on_top_of_the_budget_are_charged(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path, mode: Mode
) -> None:
    """With its native policy SnapKV keeps k tokens of the prompt, and all generated tokens."""
    policy = Policy(k=24, num_sink=0, num_recent=0, protocol="native")
    settings = {"length": 200, "num_samples": 1, "subtasks": ("vt",), "cache_dir": str(tmp_path)}
    task = Ruler(**settings)  # type: ignore[arg-type]
    method = SnapKV(window=8, mode=mode)
    context = Context(loaded, store, method, policy, FullAttention(), None, 1e9)
    outcome = run_cell(context, task)
    (prompt,) = tokenise_all(loaded, task.samples(loaded), "sparse")
    # The question's tokens are decoded, and all answer tokens but the last.
    steps = len(prompt.decode_ids) + outcome.samples[0]["num_generated"] - 1
    read = outcome.rows[-1].values["bytes_read_per_step"]
    if mode == "compact":  # the kept tokens are moved every 32 steps
        read -= read // 33
    tokens = read / (2 * 2 * 2 * 16 * 4)
    assert tokens == pytest.approx(24 + (1 + steps) / 2, abs=0.6)


def test_a_partly_filled_page_is_charged_for_its_tokens_only(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    settings = {"length": 200, "num_samples": 1, "subtasks": ("vt",), "cache_dir": str(tmp_path)}
    task = Ruler(**settings)  # type: ignore[arg-type]
    policy = Policy(k=24, num_sink=0, num_recent=1)  # the page being filled is always read
    context = Context(loaded, store, Quest(page_size=8), policy, FullAttention(), None, 1e9)
    mean = run_cell(context, task).rows[-1].values
    pages = -(-mean["kv_len"] // 8)
    tokens = (mean["bytes_read_per_step"] / 2 - pages * 2 * 2 * 16 * 4) / (2 * 2 * 16 * 4)
    assert 16 < tokens < 24  # two whole pages, and half of the last one on average


def test_with_selections_per_query_head_labels_are_built_and_charged_per_query_head(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    method = DoubleSparsity(channels=4, native={"head_scope": "query_head"})
    prepare_method(loaded, method, CalibrationPrompts(), tmp_path)
    task = Ruler(length=200, num_samples=1, subtasks=("vt",), cache_dir=str(tmp_path))
    for protocol, heads in (("unified", 2), ("native", 4)):
        policy = Policy(k=24, num_sink=0, num_recent=0, protocol=protocol)  # type: ignore[arg-type]
        context = Context(loaded, store, method, policy, FullAttention(), None, 1e9)
        mean = run_cell(context, task).rows[-1].values
        assert mean["index_bytes_per_token"] == 2 * heads * 4 * 4  # 2 layers
        n = mean["kv_len"]
        labels = 2 * n * heads * 4 * 4
        read = (mean["bytes_read_per_step"] - labels) / (2 * 2 * 2 * 16 * 4)
        assert read == pytest.approx(24 if heads == 2 else mean["density"] * n, rel=0.05)
        with attach(loaded.model, method, policy) as session:
            assert session.method.index_bytes_per_token(session.geometry) == heads * 4 * 4


def test_the_candidates_of_query_heads_are_charged_too(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    policy = Policy(k=12, num_sink=0, num_recent=0, protocol="native")
    settings = {"length": 200, "num_samples": 1, "subtasks": ("vt",), "cache_dir": str(tmp_path)}
    task = Ruler(**settings)  # type: ignore[arg-type]
    method = Twilight(base=ExactTopK(), base_k=4, native={"head_scope": "query_head"})
    context = Context(loaded, store, method, policy, FullAttention(), None, 1e9)
    mean = run_cell(context, task).rows[-1].values
    without_keys = mean["bytes_read_per_step"] / 2 - mean["kv_len"] * 2 * 16 * 4
    # Keys in 4 bits of the candidates, whole keys and values of the selected tokens.
    tokens = mean["density"] * mean["kv_len"]
    assert 2 * 12 < tokens <= 2 * 4 * 12  # bounded by the mass, not by k
    candidates = (without_keys - tokens * 2 * 2 * 16 * 4) / (2 * (16 / 2 + 4))
    assert 4 * 12 < candidates <= 2 * 4 * 12  # two queries of each KV head


def test_samples_contain_what_re_scoring_needs(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    outcome = run(loaded, store, tmp_path, FullAttention())
    ids = [one["sample_id"] for one in outcome.samples]
    assert ids == ["niah_single-200-0-0", "niah_single-200-0-1", "vt-200-0-0", "vt-200-0-1"]
    for one in outcome.samples:
        assert one["num_generated"] == len(one["tokens"])
        decoded = loaded.tokenizer.decode(one["tokens"], skip_special_tokens=True)
        assert one["prediction"] == decoded
        assert one["references"]


def test_full_attention_has_no_selection_quality(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    mean = run(loaded, store, tmp_path, FullAttention(), num_samples=1).rows[-1].values
    assert [mean.get(name) for name in QUALITY] == [None, None, None]
    assert mean["density"] == 1.0
    assert mean["speedup_vs_full"] is None
    assert mean["full_backend"] == "sdpa"
    assert mean["attend_ms"] > 0
    assert mean["bytes_read_per_step"] == 2 * mean["kv_len"] * 2 * 2 * 16 * 4


def test_an_unsupported_model_is_skipped_with_a_reason(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = ExactTopK()
    monkeypatch.setattr(
        method, "model_unsupported_reason", lambda geometry: "exact does not support this model."
    )
    outcome = run(loaded, store, tmp_path, method)
    assert outcome == Outcome(
        [TaskRow("mean", {}, "skipped", "exact does not support this model.")], []
    )


def test_running_out_of_memory_is_a_status(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = ExactTopK()

    def build(prefill: object) -> None:
        raise MemoryError("out of memory")

    monkeypatch.setattr(method, "build_index", build)
    (row,) = run(loaded, store, tmp_path, method).rows
    assert (row.status, row.reason) == ("out_of_memory", "out of memory")


def test_a_failed_cpu_allocation_is_out_of_memory_too(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch raises a plain RuntimeError for it; any other RuntimeError must propagate."""
    method = ExactTopK()
    monkeypatch.setattr(method, "build_index", lambda prefill: torch.empty(2**50))
    (row,) = run(loaded, store, tmp_path, method).rows
    assert row.status == "out_of_memory"

    def broken(prefill: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(method, "build_index", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(loaded, store, tmp_path, method)


def test_few_prompts_are_spread_over_the_subtasks() -> None:
    def prompt(name: str, subtask: str) -> Prompt:
        sample = Sample(
            sample_id=name,
            subtask=subtask,
            context="",
            question="",
            answer_prefix="",
            answers=(),
            max_new_tokens=1,
            length=1,
        )
        return Prompt(sample, (), ())

    prompts = [prompt("a", "vt"), prompt("b", "vt"), prompt("c", "cwe"), prompt("d", "fwe")]
    assert [one.sample.sample_id for one in spread_over_subtasks(prompts, 3)] == ["a", "c", "d"]
    assert [one.sample.sample_id for one in spread_over_subtasks(prompts, 9)] == [
        "a",
        "c",
        "d",
        "b",
    ]
