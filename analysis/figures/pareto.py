"""Score against cost with the Pareto front; costs are bytes read per decode step, and its time.

Times are relative to full attention timed alternately with each method. Milliseconds of different
cells are not comparable: cells run minutes apart, under different loads of the machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from topkbench.analysis import style
from topkbench.analysis.comparison.configurations import BASELINES
from topkbench.analysis.comparison.metrics import METRICS, ends_of
from topkbench.analysis.comparison.timings import is_unsteady
from topkbench.analysis.figures.curves import lay_out, legend, new_figure, plain_number, table
from topkbench.analysis.figures.highlight import NAME_COLOUR, highlighted, marked
from topkbench.analysis.figures.points import describe
from topkbench.analysis.tables.overview import LEAGUE

COSTS = ("bytes_read_per_step", "decode_vs_full")
FRONT_WORDS = (
    "The front, joined, starts at the cheapest point: a dearer point joins it if its score exceeds "
    "that of each point on it by more than the intervals allow (a value without one counts as "
    "exact); points that cannot be told apart in either join it together."
)
"""Which points are on the front, for a caption."""
OVERLAP_WORDS = "Where points overlap, one is drawn smaller, on top of the other."
"""How overlapping points are drawn, for a caption."""

# Positions of a label at its point: offset in points, horizontal and vertical alignment.
_PLACES = (
    ((0, 6), "center", "bottom"),
    ((-6, 3), "right", "bottom"),
    ((6, -3), "left", "top"),
    ((0, -6), "center", "top"),
    ((-6, -3), "right", "top"),
    ((6, 3), "left", "bottom"),
    ((6, 0), "left", "center"),
    ((-6, 0), "right", "center"),
)
_AWAY = (14.0, 22.0, 32.0, 44.0, 58.0, 74.0)  # distances of a label from its point, in points,
_AROUND = 16  # in as many directions; a line then leads to it
_AT_END = 2  # distance of a label from the end of its point's interval, in points
_SHARE = {"left": 0.0, "bottom": 0.0, "center": 0.5, "right": 1.0, "top": 1.0}
_SIZE = 7.5  # of labels, in points
_POINT = 5.0  # half the width of the area around a point that is kept free of labels, in points
_ALONG = 60  # positions between two points of the front that are kept free of labels
_OVERLAP = 5.0  # points nearer than this overlap, in points of length,
_SMALLER = 0.4  # and the later one is drawn with this share of the area, on top of the other
_SMALLEST = 6.0  # area of a marker, in square points
_ROUND = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)  # mantissas of ticks
_APART = 0.06  # distance between ticks, as a share of the axis
_MOST_BARS = 24  # if there are more points, only those of the front have an interval


def front_of(points: pd.DataFrame, cost: str, goal: str = "score") -> list[bool]:
    """Return for each point whether it is on the front of what can be told apart.

    A point beats another if it is better in goal or cost by more than the intervals allow, and not
    worse in the other by more. From the best cost on, and of equal costs from the best goal on, a
    point that no point on the front beats joins the front, from which those that it beats are
    removed. Scores are compared by their paired differences to full attention where both points
    have one, since these have no variation between samples; bytes are exact.

    Args:
        points: Configurations with goal and cost.
        cost: A metric, such as one of ``COSTS``.
        goal: Another metric.
    """
    cheap, good = (-1 if METRICS[name].better == "higher" else 1 for name in (cost, goal))
    every: list[dict[str, Any]] = points.to_dict("records")  # type: ignore[assignment]
    order = sorted(range(len(every)), key=lambda i: (cheap * every[i][cost], good * every[i][goal]))
    found: list[int] = []
    for place in order:
        if not any(_beats(every[one], every[place], cost, goal) for one in found):
            found = [one for one in found if not _beats(every[place], every[one], cost, goal)]
            found.append(place)
    return [place in found for place in range(len(every))]


def _beats(first: Mapping[str, Any], other: Mapping[str, Any], cost: str, goal: str) -> bool:
    """Return whether a point is better in goal or cost, and not worse in the other."""
    if goal == "score" and all(
        one["method"] == "full" or not pd.isna(one["delta_full"]) for one in (first, other)
    ):
        goal = "delta_full"
    cheaper, dearer = _is_better(first, other, cost), _is_better(other, first, cost)
    better, worse = _is_better(first, other, goal), _is_better(other, first, goal)
    return (cheaper and not worse) or (better and not dearer)


def _is_better(first: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    """Return whether a value is better than another by more than their intervals allow."""
    if METRICS[name].better == "higher":
        return _is_above(first, other, name)
    return _is_above(other, first, name)


def _is_above(first: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    """Return whether a value exceeds another by more than their intervals allow.

    The distances to the ends of the intervals between the two are combined by Newcombe's rule.
    """

    def ends(one: Mapping[str, Any]) -> tuple[float, float, float]:
        value = 0.0 if name == "delta_full" and one["method"] == "full" else float(one[name])
        known = (one.get(end) for end in ends_of(name))
        low, high = (value if one is None or pd.isna(one) else float(one) for one in known)
        return value, low, high

    (value, low, _), (below, _, high) = ends(first), ends(other)
    return value > below and value - below > math.hypot(value - low, high - below)


def has_all_bars(points: pd.DataFrame) -> bool:
    """Return whether all points have the interval of their score, and not only the front's."""
    return len(points) <= _MOST_BARS


