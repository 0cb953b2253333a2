"""Figures, each from one tidy frame, each saved as PNG and SVG with the CSV it was drawn from.

A figure is drawn only where its data vary: a curve needs two points, a comparison two lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from topkbench.analysis import style
from topkbench.analysis.bars import ablation, heat_table, needle_heatmap, stages
from topkbench.analysis.break_even import MODELS, ModelSize, break_even, step_bound
from topkbench.analysis.curves import context_curve, curve
from topkbench.analysis.files import write_atomic
from topkbench.analysis.pareto import pareto, pareto_pair
from topkbench.analysis.stats import MEAN
from topkbench.analysis.timings import figure_words
from topkbench.analysis.training import loss_curve
from topkbench.analysis.variants import arms, ladder

OVER_LENGTHS = (
    "latency_vs_context",
    "throughput_vs_context",
    "latency_vs_batch",
    "break_even",
    "step_bound",
)
"""The figures that show more than the longest length of the smallest batch."""

RATIOS = ("break_even", "step_bound", "decode_vs_k", "decode_vs_rbit", "score_vs_cost", "ablation")
"""The figures of times in full attention's, with intervals."""

TIMED = (*OVER_LENGTHS, *RATIOS, "stages")
"""The figures of times, whose captions say which of them do not count."""


@dataclass(frozen=True)
class Drawn:
    """A figure on disk."""

    name: str
    """File name without its ending."""
    title: str
    """What is shown, in words."""
    caption: str
    """How to read it, and what it was measured on."""
    folder: Path

    @property
    def png(self) -> Path:
        """The picture in pixels."""
        return self.folder / f"{self.name}.png"

    @property
    def svg(self) -> Path:
        """The picture in vectors."""
        return self.folder / f"{self.name}.svg"

    @property
    def csv(self) -> Path:
        """The numbers it was drawn from."""
        return self.folder / f"{self.name}.csv"


