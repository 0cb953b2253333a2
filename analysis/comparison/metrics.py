"""Metrics: the label, unit, better direction, number format and axis scale of each column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How one column of a row is shown."""

    label: str
    """Label of an axis or a heading, without the unit."""
    unit: str = ""
    """Unit of the shown value, empty for a ratio or a count."""
    better: Literal["higher", "lower"] | None = None
    """Whether higher or lower is better; None if neither is."""
    format: str = ".1f"
    """Format of the shown value."""
    scale: Literal["linear", "log"] = "linear"
    """Scale of an axis."""
    divisor: float = 1.0
    """Divisor that turns the column's value into the shown value."""

    @property
    def axis(self) -> str:
        """The label with its unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def text(self, value: Any) -> str:
        """Return the shown value as text, a dash for a missing one."""
        if value is None or pd.isna(value):
            return "–"
        text = format(value / self.divisor, self.format)
        # A value that rounds to zero gets no sign: "-0.0" would read as a loss.
        return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


MIB = 2.0**20

METRICS: dict[str, Metric] = {
    "score": Metric(label="Score", unit="0–100", better="higher"),
    "delta_full": Metric(
        label="Difference to full attention", unit="points", better="higher", format="+.1f"
    ),
    "nll": Metric(label="Negative log-likelihood", unit="nats/token", better="lower", format=".4f"),
    "nll_delta": Metric(
        label="Loss over full attention", unit="nats/token", better="lower", format="+.4f"
    ),
    "kl_full": Metric(
        label="KL divergence from full attention",
        unit="nats/token",
        better="lower",
        format=".4f",
        scale="log",
    ),
    "top1_agreement": Metric(
        label="Same likeliest next token as full attention", better="higher", format=".3f"
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
        label="Full attention's step, timed alternately", unit="ms", better="lower", format=".3g"
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
        label="Decode time relative to full attention (timed alternately)",
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
        label="KV cache in memory", unit="MiB", better="lower", format=".3g", scale="log"
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
    "step": Metric(label="Training step", format=".0f"),
    "loss": Metric(label="Training loss", better="lower", format=".4g", scale="log"),
    "k": Metric(label="Budget k", unit="tokens kept per KV head", format=".0f", scale="log"),
    "rbit": Metric(label="Hash bits, rbit", unit="bits per key", format=".0f", scale="log"),
    "batch_size": Metric(label="Batch size", format=".0f", scale="log"),
    "kv_len": Metric(label="Context length", unit="cached tokens", format=".0f", scale="log"),
}
"""All columns that a table or a figure shows."""

STAGES = ("encode_ms", "append_ms", "score_ms", "select_ms", "attend_ms")
"""The stages of a decode step in the order in which they run."""
