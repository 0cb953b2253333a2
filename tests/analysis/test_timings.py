"""Times are paired, speed-ups have intervals, and unreliable times are marked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from topkbench.analysis.comparison.configurations import compare
from topkbench.analysis.comparison.timings import lacks_interval, timed_text
from topkbench.analysis.figures.bars import stages
from topkbench.analysis.figures.curves import context_curve, curve
from topkbench.analysis.figures.pareto import pareto_pair
from topkbench.analysis.figures.plots import draw_all
from topkbench.analysis.figures.points import points_of
from topkbench.analysis.record.store import Row, frame
from topkbench.analysis.report.build import build, load
from topkbench.analysis.tables.matched import matched_table
from topkbench.analysis.tables.overview import league_table, main_table, summary_table
from topkbench.analysis.tracking.wandb_payload import curves, summary

RowMaker = Callable[..., Row]
MEASURED = Path(__file__).parents[2] / "analysis" / "measured" / "epyc_2_threads"
WILD = "the step took 0.58 to 12.9 ms (20th to 80th percentile)"


def timed(
    row: RowMaker,
    method: str,
    step: float,
    full: float,
    width: float | None = 0.1,
    note: str | None = None,
    **columns: Any,
) -> Row:
    """Return a row with paired times; ``width`` is the interval's half width over the speed-up."""
    speedup = None if method == "full" else full / step
    known = {"task": "decode_latency", "method": method, "decode_ms_p50": step, **columns}
    known["run_id"] = f"{abs(hash((method, step, *columns.values()))):016x}"[:16]
    return row(
        **known,
        decode_ms_p20=0.9 * step,
        decode_ms_p80=1.2 * step,
        full_ms_p50=full,
        speedup_vs_full=speedup,
        speedup_ci_low=speedup and width and speedup * (1 - width),
        speedup_ci_high=speedup and width and speedup * (1 + width),
        timing_note=note,
    )


def busy(row: RowMaker) -> pd.DataFrame:
    """Rows of a machine that was busy while the cells of full attention and of Quest ran."""
    return frame(
        [
            timed(row, "full", 980.0, 980.0),
            timed(row, "exact", 66.0, 66.0, k=64),
            timed(row, "hata", 2.0, 64.0, k=64, rbit=128),
            timed(row, "quest", 2.0, 65.56, k=64, note=WILD, width=0.9),
            timed(row, "loki", 4.0, 64.0, k=64, width=None),
        ]
    )


def cells(table: Any, *heads: str) -> dict[str, list[str]]:
    places = [table.head.index(head) for head in heads]
    return {row[0]: [row[place] for place in places] for row in table.rows}


def test_a_table_shows_full_attention_timed_alternately_with_each_method(row: RowMaker) -> None:
    table = main_table(compare(busy(row)).overall)
    found = cells(table, "Decode step (ms)", "Full attention (ms)", "Speed-up (×)")
    assert found == {
        "Full attention": ["–", "–", "–"],  # 980 ms must not be compared with exact's 66
        "Exact top-k": ["66", "66", "1.00 [0.90, 1.10]"],
        "HATA": ["2", "64", "32.00 [28.80, 35.20]"],
        "Quest": ["2‡", "65.6‡", "32.78 [3.28, 62.28]‡"],
        "Loki": ["4", "64", "16.00†"],
    }
    assert table.notes == [
        "† No interval was recorded: the row is older than intervals, or too few pairs were timed.",
        f"‡ Unsteady, not to be quoted: Quest, 4,110 tokens, k=64: {WILD}.",
        "‡ The same command reuses them, and with force=true measures its cells again, best on an "
        "idle machine.",
    ]
    assert table.strong == set()


def test_full_attention_without_methods_shows_the_time_of_its_cell(row: RowMaker) -> None:
    table = main_table(compare(busy(row).head(1)).overall)
    assert cells(table, "Decode step (ms)") == {"Full attention": ["980"]}
    assert table.notes == []


def test_console_and_report_mark_unsteady_numbers(row: RowMaker, tmp_path: Path) -> None:
    busy(row).to_parquet(tmp_path / "rows.parquet")
    text = build(tmp_path, tmp_path / "out").read_text()
    for said in (
        summary_table(compare(busy(row))),
        text,
        (tmp_path / "out" / "report.md").read_text(),
    ):
        assert "32.78 [3.28, 62.28]‡" in said
        assert WILD in said
        assert "16.00†" in said
        assert "No interval was recorded" in said
        assert "force=true" in said
    assert "its recall is below 1." in text


def test_many_unsteady_configurations_are_counted(row: RowMaker) -> None:
    rows = [timed(row, "hata", 2.0, 4.0, k=k, note=WILD) for k in range(64, 84)]
    table = main_table(compare(frame(rows)).overall)
    assert len(table.notes) == 10
    assert table.notes[-2] == "‡ So are 12 more; the column timing_note says why."


