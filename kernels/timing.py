"""All timing: interleaved trials, stages, and the state of the machine during them.

A speed-up is a ratio of two medians whose times were measured alternately, and has an interval over
those pairs: `speed_columns` computes both, with a note if the times are unreliable.
"""

import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch

# Larger than any cache: 256 MiB.
_PROBE_BYTES = 2**28
# The size assumed for the last-level cache if the machine does not report it: 64 MiB, above most.
_ASSUMED_CACHE_BYTES = 2**26

T = TypeVar("T")

LEAST_PAIRS = 6
"""A speed-up of fewer pairs than this has no interval: not even the smallest and the largest ratio
would enclose the median with 95%."""
WIDE_SPREAD = 2.0
"""Times are unsteady if their 80th percentile is more than this many times their 20th. On a quiet
machine the ratio was at most 1.4 in 165 rows of layers and of whole models, and 1.9 in 274 rows of
the small model's steps."""
MUCH_LOAD = 0.1
"""Times are unsteady if other processes took more than this fraction of the processors' time
meanwhile. An idle system takes one or two hundredths."""
_LEAST_SECONDS = 0.25  # Linux counts in hundredths of a second, too coarse for shorter times
_RESAMPLES = 2000


@dataclass(frozen=True)
class Timing:
    """The times of one function over all trials, in milliseconds."""

    p50_ms: float
    p20_ms: float
    p80_ms: float
    trials: int
    taken_ms: tuple[float, ...]
    """The times of the trials, in order."""

    @staticmethod
    def of(milliseconds: Sequence[float]) -> "Timing":
        """Summarise measured times.

        Raises:
            ValueError: If there are none.
        """
        if not milliseconds:
            raise ValueError("milliseconds must hold at least one measured time, got none.")
        return Timing(
            p50_ms=quantile(milliseconds, 0.5),
            p20_ms=quantile(milliseconds, 0.2),
            p80_ms=quantile(milliseconds, 0.8),
            trials=len(milliseconds),
            taken_ms=tuple(milliseconds),
        )

    @property
    def turns(self) -> list[list[float]]:
        """The times in the form of `speed_columns`, each trial as a turn of its own."""
        return [[taken] for taken in self.taken_ms]


def quantile(values: Sequence[float], share: float) -> float:
    """Return the quantile of some values at ``share``, 0 to 1, interpolated linearly."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def speedup_interval(
    full: Sequence[Sequence[float]], step: Sequence[Sequence[float]], seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95% interval of the ratio of medians of two functions timed alternately.

    A turn is an uninterrupted run of times of one function; turns come in pairs. Pairs are drawn
    with replacement, each with all of its times, so that a disturbance of a whole turn, or of both
    turns of a pair, does not make the interval too narrow. The interval is the percentile
    bootstrap's (Efron and Tibshirani 1993, chapter 13; whole turns: Davison and Hinkley 1997,
    section 3.8). It covers 92 to 99% with 6 to 30 pairs of noisy, bursty or drifting times.

    Args:
        full: Milliseconds of full attention, turn by turn.
        step: Milliseconds of the compared step, each turn measured just after full attention's.
        seed: Seed of the resampling.

    Returns:
        Both ends, with the ratio between them; None with fewer than ``LEAST_PAIRS`` pairs.

    Raises:
        ValueError: If the two have different numbers of turns, or turns differ in length.
    """
    if len(full) != len(step):
        raise ValueError(f"turns must come in pairs, got {len(full)} and {len(step)}.")
    if len({len(turn) for turn in (*full, *step)}) != 1:
        raise ValueError("all turns must have the same number of times, got several.")
    if len(full) < LEAST_PAIRS:
        return None
    first, second = np.asarray(full, np.float64), np.asarray(step, np.float64)
    drawn = np.random.default_rng(seed).integers(len(full), size=(_RESAMPLES, len(full)))
    ratios = [
        np.median(first[one], axis=(1, 2)) / np.median(second[one], axis=(1, 2))
        for one in np.array_split(drawn, 20)  # in parts, since turns may be long
    ]
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    ratio = float(np.median(first) / np.median(second))
    return min(float(low), ratio), max(float(high), ratio)


def unsteady(step: Timing, full: Timing | None, other_load: float | None) -> str | None:
    """Return in words why times are unreliable; None if they are reliable.

    Args:
        step: Times of the step.
        full: Times of full attention, measured alternately; None if the step is full attention's.
        other_load: What `OtherLoad.share` returned.
    """
    reasons = []
    for name, timing in (("the step", step), ("full attention's step", full)):
        if timing is not None and timing.p80_ms > WIDE_SPREAD * timing.p20_ms:
            ends = f"{timing.p20_ms:.3g} to {timing.p80_ms:.3g} ms"
            reasons.append(f"{name} took {ends} (20th to 80th percentile)")
    if other_load is not None and other_load > MUCH_LOAD:
        reasons.append(f"others took {other_load:.0%} of the processors' time")
    return "; ".join(reasons) or None


