"""MagicPIG: keys sampled by locality-sensitive hashing, weighted by inverse probability."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from topkbench.kernels.hash_encode.api import hash_encode
from topkbench.methods.base import (
    Geometry,
    Index,
    PrefillInputs,
    Ranking,
    ScoringMethod,
    Selection,
    StepContext,
    Traits,
    check_whole,
    kv_bytes,
)
from topkbench.methods.draws import draw_tokens
from topkbench.methods.states import at_slots

FLOOR = 1e-4
"""Added to an inclusion probability, to bound the weights."""

CODE_BITS = 16
"""Bits that store a bucket's number: more than it has, so that one code can mark no token."""


@dataclass(kw_only=True)
class MagicPIGIndex(Index):
    """Hash tables of the prompt's tokens; decoded tokens are in none.

    Attributes:
        entries: int32 ``[B, Hkv, L, capacity]`` slots, sorted by bucket; unused after the prompt.
        starts: int32 ``[B, Hkv, L, 2**K + 1]`` each bucket's start in its table, and the end.
        mean: float32 ``[B, Hkv, d]`` mean of the prompt's keys.
        planes: float32 ``[1, d, 16 L]`` normals of the hyperplanes: K per table, padded with zeros
            to 16, and one more table of zeros if L is odd.
        prompt_end: int32 ``[B]`` end of each row's prompt.
        layer: Index of the layer.
    """

    entries: Tensor
    starts: Tensor
    mean: Tensor
    planes: Tensor
    prompt_end: Tensor
    layer: int

    without_rows: ClassVar[frozenset[str]] = frozenset({"planes"})

    def grow(self, capacity: int) -> None:
        self.capacity = capacity  # decoded tokens are in no table


