"""Score against cost, with the Pareto front: bytes read by a decode step, and its time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from topkbench.analysis import style
from topkbench.analysis.curves import legend, new_figure, table, whole_axis
from topkbench.analysis.lines import YARDSTICKS
from topkbench.analysis.metrics import METRICS
from topkbench.analysis.tables import LEAGUE

COSTS = ("bytes_read_per_step", "decode_ms_p50")

# Where a label may stand beside its point: shift in points, and what of it is at the shifted place.
_PLACES = (
    ((0, 6), "center", "bottom"),
    ((-6, 3), "right", "bottom"),
    ((6, -3), "left", "top"),
    ((0, -6), "center", "top"),
    ((-6, -3), "right", "top"),
    ((6, 3), "left", "bottom"),
)
_POINT = 5.0  # half of the width that a point keeps free of labels, in points
_ALONG = 60  # places of the front's line, between two of its points, that are kept free


def on_front(cost: Sequence[float], gain: Sequence[float]) -> list[bool]:
    """Return for each point whether no other costs at most as much and gains at least as much.

    Equal points are all on the front.
    """
    return [
        not any(
            (c <= cost[i] and g >= gain[i]) and (c < cost[i] or g > gain[i])
            for c, g in zip(cost, gain, strict=True)
        )
        for i in range(len(cost))
    ]


def pareto(lines: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """Draw score against bytes read by a decode step, the front marked.

    Returns:
        The figure and its data, or None for fewer than three points.
    """
    data = _priced(lines, COSTS[:1])
    if len(data) < 3:
        return None
    figure, axes = new_figure(7.6, 4.4)
    front = _draw(axes, data, COSTS[0])
    _finish(figure, [axes], [data[front]], COSTS[:1])
    return figure, table(data.assign(on_front=front), COSTS[0], "score", "on_front")


def pareto_pair(lines: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """Draw score against bytes and against the time of a decode step, the fronts marked.

    Returns:
        The figure and its data, or None where ``tables.LEAGUE`` methods or fewer have both.
    """
    data = _priced(lines, COSTS)
    if data["method"].nunique() <= LEAGUE:
        return None
    figure = Figure(figsize=(12.0, 4.8))
    axes = list(figure.subplots(1, 2, sharey=True))
    fronts = [_draw(one, data, cost) for one, cost in zip(axes, COSTS, strict=True)]
    axes[1].set_ylabel("")
    _finish(figure, axes, [data[front] for front in fronts], COSTS)
    marked = data.assign(on_front_of_bytes=fronts[0], on_front_of_time=fronts[1])
    return figure, table(marked, *COSTS, "score", "on_front_of_bytes", "on_front_of_time")


def _priced(lines: pd.DataFrame, costs: Sequence[str]) -> pd.DataFrame:
    known = lines["score"].notna()
    for cost in costs:
        known &= lines[cost].fillna(0) > 0
    return lines[known]


def _draw(axes: Axes, data: pd.DataFrame, cost: str) -> pd.Series:
    """Draw one cost's points, each method's joined by budget; return which are on the front."""
    price = data[cost] / METRICS[cost].divisor
    # The oracles that read every key to choose are bounds, not candidates.
    rivals = data[~data["method"].isin(YARDSTICKS) | (data["method"] == "full")]
    marks = on_front(list(price[rivals.index]), list(rivals["score"]))
    front = pd.Series(marks, index=rivals.index).reindex(data.index, fill_value=False)
    ordered = data[front].assign(price=price[front]).sort_values(["price", "score"])
    axes.plot(
        ordered["price"], ordered["score"], color="#333333", lw=1.2, zorder=2, label="Pareto front"
    )
    for method in sorted(data["method"].unique(), key=style.order):
        look = style.style(method)
        own = data[data["method"] == method]
        for _, curve in own.groupby(["label", "rbit"], dropna=False, sort=False):
            by_budget = curve.sort_values("k")
            axes.plot(
                price[by_budget.index],
                by_budget["score"],
                color=look.colour,
                linestyle=look.line,
                lw=0.9,
                alpha=0.45,
                zorder=1,
            )
        for on, size, alpha in ((False, 30, 0.55), (True, 58, 1.0)):
            mine = own[front[own.index] == on]
            axes.scatter(
                price[mine.index],
                mine["score"],
                s=size,
                marker=look.marker,
                color=look.colour,
                alpha=alpha,
                edgecolors="white" if on else "none",
                linewidths=0.6,
                zorder=4 if on else 3,
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
    _cost_axis(axes, price)
    whole_axis(axes, float(data["score"].min()), 100.0, room=0.06)
    axes.set_xlabel(METRICS[cost].axis)
    axes.set_ylabel(METRICS["score"].axis)
    return front


def _cost_axis(axes: Axes, price: pd.Series) -> None:
    """Put ticks at powers of two, or of its roots where these would be few."""
    axes.set_xscale("log", base=2)
    low, high = math.log2(float(price.min())), math.log2(float(price.max()))
    step = next((one for one in (2.0, 1.0, 0.5, 0.25) if (high - low) / one >= 3), 0.25)
    places = np.arange(math.floor(low / step), math.ceil(high / step) + 1) * step
    axes.xaxis.set_major_locator(FixedLocator(list(2.0**places)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    room = 0.06 * (high - low) + 0.03
    axes.set_xlim(2.0 ** (low - room), 2.0 ** (high + room))


def _finish(
    figure: Figure, axes: Sequence[Axes], fronts: Sequence[pd.DataFrame], costs: Sequence[str]
) -> None:
    """Add the legend, lay out, and label the points of each front where there is room."""
    legend(figure, axes[0])
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # where labels have room is known once all has its place
    for one, front, cost in zip(axes, fronts, costs, strict=True):
        _label_front(one, front, cost, renderer)


def _label_front(axes: Axes, front: pd.DataFrame, cost: str, renderer: RendererAgg) -> None:
    """Write the settings beside points of the front, wherever they touch no point and no label."""
    names = [name for name in ("k", "rbit") if front[name].nunique() > 1]
    pixels = axes.figure.dpi / 72

    def around(x: float, y: float, room: float) -> Bbox:
        return Bbox([[x - room, y - room], [x + room, y + room]])

    taken = [
        around(x, y, _POINT * pixels)
        for collection in axes.collections
        for x, y in axes.transData.transform(collection.get_offsets())
    ]
    joined = axes.transData.transform(axes.lines[0].get_xydata())
    for first, second in itertools.pairwise(joined):
        taken += [around(x, y, pixels) for x, y in np.linspace(first, second, _ALONG)]
    inside = axes.get_window_extent(renderer)
    for _, line in front.iterrows():
        words = [f"{name}={line[name]}" for name in names if not pd.isna(line[name])]
        for shift, across, along in _PLACES if words else ():
            label = axes.annotate(
                ", ".join(words),
                (line[cost] / METRICS[cost].divisor, line["score"]),
                xytext=shift,
                textcoords="offset points",
                ha=across,
                va=along,
                fontsize=6.5,
                color="#333333",
            )
            label.set_in_layout(False)
            box = label.get_window_extent(renderer)
            free = inside.x0 <= box.x0 and box.x1 <= inside.x1
            if free and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()
