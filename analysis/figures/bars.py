"""Figures with one bar, or one row of cells, per configuration."""

from __future__ import annotations

import textwrap
from collections.abc import Sized
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from topkbench.analysis import style
from topkbench.analysis.comparison.metrics import METRICS, STAGES
from topkbench.analysis.comparison.stats import quotient
from topkbench.analysis.comparison.timings import NO_INTERVAL, UNSTEADY
from topkbench.analysis.figures.curves import legend, new_figure, table
from topkbench.analysis.figures.names import MOST_SUBTASK, short_names
from topkbench.analysis.figures.points import describe_places, texts_of

_MOST_CONFIGURATIONS = 24
_MOST_GRIDS = 4
_WIDEST_NAME = 36  # characters; a longer name leaves no space for the bars
_WIDEST_PANEL = 28  # below a panel
_WIDEST_COLUMN = 14  # below a column of cells
_OPERATORS = {
    "hash_encode": "encode",
    "hamming_score": "score",
    "page_score": "score",
    "lowrank_score": "score",
    "channel_score": "score",
    "code_score": "score",
    "topk_select": "select",
    "sparse_attention": "fused attention",
}


def _names(
    configurations: pd.DataFrame, widest: int = _WIDEST_NAME, commit: str | None = None
) -> list[str]:
    """Return a distinct name for each configuration.

    Args:
        configurations: The configurations.
        widest: Characters of a line.
        commit: The commits at which most bars were measured, as `_commits` says them; a name says
            where its bar's are others.
    """
    names = []
    for _, configuration in configurations.iterrows():
        words = [str(configuration["label"])]
        words += [f"k={configuration['k']}"] if not pd.isna(configuration["k"]) else []
        words += [f"{configuration['rbit']} bits"] if not pd.isna(configuration["rbit"]) else []
        if not pd.isna(configuration["length"]) and configurations["length"].nunique() > 1:
            words.append(f"{configuration['length']:,} tokens")
        if not pd.isna(configuration["batch_size"]) and configurations["batch_size"].nunique() > 1:
            words.append(f"batch {configuration['batch_size']}")
        if commit is not None and (own := _commits(configuration)) != commit:
            words.append(own)
        names.append(textwrap.fill(", ".join(words), widest))
    return names


def _commits(configuration: pd.Series) -> str:
    """Return the commits at which a configuration was measured.

    Bars of other commits are of the same machine, or of another one of its name: rows cannot tell.
    """
    return f"commit {' and '.join(one[:7] for one in configuration['git_commit'].split(', '))}"


def _fewer(configurations: pd.DataFrame) -> pd.DataFrame:
    """Return the configurations, or only those of the largest budget if there are too many."""
    if configurations["configuration_id"].nunique() <= _MOST_CONFIGURATIONS:
        return configurations
    largest = configurations["k"].max()
    return configurations[configurations["k"].isna() | (configurations["k"] == largest)]


