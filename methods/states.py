"""The data passed between a method and its caller: cached states, indices, selections."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Generic, Protocol, Self, TypedDict, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from topkbench.methods.policy import Policy

QueryT_co = TypeVar("QueryT_co", covariant=True)


class SharedState(Protocol):
    """State shared by the indices of all layers of one cache."""

    def take_rows(self, rows: Tensor) -> None:
        """Let row ``b`` become the present row ``rows[b]``; called once for all layers."""


@dataclass(kw_only=True)
class PrefillInputs:
    """One layer's states after prefill, from which an index is built.

    Attributes:
        key_states: ``[B, Hkv, n, d]`` post-RoPE keys, a view of the cache's used part.
        value_states: ``[B, Hkv, n, dv]``.
        capacity: Slots to allocate in the index, at least ``n``.
        layer: Index of the layer.
        num_layers: Layers of the model.
        kv_start: int32 ``[B]`` first valid slot of each row; None for 0.
        kv_len: int32 ``[B]`` end of each row's valid slots; None for ``n``.
        query_tail: ``[B, Hq, w, d]`` the prompt's last ``w`` queries; a row of fewer tokens has
            padding before its queries. None unless the method needs it.
        column_sums: float32 ``[B, Hq, n]`` attention weight that each token received, summed over
            all queries of the prompt; None unless the method needs it.
        shared: Objects shared by the indices of all layers of one cache; empty when the first
            index is built.
        scale: The attention's factor on dot products; None for ``d ** -0.5``.
        softcap: The attention's logit cap, or None.
        sinks: ``[Hq]`` the logits of the attention's learned sinks, or None.
    """

    key_states: Tensor
    value_states: Tensor
    capacity: int
    layer: int
    num_layers: int
    kv_start: Tensor | None = None
    kv_len: Tensor | None = None
    query_tail: Tensor | None = None
    column_sums: Tensor | None = None
    shared: dict[str, SharedState] = field(default_factory=dict)
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def n(self) -> int:
        """Slots in use in the longest row."""
        return self.key_states.shape[2]

    @property
    def logit_scale(self) -> float:
        """The attention's factor on dot products, with the default filled in."""
        return self.key_states.shape[3] ** -0.5 if self.scale is None else self.scale

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return int32 ``[B]`` first slot and end of each row."""
        keys = self.key_states
        return row_bounds(self.n, len(keys), keys.device, self.kv_start, self.kv_len)

    def valid_slots(self) -> Tensor:
        """Return bool ``[B, n]``: the slots that hold a token."""
        return slots_within(self.n, *self.bounds())


@dataclass
class CacheView:
    """One layer's cache at one decode step, the current token included.

    Attributes:
        key_states: ``[B, Hkv, n, d]``, a view of the cache's used part.
        value_states: ``[B, Hkv, n, dv]``.
        kv_start: int32 ``[B]`` first valid slot of each row; None for 0.
        kv_len: int32 ``[B]`` end of each row's valid slots; None for ``n``.
        freed: int32 ``[B]`` how many tokens of each row have been freed from the cache; None for
            none.
        new_tokens: How many of each row's last slots no index holds yet; one at a decode step.
    """

    key_states: Tensor
    value_states: Tensor
    kv_start: Tensor | None = None
    kv_len: Tensor | None = None
    freed: Tensor | None = None
    new_tokens: int = 1

    @property
    def n(self) -> int:
        """Slots in the view, an upper bound on the valid tokens of each row."""
        return self.key_states.shape[2]

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return int32 ``[B]`` first slot and end of each row."""
        return row_bounds(self.n, len(self.key_states), self.device, self.kv_start, self.kv_len)

    def valid_slots(self) -> Tensor:
        """Return bool ``[B, n]``: the slots that hold a token."""
        return slots_within(self.n, *self.bounds())

    @property
    def device(self) -> torch.device:
        """The device of the states."""
        return self.key_states.device

    def newest(self) -> tuple[Tensor, Tensor]:
        """Return the current token's key and value, ``[B, Hkv, 1, d]`` and ``dv``."""
        if self.kv_len is None:
            return self.key_states[:, :, -1:], self.value_states[:, :, -1:]
        rows, slots = torch.arange(len(self.kv_len), device=self.device), self.kv_len.long() - 1
        return self.key_states[rows, :, slots, None], self.value_states[rows, :, slots, None]

    def without_newest(self, tokens: int) -> "CacheView":
        """Return the cache as it was ``tokens`` tokens ago, at the step of the token then newest.

        Args:
            tokens: Less than ``new_tokens``.
        """
        if not tokens:
            return self
        n = self.n - tokens
        return CacheView(
            self.key_states[:, :, :n],
            self.value_states[:, :, :n],
            self.kv_start,
            None if self.kv_len is None else self.kv_len - tokens,
            self.freed,
        )

    def by_token(self, row: int, ends: Sequence[int]) -> "CacheView":
        """Return one row once for each of some of its tokens, as the cache was at their steps.

        Args:
            row: The row.
            ends: Each token's slot plus one.

        Returns:
            A view without copies: rows have stride 0.
        """
        one, n = slice(row, row + 1), max(ends)
        return CacheView(
            self.key_states[one, :, :n].expand(len(ends), -1, -1, -1),
            self.value_states[one, :, :n].expand(len(ends), -1, -1, -1),
            None if self.kv_start is None else self.kv_start[one].expand(len(ends)),
            torch.tensor(ends, dtype=torch.int32, device=self.device),
        )

    def take_rows(self, rows: Sequence[int]) -> "CacheView":
        """Return some rows, without a copy if all are the same one (see ``by_token``)."""
        if self.key_states.stride(0) == 0:
            keys, values = (one[: len(rows)] for one in (self.key_states, self.value_states))
        else:
            keys, values = (one[list(rows)] for one in (self.key_states, self.value_states))
        start, end, freed = (
            None if bound is None else bound[list(rows)]
            for bound in (self.kv_start, self.kv_len, self.freed)
        )
        return CacheView(keys, values, start, end, freed)


