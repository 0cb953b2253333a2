"""The check of the kernels on a GPU, in Triton's interpreter and with times that are made up."""

from __future__ import annotations

import csv
import importlib
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from topkbench.analysis.record.row import COLUMNS as ROW_COLUMNS
from topkbench.analysis.record.row import SPEED_COLUMNS, Row
from topkbench.analysis.report import build as report
from topkbench.harness import variants
from topkbench.harness.gpu_check import __main__ as script
from topkbench.harness.gpu_check import checks, decode, dense, plan, supervisor, worker, workplace
from topkbench.harness.gpu_check.dense import BASELINES, Baseline
from topkbench.harness.gpu_check.plan import (
    CHECKED,
    CHECKS_END_S,
    DTYPES,
    Job,
    Plan,
    make_plan,
)
from topkbench.harness.gpu_check.rows import COLUMNS, DeviceLost, Writer
from topkbench.harness.gpu_check.supervisor import Supervisor
from topkbench.harness.gpu_check.workplace import Workplace
from topkbench.harness.outcome import Unavailable, outcome
from topkbench.harness.planted import PlantedStates
from topkbench.kernels import operators, timing
from topkbench.kernels.full_attention.api import full_attention
from topkbench.kernels.testing import WrongResult
from topkbench.kernels.timing import Timing

ROOT = Path(__file__).parents[2]


@pytest.fixture
def interpreted() -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled for the GPU here, so the interpreter is off")


class Sent(list[tuple[Any, ...]]):
    """A channel that keeps what is sent."""

    def send(self, message: tuple[Any, ...]) -> None:
        self.append(message)

    def recv(self) -> None:
        return None


def toy_jobs() -> dict[str, Job]:
    """Return the toy plan's jobs by kind and, of methods, by name."""
    jobs = make_plan(1, True, []).jobs
    return {job.options.get("method", job.kind): job for job in reversed(jobs)}


