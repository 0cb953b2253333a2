"""Random selection, the lower baseline that every method should beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from topkbench.methods.base import Index, Policy, PrefillInputs, Selection, TopKMethod
from topkbench.methods.draws import draw_tokens


@dataclass(kw_only=True)
class RandomIndex(Index):
    """What a draw depends on besides a token's position.

    Attributes:
        layer: Index of the layer.
        device: Device of the selection.
    """

    layer: int
    device: torch.device


@dataclass(kw_only=True)
class RandomSelection(TopKMethod):
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

    def build_index(self, prefill: PrefillInputs) -> RandomIndex:
        device = prefill.key_states.device
        return RandomIndex(layer=prefill.layer, device=device, **Index.counts(prefill))

    def append(self, index: RandomIndex, key_states: Tensor, value_states: Tensor) -> None:
        index.advance()

    def encode(self, query_states: Tensor, index: RandomIndex) -> torch.Size:
        """Return ``(B, Hkv, G)``, all that the selection needs of the queries."""
        return query_states.shape[:3]

    def score(self, encoded: torch.Size, index: RandomIndex) -> None:
        return None

    def select(
        self, scores: Tensor | None, encoded: torch.Size, index: RandomIndex, policy: Policy
    ) -> Selection:
        batch_size, num_kv_heads, group = encoded
        num_heads = num_kv_heads * (group if policy.head_scope == "query_head" else 1)
        start, end = index.row_bounds(batch_size, index.device)
        drawn = draw_tokens(self.seed, index.layer, num_heads, index.length, start, end) >> 32
        # int32's lowest value is reserved for missing units.
        drawn = drawn.clamp(min=-(2**31) + 1).to(torch.int32)
        return super().select(drawn, encoded, index, policy)
