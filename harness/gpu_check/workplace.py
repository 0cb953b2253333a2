"""What the jobs of one process share: the device, its bandwidth, and the handling of failures."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from topkbench.harness.gpu_check.rows import DeviceLost
from topkbench.harness.outcome import outcome
from topkbench.kernels.testing import WrongResult, assert_same
from topkbench.kernels.timing import Timing, cache_emptier, captured, measure, read_bandwidth

_PROBE_BYTES = (2**31, 2**28)  # the second is used if there is no memory for the first


class Workplace:
    """One process's device, and the objects kept from job to job.

    Args:
        device: Where everything runs.
        toy: Whether nothing is timed.
        trials: How often each call is timed.
    """

    def __init__(self, device: torch.device, toy: bool, trials: int) -> None:
        self.device, self.toy, self.trials = device, toy, trials
        self.announce: Callable[[str], None] = lambda part: None
        self.current_part: str | None = None
        self._shape: Any = None
        self._kept: dict[str, Any] = {}

    @cached_property
    def bandwidth_gb_s(self) -> float:
        """The measured memory bandwidth, over enough bytes that launch time does not matter.

        Measured at first use, since other processes are running when this one starts.
        """
        most, least = _PROBE_BYTES
        try:
            return read_bandwidth(self.device, most).ceiling_gb_s
        except torch.OutOfMemoryError:
            return read_bandwidth(self.device, least).ceiling_gb_s

    @cached_property
    def emptier(self) -> Callable[[], object]:
        return cache_emptier(self.device)

    def timed(self, functions: Mapping[str, Callable[[], Tensor]]) -> dict[str, Timing]:
        """Time functions in turn as CUDA graphs, each with the caches emptied before it.

        Raises:
            WrongResult: If a graph's output after the last replay differs from what its function
                returns, which was checked before.
        """
        on_gpu = self.device.type == "cuda"
        calls = {
            name: captured(function, self.device) if on_gpu else function
            for name, function in functions.items()
        }
        timings = measure(calls, self.trials, 3, self.device, before=self.emptier)
        for name, function in functions.items():
            try:
                assert_same(calls[name](), function())
            except WrongResult as error:
                raise WrongResult(f"{name} as it was timed: {error}") from None
        return timings

    @contextmanager
    def part(self, name: str, columns: dict[str, Any]) -> Iterator[None]:
        """Run one part of a job; if it fails, replace ``columns`` by its status and the reason.

        Raises:
            DeviceLost: If the device answers every call with an error.
        """
        self.current_part = name
        self.announce(name)
        try:
            yield
            self.synchronize()
        except Exception as error:
            columns.clear()
            columns |= outcome(error)
            # Tensors that the traceback refers to would stay on the device.
            error.__traceback__ = None
            self.recover(columns["reason"])

    def recover(self, reason: str = "") -> None:
        """Free unused device memory.

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
        """Wait for the device; raises what went wrong there."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def keep(self, shape: Any, name: str, make: Callable[[], Any]) -> Any:
        """Return the object kept under a name for a shape; make it if there is none.

        Objects of another shape are freed first.
        """
        if self._shape != shape:
            self._kept.clear()
            self.recover()
            self._shape = shape
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


def wrong_operators(rows: Sequence[Any], dtype: str, head_dim: int, group: int) -> dict[str, str]:
    """Return the operators that were wrong in an earlier check of this setting, with reasons."""
    return {
        row["method"]: row["reason"]
        for row in rows
        if row["task"] == "kernel_check"
        and row["status"] == "wrong"
        and (row["p_dtype"], row.get("p_head_dim"), row.get("p_group")) == (dtype, head_dim, group)
    }
