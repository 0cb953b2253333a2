"""Figures, each saved as PNG and SVG together with a CSV of its data.

A figure is drawn only if its data vary: a curve needs two points, a comparison two configurations.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from topkbench.analysis import style
from topkbench.analysis.comparison.configurations import without_parameters
from topkbench.analysis.comparison.counts import measured_on
from topkbench.analysis.comparison.metrics import CURVES
from topkbench.analysis.comparison.stats import MEAN
from topkbench.analysis.comparison.timings import figure_words
from topkbench.analysis.figures.bars import ablation, heat_table, needle_heatmap, stages
from topkbench.analysis.figures.break_even import MODELS, ModelSize, break_even, step_bound
from topkbench.analysis.figures.by_layer import recall_by_layer
from topkbench.analysis.figures.curves import context_curve, curve, lay_out
from topkbench.analysis.figures.highlight import words as highlight_words
from topkbench.analysis.figures.names import short_methods, short_names
from topkbench.analysis.figures.pareto import (
    COSTS,
    FRONT_WORDS,
    OVERLAP_WORDS,
    bars_words,
    pareto,
    pareto_pair,
)
from topkbench.analysis.figures.points import (
    LEGEND,
    Box,
    Point,
    legend_on_the_right,
    points_of,
    smallest_text,
)
from topkbench.analysis.figures.training import loss_curve
from topkbench.analysis.figures.variants import arms, is_ladder, ladder
from topkbench.analysis.record.csv_file import csv_bytes
from topkbench.analysis.record.files import write_atomic

OVER_LENGTHS = (
    "latency_vs_context",
    "throughput_vs_context",
    "latency_vs_batch",
    "break_even",
    "step_bound",
)
"""Figures over lengths or batch sizes; all others show the longest length and smallest batch."""

RATIOS = ("break_even", "step_bound", "decode_vs_k", "decode_vs_rbit", "score_vs_cost", "ablation")
"""Figures that show decode times relative to full attention, with intervals."""

TIMED = (*OVER_LENGTHS, *RATIOS, "stages")
"""Figures of times, whose captions say which times are unreliable."""


Plan = tuple[str, str, str, Callable[[], tuple[Figure, pd.DataFrame] | None]]
"""A figure's name, its title, how to read it, and what draws it if the data vary."""


@dataclass(frozen=True)
class Drawn:
    """A figure on disk."""

    name: str
    """File name without its suffix."""
    title: str
    """What the figure shows."""
    caption: str
    """How to read the figure, and what it was measured on."""
    folder: Path
    points: tuple[Point, ...] = ()
    """What is behind its points."""
    legend: Box | None = None
    """Where its SVG file has the legend, if that is right of everything else."""
    smallest_text: float = 8.5
    """Size of its smallest letters, in units of its SVG file (1/72 inch)."""

    @property
    def png(self) -> Path:
        """Path of the PNG file."""
        return self.folder / f"{self.name}.png"

    @property
    def svg(self) -> Path:
        """Path of the SVG file."""
        return self.folder / f"{self.name}.svg"

    @property
    def csv(self) -> Path:
        """Path of the CSV file with the figure's data."""
        return self.folder / f"{self.name}.csv"


