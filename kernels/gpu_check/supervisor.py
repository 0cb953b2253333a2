"""Runs a plan: hands jobs to processes, keeps the clock, and writes what they report.

A kernel may end its process, or the device's context in it, or never return. Then the part that was
running gets a row with the reason, a new process is started, and the job's other parts go on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from topkbench.kernels.gpu_check.plan import SECONDS_TO_START, Job, Plan
from topkbench.kernels.gpu_check.rows import Writer, speedup
from topkbench.kernels.gpu_check.worker import serve

_TICK_S = 1.0


@dataclass
class Worker:
    """A process and what it is doing."""

    process: BaseProcess
    channel: Connection
    known: dict[str, Any] = field(default_factory=dict)
    job: Job | None = None
    began: float = 0.0
    at: str | None = None
    reported: set[str] = field(default_factory=set)


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
        finally:
            for worker in list(self.workers):
                self._end(worker)

    def _hand_out(self) -> None:
        """Give each idle process the next job that may run now and for which there is time."""
        while self.waiting:
            job = self.waiting[0]
            busy = [worker for worker in self.workers if worker.job is not None]
            if job.alone:
                if busy:
                    return
                for worker in self.workers[1:]:
                    self._end(worker)  # also gives back its share of the device's memory
            elif len(busy) >= self.plan.workers or any(one.job and one.job.alone for one in busy):
                return
            self.waiting.popleft()
            left = self.deadline - time.monotonic()
            idle = next((worker for worker in self.workers if worker.job is None), None)
            needed = job.estimate_s + (0 if idle is not None else SECONDS_TO_START)
            if needed > left:
                reason = f"dropped: {needed:.0f} s needed, {max(left, 0):.0f} s left."
                self._write(job, None, {"status": "skipped", "reason": reason})
                continue
            worker = idle or self._start()
            worker.job, worker.began, worker.at = job, time.monotonic(), None
            worker.reported = set()
            with suppress(OSError):  # if it has just ended, that is seen when it is listened to
                worker.channel.send((job, self.writer.rows))

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
                self._died(worker, f"the process ended with status {worker.process.exitcode}")

    def _take(self, worker: Worker, message: tuple[Any, ...]) -> None:
        kind, *content = message
        if kind == "hello":
            worker.known = self.known = content[0]
        elif kind == "at":
            worker.at = content[0]
        elif kind == "row" and worker.job is not None:
            part, columns = content
            self._write(worker.job, part, columns)
            worker.reported.add(part)
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
            allowed = worker.job.limit_s
            if now > self.deadline:
                self._died(worker, "still running when the time was up")
            elif now - worker.began > allowed:
                self._died(worker, f"still running after {allowed:.0f} s")

    def _died(self, worker: Worker, why: str) -> None:
        """Write a row for what was running in a process, end it, and take the rest up again."""
        job, at = worker.job, worker.at
        self._end(worker)
        if job is None:
            return
        where = f" in {at}" if at else ""
        self._write(job, at, {"status": "failed", "reason": f"{why}{where}."})
        self._again(job, worker.reported | ({at} if at else set(job.parts)))

    def _again(self, job: Job, done: set[str]) -> None:
        rest = replace(job, left_out=job.left_out | done)
        if rest.left and rest.left_out != job.left_out:
            self.waiting.appendleft(rest)

    def _end(self, worker: Worker) -> None:
        self.workers.remove(worker)
        with suppress(OSError):
            worker.channel.send(None)
        worker.process.join(0 if worker.job is not None else 5)
        if worker.process.is_alive():
            # Its whole session: a compiler that it started would run on beside what is timed.
            assert worker.process.pid
            with suppress(ProcessLookupError):
                os.killpg(worker.process.pid, signal.SIGKILL)
            worker.process.kill()
            worker.process.join(5)
        worker.channel.close()

    def _write(self, job: Job, part: str | None, columns: Mapping[str, Any]) -> None:
        named = {job.part_column: part} if job.part_column and part else {}
        if "method" not in job.about and "method" not in named:
            named["method"] = "all operators"
        row = self.writer.write(
            {
                **{**self.known, **self.always, "reason": "", **job.about, **named, **columns},
                "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        self.say(_line(time.monotonic() - self.began, job, part, row))


def _line(seconds: float, job: Job, part: str | None, row: Mapping[str, Any]) -> str:
    words = [f"{seconds:6.1f} s  {row['status']:<13} {job.name}"]
    if part and len(job.parts) > 1:
        words.append(f": {row.get('full_backend') if row['method'] == 'full' else part}")
    if row.get("decode_ms_p50") is not None:
        words.append(f"  {row['decode_ms_p50']:.4f} ms, {row['bandwidth_fraction']:.0%} of memory")
    if row.get("speedup_vs_full") is not None:
        words.append(f", {speedup(row)} times {row['full_backend']}")
    if row.get("timing_note"):
        words.append(f"  unsteady: {row['timing_note']}")
    return "".join([*words, f"  {row['reason']}" if row["reason"] else ""])
