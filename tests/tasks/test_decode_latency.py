"""One decode step of one layer: timed only where it is right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from topkbench.methods.base import Policy, Selection, TopKMethod
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.hata import HATA
from topkbench.methods.quest import Quest
from topkbench.models.load import LoadedModel
from topkbench.models.prefill import PrefillStore
from topkbench.tasks.decode_latency import DecodeLatency, PlantedStates
from topkbench.tasks.evaluation import Context, TaskRow

SPEED = ("decode_ms_p50", "speedup_vs_full", "build_ms", "attend_ms", "bandwidth_fraction")


def task(**knobs: Any) -> DecodeLatency:
    small = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 32, "trials": 3}
    return DecodeLatency(**{"lengths": (300,), "budget": 0.25, **small, **knobs})


def rows(
    loaded: LoadedModel, store: PrefillStore, method: TopKMethod, made: DecodeLatency, k: int = 16
) -> list[TaskRow]:
    context = Context(loaded, store, method, Policy(k=k), FullAttention(), None, 1e9)
    return made.run(context).rows


@pytest.mark.parametrize(
    "method",
    [ExactTopK(), HATA(weights="random", rbit=64), Quest(page_size=8)],
    ids=lambda method: method.name,
)
def test_a_right_step_has_every_time(
    loaded: LoadedModel, store: PrefillStore, method: TopKMethod
) -> None:
    found = rows(loaded, store, method, task(lengths=(300, 513)))
    assert [(row.subtask, row.status, row.values["k"]) for row in found] == [
        ("300", "ok", 75),
        ("513", "ok", 128),
    ]
    values = found[0].values
    assert all(values[column] > 0 for column in (*SPEED, "score_ms", "select_ms", "append_ms"))
    assert (values["kv_len"], values["length"], values["batch_size"]) == (300, 300, 1)
    # Whole pages of 8, of which the last is half full: 9 pages at most, one of 4 tokens.
    assert 68 / 300 <= values["density"] <= 75 / 300


def test_full_attention_is_timed_by_the_same_task(loaded: LoadedModel, store: PrefillStore) -> None:
    (row,) = rows(loaded, store, FullAttention(), task())
    values = row.values
    assert row.status == "ok"
    assert values["attend_ms"] == values["decode_ms_p50"] > 0
    assert "speedup_vs_full" not in values
    assert values["bytes_read_per_step"] == 2 * 300 * 2 * 32 * 4


class Broken(ExactTopK):
    """Right by its reference, wrong where it is fast."""

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
def test_the_budget_is_a_share_or_the_cells(
    loaded: LoadedModel, store: PrefillStore, budget: float | None, k: int
) -> None:
    (row,) = rows(loaded, store, ExactTopK(), task(budget=budget))
    assert (row.status, row.values["k"]) == ("ok", k)


def test_a_trained_method_is_fitted_on_the_states(loaded: LoadedModel, store: PrefillStore) -> None:
    method = HATA(weights="trained", rbit=32, epochs=1, steps_per_epoch=1)
    (row,) = rows(loaded, store, method, task())
    assert row.status == "ok"


def test_what_does_not_fit_into_memory_is_skipped(loaded: LoadedModel, store: PrefillStore) -> None:
    found = rows(loaded, store, ExactTopK(), task(lengths=(300, 10**12)))
    assert [row.status for row in found] == ["ok", "skipped"]
    assert found[1].reason.endswith("GiB of states exceed half of the free memory.")


def test_captured_states_are_the_models_own(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    made = task(lengths=(200,), states="captured", layer=1, cache_dir=str(tmp_path))
    context = Context(loaded, store, ExactTopK(), Policy(k=16), FullAttention())
    states = made._captured(context, 200)
    (sample,) = (tmp_path / "samples").iterdir()
    n = states.key_states.shape[2]
    assert 180 < n <= 200
    assert sample.exists()
    # The last token's keys and values are what full attention of the model itself would see.
    weights = (states.query_states @ states.key_states.mT * 16**-0.5).softmax(-1)
    found: list[Tensor] = []
    attention = loaded.model.model.layers[1].self_attn.o_proj
    hook = attention.register_forward_pre_hook(lambda _, given: found.append(given[0][0, -1]))
    made._captured(context, 200)
    hook.remove()
    own = (weights @ states.value_states).flatten()
    torch.testing.assert_close(own, found[0], rtol=1e-4, atol=1e-5)
    (row,) = made.run(context).rows
    assert (row.status, row.subtask) == ("ok", "200")
    assert (row.values["kv_len"], row.values["length"]) == (n, 200)
    assert row.values["index_bytes_per_token"] == 0


def test_a_layer_that_the_model_has_not(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    made = task(lengths=(200,), states="captured", layer=2, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"task\.layer must lie between 0 and 1, got 2"):
        rows(loaded, store, ExactTopK(), made)


class Rounded(ExactTopK):
    """Scores that differ from the reference's in their last bits, so that ties fall otherwise."""

    def score(self, *args: Any, **kwargs: Any) -> Tensor:
        scores = super().score(*args, **kwargs)
        return scores if self.impl == "reference" else scores.bfloat16().float() * (1 + 1e-6)


def test_a_near_tie_is_not_wrong(loaded: LoadedModel, store: PrefillStore) -> None:
    (row,) = rows(loaded, store, Rounded(), task(dtype="bfloat16"))
    assert row.status == "ok"


class Shifted(ExactTopK):
    """Chooses the neighbour of each token that it should choose."""

    def select(self, *args: Any, **kwargs: Any) -> Selection:
        chosen = super().select(*args, **kwargs)
        if self.impl != "reference":
            chosen.indices = (chosen.indices - 1).clamp_min(0)
        return chosen


def test_a_wrong_selection_has_no_time(loaded: LoadedModel, store: PrefillStore) -> None:
    (row,) = rows(loaded, store, Shifted(), task())
    assert row.status == "wrong"
    assert row.reason.startswith("the selection must be the reference's")


def test_planted_states_are_the_same_every_time_and_hold_needles() -> None:
    drawn = [PlantedStates.draw(task(), 100, torch.float32, torch.device("cpu")) for _ in range(2)]
    assert torch.equal(drawn[0].key_states, drawn[1].key_states)
    assert drawn[0].query_states.shape == (1, 2, 3, 32)
    logits = drawn[0].query_states @ drawn[0].key_states.mT * 32**-0.5
    assert logits.amax() > 8  # two times a query's squared norm, scaled: far above noise
