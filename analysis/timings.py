"""Times and speed-ups as text: with their intervals, and with a mark where they do not count.

A speed-up compares a step with the full attention that was timed in turn with it, never with
another row's. Its interval is over those pairs. What a row calls unsteady is marked beside every
number, stands under the table with its reason, and is never bold, on a front or in a headline.
"""

from __future__ import annotations

import pandas as pd

from topkbench.analysis.metrics import METRICS

NO_INTERVAL, UNSTEADY = "†", "‡"
RATIOS = ("speedup_vs_full", "decode_vs_full")
"""Columns that compare a step with full attention's, and have an interval."""
TIMED = ("decode_ms_p50", "decode_ms_warm_p50", "full_ms_p50", "tokens_per_s", *RATIOS)
"""Columns that an unsteady line's mark stands beside."""
_MOST_NAMED = 8
"""Unsteady lines that are named under a table."""


def is_unsteady(lines: pd.DataFrame) -> pd.Series:
    """Return for each line whether its times cannot be relied on."""
    return lines["timing_note"].notna()


def lacks_interval(lines: pd.DataFrame) -> pd.Series:
    """Return for each line whether it has a speed-up without an interval."""
    return lines["speedup_vs_full"].notna() & lines["speedup_ci_low"].isna()


def timed_text(lines: pd.DataFrame, name: str) -> list[str]:
    """Return a column of ``TIMED`` as text: the interval and the marks beside each number."""
    text = METRICS[name].text
    cells = [text(value) for value in lines[name]]
    if name in RATIOS:
        low, high = (lines[f"{interval_of(name)}_{end}"] for end in ("low", "high"))
        ends = [
            "" if pd.isna(one) else f" [{text(one)}, {text(two)}]"
            for one, two in zip(low, high, strict=True)
        ]
        without = (NO_INTERVAL if lacks else "" for lacks in lacks_interval(lines))
        cells = ["".join(parts) for parts in zip(cells, ends, without, strict=True)]
    return [
        cell + (UNSTEADY if unsteady and not pd.isna(value) else "")
        for cell, value, unsteady in zip(cells, lines[name], is_unsteady(lines), strict=True)
    ]


def interval_of(name: str) -> str:
    """Return what the columns of a ratio's interval begin with."""
    return {"speedup_vs_full": "speedup_ci", "decode_vs_full": "decode_vs_full_ci"}[name]


def timing_notes(lines: pd.DataFrame) -> list[str]:
    """Return what the marks beside some lines' numbers mean, one sentence each; none if unused."""
    notes = []
    if lacks_interval(lines).any():
        notes.append(
            f"{NO_INTERVAL} No interval was recorded: the row is older than intervals, or too few "
            "pairs were timed."
        )
    unsteady = lines[is_unsteady(lines)].drop_duplicates(["line", "timing_note"])
    for _, line in unsteady.head(_MOST_NAMED).iterrows():
        notes.append(f"{UNSTEADY} Unsteady, not to be quoted: {_named(line)}: {line.timing_note}.")
    if len(unsteady) > _MOST_NAMED:
        more = len(unsteady) - _MOST_NAMED
        notes.append(f"{UNSTEADY} So are {more} more; the column timing_note says why.")
    return notes


def _named(line: pd.Series) -> str:
    words = [str(line["label"])]
    if not pd.isna(line["kv_len"]):
        words.append(f"{line['kv_len']:,} tokens")
    for name in ("k", "rbit"):
        if not pd.isna(line[name]):
            words.append(f"{name}={line[name]}")
    if not pd.isna(line["batch_size"]) and line["batch_size"] != 1:
        words.append(f"batch {line['batch_size']}")
    return ", ".join(words)


def figure_words(lines: pd.DataFrame, of_ratios: bool) -> str:
    """Return what a caption of a figure of times adds, with a leading space; nothing if nothing.

    Args:
        lines: What the figure shows.
        of_ratios: Whether it shows times in full attention's, whose intervals it draws.
    """
    words = ""
    if of_ratios and lacks_interval(lines).any():
        words += f" {NO_INTERVAL} or without a bar: no interval was recorded."
    if is_unsteady(lines).any():
        words += f" Hollow or {UNSTEADY}: unsteady times, not to be quoted."
    return words
