"""What a sweep would cost, known beforehand: ``topkbench plan`` and the rest of the command.

On the device of the run a few steps of each cell are measured and extended to all of them
(`topkbench.harness.pilot`). For a named card the time follows from its published figures, and only
the model's configuration and tokenizer are read. Nothing is written into the folder of results.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from tabulate import tabulate

from topkbench.analysis.record.store import Sweep
from topkbench.harness import artifact
from topkbench.harness.batch_size import found_in, most_prompts
from topkbench.harness.card import Card
from topkbench.harness.cell import (
    artifact_spec,
    checked_context,
    layers_to_fit,
    unsupported_reason,
)
from topkbench.harness.decoding import Prompt, spread_over_subtasks
from topkbench.harness.pilot import (
    SIMILAR,
    Cost,
    PrefillTimes,
    Trial,
    alone,
    at_length,
    copies,
    fit,
    timed,
    total,
    try_part,
)
from topkbench.harness.run import Run, describe_settings
from topkbench.harness.runner import (
    Job,
    JournaledCell,
    Runner,
    SweepCell,
    positions_by_model,
)
from topkbench.harness.settings import Composed, Names, SettingsError, construct
from topkbench.harness.sweep import PromptTask, message_of
from topkbench.harness.task import Context, Outcome
from topkbench.harness.work import PartOfBatch, PlannedCell, Work, prefilled
from topkbench.kernels.timing import machine_name
from topkbench.methods.base import cache_bytes
from topkbench.methods.learning import LearningMethod
from topkbench.models.attach import geometry_of
from topkbench.models.load import LoadedModel, free_bytes, load_model, load_without_weights
from topkbench.models.prefill_store import PrefillStore

ANSWERED_SHARE = 0.1
"""Share of the prompts that full attention answers at most, to see how long answers are."""
MOST_WORKERS = 64
# Measured on the three sweeps of docs/plan.md: a report with its figures takes this share of what
# starting Python and importing the libraries take, and the rows of each cell a little more.
REPORT_PER_START = 0.6
ROWS_PER_START = 0.05
# A sweep's samples repeat what its journals hold.
FILES_PER_RECORD = 2.0


@dataclass
class GroupPlan:
    """What cells that share prompts, or one that is measured by itself, would cost.

    Attributes:
        title: The task in words.
        facts: What is printed of it, by name.
        units: What can be handed to a worker, such as a batch: by part what it takes.
        longest: The same if every answer takes all its tokens.
        once: What is done once in each process, such as loading compiled kernels.
    """

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    units: list[dict[str, Cost]] = field(default_factory=list)
    longest: list[dict[str, Cost]] = field(default_factory=list)
    once: Cost = field(default_factory=Cost)

    def text(self) -> str:
        """Return the facts."""
        rows = [[f"  {name}", value] for name, value in self.facts.items()]
        return f"{self.title}\n{tabulate(rows, tablefmt='plain', disable_numparse=True)}".rstrip()


class Planner:
    """Says what the jobs of a sweep would cost.

    Args:
        sweep: The sweep, of which nothing is written.
        jobs: The composed configurations that can run.
        refused: Why others cannot.
    """

    def __init__(self, sweep: Sweep, jobs: Sequence[Job], refused: Sequence[str]) -> None:
        # What every process of the command has done before it comes to its cells.
        self.start = Cost(time.process_time(), time.time() - psutil.Process().create_time())
        self.jobs, self.refused = jobs, refused
        self.runner = Runner(sweep, None)
        card = jobs[0].composed.card
        self.card = card if isinstance(card, Card) else None
        self.notes: list[str] = []
        self.fits: dict[str, Cost | None] = {}

    def plan(self) -> str:
        """Return the plan as text."""
        began = time.perf_counter()
        texts, groups, fixed = [], list[GroupPlan](), self.start
        num_cells, device = 0, torch.device("cpu")
        for positions in positions_by_model(self.jobs):
            jobs = [self.jobs[one] for one in positions]
            try:
                loading, loaded = timed(device, self._load, jobs)
            except Exception as error:  # the sweep makes failed rows of them
                self._note_failures([message_of(error)] * len(jobs))
                continue
            device = loaded.model.device
            preparing, cells = timed(device, self._cells, jobs, loaded)
            fixed += loading + preparing
            self._measure_fits(cells)
            of_model = self._groups(cells, PrefillStore(loaded.model))
            num_cells += len(cells)
            groups += of_model
            texts += [self._cells_text(loaded, cells), *(group.text() for group in of_model)]
        report = (REPORT_PER_START + ROWS_PER_START * num_cells) * self.start
        self._note_failures(self.refused)
        words = f"Plan of {len(self.jobs)} configuration{'s' if len(self.jobs) > 1 else ''}"
        if self.card is None:
            seconds = time.perf_counter() - began
            words += f" on {machine_name(device)}, from a few steps that took {seconds:.0f} s."
        else:
            words += f" on {self.card.name}: what it takes at least, by its published figures."
        texts = [f"{words} Nothing was run or written.", *texts]
        if self.card is None or any(group.units for group in groups):
            texts += self._costs_texts(groups, fixed, report)
        return "\n\n".join([*texts, "\n".join(f"- {note}" for note in self.notes)]).rstrip()

    def _note_failures(self, reasons: Sequence[str]) -> None:
        """Note configurations of which the sweep makes failed rows."""
        for reason in dict.fromkeys(reasons):
            count = list(reasons).count(reason)
            words = "a configuration" if count == 1 else f"{count} configurations"
            self.notes.append(f"{words} will fail: {reason}")

    # The cells -----------------------------------------------------------------------------------

    def _load(self, jobs: Sequence[Job]) -> LoadedModel:
        settings = jobs[0].composed.settings
        if self.card is None:
            return self.runner.load(settings)[0]
        loader = settings["model"]["_target_"]
        if loader != f"{load_model.__module__}.{load_model.__name__}":
            raise SettingsError(
                f"a plan for a card needs a model that topkbench loads, got model._target_={loader}"
                "; leave card out."
            )
        target = f"{load_without_weights.__module__}.{load_without_weights.__name__}"
        loaded: LoadedModel = construct(
            Names({}), "model", {**settings["model"], "_target_": target}
        )
        return loaded

    def _cells(self, jobs: Sequence[Job], loaded: LoadedModel) -> list[PlannedCell]:
        """Return the cells of some jobs, those of full attention among them."""
        cells: dict[str, PlannedCell] = {}
        failures = []
        for job in jobs:
            try:
                full = None
                if job.composed.task.needs_full and job.full is not job.composed:
                    full = self._cell(cells, job.full, job.full, loaded, None)
                self._cell(cells, job.composed, job.full, loaded, full)
            except Exception as error:
                failures.append(message_of(error))
        self._note_failures(failures)
        return list(cells.values())

    def _cell(
        self,
        cells: dict[str, PlannedCell],
        composed: Composed,
        full: Composed,
        loaded: LoadedModel,
        compared: PlannedCell | None,
    ) -> PlannedCell:
        """Return a configuration's cell, by identity among the cells from now on."""
        task, settings = composed.task, composed.settings
        if isinstance(task, PromptTask) and task.batch_size == "auto":
            task.batch_size = self._batch_size(task, loaded, settings)
        learned, missing = self._artifact(composed, loaded)
        run = Run(composed, full.method, loaded, learned)
        if run.identity not in cells:
            found = None
            if self.card is None:
                found = missing is None and SweepCell(run, self.runner, None).is_found()
            title = describe_settings(run.row()).removeprefix(f"{loaded.name} ")
            cells[run.identity] = PlannedCell(run, compared, title, found, artifact=missing)
        return cells[run.identity]

    def _batch_size(
        self, task: PromptTask, loaded: LoadedModel, settings: Mapping[str, Any]
    ) -> int:
        """Return how many prompts decode together, as the sweep would choose it."""
        if self.card is None:
            found = found_in(self.runner.batch_size_file(task, loaded, settings))
            return most_prompts(*task.memory(loaded)) if found is None else found
        free = self.card.memory_gb * 1e9 - loaded.model.get_memory_footprint()
        tokens = max(one.num_tokens + one.sample.max_new_tokens for one in task.tokenised(loaded))
        geometry = geometry_of(loaded.model)
        return most_prompts(cache_bytes(geometry, tokens), max(0, int(free)))

    def _artifact(
        self, composed: Composed, loaded: LoadedModel
    ) -> tuple[artifact.Artifact | None, str | None]:
        """Load a method's artifact; return it, or the file name of one that is not there.

        Without it the method gets random tensors: its steps take the same time.
        """
        method, task, settings = composed.method, composed.task, composed.settings
        if not (task.uses_model and task.fits_methods) or not isinstance(method, LearningMethod):
            return None, None
        geometry = geometry_of(loaded.model, loaded.digest)
        layers = layers_to_fit(loaded, method, composed.policy)
        if not layers or method.unsupported_reason(geometry) is not None:
            return None, None
        if self.card is None:
            spec = artifact_spec(loaded, method, composed.texts)
        else:  # its name depends on the weights
            spec = method.artifact_spec(geometry)
        if spec is None:
            return None, None
        is_refitted = self.card is not None or (settings["force"] and task.refits)
        folders = () if is_refitted else (settings["artifact_dir"], *artifact.SHIPPED)
        learned = artifact.find(spec, folders, layers)
        if learned is not None:
            learned = learned.of_layers(layers)
            method.load_artifact(learned.tensors, learned.digest)
            return learned, None
        generator = torch.Generator().manual_seed(0)
        method.load_artifact(
            {
                name: torch.randn(shape, generator=generator)
                for name, shape in method.artifact_layout(geometry).items()
            }
        )
        return None, artifact.file_name(spec)

    def _measure_fits(self, cells: Sequence[PlannedCell]) -> None:
        """Measure what it takes to fit each artifact that some cells lack."""
        for cell in cells:
            run, name, method = cell.run, cell.artifact, cell.run.method
            if name is None or name in self.fits:
                continue
            self.fits[name] = None  # as far as it is known
            if self.card is not None or not isinstance(method, LearningMethod):
                continue
            composed = run.composed
            try:
                layers = layers_to_fit(run.loaded, method, composed.policy)
                self.fits[name] = fit(
                    run.loaded, method, composed.texts, composed.calibration_bytes, layers
                )
            except Exception as error:
                cell.reason = message_of(error)

    def _context(self, cell: PlannedCell, store: PrefillStore) -> Context | None:
        """Return what a cell needs to be measured; None if it will have no results."""
        answers = {}
        if cell.full is not None and cell.full.found:
            answers = SweepCell(cell.full.run, self.runner, None).found_answers
        context, task = cell.run.context(store, answers), cell.run.task
        if self.card is not None:
            cell.reason = unsupported_reason(context, task) or ""
            return None if cell.reason else replace(context, method=context.resolved()[0])
        try:
            ready = checked_context(context, task)
        except Exception as error:
            cell.reason = message_of(error)
            return None
        if isinstance(ready, Outcome):
            cell.reason = ready.rows[0].reason
            return None
        return ready

    # What they cost ------------------------------------------------------------------------------

    def _groups(self, cells: Sequence[PlannedCell], store: PrefillStore) -> list[GroupPlan]:
        """Return what the cells that are not found cost, by group."""
        groups: dict[str, list[PlannedCell]] = {}
        for cell in cells:
            if not cell.found and not cell.reason:
                name = SweepCell(cell.run, self.runner, None).group
                groups.setdefault(name, []).append(cell)
        plans = []
        for group in groups.values():
            if isinstance(group[0].run.task, PromptTask):
                plans.append(self._by_prompts(group, store))
            else:  # the cell is a group of its own
                plans.append(self._alone(group[0], store))
        return [plan for plan in plans if plan is not None]

    def _alone(self, cell: PlannedCell, store: PrefillStore) -> GroupPlan | None:
        """Return what a cell costs that is not measured prompt by prompt; None if it is skipped."""
        task, plan = cell.run.task, GroupPlan(cell.title)
        if self.card is not None:
            self.notes.append(f"what task={task.name} takes is not known for a card.")
            return plan
        ready = self._context(cell, store)
        if ready is None:
            return None
        device = ready.loaded.model.device
        try:
            fitting, context = timed(device, task.fitted, ready)
            skipped, pilots = task.known_rows(context), task.pilots(context)
            if pilots:  # the first of them loads or compiles kernels
                first, _ = timed(device, pilots[0][0].run, context)
                again, _ = timed(device, pilots[0][0].run, context)
                plan.once = (first - again).at_least_nothing()
            plan.units = plan.longest = [{"cell": fitting + alone(context, pilots)}]
        except Exception as error:
            cell.reason = message_of(error)
            return None
        self.notes += [f"{cell.title}: {row.subtask} is skipped: {row.reason}" for row in skipped]
        need = task.bytes_needed(context)
        if need:
            plan.facts["memory"] = f"{_bytes(need)} of {_bytes(free_bytes(device))} free"
        return plan

    def _by_prompts(self, cells: Sequence[PlannedCell], store: PrefillStore) -> GroupPlan | None:
        """Return what cells cost that share prompts; None if nothing of them is measured."""
        task = cells[0].run.task
        assert isinstance(task, PromptTask)
        question = cells[0].run.settings["task"].get("question")
        plan = GroupPlan(f"{task.name} question={question}" if question else task.name)
        prompts, answers = task.tokenised(cells[0].run.loaded), dict[str, list[int]]()
        started = []
        for cell in sorted(cells, key=lambda one: one.run.method.selects):
            context, own = self._context(cell, store), cell.run.task
            if context is None:
                continue
            assert isinstance(own, PromptTask)
            cell.measured = JournaledCell.of(context, own, prompts)
            if cell.measured.ended is not None:
                cell.reason = "; ".join(row.reason for row in cell.measured.ended.rows)
                continue
            if self.card is None and not cell.run.settings["force"]:
                cell.measured.open(cell.run, self.runner)
            answers |= context.full_answers
            cell.measured.context = replace(context, full_answers=answers)
            started.append(cell)
        if not started:
            return None
        work = Work(started)
        plan.facts |= self._facts(work)
        if self.card is None:
            self._measure(plan, work, store)
        else:
            plan.units = plan.longest = [
                {part: Cost(wall_s=seconds) for part, seconds in unit.items()}
                for unit in work.seconds_on(self.card)
            ]
        return plan

    def _measure(self, plan: GroupPlan, work: Work, store: PrefillStore) -> None:
        """Measure a few prompts, and extend what they take to all batches."""
        device, context = work.context.loaded.model.device, work.context
        ends, others = measured_prompts(work.prompts)
        prefills: list[tuple[int, Cost]] = []
        trials: dict[tuple[PlannedCell, str], list[Trial]] = {}
        for prompt in [*ends, *others]:
            try:
                cost, _ = timed(device, store.get, prompt.prefill_ids, work.needs)
                if prompt.sample.max_new_tokens:
                    context.full_answer(prompt)
            except Exception as error:
                for cell in work.cells:
                    cell.reason = message_of(error)
                return
            prefills.append((len(prompt.prefill_ids), cost))
            if prompt in ends:
                self._try(plan, work, prompt, trials)
            store.release()
        times, answers = PrefillTimes(prefills), context.full_answers
        for number, once in zip(work.missing, work.prefills, strict=True):
            prefill = total([times.of(len(prompt.prefill_ids)) for prompt in once])
            for units, known in ((plan.units, answers), (plan.longest, {})):
                unit = {"prefill": prefill}
                for one in work.of_batch(number):
                    cost = cost_of(one, trials[one.cell, one.part], known)
                    unit[one.part] = unit.get(one.part, Cost()) + cost
                units.append(unit)
        records = sum(
            len(one.prompts) / trial.rows * trial.num_bytes
            for one in work.parts()
            for trial in trials[one.cell, one.part][-1:]
        )
        plan.facts["disk"] = f"{_bytes(FILES_PER_RECORD * records)} of samples, and the report"
        share = answered_share(answers, work.prompts)
        if share is not None:
            num_known = sum(one.sample.sample_id in answers for one in work.prompts)
            plan.facts["answers"] = (
                f"on {num_known} of the prompts full attention takes at most {share:.0%} of the"
                " tokens that an answer may have; the costs below count on that"
            )

    def _try(
        self,
        plan: GroupPlan,
        work: Work,
        prompt: Prompt,
        trials: dict[tuple[PlannedCell, str], list[Trial]],
    ) -> None:
        """Measure each part of each cell on one prompt."""
        rows: dict[tuple[PlannedCell, str], int] = {}
        for one in work.parts():
            known = rows.get((one.cell, one.part), 1)
            rows[one.cell, one.part] = max(known, len(one.prompts)) if one.is_together else 1
        for (cell, part), num_rows in rows.items():
            measured, context = cell.measured, cell.measured.context
            device = context.loaded.model.device
            try:
                if (cell, part) not in trials and part != "speed":
                    # Kernels are loaded or compiled when they are first used.
                    arguments = context, measured.plan, part, copies(prompt, 1, 1)
                    first, _ = timed(device, measured.task.trial, *arguments)
                    again, _ = timed(device, measured.task.trial, *arguments)
                    plan.once += (first - again).at_least_nothing()
                trial = try_part(measured, part, prompt, num_rows)
            except Exception as error:
                cell.reason = message_of(error)
                continue
            trials.setdefault((cell, part), []).append(trial)

    # The text ------------------------------------------------------------------------------------

    def _facts(self, work: Work) -> dict[str, str]:
        """Return what is known of a group before anything is measured."""
        names = [cell.run.method.name for cell in work.cells]
        lengths = [prompt.num_tokens for prompt in work.prompts]
        batches = list(map(len, work.batches))
        prefills = [len(prompt.prefill_ids) for once in work.prefills for prompt in once]
        steps, memory = work.steps(), work.memory()
        free = f"{self.card.memory_gb:g} GB" if self.card is not None else ""
        if self.card is None:
            free_now = free_bytes(work.context.loaded.model.device) + memory["weights"]
            free = f"{_bytes(free_now)} free"
        by_use = ", ".join(f"{use} {_bytes(size)}" for use, size in memory.items() if size)
        return {
            "cells": ", ".join(f"{names.count(one)} {one}" for one in dict.fromkeys(names)),
            "prompts": f"{len(lengths):,} of {min(lengths):,} to {max(lengths):,} tokens",
            "prefills": f"{len(prefills):,} of {sum(prefills):,} tokens together",
            "batches": f"{len(batches):,} of at most {max(batches)} prompts",
            "decode steps": f"at most {sum(steps.values()):,}, one for each token of each prompt: "
            + ", ".join(f"{part} {count:,}" for part, count in steps.items()),
            "memory": f"{_bytes(sum(memory.values()))} of {free}: {by_use}",
        }

    def _cells_text(self, loaded: LoadedModel, cells: Sequence[PlannedCell]) -> str:
        """Return in words how many cells a model has, and which of them have no results."""
        found = f"{sum(bool(cell.found) for cell in cells)} found"
        if self.card is not None:
            found = "found ones unknown without the weights"
        skipped = [cell for cell in cells if cell.reason]
        words = f"{len(cells)} cell{'s' if len(cells) != 1 else ''}"
        lines = [f"{loaded.name}: {words}, {found}, {len(skipped)} without results"]
        for reason in dict.fromkeys(cell.reason for cell in skipped):
            lines += [f"  {cell.title}" for cell in skipped if cell.reason == reason]
            lines.append(f"    {reason}")
        for name, cost in self.fits.items():
            users = {cell.run.method.name for cell in cells if cell.artifact == name}
            if not users:
                continue
            if self.card is not None:
                line = f"  {', '.join(users)} must be fitted unless its artifact is there"
                lines += [] if line in lines else [line]
                continue
            takes = "what it takes is unknown"
            if cost is not None:
                takes = f"{_number(cost.cpu_s)} processor seconds"
            lines.append(f"  {', '.join(users)} is fitted first ({name}): {takes}")
        return "\n".join(lines)

    def _costs_texts(self, groups: Sequence[GroupPlan], fixed: Cost, report: Cost) -> list[str]:
        """Return the tables of what everything takes, alone and with several workers."""
        units = [total(list(unit.values())) for group in groups for unit in group.units]
        longest = [total(list(unit.values())) for group in groups for unit in group.longest]
        rows: dict[str, Cost] = {}
        for group in groups:
            for unit in group.units:
                for part, cost in unit.items():
                    name = f"{group.title}: {part}"
                    rows[name] = rows.get(name, Cost()) + cost
        fixed += total([group.once for group in groups])
        fits = total([cost for cost in self.fits.values() if cost is not None])
        if self.card is not None:  # its figures say nothing of these
            fixed = fits = report = Cost()
        else:
            rows |= {"fits": fits} if self.fits else {}
            rows |= {"Python, model, cells, kernels": fixed, "rows and report": report}
        rows["all"] = fixed + fits + report + total(units)
        if total(longest) != total(units):
            rows["all, if every answer takes all its tokens"] = rows["all"] + (
                total(longest) - total(units)
            )
        workers = {
            str(count): shared(units, count, fixed) + fits + report
            for count in worker_counts(len(units))
        }
        return [self._table("", rows), self._table("Workers", workers)]

    def _table(self, head: str, costs: Mapping[str, Cost]) -> str:
        if self.card is not None:
            rows = [[name, _number(cost.wall_s)] for name, cost in costs.items()]
            return tabulate(rows, [head, "At least (s)"], "simple", disable_numparse=True)
        rows = [[name, _number(one.cpu_s), _number(one.wall_s)] for name, one in costs.items()]
        heads = [head, "Processor (s)", "Wall (s)"]
        return tabulate(rows, heads, "simple", disable_numparse=True)


