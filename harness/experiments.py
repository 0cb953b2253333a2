"""Named experiments on single layers, run by ``harness.bench --experiment NAME``.

They need only torch, numba and Triton, for use on a bare GPU machine. The decode steps and the
rules are those of ``task=decode_latency``: each method is timed alternately with full attention,
with cold caches. The result of each stage is first compared with the reference, and a wrong one
gets no time. Methods that need more than half of the free memory are skipped. The rows have that
task's columns, so that ``python -m topkbench.analysis.report FILE.csv`` draws its figures from
them. Stages are timed launch by launch, even if whole steps are graph replays.

Keys are drawn without needles: every token has about the same weight, so a method whose budget
varies reads as many tokens as it may. What a method needs of the prompt is drawn as well, so the
time to build an index is not reported.
"""

import csv
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from topkbench.harness import variants
from topkbench.harness.commit import commit_of
from topkbench.harness.huge_pages import has_huge_pages
from topkbench.harness.layer import (
    LEAST_K,
    STAGES,
    bytes_needed,
    heads_label,
    one_layer,
    shape_label,
    time_layer,
    too_large_reason,
)
from topkbench.harness.outcome import outcome
from topkbench.harness.planted import PlantedStates
from topkbench.kernels.dispatch import OPERATORS, Impl, Operator, resolve
from topkbench.kernels.timing import machine_name, versions
from topkbench.methods.base import AnyMethod, Geometry, with_impl

GEOMETRIES = {"llama2": one_layer(32, 32, 128), "llama31": one_layer(32, 8, 128)}
"""Attention of Llama-2-7B and of Llama-3.1-8B."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The shapes and methods that an experiment times.

    Attributes:
        geometries: Names in ``GEOMETRIES``.
        lengths: Numbers of cached tokens, at batch size 1.
        batch_sizes: Batch sizes, at ``batch_length``.
        batch_length: Cached tokens for the batch sizes.
        methods: Names of `variants.names`.
        slow: For each variant of the methods, the operators that run in torch.
    """

    geometries: Sequence[str] = ("llama31", "llama2")
    lengths: Sequence[int] = ()
    batch_sizes: Sequence[int] = ()
    batch_length: int = 32768
    methods: Sequence[str] = field(default_factory=variants.names)
    slow: Sequence[Sequence[Operator]] = ((),)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Pairs of cached tokens and batch size, without duplicates."""
        batches = [(self.batch_length, size) for size in self.batch_sizes]
        return list(dict.fromkeys([*((length, 1) for length in self.lengths), *batches]))

    @property
    def timed(self) -> list[tuple[str, Sequence[Operator]]]:
        """Pairs of a method and its operators that run in torch; full attention has none."""
        return [
            (method, slow)
            for method in self.methods
            for slow in (self.slow if method != "full" else ((),))
        ]


EXPERIMENTS = {
    "layer_latency": Experiment(
        lengths=[2**power for power in range(12, 19)], batch_sizes=(1, 2, 4, 8)
    ),
    "stage_breakdown": Experiment(geometries=("llama31",), lengths=[131072]),
    "break_even": Experiment(lengths=[2**power for power in range(8, 17)]),
    "optimisation_ablation": Experiment(
        geometries=("llama2",),
        lengths=[32768],
        methods=("hata_integer",),
        slow=(
            OPERATORS,
            ("hash_encode", "topk_select", "sparse_attention"),
            ("hash_encode", "topk_select"),
            ("topk_select",),
            (),
        ),
    ),
}
"""The named experiments, as in ``conf/experiment/``."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Device, dtype and settings of the timing."""

    device: torch.device
    dtype: torch.dtype
    impl: Impl = "auto"
    rbit: int = 128
    trials: int = 15
    cuda_graph: bool = False


