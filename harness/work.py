"""What a group of cells has still to do, before anything runs: batches, decode steps, memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from topkbench.harness.card import Card
from topkbench.harness.decoding import Prompt, by_subtask, prefilled_once
from topkbench.harness.reads import Reads, dense_bytes, layer_bytes_read, layers_read
from topkbench.harness.run import Run
from topkbench.harness.runner import JournaledCell
from topkbench.harness.sweep import Steps
from topkbench.harness.task import Context
from topkbench.methods.base import QUERY_TAIL, cache_bytes, kv_bytes


@dataclass(eq=False)
class PlannedCell:
    """A cell of a sweep that is planned.

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


@dataclass(frozen=True)
class PartOfBatch:
    """A part of a cell that is to be measured on one batch.

    Attributes:
        cell: The cell.
        part: The part.
        prompts: The prompts of the batch that it concerns; of a part in which prompts decode
            together those of one sub-task.
    """

    cell: PlannedCell
    part: str
    prompts: Sequence[Prompt]

    @property
    def steps(self) -> Steps:
        """Its decode steps."""
        measured = self.cell.measured
        return measured.task.steps(measured.context, measured.plan, self.part, self.prompts)

    @property
    def is_together(self) -> bool:
        """Whether the prompts decode together."""
        return self.part in self.cell.measured.task.together


class Work:
    """What the cells of a group that are measured prompt by prompt have still to measure.

    Args:
        cells: The cells, full attention first.
    """

    def __init__(self, cells: Sequence[PlannedCell]) -> None:
        self._cells = cells
        numbers = range(len(cells[0].measured.batches))
        self.missing = [
            number for number in numbers if any(cell.measured.missing(number) for cell in cells)
        ]

    @property
    def cells(self) -> list[PlannedCell]:
        """The cells that have something to measure."""
        return [
            cell
            for cell in self._cells
            if not cell.reason and any(map(cell.measured.missing, self.missing))
        ]

    @property
    def context(self) -> Context:
        """The context of the first cell; all have the same model and known answers."""
        return self._cells[0].measured.context

    @property
    def batches(self) -> list[list[Prompt]]:
        """The batches of which something is missing."""
        return [self._cells[0].measured.batches[number] for number in self.missing]

    @property
    def prompts(self) -> list[Prompt]:
        """Their prompts."""
        return [prompt for batch in self.batches for prompt in batch]

    @property
    def prefills(self) -> list[list[Prompt]]:
        """One prompt for each prefill of these batches."""
        return [prefilled_once(batch) for batch in self.batches]

    @property
    def needs(self) -> frozenset[str]:
        """What must be captured at prefill for some cell."""
        needs = (cell.measured.context.method.traits.needs for cell in self.cells)
        return frozenset[str]().union(*needs)

    def of_batch(self, number: int) -> Iterator[PartOfBatch]:
        """Yield what is to be measured on a batch."""
        for cell in self.cells:
            for part in cell.measured.missing(number):
                prompts = cell.measured.plan.measured(part, cell.measured.batches[number])
                is_together = part in cell.measured.task.together
                for some in by_subtask(prompts) if is_together else [prompts]:
                    yield PartOfBatch(cell, part, some)

    def parts(self) -> list[PartOfBatch]:
        """Return everything that is to be measured, batch by batch."""
        return [one for number in self.missing for one in self.of_batch(number)]

    def steps(self) -> dict[str, int]:
        """Return the decode steps of each part, with the method and with full attention."""
        found: dict[str, int] = {}
        for one in self.parts():
            steps = one.steps
            found[one.part] = found.get(one.part, 0) + steps.own + steps.full
        return found

    def memory(self) -> dict[str, float]:
        """Return the bytes that the largest batch needs on the device, by what they are for."""
        geometry = self.context.geometry
        most = max(one.num_tokens + one.sample.max_new_tokens for one in self.prompts)
        rows = max(map(len, self.prefills))
        layers = rows * len(geometry.global_layers)
        captured = 0
        if "query_tail" in self.needs:
            captured += QUERY_TAIL * geometry.num_heads * geometry.head_dim * geometry.dtype_bytes
        if "column_sums" in self.needs:
            captured += 4 * geometry.num_heads * most
        index = max(
            cell.measured.context.method.index_bytes_per_token(geometry) for cell in self.cells
        )
        return {
            "weights": self.context.loaded.model.get_memory_footprint(),
            "keys and values": rows * cache_bytes(geometry, most),
            "captured states": layers * captured,
            "largest index": layers * most * index,
        }

    def seconds_on(self, card: Card) -> list[dict[str, float]]:
        """Return the seconds that each batch takes at least on a card, by part.

        These are those of the model's multiplications and of the bytes that it reads, by the card's
        published figures. Other work, and the time between kernels, is left out.
        """
        model, geometry = self.context.loaded.model, self.context.geometry
        # A token goes through each weight once; the output's are used for the last one alone.
        output = model.get_output_embeddings()
        linear = [one for one in model.modules() if isinstance(one, torch.nn.Linear)]
        numbers = sum(layer.weight.numel() for layer in linear if layer is not output)
        weights = numbers * geometry.dtype_bytes
        channels = len(geometry.global_layers) * geometry.num_heads * geometry.head_dim
        found = []
        for number, once in zip(self.missing, self.prefills, strict=True):
            # Two products of n²/2 pairs, each of a multiplication and an addition a channel, in the
            # layers that attend to the whole past; the others' work is left out.
            prefills = [
                card.seconds(2 * numbers * n + 2 * channels * n**2, weights)
                for n in (len(prompt.prefill_ids) for prompt in once)
            ]
            seconds = {"prefill": sum(prefills)}
            for one in self.of_batch(number):
                steps, n = one.steps, round(prefilled(one.prompts))
                num_bytes = steps.forwards * weights
                num_bytes += steps.own * step_bytes(one.cell.measured.context, n)
                num_bytes += steps.full * len(geometry.global_layers) * kv_bytes(geometry, n)
                operations = 2.0 * numbers * (steps.own + steps.full)
                more = card.seconds(operations, num_bytes)
                seconds[one.part] = seconds.get(one.part, 0.0) + more
            found.append(seconds)
        return found


def prefilled(prompts: Sequence[Prompt]) -> float:
    """Return the mean of the prefilled tokens of some prompts."""
    return sum(len(one.prefill_ids) for one in prompts) / len(prompts)


def step_bytes(context: Context, n: int) -> int:
    """Return the bytes of keys, values and index that a step over ``n`` tokens reads."""
    geometry, k = context.geometry, context.effective_policy.k
    sparse, dense = layers_read(context, n)
    of_layer = layer_bytes_read(context.method, geometry, n, k, Reads(min(k, n)))
    return sparse * of_layer + dense_bytes(geometry, dense)
