"""Runs a plan: hands jobs to processes, keeps the clock, and writes what they report.

A kernel may end its process, or the device's context in it, or never return. Then the part that was
running gets a row with the reason, a new process is started, and the job's other parts go on. What
is timed does not wait for checks that take too long: they are stopped and taken up again after it.
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

from topkbench.kernels.gpu_check.plan import (
    CHECKS_END_S,
    SECONDS_TO_END,
    SECONDS_TO_START,
    Job,
    Plan,
    holds_up_timing,
    timing_first,
)
from topkbench.kernels.gpu_check.rows import Writer, speedup
from topkbench.kernels.gpu_check.worker import serve

_TICK_S = 1.0


@dataclass
class Worker:
    """A process and what it is doing."""

    process: BaseProcess
    channel: Connection
    job: Job | None = None
    at: str | None = None
    since: float = 0.0
    """When the part began that it is at, or the job, or the process."""
    reported: set[str] = field(default_factory=set)
    broken: str | None = None
    """Why it could not start."""


class Supervisor:
    """Runs a plan until its end or until the time is up.

    Args:
        plan: What to do.
        writer: Where the rows go.
        limit_s: Seconds from now after which nothing runs any more.
        device: Where the jobs run.
        toy: In Triton's interpreter, untimed.
        trials: How often each thing is timed.
        always: Columns of every row beside those that a worker knows.
        say: Prints a line.
    """

    def __init__(
        self,
        plan: Plan,
        writer: Writer,
        limit_s: float,
        device: str,
        toy: bool,
        trials: int,
        always: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self.plan, self.writer, self.always, self.say = plan, writer, always, say
        self.settings = (device, toy, trials)
        self.began = time.monotonic()
        self.deadline = self.began + limit_s
        self.waiting = deque(plan.jobs)
        self.workers: list[Worker] = []
        self.known: dict[str, Any] = {}

    def run(self) -> None:
        """Run the plan."""
        try:
            while self.waiting or any(worker.job for worker in self.workers):
                self._hand_out()
                self._listen()
                self._stop_what_is_late()
                self._begin_timing()
        finally:
            self._end(*self.workers)

    def _hand_out(self) -> None:
        """Give each idle process the next job that may run now and for which there is time."""
        while self.waiting:
            job = self.waiting[0]
            busy = [worker for worker in self.workers if worker.job is not None]
            if job.alone:
                if busy:
                    return
                self._end(*self.workers[1:])  # also gives back their shares of the memory
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
            worker.job, worker.since, worker.at = job, now, None
            worker.reported = set()
            with suppress(OSError):  # if it has just ended, that is seen when it is listened to
                worker.channel.send((job, self.writer.rows))

    def _drop(self, job: Job, reason: str) -> None:
        """Write that a job is not done, nor what needs it, unless a part of it was done."""
        needing = [] if job.left_out else [one for one in self.waiting if one.needs == job.name]
        for one in (job, *needing):
            self._write_all(one, one.left, "skipped", reason)
        self.waiting = deque(one for one in self.waiting if one not in needing)

    def _begin_timing(self) -> None:
        """Stop the checks when it is time for what is timed; they go on after that."""
        if time.monotonic() - self.began < CHECKS_END_S or not any(j.alone for j in self.waiting):
            return
        checking = [one for one in self.workers if one.job is not None and not one.job.alone]
        for worker in checking:
            assert worker.job is not None
            self._end(worker)
            self._again(worker.job, worker.reported)
        self.waiting = timing_first(self.waiting)

    def _start(self) -> Worker:
        # Spawned: a process that was forked cannot use CUDA.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, *self.settings), daemon=True)
        process.start()
        theirs.close()
        worker = Worker(process, ours)
        self.workers.append(worker)
        return worker

    def _listen(self) -> None:
        """Take what the processes report, for a second at most."""
        channels = {worker.channel: worker for worker in self.workers}
        for ready in wait(list(channels), timeout=_TICK_S):
            worker = channels[ready]  # type: ignore[index]
            try:
                while worker in self.workers and worker.channel.poll():
                    self._take(worker, worker.channel.recv())
            except (EOFError, OSError):
                worker.process.join(10)
                ended = f"the process ended with status {worker.process.exitcode}"
                self._died(worker, worker.broken or ended)

    def _take(self, worker: Worker, message: tuple[Any, ...]) -> None:
        kind, *content = message
        if kind == "hello":
            self.known, worker.since = content[0], time.monotonic()
        elif kind == "broken":
            worker.broken = f"the process could not start: {content[0]}"
        elif kind == "at":
            worker.at, worker.since = content[0], time.monotonic()
        elif kind == "row" and worker.job is not None:
            part, columns = content
            self._write(worker.job, part, columns)
            worker.reported.add(part)
            worker.at, worker.since = None, time.monotonic()
        elif kind == "done":
            job, worker.job = worker.job, None
            if not content[0] and job is not None:
                self._end(worker)
                self._again(job, worker.reported)

    def _stop_what_is_late(self) -> None:
        now = time.monotonic()
        for worker in list(self.workers):
            if worker.job is None:
                continue
            allowed = worker.job.part_limit_s
            if now > self.deadline:
                self._died(worker, "still running when the time was up")
            elif now - worker.since > allowed:
                self._died(worker, f"still running after {allowed:.0f} s")

    def _died(self, worker: Worker, why: str) -> None:
        """Write a row for what was running in a process, end it, and take the rest up again.

        Where no part was running, all that are left have failed.
        """
        job, at = worker.job, worker.at
        self._end(worker)
        if job is None:
            return
        ended = [at] if at else [part for part in job.left if part not in worker.reported]
        self._write_all(job, ended, "failed", f"{why} in {at}." if at else why)
        self._again(job, worker.reported | set(ended))

    def _again(self, job: Job, done: set[str]) -> None:
        rest = replace(job, left_out=job.left_out | done)
        if rest.left:
            self.waiting.appendleft(rest)

    def _end(self, *workers: Worker) -> None:
        """End processes: the idle ones in peace, all at once, and those that do a job now."""
        until = time.monotonic() + SECONDS_TO_END
        for worker in workers:
            self.workers.remove(worker)
            with suppress(OSError):
                worker.channel.send(None)
        for worker in workers:
            idle = worker.job is None
            worker.process.join(max(0.0, until - time.monotonic()) if idle else 0)
            if worker.process.is_alive():
                # Its whole session: a compiler that it started would run on beside what is timed.
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
        named = {job.part_column: part} if job.part_column else {}
        row = self.writer.write(
            {
                **{**self.known, **self.always, "reason": "", **job.about, **named, **columns},
                "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        self.say(_line(time.monotonic() - self.began, job, part, row))


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
