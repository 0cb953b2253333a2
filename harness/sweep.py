"""Runs cells prompt by prompt: each prompt is prefilled once for all cells that need it.

Only the states of one batch of prompts are in memory, whatever the number of prompts and cells.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from topkbench.harness.decoding import Prompt, batches
from topkbench.harness.task import Context, Outcome, Task, TaskRow
from topkbench.models.load import LoadedModel
from topkbench.models.prefill import PrefillStore
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
        ended: The rows of a cell that ends early: it failed, or was skipped.
        write: Stores a record, given its part and the number of its batch.
    """

    context: Context
    task: PromptTask
    prompts: list[Prompt]
    plan: Plan
    records: dict[str, dict[int, Record]] = field(default_factory=dict)
    ended: Outcome | None = None
    write: Callable[[str, int, Record], None] = lambda part, number, record: None

    @classmethod
    def of(cls, context: Context, task: PromptTask, prompts: list[Prompt]) -> "PromptCell":
        """Return a cell of which nothing has been measured."""
        plan = task.plan(context, prompts)
        if isinstance(plan, Outcome):
            return cls(context, task, prompts, Plan({}), ended=plan)
        return cls(context, task, prompts, plan, {part: {} for part in plan.parts})

    def batches(self) -> list[list[Prompt]]:
        """Return the batches, which depend on the prompts and the batch size alone."""
        return batches(self.prompts, self.task.batch_size)

    def missing(self, number: int, batch: Sequence[Prompt]) -> list[str]:
        """Return the parts that are still to be measured on a batch."""
        if self.ended is not None:
            return []
        return [
            part
            for part in self.plan.parts
            if number not in self.records[part] and self.plan.measured(part, batch)
        ]

    def measure(self, part: str, number: int, batch: Sequence[Prompt]) -> None:
        """Measure a part on a batch; a failure ends the cell."""
        prompts = self.plan.measured(part, batch)
        record = self.task.measure(self.context, self.plan, part, prompts)
        self.records[part][number] = record
        self.write(part, number, record)

    def result(self) -> Outcome:
        """Return the rows and samples, once everything has been measured."""
        if self.ended is not None:
            return self.ended
        records = {
            part: [by_batch[number] for number in sorted(by_batch)]
            for part, by_batch in self.records.items()
        }
        return self.task.outcome(self.context, self.plan, self.prompts, records)


def run_by_prompts(
    cells: Sequence[PromptCell],
    store: PrefillStore,
    claim: Callable[[int], AbstractContextManager[None]] = lambda number: nullcontext(),
    after: Callable[[int], None] = lambda number: None,
) -> None:
    """Measure what is missing of cells over the same prompts, batch by batch.

    Args:
        cells: The cells, full attention first: its answers are what others are measured on.
        store: The prompts' prefills.
        claim: Given the number of a batch, returns a context that is entered while it is measured.
        after: Called with the number of each batch after it was measured.
    """
    answers: dict[str, list[int]] = {}  # full attention's, whichever cell decodes them
    for cell in cells:
        answers |= cell.context.full_answers
        cell.context = replace(cell.context, full_answers=answers)
    for number, batch in enumerate(cells[0].batches() if cells else ()):
        if any(cell.missing(number, batch) for cell in cells):
            with claim(number):
                _run_batch(cells, store, number, batch, answers)
                store.release()
        after(number)


def _run_batch(
    cells: Sequence[PromptCell],
    store: PrefillStore,
    number: int,
    batch: Sequence[Prompt],
    answers: dict[str, list[int]],
) -> None:
    waiting = [cell for cell in cells if cell.missing(number, batch)]
    needs = frozenset[str]().union(*(cell.context.method.traits.needs for cell in waiting))
    for prompt in batch:
        store.get(prompt.prefill_ids, needs)
    for cell in cells:
        for part in cell.missing(number, batch):
            try:
                cell.measure(part, number, batch)
            except Exception as error:
                cell.ended = outcome_of(error)
        if not cell.context.method.selects and number in cell.records.get("answers", {}):
            for sample in cell.records["answers"][number]["samples"]:
                answers[sample["sample_id"]] = sample["tokens"]


def outcome_of(error: Exception) -> Outcome:
    """Return the row of a cell that an error ended.

    If decode steps did not all go through the method it is ``wrong``; if memory ran out,
    ``out_of_memory``. Any other exception is raised again.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MethodBypassedError):
        return Outcome([TaskRow("mean", status="wrong", reason=text[:500])], [])
    is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        # torch has no separate exception class for running out of CPU memory
        type(error) is RuntimeError and "can't allocate memory" in text
    )
    if not is_memory:
        raise error
    return Outcome([TaskRow("mean", status="out_of_memory", reason=text[:200])], [])
