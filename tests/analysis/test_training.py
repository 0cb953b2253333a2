"""Training losses as points for a tracker, and as curves over the steps."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from topkbench.analysis.comparison.configurations import compare
from topkbench.analysis.figures.training import loss_curve, loss_points, losses
from topkbench.analysis.record.store import Row, Sweep, frame
from topkbench.analysis.report import build as report
from topkbench.analysis.tables.overview import main_table

LOSSES = {"a": [[8.0, 4.0, 2.0], [6.0, 2.0, 1.0]], "b": [[9.0, 5.0, 3.0], [7.0, 5.0, 1.0]]}


def identity_of(cell: str) -> str:
    return cell.rjust(16, "0")


def samples_of(cell: str) -> list[dict[str, float | str]]:
    return [
        {"run_id": identity_of(cell), "layer": layer, "step": step, "loss": loss}
        for layer, steps in enumerate(LOSSES[cell])
        for step, loss in enumerate(steps, start=1)
    ]


@pytest.fixture
def rows(row: Callable[..., Row]) -> list[Row]:
    return [
        row(
            run_id=identity_of(cell),
            task="fit",
            method="hata",
            rbit=rbit,
            subtask=subtask,
            length=None,
            kv_len=None,
            loss_last=1.5,
            fit_s=seconds,
        )
        for cell, rbit in (("a", 32), ("b", 64))
        for subtask, seconds in (("layer 0", None), ("layer 1", None), ("mean", 12.0))
    ]


def test_the_table_says_which_fits_were_reused(rows: list[Row]) -> None:
    rows[-1] = rows[-1].replace(fit_s=None)
    table = main_table(compare(frame(rows)).overall)
    place = table.head.index("Fit (s)")
    assert [row[place] for row in table.rows] == ["12", "found"]
    alone = main_table(compare(frame(rows[3:])).overall)
    assert [row[alone.head.index("Fit (s)")] for row in alone.rows] == ["found"]


def test_points_have_every_layer_and_their_mean() -> None:
    points = loss_points(pd.DataFrame(samples_of("a")))
    assert points == [
        {"step": 1.0, "loss/layer_00": 8.0, "loss/layer_01": 6.0, "loss/mean": 7.0},
        {"step": 2.0, "loss/layer_00": 4.0, "loss/layer_01": 2.0, "loss/mean": 3.0},
        {"step": 3.0, "loss/layer_00": 2.0, "loss/layer_01": 1.0, "loss/mean": 1.5},
    ]


@pytest.mark.parametrize(
    "samples",
    [
        pd.DataFrame(),
        pd.DataFrame({"run_id": ["a"], "score": [1.0]}),
        pd.DataFrame({"run_id": ["a"], "layer": [0], "step": [3], "recall_at_k": [0.5]}),
        pd.DataFrame({"layer": [0], "step": [3], "loss": [None]}),
    ],
)
def test_samples_of_other_tasks_are_no_losses(samples: pd.DataFrame) -> None:
    assert loss_points(samples) == []
    assert not len(losses(samples))


def test_the_curve_has_each_configurations_losses(rows: list[Row]) -> None:
    samples = pd.DataFrame(samples_of("a") + samples_of("b"))
    made = loss_curve(compare(frame(rows), samples).overall, samples)
    assert made is not None
    figure, data = made
    assert len(data) == 12
    first = data[(data["rbit"] == 64) & (data["step"] == 2)]
    assert first["loss"].tolist() == [5.0, 5.0]
    axes = figure.axes[0]
    # Two layers and their mean, of two configurations.
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert len(axes.lines) == 6
    assert drawn["HATA, 32 bits"] == [7.0, 3.0, 1.5]
    assert drawn["HATA, 64 bits"] == [8.0, 5.0, 2.0]
    assert axes.get_yscale() == "log"


def test_seeds_of_one_configuration_are_one_curve(rows: list[Row]) -> None:
    seeds = [one.replace(rbit=32, seed=("a", "b").index(one.run_id[-1])) for one in rows]
    samples = pd.DataFrame(samples_of("a") + samples_of("b"))
    made = loss_curve(compare(frame(seeds), samples).overall, samples)
    assert made is not None
    assert made[1]["loss"].tolist() == [8.5, 4.5, 2.5, 6.5, 3.5, 1.0]


def test_losses_below_zero_are_drawn_too(rows: list[Row]) -> None:
    samples = pd.DataFrame(samples_of("a"))
    samples["loss"] -= 5
    made = loss_curve(compare(frame(rows), samples).overall, samples)
    assert made is not None
    assert made[0].axes[0].get_yscale() == "linear"


def test_nothing_is_drawn_without_training_losses(rows: list[Row]) -> None:
    assert loss_curve(compare(frame(rows)).overall, pd.DataFrame({"run_id": []})) is None


def test_the_report_of_a_fit_has_its_figure_and_its_seconds(
    rows: list[Row], tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path / "results" / "fit" / "first", tmp_path / "results")
    for cell in ("a", "b"):
        own = [one for one in rows if one.run_id == identity_of(cell)]
        cell_folder = sweep.store.cell(identity_of(cell))
        with cell_folder.lock():
            cell_folder.begin(own[0])
            # run_id is added when the store is read.
            samples = pd.DataFrame(samples_of(cell)).drop(columns="run_id").to_dict("records")
            cell_folder.write(own, samples, {}, "")
        sweep.append(identity_of(cell))
    text = report.build(sweep.folder).with_suffix(".md").read_text()
    assert "![Training loss](figures/fit_loss.png)" in text
    assert "Fit (s)" in text
    assert "Last loss" in text
    data = pd.read_csv(sweep.folder / "figures" / "fit_loss.csv")
    assert sorted(data["rbit"].unique()) == [32, 64]
