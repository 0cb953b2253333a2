"""Fitting a model's layers: the same result for any grouping and any number of devices."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from topkbench.harness.artifact import digest_of
from topkbench.harness.calibration import Calibration, CapturedStates
from topkbench.harness.fitting import KeptLayers, fit_layers, learning_devices
from topkbench.harness.pilot import counted_forwards
from topkbench.methods.hata import HATA
from topkbench.methods.learning import LayerStates, LossReport
from topkbench.methods.loki import Loki
from topkbench.models.load import LoadedModel
from topkbench.tasks.ruler_words_prompts import CalibrationPrompts

CPU = torch.device("cpu")


PROMPTS = CalibrationPrompts(seed=3, num_sequences=3, max_length=260)


def quick(**settings: Any) -> HATA:
    return HATA(rbit=32, epochs=2, steps_per_epoch=3, **settings)


def drawn(loaded: LoadedModel, method: Any, limit: int | None = None) -> Calibration:
    return Calibration.draw(loaded, method, PROMPTS, limit)


def test_the_fit_does_not_depend_on_groups_or_devices_but_on_the_seed(loaded: LoadedModel) -> None:
    method = quick()
    one_layer = drawn(loaded, method).num_bytes(0)
    found = {}
    for name, limit, devices in (
        ("once", None, [CPU]),
        ("again", None, [CPU]),
        ("in groups", one_layer, [CPU]),
        ("on two devices", None, [CPU, CPU]),
        ("in groups on three devices", one_layer, [CPU] * 3),
    ):
        tensors, losses = fit_layers(method, drawn(loaded, method, limit), devices)
        found[name] = (digest_of(tensors), losses)
    assert all(one == found["once"] for one in found.values())
    other, _ = fit_layers(quick(seed=1), drawn(loaded, quick(seed=1)), [CPU])
    assert digest_of(other) != found["once"][0]


def test_several_fits_read_the_same_texts_once(loaded: LoadedModel) -> None:
    states, alone = CapturedStates(), {}
    for seed in (0, 1):
        method = quick(seed=seed)
        alone[seed] = digest_of(fit_layers(method, drawn(loaded, method), [CPU])[0])
    every_query = 2 * drawn(loaded, quick()).num_bytes(0, every_query=True)
    for limit, expected in ((every_query, 3), (every_query - 1, 6)):
        states.clear()
        with counted_forwards(loaded.model.base_model) as forwards:
            for seed in (0, 1):
                method = quick(seed=seed)
                calibration = drawn(loaded, method, limit)
                tensors, _ = fit_layers(method, calibration, [CPU], states=states)
                assert digest_of(tensors) == alone[seed]
        assert len(forwards) == expected  # of three prompts
    # Other layers count, too: a limit of one layer keeps the second in place of the first.
    states.clear()
    one = drawn(loaded, quick()).num_bytes(0, every_query=True)
    for layer in (0, 1):
        chosen = replace(drawn(loaded, quick(), one), layers=[layer])
        fit_layers(quick(), chosen, [CPU], states=states)
        assert len(states.of((loaded.digest, chosen.digest))) <= 1
    # Other texts replace them.
    other = Calibration.draw(loaded, quick(), replace(PROMPTS, seed=4))
    expected_tensors, _ = fit_layers(quick(), other, [CPU])
    tensors, _ = fit_layers(quick(), other, [CPU], states=states)
    assert digest_of(tensors) == digest_of(expected_tensors)


def test_fitting_all_layers_gives_what_fitting_each_layer_gives(loaded: LoadedModel) -> None:
    method = quick()
    calibration = drawn(loaded, method)
    tensors, losses = fit_layers(method, calibration, [CPU])
    assert tensors["hash_weight"].shape == (2, 2, 16, 32)
    assert [len(steps) for steps in losses] == [6, 6]
    assert all(steps[-1] < steps[0] for steps in losses)
    second = method.fit_layer(1, calibration.capture([1])[1])
    assert torch.equal(tensors["hash_weight"][1], second["hash_weight"])


def test_a_fit_that_is_killed_goes_on_after_its_last_layer(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    method, spec = quick(), {"method": "hata"}
    undisturbed, losses = fit_layers(method, drawn(loaded, method), [CPU])
    fitted: list[int] = []

    class Killed(HATA):
        def fit_layer(self, layer: int, *args: Any) -> dict[str, torch.Tensor]:
            if len(fitted) == 1:
                raise KeyboardInterrupt
            fitted.append(layer)
            return super().fit_layer(layer, *args)

    killed = Killed(rbit=32, epochs=2, steps_per_epoch=3)
    kept = KeptLayers(tmp_path, spec, "code")
    with pytest.raises(KeyboardInterrupt):
        fit_layers(killed, drawn(loaded, killed), [CPU], kept=kept)
    assert [path.name for path in tmp_path.iterdir()] == ["layer_0.safetensors"]
    fitted.clear()
    kept = KeptLayers(tmp_path, spec, "code")
    done: list[int] = []
    again, its = fit_layers(
        killed, drawn(loaded, killed), [CPU], lambda one, _: done.append(one), kept
    )
    assert fitted == [1]
    assert min(done) >= 100  # the first layer counts as done
    assert digest_of(again) == digest_of(undisturbed)
    assert its == losses
    assert KeptLayers(tmp_path, spec, "other").read(0) is None
    assert KeptLayers(tmp_path, {"method": "loki"}, "code").read(0) is None
    (tmp_path / "layer_1.safetensors").write_bytes(b"damaged")
    assert kept.read(1) is None
    assert kept.read(0) is not None
    kept.remove()
    assert not tmp_path.exists()


def test_the_seconds_of_a_fit_include_those_before_it_was_killed(tmp_path: Path) -> None:
    first = KeptLayers(tmp_path, {"method": "hata"}, "code")
    first._began -= 100
    first.write(3, {"weight": torch.zeros(1)}, [])
    again = KeptLayers(tmp_path, {"method": "hata"}, "code")
    again.read(3)
    assert 100 <= again.seconds < 110


def test_a_method_without_steps_has_no_losses(loaded: LoadedModel) -> None:
    tensors, losses = fit_layers(Loki(), drawn(loaded, Loki()), [CPU])
    assert tensors["components"].shape == (2, 2, 16, 16)
    assert losses == [[], []]


def test_layers_are_assigned_to_devices_round_robin(loaded: LoadedModel) -> None:
    device_types: dict[int, str] = {}

    class Placed(Loki):
        def fit_layer(
            self, layer: int, states: LayerStates, report: LossReport | None = None
        ) -> dict[str, torch.Tensor]:
            device_types[layer] = states[0][1].device.type
            return {"components": torch.zeros(1)}

    fit_layers(Placed(), drawn(loaded, Placed()), [CPU, torch.device("meta")])
    assert device_types == {0: "cpu", 1: "meta"}


def test_devices_fit_at_the_same_time(loaded: LoadedModel) -> None:
    meeting = threading.Barrier(2)

    class Waiting(Loki):
        def fit_layer(
            self, layer: int, states: LayerStates, report: LossReport | None = None
        ) -> dict[str, torch.Tensor]:
            meeting.wait(timeout=30)
            return {"components": torch.zeros(1)}

    fit_layers(Waiting(), drawn(loaded, Waiting()), [CPU, CPU])


def test_an_error_on_a_device_propagates(loaded: LoadedModel) -> None:
    class Failing(Loki):
        def fit_layer(
            self, layer: int, states: LayerStates, report: LossReport | None = None
        ) -> dict[str, torch.Tensor]:
            raise RuntimeError(f"layer {layer} failed")

    with pytest.raises(RuntimeError, match="layer 0 failed"):
        fit_layers(Failing(), drawn(loaded, Failing()), [CPU, CPU])


@pytest.mark.parametrize("devices", [1, 2])
def test_progress_never_decreases_and_ends_at_its_total(loaded: LoadedModel, devices: int) -> None:
    calls: list[tuple[int, int]] = []
    method = quick()
    calibration = drawn(loaded, method, drawn(loaded, method).num_bytes(0))
    fit_layers(method, calibration, [CPU] * devices, lambda *one: calls.append(one))
    # Three prompts are read for each of two groups, which says nothing of the time of a fit.
    assert {total for _, total in calls} == {200}
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[:3] == [(0, 200)] * 3
    assert calls[-1] == (200, 200)


def test_a_fit_that_diverges_raises_a_one_line_error(loaded: LoadedModel) -> None:
    method = quick(learning_rate=1e30)
    with pytest.raises(ValueError, match=r"hata must learn finite values, got .* in hash_weight"):
        fit_layers(method, drawn(loaded, method), [CPU])


def test_a_model_on_the_cpu_is_fitted_there() -> None:
    assert learning_devices(CPU) == [CPU]
