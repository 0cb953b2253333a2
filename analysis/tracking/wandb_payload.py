"""The data that is copied to W&B: names, configuration, summary and curves, as plain values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pandas as pd

from topkbench.analysis.comparison.configurations import compare
from topkbench.analysis.comparison.metrics import CURVES
from topkbench.analysis.comparison.stats import MEAN
from topkbench.analysis.comparison.timings import TIMED
from topkbench.analysis.record.row import DECLARED, PARAMETER_PREFIX, SPEED_COLUMNS, Row

NAMES = ("model", "task", "length", "method", "impl", "protocol", "question", "k", "rbit", "seed")
"""Columns of the row at the top level of a run's configuration, to find it by."""

PER_ROW = tuple(name for name, one in DECLARED.items() if one.tracked)
"""Metrics that the summary lists for each row of a cell."""

UNSTEADY = tuple(name for name in SPEED_COLUMNS if name not in ("other_load", "timing_note"))
"""Metrics that are renamed ``unsteady/NAME`` if a row's times are unreliable, so that no panel
draws them."""


def plain_config(value: Any) -> Any:
    """Return a configuration in the form of W&B: string keys without dots, lists for tuples."""
    if isinstance(value, Mapping):
        return {str(key).replace(".", "_"): plain_config(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain_config(one) for one in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def table_value(value: Any) -> Any:
    """Return a value in a type that W&B tables accept: number, boolean or text."""
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if value is pd.NA:
        return None
    return value.item() if hasattr(value, "item") else str(value)


def run_name(row: Row) -> str:
    """Return a cell's name: method, task, length, k and rbit."""
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
    """Return a run's configuration: the row's names at the top level, the rest in ``resolved``."""
    names: dict[str, Any] = {name: getattr(row, name) for name in NAMES}
    names |= {PARAMETER_PREFIX + name: value for name, value in row.parameters.items()}
    names |= {"git_commit": row.git_commit, "device": row.device, "cell": row.run_id}
    found: dict[str, Any] = plain_config({**names, "resolved": dict(config)})
    return found


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return a cell's metrics: those of its mean as ``NAME``, of its other rows as ``NAME/ROW``.

    A row is named by its sub-task (a length in timing tasks), or by its budget if the cell covers
    several. Unreliable times are named ``unsteady/NAME``.
    """
    top = next((row for row in rows if row.subtask == MEAN), rows[0])
    skipped = {*NAMES, "run_id", "task", "subtask", "git_commit", "device"}
    values = {
        _metric_name(name, top): value
        for name, value in top.flat().items()
        if name not in skipped and not name.startswith(PARAMETER_PREFIX) and value is not None
    }
    for row in rows:
        row_name = f"k{row.k}" if row.subtask == MEAN else row.subtask
        for name in PER_ROW:
            value = getattr(row, name)
            if row is not top and value is not None:
                values[f"{_metric_name(name, row)}/{row_name}"] = value
    return values


def _metric_name(name: str, row: Row) -> str:
    return f"unsteady/{name}" if row.timing_note and name in UNSTEADY else name


def curves(rows: pd.DataFrame, samples: pd.DataFrame) -> list[dict[str, float]]:
    """Return the points of the sweep's curves, one mapping per value of k, then per value of rbit.

    Returns:
        ``{"k": 64, "by_k/score/hata-r128": 91.2, ...}`` for each k, then the same for each rbit.
    """
    configurations = compare(rows, samples).overall
    points: list[dict[str, float]] = []
    for x, other, letter in (("k", "rbit", "r"), ("rbit", "k", "k")):
        if not len(configurations) or configurations[x].nunique() < 2:
            continue
        for value, part in configurations[configurations[x].notna()].groupby(x):
            point: dict[str, float] = {x: float(cast(float, value))}
            for _, configuration in part.iterrows():
                words = [
                    configuration["method"],
                    configuration["variant"],
                    configuration["subtask"],
                ]
                words = [str(word) for word in words if word and word != MEAN]
                words += (
                    [f"{letter}{configuration[other]}"] if not pd.isna(configuration[other]) else []
                )
                series = re.sub(r"[^A-Za-z0-9_=-]+", "_", "-".join(words))
                for metric in (name for name, one in CURVES.items() if x in one.over):
                    unsteady = metric in TIMED and not pd.isna(configuration["timing_note"])
                    if not math.isnan(configuration[metric]) and not unsteady:
                        point[f"by_{x}/{metric}/{series}"] = float(configuration[metric])
            points.append(point)
    return points
