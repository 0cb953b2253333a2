"""The plan of a run: what to check and time, most important first, with time estimates."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

from topkbench.harness import variants
from topkbench.harness.gpu_check.dense import BASELINES
from topkbench.harness.layer import budget, heads_label, one_layer, shape_label
from topkbench.kernels.dispatch import OPERATORS
from topkbench.methods.base import Geometry

SECONDS_PER_KERNEL = {"bfloat16": 1.25, "float16": 1.25, "float32": 1.75}
"""Estimate for compiling one variant of a kernel, by the states' dtype: 1.5 times what it took for
sm_90 on a shared core of a machine without a GPU (``tests/kernels/compile_kernels.py``)."""
SECONDS_TO_START = 15.0
"""Estimate for starting a process with torch, Triton and the device."""
SECONDS_TO_END = 5.0
"""Estimate for ending the other processes before timing begins."""
CHECKS_END_S = 200.0
"""When timing begins, in seconds from the start; unfinished checks continue after the timing."""
SECONDS_PER_PART = 45.0
"""Time limit of one part of a job, compiling included."""
RBIT = 128
"""Hash bits of a key."""

DTYPES = ("bfloat16", "float16", "float32")
CHECKED = (*OPERATORS, "full_attention")
"""The operators that have a Triton kernel."""

# Triples of dtype, head_dim and queries per KV head: in these each pair of values occurs.
_PAIRS = [
    *(("bfloat16", 128, 4), ("bfloat16", 128, 1), ("bfloat16", 64, 8)),
    *(("float16", 128, 4), ("float16", 64, 1), ("float16", 128, 8)),
    *(("float32", 64, 4), ("float32", 128, 1), ("float32", 128, 8)),
]
_OTHER_TRIPLES = [
    triple for triple in product(DTYPES, (128, 64), (4, 1, 8)) if triple not in _PAIRS
]


class Size(NamedTuple):
    """One cache that operators are checked on.

    Attributes:
        tokens: Cached tokens.
        rows: Batch rows.
        bounded: Rows begin and end inside the cache, so that fewer tokens are valid.
        planted: A few keys carry most of the weight, so that missing one of them shows; otherwise
            all weigh about the same, so that missing any tile shows.
    """

    tokens: int
    rows: int
    bounded: bool
    planted: bool

    def __str__(self) -> str:
        ends = ", rows that end inside" if self.bounded else ""
        return f"{self.tokens:,} tokens{ends}{', planted keys' if self.planted else ''}"


_SIZES = (
    *(Size(128, 2, False, False), Size(128, 2, True, True)),
    *(Size(1000, 2, *both) for both in product((False, True), (False, True))),
    *(Size(32768, 2, False, False), Size(32768, 2, True, True)),
    *(Size(262144, 1, False, False), Size(262144, 1, True, True)),
)


class Shape(NamedTuple):
    """The cache of one decode step of one layer."""

    heads: Geometry
    length: int
    batch_size: int
    dtype: str

    def __str__(self) -> str:
        return f"{heads_label(self.heads)}, {self.length:,} tokens, batch {self.batch_size}"

    def options(self) -> dict[str, Any]:
        """Return the shape as options of a job."""
        return self._asdict()

    def columns(self) -> dict[str, Any]:
        """Return the shape as columns of a row."""
        label = shape_label(self.length, self.batch_size)
        return {
            **{"model": heads_label(self.heads), "subtask": label, "length": self.length},
            **{"kv_len": self.length, "batch_size": self.batch_size, "p_dtype": self.dtype},
            "seed": 0,
        }


# HATA's geometries (its Figure 5): heads, cached tokens and batch rows.
_LLAMA2, _LLAMA31 = one_layer(32, 32, 128), one_layer(32, 8, 128)
_DECODE_SHAPES = [
    Shape(_LLAMA2, 32768, 8, "bfloat16"),
    Shape(_LLAMA31, 131072, 1, "bfloat16"),
    Shape(_LLAMA2, 262144, 1, "bfloat16"),
    Shape(_LLAMA31, 131072, 8, "bfloat16"),
]


@dataclass(frozen=True)
class Job:
    """One step of the plan, done by one process.

    Attributes:
        name: The name that is printed.
        kind: The key in ``worker.JOBS`` of the function that does it.
        options: That function's settings.
        about: Columns that all of its rows share.
        parts: Its parts, done one after the other; each gives a row.
        part_column: The column that names the part; empty if none does.
        compiles: Kernel variants that it compiles and no earlier job has compiled.
        seconds: Estimated time apart from compiling.
        alone: Whether it is timed, so that nothing else may run at the same time.
        finished_parts: Parts not to do again: they are done, or ended an earlier process.
        part_limit_s: A part is stopped after this many seconds.
        needs: Name of the job whose rows this one needs; if that job is dropped, so is this one.
        last: Whether it is timed after the checks, in the time that they leave.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    about: Mapping[str, Any]
    parts: tuple[str, ...]
    part_column: str
    compiles: int
    seconds: float
    alone: bool
    finished_parts: frozenset[str] = frozenset()
    part_limit_s: float = SECONDS_PER_PART
    needs: str = ""
    last: bool = False

    @property
    def before_checks(self) -> bool:
        """Whether checks that take too long wait for this job."""
        return self.alone and not self.last

    @property
    def estimate_s(self) -> float:
        """Estimated seconds, compiling included."""
        cost = SECONDS_PER_KERNEL[self.about.get("p_dtype", "bfloat16")]
        return self.compiles * cost + self.seconds

    @property
    def remaining_parts(self) -> tuple[str, ...]:
        """The parts still to be done."""
        return tuple(part for part in self.parts if part not in self.finished_parts)


