"""Break-even lengths and bounds on the speed-up of a whole step, checked by hand."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from topkbench.analysis.comparison.configurations import compare
from topkbench.analysis.figures import plots
from topkbench.analysis.figures.break_even import (
    ModelSize,
    break_even,
    break_even_table,
    crossing,
    crossing_interval,
    curves,
    faster_from,
    model_sizes,
    step_bound,
    step_ms,
)
from topkbench.analysis.record.store import RecordError, Row, frame
from topkbench.analysis.report import build as report

RowMaker = Callable[..., Row]


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ([1.0, 2.0, 4.0], 0.0),
        ([0.5, 0.7, 0.99], math.inf),
        ([0.5, 2.0, 4.0], 2048.0),  # halfway between 1,024 and 4,096, both axes logarithmic
        ([0.25, 0.5, 2.0], 8192.0),
        ([2.0, 0.5, 2.0], 8192.0),  # being faster only at a shorter length does not count
        ([0.5, 1.0, 2.0], 4096.0),
    ],
)
def test_the_crossing_is_interpolated_on_logarithmic_axes(
    speedups: list[float], expected: float
) -> None:
    assert crossing([1024, 4096, 16384], speedups) == pytest.approx(expected)


def latency_lines(
    row: RowMaker, dtype: str = "float32", width: float | None = 0.1, **columns: Any
) -> pd.DataFrame:
    """Full attention takes 1 ms at 1,024 tokens; speed-ups and their intervals are fixed."""
    speedups = {"hata": (0.5, 2.0, 4.0), "loki": (0.2, 0.4, 0.8), "quest": (1.5, 2.0, 3.0)}
    rows = [
        row(
            run_id=f"{place:016x}",
            task="decode_latency",
            subtask=str(length),
            method=method,
            rbit=128 if method == "hata" else None,
            length=length,
            kv_len=length,
            decode_ms_p50=length / 1024 / (speedup or 1.0),
            speedup_vs_full=speedup,
            speedup_ci_low=speedup and width and speedup * (1 - width),
            speedup_ci_high=speedup and width and speedup * (1 + width),
            bandwidth_gb_s=10.0,
            parameters={"dtype": dtype},
            **columns,
        )
        for place, (method, values) in enumerate([("full", (None,) * 3), *speedups.items()])
        for length, speedup in zip((1024, 4096, 16384), values, strict=True)
    ]
    return compare(frame(rows)).overall


def test_a_step_takes_the_time_of_its_weights_and_its_layers(row: RowMaker) -> None:
    (_, hata), *_ = curves(latency_lines(row))
    size = ModelSize(parameters=1e7, layers=4)
    # 40 MB at 10 GB/s take 4 ms; four layers take 1, 4 and 16 ms each, divided by the speed-up.
    assert step_ms(hata, "full_ms", size).tolist() == pytest.approx([8.0, 20.0, 68.0])
    assert step_ms(hata, "decode_ms_p50", size).tolist() == pytest.approx([12.0, 12.0, 20.0])
    (_, half), *_ = curves(latency_lines(row, dtype="bfloat16"))
    assert step_ms(half, "full_ms", size).tolist() == pytest.approx([6.0, 18.0, 66.0])


def test_the_break_even_table(row: RowMaker) -> None:
    table = break_even_table(latency_lines(row), {"10M": ModelSize(1e7, 4)})
    assert table is not None
    assert table.head == [
        *("Method", "Faster than full from (tokens)", "Speed-up at 16,384 (×)"),
        "At most, 10M step, of which attention 94% (×)",
    ]
    assert table.rows == [
        # 68 / 20, and 68 / (4 + 64 / 3.6) to 68 / (4 + 64 / 4.4)
        ["HATA, 128 bits", "2,048 [1,862, 2,276]", "4.00 [3.60, 4.40]", "3.40 [3.12, 3.67]"],
        # 68 / (4 + 64 / 3)
        ["Quest", "always, 1,024 and more", "3.00 [2.70, 3.30]", "2.68 [2.45, 2.91]"],
        ["Loki", "never, up to 16,384", "0.80 [0.72, 0.88]", "0.81 [0.73, 0.89]"],  # 68 / 84
    ]
    assert table.notes == []


def test_rows_without_intervals_are_marked_and_say_neither_always_nor_never(row: RowMaker) -> None:
    table = break_even_table(latency_lines(row, width=None), {"10M": ModelSize(1e7, 4)})
    assert table is not None
    assert table.rows == [
        ["HATA, 128 bits", "2,048†", "4.00†", "3.40†"],
        ["Quest", "≤ 1,024†", "3.00†", "2.68†"],
        ["Loki", "> 16,384†", "0.80†", "0.81†"],
    ]
    assert table.notes == [
        "† No interval was recorded: the row is older than intervals, or too few pairs were timed."
    ]


@pytest.mark.parametrize(
    ("speedups", "width", "note", "expected"),
    [
        ((1.5, 2.0, 3.0), 0.2, None, "always, 1,024 and more"),
        ((1.5, 2.0, 3.0), 0.2, "others", "≤ 1,024 [≤ 1,024, ≤ 1,024]‡"),
        # 32 times faster at the median, but perhaps not faster at all: not always.
        ((32.8, 32.8, 32.8), 0.98, None, "≤ 1,024 [≤ 1,024, > 16,384]"),
        ((1.1, 2.0, 4.0), 0.5, None, "≤ 1,024 [≤ 1,024, 4,096]"),
        ((0.2, 0.4, 0.8), 0.1, None, "never, up to 16,384"),
        ((0.2, 0.4, 0.8), 0.6, None, "> 16,384 [10,000, > 16,384]"),
        ((0.5, 2.0, 4.0), 0.1, "others", "2,048 [1,862, 2,276]‡"),
    ],
)
def test_always_and_never_require_the_whole_interval(
    speedups: tuple[float, ...], width: float, note: str | None, expected: str
) -> None:
    points = pd.DataFrame(
        {
            "length": [1024, 4096, 16384],
            "speedup_vs_full": speedups,
            "speedup_ci_low": [one * (1 - width) for one in speedups],
            "speedup_ci_high": [one * (1 + width) for one in speedups],
            "timing_note": [None, note, None],
        }
    )
    assert faster_from(points) == expected
    points.loc[1, "speedup_ci_low"] = math.nan
    assert crossing_interval(points) is None


def test_the_figures_agree_with_the_table(row: RowMaker) -> None:
    configurations = latency_lines(row)
    made = break_even(configurations)
    assert made is not None
    figure, data = made
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *("Full attention", "HATA, 128 bits", "Quest", "Loki"),
    ]
    marks = [line for line in figure.axes[0].lines if line.get_marker() == "|"]
    assert [float(mark.get_xdata()[0]) for mark in marks] == pytest.approx([2048.0])
    bars = [line.get_xdata() for line in figure.axes[0].lines if line.get_linewidth() == 4]
    assert [list(bar) for bar in bars] == [pytest.approx([1862, 2276], abs=0.5)]
    ends = data[data["method"] == "hata"].iloc[0]
    assert [ends["faster_from_low"], ends["faster_from_high"]] == pytest.approx(
        [1862, 2276], abs=0.5
    )
    assert data.groupby("method")["faster_from"].first().to_dict() == pytest.approx(
        {"hata": 2048.0, "loki": math.inf, "quest": 0.0}
    )
    bound = step_bound(configurations, {"10M": ModelSize(1e7, 4), "10G": ModelSize(1e10, 4)})
    assert bound is not None
    figure, data = bound
    assert [axes.get_title() for axes in figure.axes] == ["", "10M, 4 layers", "10G, 4 layers"]
    small = data[(data["model"] == "10M") & (data["method"] == "hata")]
    assert small["attention_share"].tolist() == pytest.approx([4 / 8, 16 / 20, 64 / 68])
    assert small["step_speedup"].tolist() == pytest.approx([8 / 12, 20 / 12, 68 / 20])
    assert small["step_speedup_low"].iloc[-1] == pytest.approx(68 / (4 + 64 / 3.6))
    assert small["step_speedup_high"].iloc[-1] == pytest.approx(68 / (4 + 64 / 4.4))
    large = data[data["model"] == "10G"]
    assert (
        large["step_speedup"].between(0.98, 1.02).all()
    )  # reading the weights takes 4 s, so that attention hardly matters


def test_rows_without_a_bandwidth_have_no_bound(row: RowMaker) -> None:
    configurations = latency_lines(row).assign(bandwidth_gb_s=math.nan)
    table = break_even_table(configurations)
    assert table is not None
    assert table.head[-1] == "Speed-up at 16,384 (×)"
    assert step_bound(configurations) is None


def test_one_length_has_no_break_even(row: RowMaker) -> None:
    configurations = latency_lines(row)
    configurations = configurations[configurations["length"] == 4096]
    assert break_even_table(configurations) is None
    assert break_even(configurations) is None
    assert step_bound(configurations) is None


@pytest.mark.parametrize("text", ["8B", "8B=8e9", "8B=8e9/", "8B=many/32", "8B=8e9/1.5"])
def test_a_model_size_in_another_form_is_refused(text: str) -> None:
    with pytest.raises(RecordError, match=r"NAME=PARAMETERS/LAYERS, such as 8B=8.03e9/32, got"):
        model_sizes([text])


def test_a_model_has_weights_and_layers() -> None:
    assert model_sizes(["8B=8.03e9/32"]) == {"8B": ModelSize(8.03e9, 32)}
    with pytest.raises(RecordError, match="must have parameters and layers, got 0 and 32"):
        model_sizes(["8B=0/32"])


def test_a_report_of_few_columns_has_the_section(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = ("run_id", "status", "model", "task", "subtask", "length", "kv_len", "method")
    timed = ("decode_ms_p50", "speedup_vs_full", "bandwidth_gb_s", "p_dtype")
    file = tmp_path / "rows.csv"
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow([*columns, *timed])
        for length, speedup in ((1024, 0.5), (4096, 2.0)):
            known = ["a" * 16, "ok", "32/8 heads of 128", "decode_latency", length, length, length]
            writer.writerow([*known, "hata", length / 1024 / speedup, speedup, 10, "float32"])
    out = tmp_path / "out"
    arguments = [str(file), "--out", str(out), "--models", "10M=1e7/4"]
    assert report.main(arguments) == 0, capsys.readouterr().err
    text = (out / "report.md").read_text()
    assert "### Break-even" in text
    assert "| HATA     | 2,048" in text
    assert "At most, 10M step, of which attention 80% (×)" in text
    assert (out / "figures" / "step_bound.png").is_file()
    assert "Break-even" in (out / "report.html").read_text()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_bounds_title_covers_no_panel_and_its_markers_are_whole(
    row: RowMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, *_: figures.append(figure))
    # Attention is a small part of these steps: bounds near 1, where a scale from 0 has least space.
    models = {f"{n}B": ModelSize(n * 1e9, 16) for n in range(1, number + 1)}
    plots.draw_all(latency_lines(row), tmp_path, "", models=models, only="step_bound")
    (figure,) = figures
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    _, *panels = figure.axes
    assert len(panels) == number
    boxes = [axes._left_title.get_window_extent(renderer) for axes in panels]
    title = next(text for text in figure.texts if text.get_text().startswith("Upper bound"))
    boxes += [title.get_window_extent(renderer), figure.legends[0].get_window_extent(renderer)]
    boxes += [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for axes in panels:
        highest = axes.transData.transform((1024, axes.dataLim.y1))[1]
        half_a_marker = 0.5 * axes.lines[-1].get_markersize() * figure.dpi / 72
        assert highest + half_a_marker < axes.get_window_extent(renderer).y1
