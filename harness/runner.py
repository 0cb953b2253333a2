"""Runs a sweep: loads each model once, fits what must be fitted, and measures all its cells."""

import functools
import gc
import json
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from topkbench.analysis.console import say, say_error
from topkbench.analysis.record.files import NotWritableError
from topkbench.analysis.record.journal import Claims, DisagreementError, counting_deaths
from topkbench.analysis.record.store import (
    Cell,
    PartStore,
    RecordError,
    Row,
    Status,
    Sweep,
    identity,
)
from topkbench.harness.batch_size import recorded
from topkbench.harness.calibration import CapturedStates
from topkbench.harness.cell import (
    artifact_spec,
    checked_context,
    environment,
    peak_memory_mib,
    prepare_method,
    reset_peak_memory,
    run_cell,
)
from topkbench.harness.commit import git_state
from topkbench.harness.decoding import Prompt
from topkbench.harness.device_use import load_warning, using
from topkbench.harness.parts import MeasuredPart
from topkbench.harness.progress import Bar
from topkbench.harness.run import Run, answers_in, describe, describe_settings, now
from topkbench.harness.settings import Composed, Names, construct
from topkbench.harness.sources import ROOT
from topkbench.harness.speed import memory_bandwidth
from topkbench.harness.sweep import (
    PromptCell,
    PromptTask,
    Record,
    is_out_of_memory,
    message_of,
    outcome_of,
    run_by_prompts,
)
from topkbench.harness.task import TIMED, Outcome, TaskRow
from topkbench.kernels.compiled import are_cached
from topkbench.models.digests import model_digest
from topkbench.models.load import LoadedModel
from topkbench.models.prefill_store import PrefillStore

ARTIFACT_PATH = "artifact_path"
"""What a cell's configuration records besides its settings: the file of what its method learned."""


@dataclass(frozen=True)
class Job:
    """One composed configuration of a sweep.

    Attributes:
        composed: The configuration, checked.
        full: The same with full attention; the same object if that is the method.
        choices: The option chosen in each group, such as ``{"method": "hata"}``.
        trial: Number of the trial that it is in a search, which finds its cell by it; else None.
    """

    composed: Composed
    full: Composed
    choices: Mapping[str, str]
    trial: int | None = None


@dataclass(frozen=True)
class Refused:
    """A configuration that cannot be run, as one of its settings is wrong.

    Attributes:
        error: Which one, in a sentence.
        choices: The option chosen in each group.
        settings: The settings, references unresolved.
        trial: Number of the trial that it is in a search; else None.
    """

    error: Exception
    choices: Mapping[str, str]
    settings: Mapping[str, Any]
    trial: int | None = None


@dataclass(frozen=True)
class Share:
    """What one worker of a sweep measures: some batches of prompts, each with all of its cells.

    Attributes:
        batches: The numbers of the batches, for each group of cells that have the same prompts.
        cells: The identities of cells that are measured by themselves.
    """

    batches: Mapping[str, Sequence[int]]
    cells: Sequence[str]

    def split(self, count: int) -> list["Share"]:
        """Return at most so many shares of this one, which together are all of it."""
        shares = [
            Share(
                {name: numbers[i::count] for name, numbers in self.batches.items()},
                self.cells[i::count],
            )
            for i in range(count)
        ]
        return [one for one in shares if one.cells or any(one.batches.values())]


def model_settings(settings: Mapping[str, Any]) -> str:
    """Return a configuration's settings of the model as text; equal ones have the same model."""
    return json.dumps(settings["model"])


def positions_by_model(jobs: Sequence[Job]) -> list[list[int]]:
    """Return the positions of each model's jobs."""
    found: dict[str, list[int]] = {}
    for position, job in enumerate(jobs):
        found.setdefault(model_settings(job.composed.settings), []).append(position)
    return list(found.values())


class Local:
    """Runs sweeps in this process: ``launcher=local``."""

    def check(self) -> None:
        """Check that what it needs is installed: nothing."""

    def run(self, runner: "Runner", jobs: Sequence[Job]) -> list[str | None]:
        """Run a sweep's jobs; return the identity of each one's cell, None if it cannot be run."""
        identities: dict[int, str] = {}
        for positions in runner.by_model(jobs):
            found = runner.run([jobs[one] for one in positions])
            identities |= {positions[at]: identity for at, identity in found.items()}
        return [identities.get(position) for position in range(len(jobs))]