def speed_columns(
    step: Sequence[Sequence[float]],
    full: Sequence[Sequence[float]] | None,
    other_load: float | None = None,
    sdpa: Sequence[Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Return a row's columns on a timed step and on full attention timed alternately with it.

    Args:
        step: Milliseconds of the step, turn by turn.
        full: Milliseconds of full attention, each turn measured just before the step's; None if the
            step is full attention's, which has no speed-up.
        other_load: What `OtherLoad.share` returned.
        sdpa: Milliseconds of full attention by torch's SDPA, timed alternately with both; None if
            it was not, or is what ``full`` has.

    Returns:
        The columns ``decode_ms_*``, ``full_ms_*``, ``speedup_vs_full`` with its interval,
        ``sdpa_ms_p50``, ``speedup_vs_sdpa`` with its interval, ``other_load`` and ``timing_note``,
        by name.
    """
    step_timing = Timing.of([taken for turn in step for taken in turn])
    full_timing = None if full is None else Timing.of([taken for turn in full for taken in turn])
    columns: dict[str, Any] = {}
    for name, timing in (("decode_ms", step_timing), ("full_ms", full_timing or step_timing)):
        columns[f"{name}_p20"] = timing.p20_ms
        columns[f"{name}_p50"] = timing.p50_ms
        columns[f"{name}_p80"] = timing.p80_ms
    if full is not None and full_timing is not None:
        columns["speedup_vs_full"] = full_timing.p50_ms / step_timing.p50_ms
        interval = speedup_interval(full, step)
        if interval is not None:
            columns["speedup_ci_low"], columns["speedup_ci_high"] = interval
    if sdpa is not None:
        columns["sdpa_ms_p50"] = Timing.of([taken for turn in sdpa for taken in turn]).p50_ms
        columns["speedup_vs_sdpa"] = columns["sdpa_ms_p50"] / step_timing.p50_ms
        interval = speedup_interval(sdpa, step)
        if interval is not None:
            columns["sdpa_ci_low"], columns["sdpa_ci_high"] = interval
    columns["other_load"] = other_load
    columns["timing_note"] = unsteady(step_timing, full_timing, other_load)
    return columns


@dataclass(frozen=True)
class Usage:
    """Processor usage up to some moment, in seconds, on the processors this process may use."""

    wall_s: float
    own_s: float
    """Processor time of this process, all threads."""
    busy_s: float
    """Time in which those processors were busy for any process, or were taken by the host."""
    processors: int


def usage() -> Usage | None:
    """Return the processors' usage so far from Linux's ``/proc/stat``; None on other systems."""
    try:
        allowed = os.sched_getaffinity(0)
        tick = os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError):
        return None
    busy = 0
    found = re.findall(r"^cpu(\d+) (.+)$", _read(Path("/proc/stat")), re.MULTILINE)
    ours = [counts.split() for number, counts in found if int(number) in allowed]
    for counts in ours:
        user, nice, system, _idle, _waiting, interrupt, soft, stolen = map(int, counts[:8])
        busy += user + nice + system + interrupt + soft + stolen
    if not busy:  # some sandboxes do not count
        return None
    return Usage(time.perf_counter(), time.process_time(), busy / tick, len(ours))


def other_share(before: Usage | None, after: Usage | None) -> float | None:
    """Return the fraction of processor time that other processes took between two moments.

    It is the time in which processors were busy, minus this process's own; 0 to 1. None if it is
    not known, or the moments are too close together.
    """
    if before is None or after is None:
        return None
    wall = after.wall_s - before.wall_s
    if wall < _LEAST_SECONDS:
        return None
    others = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return min(1.0, max(0.0, others / (wall * after.processors)))


class OtherLoad:
    """Measures, from its construction on, how busy other processes keep the processors.

    Args:
        device: Device of the timed work; on a GPU nothing is measured, since its events do not
            depend on the processors.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._watched = torch.device(device).type == "cpu"
        self._before = usage() if self._watched else None

    def share(self) -> float | None:
        """Return the fraction of processor time that others took, 0 to 1; None if unknown."""
        return other_share(self._before, usage()) if self._watched else None


def measure(
    functions: Mapping[str, Callable[[], object] | Sequence[Callable[[], object]]],
    trials: int = 30,
    warmup: int = 5,
    device: torch.device | str = "cpu",
    cuda_graph: bool = False,
    before: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time functions interleaved: each trial runs each of them once, so drift affects all equally.

    Args:
        functions: The functions by name. A sequence of functions is a rotation: copies that do the
            same on different memory, called one after the other, so that a trial's data are not in
            the cache; `copies_needed` returns how many this takes. A single function is timed warm.
        trials: Number of timed calls of each.
        warmup: Number of untimed calls of each before, for compilation and first touch of memory.
        device: Device of the functions. On CUDA the time is the device's, between two events.
        cuda_graph: Capture each function once and time the replay, without launch overhead; its
            inputs and outputs must stay where they are. CUDA only.
        before: A function that runs untimed before each timed call, for example to empty the
            caches. On CUDA there is no wait in between: the device is still busy when the timed
            call is launched, which hides the launch's time.

    Returns:
        A ``Timing`` for each name.

    Raises:
        ValueError: If nothing is to be measured, or a graph is requested on a device other than
            CUDA.
    """
    device = torch.device(device)
    if trials < 1 or warmup < 0:
        raise ValueError(f"trials must be at least 1 and warmup 0, got {trials} and {warmup}.")
    if cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph needs a cuda device, got {device.type}.")
    rotations: dict[str, list[Callable[[], object]]] = {}
    for name, value in functions.items():
        rotations[name] = [value] if callable(value) else list(value)
        if not rotations[name]:
            raise ValueError(f"functions[{name!r}] must hold at least one function, got none.")
    for turn in range(warmup):
        for rotation in rotations.values():
            rotation[turn % len(rotation)]()
    if cuda_graph:
        rotations = {
            name: [captured(function, device) for function in rotation[: warmup + trials]]
            for name, rotation in rotations.items()
        }
    clock = _time_cuda if device.type == "cuda" else _time_cpu
    taken: dict[str, list[float]] = {name: [] for name in rotations}
    # Continue where the warm-up ended: the first copies may still be in the cache.
    for turn in range(warmup, warmup + trials):
        for name, rotation in rotations.items():
            taken[name].append(clock(rotation[turn % len(rotation)], device, before))
    return {name: Timing.of(milliseconds) for name, milliseconds in taken.items()}


def _time_cpu(
    function: Callable[[], object], device: torch.device, before: Callable[[], object] | None
) -> float:
    """Return the milliseconds of one call."""
    if before is not None:
        before()
    began = time.perf_counter()
    function()
    return (time.perf_counter() - began) * 1e3


def _time_cuda(
    function: Callable[[], object], device: torch.device, before: Callable[[], object] | None
) -> float:
    """Return the device's milliseconds of one call."""
    with torch.cuda.device(device):
        began = torch.cuda.Event(enable_timing=True)
        ended = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if before is not None:
            before()
        began.record()
        function()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended)


class NotCaptured(RuntimeError):
    """A function that runs, but not as a CUDA graph, which allows no wait for the device."""


def captured(function: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """Capture a function into a CUDA graph.

    Returns:
        The graph's replay, which returns the same output tensors each time, overwritten.

    Raises:
        NotCaptured: If the function runs alone and fails during the capture.
    """
    with torch.cuda.device(device):
        # Capture needs its warm-up on a side stream.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                out = function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotCaptured(f"it cannot be captured in a CUDA graph: {error}") from error

    def replay() -> T:
        graph.replay()
        return out

    return replay


@dataclass(frozen=True)
class Bandwidth:
    """A machine's measured memory bandwidth, in 1e9 bytes a second.

    Attributes:
        read_gb_s: Bytes read per second.
        copy_gb_s: Bytes read and written per second by a copy.
    """

    read_gb_s: float
    copy_gb_s: float

    @property
    def ceiling_gb_s(self) -> float:
        """The higher of both, which no kernel is expected to exceed."""
        return max(self.read_gb_s, self.copy_gb_s)


class MemoryProbe:
    """Reads (sums) a buffer larger than any cache, and copies its one half to the other.

    To be timed in turn with other work.

    A virtual machine's memory may be twice as fast in one second as in the next: a share of the
    bandwidth is true only if both were measured in turn.

    Args:
        device: Device of the memory.
        num_bytes: Size of the buffer, 256 MiB by default.

    Attributes:
        calls: The two functions, for `measure`.
    """

    def __init__(self, device: torch.device | str = "cpu", num_bytes: int | None = None) -> None:
        buffer = torch.ones((num_bytes or _PROBE_BYTES) // 8 * 2, device=device)
        source, target = buffer.chunk(2)
        self._num_bytes = buffer.numel() * 4
        self.calls: dict[str, Callable[[], object]] = {
            "memory read": buffer.sum,
            "memory copy": lambda: target.copy_(source),
        }

    def bandwidth(self, timings: Mapping[str, Timing]) -> Bandwidth:
        """Return the bandwidth in the trials in which ``calls`` took these times."""
        read, copy = (timings[name].p50_ms for name in self.calls)
        return Bandwidth(self._num_bytes / read / 1e6, self._num_bytes / copy / 1e6)


def read_bandwidth(
    device: torch.device | str = "cpu", num_bytes: int | None = None, trials: int = 5
) -> Bandwidth:
    """Measure how fast torch reads and copies a buffer larger than any cache, see `MemoryProbe`.

    Args:
        device: Device of the memory.
        num_bytes: Size of the buffer, 256 MiB by default.
        trials: Number of timed calls of each; the median is used.
    """
    probe = MemoryProbe(device, num_bytes)
    return probe.bandwidth(measure(probe.calls, trials, 2, device))


def cache_emptier(device: torch.device | str) -> Callable[[], object]:
    """Return a function that reads 256 MiB, which evicts everything else from the caches.

    It only reads, so that the lines it leaves in the cache need no write-back later.
    """
    buffer = torch.ones(_PROBE_BYTES // 4, device=device)
    return buffer.sum


def cache_bytes(device: torch.device | str = "cpu") -> int | None:
    """Return the size of the device's last-level cache in bytes; None if it is not reported.

    A CPU's is read from Linux's ``/sys``, a CUDA device's L2 from its properties.
    """
    device = torch.device(device)
    if device.type == "cuda":
        size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", None)
        return int(size) if size else None
    sizes: dict[int, int] = {}
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        text = re.fullmatch(r"(\d+)([KMG]?)", _read(folder / "size"))
        level = _read(folder / "level")
        if text is not None and level.isdigit():
            sizes[int(level)] = int(text[1]) * 1024 ** " KMG".find(text[2] or " ")
    return sizes[max(sizes)] if sizes else None


def copies_needed(num_bytes: int, device: torch.device | str = "cpu") -> int:
    """Return how many copies of some data a rotation needs for each to be out of cache when used.

    Together they fill at least twice the last-level cache; a single copy larger than it suffices.

    Raises:
        ValueError: If there is no data.
    """
    if num_bytes < 1:
        raise ValueError(f"num_bytes must be at least 1, got {num_bytes}.")
    cache = cache_bytes(device) or _ASSUMED_CACHE_BYTES
    return 1 if num_bytes > cache else math.ceil(2 * cache / num_bytes)


def clock_mhz(device: torch.device | str = "cpu") -> float | None:
    """Return the present clock in MHz of the fastest core, or of a GPU's SMs; None if unknown.

    That of a CPU comes from Linux; a virtual machine may report its nominal clock. That of a GPU
    needs nvidia-ml-py.
    """
    device = torch.device(device)
    if device.type == "cuda":
        try:
            return float(torch.cuda.clock_rate(device))
        except (RuntimeError, ImportError, AttributeError):  # no library, or no permission
            return None
    clocks = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return max(float(clock) for clock in clocks) if clocks else None


def machine_name(device: torch.device) -> str:
    """Return the name of the accelerator, or of the processor with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"model name\s*:\s*(.+)", _read(Path("/proc/cpuinfo")))
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str | None]:
    """Return the versions that a time depends on, None for what is not installed.

    Returns:
        ``python``, ``torch``, ``numba``, ``triton``, ``cuda`` (torch's own) and ``driver``.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "numba", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    # "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build ..."
    driver = re.search(
        r"Kernel Module.*?\s(\d+(?:\.\d+)+)", _read(Path("/proc/driver/nvidia/version"))
    )
    return found | {"cuda": torch.version.cuda, "driver": driver[1] if driver else None}


def _read(path: Path) -> str:
    """Return a system file's text without surrounding whitespace, or "" if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


@dataclass
class Stages:
    """Collects the milliseconds of named stages: ``with stages("score"): ...``.

    On CUDA each stage is enclosed in events, which are read only for a summary, so that timing a
    stage does not wait for the device.

    Attributes:
        device: Device of the stages.
        taken_ms: Times of each stage in order; on CUDA those that have been read.
    """

    device: torch.device | str = "cpu"
    taken_ms: dict[str, list[float]] = field(default_factory=dict)
    _pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the body as one run of a stage; a body that raises is not counted."""
        if torch.device(self.device).type == "cuda":
            before = torch.cuda.Event(enable_timing=True)
            after = torch.cuda.Event(enable_timing=True)
            before.record(torch.cuda.current_stream(self.device))
            yield
            after.record(torch.cuda.current_stream(self.device))
            self._pending.append((name, before, after))
        else:
            began = time.perf_counter()
            yield
            self.taken_ms.setdefault(name, []).append((time.perf_counter() - began) * 1e3)

    def times(self) -> dict[str, list[float]]:
        """Return every stage's milliseconds, in order."""
        for name, before, after in self._pending:
            after.synchronize()
            self.taken_ms.setdefault(name, []).append(before.elapsed_time(after))
        self._pending.clear()
        return self.taken_ms

    def medians(self) -> dict[str, float]:
        """Return every stage's median milliseconds."""
        return {name: median(taken) for name, taken in self.times().items()}
