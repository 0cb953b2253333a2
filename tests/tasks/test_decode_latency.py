"""One decode step of one layer: timed only if its result is correct."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from topkbench.harness.layer import Layer, time_layer
from topkbench.harness.main import make_method
from topkbench.harness.planted import BLOCK, PlantedCalibration, PlantedStates, capture
from topkbench.harness.task import Context, TaskRow
from topkbench.kernels.timing import Bandwidth, MemoryProbe, OtherLoad, Stages, Timing
from topkbench.methods.base import (
    AnyMethod,
    CacheView,
    Geometry,
    Policy,
    Selection,
    StepContext,
    StepResult,
)
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.h2o import H2O
from topkbench.methods.hata import HATA
from topkbench.methods.infinigen import InfiniGen
from topkbench.methods.magicpig import MagicPIG
from topkbench.methods.quest import Quest
from topkbench.methods.snapkv import SnapKV
from topkbench.methods.twilight import Twilight
from topkbench.models.load import LoadedModel
from topkbench.models.prefill_store import PrefillStore
from topkbench.tasks import decode_latency
from topkbench.tasks.decode_latency import DecodeLatency

CONF = Path(__file__).parents[2] / "conf"
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
SPEED = (
    "decode_ms_p50",
    "decode_ms_warm_p50",
    "speedup_vs_full",
    "build_ms",
    "attend_ms",
    "bandwidth_fraction",
)


@pytest.fixture(autouse=True)
def two_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotate over two copies only: exceeding a real cache at these lengths takes many copies."""
    monkeypatch.setattr("topkbench.harness.layer.copies_needed", lambda num_bytes, device: 2)


def task(**knobs: Any) -> DecodeLatency:
    small = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 32, "trials": 3}
    return DecodeLatency(**{"lengths": (300,), "budget": 0.25, **small, **knobs})


def rows(
    loaded: LoadedModel,
    store: PrefillStore,
    method: AnyMethod,
    latency_task: DecodeLatency,
    k: int = 16,
) -> list[TaskRow]:
    context = Context(loaded, store, method, Policy(k=k), FullAttention(), {})
    return latency_task.run(context).rows


@pytest.mark.parametrize(
    "method",
    [
        ExactTopK(),
        HATA(weights="random", rbit=64),
        Quest(page_size=8),
        Twilight(base=Quest(page_size=8), base_k=4, p=1.0),  # the inner append is undone too
    ],
    ids=lambda method: method.name,
)
def test_a_correct_step_has_all_times(
    loaded: LoadedModel, store: PrefillStore, method: AnyMethod
) -> None:
    found = rows(loaded, store, method, task(lengths=(300, 513)))
    assert [(row.subtask, row.status, row.values["k"]) for row in found] == [
        ("300", "ok", 75),
        ("513", "ok", 128),
    ]
    values = found[0].values
    assert all(values[column] > 0 for column in (*SPEED, "score_ms", "select_ms", "append_ms"))
    assert (values["kv_len"], values["length"], values["batch_size"]) == (300, 300, 1)
    # At most 9 pages of 8 tokens, the last of which has only 4.
    assert 68 / 300 <= values["density"] <= 75 / 300


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_correct_step(
    loaded: LoadedModel, store: PrefillStore, name: str
) -> None:
    """Methods are as their YAML configures them, except for shorter training."""
    overrides = [f"method={name}", "rbit=64"]
    overrides += {
        "hata": ["method.weights=random"],
        "hash_attention": ["method.steps=2"],
    }.get(name, [])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        method = make_method(compose("config", overrides).method)
    (row,) = rows(loaded, store, method, task())
    assert (row.status, row.reason) == ("ok", "")
    assert row.values["decode_ms_p50"] > 0


def test_full_attention_is_timed_by_the_same_task(loaded: LoadedModel, store: PrefillStore) -> None:
    (row,) = rows(loaded, store, FullAttention(), task())
    values = row.values
    assert row.status == "ok"
    assert values["attend_ms"] == values["decode_ms_p50"] > 0
    assert "speedup_vs_full" not in values
    assert values["bytes_read_per_step"] == 2 * 300 * 2 * 32 * 4


