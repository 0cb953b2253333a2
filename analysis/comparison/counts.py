"""On how many samples or prompts numbers were measured, in words.

Answers are scored on all samples; selections and times are measured on a few prompts among them.
"""

from __future__ import annotations

import pandas as pd

from topkbench.analysis.record.row import DECLARED

COUNTS = {
    "scores": ("n", "sample"),
    "likelihoods": ("n", "window"),
    "selection quality": ("judged_prompts", "prompt"),
    "times": ("timed_prompts", "prompt"),
}
"""What is measured: the column of the number it was measured on, and of what."""


def _columns(kind: str) -> tuple[str, ...]:
    """Return the columns that are measured on the same samples or prompts."""
    derived = ("decode_vs_full",) if kind == "times" else ()
    return (*(name for name, one in DECLARED.items() if one.measured_on == kind), *derived)


def counted(column: str) -> tuple[str, ...]:
    """Return the column that counts what a column was measured on, or nothing."""
    return tuple(count for kind, (count, _) in COUNTS.items() if column in _columns(kind))


def measured_on(data: pd.DataFrame) -> str:
    """Return on how many samples or prompts the numbers of a table or figure were measured.

    What was measured on an unknown number, as in older rows, is left out.

    Args:
        data: Any columns that say what they are measured on, with those that count.

    Returns:
        One sentence such as "n = 175 samples.", or "" if no number is known.
    """
    found = {}
    kinds = 0
    for kind, (count, noun) in COUNTS.items():
        shown = data[[name for name in _columns(kind) if name in data]].notna().any(axis=1)
        if not shown.any():
            continue
        kinds += 1
        numbers = data.loc[shown, count] if count in data else pd.Series(dtype=float)
        if len(numbers) and numbers.notna().all():
            low, high = int(numbers.min()), int(numbers.max())
            number = f"{low}" if low == high else f"{low} to {high}"
            found[kind] = f"n = {number} {noun}{'' if high == 1 else 's'}"
    words = [words if kinds == 1 else f"{kind}: {words}" for kind, words in found.items()]
    text = "; ".join(words)
    return f"{text[0].upper() if kinds > 1 else text[0]}{text[1:]}." if words else ""
