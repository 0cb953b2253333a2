"""What a report's page needs to know of a figure's SVG file: its points, and where its legend is.

A point that is pointed at says its settings and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast
from weakref import WeakKeyDictionary

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from topkbench.analysis.comparison.metrics import METRICS, ends_of
from topkbench.analysis.comparison.stats import MEAN

_TEXTS: WeakKeyDictionary[Artist, list[str]] = WeakKeyDictionary()


LEGEND = "legend"
"""Identifier of a figure's legend in its SVG file."""


@dataclass(frozen=True)
class Box:
    """A rectangle of a figure.

    Attributes:
        x: Distance of its left side from the figure's left edge, in units of the SVG file
            (1/72 inch).
        y: Distance of its upper side from the figure's upper edge.
        width: From its left to its right side.
        height: From its upper to its lower side.
    """

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Point:
    """A point of a figure.

    Attributes:
        x: Distance from the left edge, in units of the SVG file (1/72 inch).
        y: Distance from the upper edge, in the same units.
        text: The settings and numbers behind it, one to a line.
    """

    x: float
    y: float
    text: str


def describe(line: Line2D, configurations: pd.DataFrame, *columns: str) -> None:
    """Say what is behind each point of a line.

    Args:
        line: The line, with a point for each configuration.
        configurations: The configurations, in the order of the points.
        columns: The columns whose values are said after the settings.
    """
    _TEXTS[line] = texts_of(configurations, *columns)


def describe_places(
    axes: Axes, x: Sequence[float], y: Sequence[float], texts: Sequence[str]
) -> None:
    """Say what is behind places of axes that are no points of a line, such as bars and cells."""
    (line,) = axes.plot(x, y, ls="none")
    _TEXTS[line] = list(texts)


def texts_of(configurations: pd.DataFrame, *columns: str) -> list[str]:
    """Return what `describe` says of each configuration."""
    return [_text(one, columns) for _, one in configurations.iterrows()]


def _text(configuration: pd.Series, columns: Sequence[str]) -> str:
    """Return the settings and numbers of a configuration, one to a line."""
    lines = [str(configuration.get("whole_label", configuration["label"]))]
    if configuration["subtask"] not in (MEAN, "", configuration["task"]):
        lines.append(str(configuration["subtask"]))
    settings = [
        f"{word}{int(configuration[name]):,}"
        for name, word in (
            ("k", "k = "),
            ("rbit", "rbit = "),
            ("kv_len", "cached tokens: "),
            ("batch_size", "batch size "),
        )
        if not pd.isna(configuration[name])
    ]
    lines += [", ".join(settings)] if settings else []
    for name in columns:
        if name in ("k", "rbit", "kv_len", "batch_size") or pd.isna(configuration[name]):
            continue
        metric = METRICS[name]
        value = metric.text(configuration[name])
        ends = [configuration.get(end) for end in ends_of(name)]
        if not any(pd.isna(one) for one in ends):
            value += f" [{metric.text(ends[0])}, {metric.text(ends[1])}]"
        lines.append(f"{metric.label}: {value}{f' {metric.unit}' if metric.unit else ''}")
    return "\n".join(lines)


def points_of(figure: Figure) -> list[Point]:
    """Return the described points of a figure that is laid out, where its SVG file has them.

    Those in one place are one point, which says what is behind each.
    """
    _, height = figure.get_size_inches() * 72
    found: dict[tuple[float, float], list[str]] = {}
    for axes in figure.axes:
        for line in axes.lines:
            if line not in _TEXTS:
                continue
            places = line.get_transform().transform(line.get_xydata()) * 72 / figure.dpi
            for (x, y), text in zip(places, _TEXTS[line], strict=True):
                if math.isfinite(x) and math.isfinite(y):
                    place = round(float(x), 1), round(float(height - y), 1)
                    found.setdefault(place, []).append(text)
    return [Point(x, y, "\n\n".join(texts)) for (x, y), texts in found.items()]


def smallest_text(figure: Figure) -> float:
    """Return the size of the smallest letters of a figure, in points."""
    texts = cast(list[Text], figure.findobj(Text))
    return min(float(one.get_fontsize()) for one in texts if one.get_visible() and one.get_text())


def legend_on_the_right(figure: Figure) -> Box | None:
    """Return the place of the legend of a figure that is laid out, if all axes are left of it.

    What is drawn beside the axes, such as names at lines' ends, then is left of it as well.
    """
    if len(figure.legends) != 1:
        return None
    width, height = figure.get_size_inches() * 72
    scale = 72 / figure.dpi
    box = figure.legends[0].get_window_extent()
    if any(one.bbox.x1 > box.x0 for one in figure.axes):
        return None
    left, upper = box.x0 * scale, height - box.y1 * scale
    return Box(
        round(left, 1),
        round(upper, 1),
        round(min(box.width * scale, width - left), 1),
        round(box.height * scale, 1),
    )
