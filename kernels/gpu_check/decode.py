"""One decode step of one layer: every dense baseline, and each method against the best of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from topkbench.kernels.dispatch import OPERATORS, Impl
from topkbench.kernels.gpu_check.dense import BASELINES
from topkbench.kernels.gpu_check.plan import Job
from topkbench.kernels.gpu_check.rows import Unavailable, times
from topkbench.kernels.gpu_check.workplace import DTYPES, Workplace, wrong_operators
from topkbench.kernels.steps import METHODS, Geometry, Layer
from topkbench.kernels.testing import assert_near, assert_within_bound, full_attention_bound
from topkbench.kernels.timing import Timing, clock_mhz

Found = Iterator[tuple[str, dict[str, Any]]]

_RBIT = 128


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
        for num_kv_heads in (32, 8):
            shape = Geometry(32, num_kv_heads, 128)
            layer = Layer.draw(shape, 2, 4096, _RBIT, torch.bfloat16, place.device)
            _checked(layer, _made(layer, "flashinfer"), _expected(layer))
        found |= {"status": "ok", "kv_len": 4096, "subtask": _version("flashinfer")}
    yield "flashinfer", found


def dense(place: Workplace, job: Job, rows: Sequence[Mapping[str, Any]]) -> Found:
    """Check every baseline against float64, then time in turn those that are right."""
    layer = _layer(place, job)
    expected = place.kept.setdefault("expected", _expected(layer))
    calls: dict[str, Callable[[], object]] = {}
    columns: dict[str, dict[str, Any]] = {}
    for name in job.left:
        found: dict[str, Any] = {}
        with place.part(name, found):
            found["full_backend"] = f"{name}, {_version(name)}"
            _refuse_unready(name, rows)
            call = _made(layer, name)
            _checked(layer, call, expected)
            if name == "triton":
                _refuse_wrong({"full_attention"}, job, layer, rows)
            if not place.toy:
                place.timed({name: call}, trials=2)  # what cannot be recorded fails here, alone
            calls[name] = call
        if not place.toy and not name.startswith("triton"):
            found["impl"] = None  # the library's own
        columns[name] = found
        if name not in calls:
            reason = f"{name}: {found['reason']}"
            yield name, found | {"full_backend": name, "reason": reason}
    read = layer.keys.nbytes + layer.values.nbytes
    taken: dict[str, Timing] = {}
    together: dict[str, Any] = {"status": "ok"}
    with place.part("all that are right, timed in turn", together):
        if calls and not place.toy:
            taken = place.timed(calls)
            together["clock_mhz"] = clock_mhz(place.device)
    for name in calls:
        found = columns[name] | {"seed": 0, "bytes_read_per_step": read / len(layer.keys)}
        if taken:
            found |= times(taken[name], None, read, place.bandwidth_gb_s)
        yield name, found | together


def method(place: Workplace, job: Job, rows: Sequence[Mapping[str, Any]]) -> Found:
    """Check one method's step stage by stage, then time it in turn with the best baseline."""
    name = job.options["method"]
    found: dict[str, Any] = {}
    # What tells this row from another of the method, also where it fails.
    about = {"k": None, "p_use_norm": name == "hata" if name.startswith("hata") else None}
    with place.part(name, found):
        layer = _layer(place, job)
        about |= {"k": layer.k, "seed": 0}
        used = _Used()
        step = METHODS[name](layer, used)
        about |= {key: value for key, value in step.knobs().items() if key == "rbit"}
        step.check()
        _refuse_wrong(used.names, job, layer, rows)
        found |= {"status": "ok", "bytes_read_per_step": float(step.bytes_read())}
        if not place.toy:
            needed = step.bytes_read() * len(layer.keys)
            best = _best(job, rows)
            if best is None:
                taken = place.timed({name: step})
                found |= times(taken[name], None, needed, place.bandwidth_gb_s)
            else:
                full = _baseline(place, layer, best["full_backend"])
                taken = place.timed({"full": full, name: step})
                found |= times(taken[name], taken["full"], needed, place.bandwidth_gb_s)
                found["full_backend"] = best["full_backend"]
            found["clock_mhz"] = clock_mhz(place.device)
    yield name, about | found


def _layer(place: Workplace, job: Job) -> Layer:
    """Return the states of a job's shape, drawn once for all jobs of it."""
    options = job.options
    shape, length, batch_size = options["shape"], options["length"], options["batch_size"]
    place.forget((shape, length, batch_size, options["dtype"]))
    if "layer" not in place.kept:
        dtype = DTYPES[options["dtype"]]
        place.kept["layer"] = Layer.draw(shape, batch_size, length, _RBIT, dtype, place.device)
    layer: Layer = place.kept["layer"]
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


def _best(job: Job, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the row of the fastest dense baseline of a job's shape, or None."""
    same = ("model", "subtask", "p_dtype")
    dense = [
        row
        for row in rows
        if (row["task"], row["status"]) == ("kernel_dense", "ok")
        and row.get("decode_ms_p50") is not None
        and all(row[name] == job.about[name] for name in same)
    ]
    return min(dense, key=lambda row: row["decode_ms_p50"], default=None)


def _baseline(place: Workplace, layer: Layer, backend: str) -> Callable[[], torch.Tensor]:
    """Return the call of a baseline named as its row names it, made once for all methods."""
    if backend not in place.kept:
        # A name may begin another: "triton" and "triton, tiles of 8 KiB".
        name = max((one for one in BASELINES if backend.startswith(f"{one}, ")), key=len)
        place.kept[backend] = _made(layer, name)
    call: Callable[[], torch.Tensor] = place.kept[backend]
    return call


def _refuse_unready(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a library that did not compile in time: here it would hold up all others."""
    for row in rows:
        if (row["task"], row["method"]) == ("kernel_check", name) and row["status"] != "ok":
            raise Unavailable(f"{name} was not ready: {row['reason']}")


def _refuse_wrong(
    names: set[str], job: Job, layer: Layer, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse what uses an operator whose very kernels an earlier check found wrong."""
    _, _, group, head_dim = layer.query.shape
    wrong = wrong_operators(rows, job.options["dtype"], head_dim, group)
    for name in sorted(names & set(wrong)):
        raise AssertionError(f"{name} was wrong in the checks before: {wrong[name]}")
