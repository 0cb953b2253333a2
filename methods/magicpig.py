"""MagicPIG: keys sampled by locality-sensitive hashing, weighted by how likely they are drawn."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from topkbench.kernels.hash_encode.api import hash_encode
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
from topkbench.methods.draws import draw_tokens
from topkbench.methods.states import at_slots

FLOOR = 1e-4
"""Added to an inclusion probability, so that no weight is beyond bounds."""

CODE_BITS = 16
"""Bits that a bucket's number is kept in: more than it has, for one code of no token."""


@dataclass(kw_only=True)
class MagicPIGIndex(Index):
    """The prompt's tokens in hash tables, a bucket after the other; later tokens are in none.

    Attributes:
        entries: int32 ``[B, Hkv, L, capacity]`` slots, sorted by bucket; unused after the prompt.
        first: int32 ``[B * Hkv * L, 2**K + 1]`` where each bucket begins in its table, and the end.
        mean: float32 ``[B * Hkv, d]`` of the prompt's keys.
        planes: float32 ``[1, d, 16 L]`` normals of the hyperplanes, for each table K and then
            zeros; a table more of zeros where L is odd.
        prompt_end: int32 ``[B]`` end of each row's prompt.
        layer: Index of the layer.
        key_states: ``[B, Hkv, n, d]`` the cached keys, as of the last ``bind``.
    """

    entries: Tensor
    first: Tensor
    mean: Tensor
    planes: Tensor
    prompt_end: Tensor
    layer: int
    key_states: Tensor


@dataclass
class MagicPIGQuery:
    """What a step's queries are.

    Attributes:
        states: ``[B, Hkv, G, d]``.
        codes: int64 ``[B, Hkv, G, L]`` the query's bucket in each table.
    """

    states: Tensor
    codes: Tensor


