"""Figures, each from one tidy frame, each saved as PNG and SVG with the CSV it was drawn from.

A figure is drawn only where its data vary: a curve needs two points, a comparison two lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from topkbench.analysis import style
from topkbench.analysis.bars import heat_table, stages
from topkbench.analysis.curves import context_curve, curve, pareto
from topkbench.analysis.files import write_atomic
from topkbench.analysis.stats import MEAN

CONTEXT = ("latency_vs_context", "throughput_vs_context")
"""The figures whose axis is the length."""


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


def draw_all(lines: pd.DataFrame, folder: Path, context: str, suffix: str = "") -> list[Drawn]:
    """Draw every figure that the lines of one setting allow.

    Args:
        lines: Lines of one setting (`lines.Comparison.panels`), sub-tasks included.
        folder: Where the files go.
        context: What was measured: model, task, length, question, samples, machine, commit.
        suffix: End of the files' names, where a report has several settings.

    Returns:
        The figures drawn, in the order they are shown.
    """
    with_mean = set(lines.loc[lines["subtask"] == MEAN, "line"])
    top = lines[(lines["subtask"] == MEAN) | ~lines["line"].isin(with_mean)]
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
            lambda: curve(top, "score", "rbit"),
        ),
        (
            "recall_vs_k",
            "Recall of the exact top-k against budget",
            "Higher is better.",
            lambda: curve(top, "recall_at_k", "k"),
        ),
        (
            "recall_vs_rbit",
            "Recall of the exact top-k against hash bits",
            "Higher is better.",
            lambda: curve(top, "recall_at_k", "rbit"),
        ),
        (
            "decode_vs_k",
            "Decode latency against budget",
            "Median; bars and band: 20th to 80th percentile.",
            lambda: curve(top, "decode_ms_p50", "k"),
        ),
        (
            "decode_vs_rbit",
            "Decode latency against hash bits",
            "Median; bars and band: 20th to 80th percentile.",
            lambda: curve(top, "decode_ms_p50", "rbit"),
        ),
        (
            "score_vs_bytes",
            "Score against bytes read",
            "Up and to the left is better; the Pareto front is joined, dominated points are faint.",
            lambda: pareto(top),
        ),
        (
            "stages",
            "Decode step by stage",
            "Medians within one decode step.",
            lambda: stages(top),
        ),
        (
            CONTEXT[0],
            "Decode latency against context length",
            "Median; thin dashes: the same bytes at the machine's full memory bandwidth.",
            lambda: context_curve(every, "decode_ms_p50"),
        ),
        (
            CONTEXT[1],
            "Decode throughput against context length",
            "Median of the whole model's step; bars: 20th to 80th percentile. Higher is better.",
            lambda: context_curve(every, "tokens_per_s"),
        ),
        (
            "subtasks",
            "Score by sub-task",
            "Mean score; darker is better.",
            lambda: heat_table(lines[lines["subtask"] != MEAN]),
        ),
    ]
    drawn: list[Drawn] = []
    # rc_context, never rcParams: drawing must not change a caller's own figures.
    with matplotlib.rc_context(cast(Any, style.RC_PARAMS)):
        for name, title, reading, make in plans:
            made = make()
            if made is not None:
                figure, data = made
                figure.axes[0].set_title(title)
                one = Drawn(
                    name + suffix,
                    title,
                    f"{reading}{at if name not in CONTEXT else ''} {context}",
                    folder,
                )
                _save(figure, data, one)
                drawn.append(one)
    return drawn


def _save(figure: Figure, data: pd.DataFrame, drawn: Drawn) -> None:
    drawn.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(drawn.csv, data.to_csv(index=False, lineterminator="\n").encode())
    FigureCanvasAgg(figure)
    # Lay out once: constrained layout is most of the cost of a file, and there are two.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    # No date and no version: the same rows give the same bytes.
    figure.savefig(drawn.png, metadata={"Software": None})
    figure.savefig(drawn.svg, metadata={"Date": None, "Creator": None})
