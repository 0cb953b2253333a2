"""Which slots of a cache are valid, and whether a stored index still matches its cache."""

from dataclasses import dataclass, replace
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor

from topkbench.methods.base import Index
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

    def lengths(self, cache: Any, stored: Any, key: Tensor, mask: Tensor | None) -> Lengths | None:
        """Return the valid slots at this layer, or None if a row's are not one range.

        Args:
            cache: The transformers cache.
            stored: The cache's object for this layer.
            key: ``[B, Hkv, slots, d]`` the keys that it returned.
            mask: Transformers' mask, which covers padding and unwritten slots.
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
        return self._read


def is_decode_cache(cache: Any) -> bool:
    """Return whether a cache is topkbench's DecodeCache, which records its rows' lengths."""
    return hasattr(cache, "topkbench_lengths")


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


@dataclass
class _Entry:
    """An index, and the state of its cache when the two last matched."""

    index: Index
    capacity: int
    keys: "ReferenceType[Tensor]"
    version: int | None
    lengths: Lengths


class IndexStore:
    """The indices of each cache's layers; they live as long as the cache object.

    An index is valid if the cache layer still holds the same key tensor as after the index's last
    token, and that tensor has not been written to since: cropping, resetting, reordering or
    repeating rows all replace the tensor or write to it. (Writes to tensors made in inference mode
    are not counted; a caller that rewrites a pre-allocated cache there attaches anew.)
    """

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[Any, dict[int, _Entry]] = WeakKeyDictionary()
        self._shared: WeakKeyDictionary[Any, dict[str, object]] = WeakKeyDictionary()

    def shared(self, cache: Any) -> dict[str, object]:
        """Return the objects that a cache's indices share; emptied once all are dropped."""
        shared = self._shared.setdefault(cache, {})
        if not self._entries.get(cache):
            shared.clear()
        return shared

    def check(self, cache: Any, layer: int) -> None:
        """Drop a layer's index if the cache has changed since; called before each write."""
        entry = self._entries.get(cache, {}).get(layer)
        if entry is None:
            return
        keys = getattr(cache_layer(cache, layer), "keys", None)
        if keys is None or entry.keys() is not keys or entry.version != _version(keys):
            self.drop(cache, layer)

    def get(self, cache: Any, layer: int, lengths: Lengths) -> Index | None:
        """Return a layer's index if it lacks only the current token, else None."""
        entry = self._entries.get(cache, {}).get(layer)
        if entry is None or entry.lengths.starts != lengths.starts:
            return None
        before = entry.lengths
        if before.n + 1 != lengths.n:
            return None
        if before.kv_len is None or lengths.kv_len is None:
            return entry.index if before.kv_len is lengths.kv_len else None
        # Not compared on a GPU, which would synchronise; there every row gains one token a step.
        if before.kv_len.is_cpu and not torch.equal(before.kv_len + 1, lengths.kv_len):
            return None
        return entry.index

    def keep(
        self, cache: Any, layer: int, index: Index, capacity: int, key: Tensor, lengths: Lengths
    ) -> None:
        """Store an index that now matches the whole cache.

        If the cache's writes cannot be watched, nothing is stored and each step builds its index.
        """
        if not can_watch(cache, layer, key):
            self.drop(cache, layer)
            return
        keys = cache_layer(cache, layer).keys
        entry = _Entry(index, capacity, ref(keys), _version(keys), lengths)
        self._entries.setdefault(cache, {})[layer] = entry

    def capacity(self, cache: Any, layer: int) -> int:
        """Return the slots allocated in a layer's stored index."""
        return self._entries[cache][layer].capacity

    def undo_append(self, cache: Any) -> None:
        """Remove the newest token from a cache's indices; the next append overwrites its slot."""
        for entry in self._entries.get(cache, {}).values():
            entry.index.undo_append()
            kv_len = entry.lengths.kv_len
            kv_len = None if kv_len is None else kv_len - 1
            entry.lengths = replace(entry.lengths, n=entry.lengths.n - 1, kv_len=kv_len)

    def drop(self, cache: Any, layer: int) -> None:
        """Drop a layer's index, or all of the cache's indices if they share state."""
        if cache is None:
            return
        entries = self._entries.get(cache, {})
        if entries.pop(layer, None) is not None and self._shared.get(cache):
            entries.clear()  # a rebuilt index would add its part to the shared state again


def can_watch(cache: Any, layer: int, key: Tensor) -> bool:
    """Return whether writes to a layer can be detected: it returned the very keys it stores.

    A cache that returns other tensors, or a part of its keys (quantised, offloaded), cannot be
    watched.
    """
    keys = getattr(cache_layer(cache, layer), "keys", None)
    return keys is not None and (keys.data_ptr(), keys.stride()) == (key.data_ptr(), key.stride())


def _version(tensor: Tensor | None) -> int | None:
    """Return how often a tensor was written to; None if torch does not count."""
    return None if tensor is None or tensor.is_inference() else tensor._version
