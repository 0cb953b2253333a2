"""The check of the kernels on a GPU, in Triton's interpreter and with times that are made up."""

from __future__ import annotations

import csv
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from topkbench.analysis import report
from topkbench.analysis.row import COLUMNS as ROW_COLUMNS
from topkbench.analysis.row import SPEED_COLUMNS, Row
from topkbench.kernels.gpu_check import __main__ as script
from topkbench.kernels.gpu_check import decode, supervisor, worker
from topkbench.kernels.gpu_check.dense import BASELINES, Baseline
from topkbench.kernels.gpu_check.plan import CHECKED, DTYPES, Job, Plan, make_plan
from topkbench.kernels.gpu_check.rows import COLUMNS, Writer
from topkbench.kernels.gpu_check.supervisor import Supervisor
from topkbench.kernels.gpu_check.workplace import Workplace
from topkbench.kernels.steps import Layer
from topkbench.kernels.timing import Timing

ROOT = Path(__file__).parents[2]
ABSENT = (
    *(
        "transformers",
        "tokenizers",
        "hydra",
        "omegaconf",
        "wandb",
        "pandas",
        "matplotlib",
        "jinja2",
    ),
    *("pyarrow", "filelock", "psutil", "safetensors", "tabulate", "tqdm", "pytest", "hypothesis"),
)
HIDE = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")
sys.meta_path.insert(0, Hidden())
"""


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
def test_the_whole_script_runs_in_the_interpreter_on_a_bare_machine(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    out = tmp_path / "out"
    path = os.pathsep.join([str(tmp_path), str(ROOT / ".types")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "topkbench.kernels.gpu_check", "--toy", "--out", str(out)],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
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


def test_the_plan_fits_eight_minutes_and_begins_with_what_matters_most() -> None:
    plan = make_plan(11, False, ["flashinfer"])
    assert plan.total_s <= 8 * 60
    assert sum(job.compiles for job in plan.jobs) > 100
    checks = [job for job in plan.jobs if job.kind == "check"]
    settings = [(job.options["dtype"], job.options["head_dim"], job.options["group"])
                for job in checks]  # fmt: skip
    assert set(settings) == set(itertools.product(DTYPES, (64, 128), (1, 4, 8)))
    lengths = [size for job in checks for size, _, _ in job.options["sizes"]]
    assert (min(lengths), max(lengths)) == (128, 262144)
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
    assert plan.text(2).count("(no time)") > 20


def test_a_plan_counts_compiling_and_what_must_be_alone() -> None:
    def job(seconds: float, alone: bool, compiles: int = 0) -> Job:
        return Job("name", "check", {}, {}, ("a",), "", compiles, seconds, alone)

    parallel = [job(10, False, 5), job(10, False), job(10, False)]
    assert Plan(parallel, 2).starts_s == [15, 15, 25]
    assert Plan(parallel, 2).total_s == 35  # five kernels of 2 s and 10 s; or twice 10 s
    assert Plan([*parallel, job(7, True)], 2).starts_s == [15, 15, 25, 35]
    # Timing is done by one process; the others are started anew.
    assert Plan([job(7, True), job(1, False)], 2).starts_s == [15, 37]


@pytest.mark.usefixtures("interpreted")
def test_a_broken_kernel_is_wrong_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from topkbench.kernels.hamming_score import fused

    right = fused.hamming_score

    def broken(*arguments: Any) -> Tensor:
        scores = right(*arguments)
        scores[..., -20:] -= 3
        return scores

    monkeypatch.setattr(fused, "hamming_score", broken)
    jobs = toy_jobs()
    two = ("hamming_score", "page_score")
    checked = do(replace(jobs["check"], parts=two), [])
    assert [(row["method"], row["status"]) for row in checked] == [
        ("hamming_score", "wrong"),
        ("page_score", "ok"),
    ]
    assert checked[0]["reason"].startswith("at 136 tokens: hamming_score is wrong with integer")
    timed = do(replace(jobs["operators"], parts=two), checked)
    assert [row["status"] for row in timed] == ["wrong", "ok"]
    assert do(jobs["hata_integer"], [])[0]["status"] == "wrong"
    assert do(jobs["streaming_llm"], [])[0]["status"] == "ok"


@pytest.mark.usefixtures("interpreted")
def test_what_was_wrong_before_has_no_speed_in_the_same_kernels(times: Times) -> None:
    jobs = toy_jobs()
    before = {
        **{"task": "kernel_check", "method": "sparse_attention", "status": "wrong"},
        **{"reason": "at 1,000 tokens: bad.", "p_dtype": "float32", "p_head_dim": 64},
    }
    step = jobs["streaming_llm"]
    found = do(step, [{**before, "p_group": 2}], toy=False)[0]
    assert (found["status"], found.get("decode_ms_p50")) == ("wrong", None)
    assert found["reason"] == (
        "sparse_attention was wrong in the checks before: at 1,000 tokens: bad."
    )
    other = [{**before, "p_group": 8}, {**before, "p_group": 2, "method": "page_score"}]
    assert do(step, other, toy=False)[0]["status"] == "ok"
    one = replace(jobs["operators"], parts=("sparse_attention", "code_score"))
    rows = do(one, [{**before, "p_group": 2, "p_dtype": "bfloat16"}], toy=False)
    assert [row["status"] for row in rows] == ["wrong", "ok"]


Times = Callable[[Mapping[str, float]], None]


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    """Make up how long each call takes, by its name; 1 ms where nothing is said."""
    told: dict[str, float] = {}

    def timed(place: Workplace, calls: Mapping[str, Any], trials: int = 1) -> dict[str, Timing]:
        return {name: Timing.of([told.get(name, 1.0)] * 8) for name in calls}

    monkeypatch.setattr(Workplace, "timed", timed)
    monkeypatch.setattr(Workplace, "bandwidth_gb_s", 2.0)
    return told.update


@pytest.mark.usefixtures("interpreted")
def test_a_method_is_timed_against_the_fastest_dense_that_is_right(
    monkeypatch: pytest.MonkeyPatch, times: Times
) -> None:
    def half(layer: Layer) -> Callable[[], Tensor]:
        call = BASELINES["sdpa math"].make(replace(layer, values=layer.values / 2))
        return call

    monkeypatch.setitem(BASELINES, "sdpa cudnn", Baseline(lambda: "torch 9", half))
    jobs = toy_jobs()
    times({"sdpa cudnn": 0.1, "sdpa math": 4.0, "triton": 2.0, "full": 3.0, "hata": 0.5})
    dense = replace(jobs["dense"], parts=("sdpa cudnn", "sdpa math", "triton"))
    rows = do(dense, [], toy=False)
    found = {row["full_backend"].partition(",")[0]: row for row in rows}
    assert found["sdpa cudnn"]["status"] == "wrong"
    assert "the error must be at most" in found["sdpa cudnn"]["reason"]
    assert found["sdpa cudnn"].get("decode_ms_p50") is None
    read = 2 * 96 * 64 * 4  # keys and values of one head
    assert found["sdpa math"]["bandwidth_fraction"] == pytest.approx(read / 4e-3 / 2e9)
    hata = do(jobs["hata"], rows, toy=False)[0]
    assert hata["full_backend"].startswith("triton, topkbench's, triton ")
    # Full attention as it was timed in turn with the step, not as in its own row.
    assert (hata["full_ms_p50"], hata["speedup_vs_full"]) == (3.0, 6.0)
    assert (hata["speedup_ci_low"], hata["speedup_ci_high"]) == (6.0, 6.0)
    assert (hata["k"], hata["rbit"], hata["p_use_norm"]) == (64, 128, True)
    alone = do(jobs["streaming_llm"], [row for row in rows if row["status"] != "ok"], toy=False)[0]
    assert (alone["status"], alone.get("speedup_vs_full")) == ("ok", None)


@pytest.mark.usefixtures("interpreted")
def test_a_missing_library_and_a_lack_of_memory_are_rows_with_their_reasons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(layer: Layer) -> Callable[[], Tensor]:
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

    def draw(*arguments: Any) -> Layer:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(decode.Layer, "draw", draw)
    jobs = toy_jobs()
    (dense,), (step,) = do(jobs["dense"], []), do(jobs["quest"], [])
    assert dense["status"] == step["status"] == "out_of_memory"


def test_a_library_that_was_not_ready_is_not_waited_for_again(times: Times) -> None:
    row = {"task": "kernel_check", "method": "flashinfer", "status": "failed", "reason": "late."}
    found = do(replace(toy_jobs()["dense"], parts=("flashinfer",)), [row])[0]
    assert found["status"] == "skipped"


def fake_worker(channel: Any, device: str, toy: bool, trials: int) -> None:
    os.setsid()
    channel.send(("hello", {"device": device}))
    while (given := channel.recv()) is not None:
        job, _ = given
        for part in job.left:
            channel.send(("at", part))
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
    monkeypatch: pytest.MonkeyPatch, folder: Path, jobs: list[Job], limit_s: float = 600
) -> list[tuple[str, str, str]]:
    # Forked, so that the processes find the function above; none of them touches torch.
    monkeypatch.setattr(
        supervisor.multiprocessing, "get_context", lambda _, real=multiprocessing.get_context:
        real("fork"),
    )  # fmt: skip
    monkeypatch.setattr(supervisor, "serve", fake_worker)
    writer = Writer(folder / "out")
    said: list[str] = []
    Supervisor(Plan(jobs, 2), writer, limit_s, "made up", True, 1, {}, said.append).run()
    assert len(said) == len(writer.rows)
    with (folder / "out" / "rows.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["method"] for row in read] == [row["method"] for row in writer.rows]
    return [(row["method"], row["status"], row["reason"]) for row in read]


def job_of(*parts: str, alone: bool = True, seconds: float = 1) -> Job:
    about = {"task": "kernel_check", "model": "m", "subtask": parts[0]}
    return Job("name", "check", {}, about, parts, "method", 0, seconds, alone)


def test_what_ends_a_process_is_a_row_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobs = [job_of("a", "killer", "b", "lost", "c"), job_of("d", alone=False), job_of("e")]
    assert supervised(monkeypatch, tmp_path, jobs) == [
        ("a", "ok", ""),
        ("killer", "failed", "the process ended with status -9 in killer."),
        ("b", "ok", ""),
        ("lost", "failed", "DeviceLost: gone."),
        ("c", "ok", ""),
        ("d", "ok", ""),
        ("e", "ok", ""),
    ]


def test_what_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Job, "limit_s", 0.3)
    assert supervised(monkeypatch, tmp_path, [job_of("sleeper", "a")]) == [
        ("sleeper", "failed", "still running after 0 s in sleeper."),
        ("a", "ok", ""),
    ]


def test_what_there_is_no_time_for_is_dropped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    began = time.monotonic()
    monkeypatch.setattr(supervisor, "SECONDS_TO_START", 0)
    jobs = [job_of("a", seconds=1), job_of("b", seconds=900), job_of("c", "sleeper", "d")]
    found = supervised(monkeypatch, tmp_path, jobs, limit_s=3)
    assert time.monotonic() - began < 10
    assert [(method, status) for method, status, _ in found] == [
        ("a", "ok"),
        ("all operators", "skipped"),
        ("c", "ok"),  # there is time for what comes later and is short
        ("sleeper", "failed"),
        ("all operators", "skipped"),
    ]
    assert found[1][2].startswith("dropped: 900 s needed, ")
    assert found[3][2] == "still running when the time was up in sleeper."
    assert found[4][2] == "dropped: 1 s needed, 0 s left."


def test_what_cannot_be_run_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--out", str(tmp_path)]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(script, "has_triton", lambda: True)
    for arguments, said in (
        ([], "TRITON_INTERPRET=1 runs the kernels in Python, which measures nothing"),
        (["--toy", "--minutes", "0"], "--minutes must be positive and --trials at least 1, got 0"),
    ):
        assert script.main([*given, *arguments]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "0")
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
