"""Score against cost with the Pareto front; costs are bytes read per decode step, and its time.

Times are relative to full attention timed alternately with each method. Milliseconds of different
cells are not comparable: cells run minutes apart, under different loads of the machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from topkbench.analysis import style
from topkbench.analysis.comparison.configurations import BASELINES
from topkbench.analysis.comparison.metrics import METRICS
from topkbench.analysis.comparison.timings import is_unsteady
from topkbench.analysis.figures.curves import legend, new_figure, table
from topkbench.analysis.tables.overview import LEAGUE

COSTS = ("bytes_read_per_step", "decode_vs_full")

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
_AT_END = 2  # distance of a label from the end of its point's interval, in points
_AT_ENDS = (
    ("score_ci_high", (0, _AT_END), "center", "bottom"),
    ("score_ci_low", (0, -_AT_END), "center", "top"),
)
_POINT = 5.0  # half the width of the area around a point that is kept free of labels, in points
_ALONG = 60  # positions between two points of the front that are kept free of labels
_OVERLAP = 5.0  # points nearer than this overlap, in points of length,
_SHIFT = 6.5  # and one of them is shifted by this much, in points of length,
_ROUND = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)  # mantissas of ticks
_APART = 0.06  # distance between ticks, as a share of the axis
_MOST_BARS = 24  # if there are more points, only those of the front have an interval
_SIDES = (0, 1, -1)  # to the first of these sides that is free; if none is, it is not shifted


def on_front(cost: Sequence[float], gain: Sequence[float]) -> list[bool]:
    """Return for each point whether it is on the Pareto front, that is, not dominated.

    Of equal points on the front all are on it.
    """
    return [
        not any(
            (c <= cost[i] and g >= gain[i]) and (c < cost[i] or g > gain[i])
            for c, g in zip(cost, gain, strict=True)
        )
        for i in range(len(cost))
    ]


def has_all_bars(points: pd.DataFrame) -> bool:
    """Return whether all points have the interval of their score, and not only the front's."""
    return len(points) <= _MOST_BARS


def bars_words(configurations: pd.DataFrame, costs: Sequence[str]) -> str:
    """Return what the vertical bars of a figure over some costs are, for its caption."""
    which = "" if has_all_bars(_with_costs(configurations, costs)) else ", of the front alone"
    return (
        f"Vertical bars: 95% intervals of scores{which}; points whose bars overlap may be on the "
        "front, or off it, by chance."
    )


