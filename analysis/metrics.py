"""Metrics as data: what a column is called, its unit, which way is better, how it is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How one column of the row is shown."""

    label: str
    """Words for an axis or a heading, without the unit."""
    unit: str = ""
    """Unit of the shown value, empty for a plain ratio or count."""
    better: Literal["higher", "lower"] | None = None
    """Which way is better; None where neither is."""
    format: str = ".1f"
    """Format of the shown value."""
    scale: Literal["linear", "log"] = "linear"
    """Scale of an axis."""
    divisor: float = 1.0
    """The column's value divided by this is the shown value."""

    @property
    def axis(self) -> str:
        """The label with its unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def text(self, value: Any) -> str:
        """Return the shown value as text, a dash where there is none."""
        if value is None or pd.isna(value):
            return "–"
        text = format(value / self.divisor, self.format)
        # What rounds to zero has no sign: "-0.0" would read as a loss.
        return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


MIB = 2.0**20

METRICS: dict[str, Metric] = {
    "score": Metric(label="Score", unit="0–100", better="higher"),
    "delta_full": Metric(
        label="Difference to full attention", unit="points", better="higher", format="+.1f"
    ),
    "recall_at_k": Metric(label="Recall@k", better="higher", format=".3f"),
    "attention_mass": Metric(label="Attention mass kept", better="higher", format=".3f"),
    "output_rel_error": Metric(
        label="Relative output error", better="lower", format=".3f", scale="log"
    ),
    "density": Metric(label="Density (fraction of tokens read)", better="lower", format=".3f"),
    "prefill_ms": Metric(label="Prefill", unit="ms", better="lower", scale="log"),
    "build_ms": Metric(label="Index build", unit="ms", better="lower", format=".2f", scale="log"),
    "decode_ms_p50": Metric(
        label="Decode step, median", unit="ms", better="lower", format=".3g", scale="log"
    ),
    "full_ms_p50": Metric(
        label="Full attention's step, timed in turn", unit="ms", better="lower", format=".3g"
    ),
    "decode_ms_warm_p50": Metric(
        label="Decode step, warm", unit="ms", better="lower", format=".3g", scale="log"
    ),
    "encode_ms": Metric(label="Encode", unit="ms", better="lower", format=".3g"),
    "append_ms": Metric(label="Append", unit="ms", better="lower", format=".3g"),
    "score_ms": Metric(label="Score", unit="ms", better="lower", format=".3g"),
    "select_ms": Metric(label="Select", unit="ms", better="lower", format=".3g"),
    "attend_ms": Metric(label="Attend", unit="ms", better="lower", format=".3g"),
    "tokens_per_s": Metric(label="Throughput", unit="tokens/s", better="higher", scale="log"),
    "speedup_vs_full": Metric(label="Speed-up over full", unit="×", better="higher", format=".2f"),
    "decode_vs_full": Metric(
        label="Decode time, times full attention's (timed in turn)",
        better="lower",
        format=".3g",
        scale="log",
    ),
    "bytes_read_per_step": Metric(
        label="Read per decode step",
        unit="MiB",
        better="lower",
        format=".3g",
        scale="log",
        divisor=MIB,
    ),
    "index_bytes_per_token": Metric(
        label="Side information", unit="bytes/token", better="lower", format=".4g", scale="log"
    ),
    "kv_cache_mib": Metric(
        label="Keys and values held", unit="MiB", better="lower", format=".3g", scale="log"
    ),
    "peak_memory_mib": Metric(label="Peak memory", unit="MiB", better="lower", scale="log"),
    "bandwidth_fraction": Metric(
        label="Memory bandwidth reached",
        unit="% of measured",
        better="higher",
        format=".0f",
        divisor=0.01,
    ),
    "fit_s": Metric(label="Fit", unit="s", better="lower", format=".3g", scale="log"),
    "loss_first": Metric(label="First loss", better="lower", format=".4g"),
    "loss_last": Metric(label="Last loss", better="lower", format=".4g"),
    "step": Metric(label="Step of the training", format=".0f"),
    "loss": Metric(label="Training loss", better="lower", format=".4g", scale="log"),
    "k": Metric(label="Budget k", unit="tokens kept per KV head", format=".0f", scale="log"),
    "rbit": Metric(label="Hash bits, rbit", unit="bits per key", format=".0f", scale="log"),
    "batch_size": Metric(label="Batch size", format=".0f", scale="log"),
    "kv_len": Metric(label="Context length", unit="cached tokens", format=".0f", scale="log"),
}
"""Every column that a table or a figure shows."""

STAGES = ("encode_ms", "append_ms", "score_ms", "select_ms", "attend_ms")
"""The parts of a decode step in the order they run."""