def test_the_tokens_that_a_step_read_are_charged_not_the_budget(
    loaded: LoadedModel, store: PrefillStore
) -> None:
    shape = Geometry(num_layers=1, num_heads=6, num_kv_heads=2, head_dim=32, dtype_bytes=4)
    states = PlantedStates.draw(shape, 1, 300, torch.float32, 0)
    cache = CacheView(states.key_states, states.value_states)
    step = StepContext(states.query_states, cache, Policy(k=75), 32**-0.5)
    methods: list[AnyMethod] = [
        Twilight(base=ExactTopK(), p=0.5),
        MagicPIG(hash_bits=4, num_tables=8, native={"head_scope": "query_head"}),
    ]
    for method in methods:
        index = method.index_prompt(step, 300, {})
        method.append(index, *cache.newest())
        selection = method.step(index, step).selection
        assert selection is not None
        assert selection.scanned is not None
        read = round(selection.tokens_read(cache).double().mean().item())
        scanned = round(selection.scanned.double().mean().item())
        (row,) = rows(loaded, store, method, task())
        expected = method.bytes_read(shape, 300, read, scanned)
        assert expected != method.bytes_read(shape, 300, 75)
        assert row.values["bytes_read_per_step"] == expected


@pytest.mark.parametrize("batch_size", [1, 2])
def test_column_sums_are_captured_from_queries_at_all_positions(
    monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    monkeypatch.setattr("topkbench.harness.planted.BLOCK", 128)
    monkeypatch.setattr("topkbench.methods.captured.WEIGHTS", 6 * 300 * 50)
    keys = planted(batch_size, 300).key_states
    both = frozenset({"column_sums", "query_tail"})
    captured = capture(both, keys, 6, 32**-0.5)
    assert captured.column_sums is not None
    assert captured.query_tail is not None
    assert captured.column_sums.shape == (batch_size, 6, 300)
    # Each query's attention weights sum to one.
    torch.testing.assert_close(captured.column_sums.sum(-1), torch.full((batch_size, 6), 300.0))
    assert captured.query_tail.shape == (batch_size, 6, 64, 32)
    assert set(captured.milliseconds) == both
    tail = capture(frozenset({"query_tail"}), keys[:, :, :40], 6, 32**-0.5)
    assert tail.query_tail is not None
    assert tail.query_tail.shape == (batch_size, 6, 40, 32)
    assert tail.column_sums is None


@pytest.mark.parametrize("method", [H2O(), SnapKV()], ids=lambda method: method.name)
def test_capturing_at_prefill_counts_as_build_time(method: AnyMethod) -> None:
    layer = Layer(method, Policy(k=16), planted(2, 100))
    assert set(layer.captured.milliseconds) == set(method.traits.needs)
    layer.captured.milliseconds = dict.fromkeys(method.traits.needs, 1e6)
    assert 1e6 < layer.build_ms(1) < 1.1e6
    assert layer.copy().captured is layer.captured  # it is not captured again


def test_a_step_includes_speculating_its_queries() -> None:
    """The step has one projection per row, as wide as all query heads together."""
    method, states = InfiniGen(), planted(2, 100)
    method.load_artifact(method.fit(PlantedCalibration.of(states)))
    layer = Layer(method, Policy(k=16), states)
    for one in (layer, layer.copy()):
        with FlopCounterMode(display=False) as counter:
            one.step()
        assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == 2 * 2 * (6 * 32) ** 2


def test_the_parts_of_a_stage_add_up_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topkbench.harness.layer.copies_needed", lambda num_bytes, device: 1)
    steps = iter(range(3))

    class Timed(Layer):
        """Records two parts of a stage, and another stage, in each step whose stages are timed."""

        def step(self, watch: Any = None) -> StepResult:
            if isinstance(watch, Stages):
                watch.taken_ms.setdefault("encode", []).extend([10.0, float(next(steps))])
                watch.taken_ms.setdefault("attend", []).append(5.0)
            return super().step()

    shape = Geometry(num_layers=1, num_heads=6, num_kv_heads=2, head_dim=32)
    layer = Timed(ExactTopK(), Policy(k=16), planted(1, 100))
    values, status, _ = time_layer(layer, FullAttention(), shape, trials=3)
    assert (status, values["encode_ms"], values["attend_ms"]) == ("ok", 11.0, 5.0)
    assert not {"append_ms", "score_ms", "select_ms"} & set(values)


def test_the_bandwidth_is_measured_in_turn_with_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def measured(functions: Mapping[str, Any], **_: Any) -> dict[str, Timing]:
        """Return times of 2 ms, but 4 ms for the method between reads, as of a slower minute."""
        asked.append(list(functions))
        slow = 4.0 if "memory read" in functions else 2.0
        return {name: Timing.of([slow if name == "method" else 2.0] * 3) for name in functions}

    monkeypatch.setattr("topkbench.harness.layer.measure", measured)
    monkeypatch.setattr(MemoryProbe, "bandwidth", lambda _, __: Bandwidth(0.5, 0.25))
    shape = Geometry(num_layers=1, num_heads=6, num_kv_heads=2, head_dim=32)
    layer = Layer(ExactTopK(), Policy(k=16), planted(3, 100))
    values, _, _ = time_layer(layer, FullAttention(), shape, trials=3)
    in_turn = ["memory read", "memory copy", "full", "method"]
    assert asked == [["full", "method"], ["warm"], in_turn]
    assert (values["decode_ms_p50"], values["bandwidth_gb_s"]) == (2.0, 0.5)
    per_prompt = values["bytes_read_per_step"]
    assert values["bandwidth_fraction"] == pytest.approx(3 * per_prompt / 4e-3 / 0.5e9)


class Broken(ExactTopK):
    """Correct with impl=reference, wrong with the fast implementation."""

    def attend(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        out, lse = super().attend(*args, **kwargs)
        return (out if self.impl == "reference" else 1.01 * out), lse


def test_a_wrong_output_has_no_time(loaded: LoadedModel, store: PrefillStore) -> None:
    (row,) = rows(loaded, store, Broken(), task())
    assert row.status == "wrong"
    assert row.reason.startswith(
        "the output must be the reference's within 0.001, got a difference"
    )
    assert [name for name in SPEED if row.values.get(name) is not None] == []
    assert "tokens_per_s" not in row.values


def test_nan_is_wrong(loaded: LoadedModel, store: PrefillStore) -> None:
    class Nan(Broken):
        def attend(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            out, lse = super().attend(*args, **kwargs)
            return out * float("nan"), lse

    assert rows(loaded, store, Nan(), task())[0].status == "wrong"


@pytest.mark.parametrize(("budget", "k"), [(0.5, 150), (0.001, 64), (None, 16)])
def test_k_is_a_share_of_the_length_or_the_cells(
    loaded: LoadedModel, store: PrefillStore, budget: float | None, k: int
) -> None:
    (row,) = rows(loaded, store, ExactTopK(), task(budget=budget))
    assert (row.status, row.values["k"]) == ("ok", k)


def test_a_trained_method_is_fitted_on_the_states(loaded: LoadedModel, store: PrefillStore) -> None:
    method = HATA(weights="trained", rbit=32, epochs=1, steps_per_epoch=1)
    (row,) = rows(loaded, store, method, task())
    assert row.status == "ok"


def test_a_length_that_does_not_fit_into_memory_is_skipped(
    loaded: LoadedModel, store: PrefillStore
) -> None:
    found = rows(loaded, store, ExactTopK(), task(lengths=(300, 10**12)))
    assert [row.status for row in found] == ["ok", "skipped"]
    assert found[1].reason.endswith("GiB of states exceed half of the free memory.")


def test_captured_states_equal_the_models(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    latency_task = task(lengths=(200,), states="captured", layer=1, cache_dir=str(tmp_path))
    context = Context(loaded, store, ExactTopK(), Policy(k=16), FullAttention())
    states = latency_task.captured_states(context, 200)
    (sample,) = (tmp_path / "samples").iterdir()
    n = states.key_states.shape[2]
    assert 180 < n <= 200
    assert sample.exists()
    # Attention over the captured states gives the output of the model's own attention layer.
    weights = (states.query_states @ states.key_states.mT * 16**-0.5).softmax(-1)
    outputs: list[Tensor] = []
    projection = loaded.model.model.layers[1].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda _, args: outputs.append(args[0][0, -1]))
    latency_task.captured_states(context, 200)
    hook.remove()
    expected = (weights @ states.value_states).flatten()
    torch.testing.assert_close(expected, outputs[0], rtol=1e-4, atol=1e-5)
    (row,) = latency_task.run(context).rows
    assert (row.status, row.subtask) == ("ok", "200")
    assert (row.values["kv_len"], row.values["length"]) == (n, 200)
    assert row.values["index_bytes_per_token"] == 0


def test_a_layer_that_the_model_does_not_have_is_refused(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    latency_task = task(lengths=(200,), states="captured", layer=2, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"task\.layer must lie between 0 and 1, got 2"):
        rows(loaded, store, ExactTopK(), latency_task)


class Rounded(ExactTopK):
    """Returns scores that differ from the reference's in the last bits, which breaks near ties."""

    def score(self, *args: Any, **kwargs: Any) -> Tensor:
        scores = super().score(*args, **kwargs)
        return scores if self.impl == "reference" else (1024 * scores).round() / 1024


def test_a_near_tie_is_not_wrong(loaded: LoadedModel, store: PrefillStore) -> None:
    (row,) = rows(loaded, store, Rounded(), task(dtype="bfloat16"))
    assert row.status == "ok"


class Shifted(ExactTopK):
    """Selects the left neighbour of each token that it should select."""

    def select(self, *args: Any, **kwargs: Any) -> Selection:
        selection = super().select(*args, **kwargs)
        if self.impl != "reference":
            selection.indices = (selection.indices - 1).clamp_min(0)
        return selection


def test_a_wrong_selection_has_no_time(loaded: LoadedModel, store: PrefillStore) -> None:
    (row,) = rows(loaded, store, Shifted(), task())
    assert row.status == "wrong"
    assert row.reason.startswith("the selection must be the reference's")


class RecordedAddresses(ExactTopK):
    """Records the memory address of each step's queries."""

    def step(self, index: Any, context: StepContext, *args: Any, **kwargs: Any) -> StepResult:
        self.addresses.append(context.query_states.data_ptr())
        return super().step(index, context, *args, **kwargs)


def test_cold_steps_rotate_over_copies_and_warm_steps_use_one(
    loaded: LoadedModel, store: PrefillStore
) -> None:
    method = RecordedAddresses()
    method.addresses = []
    (row,) = rows(loaded, store, method, task(trials=4))
    assert row.status == "ok"
    first, *others = method.addresses  # the first step counts the density
    cold, warm, stages = others[:9], others[9:18], others[18:22]  # 5 of the 9 are warm-up
    second, third = cold[:2]
    assert len({first, second, third}) == 3
    assert cold == [second, third, first] * 3  # full attention begins at the first
    assert warm == [first] * 9
    assert stages == [first, second, third, first]
    assert others[22:] == cold  # between reads of memory


def test_what_is_timed_in_turn_reads_other_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a step would find in the cache what the one before has read."""
    monkeypatch.setattr("topkbench.harness.layer.copies_needed", lambda num_bytes, device: 6)
    taken: list[tuple[str, int]] = []
    step = Layer.step

    def recorded(layer: Layer, *arguments: Any) -> StepResult:
        name = str(getattr(layer.method, "backend", "method"))
        taken.append((name, layer.states.key_states.data_ptr()))
        return step(layer, *arguments)

    layer = Layer(ExactTopK(), Policy(k=16), planted(1, 100))
    monkeypatch.setattr(Layer, "step", recorded)
    shape = Geometry(num_layers=1, num_heads=6, num_kv_heads=2, head_dim=32)
    time_layer(layer, FullAttention(backend="cpu"), shape, trials=6)
    first = next(place for place, one in enumerate(taken) if one[0] == "sdpa")
    cold = taken[first : first + 3 * 11]
    assert [name for name, _ in cold] == ["sdpa", "cpu", "method"] * 11
    copies = [address for name, address in cold if name == "sdpa"][:6]
    assert len(set(copies)) == 6
    for place, (_, address) in enumerate(cold):
        assert address == copies[(place // 3 + place % 3 * 2) % 6]
    stages = taken[first + 3 * 11 + 11 :][: 2 * 6]  # after the warm steps
    assert [name for name, _ in stages] == ["cpu", "method"] * 6
    for (_, before), (_, address) in zip(stages[::2], stages[1::2], strict=True):
        assert copies.index(before) == (copies.index(address) - 2) % 6


def test_each_length_is_a_row_and_each_batch_at_one_length(
    loaded: LoadedModel, store: PrefillStore
) -> None:
    latency_task = task(lengths=(300, 128), batch_sizes=(1, 3), batch_length=128)
    found = rows(loaded, store, HATA(weights="random", rbit=32), latency_task)
    known = [(row.values["length"], row.values["batch_size"]) for row in found]
    assert known == [(300, 1), (128, 1), (128, 3)]
    assert [row.subtask for row in found] == ["300", "128", "128 x 3"]
    assert {row.status for row in found} == {"ok"}
    # Bytes are per prompt; the bandwidth fraction is that of the whole batch.
    reads = [row.values["bytes_read_per_step"] for row in found]
    assert reads[1] == reads[2]
    # 3 prompts' bytes, in the time of a step that took about as long between two reads of memory.
    values = found[2].values
    seconds = 3 * reads[2] / (values["bandwidth_fraction"] * values["bandwidth_gb_s"] * 1e9)
    assert values["decode_ms_p50"] / 5 < seconds * 1e3 < values["decode_ms_p50"] * 5


def test_all_copies_count_towards_the_memory_needed(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, store: PrefillStore
) -> None:
    cached = 2 * 300 * 2 * 32 * 4  # keys and values of 2 heads of 32 in float32
    monkeypatch.setattr(decode_latency, "free_bytes", lambda device: 2 * 3 * cached)
    (row,) = rows(loaded, store, ExactTopK(), task())  # two copies and one temporary copy
    assert row.status == "ok"
    monkeypatch.setattr(decode_latency, "free_bytes", lambda device: 2 * 3 * cached - 2)
    (row,) = rows(loaded, store, ExactTopK(), task())
    needed = row.values.pop("memory_needed_mib")
    assert needed == pytest.approx(3 * cached / 2**20, rel=0.01)
    assert (row.status, row.values) == (
        "skipped",
        {"kv_len": 300, "length": 300, "batch_size": 1},
    )


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"lengths": (1,)}, r"task\.lengths must be at least 2, got 1"),
        ({"lengths": ()}, r"task\.lengths must list at least one value"),
        ({"lengths": (64, 64)}, r"task\.lengths must list each value once, got 64 twice"),
        ({"batch_sizes": (2,), "batch_length": 1}, r"task\.batch_length must be at least 2, got 1"),
        ({"batch_sizes": (0,)}, r"task\.batch_sizes must be at least 1, got 0"),
        ({"batch_sizes": (2,), "states": "captured"}, r"\[\] or \[1\] with states=captured"),
    ],
)
def test_invalid_shapes_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(**knobs)


def planted(batch_size: int, n: int, seed: int = 0) -> PlantedStates:
    shape = Geometry(num_layers=1, num_heads=6, num_kv_heads=2, head_dim=32)
    return PlantedStates.draw(shape, batch_size, n, torch.bfloat16, seed)


def test_planted_states_are_the_same_every_time_and_hold_needles() -> None:
    drawn = planted(3, 100)
    assert torch.equal(drawn.key_states, planted(3, 100).key_states)
    assert not torch.equal(drawn.key_states, planted(3, 100, seed=1).key_states)
    assert drawn.query_states.shape == (3, 2, 3, 32)
    assert drawn.key_states.shape == drawn.value_states.shape == (3, 2, 100, 32)
    assert drawn.key_states.dtype == torch.bfloat16
    logits = drawn.query_states.float() @ drawn.key_states.float().mT * 32**-0.5
    # Two times a query's squared norm, scaled, is far above noise: in each head of each row.
    assert ((logits > 8).sum(-1) <= 8).all()
    assert (logits.amax((-1, -2)) > 8).all()


def test_repeated_blocks_are_keys_of_their_own() -> None:
    keys = planted(2, 2 * BLOCK + 100).key_states.float()
    blocks = [keys[0, 0, :BLOCK], keys[0, 0, BLOCK : 2 * BLOCK], keys[1, 0, :BLOCK]]
    assert len(torch.unique(keys.flatten(0, 2), dim=0)) == keys.flatten(0, 2).shape[0]
    query = planted(1, 2).query_states[0, 0, 0].float()
    logits = torch.stack([block @ query for block in blocks])
    away = torch.corrcoef(logits) - torch.eye(3)
    assert away.abs().max() < 0.6  # 1 / sqrt(32) is one deviation; the same keys would give 1
    assert keys.std().item() == pytest.approx(1.0, abs=0.02)


def test_a_row_has_paired_full_attention_an_interval_and_other_load(
    loaded: LoadedModel, store: PrefillStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OtherLoad, "share", lambda self: 0.381)
    (row,) = rows(loaded, store, ExactTopK(), task(trials=6))
    values = row.values
    assert values["full_ms_p20"] <= values["full_ms_p50"] <= values["full_ms_p80"]
    assert values["speedup_vs_full"] == values["full_ms_p50"] / values["decode_ms_p50"]
    assert values["speedup_ci_low"] <= values["speedup_vs_full"] <= values["speedup_ci_high"]
    assert values["other_load"] == 0.381
    assert "others took 38% of the processors' time" in values["timing_note"]
    (row,) = rows(loaded, store, FullAttention(), task(trials=6))
    assert row.values["full_ms_p50"] == row.values["decode_ms_p50"]
    assert "speedup_vs_full" not in row.values
