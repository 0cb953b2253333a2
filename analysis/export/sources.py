"""The papers of methods and benchmarks as BibTeX; ``sources.bib`` has all of them."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pandas as pd

FILE = Path(__file__).with_name("sources.bib")

BENCHMARKS = (
    ("ruler", "ruler", ""),
    ("ruler", "ruler_words", ""),  # our prompts are in its manner
    ("longbench", "lm_eval", "longbench_"),
    ("longbench2", "lm_eval", "longbench2"),
    ("infinitebench", "lm_eval", "infinitebench_"),
    ("babilong", "lm_eval", "babilong"),
    ("gsm8k", "lm_eval", "gsm8k"),
    ("math", "lm_eval", "hendrycks_math"),
    ("math", "lm_eval", "math500"),
)
"""Name of a benchmark's entry, the task that asks it, and how names of its sub-tasks begin."""


@functools.cache
def entries() -> dict[str, str]:
    """Return all entries by name; that of a method has the method's name."""
    text = FILE.read_text(encoding="utf-8")
    return {found[1]: found[0] for found in re.finditer(r"^@\w+\{(\w+),.*?^\}", text, re.M | re.S)}


def cited(rows: pd.DataFrame) -> dict[str, str]:
    """Return the entries of the methods and benchmarks that appear in rows."""
    names = set(rows["method"])
    for name, task, beginning in BENCHMARKS:
        asked = rows.loc[rows["task"] == task, "subtask"]
        if asked.str.startswith(beginning).any():
            names.add(name)
    return {name: text for name, text in entries().items() if name in names}