def bars_words(configurations: pd.DataFrame, costs: Sequence[str]) -> str:
    """Return what the vertical bars of a figure over some costs are, for its caption."""
    which = "" if has_all_bars(_with_costs(configurations, costs)) else ", of the front alone"
    return f"Vertical bars: 95% intervals of scores{which}."


def pareto(
    configurations: pd.DataFrame, methods: Sequence[str] | None = None
) -> tuple[Figure, pd.DataFrame] | None:
    """Draw score against bytes read per decode step, with the Pareto front.

    Args:
        configurations: `Comparison.overall` of one setting.
        methods: Methods to highlight; None for the default of `highlight.highlighted`. Those on the
            front are too.

    Returns:
        The figure and its data, or None for fewer than three points.
    """
    data = _with_costs(configurations, COSTS[:1])
    if len(data) < 3:
        return None
    figure, axes = new_figure(7.6, 4.4)
    front = _front(data, COSTS[0])
    chosen = _highlighted(data, [front], methods)
    price = _draw(axes, data, COSTS[0], front, chosen)
    _finish(figure, [axes], data, [(front, price)], chosen)
    return figure, marked(table(data.assign(on_front=front), COSTS[0], "score", "on_front"), chosen)


def pareto_pair(
    configurations: pd.DataFrame, methods: Sequence[str] | None = None
) -> tuple[Figure, pd.DataFrame] | None:
    """Draw score against bytes read and against decode time, each with its Pareto front.

    Args:
        configurations: `Comparison.overall` of one setting.
        methods: As of `pareto`.

    Returns:
        The figure and its data, or None if ``tables.LEAGUE`` methods or fewer have both costs.
    """
    data = _with_costs(configurations, COSTS)
    if data["method"].nunique() <= LEAGUE:
        return None
    figure = Figure(figsize=style.figure_size(12.0, 4.8))
    axes = list(figure.subplots(1, 2, sharey=True))
    fronts = [_front(data, cost) for cost in COSTS]
    chosen = _highlighted(data, fronts, methods)
    drawn = [
        (front, _draw(one, data, cost, front, chosen))
        for one, cost, front in zip(axes, COSTS, fronts, strict=True)
    ]
    axes[1].set_ylabel("")
    _finish(figure, axes, data, drawn, chosen)
    shown = data.assign(on_front_of_bytes=fronts[0], on_front_of_time=fronts[1])
    columns = (*COSTS, "score", "on_front_of_bytes", "on_front_of_time")
    return figure, marked(table(shown, *columns), chosen)


