"""Means over the sub-tasks that full attention answers.

Where full attention itself fails, a difference to it says nothing of a method, and a mean that
contains such sub-tasks hides what the others show.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from topkbench.analysis import stats
from topkbench.analysis.metrics import METRICS
from topkbench.analysis.stats import MEAN
from topkbench.analysis.tables import Table, whole, with_interval

ANSWERED = 50.0
"""The lowest score of full attention on a sub-task that counts as answered, 0 to 100."""


def answered_table(
    configurations: pd.DataFrame, answers: Mapping[str, pd.DataFrame]
) -> Table | None:
    """Return each configuration's mean over the sub-tasks that full attention answers.

    Args:
        configurations: Configurations of one setting, sub-tasks included.
        answers: The scored samples of each configuration, as in `Comparison.answers`.

    Returns:
        None if full attention answers all sub-tasks, or none, or was not run.
    """
    data = configurations[(configurations["subtask"] != MEAN) & configurations["score"].notna()]
    full = data[data["method"] == "full"]
    if not len(full):
        return None
    full = full[full["configuration_id"] == full["configuration_id"].iloc[0]]
    scores = full.set_index("subtask")["score"]
    kept = [str(one) for one in scores.index[scores >= ANSWERED]]
    left = scores[scores < ANSWERED]
    if not kept or not len(left):
        return None
    pool = answers.get(str(full["configuration_id"].iloc[0]))
    records = []
    for identity, part in data.groupby("configuration_id", sort=False):
        own = answers.get(str(identity))
        if not set(kept) <= set(part["subtask"]) or own is None:
            continue
        is_full = part["method"].iloc[0] == "full"
        found = stats.paired_columns(
            own[own["subtask"].isin(kept)],
            None if pool is None or is_full else pool[pool["subtask"].isin(kept)],
        )[MEAN]
        records.append({**part.iloc[0][["label", "k", "rbit"]], **found})
    if not records:
        return None
    means = pd.DataFrame.from_records(records)
    rows = zip(
        map(str, means["label"]),
        map(whole, means["k"]),
        map(whole, means["rbit"]),
        with_interval(means, "score", "score_ci"),
        with_interval(means, "delta_full", "delta_ci"),
        strict=True,
    )
    names = ", ".join(f"{name} ({METRICS['score'].text(score)})" for name, score in left.items())
    return Table(
        head=["Method", "k", "rbit", "Score (0–100)", "Δ full (points)"],
        rows=[list(row) for row in rows],
        notes=[
            f"Means of {', '.join(kept)}. Left out, since full attention scores below"
            f" {ANSWERED:.0f} there: {names}."
        ],
    )
