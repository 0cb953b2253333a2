"""What the jobs of one process share: the device, its bandwidth, and how a part may fail."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from topkbench.kernels.gpu_check.rows import DeviceLost, outcome
from topkbench.kernels.testing import WrongResult, assert_same
from topkbench.kernels.timing import Timing, cache_emptier, captured, measure, read_bandwidth

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_PROBE_BYTES = (2**31, 2**28)  # the second where there is no memory for the first


class Workplace:
    """One process's device, and what it keeps from job to job.

    Args:
        device: Where everything runs.
        toy: Nothing is timed.
        trials: How often each thing is timed.
    """

    def __init__(self, device: torch.device, toy: bool, trials: int) -> None:
        self.device, self.toy, self.trials = device, toy, trials
        self.announce: Callable[[str], None] = lambda part: None
        self.at: str | None = None
        self._shape: Any = None
        self._kept: dict[str, Any] = {}

    @cached_property
    def bandwidth_gb_s(self) -> float:
        """The memory's measured bandwidth; of so much that launching does not count.

        Not measured before it is asked for: at a process's start others run beside it.
        """
        most, least = _PROBE_BYTES
        try:
            return read_bandwidth(self.device, most).ceiling_gb_s
        except torch.OutOfMemoryError:
            return read_bandwidth(self.device, least).ceiling_gb_s

    @cached_property
    def _emptier(self) -> Callable[[], object]:
        return cache_emptier(self.device)

    def timed(self, functions: Mapping[str, Callable[[], Tensor]]) -> dict[str, Timing]:
        """Time functions in turn as CUDA graphs, each with the caches emptied before it.

        Raises:
            WrongResult: If what a graph left after the last replay is not what its function
                returns, which was checked before.
        """
        on_gpu = self.device.type == "cuda"
        calls = {
            name: captured(function, self.device) if on_gpu else function
            for name, function in functions.items()
        }
        taken = measure(calls, self.trials, 3, self.device, before=self._emptier)
        for name, function in functions.items():
            try:
                assert_same(calls[name](), function())
            except WrongResult as error:
                raise WrongResult(f"{name} as it was timed: {error}") from None
        return taken

    @contextmanager
    def part(self, name: str, found: dict[str, Any]) -> Iterator[None]:
        """Do one part of a job: what fails in it is written into ``found``, and the rest goes on.

        Raises:
            DeviceLost: If the device answers nothing but errors from now on.
        """
        self.at = name
        self.announce(name)
        try:
            yield
            self.synchronize()
        except Exception as error:
            found.clear()
            found |= outcome(error)
            # What the traceback holds would stay on the device.
            error.__traceback__ = None
            self.recover(found["reason"])

    def recover(self, reason: str = "") -> None:
        """Give unused memory back.

        Raises:
            DeviceLost: If the device does not answer.
        """
        gc.collect()
        try:
            self.synchronize()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(reason or str(error)) from None

    def synchronize(self) -> None:
        """Wait for the device, and hear of what went wrong there."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def keep(self, shape: Any, name: str, make: Callable[[], Any]) -> Any:
        """Return what was kept under a name for a shape, made now if it was not.

        What was kept for another shape is let go of before.
        """
        if self._shape != shape:
            self._kept.clear()
            self.recover()
            self._shape = shape
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


def wrong_operators(rows: Sequence[Any], dtype: str, head_dim: int, group: int) -> dict[str, str]:
    """Return the operators whose very kernels an earlier check found wrong, and why."""
    return {
        row["method"]: row["reason"]
        for row in rows
        if row["task"] == "kernel_check"
        and row["status"] == "wrong"
        and (row["p_dtype"], row.get("p_head_dim"), row.get("p_group")) == (dtype, head_dim, group)
    }
