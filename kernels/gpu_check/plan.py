"""What is checked and timed, most important first, and how long it may take."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

from topkbench.kernels.dispatch import OPERATORS
from topkbench.kernels.gpu_check.dense import BASELINES
from topkbench.kernels.steps import METHODS, Geometry, budget

SECONDS_PER_KERNEL = {"bfloat16": 1.25, "float16": 1.25, "float32": 1.75}
"""To compile one variant of a kernel, by the dtype of the states: half as long again as it took
for sm_90 on a shared core of a machine without a GPU (``tests/kernels/compile_kernels.py``)."""
SECONDS_TO_START = 15.0
"""To start a process that has torch, Triton and the device."""
SECONDS_TO_END = 5.0
"""To end the processes that must not run beside what is timed."""
CHECKS_END_S = 200.0
"""When timing begins, whatever is checked by then; the other checks go on after it."""
SECONDS_PER_PART = 45.0
"""After so long a part of a job is stopped, compiling included."""
RBIT = 128
"""Hash bits of a key."""

DTYPES = ("bfloat16", "float16", "float32")
CHECKED = (*OPERATORS, "full_attention")
"""The operators that have a Triton kernel."""

# Every two of dtype, head_dim and queries to a KV head occur together. Then the other triples.
_PAIRS = [
    *(("bfloat16", 128, 4), ("bfloat16", 128, 1), ("bfloat16", 64, 8)),
    *(("float16", 128, 4), ("float16", 64, 1), ("float16", 128, 8)),
    *(("float32", 64, 4), ("float32", 128, 1), ("float32", 128, 8)),
]
_REST = [one for one in product(DTYPES, (128, 64), (4, 1, 8)) if one not in _PAIRS]


class Size(NamedTuple):
    """One cache that operators are checked on.

    Attributes:
        tokens: Cached tokens.
        rows: Batch rows.
        bounded: Rows begin and end inside the cache: fewer tokens count.
        planted: A few keys carry most of the weight, which shows when one of them is left out;
            else all weigh about alike, which shows when a tile of any others is.
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

# HATA's geometries (its Figure 5): heads, cached tokens and batch rows.
_LLAMA2, _LLAMA31 = Geometry(32, 32, 128), Geometry(32, 8, 128)
_DECODED = [(_LLAMA2, 32768, 8), (_LLAMA31, 131072, 1), (_LLAMA2, 262144, 1), (_LLAMA31, 131072, 8)]
_SELECTING = [name for name in METHODS if name != "full"]


