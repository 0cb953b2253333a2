"""Write rows, one by one, in the form that ``topkbench.analysis.report`` reads."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from topkbench.kernels.timing import Timing, speed_columns

COLUMNS = (
    *("run_id", "status", "reason", "model", "task", "subtask", "length", "method", "impl"),
    *("full_backend", "k", "kv_len", "batch_size", "rbit", "seed"),
    *("decode_ms_p50", "decode_ms_p20", "decode_ms_p80"),
    *("full_ms_p50", "full_ms_p20", "full_ms_p80", "speedup_vs_full"),
    *("speedup_ci_low", "speedup_ci_high", "other_load", "timing_note"),
    *("bytes_read_per_step", "bandwidth_fraction", "bandwidth_gb_s"),
    *("device", "clock_mhz", "driver", "torch", "numba", "triton", "git_commit"),
    *("git_dirty", "started_at"),
    *("p_dtype", "p_head_dim", "p_group", "p_use_norm"),
)
_IDENTITY = (
    *("model", "task", "subtask", "method", "batch_size", "k", "rbit", "device", "p_dtype"),
    *("p_use_norm", "p_head_dim", "p_group"),
)


class DeviceLost(Exception):
    """The device answers every call with an error, so the process cannot go on."""


def time_columns(
    step: Timing, full: Timing | None, needed: int, bandwidth: float
) -> dict[str, Any]:
    """Return the speed columns of a step, which may be timed in turn with full attention.

    Args:
        step: The step's times.
        full: Full attention's times; None for full attention itself, and for an operator.
        needed: Bytes that the step must move, over the whole batch.
        bandwidth: The memory's bandwidth in GB/s (1e9 bytes per second).
    """
    columns = speed_columns(step.turns, None if full is None else full.turns)
    if full is None:  # nothing was timed in turn with it
        columns = {name: value for name, value in columns.items() if not name.startswith("full_ms")}
    columns["bandwidth_fraction"] = needed / step.p50_ms / 1e6 / bandwidth
    return columns | {"bandwidth_gb_s": bandwidth}


def speedup(row: Mapping[str, Any]) -> str:
    """Return a row's speed-up, with its 95% interval if there were enough pairs for one."""
    text = f"{row['speedup_vs_full']:.2f}"
    if row.get("speedup_ci_low") is None:
        return text
    return f"{text} [{row['speedup_ci_low']:.2f}, {row['speedup_ci_high']:.2f}]"


class Writer:
    """Appends rows to ``rows.csv``; each is on the disk before the next step begins.

    Args:
        folder: The file's folder; created if needed.

    Raises:
        FileExistsError: If the folder has a ``rows.csv``: two runs must not share a file.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "rows.csv"
        self.rows: list[dict[str, Any]] = []
        self._file = self.path.open("x", newline="")
        self._append(dict(zip(COLUMNS, COLUMNS, strict=True)))

    def write(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Add a row's ``run_id``, append the row, and return it."""
        unknown = sorted(set(row) - set(COLUMNS))
        if unknown:
            raise ValueError(f"a row has no column {unknown[0]!r}.")
        names = [*_IDENTITY, *(["full_backend"] if row["method"] == "full" else [])]
        identity = repr([(name, row.get(name)) for name in names])
        complete = {"subtask": "", **row, "run_id": sha256(identity.encode()).hexdigest()[:16]}
        self._append(complete)
        self.rows.append(complete)
        return complete

    def _append(self, row: Mapping[str, Any]) -> None:
        line = io.StringIO()
        writer = csv.DictWriter(line, COLUMNS, restval="", lineterminator="\n")
        writer.writerow(row)
        self._file.write(line.getvalue())
        self._file.flush()
        os.fsync(self._file.fileno())