def draw_all(
    lines: pd.DataFrame,
    folder: Path,
    context: str,
    suffix: str = "",
    models: Mapping[str, ModelSize] = MODELS,
    samples: pd.DataFrame | None = None,
    only: str | None = None,
) -> list[Drawn]:
    """Draw every figure that the lines of one setting allow.

    Args:
        lines: Lines of one setting (`lines.Comparison.panels`), sub-tasks included.
        folder: Where the files go.
        context: What was measured: model, task, length, question, samples, machine, commit.
        suffix: End of the files' names, where a report has several settings.
        models: Whole models that the bound on a step is drawn for.
        samples: The samples behind the lines, for what is drawn from them.
        only: Name of the one figure that is wanted; None for all.

    Returns:
        The figures drawn, in the order they are shown.
    """
    with_mean = set(lines.loc[lines["subtask"] == MEAN, "line"])
    top = lines[(lines["subtask"] == MEAN) | ~lines["line"].isin(with_mean)]
    batched = at_one_length(top)
    top = smallest_batch(top)
    # Lengths stand together only where they are an axis; the other figures show the longest.
    every, lengths = top, sorted(int(one) for one in top["length"].dropna().unique())
    if len(lengths) > 1:
        top = top[top["length"] == lengths[-1]]
    at = f" At {lengths[-1]:,} tokens." if len(lengths) > 1 else ""
    plans: list[tuple[str, str, str, Callable[[], tuple[Figure, pd.DataFrame] | None]]] = [
        (
            "score_vs_k",
            "Score against budget",
            "Bars and band: 95% intervals.",
            lambda: curve(top, "score", "k"),
        ),
        (
            "score_vs_rbit",
            "Score against hash bits",
            "Bars and band: 95% intervals.",
            lambda: None if ladder(top) else curve(top, "score", "rbit"),
        ),
        (
            "recall_vs_k",
            "Recall of the exact top-k against budget",
            "Higher is better.",
            lambda: None if ladder(top) else curve(top, "recall_at_k", "k"),
        ),
        (
            "recall_vs_rbit",
            "Recall of the exact top-k against hash bits",
            "Higher is better.",
            lambda: None if ladder(top) or arms(top) else curve(top, "recall_at_k", "rbit"),
        ),
        (
            "hash_ladder",
            "Selections against hash bits, rung by rung",
            "Recall and attention mass are means over layers, KV heads and steps; bars: 95% "
            "intervals, over seeds or, of scores, over samples.",
            lambda: ladder(top),
        ),
        (
            "arms",
            "Selections of each arm",
            "An arm departs from the configuration in what its name says (dashed: as configured); "
            "bars: 95% intervals over seeds.",
            lambda: arms(top),
        ),
        (
            "decode_vs_k",
            "Decode latency against budget",
            "In times full attention's, timed in turn with each; bars: 95% intervals over pairs.",
            lambda: curve(top, "decode_vs_full", "k"),
        ),
        (
            "decode_vs_rbit",
            "Decode latency against hash bits",
            "In times full attention's, timed in turn with each; bars: 95% intervals over pairs.",
            lambda: curve(top, "decode_vs_full", "rbit"),
        ),
        (
            "score_vs_bytes",
            "Score against bytes read",
            "Up and to the left is better; the Pareto front is joined, dominated points are faint; "
            "points that would hide one another stand side by side.",
            lambda: pareto(top),
        ),
        (
            "score_vs_cost",
            "Score against bytes read, and against the decode step",
            "Up and to the left is better; Pareto fronts are joined, dominated points are faint; "
            "points that would hide one another stand side by side. Bars: 95% intervals of times.",
            lambda: pareto_pair(top),
        ),
        (
            "stages",
            "Decode step by stage",
            "Medians within one decode step; grey mark: full attention, timed in turn with it.",
            lambda: stages(top),
        ),
        (
            "ablation",
            "What each fast operator adds",
            "Medians within one decode step, each bar with the operators of those above; times "
            "faster than the first, by their speed-ups over full attention, with 95% intervals; "
            f"{', '.join(dict.fromkeys(top['impl'].dropna().astype(str)))}.",
            lambda: ablation(top),
        ),
        (
            "latency_vs_context",
            "Decode latency against context length",
            "Median; thin dashes: the same bytes at the machine's measured memory bandwidth.",
            lambda: context_curve(every, "decode_ms_p50"),
        ),
        (
            "throughput_vs_context",
            "Decode throughput against context length",
            "Median of the whole model's step; bars: 20th to 80th percentile. Higher is better.",
            lambda: context_curve(every, "tokens_per_s"),
        ),
        (
            "latency_vs_batch",
            "Decode latency against batch size",
            "Median; thin dashes: the same bytes at the machine's measured memory bandwidth."
            + (f" At {int(batched['length'].iloc[0]):,} tokens." if len(batched) else ""),
            lambda: context_curve(batched, "decode_ms_p50", "batch_size"),
        ),
        (
            "break_even",
            "Speed-up of one layer's decode step",
            "Over full attention timed in turn; bars: 95% intervals over pairs; on the line of 1: "
            "where it breaks even, with its interval.",
            lambda: break_even(every),
        ),
        (
            "step_bound",
            "Whole decode step: a bound",
            "Weights read once at the measured bandwidth, and every layer's attention as timed; "
            "nothing else is counted, so no method can speed up a step by more.",
            lambda: step_bound(every, models),
        ),
        (
            "needle_heatmap",
            "Needle found, by context length and depth",
            "Mean score of each length and depth; darker is better.",
            lambda: needle_heatmap(lines),
        ),
        (
            "subtasks",
            "Score by sub-task",
            "Mean score; darker is better.",
            lambda: None if needle_heatmap(lines) else heat_table(lines[lines["subtask"] != MEAN]),
        ),
        (
            "fit_loss",
            "Training loss",
            "Mean over layers, a running one over a fiftieth of the steps; faint: each layer.",
            lambda: None if samples is None else loss_curve(top, samples),
        ),
    ]
    drawn: list[Drawn] = []
    # rc_context, never rcParams: drawing must not change a caller's own figures.
    with matplotlib.rc_context(cast(Any, style.RC_PARAMS)):
        for name, title, reading, make in plans:
            made = make() if only in (None, name) else None
            if made is not None:
                figure, data = made
                figure.axes[0].set_title(title)
                shown = every if name in OVER_LENGTHS else top
                words = figure_words(shown, name in RATIOS) if name in TIMED else ""
                one = Drawn(
                    name + suffix,
                    title,
                    f"{reading}{words}{at if name not in OVER_LENGTHS else ''} {context}",
                    folder,
                )
                save(figure, data, one)
                drawn.append(one)
    return drawn


def smallest_batch(lines: pd.DataFrame) -> pd.DataFrame:
    """Return the lines of the smallest batch size, and those that have none."""
    sizes = lines["batch_size"]
    return lines[sizes.isna() | (sizes == sizes.min()).fillna(False)]


def at_one_length(lines: pd.DataFrame) -> pd.DataFrame:
    """Return the lines of the length at which most batch sizes were timed; none of one size."""
    sizes = lines.groupby("length")["batch_size"].nunique()
    if not len(sizes) or sizes.max() < 2:
        return lines[:0]
    return lines[lines["length"] == sizes.idxmax()]


def save(figure: Figure, data: pd.DataFrame, drawn: Drawn) -> None:
    """Write a figure as PNG and SVG, with the CSV it was drawn from."""
    drawn.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(drawn.csv, data.to_csv(index=False, lineterminator="\n").encode())
    FigureCanvasAgg(figure)
    # Lay out once: constrained layout is most of the cost of a file, and there are two.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    # No date and no version: the same rows give the same bytes.
    figure.savefig(drawn.png, metadata={"Software": None})
    figure.savefig(drawn.svg, metadata={"Date": None, "Creator": None})
