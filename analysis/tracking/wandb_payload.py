"""The data that is copied to W&B: names, configuration, summary and curves, as plain values."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import pandas as pd

from topkbench.analysis.comparison.configurations import DEFAULTS, compare
from topkbench.analysis.comparison.metrics import CURVES
from topkbench.analysis.comparison.stats import MEAN
from topkbench.analysis.comparison.timings import TIMED
from topkbench.analysis.record.row import DECLARED, PARAMETER_PREFIX, SPEED_COLUMNS, Row
from topkbench.analysis.record.store import named_values

NAMES = ("model", "task", "length", "method", "impl", "protocol", "question", "k", "rbit", "seed")
"""Columns of the row at the top level of a run's configuration, to find it by."""

PER_ROW = tuple(name for name, one in DECLARED.items() if one.tracked)
"""Metrics that the summary lists for each row of a cell."""

UNSTEADY = tuple(name for name in SPEED_COLUMNS if name not in ("other_load", "timing_note"))
"""Metrics that are renamed ``unsteady/NAME`` if a row's times are unreliable, so that no panel
draws them."""

_MOST_NAMED = 4
"""Most settings without a word of their own in a name."""
_WITH_WORDS = ("k", "rbit", "seed", "question", "task.length", "model.name")
"""Settings that are named by a column of the row."""
_CHOSEN_BY = {"model": "name", "protocol": "protocol"}
"""The setting of a group that says which option it is; of other groups ``_target_``."""

SHOWN = {"model": "tiny", "task": "ruler_words", **DEFAULTS}
"""What a workspace shows one of, with what conf/ has by default. Each is a tag of its runs."""


def shown_of(rows: pd.DataFrame) -> dict[str, str]:
    """Return which runs of a sweep a workspace shows: of several, the default or the first."""
    shown = {}
    for name, default in SHOWN.items():
        found = rows[name].dropna().unique().tolist()
        shown[name] = "all" if not found else default if default in found else str(found[0])
    return shown


def tag(word: str) -> str:
    """Return a word as a tag of W&B, which has at most 64 characters."""
    return word[:64]


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


class Names:
    """Names, tags and configurations of a sweep's cells, in words that tell them apart.

    What varies in the sweep is named; so are settings of method and protocol that the command gave.
    Of a method's settings, those with the value that most of its cells have are left out.

    Args:
        settings: Of each configuration of the sweep: the settings on which its cell depends, by
            name, such as ``method.page_size``.
        given: Names of the settings that the command gave.
    """

    def __init__(
        self, settings: Sequence[Mapping[str, Any]] = (), given: Collection[str] = ()
    ) -> None:
        self._given = given
        self._options: dict[str, set[str]] = {}  # of each group
        self._values: dict[tuple[str, str, str], Counter[str]] = {}  # of each setting of an option
        for one in settings:
            for name, value in one.items():
                group, option = _option(one, name)
                self._options.setdefault(group, set()).add(option)
                self._values.setdefault((group, option, name), Counter())[shown(value)] += 1
        self._taken: dict[str, str] = {}  # which cell has a name

    def run_name(self, row: Row, config: Mapping[str, Any]) -> str:
        """Return the name of a cell's run, which no other cell of the sweep has."""
        words = [row.model] if self._varies("model") else []
        words += [row.method]
        words += [row.task] if self._varies("task") else []
        words += _sizes(row, with_length=self._varies("task.length"))
        words += [row.protocol] if row.protocol and self._varies("protocol") else []
        words += [row.question] if row.question and self._varies("question") else []
        words += [f"s{row.seed}"] if self._varies("seed") else []
        others = self._others(row, config)
        name = "-".join([*words, *others[:_MOST_NAMED]])
        # What has no word, or one too many, is told apart by the cell's identity.
        if len(others) > _MOST_NAMED or self._taken.setdefault(name, row.run_id) != row.run_id:
            name += f"-{row.run_id[:6]}"
        return name

    def configuration(self, row: Row, config: Mapping[str, Any]) -> str:
        """Return what is the same of cells that differ in model, task, rules and seed alone.

        The number of samples and the commit are part of it, so that the runs of a first try, or of
        other code, are not averaged with those that follow.
        """
        words = [row.method, *_sizes(row, with_length=True), *self._others(row, config)]
        words += [f"n{row.num_samples}"] if row.num_samples is not None else []
        words += [row.git_commit[:7]] if row.git_commit else []
        return "-".join(words)

    def tags(self, row: Row, config: Mapping[str, Any]) -> list[str]:
        """Return a run's tags, at most 64 characters each."""
        words = [row.method, row.model, row.task, row.status.value, row.protocol, row.question]
        words += [f"seed{row.seed}"] if row.seed is not None else []
        words += [f"L{row.length}"] if row.length is not None else []
        words += [f"k{row.k}"] if row.k is not None else []
        words += [f"rbit{row.rbit}"] if row.rbit is not None else []
        words += self._others(row, config, of_run=True)
        return list(dict.fromkeys(tag(word) for word in words if word))

    def _varies(self, name: str) -> bool:
        """Return whether a sweep has several options of a group, or values of a setting."""
        values = [set(counts) for (*_, one), counts in self._values.items() if one == name]
        return len(self._options.get(name, ())) > 1 or len(set().union(*values)) > 1

    def _others(self, row: Row, config: Mapping[str, Any], of_run: bool = False) -> list[str]:
        """Return ``NAME=VALUE`` of the settings of a cell that have no word of their own.

        Args:
            row: A row of the cell.
            config: The cell's configuration.
            of_run: Whether settings of the whole run and of its task are named if they were given.
        """
        own = named_values(config)
        found = []
        if "calibration" in row.parameters and self._varies("calibration"):
            found.append(str(row.parameters["calibration"]))
        for name in own:
            group, option = _option(own, name)
            counts = self._values.get((group, option, name))
            if counts is None or name in _WITH_WORDS:
                continue
            if (group == "protocol" and row.protocol is None) or (
                group == "calibration" and row.artifact_digest is None
            ):
                continue  # it has no effect
            value = shown(own[name])
            is_usual = group == "method" and value == counts.most_common(1)[0][0]
            is_given = name in self._given and (of_run or group in ("method", "protocol"))
            if is_given or (len(counts) > 1 and not is_usual):
                found.append(f"{name.rpartition('.')[2]}={value}")
        return found


def _option(settings: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Return the group of a setting, and which of its options is chosen; both empty without one."""
    group, dot, _ = name.partition(".")
    if not dot:
        return "", ""
    return group, str(settings.get(f"{group}.{_CHOSEN_BY.get(group, '_target_')}"))


def _sizes(row: Row, with_length: bool) -> list[str]:
    words = [f"L{row.length}"] if with_length and row.length is not None else []
    words += [f"k{row.k}"] if row.k is not None else []
    return words + ([f"r{row.rbit}"] if row.rbit is not None else [])


def shown(value: Any) -> str:
    """Return a setting's value as YAML has it: ``true``, ``null``, ``[0, 1]``."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def cell_config(row: Row, config: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """Return a run's configuration: the row's names at the top level, the rest in ``resolved``.

    Args:
        row: A row of the cell.
        config: The cell's resolved configuration.
        configuration: From ``Names.configuration``.
    """
    names: dict[str, Any] = {name: getattr(row, name) for name in NAMES}
    names["configuration"] = configuration
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
