"""A process that does one job after the other on the device, and says what came out as it goes.

It sends ``("hello", columns)`` when it can begin, or ``("broken", reason)`` and ends. Then
``("at", part)`` before each part of a job, ``("row", part, columns)`` after it, and
``("done", alive)`` at the end; where the device answers nothing but errors, ``alive`` is false and
the process ends. `topkbench.kernels.gpu_check.supervisor` is at the other end.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from topkbench.kernels.gpu_check import checks, decode
from topkbench.kernels.gpu_check.plan import Job
from topkbench.kernels.gpu_check.rows import DeviceLost, outcome
from topkbench.kernels.gpu_check.workplace import Workplace
from topkbench.kernels.timing import machine_name, versions

JOBS = {
    "prepare": decode.prepare,
    "check": checks.check,
    "dense": decode.dense,
    "method": decode.method,
    "operators": checks.operators,
}
"""What does each kind of job: ``(workplace, job, rows so far) -> parts and their columns``."""


class Channel(Protocol):
    """One end of a pipe."""

    def send(self, message: Any) -> None:
        """Send."""

    def recv(self) -> Any:
        """Receive."""


def serve(channel: Channel, device: str, toy: bool, trials: int) -> None:
    """Do jobs until told to stop or the device is lost.

    Args:
        channel: Gives ``(job, rows so far)``, or None to stop.
        device: Where everything runs.
        toy: In Triton's interpreter, and nothing is timed.
        trials: How often each thing is timed.
    """
    os.setsid()  # so that it can be ended with all that it started
    try:
        place = Workplace(torch.device(device), toy, trials)
        channel.send(("hello", known(place.device, toy)))
    except Exception as error:
        channel.send(("broken", outcome(error)["reason"]))
        return
    while (given := channel.recv()) is not None:
        job, rows = given
        alive = run(place, job, rows, channel)
        channel.send(("done", alive))
        if not alive:
            return


def run(place: Workplace, job: Job, rows: Sequence[Mapping[str, Any]], channel: Channel) -> bool:
    """Do one job, a row for each of its parts; return whether the device still answers."""
    place.announce = lambda part: channel.send(("at", part))
    place.at = None
    left = list(job.left)
    try:
        for part, columns in JOBS[job.kind](place, job, rows):
            channel.send(("row", part, columns))
            left.remove(part)
    except DeviceLost as error:
        for lost in [place.at] if place.at in left else left:
            channel.send(("row", lost, outcome(error)))
        return False
    except Exception as error:
        for part in left:
            channel.send(("row", part, outcome(error)))
    try:
        place.recover()
    except DeviceLost:
        return False
    return True


def known(device: torch.device, toy: bool) -> dict[str, Any]:
    """Return the columns that all rows of this machine have."""
    found = versions()
    name = machine_name(device)
    return {
        "device": f"Triton's interpreter on {name}" if toy else name,
        **{library: found[library] for library in ("driver", "torch", "numba", "triton")},
        "impl": "interpreter" if toy else "triton",
    }
