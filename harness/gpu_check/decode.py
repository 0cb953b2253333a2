"""Time one decode step of one layer: dense baselines, and each method against the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from topkbench.harness import variants
from topkbench.harness.gpu_check.dense import BASELINES, attention_inputs
from topkbench.harness.gpu_check.plan import RBIT, Job
from topkbench.harness.gpu_check.rows import time_columns
from topkbench.harness.gpu_check.workplace import Workplace, wrong_operators
from topkbench.harness.layer import one_layer
from topkbench.harness.outcome import Unavailable
from topkbench.harness.planted import DTYPES, PlantedStates
from topkbench.kernels.dispatch import OPERATORS, Impl, Operator
from topkbench.kernels.testing import (
    WrongResult,
    assert_near,
    assert_within_bound,
    full_attention_bound,
)
from topkbench.kernels.timing import Timing, clock_mhz, unsteady
from topkbench.methods.base import Geometry, with_impl

PartRows = Iterator[tuple[str, dict[str, Any]]]
"""Each part of a job with the columns of its row."""

_PREPARED = (2, 4096)  # batch rows and tokens with which FlashInfer is prepared
_NUM_BASELINES = 3  # each method is timed in turn with this many of the fastest dense baselines


class _UsedOperators(dict[Operator, Impl]):
    """The implementation of each operator; records the names that were looked up."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(OPERATORS, "triton"))
        self.names: set[str] = set()

    def get(self, name: Operator, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)


def prepare(workplace: Workplace, job: Job, rows: Sequence[Mapping[str, Any]]) -> PartRows:
    """Let FlashInfer compile what the timed steps need, while checks run; check its result."""
    columns: dict[str, Any] = {}
    with workplace.part("flashinfer", columns):
        rows_of_batch, tokens = _PREPARED
        for num_kv_heads in (32, 8):
            shape = replace(one_layer(32, num_kv_heads, 128), device=workplace.device)
            states = PlantedStates.draw(shape, rows_of_batch, tokens, torch.bfloat16, 0, 0)
            call = BASELINES["flashinfer"].make(states)
            _assert_right(call, _expected_output(states))
        columns |= {"status": "ok", "kv_len": tokens, "subtask": _version("flashinfer")}
    yield "flashinfer", columns


def dense(workplace: Workplace, job: Job, rows: Sequence[Mapping[str, Any]]) -> PartRows:
    """Check every baseline against float64; time those that are right, each alone."""
    for name in job.remaining_parts:
        columns: dict[str, Any] = {}
        with workplace.part(name, columns):
            columns["full_backend"] = f"{name}, {_version(name)}"
            _require_ready(name, rows)
            states = _states(workplace, job)
            call = BASELINES[name].make(states)
            _assert_right(
                call,
                workplace.keep(_shape_key(job), "expected", partial(_expected_output, states)),
            )
            if name == "triton":
                _require_right_operators({"full_attention"}, job, rows)
            read = states.key_states.nbytes + states.value_states.nbytes
            if not workplace.toy:
                timing = workplace.timed({name: call})[name]
                columns |= time_columns(timing, None, read, workplace.bandwidth_gb_s)
                columns["clock_mhz"] = clock_mhz(workplace.device)
            columns |= {"bytes_read_per_step": read / len(states.key_states), "status": "ok"}
        if columns["status"] != "ok":
            columns["reason"] = f"{name}: {columns['reason']}"
        if not workplace.toy and not name.startswith("triton"):
            columns["impl"] = None  # the kernel is the library's
        yield name, columns


def method(workplace: Workplace, job: Job, rows: Sequence[Mapping[str, Any]]) -> PartRows:
    """Check each stage of one method's step, then time it in turn with the fastest dense baselines.

    The speed-up is over the fastest of those, by the times taken here.
    """
    name = job.options["method"]
    columns: dict[str, Any] = {}
    with workplace.part(name, columns):
        states, used = _states(workplace, job), _UsedOperators()
        method = with_impl(variants.make(name, rbit=RBIT), used)
        geometry = _geometry(workplace, job)
        layer = variants.layer_of(method, geometry, states)
        mismatch = layer.mismatch()
        if mismatch is not None:
            raise WrongResult(mismatch)
        read, _ = layer.reads(geometry)
        _require_right_operators(used.names, job, rows)
        columns |= {"status": "ok", "bytes_read_per_step": float(read)}
        if not workplace.toy:
            needed = read * len(states.key_states)
            full = {one: _baseline(workplace, job, one) for one in fastest_baselines(job, rows)}
            timings = workplace.timed({**full, name: lambda: layer.step().out})
            best = min(full, key=lambda one: _steady_then_fast(timings[one]), default=None)
            baseline = None if best is None else timings[best]
            columns |= time_columns(timings[name], baseline, needed, workplace.bandwidth_gb_s)
            columns |= {"full_backend": best, "clock_mhz": clock_mhz(workplace.device)}
    yield name, columns


