"""Runs a plan: hands jobs to processes, enforces time limits, and writes the rows.

A kernel may crash its process, break the device's context in it, or never return. Then the part
that was running gets a row with the reason, a new process is started, and it goes on with the job's
other parts. Timed jobs do not wait for checks that take too long: those are stopped, and continue
after the timing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from topkbench.harness.gpu_check.plan import (
    CHECKS_END_S,
    SECONDS_TO_END,
    SECONDS_TO_START,
    Job,
    Plan,
    holds_up_timing,
    timing_first,
)
from topkbench.harness.gpu_check.rows import Writer, speedup
from topkbench.harness.gpu_check.worker import serve

_TICK_S = 1.0


@dataclass
class Worker:
    """A process, its job, and the part of the job that it is doing."""

    process: BaseProcess
    channel: Connection
    job: Job | None = None
    current_part: str | None = None
    started_at: float = 0.0
    """When the current part started; without one, when the job or the process did."""
    reported: set[str] = field(default_factory=set)
    broken: str | None = None
    """Why the process could not start."""


class Supervisor:
    """Runs a plan until its end or until the time is up.

    Args:
        plan: What to do.
        writer: Where the rows go.
        limit_s: Seconds from now after which everything is stopped.
        device: Where the jobs run.
        toy: Run in Triton's interpreter and time nothing.
        trials: How often each call is timed.
        shared_columns: Columns of every row, besides those that a worker sends.
        print_line: Prints a line.
    """

    def __init__(
        self,
        plan: Plan,
        writer: Writer,
        limit_s: float,
        device: str,
        toy: bool,
        trials: int,
        shared_columns: Mapping[str, Any],
        print_line: Callable[[str], None],
    ) -> None:
        self.plan, self.writer = plan, writer
        self.shared_columns, self.print_line = shared_columns, print_line
        self.settings = (device, toy, trials)
        self.began = time.monotonic()
        self.deadline = self.began + limit_s
        self.waiting = deque(plan.jobs)
        self.workers: list[Worker] = []
        self.machine_columns: dict[str, Any] = {}

    def run(self) -> None:
        """Run the plan."""
        try:
            while self.waiting or any(worker.job for worker in self.workers):
                self._hand_out()
                self._receive()
                self._stop_late_parts()
                self._begin_timing()
        finally:
            self.end_workers(*self.workers)

    def _hand_out(self) -> None:
        """Give each idle process the next job that may run now and fits the remaining time."""
        while self.waiting:
            job = self.waiting[0]
            busy = [worker for worker in self.workers if worker.job is not None]
            if job.alone:
                if busy:
                    return
                self.end_workers(*self.workers[1:])  # this also frees their device memory
            elif len(busy) >= self.plan.workers or any(one.job and one.job.alone for one in busy):
                return
            now = time.monotonic()
            left = self.deadline - now
            idle = next((worker for worker in self.workers if worker.job is None), None)
            needed = job.estimate_s + (0 if idle is not None else SECONDS_TO_START)
            if holds_up_timing(job, now - self.began + needed, self.waiting):
                self.waiting = timing_first(self.waiting)
                continue
            self.waiting.popleft()
            if needed > left:
                self._drop(job, f"dropped: {needed:.0f} s needed, {max(left, 0):.0f} s left.")
                continue
            worker = idle or self._start()
            worker.job, worker.started_at, worker.current_part = job, now, None
            worker.reported = set()
            with suppress(OSError):  # if it has just ended, _receive notices it
                worker.channel.send((job, self.writer.rows))

    def _drop(self, job: Job, reason: str) -> None:
        """Write a job's remaining parts as skipped.

        If no part of it was done, the jobs that need it are skipped too.
        """
        dependents = (
            [] if job.finished_parts else [one for one in self.waiting if one.needs == job.name]
        )
        for one in (job, *dependents):
            self._write_all(one, one.remaining_parts, "skipped", reason)
        self.waiting = deque(one for one in self.waiting if one not in dependents)

    def _begin_timing(self) -> None:
        """When timing is due, stop the checks; they continue after it."""
        if time.monotonic() - self.began < CHECKS_END_S or not any(
            j.before_checks for j in self.waiting
        ):
            return
        checking = [one for one in self.workers if one.job is not None and not one.job.alone]
        for worker in checking:
            assert worker.job is not None
            self.end_workers(worker)
            self._requeue(worker.job, worker.reported)
        self.waiting = timing_first(self.waiting)

    def _start(self) -> Worker:
        # A forked process could not use CUDA.
        context = multiprocessing.get_context("spawn")
        own_end, worker_end = context.Pipe()
        process = context.Process(target=serve, args=(worker_end, *self.settings), daemon=True)
        process.start()
        worker_end.close()
        worker = Worker(process, own_end)
        self.workers.append(worker)
        return worker

    def _receive(self) -> None:
        """Handle the processes' messages; wait at most a second for one."""
        channels = {worker.channel: worker for worker in self.workers}
        for ready in wait(list(channels), timeout=_TICK_S):
            worker = channels[ready]  # type: ignore[index]
            try:
                while worker in self.workers and worker.channel.poll():
                    self._handle_message(worker, worker.channel.recv())
            except (EOFError, OSError):
                worker.process.join(10)
                ended = f"the process ended with status {worker.process.exitcode}"
                self._fail(worker, worker.broken or ended)

    def _handle_message(self, worker: Worker, message: tuple[Any, ...]) -> None:
        kind, *content = message
        if kind == "hello":
            self.machine_columns, worker.started_at = content[0], time.monotonic()
        elif kind == "broken":
            worker.broken = f"the process could not start: {content[0]}"
        elif kind == "part":
            worker.current_part, worker.started_at = content[0], time.monotonic()
        elif kind == "row" and worker.job is not None:
            part, columns = content
            self._write(worker.job, part, columns)
            worker.reported.add(part)
            worker.current_part, worker.started_at = None, time.monotonic()
        elif kind == "done":
            job, worker.job = worker.job, None
            if not content[0] and job is not None:
                self.end_workers(worker)
                self._requeue(job, worker.reported)

    def _stop_late_parts(self) -> None:
        now = time.monotonic()
        for worker in list(self.workers):
            if worker.job is None:
                continue
            allowed = worker.job.part_limit_s
            if now > self.deadline:
                self._fail(worker, "still running when the time was up")
            elif now - worker.started_at > allowed:
                self._fail(worker, f"still running after {allowed:.0f} s")

    def _fail(self, worker: Worker, why: str) -> None:
        """End a process, write a row for the part it was doing, and requeue the job's other parts.

        If no part was running, all remaining parts have failed.
        """
        job, running = worker.job, worker.current_part
        self.end_workers(worker)
        if job is None:
            return
        failed = (
            [running]
            if running
            else [part for part in job.remaining_parts if part not in worker.reported]
        )
        self._write_all(job, failed, "failed", f"{why} in {running}." if running else why)
        self._requeue(job, worker.reported | set(failed))

    def _requeue(self, job: Job, done: set[str]) -> None:
        rest = replace(job, finished_parts=job.finished_parts | done)
        if rest.remaining_parts:
            self.waiting.appendleft(rest)

    def end_workers(self, *workers: Worker) -> None:
        """End processes: tell the idle ones to stop, all at once; kill those that have a job."""
        until = time.monotonic() + SECONDS_TO_END
        for worker in workers:
            self.workers.remove(worker)
            with suppress(OSError):
                worker.channel.send(None)
        for worker in workers:
            idle = worker.job is None
            worker.process.join(max(0.0, until - time.monotonic()) if idle else 0)
            if worker.process.is_alive():
                # Kill its whole session: a compiler it started would disturb the timing.
                assert worker.process.pid
                with suppress(ProcessLookupError):
                    os.killpg(worker.process.pid, signal.SIGKILL)
                worker.process.kill()
                worker.process.join(5)
            worker.channel.close()

    def _write_all(self, job: Job, parts: Sequence[str], status: str, reason: str) -> None:
        for part in parts:
            self._write(job, part, {"status": status, "reason": reason})

    def _write(self, job: Job, part: str, columns: Mapping[str, Any]) -> None:
        part_columns = {job.part_column: part} if job.part_column else {}
        row = self.writer.write(
            {
                **{
                    **self.machine_columns,
                    **self.shared_columns,
                    "reason": "",
                    **job.about,
                    **part_columns,
                    **columns,
                },
                "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        self.print_line(_line(time.monotonic() - self.began, job, part, row))


def _line(seconds: float, job: Job, part: str, row: Mapping[str, Any]) -> str:
    words = [f"{seconds:6.1f} s  {row['status']:<13} {job.name}"]
    if len(job.parts) > 1:
        words.append(f": {row.get('full_backend') if row['method'] == 'full' else part}")
    if row.get("decode_ms_p50") is not None:
        words.append(f"  {row['decode_ms_p50']:.4f} ms, {row['bandwidth_fraction']:.0%} of memory")
    if row.get("speedup_vs_full") is not None:
        words.append(f", {speedup(row)} times {row['full_backend']}")
    if row.get("timing_note"):
        words.append(f"  unsteady: {row['timing_note']}")
    return "".join([*words, f"  {row['reason']}" if row["reason"] else ""])
