"""PQCache: keys ranked by product quantisation, with a codebook computed from each prompt."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from topkbench.kernels.code_score.api import code_score
from topkbench.methods.base import (
    Geometry,
    Index,
    Policy,
    PrefillInputs,
    ScoreKind,
    ScoringMethod,
    StepContext,
    Traits,
    check_whole,
    kv_bytes,
)
from topkbench.methods.states import slots_within

# Distances computed at once: on a CPU as many as fit its L2 cache, on a GPU enough to need only few
# kernel launches.
CPU_BLOCK, BLOCK = 2**18, 2**26


@dataclass(kw_only=True)
class PQCacheIndex(Index):
    """The keys' codes and the codebook.

    Attributes:
        key_codes: uint8 ``[B, Hkv, capacity, m]`` nearest centroid of each part of a key.
        centroids: float32 ``[B, Hkv, m, 2 ** bits, d / m]``, computed from the prompt.
    """

    key_codes: Tensor
    centroids: Tensor


@dataclass(kw_only=True)
class PQCache(ScoringMethod[PQCacheIndex, Tensor]):
    """Rank keys by the dot product of the query with their product-quantised approximations.

    A key is split into parts, and each part is represented by the nearest of ``2 ** bits``
    centroids, which k-means computes from the prompt's keys for each row, KV head and part. A step
    multiplies the query with the centroids once, and a key's score is the sum of its parts'
    products. A group's scores are the sum of its queries' softmax over these: under the native
    protocol over the tokens that are neither sinks nor recents, under the unified protocol over all
    tokens.

    Attributes:
        parts: Parts of a key, a divisor of ``head_dim``.
        bits: Bits of a part's code, at most 8.
        iterations: Iterations of k-means, a fixed number.
        seed: Seed of the draw of k-means' initial centroids.
        sinks: First tokens that the native policy keeps, at most a quarter of ``k``.
        local_share: Share of ``k`` for the last tokens, used under the native protocol only.

    Source:
        PQCache (arXiv:2407.12820), section 3, and its code: 2 parts of 6 bits, softmax of the
        approximate logits summed over the group, 32 sinks and half of the budget recent. There
        k-means runs on a CPU for as many iterations as the prefill leaves time for, on all keys
        except the sinks, and codes are int64; here it runs on all keys of the row, for a fixed
        number of iterations. There the 32 sinks and the current token are additional to the budget.
        Here, as for every method, they count towards ``k``: sinks take at most a quarter of it, and
        the current token is the last of the recents. A code takes a byte, where packed codes would
        take ``bits / 8``. Decoded tokens get the nearest centroid and do not change the centroids,
        so rebuilding the index with them gives other codes. The centroids, ``4 * 2 ** bits * d``
        bytes per KV head, are independent of the length and not included in bytes per token; each
        step reads them.

    Compared with the authors' code:
        ``vq_method/retrieval_based/pq_search.py`` (HugoZHL/PQCache): run on the same codes and
        centroids, the native selection agrees to 0.99 or more in each of 20 draws, apart from ties
        (the unified one to 0.61 at least). Differences: sinks and the current token count towards
        ``k``, there they are additional; k-means uses the sinks' keys too, and has a fixed number
        of iterations.
    """

    name: ClassVar[str] = "pqcache"
    score_kind: ClassVar[ScoreKind] = "logit"
    traits: ClassVar[Traits] = Traits(index="prompt")  # the codebook

    parts: int = 2
    bits: int = 6
    iterations: int = 10
    seed: int = 0
    sinks: int = 32
    local_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("parts", "bits", "iterations"):
            check_whole(name, getattr(self, name))
        for name in ("sinks", "seed"):
            check_whole(name, getattr(self, name), least=0)
        if self.bits > 8:
            raise ValueError(f"bits must be at most 8, as a code is one byte, got {self.bits}.")
        if not 0 <= self.local_share <= 0.75:
            raise ValueError(
                f"local_share must be a share from 0 to 0.75, got {self.local_share}; sinks may "
                "take the other quarter."
            )

    def unsupported_reason(self, geometry: Geometry, policy: Policy | None = None) -> str | None:
        if geometry.head_dim % self.parts:
            return f"parts must divide head_dim={geometry.head_dim}, got {self.parts}."
        return super().unsupported_reason(geometry, policy)

    def native_policy(self, policy: Policy) -> Policy:
        sinks, recent = min(self.sinks, policy.k // 4), int(self.local_share * policy.k)
        return replace(super().native_policy(policy), num_sink=sinks, num_recent=recent)

    def build_index(self, prefill: PrefillInputs) -> PQCacheIndex:
        keys = prefill.key_states
        batch_size, num_kv_heads, n, _ = keys.shape
        start, end = prefill.bounds()
        valid = slots_within(n, start, end)
        # Slots outside the valid range may hold anything, including NaN.
        parts = self._split(keys.float().masked_fill(~valid[:, None, :, None], 0))
        states = parts.flatten(0, 2)
        is_token = valid[:, None, None].expand(parts.shape[:4]).flatten(0, 2).float()
        initial = self._initial_slots(start.long(), end.long()).clamp(max=max(n - 1, 0))
        initial = initial[:, None, None, :, None].expand(*parts.shape[:3], -1, parts.shape[4])
        centroids = parts.gather(3, initial).flatten(0, 2)
        for _ in range(self.iterations):
            centroids = _lloyd(states, is_token, centroids)
        codes = torch.zeros(
            batch_size, num_kv_heads, prefill.capacity, self.parts,
            dtype=torch.uint8, device=keys.device,
        )  # fmt: skip
        nearest = _nearest(states, centroids).unflatten(0, parts.shape[:3])
        codes[:, :, :n] = nearest.permute(0, 1, 3, 2)
        centroids = centroids.unflatten(0, parts.shape[:3])
        return PQCacheIndex(key_codes=codes, centroids=centroids, **Index.counts(prefill))

    def _split(self, states: Tensor) -> Tensor:
        """Split states ``[B, Hkv, n, d]`` into parts ``[B, Hkv, m, n, d / m]``."""
        return states.unflatten(3, (self.parts, -1)).transpose(2, 3)

    def _initial_slots(self, start: Tensor, end: Tensor) -> Tensor:
        """Return int64 ``[B, 2 ** bits]`` slots of the keys that k-means starts from.

        One is drawn from each of ``2 ** bits`` equal stretches of a row. A row with no more tokens
        than centroids uses all its tokens.
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

    def encode(self, index: PQCacheIndex, context: StepContext) -> Tensor:
        """Return each query's product with each centroid, float32 ``[B, Hkv, m, G, 2 ** bits]``."""
        return (self._split(context.query_states.float()) @ index.centroids.mT).float()

    def score(self, encoded: Tensor, index: PQCacheIndex, context: StepContext) -> Tensor:
        codes = index.key_codes[:, :, : index.length]
        impl = self.impl_for("code_score")
        return code_score(encoded, codes, index.kv_start, index.kv_len, impl=impl)

    def aggregate(self, scores: Tensor, context: StepContext) -> Tensor:
        policy = context.policy
        if policy.protocol == "native":
            # Valid tokens are counted by their finite scores, which are the same for all heads.
            position = (scores[:, :1, :1] != -torch.inf).cumsum(-1)
            last = position[..., -1:]
            forced = (position <= policy.num_sink) | (position > last - policy.num_recent)
            scores = scores.masked_fill(forced, -torch.inf)  # select keeps them in any case
        return super().aggregate(scores, context)

    def index_bytes_per_token(self, geometry: Geometry) -> float:
        return float(geometry.num_kv_heads * self.parts)

    def bytes_read(self, geometry: Geometry, n: int, read: int, scanned: int | None = None) -> int:
        centroids = 4 * geometry.num_kv_heads * geometry.head_dim * 2**self.bits
        side = round(n * self.index_bytes_per_token(geometry))
        return side + centroids + kv_bytes(geometry, read)


