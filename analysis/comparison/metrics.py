"""Metrics: how each number that a table or a figure shows is written and drawn."""

from __future__ import annotations

from topkbench.analysis.record.column import Curve, Metric
from topkbench.analysis.record.row import DECLARED, MIB

__all__ = ["CURVES", "METRICS", "MIB", "STAGES", "Metric", "ends_of"]

METRICS: dict[str, Metric] = {
    **{name: one for name, one in DECLARED.items() if one.label},
    "decode_vs_full": Metric(
        label="Decode time relative to full attention (timed alternately)",
        better="lower",
        format=".3g",
        scale="log",
        curve=Curve(
            "decode",
            "Decode latency",
            "Relative to full attention, timed alternately with each method; bars: 95% intervals "
            "over pairs.",
        ),
    ),
    "step": Metric(label="Training step", format=".0f"),
    "loss": Metric(label="Training loss", better="lower", format=".4g", scale="log"),
}
"""The columns of the row that have a label, and what is derived from rows and samples."""

CURVES: dict[str, Curve] = {
    name: metric.curve for name, metric in METRICS.items() if metric.curve is not None
}
"""The metrics that are drawn over the budget or the hash bits, in the order of the figures."""


def ends_of(name: str) -> tuple[str, str]:
    """Return the columns with the ends of a metric's 95% interval, which need not exist."""
    return METRICS[name].ends or (f"{name}_ci_low", f"{name}_ci_high")


STAGES = ("encode_ms", "append_ms", "score_ms", "select_ms", "attend_ms")
"""The stages of a decode step in the order in which they run."""
