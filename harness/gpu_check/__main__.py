"""Check and time the kernels on a GPU: ``python -m topkbench.harness.gpu_check --out FOLDER``.

Checks every Triton kernel against its reference, times the operators, and times one decode step of
each method against the fastest dense attention on the machine, most important first, within the
given minutes. Needs only torch, Triton and numba. ``docs/gpu.md`` explains the rows it writes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from topkbench.harness.commit import commit_of
from topkbench.harness.gpu_check.plan import make_plan
from topkbench.harness.gpu_check.rows import Writer, speedup
from topkbench.harness.gpu_check.supervisor import Supervisor
from topkbench.kernels.dispatch import has_triton, interpreted

_MHA, _GQA = "32/32 heads of 128", "32/8 heads of 128"
_GOALS = {
    **{(_MHA, "32768 x 8"): 12, (_MHA, "262144"): 12},
    **{(_GQA, "131072"): 6, (_GQA, "131072 x 8"): 6},
}
"""HATA's target speed-ups over the fastest dense attention, by model and tokens."""
_BANDWIDTH_GOAL = 0.7  # target share of the memory bandwidth, for the Hamming score

_MOST_WORKERS = 11  # the number of steps before timing, which can run at the same time
_GIB_PER_WORKER = 7  # device memory for checking the largest shape


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan; return `exit_status`, or 2 if nothing could run."""
    started = time.monotonic()
    options = _parser().parse_args(arguments)
    reason = _reason_not_to_run(options)
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    if options.toy:
        os.environ["TRITON_INTERPRET"] = "1"  # read by the worker processes
    try:
        commit = commit_of(Path(__file__).resolve().parents[2], options.commit)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    libraries = [name for name in ("flashinfer",) if find_spec(name) is not None]
    plan = make_plan(_workers(options), options.toy, libraries)
    try:
        writer = Writer(Path(options.out))
    except OSError as error:
        print(f"error: {options.out} must be a folder without rows.csv that can be written, but "
              f"{error.strerror or error}; name another.", file=sys.stderr)  # fmt: skip
        return 2
    _print_line(plan.text(options.minutes))
    supervisor = Supervisor(
        plan,
        writer,
        60 * options.minutes - (time.monotonic() - started),
        "cpu" if options.toy else options.device,
        options.toy,
        options.trials,
        commit,
        _print_line,
    )
    supervisor.run()
    _print_line(summary(writer.rows))
    _print_line(
        f"rows: {writer.path}; tables and figures, where pandas and matplotlib are installed: "
        f"python -m topkbench.analysis.report {writer.path.parent}"
    )
    return exit_status(writer.rows)


def exit_status(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return 0, or 1 if any row is wrong or failed or if none is ok."""
    statuses = {row["status"] for row in rows}
    return int("ok" not in statuses or bool(statuses & {"wrong", "failed"}))


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the statuses' counts, each method's speed-up over dense attention, and the goals."""
    counts = Counter(row["status"] for row in rows)
    lines = ["", ", ".join(f"{count} {status}" for status, count in counts.items())]
    for row in rows:
        if row.get("speedup_vs_full") is not None:
            norms = {True: " with norms", False: " with integer scores", None: ""}[
                row.get("p_use_norm")
            ]
            lines.append(
                f"{row['model']}, {row['subtask']} tokens: {row['method']}{norms} "
                f"{row['decode_ms_p50']:.4f} ms, {speedup(row)} times "
                f"{row['full_backend']}"
            )
    for (model, subtask), goal in _GOALS.items():
        speedups = _values(rows, "speedup_vs_full", method="hata", model=model, subtask=subtask)
        label = f"{model}, {subtask} tokens: at least {goal} times the fastest dense"
        lines.append(f"goal, HATA, {label}: {_verdict(goal, speedups, '.2f')}")
    shares = _values(rows, "bandwidth_fraction", task="kernel_times", method="hamming_score")
    label = f"hamming_score: at least {_BANDWIDTH_GOAL:.0%} of the bandwidth"
    return "\n".join([*lines, f"goal, {label}: {_verdict(_BANDWIDTH_GOAL, shares, '.0%')}"])


def _values(rows: Sequence[Mapping[str, Any]], column: str, **conditions: str) -> list[float]:
    """Return a column's values in the rows whose other columns meet the conditions."""
    matching = [
        row for row in rows if all(row.get(name) == value for name, value in conditions.items())
    ]
    return [row[column] for row in matching if row.get(column) is not None]


def _verdict(goal: float, values: Sequence[float], number_format: str) -> str:
    """Return whether all measured values reach a goal, followed by the values."""
    if not values:
        return "not measured"
    met = "met" if min(values) >= goal else "missed"
    return ", ".join([met, *(format(value, number_format) for value in values)])


def _reason_not_to_run(options: argparse.Namespace) -> str | None:
    """Return one sentence saying why nothing can run, or None."""
    if not has_triton():
        return "the package triton is needed, which is not installed."
    if options.minutes <= 0 or options.trials < 1:
        return (
            f"--minutes must be positive and --trials at least 1, got {options.minutes:g} and "
            f"{options.trials}."
        )
    if options.workers is not None and options.workers < 1:
        return f"--workers must be at least 1, got {options.workers}."
    if options.toy:
        return None
    if options.device.partition(":")[0] != "cuda":
        return f"--device must be a CUDA device, got {options.device}."
    if interpreted():
        return (
            "TRITON_INTERPRET=1 runs the kernels in Python, which measures nothing; unset it, or "
            "pass --toy to try the script."
        )
    if not torch.cuda.is_available():
        return "a CUDA device is needed, and there is none; --toy tries the script without one."
    return None


def _workers(options: argparse.Namespace) -> int:
    """Return the number of processes for the checks; each compiles on one core."""
    if options.workers:
        return int(options.workers)
    if options.toy:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = torch.cuda.get_device_properties(options.device).total_memory / 2**30
    return max(1, min(_MOST_WORKERS, (cores or 1) - 1, int(memory // _GIB_PER_WORKER)))


def _print_line(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m topkbench.harness.gpu_check", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where rows.csv is written")
    parser.add_argument("--minutes", type=float, default=8.0, help="default: %(default)g")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--trials", type=int, default=25, help="default: %(default)s")
    parser.add_argument("--workers", type=int, help="processes for the checks; default: by cores")
    parser.add_argument("--commit", help="the code's commit, where it is not in git")
    parser.add_argument(
        "--toy", action="store_true", help="toy sizes in Triton's interpreter; nothing is timed"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
