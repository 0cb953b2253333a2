"""Figures with one bar or one row of cells per line."""

from __future__ import annotations

import textwrap
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from topkbench.analysis import style
from topkbench.analysis.curves import legend, new_figure, table
from topkbench.analysis.metrics import METRICS, STAGES
from topkbench.analysis.stats import quotient
from topkbench.analysis.timings import NO_INTERVAL, UNSTEADY

_MOST_LINES = 24
_MOST_GRIDS = 4
_WIDEST_NAME = 48  # characters; a wider one leaves no room for the bars
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
        if not pd.isna(line["batch_size"]) and lines["batch_size"].nunique() > 1:
            words.append(f"batch {line['batch_size']}")
        names.append(textwrap.fill(", ".join(words), _WIDEST_NAME))
    return names


def _fewer(lines: pd.DataFrame) -> pd.DataFrame:
    """Keep what fits one figure: if there are too many lines, those of the largest budget."""
    if lines["line"].nunique() <= _MOST_LINES:
        return lines
    largest = lines["k"].max()
    return lines[lines["k"].isna() | (lines["k"] == largest)]


def stages(lines: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """Draw one stacked bar per line: the stages of a decode step and what is left of it.

    Full attention is a mark beside each, where it was timed in turn with it, and no bar: its own
    cell's times are of another moment.
    """
    data = lines[lines[list(STAGES)].notna().any(axis=1)]
    is_full = data["method"] == "full"
    if data.loc[~is_full, "full_ms_p50"].notna().any():
        data = data[~is_full]
    data = _fewer(data)
    if len(data) < 2 or ablation(lines) is not None:
        return None
    marked = data["timing_note"].notna()
    names = [
        f"{one}{UNSTEADY}" if no else one for one, no in zip(_names(data), marked, strict=True)
    ]
    figure, axes, shown = _stacked(data, names)
    look = style.style("full")
    axes.plot(
        data["full_ms_p50"],
        range(len(data)),
        ls="none",
        marker="|",
        ms=9,
        mew=1.6,
        color=look.colour,
        label=f"{look.label},\ntimed in turn",
    )
    figure.legends.clear()
    legend(figure, axes)
    return figure, shown


def ablation(lines: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """Draw what each fast operator adds, from torch alone, as one stacked bar a step.

    That is for lines of one method that differ in their kernels alone, each step with those of the
    step before and more.
    """
    data = lines[lines[list(STAGES)].notna().any(axis=1) & lines["impl"].notna()]
    if len(data) < 3 or data["method"].nunique() > 1:
        return None
    data = data.assign(slow=data["impl"].map(_slow))
    data = data.sort_values("slow", key=lambda sets: -sets.map(len), kind="stable")
    steps = list(zip(data["slow"], data["slow"].iloc[1:], strict=False))
    if not all(one > two for one, two in steps):
        return None
    rest = _words(frozenset(_OPERATORS) - data["slow"].iloc[0])
    names = [f"simple: all but {' and '.join(rest)} in torch" if rest else "simple: all in torch"]
    names += ["+ " + " and ".join(_words(one - two)) for one, two in steps]
    figure, axes, shown = _stacked(data, names)
    first = data.iloc[0]
    # Stages are timed apart, so together they may be longer than the step.
    ends = data[list(STAGES)].sum(axis=1).clip(lower=data["decode_ms_p50"])
    for place, (end, (_, line)) in enumerate(zip(ends, data.iterrows(), strict=True)):
        text = f" {METRICS['decode_ms_p50'].text(line['decode_ms_p50'])} ms"
        axes.text(end, place, text + _faster(line, first), va="center", fontsize=8)
    axes.set_xlim(right=1.5 * ends.max())
    return figure, shown.assign(step=names, impl=list(data["impl"]))


def _faster(line: pd.Series, first: pd.Series) -> str:
    """Return how much faster than the first a step is, by both speed-ups over full attention.

    The steps' milliseconds were taken at different moments, and are not divided.
    """
    both = (line, first)
    mark = "" if all(pd.isna(one["timing_note"]) for one in both) else UNSTEADY
    if line.name == first.name or pd.isna(line["speedup_vs_full"] / first["speedup_vs_full"]):
        return mark
    names = ("speedup_vs_full", "speedup_ci_low", "speedup_ci_high")
    ratio, low, high = quotient(*([float(one[name]) for name in names] for one in both))
    interval = NO_INTERVAL if pd.isna(low) else f" [{low:.1f}, {high:.1f}]"
    return f", {ratio:.1f}×{interval}{mark}"


def _slow(impl: str) -> frozenset[str]:
    """Return the operators that ran in torch: of ``reference`` all of them.

    ``cpu, reference: hash_encode topk_select`` names those that differ from most.
    """
    most, _, rest = impl.partition(", ")
    other, _, named = rest.partition(": ")
    others = frozenset(named.split())
    if most == "reference":
        return frozenset(_OPERATORS) - others
    return others if other == "reference" else frozenset()


def _words(operators: frozenset[str]) -> list[str]:
    """Return what operators do, in the order of a step, each word once."""
    return list(dict.fromkeys(_OPERATORS[name] for name in _OPERATORS if name in operators))


def _stacked(data: pd.DataFrame, names: list[str]) -> tuple[Figure, Axes, pd.DataFrame]:
    """Draw the stages of each line as a stacked bar, and what is left of the step."""
    columns = list(STAGES)
    parts = data[columns].fillna(0.0)
    rest = (data["decode_ms_p50"] - parts.sum(axis=1)).clip(lower=0).fillna(0.0)
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
    return (
        figure,
        axes,
        table(data.assign(rest_ms=rest), *columns, "rest_ms", "decode_ms_p50", "decode_vs_full"),
    )


def heat_table(lines: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """Draw scores as a table of cells, lines by sub-tasks, coloured on one scale 0 to 100."""
    data = _fewer(lines[lines["score"].notna()])
    if data["subtask"].nunique() < 2 or data["line"].nunique() < 2:
        return None
    first = data.drop_duplicates("line")
    subtasks = list(dict.fromkeys(data["subtask"]))
    grid = data.pivot(index="line", columns="subtask", values="score").loc[first["line"], subtasks]
    figure, axes = new_figure(2.6 + 0.82 * len(subtasks), 1.1 + 0.27 * len(first))
    image = _cells(axes, grid)
    axes.set_xticks(range(len(subtasks)), [name.replace("_", "\n", 1) for name in subtasks])
    axes.set_yticks(range(len(first)), _names(first))
    _scale(figure, image, axes)
    return figure, table(data, "score")


def needle_heatmap(lines: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """Draw the score over context length and needle depth, one grid a line.

    The sub-tasks of ``task=needle`` are called ``LENGTH x DEPTH%``.
    """
    place = lines["subtask"].str.extract(r"^(\d+) x (\d+)%$").astype("Float64")
    data = lines.assign(tokens=place[0], depth=place[1])
    data = _fewer(data[data["depth"].notna() & data["score"].notna()])
    if data["depth"].nunique() < 2 or data["tokens"].nunique() < 2:
        return None
    first = data.drop_duplicates("line").head(_MOST_GRIDS)
    figure = Figure(figsize=(1.4 + 2.5 * len(first), 3.2))
    every = list(figure.subplots(1, len(first), sharey=True, squeeze=False)[0])
    for axes, line, name in zip(every, first["line"], _names(first), strict=True):
        own = data[data["line"] == line]
        grid = own.pivot(index="depth", columns="tokens", values="score").sort_index()
        image = _cells(axes, grid)
        axes.set_xticks(range(len(grid.columns)), [f"{one / 1024:g}K" for one in grid.columns])
        axes.set_yticks(range(len(grid.index)), [f"{one:.0f}%" for one in grid.index])
        axes.set_xlabel(f"Context length (tokens)\n{name}")
    every[0].set_ylabel("Depth of the needle")
    _scale(figure, image, every[-1])
    return figure, table(data[data["line"].isin(first["line"])], "tokens", "depth", "score")


def _cells(axes: Axes, grid: pd.DataFrame) -> Any:
    """Draw scores as coloured cells with their numbers; return the picture."""
    image = axes.imshow(grid.to_numpy(float), cmap=_BLUES, vmin=0, vmax=100, aspect="auto")
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for i, values in enumerate(grid.to_numpy(float)):
        for j, value in enumerate(values):
            if value == value:  # what this line does not have stays white
                colour = "white" if value > 62 else "#222222"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, size=8)
    return image


def _scale(figure: Figure, image: Any, axes: Axes) -> None:
    """Put the scale of the cells' colours beside them."""
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label(METRICS["score"].axis)
    bar.outline.set_visible(False)
