"""Methods at equal cost, and the league, checked by hand."""

from __future__ import annotations

import dataclasses
import html
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.collections import LineCollection, PathCollection

from topkbench.analysis import style
from topkbench.analysis.comparison.configurations import Comparison, compare
from topkbench.analysis.figures.pareto import bars_words, pareto, pareto_pair
from topkbench.analysis.record.row import COLUMNS
from topkbench.analysis.record.store import Row, frame
from topkbench.analysis.report import build as report
from topkbench.analysis.report import contents
from topkbench.analysis.tables.matched import MATCHED, at_cost, levels, matched_table
from topkbench.analysis.tables.overview import league_table
from topkbench.analysis.tables.table import Table

MIB = 2.0**20
MANY = ("exact", "random", "quest", "loki", "sparq", "h2o", "magicpig")


def samples_of(name: str, scores: dict[str, list[float]]) -> list[dict[str, object]]:
    return [
        {
            **{"run_id": name, "sample_id": f"{subtask}-{place}", "subtask": subtask},
            **{"score": score, "references": '["w1"]'},
        }
        for subtask, values in scores.items()
        for place, score in enumerate(values)
    ]


class Results:
    """Cells with literal scores, bytes and times."""

    def __init__(self, row: Callable[..., Row]) -> None:
        self.row = row
        self.rows: list[Row] = []
        self.samples: list[dict[str, object]] = []

    def add(
        self,
        method: str,
        k: int | None,
        scores: dict[str, list[float]],
        mib: float,
        milliseconds: float = 1.0,
        speedup: float | None = None,
        **columns: object,
    ) -> None:
        name = f"{len(self.rows):016x}"
        self.samples += samples_of(name, scores)
        known = {"run_id": name, "method": method, "k": k, "protocol": "unified", **columns}
        if method == "full":
            known["protocol"] = None
        mean = sum(sum(one) / len(one) for one in scores.values()) / len(scores)
        for subtask in (*scores, "mean"):
            self.rows.append(
                self.row(
                    **known,
                    subtask=subtask,
                    score=mean,
                    bytes_read_per_step=mib * MIB if subtask == "mean" else None,
                    decode_ms_p50=milliseconds if subtask == "mean" else None,
                    speedup_vs_full=speedup if subtask == "mean" else None,
                )
            )

    @property
    def compared(self) -> Comparison:
        return compare(frame(self.rows), pd.DataFrame(self.samples))


@pytest.fixture
def results(row: Callable[..., Row]) -> Results:
    return Results(row)


def test_levels_are_costs_that_two_methods_reach() -> None:
    assert levels([(1.0, 19.0), (2.0, 40.0), (3.9, 8.0)]) == [2.0, 4.0, 8.0, 16.0]
    # A range too narrow for four powers of two: powers of the root of two.
    assert levels([(1.0, 4.1), (1.3, 4.1)]) == pytest.approx([2**0.5, 2.0, 2**1.5, 4.0])
    assert levels([(1.0, 2.0), (3.0, 4.0)]) == []
    assert levels([]) == []
    many = levels([(1.0, 2.0**20), (1.0, 2.0**20)])
    assert (len(many), many[0], many[-1]) == (6, 1.0, 2.0**20)


def test_a_score_is_interpolated_over_the_logarithm_of_the_cost(results: Results) -> None:
    results.add("quest", 64, {"vt": [0, 0, 100, 100]}, mib=1)
    results.add("quest", 128, {"vt": [0, 100, 100, 100]}, mib=4)
    found = results.compared
    configurations = found.overall
    cost = "bytes_read_per_step"
    # On the logarithmic axis two is halfway between one and four, and so is each sample's score.
    score, samples = at_cost(configurations, cost, 2 * MIB, found.answers) or (None, None)
    assert score == pytest.approx(62.5)
    assert samples is not None
    assert samples.sort_values("sample_id")["score"].tolist() == [0, 50, 100, 100]
    score, samples = at_cost(configurations, cost, 4 * MIB, found.answers) or (None, None)
    assert score == 75
    assert samples is not None
    assert samples["score"].tolist() == [0, 100, 100, 100]
    for outside in (0.99, 4.01):
        assert at_cost(configurations, cost, outside * MIB, found.answers) is None
    assert at_cost(configurations, cost, 2 * MIB, {}) == (pytest.approx(62.5), None)