def timing_first(jobs: Iterable[Job]) -> deque[Job]:
    """Return the timed jobs that come before the checks, then the others, each in their order."""
    return deque(sorted(jobs, key=lambda job: not job.before_checks))


def holds_up_timing(job: Job, end_s: float, waiting: Iterable[Job]) -> bool:
    """Return whether a check that would end at ``end_s`` must wait for the timed jobs."""
    return not job.alone and end_s > CHECKS_END_S and any(one.before_checks for one in waiting)


@dataclass(frozen=True)
class Plan:
    """Jobs, most important first, and the number of processes that run them.

    Attributes:
        jobs: The jobs.
        workers: Processes at a time, for jobs that need not run alone.
    """

    jobs: Sequence[Job]
    workers: int
    steps: list[tuple[float, Job]] = field(init=False)
    """The planned start of each job, in seconds from the beginning, in order."""
    total_s: float = field(init=False)
    """The planned end of the last job."""

    def __post_init__(self) -> None:
        """Schedule the jobs: neighbours run in parallel unless they must run alone."""
        free = [SECONDS_TO_START] * self.workers
        steps: list[tuple[float, Job]] = []
        waiting = deque(self.jobs)
        while waiting:
            if holds_up_timing(waiting[0], min(free) + waiting[0].estimate_s, waiting):
                waiting = timing_first(waiting)
            job = waiting.popleft()
            before = steps[-1][1] if steps else job
            if self.workers > 1 and job.alone != before.alone:
                change = SECONDS_TO_END if job.alone else SECONDS_TO_START
                free = [max(free) + change] * self.workers
            elif job.alone:
                free = [max(free)] * self.workers
            worker = free.index(min(free))
            steps.append((free[worker], job))
            free[worker] += job.estimate_s
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "total_s", max(free))

    def text(self, minutes: float) -> str:
        """Return the plan as lines; jobs that do not fit the time by the estimates are marked."""
        first = [(start, job) for start, job in self.steps if not job.last]
        end_s = max(start + job.estimate_s for start, job in first)
        others = len(self.steps) - len(first)
        then = f", then {others} steps of other methods until {self.total_s / 60:.1f}"
        lines = [
            f"plan: {len(first)} steps, {self.workers} processes: about {end_s / 60:.1f} of "
            f"{minutes:g} minutes{then if others else ''}; "
            f"{sum(job.compiles for job in self.jobs)} kernels to compile. A step for which there "
            "is no time left is dropped, later ones first.",
            f"{'from s':>7} {'for s':>6} {'kernels':>8}  step",
        ]
        for start, job in self.steps:
            late = "  (no time)" if start + job.estimate_s > 60 * minutes else ""
            lines.append(
                f"{start:>7.0f} {job.estimate_s:>6.0f} {job.compiles:>8}  {job.name}{late}"
            )
        return "\n".join(lines)


