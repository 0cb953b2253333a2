"""How a column of the row is declared, beside its type and its meaning: once, where the row is.

Everything that shows a column reads its declaration: tables, figures, W&B, the search's objectives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a number is shown."""

    label: str = ""
    """Label of an axis or a heading, without the unit; empty for what is only recorded."""
    unit: str = ""
    """Unit of the shown value, empty for a ratio or a count."""
    better: Literal["higher", "lower"] | None = None
    """Whether higher or lower is better; None if neither is."""
    format: str = ".1f"
    """Format of the shown value."""
    scale: Literal["linear", "log", "symlog"] = "linear"
    """Scale of an axis; symlog for what differs by orders of magnitude on either side of 0."""
    divisor: float = 1.0
    """Divisor that turns the column's value into the shown value."""
    most: float | None = None
    """Largest possible value, where the smallest is 0: an axis then shows no more."""
    ends: tuple[str, str] | None = None
    """Columns with the ends of its 95% interval; None for ``NAME_ci_low`` and ``NAME_ci_high``,
    where there are any."""
    curve: Curve | None = None
    """The figures that draw it over the budget or the hash bits; None for no figure."""

    @property
    def axis(self) -> str:
        """The label with its unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def text(self, value: Any) -> str:
        """Return the shown value as text, a dash for a missing one."""
        try:
            number = float(value)
        except TypeError:  # None, or pandas' own missing value
            return "–"
        if math.isnan(number):
            return "–"
        text = format(number / self.divisor, self.format)
        if "e+" in text:  # three digits are written without an exponent
            return f"{number / self.divisor:,.0f}".replace("-", "−")
        # A value that rounds to zero gets no sign: "-0.0" would read as a loss.
        return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


@dataclass(frozen=True)
class Curve:
    """The figures that draw a number over another column.

    Attributes:
        name: Beginning of the files' names: ``recall`` for ``recall_vs_k``.
        title: What is drawn, in words, without the axis it is drawn over.
        reading: How to read the figure, one sentence.
        over: The columns it is drawn over.
        of_full: What full attention is drawn at: its measured value; 0 for a difference to it; None
            if it says nothing of it, as the share of its own selection that it found.
    """

    name: str
    title: str
    reading: str
    over: tuple[Literal["k", "rbit"], ...] = ("k", "rbit")
    of_full: Literal["measured", 0] | None = "measured"


Kind = Literal["fact", "result", "paired", "speed"]
"""What a column says: a name, a setting or a count; what came out; what `stats.paired_columns` and
`stats.window_columns` compute from the samples; a time and what is derived from it. All but facts
are empty unless a row's status is ok."""


@dataclass(frozen=True, kw_only=True)
class Column(Metric):
    """What is declared of one column of the row."""

    kind: Kind = "fact"
    pooled: Literal["mean", "median"] | None = None
    """How rows that differ only in their seed become one; None for what is not pooled."""
    interval: Literal["seeds", "windows"] | None = None
    """Over what the interval of the pooled value is: Student's over seeds, which rows do not
    record, or that of the windows of text, which they do (``NAME_ci_low``, ``NAME_ci_high``)."""
    head: str = ""
    """Heading in a report's table, without the unit; empty for what the table does not show."""
    minor: bool = False
    """Whether a terminal leaves the column out, and a page shows it only if it is asked for."""
    measured_on: str = ""
    """Name of what it is measured on, of `comparison.counts.COUNTS`; empty if that is not said."""
    tracked: bool = False
    """Whether W&B's summary has it for each row of a cell, not only for the mean."""


def column(**declared: Any) -> Any:
    """Return a field of the row, None by default, with the attributes of `Column` as declared."""
    return field(default=None, metadata={"column": Column(**declared)})
