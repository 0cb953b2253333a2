"""Scores at equal cost: each method's score interpolated at common bytes read or decode times.

A score is interpolated linearly, over the logarithm of the cost, between the two budgets whose
costs enclose the target. It is never extrapolated beyond a method's cheapest or most expensive
budget. The score of each sample is interpolated, so that intervals and differences are paired as
elsewhere.

A larger budget is taken to cost no less than a smaller one: where noise says otherwise, its cost is
that of the smaller one (the running maximum over ``k``). A method that reads the same number of
bytes at every budget is a single point: its score counts at every cost that is not below its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from topkbench.analysis.comparison import stats
from topkbench.analysis.comparison.configurations import BASELINES
from topkbench.analysis.comparison.metrics import METRICS
from topkbench.analysis.comparison.timings import (
    NO_INTERVAL,
    RATIOS,
    UNSTEADY,
    is_unsteady,
    lacks_interval,
    timing_notes,
)
from topkbench.analysis.tables.table import Table

MATCHED = {
    "bytes_read_per_step": "bytes read per step",
    "decode_vs_full": "decode time relative to full attention (timed alternately)",
}
"""Costs, other than the budget, at which methods are compared, with their names."""

ScoreAtCost = tuple[float, pd.DataFrame | None]
"""A score, and the scores of the samples behind it where they are known."""

_FINEST = 16
"""Most levels per factor of two in cost."""
_FEWEST, _MOST = 4, 6
"""Fewest and most levels of a table; fewer where ``_FINEST`` allows no more."""


def levels(ranges: Sequence[tuple[float, float]]) -> list[float]:
    """Return costs that at least two methods reach: powers of two, or of a root of two if few are.

    Args:
        ranges: Each method's lowest and highest cost.
    """

    def reached(cost: float) -> int:
        return sum(low <= cost <= high for low, high in ranges)

    found: list[float] = []
    parts = 1
    while len(found) < _FEWEST and parts <= _FINEST and ranges:
        first = math.floor(parts * math.log2(min(low for low, _ in ranges)))
        last = math.ceil(parts * math.log2(max(high for _, high in ranges)))
        steps = (2.0 ** (place / parts) for place in range(first, last + 1))
        found = [cost for cost in steps if reached(cost) > 1]
        parts *= 2
    if len(found) > _MOST:  # the ends are kept
        found = [found[round(i * (len(found) - 1) / (_MOST - 1))] for i in range(_MOST)]
    return found


def at_cost(
    points: pd.DataFrame, cost: str, target: float, answers: Mapping[str, pd.DataFrame]
) -> ScoreAtCost | None:
    """Return a method's score at a cost, and the scores of its samples there.

    Args:
        points: Configurations of one method that differ only in their budget.
        cost: Column of the cost.
        target: The cost.
        answers: Samples by configuration, as `Comparison.answers`.

    Returns:
        The score and its samples, the latter None where some are missing; None if the cost lies
        outside the method's range, or below it for a method whose cost is a single point.
    """
    ordered = points.sort_values("k", kind="stable").reset_index(drop=True)
    costs = _non_decreasing_costs(ordered, cost)
    if _is_point(points):
        target = min(target, costs[-1])
    if not len(costs) or not costs[0] <= target <= costs[-1]:
        return None
    below = int(np.searchsorted(costs, target, side="right")) - 1  # of equal costs the last budget
    above = below if costs[below] == target else below + 1
    share = 0.0
    if below != above:
        share = math.log(target / costs[below]) / math.log(costs[above] / costs[below])
    first, second = ordered.iloc[below], ordered.iloc[above]
    score = (1 - share) * float(first["score"]) + share * float(second["score"])
    pools = [answers.get(str(one["configuration_id"])) for one in (first, second)]
    if pools[0] is None or pools[1] is None:
        return score, None
    if below == above:
        return score, pools[0]
    both = stats.pair(pools[0], pools[1])
    if len(both) != len(pools[0]):
        return score, None
    return score, both.assign(score=(1 - share) * both["score"] + share * both["other"])


def _is_point(points: pd.DataFrame) -> bool:
    """Return whether a method reads the same number of bytes at each of several budgets."""
    return points["k"].nunique() > 1 and points["bytes_read_per_step"].nunique() == 1


def _non_decreasing_costs(points: pd.DataFrame, cost: str) -> NDArray[np.float64]:
    """Return a method's costs by increasing budget, each at least that of the budget before."""
    costs = points.sort_values("k", kind="stable")[cost].to_numpy(dtype=float)
    if _is_point(points):
        return np.full(len(costs), np.median(costs))
    return np.maximum.accumulate(costs)


