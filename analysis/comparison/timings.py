"""Format times and speed-ups with their intervals, and mark those that are unreliable.

A speed-up compares a step with full attention timed alternately with it, never with another row's
time; its interval is over those pairs. Unsteady times are marked at each number and explained under
the table, and are never bold or on a Pareto front.
"""

from __future__ import annotations

import pandas as pd

from topkbench.analysis.comparison.metrics import METRICS, ends_of
from topkbench.analysis.record.row import DECLARED, SPEED_COLUMNS

NO_INTERVAL, UNSTEADY = "†", "‡"
RATIOS = ("speedup_vs_full", "decode_vs_full")
"""Columns that compare a step with full attention, with an interval."""
TIMED = (
    *(name for name in SPEED_COLUMNS if DECLARED[name].pooled == "median"),
    "decode_vs_full",
)
"""Columns of times, which are marked if they are unsteady."""
AGAIN = (
    "the same command reuses them, and with force=true measures its cells again, best on an idle "
    "machine"
)
"""What to do about unsteady times."""
_MOST_NAMED = 8
"""Largest number of unsteady configurations named under a table."""


def is_unsteady(configurations: pd.DataFrame) -> pd.Series:
    """Return for each configuration whether its times are unreliable."""
    return configurations["timing_note"].notna()


def lacks_interval(configurations: pd.DataFrame) -> pd.Series:
    """Return for each configuration whether it has a speed-up without an interval."""
    return configurations["speedup_vs_full"].notna() & configurations["speedup_ci_low"].isna()


def timed_text(configurations: pd.DataFrame, name: str) -> list[str]:
    """Return a column of ``TIMED`` as text, each number with its interval and marks."""
    text = METRICS[name].text
    cells = [text(value) for value in configurations[name]]
    if name in RATIOS:
        low, high = (configurations[end] for end in ends_of(name))
        ends = [
            "" if pd.isna(one) else f" [{text(one)}, {text(two)}]"
            for one, two in zip(low, high, strict=True)
        ]
        without = (NO_INTERVAL if lacks else "" for lacks in lacks_interval(configurations))
        cells = ["".join(parts) for parts in zip(cells, ends, without, strict=True)]
    return [
        cell + (UNSTEADY if unsteady and not pd.isna(value) else "")
        for cell, value, unsteady in zip(
            cells, configurations[name], is_unsteady(configurations), strict=True
        )
    ]


def timing_notes(configurations: pd.DataFrame) -> list[str]:
    """Return the meaning of the marks that occur, one sentence each."""
    notes = []
    if lacks_interval(configurations).any():
        notes.append(
            f"{NO_INTERVAL} No interval was recorded: the row is older than intervals, or too few "
            "pairs were timed."
        )
    unsteady = configurations[is_unsteady(configurations)].drop_duplicates(
        ["configuration_id", "timing_note"]
    )
    for _, configuration in unsteady.head(_MOST_NAMED).iterrows():
        notes.append(
            f"{UNSTEADY} Unsteady, not to be quoted: {_description(configuration)}: "
            f"{configuration.timing_note}."
        )
    if len(unsteady) > _MOST_NAMED:
        more = len(unsteady) - _MOST_NAMED
        notes.append(f"{UNSTEADY} So are {more} more; the column timing_note says why.")
    if len(unsteady):
        notes.append(f"{UNSTEADY} {AGAIN[0].upper()}{AGAIN[1:]}.")
    return notes


def _description(configuration: pd.Series) -> str:
    words = [str(configuration["label"])]
    if not pd.isna(configuration["kv_len"]):
        words.append(f"{configuration['kv_len']:,} tokens")
    for name in ("k", "rbit"):
        if not pd.isna(configuration[name]):
            words.append(f"{name}={configuration[name]}")
    if not pd.isna(configuration["batch_size"]) and configuration["batch_size"] != 1:
        words.append(f"batch {configuration['batch_size']}")
    return ", ".join(words)


def figure_words(configurations: pd.DataFrame, of_ratios: bool) -> str:
    """Return the meaning of a figure's marks for its caption, with a leading space; else "".

    Args:
        configurations: The configurations that the figure shows.
        of_ratios: Whether it shows times relative to full attention, with intervals.
    """
    words = ""
    if of_ratios and lacks_interval(configurations).any():
        words += f" {NO_INTERVAL} or without a bar: no interval was recorded."
    if is_unsteady(configurations).any():
        words += f" Hollow or {UNSTEADY}: unsteady times, not to be quoted; {AGAIN}."
    return words