def draw_all(
    configurations: pd.DataFrame,
    folder: Path,
    context: str,
    suffix: str = "",
    models: Mapping[str, ModelSize] = MODELS,
    samples: pd.DataFrame | None = None,
    only: str | None = None,
    methods: Sequence[str] | None = None,
    write: Callable[[Figure, pd.DataFrame, Drawn], Drawn] | None = None,
) -> list[Drawn]:
    """Draw every figure that the configurations of one setting allow.

    Args:
        configurations: Those of one setting (`Comparison.by_setting`), sub-tasks included.
        folder: Folder of the files.
        context: What was measured: model, task, length, question, machine, commit.
        suffix: Suffix of the files' names, for a report of several settings.
        models: Whole models for which the bound on a decode step is drawn.
        samples: The samples behind the configurations, for the figures that need them.
        only: Name of the only figure to draw; None for all.
        methods: Methods to highlight in figures of curves and points; None for the default of
            `highlight.highlighted`.
        write: Writes a figure and its data, and returns it as drawn; None for `save`.

    Returns:
        The figures drawn, in the order in which they are shown.
    """
    whole = configurations["label"].astype(str)
    configurations = configurations.assign(whole_label=whole, label=whole.map(short_names(whole)))
    with_mean = set(configurations.loc[configurations["subtask"] == MEAN, "configuration_id"])
    top = configurations[
        (configurations["subtask"] == MEAN) | ~configurations["configuration_id"].isin(with_mean)
    ]
    batched = at_one_length(top)
    top = smallest_batch(top)
    # Only figures with length as an axis show all lengths; the others show the longest.
    every_length, lengths = top, sorted(int(one) for one in top["length"].dropna().unique())
    if len(lengths) > 1:
        top = top[top["length"] == lengths[-1]]
    plain = without_parameters(top)
    at = f" At {lengths[-1]:,} tokens." if len(lengths) > 1 else ""
    plans: list[Plan] = [
        *_curves(plain, top, methods),
        (
            "hash_ladder",
            "Quality of the selection against hash bits, by ablation variant",
            "Recall and attention mass are means over layers, KV heads and steps; bars: 95% "
            "intervals, over seeds or, of scores, over samples.",
            lambda: ladder(top),
        ),
        (
            "arms",
            "Quality of the selection, by ablation arm",
            "Each arm changes only the settings that its name lists (dashed: none changed); bars: "
            "95% intervals over seeds.",
            lambda: arms(top),
        ),
        (
            "score_vs_bytes",
            "Score against bytes read",
            f"Up and to the left is better. {FRONT_WORDS} {OVERLAP_WORDS} "
            f"{bars_words(top, COSTS[:1])}",
            lambda: pareto(plain, methods),
        ),
        (
            "score_vs_cost",
            "Score against bytes read, and against the decode step",
            f"Up and to the left is better. {FRONT_WORDS} {OVERLAP_WORDS} "
            f"{bars_words(top, COSTS)} Horizontal bars: 95% intervals of times.",
            lambda: pareto_pair(plain, methods),
        ),
        (
            "stages",
            "Decode step by stage",
            "Medians within one decode step; grey mark: full attention, timed alternately. Compare "
            "each bar with its mark: bars are of different moments, and of different machines or "
            "code where their commits differ.",
            lambda: stages(plain),
        ),
        (
            "ablation",
            "What each fast operator adds",
            "Medians within one decode step; each bar also has the fast operators of the bars "
            "above. ×: times faster than the first bar, the quotient of their speed-ups over full "
            "attention, with 95% intervals; "
            f"{', '.join(dict.fromkeys(top['impl'].dropna().astype(str)))}.",
            lambda: ablation(plain),
        ),
        (
            "latency_vs_context",
            "Decode latency against context length",
            "Median; grey dots, up to a method's marker: its bytes at the machine's measured "
            "memory bandwidth.",
            lambda: context_curve(every_length, "decode_ms_p50", methods=methods),
        ),
        (
            "throughput_vs_context",
            "Decode throughput against context length",
            "Median of the whole model's step; bars: 20th to 80th percentile. Higher is better.",
            lambda: context_curve(every_length, "tokens_per_s", methods=methods),
        ),
        (
            "latency_vs_batch",
            "Decode latency against batch size",
            "Median; grey dots, up to a method's marker: its bytes at the machine's measured "
            "memory bandwidth."
            + (f" At {int(batched['length'].iloc[0]):,} tokens." if len(batched) else ""),
            lambda: context_curve(batched, "decode_ms_p50", "batch_size", methods),
        ),
        (
            "break_even",
            "Speed-up of one layer's decode step",
            "Over full attention, timed alternately; bars: 95% intervals over pairs; marks on the "
            "line of 1: the break-even length with its interval.",
            lambda: break_even(every_length, methods),
        ),
        (
            "step_bound",
            "Upper bound on the speed-up of a whole decode step",
            "Counts reading the weights once at the measured bandwidth and the measured attention "
            "of every layer, and nothing else: no method can speed up a step by more.",
            lambda: step_bound(every_length, models, methods),
        ),
        (
            "needle_heatmap",
            "Needle found, by context length and depth",
            "Mean score of each length and depth; the fuller the colour, the better.",
            lambda: needle_heatmap(configurations),
        ),
        (
            "subtasks",
            "Score by sub-task",
            "Mean score; the fuller the colour, the better.",
            lambda: (
                None
                if needle_heatmap(configurations)
                else heat_table(configurations[configurations["subtask"] != MEAN])
            ),
        ),
        (
            "recall_by_layer",
            "Recall of the exact top-k by layer",
            "Mean over KV heads, prompts and steps; bars: from the worst head to the best.",
            lambda: None if samples is None else recall_by_layer(top, samples, methods),
        ),
        (
            "fit_loss",
            "Training loss",
            "Mean over layers, smoothed over a fiftieth of the steps; faint: each layer.",
            lambda: None if samples is None else loss_curve(top, samples),
        ),
    ]
    drawn: list[Drawn] = []
    # rc_context, not rcParams: drawing must not change the style of a caller's figures.
    with matplotlib.rc_context(cast(Any, style.rc_params())), short_methods():
        for name, title, reading, make in plans:
            made = make() if only in (None, name) else None
            if made is not None:
                figure, data = made
                if any(axes.get_title(loc="left") for axes in figure.axes[1:]):
                    figure.suptitle(title, x=0.01, ha="left", size=10, weight="bold")
                else:
                    figure.axes[0].set_title(title)
                shown = every_length if name in OVER_LENGTHS else top
                words = figure_words(shown, name in RATIOS) if name in TIMED else ""
                number = measured_on(data)
                words += highlight_words(data)
                parts = (f"{reading}{words}{at if name not in OVER_LENGTHS else ''}", number)
                one = Drawn(name + suffix, title, " ".join([*filter(None, parts), context]), folder)
                drawn.append((write or save)(figure, data, one))
    return drawn


