"""The kernels on a GPU, in one shot: ``python -m topkbench.kernels.gpu_check --out FOLDER``.

Checks every Triton kernel against its reference, times the operators, and times one decode step of
each method against the fastest dense attention on the machine, most important first, within the
minutes given. Needs torch, Triton and numba alone. ``docs/gpu.md`` says how to read what it leaves.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from topkbench.kernels.dispatch import has_triton, interpreted
from topkbench.kernels.gpu_check.plan import make_plan
from topkbench.kernels.gpu_check.rows import Writer, speedup
from topkbench.kernels.gpu_check.supervisor import Supervisor

_MHA, _GQA = "32/32 heads of 128", "32/8 heads of 128"
_GOALS = {
    **{(_MHA, "32768 x 8"): 12, (_MHA, "262144"): 12},
    **{(_GQA, "131072"): 6, (_GQA, "131072 x 8"): 6},
}
"""HATA's speed-ups over the fastest dense attention that are hoped for, by model and tokens."""
_GOAL_OF_BANDWIDTH = 0.7

_MOST_WORKERS = 11  # as many as the first steps that may run at a time
_GIB_PER_WORKER = 7  # of the device's memory, to check the largest shape


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan; return `exit_status`, or 2 if nothing could run."""
    began = time.monotonic()
    options = _parser().parse_args(arguments)
    problem = _problem(options)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if options.toy:
        os.environ["TRITON_INTERPRET"] = "1"  # read by the processes that are started
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
    _say(plan.text(options.minutes))
    supervisor = Supervisor(
        plan,
        writer,
        60 * options.minutes - (time.monotonic() - began),
        "cpu" if options.toy else options.device,
        options.toy,
        options.trials,
        commit,
        _say,
    )
    supervisor.run()
    _say(summary(writer.rows))
    _say(f"rows: {writer.path}; tables and figures, where pandas and matplotlib are: "
         f"python -m topkbench.analysis.report {writer.path.parent}")  # fmt: skip
    return exit_status(writer.rows)


def exit_status(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return 0, or 1 if a row is wrong or failed, or none is ok."""
    statuses = {row["status"] for row in rows}
    return int("ok" not in statuses or bool(statuses & {"wrong", "failed"}))


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how the steps ended, each method against the best dense baseline, and the goals."""
    counts = Counter(row["status"] for row in rows)
    lines = ["", ", ".join(f"{count} {status}" for status, count in counts.items())]
    for row in rows:
        if row.get("speedup_vs_full") is not None:
            norms = {True: " with norms", False: " with integer scores", None: ""}[
                row["p_use_norm"]
            ]
            lines.append(
                f"{row['model']}, {row['subtask']} tokens: {row['method']}{norms} "
                f"{row['decode_ms_p50']:.4f} ms, {speedup(row)} times "
                f"{row['full_backend']}"
            )
    for (model, subtask), goal in _GOALS.items():
        place = {"method": "hata", "model": model, "subtask": subtask}
        found = _found(rows, "speedup_vs_full", **place)
        said = f"{model}, {subtask} tokens: at least {goal} times the fastest dense"
        lines.append(f"goal, HATA, {said}: {_against(goal, found, '.2f')}")
    found = _found(rows, "bandwidth_fraction", task="kernel_times", method="hamming_score")
    said = f"hamming_score: at least {_GOAL_OF_BANDWIDTH:.0%} of the bandwidth"
    return "\n".join([*lines, f"goal, {said}: {_against(_GOAL_OF_BANDWIDTH, found, '.0%')}"])


def _found(rows: Sequence[Mapping[str, Any]], column: str, **place: str) -> list[float]:
    """Return a column's values in the rows of a place."""
    named = place.items()
    own = [row for row in rows if all(row.get(name) == value for name, value in named)]
    return [row[column] for row in own if row.get(column) is not None]


def _against(goal: float, found: Sequence[float], number: str) -> str:
    """Say whether all that was found reaches a goal."""
    if not found:
        return "not measured"
    met = "met" if min(found) >= goal else "missed"
    return ", ".join([met, *(format(one, number) for one in found)])


def _problem(options: argparse.Namespace) -> str | None:
    """Return in one sentence why nothing can run, or None."""
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
    """Return on how many processes to check: they compile, each on one core."""
    if options.workers:
        return int(options.workers)
    if options.toy:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = torch.cuda.get_device_properties(options.device).total_memory / 2**30
    return max(1, min(_MOST_WORKERS, (cores or 1) - 1, int(memory // _GIB_PER_WORKER)))


def commit_of(folder: Path, stated: str | None) -> dict[str, Any]:
    """Return the columns ``git_commit`` and ``git_dirty`` of the code in a checkout.

    Args:
        folder: The checkout's root. Where it is not one, as in site-packages, git is not asked:
            a repository further up is another project's.
        stated: The commit that the user names, for code outside of git; may be abbreviated.

    Returns:
        The commit, and whether a file that git knows was changed since; without git the stated
        commit alone, or nothing.

    Raises:
        ValueError: If the stated commit is not the one that is checked out.
    """

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            return None
        return None if done.returncode else done.stdout.strip()

    root, head = git("rev-parse", "--show-toplevel"), git("rev-parse", "HEAD")
    if root is None or head is None or Path(root).resolve() != folder.resolve():
        return {"git_commit": stated} if stated else {}
    if stated and not head.startswith(stated):
        raise ValueError(f"--commit must be the checked out {head}, got {stated}.")
    return {"git_commit": head, "git_dirty": git("status", "--porcelain", "-uno") != ""}


def _say(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m topkbench.kernels.gpu_check", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where rows.csv goes")
    parser.add_argument("--minutes", type=float, default=8.0, help="default: %(default)g")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--trials", type=int, default=25, help="default: %(default)s")
    parser.add_argument("--workers", type=int, help="processes that check; default: by cores")
    parser.add_argument("--commit", help="of the code, where git does not say")
    parser.add_argument(
        "--toy", action="store_true", help="toy sizes in Triton's interpreter; nothing is timed"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
