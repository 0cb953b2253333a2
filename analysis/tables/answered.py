"""Means over the sub-tasks that full attention answers.

Where full attention itself fails, a difference to it says nothing of a method, and a mean that
contains such sub-tasks hides what the others show.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from topkbench.analysis.comparison import stats
from topkbench.analysis.comparison.metrics import METRICS
from topkbench.analysis.comparison.stats import MEAN
from topkbench.analysis.tables.table import Table, whole, with_interval

_HEAD = ["Method", "k", "rbit", "Score (0–100)", "Δ full (points)"]
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
        None if full attention answers all sub-tasks, or was not run, or there are no samples.
    """
    data = configurations[(configurations["subtask"] != MEAN) & configurations["score"].notna()]
    full = data[data["method"] == "full"]
    if not len(full):
        return None
    full = full[full["configuration_id"] == full["configuration_id"].iloc[0]]
    scores = full.set_index("subtask")["score"]
    kept = [str(one) for one in scores.index[scores >= ANSWERED]]
    left = scores[scores < ANSWERED]
    if not len(left):
        return None
    names = ", ".join(f"{name} ({METRICS['score'].text(score)})" for name, score in left.items())
    if not kept:
        note = f"Full attention scores below {ANSWERED:.0f} on every sub-task: {names}."
        return Table(_HEAD, [], notes=[note])
    pool = answers.get(str(full["configuration_id"].iloc[0]))
    records, incomplete = [], []
    for identity, part in data.groupby("configuration_id", sort=False):
        own = answers.get(str(identity))
        if own is None:
            continue
        if not set(kept) <= set(part["subtask"]):
            incomplete.append(str(part["label"].iloc[0]))
            continue
        is_full = part["method"].iloc[0] == "full"
        own = own[own["subtask"].isin(kept)]
        others = None if pool is None or is_full else pool[pool["subtask"].isin(kept)]
        try:
            found = stats.paired_columns(own, others)[MEAN]
        except ValueError:  # full attention's have other references: `compare` notes it
            found = stats.paired_columns(own, None)[MEAN]
        records.append({**part.iloc[0][["label", "k", "rbit"]], **found})
    if not records:
        return None
    means = pd.DataFrame.from_records(records)
    rows = zip(
        map(str, means["label"]),
        map(whole, means["k"]),
        map(whole, means["rbit"]),
        with_interval(means, "score"),
        with_interval(means, "delta_full"),
        strict=True,
    )
    notes = [
        f"Means of {', '.join(kept)}. Left out, since full attention scores below {ANSWERED:.0f}"
        f" there: {names}. The other tables and the figures have means of all sub-tasks."
    ]
    if incomplete:
        without = ", ".join(dict.fromkeys(incomplete))
        notes.append(f"Without all of these sub-tasks, and so without such a mean: {without}.")
    return Table(_HEAD, [list(row) for row in rows], notes=notes)
