"""PQCache: keys ranked by product-quantised codes, whose codebook is made of each prompt."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from topkbench.kernels.code_score.api import code_score
from topkbench.methods.base import (
    Geometry,
    Index,
    Policy,
    PrefillInputs,
    TopKMethod,
    check_whole,
    kv_bytes,
)
from topkbench.methods.states import slots_within

# Distances held at once: on a CPU what its second-level cache holds, elsewhere for few launches.
CPU_BLOCK, BLOCK = 2**18, 2**26


@dataclass(kw_only=True)
class PQCacheIndex(Index):
    """The keys' codes, and the centroids that they name.

    Attributes:
        key_codes: uint8 ``[B, Hkv, capacity, m]`` nearest centroid of each part of a key.
        centroids: float32 ``[B, Hkv, m, 2 ** bits, d / m]``, of the prompt.
    """

    key_codes: Tensor
    centroids: Tensor


@dataclass(kw_only=True)
class PQCache(TopKMethod):
    """Rank keys by the dot product of the query with the centroids that stand for them.

    A key is cut into parts, and each part is known by the nearest of ``2 ** bits`` centroids, which
    k-means finds among the prompt's keys, for each row, KV head and part. A step multiplies the
    query with the centroids once, and a key's score is the sum of its parts' products. A group's
    scores are the sum of its queries' softmax of them: under the native protocol over the
    candidates, which are neither sinks nor recents, under the unified protocol over all tokens.

    Attributes:
        parts: Parts of a key, a divisor of ``head_dim``.
        bits: Of a part's code, at most 8.
        iterations: Of k-means, always as many.
        seed: Draws the tokens that k-means starts from.
        sinks: First tokens that the native policy keeps, at most a quarter of ``k``.
        local_share: Share of ``k`` that is the last tokens, under the native protocol alone.

    Source:
        PQCache (arXiv:2407.12820), section 3, and its code: 2 parts of 6 bits, softmax of the
        approximate logits summed over the group, 32 sinks and half of the budget recent. There
        k-means runs on a CPU for as many iterations as the prefill leaves time for, on all keys
        but the sinks, and codes are int64; here on all keys of the row, for a fixed number. There
        the 32 sinks and the current token stand beside the budget. Here, as for every method, they
        are inside ``k``: sinks take at most a quarter of it, and the current token is the last of
        the recents. A code is a byte, where packed ones would
        take ``bits / 8``. Tokens decoded later take the nearest centroid and move none, so building
        anew with them gives other codes. The centroids, ``4 * 2 ** bits * d`` bytes for a KV head,
        are the same for any length and in no figure of bytes per token; each step reads them.

    Compared with the authors' code:
        ``vq_method/retrieval_based/pq_search.py`` (HugoZHL/PQCache): run on the same codes and
        centroids, the native selection agrees to 0.99 or more in each of 20 draws, ties decided
        apart (the unified one to 0.61 at least). Differs: sinks and the current token are inside
        ``k``, there beside it; k-means sees the sinks' keys too, and has a fixed number of
        iterations.
    """

    name: ClassVar[str] = "pqcache"
    score_kind: ClassVar[Literal["logit", "count"]] = "logit"
    fits_prompt: ClassVar[bool] = True

    parts: int = 2
    bits: int = 6
    iterations: int = 10
    seed: int = 0
    sinks: int = 32
    local_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("parts", "bits", "iterations"):
            check_whole(name, getattr(self, name))
        check_whole("sinks", self.sinks, least=0)
        if self.bits > 8:
            raise ValueError(f"bits must be at most 8, as a code is one byte, got {self.bits}.")
        if not 0 <= self.local_share <= 0.75:
            raise ValueError(
                f"local_share must be a share from 0 to 0.75, got {self.local_share}; sinks may "
                "take the other quarter."
            )

    def unsupported(self, geometry: Geometry) -> str | None:
        if geometry.head_dim % self.parts:
            return f"parts must divide head_dim={geometry.head_dim}, got {self.parts}."
        return None

    def effective_policy(self, policy: Policy) -> Policy:
        policy = super().effective_policy(policy)
        if policy.protocol == "native":
            sinks = min(self.sinks, policy.k // 4)
            policy = replace(policy, num_sink=sinks, num_recent=int(self.local_share * policy.k))
        return policy

    def build_index(self, prefill: PrefillInputs) -> PQCacheIndex:
        keys = prefill.key_states
        batch_size, num_kv_heads, n, _ = keys.shape
        start, end = prefill.bounds()
        valid = slots_within(n, start, end)
        # What is outside the valid range may be anything, also not a number.
        parts = self._split(keys.float().masked_fill(~valid[:, None, :, None], 0))
        states = parts.flatten(0, 2)
        held = valid[:, None, None].expand(parts.shape[:4]).flatten(0, 2).float()
        places = self._start(start.long(), end.long()).clamp(max=max(n - 1, 0))
        chosen = places[:, None, None, :, None].expand(*parts.shape[:3], -1, parts.shape[4])
        centroids = parts.gather(3, chosen).flatten(0, 2)
        for _ in range(self.iterations):
            centroids = _lloyd(states, held, centroids)
        codes = torch.zeros(
            batch_size, num_kv_heads, prefill.capacity, self.parts,
            dtype=torch.uint8, device=keys.device,
        )  # fmt: skip
        nearest = _nearest(states, centroids).unflatten(0, parts.shape[:3])
        codes[:, :, :n] = nearest.permute(0, 1, 3, 2)
        centroids = centroids.unflatten(0, parts.shape[:3])
        return PQCacheIndex(key_codes=codes, centroids=centroids, **Index.counts(prefill))

    def _split(self, states: Tensor) -> Tensor:
        """Return ``[B, Hkv, m, n, d / m]`` of ``[B, Hkv, n, d]``."""
        return states.unflatten(3, (self.parts, -1)).transpose(2, 3)

    def _start(self, start: Tensor, end: Tensor) -> Tensor:
        """Return int64 ``[B, 2 ** bits]`` slots to start from: one drawn of each stretch of a row.

        A row with no more tokens than centroids has each of them.
        """
        count = 2**self.bits
        generator = torch.Generator().manual_seed(self.seed)
        steps = torch.arange(count)
        drawn = (steps + torch.rand(count, generator=generator, dtype=torch.float64)) / count
        length = (end - start).clamp_min(1)[:, None]
        spread = (drawn.to(start.device) * length).long()
        each = steps.to(start.device) % length
        return start[:, None] + torch.where(length <= count, each, spread)

    def append(self, index: PQCacheIndex, key_states: Tensor, value_states: Tensor) -> None:
        slot = index.advance()
        parts = self._split(key_states.float())
        codes = _nearest(parts.flatten(0, 2), index.centroids.flatten(0, 2))
        index.put(index.key_codes, slot, codes.view(parts.shape[:3]).to(torch.uint8))

    def encode(self, query_states: Tensor, index: PQCacheIndex) -> Tensor:
        """Return each query's product with each centroid, float32 ``[B, Hkv, m, G, 2 ** bits]``."""
        return (self._split(query_states.float()) @ index.centroids.mT).float()

    def score(self, encoded: Tensor, index: PQCacheIndex) -> Tensor:
        codes = index.key_codes[:, :, : index.length]
        impl = self.impl_for("code_score")
        return code_score(encoded, codes, index.kv_start, index.kv_len, impl=impl)

    def aggregate_over_group(
        self, scores: Tensor | None, policy: Policy, scale: float, softcap: float | None = None
    ) -> Tensor | None:
        assert scores is not None  # code_score always scores
        if policy.protocol == "native":
            # A row's tokens are the same for all heads: what is absent scores minus infinity.
            place = (scores[:, :1, :1] != -torch.inf).cumsum(-1)
            last = place[..., -1:]
            forced = (place <= policy.num_sink) | (place > last - policy.num_recent)
            scores = scores.masked_fill(forced, -torch.inf)  # kept whatever they score
        return super().aggregate_over_group(scores, policy, scale, softcap)

    def index_bytes_per_token(self, geometry: Geometry) -> float:
        return float(geometry.num_kv_heads * self.parts)

    def bytes_read_per_step(self, geometry: Geometry, n: int, k: int) -> int:
        centroids = 4 * geometry.num_kv_heads * geometry.head_dim * 2**self.bits
        side = round(n * self.index_bytes_per_token(geometry))
        return side + centroids + kv_bytes(geometry, min(k, n))


