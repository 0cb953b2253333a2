"""Figures of many methods highlight a few; the others are grey, named, and in the data."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from topkbench.analysis import style
from topkbench.analysis.comparison.configurations import compare
from topkbench.analysis.figures.curves import context_curve, curve, plain_number
from topkbench.analysis.figures.highlight import highlighted
from topkbench.analysis.figures.pareto import front_of, pareto
from topkbench.analysis.figures.plots import draw_all
from topkbench.analysis.record.store import Row, frame
from topkbench.analysis.report import build as report
from topkbench.analysis.report.sweep_report import SweepReport

RIVALS = ("hata", "quest", "loki", "sparq", "h2o", "snapkv", "random")
NAMED = {"HATA", "Quest", "Loki"}  # of the others, the three worst


@pytest.fixture
def many(row: Callable[..., Row]) -> pd.DataFrame:
    """Full attention, the oracle and seven methods, from Random, the best, down to HATA."""
    rows = [row(run_id="f" * 16, score=60.0, bytes_read_per_step=9999.0)]
    for place, method in enumerate(("exact", *RIVALS)):
        for k in (64, 128):
            rows.append(
                row(
                    run_id=f"{place:x}{k}".ljust(16, "0"),
                    method=method,
                    k=k,
                    protocol="unified",
                    score=10.0 * place + k / 64,
                    recall_at_k=0.1 * place,
                    bytes_read_per_step=float(k - place),  # the best read least
                )
            )
    return frame(rows)


def test_references_and_the_best_by_the_figures_metric_are_highlighted(many: pd.DataFrame) -> None:
    top = compare(many).overall
    best = {"sparq", "h2o", "snapkv", "random"}
    assert highlighted(top, "score", "k") == {"full", "exact", *best}
    assert highlighted(top.assign(bytes_read_per_step=-top["score"]), "score", "k") == {
        *("full", "exact"),
        *best,
    }
    fast = top.assign(decode_vs_full=top["score"])  # lower is better
    assert highlighted(fast, "decode_vs_full", "k") == {"full", "exact", *RIVALS[:4]}
    few = top[top["method"].isin(["full", "exact", "hata", "quest", "block_oracle"])]
    assert highlighted(few, "score", "k") == {"full", "exact", "hata", "quest"}
    assert highlighted(top, "score", "k", ["hata"]) == {"hata"}
    assert highlighted(top, "score", "k", ["magicpig"]) == highlighted(top, "score", "k")


def test_the_other_methods_are_grey_named_at_their_ends_and_in_the_data(many: pd.DataFrame) -> None:
    made = curve(compare(many).overall, "score", "k")
    assert made is not None
    (axes,), data = made[0].axes, made[1]
    grey = {line.get_gid() for line in axes.lines if line.get_color() == style.OTHERS}
    assert grey - {None} == NAMED
    assert {text.get_text() for text in axes.texts} == NAMED
    _, labels = axes.get_legend_handles_labels()
    assert labels == ["Full attention", "Exact top-k", "SparQ", "H2O", "SnapKV", "Random"]
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert min(b - a for a, b in itertools.pairwise(heights)) > 0.03  # a line of text
    assert set(data.loc[~data["highlighted"], "method"]) == {"hata", "quest", "loki"}


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("name", ["score_vs_k", "score_vs_bytes"])
def test_a_figure_of_many_methods_fits_a_phone_with_its_legend_below(
    many: pd.DataFrame, tmp_path: Path, name: str
) -> None:
    """A screen of 390 pixels has 362 for a figure, whose letters then have eight or more."""
    (drawn,) = draw_all(compare(many).overall, tmp_path, "words", only=name)
    assert drawn.legend is not None
    assert 300 < drawn.legend.x < 362 * drawn.smallest_text / 8


def test_few_methods_are_all_in_colour(many: pd.DataFrame) -> None:
    made = curve(compare(many[many["method"].isin(["full", *RIVALS[:3]])]).overall, "score", "k")
    assert made is not None
    assert style.OTHERS not in {line.get_color() for line in made[0].axes[0].lines}
    assert "highlighted" not in made[1]


@pytest.mark.usefixtures("pictures")
def test_chosen_methods_reach_the_figures_and_captions(
    many: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many[many["k"].isna() | many["method"].ne("exact")].to_csv(tmp_path / "rows.csv", index=False)
    given = [str(tmp_path / "rows.csv"), "--out", str(tmp_path / "out")]
    assert report.main([*given, "--methods", "loki", "quest"]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Highlighted: Full attention, Quest, Loki. The others are grey" in text
    svg = (tmp_path / "out" / "figures" / "score_vs_k.svg").read_text()
    assert {"HATA", "Quest", "Loki"} <= set(re.findall(r'<g id="(\w+)"', svg))
    capsys.readouterr()
    assert report.main([*given, "--methods", "lokki"]) == 2
    assert capsys.readouterr().err.startswith("error: methods must name methods, got 'lokki'; ")
    assert SweepReport(methods=["loki"]).methods == ["loki"]


def test_front_points_are_highlighted_and_every_method_is_named_at_a_point(
    many: pd.DataFrame, tmp_path: Path
) -> None:
    top = compare(many).overall
    cheap = top["method"].eq("hata") & top["k"].eq(64)
    top = top.assign(bytes_read_per_step=top["bytes_read_per_step"].mask(cheap, 1.0))
    (drawn,) = draw_all(top, tmp_path, "words", only="score_vs_bytes")
    data = pd.read_csv(drawn.csv)
    on_front = data[data["on_front"]]
    assert on_front[["method", "k"]].to_numpy().tolist() == [
        *(["hata", 64], ["random", 64], ["random", 128]),
    ]
    assert on_front["highlighted"].all()
    assert "Highlighted: Full attention, Exact top-k, HATA, SparQ, H2O, SnapKV, Random." in (
        drawn.caption
    )
    made = pareto(top)
    assert made is not None
    texts = [text.get_text() for text in made[0].axes[0].texts]
    for method in ("full", "exact", *RIVALS):
        label = style.style(method).label
        assert sum(text.partition(",")[0] == label for text in texts) >= 1, label


def test_of_equally_cheap_methods_that_cannot_be_told_apart_the_best_is_highlighted(
    many: pd.DataFrame,
) -> None:
    """Else a figure of methods that find nothing at the least budget would highlight them all."""
    top = compare(many).overall
    cheap = top["k"].eq(64) & top["method"].isin(["hata", "quest", "loki"])
    top = top.assign(
        bytes_read_per_step=top["bytes_read_per_step"].mask(cheap, 1.0),
        score_ci_low=0.0,
        score_ci_high=100.0,
        delta_ci_low=-100.0,
        delta_ci_high=100.0,
    )
    made = pareto(top)
    assert made is not None
    data = made[1]
    cheapest = data[data["method"].isin(["hata", "quest", "loki"]) & data["k"].eq(64)]
    assert cheapest["on_front"].all()
    shown = set(cheapest.loc[cheapest["highlighted"], "method"])
    assert shown == {"loki"}  # of the highest score


def test_a_bound_looks_like_no_method(row: Callable[..., Row]) -> None:
    times = {"decode_ms_p50": 2.0, "bandwidth_fraction": 0.5, "bandwidth_gb_s": 20.0}
    times["full_ms_p50"] = 5.0
    rows = [
        row(
            run_id=f"{method:x<12}{n}",
            **{"method": method, "k": 64, "length": n, "kv_len": n, "subtask": str(n)},
            **times,
        )
        for method in ("hata", "quest")
        for n in (1024, 4096)
    ]
    made = context_curve(compare(frame(rows)).overall, "decode_ms_p50")
    assert made is not None
    (axes,) = made[0].axes
    bounds = [line for line in axes.lines if line.get_color() == style.BOUND_COLOUR]
    assert [line.get_label() for line in bounds][-1] == "Bandwidth bound (20 GB/s)"
    assert len(bounds) == 3  # one a method, and the entry of the legend
    # Each ends in its method's marker, though full attention is drawn beside it.
    markers = [style.style(method).marker for method in ("hata", "quest")]
    assert [line.get_marker() for line in bounds][:2] == markers
    patterns = {line._dash_pattern[1] is not None for line in bounds}  # type: ignore[attr-defined]
    assert patterns == {True}
    lines = {look.line for look in style.shipped().values()} | set(map(style.turn, range(4)))
    assert style.BOUND not in lines
    colours = {look.colour for look in style.shipped().values()}
    assert not {style.BOUND_COLOUR, style.OTHERS} & colours


def test_curves_of_several_budgets_and_bits_all_look_different(row: Callable[..., Row]) -> None:
    rows = [
        row(
            run_id=f"{rbit:04d}{k:04d}{n:08d}",
            **{"method": "hata", "k": k, "rbit": rbit, "length": n, "kv_len": n},
            **{"subtask": str(n), "decode_ms_p50": (rbit + k + n) / 1000},
        )
        for rbit, k, n in itertools.product((32, 64, 128), (64, 256), (1024, 4096))
    ]
    made = context_curve(compare(frame(rows)).overall, "decode_ms_p50")
    assert made is not None
    (axes,) = made[0].axes
    looks = [(line.get_color(), line.get_linestyle()) for line in axes.lines]
    styles = {(colour, str(one)) for colour, one in looks}
    patterns = {(line.get_color(), str(line._dash_pattern)) for line in axes.lines}  # type: ignore[attr-defined]
    assert len(axes.lines) == 6
    assert max(len(styles), len(patterns)) == 6
    assert [one.get_text() for one in axes.get_xticklabels()] == ["1K", "4K"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1024.0, "1,024"), (16384.0, "16,384"), (20.0, "20"), (0.125, "0.125"), (0.00001, "0.00001"),
     (-0.01, "−0.01"), (0.0, "0")],
)  # fmt: skip
def test_numbers_of_axes_are_plain(value: float, text: str) -> None:
    assert plain_number(value) == text


def points(cost: str, *values: tuple[float, float, float, float, float]) -> pd.DataFrame:
    """Return configurations by cost, half its interval's width, score, difference, half of its."""
    return pd.DataFrame(
        [
            {
                "method": "full" if gap == 0 else "hata",
                cost: price,
                f"{cost}_ci_low": price - wide if wide else None,
                f"{cost}_ci_high": price + wide if wide else None,
                "score": score,
                **{"score_ci_low": score - 5, "score_ci_high": score + 5},
                "delta_full": None if gap == 0 else gap,
                "delta_ci_low": None if gap == 0 else gap - half,
                "delta_ci_high": None if gap == 0 else gap + half,
            }
            for price, wide, score, gap, half in values
        ]
    )