def test_a_table_at_equal_bytes_omits_methods_whose_costs_no_other_reaches(
    results: Results,
) -> None:
    right, wrong = {"vt": [100.0] * 20}, {"vt": [0.0] * 20}
    results.add("full", None, right, mib=64)
    for place, k in enumerate((64, 128, 256)):
        results.add("quest", k, right, mib=2**place)
        results.add("h2o", k, wrong, mib=2 ** (place + 1))
        results.add("exact", k, right, mib=30 + k / 64)
    found = results.compared
    table = matched_table(found.overall, "bytes_read_per_step", found.answers)
    assert table is not None
    # Full attention has no budget; no other method reaches the exact top-k's costs.
    assert table.head == ["Method", "2 MiB", "2.38 MiB", "2.83 MiB", "3.36 MiB", "4 MiB"]
    cells = {row[0]: [one.split(" ")[0] for one in row[1:]] for row in table.rows}
    assert cells == {"Quest": ["100.0"] * 5, "H2O": ["0.0"] * 5}
    quest = [row[0] for row in table.rows].index("Quest")
    assert table.strong == {(quest, place) for place in range(1, 6)}
    assert re.fullmatch(
        r"100\.0 \[83\.9, 100\.0\]", table.rows[quest][1]
    )  # Wilson's interval of 20 samples
    # No comparison at equal times, since all steps took equally long.
    assert matched_table(found.overall, "decode_vs_full", found.answers) is None


def test_times_are_relative_to_full_attention_timed_alternately(results: Results) -> None:
    """The machine was slower while the second method ran, for full attention as well."""
    some = {"vt": [0.0, 100.0]}
    results.add("full", None, some, mib=64, milliseconds=4.0)
    for k, speedup in ((64, 4.0), (256, 1.0)):
        results.add("quest", k, some, mib=k / 64, milliseconds=4 / speedup, speedup=speedup)
        results.add("h2o", k, some, mib=k / 64, milliseconds=80 / speedup, speedup=speedup)
    configurations = results.compared.overall
    taken = {name: list(part) for name, part in configurations.groupby("method")["decode_vs_full"]}
    assert taken == {"full": [1.0], "quest": [0.25, 1.0], "h2o": [0.25, 1.0]}
    table = matched_table(configurations, "decode_vs_full", results.compared.answers)
    assert table is not None
    assert table.head == ["Method", "0.25", "0.354", "0.5", "0.707", "1"]
    assert [row[0] for row in table.rows] == ["Quest†", "H2O†"]  # marked: no intervals


def test_the_time_axis_is_named_and_begins_with_full_attention(results: Results) -> None:
    results.add("full", None, {"vt": [100.0] * 20}, mib=64, milliseconds=9.0)
    league(results, MANY)
    made = pareto_pair(results.compared.overall)
    assert made is not None
    figure, data = made
    words = [axes.get_xlabel() for axes in figure.axes]
    assert words[1] == "Decode time relative to full attention (timed alternately)"
    assert data.loc[data["method"] == "full", "decode_vs_full"].tolist() == [1.0]


def test_overlapping_points_are_where_they_were_measured_and_all_can_be_seen(
    results: Results,
) -> None:
    """Three methods with the same costs and score: in every figure, smaller markers on larger."""
    for method in ("random", "streaming_llm", "snapkv"):
        results.add(method, 64, {"vt": [0.0] * 20}, mib=1, speedup=1.25)
    for place, method in enumerate(("exact", "quest", "loki", "h2o")):
        right = 8 + 4 * place
        answers = {"vt": [100.0] * right + [0.0] * (20 - right)}
        results.add(method, 64, answers, mib=4, speedup=1.0)
    found = results.compared.overall
    for made, costs in ((pareto(found), (1, 4)), (pareto_pair(found), (1, 4, 0.8, 1.0))):
        assert made is not None
        for place, axes in enumerate(made[0].axes):
            drawn = [one for one in axes.collections if isinstance(one, PathCollection)]
            points = [(x, y, one) for one in drawn for x, y in one.get_offsets()]
            cheap, dear = costs[2 * place :][:2]
            assert sorted((x, y) for x, y, _ in points) == [
                *[(cheap, 0)] * 3,
                *((dear, 40), (dear, 60), (dear, 80), (dear, 100)),
            ]
            low = sorted((one.get_zorder(), one.get_gid(), one) for _, y, one in points if y == 0)
            assert [name.split("_")[0] for _, name, _ in low] == ["streaming", "snapkv", "random"]
            areas = [one.get_sizes()[0] for *_, one in low]
            assert all(above < 0.5 * below for below, above in itertools.pairwise(areas))


