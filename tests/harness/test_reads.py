"""The bytes of a decode step follow from the tokens and index entries that it read."""

from pathlib import Path

import pytest

from topkbench.harness.cell import prepare_method, run_cell
from topkbench.harness.decoding import tokenise_all
from topkbench.harness.task import Context
from topkbench.methods.base import Policy
from topkbench.methods.double_sparsity import DoubleSparsity
from topkbench.methods.eviction import Mode
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.quest import Quest
from topkbench.methods.snapkv import SnapKV
from topkbench.methods.twilight import Twilight
from topkbench.models.attach import attach
from topkbench.models.load import LoadedModel
from topkbench.models.prefill_store import PrefillStore
from topkbench.tasks.ruler_words import RulerWords
from topkbench.tasks.ruler_words_prompts import CalibrationPrompts


def test_query_heads_that_select_separately_are_charged_for_all_tokens_read(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    native = {"head_scope": "query_head"}
    policy = Policy(k=24, num_sink=0, num_recent=0, protocol="native")
    settings = {"length": 200, "num_samples": 1, "subtasks": ("vt",), "cache_dir": str(tmp_path)}
    task = RulerWords(**settings)  # type: ignore[arg-type]
    context = Context(loaded, store, ExactTopK(native=native), policy, FullAttention(), {})
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
    task = RulerWords(**settings)  # type: ignore[arg-type]
    method = SnapKV(window=8, mode=mode)
    context = Context(loaded, store, method, policy, FullAttention(), {})
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
    task = RulerWords(**settings)  # type: ignore[arg-type]
    policy = Policy(k=24, num_sink=0, num_recent=1)  # the page being filled is always read
    context = Context(loaded, store, Quest(page_size=8), policy, FullAttention(), {})
    mean = run_cell(context, task).rows[-1].values
    pages = -(-mean["kv_len"] // 8)
    tokens = (mean["bytes_read_per_step"] / 2 - pages * 2 * 2 * 16 * 4) / (2 * 2 * 16 * 4)
    assert 16 < tokens < 24  # two whole pages, and half of the last one on average


def test_with_selections_per_query_head_labels_are_built_and_charged_per_query_head(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    method = DoubleSparsity(channels=4, native={"head_scope": "query_head"})
    prepare_method(loaded, method, CalibrationPrompts(), tmp_path)
    task = RulerWords(length=200, num_samples=1, subtasks=("vt",), cache_dir=str(tmp_path))
    for protocol, heads in (("unified", 2), ("native", 4)):
        policy = Policy(k=24, num_sink=0, num_recent=0, protocol=protocol)  # type: ignore[arg-type]
        context = Context(loaded, store, method, policy, FullAttention(), {})
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
    task = RulerWords(**settings)  # type: ignore[arg-type]
    method = Twilight(base=ExactTopK(), base_k=4, native={"head_scope": "query_head"})
    context = Context(loaded, store, method, policy, FullAttention(), {})
    mean = run_cell(context, task).rows[-1].values
    without_keys = mean["bytes_read_per_step"] / 2 - mean["kv_len"] * 2 * 16 * 4
    # Keys in 4 bits of the candidates, whole keys and values of the selected tokens.
    tokens = mean["density"] * mean["kv_len"]
    assert 2 * 12 < tokens <= 2 * 4 * 12  # bounded by the mass, not by k
    candidates = (without_keys - tokens * 2 * 2 * 16 * 4) / (2 * (16 / 2 + 4))
    assert 4 * 12 < candidates <= 2 * 4 * 12  # two queries of each KV head
