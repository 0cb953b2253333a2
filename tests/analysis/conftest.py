"""Sweeps like those of the tiny model: literal settings, scores drawn from a fixed seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from topkbench.analysis.comparison.configurations import Comparison, compare
from topkbench.analysis.comparison.stats import MEAN, paired_columns
from topkbench.analysis.figures import plots
from topkbench.analysis.record.provenance import pinned_versions
from topkbench.analysis.record.store import CellStore, Row, Status, Sweep, identity
from topkbench.analysis.report import build as report
from topkbench.analysis.report import kernels

SUBTASKS = ("niah_single", "niah_multikey", "niah_multivalue", "vt", "cwe")
HARDNESS = {
    "niah_single": 0.0,
    "niah_multikey": 0.02,
    "niah_multivalue": 0.08,
    "vt": 0.3,
    "cwe": 0.5,
}
N = 25
TESTED = pinned_versions()


def make_row(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "run_id": "0123456789abcdef",
        "status": Status.OK,
        "model": "tiny",
        "task": "ruler",
        "subtask": MEAN,
        "length": 4096,
        "method": "full",
        "question": "sparse",
        "kv_len": 4110,
        "batch_size": 1,
        "seed": 0,
        "num_samples": N,
        "device": "AMD EPYC 9554, 2 cores",
        "torch": TESTED["torch"],
        "transformers": TESTED["transformers"],
        "git_commit": "fb6212e9d0c1a2b3",
        "git_dirty": False,
        "started_at": "2026-11-21T06:00:00+00:00",
    }
    return Row(**(values | changes))


def loss(method: str, k: int, rbit: int | None) -> float:
    """Return the fraction of correct answers lost, roughly that of methods on the tiny model."""
    budget = {32: 1.0, 64: 0.6, 128: 0.35, 256: 0.15, 512: 0.05}[k]
    bits = {None: 0.0, 32: 0.7, 64: 0.3, 128: 0.08, 256: 0.03}[rbit]
    base = {"exact": 0.01, "hata": 0.02, "quest": 0.8, "loki": 0.05, "streaming_llm": 1.0}[method]
    return min(1.0, (base + bits) * budget if method != "streaming_llm" else 0.8 + 0.15 * budget)


def make_cell(
    sweep: Sweep, method: str, k: int | None, rbit: int | None, full: list[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    name = identity({"method": method, "k": k, "rbit": rbit})
    generator = np.random.default_rng([ord(c) for c in method] + [k or 0, rbit or 0])
    samples: list[dict[str, Any]] = []
    for subtask, i in itertools.product(SUBTASKS, range(N)):
        shared = np.random.default_rng([SUBTASKS.index(subtask), i]).random()
        correct = shared > HARDNESS[subtask]
        if method != "full" and k is not None:
            correct = correct and generator.random() > loss(method, k, rbit)
        samples.append(
            {
                "sample_id": f"{subtask}-{i}",
                "subtask": subtask,
                "length": 4096,
                "score": 100.0 if correct else 0.0,
                "prediction": "w1",
                "references": ["w1"],
                "num_generated": 3,
            }
        )
    columns = paired_columns(samples, full if method != "full" else None)
    share = 1.0 if k is None else k / 4096
    stages = {
        "encode_ms": 0.05 if rbit else None,
        "append_ms": 0.04 if rbit else None,
        "score_ms": 0.02 + (rbit or 0) / 2000 if method != "full" else None,
        "select_ms": 0.1 if method not in ("full", "streaming_llm") else None,
        "attend_ms": 1.4 * share + 0.03,
    }
    total = 1.2 + sum(value or 0.0 for value in stages.values())
    rows = [
        make_row(
            run_id=name,
            method=method,
            k=k,
            rbit=rbit,
            protocol=None if method == "full" else "unified",
            impl=None if method == "full" else "cpu",
            subtask=subtask,
            num_samples=N * (len(SUBTASKS) if subtask == MEAN else 1),
            judged_prompts=None if method == "full" else 8,
            timed_prompts=3,
            recall_at_k=None if method == "full" else max(0.05, 0.98 - 0.9 * loss(method, k, rbit)),
            attention_mass=None if k is None else max(0.2, 1 - 0.8 * loss(method, k, rbit)),
            density=share,
            bytes_read_per_step=16 * 2**20 * (share + (rbit or 0) / 4096),
            decode_ms_p50=total,
            decode_ms_p20=total * 0.97,
            decode_ms_p80=total * 1.05,
            speedup_vs_full=2.63 / total,
            prefill_ms=320.0,
            build_ms=4.0 if rbit else 0.0,
            parameters={"use_norm": True} if method == "hata" else {},
            **stages,
            **values,
        )
        for subtask, values in columns.items()
    ]
    cell = sweep.store.cell(name)
    with cell.lock():
        cell.begin(rows[0])
        cell.write(rows, samples, {"method": method, "k": k}, "log\n")
    sweep.append(name)
    return samples


def fill(
    sweep: Sweep, methods: tuple[str, ...], ks: tuple[int, ...], rbits: tuple[int, ...]
) -> None:
    full = make_cell(sweep, "full", None, None, None)
    for method, k in itertools.product(methods, ks):
        for rbit in rbits if method == "hata" else (None,):
            make_cell(sweep, method, k, rbit, full)


def fail(sweep: Sweep) -> None:
    for status, method, reason in (
        (Status.FAILED, "quest", "page_size must divide the capacity, got 17."),
        (Status.SKIPPED, "loki", "rank must not exceed head_dim 64, got 128."),
    ):
        name = identity({"failed": method})
        row = make_row(run_id=name, method=method, k=64, status=status, reason=reason)
        sweep.store.cell(name).write([row], [], {}, "")
        sweep.append(name)


def save_data(figure: Figure, data: pd.DataFrame, drawn: plots.Drawn) -> plots.Drawn:
    """Lay a figure out, and write its data, and pictures without anything in them."""
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    drawn.csv.write_text(data.to_csv(index=False))
    drawn.png.touch()
    drawn.svg.write_text('<svg viewBox="0 0 1 1"></svg>')
    return drawn


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write pictures, which takes most of a report's time, only in tests that use `pictures`."""
    if "pictures" not in request.fixturenames:
        for module in (plots, kernels):
            monkeypatch.setattr(module, "save", save_data)