def test_ticks_are_where_the_points_are_and_scores_have_bars(results: Results) -> None:
    """Four widths read 2.3 to 3.6 MiB, full attention 15.8."""
    results.add("full", None, {"vt": [100.0] * 12 + [0.0] * 8}, mib=15.8)
    for place, mib in enumerate((2.31, 2.5, 2.87, 3.61)):
        answers = {"vt": [100.0] * (10 + place) + [0.0] * (10 - place)}
        results.add("quest", 64 + place, answers, mib=mib)
    made = pareto(results.compared.overall)
    assert made is not None
    figure, data = made
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    ticks = [float(one) for one in axes.get_xticks() if low <= one <= high]
    assert ticks == [2, 2.5, 3, 4, 5, 6, 8, 10, 12, 15]
    bars = [one for one in axes.collections if isinstance(one, LineCollection)]
    ends = sorted(segment[:, 1].tolist() for one in bars for segment in one.get_segments())
    assert ends == sorted(data[["score_ci_low", "score_ci_high"]].to_numpy().tolist())
    bottom, top = axes.get_ylim()
    assert bottom < ends[0][0]
    assert top > max(end for _, end in ends)
    words = bars_words(results.compared.overall, ("bytes_read_per_step",))
    assert words == "Vertical bars: 95% intervals of scores."


def test_a_larger_budget_that_was_faster_is_taken_to_cost_as_much(results: Results) -> None:
    for k, milliseconds, right in ((64, 2.0, 0), (128, 1.0, 1), (256, 8.0, 3)):
        answers = {"vt": [100.0] * right + [0.0] * (4 - right)}
        results.add("quest", k, answers, mib=k / 64, milliseconds=milliseconds)
    found = results.compared
    cost = "decode_ms_p50"

    def score(target: float) -> float | None:
        known = at_cost(found.overall, cost, target, found.answers)
        return None if known is None else known[0]

    # The second budget is taken to cost what the first does; its score there is 25.
    assert score(2.0) == 25
    assert score(4.0) == pytest.approx(50)  # halfway from 2 to 8 ms
    assert score(8.0) == 75
    assert score(1.0) is None
    assert score(8.1) is None


def test_a_method_with_the_same_bytes_at_every_budget_is_one_point(results: Results) -> None:
    right, wrong = {"vt": [100.0] * 20}, {"vt": [0.0] * 20}
    for place, k in enumerate((64, 128, 256, 512)):
        results.add("quest", k, wrong, mib=2**place, milliseconds=2**place)
        noise = (0.1, -0.1, 0.0, 0.2)[place]
        results.add("magicpig", k, right, mib=2.5, milliseconds=3 + noise)
    results.add("loki", 64, wrong, mib=1, milliseconds=1)  # one budget alone is not interpolated
    found = results.compared
    for cost, name in (("bytes_read_per_step", "MiB"), ("decode_ms_p50", "ms")):
        table = matched_table(found.overall, cost, found.answers)
        assert table is not None
        cells = {row[0]: [one.split(" ")[0] for one in row[1:]] for row in table.rows}
        costs = [float(head.removesuffix(f" {name}")) for head in table.head[1:]]
        assert len(costs) >= 4
        assert min(costs) >= 2.5
        assert max(costs) == 8
        assert cells == {"Quest": ["0.0"] * len(costs), "MagicPIG": ["100.0"] * len(costs)}
    points = found.overall[found.overall["method"] == "magicpig"]
    below = [at_cost(points, "decode_ms_p50", one, found.answers) for one in (2.9, 3.04)]
    assert below == [None, None]
    known = at_cost(points, "decode_ms_p50", 3.05, found.answers)  # the median of its times
    assert known is not None
    assert known[0] == 100


def test_methods_with_a_single_cost_are_not_compared(results: Results) -> None:
    for k in (64, 128):
        results.add("quest", k, {"vt": [0.0] * 20}, mib=1, milliseconds=k)
        results.add("magicpig", k, {"vt": [100.0] * 20}, mib=1, milliseconds=k)
    found = results.compared
    for cost in ("bytes_read_per_step", "decode_ms_p50"):
        assert matched_table(found.overall, cost, found.answers) is None


def league(results: Results, methods: tuple[str, ...], **columns: object) -> None:
    for place, method in enumerate(methods):
        for k in (64, 512):
            right = 2 * place + (4 if k == 512 else 0)
            answers = {
                "niah_single": [100.0] * 20,
                "vt": [100.0] * min(right, 20) + [0.0] * (20 - min(right, 20)),
            }
            results.add(
                method,
                k,
                answers,
                mib=place + k / 64,
                milliseconds=2 + k / 99,
                speedup=99 / k,
                **columns,
            )


def table_of(found: Comparison, place: int = 0) -> Table:
    _, configurations = list(found.by_setting())[place]
    table = league_table(configurations)
    assert table is not None
    return table