def test_intervals_of_several_seeds_go_from_the_lowest_end_to_the_highest(row: RowMaker) -> None:
    rows = [
        timed(row, "hata", 2.0, 4.0, k=64, seed=0, width=0.1),
        timed(row, "hata", 2.0, 6.0, k=64, seed=1, width=0.2, note=WILD),
    ]
    (configuration,) = compare(frame(rows)).overall.to_dict("records")
    assert configuration["speedup_vs_full"] == 2.5
    assert (configuration["speedup_ci_low"], configuration["speedup_ci_high"]) == pytest.approx(
        (1.8, 3.6)
    )
    assert (
        configuration["decode_vs_full_ci_low"],
        configuration["decode_vs_full_ci_high"],
    ) == pytest.approx((1 / 3.6, 1 / 1.8))
    assert (configuration["timing_note"], configuration["full_ms_p50"]) == (WILD, 5)
    rows.append(timed(row, "hata", 2.0, 4.0, k=64, seed=2, width=None))
    (configuration,) = compare(frame(rows)).overall.to_dict("records")
    assert pd.isna(configuration["speedup_ci_low"])


def over_lengths(row: RowMaker, note: str | None = None, width: float | None = 0.1) -> pd.DataFrame:
    rows = [
        timed(
            *(row, method, step * n, full * n, width, note if method == "quest" else None),
            **{"length": 1024 * n, "kv_len": 1024 * n, "subtask": str(1024 * n)},
            **{"k": None if method == "full" else 64, "attend_ms": 0.5 * step},
        )
        for method, step, full in (("full", 9.0, 9.0), ("hata", 1.0, 4.0), ("quest", 2.0, 5.0))
        for n in (1, 4)
    ]
    return compare(frame(rows)).overall


def test_figures_over_lengths_draw_full_attention_timed_alternately(row: RowMaker) -> None:
    made = context_curve(over_lengths(row), "decode_ms_p50")
    assert made is not None
    drawn = [list(line.get_ydata()) for line in made[0].axes[0].lines]
    assert [4.0, 16.0] in drawn
    assert [5.0, 20.0] in drawn
    assert [9.0, 36.0] not in drawn
    assert made[1]["full_ms_p50"].tolist() == [4, 16, 5, 20]
    configurations = over_lengths(row).assign(
        tokens_per_s=lambda data: 1000 / data["decode_ms_p50"]
    )
    made = context_curve(configurations, "tokens_per_s")
    assert made is not None
    drawn = [list(line.get_ydata()) for line in made[0].axes[0].lines]
    assert [250.0, 62.5] in drawn
    assert [pytest.approx(1000 / 9), pytest.approx(1000 / 36)] not in drawn


def test_stages_show_the_full_attention_of_their_own_row(row: RowMaker) -> None:
    configurations = over_lengths(row, note=WILD)
    made = stages(configurations[configurations["length"] == 4096])
    assert made is not None
    (marks,) = [line for line in made[0].axes[0].lines if line.get_marker() == "|"]
    assert list(marks.get_xdata()) == [16.0, 20.0]
    names = [text.get_text() for text in made[0].axes[0].get_yticklabels()]
    assert names == ["HATA, k=64", "Quest, k=64‡"]
    made[0].draw_without_rendering()
    said = [one.text.splitlines()[0] for one in points_of(made[0])]
    assert said == ["HATA", "Quest"]  # each bar can be pointed at


def test_unsteady_points_are_hollow_and_captions_say_so(row: RowMaker, tmp_path: Path) -> None:
    every = {"latency_vs_context", "break_even", "stages"}
    for note, width, words, names in (
        (WILD, 0.1, "Hollow or ‡: unsteady times, not to be quoted; the same command", every),
        (None, None, "† or without a bar: no interval was recorded.", {"break_even"}),
        (None, 0.1, "no interval", set()),
    ):
        drawn = draw_all(over_lengths(row, note, width), tmp_path, "words")
        assert {one.name for one in drawn} == every
        assert {one.name for one in drawn if words in one.caption} == names
    made = context_curve(over_lengths(row, WILD), "decode_ms_p50")
    assert made is not None
    hollow = [line for line in made[0].axes[0].lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_ydata()) for line in hollow] == [[2.0], [8.0]]


def test_time_over_budgets_is_relative_to_full_attention(row: RowMaker) -> None:
    rows = [timed(row, "full", 980.0, 980.0)]
    rows += [timed(row, "hata", step, 8.0, k=k) for k, step in ((64, 2.0), (128, 4.0))]
    made = curve(compare(frame(rows)).overall, "decode_vs_full", "k")
    assert made is not None
    assert made[1]["decode_vs_full"].tolist() == [1.0, 0.25, 0.5]
    assert made[1]["decode_vs_full_ci_high"].dropna().tolist() == pytest.approx(
        [0.25 / 0.9, 0.5 / 0.9]
    )


