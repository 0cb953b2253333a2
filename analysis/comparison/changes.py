"""What changed between two sets of results of the same cells, and what of it is worse.

Scores are compared on the same samples. A score is worse if the interval of its paired difference
lies below minus the tolerance; the intervals are so wide that in at most ``FALSE_ALARMS`` of the
comparisons of results that do not differ any score is found worse, however many are compared. The
number of scores is allowed for by Holm's procedure. Numbers without sampling error are worse if
they moved by more than a share. Times are not compared: they are of different moments.

Source: Holm 1979 (Scand. J. Statist. 6, 65).
"""

from __future__ import annotations

import dataclasses
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from topkbench.analysis.comparison.configurations import SETTING, Comparison, once
from topkbench.analysis.comparison.metrics import METRICS
from topkbench.analysis.comparison.stats import MEAN, Interval, independent, pair, paired_interval
from topkbench.analysis.record.row import (
    PARAMETER_PREFIX,
    RecordError,
    Status,
    same_under_each_seed,
)

FALSE_ALARMS = 0.01
"""Share of comparisons of results that do not differ in which any score may be found worse."""
EXACT = ("recall_at_k", "nll", "density", "bytes_read_per_step")
"""Numbers without sampling error: the same code finds the same on the same prompts."""
_NAMED = tuple(name for name in SETTING if name != "device")
_KEY = (*_NAMED, "method", "k", "rbit", "batch_size")
"""Columns that name a configuration, beside its method's parameters."""
_IF_SEVERAL = ("device", "impl", "full_backend", "config_digest", "repeat")
"""Columns that must agree as well where several configurations have one name."""
_MOST_NAMED = 3
"""Configurations that a sentence names; of more it says the number."""