@dataclass(frozen=True)
class Job:
    """One step of the plan, done by one process.

    Attributes:
        name: What it is called where it is printed.
        kind: Which function of ``worker.JOBS`` does it.
        options: That function's settings.
        about: Columns that all of its rows have.
        parts: What it does one after the other, each of which gives a row.
        part_column: The column that names the part.
        compiles: Variants of kernels that it compiles and no earlier job did.
        seconds: What it takes beside compiling.
        alone: Nothing else may run meanwhile: it is timed.
        left_out: Parts that are done, or ended an earlier process.
        part_limit_s: After so many seconds a part is stopped.
        needs: The job without whose rows this one is not worth doing; it is dropped with it.
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
    left_out: frozenset[str] = frozenset()
    part_limit_s: float = SECONDS_PER_PART
    needs: str = ""

    @property
    def estimate_s(self) -> float:
        """How long it should take."""
        cost = SECONDS_PER_KERNEL[self.about.get("p_dtype", "bfloat16")]
        return self.compiles * cost + self.seconds

    @property
    def left(self) -> tuple[str, ...]:
        """The parts still to be done."""
        return tuple(part for part in self.parts if part not in self.left_out)


def timing_first(jobs: Iterable[Job]) -> deque[Job]:
    """Return jobs in their order, but those that are timed before all others."""
    return deque(sorted(jobs, key=lambda job: not job.alone))


def holds_up_timing(job: Job, end_s: float, waiting: Iterable[Job]) -> bool:
    """Say whether a job that ends then is to wait until what is timed is done."""
    return not job.alone and end_s > CHECKS_END_S and any(one.alone for one in waiting)


@dataclass(frozen=True)
class Plan:
    """Jobs in the order of their importance, and on how many processes they run.

    Attributes:
        jobs: The jobs.
        workers: Processes at a time, for what need not be alone.
    """

    jobs: Sequence[Job]
    workers: int
    steps: list[tuple[float, Job]] = field(init=False)
    """When each job should start, in seconds from the beginning, in the order of their starts."""
    total_s: float = field(init=False)
    """When the last should end."""

    def __post_init__(self) -> None:
        """Lay the jobs out: those next to each other in parallel, unless they must be alone."""
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
            place = free.index(min(free))
            steps.append((free[place], job))
            free[place] += job.estimate_s
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "total_s", max(free))

    def text(self, minutes: float) -> str:
        """Return the plan as lines, with what is left out if it takes as long as it says."""
        lines = [
            f"plan: {len(self.jobs)} steps, {sum(job.compiles for job in self.jobs)} kernels to "
            f"compile, {self.workers} processes: about {self.total_s / 60:.1f} of {minutes:g} "
            "minutes. A step for which there is no time left is dropped, later ones first.",
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
        toy: The same at sizes that Triton's interpreter can do.
        libraries: Optional libraries that are installed.
    """
    if toy:
        tiny = Geometry(2, 1, 64)
        jobs = [
            _check("float32", 64, 4, [Size(136, 1, True, True)], 1),
            _operators(tiny, 96, 1, "bfloat16", 0),
            *_decode(tiny, 96, 1, "float32"),
        ]
        return Plan(jobs, workers)
    jobs = [_prepare()] if "flashinfer" in libraries else []
    # Processes that start together each compile for themselves what all of them need.
    jobs += [_check(*one, compiles=51) for one in _PAIRS if one[0] == "bfloat16"]
    # As many heads as Llama-2 has are compiled for apart: their number is a multiple of 16.
    few = (Size(128, 1, False, True), Size(1000, 2, False, False), Size(1000, 2, True, True))
    jobs.append(_check("bfloat16", 128, 1, few, 16, 51))
    jobs += [_check(*one, compiles=51) for one in _PAIRS if one[0] == "float16"]
    jobs += [_operators(*shape, "bfloat16", 2) for shape in _DECODED[:2]]
    for shape, compiles in zip(_DECODED, (True, True, False, False), strict=True):
        jobs += _decode(*shape, "bfloat16", compiles)
    # Nothing is timed in float32. What does not depend on the dtype is compiled by now.
    jobs += [_check(*one, compiles=27) for one in _PAIRS if one[0] == "float32"]
    jobs += [_check(*one, compiles=27) for one in _REST]
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


def _place(shape: Geometry, length: int, batch_size: int, dtype: str) -> dict[str, Any]:
    called = str(length) if batch_size == 1 else f"{length} x {batch_size}"
    return {
        **{"model": str(shape), "subtask": called, "length": length, "kv_len": length},
        **{"batch_size": batch_size, "p_dtype": dtype},
    }


def _decode(
    shape: Geometry, length: int, batch_size: int, dtype: str, compiles: bool = False
) -> list[Job]:
    """Return the dense baselines of one shape, then each method."""
    options = {"shape": shape, "length": length, "batch_size": batch_size, "dtype": dtype}
    about = {"task": "decode_latency", **_place(shape, length, batch_size, dtype), "seed": 0}
    called = f"{shape}, {length:,} tokens, batch {batch_size}"
    dense = Job(
        name=f"every dense baseline: {called}",
        kind="dense",
        options=options,
        about={**about, "task": "kernel_dense", "method": "full"},
        parts=tuple(BASELINES),
        part_column="full_backend",
        compiles=4 if compiles else 0,
        seconds=12,
        alone=True,
    )
    methods = [
        Job(
            name=f"{name} against the best of them: {called}",
            kind="method",
            options={**options, "method": name},
            about={
                **{**about, "method": METHODS[name].name, "k": budget(length)},
                **_hashed(name),
            },
            parts=(name,),
            part_column="",
            compiles=2 if compiles else 0,
            seconds=3,
            alone=True,
            needs=dense.name,
        )
        for name in ("hata_integer", "hata", *(one for one in _SELECTING if "hata" not in one))
    ]
    return [dense, *methods]


def _hashed(method: str) -> dict[str, Any]:
    """Return the columns that tell HATA's two variants apart; none for other methods."""
    return {"rbit": RBIT, "p_use_norm": method == "hata"} if "hata" in method else {}


def _operators(shape: Geometry, length: int, batch_size: int, dtype: str, compiles: int) -> Job:
    options = {"shape": shape, "length": length, "batch_size": batch_size, "dtype": dtype}
    return Job(
        name=f"time of each operator: {shape}, {length:,} tokens, batch {batch_size}",
        kind="operators",
        options=options,
        about={
            **{"task": "kernel_times", **_place(shape, length, batch_size, dtype)},
            **{"k": budget(length), "seed": 0},
        },
        parts=CHECKED,
        part_column="method",
        compiles=compiles,
        seconds=12,
        alone=True,
    )
