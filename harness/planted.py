"""Random attention states with something to find, at any geometry; no model is needed."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from topkbench.methods.base import QUERY_TAIL, Geometry
from topkbench.models.capture import Captured

NEEDLES = 8
MEMORY_SHARE = 0.5  # of the free memory; what needs more is skipped
BLOCK = 4096  # tokens that are drawn; more are made of them
CALIBRATION_TOKENS = 256


@dataclass
class PlantedStates:
    """Random keys, and queries that look for a few of them: attention with something to find.

    Attributes:
        query_states: ``[B, Hkv, G, d]``.
        key_states: ``[B, Hkv, n, d]``, the newest token included.
        value_states: ``[B, Hkv, n, d]``.
    """

    query_states: Tensor
    key_states: Tensor
    value_states: Tensor

    @classmethod
    def draw(
        cls, geometry: Geometry, batch_size: int, n: int, dtype: torch.dtype, seed: int
    ) -> "PlantedStates":
        """Draw normal states on the geometry's device, with 8 needles in every head.

        A needle is a key near one of the group's queries. Drawing hundreds of millions of numbers
        takes longer than timing them, so one block of tokens is drawn for the heads of a row and
        repeated over slots and rows, each time with the signs of other channels turned: states stay
        normal, no key occurs twice, and the logits of two repetitions are nearly independent, so
        that a selection is spread as among keys drawn one by one. All is written in place and in
        its dtype; beside the states there is never more than one block.
        """
        generator = torch.Generator().manual_seed(seed)
        heads, d, device = geometry.num_kv_heads, geometry.head_dim, geometry.device
        group = geometry.num_heads // heads
        queries = torch.randn(batch_size, heads, group, d, generator=generator).to(device, dtype)
        states = []
        for _ in range(2):
            drawn = torch.randn(heads, min(n, BLOCK), d, generator=generator).to(device, dtype)
            held = torch.empty(batch_size, heads, n, d, dtype=dtype, device=device)
            for row in held:
                for part in row.split(BLOCK, dim=1):
                    turns = torch.randint(2, (heads, 1, d), generator=generator) * 2 - 1
                    torch.mul(drawn[:, : part.shape[1]], turns.to(device, dtype), out=part)
            states.append(held)
        keys, values = states
        needles = torch.randperm(n, generator=generator)[:NEEDLES]
        for place, slot in enumerate(needles.tolist()):
            keys[:, :, slot] += 2 * queries[:, :, place % group]
        return cls(queries, keys, values)

    def copy(self) -> "PlantedStates":
        """Return the same states in other memory."""
        return PlantedStates(
            self.query_states.clone(), self.key_states.clone(), self.value_states.clone()
        )


def capture(needs: frozenset[str], key_states: Tensor, num_heads: int, scale: float) -> Captured:
    """Capture what a method needs of prompts that nobody read, in the time that real ones take.

    The queries are random: whose they are does not matter to the time. The attention that tokens
    received is that of queries at all positions; a query tail takes the last ones alone. Prompts
    are read one by one, so the milliseconds of a batch are the sum of its rows'.

    Args:
        needs: One of ``PREFILL_NEEDS`` or more.
        key_states: ``[B, Hkv, n, d]``.
        num_heads: Query heads.
        scale: The attention's factor on dot products.
    """
    n, head_dim = key_states.shape[2:]
    wanted = n if "column_sums" in needs else min(n, QUERY_TAIL)
    generator = torch.Generator().manual_seed(0)
    shape = (1, num_heads, min(wanted, BLOCK), head_dim)
    # Drawn once, as all queries would take more room than the keys.
    queries = torch.randn(shape, generator=generator).to(key_states)
    Captured(needs).update(queries[:, :, :QUERY_TAIL], key_states[:1], scale)  # the first is slower
    rows = []
    for row in key_states.split(1):
        captured = Captured(needs)
        for begin in range(n - wanted, n, BLOCK):
            end = min(begin + BLOCK, n)
            captured.update(queries[:, :, : end - begin], row[:, :, :end], scale)
        rows.append(captured)
    joined = Captured.batch(rows, n, key_states.device)
    joined.milliseconds = {need: sum(row.milliseconds[need] for row in rows) for need in needs}
    return joined


@dataclass
class PlantedCalibration:
    """Short planted sequences for methods that must be fitted to run at all.

    What is learned from them is no better than chance and costs what a good one costs: the time is
    the same.
    """

    sequences: int
    drawn: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    num_layers: int = 1

    @classmethod
    def of(cls, planted: PlantedStates) -> "PlantedCalibration":
        """Cut two short sequences out of planted states, so that a fit takes seconds."""
        keys, group = planted.key_states[0], planted.query_states.shape[2]
        size = min(CALIBRATION_TOKENS, keys.shape[1])
        pieces = [keys[:, begin : begin + size].float() for begin in (0, keys.shape[1] - size)]
        drawn = [(piece.repeat_interleave(group, 0), piece) for piece in pieces]
        return cls(len(drawn), drawn)

    def states(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Return each sequence's ``[Hq, n, d]`` queries and ``[Hkv, n, d]`` keys."""
        return self.drawn
