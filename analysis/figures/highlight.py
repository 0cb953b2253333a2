"""Highlight a few of many methods: lines in more colours than these cannot be told apart.

The other methods are grey and named at the ends of their lines. Small multiples would need a panel
for each method, and differences between methods are what these figures are for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from topkbench.analysis import style
from topkbench.analysis.comparison.configurations import BASELINES
from topkbench.analysis.comparison.metrics import METRICS
from topkbench.analysis.figures.names import MOST_METHOD, short_names
from topkbench.analysis.figures.points import describe

MOST = 6
"""Up to as many methods, all are highlighted."""
REFERENCES = ("full", "exact")
"""Highlighted in any case, unless methods are chosen."""
BEST = MOST - len(REFERENCES)

_SIZE = 8  # of the names at lines' ends, in points
_LINE = 10.0  # distance between two of them, in points
NAME_COLOUR = "#777777"
"""Colour of the names of methods that are not highlighted."""


def highlighted(
    data: pd.DataFrame, metric: str, x: str, methods: Sequence[str] | None = None
) -> frozenset[str]:
    """Return the methods of a figure that are highlighted.

    Args:
        data: The figure's configurations.
        metric: The column that the figure shows, by whose mean over ``x`` methods are ranked. At
            each value of ``x`` a method's best configuration counts.
        x: The column on the horizontal axis.
        methods: The methods chosen; None, or if the figure has none of them, for the default: all
            methods up to ``MOST``, else the ``REFERENCES`` and the ``BEST`` others.
    """
    every = frozenset(data["method"].astype(str))
    chosen = every & frozenset(methods or ())
    if chosen or len(every) <= MOST:
        return chosen or every
    rivals = data[~data["method"].isin(BASELINES) & data[metric].notna()]
    is_higher = METRICS[metric].better == "higher"
    points = rivals.groupby(["method", x], dropna=False)[metric].agg("max" if is_higher else "min")
    means = points.groupby("method").mean().sort_values(ascending=not is_higher, kind="stable")
    return frozenset(map(str, means.index[:BEST])) | (every & frozenset(REFERENCES))


def marked(data: pd.DataFrame, chosen: Collection[str]) -> pd.DataFrame:
    """Return a figure's data with the column ``highlighted``, if a method is not."""
    are = data["method"].isin(list(chosen))
    return data if are.all() else data.assign(highlighted=are)


def words(data: pd.DataFrame) -> str:
    """Return which methods a figure highlights for its caption, with a leading space; else ""."""
    if "highlighted" not in data:
        return ""
    methods = sorted(set(data.loc[data["highlighted"], "method"]), key=style.order)
    names = ", ".join(style.style(str(one)).label for one in methods)
    return f" Highlighted: {names}. The others are grey, and their intervals are in the data."


def draw_line(
    axes: Axes,
    x: Any,
    y: Any,
    ends: Any,
    *,
    look: style.Style,
    label: str,
    rows: pd.DataFrame,
    shows: Sequence[str],
    in_grey: bool = False,
    **looks: Any,
) -> None:
    """Draw a curve with its intervals; in grey, without them, where it is not highlighted.

    Args:
        axes: The axes.
        x: Horizontal positions, [points].
        y: Values, [points].
        ends: Distances to the ends of the intervals, [2, points], or None.
        look: How the curve's method is drawn, as far as ``looks`` say nothing else.
        label: The curve's name, which the SVG file has as its group's id.
        rows: The configurations behind the points.
        shows: The columns whose values a report says at a point.
        in_grey: Whether the curve is not highlighted.
        looks: Further arguments of matplotlib's ``errorbar``.
    """
    panel = axes.figure.axes.index(axes)
    identity = re.sub(r"\W+", "_", f"{label} {panel}" if panel else label)
    if in_grey:
        (line,) = axes.plot(x, y, color=style.OTHERS, lw=1.0, zorder=1.6)
    else:
        usual = {"color": look.colour, "marker": look.marker, "linestyle": look.line}
        drawn = {**usual, "elinewidth": 0.9, "capsize": 1.8, **looks}
        line = axes.errorbar(x, y, yerr=ends, label=label, **drawn).lines[0]
    line.set_gid(identity)
    describe(line, rows, *shows)


def name_ends(axes: Axes, ends: Sequence[tuple[float, float, str]]) -> None:
    """Name grey curves on the right of the axes, each at its end as far as names do not touch.

    Args:
        axes: The axes, with their final limits.
        ends: (x, y, name) of each curve's last point.
    """
    if not ends:
        return
    height = axes.figure.bbox.height / axes.figure.dpi * 72 * 0.8  # of the axes, roughly
    apart = _LINE / height
    to_axes = axes.transData + axes.transAxes.inverted()
    found = sorted((float(to_axes.transform((x, y))[1]), x, y, name) for x, y, name in ends)
    names = short_names([name for *_, name in ends], MOST_METHOD)
    places: list[float] = []
    for wanted, *_ in found:
        places.append(max(wanted, places[-1] + apart) if places else wanted)
    highest = 1.0
    for place in reversed(range(len(places))):
        places[place] = min(places[place], highest)
        highest = places[place] - apart
    for at, (wanted, x, _, name) in zip(places, found, strict=True):
        start = float(to_axes.transform((x, axes.get_ylim()[0]))[0])
        # A plain line: an arrow takes many times as long to draw.
        line: dict[str, Any] = {
            "color": style.OTHERS,
            "lw": 0.5,
            "clip_on": False,
            "transform": axes.transAxes,
        }
        axes.plot((start, 1.02), (wanted, at), **line)
        look: dict[str, Any] = {
            "va": "center",
            "fontsize": _SIZE,
            "color": NAME_COLOUR,
        }
        axes.text(1.03, at, names[name], transform=axes.transAxes, **look)