MANY = ("hata", "quest", "loki", "sparq", "h2o", "snapkv")


def league(row: RowMaker, note: str | None, width: float | None = 0.1) -> pd.DataFrame:
    """Seven methods at two budgets; Quest has the best score and the lowest time."""
    rows = [timed(row, "full", 9.0, 9.0, task="ruler", score=90.0, bytes_read_per_step=999.0)]
    for place, method in enumerate(MANY):
        for k, step in ((64, 1.0), (128, 2.0)):
            fast = method == "quest"
            rows.append(
                timed(
                    *(row, method, step * (0.5 if fast else 1 + place / 10), 4.0, width),
                    note if fast else None,
                    **{"task": "ruler", "k": k, "protocol": "unified"},
                    **{"bytes_read_per_step": float(k), "score": 80.0 if fast else 10.0 + place},
                )
            )
    return compare(frame(rows)).overall


def test_a_league_shows_intervals_of_times(row: RowMaker) -> None:
    table = league_table(league(row, WILD))
    assert table is not None
    column = table.head.index("Decode time (× full attention)")
    found = {(line[0], line[1]): line[column] for line in table.rows}
    assert found["–", "Full attention"] == "1"
    assert found["64", "HATA"] == "0.25 [0.227, 0.278]"
    assert found["64", "Quest"] == "0.125 [0.114, 0.139]‡"
    assert any(WILD in note for note in table.notes)


def test_where_every_time_is_unsteady_no_point_is_on_the_front_of_time(row: RowMaker) -> None:
    made = pareto_pair(league(row, WILD).assign(timing_note=WILD))
    assert made is not None
    assert not made[1]["on_front_of_time"].any()
    assert made[1]["on_front_of_bytes"].any()


def test_an_unsteady_time_is_never_on_a_pareto_front(row: RowMaker) -> None:
    for note, expected in ((None, True), (WILD, False)):
        made = pareto_pair(league(row, note))
        assert made is not None
        data = made[1][(made[1]["method"] == "quest") & (made[1]["k"] == 64)]
        assert data["on_front_of_time"].tolist() == [expected]
        assert data["on_front_of_bytes"].tolist() == [True]  # bytes are not affected by timing


def test_nothing_unsteady_or_without_interval_is_bold_at_equal_time(row: RowMaker) -> None:
    def pool(right: int) -> pd.DataFrame:
        scores = [100.0] * right + [0.0] * (40 - right)
        ids = [f"s{i}" for i in range(40)]
        return pd.DataFrame({"subtask": "vt", "sample_id": ids, "score": scores})

    for note, width, mark in ((None, 0.1, ""), (WILD, 0.1, "‡"), (None, None, "†")):
        configurations = league(row, note, width)
        answers = {
            configuration["configuration_id"]: pool(39 if configuration["method"] == "quest" else 2)
            for _, configuration in configurations.iterrows()
        }
        # Over the range of times that both reach; Quest's times are half of the others'.
        table = matched_table(configurations, "decode_vs_full", answers)
        assert table is not None
        place = [row[0] for row in table.rows].index(f"Quest{mark}")
        assert {i for i, _ in table.strong} == ({place} if mark == "" else set())
        assert bool(table.notes) == bool(mark)


def test_unsteady_speeds_are_tracked_as_unsteady(row: RowMaker) -> None:
    rows = [
        timed(row, "quest", 2.0, 8.0, k=64, subtask=str(n), length=n, note=note)
        for n, note in ((1024, WILD), (4096, None))
    ]
    found = summary(rows)
    assert found["unsteady/speedup_vs_full"] == 4
    assert "speedup_vs_full" not in found
    assert found["timing_note"] == WILD
    assert found["speedup_vs_full/4096"] == 4
    assert (found["speedup_ci_low/4096"], found["full_ms_p50/4096"]) == (3.6, 8)
    points = [
        timed(row, "quest", step, 8.0, k=k, note=note)
        for k, step, note in ((64, 1.0, WILD), (128, 2.0, None))
    ]
    drawn = curves(frame(points), pd.DataFrame())
    assert drawn == [{"k": 64.0}, {"k": 128.0, "by_k/decode_vs_full/quest": 0.25}]


@pytest.mark.parametrize("file", ["break_even", "layer_latency", "end_to_end", "league"])
def test_older_rows_load_and_their_speed_ups_are_marked(file: str) -> None:
    configurations = compare(load(MEASURED / f"{file}.csv")[0]).overall
    without_interval = configurations[lacks_interval(configurations)]
    assert len(without_interval)
    assert all(text.endswith("†") for text in timed_text(without_interval, "speedup_vs_full"))
    product = without_interval["decode_ms_p50"] * without_interval["speedup_vs_full"]
    assert without_interval["full_ms_p50"].tolist() == pytest.approx(product.tolist())