_AT = {"k": "budget", "rbit": "number of bits"}


def _curves(
    plain: pd.DataFrame, top: pd.DataFrame, methods: Sequence[str] | None
) -> Iterator[Plan]:
    """Yield the figures of the columns that are declared with a curve.

    Args:
        plain: The configurations without their methods' parameters.
        top: The configurations with them.
        methods: Methods to highlight; None for the default.
    """

    def make(y: str, x: str) -> tuple[Figure, pd.DataFrame] | None:
        # The ladder and the arms of an ablation have figures of their own of these, in which
        # variants of one method are told apart.
        of_ladder = (y, x) in (("score", "rbit"), ("recall_at_k", "k"), ("recall_at_k", "rbit"))
        if of_ladder and is_ladder(top):
            return None
        if (y, x) == ("recall_at_k", "rbit") and arms(top):
            return None
        return curve(plain, y, x, methods)

    for y, one in CURVES.items():
        for x in one.over:
            title = f"{one.title} against {'budget' if x == 'k' else 'hash bits'}"
            reading = f"{one.reading} Points of one {_AT[x]} stand a little apart around its tick."
            yield f"{one.name}_vs_{x}", title, reading, functools.partial(make, y, x)


def smallest_batch(configurations: pd.DataFrame) -> pd.DataFrame:
    """Return the configurations of the smallest batch size, and those without one."""
    sizes = configurations["batch_size"]
    return configurations[sizes.isna() | (sizes == sizes.min()).fillna(False)]


def at_one_length(configurations: pd.DataFrame) -> pd.DataFrame:
    """Return the configurations of the length with most batch sizes; none if it has only one."""
    sizes = configurations.groupby("length")["batch_size"].nunique()
    if not len(sizes) or sizes.max() < 2:
        return configurations[:0]
    return configurations[configurations["length"] == sizes.idxmax()]


def save(figure: Figure, data: pd.DataFrame, drawn: Drawn) -> Drawn:
    """Write a figure as PNG and SVG, and its data as CSV; return it with its points."""
    write_atomic(drawn.csv, csv_bytes(data))
    png, svg = io.BytesIO(), io.BytesIO()
    lay_out(figure)
    # Not savefig, which draws a figure once more before each file. No date and no version, so that
    # the same rows give the same bytes.
    figure.dpi = matplotlib.rcParams["savefig.dpi"]
    for legend in figure.legends:
        legend.set_gid(LEGEND)
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    write_atomic(drawn.png, png.getvalue())
    write_atomic(drawn.svg, svg.getvalue())
    return dataclasses.replace(
        drawn,
        points=tuple(points_of(figure)),
        legend=legend_on_the_right(figure),
        smallest_text=smallest_text(figure),
    )
