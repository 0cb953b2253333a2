"""How long generated answers are, and what was found among prompt and answer apart."""

from __future__ import annotations

import pandas as pd

from topkbench.analysis.tables.table import Table, whole, with_interval

LONG = 64
"""Answers of fewer tokens on average are no long ones, and say nothing of their length."""

_COLUMNS = (
    ("generated_tokens", "Generated (tokens)"),
    ("generated_delta", "Over full (tokens)"),
    ("cut_off_share", "Cut off (%)"),
    ("cut_off_delta", "Over full (points)"),
    ("delta_full", "Δ full (points)"),
    ("recall_at_k", "Recall@k"),
    ("recall_prompt", "of the prompt's tokens"),
    ("recall_generated", "of the generated"),
)


def length_table(configurations: pd.DataFrame) -> Table | None:
    """Return how long the answers are, one row per configuration; None without long answers.

    Args:
        configurations: `Comparison.overall` of one setting.
    """
    data = configurations[configurations["generated_tokens"].notna()]
    if not len(data) or data["generated_tokens"].max() < LONG:
        return None
    heads, cells = ["Method"], [[str(one) for one in data["label"]]]
    for name in ("k", "rbit"):
        if data[name].notna().any():
            heads.append(name)
            cells.append([whole(one) for one in data[name]])
    for name, head in _COLUMNS:
        if data[name].notna().any():
            heads.append(head)
            cells.append(with_interval(data, name))
    return Table(heads, [list(row) for row in zip(*cells, strict=True)])
