"""Runs a sweep in several processes: on this machine, on a SLURM cluster, or on a Ray cluster.

The jobs of a model are prepared first, in one worker: what learns is fitted, the cells are begun,
and the batches of prompts are counted. Then each worker measures a share: some batches, each with
all cells that have its prompts, so that a prompt is prefilled once, whatever the number of workers.
Workers write into the same cells as a sweep in one process, and whoever finds that everything of a
cell is measured writes its rows.
"""

import contextlib
import functools
import logging
import math
import os
import queue
import shutil
import signal
import subprocess
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import psutil
import torch

from topkbench.analysis.console import say
from topkbench.analysis.record.files import write_atomic
from topkbench.analysis.record.store import RecordError, Sweep
from topkbench.harness.run import describe
from topkbench.harness.runner import Job, Runner, Share
from topkbench.methods.base import check_whole

MOST_DEATHS = 30
"""How often the process with an assignment may die before the assignment is given up."""

POLL_S = 5.0
"""Seconds between two looks at whether jobs have ended."""

RESULT_S = 60.0
"""Seconds in which the result of a job that has left the queue must be seen."""


class WorkerError(RecordError):
    """A worker could not do its task; what was measured is kept."""


@dataclass(frozen=True)
class Assignment:
    """What a worker is asked to do with the jobs of one model: prepare them, or measure a share.

    Attributes:
        sweep: The sweep.
        jobs: The jobs.
        ended: The identities of cells that this command has run before; ``force=true`` does not run
            them again.
        sharing: Number of workers that share the memory of a device.
        share: What is measured; None to prepare.
        prepared: The identities and the machine of the preparation.
    """

    sweep: Sweep
    jobs: Sequence[Job]
    ended: frozenset[str]
    sharing: int = 1
    share: Share | None = None
    prepared: tuple[Mapping[int, str], str] = ({}, "")


@dataclass(frozen=True)
class Done:
    """What a worker has done.

    Attributes:
        identities: Of a preparation: the identity of each job's cell, by the job's position.
        share: Of a preparation: what is left to measure.
        machine: Of a preparation: the machine in words.
        prefills: Of a share: the number of prompts that were prefilled.
        is_stopped: Whether a part of it was left to another time.
        error: Why it could not be done; empty if it was.
        log: The error's traceback.
        has_died: Whether the process ended before, so that it is to be done again.
    """

    identities: Mapping[int, str] = field(default_factory=dict)
    share: Share | None = None
    machine: str = ""
    prefills: int = 0
    is_stopped: bool = False
    error: str = ""
    log: str = ""
    has_died: bool = False


@functools.lru_cache(maxsize=1)
def runner_of(folder: Path, results_dir: Path) -> Runner:
    """Return this process's runner of a sweep, which keeps its model between assignments."""
    return Runner(Sweep(folder, results_dir), None)


def do(assignment: Assignment, is_stopped: Callable[[], bool] = lambda: False) -> Done:
    """Do an assignment in this process.

    Args:
        assignment: The assignment.
        is_stopped: Whether to leave what is not begun to another time.
    """
    stopped: list[bool] = []

    def ask() -> bool:
        if is_stopped():
            stopped.append(True)
        return bool(stopped)

    try:
        runner = runner_of(assignment.sweep.folder, assignment.sweep.results_dir)
        runner.ended |= assignment.ended
        runner.sharing = assignment.sharing
        jobs, share = assignment.jobs, assignment.share
        if share is None:
            return Done(*runner.prepare(jobs))
        prefills = runner.run_share(jobs, share, assignment.prepared, ask)
        return Done(prefills=prefills, is_stopped=bool(stopped))
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        return Done(error=text, log=traceback.format_exc())


