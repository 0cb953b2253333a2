"""A process that does one job after the other on the device and reports each result as it comes.

It sends ``("hello", columns)`` when it is ready; if it cannot start, it sends ``("broken",
reason)`` and ends. For each job it sends ``("part", part)`` before each part, ``("row", part,
columns)`` after it, and ``("done", alive)`` at the end. If the device only answers with errors,
``alive`` is false and the process ends. `topkbench.harness.gpu_check.supervisor` receives these.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from topkbench.harness.gpu_check import checks, decode
from topkbench.harness.gpu_check.plan import Job
from topkbench.harness.gpu_check.rows import DeviceLost
from topkbench.harness.gpu_check.workplace import Workplace
from topkbench.harness.outcome import outcome
from topkbench.kernels.timing import machine_name, versions

JOBS = {
    "prepare": decode.prepare,
    "check": checks.check,
    "dense": decode.dense,
    "method": decode.method,
    "operators": checks.operators,
}
"""The function for each kind of job: ``(workplace, job, rows so far) -> parts, their columns``."""


class Channel(Protocol):
    """One end of a pipe."""

    def send(self, message: Any) -> None:
        """Send."""

    def recv(self) -> Any:
        """Receive."""


def serve(channel: Channel, device: str, toy: bool, trials: int) -> None:
    """Do jobs until None is received or the device is lost.

    Args:
        channel: Gives ``(job, rows so far)``, or None to stop.
        device: Where everything runs.
        toy: Run in Triton's interpreter and time nothing.
        trials: How often each call is timed.
    """
    os.setsid()  # so that its children can be ended with it
    try:
        workplace = Workplace(torch.device(device), toy, trials)
        channel.send(("hello", machine_columns(workplace.device, toy)))
    except Exception as error:
        channel.send(("broken", outcome(error)["reason"]))
        return
    gc.freeze()  # collecting garbage after each part then skips what is imported
    try:
        while (message := channel.recv()) is not None:
            job, rows = message
            alive = run(workplace, job, rows, channel)
            channel.send(("done", alive))
            if not alive:
                return
    finally:
        gc.unfreeze()  # else libraries report leaks when the process ends


def run(
    workplace: Workplace, job: Job, rows: Sequence[Mapping[str, Any]], channel: Channel
) -> bool:
    """Do one job and send a row for each of its parts; return whether the device still answers."""
    workplace.announce = lambda part: channel.send(("part", part))
    workplace.current_part = None
    remaining = list(job.remaining_parts)
    try:
        for part, columns in JOBS[job.kind](workplace, job, rows):
            channel.send(("row", part, columns))
            remaining.remove(part)
    except DeviceLost as error:
        current = workplace.current_part
        for lost in [current] if current in remaining else remaining:
            channel.send(("row", lost, outcome(error)))
        return False
    except Exception as error:
        for part in remaining:
            channel.send(("row", part, outcome(error)))
    try:
        workplace.recover()
    except DeviceLost:
        return False
    return True


def machine_columns(device: torch.device, toy: bool) -> dict[str, Any]:
    """Return the columns that describe the machine, the same in all rows."""
    library_versions = versions()
    name = machine_name(device)
    return {
        "device": f"Triton's interpreter on {name}" if toy else name,
        **{
            library: library_versions[library] for library in ("driver", "torch", "numba", "triton")
        },
        "impl": "interpreter" if toy else "triton",
    }
