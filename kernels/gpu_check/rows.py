"""Rows, as ``python -m topkbench.analysis.report FOLDER`` reads them, written one by one."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from topkbench.kernels.testing import WrongResult
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
_LONGEST_REASON = 400


class Unavailable(Exception):
    """What is to be timed is not on this machine; the text says why."""


class DeviceLost(Exception):
    """The device answers every call with an error: this process can do nothing more."""


def outcome(error: BaseException) -> dict[str, str]:
    """Return the status and the reason that an exception stands for."""
    if isinstance(error, WrongResult):
        status = "wrong"
    elif isinstance(error, torch.OutOfMemoryError | MemoryError):
        status = "out_of_memory"
    elif isinstance(error, Unavailable):
        status = "skipped"
    else:
        status = "failed"
    named = status in ("wrong", "skipped")
    words = " ".join(str(error).split()) or "no reason was given."
    return {
        "status": status,
        "reason": (words if named else f"{type(error).__name__}: {words}")[:_LONGEST_REASON],
    }


def times(step: Timing, full: Timing | None, needed: int, bandwidth: float) -> dict[str, Any]:
    """Return the speed columns of a step that was timed in turn with full attention.

    Args:
        step: Its time.
        full: Full attention's; None for full attention itself, and for an operator.
        needed: Bytes that the step cannot do without, over the whole batch.
        bandwidth: The memory's, in 1e9 bytes a second.
    """
    found = speed_columns(step.turns, None if full is None else full.turns)
    if full is None:  # nothing was timed in turn with it
        found = {name: value for name, value in found.items() if not name.startswith("full_ms")}
    found["bandwidth_fraction"] = needed / step.p50_ms / 1e6 / bandwidth
    return found | {"bandwidth_gb_s": bandwidth}


def speedup(row: Mapping[str, Any]) -> str:
    """Return a row's speed-up with its 95% interval, where there were pairs enough for one."""
    text = f"{row['speedup_vs_full']:.2f}"
    if row.get("speedup_ci_low") is None:
        return text
    return f"{text} [{row['speedup_ci_low']:.2f}, {row['speedup_ci_high']:.2f}]"


class Writer:
    """Appends rows to ``rows.csv``, each on the disk before the next step begins.

    Args:
        folder: Where; made if it is not there.

    Raises:
        FileExistsError: If it holds rows already: two runs must not mix in one file.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "rows.csv"
        self.rows: list[dict[str, Any]] = []
        self._file = self.path.open("x", newline="")
        self._append(dict(zip(COLUMNS, COLUMNS, strict=True)))

    def write(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Complete a row with its identity, append it, and return it."""
        unknown = sorted(set(row) - set(COLUMNS))
        if unknown:
            raise ValueError(f"a row has no column {unknown[0]!r}.")
        names = [*_IDENTITY, *(["full_backend"] if row["method"] == "full" else [])]
        key = repr([(name, row.get(name)) for name in names])
        whole = {"subtask": "", **row, "run_id": sha256(key.encode()).hexdigest()[:16]}
        self._append(whole)
        self.rows.append(whole)
        return whole

    def _append(self, row: Mapping[str, Any]) -> None:
        line = io.StringIO()
        writer = csv.DictWriter(line, COLUMNS, restval="", lineterminator="\n")
        writer.writerow(row)
        self._file.write(line.getvalue())
        self._file.flush()
        os.fsync(self._file.fileno())