class Launcher(ABC):
    """Runs a sweep in workers; how they are started is each launcher's own.

    Attributes:
        package: The package that starts them.
        install: What pip installs to have it.
    """

    package: ClassVar[str]
    install: ClassVar[str]

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of workers, each of which measures a share of each model's prompts."""

    def check(self) -> None:
        """Check that what starts the workers is installed.

        Raises:
            ValueError: If it is not.
        """
        if find_spec(self.package) is None:
            raise ValueError(
                f"this launcher needs the package {self.package}, which is not installed: pip"
                f" install '{self.install}'."
            )

    @property
    def sharing(self) -> int:
        """Number of workers that share the memory of a device."""
        return 1

    @abstractmethod
    def start(
        self, assignments: Sequence[Assignment], folder: Path
    ) -> Iterator[tuple[int, Done] | None]:
        """Do assignments in workers.

        Args:
            assignments: The assignments.
            folder: The sweep's folder, for the engine's own files.

        Yields:
            The position of each assignment and what was done, in the order in which they end; None
            every few seconds in between.
        """

    def run(self, runner: Runner, jobs: Sequence[Job]) -> list[str | None]:
        """Run a sweep's jobs; return the identity of each one's cell, None if it cannot be run.

        Raises:
            WorkerError: If a worker could not do its assignment.
        """
        sweep, of_model = runner.sweep, runner.by_model(jobs)
        ended = frozenset(runner.ended)
        assignments = [
            Assignment(sweep, [jobs[one] for one in positions], ended, self.sharing)
            for positions in of_model
        ]
        identities: dict[int, str] = {}
        shares: list[Assignment] = []
        for position, done in self._do_all(assignments, runner):
            identities |= {of_model[position][at]: one for at, one in done.identities.items()}
            assert done.share is not None, "it was a preparation"
            prepared = done.identities, done.machine
            shares += [
                replace(assignments[position], share=share, prepared=prepared)
                for share in done.share.split(self.count)
            ]
        known = {cell.identity for cell in sweep.cells() if cell.has_ended()}
        for one in known:
            runner.track(sweep.store.cell(one))
        prefills = 0
        for number, (_, done) in enumerate(self._do_all(shares, runner, known), 1):
            prefills += done.prefills
            say(
                f"{number} of {len(shares)} shares measured, {prefills} prompts prefilled by the"
                " processes that ended"
            )
        left = [cell.identity for cell in sweep.cells() if not cell.has_ended()]
        if left:
            raise WorkerError(
                f"all cells must have ended when every share is measured, but {', '.join(left)}"
                " have not; what was measured is kept, and the same command goes on."
            )
        runner.ended |= set(sweep.identities())
        return [identities.get(position) for position in range(len(jobs))]

    def _do_all(
        self, assignments: Sequence[Assignment], runner: Runner, known: set[str] | None = None
    ) -> Iterator[tuple[int, Done]]:
        """Do assignments, again where a worker dies.

        Args:
            assignments: The assignments.
            runner: Reports the cells that have ended, and copies them to the tracker.
            known: The identities of cells of which that was done; None if none can have ended.
        """
        folder = runner.sweep.folder
        left = list(range(len(assignments)))
        deaths = dict.fromkeys(left, 0)
        while left:
            now, left = left, []
            for one in self.start([assignments[position] for position in now], folder):
                if known is not None:
                    _report_ended(runner, known)
                if one is None:
                    continue
                position, done = now[one[0]], one[1]
                if done.has_died and deaths[position] < MOST_DEATHS:
                    deaths[position] += 1
                    say(f"a worker has died ({done.error}): what it had not measured is done again")
                    left.append(position)
                elif done.error:
                    where = ""
                    if done.log:
                        write_atomic(folder / "worker_error.txt", done.log.encode())
                        where = f" (traceback in {folder / 'worker_error.txt'})"
                    raise WorkerError(
                        f"{done.error.rstrip('.')}{where}; what was measured is kept, and the same"
                        " command goes on."
                    )
                else:
                    yield position, done


def _report_ended(runner: Runner, known: set[str]) -> None:
    """Report and track the cells that have ended since the last time."""
    for cell in runner.sweep.cells():
        if cell.identity in known or not cell.has_ended():
            continue
        with cell.lock():  # its worker may still write
            rows = cell.read()
            runner.report(rows, describe(rows))
            runner.track(cell)
        known.add(cell.identity)


