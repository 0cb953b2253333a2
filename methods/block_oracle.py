"""Oracle page selection: the pages with the largest true attention weights."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from topkbench.kernels.lowrank_score.api import lowrank_score
from topkbench.methods.base import (
    Geometry,
    Index,
    PrefillInputs,
    Ranking,
    ScoreKind,
    ScoringMethod,
    Selection,
    StepContext,
    check_whole,
    key_bytes,
    kv_bytes,
)
from topkbench.methods.pages import PagedIndex, page_slots, select_pages


@dataclass(kw_only=True)
class BlockOracle(ScoringMethod[PagedIndex, Tensor]):
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
    score_kind: ClassVar[ScoreKind] = "logit"

    page_size: int = 16

    def __post_init__(self) -> None:
        check_whole("page_size", self.page_size)

    def build_index(self, prefill: PrefillInputs) -> PagedIndex:
        return PagedIndex(page_size=self.page_size, **Index.counts(prefill))

    def append(self, index: PagedIndex, key_states: Tensor, value_states: Tensor) -> None:
        index.advance()  # the keys themselves are in the cache

    def score(self, encoded: Tensor, index: PagedIndex, context: StepContext) -> Tensor:
        """Return the tokens' logits in page order, ``[B, Hkv, G, pages * page_size]``."""
        keys, impl = context.cache.key_states, self.impl_for("lowrank_score")
        logits = lowrank_score(encoded, keys, index.kv_start, index.kv_len, impl=impl)
        slots, is_token = page_slots(
            keys.shape[2], len(keys), self.page_size, keys.device, index.kv_start, index.kv_len
        )
        slots = slots[:, None, None].expand(*logits.shape[:3], -1)
        return logits.gather(-1, slots).masked_fill(~is_token[:, None, None], -torch.inf)

    def aggregate(self, scores: Tensor, context: StepContext) -> Tensor:
        """Reduce logits to the selecting heads and to each page's maximum: ``[B, H, pages]``."""
        tokens = super().aggregate(scores, context)
        return tokens.unflatten(-1, (-1, self.page_size)).amax(-1)

    def select(
        self, ranking: Ranking[Tensor], index: PagedIndex, context: StepContext
    ) -> Selection:
        return select_pages(ranking.scores, index, context.policy, self.impl_for("topk_select"))

    def bytes_read(self, geometry: Geometry, n: int, read: int, scanned: int | None = None) -> int:
        # Two passes: every key for scoring, then keys and values of the selected pages.
        return key_bytes(geometry, n) + kv_bytes(geometry, read)