def test_the_league_ranks_by_score_and_names_the_worst_sub_task(results: Results) -> None:
    results.add("full", None, {"niah_single": [100.0] * 20, "vt": [100.0] * 20}, mib=64)
    league(results, MANY)
    table = table_of(results.compared)
    assert [row[:2] for row in table.rows] == [
        ["–", "Full attention"],
        *([str(k), style.style(name).label] for k in (64, 512) for name in reversed(MANY)),
    ]
    by_head = dict(zip(table.head, table.rows[1], strict=True))
    assert by_head["Worst sub-task (points)"] == "−40.0 (vt)"  # 12 of 20
    assert by_head["Score (0–100)"].startswith("80.0 [")
    assert by_head["Δ full (points)"].startswith("−20.0 [")
    assert by_head["Read/step (MiB)"] == "7"
    assert table.rows[0][3:5] == ["–", "–"]


def test_a_league_says_which_of_its_scores_cannot_be_bold(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "draw_all", lambda *_, **__: [])
    league(results, MANY)
    found = results.compared

    def words(answers: dict[str, pd.DataFrame]) -> str:
        compared = dataclasses.replace(found, answers=answers)
        (one,) = contents.settings(compared, pd.DataFrame(), tmp_path, {}, None, lambda _: None)
        shown = next(section for section in one.sections if section.title == "League")
        return str(shown.parts[1]).partition("Ranked")[0]

    assert words(found.answers) == ""
    only = "A score is bold only if its samples are there, and "
    assert words({}) == f"{only}these rows have none. "
    *others, _ = found.answers
    some = {name: found.answers[name] for name in others}
    assert words(some) == f"{only}1 of 12 rows here have none. "


def test_few_methods_make_no_league(results: Results) -> None:
    league(results, MANY[:6])
    ((_, configurations),) = results.compared.by_setting()
    assert league_table(configurations) is None
    assert pareto_pair(configurations[configurations["subtask"] == "mean"]) is None


def test_each_protocol_is_a_setting_with_full_attention_in_it(results: Results) -> None:
    results.add("full", None, {"niah_single": [100.0] * 20, "vt": [100.0] * 20}, mib=64)
    for protocol, sinks in (("unified", 4), ("native", 0)):
        columns = {"protocol": protocol, "parameters": {"num_sink": sinks}}
        league(results, MANY[:6], **columns)
    settings = list(results.compared.by_setting())
    assert [key["protocol"] for key, _ in settings] == ["unified", "native"]
    for _, configurations in settings:
        top = configurations[configurations["subtask"] == "mean"]
        assert len(top) == 1 + 12
        assert set(top["method"]) == {"full", *MANY[:6]}
        assert set(top["variant"]) == {""}  # the protocol is in the section's title
        assert top.loc[top["method"] != "full", "delta_full"].notna().all()


def test_a_league_is_in_the_report(results: Results, tmp_path: Path) -> None:
    results.add("full", None, {"niah_single": [100.0] * 20, "vt": [100.0] * 20}, mib=64)
    league(results, MANY)
    frame(results.rows).to_parquet(tmp_path / "rows.parquet")
    pd.DataFrame(results.samples).to_parquet(tmp_path / "samples.parquet")
    page = report.build(tmp_path, tmp_path / "out")
    text = page.with_name("report.md").read_text()
    titles = ("League", *(f"Score at equal {words}" for words in MATCHED.values()))
    for title in titles:
        assert f"### {title}" in text
        assert f"<h3>{title}</h3>" in html.unescape(page.read_text())
    assert text.index("### Figures") < text.index("### League") < text.index("### Results")
    assert "protocol=unified" in text
    data = pd.read_csv(tmp_path / "out" / "figures" / "score_vs_cost.csv")
    assert {"on_front_of_bytes", "on_front_of_time"} < set(data.columns)
    assert set(data["method"]) == {"full", *MANY}
    assert set(COLUMNS) >= {"bytes_read_per_step", "score"} & set(data.columns)


def test_labels_of_the_front_overlap_neither_points_nor_labels(results: Results) -> None:
    for place, k in enumerate((64, 72, 80, 88, 128, 512)):
        right = 20 + 32 * place  # of 200, so that each is told apart from the next
        results.add("quest", k, {"vt": [100.0] * right + [0.0] * (200 - right)}, mib=k / 64)
    results.add("h2o", 512, {"vt": [0.0] * 200}, mib=20)
    made = pareto(results.compared.overall)
    assert made is not None
    (axes,) = made[0].axes
    renderer = made[0].canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = [one.get_window_extent(renderer) for one in axes.texts]
    assert len(boxes) >= 4
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:place])
        points = [axes.transData.transform(one.get_offsets()) for one in axes.collections]
        assert not any(box.contains(x, y) for part in points for x, y in part)
