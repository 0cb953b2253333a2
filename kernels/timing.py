"""The only stopwatch: interleaved medians, stages, and what the machine was while it was timed.

A speed-up is a ratio of two medians whose times were taken in turn, and has an interval over those
pairs: `speed_columns` makes both, with a note where the times cannot be relied on.
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

# Large enough that no cache holds it: 256 MiB.
_PROBE_BYTES = 2**28
# Taken for the last-level cache's size where the machine does not tell it: 64 MiB, more than most.
_ASSUMED_CACHE_BYTES = 2**26

T = TypeVar("T")

LEAST_PAIRS = 6
"""Pairs below which a speed-up has no interval: of fewer, not even the smallest and the largest
ratio enclose the median with 95%."""
WIDE_SPREAD = 2.0
"""A time whose 80th percentile is more than this many times its 20th is unsteady. On a quiet
machine it was at most 1.4 in 165 rows of layers and of whole models, and 1.9 in 274 rows of the
small model's steps."""
MUCH_LOAD = 0.1
"""Times are unsteady if others took more than this share of the processors while they were taken.
An idle system takes one or two hundredths."""
_LEAST_SECONDS = 0.25  # Linux counts in hundredths of a second: of less, a share says little
_RESAMPLES = 2000


@dataclass(frozen=True)
class Timing:
    """How long one function took, in milliseconds, over all trials."""

    p50_ms: float
    p20_ms: float
    p80_ms: float
    trials: int
    taken_ms: tuple[float, ...]
    """The times themselves, in the order they were taken."""

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
        """The times as `speed_columns` takes them: each trial was a turn of its own."""
        return [[taken] for taken in self.taken_ms]


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of the values lies, interpolated linearly."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def speedup_interval(
    full: Sequence[Sequence[float]], step: Sequence[Sequence[float]], seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95% interval of the ratio of medians of two things that were timed in turn.

    Pairs of turns are drawn with replacement, each with all of its times, so what slows both turns
    of a pair, or a whole turn, does not pass for precision. The interval is the percentile
    bootstrap's (Efron and Tibshirani 1993, chapter 13; whole turns: Davison and Hinkley 1997,
    section 3.8). It covers 92 to 99% with 6 to 30 pairs of noisy, bursty or drifting times.

    Args:
        full: Milliseconds of full attention, turn by turn.
        step: Milliseconds of what is compared, each turn taken just after full attention's.
        seed: Of the resampling.

    Returns:
        Both ends, the ratio itself between them; None with fewer than ``LEAST_PAIRS`` pairs.

    Raises:
        ValueError: If there are not as many turns of one as of the other, or turns differ in
            length.
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
        for one in np.array_split(drawn, 20)  # not all at once: turns may be long
    ]
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    ratio = float(np.median(first) / np.median(second))
    return min(float(low), ratio), max(float(high), ratio)


def unsteady(step: Timing, full: Timing | None, other_load: float | None) -> str | None:
    """Return why times cannot be relied on, in words; None where nothing speaks against them.

    Args:
        step: What was timed.
        full: Full attention, timed in turn with it; None where the step is full attention's.
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
) -> dict[str, Any]:
    """Return what a row says of a timed step and of the full attention timed in turn with it.

    Args:
        step: Milliseconds of the steps, turn by turn.
        full: Full attention's, each turn taken just before the step's; None where the step is full
            attention's own, which has no speed-up.
        other_load: What `OtherLoad.share` returned.

    Returns:
        The columns ``decode_ms_*``, ``full_ms_*``, ``speedup_vs_full`` with its interval,
        ``other_load`` and ``timing_note``, by name.
    """
    own = Timing.of([taken for turn in step for taken in turn])
    against = None if full is None else Timing.of([taken for turn in full for taken in turn])
    columns: dict[str, Any] = {}
    for name, timing in (("decode_ms", own), ("full_ms", against or own)):
        columns[f"{name}_p20"] = timing.p20_ms
        columns[f"{name}_p50"] = timing.p50_ms
        columns[f"{name}_p80"] = timing.p80_ms
    if full is not None and against is not None:
        columns["speedup_vs_full"] = against.p50_ms / own.p50_ms
        ends = speedup_interval(full, step)
        if ends is not None:
            columns["speedup_ci_low"], columns["speedup_ci_high"] = ends
    columns["other_load"] = other_load
    columns["timing_note"] = unsteady(own, against, other_load)
    return columns


@dataclass(frozen=True)
class Usage:
    """Seconds up to some moment, and the processors that this process may run on."""

    wall_s: float
    own_s: float
    """Processor time of this process, all threads."""
    busy_s: float
    """Time in which those processors worked for anyone, or were taken by the host."""
    processors: int


def usage() -> Usage | None:
    """Return the processors' usage so far, from Linux's ``/proc/stat``; None elsewhere."""
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
    if not busy:  # some sandboxes count nothing
        return None
    return Usage(time.perf_counter(), time.process_time(), busy / tick, len(ours))


def other_share(before: Usage | None, after: Usage | None) -> float | None:
    """Return the share of the processors' time that went to others between two moments, 0 to 1.

    That is the time in which processors were busy, less this process's own. None where it is not
    told, or the moments are too near together to tell.
    """
    if before is None or after is None:
        return None
    wall = after.wall_s - before.wall_s
    if wall < _LEAST_SECONDS:
        return None
    others = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return min(1.0, max(0.0, others / (wall * after.processors)))


class OtherLoad:
    """Watches, from when it is made, what else the processors do.

    Args:
        device: Where the work is done; a GPU's events do not measure the processors.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._watched = torch.device(device).type == "cpu"
        self._before = usage() if self._watched else None

    def share(self) -> float | None:
        """Return the share of the processors' time that others took, 0 to 1; None if unknown."""
        return other_share(self._before, usage()) if self._watched else None


