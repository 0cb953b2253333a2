"""Runs cells prompt by prompt: each prompt is prefilled once for all cells that need it.

Only the states of one batch of prompts are in memory, whatever the number of prompts and cells.
"""

import functools
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch

from topkbench.harness.batch_size import most_prompts
from topkbench.harness.decoding import Prompt, batches, by_subtask, known_tokens
from topkbench.harness.device_use import using
from topkbench.harness.task import TIMED, Context, Outcome, Task, TaskRow
from topkbench.methods.base import KnownTokens, cache_bytes, check_whole
from topkbench.models.attach import geometry_of
from topkbench.models.load import LoadedModel, free_bytes
from topkbench.models.prefill_store import PrefillStore
from topkbench.models.step_count import MethodBypassedError

Record = dict[str, Any]
"""What was measured for one part of a cell on one batch: plain values that JSON can hold. A batch
for which memory was short has several, each with ``share``, the number of its prompts."""


@dataclass(frozen=True)
class Steps:
    """Decode steps, one for each token of each row; at most, as an answer may end early.

    Attributes:
        forwards: Forwards of the model in which they are run.
        own: Steps with the cell's method.
        full: Steps with full attention, with which the method is compared.
    """

    forwards: int = 0
    own: int = 0
    full: int = 0


@dataclass(frozen=True)
class Plan:
    """What a cell measures, known before anything is decoded.

    Attributes:
        parts: The prompts on which each part is measured, by part and sample id.
        kept: The sample ids of the prompts of which the tokens that the heads kept are recorded.
    """

    parts: Mapping[str, frozenset[str]]
    kept: frozenset[str] = frozenset()

    def measured(self, part: str, batch: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts of a batch on which a part is measured."""
        wanted = self.parts.get(part, frozenset())
        return [prompt for prompt in batch if prompt.sample.sample_id in wanted]


class PromptTask(Task):
    """A task that is measured prompt by prompt.

    Attributes:
        batch_size: At most this many prompts decode together; ``"auto"`` until a sweep has chosen.
        together: The parts that decode a batch's prompts together; the others go one by one.
    """

    batch_size: int | Literal["auto"]
    together: ClassVar[frozenset[str]] = frozenset()

    def check_batch_size(self) -> None:
        """Check the setting.

        Raises:
            ValueError: If it is neither a whole number above 0 nor ``"auto"``.
        """
        if self.batch_size != "auto":
            check_whole("task.batch_size", self.batch_size)

    def decided(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size}

    @abstractmethod
    def tokenised(self, loaded: LoadedModel) -> list[Prompt]:
        """Return the prompts for a model; the same for every method."""

    @abstractmethod
    def plan(self, context: Context, prompts: Sequence[Prompt]) -> Plan | Outcome:
        """Return what a cell measures; its rows if that is known without decoding."""

    @abstractmethod
    def measure(self, context: Context, plan: Plan, part: str, prompts: Sequence[Prompt]) -> Record:
        """Measure a part on the prompts of one batch that it concerns."""

    def steps(self, context: Context, plan: Plan, part: str, prompts: Sequence[Prompt]) -> Steps:
        """Return the decode steps of a part on the prompts of one batch that it concerns."""
        questions = [len(prompt.decode_ids) for prompt in prompts]
        answers = [prompt.sample.max_new_tokens for prompt in prompts]
        known = known_tokens(context.loaded, context.answering, questions)
        return decode_steps(known, questions, answers)

    def trial(
        self, context: Context, plan: Plan, part: str, prompts: Sequence[Prompt]
    ) -> tuple[Record, float]:
        """Measure a part in short, to see how long it takes.

        Returns:
            The record, and how many times as long measuring the whole part takes.
        """
        return self.measure(context, plan, part, prompts), 1.0

    @abstractmethod
    def outcome(
        self,
        context: Context,
        plan: Plan,
        prompts: Sequence[Prompt],
        records: Mapping[str, Sequence[Record]],
    ) -> Outcome:
        """Return the rows and samples of a cell, given each part's records in order of prompts."""

    def num_batches(self, loaded: LoadedModel) -> int:
        """Return in how many batches a model's prompts are measured, once the size is chosen."""
        assert self.batch_size != "auto", "it is chosen before"
        return len(batches(self.tokenised(loaded), self.batch_size))

    def memory(self, loaded: LoadedModel) -> tuple[int, int]:
        """Return the bytes of the longest prompt's keys and values, and those free on the device.

        Args:
            loaded: The model.
        """
        tokens = max(
            prompt.num_tokens + prompt.sample.max_new_tokens for prompt in self.tokenised(loaded)
        )
        geometry = geometry_of(loaded.model)
        all_layers = cache_bytes(geometry, tokens)
        return all_layers, free_bytes(loaded.model.device)

    def run(self, context: Context) -> Outcome:
        if self.batch_size == "auto":
            self.batch_size = most_prompts(*self.memory(context.loaded))
        cell = PromptCell.of(context, self, self.tokenised(context.loaded))
        run_by_prompts([cell], context.store)
        return cell.result()


def decode_steps(known: KnownTokens, questions: Sequence[int], answers: Sequence[int]) -> Steps:
    """Return the steps of decoding a batch.

    Args:
        known: How the questions' tokens are decoded.
        questions: Tokens of each row that are known beforehand.
        answers: Tokens of each row's answer, the last of which is never fed back.
    """
    rows = [
        question + max(0, answer - 1) for question, answer in zip(questions, answers, strict=True)
    ]
    forwards = max(rows)
    if known != "one by one":
        forwards = any(questions) + max(0, max(answers) - 1)
    return Steps(forwards, own=sum(rows))


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
    records: dict[str, dict[int, list[Record]]] = field(default_factory=dict)
    ended: Outcome | None = None
    seconds: float = 0.0
    _unfinished: dict[str, list[Record]] = field(default_factory=dict)

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
        assert self.task.batch_size != "auto", "it is chosen before"
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

    def measure(self, part: str, number: int, share: Sequence[Prompt]) -> None:
        """Measure a part on a batch; an error that makes a row of its own ends the cell.

        Where memory runs out, one half of the prompts is measured after the other.

        Args:
            part: The part.
            number: The batch.
            share: Its prompts, or the next ones of them if memory is short for all.
        """
        began = time.perf_counter()
        batch = self.batches[number]
        whole = self.plan.measured(part, batch)
        sizes = Counter(prompt.sample.subtask for prompt in whole)
        records = self._unfinished.setdefault(part, [])
        waiting = by_subtask(self.plan.measured(part, share))
        is_halved = False
        while waiting and self.ended is None:
            prompts = waiting.pop(0)
            if is_halved:  # nothing refers to the states of the other half any more
                self.context.store.release()
            try:
                with using(self.context.loaded.model.device, alone=part == TIMED):
                    record = self.task.measure(self.context, self.plan, part, prompts)
            except Exception as error:
                if len(prompts) == 1 or not is_out_of_memory(error):
                    culprits = self._culprits(part, prompts, error)
                    self.ended = self.outcome_of(error, f"{part} of {named(culprits)}")
                    break
                waiting[:0] = halves(prompts)
                is_halved = True
            else:
                is_whole = len(prompts) == sizes[prompts[0].sample.subtask]
                records.append(record if is_whole else {**record, "share": len(prompts)})
                continue
            self.note(f"memory ran out in {part} of {named(prompts)}: halved")
        is_last = share[-1].sample.sample_id == batch[-1].sample.sample_id
        if is_last and self.ended is None:
            try:
                self.keep(part, number, self._unfinished.pop(part))
            except Exception as error:  # a number that is not finite
                self.ended = self.outcome_of(error, f"{part} of {named(whole)}")
        self.seconds += time.perf_counter() - began

    def _culprits(self, part: str, prompts: Sequence[Prompt], error: Exception) -> Sequence[Prompt]:
        """Return the prompt that an error comes from; all, if no half of them fails by itself."""
        while len(prompts) > 1 and not isinstance(error, MethodBypassedError):
            failing = next((half for half in halves(prompts) if self._fails(part, half)), None)
            if failing is None:
                break
            prompts = failing
        return prompts

    def _fails(self, part: str, prompts: Sequence[Prompt]) -> bool:
        self.context.store.release()
        try:
            self.task.measure(self.context, self.plan, part, prompts)
        except Exception:
            return True
        return False

    def keep(self, part: str, number: int, records: list[Record]) -> None:
        """Add a batch's records."""
        self.records[part][number] = records

    def answers(self, number: int) -> dict[str, list[int]]:
        """Return the answer tokens of a batch by sample id, as far as they are decoded."""
        records = self.records.get("answers", {}).get(number) or self._unfinished.get("answers", [])
        return {one["sample_id"]: one["tokens"] for record in records for one in record["samples"]}

    def outcome_of(self, error: Exception, place: str) -> Outcome:
        """Return the row of a cell that an error ended, or raise it again.

        Args:
            error: The error.
            place: The part and the prompts that were measured.
        """
        return outcome_of(error)

    def note(self, text: str) -> None:
        """Tell the user, where there is a console."""

    def refresh(self) -> None:
        """Read what other processes have measured."""

    def read_others(self) -> None:
        """Read what other processes have measured; if it is something else, the cell has ended."""
        try:
            self.refresh()
        except Exception as error:
            self.ended = self.outcome_of(error, "")

    def result(self) -> Outcome:
        """Return the rows and samples, once everything has been measured."""
        if self.ended is not None:
            return self.ended
        records = {
            part: [record for number in sorted(by_batch) for record in by_batch[number]]
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
    prefilling: Callable[[int], AbstractContextManager[object]] = nullcontext,
    after: Callable[[], None] = lambda: None,
    numbers: Sequence[int] | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
    after_batch: Callable[[], None] = lambda: None,
) -> None:
    """Measure what is missing of cells over the same prompts, batch by batch.

    Args:
        cells: The cells, full attention first: its answers are what others are measured on.
        store: The prompts' prefills; only those of one batch are kept.
        claim: Claims batches, so that no two processes measure the same.
        prefilling: Given the number of a batch, returns a context in which it is prefilled; it
            raises MemoryError if that has killed the process too often.
        after: Called whenever something was measured, or by another process.
        numbers: The batches to measure; None for all.
        is_stopped: Whether to leave the batches that are not begun.
        after_batch: Called after each batch.
    """
    answers: dict[str, list[int]] = {}  # full attention's, whichever cell decodes them
    for cell in cells:
        answers |= cell.context.full_answers
        cell.context = replace(cell.context, full_answers=answers)
    if numbers is None:
        numbers = range(len(cells[0].batches) if cells else 0)
    for wait in (False, True):  # batches that other processes measure come last
        for number in numbers:
            if not any(cell.missing(number) for cell in cells) or is_stopped():
                continue
            with claim(number, wait) as is_mine:
                if is_mine:
                    _run_batch(cells, store, number, answers, prefilling, after)
            store.release()
            after()
            after_batch()


def _run_batch(
    cells: Sequence[PromptCell],
    store: PrefillStore,
    number: int,
    answers: dict[str, list[int]],
    prefilling: Callable[[int], AbstractContextManager[object]],
    after: Callable[[], None],
) -> None:
    for cell in cells:
        cell.read_others()
        if not cell.context.method.selects:
            answers |= cell.answers(number)
    waiting = [cell for cell in cells if cell.missing(number)]
    needs = frozenset[str]().union(*(cell.context.method.traits.needs for cell in waiting))
    shares = [cells[0].batches[number]] if waiting else []
    while shares:
        share = shares.pop(0)
        try:
            # What a prefill takes is part of a cell's speed.
            is_timed = any(TIMED in cell.missing(number) for cell in waiting)
            with prefilling(number), using(store.model.device, alone=is_timed):
                is_prefilled = _can_prefill(share, store, needs)
        except MemoryError as error:
            for cell in waiting:
                cell.ended = outcome_of(error)
            after()
            return
        if not is_prefilled:
            waiting[0].note(f"memory ran out in the prefill of {named(share)}: halved")
            store.release()
            shares[:0] = halves(share)
            continue
        for cell in waiting:
            for part in cell.missing(number):
                cell.measure(part, number, share)
            if not cell.context.method.selects:
                answers |= cell.answers(number)
            after()
        if shares:  # memory was short for all of them at a time
            store.release()


def _can_prefill(prompts: Sequence[Prompt], store: PrefillStore, needs: frozenset[str]) -> bool:
    """Prefill prompts; return False if memory is short for all of them, but perhaps not for half.

    Any other error is left to the cells, each of which meets it again and says so in its row.
    """
    try:
        for prompt in prompts:
            store.get(prompt.prefill_ids, needs)
    except Exception as error:
        return len(prompts) == 1 or not is_out_of_memory(error)
    return True


def halves(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Return the first half of some prompts, which is not the smaller one, and the second."""
    middle = (len(prompts) + 1) // 2
    return [list(prompts[:middle]), list(prompts[middle:])]


def named(prompts: Sequence[Prompt]) -> str:
    """Return the ids of the first and the last prompt."""
    first, last = prompts[0].sample.sample_id, prompts[-1].sample.sample_id
    return first if len(prompts) == 1 else f"{first} to {last}"


def message_of(error: Exception) -> str:
    """Return an error's message in one line; its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        # torch has no separate exception class for a CPU's memory, nor for that of a library
        isinstance(error, RuntimeError) and any(one in str(error) for one in words)
    )


def outcome_of(error: Exception) -> Outcome:
    """Return the row of a cell that an error ended.

    If decode steps did not all go through the method it is ``wrong``; if memory ran out,
    ``out_of_memory``. Any other exception is raised again.
    """
    text = message_of(error)
    if isinstance(error, MethodBypassedError):
        return Outcome([TaskRow("mean", status="wrong", reason=text[:500])], [])
    if not is_out_of_memory(error):
        raise error
    return Outcome([TaskRow("mean", status="out_of_memory", reason=text[:200])], [])
