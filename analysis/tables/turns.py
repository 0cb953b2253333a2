"""Scores turn by turn, where several questions are asked about one document."""

from __future__ import annotations

import pandas as pd

from topkbench.analysis.comparison.stats import MEAN
from topkbench.analysis.tables.table import Table, whole, with_interval


def turn_table(configurations: pd.DataFrame) -> Table | None:
    """Return each configuration's score by turn, and the change since the first turn.

    Args:
        configurations: Configurations of one setting, sub-tasks included.

    Returns:
        None if no change was measured.
    """
    later = configurations[configurations["turn_change"].notna()]
    if not len(later):
        return None
    data = configurations[
        (configurations["subtask"] != MEAN)
        & configurations["configuration_id"].isin(later["configuration_id"])
    ]
    turns = list(dict.fromkeys(data["subtask"]))
    changing = [turn for turn in turns if turn in set(later["subtask"])]
    heads = ["Method", "k", "rbit", *(f"{turn} (0–100)" for turn in turns)]
    heads += [f"{turns[0]} to {turn} (points)" for turn in changing]
    rows = []
    for _, part in data.groupby("configuration_id", sort=False):
        cells = [str(part["label"].iloc[0]), whole(part["k"].iloc[0]), whole(part["rbit"].iloc[0])]
        scores = dict(zip(part["subtask"], with_interval(part, "score"), strict=True))
        changes = dict(zip(part["subtask"], with_interval(part, "turn_change"), strict=True))
        cells += [scores.get(turn, "–") for turn in turns]
        rows.append([*cells, *(changes.get(turn, "–") for turn in changing)])
    return Table(heads, rows)