@dataclass(frozen=True)
class Change:
    """One configuration and sub-task, before and after.

    Attributes:
        setting: The columns of ``SETTING``.
        label: The configuration's name.
        k: Its budget, and
        rbit: its hash bits; None if it has none.
        subtask: The sub-task, or ``mean``.
        scores: Mean scores before and after over the common samples; None without scores.
        difference: After minus before with its 95% interval; None without scores.
        exact: Numbers of ``EXACT``, before and after.
        speedups: Speed-ups over full attention, before and after, for information.
        pairs: The paired scores; empty without scores.
        worse: What is worse: names of columns, or the reason why there is nothing after.
    """

    setting: Mapping[str, Any]
    label: str
    k: int | None
    rbit: int | None
    subtask: str
    scores: tuple[float, float] | None = None
    difference: Interval | None = None
    exact: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    speedups: tuple[float, float] | None = None
    pairs: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame, repr=False)
    worse: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The configuration in words."""
        return _name(self.label, self.k, self.rbit)


def find_changes(
    before: Comparison,
    after: Comparison,
    *,
    tolerance: float = 0.0,
    relative: float = 0.01,
    only_common: bool = False,
) -> list[Change]:
    """Return what changed in each configuration and sub-task.

    Args:
        before: The one set of results, with samples, and
        after: the other.
        tolerance: Points that a score may lose.
        relative: Share by which other numbers may become worse.
        only_common: Compare what both have, if the later results lack some; else that is an error.

    Raises:
        RecordError: If the two cannot be compared; the message says why, and what to do.
    """
    matches = list(_matched(before, after))
    pairs = [(own, other) for own, other in matches if other is not None]
    found: list[Change] = []
    missing = []
    for own, other in matches:
        reason = _reason(own.iloc[0], after.rows) if other is None else None
        if reason is not None:
            found.append(_change(own.iloc[0], MEAN, worse=(reason,)))
        elif other is None:
            missing.append(_label(own))
    if not pairs and not found:
        raise RecordError(_nothing_in_common(before, after))
    if missing and not only_common:
        raise RecordError(
            f"the later results must have every configuration of the earlier ones that ran, but"
            f" lack {_some(missing)}; run them, or compare with --common what both have."
        )
    for own, other in pairs:
        found += _of_configuration(own, other, before, after, only_common)
    return _with_worse(found, tolerance, relative)


def _matched(
    before: Comparison, after: Comparison
) -> Iterator[tuple[pd.DataFrame, pd.DataFrame | None]]:
    """Yield each earlier configuration with the same later one, or None; sub-tasks included.

    Raises:
        RecordError: If settings do not tell two configurations of one side apart.
    """
    sides = [one.configurations for one in (before, after)]
    if not all(map(len, sides)):
        return
    # A parameter that one version alone knows tells no two of its configurations from the others'.
    parameters = [
        str(name)
        for name in sides[0]
        if str(name).startswith(PARAMETER_PREFIX) and name in sides[1].columns
    ]
    for columns in ((*_KEY, *parameters), (*_KEY, *parameters, *_IF_SEVERAL)):
        earlier, later = (_by_key(one, columns) for one in sides)
        several = [
            parts[0].iloc[0]
            for key in {**earlier, **later}
            if len(parts := max(earlier.get(key, []), later.get(key, []), key=len)) > 1
        ]
        if not several:
            break
    else:
        names = [_name(one["label"], one["k"], one["rbit"]) for one in several]
        raise RecordError(
            f"each configuration must be there once, but {_some(names)} are not told apart by"
            " their settings; compare folders of one sweep each."
        )
    for key, (own,) in earlier.items():
        (other,) = later.get(key, [None])
        yield own, other


def _by_key(configurations: pd.DataFrame, columns: Sequence[str]) -> dict[str, list[pd.DataFrame]]:
    """Return the configurations by the values of some columns, each with its sub-tasks."""
    found: dict[str, list[pd.DataFrame]] = {}
    for _, part in configurations.groupby("configuration_id", sort=False):
        values = [None if pd.isna(part[name].iloc[0]) else part[name].iloc[0] for name in columns]
        found.setdefault(json.dumps(values, default=str), []).append(part)
    return found


def _nothing_in_common(before: Comparison, after: Comparison) -> str:
    for when, one in (("earlier", before), ("later", after)):
        if not len(one.configurations):
            return f"the {when} results must have a cell that ran, but have none."
    for name in _NAMED:
        first, other = (set(one.configurations[name].dropna()) for one in (before, after))
        if first and other and not first & other:
            words = (", ".join(sorted(map(str, values))) for values in (first, other))
            return (
                f"the two results must have a configuration in common, but differ in {name}:"
                f" {' and '.join(words)}; run the same command for both."
            )
    return (
        "the two results must have a configuration in common (model, task, prompts, length,"
        " question, protocol, method, k, rbit and parameters), but have none; run the same"
        " command for both."
    )


def _reason(configuration: pd.Series, rows: pd.DataFrame) -> str | None:
    """Return how a configuration ended that has no later results; None if it did not run."""
    ended = rows["status"].ne(Status.OK.value) & rows["status"].ne(Status.INTERRUPTED.value)
    for name in ("model", "task", "length", "method", "k", "rbit", "protocol", "question"):
        value = configuration[name]
        ended &= rows[name].isna() if pd.isna(value) else rows[name].eq(value).fillna(False)
    found = rows[ended.astype(bool)]
    if not len(found):
        return None
    return f"{found['status'].iloc[0]}: {found['reason'].iloc[0]}"


def _of_configuration(
    own: pd.DataFrame,
    other: pd.DataFrame,
    before: Comparison,
    after: Comparison,
    only_common: bool,
) -> Iterator[Change]:
    """Yield what changed in each sub-task that a configuration has before and after."""
    pairs = _pairs(own, other, before, after, only_common)
    later = {one["subtask"]: one for _, one in other.iterrows()}
    lacking = [one for one in own["subtask"] if one not in later]
    if lacking and not only_common:
        raise RecordError(
            f"the later results must have every sub-task of the earlier ones, but"
            f" {_label(own)} lacks {_some(lacking)}; run the same command for both, or compare"
            " with --common what both have."
        )
    for _, configuration in own.iterrows():
        subtask = str(configuration["subtask"])
        if subtask not in later:
            continue
        both = pairs if subtask == MEAN or not len(pairs) else pairs[pairs["subtask"] == subtask]
        scored: dict[str, Any] = {}
        if len(both):
            both = independent(both)
            means = both.groupby("subtask")[["score", "other"]].mean().mean()
            scored = {
                "scores": (float(means["score"]), float(means["other"])),
                "difference": paired_interval(both["other"], both["score"], both["subtask"]),
                "pairs": both,
            }
        values = {
            name: (float(configuration[name]), float(later[subtask][name]))
            for name in (*EXACT, "speedup_vs_full")
            if not pd.isna(configuration[name]) and not pd.isna(later[subtask][name])
        }
        speedups = values.pop("speedup_vs_full", None)
        yield _change(configuration, subtask, exact=values, speedups=speedups, **scored)


def _pairs(
    own: pd.DataFrame,
    other: pd.DataFrame,
    before: Comparison,
    after: Comparison,
    only_common: bool,
) -> pd.DataFrame:
    """Return the scores of a configuration's samples before (``score``) and after (``other``)."""
    scored = [bool(one["score"].notna().any()) for one in (own, other)]
    if not all(scored):
        return pd.DataFrame()
    pools = []
    for when, side, part in (("earlier", before, own), ("later", after, other)):
        pool = side.answers.get(str(part["configuration_id"].iloc[0]))
        if pool is None:
            raise RecordError(
                f"scores are paired by sample, but the {when} results have no samples of"
                f" {_label(part)}; samples.parquet must be beside the rows."
            )
        pools.append(once(pool) if same_under_each_seed(part["prompts"].iloc[0]) else pool)
    try:
        pairs = pair(pools[0], pools[1])
    except ValueError as error:
        raise RecordError(f"{_label(own)} cannot be paired: {error}") from None
    number = len(pools[0]) - len(pairs)
    if not len(pairs) or (number and not only_common):
        raise RecordError(
            f"the later results must have every sample of the earlier ones, but"
            f" {_label(own)} lacks {number} of {len(pools[0])}; run the same command for both"
            f"{', or compare with --common what both have' if len(pairs) else ''}."
        )
    return pairs


