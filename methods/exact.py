"""Exact top-k: the oracle that ranks by true attention weights, and so reads every key."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from topkbench.kernels.lowrank_score.api import lowrank_score
from topkbench.methods.base import (
    CacheView,
    Geometry,
    Index,
    PrefillInputs,
    TopKMethod,
    kv_bytes,
)


@dataclass(kw_only=True)
class ExactIndex(Index):
    """The cached keys ``[B, Hkv, n, d]`` themselves, from the last ``bind``."""

    key_states: Tensor


@dataclass(kw_only=True)
class ExactTopK(TopKMethod):
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
    score_kind: ClassVar[Literal["logit", "count"]] = "logit"

    def build_index(self, prefill: PrefillInputs) -> ExactIndex:
        return ExactIndex(key_states=prefill.key_states, **Index.counts(prefill))

    def append(self, index: ExactIndex, key_states: Tensor, value_states: Tensor) -> None:
        index.advance()  # the key itself is in the cache, see bind

    def bind(self, index: ExactIndex, cache: CacheView) -> None:
        index.key_states = cache.key_states

    def score(self, encoded: Tensor, index: ExactIndex) -> Tensor:
        if index.key_states.shape[2] < index.length:
            raise ValueError(
                f"the index must be bound to the cache's {index.length} slots, got "
                f"{index.key_states.shape[2]}; call bind before score."
            )
        impl = self.impl_for("lowrank_score")
        return lowrank_score(encoded, index.key_states, index.kv_start, index.kv_len, impl=impl)

    def bytes_read_per_step(self, geometry: Geometry, n: int, k: int) -> int:
        # Two passes: every key for scoring, then keys and values of the selected tokens.
        return kv_bytes(geometry, n) // 2 + kv_bytes(geometry, min(k, n))
