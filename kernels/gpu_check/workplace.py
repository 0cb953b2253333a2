"""What the jobs of one process share: the device, its bandwidth, and how a part may fail."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from topkbench.kernels.gpu_check.rows import DeviceLost, outcome
from topkbench.kernels.timing import Timing, cache_emptier, measure, read_bandwidth

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_PROBE_BYTES = 2**31


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
        self.kept: dict[Any, Any] = {}
        """What later jobs use again, of one shape at a time."""

    @cached_property
    def bandwidth_gb_s(self) -> float:
        """The memory's measured bandwidth; of so much that launching does not count."""
        return read_bandwidth(self.device, _PROBE_BYTES).ceiling_gb_s

    @cached_property
    def _emptier(self) -> Callable[[], object]:
        return cache_emptier(self.device)

    def timed(
        self, functions: dict[str, Callable[[], object]], trials: int | None = None
    ) -> dict[str, Timing]:
        """Time functions in turn as CUDA graphs, each with the caches emptied before it."""
        return measure(
            functions,
            trials or self.trials,
            warmup=3,
            device=self.device,
            cuda_graph=self.device.type == "cuda",
            before=self._emptier,
        )

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

    def forget(self, key: Any) -> None:
        """Let go of what was kept for another shape than this."""
        if self.kept.get("key") != key:
            self.kept.clear()
            self.recover()
            self.kept["key"] = key


def wrong_operators(rows: Sequence[Any], dtype: str, head_dim: int, group: int) -> dict[str, str]:
    """Return the operators whose very kernels an earlier check found wrong, and why."""
    return {
        row["method"]: row["reason"]
        for row in rows
        if row["task"] == "kernel_check"
        and row["status"] == "wrong"
        and (row["p_dtype"], row.get("p_head_dim"), row.get("p_group")) == (dtype, head_dim, group)
    }