def _shape_key(job: Job) -> tuple[Any, ...]:
    """Return what identifies a job's shape, dtype included."""
    return tuple(job.options[name] for name in ("heads", "length", "batch_size", "dtype"))


def _geometry(workplace: Workplace, job: Job) -> Geometry:
    """Return a job's shape on the device, in the job's dtype."""
    dtype_bytes = DTYPES[job.options["dtype"]].itemsize
    return replace(job.options["heads"], device=workplace.device, dtype_bytes=dtype_bytes)


def _states(workplace: Workplace, job: Job) -> PlantedStates:
    """Return the states of a job's shape, drawn once for all jobs of that shape.

    No needle outweighs the other keys, so that any tile that a kernel leaves out shows.
    """
    _, length, batch_size, dtype = _shape_key(job)
    drawn = (_geometry(workplace, job), batch_size, length, DTYPES[dtype], 0, 0)
    states: PlantedStates = workplace.keep(
        _shape_key(job), "states", lambda: PlantedStates.draw(*drawn)
    )
    return states


def _version(name: str) -> str:
    try:
        return BASELINES[name].version()
    except ValueError as error:
        raise Unavailable(str(error)) from None


def _expected_output(states: PlantedStates) -> tuple[torch.Tensor, torch.Tensor]:
    return full_attention_bound(*attention_inputs(states))


def _assert_right(
    call: Callable[[], torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    out = call()
    assert_within_bound(out, *expected)
    assert_near(out, expected[0])


def _steady_then_fast(timing: Timing) -> tuple[bool, float]:
    """Return a sort key of baselines: steady times before unsteady ones, then by the median."""
    return unsteady(timing, None, None) is not None, timing.p50_ms


def fastest_baselines(job: Job, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the fastest dense baselines of a job's shape, as their rows name them."""
    same = ("model", "subtask", "p_dtype")
    dense = [
        row
        for row in rows
        if (row["task"], row["status"]) == ("kernel_dense", "ok")
        and row.get("decode_ms_p50") is not None
        and all(row[name] == job.about[name] for name in same)
    ]
    dense.sort(key=lambda row: (row.get("timing_note") is not None, row["decode_ms_p50"]))
    return [row["full_backend"] for row in dense[:_NUM_BASELINES]]


def _baseline(workplace: Workplace, job: Job, backend: str) -> Callable[[], torch.Tensor]:
    """Return the call of a baseline, named as in its row; made once for all methods."""
    # A name may be the beginning of another: "triton" and "triton, tiles of 8 KiB".
    name = max((one for one in BASELINES if backend.startswith(f"{one}, ")), key=len)
    states = _states(workplace, job)
    call: Callable[[], torch.Tensor] = workplace.keep(
        _shape_key(job), backend, lambda: BASELINES[name].make(states)
    )
    return call


def _require_ready(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise Unavailable if FlashInfer was not prepared in time: compiling it now takes too long."""
    if name != "flashinfer":
        return
    preparations = [row for row in rows if (row["task"], row["method"]) == ("kernel_check", name)]
    if not any(row["status"] == "ok" for row in preparations):
        reason = (
            preparations[-1]["reason"] if preparations else "it was not prepared before the timing."
        )
        raise Unavailable(f"{name} was not ready: {reason}")


def _require_right_operators(names: set[str], job: Job, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise WrongResult if the step uses an operator whose kernel failed an earlier check."""
    shape = job.options["heads"]
    group = shape.num_heads // shape.num_kv_heads
    wrong = wrong_operators(rows, job.options["dtype"], shape.head_dim, group)
    for name in sorted(names & set(wrong)):
        raise WrongResult(f"{name} was wrong in an earlier check: {wrong[name]}")
