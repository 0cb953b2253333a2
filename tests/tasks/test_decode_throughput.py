"""Tokens per second of a whole model: all steps are the same, timed only if they are correct."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from topkbench.harness.layer import fitted_on
from topkbench.harness.planted import capture
from topkbench.harness.task import Context, TaskRow
from topkbench.kernels.timing import Timing
from topkbench.methods.base import AnyMethod, Policy, StepContext, StepResult
from topkbench.methods.captured import Captured
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.h2o import H2O
from topkbench.methods.hata import HATA
from topkbench.methods.loki import Loki
from topkbench.methods.quest import Quest
from topkbench.methods.streaming_llm import StreamingLLM
from topkbench.models.attach import attach
from topkbench.models.load import LoadedModel
from topkbench.models.prefill_store import PrefillStore
from topkbench.tasks import decode_throughput
from topkbench.tasks.decode_throughput import (
    DecodeThroughput,
    random_keys,
    sharing_weights,
    step,
)

METHODS: dict[str, Callable[[], AnyMethod]] = {
    "exact": ExactTopK,
    "hata": lambda: HATA(rbit=32, epochs=1, steps_per_epoch=1),
    "loki": Loki,
    "quest": lambda: Quest(page_size=8),
    "streaming_llm": StreamingLLM,
}
SPEED = ("tokens_per_s", "decode_ms_p50", "decode_ms_p20", "decode_ms_p80", "speedup_vs_full")


def context(loaded: LoadedModel, store: PrefillStore, method: AnyMethod, k: int = 32) -> Context:
    return Context(loaded, store, method, Policy(k=k), FullAttention())


def rows(
    loaded: LoadedModel, store: PrefillStore, method: AnyMethod, k: int = 32, **knobs: Any
) -> list[TaskRow]:
    made = DecodeThroughput(**{"lengths": (300,), "budget": None, "trials": 2, **knobs})
    return made.run(context(loaded, store, method, k)).rows


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_its_speed_beside_full_attention(
    loaded: LoadedModel, store: PrefillStore, name: str
) -> None:
    (row,) = rows(loaded, store, METHODS[name](), batch_size=3)
    assert (row.subtask, row.status, row.reason) == ("300", "ok", "")
    values = row.values
    assert all(values[column] > 0 for column in (*SPEED, "build_ms", "peak_memory_mib"))
    assert values["tokens_per_s"] == pytest.approx(3000 / values["decode_ms_p50"])
    assert values["speedup_vs_full"] == values["full_ms_p50"] / values["decode_ms_p50"]
    assert (values["kv_len"], values["length"], values["batch_size"]) == (300, 300, 3)
    assert (values["k"], values["full_backend"]) == (32, "sdpa")
    # The last of Quest's four pages of 8 has only 4 tokens.
    assert values["density"] == pytest.approx((28 if name == "quest" else 32) / 300)


def test_full_attention_is_compared_with_nothing(loaded: LoadedModel, store: PrefillStore) -> None:
    values = rows(loaded, store, FullAttention())[0].values
    assert values["tokens_per_s"] > 0
    assert values["full_ms_p50"] == values["decode_ms_p50"]
    assert not {"speedup_vs_full", "build_ms", "k"} & set(values)
    # Keys and values of 2 layers, 2 KV heads of 16 channels in float32.
    assert values["bytes_read_per_step"] == 2 * 300 * 2 * 2 * 16 * 4


@pytest.mark.parametrize(("budget", "lengths", "k"), [(0.5, (300,), 150), (0.001, (300,), 64)])
def test_the_budget_is_a_share_of_the_length(
    loaded: LoadedModel, store: PrefillStore, budget: float, lengths: tuple[int], k: int
) -> None:
    made = DecodeThroughput(budget=budget)
    assert made.all_budgets
    (row,) = rows(loaded, store, ExactTopK(), budget=budget, lengths=lengths)
    assert row.values["k"] == k


def test_capturing_at_prefill_counts_as_build_time(
    loaded: LoadedModel, store: PrefillStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_capture(*args: Any) -> Captured:
        captured = capture(*args)
        captured.milliseconds = {"column_sums": 1e6}
        return captured

    monkeypatch.setattr(decode_throughput, "capture", slow_capture)
    (row,) = rows(loaded, store, H2O(), batch_size=3)
    assert 6e6 < row.values["build_ms"] < 6.1e6  # 3 prompts, 2 layers


class Recorded(ExactTopK):
    """Records the number of indices built and the sizes and address of each step's cache."""

    def __init__(self) -> None:
        super().__init__()
        self.built = 0
        self.caches: set[tuple[int, ...]] = set()

    def build_index(self, prefill: Any) -> Any:
        self.built += 1
        return super().build_index(prefill)

    def step(self, index: Any, context: StepContext, *args: Any, **kwargs: Any) -> StepResult:
        cache = context.cache
        self.caches.add((index.length, index.capacity, cache.n, cache.key_states.data_ptr()))
        return super().step(index, context, *args, **kwargs)


def test_every_step_decodes_the_same_position_of_one_buffer(
    loaded: LoadedModel, store: PrefillStore
) -> None:
    method = Recorded()
    (row,) = rows(loaded, store, method, trials=5)
    assert row.status == "ok"
    # All steps use the one buffer of each layer, which never grows.
    assert {entry[:3] for entry in method.caches} == {(300, 300, 300)}
    assert len(method.caches) == 2
    # In each of two layers once to compile, to count, to check and to time: timed steps build none.
    assert method.built == 8