def measured_prompts(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts on which every cell is measured, and those that are answered besides.

    The first are one of middle length, or the shortest and the longest if they differ much. The
    others are of different sub-tasks.
    """
    ordered = sorted(prompts, key=lambda one: len(one.prefill_ids))
    ends = [ordered[0], ordered[-1]]
    if len(ordered[0].prefill_ids) >= SIMILAR * len(ordered[-1].prefill_ids):
        ends = [ordered[len(ordered) // 2]]
    limit = int(ANSWERED_SHARE * len(prompts))
    limit = min(limit, len({one.sample.subtask for one in prompts}))
    return ends, [one for one in spread_over_subtasks(prompts, limit) if one not in ends]


def answered_share(answers: Mapping[str, Sequence[int]], prompts: Sequence[Prompt]) -> float | None:
    """Return the largest share of its tokens that a known answer takes; None if none is known."""
    shares = [
        min(1.0, (len(answers[one.sample.sample_id]) + 1) / one.sample.max_new_tokens)
        for one in prompts
        if one.sample.sample_id in answers and one.sample.max_new_tokens
    ]
    return max(shares, default=None)


def cost_of(
    one: PartOfBatch, trials: Sequence[Trial], answers: Mapping[str, Sequence[int]]
) -> Cost:
    """Return what a part of a cell takes on a batch.

    Args:
        one: The part and the prompts.
        trials: What it takes on copies of one prompt, or of the shortest and the longest one.
        answers: Known answers, by sample id; without any, all answers take all their tokens.
    """
    measured = one.cell.measured
    trial = at_length(trials, prefilled(one.prompts))
    if not one.is_together:
        return len(one.prompts) * trial.cost
    share = answered_share(answers, measured.prompts) or 1.0
    expected = [
        copies(prompt, 1, math.ceil(share * prompt.sample.max_new_tokens))[0]
        for prompt in one.prompts
    ]
    further = max(0, replace(one, prompts=expected).steps.forwards - trial.forwards)
    return (len(one.prompts) / trial.rows) * (trial.cost + further * trial.per_forward)


def worker_counts(num_units: int) -> list[int]:
    """Return the powers of two of workers that all have something to do, at least one."""
    most = max(1, min(MOST_WORKERS, num_units))
    return [2**power for power in range(most.bit_length())]


def shared(units: Sequence[Cost], num_workers: int, fixed: Cost) -> Cost:
    """Return what several workers take, if each takes the next longest unit when it is free.

    Args:
        units: What can be handed to a worker.
        num_workers: Their number.
        fixed: What each of them does before.
    """
    loads = [0.0] * num_workers
    for unit in sorted(units, key=lambda one: one.wall_s, reverse=True):
        loads[loads.index(min(loads))] += unit.wall_s
    processor = num_workers * fixed.cpu_s + total(units).cpu_s
    return Cost(processor, fixed.wall_s + max(loads))


def _number(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"


def _bytes(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