def stages(configurations: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """Draw one stacked bar per configuration: the stages of a decode step and the remainder.

    Full attention is a mark at each bar, the time measured alternately with that configuration,
    and has no bar of its own: the times of its own cell were measured at another moment.
    """
    data = configurations[configurations[list(STAGES)].notna().any(axis=1)]
    is_full = data["method"] == "full"
    if data.loc[~is_full, "full_ms_p50"].notna().any():
        data = data[~is_full]
    data = _fewer(data)
    if len(data) < 2 or ablation(configurations) is not None:
        return None
    marked = data["timing_note"].notna()
    commits = data.apply(_commits, axis=1)
    usual = str(commits.mode()[0])
    names = [
        f"{name}{UNSTEADY}" if unsteady else name
        for name, unsteady in zip(_names(data, commit=usual), marked, strict=True)
    ]
    figure, axes, shown = _stacked(data, names)
    if commits.nunique() > 1:
        # On the right, so that it begins under the names of short bars and ends within the axes.
        axes.set_xlabel(f"{axes.get_xlabel()}\n{usual} where none is named", loc="right")
    look = style.style("full")
    axes.plot(
        data["full_ms_p50"],
        range(len(data)),
        ls="none",
        marker="|",
        ms=9,
        mew=1.6,
        color=look.colour,
        label=f"{look.label},\ntimed alternately",
    )
    said = texts_of(data, "decode_ms_p50", *STAGES, "full_ms_p50")
    describe_places(axes, list(data["decode_ms_p50"]), range(len(data)), said)
    figure.legends.clear()
    legend(figure, axes)
    return figure, shown


def ablation(configurations: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """Draw the gain of each fast operator as stacked bars, starting from torch alone.

    Drawn only for configurations of one method that differ in their kernels alone, where each bar
    uses all the fast operators of the bar above it, and more.
    """
    data = configurations[
        configurations[list(STAGES)].notna().any(axis=1) & configurations["impl"].notna()
    ]
    if len(data) < 3 or data["method"].nunique() > 1:
        return None
    data = data.assign(slow=data["impl"].map(_operators_in_torch))
    data = data.sort_values("slow", key=lambda sets: -sets.map(len), kind="stable")
    steps = list(zip(data["slow"], data["slow"].iloc[1:], strict=False))
    if not all(one > two for one, two in steps):
        return None
    rest = _stage_words(frozenset(_OPERATORS) - data["slow"].iloc[0])
    names = [f"simple: all but {' and '.join(rest)} in torch" if rest else "simple: all in torch"]
    names += ["+ " + " and ".join(_stage_words(one - two)) for one, two in steps]
    figure, axes, shown = _stacked(data, names)
    first = data.iloc[0]
    # Stages are timed separately, so that their sum may exceed the step.
    ends = data[list(STAGES)].sum(axis=1).clip(lower=data["decode_ms_p50"])
    for place, (end, (_, configuration)) in enumerate(zip(ends, data.iterrows(), strict=True)):
        text = f" {METRICS['decode_ms_p50'].text(configuration['decode_ms_p50'])} ms"
        axes.text(end, place, text + _gain_text(configuration, first), va="center", fontsize=8)
    axes.set_xlim(right=1.5 * ends.max())
    return figure, shown.assign(step=names, impl=list(data["impl"]))


def _gain_text(configuration: pd.Series, first: pd.Series) -> str:
    """Return how many times faster than the first a step is: the quotient of two speed-ups.

    Both speed-ups are over full attention. Milliseconds are not divided, since the two steps were
    timed at different moments.
    """
    both = (configuration, first)
    mark = "" if all(pd.isna(one["timing_note"]) for one in both) else UNSTEADY
    if configuration.name == first.name or pd.isna(
        configuration["speedup_vs_full"] / first["speedup_vs_full"]
    ):
        return mark
    names = ("speedup_vs_full", "speedup_ci_low", "speedup_ci_high")
    ratio, low, high = quotient(*([float(one[name]) for name in names] for one in both))
    interval = NO_INTERVAL if pd.isna(low) else f" [{low:.1f}, {high:.1f}]"
    return f", {ratio:.1f}×{interval}{mark}"


def _operators_in_torch(impl: str) -> frozenset[str]:
    """Return the operators that ran in torch; all of them for ``reference``.

    ``cpu, reference: hash_encode topk_select`` means cpu for all but the two operators named.
    """
    most, _, rest = impl.partition(", ")
    other, _, named = rest.partition(": ")
    others = frozenset(named.split())
    if most == "reference":
        return frozenset(_OPERATORS) - others
    return others if other == "reference" else frozenset()


def _stage_words(operators: frozenset[str]) -> list[str]:
    """Return the stages that operators belong to, in the order of a step, without repeats."""
    return list(dict.fromkeys(_OPERATORS[name] for name in _OPERATORS if name in operators))


def _stacked(data: pd.DataFrame, names: list[str]) -> tuple[Figure, Axes, pd.DataFrame]:
    """Draw a stacked bar per configuration: its stages, then the remainder of the step."""
    columns = list(STAGES)
    parts = data[columns].fillna(0.0)
    rest = (data["decode_ms_p50"] - parts.sum(axis=1)).clip(lower=0).fillna(0.0)
    most = max(name.count("\n") for name in names)  # bars are equally far apart
    figure, axes = new_figure(7.2, 1.3 + (0.25 + 0.1 * most) * len(data))
    places = range(len(data))
    left = pd.Series(0.0, index=data.index)
    for name in columns:
        if parts[name].sum() > 0:
            axes.barh(
                places,
                parts[name],
                left=left,
                height=0.72,
                color=style.STAGE_COLOURS[name],
                label=METRICS[name].label,
            )
            left += parts[name]
    if rest.sum() > 0:
        axes.barh(
            places,
            rest,
            left=left,
            height=0.72,
            color=style.STAGE_COLOURS["rest_ms"],
            label="Rest of the step",
        )
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("Time within one decode step (ms)")
    legend(figure, axes)
    return (
        figure,
        axes,
        table(data.assign(rest_ms=rest), *columns, "rest_ms", "decode_ms_p50", "decode_vs_full"),
    )


def heat_table(configurations: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """Draw scores as a heat map, configurations by sub-tasks, coloured on one scale 0 to 100."""
    data = _fewer(configurations[configurations["score"].notna()])
    if data["subtask"].nunique() < 2 or data["configuration_id"].nunique() < 2:
        return None
    first = data.drop_duplicates("configuration_id")
    subtasks = list(dict.fromkeys(data["subtask"]))
    grid = data.pivot(index="configuration_id", columns="subtask", values="score").loc[
        first["configuration_id"], subtasks
    ]
    names = _names(first)
    lines = [line for name in names for line in name.split("\n")]
    width = max(2.6, 1.4 + 0.07 * max(map(len, lines))) + 0.82 * len(subtasks)
    most = max(name.count("\n") for name in names)  # rows are equally high
    height = 1.1 + (0.27 + 0.13 * most) * len(first)
    figure, axes = new_figure(width, height)
    cells = _cells(axes, grid)
    short = short_names(subtasks, MOST_SUBTASK)
    axes.set_xticks(_middles(subtasks), [_in_lines(short[name]) for name in subtasks])
    axes.set_yticks(_middles(first), names)
    rows = {name: place for place, name in enumerate(first["configuration_id"])}
    across = [subtasks.index(one) + 0.5 for one in data["subtask"]]
    down = [rows[one] + 0.5 for one in data["configuration_id"]]
    describe_places(axes, across, down, texts_of(data, "score", "delta_full"))
    _scale(figure, cells, axes)
    return figure, table(data, "score")


def _in_lines(subtask: str) -> str:
    """Return a sub-task's name as the lines of a narrow column."""
    return textwrap.fill(subtask.replace("_", "\n", 1), _WIDEST_COLUMN, replace_whitespace=False)


def needle_heatmap(configurations: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """Draw the score over context length and needle depth, one grid per configuration.

    The sub-tasks of ``task=needle`` are called ``LENGTH x DEPTH%``.
    """
    place = configurations["subtask"].str.extract(r"^(\d+) x (\d+)%$").astype("Float64")
    data = configurations.assign(tokens=place[0], depth=place[1])
    data = _fewer(data[data["depth"].notna() & data["score"].notna()])
    if data["depth"].nunique() < 2 or data["tokens"].nunique() < 2:
        return None
    first = data.drop_duplicates("configuration_id").head(_MOST_GRIDS)
    figure = Figure(figsize=style.figure_size(1.4 + 2.5 * len(first), 3.2))
    every = list(figure.subplots(1, len(first), sharey=True, squeeze=False)[0])
    for axes, configuration, name in zip(
        every, first["configuration_id"], _names(first, _WIDEST_PANEL), strict=True
    ):
        own = data[data["configuration_id"] == configuration]
        grid = own.pivot(index="depth", columns="tokens", values="score").sort_index()
        cells = _cells(axes, grid)
        axes.set_xticks(_middles(grid.columns), [f"{one / 1024:g}K" for one in grid.columns])
        axes.set_yticks(_middles(grid.index), [f"{one:.0f}%" for one in grid.index])
        axes.set_xlabel(f"Context length (tokens)\n{name}")
        across = [grid.columns.get_loc(one) + 0.5 for one in own["tokens"]]
        down = [grid.index.get_loc(one) + 0.5 for one in own["depth"]]
        describe_places(axes, across, down, texts_of(own, "score", "delta_full"))
    every[0].set_ylabel("Depth of the needle")
    _scale(figure, cells, every[-1])
    return figure, table(
        data[data["configuration_id"].isin(first["configuration_id"])], "tokens", "depth", "score"
    )


def _middles(cells: Sized) -> list[float]:
    """Return where the middles of a row or column of cells are."""
    return [place + 0.5 for place in range(len(cells))]


def _cells(axes: Axes, grid: pd.DataFrame) -> Any:
    """Draw scores as coloured cells with their numbers; return the cells.

    They are shapes, not an image, so that a page in dark mode can draw them in other colours.
    """
    values = grid.to_numpy(float)
    colours = style.scale()
    cells = axes.pcolormesh(
        np.ma.masked_invalid(values),  # a missing score stays white
        cmap=ListedColormap(colours),
        vmin=0,
        vmax=100,
        edgecolor="face",  # else hairlines are seen between cells
        linewidth=0.3,
    )
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for (i, j), value in np.ndenumerate(values):
        if value == value:
            colour = style.cell_ink(colours[min(int(value / 100 * len(colours)), len(colours) - 1)])
            text = METRICS["score"].text(value).removesuffix(".0")
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=colour, size=8)
    return cells


def _scale(figure: Figure, cells: Any, axes: Axes) -> None:
    """Add the colour bar beside the axes."""
    bar = figure.colorbar(cells, ax=axes, fraction=0.04, pad=0.02)
    bar.solids.set_rasterized(False)  # type: ignore[union-attr]
    bar.solids.set_edgecolor("face")  # type: ignore[union-attr]
    bar.set_label(METRICS["score"].axis)
    bar.outline.set_visible(False)
