"""A table of text, for a terminal, Markdown or HTML, and how its cells are written."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from tabulate import tabulate

from topkbench.analysis.comparison.metrics import METRICS, ends_of
from topkbench.analysis.console import visible


@dataclass
class Table:
    """A table of text.

    Attributes:
        head: Column headings, units included.
        rows: Cells as text.
        strong: (row, column) of each bold cell.
        words: Columns of text, aligned to the left; the others are numbers.
        minor: Columns that a terminal leaves out, and a page shows only if they are asked for.
        notes: Sentences under the table, such as the meaning of its marks.
    """

    head: list[str]
    rows: list[list[str]]
    strong: set[tuple[int, int]] = field(default_factory=set)
    words: set[int] = field(default_factory=lambda: {0})
    minor: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the table for a terminal."""
        grid = tabulate(self.rows, self.head, "simple", disable_numparse=True, colalign=self._side)
        return "\n".join([grid, *self.notes])

    def markdown(self) -> str:
        """Return the table in Markdown, ``strong`` cells in bold."""
        rows = [
            [
                f"**{in_markdown(text)}**" if (i, j) in self.strong else in_markdown(text)
                for j, text in enumerate(row)
            ]
            for i, row in enumerate(self.rows)
        ]
        head = [in_markdown(text) for text in self.head]
        grid = tabulate(rows, head, "pipe", disable_numparse=True, colalign=self._side)
        return "\n\n".join([grid, *map(in_markdown, self.notes)])

    @property
    def _side(self) -> list[str] | None:
        # tabulate rejects alignments if there are no rows
        sides = ["left" if j in self.words else "right" for j in range(len(self.head))]
        return sides if self.rows else None


_MARKED = re.compile(r"[\\`*|~]|\](?=[(\[])|(?<![^\W_])_|_(?![^\W_])")
"""Signs that Markdown takes as more than themselves; an underscore inside a word is none."""


def in_markdown(text: object) -> str:
    """Return a text as Markdown that shows it as it is: one line, no tags, links or other marks."""
    line = " ".join(visible(text).split())
    line = re.sub(r"&(?=#?\w+;)", "&amp;", line).replace("<", "&lt;")
    return _MARKED.sub(r"\\\g<0>", line)


def setting(key: dict[str, Any]) -> str:
    """Return a setting in words."""
    words = [f"{key['model']}, {key['task']}"]
    if key.get("length") is not None and not pd.isna(key["length"]):
        words.append(f"{int(key['length']):,} tokens")
    if key.get("prompts"):
        words.append(f"prompts of {key['prompts']}")
    if key.get("question"):
        words.append(f"question={key['question']}")
    if key.get("protocol"):
        words.append(f"protocol={key['protocol']}")
    if key.get("device"):
        words.append(str(key["device"]))
    return ", ".join(words)


def whole(value: Any) -> str:
    """Return a whole number as text."""
    return "–" if pd.isna(value) else f"{int(value)}"


def with_interval(configurations: pd.DataFrame, name: str) -> list[str]:
    """Return a metric's column as text, with intervals where there are any."""
    metric, ends = METRICS[name], ends_of(name)
    if ends[0] not in configurations:
        return [metric.text(one) for one in configurations[name]]
    return [
        metric.text(value) + ("" if pd.isna(low) else f" [{metric.text(low)}, {metric.text(high)}]")
        for value, low, high in zip(
            configurations[name],
            *(configurations[end] for end in ends),
            strict=True,
        )
    ]
