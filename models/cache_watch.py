"""Which slots of a cache are valid, and whether changes to them can be detected."""

from dataclasses import dataclass, replace
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from topkbench.models.compat import PartialAttention, cache_layer, written_slots


@dataclass(frozen=True)
class Lengths:
    """The valid slots of a cache's rows, the current token included.

    Attributes:
        n: Slots in use in the longest row.
        kv_start: int32 ``[B]`` first valid slot; None for 0.
        kv_len: int32 ``[B]`` end of the valid slots; None for ``n``.
        is_decode_cache: True for topkbench's DecodeCache, whose rows may end at different slots.
        starts: ``kv_start`` as Python ints, if it was read from a mask; else None.
    """

    n: int
    kv_start: Tensor | None = None
    kv_len: Tensor | None = None
    is_decode_cache: bool = False
    starts: tuple[int, ...] | None = None

    def ends(self, batch_size: int) -> list[int]:
        """Return the end of each row's valid slots."""
        return [self.n] * batch_size if self.kv_len is None else self.kv_len.tolist()

    def follow(self, before: "Lengths", num_new: int) -> bool:
        """Return whether these are the slots of before, and as many new tokens in each row.

        On a GPU the ends of rows are not compared, which would synchronise.
        """
        if before.starts != self.starts or before.n + num_new != self.n:
            return False
        now, then = (
            torch.tensor(one.n) if one.kv_len is None else one.kv_len for one in (self, before)
        )
        if not (now.is_cpu and then.is_cpu):
            return True
        return bool((then + num_new == now).all())

    def take_rows(self, rows: Tensor) -> "Lengths":
        """Return the slots after row ``b`` has become the present row ``rows[b]``."""
        kv_start, kv_len = (
            None if bound is None else bound.index_select(0, rows.to(bound.device))
            for bound in (self.kv_start, self.kv_len)
        )
        starts = None if self.starts is None else tuple(self.starts[row] for row in rows.tolist())
        return replace(self, kv_start=kv_start, kv_len=kv_len, starts=starts)

    def causal_mask(
        self, q_len: int, num_slots: int, partial: PartialAttention | None = None
    ) -> Tensor | None:
        """Return a causal mask, bool ``[B, 1, q_len, num_slots]``, for each row's last queries.

        None if the queries are the whole of every row, so that SDPA's causal mode suffices.

        Args:
            q_len: Queries of each row.
            num_slots: Slots of the keys.
            partial: The layer's pattern if it does not attend to the whole past.
        """
        level = self.kv_len is None and self.kv_start is None
        if level and self.n == q_len and partial is None:
            return None
        bounds = self.kv_start if self.kv_len is None else self.kv_len
        device = torch.device("cpu") if bounds is None else bounds.device
        end = torch.tensor([self.n], device=device) if self.kv_len is None else self.kv_len
        slots = torch.arange(num_slots, device=device)
        positions = (end[:, None] - q_len + torch.arange(q_len, device=device))[..., None]
        visible = slots <= positions
        if self.kv_start is not None:
            visible = visible & (slots >= self.kv_start[:, None, None])
        if partial is not None:
            visible = visible & (slots >= partial.first_visible(positions))
        # A padding query sees itself, since a softmax over nothing is undefined.
        return (visible | (slots == positions))[:, None]


class LengthReader:
    """Reads the valid slots from a mask or a cache; a mask shared by layers is read once."""

    def __init__(self) -> None:
        self._mask: ReferenceType[Tensor] | None = None
        self._read: Lengths | None = None

    def lengths(
        self, cache: Any, stored: Any, key: Tensor, mask: Tensor | None, q_len: int = 1
    ) -> Lengths | None:
        """Return the valid slots at this layer, or None if a row's are not one range.

        Neither are they if a query does not see exactly its own slot and those before it.

        Args:
            cache: The transformers cache.
            stored: The cache's object for this layer.
            key: ``[B, Hkv, slots, d]`` the keys that it returned.
            mask: Transformers' mask, which covers padding and unwritten slots.
            q_len: Queries of each row.
        """
        if is_decode_cache(cache):
            return _decode_cache_lengths(cache, stored, key)
        if mask is None:
            written = written_slots(stored)
            if written is not None:  # a static cache: the rest of it is not written yet
                return Lengths(written)
            return Lengths(key.shape[2])
        if self._mask is None or self._mask() is not mask:
            self._mask = ref(mask)
            self._read = _read_mask(mask, key)
            if self._read is not None and q_len > 1:
                causal = self._read.causal_mask(q_len, key.shape[2])
                if causal is None or not torch.equal(causal.to(mask.device).expand_as(mask), mask):
                    self._read = None
        return self._read