def make_plan(workers: int, toy: bool, libraries: Sequence[str]) -> Plan:
    """Return the plan of a run.

    Args:
        workers: Processes at a time.
        toy: Use sizes that Triton's interpreter can run.
        libraries: Optional libraries that are installed.
    """
    if toy:
        tiny = Shape(one_layer(2, 1, 64), 96, 1, "float32")
        jobs = [
            _check("float32", 64, 4, [Size(136, 1, True, True)], 1),
            _operators(tiny._replace(dtype="bfloat16"), 0),
            *_decode(tiny, 0),
            *_other_methods(tiny, 0),
        ]
        return Plan(jobs, workers)
    jobs = [_prepare()] if "flashinfer" in libraries else []
    # Processes that start together each compile what all of them need.
    jobs += [_check(*one, compiles=51) for one in _PAIRS if one[0] == "bfloat16"]
    # Triton compiles separately for Llama-2's number of heads, since it is a multiple of 16.
    few_sizes = (Size(128, 1, False, True), Size(1000, 2, False, False), Size(1000, 2, True, True))
    jobs.append(_check("bfloat16", 128, 1, few_sizes, 16, 51))
    jobs += [_check(*one, compiles=51) for one in _PAIRS if one[0] == "float16"]
    jobs += [_operators(shape, 2) for shape in _DECODE_SHAPES[:2]]
    compiles = (2, 2, 0, 0)  # a geometry's second shape needs no other kernels than its first
    for shape, count in zip(_DECODE_SHAPES, compiles, strict=True):
        jobs += _decode(shape, count)
    # Nothing is timed in float32. Kernels that do not depend on the dtype are compiled by now.
    jobs += [_check(*one, compiles=27) for one in _PAIRS if one[0] == "float32"]
    jobs += [_check(*one, compiles=27) for one in _OTHER_TRIPLES]
    for shape, count in zip(_DECODE_SHAPES, compiles, strict=True):
        jobs += _other_methods(shape, count)
    return Plan(jobs, workers)


def _prepare() -> Job:
    return Job(
        name="compile FlashInfer",
        kind="prepare",
        options={},
        about={"task": "kernel_check", "model": "32 query heads of 128", "p_dtype": "bfloat16"},
        parts=("flashinfer",),
        part_column="method",
        compiles=0,
        seconds=100,
        alone=False,
        part_limit_s=150,
    )


def _check(
    dtype: str,
    head_dim: int,
    group: int,
    sizes: Sequence[Size] = _SIZES,
    num_kv_heads: int = 2,
    compiles: int = 0,
) -> Job:
    return Job(
        name=f"check operators: {dtype}, head_dim {head_dim}, {num_kv_heads} x {group} heads",
        kind="check",
        options={
            **{"dtype": dtype, "head_dim": head_dim, "group": group, "sizes": sizes},
            "num_kv_heads": num_kv_heads,
        },
        about={
            **{"task": "kernel_check", "model": f"head_dim {head_dim}, {num_kv_heads} x {group}"},
            **{"subtask": dtype, "p_dtype": dtype, "p_head_dim": head_dim, "p_group": group},
        },
        parts=CHECKED,
        part_column="method",
        compiles=compiles,
        seconds=16,
        alone=False,
    )


def _decode(shape: Shape, compiles: int) -> list[Job]:
    """Return the dense baselines of one shape, then each method that is timed before the checks.

    Args:
        shape: The shape.
        compiles: Kernel variants that each method compiles.
    """
    dense = Job(
        name=f"every dense baseline: {shape}",
        kind="dense",
        options=shape.options(),
        about={"task": "kernel_dense", **shape.columns(), "method": "full"},
        parts=tuple(BASELINES),
        part_column="full_backend",
        compiles=2 * compiles,
        seconds=12,
        alone=True,
    )
    return [dense, *(_method(name, shape, compiles, dense.name) for name in variants.FIRST)]


def _other_methods(shape: Shape, compiles: int) -> list[Job]:
    """Return the methods of one shape that are timed after the checks."""
    dense, *_ = _decode(shape, compiles)
    others = [name for name in variants.names() if name not in ("full", *variants.FIRST)]
    return [
        replace(_method(name, shape, compiles, dense.name), seconds=5, last=True) for name in others
    ]


def _method(name: str, shape: Shape, compiles: int, needs: str) -> Job:
    return Job(
        name=f"{name} against the best of them: {shape}",
        kind="method",
        options={**shape.options(), "method": name},
        about={
            **{"task": "decode_latency", **shape.columns(), "k": budget(shape.length)},
            **variants.columns(variants.make(name, rbit=RBIT)),
        },
        parts=(name,),
        part_column="",
        compiles=compiles,
        seconds=3,
        alone=True,
        needs=needs,
    )


def _operators(shape: Shape, compiles: int) -> Job:
    return Job(
        name=f"time of each operator: {shape}",
        kind="operators",
        options=shape.options(),
        about={"task": "kernel_times", **shape.columns(), "k": budget(shape.length)},
        parts=CHECKED,
        part_column="method",
        compiles=compiles,
        seconds=12,
        alone=True,
    )