@pytest.mark.parametrize("name", METHODS)
def test_with_every_token_kept_the_logits_are_full_attentions(
    loaded: LoadedModel, store: PrefillStore, name: str
) -> None:
    cell = context(loaded, store, METHODS[name]())
    method = fitted_on(cell.method, cell.geometry, random_keys(cell.geometry))
    twin = sharing_weights(loaded.model)
    with torch.inference_mode():
        cache, _ = DecodeThroughput().random_cache(cell, 60)
        buffers = [layer.keys.data_ptr() for layer in cache.layers]
        with (
            attach(loaded.model, method, Policy(k=60)) as all_kept,
            attach(twin, FullAttention(), Policy(k=60)) as full,
        ):
            expected = step(twin, full, cache)
            found = step(loaded.model, all_kept, cache)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            # Again, with full attention's step in between.
            assert torch.equal(step(twin, full, cache), expected)
            assert torch.equal(step(loaded.model, all_kept, cache), found)
        with attach(loaded.model, method, Policy(k=12)) as few_kept:
            fewer = step(loaded.model, few_kept, cache)
            assert (fewer - expected).abs().max() > 1e-3
    assert (cache.n, cache.kv_len.tolist()) == (60, [60])
    assert [layer.keys.data_ptr() for layer in cache.layers] == buffers


def test_the_second_model_shares_only_the_weights(loaded: LoadedModel) -> None:
    twin = sharing_weights(loaded.model)
    pairs = zip(twin.parameters(), loaded.model.parameters(), strict=True)
    assert all(mine is its for mine, its in pairs)
    assert twin.config is not loaded.model.config


class Broken(ExactTopK):
    """Returns a wrong attention output."""

    factor = 1.5

    def attend(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        out, lse = super().attend(*args, **kwargs)
        return self.factor * out, lse


class Infinite(Broken):
    factor = float("inf")


@pytest.mark.parametrize(
    ("method", "status", "reason"),
    [
        (
            Infinite(),
            "failed",
            "the attention's output must be finite, got infinity or NaN in layer 0",
        ),
        (
            Broken(),
            "wrong",
            "with k at all 300 tokens the logits must be full attention's within 0.001, ",
        ),
    ],
)
def test_wrong_logits_have_no_speed(
    loaded: LoadedModel, store: PrefillStore, method: AnyMethod, status: str, reason: str
) -> None:
    (row,) = rows(loaded, store, method)
    assert row.status == status
    assert row.reason.startswith(reason)
    assert not {*SPEED, "build_ms"} & set(row.values)


def test_a_length_beyond_window_or_memory_is_skipped(
    loaded: LoadedModel, store: PrefillStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = loaded.model.get_memory_footprint()
    free = int(2 * (weights + 500 * 2**10)) - weights
    monkeypatch.setattr(decode_throughput, "free_bytes", lambda device: free)
    with_window = replace(loaded, window=2000)
    found = rows(with_window, store, ExactTopK(), lengths=(300, 1800, 4000))
    assert [row.status for row in found] == ["ok", "skipped", "skipped"]
    assert found[1].reason.endswith("GiB of weights and caches exceed half of the free memory.")
    assert found[2].reason == "4000 tokens exceed the window of 2000 tokens of random."
    # Keys and values of 2 layers and 2 heads of 16 in float32. Memory varies, the window does not.
    needed = (weights + 1800 * 2 * 2 * 2 * 16 * 4) / 2**20
    assert found[1].values.pop("memory_needed_mib") == pytest.approx(needed)
    assert found[1].values == {"kv_len": 1800, "length": 1800, "batch_size": 1}
    assert found[2].values == {"kv_len": 4000, "length": 4000, "batch_size": 1}


def test_a_step_that_cannot_be_captured_in_a_graph_is_skipped(
    loaded: LoadedModel, store: PrefillStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph_requests: list[bool] = []

    def measure(*args: Any, cuda_graph: bool) -> dict[str, Timing]:
        graph_requests.append(cuda_graph)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(decode_throughput, "measure", measure)
    with pytest.raises(RuntimeError, match="not permitted"):  # without a graph it is an error
        rows(loaded, store, ExactTopK())
    monkeypatch.setattr(DecodeThroughput, "_graph", lambda *_: True)
    (row,) = rows(loaded, store, ExactTopK())
    assert graph_requests == [False, True]
    assert row.status == "skipped"
    assert row.reason == (
        "the step must record into a CUDA graph, got operation not permitted when stream is"
        " capturing; task.cuda_graph=false times it kernel by kernel."
    )
    assert not {*SPEED, "build_ms"} & set(row.values)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_whole_step_can_be_captured_in_a_graph(tmp_path: Path, loaded: LoadedModel) -> None:
    moved = replace(loaded, model=copy.deepcopy(loaded.model).to("cuda", torch.bfloat16))
    store = PrefillStore(moved.model)
    for make in (FullAttention, *METHODS.values()):
        (row,) = rows(moved, store, make())
        assert (row.status, row.reason) == ("ok", "")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"lengths": ()}, r"task\.lengths must list at least one value"),
        ({"lengths": (1, 8)}, r"task\.lengths must be at least 2, got 1"),
        ({"budget": 0}, r"task\.budget must be a share above 0 and up to 1, got 0"),
        ({"trials": 0}, r"task\.trials must be at least 1, got 0"),
        ({"batch_size": 0}, r"task\.batch_size must be at least 1, got 0"),
    ],
)
def test_an_invalid_setting_is_refused_in_one_line(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeThroughput(**knobs)