def _highlighted(
    data: pd.DataFrame, fronts: Sequence[pd.Series], methods: Sequence[str] | None
) -> frozenset[str]:
    """Return the highlighted methods, among them those on a front.

    Of several points of one cost that cannot be told apart, that of the highest score stands for
    them: where the cheapest methods find nothing, all of them are on the front.
    """
    on_a_front: set[str] = set()
    for front, cost in zip(fronts, COSTS, strict=False):
        points = data[front].sort_values("score", ascending=False, kind="stable")
        on_a_front.update(points.drop_duplicates(cost)["method"].astype(str))
    return highlighted(data, "score", "k", methods) | on_a_front


def _front(data: pd.DataFrame, cost: str) -> pd.Series:
    """Return for each configuration whether it is on the front."""
    # Oracles read every key to select: they are bounds, not candidates for the front.
    rivals = data[~data["method"].isin(BASELINES) | (data["method"] == "full")]
    if cost == "decode_vs_full":  # an unreliable time beats no other point
        rivals = rivals[~is_unsteady(rivals)]
    # Named, as a column without rows would not be bool.
    front = pd.Series(front_of(rivals, cost), index=rivals.index, dtype=bool)
    return front.reindex(data.index, fill_value=False)


def _with_costs(configurations: pd.DataFrame, costs: Sequence[str]) -> pd.DataFrame:
    """Return the configurations that have a score and each of the costs."""
    known = configurations["score"].notna()
    for cost in costs:
        known &= configurations[cost].fillna(0) > 0
    # The columns that are drawn alone: selecting rows takes longer the more columns there are.
    drawn = table(configurations, *costs, "score", "delta_full").columns
    ends = list(ends_of("delta_full"))
    also = ["configuration_id", "task", "kv_len", "batch_size", "label", "timing_note", *ends]
    also += ["whole_label"] if "whole_label" in configurations else []
    return configurations.loc[known, list(dict.fromkeys([*drawn, *also]))]


