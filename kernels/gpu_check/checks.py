"""Every operator that has a Triton kernel: checked on real shapes, and timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from topkbench.kernels.full_attention.api import full_attention
from topkbench.kernels.gpu_check.plan import Job
from topkbench.kernels.gpu_check.rows import times
from topkbench.kernels.gpu_check.workplace import DTYPES, Workplace, wrong_operators
from topkbench.kernels.operators import Geometry, Operators
from topkbench.kernels.steps import BUDGET, LEAST_K
from topkbench.kernels.timing import clock_mhz

Found = Iterator[tuple[str, dict[str, Any]]]

_RBIT = 128


def check(place: Workplace, job: Job, rows: Sequence[Mapping[str, Any]]) -> Found:
    """Compare each operator with its reference at every size; the first that differs ends it."""
    dtype = DTYPES[job.options["dtype"]]
    made: dict[int, Operators] = {}
    for size, batch_size, bounded in job.options["sizes"]:
        shape = Geometry(
            batch_size=batch_size,
            num_kv_heads=job.options["num_kv_heads"],
            group=job.options["group"],
            head_dim=job.options["head_dim"],
            rbit=_RBIT,
            kv_len=size,
            k=min(max(LEAST_K, round(size * BUDGET)), size // 2),
        )
        made[size] = Operators(shape, place.device, dtype, "triton", bounded, planted=True)
    for name in job.left:
        found: dict[str, Any] = {}
        with place.part(name, found):
            for size, operators in made.items():
                try:
                    operators.checks()[name]()
                except AssertionError as error:
                    raise AssertionError(f"at {size:,} tokens: {error}") from None
                found["kv_len"] = size
            found["status"] = "ok"
        yield name, found


def operators(place: Workplace, job: Job, rows: Sequence[Mapping[str, Any]]) -> Found:
    """Check each operator at one shape, then time those that are right in turn, cold."""
    options = job.options
    heads, dtype = options["shape"], options["dtype"]
    shape = Geometry(
        batch_size=options["batch_size"],
        num_kv_heads=heads.num_kv_heads,
        group=heads.num_heads // heads.num_kv_heads,
        head_dim=heads.head_dim,
        rbit=_RBIT,
        kv_len=options["length"],
        k=max(LEAST_K, round(options["length"] * BUDGET)),
    )
    place.forget(job.name)
    made = Operators(shape, place.device, DTYPES[dtype], "triton")
    states = (made.query.flatten(1, 2), made.keys, made.values, made.scale)
    calls = made.calls() | {"full_attention": lambda: full_attention(*states, backend="triton")}
    before = wrong_operators(rows, dtype, shape.head_dim, shape.group)
    needed = made.bytes_needed()
    for name in job.left:
        found: dict[str, Any] = {}
        with place.part(name, found):
            assert name not in before, f"wrong in the checks before: {before[name]}"
            made.checks()[name]()
            if not place.toy:
                taken = place.timed({name: calls[name]})[name]
                found |= times(taken, None, needed[name], place.bandwidth_gb_s)
                found["clock_mhz"] = clock_mhz(place.device)
            found |= {"bytes_read_per_step": needed[name] / shape.batch_size, "status": "ok"}
            found |= {"k": shape.k, "rbit": _RBIT if name.startswith("ha") else None, "seed": 0}
        yield name, found