def pareto(configurations: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """Draw score against bytes read per decode step, with the Pareto front.

    Returns:
        The figure and its data, or None for fewer than three points.
    """
    data = _with_costs(configurations, COSTS[:1])
    if len(data) < 3:
        return None
    figure, axes = new_figure(7.6, 4.4)
    front, shown = _draw(axes, data, COSTS[0])
    _finish(figure, [axes], data, [(front, shown)])
    return figure, table(data.assign(on_front=front), COSTS[0], "score", "on_front")


def pareto_pair(configurations: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """Draw score against bytes read and against decode time, each with its Pareto front.

    Returns:
        The figure and its data, or None if ``tables.LEAGUE`` methods or fewer have both costs.
    """
    data = _with_costs(configurations, COSTS)
    if data["method"].nunique() <= LEAGUE:
        return None
    figure = Figure(figsize=(12.0, 4.8))
    axes = list(figure.subplots(1, 2, sharey=True))
    drawn = [_draw(one, data, cost) for one, cost in zip(axes, COSTS, strict=True)]
    axes[1].set_ylabel("")
    _finish(figure, axes, data, drawn)
    (of_bytes, _), (of_time, _) = drawn
    marked = data.assign(on_front_of_bytes=of_bytes, on_front_of_time=of_time)
    return figure, table(marked, *COSTS, "score", "on_front_of_bytes", "on_front_of_time")


def _with_costs(configurations: pd.DataFrame, costs: Sequence[str]) -> pd.DataFrame:
    """Return the configurations that have a score and each of the costs."""
    known = configurations["score"].notna()
    for cost in costs:
        known &= configurations[cost].fillna(0) > 0
    return configurations[known]


def _draw(axes: Axes, data: pd.DataFrame, cost: str) -> tuple[pd.Series, pd.Series]:
    """Draw one cost's points, each method's joined by budget.

    Returns:
        Which points are on the front, and where on the cost axis each is drawn.
    """
    price = data[cost] / METRICS[cost].divisor
    # Oracles read every key to select: they are bounds, not candidates for the front.
    rivals = data[~data["method"].isin(BASELINES) | (data["method"] == "full")]
    hollow = pd.Series(False, index=data.index)
    if cost == "decode_vs_full":  # an unreliable time dominates no other point
        hollow = is_unsteady(data)
        rivals = rivals[~hollow[rivals.index]]
    marks = on_front(list(price[rivals.index]), list(rivals["score"]))
    # Named, as a column without rows would not be bool.
    front = pd.Series(marks, index=rivals.index, dtype=bool).reindex(data.index, fill_value=False)
    cost_axis(axes, price)
    barred = data if has_all_bars(data) else data[front]
    bottom = 10 * (pd.concat([data["score"], barred["score_ci_low"]]).min() // 10)
    top = -10 * (-pd.concat([data["score"], barred["score_ci_high"]]).max() // 10)
    top = max(top, bottom + 10)  # all scores may be equal
    margin = 0.06 * (top - bottom)
    axes.set_ylim(bottom - margin, top + margin)
    shown = _without_overlap(axes, price, data["score"], front)
    axes.vlines(
        shown[barred.index],
        barred["score_ci_low"],
        barred["score_ci_high"],
        colors=[style.style(method).colour for method in barred["method"]],
        lw=0.8,
        alpha=0.5,
        zorder=2.5,
    )
    ordered = data[front].assign(price=price[front]).sort_values(["price", "score"])
    axes.plot(
        shown[ordered.index],
        ordered["score"],
        color="#333333",
        lw=1.2,
        zorder=2,
        label="Pareto front",
    )
    if cost == "decode_vs_full":
        axes.axvline(1.0, color=style.style("full").colour, lw=0.8, zorder=0.9)
        aside = shown / price
        axes.hlines(
            data["score"],
            data["decode_vs_full_ci_low"] * aside,
            data["decode_vs_full_ci_high"] * aside,
            colors=[style.style(method).colour for method in data["method"]],
            lw=0.8,
            alpha=0.6,
            zorder=2.5,
        )
    for method in sorted(data["method"].unique(), key=style.order):
        look = style.style(method)
        own = data[data["method"] == method]
        for _, curve in own.groupby(["label", "rbit"], dropna=False, sort=False):
            by_budget = curve.sort_values("k")
            axes.plot(
                shown[by_budget.index],
                by_budget["score"],
                color=look.colour,
                linestyle=look.line,
                lw=0.9,
                alpha=0.45,
                zorder=1,
            )
        for on, size, alpha in ((False, 30, 0.7), (True, 58, 1.0)):
            mine = own[(front[own.index] == on) & ~hollow[own.index]]
            axes.scatter(
                shown[mine.index],
                mine["score"],
                s=size,
                marker=look.marker,
                color=look.colour,
                alpha=alpha,
                edgecolors="white" if on else "none",
                linewidths=0.6,
                zorder=4 if on else 3,
            )
        loose = own[hollow[own.index]]
        axes.scatter(
            shown[loose.index],
            loose["score"],
            s=30,
            marker=look.marker,
            facecolors="white",
            edgecolors=look.colour,
            linewidths=1.0,
            zorder=3,
        )
        axes.plot(
            [],
            [],
            marker=look.marker,
            ms=6.5,
            color=look.colour,
            linestyle=look.line,
            lw=0.9,
            label=look.label,
        )
    axes.set_xlabel(METRICS[cost].axis)
    axes.set_ylabel(METRICS["score"].axis)
    return front, shown


def _without_overlap(axes: Axes, price: pd.Series, score: pd.Series, front: pd.Series) -> pd.Series:
    """Return each point's position on the cost axis, shifted where it would overlap another.

    Points of the front are placed first.
    """
    whole, pixels = axes.figure.bbox, axes.figure.dpi / 72
    width = 0.72 * whole.width / pixels / len(axes.figure.axes)  # roughly, without the legend
    height = 0.8 * whole.height / pixels
    low, high = (math.log2(end) for end in axes.get_xlim())
    bottom, top = axes.get_ylim()
    across = (np.log2(price.astype(float)) - low) / (high - low) * width
    along = (score.astype(float) - bottom) / (top - bottom) * height
    found: dict[Any, float] = {}
    for index in [*front.index[front], *front.index[~front]]:
        for side in _SIDES:
            x, y = across[index] + side * _SHIFT, along[index]
            if all(math.hypot(x - found[i], y - along[i]) >= _OVERLAP for i in found):
                break
        else:
            x = across[index]
        found[index] = x
    return 2.0 ** (low + pd.Series(found)[price.index] / width * (high - low))


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
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
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
) -> None:
    """Add the legend, lay the figure out, and label points where there is space."""
    legend(figure, axes[0])
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # the space for labels is known only after layout
    for one, (front, shown) in zip(axes, drawn, strict=True):
        _label(one, data.assign(shown=shown), front, renderer)


def _label(axes: Axes, data: pd.DataFrame, front: pd.Series, renderer: RendererAgg) -> None:
    """Label points with names and settings, where a label overlaps nothing and is not ambiguous.

    Every point of the front is labelled, and of each other method the most expensive point that has
    space for a label.
    """
    knobs = [name for name in ("k", "rbit") if data.loc[front, name].nunique() > 1]
    is_one = data.loc[data["method"] != "full", "method"].nunique() == 1
    pixels = axes.figure.dpi / 72

    def around(x: float, y: float, radius: float) -> Bbox:
        return Bbox([[x - radius, y - radius], [x + radius, y + radius]])

    points = axes.transData.transform(data[["shown", "score"]].astype(float).to_numpy())
    places = dict(zip(data.index, points, strict=True))
    taken = [around(x, y, _POINT * pixels) for x, y in points]
    joined = axes.transData.transform(axes.lines[0].get_xydata())
    for first, second in itertools.pairwise(joined):
        taken += [around(x, y, pixels) for x, y in np.linspace(first, second, _ALONG)]
    barred = data.index[has_all_bars(data) | front]
    for _, point in data.loc[barred].iterrows():
        ends = [[point["shown"], point[f"score_ci_{end}"]] for end in ("low", "high")]
        (x, bottom), (_, top) = axes.transData.transform(np.array(ends, dtype=float))
        if not math.isnan(bottom):
            taken.append(Bbox([[x - pixels, bottom], [x + pixels, top]]))
    inside = axes.get_window_extent(renderer)

    def fits(text: str, configuration: pd.Series) -> bool:
        tried = [("score", *place) for place in _PLACES]
        if configuration.name in barred and not pd.isna(configuration["score_ci_low"]):
            tried += _AT_ENDS
        for height, shift, across, along in tried if text else ():
            label = axes.annotate(
                text,
                (configuration["shown"], configuration[height]),
                xytext=shift,
                textcoords="offset points",
                ha=across,
                va=along,
                fontsize=7,
                color=style.style(configuration["method"]).colour,
            )
            label.set_in_layout(False)
            box = label.get_window_extent(renderer)
            free = inside.x0 <= box.x0 and box.x1 <= inside.x1 and box.y1 <= inside.y1
            gaps = {index: _gap(box, *place) for index, place in places.items()}
            own = gaps.pop(configuration.name) if height == "score" else _AT_END * pixels
            is_nearest = own < min(gaps.values(), default=math.inf) - pixels
            if free and is_nearest and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                return True
            label.remove()
        return False

    for _, configuration in data[front].iterrows():
        settings = [
            f"{name}={configuration[name]}" for name in knobs if not pd.isna(configuration[name])
        ]
        name = [] if is_one else [style.style(configuration["method"]).label]
        if not fits(", ".join([*name, *settings]), configuration):
            fits(", ".join(settings), configuration)
    if is_one:
        return
    named = set(data.loc[front, "method"])
    rest = data[~data["method"].isin(named)].sort_values("shown", ascending=False, kind="stable")
    for method, own in rest.groupby("method", sort=False):
        any(
            fits(style.style(str(method)).label, configuration)
            for _, configuration in own.iterrows()
        )


def _gap(box: Bbox, x: float, y: float) -> float:
    """Return the distance of a point from a box."""
    return math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))
