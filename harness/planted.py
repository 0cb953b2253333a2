"""Random attention states with a few planted needles, at any geometry; no model is needed."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from topkbench.methods.base import QUERY_TAIL, Geometry
from topkbench.methods.captured import Captured

NEEDLES = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY_SHARE = 0.5  # of the free memory; rows that need more are skipped
BLOCK = 4096  # tokens that are drawn at random; longer states repeat them
CALIBRATION_TOKENS = 256


@dataclass
class PlantedStates:
    """Random keys and values, and queries that attend strongly to a few of the keys.

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
        cls,
        geometry: Geometry,
        batch_size: int,
        n: int,
        dtype: torch.dtype,
        seed: int,
        num_needles: int = NEEDLES,
    ) -> "PlantedStates":
        """Draw normal states on the geometry's device, with some needles in every head.

        A needle is a key near one of the group's queries; it outweighs all other keys. Drawing
        hundreds of millions of numbers takes longer than timing them, so one block of tokens is
        drawn for the heads of a row and repeated over slots and rows, each time with the signs of
        random channels flipped: states stay normal, no key occurs twice, and the logits of two
        repetitions are nearly independent, so a selection is spread as if every key had been drawn
        independently. States are written in place in their dtype; besides them, there is never more
        than one block in memory.
        """
        generator = torch.Generator().manual_seed(seed)
        heads, d, device = geometry.num_kv_heads, geometry.head_dim, geometry.device
        group = geometry.num_heads // heads
        queries = torch.randn(batch_size, heads, group, d, generator=generator).to(device, dtype)
        states = []
        for _ in range(2):
            block = torch.randn(heads, min(n, BLOCK), d, generator=generator).to(device, dtype)
            whole = torch.empty(batch_size, heads, n, d, dtype=dtype, device=device)
            for row in whole:
                for part in row.split(BLOCK, dim=1):
                    signs = torch.randint(2, (heads, 1, d), generator=generator) * 2 - 1
                    torch.mul(block[:, : part.shape[1]], signs.to(device, dtype), out=part)
            states.append(whole)
        keys, values = states
        needles = torch.randperm(n, generator=generator)[:num_needles]
        for number, slot in enumerate(needles.tolist()):
            keys[:, :, slot] += 2 * queries[:, :, number % group]
        return cls(queries, keys, values)

    def copy(self) -> "PlantedStates":
        """Return a copy of the states in new memory."""
        return PlantedStates(
            self.query_states.clone(), self.key_states.clone(), self.value_states.clone()
        )


def capture(needs: frozenset[str], key_states: Tensor, num_heads: int, scale: float) -> Captured:
    """Capture what a method needs at prefill, from random queries, in the time that real ones take.

    The time does not depend on the queries' values. Column sums use queries at all positions, a
    query tail only the last ones. Prompts are captured one by one, so the milliseconds of a batch
    are the sum over its rows.

    Args:
        needs: A subset of ``PREFILL_NEEDS``, not empty.
        key_states: ``[B, Hkv, n, d]``.
        num_heads: Query heads.
        scale: Factor on the dot products of the attention.
    """
    n, head_dim = key_states.shape[2:]
    num_queries = n if "column_sums" in needs else min(n, QUERY_TAIL)
    generator = torch.Generator().manual_seed(0)
    shape = (1, num_heads, min(num_queries, BLOCK), head_dim)
    # One block is drawn and reused, as queries at all positions would take more memory than the
    # keys.
    queries = torch.randn(shape, generator=generator).to(key_states)
    Captured(needs).update(queries[:, :, :QUERY_TAIL], key_states[:1], scale)  # warm-up
    rows = []
    for row in key_states.split(1):
        captured = Captured(needs)
        for begin in range(n - num_queries, n, BLOCK):
            end = min(begin + BLOCK, n)
            captured.update(queries[:, :, : end - begin], row[:, :, :end], scale)
        rows.append(captured)
    joined = Captured.batch(rows, n, key_states.device)
    joined.milliseconds = {need: sum(row.milliseconds[need] for row in rows) for need in needs}
    return joined


def drawn_capture(needs: frozenset[str], key_states: Tensor, num_heads: int) -> Captured:
    """Return made-up values of what a method needs at prefill, where only decode steps are timed.

    Their size and dtype are those of `capture`, which may take minutes on a long prompt: it
    computes the whole prompt's attention. How long capturing takes is not known.

    Args:
        needs: A subset of ``PREFILL_NEEDS``.
        key_states: ``[B, Hkv, n, d]``.
        num_heads: Query heads.
    """
    batch_size, _, n, head_dim = key_states.shape
    generator = torch.Generator(key_states.device).manual_seed(0)
    captured = Captured(needs)
    if "query_tail" in needs:
        tail = key_states.new_empty(batch_size, num_heads, min(n, QUERY_TAIL), head_dim)
        captured.query_tail = tail.normal_(generator=generator)
    if "column_sums" in needs:
        sums = torch.empty(batch_size, num_heads, n, device=key_states.device)
        captured.column_sums = sums.uniform_(generator=generator)
    return captured


@dataclass
class PlantedCalibration:
    """Short planted sequences for methods that cannot run without being fitted.

    A method fitted on them selects no better than chance, but takes the same time as a well-fitted
    one.
    """

    sequences: int
    drawn: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    num_layers: int = 1

    @classmethod
    def of(cls, planted: PlantedStates) -> "PlantedCalibration":
        """Return two short sequences cut out of planted states, so that a fit takes seconds."""
        keys, group = planted.key_states[0], planted.query_states.shape[2]
        size = min(CALIBRATION_TOKENS, keys.shape[1])
        pieces = [keys[:, begin : begin + size].float() for begin in (0, keys.shape[1] - size)]
        drawn = [(piece.repeat_interleave(group, 0), piece) for piece in pieces]
        return cls(len(drawn), drawn)

    def states(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Return each sequence's ``[Hq, n, d]`` queries and ``[Hkv, n, d]`` keys."""
        return self.drawn
