"""Exact top-k: the oracle that ranks by true attention weights, and so reads every key."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from topkbench.kernels.lowrank_score.api import lowrank_score
from topkbench.methods.base import (
    Geometry,
    Index,
    PrefillInputs,
    ScoreKind,
    ScoringMethod,
    StepContext,
    key_bytes,
    kv_bytes,
)


@dataclass(kw_only=True)
class ExactTopK(ScoringMethod[Index, Tensor]):
    """Keep the tokens with the largest attention weight, summed over the group's queries.

    Source:
        The oracle of HATA's released code that selects once per KV head. Here it ranks in float32,
        there in half precision.

    Compared with the authors' code:
        It has no code of its own. The rule is that of HATA's
        ``python/myTransformer/cache/kvcache_topk.py`` (gpzlx1/HATA), which was read, not run.
        Differences: HATA's scripts force 64 first and 96 last tokens inside ``k``, and its code
        ranks in half precision.
    """

    name: ClassVar[str] = "exact"
    score_kind: ClassVar[ScoreKind] = "logit"

    def build_index(self, prefill: PrefillInputs) -> Index:
        return Index.of(prefill)  # the keys themselves are in the cache

    def append(self, index: Index, key_states: Tensor, value_states: Tensor) -> None:
        index.advance()

    def score(self, encoded: Tensor, index: Index, context: StepContext) -> Tensor:
        keys, impl = context.cache.key_states, self.impl_for("lowrank_score")
        return lowrank_score(encoded, keys, index.kv_start, index.kv_len, impl=impl)

    def bytes_read(self, geometry: Geometry, n: int, read: int, scanned: int | None = None) -> int:
        # Two passes: every key for scoring, then keys and values of the selected tokens.
        return key_bytes(geometry, n) + kv_bytes(geometry, read)