def run(experiment: Experiment, conditions: Conditions) -> list[dict[str, Any]]:
    """Time an experiment and print each shape's table; return one row per shape and method."""
    device = conditions.device
    known = {
        "device": machine_name(device),
        **{name: found for name, found in versions().items() if name not in ("python", "cuda")},
        "huge_pages": has_huge_pages(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "p_dtype": str(conditions.dtype).removeprefix("torch."),
        **commit_of(Path(__file__).resolve().parents[1], None),
    }
    print(", ".join(f"{name} {value}" for name, value in known.items() if value is not None))
    rows = []
    for name in experiment.geometries:
        geometry = replace(GEOMETRIES[name], dtype_bytes=conditions.dtype.itemsize, device=device)
        label = heads_label(geometry)
        for length, batch_size in experiment.shapes:
            print(f"\n{name} ({label}), {length:,} tokens, batch {batch_size}", flush=True)
            subtask = shape_label(length, batch_size)
            place = {
                **{"model": label, "task": "decode_latency", "subtask": subtask},
                **{"length": length, "kv_len": length, "batch_size": batch_size},
            }
            for row in _shape(experiment, conditions, geometry, length, batch_size):
                key = repr([known["device"], label, subtask, row, conditions])
                run_id = sha256(key.encode()).hexdigest()[:16]
                rows.append({"run_id": run_id, **known, **place, **row})
    return rows


def _shape(
    experiment: Experiment,
    conditions: Conditions,
    geometry: Geometry,
    length: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Check and time the methods one after the other at one shape; print their table."""
    free, states = free_bytes(geometry.device), None
    rows: dict[str, dict[str, Any]] = {}
    methods: dict[str, AnyMethod] = {}
    for name, slow in experiment.timed:
        impl: dict[Operator, Impl] = dict.fromkeys(OPERATORS, conditions.impl)
        impl |= {op: "reference" for op in OPERATORS if op in slow}
        ran = _implementations(impl, geometry.device, conditions.dtype, geometry.head_dim)
        label = ran if len(experiment.slow) > 1 and name != "full" else name
        methods[label] = with_impl(variants.make(name, rbit=conditions.rbit), impl)
        rows[label] = {**variants.columns(methods[label]), "impl": ran}
    width = max(len(label) for label in rows) + 2
    _print_head(width)
    for label, method in methods.items():
        row = rows[label]
        row |= {"seed": 0, "started_at": datetime.now(UTC).isoformat(timespec="seconds")}
        reason = too_large_reason(bytes_needed(method, geometry, batch_size, length), free)
        if reason is not None:
            row |= {"status": "skipped", "reason": reason}
        else:
            if states is None:
                states = PlantedStates.draw(geometry, batch_size, length, conditions.dtype, 0, 0)
            row |= _timed(method, geometry, states, conditions)
        _print(label, row, width)
    return list(rows.values())


def _timed(
    method: AnyMethod,
    geometry: Geometry,
    states: PlantedStates,
    conditions: Conditions,
) -> dict[str, Any]:
    """Return the columns of a method's step: status and reason, and if it is right its times.

    What goes wrong with a method is in its row: the others are timed nevertheless.
    """
    full = variants.make("full", backend="auto").on(conditions.device, conditions.dtype)
    try:
        layer = variants.layer_of(method if method.selects else full, geometry, states)
        values, status, reason = time_layer(
            layer,
            full,
            geometry,
            conditions.trials,
            conditions.cuda_graph,
            builds=0,
        )
    except Exception as error:
        return outcome(error)
    return {**values, "status": status, "reason": reason}


def _implementations(
    impl: Mapping[Operator, Impl], device: torch.device, dtype: torch.dtype, channels: int
) -> str:
    """Return the name of the fast implementation, and the operators that run in torch instead."""
    ran = {op: resolve(op, one, device, dtype, channels) for op, one in impl.items()}
    fast = sorted(set(ran.values()) - {"reference"})
    slow = [op for op in OPERATORS if ran[op] == "reference"]
    if not fast:
        return "reference"
    return fast[0] + (f", reference: {' '.join(slow)}" if slow else "")


def _print_head(width: int) -> None:
    heads = [
        *("p50 ms", "p20", "p80", "warm", "full p50", "speed-up", "95% low", "high", "over SDPA"),
        *STAGES,
    ]
    print(f"{'':<{width}}" + "".join(f"{head:>10}" for head in heads))


def _print(name: str, row: Mapping[str, Any], width: int) -> None:
    """Print a row's times, or why it has none."""
    if row["status"] != "ok":
        words = "wrong result, no times" if row["status"] == "wrong" else row["status"]
        print(f"{name}: {words}: {row['reason']}", file=sys.stderr, flush=True)
        return
    columns = [
        *("decode_ms_p50", "decode_ms_p20", "decode_ms_p80", "decode_ms_warm_p50", "full_ms_p50"),
        *("speedup_vs_full", "speedup_ci_low", "speedup_ci_high", "speedup_vs_sdpa"),
        *(f"{stage}_ms" for stage in STAGES),
    ]
    cells = [f"{row[one]:.3f}" if row.get(one) is not None else "-" for one in columns]
    unsteady = f"  unsteady: {row['timing_note']}" if row["timing_note"] else ""
    print(f"{name:<{width}}" + "".join(f"{cell:>10}" for cell in cells) + unsteady, flush=True)


def faster_from(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence per geometry and method: the measured length from which it is faster.

    The length has a 95% interval if the speed-ups have: from the length from which all upper ends
    are at least 1, to the length from which all lower ends are.

    Args:
        rows: What `run` returned; only those of batch size 1 count.
    """
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["batch_size"] == 1 and row.get("speedup_vs_full") is not None:
            norm = "" if row.get("p_use_norm", True) else " by integer scores"
            found.setdefault((row["model"], row["method"] + norm), []).append(row)
    sentences = []
    for (model, method), points in found.items():
        points.sort(key=lambda row: row["length"])
        where = _from(points, "speedup_vs_full")
        if any(row.get("speedup_ci_low") is None for row in points):
            where += ", no interval"
        else:
            ends = [_from(points, f"speedup_ci_{end}") for end in ("high", "low")]
            if set(ends) != {where}:
                where += f" (95% interval: {ends[0]}, to {ends[1]})"
        unsteady = [f"{row['length']:,}" for row in points if row.get("timing_note")]
        where += f"; unsteady at {', '.join(unsteady)}" if unsteady else ""
        sentences.append(f"{model}, {method}: faster than full attention {where}")
    return sentences


def _from(points: Sequence[Mapping[str, Any]], column: str) -> str:
    """Return in words the shortest length from which a speed-up stays at or above 1."""
    slower = [row["length"] for row in points if row[column] < 1]
    faster = [row["length"] for row in points if not slower or row["length"] > slower[-1]]
    return f"from {faster[0]:,} tokens on" if faster else f"nowhere up to {slower[-1]:,}"


def write(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write rows as CSV with the columns of a sweep's ``rows.csv``, omitting empty columns."""
    names = dict.fromkeys(name for row in rows for name in row)
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(names), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a CUDA device, or of a Linux machine; None elsewhere."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what earlier shapes took
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def chosen(name: str, **changes: Sequence[Any] | None) -> Experiment:
    """Return a named experiment with some settings replaced.

    If lengths are given without batch sizes, only these lengths run, at batch size 1.

    Raises:
        ValueError: If a length is too short for the least budget, or a batch size is not positive.
    """
    replaced: dict[str, Any] = {key: value for key, value in changes.items() if value}
    if "lengths" in replaced:
        replaced.setdefault("batch_sizes", ())
    experiment = replace(EXPERIMENTS[name], **replaced)
    for length, batch_size in experiment.shapes:
        if length <= LEAST_K or batch_size < 1:
            raise ValueError(
                f"lengths must be more than {LEAST_K} tokens and batch sizes at least 1, got "
                f"{length} and {batch_size}."
            )
    return experiment