def is_decode_cache(cache: Any) -> bool:
    """Return whether a cache is topkbench's DecodeCache, which records its rows' lengths."""
    return hasattr(cache, "topkbench_lengths")


def new_tokens(cache: Any, batch_size: int, q_len: int) -> list[int]:
    """Return how many tokens of a forward each row has, without padding behind them.

    Args:
        cache: The cache; None without one.
        batch_size: Rows.
        q_len: Queries of each row.
    """
    return list(cache.new_tokens) if is_decode_cache(cache) else [q_len] * batch_size


def _decode_cache_lengths(cache: Any, stored: Any, key: Tensor) -> Lengths:
    lengths: Any = cache.topkbench_lengths
    kv_start, kv_len = lengths() if callable(lengths) else lengths
    # A compacted layer has its own lengths.
    kv_len = getattr(stored, "kv_len", kv_len)
    n = stored.get_seq_length()
    if kv_len is None:  # every row fills every slot: no kernel needs a mask
        return Lengths(int(n), kv_start, None, is_decode_cache=True)
    if key.device.type != "cpu":  # reading the lengths would make the GPU wait
        return Lengths(int(n), kv_start, kv_len.to(key.device), is_decode_cache=True)
    ends = kv_len.tolist()
    if min(ends) == max(ends):
        return Lengths(ends[0], kv_start, None, is_decode_cache=True)
    # A copy, as the cache advances its counters in place.
    return Lengths(max(ends), kv_start, kv_len.clone(), is_decode_cache=True)


def _read_mask(mask: Tensor, key: Tensor) -> Lengths | None:
    """Turn a mask's last query row into ranges; None if it has holes or another layout."""
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1:
        return None
    if mask.shape[3] != key.shape[2]:
        return None
    batch_size, _, slots, _ = key.shape
    visible = mask[:, 0, -1].cpu().int()
    start = visible.argmax(1)
    end = slots - visible.flip(1).argmax(1)
    if not torch.equal(visible.sum(1), end - start):
        return None
    starts, ends = (tuple(t.expand(batch_size).tolist()) for t in (start, end))
    kv_start = kv_len = None
    if any(starts):
        kv_start = torch.tensor(starts, dtype=torch.int32, device=key.device)
    if min(ends) != max(ends):
        kv_len = torch.tensor(ends, dtype=torch.int32, device=key.device)
    return Lengths(max(ends), kv_start, kv_len, starts=starts if any(starts) else None)


def can_watch(cache: Any, layer: int, key: Tensor) -> bool:
    """Return whether writes to a layer can be detected: it returned the very keys it stores.

    A cache that returns other tensors, or a part of its keys (quantised, offloaded), cannot be
    watched; latent vectors can, since keys are computed from them and change only with them.

    Args:
        cache: The cache.
        layer: Index of the layer.
        key: ``[B, Hkv, slots, d]`` the keys that attention reads.
    """
    if stores_latents(cache, layer, key):
        return True
    keys = getattr(cache_layer(cache, layer), "keys", None)
    return keys is not None and (keys.data_ptr(), keys.stride()) == (key.data_ptr(), key.stride())


def stores_latents(cache: Any, layer: int, key: Tensor) -> bool:
    """Return whether a layer stores one latent vector per token, from which keys are computed.

    Under multi-head latent attention (DeepSeek) transformers 5.24 caches the latent vector as the
    one head's keys and the rotary part as its values; earlier releases cached keys and values.

    Args:
        cache: The cache.
        layer: Index of the layer.
        key: ``[B, Hkv, slots, d]`` the keys that attention reads.
    """
    keys = getattr(cache_layer(cache, layer), "keys", None)
    if keys is None or keys.ndim != 4 or keys.shape[1] != 1 or keys.shape[2] < key.shape[2]:
        return False
    return (1, keys.shape[3]) != (key.shape[1], key.shape[3])
