"""What a check of the kernels on a GPU left becomes tables and figures. All numbers are made up."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from topkbench.analysis import style
from topkbench.analysis.record.store import COLUMNS, Row, typed
from topkbench.analysis.report import build as report
from topkbench.analysis.report import kernels

MADE_UP = {"device": "Made-up GPU", "torch": "2.11.0", "git_commit": "0123456789abcdef"}


def row(task: str, method: str, number: int, **changes: Any) -> dict[str, Any]:
    values = {
        **{"run_id": f"{number:016x}", "status": "ok", "reason": "", "task": task},
        **{"model": "32/8 heads of 128", "subtask": "131072", "method": method, **MADE_UP},
        "started_at": "2026-01-01T00:00:00+00:00",
    }
    return values | changes


def timed(task: str, method: str, number: int, ms: float, **changes: Any) -> dict[str, Any]:
    place = {"length": 131072, "kv_len": 131072, "batch_size": 1}
    times = {"full_ms_p50": 0.2} if task == "decode_latency" else {}
    times |= {"decode_ms_p50": ms, "decode_ms_p20": 0.9 * ms, "decode_ms_p80": 1.1 * ms}
    share = {"bandwidth_fraction": 0.1 / ms, "bandwidth_gb_s": 1000.0, "bytes_read_per_step": 1e6}
    return row(task, method, number, **{**place, **times, **share, **changes})


def made_up() -> list[dict[str, Any]]:
    wrong = {"status": "wrong", "reason": "at 1,000 tokens: hamming_score is wrong."}
    dropped = {"status": "skipped", "reason": "dropped: 50 s needed, 3 s left."}
    best = {"full_backend": "sdpa cudnn, torch 2.11.0"}
    unsteady = {"timing_note": "times of one step spread by more than 2 times"}
    second = {"model": "32/32 heads of 128", "subtask": "32768 x 8", "length": 32768}
    return [
        row("kernel_check", "hash_encode", 1, subtask="bfloat16", kv_len=262144),
        row("kernel_check", "hash_encode", 2, subtask="float16", **dropped),
        row("kernel_check", "hamming_score", 3, subtask="bfloat16", **wrong),
        timed("kernel_times", "hash_encode", 4, 0.25),
        row("kernel_times", "hamming_score", 5, **wrong),
        timed("kernel_dense", "full", 6, 0.2, **best),
        timed("kernel_dense", "full", 7, 0.8, full_backend="sdpa math, torch 2.11.0"),
        timed("decode_latency", "hata", 8, 0.02, k=2048, speedup_vs_full=10.0, p_use_norm=True)
        | {**best, "speedup_ci_low": 9.0, "speedup_ci_high": 11.0},
        timed("decode_latency", "hata", 9, 0.016, k=2048, speedup_vs_full=12.5, p_use_norm=False)
        | best,
        timed("decode_latency", "quest", 10, 0.05, k=2048, speedup_vs_full=4.0)
        | {**best, **unsteady, "speedup_ci_low": 3.0, "speedup_ci_high": 5.0},
        timed("kernel_dense", "full", 11, 1.0, **best) | second | {"batch_size": 8},
        timed("decode_latency", "quest", 12, 0.1, k=512, speedup_vs_full=10.0)
        | {**best, **second, "batch_size": 8},
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = made_up()
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for one in rows for name in one)))
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


def test_a_report_says_which_kernels_are_right_and_how_fast(folder: Path) -> None:
    assert report.main([str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert [cell.strip() for cell in line_of(text, "hash_encode")] == [
        *("hash_encode", "2", "1", "0", "0", "1", "262,144"),
    ]
    assert [cell.strip() for cell in line_of(text, "hamming_score")] == [
        *("hamming_score", "1", "0", "1", "0", "0", "–"),
    ]
    # The time of what is wrong stands nowhere.
    assert "0.2500" in text
    rows = report.load(folder)[0]
    times, dense = (kernels.time_table(rows, task) for task in (kernels.TIMES, kernels.DENSE))
    assert times is not None
    assert [cells[0] for cells in times.rows] == ["hash_encode"]
    assert dense is not None
    assert [(cells[0], cells[4]) for cells in dense.rows] == [
        ("sdpa cudnn, torch 2.11.0", "0.2000"),
        ("sdpa math, torch 2.11.0", "0.8000"),
        ("sdpa cudnn, torch 2.11.0", "1.0000"),
    ]
    assert "at 1,000 tokens: hamming_score is wrong." in text
    # What kernels are called are no models, which a report would say are mixed.
    assert "These rows mix models: 32/32 heads of 128, 32/8 heads of 128." in text
    # A report of the report's own rows says the same.
    assert report.main([str(folder)]) == 0
    assert (folder / "report.md").read_text() == text


def line_of(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(f"| {name}"))[1:-1].split("|")


def test_the_figures_show_each_shape_against_its_fastest_dense(folder: Path) -> None:
    report.main([str(folder)])
    shown = pd.read_csv(folder / "figures" / "speedup_over_best_dense.csv")
    assert list(zip(shown["name"], shown["speedup_vs_full"], strict=True)) == [
        *(("HATA, norms", 10.0), ("HATA, integer", 12.5), ("Quest", 4.0), ("Quest", 10.0)),
    ]
    assert shown["timing_note"].notna().tolist() == [False, False, True, False]
    page = (folder / "report.html").read_text()
    assert page.count("‡ Unsteady time, do not cite it; see column timing_note.") == 2
    dense = pd.read_csv(folder / "figures" / "dense_baselines.csv")
    assert dense["percent"].tolist() == pytest.approx([50.0, 12.5, 10.0])
    operators = pd.read_csv(folder / "figures" / "operator_bandwidth.csv")
    assert operators["name"].tolist() == ["hash_encode"]
    assert page.count("<figcaption><b>One decode step against the fastest dense") == 1


def test_rows_without_times_have_tables_and_no_figures(tmp_path: Path) -> None:
    rows = pd.DataFrame([one for one in made_up() if one["task"] == "kernel_check"])
    rows.to_csv(tmp_path / "rows.csv", index=False)
    assert report.main([str(tmp_path)]) == 0
    assert "### Are they right?" in (tmp_path / "report.md").read_text()
    assert list((tmp_path / "figures").iterdir()) == []


def test_a_time_in_a_row_that_is_not_ok_is_refused_and_drawn_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"status": "wrong", "reason": "off by 1."}
    rows = [*made_up(), timed("kernel_times", "hamming_score", 20, 0.7654, **wrong)]
    rows.append(timed("kernel_dense", "full", 21, 0.0001, full_backend="broken, 1", **wrong))
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    assert report.main([str(tmp_path)]) == 2
    assert "must be empty unless status is ok" in capsys.readouterr().err
    (tmp_path / "figures").mkdir()
    every = pd.DataFrame(rows)
    missing = [name for name in COLUMNS if name not in every]
    kernels.draw(typed(every.reindex(columns=[*every, *missing])), tmp_path / "figures", "")
    for name in ("operator_bandwidth", "dense_baselines"):
        shown = pd.read_csv(tmp_path / "figures" / f"{name}.csv")
        assert not {"hamming_score", "broken, 1"} & set(shown["name"])


def test_a_report_does_not_write_over_the_rows_it_was_made_of(folder: Path) -> None:
    before = (folder / "rows.csv").read_bytes()
    assert report.main([str(folder)]) == 0
    assert (folder / "rows.csv").read_bytes() == before
    assert not (folder / "rows.parquet").exists()
    assert report.main([str(folder / "rows.csv")]) == 0
    assert (folder / "rows.csv").read_bytes() == before
    assert report.main([str(folder), "--out", str(folder / "elsewhere")]) == 0
    assert (folder / "elsewhere" / "rows.csv").is_file()


def test_each_step_stands_beside_the_dense_attention_it_is_compared_with(folder: Path) -> None:
    table = kernels.speedup_table(report.load(folder)[0])
    assert table is not None
    assert table.rows[0] == [
        *("HATA, norms", "32/8 heads of 128", "131,072", "1", "sdpa cudnn, torch 2.11.0"),
        *("0.0200", "0.2000", "10.00 [9.00, 11.00]"),
    ]
    assert [row[-1] for row in table.rows[2:]] == ["4.00 [3.00, 5.00]‡", "10.00"]


def test_an_unsteady_baseline_is_the_fastest_only_where_no_other_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[list[str]] = []
    monkeypatch.setattr(kernels, "_bars", lambda axes, found, column, colours, number:
                        drawn.append(colours))  # fmt: skip
    note = {"timing_note": "spread"}
    rows = pd.DataFrame(
        [
            timed("kernel_dense", "full", 1, 0.1, full_backend="a", **note),
            timed("kernel_dense", "full", 2, 0.2, full_backend="b"),
        ]
    )
    kernels.bandwidth_shares(rows)
    kernels.bandwidth_shares(rows[:1])
    assert drawn == [[style.BLUE, style.RED], [style.RED]]


def test_operators_share_one_scale_with_the_goal_on_it() -> None:
    rows = pd.DataFrame(
        [
            timed("kernel_times", "hash_encode", 1, 0.25, timing_note=None),
            timed("kernel_times", "hash_encode", 2, 10.0, timing_note=None, batch_size=8),
        ]
    )
    made = kernels.bandwidth_shares(rows)
    assert made is not None
    for axes in made[0].axes:
        assert axes.get_xlim() == (0, 118)
        assert [list(line.get_xdata()) for line in axes.lines] == [[70, 70]]


def test_titles_of_panels_do_not_run_over_each_other() -> None:
    long = {
        "full_backend": "triton, tiles of 32 KiB, 3.6.0+a.very.long.version",
        "p_use_norm": None,
    }
    more = {**long, "timing_note": None, "speedup_ci_low": None, "speedup_ci_high": None}
    rows = [timed("decode_latency", "quest", n, 0.1, speedup_vs_full=2.0, batch_size=n, **more)
            for n in (1, 2, 3, 4)]  # fmt: skip
    made = kernels.speedups(pd.DataFrame(rows))
    assert made is not None
    figure = made[0]
    FigureCanvasAgg(figure).draw()
    ends = [axes.title.get_window_extent() for axes in figure.axes]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(ends))


def test_the_made_up_rows_are_rows() -> None:
    for values in made_up():
        Row.from_flat(values)
