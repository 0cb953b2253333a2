"""Random selection, the lower baseline that every method should beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from topkbench.methods.base import (
    Index,
    PrefillInputs,
    QueryIndependentMethod,
    Selection,
    StepContext,
    check_whole,
    top_units,
)
from topkbench.methods.draws import draw_tokens


@dataclass(kw_only=True)
class RandomSelection(QueryIndependentMethod[Index]):
    """Keep sinks, recents and a uniform sample of the other tokens, drawn again at every step.

    A draw depends on the seed, the layer, the head, the token's position in its row and the row's
    length, but not on the batch, the padding or earlier draws.

    Attributes:
        seed: Seed of the draws.

    Source:
        None: it is a baseline. A method that does not beat it selects no better than chance.

    Compared with the authors' code:
        None to compare with: it is not a published method.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("seed", self.seed, least=0)

    def build_index(self, prefill: PrefillInputs) -> Index:
        return Index.of(prefill)

    def append(self, index: Index, key_states: Tensor, value_states: Tensor) -> None:
        index.advance()

    def select(self, index: Index, context: StepContext) -> Selection:
        batch_size, num_kv_heads, group, _ = context.query_states.shape
        policy, device = context.policy, context.cache.device
        num_heads = num_kv_heads * (group if policy.head_scope == "query_head" else 1)
        start, end = index.row_bounds(batch_size, device)
        drawn = draw_tokens(self.seed, context.layer, num_heads, index.length, start, end) >> 32
        # int32's lowest value is reserved for missing units.
        drawn = drawn.clamp(min=-(2**31) + 1).to(torch.int32)
        return top_units(drawn, index, policy, self.impl_for("topk_select"))
