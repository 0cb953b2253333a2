"""Every operator that has a Triton kernel: checked on real shapes, and timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

from topkbench.kernels.full_attention.api import full_attention
from topkbench.kernels.gpu_check.plan import RBIT, Job, Size
from topkbench.kernels.gpu_check.rows import times
from topkbench.kernels.gpu_check.workplace import DTYPES, Workplace, wrong_operators
from topkbench.kernels.operators import Geometry, Operators
from topkbench.kernels.steps import budget
from topkbench.kernels.testing import WrongResult
from topkbench.kernels.timing import clock_mhz

Found = Iterator[tuple[str, dict[str, Any]]]


def check(place: Workplace, job: Job, rows: Sequence[Mapping[str, Any]]) -> Found:
    """Compare each operator with its reference at every size; the first that fails ends it.

    A row's ``kv_len`` is the most tokens at which the operator was right.
    """
    dtype = DTYPES[job.options["dtype"]]

    @cache
    def made(size: Size) -> Operators:
        shape = Geometry(
            batch_size=size.rows,
            num_kv_heads=job.options["num_kv_heads"],
            group=job.options["group"],
            head_dim=job.options["head_dim"],
            rbit=RBIT,
            kv_len=size.tokens,
            k=min(budget(size.tokens), size.tokens // 2),
        )
        return Operators(shape, place.device, dtype, "triton", size.bounded, size.planted)

    for name in job.left:
        found: dict[str, Any] = {}
        right: int | None = None
        with place.part(name, found):
            for size in job.options["sizes"]:
                made(size).checks()[name]()
                if not size.bounded:  # else fewer tokens than that count
                    right = size.tokens
            found["status"] = "ok"
        if found["status"] != "ok":
            found["reason"] = f"at {size}: {found['reason']}"
        yield name, found | {"kv_len": right}


def operators(place: Workplace, job: Job, rows: Sequence[Mapping[str, Any]]) -> Found:
    """Check each operator at one shape, then time those that are right, one by one, cold."""
    options = job.options
    heads, dtype = options["shape"], options["dtype"]
    shape = Geometry(
        batch_size=options["batch_size"],
        num_kv_heads=heads.num_kv_heads,
        group=heads.num_heads // heads.num_kv_heads,
        head_dim=heads.head_dim,
        rbit=RBIT,
        kv_len=options["length"],
        k=budget(options["length"]),
    )
    before = wrong_operators(rows, dtype, shape.head_dim, shape.group)
    for name in job.left:
        about = {"rbit": RBIT if name in ("hash_encode", "hamming_score") else None}
        found: dict[str, Any] = {}
        with place.part(name, found):
            if name in before:
                raise WrongResult(f"wrong in the checks before: {before[name]}")
            made: Operators = place.keep(
                job.name,
                "operators",
                lambda: Operators(shape, place.device, DTYPES[dtype], "triton"),
            )
            made.checks()[name]()
            needed = made.bytes_needed()[name]
            if not place.toy:
                states = (made.query.flatten(1, 2), made.keys, made.values, made.scale)
                ours = {"full_attention": partial(full_attention, *states, backend="triton")}
                taken = place.timed({name: (made.calls() | ours)[name]})[name]
                found |= times(taken, None, needed, place.bandwidth_gb_s)
                found["clock_mhz"] = clock_mhz(place.device)
            found |= {"bytes_read_per_step": needed / shape.batch_size, "status": "ok"}
        yield name, about | found