@dataclass(kw_only=True)
class MagicPIG(ScoringMethod[MagicPIGIndex, Tensor]):
    """Attend to the keys that share hash buckets with the query, weighted by inverse probability.

    A key of the prompt is sampled if all ``hash_bits`` bits agree with the query's in at least
    ``min_collisions`` of ``num_tables`` tables. At an angle t between query and centred key, its
    probability is ``w = P(X >= min_collisions)``, where X is binomial with ``num_tables`` trials of
    probability ``(1 - t / pi) ** hash_bits``. Subtracting ``log(w + 1e-4)`` from the key's logit
    makes attention over the sample an estimate of attention over all keys. Sinks, recents and all
    decoded tokens are attended to with weight 1. Each query head has its own sample, regardless of
    ``head_scope``.

    What ``k`` means: under ``protocol="native"`` nothing is capped. The hash tables determine the
    size of the sample, the prompt's last ``native_local`` tokens are kept at every step, and ``k``
    has no effect. Under ``protocol="unified"`` a query head may keep ``k`` tokens
    (``head_scope="query_head"``), or the G heads of a group ``k`` in all, with the forced tokens
    shared and the rest of the budget divided equally (``kv_head``, so that a KV head never reads
    more than ``k``). If the sample is larger, the tokens with the most collisions are kept. Let c
    be the fewest collisions of a kept token: of the tokens with c collisions a uniform draw is
    kept, and a token's probability becomes ``P(X > c) + P(X = c) * drawn / tied``. That is exact
    for a threshold c fixed beforehand, and slightly biased since c comes from the sample. Decoded
    tokens beyond the budget are dropped, the oldest first.

    Attributes:
        hash_bits: K, bits of a bucket's number.
        num_tables: L, number of hash tables.
        min_collisions: Number of tables in which a key must share the query's bucket.
        native_local: Last tokens of the prompt that the native protocol keeps, outside ``k``.
        seed: Seed of the hyperplanes and of draws among ties.

    Source:
        MagicPIG (arXiv:2410.16179), sections 4 and 5. As in its released code: keys are centred and
        queries are not; two collisions; the floor of 1e-4; generated tokens are attended to exactly
        and are in no table; one set of hyperplanes for all heads and layers, as in its server (its
        evaluation draws them per head, for 16 layers at a time). Differences: the mean is over all
        prompt keys, there over those between sinks and local tokens; attention reads keys as
        cached, since centring shifts all logits of a query by the same amount; there is no cap
        there.

    Compared with the authors' code:
        ``evaluations/RULER/pred/cache_ref.py`` (Infini-AI-Lab/MagicPIG): run on the same tensors
        with the same hyperplanes and the same mean, the native output agrees to 5e-5, where the
        prompt's last 64 tokens are local and all decoded tokens are kept. Differences: the mean is
        over all prompt keys, there over those between sinks and local tokens; there is no cap
        there.

    The bytes of a step are those of reading the tables: for each query head both ends of L buckets
    and the entries in them, of 4 bytes each. Entries are counted as they are read; before any step
    they are estimated as those of L buckets for keys at right angles, ``L n / 2**K``. To these add
    the hyperplanes, and a second read of the selected keys for their angles. The tables cost 4 L
    bytes per token, more than half-precision keys and values; the ``2**K + 1`` bucket ends of each
    table, independent of the length, are not included in bytes per token. At each step the buckets'
    sizes are copied to the host, so a step cannot be captured in a CUDA graph.
    """

    name: ClassVar[str] = "magicpig"
    # Decoded tokens are always kept; as prompt tokens they would be sampled.
    traits: ClassVar[Traits] = Traits(index="history", variable_budget=True)

    hash_bits: int = 10
    num_tables: int = 150
    min_collisions: int = 2
    native_local: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for setting in ("hash_bits", "num_tables", "min_collisions"):
            check_whole(setting, getattr(self, setting))
        for setting in ("native_local", "seed"):
            check_whole(setting, getattr(self, setting), least=0)
        if self.hash_bits > CODE_BITS - 2:  # one bit for the sign, one for the code of no token
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
        starts = torch.zeros(*shape, buckets + 1, dtype=torch.int32, device=keys.device)
        # Offset of each table in the flat counts: its buckets, and one entry for no token.
        tables = torch.arange(self.num_tables, device=keys.device)[:, None] * (buckets + 1)
        for row in range(batch_size):  # one head at a time: its hashes are larger than its keys
            for head in range(num_kv_heads):
                codes = self.codes(keys[row, head].float() - mean[row, head], planes)
                # Invalid slots go behind the last bucket, which no query reads.
                codes = codes.masked_fill(~valid[row, 0, :, None], buckets).mT.contiguous()
                entries[row, head, :, :n] = _order(codes)
                table_codes = (codes + tables).flatten()
                sizes = table_codes.bincount(minlength=self.num_tables * (buckets + 1))
                starts[row, head, :, 1:] = sizes.view(-1, buckets + 1)[:, :-1].cumsum(1)
        return MagicPIGIndex(
            entries=entries,
            starts=starts,
            mean=mean,
            planes=planes,
            prompt_end=prefill.bounds()[1].clone(),
            layer=prefill.layer,
            **Index.counts(prefill),
        )

    def append(self, index: MagicPIGIndex, key_states: Tensor, value_states: Tensor) -> None:
        index.advance()  # the key itself is in the cache

    def codes(self, states: Tensor, planes: Tensor) -> Tensor:
        """Return the states' bucket in each table: int16 ``[..., n, L]`` for ``[..., n, d]``."""
        rows = states.reshape(-1, 1, *states.shape[-2:])
        words = hash_encode(rows, planes, impl=self.impl_for("hash_encode"))
        codes = words.view(torch.int16)[..., : self.num_tables]
        return codes.reshape(*states.shape[:-1], self.num_tables)

    def encode(self, index: MagicPIGIndex, context: StepContext) -> Tensor:
        """Return int64 ``[B, Hkv, G, L]``, each query's bucket in each table."""
        return self.codes(context.query_states, index.planes).long()

    def walk(self, codes: Tensor, index: MagicPIGIndex) -> tuple[Tensor, Tensor]:
        """Read the entries of the queries' buckets, ``codes [B, Hkv, G, L]``.

        Returns:
            Slots, int64 ``[hits]``, and the query of each, int64 ``[hits]``, as an index into the
            flattened ``[B, Hkv, G]``.
        """
        batch_size, num_kv_heads, _, num_tables = codes.shape
        # Index of each query's table: [B, Hkv, G, L].
        tables = torch.arange(batch_size * num_kv_heads * num_tables, device=codes.device)
        tables = tables.view(batch_size, num_kv_heads, 1, num_tables).expand_as(codes)
        tables, codes = tables.flatten(), codes.flatten()
        starts = index.starts.flatten(0, 2)
        begin = starts[tables, codes].long()
        size = starts[tables, codes + 1] - begin
        bucket = torch.arange(len(size), device=size.device).repeat_interleave(size)
        before = size.cumsum(0) - size
        entry = torch.arange(len(bucket), device=size.device) - before[bucket] + begin[bucket]
        slots = index.entries.flatten(0, 2)[tables[bucket], entry].long()
        return slots, bucket // num_tables

    def score(self, encoded: Tensor, index: MagicPIGIndex, context: StepContext) -> Tensor:
        """Count the tables in which each key shares the query's bucket, ``[B, Hkv, G, n]``."""
        slots, query = self.walk(encoded, index)
        queries = encoded.shape[:3]
        hits = query * index.length + slots
        size = queries.numel() * index.length
        return torch.bincount(hits, minlength=size).view(*queries, index.length).float()

    def aggregate(self, scores: Tensor, context: StepContext) -> Tensor:
        """Return the scores of each query head, ``[B, Hq, n]``, under every policy."""
        return scores.flatten(1, 2)

    def select(
        self, ranking: Ranking[Tensor], index: MagicPIGIndex, context: StepContext
    ) -> Selection:
        """Keep forced tokens and those with enough collisions."""
        scores, policy = ranking.scores, context.policy
        batch_size, num_heads, n = scores.shape
        group = context.query_states.shape[2]
        start, end = index.row_bounds(batch_size, scores.device)
        slots = torch.arange(n, device=scores.device)
        is_native = policy.protocol == "native"
        # The first slot of each row's local tokens, which are all kept: the end of the prompt,
        # decoded tokens and recents.
        local = self.native_local if is_native else 0
        local_start = torch.minimum(index.prompt_end - local, end - policy.num_recent)
        if not is_native:
            local_start = torch.maximum(local_start, end - (policy.k - policy.num_sink))
        is_sink = slots < (start + policy.num_sink)[:, None]
        valid = (slots >= start[:, None]) & (slots < end[:, None])
        forced = (valid & (is_sink | (slots >= local_start[:, None])))[:, None]
        sampled = (scores >= self.min_collisions) & ~forced & valid[:, None]

        least = torch.full((batch_size, num_heads), self.min_collisions, device=scores.device)
        share = torch.ones_like(least, dtype=torch.float32)
        if not is_native:
            budget = policy.k - forced.sum(-1)
            budget = budget if policy.head_scope == "query_head" else budget // group
            # The number of collisions plus a uniform fraction that breaks ties.
            drawn = draw_tokens(self.seed, index.layer, num_heads, n, start, end)
            fraction = torch.bitwise_and(drawn, 2**44 - 1).double() * 2.0**-44
            ranked = (scores + fraction).where(sampled, -torch.inf)
            best = ranked.topk(min(policy.k, n)).values
            last = best.gather(-1, (budget - 1).clamp_min(0).expand(-1, num_heads)[..., None])
            kept = sampled & (ranked >= last) & (budget > 0)[..., None]
            tied = sampled & (scores == last.floor())
            is_cut = sampled.sum(-1) > kept.sum(-1)
            least = torch.where(is_cut, last[..., 0].floor().clamp_min(0), least)
            kept_share = (tied & kept).sum(-1) / tied.sum(-1).clamp_min(1)
            share = torch.where(is_cut, kept_share, share)
            sampled = kept
        chosen = sampled | forced
        width = int(chosen.sum(-1).max())
        indices = slots.where(chosen, n).topk(width, largest=False).values
        is_token = indices < n
        indices = indices.where(is_token, 0)
        is_weighted = is_token & sampled.gather(-1, indices)
        collision = self._collision_probability(index, context, indices)
        inclusion = self.probability(collision, least, share)
        log_weight = torch.where(is_weighted, -torch.log(inclusion + FLOOR), 0.0)
        entries = scores.unflatten(1, (-1, group)).sum((2, 3)).long()
        slots = indices.where(is_token, -1).to(torch.int32)
        return Selection(slots, log_weight=log_weight, scanned=entries)

    def _collision_probability(
        self, index: MagicPIGIndex, context: StepContext, slots: Tensor
    ) -> Tensor:
        """Return each slot's probability to share the query's bucket in a table, ``[B, Hq, m]``."""
        batch_size, num_kv_heads, group, _ = context.query_states.shape
        keys = at_slots(context.cache.key_states, slots.view(batch_size, num_kv_heads, -1)).float()
        keys = keys - index.mean[:, :, None]
        keys = keys.unflatten(2, (group, -1))
        queries = context.query_states.float()[..., None, :]
        cosine = torch.cosine_similarity(queries, keys, dim=-1).clamp(-1, 1)
        return (1 - torch.acos(cosine) / torch.pi).pow(self.hash_bits).flatten(1, 2)

    def probability(self, collision: Tensor, least: Tensor, share: Tensor) -> Tensor:
        """Return ``P(X > least) + share * P(X = least)`` for a binomial X of ``num_tables`` trials.

        Args:
            collision: ``[..., m]`` success probability of a trial.
            least: ``[...]`` number of collisions.
            share: ``[...]`` share of tokens with exactly ``least`` collisions that is kept, 0 to 1.
        """
        # Sum up to ``least`` hits and subtract from 1, rather than sum up to num_tables.
        hits = torch.arange(int(least.max()) + 1, device=collision.device)
        ways = torch.lgamma(torch.tensor(self.num_tables + 1.0, dtype=torch.double))
        ways = ways - torch.lgamma(hits + 1.0) - torch.lgamma(self.num_tables - hits + 1.0)
        success = collision.double()[..., None]
        tiny = torch.finfo(success.dtype).tiny  # keeps logarithms finite, so that 0 * log is 0
        hit, miss = success.clamp_min(tiny).log(), (1 - success).clamp_min(tiny).log()
        log_mass = ways + hits * hit + (self.num_tables - hits) * miss
        least, share = least[..., None, None], share[..., None, None]
        left_out = torch.where(hits == least, 1 - share, (hits < least).float())
        return (1 - (log_mass.exp() * left_out).sum(-1)).clamp(0, 1).float()

    def index_bytes_per_token(self, geometry: Geometry) -> float:
        return 4.0 * geometry.num_kv_heads * self.num_tables

    def bytes_read(self, geometry: Geometry, n: int, read: int, scanned: int | None = None) -> int:
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
    """Draw the hyperplanes' normals, ``[d, L * K]``, and pad them to the index's layout."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(head_dim, num_tables * hash_bits, generator=generator)
    drawn = drawn.view(head_dim, num_tables, hash_bits)
    return pad(drawn, (0, CODE_BITS - hash_bits, 0, num_tables % 2)).flatten(1)[None]


def _order(codes: Tensor) -> Tensor:
    """Return each table's slots sorted by code, ``[L, n]``; slots of one code are ascending."""
    if codes.device.type == "cpu":  # NumPy's radix sort of 16 bits is many times faster than torch
        return torch.from_numpy(np.argsort(codes.numpy(), axis=1, kind="stable"))
    return codes.sort(dim=1, stable=True).indices
