"""One decode step of one layer: every dense baseline, and each method against the best of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from topkbench.kernels.dispatch import OPERATORS, Impl
from topkbench.kernels.gpu_check.dense import BASELINES
from topkbench.kernels.gpu_check.plan import RBIT, Job
from topkbench.kernels.gpu_check.rows import Unavailable, times
from topkbench.kernels.gpu_check.workplace import DTYPES, Workplace, wrong_operators
from topkbench.kernels.steps import METHODS, Geometry, Layer
from topkbench.kernels.testing import (
    WrongResult,
    assert_near,
    assert_within_bound,
    full_attention_bound,
)
from topkbench.kernels.timing import Timing, clock_mhz, unsteady

Found = Iterator[tuple[str, dict[str, Any]]]

_PREPARED = (2, 4096)  # batch rows and tokens that FlashInfer is prepared with
_CLOSEST = 3  # dense baselines, the fastest alone, that each method is timed in turn with


class _Used(dict[str, Impl]):
    """The implementation of each operator, and which were asked for."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(OPERATORS, "triton"))
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Impl:
        self.names.add(name)
        return super().__getitem__(name)


def prepare(place: Workplace, job: Job, rows: Sequence[Mapping[str, Any]]) -> Found:
    """Let FlashInfer compile what the timed steps need, while others check; and check it."""
    found: dict[str, Any] = {}
    with place.part("flashinfer", found):
        rows_of_batch, tokens = _PREPARED
        for num_kv_heads in (32, 8):
            shape = Geometry(32, num_kv_heads, 128)
            layer = Layer.draw(shape, rows_of_batch, tokens, RBIT, torch.bfloat16, place.device)
            _checked(layer, _made(layer, "flashinfer"), _expected(layer))
        found |= {"status": "ok", "kv_len": tokens, "subtask": _version("flashinfer")}
    yield "flashinfer", found


def dense(place: Workplace, job: Job, rows: Sequence[Mapping[str, Any]]) -> Found:
    """Check every baseline against float64 and time those that are right, each alone."""
    for name in job.left:
        found: dict[str, Any] = {}
        with place.part(name, found):
            found["full_backend"] = f"{name}, {_version(name)}"
            _refuse_unready(name, rows)
            layer = _layer(place, job)
            call = _made(layer, name)
            _checked(layer, call, place.keep(_key(job), "expected", partial(_expected, layer)))
            if name == "triton":
                _refuse_wrong({"full_attention"}, job, layer, rows)
            read = layer.keys.nbytes + layer.values.nbytes
            if not place.toy:
                taken = place.timed({name: call})[name]
                found |= times(taken, None, read, place.bandwidth_gb_s)
                found["clock_mhz"] = clock_mhz(place.device)
            found |= {"bytes_read_per_step": read / len(layer.keys), "status": "ok"}
        if found["status"] != "ok":
            found["reason"] = f"{name}: {found['reason']}"
        if not place.toy and not name.startswith("triton"):
            found["impl"] = None  # the library's own
        yield name, found


def method(place: Workplace, job: Job, rows: Sequence[Mapping[str, Any]]) -> Found:
    """Check one method's step stage by stage, then time it in turn with the fastest dense ones.

    The fastest of those, as they were timed here, is the baseline of its speed-up.
    """
    name = job.options["method"]
    found: dict[str, Any] = {}
    with place.part(name, found):
        layer = _layer(place, job)
        used = _Used()
        step = METHODS[name](layer, used)
        step.check()
        _refuse_wrong(used.names, job, layer, rows)
        found |= {"status": "ok", "bytes_read_per_step": float(step.bytes_read())}
        if not place.toy:
            needed = step.bytes_read() * len(layer.keys)
            full = {one: _baseline(place, job, one) for one in _fastest(job, rows)}
            taken = place.timed({**full, name: step})
            best = min(full, key=lambda one: _rank(taken[one]), default=None)
            against = None if best is None else taken[best]
            found |= times(taken[name], against, needed, place.bandwidth_gb_s)
            found |= {"full_backend": best, "clock_mhz": clock_mhz(place.device)}
    yield name, found


def _key(job: Job) -> tuple[Any, ...]:
    """Return what tells the states of a job's shape from those of another."""
    return tuple(job.options[name] for name in ("shape", "length", "batch_size", "dtype"))


def _layer(place: Workplace, job: Job) -> Layer:
    """Return the states of a job's shape, drawn once for all jobs of it."""
    shape, length, batch_size, dtype = _key(job)
    states = (shape, batch_size, length, RBIT, DTYPES[dtype], place.device)
    layer: Layer = place.keep(_key(job), "layer", lambda: Layer.draw(*states))
    return layer


def _version(name: str) -> str:
    try:
        return BASELINES[name].version()
    except ValueError as error:
        raise Unavailable(str(error)) from None


def _made(layer: Layer, name: str) -> Callable[[], torch.Tensor]:
    return BASELINES[name].make(layer)


def _expected(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    states = (layer.query.flatten(1, 2), layer.keys, layer.values)
    return full_attention_bound(*states, layer.keys.shape[-1] ** -0.5)


def _checked(
    layer: Layer, call: Callable[[], torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    out = call()
    assert_within_bound(out, *expected)
    assert_near(out, expected[0])


def _rank(timing: Timing) -> tuple[bool, float]:
    """Return what orders baselines: steady ones before unsteady ones, then the faster."""
    return unsteady(timing, None, None) is not None, timing.p50_ms


def _fastest(job: Job, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the fastest dense baselines of a job's shape, as their rows have them."""
    same = ("model", "subtask", "p_dtype")
    dense = [
        row
        for row in rows
        if (row["task"], row["status"]) == ("kernel_dense", "ok")
        and row.get("decode_ms_p50") is not None
        and all(row[name] == job.about[name] for name in same)
    ]
    dense.sort(key=lambda row: (row.get("timing_note") is not None, row["decode_ms_p50"]))
    return [row["full_backend"] for row in dense[:_CLOSEST]]


def _baseline(place: Workplace, job: Job, backend: str) -> Callable[[], torch.Tensor]:
    """Return the call of a baseline named as its row names it, made once for all methods."""
    # A name may begin another: "triton" and "triton, tiles of 8 KiB".
    name = max((one for one in BASELINES if backend.startswith(f"{one}, ")), key=len)
    layer = _layer(place, job)
    call: Callable[[], torch.Tensor] = place.keep(_key(job), backend, lambda: _made(layer, name))
    return call


def _refuse_unready(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a library that was not prepared in time: here it would hold up all others."""
    if name != "flashinfer":
        return
    prepared = [row for row in rows if (row["task"], row["method"]) == ("kernel_check", name)]
    if not any(row["status"] == "ok" for row in prepared):
        reason = prepared[-1]["reason"] if prepared else "it was not prepared before the timing."
        raise Unavailable(f"{name} was not ready: {reason}")


def _refuse_wrong(
    names: set[str], job: Job, layer: Layer, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse what uses an operator whose very kernels an earlier check found wrong."""
    _, _, group, head_dim = layer.query.shape
    wrong = wrong_operators(rows, job.options["dtype"], head_dim, group)
    for name in sorted(names & set(wrong)):
        raise WrongResult(f"{name} was wrong in the checks before: {wrong[name]}")