NONE = float("nan")


def test_the_front_has_what_can_be_told_apart_in_score() -> None:
    cost = "bytes_read_per_step"
    # 53 does not exceed 50 by more than hypot(5, 5), 60 does; 61 does not exceed 60.
    unpaired = points(
        cost, *((c, 0, s, NONE, NONE) for c, s in ((1, 50), (2, 53), (4, 60), (8, 61)))
    )
    assert front_of(unpaired, cost) == [True, False, True, False]
    # Paired with full attention, which scores 55, differences are told apart to a point.
    paired = points(
        cost, (1, 0, 50, -5, 1), (2, 0, 53, -2, 1), (3, 0, 53.8, -1.2, 1), (9, 0, 55, 0, 0)
    )
    assert front_of(paired, cost) == [True, True, False, True]
    assert front_of(paired.iloc[::-1], cost) == [True, False, True, True]
    exact = unpaired.assign(score_ci_low=None, score_ci_high=None)  # as older rows
    assert front_of(exact, cost) == [True, True, True, True]


def test_the_front_has_what_can_be_told_apart_in_time() -> None:
    cost = "decode_vs_full"
    # Neither score nor time are told apart: both are on the front.
    assert front_of(points(cost, (1, 0.1, 50, NONE, NONE), (1.1, 0.1, 52, NONE, NONE)), cost) == [
        *(True, True),
    ]
    # As fast as can be told, and better: the first is beaten though it was faster.
    assert front_of(points(cost, (1, 0.1, 50, NONE, NONE), (1.1, 0.1, 60, NONE, NONE)), cost) == [
        *(False, True),
    ]
    # Faster, and no worse as can be told: the second is beaten though it scored more.
    assert front_of(points(cost, (1, 0.1, 50, NONE, NONE), (1.3, 0.1, 52, NONE, NONE)), cost) == [
        *(True, False),
    ]