class Runner:
    """Runs the jobs of one sweep in this process, or a share of them for a launcher.

    Args:
        sweep: The sweep.
        tracker: The ``Tracker`` to which its progress is copied; None in a worker, whose cells are
            copied by the process that started it.

    Attributes:
        is_worker: Whether it measures a share of cells that were begun before.
        sharing: Number of processes of the sweep that share the memory of its device.
        ended: The identities of the cells that it has run.
    """

    def __init__(self, sweep: Sweep, tracker: Any) -> None:
        self.sweep = sweep
        self.tracker = tracker
        self.is_worker = False
        self.sharing = 1
        self.parts = PartStore(sweep.results_dir)
        self.ended: set[str] = set()
        self._fitted: set[str] = set()
        self._captured = CapturedStates()
        self._reported: set[str] = set()
        self._parts: dict[tuple[str, str], MeasuredPart] = {}
        self._batch_sizes: dict[Path, int] = {}
        self._model: tuple[str, LoadedModel, PrefillStore] | None = None

    def part(self, name: str, key: str, force: bool) -> MeasuredPart:
        """Return what was measured of a part; the same object for all cells that have it.

        Args:
            name: Name of the part.
            key: Digest of everything that it depends on.
            force: Whether what was measured before this command is deleted.
        """
        if (name, key) not in self._parts:
            self._parts[name, key] = MeasuredPart(self.parts, name, key, force)
        return self._parts[name, key]

    def by_model(self, jobs: Sequence[Job]) -> list[list[int]]:
        """Return the positions of each model's jobs, and say how many jobs there are."""
        on_cpu = any(job.composed.settings["device"] == "cpu" for job in jobs)
        if on_cpu and not are_cached():
            say("CPU kernels are compiled when first used, once on this machine: up to a minute")
        warning = load_warning() if on_cpu else None
        if warning is not None:
            say(warning)
        found = positions_by_model(jobs)
        words = f"{len(jobs)} configuration{'s' if len(jobs) > 1 else ''}"
        models = f" over {len(found)} models" if len(found) > 1 else ""
        say(f"{words}{models}; results in {self.sweep.results_dir}")
        return found

    def run(self, jobs: Sequence[Job]) -> dict[int, str]:
        """Run all jobs of one model.

        Returns:
            The identity of each job's cell, by the job's position; a job that cannot be run has
            none.
        """
        loaded = self._load(jobs)
        if loaded is None:
            return {}
        identities, groups = self._groups(loaded[0], jobs)
        self._run_groups(groups, loaded[1])
        return identities

    def prepare(self, jobs: Sequence[Job]) -> tuple[dict[int, str], Share, str]:
        """Fit what must be fitted of one model's jobs, and begin their cells.

        Returns:
            The identities, as ``run`` does, what is left to measure, and the machine in words.
        """
        self.is_worker = False
        loaded = self._load(jobs)
        if loaded is None:
            return {}, Share({}, ()), ""
        batches: dict[str, Sequence[int]] = {}
        alone: list[str] = []
        identities, groups = self._groups(loaded[0], jobs)
        for name, group in groups.items():
            task = group[0].run.task
            if task.refits:  # a cell that reports a fit
                for cell in group:
                    cell.run_alone(loaded[1])
                continue
            begun = [cell for cell in group if cell.begin_attempt()]
            if begun and isinstance(task, PromptTask):
                for cell in begun:
                    if cell.is_forced:
                        cell.forget()
                batches[name] = range(task.num_batches(loaded[0]))
            elif begun:
                alone.append(name)
        return identities, Share(batches, alone), machine_of(loaded[0])

    def run_share(
        self,
        jobs: Sequence[Job],
        share: Share,
        prepared: tuple[Mapping[int, str], str],
        is_stopped: Callable[[], bool],
    ) -> int:
        """Measure a share of one model's jobs; write the cells of which everything is measured.

        Args:
            jobs: All jobs of the model.
            share: What is measured.
            prepared: The identities and the machine that ``prepare`` returned.
            is_stopped: Asked whether to leave what is left to another time.

        Returns:
            The number of prompts that were prefilled.

        Raises:
            RecordError: If this machine is of another kind than the one that prepared the cells.
        """
        self.is_worker = True
        loaded = self._load(jobs)
        assert loaded is not None, "a worker raises the error"
        _, store = loaded
        before = store.forwards
        identities, groups = self._groups(loaded[0], jobs)
        if identities != prepared[0]:
            raise RecordError(
                "all workers of a sweep must have the same code, libraries, device, driver and"
                f" number of threads, but one has {machine_of(loaded[0])}, and the first"
                f" {prepared[1]}; choose nodes of one kind, and set OMP_NUM_THREADS"
            )
        self._run_groups(groups, store, share, is_stopped)
        return store.forwards - before

    def _load(self, jobs: Sequence[Job]) -> tuple[LoadedModel, PrefillStore] | None:
        """Return the jobs' model and its prefills; None, with rows that say why, if it fails."""
        settings = jobs[0].composed.settings
        try:
            return self.load(settings)
        except Exception as error:  # the sweep goes on with other models
            if self.is_worker:  # its cells have begun, and wait for it
                raise
            for job in jobs:
                self.refuse(error, job.choices, job.composed.settings, job.trial)
            return None

    def load(self, settings: Mapping[str, Any]) -> tuple[LoadedModel, PrefillStore]:
        """Return a model and its prefills; the model before, if it is another one, is dropped."""
        name = model_settings(settings)
        if self._model is None or self._model[0] != name:
            if self._model is not None:  # before the next one takes memory
                self._model = None
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            loaded = construct(
                Names({}), "model", settings["model"], cache_dir=settings["cache_dir"]
            )
            store = PrefillStore(loaded.model, int(settings["prefill_memory_gib"] * 2**30))
            self._model = name, loaded, store
        return self._model[1:]

    def _run_groups(
        self,
        groups: Mapping[str, Sequence["SweepCell"]],
        store: PrefillStore,
        share: Share | None = None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Measure cells, those that share prompts together; only a share of them if it is given."""
        by_prompts, alone = {}, {}
        for name, group in groups.items():
            if isinstance(group[0].run.task, PromptTask):
                if share is None or name in share.batches:
                    by_prompts[name] = group
            elif share is None or name in share.cells:
                alone[name] = group
        with Progress(sum(map(len, by_prompts.values())), self.tracker) as progress:
            for name, group in by_prompts.items():
                numbers = None if share is None else share.batches[name]
                self._run_by_prompts(name, group, store, progress, numbers, is_stopped)
        for group in alone.values():
            for cell in group:
                if not is_stopped():
                    cell.run_alone(store)

    def _groups(
        self, loaded: LoadedModel, jobs: Sequence[Job]
    ) -> tuple[dict[int, str], dict[str, list["SweepCell"]]]:
        """Return the identity of each job's cell, and the cells that have not ended, by group."""
        cells: dict[str, SweepCell] = {}
        identities: dict[int, str] = {}
        for position, job in enumerate(jobs):
            try:
                identities[position] = self._add(cells, job, loaded)
            except NotWritableError:
                raise
            except Exception as error:  # its method cannot be fitted, or its prompts not be made
                if self.is_worker:
                    raise
                self.refuse(error, job.choices, job.composed.settings, job.trial)
        self._captured.clear()  # cells need the memory
        for cell in cells.values():
            cell.has_ended = cell.is_found()
        self._say_what_runs(loaded.name, len(identities), cells)
        groups: dict[str, list[SweepCell]] = {}
        for cell in cells.values():
            if cell.has_ended:
                cell.report_found()
            else:
                groups.setdefault(cell.group, []).append(cell)
        return identities, groups

    def _say_what_runs(self, model: str, num_jobs: int, cells: Mapping[str, "SweepCell"]) -> None:
        """Say how many cells a model has, and how many of them were found."""
        if self.is_worker:
            return
        alike = num_jobs - sum(cell.is_asked_for for cell in cells.values())
        found = sum(cell.has_ended for cell in cells.values())
        words = [f"{model}: {len(cells)} cell{'s' if len(cells) != 1 else ''}", f"{found} found"]
        if alike:
            words.append(f"{alike} left out that differ only in a setting their method lacks")
        say(", ".join(words))

    def _add(self, cells: dict[str, "SweepCell"], job: Job, loaded: LoadedModel) -> str:
        """Add a job's cell, and that of full attention, unless they are among the cells.

        Returns:
            The identity of the job's cell.
        """
        run = self._prepare(job.composed, job.full, loaded)
        full = None
        if run.task.needs_full and job.full is not job.composed:
            full_run = self._prepare(job.full, job.full, loaded)
            full = cells.setdefault(full_run.identity, SweepCell(full_run, self, None))
        cells.setdefault(run.identity, SweepCell(run, self, full)).is_asked_for = True
        if job.trial is not None:
            self.sweep.note_trial(job.trial, run.identity)
        for cell in (cells[run.identity], full):
            if cell is not None:
                self.sweep.append(cell.run.identity)
        return run.identity

    def _prepare(self, composed: Composed, full: Composed, loaded: LoadedModel) -> Run:
        """Return a configuration's run, its method fitted first if there is no artifact."""
        artifact, task, settings = None, composed.task, composed.settings
        began = now()
        if task.uses_model and task.fits_methods:
            refit = False
            if task.refits:
                # Several cells use the same artifact; with force=true a process fits it once.
                spec = artifact_spec(loaded, composed.method, composed.texts)
                name = identity({"artifact": spec})
                refit = settings["force"] and name not in self._fitted and not self.is_worker
                self._fitted.add(name)
            title = f"{composed.method.name} learns on {loaded.name}"
            # A method that learns nothing shows no bar.
            with Bar(title, lambda done, total: f"{title}: {done / total:.0%}") as bar:
                artifact = prepare_method(
                    loaded,
                    composed.method,
                    composed.texts,
                    settings["artifact_dir"],
                    bar.update,
                    composed.calibration_bytes,
                    refit,
                    composed.policy,
                    self._captured,
                )
        if isinstance(task, PromptTask) and task.batch_size == "auto":
            path = self.batch_size_file(task, loaded, settings)
            if path not in self._batch_sizes:
                self._batch_sizes[path] = recorded(path, lambda: self._memory(task, loaded))
            task.batch_size = self._batch_sizes[path]
        # A cell that reports a fit begins with the fit.
        return Run(composed, full.method, loaded, artifact, began if task.refits else None)

    def _memory(self, task: PromptTask, loaded: LoadedModel) -> tuple[int, int]:
        """Return the bytes of a prompt's states, and those that are free for this process."""
        self._captured.clear()  # what fits have read takes memory that cells will have
        bytes_per_prompt, free = task.memory(loaded)
        return bytes_per_prompt, free // self.sharing

    def batch_size_file(
        self, task: PromptTask, loaded: LoadedModel, settings: Mapping[str, Any]
    ) -> Path:
        """Return the file that records how many prompts of a task decode together."""
        inputs = {
            "model": model_digest(loaded),
            "device": loaded.model.device.type,
            "inputs": task.inputs_digest(loaded),
            "question": settings["task"].get("question"),
        }
        return self.sweep.results_dir / "batch_sizes" / f"{identity(inputs)}.json"

    def _run_by_prompts(
        self,
        group: str,
        cells: Sequence["SweepCell"],
        store: PrefillStore,
        progress: "Progress",
        numbers: Sequence[int] | None,
        is_stopped: Callable[[], bool],
    ) -> None:
        """Measure the cells of one group batch by batch; each is written when its last is in.

        Args:
            group: The group's identity.
            cells: Its cells.
            store: The model's prefills.
            progress: Says how far the sweep is.
            numbers: The batches to measure; None for all.
            is_stopped: Whether to leave the batches that are not begun.
        """
        # Full attention first, as others are judged on its answers.
        ordered = sorted(cells, key=lambda one: one.run.method.selects)
        claims = Claims(self.sweep.results_dir / "claims" / group, say)
        # All cells of a group have the same prompts.
        prompts = functools.cache(lambda: prompts_of(ordered[0].run))
        started = [cell for cell in ordered if cell.begin(store, prompts)]
        progress.begin(started, len(ordered) - len(started))

        def after() -> None:
            progress.update()
            for cell in ordered:
                cell.write_if_complete()

        after()
        if started and not self.is_worker:
            one = started[0].measured
            say(
                f"{len(one.prompts)} prompt{'s' if len(one.prompts) > 1 else ''} in"
                f" {len(one.batches)} batch{'es' if len(one.batches) > 1 else ''}, decoded with"
                f" {len(started)} cell{'s' if len(started) > 1 else ''}"
            )
        run_by_prompts(
            [cell.measured for cell in started],
            store,
            claims.claim,
            claims.prefilling,
            after,
            numbers,
            is_stopped,
            progress.end_batch,
        )
        for cell in started:  # other workers may have measured the last of what is missing here
            cell.measured.read_others()
        after()

    def track(self, cell: Cell) -> None:
        """Copy a cell to the tracker, unless that was done; a killed process may not have."""
        if self.tracker is None or cell.tracked:
            return
        rows, samples, sweep, config = cell.read(), cell.samples(), self.sweep, cell.config()
        artifact = Path(config[ARTIFACT_PATH]) if ARTIFACT_PATH in config else None
        if self.tracker.log_cell(
            sweep.folder, sweep.title, rows, samples, config, cell.attempt, artifact
        ):
            cell.mark_tracked()

    def report(self, rows: Sequence[Row], ended: str) -> None:
        """Print that a cell has ended, and why if it has failed; a worker leaves it to others.

        Args:
            rows: The cell's rows.
            ended: The cell in one line.
        """
        if self.is_worker:
            return
        say(ended)
        for row in rows:
            if not row.status.settled:
                self.say_reason(row.reason)

    def score_of(self, identity: str | None) -> float:
        """Return a cell's score; NaN, which a sweeper takes for a failed trial, if it has none."""
        rows = [] if identity is None else self.sweep.store.cell(identity).read()
        scores = [row.score for row in rows if row.subtask == "mean" and row.score is not None]
        return scores[0] if scores else math.nan

    def say_once(self, error: Exception) -> str:
        """Print an error's message unless it was printed before; return it in one line."""
        reason = message_of(error)
        self.say_reason(reason)
        return reason

    def say_reason(self, reason: str) -> None:
        """Print why something failed unless it was printed before."""
        if reason not in self._reported:
            self._reported.add(reason)
            say_error(reason)

    def refuse(
        self,
        error: Exception,
        choices: Mapping[str, str],
        settings: Mapping[str, Any],
        trial: int | None = None,
    ) -> None:
        """Print once why a configuration cannot be run, and write a row with the same reason."""
        reason = self.say_once(error)
        method = settings.get("method")
        known = ["k", "rbit"] if isinstance(method, dict) and "rbit" in method else ["k"]
        whole: dict[str, Any] = {
            name: settings[name] for name in known if type(settings.get(name)) is int
        }
        chosen: dict[str, Any] = {**choices}
        # Axes of the sweep that the reason does not name make no rows of their own.
        run_id = identity({"refused": reason, "k": whole.get("k"), **chosen})
        if trial is not None:
            self.sweep.note_trial(trial, run_id)
        if run_id in self.sweep.identities():
            return
        row = Row(
            run_id=run_id,
            status=Status.OUT_OF_MEMORY if is_out_of_memory(error) else Status.FAILED,
            reason=reason,
            **chosen,
            subtask="mean",
            **whole,
            started_at=now(),
            **git_state(ROOT),
        )
        cell = self.sweep.store.cell(run_id)
        with cell.lock():
            cell.begin(row)
            cell.write([row], [], {}, "".join(traceback.format_exception(error)))
        self.sweep.append(run_id)


def machine_of(loaded: LoadedModel) -> str:
    """Return in words what the times of a cell depend on."""
    found = environment(loaded)
    driver = f", driver {found['driver']}" if found["driver"] else ""
    return f"{found['device']}, {found['threads']} threads{driver}, torch {found['torch']}"


def prompts_of(run: Run) -> list[Prompt]:
    """Return the prompts of a cell whose task is measured prompt by prompt."""
    assert isinstance(run.task, PromptTask)
    return run.task.tokenised(run.loaded)


@dataclass(eq=False)
class SweepCell:
    """A cell of a sweep: measured by itself or prompt by prompt, and written when it has ended.

    Attributes:
        run: The cell.
        runner: The sweep's.
        full: Full attention's cell, with which it is compared; None if it is not compared.
        measured: What was measured so far of a cell that is measured prompt by prompt.
        title: The cell's model, task and settings in one line, once it has begun.
        has_ended: Whether the cell was found, or was written by this process.
        is_asked_for: Whether a configuration of the sweep is this cell; else it is full
            attention's, with which others are compared.
    """

    run: Run
    runner: Runner
    full: "SweepCell | None"
    measured: "JournaledCell" = field(init=False)
    title: str = field(init=False)
    has_ended: bool = False
    is_asked_for: bool = False

    @property
    def cell(self) -> Cell:
        """The cell's folder."""
        return self.runner.sweep.store.cell(self.run.identity)

    @property
    def group(self) -> str:
        """The identity of the cells that share prompts and batches with this one."""
        task, payload = self.run.task, self.run.payload
        if not isinstance(task, PromptTask):
            return self.run.identity
        inputs = {name: payload["task"].get(name) for name in ("inputs", "question", "batch_size")}
        return identity({"task": task.name, "model": payload["model"], **inputs})

    def is_ended(self) -> bool:
        """Return whether the cell has ended, in this process or in another worker of its sweep."""
        if self.runner.is_worker and not self.has_ended:
            self.has_ended = self.cell.has_ended()
        return self.has_ended

    @property
    def is_forced(self) -> bool:
        """Whether what was measured before this command is measured again."""
        is_first = self.run.identity not in self.runner.ended and not self.runner.is_worker
        return self.run.settings["force"] and is_first

    def is_found(self) -> bool:
        """Return whether the cell has ended before and need not run again.

        In a worker also if it has failed: its sweep began it, and another worker has met the error.
        """
        if self.runner.is_worker:
            return self.cell.has_ended()
        return not self.is_forced and self.cell.finished()

    def begin_attempt(self) -> bool:
        """Write that the cell has begun, unless another process has ended it; return whether.

        A worker writes nothing: the cells of its share were begun before.
        """
        with self.cell.lock():
            self.has_ended = self.is_found()
            if not self.has_ended:
                row = self.run.row()
                self.title = describe_settings(row)
                if not self.runner.is_worker:
                    self.cell.begin(row)
        if self.has_ended:
            self.report_found()
        return not self.has_ended

    def report_found(self) -> None:
        """Track a cell that was found, unless it was tracked before."""
        if self.run.task.refits:
            say(f"{describe(self.cell.read())}: found, and not fitted again")
        self.runner.track(self.cell)

    def run_alone(self, store: PrefillStore) -> None:
        """Run the whole cell."""
        if not self.begin_attempt():
            return
        began = time.perf_counter()
        log = ""
        device = self.run.loaded.model.device
        try:
            reset_peak_memory(device)
            with (
                counting_deaths(self.cell.folder / "measuring.json"),
                using(device, alone=TIMED in self.run.task.parts),
            ):
                outcome = run_cell(self.run.context(store, self._full_answers()), self.run.task)
        except NotWritableError:
            raise
        except Exception as error:  # the row says why the cell failed, and the sweep goes on
            log, outcome = traceback.format_exc(), ended_by(error)
        peak = peak_memory_mib(device)
        self._write(outcome, log, time.perf_counter() - began, (), peak)

    def begin(self, store: PrefillStore, prompts: Callable[[], list[Prompt]]) -> bool:
        """Begin to measure a cell prompt by prompt; return whether there is anything to measure.

        Args:
            store: The model's prefills.
            prompts: Returns the cell's prompts.
        """
        if not self.begin_attempt():
            return False
        context = self.run.context(store, self._full_answers())
        task = self.run.task
        assert isinstance(task, PromptTask)
        try:
            ready = checked_context(context, task)
            if isinstance(ready, Outcome):
                self._write(ready)
                return False
            self.measured = JournaledCell.of(ready, task, prompts())
            self.measured.open(self.run, self.runner)
        except NotWritableError:
            raise
        except Exception as error:
            self._write(ended_by(error), traceback.format_exc())
            return False
        return True

    def forget(self) -> None:
        """Delete what was measured of the cell before this command."""
        for part, key in self.run.keys.items():
            self.runner.part(part, key, force=True)

    def so_far(self) -> dict[str, Any]:
        """Return the cell's name, its samples done, and the mean of their scores."""
        measured = self.measured
        samples = [
            sample
            for records in measured.records.get("answers", {}).values()
            for record in records
            for sample in record["samples"]
        ]
        # A choice has no score of its own: its document has one, when all choices are measured.
        scores = [sample["score"] for sample in samples if "score" in sample]
        return {
            "cell": self.title,
            "samples": len(samples),
            "score": sum(scores) / len(scores) if scores else None,
            "ended": self.has_ended,
        }

    def write_if_complete(self) -> None:
        """Write the cell once its last batch is in, and full attention's cell has ended."""
        if self.is_ended() or not self.measured.is_complete():
            return
        has_failed = self.runner.is_worker and self.measured.ended is not None
        if self.full is not None and not self.full.is_ended() and not has_failed:
            return
        measured = self.measured
        measured.close()
        try:
            outcome, log = measured.result(), measured.log
        except Exception as error:
            outcome, log = failed(error), traceback.format_exc()
        reused = measured.reused
        peak = None if reused else measured.peak_mib
        self._write(outcome, log, measured.seconds, reused, peak)

    @functools.cached_property
    def found_answers(self) -> dict[str, list[int]]:
        """The answers in the cell's folder when it is first asked; empty if it had not ended."""
        return answers_in(self.cell.samples())

    def _full_answers(self) -> dict[str, list[int]]:
        """Return full attention's answers, if its cell was found."""
        return {} if self.full is None else self.full.found_answers

    def _write(
        self,
        outcome: Outcome,
        log: str = "",
        seconds: float = 0.0,
        found: Sequence[str] = (),
        peak_mib: float | None = None,
    ) -> None:
        rows = self.run.rows(outcome, self.full.cell if self.full else None, found, peak_mib)
        seconds += sum(row.fit_s or 0.0 for row in rows if row.subtask == "mean")
        ended = f"{describe(rows)}, {seconds:.1f} s"
        with self.cell.lock():
            if self.runner.is_worker and self.cell.has_ended():  # another one was faster
                self.has_ended = True
                return
            log = f"{log}\n{ended}".strip()
            artifact = self.run.artifact
            config = {} if artifact is None else {ARTIFACT_PATH: str(artifact.path.absolute())}
            config |= self.run.settings
            self.cell.write(rows, outcome.samples, config, log, outcome.kept)
        self.has_ended = True
        self.runner.ended.add(self.run.identity)
        self.runner.report(rows, ended)
        self.runner.track(self.cell)


@dataclass
class JournaledCell(PromptCell):
    """A cell whose records are on disk as soon as they are measured.

    Attributes:
        measured_parts: Each part, on disk.
        peak_mib: Peak memory while the cell was measured, in MiB.
        log: The traceback of the error that ended it.
    """

    measured_parts: dict[str, MeasuredPart] = field(default_factory=dict)
    peak_mib: float = 0.0
    log: str = ""
    _own: set[tuple[str, int]] = field(default_factory=set)

    def open(self, run: Run, runner: Runner) -> None:
        """Read what was measured before; with ``force=true`` it is deleted."""
        force = run.settings["force"] and not runner.is_worker
        for part in self.plan.parts:
            one = runner.part(part, run.keys[part], force)
            self.measured_parts[part], self.records[part] = one, one.records
        self.refresh()

    def note(self, text: str) -> None:
        say(text)

    def refresh(self) -> None:
        for part in self.measured_parts.values():
            part.refresh()

    @property
    def reused(self) -> list[str]:
        """The parts that were not measured by this cell in this process, or only in part."""
        return [
            part
            for part, numbers in self.planned.items()
            if any((part, number) not in self._own for number in numbers)
        ]

    def _is_whole(self, part: str) -> bool:
        return self.planned[part] <= self.records[part].keys()

    def is_complete(self) -> bool:
        """Return whether the cell has ended, or all of its parts are measured."""
        return self.ended is not None or all(map(self._is_whole, self.plan.parts))

    def close(self) -> None:
        """Write each whole part as one file, and delete its journal."""
        for name, part in self.measured_parts.items():
            if self._is_whole(name):
                part.close()

    def measure(self, part: str, number: int, share: Sequence[Prompt]) -> None:
        device = self.context.loaded.model.device
        if part == TIMED:  # before the reset: it takes memory that the method does not need
            self.context.bandwidth = memory_bandwidth(device)
        reset_peak_memory(device)
        try:
            with self.measured_parts[part].journal.measuring(number):
                super().measure(part, number, share)
        except MemoryError as error:
            self.ended = outcome_of(error)
        self.peak_mib = max(self.peak_mib, peak_memory_mib(device))

    def keep(self, part: str, number: int, records: list[Record]) -> None:
        self.measured_parts[part].keep(number, records)
        self._own.add((part, number))

    def outcome_of(self, error: Exception, place: str) -> Outcome:
        if isinstance(error, NotWritableError):
            raise error
        self.log = traceback.format_exc()
        return ended_by(error, place)


def ended_by(error: Exception, place: str = "") -> Outcome:
    """Return the row of a cell that an error ended."""
    if isinstance(error, DisagreementError):
        return Outcome([TaskRow("mean", status="wrong", reason=message_of(error))], [])
    try:
        return outcome_of(error)
    except Exception as other:
        return failed(other, place)


def failed(error: Exception, place: str = "") -> Outcome:
    """Return the row of a cell that an unexpected error ended.

    Args:
        error: The error.
        place: What was measured when it was raised.
    """
    reason = message_of(error)
    reason += f" ({place})" if place else ""
    return Outcome([TaskRow("mean", status="failed", reason=reason)], [])


class Progress:
    """Says how far a model's cells are, on the console and to the tracker.

    Args:
        num_cells: Cells that are measured prompt by prompt.
        tracker: The ``Tracker`` to which the progress is copied; None in a worker.
    """

    def __init__(self, num_cells: int, tracker: Any) -> None:
        self._num_cells = num_cells
        self._tracker = tracker
        self._cells: list[SweepCell] = []
        self._bar = Bar(
            "samples",
            lambda done, total: f"{done:,} of {total:,} samples",
            self._copy,
            lines=tracker is None,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)
        self._copy()

    def begin(self, cells: Sequence[SweepCell], num_ended: int) -> None:
        """Add cells that are measured from now on, and leave out those that have ended already."""
        self._num_cells -= num_ended
        self._cells += cells
        self._bar.find(sum(map(_samples_done, cells)))
        self._copy()

    def update(self) -> None:
        """Show what is done now, of all cells if those to come have as many samples."""
        self._bar.update(self._done(), self._total(), is_step=False)

    def end_batch(self) -> None:
        """Note that a batch is done with all cells, which is what the time left follows from."""
        self._bar.update(self._done(), self._total())

    def _done(self) -> int:
        return sum(map(_samples_done, self._cells))

    def _total(self) -> int:
        sizes = [len(cell.measured.prompts) for cell in self._cells]
        return round(sum(sizes) / max(1, len(sizes)) * self._num_cells)

    def _copy(self) -> None:
        """Copy what is done now to the tracker."""
        if self._cells and self._tracker is not None:
            so_far = [cell.so_far() for cell in self._cells]
            self._tracker.log_progress(self._done(), self._total(), so_far)


def _samples_done(cell: SweepCell) -> int:
    """Return how many samples a cell has measured."""
    measured = cell.measured
    return sum(
        len(batch) for number, batch in enumerate(measured.batches) if not measured.missing(number)
    )