# This machine -------------------------------------------------------------------------------------


@dataclass
class Joblib(Launcher):
    """Runs a sweep in processes of this machine: ``launcher=joblib``.

    Each has its share of the processor's cores and, where there are GPUs, one of its own. The
    processes are those of joblib's engine loky. They live as long as the sweep, so that the one
    that prepares it has the libraries and the model when it measures.

    Attributes:
        workers: Number of processes; None for one a GPU, and two where there is none.
    """

    package: ClassVar[str] = "joblib"
    install: ClassVar[str] = "joblib"

    workers: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None:
            check_whole("workers", self.workers)
        self.gpus = visible_gpus()
        # One process each, as all processes of a pool end when one of them dies.
        self._pools: dict[int, Any] = {}

    @property
    def count(self) -> int:
        return self.workers or len(self.gpus) or 2

    @property
    def sharing(self) -> int:
        return math.ceil(self.count / (len(self.gpus) or 1))

    def run(self, runner: Runner, jobs: Sequence[Job]) -> list[str | None]:
        try:
            return super().run(runner, jobs)
        finally:
            for pool in self._pools.values():
                pool.shutdown(wait=True, kill_workers=True)
            self._pools.clear()

    def start(
        self, assignments: Sequence[Assignment], folder: Path
    ) -> Iterator[tuple[int, Done] | None]:
        from joblib.externals.loky import ProcessPoolExecutor
        from joblib.externals.loky.process_executor import BrokenProcessPool

        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        ended: queue.SimpleQueue[tuple[int, Done]] = queue.SimpleQueue()
        for position in range(len(assignments)):
            waiting.put(position)
        is_over = threading.Event()

        def renew(number: int) -> None:
            self._pools[number] = ProcessPoolExecutor(
                1,
                timeout=None,
                env=self.environment(number),
                initializer=_follow_parent,
                initargs=(os.getpid(),),
            )

        def work_on(number: int) -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    position = waiting.get_nowait()
                    try:
                        done = self._pools[number].submit(do, assignments[position]).result()
                    except BrokenProcessPool as error:
                        if is_over.is_set():
                            return
                        can_read = "un-serialize" not in str(error)
                        reason = str(error).partition(". ")[0]
                        done = Done(error=reason, has_died=can_read)
                        renew(number)
                    except Exception as error:  # what it was asked to do cannot be pickled
                        done = Done(error=_last_line(error))
                    ended.put((position, done))

        count = min(self.count, len(assignments))
        for number in range(count):
            if number not in self._pools:
                renew(number)
        try:
            for number in range(count):
                threading.Thread(target=work_on, args=[number], daemon=True).start()
            num_ended = 0
            while num_ended < len(assignments):
                try:
                    yield ended.get(timeout=POLL_S)
                    num_ended += 1
                except queue.Empty:
                    yield None
        finally:
            is_over.set()

    def environment(self, number: int) -> dict[str, str]:
        """Return what a worker's environment has in addition: its GPU, and its number of threads.

        Args:
            number: The worker's number.
        """
        cores = psutil.cpu_count(logical=False) or 1
        added = {
            name: os.environ.get(name, str(max(1, cores // self.count)))
            for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        }
        if self.gpus:
            added["CUDA_VISIBLE_DEVICES"] = self.gpus[number % len(self.gpus)]
        return added


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one.strip() for one in named.split(",") if one.strip()]
    return [str(one) for one in range(torch.cuda.device_count())]


def _follow_parent(parent: int) -> None:
    """Leave an interrupt to the process that started this one; end when that one has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _last_line(error: BaseException) -> str:
    """Return the last line of an error's message, which may have a traceback before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    return lines[-1] if lines else type(error).__name__


# SLURM --------------------------------------------------------------------------------------------


class StopsAfterBatch:
    """What a SLURM job does: warned before its time limit, it ends after its batch.

    Then submitit puts the job back into the queue, and it goes on with the next batch.
    """

    def __call__(self, assignment: Assignment) -> Done:
        """Do an assignment.

        Args:
            assignment: The assignment.
        """
        if assignment.share is None:  # a fit keeps each layer, and goes on after the last one
            return do(assignment)
        warned: list[tuple[int, Any]] = []
        number = getattr(signal, os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "SIGUSR2"))
        requeue = signal.getsignal(number)  # submitit's: it ends the process at once
        signal.signal(number, lambda *arguments: warned.append(arguments))
        try:
            done = do(assignment, lambda: bool(warned))
        finally:
            signal.signal(number, requeue)
        if warned and done.is_stopped and callable(requeue):
            requeue(*warned[0])
        return done

    def checkpoint(self, assignment: Assignment) -> Any:
        """Return what the job does once it is in the queue again: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, assignment)


@dataclass
class Submitit(Launcher):
    """Runs a sweep as jobs of a SLURM cluster, or as if they were: ``launcher=submitit_slurm``.

    This process waits for the jobs, and makes the report. If it ends before them they go on, and
    the same command collects what they have measured.

    Attributes:
        workers: Number of jobs, in one array.
        cluster: ``slurm``, or ``local`` for processes of this machine.
        time_min: Time limit of a job, in minutes.
        signal_s: Seconds before the time limit at which a job is warned: it ends after its batch,
            goes back into the queue, and goes on there.
        most_requeues: How often a job that met its time limit goes back into the queue.
        gpus: GPUs of each job.
        cpus: Processor cores of each job.
        memory_gib: Memory of each job.
        partition: The partition of the cluster; None for its default one.
        at_once: Most jobs that run at a time; None for all.
        setup: Shell commands before a job begins, such as ``module load cuda``.
        more: Further options of sbatch, such as ``{account: NAME, qos: NAME}``.
    """

    package: ClassVar[str] = "submitit"
    install: ClassVar[str] = "topkbench[slurm]"

    workers: int
    cluster: Literal["slurm", "local"] = "slurm"
    time_min: int = 240
    signal_s: int = 600
    most_requeues: int = 20
    gpus: int = 1
    cpus: int = 8
    memory_gib: int = 64
    partition: str | None = None
    at_once: int | None = None
    setup: Sequence[str] = ()
    more: Mapping[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("workers", "time_min", "cpus", "memory_gib"):
            check_whole(name, getattr(self, name))
        for name in ("signal_s", "most_requeues", "gpus"):
            check_whole(name, getattr(self, name), least=0)
        if self.at_once is not None:
            check_whole("at_once", self.at_once)
        self._seen: dict[str, float] = {}
        if self.signal_s >= 60 * self.time_min:
            raise ValueError(
                f"signal_s must be less than the {60 * self.time_min} s of time_min, got"
                f" {self.signal_s}."
            )

    def check(self) -> None:
        super().check()
        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise ValueError(
                "this launcher needs SLURM's command sbatch, which is not found here: run it on a"
                " node from which jobs are submitted, or use launcher=submitit_local."
            )

    @property
    def count(self) -> int:
        return self.workers

    def start(
        self, assignments: Sequence[Assignment], folder: Path
    ) -> Iterator[tuple[int, Done] | None]:
        from submitit.core.utils import FailedJobError

        logs = folder / "submitit"
        executor = self._executor(logs)
        try:
            with executor.batch():
                jobs = [executor.submit(StopsAfterBatch(), one) for one in assignments]
        except FailedJobError as error:
            raise WorkerError(
                f"SLURM must accept the jobs, but sbatch says: {_last_line(error)}; see the"
                " settings of launcher, such as gpus, partition and memory_gib."
            ) from error
        if jobs:
            say(f"submitted {', '.join(job.job_id for job in jobs)}; logs in {logs}")
        waiting = dict(enumerate(jobs))
        while waiting:
            time.sleep(POLL_S)
            for position in self._ended(waiting):
                yield position, _done(waiting.pop(position))
            yield None

    def _ended(self, jobs: Mapping[int, Any]) -> list[int]:
        """Return which jobs have left a result, or are neither running nor waiting any more."""
        if self.cluster == "local":
            return [position for position, job in jobs.items() if job.done()]
        # sacct, which submitit asks, knows nothing on a cluster without accounting.
        command = ["squeue", "--noheader", "--array", "--me", "--format=%i"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
        queued = listed.stdout.split()
        ended = []
        for position, job in jobs.items():
            is_queued = listed.returncode != 0 or job.job_id in queued
            if is_queued:
                self._seen[job.job_id] = time.monotonic()
            # A result may take a while to be seen on this node.
            unseen_s = time.monotonic() - self._seen.setdefault(job.job_id, time.monotonic())
            if job.paths.result_pickle.exists() or unseen_s > RESULT_S:
                ended.append(position)
        return ended

    def _executor(self, folder: Path) -> Any:
        """Return submitit's executor, with the settings of a job."""
        import submitit

        executor = submitit.AutoExecutor(
            folder, cluster=self.cluster, **{f"{self.cluster}_max_num_timeout": self.most_requeues}
        )
        executor.update_parameters(
            name="topkbench",
            timeout_min=self.time_min,
            cpus_per_task=self.cpus,
            gpus_per_node=self.gpus,
            mem_gb=self.memory_gib,
        )
        if self.cluster == "slurm":
            executor.update_parameters(
                slurm_signal_delay_s=self.signal_s,
                slurm_partition=self.partition,
                slurm_array_parallelism=self.at_once or self.workers,
                slurm_setup=list(self.setup),
                slurm_additional_parameters=dict(self.more),
            )
        return executor


def _done(job: Any) -> Done:
    """Return what a job that has ended has done."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    if not job.paths.result_pickle.exists():
        return Done(error=f"job {job.job_id} left no result", has_died=True)
    try:
        done = job.result()
    except UncompletedJobError as error:
        return Done(error=_last_line(error), has_died=True)
    except FailedJobError as error:  # it would fail again: the package is not there, for instance
        return Done(error=_last_line(error))
    assert isinstance(done, Done)
    return done


# Ray ----------------------------------------------------------------------------------------------


@dataclass
class Ray(Launcher):
    """Runs a sweep as tasks of a Ray cluster: ``launcher=ray``.

    Attributes:
        workers: Number of tasks.
        address: The cluster's address, as ``ray.init`` takes it; None for one that is started here.
        cpus: Processor cores of each task, which computes with as many threads.
        gpus: GPUs of each task.
    """

    package: ClassVar[str] = "ray"
    install: ClassVar[str] = "topkbench[ray]"

    workers: int
    address: str | None = "auto"
    cpus: int = 8
    gpus: int = 1

    def __post_init__(self) -> None:
        for name in ("workers", "cpus"):
            check_whole(name, getattr(self, name))
        check_whole("gpus", self.gpus, least=0)

    @property
    def count(self) -> int:
        return self.workers

    def start(
        self, assignments: Sequence[Assignment], folder: Path
    ) -> Iterator[tuple[int, Done] | None]:
        import ray

        if not ray.is_initialized():
            try:
                ray.init(address=self.address, logging_level=logging.ERROR, log_to_driver=False)
            except ConnectionError as error:
                raise WorkerError(
                    f"launcher.address must be that of a running Ray cluster, got {self.address};"
                    " start one with ray start --head, or use launcher.address=null"
                ) from error
        there = ray.cluster_resources()
        for name, wanted in (("CPU", self.cpus), ("GPU", self.gpus)):
            if wanted > there.get(name, 0):
                raise WorkerError(
                    f"launcher.{name.lower()}s must be at most what the Ray cluster has,"
                    f" {there.get(name, 0):g}, got {wanted}"
                )
        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(do)
        waiting = {
            task.remote(assignment): position for position, assignment in enumerate(assignments)
        }
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_S)
            if not ready:
                yield None
                continue
            (one,) = ready
            try:
                done = ray.get(one)
            except ray.exceptions.RayTaskError as error:  # it would fail again
                done = Done(error=_last_line(error))
            except ray.exceptions.RayError as error:
                done = Done(error=_last_line(error), has_died=True)
            yield waiting.pop(one), done
