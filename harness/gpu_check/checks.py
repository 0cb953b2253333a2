"""Check and time every operator that has a Triton kernel, on shapes of real models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

from topkbench.harness.gpu_check.plan import RBIT, Job, Size
from topkbench.harness.gpu_check.rows import time_columns
from topkbench.harness.gpu_check.workplace import Workplace, wrong_operators
from topkbench.harness.layer import budget
from topkbench.harness.planted import DTYPES
from topkbench.kernels.full_attention.api import full_attention
from topkbench.kernels.operators import Geometry, Operators
from topkbench.kernels.testing import WrongResult
from topkbench.kernels.timing import clock_mhz

PartRows = Iterator[tuple[str, dict[str, Any]]]
"""Each part of a job with the columns of its row."""


def check(workplace: Workplace, job: Job, rows: Sequence[Mapping[str, Any]]) -> PartRows:
    """Compare each operator with its reference at every size, up to the first that fails.

    A row's ``kv_len`` is the largest number of tokens at which the operator was right.
    """
    dtype = DTYPES[job.options["dtype"]]

    @cache
    def operators_of(size: Size) -> Operators:
        shape = Geometry(
            batch_size=size.rows,
            num_kv_heads=job.options["num_kv_heads"],
            group=job.options["group"],
            head_dim=job.options["head_dim"],
            rbit=RBIT,
            kv_len=size.tokens,
            k=min(budget(size.tokens), size.tokens // 2),
        )
        return Operators(shape, workplace.device, dtype, "triton", size.bounded, size.planted)

    for name in job.remaining_parts:
        columns: dict[str, Any] = {}
        right_at: int | None = None
        with workplace.part(name, columns):
            for size in job.options["sizes"]:
                operators_of(size).checks()[name]()
                if not size.bounded:  # in a bounded size fewer than its tokens are valid
                    right_at = size.tokens
            columns["status"] = "ok"
        if columns["status"] != "ok":
            columns["reason"] = f"at {size}: {columns['reason']}"
        yield name, columns | {"kv_len": right_at}


def operators(workplace: Workplace, job: Job, rows: Sequence[Mapping[str, Any]]) -> PartRows:
    """Check each operator at one shape; time the right ones, each alone, with empty caches."""
    options = job.options
    heads, dtype = options["heads"], options["dtype"]
    shape = Geometry(
        batch_size=options["batch_size"],
        num_kv_heads=heads.num_kv_heads,
        group=heads.num_heads // heads.num_kv_heads,
        head_dim=heads.head_dim,
        rbit=RBIT,
        kv_len=options["length"],
        k=budget(options["length"]),
    )
    known_wrong = wrong_operators(rows, dtype, shape.head_dim, shape.group)
    for name in job.remaining_parts:
        hash_columns = {"rbit": RBIT if name in ("hash_encode", "hamming_score") else None}
        columns: dict[str, Any] = {}
        with workplace.part(name, columns):
            if name in known_wrong:
                raise WrongResult(f"wrong in an earlier check: {known_wrong[name]}")
            inputs: Operators = workplace.keep(
                job.name,
                "operators",
                lambda: Operators(shape, workplace.device, DTYPES[dtype], "triton"),
            )
            inputs.checks()[name]()
            needed = inputs.bytes_needed()[name]
            if not workplace.toy:
                states = (inputs.query.flatten(1, 2), inputs.keys, inputs.values, inputs.scale)
                dense = {"full_attention": partial(full_attention, *states, backend="triton")}
                timing = workplace.timed({name: (inputs.calls() | dense)[name]})[name]
                columns |= time_columns(timing, None, needed, workplace.bandwidth_gb_s)
                columns["clock_mhz"] = clock_mhz(workplace.device)
            columns |= {"bytes_read_per_step": needed / shape.batch_size, "status": "ok"}
        yield name, hash_columns | columns