def _nearest(states: Tensor, centroids: Tensor) -> Tensor:
    """Return the nearest of ``[P, C, e]`` centroids to each of ``[P, n, e]`` states.

    Of equal distances the lower centroid is chosen. Equals argmin, which is not vectorised on a
    CPU: entries equal to the minimum are marked, marks are multiplied by an index that is negative
    and rises with the position, and the minimum of these is the first mark.

    Returns:
        int64 ``[P, n]``.
    """
    problems, count, _ = centroids.shape
    # |x - c|^2 less |x|^2, which is the same for all centroids.
    norms = centroids.square().sum(2)[:, None]
    negative_index = torch.arange(1.0 - count, 1.0, device=states.device)
    distances = CPU_BLOCK if states.device.type == "cpu" else BLOCK
    size = max(64, distances // max(1, problems * count))
    # One buffer for all blocks, as allocating new pages costs as much as the products.
    buffer = states.new_empty(problems, min(size, states.shape[1]), count)
    first_marks = []
    for block in states.split(size, dim=1):
        distance = buffer[:, : block.shape[1]]
        torch.baddbmm(norms, block, centroids.mT, alpha=-2, out=distance)
        marks = distance.eq_(distance.amin(2, keepdim=True))
        first_marks.append(marks.mul_(negative_index).amin(2))
    return torch.cat(first_marks, dim=1).long() + (count - 1)


def _lloyd(states: Tensor, is_token: Tensor, centroids: Tensor) -> Tensor:
    """Return each centroid's new position, the mean of its nearest states, after one iteration.

    A centroid without states stays where it is.

    Args:
        states: ``[P, n, e]``, zeros for invalid tokens.
        is_token: ``[P, n]``, 1 for a valid token, else 0.
        centroids: ``[P, C, e]``.
    """
    problems, count, _ = centroids.shape
    first = torch.arange(0, problems * count, count, device=states.device)
    nearest = (_nearest(states, centroids) + first[:, None]).flatten()
    sums = torch.zeros_like(centroids).flatten(0, 1).index_add_(0, nearest, states.flatten(0, 1))
    counts = torch.zeros_like(sums[:, :1]).index_add_(0, nearest, is_token.view(-1, 1))
    means = sums / counts.clamp_min(1)
    return torch.where(counts > 0, means, centroids.flatten(0, 1)).view_as(centroids)