def measure(
    functions: Mapping[str, Callable[[], object] | Sequence[Callable[[], object]]],
    trials: int = 30,
    warmup: int = 5,
    device: torch.device | str = "cpu",
    cuda_graph: bool = False,
    before: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time functions in turn: every trial runs each of them once, so drift hits all alike.

    Args:
        functions: What to time, by name. A sequence of functions is a rotation: copies that do the
            same on different memory, taken in turn, so that a trial finds its data out of cache;
            `copies_needed` says how many. A function alone is timed warm.
        trials: How often each is timed.
        warmup: How often each is run untimed before: compilation, first touch of memory.
        device: Where the functions work. On CUDA the time is the device's, between two events.
        cuda_graph: Capture each function once and time the replay, without launch overhead; its
            inputs and outputs must stay where they are. CUDA only.
        before: What runs untimed before each timed call, to empty the caches, say. A CUDA device
            is not waited for in between: it is still busy when the timed call is launched, which
            hides the time that launching takes.

    Returns:
        A ``Timing`` for each name.

    Raises:
        ValueError: If nothing is to be measured, or a graph is wanted on another device than CUDA.
    """
    device = torch.device(device)
    if trials < 1 or warmup < 0:
        raise ValueError(f"trials must be at least 1 and warmup 0, got {trials} and {warmup}.")
    if cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph needs a cuda device, got {device.type}.")
    rotations: dict[str, list[Callable[[], object]]] = {}
    for name, given in functions.items():
        rotations[name] = [given] if callable(given) else list(given)
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
    # Where the warm-up ended: from the start again would find what it has just read.
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


def captured(function: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """Capture a function into a CUDA graph.

    Returns:
        The graph's replay, which returns the same output each time, written anew.
    """
    with torch.cuda.device(device):
        # Capture wants its warm-up on a side stream.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function()

    def replay() -> T:
        graph.replay()
        return out

    return replay


@dataclass(frozen=True)
class Bandwidth:
    """A machine's measured memory bandwidth, in 1e9 bytes a second."""

    read_gb_s: float
    copy_gb_s: float

    @property
    def ceiling_gb_s(self) -> float:
        """The faster of both, which no kernel is expected to exceed."""
        return max(self.read_gb_s, self.copy_gb_s)


def read_bandwidth(
    device: torch.device | str = "cpu", num_bytes: int = _PROBE_BYTES, trials: int = 5
) -> Bandwidth:
    """Measure how fast torch reads (sums) and copies memory that no cache holds.

    Args:
        device: Whose memory.
        num_bytes: Size of the buffer; a copy needs two.
        trials: How often each is timed; the median counts.

    Returns:
        Bytes read a second, and bytes read and written a second by a copy.
    """
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    timings = measure({"read": source.sum, "copy": lambda: target.copy_(source)}, trials, 2, device)
    size = source.numel() * 4
    return Bandwidth(
        read_gb_s=size / timings["read"].p50_ms / 1e6,
        copy_gb_s=2 * size / timings["copy"].p50_ms / 1e6,
    )


def cache_emptier(device: torch.device | str) -> Callable[[], object]:
    """Return what reads 256 MiB, so that no cache holds what was there before.

    It reads and does not write: what it leaves behind costs nobody a write-back.
    """
    buffer = torch.ones(_PROBE_BYTES // 4, device=device)
    return buffer.sum


def cache_bytes(device: torch.device | str = "cpu") -> int | None:
    """Return the size of the device's last-level cache in bytes; None where it does not tell it.

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
    """Return how many distinct copies of some data make a rotation that finds them out of cache.

    Together they are at least twice the last-level cache; one that exceeds it is enough alone.

    Raises:
        ValueError: If there is no data.
    """
    if num_bytes < 1:
        raise ValueError(f"num_bytes must be at least 1, got {num_bytes}.")
    cache = cache_bytes(device) or _ASSUMED_CACHE_BYTES
    return 1 if num_bytes > cache else math.ceil(2 * cache / num_bytes)


def clock_mhz(device: torch.device | str = "cpu") -> float | None:
    """Return the clock at this moment in MHz: of the fastest core, or of a GPU's SMs; or None.

    A CPU's is Linux's; a virtual machine may state its nominal clock. A GPU's needs nvidia-ml-py.
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
    """Return what the machine calls itself: the accelerator, or the processor and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"model name\s*:\s*(.+)", _read(Path("/proc/cpuinfo")))
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str | None]:
    """Return the versions that a time depends on, None for what is not there.

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
    """Return a system file's text without its last newline, or nothing."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


@dataclass
class Stages:
    """Collects the milliseconds of named stages: ``with stages("score"): ...``.

    On CUDA each stage is enclosed in events, which are read when a summary is asked for, so that
    timing a stage does not wait for the device.

    Attributes:
        device: Where the stages work.
        taken_ms: Times of each stage in the order they ended, as far as they were read.
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