def _draw(
    axes: Axes, data: pd.DataFrame, cost: str, front: pd.Series, chosen: Collection[str]
) -> pd.Series:
    """Draw one cost's points, each method's joined by budget; return the points' costs."""
    price = data[cost] / METRICS[cost].divisor
    colours = pd.Series({index: _colour(one, chosen) for index, one in data["method"].items()})
    hollow = pd.Series(False, index=data.index)
    if cost == "decode_vs_full":
        hollow = is_unsteady(data)
    cost_axis(axes, price)
    barred = data if has_all_bars(data) else data[front]
    bottom = 10 * (pd.concat([data["score"], barred["score_ci_low"]]).min() // 10)
    top = -10 * (-pd.concat([data["score"], barred["score_ci_high"]]).max() // 10)
    top = max(top, bottom + 10)  # all scores may be equal
    margin = 0.06 * (top - bottom)
    axes.set_ylim(bottom - margin, top + margin)
    level = _levels(axes, data, price)
    axes.vlines(
        price[barred.index],
        barred["score_ci_low"],
        barred["score_ci_high"],
        colors=list(colours[barred.index]),
        lw=0.8,
        alpha=0.5,
        zorder=2.5,
    )
    ordered = data[front].assign(price=price[front]).sort_values(["price", "score"])
    axes.plot(
        price[ordered.index],
        ordered["score"],
        color="#333333",
        lw=1.2,
        zorder=2,
        label="Pareto front",
    )
    if cost == "decode_vs_full":
        axes.axvline(1.0, color=style.style("full").colour, lw=0.8, zorder=0.9)
        axes.hlines(
            data["score"],
            data["decode_vs_full_ci_low"],
            data["decode_vs_full_ci_high"],
            colors=list(colours),
            lw=0.8,
            alpha=0.6,
            zorder=2.5,
        )
    for method in sorted(data["method"].unique(), key=style.order):
        look = style.style(method)
        own = data[data["method"] == method]
        colour, is_chosen = _colour(method, chosen), method in chosen
        for _, curve in own.groupby(["label", "rbit"], dropna=False, sort=False):
            by_budget = curve.sort_values("k")
            (line,) = axes.plot(
                price[by_budget.index],
                by_budget["score"],
                color=colour,
                linestyle=look.line,
                lw=0.9,
                alpha=0.45,
                zorder=1 if is_chosen else 0.9,
            )
            describe(line, by_budget, "score", cost)
        below = 3 if is_chosen else 2.2
        for on, is_hollow, over in itertools.product(
            (False, True), (False, True), sorted(set(level[own.index]))
        ):
            mine = own[
                (front[own.index] == on)
                & (hollow[own.index] == is_hollow)
                & (level[own.index] == over)
            ]
            if mine.empty:
                continue
            kind = f"{'_front' if on else ''}{'_unsteady' if is_hollow else ''}"
            axes.scatter(
                price[mine.index],
                mine["score"],
                s=max((58 if on else 30) * _SMALLER**over, _SMALLEST),
                marker=look.marker,
                facecolors="white" if is_hollow else colour,
                alpha=0.7 if not (on or is_hollow or over) else 1.0,
                edgecolors=colour if is_hollow else "white" if on or over else "none",
                linewidths=1.0 if is_hollow else 0.6,
                zorder=(4 if on else below) + 2 * over,
                gid=f"{method}{kind}_{axes.figure.axes.index(axes)}_{over}",
            )
        if is_chosen:
            axes.plot(
                [],
                [],
                marker=look.marker,
                ms=6.5,
                color=colour,
                linestyle=look.line,
                lw=0.9,
                label=look.label,
            )
    axes.set_xlabel(METRICS[cost].axis)
    axes.set_ylabel(METRICS["score"].axis)
    # A mark on the axis at each point, as ticks are round numbers.
    beside: dict[str, Any] = {
        "transform": axes.get_xaxis_transform(),
        "clip_on": False,
        "zorder": 1,
    }
    rug: dict[str, Any] = {
        "marker": 2,
        "ms": 3.0,
        "mew": 0.6,
        "ls": "none",
        "color": "#777777",
        "gid": "points",
    }
    axes.plot(price, [0.0] * len(price), **{**beside, **rug})
    return price


def _colour(method: str, chosen: Collection[str]) -> str:
    return style.style(method).colour if method in chosen else style.OTHERS


def _levels(axes: Axes, data: pd.DataFrame, price: pd.Series) -> pd.Series:
    """Return for each point how many others it is drawn over, so that all can be seen.

    All points are where they were measured. Of those that overlap, the first in the order of
    methods, budgets and bits lies below: in every figure the same.
    """
    whole, pixels = axes.figure.bbox, axes.figure.dpi / 72
    width = 0.72 * whole.width / pixels / len(axes.figure.axes)  # roughly, without the legend
    height = 0.8 * whole.height / pixels
    low, high = (math.log2(end) for end in axes.get_xlim())
    bottom, top = axes.get_ylim()
    across = (np.log2(price.astype(float)) - low) / (high - low) * width
    along = (data["score"].astype(float) - bottom) / (top - bottom) * height
    place = data["method"].map(style.order)
    order = data.assign(place=place).sort_values(["place", "k", "rbit"], kind="stable").index
    found: dict[Any, int] = {}
    for index in order:
        under = {
            level
            for other, level in found.items()
            if math.hypot(across[index] - across[other], along[index] - along[other]) < _OVERLAP
        }
        found[index] = next(level for level in itertools.count() if level not in under)
    return pd.Series(found)[data.index]


def cost_axis(axes: Axes, price: pd.Series) -> None:
    """Put ticks at powers of two, or at round numbers near the points if these would be few."""
    axes.set_xscale("log", base=2)
    low, high = math.log2(float(price.min())), math.log2(float(price.max()))
    margin = 0.1 * (high - low) + 0.03
    ends = 2.0 ** (low - margin), 2.0 ** (high + margin)
    if high - low >= 3:
        step = 2 if high - low >= 9 else 1
        ticks = [2.0**place for place in range(math.floor(low), math.ceil(high) + 1, step)]
    else:
        ticks = _round_near(price, *ends)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
    axes.set_xlim(*ends)


def _round_near(price: pd.Series, low: float, high: float) -> list[float]:
    """Return round numbers between two ends, those nearest to a point first where space is short.

    Those are kept that are far enough apart on a logarithmic axis for their labels.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [one * 10.0**power for power in powers for one in _ROUND]
    inside = [one for one in found if low <= one <= high]
    if len(inside) < 3:  # all points cost nearly the same
        inside = [float(one) for one in MaxNLocator(5).tick_values(low, high) if low <= one <= high]
    points = np.log(price.astype(float).to_numpy())
    inside.sort(key=lambda one: float(np.abs(points - math.log(one)).min()))
    ticks: list[float] = []
    for one in inside:
        if all(abs(math.log(one / other)) >= _APART * math.log(high / low) for other in ticks):
            ticks.append(one)
    return sorted(ticks)


def _finish(
    figure: Figure,
    axes: Sequence[Axes],
    data: pd.DataFrame,
    drawn: Sequence[tuple[pd.Series, pd.Series]],
    chosen: Collection[str],
) -> None:
    """Add the legend, lay the figure out, and label its points."""
    legend(figure, axes[0])
    axes[0].set_title(" ")  # keeps the space of the title, which is set when labels are placed
    renderer = lay_out(figure)
    for one, (front, price) in zip(axes, drawn, strict=True):
        _Labels(one, data.assign(price=price), front, chosen, renderer).write()


class _Labels:
    """Labels points with names and settings, beside them or at the end of a line that leads there.

    Every point of the front is labelled, and of each other method one point; of a single method,
    all points that have space. No label overlaps a point, an interval, the front or another label.
    """

    def __init__(
        self,
        axes: Axes,
        data: pd.DataFrame,
        front: pd.Series,
        chosen: Collection[str],
        renderer: RendererAgg,
    ) -> None:
        self.axes, self.data, self.front, self.chosen = axes, data, front, chosen
        self.renderer, self.pixels = renderer, axes.figure.dpi / 72
        self.inside = axes.get_window_extent(renderer)
        self.barred = set(data.index[has_all_bars(data) | front])
        self.points = axes.transData.transform(data[["price", "score"]].astype(float).to_numpy())
        # Plain values, by the index of their point.
        self.of: dict[Any, dict[str, Any]] = data.to_dict("index")  # type: ignore[assignment]
        self.place_of = {index: place for place, index in enumerate(data.index)}
        taken = [self._around(x, y, _POINT * self.pixels) for x, y in self.points]
        joined = axes.transData.transform(axes.lines[0].get_xydata())
        for first, second in itertools.pairwise(joined):
            along = np.linspace(first, second, _ALONG)
            taken += [self._around(x, y, self.pixels) for x, y in along]
        self.ends: dict[Any, tuple[float, float]] = {}
        for index in self.barred:
            low, high = (self.of[index][f"score_ci_{end}"] for end in ("low", "high"))
            if not math.isnan(low):
                x = self.of[index]["price"]
                (x, bottom), (_, top) = axes.transData.transform([[x, low], [x, high]])
                taken.append(np.array([x - self.pixels, bottom, x + self.pixels, top]))
                self.ends[index] = (bottom, top)
        self.taken = np.array(taken)

    def write(self) -> None:
        """Write all labels."""
        data, front = self.data, self.front
        is_one = data.loc[data["method"] != "full", "method"].nunique() == 1
        of_knobs = data if is_one else data[front]
        knobs = [name for name in ("k", "rbit") if of_knobs[name].nunique() > 1]

        def settings(index: Any) -> str:
            found = ((name, self.of[index][name]) for name in knobs)
            return ", ".join(f"{name}={value}" for name, value in found if not pd.isna(value))

        for index in data.index[front]:
            name = style.style(self.of[index]["method"]).label
            words = [*([] if is_one and settings(index) else [name]), settings(index)]
            text = ", ".join(filter(None, words))
            if not self._fits(text, index) and not self._fits(text, index, away=True):
                self._fits(settings(index), index)
        if is_one:
            for index in data.index[~front]:
                self._fits(settings(index), index)
            return
        named = set(data.loc[front, "method"])
        rest = data[~data["method"].isin(named)].sort_values("price", ascending=False)
        for method, own in rest.groupby("method", sort=False):
            name = style.style(str(method)).label
            if not any(self._fits(name, index) for index in own.index):
                any(self._fits(name, index, away=True) for index in own.index)

    @staticmethod
    def _around(x: float, y: float, radius: float) -> np.ndarray:
        return np.array([x - radius, y - radius, x + radius, y + radius])

    def _fits(self, text: str, index: Any, away: bool = False) -> bool:
        """Write a label at its point, or away from it with a line, if a place is free."""
        if not text:
            return False
        own = self.place_of[index]
        x, y = self.points[own]
        width, height, descent = self.renderer.get_text_width_height_descent(
            text, FontProperties(size=style.small_type(_SIZE)), False
        )
        for shift, across, along, at in self._places(index, away):
            left = x + shift[0] * self.pixels - width * _SHARE[across]
            bottom = at + shift[1] * self.pixels - (height + descent) * _SHARE[along]
            box = np.array([left, bottom, left + width, bottom + height + descent])
            if not self._is_free(box, own, needs_nearest=not away and at == y):
                continue
            self.taken = np.vstack([self.taken, box])
            colour = style.style(self.of[index]["method"]).colour
            is_chosen = self.of[index]["method"] in self.chosen
            label = self.axes.annotate(
                text,
                tuple(self.axes.transData.inverted().transform((x, at))),
                xytext=shift,
                textcoords="offset points",
                ha=across,
                va=along,
                fontsize=style.small_type(_SIZE),
                color=style.for_text(colour) if is_chosen else NAME_COLOUR,
            )
            label.set_in_layout(False)
            if away:
                # To the edge of the label that is nearest. Clipped to the axes, as points are.
                nearest = np.clip((x, y), box[:2], box[2:])
                line = self.axes.transData.inverted().transform([(x, y), nearest])
                self.axes.plot(*line.T, color="#999999", lw=0.5, zorder=1.5)
            return True
        return False

    def _places(
        self, index: Any, away: bool
    ) -> Iterator[tuple[tuple[float, float], str, str, float]]:
        """Yield shifts in points, alignments, and the height in pixels of what they shift."""
        y = self.points[self.place_of[index]][1]
        if away:
            for distance, part in itertools.product(_AWAY, range(_AROUND)):
                angle = 2 * math.pi * part / _AROUND
                shift = distance * math.cos(angle), distance * math.sin(angle)
                across = "left" if shift[0] > 1 else "right" if shift[0] < -1 else "center"
                yield shift, across, "center", y
            return
        for shift, across, along in _PLACES:
            yield shift, across, along, y
        if index in self.ends:
            bottom, top = self.ends[index]
            yield (0, _AT_END), "center", "bottom", top
            yield (0, -_AT_END), "center", "top", bottom

    def _is_free(self, box: np.ndarray, own: int, needs_nearest: bool) -> bool:
        """Return whether a label is inside, overlaps nothing, and is nearest to its own point."""
        inside, taken = self.inside, self.taken
        if box[0] < inside.x0 or box[2] > inside.x1 or box[1] < inside.y0 or box[3] > inside.y1:
            return False
        low, high = np.maximum(taken[:, :2], box[:2]), np.minimum(taken[:, 2:], box[2:])
        if (low < high).all(axis=1).any():
            return False
        if not needs_nearest:
            return True
        gaps = np.hypot(*np.maximum(np.maximum(box[:2] - self.points, self.points - box[2:]), 0).T)
        others = np.delete(gaps, own)
        return not len(others) or bool(gaps[own] < others.min() - self.pixels)