@dataclass
class StepContext:
    """One decode step of one layer: what the stages of a method may read.

    Attributes:
        query_states: ``[B, Hkv, G, d]`` post-RoPE queries of the current token.
        cache: The layer's cached states, the current token included.
        policy: Budget and forced tokens, as ``TopKMethod.resolve`` returned them.
        scale: The attention's factor on dot products.
        softcap: Logits become ``softcap * tanh(logits / softcap)``; None for no cap.
        sinks: ``[Hq]`` the logit of each query head's learned sink, which is in the softmax's
            denominator and has no value; None for no sinks.
        layer: Index of the layer.
        num_layers: Layers of the model.
        previous_query: ``[B, Hkv, G, d]`` this layer's query projection applied to the previous
            layer's attention input; None unless the method needs it, and in the first layer.
    """

    query_states: Tensor
    cache: CacheView
    policy: Policy
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    layer: int = 0
    num_layers: int = 1
    previous_query: Tensor | None = None

    def take_rows(self, rows: Sequence[int]) -> "StepContext":
        """Return the step of some rows."""
        kept = list(rows)
        previous = self.previous_query
        return replace(
            self,
            query_states=self.query_states[kept],
            cache=self.cache.take_rows(kept),
            previous_query=None if previous is None else previous[kept],
        )

    def prompt(
        self,
        capacity: int,
        captured: Mapping[str, Tensor | None],
        shared: dict[str, SharedState] | None = None,
    ) -> PrefillInputs:
        """Return the states before the new tokens, from which an index is built.

        Args:
            capacity: Slots to allocate in the index.
            captured: What was captured of the prompt, as arguments of ``PrefillInputs``.
            shared: What the indices of all layers of the cache share.
        """
        cache = self.cache
        n = cache.n - cache.new_tokens
        return PrefillInputs(
            key_states=cache.key_states[:, :, :n],
            value_states=cache.value_states[:, :, :n],
            capacity=capacity,
            layer=self.layer,
            num_layers=self.num_layers,
            kv_start=cache.kv_start,
            kv_len=None if cache.kv_len is None else cache.kv_len - cache.new_tokens,
            query_tail=captured.get("query_tail"),
            column_sums=captured.get("column_sums"),
            shared={} if shared is None else shared,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
        )