def _change(configuration: pd.Series, subtask: str, **found: Any) -> Change:
    k, rbit = (
        None if pd.isna(configuration[name]) else int(configuration[name]) for name in ("k", "rbit")
    )
    known = {
        name: None if pd.isna(configuration[name]) else configuration[name] for name in SETTING
    }
    return Change(known, str(configuration["label"]), k, rbit, subtask, **found)


def _with_worse(changes: Sequence[Change], tolerance: float, relative: float) -> list[Change]:
    """Return the changes with what is worse in each."""
    worse = _worse_scores(changes, tolerance)
    found = []
    for place, one in enumerate(changes):
        moved = [
            name
            for name, (first, last) in one.exact.items()
            if (last - first) * (-1 if METRICS[name].better == "higher" else 1)
            > relative * abs(first)
        ]
        names = (*one.worse, *(["score"] if place in worse else []), *moved)
        found.append(dataclasses.replace(one, worse=names))
    return found


def _worse_scores(changes: Sequence[Change], tolerance: float) -> set[int]:
    """Return the places of the changes whose score is worse, by Holm's procedure."""
    left = {place: one.pairs for place, one in enumerate(changes) if len(one.pairs)}
    found: set[int] = set()
    while left:
        z = _width(len(left))
        more = {
            place
            for place, both in left.items()
            if paired_interval(both["other"], both["score"], both["subtask"], z=z).high < -tolerance
        }
        if not more:
            break
        found |= more
        left = {place: both for place, both in left.items() if place not in more}
    return found


def _width(number: int) -> float:
    """Return the standard deviations to an interval's end, for one of ``number`` scores."""
    return NormalDist().inv_cdf(1 - FALSE_ALARMS / number)


def least_losses(
    changes: Sequence[Change], tolerance: float = 0.0
) -> dict[tuple[int, ...], float | None]:
    """Return the least loss of a score that would be found worse, by the samples that it rests on.

    It is that of one score among all that are compared: so many of its samples, all right before,
    would have to be wrong afterwards, spread evenly over its sub-tasks.

    Args:
        changes: What is compared.
        tolerance: Points that a score may lose.

    Returns:
        Points, 0 to 100, by the number of samples of each sub-task of a score; None where not even
        the loss of all answers would be found.
    """
    scored = [one.pairs["subtask"].value_counts() for one in changes if len(one.pairs)]
    if not scored:
        return {}
    z = _width(len(scored))
    sizes = sorted({tuple(sorted(map(int, counts))) for counts in scored})
    return {one: _least_loss(one, tolerance, z) for one in sizes}


def _least_loss(sizes: Sequence[int], tolerance: float, z: float) -> float | None:
    subtasks = np.repeat(np.arange(len(sizes)), sizes)
    # The order in which samples are lost: each sub-task's first, then each one's second, ...
    order = np.argsort(np.concatenate([np.arange(size) / size for size in sizes]), kind="stable")
    before = np.full(len(subtasks), 100.0)

    def after(lost: int) -> Interval:
        scores = before.copy()
        scores[order[:lost]] = 0.0
        return paired_interval(scores, before, subtasks, z=z)

    numbers = range(1, len(subtasks) + 1)
    place = bisect_left(numbers, True, key=lambda lost: after(lost).high < -tolerance)
    return None if place == len(numbers) else -after(numbers[place]).estimate


def _label(part: pd.DataFrame) -> str:
    return _name(*(part[name].iloc[0] for name in ("label", "k", "rbit")))


def _name(label: Any, k: Any, rbit: Any) -> str:
    known = [(name, value) for name, value in (("k", k), ("rbit", rbit)) if not pd.isna(value)]
    return ", ".join([str(label), *(f"{name}={value}" for name, value in known)])


def _some(names: Sequence[str]) -> str:
    shown = "; ".join(names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more"
