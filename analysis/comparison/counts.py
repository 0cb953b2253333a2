"""On how many samples or prompts numbers were measured, in words.

Answers are scored on all samples; selections and times are measured on a few prompts among them.
"""

from __future__ import annotations

import pandas as pd

COUNTS = {
    "scores": (("score",), "n", "sample"),
    "likelihoods": (("nll", "nll_delta", "kl_full", "top1_agreement"), "n", "window"),
    "selection quality": (
        ("recall_at_k", "attention_mass", "output_rel_error"),
        "judged_prompts",
        "prompt",
    ),
    "times": (
        ("decode_ms_p50", "decode_vs_full", "tokens_per_s"),
        "timed_prompts",
        "prompt",
    ),
}
"""What is measured: its columns, the column of the number it was measured on, and of what."""


def counted(column: str) -> tuple[str, ...]:
    """Return the column that counts what a column was measured on, or nothing."""
    return tuple(count for columns, count, _ in COUNTS.values() if column in columns)


def measured_on(data: pd.DataFrame) -> str:
    """Return on how many samples or prompts the numbers of a table or figure were measured.

    What was measured on an unknown number, as in older rows, is left out.

    Args:
        data: Any of the columns of ``COUNTS``, with those that count.

    Returns:
        One sentence such as "n = 175 samples.", or "" if no number is known.
    """
    found = {}
    kinds = 0
    for kind, (columns, count, noun) in COUNTS.items():
        shown = data[[name for name in columns if name in data]].notna().any(axis=1)
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