def row_bounds(
    n: int, batch_size: int, device: torch.device, kv_start: Tensor | None, kv_len: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return int32 ``[B]`` first slot and end of each row, with the defaults filled in."""
    zero = torch.zeros(batch_size, dtype=torch.int32, device=device)
    return (zero if kv_start is None else kv_start), (zero + n if kv_len is None else kv_len)


def at_slots(states: Tensor, slots: Tensor) -> Tensor:
    """Gather ``states [B, Hkv, n, c]`` at int64 ``slots [B, Hkv, m]``; negative ones read slot 0.

    Returns:
        ``[B, Hkv, m, c]``.
    """
    at = slots.clamp_min(0)[..., None].expand(-1, -1, -1, states.shape[3])
    return states.gather(2, at)


def slots_within(n: int, start: Tensor, end: Tensor) -> Tensor:
    """Return bool ``[B, n]``: whether a slot lies in its row's range ``[start, end)``."""
    slots = torch.arange(n, device=start.device)
    return (slots >= start[:, None]) & (slots < end[:, None])


class Counts(TypedDict):
    """The attributes of `Index`, as arguments of a subclass's constructor."""

    capacity: int
    length: int
    kv_start: Tensor | None
    kv_len: Tensor | None


@dataclass(kw_only=True)
class Index:
    """Base of every method's index: which slots each row has filled.

    The first axis of a tensor in it is the batch's rows, unless ``without_rows`` names it.

    Attributes:
        capacity: Allocated slots.
        length: Slots in use in the longest row (an upper bound where rows differ).
        kv_start: int32 ``[B]`` first valid slot of each row; None for 0.
        kv_len: int32 ``[B]`` end of each row's valid slots; None for ``length``.
        without_rows: Names of tensors that all rows share, such as a layer's weights.
    """

    capacity: int
    length: int
    kv_start: Tensor | None
    kv_len: Tensor | None

    without_rows: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def of(cls, prefill: PrefillInputs) -> Self:
        """Return an index without side information for a prefilled cache.

        Raises:
            ValueError: If the capacity is below the slots in use.
        """
        return cls(**cls.counts(prefill))

    @staticmethod
    def counts(prefill: PrefillInputs) -> Counts:
        """Return the attributes of ``Index`` as arguments for a subclass's constructor."""
        if prefill.capacity < prefill.n:
            raise ValueError(
                f"capacity must be at least the {prefill.n} slots in use, got {prefill.capacity}."
            )
        # A copy, as the cache advances its own counter in place.
        kv_len = None if prefill.kv_len is None else prefill.kv_len.clone()
        return {
            "capacity": prefill.capacity,
            "length": prefill.n,
            "kv_start": prefill.kv_start,
            "kv_len": kv_len,
        }

    def row_bounds(self, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return int32 ``[B]`` first slot and end of each row."""
        return row_bounds(self.length, batch_size, device, self.kv_start, self.kv_len)

    def advance(self) -> int | Tensor:
        """Add one token to every row; return its slot, an int or, where rows differ, ``[B]``.

        Raises:
            ValueError: If the capacity is used up.
        """
        if self.kv_len is not None:
            slot = self.kv_len.clone()
            self.kv_len += 1
            self.length = min(self.length + 1, self.capacity)
            return slot
        if self.length >= self.capacity:
            raise ValueError(
                f"the index must have room for one slot more, got capacity={self.capacity} with "
                "all in use; build it with a larger capacity."
            )
        self.length += 1
        return self.length - 1

    def grow(self, capacity: int) -> None:
        """Pad every tensor ``[B, H, capacity, ...]`` with zeros to a larger capacity."""
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor) and value.ndim >= 3 and value.shape[2] == self.capacity:
                padding = (0, 0) * (value.ndim - 3) + (0, capacity - self.capacity)
                setattr(self, one.name, pad(value, padding))
        self.capacity = capacity
        for _, inner in self._inner():
            inner.grow(capacity)

    def take_rows(self, rows: Tensor) -> None:
        """Let row ``b`` become the present row ``rows[b]``, as when a beam search reorders a cache.

        Args:
            rows: int64 ``[B']``; rows may repeat or be left out.
        """
        for name, value in self._with_rows():
            setattr(self, name, value.index_select(0, rows.to(value.device)))
        for _, inner in self._inner():
            inner.take_rows(rows)

    def first(self, n: int) -> Self:
        """Return the index without the tokens that were appended since it had ``n`` slots in use.

        It equals the index at that time if the method's ``traits.restricts`` holds. The copy is
        shallow: it shares the tensors, so no token may be appended to it.

        Args:
            n: Slots in use in the longest row, at most ``length``. Each row loses as many tokens.
        """
        part = copy.copy(self)
        part.length = n
        if self.kv_len is not None:
            part.kv_len = self.kv_len - (self.length - n)
        for name, inner in self._inner():
            setattr(part, name, inner.first(n))
        return part

    def by_token(self, row: int, ends: Sequence[int]) -> Self:
        """Return one row once for each of some of its tokens, as the index was at their steps.

        It is so if the method's ``traits.restricts`` holds. Nothing is copied: rows have stride 0,
        and no token may be appended.

        Args:
            row: The row.
            ends: Each token's slot plus one.
        """
        part, one = copy.copy(self), slice(row, row + 1)
        for name, inner in self._inner():
            setattr(part, name, inner.by_token(row, ends))
        for name, value in self._with_rows():
            setattr(part, name, value[one].expand(len(ends), *[-1] * (value.ndim - 1)))
        device = next((v.device for v in vars(self).values() if isinstance(v, Tensor)), None)
        part.length = max(ends)
        part.kv_len = torch.tensor(ends, dtype=torch.int32, device=device)
        return part

    def end_at(self, ends: Tensor, n: int) -> None:
        """Let rows end at given slots; later tokens of a row are overwritten by the next ones.

        Args:
            ends: int32 ``[B]`` each row's slots in use, at most those it has.
            n: The largest of them.
        """
        self.length, self.kv_len = n, ends.clone()
        for _, inner in self._inner():
            inner.end_at(ends, n)

    def undo_append(self) -> None:
        """Remove the last token of every row; the next ``append`` overwrites its slot."""
        self.length -= 1
        if self.kv_len is not None:
            self.kv_len -= 1
        for _, inner in self._inner():
            inner.undo_append()

    def _inner(self) -> Iterator[tuple[str, "Index"]]:
        """Yield the indices inside this one, by name: that of a method inside the method."""
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Index):
                yield one.name, value

    def _with_rows(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors whose first axis is the batch's rows, by name."""
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor) and one.name not in self.without_rows:
                yield one.name, value

    def renumber(self, kept: Tensor, capacity: int) -> None:
        """Update the counts after the cache moved its kept tokens to the first slots.

        Args:
            kept: int32 ``[B, Hkv, m]`` old slots of the kept tokens, ascending, the same number for
                each head of a row, padded with -1 at the end.
            capacity: Slots that the cache has now.
        """
        if self.kv_start is not None or self.kv_len is not None:
            self.kv_len = (kept[:, 0] >= 0).sum(-1, dtype=torch.int32)
        self.kv_start = None
        self.length, self.capacity = kept.shape[2], capacity

    @staticmethod
    def put(buffer: Tensor, slot: int | Tensor, entry: Tensor) -> None:
        """Write ``entry [B, H, ...]`` at a slot of each row of ``buffer [B, H, capacity, ...]``."""
        if isinstance(slot, int):
            buffer[:, :, slot] = entry
        else:
            rows = torch.arange(len(buffer), device=buffer.device)
            buffer[rows, :, slot.long()] = entry.to(buffer.dtype)


@dataclass
class Remainder:
    """One value vector that approximates the tokens that were not selected.

    Attributes:
        value: ``[B, Hkv, dv]``.
        weight: float32 ``[B, Hq]`` its share of the output, 0 to 1; the rest goes to the selection.
    """

    value: Tensor
    weight: Tensor


@dataclass
class Selection:
    """Which units each head attends to.

    Attributes:
        indices: int32 ``[B, H, m]``, ``H`` KV heads or query heads; -1 is padding. With
            ``unit_size == 1`` a cache slot, else a page counted from the row's first slot.
        count: int32 ``[B, H]`` how many leading entries are valid; None for all that are not -1.
        log_weight: float32 ``[B, Hq, m]`` added to the logits of a unit's tokens; None for zeros.
        unit_size: Tokens per unit.
        remainder: Approximates the tokens not selected; None to leave them out.
        head_weight: float32 ``[B, Hq]`` factor on each head's output; None for ones.
        complete: Whether rows of at most ``k`` tokens are known to have all their tokens.
        scanned: int64 ``[B, Hkv]`` what else a KV head read, if that depends on the data. Counted
            in tokens (whose side information was read after a first selection, or whose full keys
            were read after quantised ones) or in entries of side information. None if it does not
            depend on the data.
    """

    indices: Tensor
    count: Tensor | None = None
    log_weight: Tensor | None = None
    unit_size: int = 1
    remainder: Remainder | None = None
    head_weight: Tensor | None = None
    scanned: Tensor | None = None
    complete: bool = False

    @classmethod
    def everything(cls, cache: CacheView) -> Self:
        """Select every valid token of every row, for every KV head."""
        start, end = cache.bounds()
        slots = torch.arange(cache.n, dtype=torch.int32, device=cache.device)
        slots = slots.expand(len(start), -1)
        if cache.kv_start is not None or cache.kv_len is not None:
            slots = slots + start[:, None]
            slots = slots.masked_fill(slots >= end[:, None], -1)
        return cls(slots[:, None].expand(-1, cache.key_states.shape[1], -1).contiguous())

    def with_all_of_short_rows(self, cache: CacheView, k: int) -> Self:
        """Return the selection with every token of the rows that have at most ``k`` tokens.

        Rows of a batch may differ in length; a short row keeps every token, as it would alone.
        """
        if self.complete or (cache.kv_start is None and cache.kv_len is None):
            return self
        start, end = cache.bounds()
        valid = (end - start)[:, None, None]
        short = valid <= k
        width = max(self.indices.shape[2], -(-k // self.unit_size))
        missing = width - self.indices.shape[2]
        kept = pad(self.indices, (0, missing), value=-1)
        if self.count is not None:
            entries = torch.arange(width, device=kept.device)
            kept = kept.masked_fill(entries >= self.count[..., None], -1)
        units = torch.arange(width, dtype=torch.int32, device=kept.device)
        everything = (units * self.unit_size < valid).where(short, False)
        offset = start[:, None, None] if self.unit_size == 1 else 0
        whole = (units + offset).where(everything, -1).to(torch.int32)
        weight = self.log_weight
        if weight is not None:
            weight = pad(weight, (0, missing)).masked_fill(short, 0.0)
        remainder = self.remainder
        if remainder is not None:
            remainder = Remainder(remainder.value, remainder.weight.masked_fill(short[:, 0], 0.0))
        heads = self.head_weight
        heads = None if heads is None else heads.masked_fill(short[:, 0], 1.0)
        # Run alone, such a row would not read the index.
        scanned = None if self.scanned is None else self.scanned.masked_fill(short[:, 0], 0)
        indices = torch.where(short, whole, kept)
        return replace(
            self,
            indices=indices,
            count=None,
            log_weight=weight,
            remainder=remainder,
            head_weight=heads,
            scanned=scanned,
        )

    def take_rows(self, rows: Sequence[int]) -> Self:
        """Return the selection of some rows."""
        kept, part = list(rows), copy.copy(self)
        for name in ("indices", "count", "log_weight", "head_weight", "scanned"):
            value = getattr(self, name)
            setattr(part, name, None if value is None else value[kept])
        if self.remainder is not None:
            value, weight = self.remainder.value, self.remainder.weight
            part.remainder = Remainder(value[kept], weight[kept])
        return part

    def slots(self, cache: CacheView) -> Tensor:
        """Return bool ``[B, H, n]``: the tokens that each head attends to; pages are expanded."""
        indices = self.indices.long()
        used = indices >= 0
        if self.count is not None:
            used &= torch.arange(indices.shape[-1], device=indices.device) < self.count[..., None]
        start, end = cache.bounds()
        # A token's index is its slot, a page's its position in the row.
        first = indices if self.unit_size == 1 else start[:, None, None] + indices * self.unit_size
        slots = first[..., None] + torch.arange(self.unit_size, device=indices.device)
        used = used[..., None] & (slots < end[:, None, None, None])
        chosen = torch.zeros(
            *indices.shape[:2], cache.n + 1, dtype=torch.bool, device=indices.device
        )
        chosen.scatter_(-1, torch.where(used, slots, cache.n).flatten(2), True)
        return chosen[..., :-1]

    def tokens_read(self, cache: CacheView) -> Tensor:
        """Return int64 ``[B, Hkv]``: the number of distinct tokens that each KV head reads."""
        heads = cache.key_states.shape[1]
        return self.slots(cache).unflatten(1, (heads, -1)).any(2).sum(-1)


@dataclass(frozen=True)
class Ranking(Generic[QueryT_co]):
    """The scores by which a step selects.

    Attributes:
        encoded: The queries in the form in which they were scored.
        raw_scores: What ``ScoringMethod.score`` returned.
        scores: ``[B, H, U]`` reduced to the selecting heads: the KV heads, or the query heads under
            ``head_scope="query_head"``.
    """

    encoded: QueryT_co
    raw_scores: Tensor
    scores: Tensor


@dataclass
class StepResult:
    """The result of one decode step of one layer.

    Attributes:
        out: ``[B, Hq, dv]`` in the query's dtype.
        lse: float32 ``[B, Hq]`` log of the softmax's denominator, a sink included; None if not
            computed.
        selection: What was attended to; None for every token.
        ranking: The scores that were selected by; None if nothing was scored.
    """

    out: Tensor
    lse: Tensor | None
    selection: Selection | None
    ranking: Ranking[object] | None = None

    def take_rows(self, rows: Sequence[int]) -> "StepResult":
        """Return outputs and selection of some rows, without the scores."""
        kept = list(rows)
        lse = None if self.lse is None else self.lse[kept]
        selection = None if self.selection is None else self.selection.take_rows(kept)
        return StepResult(self.out[kept], lse, selection)
