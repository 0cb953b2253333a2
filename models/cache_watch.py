"""Which slots of a cache are valid, and whether an index still describes the cache beside it."""

from dataclasses import dataclass, replace
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

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
        is_own: True for topkbench's cache, whose rows may end at different slots.
        starts: ``kv_start`` as numbers, where a mask told it; None elsewhere.
    """

    n: int
    kv_start: Tensor | None = None
    kv_len: Tensor | None = None
    is_own: bool = False
    starts: tuple[int, ...] | None = None

    def causal_mask(
        self, q_len: int, num_slots: int, partial: PartialAttention | None = None
    ) -> Tensor | None:
        """Return bool ``[B, 1, q_len, num_slots]`` for the last queries of each row.

        None where all rows begin here, which SDPA's causal mode serves.

        Args:
            q_len: Queries of each row.
            num_slots: Slots of the keys.
            partial: How the layer attends if it does not see the whole past.
        """
        level = self.kv_len is None and self.kv_start is None
        if level and self.n == q_len and partial is None:
            return None
        known = self.kv_start if self.kv_len is None else self.kv_len
        device = torch.device("cpu") if known is None else known.device
        end = torch.tensor([self.n], device=device) if self.kv_len is None else self.kv_len
        slots = torch.arange(num_slots, device=device)
        places = (end[:, None] - q_len + torch.arange(q_len, device=device))[..., None]
        seen = slots <= places
        if self.kv_start is not None:
            seen = seen & (slots >= self.kv_start[:, None, None])
        if partial is not None:
            seen = seen & (slots >= partial.first_seen(places))
        # A padding query sees itself, since a softmax over nothing is undefined.
        return (seen | (slots == places))[:, None]


class LengthReader:
    """Reads the valid slots from a mask or a cache; a mask that layers share is read once."""

    def __init__(self) -> None:
        self._mask: ReferenceType[Tensor] | None = None
        self._read: Lengths | None = None

    def lengths(self, cache: Any, stored: Any, key: Tensor, mask: Tensor | None) -> Lengths | None:
        """Return the valid slots at this layer, or None where they are no range.

        Args:
            cache: The transformers cache.
            stored: Its layer.
            key: ``[B, Hkv, slots, d]`` what the layer returned.
            mask: What transformers made of padding and unwritten slots.
        """
        if is_own(cache):
            return _own_lengths(cache, stored, key)
        if mask is None:
            written = written_slots(stored)
            if written is not None:  # a static cache: the rest of it is not written yet
                return Lengths(written)
            return Lengths(key.shape[2])
        if self._mask is None or self._mask() is not mask:
            self._mask = ref(mask)
            self._read = _read_mask(mask, key)
        return self._read


def is_own(cache: Any) -> bool:
    """Say whether a cache is topkbench's pre-allocated one, which knows its rows' lengths."""
    return hasattr(cache, "topkbench_lengths")


def _own_lengths(cache: Any, stored: Any, key: Tensor) -> Lengths:
    told: Any = cache.topkbench_lengths
    kv_start, kv_len = told() if callable(told) else told
    # While the layers are being written one after the other, each knows its own length best.
    kv_len = getattr(stored, "kv_len", kv_len)
    n = stored.get_seq_length()
    if kv_len is None:  # every row fills every slot, and no kernel needs a mask
        return Lengths(int(n), kv_start, None, is_own=True)
    if key.device.type != "cpu":  # reading the lengths would make the GPU wait
        return Lengths(int(n), kv_start, kv_len.to(key.device), is_own=True)
    ends = kv_len.tolist()
    if min(ends) == max(ends):
        return Lengths(ends[0], kv_start, None, is_own=True)
    # The cache moves its counters in place, and what is kept must not move with them.
    return Lengths(max(ends), kv_start, kv_len.clone(), is_own=True)


def _read_mask(mask: Tensor, key: Tensor) -> Lengths | None:
    """Turn a mask of one query per row into ranges, None if it has holes or is none of ours."""
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1:
        return None
    if mask.shape[3] != key.shape[2]:
        return None
    batch_size, _, slots, _ = key.shape
    seen = mask[:, 0, -1].cpu().int()
    start = seen.argmax(1)
    end = slots - seen.flip(1).argmax(1)
    if not torch.equal(seen.sum(1), end - start):
        return None
    starts, ends = (tuple(t.expand(batch_size).tolist()) for t in (start, end))
    kv_start = kv_len = None
    if any(starts):
        kv_start = torch.tensor(starts, dtype=torch.int32, device=key.device)
    if min(ends) != max(ends):
        kv_len = torch.tensor(ends, dtype=torch.int32, device=key.device)
    return Lengths(max(ends), kv_start, kv_len, starts=starts if any(starts) else None)


@dataclass
class _Kept:
    """An index, and what the cache beside it looked like when both agreed."""

    index: Any
    capacity: int
    keys: "ReferenceType[Tensor]"
    version: int | None
    lengths: Lengths


class IndexStore:
    """Each layer's index, kept with the cache object that it describes and no longer than it.

    An index is in step if the layer holds the very tensor it held after the index's last token, and
    nobody has written to that tensor since: cropping, resetting, reordering or repeating rows all
    put another tensor there or write to it. (Tensors made in inference mode do not count writes; a
    caller that rewrites a pre-allocated cache there says so by ``forget``.)
    """

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[Any, dict[int, _Kept]] = WeakKeyDictionary()
        self._shared: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()

    def shared(self, cache: Any) -> dict[str, Any]:
        """Return what the layers' indices of a cache share; empty again once all are dropped."""
        held = self._shared.setdefault(cache, {})
        if not self._kept.get(cache):
            held.clear()
        return held

    def check(self, cache: Any, layer: int) -> None:
        """Drop a layer's index unless the cache is as it was left; called before it is written."""
        kept = self._kept.get(cache, {}).get(layer)
        if kept is None:
            return
        keys = getattr(cache_layer(cache, layer), "keys", None)
        if keys is None or kept.keys() is not keys or kept.version != _version(keys):
            self.drop(cache, layer)

    def get(self, cache: Any, layer: int, lengths: Lengths) -> Any | None:
        """Return a layer's index if it lacks just the current token."""
        kept = self._kept.get(cache, {}).get(layer)
        if kept is None or kept.lengths.starts != lengths.starts:
            return None
        before = kept.lengths
        if before.n + 1 != lengths.n:
            return None
        if before.kv_len is None or lengths.kv_len is None:
            return kept.index if before.kv_len is lengths.kv_len else None
        # A GPU would have to be waited for; there a caller moves every row by one token a step.
        if before.kv_len.is_cpu and not torch.equal(before.kv_len + 1, lengths.kv_len):
            return None
        return kept.index

    def keep(
        self, cache: Any, layer: int, index: Any, capacity: int, key: Tensor, lengths: Lengths
    ) -> None:
        """Keep an index that now describes the whole cache.

        Of a cache that cannot be watched no index is kept, and each is built at every step.
        """
        if not can_watch(cache, layer, key):
            self.drop(cache, layer)
            return
        keys = cache_layer(cache, layer).keys
        kept = _Kept(index, capacity, ref(keys), _version(keys), lengths)
        self._kept.setdefault(cache, {})[layer] = kept

    def capacity(self, cache: Any, layer: int) -> int:
        """Return the slots that a layer's kept index has room for."""
        return self._kept[cache][layer].capacity

    def undo_append(self, cache: Any) -> None:
        """Take the newest token back from a cache's indices; what it wrote is written over."""
        for kept in self._kept.get(cache, {}).values():
            kept.index.undo_append()
            kv_len = kept.lengths.kv_len
            kv_len = None if kv_len is None else kv_len - 1
            kept.lengths = replace(kept.lengths, n=kept.lengths.n - 1, kv_len=kv_len)

    def drop(self, cache: Any, layer: int) -> None:
        """Drop a layer's index, and where the cache's indices share something, all of them."""
        if cache is None:
            return
        kept = self._kept.get(cache, {})
        if kept.pop(layer, None) is not None and self._shared.get(cache):
            kept.clear()  # what is shared holds the dropped layer's part, which would count twice

    def forget(self, cache: Any) -> None:
        """Drop all indices of a cache."""
        self._kept.pop(cache, None)


def can_watch(cache: Any, layer: int, key: Tensor) -> bool:
    """Say whether a layer's writes can be watched: it returned the keys that it stores.

    A cache that returns others, or a first part of them (quantised, offloaded), cannot.
    """
    keys = getattr(cache_layer(cache, layer), "keys", None)
    return keys is not None and (keys.data_ptr(), keys.stride()) == (key.data_ptr(), key.stride())


def _version(tensor: Tensor | None) -> int | None:
    """Return how often a tensor was written to, None where torch does not count."""
    return None if tensor is None or tensor.is_inference() else tensor._version
