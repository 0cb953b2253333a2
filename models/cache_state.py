"""What an attached method keeps beside a cache: an index of each layer, and what was captured.

It is kept on the cache object, so that a copy of a cache has a copy of it, also a pickled one. It
is valid for the very keys that it was made from, and follows the cache's own methods: rows are
taken along, and a cropped cache loses what was cropped.
"""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakSet

from torch import Tensor

from topkbench.methods.base import Index, SharedState, Traits
from topkbench.methods.captured import Captured
from topkbench.models.cache_watch import Lengths, can_watch
from topkbench.models.compat import cache_layer, cached_tokens

ATTRIBUTE = "topkbench_states"
"""Name of the cache's attribute: a mapping from a session's id to its ``CacheState``."""


@dataclass
class LayerState:
    """What is kept beside one layer of a cache.

    Attributes:
        captured: What was captured of the prompt, and which of the cache's tokens that is; None if
            no token was seen.
        index: The index, which matches the whole layer; None if there is none.
        capacity: Slots allocated in the index.
        lengths: The valid slots that the index covers; None without an index.
        tensors: The layer's keys and values when the state last matched them; empty if nothing is
            compared.
        versions: How often each of them had been written to.
        is_lost: Whether the keys were changed since by anything else than the cache's own methods.
    """

    captured: Captured | None = None
    index: Index | None = None
    capacity: int = 0
    lengths: Lengths | None = None
    tensors: tuple[Tensor | None, ...] = ()
    versions: tuple[int | None, ...] = ()
    is_lost: bool = False

    def matches(self, tensors: tuple[Tensor | None, ...]) -> bool:
        """Return whether these are the tensors that the state was made from, unchanged since.

        Cropping, resetting, reordering or repeating rows replace a tensor or write to it. (Writes
        to tensors made in inference mode are not counted; a caller that rewrites a pre-allocated
        cache there, other than by its own methods, attaches anew.)
        """
        same = all(one is other for one, other in zip(self.tensors, tensors, strict=True))
        return same and self.versions == _versions(tensors)

    def match(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Record that the state matches these tensors."""
        self.tensors, self.versions = tensors, _versions(tensors)

    def drop_index(self) -> None:
        """Forget the index."""
        self.index = self.lengths = None
        self.capacity = 0

    # A copied tensor has a count of writes of its own, so a copy counts from there.

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "versions": self.matches(self.tensors)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.versions = _versions(self.tensors) if state["versions"] else (-1,)


@dataclass
class CacheState:
    """What one session keeps beside one cache.

    Attributes:
        layers: The layers' states, by index.
        shared: What the layers' indices share.
    """

    layers: dict[int, LayerState] = field(default_factory=dict)
    shared: dict[str, SharedState] = field(default_factory=dict)


class StateStore:
    """The states that a session keeps on caches; ``close`` removes them.

    Args:
        traits: The method's.
    """

    def __init__(self, traits: Traits) -> None:
        self._traits = traits
        self._session = uuid.uuid4().hex
        self._caches: WeakSet[Any] = WeakSet()

    def state(self, cache: Any) -> CacheState:
        """Return a cache's state, empty if there was none."""
        self._caches.add(cache)
        sessions = vars(cache).setdefault(ATTRIBUTE, {})
        state: CacheState = sessions.setdefault(self._session, CacheState())
        return state

    def layer(self, cache: Any, layer: int) -> LayerState:
        """Return a layer's state, empty if there was none."""
        return self.state(cache).layers.setdefault(layer, LayerState())

    def close(self) -> None:
        """Remove the session's states from all caches that it has seen."""
        for cache in self._caches:
            sessions = vars(cache)[ATTRIBUTE]
            sessions.pop(self._session, None)
            if not sessions:
                delattr(cache, ATTRIBUTE)

    def _known(self, cache: Any) -> CacheState | None:
        """Return a cache's state; None if there is none, and none is made."""
        state: CacheState | None = getattr(cache, ATTRIBUTE, {}).get(self._session)
        if state is not None:  # a copy of a cache comes with a state
            self._caches.add(cache)
        return state

    # The index ----------------------------------------------------------------------------------

    def index(self, cache: Any, layer: int, lengths: Lengths, num_new: int) -> Index | None:
        """Return a layer's index if it lacks only the new tokens of each row, else None."""
        known = self.layer(cache, layer)
        if known.index is None or known.lengths is None:
            return None
        return known.index if lengths.follow(known.lengths, num_new) else None

    def shared(self, cache: Any) -> dict[str, SharedState]:
        """Return what a cache's indices share; emptied once all of them are dropped."""
        state = self.state(cache)
        if all(known.index is None for known in state.layers.values()):
            state.shared.clear()
        return state.shared

    def keep(
        self, cache: Any, layer: int, index: Index, capacity: int, key: Tensor, lengths: Lengths
    ) -> None:
        """Store an index that now matches the whole layer.

        If the cache's writes cannot be detected, nothing is stored and each step builds its index.

        Args:
            cache: The cache.
            layer: Index of the layer.
            index: The layer's index.
            capacity: Slots allocated in it.
            key: The keys that the layer returned.
            lengths: The valid slots.
        """
        if not can_watch(cache, layer, key):
            self.drop(cache, layer)
            return
        known = self.layer(cache, layer)
        known.index, known.capacity, known.lengths = index, capacity, lengths
        known.match(_states(cache, layer))

    def drop(self, cache: Any, layer: int) -> None:
        """Drop a layer's index, or all of the cache's indices if they share state."""
        state = self._known(cache)
        if state is None or layer not in state.layers or state.layers[layer].index is None:
            return
        state.layers[layer].drop_index()
        if state.shared:  # a rebuilt index would add its part to the shared state again
            for known in state.layers.values():
                known.drop_index()

    def undo_append(self, cache: Any) -> None:
        """Remove the newest token from a cache's indices; the next append overwrites its slot."""
        state = self._known(cache)
        for known in () if state is None else state.layers.values():
            if known.index is None or known.lengths is None:
                continue
            known.index.undo_append()
            kv_len = known.lengths.kv_len
            kv_len = None if kv_len is None else kv_len - 1
            known.lengths = replace(known.lengths, n=known.lengths.n - 1, kv_len=kv_len)

    # Changes of the cache -----------------------------------------------------------------------

    def check(self, cache: Any, layer: int) -> None:
        """Drop a layer's state if its keys were changed unnoticed; called before each change."""
        state = self._known(cache)
        known = None if state is None else state.layers.get(layer)
        if known is None or not known.tensors:
            return
        if not known.matches(_states(cache, layer)):
            self.drop(cache, layer)
            known.captured, known.is_lost = None, True
            known.match(())

    def saw(self, cache: Any, layer: int) -> None:
        """Record that a layer's state matches what the layer holds now."""
        state = self._known(cache)
        if state is not None and layer in state.layers:
            state.layers[layer].match(_states(cache, layer))

    def before_change(self, cache: Any) -> None:
        """Drop states that do not match; called before one of the cache's methods changes it."""
        for layer in self._layers(cache):
            self.check(cache, layer)

    def took_rows(self, cache: Any, rows: Tensor) -> None:
        """Follow a cache whose row ``b`` has become its former row ``rows[b]``."""
        state = self._known(cache)
        if state is None:
            return
        if self._traits.depends_on_prompt:
            for shared in state.shared.values():
                shared.take_rows(rows)
        for layer in self._layers(cache):
            known = state.layers[layer]
            if known.captured is not None:
                known.captured.take_rows(rows)
            if not self._traits.depends_on_prompt:
                known.drop_index()  # rebuilt from the keys alone
            elif known.index is not None and known.lengths is not None:
                known.index.take_rows(rows)
                known.lengths = known.lengths.take_rows(rows)
            self.saw(cache, layer)

    def was_cropped(self, cache: Any) -> None:
        """Follow a cache that may have lost its newest tokens."""
        state = self._known(cache)
        for layer in self._layers(cache):
            assert state is not None
            known, n = state.layers[layer], cached_tokens(cache, layer)
            if known.tensors and known.matches(_states(cache, layer)):
                continue
            if not self._restrict(known, n):
                self.drop(cache, layer)
            self.saw(cache, layer)

    def _restrict(self, known: LayerState, n: int | None) -> bool:
        """Restrict a layer's index to its first ``n`` slots; return whether that is possible."""
        if known.index is None or known.lengths is None or n is None or n < 1:
            return False
        if not self._traits.restricts or known.lengths.kv_len is not None:
            return False
        if self._traits.depends_on_prompt and (known.captured is None or n < known.captured.end):
            return False
        if n < known.lengths.n:
            known.index = known.index.first(n)
            known.lengths = replace(known.lengths, n=n)
        return True

    def _layers(self, cache: Any) -> Iterator[int]:
        state = self._known(cache)
        yield from () if state is None else list(state.layers)


def _states(cache: Any, layer: int) -> tuple[Tensor | None, ...]:
    """Return the keys and values that a cache's layer holds."""
    stored = cache_layer(cache, layer)
    return getattr(stored, "keys", None), getattr(stored, "values", None)


def _versions(tensors: tuple[Tensor | None, ...]) -> tuple[int | None, ...]:
    """Return how often each tensor was written to; None where torch does not count."""
    return tuple(
        None if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors
    )