@dataclass(kw_only=True)
class MagicPIG(TopKMethod):
    """Attend to the keys that share buckets with the query, each divided by its chance to do so.

    A key of the prompt is sampled if all ``hash_bits`` bits agree with the query's in at least
    ``min_collisions`` of ``num_tables`` tables. At an angle t between query and centred key that
    has the probability ``w = P(X >= min_collisions)``, X being binomial of ``num_tables`` trials
    at ``(1 - t / pi) ** hash_bits``; the key's logit is lowered by ``log(w + 1e-4)``, which makes
    the attention over the sample an estimate of attention over everything. Sinks, recents and
    every token decoded since the prompt are attended to as they are. Each query head samples for
    itself, whatever ``head_scope`` says.

    What ``k`` means: under ``protocol="native"`` nothing is capped. The sample is as large as the
    hash tables make it, the prompt's last ``native_local`` tokens are kept at every step, and ``k``
    plays no part. Under
    ``protocol="unified"`` a query head may keep ``k`` tokens (``head_scope="query_head"``), or the
    G heads of a group ``k`` together, the forced ones shared and the rest dealt out equally
    (``kv_head``, so that a KV head never reads more than ``k``). Where the sample is larger, the
    tokens with the most collisions are kept, and of those with the fewest kept, c, a uniform draw.
    The probability then is ``P(X > c) + P(X = c) * drawn / tied``: exact for a threshold c given
    beforehand, and slightly biased as c comes from the sample. Decoded tokens that exceed the
    budget are cut, the oldest first.

    Attributes:
        hash_bits: K, bits of a bucket's number.
        num_tables: L, hash tables.
        min_collisions: Tables in which a key must share the query's bucket.
        native_local: Last tokens of the prompt that the native protocol keeps, outside ``k``.
        seed: Of the hyperplanes, and of draws among ties.

    Source:
        MagicPIG (arXiv:2410.16179), sections 4 and 5. Followed in its released code: keys are
        centred and queries are not; two collisions; the floor of 1e-4; generated tokens exact and
        in no table; one set of hyperplanes for all heads and layers, as its server has it (its
        evaluation draws them per head, for 16 layers at a time). Different: the mean is of all
        prompt keys, there of those between sinks and local ones; attention reads keys as cached,
        since centring shifts all logits of a query alike; there is no cap there.

    Compared with the authors' code:
        ``evaluations/RULER/pred/cache_ref.py`` (Infini-AI-Lab/MagicPIG): run on the same tensors
        with the same hyperplanes and the same mean, the native output agrees to 5e-5, the local
        tokens being the prompt's last 64 and all decoded tokens kept. Differs: the mean is of all
        prompt keys, there of those between sinks and local tokens; there is no cap there.

    The bytes of a step are those of walking the tables: for each query head the two ends of L
    buckets and the entries of 4 bytes in them, counted as they are walked, or before a step was
    taken as many as L buckets hold at right angles, ``L n / 2**K``; then the hyperplanes, and the
    chosen keys once more for their angles. The tables cost 4 L bytes a token, more than half
    precision keys and values; their ``2**K + 1`` bucket ends each, the same for any
    length, are in no figure of bytes per token. In each step their sizes go through the host, so
    it cannot be captured in a CUDA graph.
    """

    name: ClassVar[str] = "magicpig"
    history_dependent: ClassVar[bool] = (
        True  # decoded tokens are kept, and would be sampled if prefilled
    )
    variable_budget: ClassVar[bool] = True

    hash_bits: int = 10
    num_tables: int = 150
    min_collisions: int = 2
    native_local: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for setting in ("hash_bits", "num_tables", "min_collisions"):
            check_whole(setting, getattr(self, setting))
        check_whole("native_local", self.native_local, 0)
        if self.hash_bits > CODE_BITS - 2:  # a sign, and the code of no token
            raise ValueError(f"hash_bits must be at most {CODE_BITS - 2}, got {self.hash_bits}.")
        if self.min_collisions > self.num_tables:
            raise ValueError(
                f"min_collisions must be at most num_tables={self.num_tables}, "
                f"got {self.min_collisions}."
            )

    def build_index(self, prefill: PrefillInputs) -> MagicPIGIndex:
        keys = prefill.key_states
        batch_size, num_kv_heads, n, head_dim = keys.shape
        valid = prefill.valid_slots()[:, None]
        count = valid.sum(-1).clamp_min(1)[..., None]
        mean = keys.float().masked_fill(~valid[..., None], 0).sum(2) / count
        planes = _normals(self.seed, head_dim, self.num_tables, self.hash_bits).to(keys.device)
        shape = (batch_size, num_kv_heads, self.num_tables)
        buckets = 2**self.hash_bits
        entries = torch.zeros(*shape, prefill.capacity, dtype=torch.int32, device=keys.device)
        first = torch.zeros(*shape, buckets + 1, dtype=torch.int32, device=keys.device)
        # Where each table's sizes begin, of its buckets and of what is no token.
        tables = torch.arange(self.num_tables, device=keys.device)[:, None] * (buckets + 1)
        for row in range(batch_size):  # the hashes of a head are many times its keys
            for head in range(num_kv_heads):
                codes = self.codes(keys[row, head].float() - mean[row, head], planes)
                # What is no token goes behind the last bucket, where no query looks.
                codes = codes.masked_fill(~valid[row, 0, :, None], buckets).mT.contiguous()
                entries[row, head, :, :n] = _order(codes)
                places = (codes + tables).flatten()
                sizes = places.bincount(minlength=self.num_tables * (buckets + 1))
                first[row, head, :, 1:] = sizes.view(-1, buckets + 1)[:, :-1].cumsum(1)
        return MagicPIGIndex(
            entries=entries,
            first=first.flatten(0, 2),
            mean=mean.flatten(0, 1),
            planes=planes,
            prompt_end=prefill.bounds()[1].clone(),
            layer=prefill.layer,
            key_states=keys,
            **Index.counts(prefill),
        )

    def append(self, index: MagicPIGIndex, key_states: Tensor, value_states: Tensor) -> None:
        index.advance()  # the key is in the cache, which bind shows

    def bind(self, index: MagicPIGIndex, cache: CacheView) -> None:
        index.key_states = cache.key_states

    def codes(self, states: Tensor, planes: Tensor) -> Tensor:
        """Return the bucket in each table, int16 ``[..., n, L]``, of states ``[..., n, d]``."""
        rows = states.reshape(-1, 1, *states.shape[-2:])
        words = hash_encode(rows, planes, impl=self.impl_for("hash_encode"))
        codes = words.view(torch.int16)[..., : self.num_tables]
        return codes.reshape(*states.shape[:-1], self.num_tables)

    def encode(self, query_states: Tensor, index: MagicPIGIndex) -> MagicPIGQuery:
        return MagicPIGQuery(query_states, self.codes(query_states, index.planes).long())

    def walk(self, encoded: MagicPIGQuery, index: MagicPIGIndex) -> tuple[Tensor, Tensor]:
        """Read the buckets that the queries are in.

        Returns:
            The slots found, int64 ``[hits]``, and which query found each, int64 ``[hits]`` counted
            over ``[B, Hkv, G]``.
        """
        batch_size, num_kv_heads, _, num_tables = encoded.codes.shape
        # The table of each query and hash: [B, Hkv, G, L].
        tables = torch.arange(batch_size * num_kv_heads * num_tables, device=encoded.codes.device)
        tables = tables.view(batch_size, num_kv_heads, 1, num_tables).expand_as(encoded.codes)
        tables, codes = tables.flatten(), encoded.codes.flatten()
        begin = index.first[tables, codes].long()
        size = index.first[tables, codes + 1] - begin
        bucket = torch.arange(len(size), device=size.device).repeat_interleave(size)
        before = size.cumsum(0) - size
        place = torch.arange(len(bucket), device=size.device) - before[bucket] + begin[bucket]
        slots = index.entries.flatten(0, 2)[tables[bucket], place].long()
        return slots, bucket // num_tables

    def score(self, encoded: MagicPIGQuery, index: MagicPIGIndex) -> Tensor:
        """Count the tables in which each key shares the query's bucket, ``[B, Hkv, G, n]``."""
        slots, query = self.walk(encoded, index)
        queries = encoded.codes.shape[:3]
        hits = query * index.length + slots
        size = queries.numel() * index.length
        return torch.bincount(hits, minlength=size).view(*queries, index.length).float()

    def aggregate_over_group(
        self, scores: Tensor | None, policy: Policy, scale: float, softcap: float | None = None
    ) -> Tensor:
        assert scores is not None  # score always scores
        return scores.flatten(1, 2)

    def select(
        self, scores: Tensor | None, encoded: MagicPIGQuery, index: MagicPIGIndex, policy: Policy
    ) -> Selection:
        """Keep what is forced and what collided often enough; ``scores`` are ``[B, Hq, n]``."""
        assert scores is not None
        batch_size, num_heads, n = scores.shape
        group = encoded.states.shape[2]
        start, end = index.row_bounds(batch_size, scores.device)
        slots = torch.arange(n, device=scores.device)
        is_native = policy.protocol == "native"
        # From here on a row is kept as it is: the end of the prompt, what was decoded since then,
        # and recents.
        local = self.native_local if is_native else 0
        exact = torch.minimum(index.prompt_end - local, end - policy.num_recent)
        if not is_native:
            exact = torch.maximum(exact, end - (policy.k - policy.num_sink))
        is_sink = slots < (start + policy.num_sink)[:, None]
        valid = (slots >= start[:, None]) & (slots < end[:, None])
        forced = (valid & (is_sink | (slots >= exact[:, None])))[:, None]
        found = (scores >= self.min_collisions) & ~forced & valid[:, None]

        least = torch.full((batch_size, num_heads), self.min_collisions, device=scores.device)
        share = torch.ones_like(least, dtype=torch.float32)
        if not is_native:
            room = policy.k - forced.sum(-1)
            room = room if policy.head_scope == "query_head" else room // group
            # Whole numbers from the collisions, and a uniform fraction that settles ties.
            drawn = draw_tokens(self.seed, index.layer, num_heads, n, start, end)
            fraction = torch.bitwise_and(drawn, 2**44 - 1).double() * 2.0**-44
            ranked = (scores + fraction).where(found, -torch.inf)
            best = ranked.topk(min(policy.k, n)).values
            last = best.gather(-1, (room - 1).clamp_min(0).expand(-1, num_heads)[..., None])
            kept = found & (ranked >= last) & (room > 0)[..., None]
            tied = found & (scores == last.floor())
            is_cut = found.sum(-1) > kept.sum(-1)
            least = torch.where(is_cut, last[..., 0].floor().clamp_min(0), least)
            among = (tied & kept).sum(-1) / tied.sum(-1).clamp_min(1)
            share = torch.where(is_cut, among, share)
            found = kept
        chosen = found | forced
        width = int(chosen.sum(-1).max())
        indices = slots.where(chosen, n).topk(width, largest=False).values
        held = indices < n
        indices = indices.where(held, 0)
        sampled = held & found.gather(-1, indices)
        chance = self.probability(self._collision(encoded, index, indices), least, share)
        log_weight = torch.where(sampled, -torch.log(chance + FLOOR), 0.0)
        entries = scores.unflatten(1, (-1, group)).sum((2, 3)).long()
        slots = indices.where(held, -1).to(torch.int32)
        return Selection(slots, log_weight=log_weight, scanned=entries)

    def _collision(self, encoded: MagicPIGQuery, index: MagicPIGIndex, slots: Tensor) -> Tensor:
        """Return each slot's chance to share the query's bucket in one table, ``[B, Hq, m]``."""
        batch_size, num_kv_heads, group, head_dim = encoded.states.shape
        keys = at_slots(index.key_states, slots.view(batch_size, num_kv_heads, -1)).float()
        keys = keys - index.mean.view(batch_size, num_kv_heads, 1, head_dim)
        keys = keys.view(batch_size, num_kv_heads, group, -1, head_dim)
        queries = encoded.states.float()[..., None, :]
        cosine = torch.cosine_similarity(queries, keys, dim=-1).clamp(-1, 1)
        return (1 - torch.acos(cosine) / torch.pi).pow(self.hash_bits).flatten(1, 2)

    def probability(self, collision: Tensor, least: Tensor, share: Tensor) -> Tensor:
        """Return ``P(X > least) + share * P(X = least)`` of a binomial X of ``num_tables`` trials.

        Args:
            collision: ``[..., m]`` chance of a trial.
            least: ``[...]`` collisions.
            share: ``[...]`` how many of those with just ``least`` collisions are drawn, 0 to 1.
        """
        # Up to that many hits, not all of num_tables: the rest of the mass is what remains of one.
        hits = torch.arange(int(least.max()) + 1, device=collision.device)
        ways = torch.lgamma(torch.tensor(self.num_tables + 1.0, dtype=torch.double))
        ways = ways - torch.lgamma(hits + 1.0) - torch.lgamma(self.num_tables - hits + 1.0)
        chance = collision.double()[..., None]
        tiny = torch.finfo(chance.dtype).tiny  # a logarithm that zero times it is zero
        hit, miss = chance.clamp_min(tiny).log(), (1 - chance).clamp_min(tiny).log()
        log_mass = ways + hits * hit + (self.num_tables - hits) * miss
        least, share = least[..., None, None], share[..., None, None]
        left_out = torch.where(hits == least, 1 - share, (hits < least).float())
        return (1 - (log_mass.exp() * left_out).sum(-1)).clamp(0, 1).float()

    def index_bytes_per_token(self, geometry: Geometry) -> float:
        return 4.0 * geometry.num_kv_heads * self.num_tables

    def bytes_read_per_step(self, geometry: Geometry, n: int, k: int) -> int:
        return self.bytes_read_by(geometry, n, min(k, n), None)

    def bytes_read_by(self, geometry: Geometry, n: int, read: int, scanned: int | None) -> int:
        group = geometry.num_heads // geometry.num_kv_heads
        at_right_angles = group * self.num_tables * n / 2**self.hash_bits
        walked = at_right_angles if scanned is None else scanned
        entries = round(4 * geometry.num_kv_heads * walked)
        ends = 2 * 4 * geometry.num_heads * self.num_tables
        planes = 4 * geometry.head_dim * self.num_tables * self.hash_bits
        chosen = kv_bytes(geometry, read)
        return ends + entries + planes + chosen + chosen // 2


@lru_cache(maxsize=8)
def _normals(seed: int, head_dim: int, num_tables: int, hash_bits: int) -> Tensor:
    """Draw the normals of hyperplanes, ``[d, L * K]``, and lay them out as the index has them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(head_dim, num_tables * hash_bits, generator=generator)
    drawn = drawn.view(head_dim, num_tables, hash_bits)
    return pad(drawn, (0, CODE_BITS - hash_bits, 0, num_tables % 2)).flatten(1)[None]


def _order(codes: Tensor) -> Tensor:
    """Return the slots of each table by code, ``[L, n]``, those of one code ascending."""
    if codes.device.type == "cpu":  # NumPy sorts 16 bits by radix, many times as fast as torch
        return torch.from_numpy(np.argsort(codes.numpy(), axis=1, kind="stable"))
    return codes.sort(dim=1, stable=True).indices