def _nearest(states: Tensor, centroids: Tensor) -> Tensor:
    """Return the nearest of ``[P, C, e]`` centroids to ``[P, n, e]`` states; of equals the lower.

    On a CPU argmin looks at one number at a time. Here vectors do the same: what equals the least
    distance is marked, the marks are weighed by their place, and the first is the least again.

    Returns:
        int64 ``[P, n]``.
    """
    problems, count, _ = centroids.shape
    # |x - c|^2 less |x|^2, which is the same for all centroids.
    norms = centroids.square().sum(2)[:, None]
    places = torch.arange(1.0 - count, 1.0, device=states.device)
    distances = CPU_BLOCK if states.device.type == "cpu" else BLOCK
    size = max(64, distances // max(1, problems * count))
    # The same memory for all blocks: fresh pages cost as much as the products.
    room = states.new_empty(problems, min(size, states.shape[1]), count)
    found = []
    for block in states.split(size, dim=1):
        distance = room[:, : block.shape[1]]
        torch.baddbmm(norms, block, centroids.mT, alpha=-2, out=distance)
        marks = distance.eq_(distance.amin(2, keepdim=True))
        found.append(marks.mul_(places).amin(2))
    return torch.cat(found, dim=1).long() + (count - 1)


def _lloyd(states: Tensor, held: Tensor, centroids: Tensor) -> Tensor:
    """Return the means of the states nearest to each centroid; without any it stays.

    Args:
        states: ``[P, n, e]``, zero where nothing is held.
        held: ``[P, n]``, 1 for a valid token, else 0.
        centroids: ``[P, C, e]``.
    """
    problems, count, _ = centroids.shape
    first = torch.arange(0, problems * count, count, device=states.device)
    nearest = (_nearest(states, centroids) + first[:, None]).flatten()
    sums = torch.zeros_like(centroids).flatten(0, 1).index_add_(0, nearest, states.flatten(0, 1))
    counts = torch.zeros_like(sums[:, :1]).index_add_(0, nearest, held.view(-1, 1))
    means = sums / counts.clamp_min(1)
    return torch.where(counts > 0, means, centroids.flatten(0, 1)).view_as(centroids)
