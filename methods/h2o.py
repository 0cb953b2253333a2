"""H2O: the tokens that have received the most attention so far, and the most recent ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from topkbench.kernels.topk_select.api import topk_select
from topkbench.methods.base import (
    FollowsAttention,
    Geometry,
    Index,
    PrefillInputs,
    Selection,
    StepContext,
    StepResult,
    Traits,
    key_bytes,
    kv_bytes,
)
from topkbench.methods.eviction import Evicting
from topkbench.methods.sinks import softmax
from topkbench.methods.softcap import capped


@dataclass(kw_only=True)
class H2OIndex(Index):
    """The attention that each token has received.

    Attributes:
        sums: float32 ``[B, Hkv, capacity]``, summed over all queries so far and over the group;
            -inf marks an evicted token.
    """

    sums: Tensor

    def renumber(self, kept: Tensor, capacity: int) -> None:
        kept_sums = self.sums.gather(2, kept.clamp(min=0).long())
        super().renumber(kept, capacity)
        self.sums = kept_sums.new_zeros(*kept_sums.shape[:2], capacity)
        self.sums[:, :, : kept_sums.shape[2]] = kept_sums


@dataclass(kw_only=True)
class H2O(Evicting[H2OIndex], FollowsAttention[H2OIndex]):
    """Keep the heavy hitters (tokens with the largest sum of attention so far) and recents.

    A share ``heavy_share`` of the ``k`` tokens are heavy hitters, including the policy's sinks; the
    others are the most recent tokens, including the current one. Evicted tokens never return. The
    sums start with the attention of all the prompt's queries; every step adds the probabilities of
    the tokens that it attended to.

    Attributes:
        heavy_share: Share of ``k`` that goes to heavy hitters.

    Source:
        H2O (arXiv:2306.14048), section 4 and algorithm 1; half heavy hitters and half recents as in
        its experiments. The released simulation sums columns over all queries, including later
        ones, and so uses the answer's queries; here, as in the paper, a sum is over past queries
        only. The paper's models have no groups: under GQA a KV head's sums are over its query
        heads. The released cache holds k tokens and attends to them and the current one; here the
        current one counts towards k. Keys keep their positions, as in the released cache. The
        shared attention kernel returns no probabilities, so the kept keys are read a second time to
        compute them; these reads are counted.

    Compared with the authors' code:
        ``h2o_hf/utils_real_drop/modify_llama.py`` (FMInference/H2O): results agree when run on the
        same tensors. Differences: the current token counts towards ``k``, there it is additional; a
        group's query heads are summed, where that code has no groups.
    """

    name: ClassVar[str] = "h2o"
    traits: ClassVar[Traits] = Traits(
        needs=frozenset({"column_sums"}), index="history", per_kv_head=True
    )

    heavy_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.heavy_share < 1:
            raise ValueError(
                f"heavy_share must be from 0 to below 1, since the current token is a recent one, "
                f"got {self.heavy_share}."
            )

    def build_index(self, prefill: PrefillInputs) -> H2OIndex:
        keys = prefill.key_states
        if prefill.column_sums is None:
            raise ValueError("h2o needs column_sums of the prompt, got none; capture them.")
        sums = torch.zeros(*keys.shape[:2], prefill.capacity, device=keys.device)
        sums[:, :, : prefill.n] = prefill.column_sums.unflatten(1, (keys.shape[1], -1)).sum(2)
        return H2OIndex(sums=sums, **Index.counts(prefill))

    def append(self, index: H2OIndex, key_states: Tensor, value_states: Tensor) -> None:
        slot = index.advance()
        index.put(index.sums, slot, index.sums.new_zeros(index.sums.shape[:2]))

    def select(self, index: H2OIndex, context: StepContext) -> Selection:
        policy = context.policy
        heavy = max(int(policy.k * self.heavy_share), policy.num_sink)
        num_recent = max(policy.k - heavy, policy.num_recent)
        indices = topk_select(
            index.sums[:, :, : index.length],
            policy.k,
            policy.num_sink,
            num_recent,
            index.kv_start,
            index.kv_len,
            impl=self.impl_for("topk_select"),
        )
        return Selection(indices)

    def update_after_step(self, result: StepResult, index: H2OIndex, context: StepContext) -> None:
        if result.selection is None:
            return
        kept = result.selection.indices.long()
        # A padding entry repeats the first slot, so it writes the same value there.
        slots = torch.where(kept >= 0, kept, kept[..., :1])
        keys = torch.take_along_dim(context.cache.key_states, slots[..., None], 2)
        products = context.query_states.float() @ keys.float().mT
        logits = capped(products * context.scale, context.softcap)
        logits = logits.masked_fill((kept < 0)[:, :, None], -torch.inf)
        weights = softmax(logits, context.sinks).sum(2)
        weights = torch.where(kept >= 0, weights, weights[..., :1])
        sums = index.sums.gather(2, slots) + weights
        index.sums.fill_(-torch.inf)
        index.sums.scatter_(2, slots, sums)

    def index_bytes_per_token(self, geometry: Geometry) -> float:
        return 4.0 * geometry.num_kv_heads

    def bytes_read(self, geometry: Geometry, n: int, read: int, scanned: int | None = None) -> int:
        sums = round(self.tokens_in_memory(n, read) * self.index_bytes_per_token(geometry))
        kept = kv_bytes(geometry, read) + key_bytes(geometry, read)
        return sums + kept + self.moved_bytes(geometry, n, read)
