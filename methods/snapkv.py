"""SnapKV: the tokens that the prompt's last queries attend to, selected once."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from topkbench.methods.base import (
    QUERY_TAIL,
    Geometry,
    Index,
    Policy,
    PrefillInputs,
    Selection,
    StepContext,
    Traits,
    check_whole,
    kv_bytes,
)
from topkbench.methods.eviction import Evicting, ascending
from topkbench.methods.sinks import softmax
from topkbench.methods.softcap import capped

Pooling = Literal["avg", "max"]
PROTECTED = 1e6  # above every importance; float32 adds slots to it exactly below 2**24


@dataclass(kw_only=True)
class SnapKVIndex(Index):
    """The importance and ranking of the prompt's tokens.

    Attributes:
        importance: float32 ``[B, Hq, capacity]`` pooled attention of the window's queries; None
            once the tokens are ranked.
        ranked: int64 ``[B, H, m]`` the prompt's slots, best first, padded with -1; None before the
            first selection.
        prompt: ``length`` when the index was built; later tokens were generated.
        window: Last tokens of the prompt, which are kept regardless of importance.
    """

    importance: Tensor | None
    ranked: Tensor | None = None
    prompt: int
    window: int

    def renumber(self, kept: Tensor, capacity: int) -> None:
        assert self.ranked is not None  # only a selection leads to compaction
        generated = min(self.length - self.prompt, kept.shape[2])
        old_slots = kept.long().masked_fill(kept < 0, torch.iinfo(torch.int64).max)
        new_slots = torch.searchsorted(old_slots, self.ranked.clamp(min=0))
        new_slots = new_slots.clamp(max=kept.shape[2] - 1)
        is_kept = (old_slots.gather(2, new_slots) == self.ranked) & (self.ranked >= 0)
        self.ranked = new_slots.masked_fill(~is_kept, -1)
        super().renumber(kept, capacity)
        self.prompt = self.length - generated


@dataclass(kw_only=True)
class SnapKV(Evicting[SnapKVIndex]):
    """Keep the prompt tokens that the prompt's last queries attend to, and generated tokens.

    At prefill, each head sums the attention of the last ``window`` queries on every earlier token
    and pools the sums along the sequence, so that a peak's neighbours are kept too. Kept of the
    prompt are the policy's sinks, the window, and the tokens with the largest pooled sums. Prompt
    tokens are not ranked again during decoding.

    What ``k`` counts: under the unified protocol all tokens, as for every method. Each generated
    token replaces the least important remaining prompt token, then those of the window, then older
    generated ones; sinks stay. Under the native protocol ``k`` is the paper's C, the tokens kept of
    the prompt, and all generated tokens are kept in addition. The tokens of a question that is
    decoded (``question=sparse``) count as generated.

    Attributes:
        window: Queries at the prompt's end that vote, at most 64; all of a shorter prompt.
        kernel: Width of the pooling kernel in tokens, odd.
        pooling: ``"max"`` or ``"avg"``.

    Source:
        SnapKV (arXiv:2404.14469), section 4; window 32, kernel 7 and max pooling as in the released
        LongBench configurations (defaults of the released class: 64, 5, avg). The released code
        repeats the keys and selects per query head, as ``head_scope="query_head"`` does; for one
        selection per KV head the pooled sums are summed over the group. Attention is computed with
        the layer's own scale, softcap and sinks; there with the root of head_dim and neither.

    Compared with the authors' code:
        ``snapkv/monkeypatch/snapkv_utils.py`` (FasterDecoding/SnapKV): results agree when run on
        the same tensors with one selection per query head. Difference: ``head_scope="kv_head"``,
        where the group's pooled sums are summed, does not exist there.
    """

    name: ClassVar[str] = "snapkv"
    traits: ClassVar[Traits] = Traits(needs=frozenset({"query_tail"}), index="history")

    window: int = 32
    kernel: int = 7
    pooling: Pooling = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("window", self.window)
        check_whole("kernel", self.kernel)
        if self.window > QUERY_TAIL:
            raise ValueError(
                f"window must be at most {QUERY_TAIL}, the queries that are captured of a prompt, "
                f"got {self.window}."
            )
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}.")
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be avg or max, got {self.pooling!r}.")

    def build_index(self, prefill: PrefillInputs) -> SnapKVIndex:
        keys, n = prefill.key_states, prefill.n
        if prefill.query_tail is None:
            raise ValueError("snapkv needs query_tail of the prompt, got none; capture it.")
        queries = prefill.query_tail[:, :, -self.window :].float()
        batch_size, num_heads, window, _ = queries.shape
        scale = prefill.logit_scale
        start, end = prefill.bounds()
        slots = torch.arange(n, device=keys.device)
        query_slots = end[:, None] - window + torch.arange(window, device=keys.device)  # [B, w]
        visible = (slots <= query_slots[..., None]) & (slots >= start[:, None, None])
        grouped = queries.unflatten(1, (keys.shape[1], -1))
        logits = capped(grouped @ keys.float().mT[:, :, None] * scale, prefill.softcap)
        logits = logits.masked_fill(~visible[:, None, None], -torch.inf)
        weights = softmax(logits, prefill.sinks)
        # A query before a row's first token attends to nothing: its vote, perhaps NaN, is zero.
        votes = weights.nan_to_num(0.0).sum(3).flatten(1, 2)
        votes = votes.masked_fill((slots >= end[:, None] - window)[:, None], 0.0)
        half = self.kernel // 2
        pool = avg_pool1d if self.pooling == "avg" else max_pool1d
        importance = votes.new_zeros(batch_size, num_heads, prefill.capacity)
        importance[:, :, :n] = pool(votes, self.kernel, stride=1, padding=half)
        counts = Index.counts(prefill)
        return SnapKVIndex(importance=importance, prompt=n, window=window, **counts)

    def append(self, index: SnapKVIndex, key_states: Tensor, value_states: Tensor) -> None:
        index.advance()

    def select(self, index: SnapKVIndex, context: StepContext) -> Selection:
        policy = context.policy
        if index.ranked is None:
            index.ranked = self._rank(index, policy, context.query_states.shape[1])
            index.importance = None
        generated = index.length - index.prompt
        from_prompt = policy.k
        if policy.protocol == "unified":
            generated = min(generated, policy.k - policy.num_sink)
            from_prompt -= generated
        ranked = index.ranked[:, :, :from_prompt]
        batch_size, num_heads, _ = ranked.shape
        _, end = index.row_bounds(batch_size, ranked.device)
        newest = end[:, None] - generated + torch.arange(generated, device=ranked.device)
        newest = newest[:, None].expand(-1, num_heads, -1)
        return Selection(ascending(torch.cat([ranked, newest], 2)))

    def _rank(self, index: SnapKVIndex, policy: Policy, num_kv_heads: int) -> Tensor:
        """Return the prompt's ``k`` best slots: sinks, then the window, then by importance."""
        assert index.importance is not None
        n = index.prompt
        importance = index.importance[:, :, :n]
        if policy.head_scope == "kv_head":
            grouped = importance.unflatten(1, (num_kv_heads, -1))
            largest = policy.aggregation == "max_softmax"
            importance = grouped.amax(2) if largest else grouped.sum(2)
        start, end = index.row_bounds(len(importance), importance.device)
        # The end of each row's prompt, before the generated tokens.
        start, end = start[:, None, None], end[:, None, None] - (index.length - n)
        slots = torch.arange(n, device=importance.device)
        protected = slots >= end - max(index.window, policy.num_recent)
        importance = torch.where(protected, PROTECTED + slots, importance)
        importance = importance.masked_fill(slots < start + policy.num_sink, torch.inf)
        importance = importance.masked_fill((slots < start) | (slots >= end), -torch.inf)
        best, ranked = importance.sort(dim=-1, descending=True, stable=True)
        return ranked.masked_fill(best == -torch.inf, -1)[:, :, : policy.k]

    def index_bytes_per_token(self, geometry: Geometry) -> float:
        return 4.0 * geometry.num_heads

    def bytes_read(self, geometry: Geometry, n: int, read: int, scanned: int | None = None) -> int:
        # The importance is read once, at the first step; later steps read the kept tokens only.
        return kv_bytes(geometry, read) + self.moved_bytes(geometry, n, read)