@pytest.fixture
def pictures() -> None:
    """Let pictures be written."""


@pytest.fixture(scope="session")
def big_sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Six methods, four budgets, four bit widths, one failure and one skip."""
    results = tmp_path_factory.mktemp("big") / "results"
    sweep = Sweep(results / "default" / "six methods", results)
    fill(
        sweep,
        ("exact", "hata", "quest", "loki", "streaming_llm"),
        (64, 128, 256, 512),
        (32, 64, 128, 256),
    )
    fail(sweep)
    return sweep


@pytest.fixture(scope="session")
def big_report(big_sweep: Sweep) -> Path:
    """The page of the big sweep's report, with its pictures."""
    return report.build(big_sweep.folder)


@pytest.fixture(scope="session")
def big(big_sweep: Sweep) -> Comparison:
    """The configurations of the big sweep, compared."""
    return compare(big_sweep.rows(), big_sweep.samples())


@pytest.fixture
def small_sweep(tmp_path: Path) -> Sweep:
    """The sweep of ``method=hata k=512 -m``: four bit widths, and full attention."""
    sweep = Sweep(tmp_path / "results" / "default" / "first", tmp_path / "results")
    fill(sweep, ("hata",), (512,), (32, 64, 128, 256))
    return sweep


@pytest.fixture
def row() -> Callable[..., Row]:
    return make_row


@pytest.fixture
def store(tmp_path: Path) -> CellStore:
    return CellStore(tmp_path / "results")
