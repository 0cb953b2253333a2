"""Oracle page selection: the pages with the largest true attention weights."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from topkbench.kernels.lowrank_score.api import lowrank_score
from topkbench.methods.base import (
    CacheView,
    Geometry,
    Index,
    Policy,
    PrefillInputs,
    Selection,
    TopKMethod,
    check_whole,
    kv_bytes,
)
from topkbench.methods.pages import PagedIndex, page_slots, page_tokens_read, select_pages


@dataclass(kw_only=True)
class BlockOracleIndex(PagedIndex):
    """The cached keys ``[B, Hkv, n, d]`` themselves, from the last ``bind``."""

    key_states: Tensor


@dataclass(kw_only=True)
class BlockOracle(TopKMethod):
    """Keep the pages whose best token has the largest true attention weight.

    No rule for selecting pages beats it, so it separates what a method loses by selecting whole
    pages from what it loses by estimating scores. A page's score is the largest of its tokens'
    scores. A token's score follows the policy: the softmax weight summed over the group
    (``aggregation="native"``), its maximum over the group, or the summed logit; under
    ``head_scope="query_head"`` it is the query's own logit.

    Attributes:
        page_size: Tokens per page.

    Source:
        ``compute_oracle_sparse_mask`` of SeerAttention-R (arXiv:2506.08889). That code takes the
        maximum weight over the group (here the native policy), where the unified policy sums, and
        has pages of 64 tokens; here they are 16, to compare with Quest. Budget and forced pages are
        those of Quest.

    Compared with the authors' code:
        ``seer_attn/decode_sparse/attn_gate_inf.py`` (microsoft/SeerAttention) was read, not run.
        Differences: pages of 16 tokens instead of 64; under the unified protocol a group's weights
        are summed instead of taking their maximum.
    """

    name: ClassVar[str] = "block_oracle"
    score_kind: ClassVar[Literal["logit", "count"]] = "logit"

    page_size: int = 16

    def __post_init__(self) -> None:
        check_whole("page_size", self.page_size)

    def build_index(self, prefill: PrefillInputs) -> BlockOracleIndex:
        counts = Index.counts(prefill)
        keys = prefill.key_states
        return BlockOracleIndex(key_states=keys, page_size=self.page_size, **counts)

    def append(self, index: BlockOracleIndex, key_states: Tensor, value_states: Tensor) -> None:
        index.advance()  # the key itself is in the cache, see bind

    def bind(self, index: BlockOracleIndex, cache: CacheView) -> None:
        index.key_states = cache.key_states

    def score(self, encoded: Tensor, index: BlockOracleIndex) -> Tensor:
        """Return the tokens' logits in page order, ``[B, Hkv, G, pages * page_size]``."""
        keys = index.key_states
        if keys.shape[2] < index.length:
            raise ValueError(
                f"the index must be bound to the cache's {index.length} slots, got "
                f"{keys.shape[2]}; call bind before score."
            )
        impl = self.impl_for("lowrank_score")
        logits = lowrank_score(encoded, keys, index.kv_start, index.kv_len, impl=impl)
        slots, is_token = page_slots(
            keys.shape[2], len(keys), self.page_size, keys.device, index.kv_start, index.kv_len
        )
        slots = slots[:, None, None].expand(*logits.shape[:3], -1)
        return logits.gather(-1, slots).masked_fill(~is_token[:, None, None], -torch.inf)

    def aggregate_over_group(
        self, scores: Tensor | None, policy: Policy, scale: float, softcap: float | None = None
    ) -> Tensor | None:
        """Reduce logits to the selecting heads and to each page's maximum: ``[B, H, pages]``."""
        tokens = super().aggregate_over_group(scores, policy, scale, softcap)
        assert tokens is not None  # score always scores
        return tokens.unflatten(-1, (-1, self.page_size)).amax(-1)

    def select(
        self, scores: Tensor | None, encoded: Tensor, index: BlockOracleIndex, policy: Policy
    ) -> Selection:
        assert scores is not None
        return select_pages(scores, index, policy, self.impl_for("topk_select"))

    def bytes_read_per_step(self, geometry: Geometry, n: int, k: int) -> int:
        chosen = page_tokens_read(n, k, self.page_size)
        return self.bytes_read_by(geometry, n, chosen, None)

    def bytes_read_by(self, geometry: Geometry, n: int, read: int, scanned: int | None) -> int:
        # Two passes: every key for scoring, then keys and values of the selected pages.
        return kv_bytes(geometry, n) // 2 + kv_bytes(geometry, read)
