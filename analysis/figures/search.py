"""The outcome of a search: its best trials, or the Pareto front over its two objectives.

What a sweep's ``search.json`` says: ``objectives``, one or two columns; ``trials``, how many were
asked for; ``knobs``, the values of each setting that was searched, in words; ``ended``, for each
trial that has ended its number (``trial``), its cell (``run_id``) and its settings (``knobs``).
What came out of a trial is in the rows of its cell alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from topkbench.analysis import style
from topkbench.analysis.comparison.counts import measured_on
from topkbench.analysis.comparison.metrics import METRICS, ends_of
from topkbench.analysis.comparison.stats import MEAN
from topkbench.analysis.figures.curves import legend, new_figure, vertical_scale
from topkbench.analysis.figures.names import short_methods
from topkbench.analysis.figures.pareto import cost_axis, front_of
from topkbench.analysis.figures.plots import Drawn, save
from topkbench.analysis.figures.points import describe_places
from topkbench.analysis.record.row import Status
from topkbench.analysis.record.store import Sweep
from topkbench.analysis.tables.table import Table, with_interval

BEST = 5
"""Configurations that are shown of a search with one objective."""

_ALSO = ("score", "bytes_read_per_step")  # shown whatever the objectives are
_BY_CHANCE = (
    "The best of many trials is better than it will be again, as it was chosen by the same samples:"
    " measure it on others, such as those of another seed."
)


@dataclass(frozen=True)
class Outcome:
    """What came out of a search.

    Attributes:
        objectives: One or two columns.
        wanted: How many trials were asked for.
        knobs: The values of each setting that was searched, in words.
        configurations: One row per configuration, best first by the first objective: ``trials``
            (the numbers of its trials, as text), a column for each knob, the columns of its row,
            and ``best``: whether it is on the Pareto front, or has the best value of the one
            objective. A configuration that failed has no values.
    """

    objectives: list[str]
    wanted: int
    knobs: dict[str, str]
    configurations: pd.DataFrame

    @property
    def num_trials(self) -> int:
        """The number of trials that have ended."""
        return sum(len(one.split(", ")) for one in self.configurations["trials"])

    @property
    def best(self) -> pd.DataFrame:
        """The Pareto front, or the ``BEST`` configurations by one objective; best first."""
        measured = self.configurations[self.configurations[self.objectives].notna().all(axis=1)]
        if len(self.objectives) == 1:
            return measured.head(BEST)
        return measured[measured["best"]]

    @property
    def columns(self) -> list[str]:
        """The objectives, and the columns that are shown in any case."""
        shown = [one for one in _ALSO if self.configurations[one].notna().any()]
        return list(dict.fromkeys([*self.objectives, *shown]))


def outcome(sweep: Sweep, rows: pd.DataFrame) -> Outcome | None:
    """Return what came out of a sweep that is a search; None if it is none.

    Args:
        sweep: The sweep.
        rows: Its rows.
    """
    found = sweep.search()
    if found is None or not found["ended"]:
        return None
    objectives, knobs = list(found["objectives"]), dict(found["knobs"])
    trials = pd.DataFrame([{**one, **one["knobs"]} for one in found["ended"]])
    grouped = trials.groupby("run_id", sort=False)["trial"]
    numbers = grouped.agg(lambda own: ", ".join(map(str, own)))
    first = trials.drop_duplicates("run_id").set_index("run_id")
    means = rows[(rows["subtask"] == MEAN) & rows["status"].eq(Status.OK.value)]
    own = means.drop(columns=set(means.columns) & set(knobs)).set_index("run_id")
    data = first[list(knobs)].join(own).assign(trials=numbers)
    data["best"] = False
    measured = data[data[objectives].notna().all(axis=1)]
    is_higher = METRICS[objectives[0]].better == "higher"
    gains = measured[objectives[0]].astype(float) * (1 if is_higher else -1)
    if len(measured) and len(objectives) == 1:
        data.loc[measured.index, "best"] = gains.eq(gains.max())
    elif len(measured):
        data.loc[measured.index, "best"] = front_of(measured, objectives[1], objectives[0])
    order = gains.sort_values(ascending=False, kind="stable").index
    data = pd.concat([data.loc[order], data.drop(order)]).reset_index(names="run_id")
    return Outcome(objectives, int(found["trials"]), knobs, data)


def words(found: Outcome) -> str:
    """Return in a sentence what was searched, and for what."""
    knobs = "; ".join(f"{name}: {values}" for name, values in found.knobs.items())
    goals = " and ".join(
        f"{METRICS[name].label} ({METRICS[name].better} is better)" for name in found.objectives
    )
    number = len(found.configurations)
    without = int(found.configurations[found.objectives].isna().any(axis=1).sum())
    failed = f", {without} of them without a result" if without else ""
    return (
        f"{found.num_trials} of {found.wanted} trials, {number} configurations{failed}. Searched:"
        f" {knobs}. Objectives: {goals}."
    )


def best_table(found: Outcome) -> Table:
    """Return the best configurations: their trials, settings, scores with intervals, and bytes."""
    data = found.best
    columns = [("Trial", [str(one) for one in data["trials"]])]
    columns += [(name, [str(one) for one in data[name]]) for name in found.knobs]
    for name in found.columns:
        columns.append((METRICS[name].axis, with_interval(data, name)))
    rows = [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]
    notes = [_measured_on(data, found.columns), _BY_CHANCE]
    return Table([head for head, _ in columns], rows, notes=[*filter(None, notes)])


def _measured_on(data: pd.DataFrame, columns: Sequence[str]) -> str:
    return measured_on(data.assign(n=data["num_samples"])[[*columns, "n", "judged_prompts"]])


def title_of(found: Outcome) -> str:
    """Return what `best_table` has."""
    return "Pareto front" if len(found.objectives) == 2 else "Best trials"


def text(found: Outcome) -> str:
    """Return the outcome for a terminal."""
    return f"Search: {words(found)}\n\n{title_of(found)}:\n\n{best_table(found).text()}"


def values(found: Outcome) -> pd.DataFrame:
    """Return the best configurations as plain values: trials, settings, and the columns shown."""
    return found.best[["trials", *found.knobs, *found.columns]].reset_index(drop=True)


def draw(found: Outcome, folder: Path, suffix: str = "") -> Drawn | None:
    """Draw all trials, and the front or the best so far; None if none has a result.

    Args:
        found: The search's outcome.
        folder: Folder of the files.
        suffix: Suffix of the files' names.
    """
    known = found.configurations[found.objectives].notna().all(axis=1)
    data = found.configurations[known]
    if not len(data):
        return None
    draw_them = _front if len(found.objectives) == 2 else _history
    with matplotlib.rc_context(cast(Any, style.RC_PARAMS)), short_methods():
        figure, shown, reading = draw_them(found, data)
        title = "Trials of the search"
        figure.axes[0].set_title(title)
        count = _measured_on(data, found.objectives)
        drawn = Drawn(f"search{suffix}", title, " ".join(filter(None, (reading, count))), folder)
        return save(figure, shown, drawn)


def _front(found: Outcome, data: pd.DataFrame) -> tuple[Figure, pd.DataFrame, str]:
    """Draw the first objective against the second, with the front."""
    y, x = found.objectives
    figure, axes = new_figure()
    price = data[x].astype(float) / METRICS[x].divisor
    height = data[y].astype(float) / METRICS[y].divisor
    if METRICS[x].scale == "log" and (price > 0).all():
        cost_axis(axes, price)
    if METRICS[y].scale == "symlog" or (height > 0).all():
        vertical_scale(axes, METRICS[y].scale)
    front = data[data["best"]].index
    front = price[front].sort_values(kind="stable").index
    label = {"color": "#333333", "lw": 1.2, "zorder": 2, "label": "Pareto front"}
    axes.plot(price[front], height[front], **cast(Any, label))
    _bars(axes, data.loc[front], price, y)
    _points(found, axes, data, price, height)
    for index in front:
        axes.annotate(
            f"{data.loc[index, 'trials']}",
            (price[index], height[index]),
            xytext=(6, -9),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set_xlabel(METRICS[x].axis)
    axes.set_ylabel(METRICS[y].axis)
    legend(figure, axes)
    reading = (
        "The Pareto front, joined, has only what intervals tell apart, and trials that they do not"
        " tell apart in either objective; it has its trials' numbers and intervals; dominated"
        " trials are faint, and their intervals are in the report's rows."
        f"{_bars_words(data, y)}"
    )
    return figure, _shown(found, data), reading


def _history(found: Outcome, data: pd.DataFrame) -> tuple[Figure, pd.DataFrame, str]:
    """Draw the one objective against the trial's number, with the best so far."""
    (y,) = found.objectives
    figure, axes = new_figure()
    first = data["trials"].str.split(", ").str[0].astype(int)
    height = data[y].astype(float) / METRICS[y].divisor
    in_order = height[first.sort_values().index]
    so_far = in_order.cummax() if METRICS[y].better == "higher" else in_order.cummin()
    axes.plot(
        first[in_order.index],
        so_far,
        drawstyle="steps-post",
        color="#333333",
        lw=1.2,
        zorder=2,
        label="Best so far",
    )
    if METRICS[y].scale == "symlog" or (height > 0).all():
        vertical_scale(axes, METRICS[y].scale)
    _bars(axes, data[data["best"]], first, y)
    _points(found, axes, data, first, height)
    axes.set_xlabel("Trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(METRICS[y].axis)
    legend(figure, axes)
    reading = (
        "The line is the best so far; trials that are not the best are faint."
        f"{_bars_words(data, y)}"
    )
    return figure, _shown(found, data), reading


def _points(found: Outcome, axes: Axes, data: pd.DataFrame, x: pd.Series, y: pd.Series) -> None:
    """Draw the configurations, those that are best larger, and say what is behind each."""
    describe_places(axes, list(x), list(y), [_said(found, one) for _, one in data.iterrows()])
    for method in sorted(data["method"].unique(), key=style.order):
        look = style.style(method)
        for is_best, size, alpha in ((False, 30, 0.5), (True, 58, 1.0)):
            own = data.index[(data["method"] == method) & (data["best"] == is_best)]
            axes.scatter(
                x[own],
                y[own],
                s=size,
                marker=look.marker,
                color=look.colour,
                alpha=alpha,
                edgecolors="white" if is_best else "none",
                linewidths=0.6,
                zorder=4 if is_best else 3,
            )
        mark = {"marker": look.marker, "ms": 6.5, "color": look.colour, "linestyle": ""}
        axes.plot([], [], label=look.label, **cast(Any, mark))


def _said(found: Outcome, configuration: pd.Series) -> str:
    """Return a configuration's trials, settings and objectives, one to a line."""
    lines = [style.style(configuration["method"]).label, f"trial {configuration['trials']}"]
    lines += [f"{name} = {configuration[name]}" for name in found.knobs]
    for name in found.objectives:
        metric = METRICS[name]
        lines.append(f"{metric.label}: {metric.text(configuration[name])} {metric.unit}".rstrip())
    return "\n".join(lines)


def _bars(axes: Axes, data: pd.DataFrame, x: pd.Series, name: str) -> None:
    """Draw the 95% intervals of configurations where a column has them."""
    low, high = ends_of(name)
    if low in data:
        divisor = METRICS[name].divisor
        colours = [style.style(method).colour for method in data["method"]]
        ends = data[low].astype(float) / divisor, data[high].astype(float) / divisor
        axes.vlines(x[data.index], *ends, colors=colours, lw=0.8, alpha=0.5, zorder=2.5)


def _bars_words(data: pd.DataFrame, name: str) -> str:
    return " Vertical bars: 95% intervals." if ends_of(name)[0] in data else ""


def _shown(found: Outcome, data: pd.DataFrame) -> pd.DataFrame:
    """Return the figure's data."""
    ends = [end for name in found.objectives for end in ends_of(name)]
    known = [name for name in ends if name in data]
    columns = ["trials", *found.knobs, *found.objectives, *known, "num_samples", "best"]
    return data[columns].reset_index(drop=True)


def sections(sweeps: Sequence[Sweep], rows: pd.DataFrame, folder: Path) -> list[Mapping[str, Any]]:
    """Return what a report shows of the searches among some sweeps; their figures are drawn.

    Args:
        sweeps: The sweeps.
        rows: Their rows.
        folder: Folder of the figures.
    """
    found = [one for sweep in sweeps if (one := outcome(sweep, rows)) is not None]
    shown: list[Mapping[str, Any]] = []
    for place, one in enumerate(found):
        number = f"-{place + 1}" if len(found) > 1 else ""
        drawn = draw(one, folder, number)
        shown.append(
            {
                "slug": f"search{number}",
                "words": words(one),
                "title": title_of(one),
                "table": best_table(one),
                "figures": [] if drawn is None else [drawn],
            }
        )
    return shown
