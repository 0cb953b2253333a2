"""What a tracker is told: names, configuration, summary and curves, as plain values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pandas as pd

from topkbench.analysis.configurations import compare
from topkbench.analysis.row import PARAMETER_PREFIX, Row
from topkbench.analysis.stats import MEAN

NAMES = ("model", "task", "length", "method", "impl", "protocol", "question", "k", "rbit", "seed")
"""Columns of the row by which a run is found, at the top of its configuration."""

PER_ROW = (
    *("score", "recall_at_k", "attention_mass", "output_rel_error"),
    *("decode_ms_p50", "full_ms_p50", "speedup_vs_full", "speedup_ci_low", "speedup_ci_high"),
    *("bandwidth_fraction", "timing_note"),
)
"""Metrics that the summary has for each row of a cell."""

UNSTEADY = (
    *("decode_ms_p50", "decode_ms_warm_p50", "tokens_per_s"),
    *("speedup_vs_full", "speedup_ci_low", "speedup_ci_high"),
)
"""Metrics that are called ``unsteady/NAME`` where a row's times cannot be relied on, so that no
panel draws them."""

CURVES = ("score", "recall_at_k", "decode_ms_p50")
"""Metrics that a sweep's run draws over k and rbit."""


def plain_config(value: Any) -> Any:
    """Return a configuration that W&B takes: string keys without dots, lists for tuples."""
    if isinstance(value, Mapping):
        return {str(key).replace(".", "_"): plain_config(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain_config(one) for one in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def table_value(value: Any) -> Any:
    """Return what a W&B table takes: numbers, truth values and text."""
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return value.item() if hasattr(value, "item") else str(value)


def run_name(row: Row) -> str:
    """Return a cell's name in words that sort well."""
    words = [row.method, row.task]
    words += [f"L{row.length}"] if row.length is not None else []
    words += [f"k{row.k}"] if row.k is not None else []
    words += [f"r{row.rbit}"] if row.rbit is not None else []
    return "-".join(words)


def tags(row: Row) -> list[str]:
    """Return a run's tags, at most 64 characters each."""
    words = [row.method, row.model, row.status.value]
    words += [f"k{row.k}"] if row.k is not None else []
    words += [f"rbit{row.rbit}"] if row.rbit is not None else []
    return [tag[:64] for tag in words if tag]


def cell_config(row: Row, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run is found by: the row's names at the top, the rest under ``resolved``."""
    names: dict[str, Any] = {name: getattr(row, name) for name in NAMES}
    names |= {PARAMETER_PREFIX + name: value for name, value in row.parameters.items()}
    names |= {"git_commit": row.git_commit, "device": row.device, "cell": row.run_id}
    found: dict[str, Any] = plain_config({**names, "resolved": dict(config)})
    return found


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return a cell's metrics: those of its mean by name, those of its other rows by ``NAME/ROW``.

    A row is called by its sub-task (a length, where one is timed), or by its budget where a cell
    covers several. Times that cannot be relied on are called so: ``unsteady/NAME``.
    """
    top = next((row for row in rows if row.subtask == MEAN), rows[0])
    skipped = {*NAMES, "run_id", "task", "subtask", "git_commit", "device"}
    values = {
        _called(name, top): value
        for name, value in top.flat().items()
        if name not in skipped and not name.startswith(PARAMETER_PREFIX) and value is not None
    }
    for row in rows:
        called = f"k{row.k}" if row.subtask == MEAN else row.subtask
        for name in PER_ROW:
            value = getattr(row, name)
            if row is not top and value is not None:
                values[f"{_called(name, row)}/{called}"] = value
    return values


def _called(name: str, row: Row) -> str:
    return f"unsteady/{name}" if row.timing_note and name in UNSTEADY else name


def curves(rows: pd.DataFrame, samples: pd.DataFrame) -> list[dict[str, float]]:
    """Return the points of the sweep's curves, one mapping per place on an axis.

    Returns:
        ``{"k": 64, "by_k/score/hata-r128": 91.2, ...}`` for each k, then the same over rbit.
    """
    lines = compare(rows, samples).headline
    points: list[dict[str, float]] = []
    for x, other, letter in (("k", "rbit", "r"), ("rbit", "k", "k")):
        if not len(lines) or lines[x].nunique() < 2:
            continue
        for value, part in lines[lines[x].notna()].groupby(x):
            point: dict[str, float] = {x: float(cast(float, value))}
            for _, line in part.iterrows():
                words = [line["method"], line["variant"], line["subtask"]]
                words = [str(word) for word in words if word and word != MEAN]
                words += [f"{letter}{line[other]}"] if not pd.isna(line[other]) else []
                series = re.sub(r"[^A-Za-z0-9_=-]+", "_", "-".join(words))
                for metric in CURVES:
                    unsteady = metric in UNSTEADY and not pd.isna(line["timing_note"])
                    if not math.isnan(line[metric]) and not unsteady:
                        point[f"by_{x}/{metric}/{series}"] = float(line[metric])
            points.append(point)
    return points
