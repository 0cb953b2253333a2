"""A sweep in several processes has the rows of one process, and prefills each prompt once."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir

from topkbench.analysis.record.store import SPEED_COLUMNS, CellStore, Row, Sweep
from topkbench.harness import device_use, launchers, speed
from topkbench.harness import run as run_module
from topkbench.harness import runner as runner_module
from topkbench.harness.device_use import using
from topkbench.harness.launchers import Assignment, Joblib, Submitit
from topkbench.harness.main import CONF, job_of
from topkbench.harness.runner import Job, Local, Runner, Share
from topkbench.harness.sweep import PromptTask
from topkbench.tasks.ruler_words import RulerWords

ROOT = Path(__file__).parents[2]
# What differs between two measurements of one thing; the cache has a slot for each timed step, of
# which there are fewer in this process.
OF_THE_RUN = {
    "kv_cache_mib",
    *SPEED_COLUMNS,
    "started_at",
    "reused",
    "peak_memory_mib",
    "git_commit",
    "git_dirty",
}
SETTINGS = (
    "rbit=32",
    "task.length=256",
    "num_samples=2",
    "task.batch_size=1",
    "task.subtasks=[niah_single]",
    "task.timed_prompts=1",
    "tracker=none",
)


class NoTracker:
    def log_cell(self, *arguments: Any, **keywords: Any) -> bool:
        return True

    def log_progress(self, *arguments: Any, **keywords: Any) -> None:
        pass


def jobs_of(*methods: str, settings: tuple[str, ...] = ()) -> list[Job]:
    found = []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for method in methods:
            config = compose("config", [*SETTINGS, *settings, *method.split()])
            one = job_of(config, {"model": "tiny", "task": "ruler_words", "method": method}, ())
            assert isinstance(one, Job), one.error
            found.append(one)
    return found


def run(launcher: Any, folder: Path, jobs: list[Job]) -> Runner:
    runner = Runner(Sweep(folder / "sweep", folder), NoTracker())
    identities = launcher.run(runner, jobs)
    assert all(runner.sweep.store.cell(one).finished() for one in identities)
    return runner


def rows(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (row.run_id, row.subtask): {
            name: value for name, value in row.flat().items() if name not in OF_THE_RUN
        }
        for cell in CellStore(folder).cells()
        for row in cell.read()
    }


def samples(folder: Path) -> dict[str, pd.DataFrame]:
    timed = ["prefill_ms"]
    return {
        cell.identity: cell.samples().drop(columns=timed, errors="ignore")
        for cell in CellStore(folder).cells()
    }


def check_same(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    expected, found = samples(one), samples(other)
    assert expected.keys() == found.keys()
    for identity, frame in expected.items():
        pd.testing.assert_frame_equal(frame, found[identity])


@pytest.fixture(scope="module", autouse=True)
def few_timed_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "WARM_UP_STEPS", 1)
        patch.setattr(speed, "TIMED_STEPS", 2)
        yield


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    return jobs_of("method=full", "method=quest k=32", "method=hata k=16")


@pytest.fixture(scope="module")
def alone(jobs: list[Job], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run(Local(), folder, jobs)
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))


class Here(Joblib):
    """Does all assignments in this process, one after the other, as if each had its own."""

    def start(self, assignments: Any, folder: Path) -> Iterator[tuple[int, launchers.Done]]:
        for position, work in enumerate(assignments):
            launchers.runner_of.cache_clear()
            yield position, launchers.do(work)


def test_shares_are_all_of_the_work_and_do_not_overlap() -> None:
    share = Share({"a": range(5), "b": range(1)}, ("x", "y", "z"))
    parts = share.split(4)
    assert [list(part.batches["a"]) for part in parts] == [[0, 4], [1], [2], [3]]
    assert [list(part.batches["b"]) for part in parts] == [[0], [], [], []]
    assert [list(part.cells) for part in parts] == [["x"], ["y"], ["z"], []]
    assert Share({"a": range(2)}, ()).split(8) == [
        Share({"a": range(0, 2, 8)}, ()),
        Share({"a": range(1, 2, 8)}, ()),
    ]
    assert Share({}, ()).split(3) == []


def test_a_job_is_pickled_as_plain_settings(jobs: list[Job]) -> None:
    again = pickle.loads(pickle.dumps(jobs[1]))
    assert again.composed.settings == jobs[1].composed.settings
    assert again.composed.method == jobs[1].composed.method
    assert again.composed.method is not jobs[1].composed.method
    assert again.choices == jobs[1].choices


def test_workers_that_share_memory_choose_a_smaller_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PromptTask, "memory", lambda task, loaded: (1000, 8000))
    found = jobs_of("method=full", settings=("task.batch_size=auto",))
    sizes = []
    for workers in (1, 2, 4):
        folder = tmp_path / str(workers)
        sweep = Sweep(folder / "sweep", folder)
        launchers.runner_of.cache_clear()
        sharing = Joblib(workers=workers).sharing
        sent = pickle.loads(pickle.dumps(Assignment(sweep, found, frozenset(), sharing)))
        done = launchers.do(sent)
        assert done.error == ""
        (path,) = (folder / "batch_sizes").glob("*.json")
        sizes.append(json.loads(path.read_text())["batch_size"])
    assert sizes == [4, 2, 1]


def test_shares_measured_apart_give_the_rows_of_one_process(
    alone: Path, jobs: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Here(workers=2), tmp_path, jobs)
    check_same(alone, tmp_path)
    assert "2 of 2 shares measured, 2 prompts prefilled" in capsys.readouterr().out


def test_what_was_measured_is_found_and_with_force_measured_again_once(
    jobs: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Here(workers=2), tmp_path, jobs)
    run(Here(workers=2), tmp_path, jobs)
    assert "shares measured" not in capsys.readouterr().out.split("3 found")[1]
    forced = jobs_of("method=full", "method=quest k=32", settings=("force=true",))
    runner = run(Here(workers=2), tmp_path, forced)
    assert "2 of 2 shares measured, 2 prompts prefilled" in capsys.readouterr().out
    # A second batch of the same command, as a search has, does not measure full attention again.
    Here(workers=2).run(
        runner, jobs_of("method=full", "method=exact k=16", settings=("force=true",))
    )
    attempts = {cell.read()[0].method: cell.attempt for cell in runner.sweep.cells()}
    assert attempts == {"full": 2, "quest": 2, "hata": 1, "exact": 1}


def test_a_skipped_cell_names_the_one_that_it_would_be_compared_with(tmp_path: Path) -> None:
    runner = Runner(Sweep(tmp_path / "sweep", tmp_path), NoTracker())
    full, skipped = Local().run(
        runner, jobs_of("method=full", "method=exact k=32 protocol.dense_layers=4")
    )
    assert skipped is not None
    (row,) = runner.sweep.store.cell(skipped).read()
    assert row.status == "skipped"
    assert row.full_run_id == full


def failed_quest(folder: Path) -> Row:
    """Run full attention and Quest in two shares; return the row of Quest, which must fail."""
    runner = Runner(Sweep(folder / "sweep", folder), NoTracker())
    full, quest = Here(workers=2).run(runner, jobs_of("method=full", "method=quest k=32"))
    assert full is not None
    assert runner.sweep.store.cell(full).finished()
    assert quest is not None
    (row,) = runner.sweep.store.cell(quest).read()
    assert row.status == "failed"
    return row


def test_an_error_of_one_cell_makes_its_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from topkbench.methods.quest import Quest

    def fail(*arguments: Any, **keywords: Any) -> Any:
        raise RuntimeError("a fault of its own")

    monkeypatch.setattr(Quest, "score", fail)
    assert "a fault of its own" in failed_quest(tmp_path).reason


def test_a_cell_that_fails_in_one_share_alone_has_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = RulerWords.measure

    def fail_on_first(task: Any, context: Any, plan: Any, part: str, prompts: Any) -> Any:
        if context.method.name == "quest" and prompts[0].sample.sample_id.endswith("-0-0"):
            raise RuntimeError("a fault of one prompt")
        return measure(task, context, plan, part, prompts)

    monkeypatch.setattr(RulerWords, "measure", fail_on_first)
    assert "a fault of one prompt" in failed_quest(tmp_path).reason
    assert "a fault of one prompt" in capsys.readouterr().err


def test_workers_of_two_kinds_are_refused_as_their_cells_differ(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(Here):
        def start(self, assignments: Any, folder: Path) -> Iterator[Any]:
            if assignments[0].share is not None:
                there = run_module.environment

                def other(loaded: Any) -> dict[str, Any]:
                    return {**there(loaded), "device": "Another GPU"}

                monkeypatch.setattr(run_module, "environment", other)
                monkeypatch.setattr(runner_module, "environment", other)
            yield from super().start(assignments, folder)

    runner = Runner(Sweep(tmp_path / "sweep", tmp_path), NoTracker())
    with pytest.raises(launchers.WorkerError, match=r"one has Another GPU, .*, and the first"):
        Other(workers=2).run(runner, jobs)


def test_a_cell_that_nobody_has_ended_is_no_success(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runner, "run_share", lambda *arguments: 0)
    runner = Runner(Sweep(tmp_path / "sweep", tmp_path), NoTracker())
    with pytest.raises(launchers.WorkerError, match="all cells must have ended when every share"):
        Here(workers=2).run(runner, jobs)


def test_an_assignment_that_cannot_be_done_ends_the_sweep_with_its_reason(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(Runner, "run_share", fail)
    runner = Runner(Sweep(tmp_path / "sweep", tmp_path), NoTracker())
    with pytest.raises(
        launchers.WorkerError, match=r"a fault of ours \(traceback in .*what was measured is kept"
    ):
        Here(workers=2).run(runner, jobs)


@pytest.mark.slow
def test_processes_of_joblib_give_the_rows_of_one_process_though_one_is_killed(
    alone: Path, jobs: list[Job], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Killing(Joblib):
        """Kills the first worker that has measured something."""

        def start(self, assignments: Any, folder: Path) -> Iterator[tuple[int, launchers.Done]]:
            if assignments[0].share is not None and not killed:
                import threading

                threading.Thread(target=kill, daemon=True).start()
            yield from super().start(assignments, folder)

    killed: list[int] = []

    def kill() -> None:
        while not killed:
            for path in (tmp_path / "parts").glob("*/*.jsonl"):
                killed.append(int(path.stem.rpartition("-")[2]))
                os.kill(killed[0], signal.SIGKILL)
                return
            time.sleep(0.01)

    run(Killing(workers=2), tmp_path, jobs)
    assert killed != []
    out = capfd.readouterr().out
    assert out.count("a worker has died") == 1
    assert "2 of 2 shares measured" in out
    check_same(alone, tmp_path)


# Devices ------------------------------------------------------------------------------------------


def test_each_joblib_worker_has_a_gpu_and_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(launchers.psutil, "cpu_count", lambda logical: 16)
    launcher = Joblib()
    assert launcher.count == 2
    assert [launcher.environment(one)["CUDA_VISIBLE_DEVICES"] for one in (0, 1, 2)] == [
        "2",
        "5",
        "2",
    ]
    assert launcher.environment(0)["OMP_NUM_THREADS"] == "8"
    assert [Joblib(workers=one).sharing for one in (1, 2, 3, 5)] == [1, 1, 2, 3]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launcher.environment(0)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Joblib().count == 2  # processes, where there is no GPU
    assert Joblib().sharing == 2


def test_time_is_measured_while_no_other_process_uses_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import sys, time, torch
from topkbench.harness.device_use import using
with using(torch.device("cpu"), alone=sys.argv[1] == "alone"):
    print("begun", flush=True)
    sys.stdin.read()
print(time.monotonic(), flush=True)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT / ".types")}
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    device_use._lock.cache_clear()

    def other(how: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", code, how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        return process

    cpu = torch.device("cpu")
    user = other("together")
    with using(cpu, alone=False):  # two at a time
        pass
    # Who waits long is told for whom; a process that was killed has left a note that says nothing.
    said: list[str] = []

    def end_user(text: str) -> None:
        said.append(text)
        assert user.stdin is not None
        user.stdin.close()

    (folder,) = tmp_path.iterdir()
    (folder / "cpu.lock-0.json").write_text('{"pid": 999999999}')
    with monkeypatch.context() as patched:
        patched.setattr(device_use, "say", end_user)
        patched.setattr(device_use, "PATIENCE_S", 0)
        with using(cpu, alone=True):
            pass
    name, place = f"process {user.pid}", re.escape(str(Path.cwd()))
    (words,) = said
    assert re.fullmatch(rf"waiting for cpu, on which {name} works since \S+, in {place}", words)
    user = other("together")
    timer = subprocess.Popen(
        [sys.executable, "-c", code, "alone"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    time.sleep(1)
    ended = time.monotonic()
    out, _ = user.communicate("")
    assert float(out) >= ended
    assert timer.stdout is not None
    assert timer.stdout.readline() == "begun\n"
    assert timer.stdin is not None
    timer.stdin.close()
    with using(cpu, alone=True):
        assert float(timer.stdout.read()) < time.monotonic()
    device_use._lock.cache_clear()


# SLURM and Ray ------------------------------------------------------------------------------------

SUBMIT = os.environ.get("TOPKBENCH_TEST_SLURM") == "1"  # sbatch alone tells nothing of a controller
HAS_RAY = find_spec("ray") is not None
ONE_CORE = {"workers": 2, "gpus": 0, "cpus": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "cluster",
    [
        "local",
        pytest.param(
            "slurm",
            marks=pytest.mark.skipif(
                not SUBMIT, reason="submits jobs to SLURM: set TOPKBENCH_TEST_SLURM=1"
            ),
        ),
    ],
)
def test_submitted_jobs_give_the_rows_of_one_process(
    alone: Path,
    jobs: list[Job],
    tmp_path: Path,
    cluster: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / ".types"))
    launcher = Submitit(cluster=cluster, time_min=30, memory_gib=3, **ONE_CORE)
    run(launcher, tmp_path, jobs)
    check_same(alone, tmp_path)
    assert "2 of 2 shares measured, 2 prompts prefilled" in capfd.readouterr().out


def test_a_job_that_is_warned_ends_after_its_batch_and_goes_on_in_the_queue(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep(tmp_path / "sweep", tmp_path)
    launchers.runner_of.cache_clear()
    prepared = launchers.do(Assignment(sweep, jobs, frozenset()))
    assert prepared.share is not None
    work = Assignment(
        sweep,
        jobs,
        frozenset(),
        share=prepared.share,
        prepared=(prepared.identities, prepared.machine),
    )
    requeued: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: requeued.append(number))
    measured: list[int] = []
    run_batch = launchers.Runner._run_by_prompts

    def warned(self: Runner, group: Any, cells: Any, *rest: Any) -> None:
        keep = cells[0].runner.part

        def part(*arguments: Any) -> Any:
            found = keep(*arguments)
            kept = found.keep

            def note(number: int, records: Any) -> None:
                kept(number, records)
                measured.append(number)
                os.kill(os.getpid(), signal.SIGUSR2)  # in the middle of the first batch

            found.keep = note
            return found

        cells[0].runner.part = part
        run_batch(self, group, cells, *rest)

    monkeypatch.setattr(launchers.Runner, "_run_by_prompts", warned)
    try:
        done = launchers.StopsAfterBatch()(work)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert requeued == [signal.SIGUSR2]  # submitit's own handler, once
    assert done.prefills == 1
    assert set(measured) == {0}
    assert len(measured) > 1  # all parts of all cells on it
    monkeypatch.undo()
    launchers.runner_of.cache_clear()
    assert launchers.do(work).prefills == 1  # the other batch
    assert all(cell.finished() for cell in sweep.cells())


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RAY, reason="needs the package ray")
def test_tasks_of_ray_give_the_rows_of_one_process(
    alone: Path, jobs: list[Job], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import ray

    # On one core the tasks come one after the other, in one process, which imports torch once.
    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
    try:
        run(launchers.Ray(address=None, **ONE_CORE), tmp_path, jobs)
    finally:
        ray.shutdown()
    check_same(alone, tmp_path)
    assert "2 of 2 shares measured, 2 prompts prefilled" in capfd.readouterr().out


def test_a_launcher_that_is_not_installed_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launchers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"package submitit, .*: pip install 'topkbench\[slurm\]'"):
        Submitit(workers=1).check()
    with pytest.raises(ValueError, match=r"package ray, .*: pip install 'topkbench\[ray\]'"):
        launchers.Ray(workers=1).check()
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs SLURM's command sbatch"):
        Submitit(workers=1).check()
    Submitit(workers=1, cluster="local").check()


@pytest.mark.parametrize(
    ("load", "threads", "expected"),
    [
        (2.0, 2, None),
        (0.1, 1, None),
        (
            4.25,
            2,
            "other processes keep the processors busy (load 4.2 on 2): what is timed now may be"
            " marked unsteady; OMP_NUM_THREADS=1 or OMP_WAIT_POLICY=passive is often faster"
            " meanwhile",
        ),
        (
            2.6,
            1,
            "other processes keep the processors busy (load 2.6 on 2): what is timed now may be"
            " marked unsteady",
        ),
    ],
)
def test_a_sweep_says_when_others_keep_all_processors_busy(
    monkeypatch: pytest.MonkeyPatch, load: float, threads: int, expected: str | None
) -> None:
    class Process:
        def cpu_affinity(self) -> list[int]:
            return [0, 1]

    monkeypatch.setattr(device_use.psutil, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(device_use.psutil, "Process", Process)
    monkeypatch.setattr(device_use.torch, "get_num_threads", lambda: threads)
    assert device_use.load_warning() == expected


def test_notes_of_killed_processes_are_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    device_use._lock.cache_clear()
    cpu = torch.device("cpu")
    with using(cpu, alone=False):
        (folder,) = tmp_path.iterdir()
        killed, alive = (folder / f"cpu.lock-{pid}.json" for pid in (999999999, os.getppid()))
        killed.write_text("{}")
        alive.write_text("{}")
    with using(cpu, alone=False):
        assert not killed.exists()
        assert alive.exists()
    device_use._lock.cache_clear()