def matched_table(
    configurations: pd.DataFrame, cost: str, answers: Mapping[str, pd.DataFrame]
) -> Table | None:
    """Return a table of each method's score at costs that several methods reach.

    Bold, at each cost: the best score and those whose paired difference to it does not exclude 0.
    At equal time, a method with an unsteady time, or one without an interval, is marked and never
    bold.

    Args:
        configurations: `Comparison.overall` of one setting.
        cost: One of ``MATCHED``.
        answers: Samples by configuration.

    Returns:
        None if no method has two or more costs, or there is no other to compare it with.
    """
    data = configurations[
        configurations["k"].notna() & configurations["score"].notna() & (configurations[cost] > 0)
    ]
    curves = [
        part
        for _, part in data.groupby(["label", "rbit"], sort=False, dropna=False)
        if part[cost].nunique() > 1 or _is_point(part)
    ]
    divisor = METRICS[cost].divisor
    ranges = [
        (costs[0], costs[-1])
        for costs in (_non_decreasing_costs(part, cost) / divisor for part in curves)
    ]
    highest = max((high for _, high in ranges), default=0.0)
    ranges = [
        (low, highest if _is_point(part) else high)
        for (low, high), part in zip(ranges, curves, strict=True)
    ]
    grid = levels(ranges)
    if not grid or all(map(_is_point, curves)):
        return None
    widths = data["rbit"].nunique()
    rows: list[list[str]] = []
    found: list[list[ScoreAtCost | None]] = []
    rivals: list[int] = []
    shown: list[pd.DataFrame] = []
    for part in curves:
        configuration = part.iloc[0]
        known = [at_cost(part, cost, level * divisor, answers) for level in grid]
        if not any(known):  # between two of these costs, or above all of them
            continue
        name = str(configuration["label"])
        if widths > 1 and not pd.isna(configuration["rbit"]):
            name += f", {configuration['rbit']} bits"
        marks = ""
        if cost in RATIOS:
            marks += NO_INTERVAL if lacks_interval(part).any() else ""
            marks += UNSTEADY if is_unsteady(part).any() else ""
            shown.append(part)
        if configuration["method"] not in BASELINES and not marks:
            rivals.append(len(rows))
        rows.append([name + marks, *(_text(one) for one in known)])
        found.append(known)
    strong = {(i, 1 + j) for j in range(len(grid)) for i in _best({i: found[i][j] for i in rivals})}
    unit = METRICS[cost].unit
    heads = ["Method", *(f"{format(level, METRICS[cost].format)} {unit}".strip() for level in grid)]
    notes = timing_notes(pd.concat(shown)) if shown else []
    return Table(heads, rows, strong, notes=notes)


def _text(found: ScoreAtCost | None) -> str:
    if found is None:
        return "–"
    score, samples = found
    if samples is None:
        return METRICS["score"].text(score)
    samples = stats.independent(samples)
    known = stats.score_interval(samples["score"], samples["subtask"])
    estimate, low, high = (METRICS["score"].text(one) for one in known[:3])
    return f"{estimate} [{low}, {high}]"


def _best(found: Mapping[int, ScoreAtCost | None]) -> list[int]:
    """Return the best and those not significantly below it; none if that would be all."""
    reached = {i: one for i, one in found.items() if one is not None}
    if len(reached) < 2:
        return []
    top = max(reached, key=lambda i: reached[i][0])
    tied = [
        i for i in reached if i == top or not _differ_significantly(reached[top][1], reached[i][1])
    ]
    return tied if len(tied) < len(reached) else []


def _differ_significantly(first: pd.DataFrame | None, other: pd.DataFrame | None) -> bool:
    if first is None or other is None:
        return False
    pairs = stats.independent(stats.pair(first, other))
    return len(pairs) > 0 and (
        stats.paired_interval(pairs["score"], pairs["other"], pairs["subtask"]).excludes_zero
    )
