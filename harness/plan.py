"""What a sweep would cost, known beforehand: ``topkbench plan`` and the rest of the command.

On the device of the run a few steps of each cell are measured and extended to all of them
(`topkbench.harness.pilot`). For a named card the time follows from its published figures, and only
the model's configuration and tokenizer are read. Nothing is written into the folder of results.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from tabulate import tabulate

from topkbench.analysis.record import Sweep
from topkbench.harness import artifact
from topkbench.harness.batch_size import found_in, most_prompts
from topkbench.harness.card import Card
from topkbench.harness.cell import artifact_spec, checked_context, unsupported_reason
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
from topkbench.harness.reads import Reads, layer_bytes_read, layers_read
from topkbench.harness.run import Run, describe_settings
from topkbench.harness.runner import Job, JournaledCell, Runner, SweepCell
from topkbench.harness.settings import Composed, Names, SettingsError, construct
from topkbench.harness.sweep import PromptTask, Steps, message_of
from topkbench.harness.task import Context, Outcome
from topkbench.kernels.timing import machine_name
from topkbench.methods.base import QUERY_TAIL, kv_bytes
from topkbench.methods.learning import LearningMethod
from topkbench.models.attach import geometry_of
from topkbench.models.load import LoadedModel, free_bytes, load_model, load_without_weights
from topkbench.models.prefill_store import PrefillStore

ANSWERED_SHARE = 0.1
"""Share of the prompts that full attention answers at most, to see how long answers are."""
MOST_WORKERS = 64
# Measured on three sweeps (docs/plan.md): a report with its figures takes this share of what it
# takes to start Python and import the libraries, and each cell's rows a little more.
REPORT_PER_START = 0.6
ROWS_PER_START = 0.05
# A sweep's samples repeat what its journals hold.
FILES_PER_RECORD = 2.0


@dataclass(eq=False)
class PlannedCell:
    """A cell of the sweep.

    Attributes:
        run: The cell.
        full: Full attention's cell, with which it is compared; None if it is not compared.
        title: The method and its settings in one line.
        found: Whether it has ended before, and is not run again; None if that is not known.
        reason: Why it will have no results; empty if it will.
        artifact: File name of the artifact that must be fitted first; None if none must.
        measured: The cell as it is measured prompt by prompt, once that is prepared.
    """

    run: Run
    full: "PlannedCell | None"
    title: str
    found: bool | None
    reason: str = ""
    artifact: str | None = None
    measured: JournaledCell = field(init=False)

    @property
    def is_run(self) -> bool:
        """Whether there is something to measure."""
        return not self.found and not self.reason


@dataclass
class GroupPlan:
    """What cells that share prompts, or one that is measured by itself, would cost.

    Attributes:
        title: The task in words.
        cells: The cells.
        prompts: All prompts; empty if the cell is not measured prompt by prompt.
        facts: What is printed of it, by name.
        units: What can be handed to a worker, such as a batch: by part what it takes.
        longest: The same if every answer takes all its tokens.
        once: What is done once in each process, such as loading compiled kernels.
    """

    title: str
    cells: Sequence[PlannedCell]
    prompts: list[Prompt] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    units: list[dict[str, Cost]] = field(default_factory=list)
    longest: list[dict[str, Cost]] = field(default_factory=list)
    once: Cost = field(default_factory=Cost)


class Planner:
    """Says what the jobs of a sweep would cost.

    Args:
        sweep: The sweep, of which nothing is written.
        jobs: The composed configurations that can run.
        refused: Why others cannot.
    """

    def __init__(self, sweep: Sweep, jobs: Sequence[Job], refused: Sequence[str]) -> None:
        self.start = Cost(time.process_time(), time.time() - psutil.Process().create_time())
        self.jobs, self.refused = jobs, refused
        self.runner = Runner(sweep, None)
        card = jobs[0].composed.card
        self.card = card if isinstance(card, Card) else None
        self.notes: list[str] = []
        self.fits: dict[str, Cost | None] = {}

    def plan(self) -> str:
        """Return the plan as text."""
        by_model: dict[str, list[Job]] = {}
        for job in self.jobs:
            by_model.setdefault(json.dumps(job.composed.settings["model"]), []).append(job)
        began = time.perf_counter()
        texts, groups, fixed = [], list[GroupPlan](), self.start
        num_cells, device = 0, torch.device("cpu")
        for name, jobs in by_model.items():
            try:
                loading, loaded = timed(device, self._load, name, jobs)
            except Exception as error:  # the sweep makes failed rows of them
                self.notes.append(f"{len(jobs)} configurations will fail: {message_of(error)}")
                continue
            device = loaded.model.device
            preparing, cells = timed(device, self._cells, jobs, loaded)
            fixed += loading + preparing
            self._measure_fits(cells)
            num_cells += len(cells)
            store = PrefillStore(loaded.model)
            of_model = [self._group(group, store) for group in _groups(cells).values()]
            groups += of_model
            texts += [self._cells_text(loaded, cells), *map(_facts_text, of_model)]
        where = machine_name(device) if self.card is None else self.card.name
        how = f"from a few steps, measured in {time.perf_counter() - began:.0f} s"
        if self.card is not None:
            how = "at least, from published figures; no weights were read"
        head = f"Plan of {len(self.jobs)} configurations on {where}, {how}. Nothing was run."
        report = (REPORT_PER_START + ROWS_PER_START * num_cells) * self.start
        costs = self._costs_text(groups, fixed, report)
        notes = [f"- {note}" for note in dict.fromkeys([*self.notes, *self._refused_notes()])]
        return "\n\n".join([head, *texts, *costs, *(["\n".join(notes)] if notes else [])])

    # What is run ---------------------------------------------------------------------------------

    def _load(self, name: str, jobs: Sequence[Job]) -> LoadedModel:
        settings = jobs[0].composed.settings
        if self.card is None:
            return self.runner.load(name, settings)[0]
        loader = settings["model"]["_target_"]
        if loader != f"{load_model.__module__}.{load_model.__name__}":
            raise SettingsError(
                f"a plan for a card needs a model that topkbench loads, got model._target_={loader}"
                "; leave card out."
            )
        outline = f"{load_without_weights.__module__}.{load_without_weights.__name__}"
        loaded: LoadedModel = construct(
            Names({}), "model", {**settings["model"], "_target_": outline}
        )
        return loaded

    def _cells(self, jobs: Sequence[Job], loaded: LoadedModel) -> dict[str, PlannedCell]:
        """Return the cells of some jobs by identity, those of full attention among them."""
        cells: dict[str, PlannedCell] = {}
        for job in jobs:
            try:
                full = None
                if job.composed.task.needs_full and job.full is not job.composed:
                    full = self._cell(cells, job.full, job.full, loaded, None)
                self._cell(cells, job.composed, job.full, loaded, full)
            except Exception as error:  # the sweep makes a failed row of it
                self.notes.append(f"a configuration will fail: {message_of(error)}")
        return cells

    def _cell(
        self,
        cells: dict[str, PlannedCell],
        composed: Composed,
        full: Composed,
        loaded: LoadedModel,
        compared: PlannedCell | None,
    ) -> PlannedCell:
        """Return a configuration's cell, which may be among the cells already."""
        task, settings = composed.task, composed.settings
        if isinstance(task, PromptTask) and task.batch_size == "auto":
            task.batch_size = self._batch_size(task, loaded, settings)
        learned, missing = self._artifact(composed, loaded)
        run = Run(composed, full.method, loaded, learned)
        if run.identity in cells:
            return cells[run.identity]
        found = (
            None if self.card else missing is None and SweepCell(run, self.runner, None).is_found()
        )
        cell = PlannedCell(run, compared, describe_settings(run.row()), found, artifact=missing)
        cells[run.identity] = cell
        return cell

    def _batch_size(
        self, task: PromptTask, loaded: LoadedModel, settings: Mapping[str, Any]
    ) -> int:
        """Return how many prompts decode together, as the sweep would choose it."""
        if self.card is None:
            found = found_in(self.runner.batch_size_file(task, loaded, settings))
            return most_prompts(*task.memory(loaded)) if found is None else found
        free = self.card.memory_gb * 1e9 - loaded.model.get_memory_footprint()
        return most_prompts(task.memory(loaded)[0], max(0, int(free)))

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
        if self.card is not None:
            spec = method.artifact_spec(geometry)
        else:
            spec = artifact_spec(loaded, method, composed.texts)
        if spec is None or method.unsupported_reason(geometry) is not None:
            return None, None
        refits = settings["force"] and task.refits
        folders = (settings["artifact_dir"], *loaded.artifact_folders)
        path = None if self.card is not None or refits else artifact.find(spec, folders)
        if path is not None:
            learned = artifact.load(path, expect=spec)
            method.load_artifact(learned.tensors, learned.digest)
            return learned, None
        generator = torch.Generator().manual_seed(0)
        layout = method.artifact_layout(geometry)
        method.load_artifact(
            {name: torch.randn(shape, generator=generator) for name, shape in layout.items()}
        )
        return None, artifact.file_name(spec)

    def _measure_fits(self, cells: Mapping[str, PlannedCell]) -> None:
        """Measure what it takes to fit each artifact that some cells lack."""
        for cell in cells.values():
            run, name, method = cell.run, cell.artifact, cell.run.method
            if name is None or cell.found or name in self.fits:
                continue
            self.fits[name] = None  # as far as it is known
            if self.card is not None or not isinstance(method, LearningMethod):
                continue
            gib = run.settings["calibration_memory_gib"]
            memory = None if gib is None else int(gib * 2**30)
            try:
                self.fits[name] = fit(run.loaded, method, run.composed.texts, memory)
            except Exception as error:
                self.notes.append(f"{method.name} cannot be fitted: {message_of(error)}")

    def _context(self, cell: PlannedCell, store: PrefillStore) -> Context | None:
        """Return what a cell needs to be measured; None if it will have no results."""
        full = cell.full
        answers = {}
        if full is not None and full.found:
            answers = SweepCell(full.run, self.runner, None).found_answers
        context = cell.run.context(store, answers)
        try:
            if self.card is not None:
                cell.reason = unsupported_reason(context, cell.run.task) or ""
                return replace(context, method=context.resolved()[0])
            ready = checked_context(context, cell.run.task)
        except Exception as error:
            cell.reason = message_of(error)
            return None
        if isinstance(ready, Outcome):
            cell.reason = ready.rows[0].reason
            return None
        return ready

    def _group(self, cells: Sequence[PlannedCell], store: PrefillStore) -> GroupPlan:
        """Return what the cells of one group cost."""
        task = cells[0].run.task
        question = cells[0].run.settings["task"].get("question")
        title = f"task={task.name}" + (f" question={question}" if question else "")
        if not isinstance(task, PromptTask):
            return self._alone(GroupPlan(f"{title} {cells[0].run.method.name}", cells), store)
        prompts = task.tokenised(cells[0].run.loaded)
        plan = GroupPlan(title, sorted(cells, key=lambda one: one.run.method.selects), prompts)
        answers: dict[str, list[int]] = {}
        started = []
        for cell in plan.cells:
            context = self._context(cell, store) if cell.is_run else None
            if context is None or cell.reason:
                continue
            own = cell.run.task
            assert isinstance(own, PromptTask)
            cell.measured = JournaledCell.of(context, own, plan.prompts)
            if cell.measured.ended is not None:
                cell.reason = "; ".join(row.reason for row in cell.measured.ended.rows)
                continue
            if self.card is None and not cell.run.settings["force"]:
                cell.measured.open(cell.run, self.runner)
            answers |= context.full_answers
            cell.measured.context = replace(context, full_answers=answers)
            started.append(cell)
        if started:
            work = _Work.of(started)
            plan.facts |= work.facts(self.card)
            if self.card is None:
                self._measure(plan, work, store)
            else:
                plan.units = plan.longest = _at_least(work, self.card)
        return plan

    def _alone(self, plan: GroupPlan, store: PrefillStore) -> GroupPlan:
        """Return what a cell costs that is not measured prompt by prompt."""
        cell = plan.cells[0]
        task = cell.run.task
        if not cell.is_run:
            return plan
        if self.card is not None:
            self.notes.append(f"what task={task.name} takes is not known for a card.")
            return plan
        context = self._context(cell, store)
        if context is None:
            return plan
        device = context.loaded.model.device
        fitting, context = timed(device, task.fitted, context)
        for row in task.known_rows(context):
            self.notes.append(f"{cell.title}, {row.subtask}: skipped: {row.reason}")
        need = task.bytes_needed(context)
        if need:
            plan.facts["memory"] = f"{_bytes(need)} of {_bytes(free_bytes(device))} free"
        pilots = task.pilots(context)
        if pilots:
            first, _ = timed(device, pilots[0][0].run, context)
            again, _ = timed(device, pilots[0][0].run, context)
            plan.once = (first - again).at_least_nothing()
        plan.units = plan.longest = [{task.name: fitting + alone(context, task)}]
        return plan

    # What is measured ----------------------------------------------------------------------------

    def _measure(self, plan: GroupPlan, work: "_Work", store: PrefillStore) -> None:
        """Measure a few prompts, and extend what they take to all batches."""
        one = work.cells[0].measured
        device = one.context.loaded.model.device
        needs = frozenset[str]().union(
            *(cell.measured.context.method.traits.needs for cell in work.cells)
        )
        waiting = [prompt for number in work.missing for prompt in one.batches[number]]
        waiting.sort(key=lambda prompt: len(prompt.prefill_ids))
        ends = [waiting[0], waiting[-1]]
        if len(ends[0].prefill_ids) >= SIMILAR * len(ends[1].prefill_ids):
            ends = [waiting[len(waiting) // 2]]
        limit = int(ANSWERED_SHARE * len(waiting))
        others = [one for one in spread_over_subtasks(plan.prompts, limit) if one not in ends]
        others = others[: len({prompt.sample.subtask for prompt in waiting}) - 1]
        prefills: list[tuple[int, Cost]] = []
        trials: dict[tuple[int, str], list[Trial]] = {}
        for prompt in [*ends, *others]:
            cost, _ = timed(device, store.get, prompt.prefill_ids, needs)
            prefills.append((len(prompt.prefill_ids), cost))
            if prompt.sample.max_new_tokens:
                one.context.full_answer(prompt)
            if prompt in ends:
                plan.once += self._try(work, prompt, trials, is_first=prompt is ends[0])
            store.release()
        times, answers = PrefillTimes(prefills), one.context.full_answers
        for number in work.missing:
            prefill = total([times.of(len(prompt.prefill_ids)) for prompt in one.batches[number]])
            for units, known in ((plan.units, answers), (plan.longest, {})):
                parts = {"prefill": prefill}
                for place, cell, part, batch in work.of_batch(number):
                    cost = _of_batch(cell, part, batch, trials[place, part], known)
                    parts[part] = parts.get(part, Cost()) + cost
                units.append(parts)
        plan.facts["disk"] = f"about {_bytes(FILES_PER_RECORD * work.record_bytes(trials))}"
        share = _answered_share(answers, plan.prompts)
        if share is not None:
            plan.facts["answers"] = (
                f"end after at most {share:.0%} of their tokens in"
                f" {len([one for one in plan.prompts if one.sample.sample_id in answers])} prompts"
                " that full attention answered; the table's costs count on that"
            )

    def _try(
        self,
        work: "_Work",
        prompt: Prompt,
        trials: dict[tuple[int, str], list[Trial]],
        is_first: bool,
    ) -> Cost:
        """Measure each cell on one prompt; return what is done once in a process."""
        once = Cost()
        for place, cell in enumerate(work.cells):
            context = cell.measured.context
            device = context.loaded.model.device
            for part in work.parts(cell):
                if is_first:
                    measure = cell.measured.task.trial
                    short = copies(prompt, 1, 1)
                    if part == "speed":
                        once += timed(device, context.bandwidth)[0]
                    else:  # kernels are loaded or compiled when first used
                        measured = cell.measured.plan, part, short
                        first, _ = timed(device, measure, context, *measured)
                        again, _ = timed(device, measure, context, *measured)
                        once += (first - again).at_least_nothing()
                rows = work.rows(cell, part)
                trials.setdefault((place, part), []).append(
                    try_part(cell.measured, part, prompt, rows)
                )
        return once

    # What is printed -----------------------------------------------------------------------------

    def _cells_text(self, loaded: LoadedModel, cells: Mapping[str, PlannedCell]) -> str:
        """Return a model's cells in words."""
        found = sum(bool(cell.found) for cell in cells.values())
        skipped = [cell for cell in cells.values() if cell.reason and not cell.found]
        words = [f"{loaded.name}: {len(cells)} cells", f"{found} found already"]
        if self.card is not None:
            words[1] = "which of them are found is not known without weights"
        words.append(f"{len(skipped)} without results")
        lines = [", ".join(words)]
        by_reason: dict[str, list[str]] = {}
        for cell in skipped:
            by_reason.setdefault(cell.reason, []).append(cell.title)
        for reason, titles in by_reason.items():
            lines += [f"  {title}" for title in titles] + [f"    {reason}"]
        for name, cost in self.fits.items():
            users = {cell.run.method.name for cell in cells.values() if cell.artifact == name}
            if users:
                takes = "what it takes is not known" if cost is None else _seconds(cost)
                lines.append(f"  to be fitted first: {name} of {', '.join(users)}: {takes}")
        return "\n".join(lines)

    def _costs_text(self, groups: Sequence[GroupPlan], fixed: Cost, report: Cost) -> list[str]:
        """Return the tables of what everything takes."""
        rows: list[list[str]] = []
        units = [total(list(unit.values())) for group in groups for unit in group.units]
        longest = [total(list(unit.values())) for group in groups for unit in group.longest]
        for group in groups:
            parts: dict[str, list[Cost]] = {}
            for unit in group.units:
                for part, cost in unit.items():
                    parts.setdefault(part, []).append(cost)
            rows += [_row(f"{group.title}: {part}", total(one)) for part, one in parts.items()]
        if self.card is not None:
            rows.append(_row("all", total(units)))
            head = ["", "Card, at least (s)"]
            return [
                tabulate([[row[0], row[2]] for row in rows], head, "simple"),
                self._workers_text(units, Cost(), Cost(), Cost()),
            ]
        fits = total([cost for cost in self.fits.values() if cost is not None])
        fixed += total([group.once for group in groups])
        if self.fits:
            rows.append(_row("fits, once", fits))
        rows.append(_row("Python, model, cells, kernels", fixed))
        rows.append(_row("rows and report", report))
        whole = fixed + fits + report
        rows.append(_row("all", whole + total(units)))
        if total(longest) != total(units):
            rows.append(_row("all, if every answer takes all its tokens", whole + total(longest)))
        return [
            tabulate(rows, ["", "Processor (s)", "Wall (s)"], "simple", disable_numparse=True),
            self._workers_text(units, fixed, fits, report),
        ]

    def _workers_text(self, units: Sequence[Cost], fixed: Cost, fits: Cost, report: Cost) -> str:
        """Return what several workers take, each with batches of its own."""
        rows, num_workers = [], 1
        while num_workers == 1 or num_workers <= min(MOST_WORKERS, len(units)):
            loads = [0.0] * num_workers
            for unit in sorted(units, key=lambda one: one.wall_s, reverse=True):
                loads[loads.index(min(loads))] += unit.wall_s
            everything = Cost(
                num_workers * fixed.cpu_s + total(units).cpu_s,
                fixed.wall_s + max(loads),
            )
            everything += fits + report
            rows.append([str(num_workers), *_row("", everything)[1:]])
            num_workers *= 2
        if self.card is not None:
            rows = [[row[0], row[2]] for row in rows]
        head = ["Workers", "Processor (s)", "Wall (s)"] if self.card is None else ["Cards", "s"]
        return tabulate(rows, head, "simple", disable_numparse=True)

    def _refused_notes(self) -> list[str]:
        counts: dict[str, int] = {}
        for reason in self.refused:
            counts[reason] = counts.get(reason, 0) + 1
        return [f"{count} configurations will fail: {reason}" for reason, count in counts.items()]


@dataclass
class _Work:
    """What the cells of a group that are measured prompt by prompt have still to measure.

    Attributes:
        cells: The cells, full attention first.
        missing: The batches of which something is missing.
    """

    cells: Sequence[PlannedCell]
    missing: list[int]

    @classmethod
    def of(cls, cells: Sequence[PlannedCell]) -> "_Work":
        """Return what some cells have still to measure."""
        numbers = range(len(cells[0].measured.batches))
        missing = [one for one in numbers if any(cell.measured.missing(one) for cell in cells)]
        return cls([cell for cell in cells if any(map(cell.measured.missing, missing))], missing)

    def parts(self, cell: PlannedCell) -> list[str]:
        """Return the parts of a cell of which something is missing."""
        found = [part for number in self.missing for part in cell.measured.missing(number)]
        return [part for part in cell.measured.plan.parts if part in found]

    def of_batch(self, number: int) -> list[tuple[int, PlannedCell, str, list[Prompt]]]:
        """Return what is missing of a batch: the cell with its place, the part and its prompts."""
        return [
            (place, cell, part, cell.measured.plan.measured(part, cell.measured.batches[number]))
            for place, cell in enumerate(self.cells)
            for part in cell.measured.missing(number)
        ]

    def rows(self, cell: PlannedCell, part: str) -> int:
        """Return how many prompts of a batch a part decodes together."""
        if part not in cell.measured.task.together:
            return 1
        return max(
            len(batch)
            for number in self.missing
            for _, one, of_part, batch in self.of_batch(number)
            if one is cell and of_part == part
        )

    def steps(self) -> dict[str, Steps]:
        """Return the decode steps of each part."""
        found: dict[str, Steps] = {}
        for number in self.missing:
            for _, cell, part, batch in self.of_batch(number):
                measured = cell.measured
                one = measured.task.steps(measured.context, measured.plan, part, batch)
                before = found.get(part, Steps())
                found[part] = Steps(
                    before.forwards + one.forwards, before.own + one.own, before.full + one.full
                )
        return found

    def record_bytes(self, trials: Mapping[tuple[int, str], Sequence[Trial]]) -> float:
        """Return the size of all records."""
        return sum(
            trials[place, part][-1].num_bytes * len(batch) / trials[place, part][-1].rows
            for number in self.missing
            for place, _, part, batch in self.of_batch(number)
        )

    def facts(self, card: Card | None) -> dict[str, str]:
        """Return what is known before anything is measured."""
        one = self.cells[0].measured
        prompts = [prompt for number in self.missing for prompt in one.batches[number]]
        lengths = [prompt.num_tokens for prompt in prompts]
        batches = [len(one.batches[number]) for number in self.missing]
        tokens = sum(len(prompt.prefill_ids) for prompt in prompts)
        steps = self.steps()
        every = sum(one.own + one.full for one in steps.values())
        by_part = ", ".join(f"{part} {one.own + one.full:,}" for part, one in steps.items())
        return {
            "cells": "; ".join(cell.title for cell in self.cells),
            "prompts": (
                f"{len(prompts):,} of {min(lengths):,} to {max(lengths):,} tokens, in"
                f" {len(batches):,} batches of at most {max(batches)}"
            ),
            "prefills": f"{len(prompts):,}, {tokens:,} tokens",
            "decode steps": f"at most {every:,} of single prompts ({by_part})",
            "memory": self._memory(prompts, max(batches), card),
        }

    def _memory(self, prompts: Sequence[Prompt], rows: int, card: Card | None) -> str:
        context = self.cells[0].measured.context
        loaded, geometry = context.loaded, context.geometry
        most = max(prompt.num_tokens + prompt.sample.max_new_tokens for prompt in prompts)
        layers, heads = geometry.num_layers, geometry.num_heads
        states = rows * layers * kv_bytes(geometry, most)
        methods = [cell.measured.context.method for cell in self.cells]
        needs = frozenset[str]().union(*(method.traits.needs for method in methods))
        captured = 0
        if "query_tail" in needs:
            captured += QUERY_TAIL * heads * geometry.head_dim * geometry.dtype_bytes
        if "column_sums" in needs:
            captured += 4 * heads * most
        per_token = max(method.index_bytes_per_token(geometry) for method in methods)
        parts = {
            "weights": loaded.model.get_memory_footprint(),
            "keys and values of a batch": states,
            "captured": rows * layers * captured,
            "largest index": rows * layers * most * per_token,
        }
        free = free_bytes(loaded.model.device) + parts["weights"] if card is None else 0
        has = f"{_bytes(free)} free" if card is None else f"{card.memory_gb:g} GB"
        words = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items() if size)
        return f"{_bytes(sum(parts.values()))} of {has}: {words}"


def _groups(cells: Mapping[str, PlannedCell]) -> dict[str, list[PlannedCell]]:
    """Return the cells that are not found, in groups that share prompts and batches."""
    groups: dict[str, list[PlannedCell]] = {}
    for cell in cells.values():
        if not cell.found:
            group = SweepCell(cell.run, Runner(Sweep(".", "."), None), None).group
            groups.setdefault(group, []).append(cell)
    return groups


def _answered_share(
    answers: Mapping[str, Sequence[int]], prompts: Sequence[Prompt]
) -> float | None:
    """Return the largest share of its tokens that a known answer takes; None if none is known."""
    shares = [
        min(1.0, (len(answers[one.sample.sample_id]) + 1) / one.sample.max_new_tokens)
        for one in prompts
        if one.sample.sample_id in answers and one.sample.max_new_tokens
    ]
    return max(shares, default=None)


def _of_batch(
    cell: PlannedCell,
    part: str,
    batch: Sequence[Prompt],
    trials: Sequence[Trial],
    answers: Mapping[str, Sequence[int]],
) -> Cost:
    """Return what a part of a cell takes on a batch.

    Args:
        cell: The cell.
        part: The part.
        batch: The prompts that it concerns.
        trials: What it takes on copies of one prompt, of the shortest and the longest one.
        answers: Known answers; without any, all answers take all their tokens.
    """
    measured = cell.measured
    trial = at_length(trials, sum(len(one.prefill_ids) for one in batch) / len(batch))
    if part not in measured.task.together:
        return len(batch) * trial.cost
    share = _answered_share(answers, measured.prompts) or 1.0
    expected = [copies(one, 1, math.ceil(share * one.sample.max_new_tokens))[0] for one in batch]
    steps = measured.task.steps(measured.context, measured.plan, part, expected)
    further = max(0, steps.forwards - trial.forwards) * trial.per_forward
    if not any(one.sample.max_new_tokens for one in batch):
        further = Cost()
    return (len(batch) / trial.rows) * (trial.cost + further)


def _at_least(work: _Work, card: Card) -> list[dict[str, Cost]]:
    """Return what each batch takes at least on a card, by part: prefills and decode steps."""
    one = work.cells[0].measured
    model, geometry = one.context.loaded.model, one.context.geometry
    # A token goes through each weight once; the output's weights are used for the last one alone.
    output = model.get_output_embeddings()
    linear = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    numbers = sum(layer.weight.numel() for layer in linear if layer is not output)
    weights = numbers * geometry.dtype_bytes
    channels = geometry.num_layers * geometry.num_heads * geometry.head_dim
    units = []
    for number in work.missing:
        # Two products of n²/2 pairs, each of a multiplication and an addition a channel.
        prefills = [
            card.seconds(2 * numbers * n + 2 * channels * n**2, weights)
            for n in (len(prompt.prefill_ids) for prompt in one.batches[number])
        ]
        parts = {"prefill": Cost(wall_s=sum(prefills))}
        for _, cell, part, batch in work.of_batch(number):
            measured = cell.measured
            steps = measured.task.steps(measured.context, measured.plan, part, batch)
            n = round(sum(len(prompt.prefill_ids) for prompt in batch) / len(batch))
            num_bytes = steps.forwards * weights + steps.own * _step_bytes(measured.context, n)
            num_bytes += steps.full * geometry.num_layers * kv_bytes(geometry, n)
            operations = 2.0 * numbers * (steps.own + steps.full)
            seconds = card.seconds(operations, num_bytes)
            parts[part] = parts.get(part, Cost()) + Cost(wall_s=seconds)
        units.append(parts)
    return units


def _step_bytes(context: Context, n: int) -> int:
    """Return the bytes of keys, values and index that a step over ``n`` tokens reads."""
    geometry, k = context.geometry, context.effective_policy.k
    sparse, dense = layers_read(context, n)
    of_layer = layer_bytes_read(context.method, geometry, n, k, Reads(min(k, n)))
    return sparse * of_layer + sum(kv_bytes(geometry, tokens) for tokens in dense)


def _row(name: str, cost: Cost) -> list[str]:
    return [name, _number(cost.cpu_s), _number(cost.wall_s)]


def _number(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"


def _seconds(cost: Cost) -> str:
    return f"{_number(cost.cpu_s)} processor seconds, {_number(cost.wall_s)} s"


def _bytes(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _facts_text(plan: GroupPlan) -> str:
    rows = [[f"  {name}", value] for name, value in plan.facts.items()]
    return f"{plan.title}\n{tabulate(rows, tablefmt='plain', disable_numparse=True)}".rstrip()
