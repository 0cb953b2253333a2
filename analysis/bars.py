"""Figures with one bar or one row of cells per line."""

from __future__ import annotations

import textwrap

import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from topkbench.analysis import style
from topkbench.analysis.curves import legend, new_figure, table
from topkbench.analysis.metrics import METRICS, STAGES

_MOST_LINES = 24
_WIDEST_NAME = 48  # characters; a wider one leaves no room for the bars
_BLUES = LinearSegmentedColormap.from_list("scores", ["#FFFFFF", "#BBD7EC", "#3F8FC4", "#08457E"])


def _names(lines: pd.DataFrame) -> list[str]:
    """Return a name for each line that tells it from the others."""
    names = []
    for _, line in lines.iterrows():
        words = [str(line["label"])]
        words += [f"k={line['k']}"] if not pd.isna(line["k"]) else []
        words += [f"{line['rbit']} bits"] if not pd.isna(line["rbit"]) else []
        if not pd.isna(line["length"]) and lines["length"].nunique() > 1:
            words.append(f"{line['length']:,} tokens")
        names.append(textwrap.fill(", ".join(words), _WIDEST_NAME))
    return names


def _fewer(lines: pd.DataFrame) -> pd.DataFrame:
    """Keep what fits one figure: if there are too many lines, those of the largest budget."""
    if lines["line"].nunique() <= _MOST_LINES:
        return lines
    largest = lines["k"].max()
    return lines[lines["k"].isna() | (lines["k"] == largest)]


def stages(lines: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """Draw one stacked bar per line: the stages of a decode step and what is left of it."""
    columns = list(STAGES)
    data = _fewer(lines[lines[columns].notna().any(axis=1)])
    if len(data) < 2:
        return None
    parts = data[columns].fillna(0.0)
    rest = (data["decode_ms_p50"] - parts.sum(axis=1)).clip(lower=0).fillna(0.0)
    names = _names(data)
    rows_of_text = sum(name.count("\n") + 1 for name in names)
    figure, axes = new_figure(7.2, 1.3 + 0.25 * len(data) + 0.1 * (rows_of_text - len(data)))
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
        axes.barh(places, rest, left=left, height=0.72, color="#DDDDDD", label="Rest of the step")
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("Time within one decode step (ms)")
    legend(figure, axes)
    return figure, table(data.assign(rest_ms=rest), *columns, "rest_ms", "decode_ms_p50")


def heat_table(lines: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """Draw scores as a table of cells, lines by sub-tasks, coloured on one scale 0 to 100."""
    data = _fewer(lines[lines["score"].notna()])
    if data["subtask"].nunique() < 2 or data["line"].nunique() < 2:
        return None
    first = data.drop_duplicates("line")
    subtasks = list(dict.fromkeys(data["subtask"]))
    grid = data.pivot(index="line", columns="subtask", values="score").loc[first["line"], subtasks]
    figure, axes = new_figure(2.6 + 0.82 * len(subtasks), 1.1 + 0.27 * len(first))
    image = axes.imshow(grid.to_numpy(float), cmap=_BLUES, vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(subtasks)), [name.replace("_", "\n", 1) for name in subtasks])
    axes.set_yticks(range(len(first)), _names(first))
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for i, values in enumerate(grid.to_numpy(float)):
        for j, value in enumerate(values):
            if value == value:  # a sub-task that this line does not have stays white
                colour = "white" if value > 62 else "#222222"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, size=8)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label(METRICS["score"].axis)
    bar.outline.set_visible(False)
    return figure, table(data, "score")