def do(job: Job, rows: list[dict[str, Any]], toy: bool = True) -> list[dict[str, Any]]:
    """Do a job in this process and return its rows."""
    sent = Sent()
    assert worker.run(Workplace(torch.device("cpu"), toy, 2), job, rows, sent)
    found = []
    for kind, *content in sent:
        if kind == "row":
            part, columns = content
            named = {job.part_column: part} if job.part_column and part else {}
            row = {"run_id": "0", "subtask": "", **job.about, **named, **columns}
            Row.from_flat(row)  # no speed in a row that is not ok, and no unknown column
            found.append({"method": "all operators"} | row)
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_the_whole_script_runs_in_the_interpreter_on_a_bare_machine(
    bare_machine: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    bare_machine.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "topkbench.harness.gpu_check", "--toy", "--out", str(out)],
        capture_output=True, text=True, env=bare_machine, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("plan: ")
    with (out / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = [part for job in make_plan(1, True, []).jobs for part in job.parts]
    assert len(rows) == len(wanted) == len({row["run_id"] for row in rows})
    # Nothing can be taken for a measurement.
    assert all(row["device"].startswith("Triton's interpreter on ") for row in rows)
    assert {row["impl"] for row in rows} == {"interpreter"}
    assert [name for row in rows for name in COLUMNS if name in SPEED_COLUMNS and row[name]] == []
    by_status = {status: [row for row in rows if row["status"] == status] for status in
                 ("ok", "skipped")}  # fmt: skip
    assert len(by_status["ok"]) + len(by_status["skipped"]) == len(rows)
    assert {row["task"] for row in by_status["skipped"]} == {"kernel_dense"}
    assert {"triton", "sdpa math"} <= {row["full_backend"].partition(",")[0] for row in rows
                                       if row["status"] == "ok"}  # fmt: skip
    assert report.main([str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "### Are they right?" in text
    assert "Triton's interpreter on " in text


def test_the_plan_fits_eight_minutes_and_begins_with_the_most_important() -> None:
    whole = make_plan(11, False, ["flashinfer"])
    plan = Plan([job for job in whole.jobs if not job.last], 11)
    assert plan.total_s <= 8 * 60
    # What comes after it delays none of it.
    assert whole.steps[: len(plan.steps)] == plan.steps
    assert whole.total_s <= 15 * 60
    assert sum(job.compiles for job in plan.jobs) > 100
    checks = [job for job in plan.jobs if job.kind == "check"]
    settings = [(job.options["dtype"], job.options["head_dim"], job.options["group"])
                for job in checks]  # fmt: skip
    assert set(settings) == set(itertools.product(DTYPES, (64, 128), (1, 4, 8)))
    kinds = [kind for kind, _ in itertools.groupby(job.kind for job in plan.jobs)]
    assert kinds == ["prepare", "check", "operators", *["dense", "method"] * 4, "check"]
    shapes = [job.about for job in plan.jobs if job.kind == "dense"]
    assert {(one["model"], one["length"], one["batch_size"]) for one in shapes} == {
        ("32/32 heads of 128", 32768, 8),
        ("32/32 heads of 128", 262144, 1),
        ("32/8 heads of 128", 131072, 1),
        ("32/8 heads of 128", 131072, 8),
    }
    # What comes first covers every two settings together.
    first = settings[: settings.index(("bfloat16", 128, 8))]
    for one, other in itertools.combinations(range(3), 2):
        assert {(s[one], s[other]) for s in first} == {(s[one], s[other]) for s in settings}
    assert "(no time)" not in plan.text(8)
    # In eight minutes only the methods that come last lack time.
    lines = whole.text(8).splitlines()
    assert re.match(
        r"plan: 50 steps, 11 processes: about [67]\.\d of 8 minutes, then 48 ", lines[0]
    )
    late = [line for line in lines if "(no time)" in line]
    assert late == lines[-len(late) :]
    assert 0 < len(late) <= 48
    assert plan.text(2).count("(no time)") > 20
    first = ["hata_integer", "hata", "exact", "quest", "loki", "streaming_llm"]
    timed = [job.options["method"] for job in whole.jobs if job.kind == "method"]
    assert timed[:24] == first * 4
    assert timed[24:] == [name for name in variants.names() if name not in ("full", *first)] * 4
    assert [job.last for job in whole.jobs if job.kind == "method"] == [False] * 24 + [True] * 48


def test_each_setting_is_checked_whole_and_bounded_planted_and_plain() -> None:
    for job in make_plan(11, False, []).jobs:
        if job.kind == "check" and job.options["num_kv_heads"] == 2:
            sizes = job.options["sizes"]
            assert [tokens for tokens, _ in itertools.groupby(one.tokens for one in sizes)] == [
                *(128, 1000, 32768, 262144),
            ]
            for tokens in (128, 1000, 32768, 262144):
                of_it = [one for one in sizes if one.tokens == tokens]
                assert {one.bounded for one in of_it} == {one.planted for one in of_it}
                assert {one.planted for one in of_it} == {True, False}


@pytest.mark.parametrize("workers", [3, 7])
def test_with_few_processes_timing_begins_in_time_and_checks_go_on_after_it(workers: int) -> None:
    plan = make_plan(workers, False, ["flashinfer"])
    timed = [(start, job) for start, job in plan.steps if job.before_checks]
    assert timed[0][0] <= CHECKS_END_S + 5
    assert timed[-1][0] + timed[-1][1].estimate_s < 8 * 60
    before = [job for start, job in plan.steps if start < timed[0][0]]
    assert sum(job.about["p_dtype"] == "bfloat16" for job in before) == 5  # FlashInfer's is one
    assert "float32" not in {job.about["p_dtype"] for job in before}
    names = [job.name for _, job in plan.steps]
    assert sorted(names) == sorted(job.name for job in plan.jobs)
    kinds = [alone for alone, _ in itertools.groupby(job.alone for _, job in plan.steps)]
    assert kinds == [False, True, False, True]
    assert [job.last for _, job in plan.steps].index(True) == len(plan.steps) - 48


def test_a_plan_counts_compiling_and_what_must_be_alone() -> None:
    def job(seconds: float, alone: bool, compiles: int = 0, dtype: str = "float16") -> Job:
        return Job("name", "check", {}, {"p_dtype": dtype}, ("a",), "", compiles, seconds, alone)

    def starts(jobs: list[Job], workers: int = 2) -> list[float]:
        return [start for start, _ in Plan(jobs, workers).steps]

    parallel = [job(10, False, 8), job(10, False), job(10, False)]
    assert starts(parallel) == [15, 15, 25]
    assert Plan(parallel, 2).total_s == 35  # eight kernels of 1.25 s and 10 s; or twice 10 s
    assert job(10, False, 8, "float32").estimate_s == 24
    # One process does the timing; the others are ended before it and started again after it.
    assert starts([*parallel, job(7, True)]) == [15, 15, 25, 40]
    assert starts([job(7, True), job(1, False)]) == [15, 37]
    # A check that would end too late waits until what is timed is done.
    assert starts([job(CHECKS_END_S, False), job(7, True)], 1) == [15, 22]


Times = Callable[[Mapping[str, Any]], None]


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    """Make up how long each call takes, or how it fails, by its name; 1 ms by default."""
    durations: dict[str, Any] = {}

    def timed(place: Workplace, calls: Mapping[str, Any]) -> dict[str, Timing]:
        taken = {}
        for name in calls:
            found = durations.get(name.partition(",")[0], 1.0)
            if isinstance(found, Exception):
                raise found
            taken[name] = Timing.of([found] * 8 if isinstance(found, float) else found)
        return taken

    monkeypatch.setattr(Workplace, "timed", timed)
    monkeypatch.setattr(Workplace, "bandwidth_gb_s", 2.0)
    return durations.update


def spoiled(result: Any) -> Any:
    """Return another result than an operator's, of the same shape and dtype."""
    if isinstance(result, tuple):
        return spoiled(result[0]), *result[1:]
    return result * 1.05 if result.is_floating_point() else result ^ 1


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.usefixtures("interpreted")
def test_a_broken_kernel_is_wrong_without_a_speed_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, times: Times, name: str
) -> None:
    fused = importlib.import_module(f"topkbench.kernels.{name}.fused")
    right = getattr(fused, name)
    monkeypatch.setattr(fused, name, lambda *given, **named: spoiled(right(*given, **named)))
    jobs = toy_jobs()
    two = (name, "page_score" if name != "page_score" else "code_score")
    checked = do(replace(jobs["check"], parts=two), [])
    assert [(row["method"], row["status"]) for row in checked] == [
        (two[0], "wrong"),
        (two[1], "ok"),
    ]
    assert checked[0]["reason"].startswith("at 136 tokens, rows that end inside, planted keys: ")
    timed = do(replace(jobs["operators"], parts=two), checked, toy=False)
    assert [(row["status"], row.get("decode_ms_p50")) for row in timed] == [
        ("wrong", None),
        ("ok", 1.0),
    ]


@pytest.mark.usefixtures("interpreted")
def test_a_method_with_a_broken_kernel_is_wrong_without_a_speed(
    monkeypatch: pytest.MonkeyPatch, times: Times
) -> None:
    from topkbench.kernels.hamming_score import fused

    right = fused.hamming_score
    monkeypatch.setattr(fused, "hamming_score", lambda *given: spoiled(right(*given)))
    jobs = toy_jobs()
    for method, status, ms in (("hata_integer", "wrong", None), ("streaming_llm", "ok", 1.0)):
        row = do(jobs[method], [], toy=False)[0]
        assert (row["status"], row.get("decode_ms_p50")) == (status, ms)


@pytest.mark.usefixtures("interpreted")
def test_a_tile_that_is_left_out_shows_where_no_key_is_planted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def leave_out(query: Tensor, keys: Tensor, values: Tensor, *rest: Any, **named: Any) -> Tensor:
        kept = torch.cat([torch.arange(1100), torch.arange(1164, keys.shape[2])])
        return full_attention(query, keys[:, :, kept], values[:, :, kept], *rest)

    monkeypatch.setattr(operators, "full_attention", leave_out)
    job = replace(toy_jobs()["check"], parts=("full_attention",))
    sizes = [plan.Size(4096, 1, False, planted) for planted in (True, False)]
    rows = do(replace(job, options={**job.options, "dtype": "bfloat16", "sizes": sizes}), [])
    assert rows[0]["status"] == "wrong"
    # The planted keys hide it: they carry most of the weight.
    assert rows[0]["reason"].startswith("at 4,096 tokens: the error")
    assert rows[0]["kv_len"] == 4096


@pytest.mark.usefixtures("interpreted")
def test_a_check_records_the_longest_cache_that_was_right(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Small(operators.Operators):
        def __init__(self, shape: operators.Geometry, *rest: Any) -> None:
            made.append(shape.kv_len)
            if shape.kv_len > 64:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            super().__init__(shape, *rest)

    monkeypatch.setattr(checks, "Operators", Small)
    job = replace(toy_jobs()["check"], parts=("hamming_score", "topk_select"))
    sizes = [plan.Size(*one) for one in ((33, 2, False, False), (64, 1, True, True))]
    two = replace(job, options={**job.options, "sizes": sizes})
    assert [(row["status"], row["kv_len"]) for row in do(two, [])] == [("ok", 33)] * 2
    assert made == [33, 64]  # once for all operators
    more = [*sizes, plan.Size(65, 1, False, False)]
    rows = do(replace(job, options={**job.options, "sizes": more}), [])
    assert [(row["method"], row["status"], row["kv_len"]) for row in rows] == [
        ("hamming_score", "out_of_memory", 33),
        ("topk_select", "out_of_memory", 33),
    ]
    assert rows[0]["reason"] == "at 65 tokens: OutOfMemoryError: CUDA out of memory."


def test_only_a_comparison_calls_a_result_wrong() -> None:
    assert outcome(WrongResult("off by 1."))["status"] == "wrong"
    assert outcome(AssertionError("num_warps"))["status"] == "failed"


def test_what_cannot_run_here_is_skipped_and_has_no_exceptions_name() -> None:
    for error in (Unavailable("head_dim must be even."), timing.NotCaptured("it waits.")):
        assert outcome(error) == {"status": "skipped", "reason": str(error)}


@pytest.mark.usefixtures("interpreted")
def test_an_operator_that_failed_a_check_has_no_speed_in_the_same_setting(times: Times) -> None:
    jobs = toy_jobs()
    before = {
        **{"task": "kernel_check", "method": "sparse_attention", "status": "wrong"},
        **{"reason": "at 1,000 tokens: bad.", "p_dtype": "float32", "p_head_dim": 64},
    }
    step = jobs["streaming_llm"]
    found = do(step, [{**before, "p_group": 2}], toy=False)[0]
    assert (found["status"], found.get("decode_ms_p50")) == ("wrong", None)
    assert found["reason"] == (
        "sparse_attention was wrong in an earlier check: at 1,000 tokens: bad."
    )
    other = [{**before, "p_group": 8}, {**before, "p_group": 2, "method": "page_score"}]
    assert do(step, other, toy=False)[0]["status"] == "ok"
    # Of Twilight it is the base that uses this one.
    pages = {**before, "p_group": 2, "method": "page_score"}
    assert do(jobs["twilight"], [pages], toy=False)[0]["status"] == "wrong"


@pytest.mark.usefixtures("interpreted")
def test_a_method_is_timed_against_the_fastest_dense_that_is_right(
    monkeypatch: pytest.MonkeyPatch, times: Times
) -> None:
    def half(states: PlantedStates) -> Callable[[], Tensor]:
        halved = replace(states, value_states=states.value_states / 2)
        call = BASELINES["sdpa math"].make(halved)
        return call

    monkeypatch.setitem(BASELINES, "sdpa cudnn", Baseline(lambda: "torch 9", half))
    jobs = toy_jobs()
    times({"sdpa cudnn": 0.1, "sdpa math": 4.0, "triton": 2.0, "hata": 0.5})
    dense = replace(jobs["dense"], parts=("sdpa cudnn", "sdpa math", "triton"))
    rows = do(dense, [], toy=False)
    found = {row["full_backend"].partition(",")[0]: row for row in rows}
    assert found["sdpa cudnn"]["status"] == "wrong"
    assert "the error must be at most" in found["sdpa cudnn"]["reason"]
    assert found["sdpa cudnn"].get("decode_ms_p50") is None
    read = 2 * 96 * 64 * 4  # keys and values of one head
    assert found["sdpa math"]["bandwidth_fraction"] == pytest.approx(read / 4e-3 / 2e9)
    times({"sdpa math": 5.0, "triton": 3.0})  # when they are timed in turn with the step
    hata = do(jobs["hata"], rows, toy=False)[0]
    assert hata["full_backend"].startswith("triton, ")
    # Full attention as it was timed in turn with the step, not as in its own row.
    assert (hata["full_ms_p50"], hata["speedup_vs_full"]) == (3.0, 6.0)
    assert (hata["speedup_ci_low"], hata["speedup_ci_high"]) == (6.0, 6.0)
    assert (hata["k"], hata["rbit"], hata["p_use_norm"]) == (64, 128, True)
    times({"sdpa math": 2.0})
    assert do(jobs["quest"], rows, toy=False)[0]["full_backend"].startswith("sdpa math, ")
    alone = do(jobs["streaming_llm"], [row for row in rows if row["status"] != "ok"], toy=False)[0]
    assert (alone["status"], alone.get("speedup_vs_full")) == ("ok", None)


@pytest.mark.usefixtures("interpreted")
def test_a_baseline_that_cannot_be_timed_takes_no_other_with_it(times: Times) -> None:
    jobs = toy_jobs()
    unsteady = [0.1, 0.1, 0.1, 0.9, 0.9, 0.9]
    times({"sdpa math": RuntimeError("not captured"), "sdpa flash": unsteady, "triton": 2.0})
    parts = ("sdpa flash", "sdpa math", "triton")
    rows = do(replace(jobs["dense"], parts=parts), [], toy=False)
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert rows[1]["reason"] == "sdpa math: RuntimeError: not captured"
    assert rows[0]["timing_note"]
    # A steady one is the baseline, though the median of the unsteady one is less.
    hata = do(jobs["hata"], rows, toy=False)[0]
    assert (hata["full_backend"].partition(",")[0], hata["speedup_vs_full"]) == ("triton", 2.0)
    assert decode.fastest_baselines(jobs["hata"], rows)[0].startswith("triton, ")


def test_a_row_gives_torchs_reasons_for_lacking_a_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raise_no_kernel(*arguments: Any) -> Tensor:
        warnings.warn(
            "Flash attention needs 16 bits. (Triggered internally at a.cpp:1)", stacklevel=1
        )
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(dense, "full_attention", raise_no_kernel)
    row = do(replace(toy_jobs()["dense"], parts=("sdpa flash",)), [])[0]
    assert (row["status"], row["reason"]) == (
        "skipped",
        "sdpa flash: this torch has no such kernel here: No available kernel. Aborting execution. "
        "Flash attention needs 16 bits.",
    )


@pytest.mark.usefixtures("interpreted")
def test_the_timed_graphs_output_is_compared_again() -> None:
    place = Workplace(torch.device("cpu"), False, 2)
    vars(place)["emptier"] = lambda: None
    count = itertools.count()
    right = {"a": lambda: torch.ones(3), "b": lambda: torch.arange(3)}
    taken = place.timed(right)
    assert [(timing.trials, timing.p50_ms > 0) for timing in taken.values()] == [(2, True)] * 2
    with pytest.raises(WrongResult, match="c as it was timed: whole numbers must be the same"):
        place.timed({**right, "c": lambda: torch.tensor(next(count))})


def test_caches_are_emptied_before_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_PROBE_BYTES", 2**12)
    place = Workplace(torch.device("cpu"), False, 2)
    assert float(place.emptier()) == 2**10  # type: ignore[arg-type]


def test_bandwidth_is_measured_with_less_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, asked = workplace.read_bandwidth, []

    def short(device: torch.device, num_bytes: int) -> timing.Bandwidth:
        asked.append(num_bytes)
        if num_bytes > 2**20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(device, num_bytes)

    monkeypatch.setattr(workplace, "read_bandwidth", short)
    monkeypatch.setattr(workplace, "_PROBE_BYTES", (2**21, 2**20))
    place = Workplace(torch.device("cpu"), False, 2)
    assert place.bandwidth_gb_s == place.bandwidth_gb_s > 0
    assert asked == [2**21, 2**20]


class PagedAttention:
    """FlashInfer's wrapper as far as it is used, in torch."""

    def __init__(self, workspace: Tensor, layout: str, **buffers: Any) -> None:
        assert (layout, buffers["use_cuda_graph"], buffers["use_tensor_cores"]) == (
            "HND",
            True,
            True,
        )

    def plan(self, *numbers: Any, sm_scale: float, **kinds: Any) -> None:
        (self.offsets, self.indices, _, *sizes), self.scale = numbers, sm_scale
        assert sizes[2:] == [128, 16]

    def run(self, query: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        rows = []
        for row, (first, last) in enumerate(itertools.pairwise(self.offsets.tolist())):
            keys, values = (
                one[self.indices[first:last].long()].transpose(0, 1).flatten(1, 2)[None]
                for one in cache
            )
            rows.append(full_attention(query[row, None], keys, values, self.scale))
        return torch.cat(rows)


def test_flashinfer_is_prepared_by_its_batched_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("flashinfer")
    library.BatchDecodeWithPagedKVCacheWrapper = PagedAttention  # type: ignore[attr-defined]
    library.__version__ = "9.9"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    monkeypatch.setattr(decode, "_PREPARED", (2, 48))
    (job,) = [job for job in make_plan(1, False, ["flashinfer"]).jobs if job.kind == "prepare"]
    (row,) = do(job, [])
    assert (row["status"], row["method"], row["kv_len"]) == ("ok", "flashinfer", 48)
    assert row["subtask"] == "9.9"
    monkeypatch.setattr(PagedAttention, "run", lambda own, query, cache: torch.zeros_like(query))
    assert do(job, [])[0]["status"] == "wrong"


@pytest.mark.usefixtures("interpreted")
def test_a_missing_library_and_a_lack_of_memory_are_rows_with_their_reasons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(states: PlantedStates) -> Callable[[], Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    for name in ("flash_attn", "flash_attn_interface", "flashinfer"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(BASELINES, "sdpa flash", Baseline(lambda: "torch 9", full))
    parts = ("flash_attn", "flash_attn_3", "flashinfer", "sdpa flash", "sdpa math")
    rows = do(replace(toy_jobs()["dense"], parts=parts), [])
    assert [row["status"] for row in rows] == [*["skipped"] * 3, "out_of_memory", "ok"]
    for row, package in zip(rows, ("flash-attn", "flash-attn-3", "flashinfer"), strict=False):
        assert row["reason"].startswith(f"{row['full_backend']}: this backend needs the package ")
        assert package in row["reason"]
    assert "OutOfMemoryError: CUDA out of memory. Tried" in rows[3]["reason"]

    def draw(*arguments: Any) -> PlantedStates:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(decode.PlantedStates, "draw", draw)
    jobs = toy_jobs()
    rows = [*do(jobs["dense"], []), *do(jobs["quest"], [])]
    # Each baseline that is there has its own row.
    assert [row["status"] for row in rows].count("out_of_memory") == 8
    assert rows[-1]["status"] == "out_of_memory"


@pytest.mark.parametrize("status", ["failed", "skipped", None])
def test_a_library_that_was_not_ready_is_not_waited_for_again(
    monkeypatch: pytest.MonkeyPatch, status: str | None
) -> None:
    monkeypatch.setattr(decode, "_version", lambda name: "9.9")
    before = {"task": "kernel_check", "method": "flashinfer", "status": status, "reason": "late."}
    dense = replace(toy_jobs()["dense"], parts=("flashinfer",))
    found = do(dense, [before] if status else [])[0]
    assert found["status"] == "skipped"
    assert found["reason"].startswith("flashinfer: flashinfer was not ready: ")


def test_a_failure_before_any_part_is_a_row_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("no states.")
        yield

    def lose(*arguments: Any) -> Any:
        raise DeviceLost("no answer.")
        yield

    place, job = Workplace(torch.device("cpu"), True, 1), job_of("a", "b")
    place.current_part = "b"  # of the job before
    for function, alive, reason in (
        (fail, True, "RuntimeError: no states."),
        (lose, False, "DeviceLost: no answer."),
    ):
        monkeypatch.setitem(worker.JOBS, "check", function)
        sent = Sent()
        assert worker.run(place, job, [], sent) == alive
        assert sent == [("row", part, {"status": "failed", "reason": reason}) for part in "ab"]


def fake_worker(channel: Any, device: str, toy: bool, trials: int) -> None:
    os.setsid()
    if device == "broken":
        channel.send(("broken", "RuntimeError: no device."))
        return
    channel.send(("hello", {"device": device}))
    while (given := channel.recv()) is not None:
        job, _ = given
        for part in job.remaining_parts:
            channel.send(("part", part))
            if part == "killer":
                os.kill(os.getpid(), signal.SIGKILL)
            if part == "sleeper":
                time.sleep(60)
            if part == "lost":
                channel.send(("row", part, {"status": "failed", "reason": "DeviceLost: gone."}))
                break
            channel.send(("row", part, {"status": "ok"}))
        alive = part != "lost"
        channel.send(("done", alive))
        if not alive:
            return


def supervised(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    jobs: Sequence[Job],
    limit_s: float = 600,
    device: str = "made up",
) -> list[dict[str, str]]:
    """Run jobs by processes that do nothing; return the rows of the file."""
    # Forked, so that the processes find the function above; none of them touches torch.
    monkeypatch.setattr(
        supervisor.multiprocessing, "get_context", lambda _, real=multiprocessing.get_context:
        real("fork"),
    )  # fmt: skip
    monkeypatch.setattr(supervisor, "serve", fake_worker)
    writer = Writer(folder / "out")
    printed: list[str] = []
    Supervisor(Plan(jobs, 2), writer, limit_s, device, True, 1, {}, printed.append).run()
    assert len(printed) == len(writer.rows)
    with (folder / "out" / "rows.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["method"] for row in read] == [row["method"] for row in writer.rows]
    return read


def outcomes(rows: Sequence[Mapping[str, str]]) -> list[tuple[str, str, str]]:
    return [(row["method"], row["status"], row["reason"]) for row in rows]


def job_of(*parts: str, alone: bool = True, seconds: float = 1, limit_s: float = 45) -> Job:
    about = {"task": "kernel_check", "model": "m", "subtask": parts[0]}
    return Job("name", "check", {}, about, parts, "method", 0, seconds, alone, part_limit_s=limit_s)


def test_a_part_that_ends_its_process_has_a_row_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobs = [job_of("a", "killer", "b", "lost", "c"), job_of("d", alone=False), job_of("e")]
    assert outcomes(supervised(monkeypatch, tmp_path, jobs)) == [
        ("a", "ok", ""),
        ("killer", "failed", "the process ended with status -9 in killer."),
        ("b", "ok", ""),
        ("lost", "failed", "DeviceLost: gone."),
        ("c", "ok", ""),
        ("d", "ok", ""),
        ("e", "ok", ""),
    ]


def test_a_process_that_cannot_start_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reason = "the process could not start: RuntimeError: no device."
    found = supervised(monkeypatch, tmp_path, [job_of("a", "b"), job_of("c")], device="broken")
    assert outcomes(found) == [(part, "failed", reason) for part in "abc"]


def test_a_process_that_cannot_start_sends_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Sent()
    monkeypatch.setattr(os, "setsid", lambda: None)
    worker.serve(sent, "nowhere", True, 1)
    ((kind, reason),) = sent
    assert kind == "broken"
    assert reason.startswith("RuntimeError: ")


def test_a_part_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jobs = [job_of("sleeper", "a", limit_s=0.3)]
    assert outcomes(supervised(monkeypatch, tmp_path, jobs)) == [
        ("sleeper", "failed", "still running after 0 s in sleeper."),
        ("a", "ok", ""),
    ]


def test_checks_that_take_too_long_continue_after_the_timing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (plan, supervisor):
        monkeypatch.setattr(module, "CHECKS_END_S", 1.5)
    monkeypatch.setattr(supervisor, "SECONDS_TO_START", 0)
    hangs = job_of("a", "sleeper", "b", alone=False, limit_s=3)
    long, timed = job_of("c", alone=False, seconds=2), job_of("d")
    assert outcomes(supervised(monkeypatch, tmp_path, [hangs, long, timed])) == [
        ("a", "ok", ""),
        ("d", "ok", ""),
        ("c", "ok", ""),  # beside the sleeper
        ("sleeper", "failed", "still running after 3 s in sleeper."),
        ("b", "ok", ""),
    ]


def test_a_job_that_does_not_fit_the_time_is_dropped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    began = time.monotonic()
    monkeypatch.setattr(supervisor, "SECONDS_TO_START", 0)
    jobs = [job_of("a", seconds=1), job_of("b", "e", seconds=900), job_of("c", "sleeper", "d")]
    found = outcomes(supervised(monkeypatch, tmp_path, jobs, limit_s=3))
    assert time.monotonic() - began < 10
    assert [(method, status) for method, status, _ in found] == [
        ("a", "ok"),
        ("b", "skipped"),
        ("e", "skipped"),
        ("c", "ok"),  # there is time for what comes later and is short
        ("sleeper", "failed"),
        ("d", "skipped"),
    ]
    assert found[1][2].startswith("dropped: 900 s needed, ")
    assert found[4][2] == "still running when the time was up in sleeper."
    assert found[5][2] == "dropped: 1 s needed, 0 s left."


def test_a_plan_without_time_has_a_row_and_an_id_for_each_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobs = make_plan(3, False, ["flashinfer"]).jobs
    rows = supervised(monkeypatch, tmp_path, jobs, limit_s=0)
    assert len(rows) == sum(len(job.parts) for job in jobs) == len({row["run_id"] for row in rows})
    assert {row["status"] for row in rows} == {"skipped"}
    report.main([str(tmp_path / "out")])
    assert len(report.load(tmp_path / "out")[0]) == len(rows)


def test_methods_are_dropped_with_the_dense_job_that_they_need(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dense = replace(job_of("a", seconds=900), name="dense")
    methods = [replace(job_of(name), needs=needs) for name, needs in (("b", "dense"), ("c", ""))]
    found = outcomes(supervised(monkeypatch, tmp_path, [dense, *methods]))
    assert [(method, status) for method, status, _ in found] == [
        ("a", "skipped"),
        ("b", "skipped"),
        ("c", "ok"),
    ]
    plans = make_plan(1, False, []).jobs
    shapes = {job.name: job.about["subtask"] for job in plans if job.kind == "dense"}
    assert all(shapes[job.needs] == job.about["subtask"] for job in plans if job.kind == "method")


def test_idle_processes_are_told_to_end_before_any_is_waited_for(tmp_path: Path) -> None:
    done: list[str] = []

    class Fake:
        exitcode, pid = 0, 1

        def __init__(self, name: str) -> None:
            self.name = name

        def send(self, message: None) -> None:
            done.append(f"tell {self.name}")

        def join(self, seconds: float) -> None:
            done.append(f"wait for {self.name}")

        def is_alive(self) -> bool:
            return False

        def close(self) -> None:
            pass

    own = Supervisor(Plan([], 2), Writer(tmp_path), 1, "", True, 1, {}, done.append)
    fakes = [Fake(name) for name in "ab"]
    own.workers = [supervisor.Worker(fake, fake) for fake in fakes]  # type: ignore[arg-type]
    own.end_workers(*own.workers)
    assert done == ["tell a", "tell b", "wait for a", "wait for b"]


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        (("ok", "skipped", "out_of_memory"), 0),
        (("ok", "wrong"), 1),
        (("ok", "failed"), 1),
        (("skipped", "skipped"), 1),
        ((), 1),
    ],
)
def test_the_exit_status_says_whether_all_went_well(statuses: tuple[str, ...], status: int) -> None:
    assert script.exit_status([{"status": one} for one in statuses]) == status


def test_the_summary_compares_the_results_with_the_goals() -> None:
    jobs = make_plan(1, False, []).jobs
    rows: list[dict[str, Any]] = []
    for job in jobs:
        if job.kind == "method" and job.about["method"] in ("hata", "exact"):
            times = {"decode_ms_p50": 0.5, "speedup_vs_full": 9.0, "full_backend": "triton, 3"}
            rows.append({**job.about, **times, "status": "ok"})
        if job.kind == "operators":
            found = {"method": "hamming_score", "bandwidth_fraction": 0.75, "status": "ok"}
            rows.append({**job.about, **found})
    text = script.summary(rows)
    assert (
        "32/32 heads of 128, 32768 x 8 tokens: at least 12 times the fastest dense: missed, 9.00"
        in (text)
    )
    assert "32/8 heads of 128, 131072 tokens: at least 6 times the fastest dense: met, 9.00" in text
    assert "hamming_score: at least 70% of the bandwidth: met, 75%, 75%" in text
    assert "not measured" not in text
    named = "32/8 heads of 128, 131072 tokens: {} 0.5000 ms, 9.00 times triton, 3"
    for name in ("hata with norms", "hata with integer scores", "exact"):
        assert named.format(name) in text
    assert script.summary([]).count("not measured") == 5


def test_a_run_that_cannot_start_has_an_error_of_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--out", str(tmp_path)]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(script, "has_triton", lambda: True)
    for arguments, printed in (
        ([], "TRITON_INTERPRET=1 runs the kernels in Python, which measures nothing"),
        (["--toy", "--minutes", "0"], "--minutes must be positive and --trials at least 1, got 0"),
        (["--toy", "--workers", "-1"], "--workers must be at least 1, got -1"),
        (["--toy", "--commit", "abc"], "--commit must be the checked out "),
    ):
        assert script.main([*given, *arguments]) == 2
        assert printed in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for device in ("cpu", "nowhere"):
        assert script.main([*given, "--device", device]) == 2
        assert f"--device must be a CUDA device, got {device}" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main(given) == 2
    assert "a CUDA device is needed, and there is none" in capsys.readouterr().err
    (tmp_path / "rows.csv").write_text("run_id\n")
    assert script.main([*given, "--toy"]) == 2
    assert "must be a folder without rows.csv that can be written" in capsys.readouterr().err


def test_a_commit_is_that_of_the_whole_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(done, capture_output=True, text=True, check=True).stdout.strip()

    changed = tmp_path / "kernels" / "hamming_score" / "fused.py"
    changed.parent.mkdir(parents=True)
    changed.write_text("right\n")
    assert script.commit_of(tmp_path, None) == {}
    assert script.commit_of(tmp_path, "abc") == {"git_commit": "abc"}
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    head = git("rev-parse", "HEAD")
    (tmp_path / "rows.csv").write_text("what runs leave is no change of the code\n")
    assert script.commit_of(tmp_path, head[:9]) == {"git_commit": head, "git_dirty": False}
    changed.write_text("wrong\n")
    assert script.commit_of(tmp_path, None) == {"git_commit": head, "git_dirty": True}
    with pytest.raises(ValueError, match=f"--commit must be the checked out {head}, got abc"):
        script.commit_of(tmp_path, "abc")
    # Code inside another project's repository is not that project's.
    assert script.commit_of(tmp_path / "kernels", None) == {}


def test_the_columns_are_those_of_every_row() -> None:
    assert [name for name in COLUMNS if name not in ROW_COLUMNS and name[:2] != "p_"] == []
    assert set(CHECKED) == {path.parent.name for path in (ROOT / "kernels").glob("*/fused.py")}
