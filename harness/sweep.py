"""Runs cells prompt by prompt: each prompt is prefilled once for all cells that need it.

Only the states of one batch of prompts are in memory, whatever the number of prompts and cells.
"""

import functools
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch

from topkbench.harness.decoding import Prompt, batches
from topkbench.harness.task import Context, Outcome, Task, TaskRow
from topkbench.models.load import LoadedModel
from topkbench.models.prefill_store import PrefillStore
from topkbench.models.step_count import MethodBypassedError

Record = dict[str, Any]
"""What was measured for one part of a cell on one batch: plain values that JSON can hold."""


@dataclass(frozen=True)
class Plan:
    """What a cell measures, known before anything is decoded.

    Attributes:
        parts: The prompts on which each part is measured, by part and sample id.
    """

    parts: Mapping[str, frozenset[str]]

    def measured(self, part: str, batch: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts of a batch on which a part is measured."""
        wanted = self.parts.get(part, frozenset())
        return [prompt for prompt in batch if prompt.sample.sample_id in wanted]


class PromptTask(Task):
    """A task that is measured prompt by prompt.

    Attributes:
        batch_size: At most this many prompts decode together.
    """

    batch_size: int

    @abstractmethod
    def tokenised(self, loaded: LoadedModel) -> list[Prompt]:
        """Return the prompts for a model; the same for every method."""

    @abstractmethod
    def plan(self, context: Context, prompts: Sequence[Prompt]) -> Plan | Outcome:
        """Return what a cell measures; its rows if that is known without decoding."""

    @abstractmethod
    def measure(self, context: Context, plan: Plan, part: str, prompts: Sequence[Prompt]) -> Record:
        """Measure a part on the prompts of one batch that it concerns."""

    @abstractmethod
    def outcome(
        self,
        context: Context,
        plan: Plan,
        prompts: Sequence[Prompt],
        records: Mapping[str, Sequence[Record]],
    ) -> Outcome:
        """Return the rows and samples of a cell, given each part's records in order of batches."""

    def run(self, context: Context) -> Outcome:
        cell = PromptCell.of(context, self, self.tokenised(context.loaded))
        run_by_prompts([cell], context.store)
        return cell.result()


@dataclass
class PromptCell:
    """One cell that is measured prompt by prompt.

    Attributes:
        context: What the task needs.
        task: The cell's task.
        prompts: All prompts, in order.
        plan: What is measured on which of them.
        records: What was measured so far, by part and number of the batch.
        ended: The rows of a cell that ended early: it failed, or was skipped.
        seconds: Time spent on measuring.
    """

    context: Context
    task: PromptTask
    prompts: list[Prompt]
    plan: Plan
    records: dict[str, dict[int, Record]] = field(default_factory=dict)
    ended: Outcome | None = None
    seconds: float = 0.0

    @classmethod
    def of(cls, context: Context, task: PromptTask, prompts: list[Prompt]) -> Self:
        """Return a cell of which nothing has been measured."""
        plan = task.plan(context, prompts)
        if isinstance(plan, Outcome):
            return cls(context, task, prompts, Plan({}), ended=plan)
        return cls(context, task, prompts, plan, {part: {} for part in plan.parts})

    @functools.cached_property
    def batches(self) -> list[list[Prompt]]:
        """The batches, which depend on the prompts and the batch size alone."""
        return batches(self.prompts, self.task.batch_size)

    @functools.cached_property
    def planned(self) -> dict[str, set[int]]:
        """The numbers of the batches on which each part is measured."""
        numbered = list(enumerate(self.batches))
        return {
            part: {number for number, batch in numbered if self.plan.measured(part, batch)}
            for part in self.plan.parts
        }

    def missing(self, number: int) -> list[str]:
        """Return the parts that are still to be measured on a batch."""
        if self.ended is not None:
            return []
        return [
            part
            for part, numbers in self.planned.items()
            if number in numbers and number not in self.records[part]
        ]

    def measure(self, part: str, number: int) -> None:
        """Measure a part on a batch; an error that makes a row of its own ends the cell."""
        began = time.perf_counter()
        prompts = self.plan.measured(part, self.batches[number])
        try:
            record = self.task.measure(self.context, self.plan, part, prompts)
            self.keep(part, number, record)
        except Exception as error:
            names = [prompt.sample.sample_id for prompt in prompts]
            place = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            self.ended = self.outcome_of(error, f"{part} of {place}")
        self.seconds += time.perf_counter() - began

    def keep(self, part: str, number: int, record: Record) -> None:
        """Add a record."""
        self.records[part][number] = record

    def outcome_of(self, error: Exception, place: str) -> Outcome:
        """Return the row of a cell that an error ended, or raise it again.

        Args:
            error: The error.
            place: The part and the prompts that were measured.
        """
        return outcome_of(error)

    def refresh(self) -> None:
        """Read what other processes have measured."""

    def result(self) -> Outcome:
        """Return the rows and samples, once everything has been measured."""
        if self.ended is not None:
            return self.ended
        records = {
            part: [by_batch[number] for number in sorted(by_batch)]
            for part, by_batch in self.records.items()
        }
        return self.task.outcome(self.context, self.plan, self.prompts, records)


Claim = Callable[[int, bool], AbstractContextManager[bool]]
"""Given the number of a batch and whether to wait, claims it: yields whether this process may
measure it now."""


def always_mine(number: int, wait: bool) -> AbstractContextManager[bool]:
    """Claim a batch where there is no other process."""
    return nullcontext(True)


def run_by_prompts(
    cells: Sequence[PromptCell],
    store: PrefillStore,
    claim: Claim = always_mine,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Measure what is missing of cells over the same prompts, batch by batch.

    Args:
        cells: The cells, full attention first: its answers are what others are measured on.
        store: The prompts' prefills; only those of one batch are kept.
        claim: Claims batches, so that no two processes measure the same.
        after: Called after each batch on which something was missing.
    """
    answers: dict[str, list[int]] = {}  # full attention's, whichever cell decodes them
    for cell in cells:
        answers |= cell.context.full_answers
        cell.context = replace(cell.context, full_answers=answers)
    num_batches = len(cells[0].batches) if cells else 0
    for wait in (False, True):  # batches that other processes measure come last
        for number in range(num_batches):
            if not any(cell.missing(number) for cell in cells):
                continue
            with claim(number, wait) as is_mine:
                if is_mine:
                    _run_batch(cells, store, number, answers)
            store.release()
            after()


def _run_batch(
    cells: Sequence[PromptCell],
    store: PrefillStore,
    number: int,
    answers: dict[str, list[int]],
) -> None:
    for cell in cells:
        cell.refresh()
    waiting = [cell for cell in cells if cell.missing(number)]
    needs = frozenset[str]().union(*(cell.context.method.traits.needs for cell in waiting))
    for prompt in cells[0].batches[number] if waiting else ():
        store.get(prompt.prefill_ids, needs)
    for cell in cells:
        for part in cell.missing(number):
            if cell.ended is None:
                cell.measure(part, number)
        if not cell.context.method.selects and number in cell.records.get("answers", {}):
            for sample in cell.records["answers"][number]["samples"]:
                answers[sample["sample_id"]] = sample["tokens"]


def message_of(error: Exception) -> str:
    """Return an error's message in one line; its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def outcome_of(error: Exception) -> Outcome:
    """Return the row of a cell that an error ended.

    If decode steps did not all go through the method it is ``wrong``; if memory ran out,
    ``out_of_memory``. Any other exception is raised again.
    """
    text = message_of(error)
    if isinstance(error, MethodBypassedError):
        return Outcome([TaskRow("mean", status="wrong", reason=text[:500])], [])
    is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        # torch has no separate exception class for running out of CPU memory
        type(error) is RuntimeError and "can't allocate memory" in text
    )
    if not is_memory:
        raise error
    return Outcome([TaskRow("mean", status="out_of_memory", reason=text[:200])], [])
