"""Holds the states of the prompts that are being decoded, once for all cells that use them."""

import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

from transformers import PreTrainedModel

from topkbench.methods.base import PREFILL_NEEDS
from topkbench.models.cache import Buffers, DecodeCache
from topkbench.models.compat import layer_devices
from topkbench.models.prefill import Prefill, prefill


class PrefillStore:
    """The prefills of the prompts that are being decoded, in memory.

    A sweep goes through its prompts batch by batch and calls ``release`` after each, so that the
    states of one batch are in memory. All cells decode in the same buffers, one after the other:
    a new cache begins at the prompts' ends again.

    Args:
        model: The model; each store serves one model.
        kept_bytes: Bytes of states to keep at ``release``, those of the first prompts, for a sweep
            that goes through few prompts several times.
        compute: Replaces ``prefill`` in tests.

    Attributes:
        forwards: Number of prompts that this store computed.
        shared: What cells keep for each other of the prompts in memory; emptied at ``release``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kept_bytes: int = 0,
        compute: Callable[[PreTrainedModel, Sequence[int], frozenset[str]], Prefill] = prefill,
    ) -> None:
        self.model = model
        self.kept_bytes = kept_bytes
        self.forwards = 0
        self.shared: dict[Hashable, Any] = {}
        self._compute = compute
        self._states: dict[tuple[int, ...], Prefill] = {}
        self._buffers: Buffers | None = None
        self._rows: list[tuple[int, ...]] = []  # the prompts of the buffers' rows
        self._users: WeakSet[DecodeCache] = WeakSet()

    def get(self, token_ids: Sequence[int], needs: frozenset[str] = frozenset()) -> Prefill:
        """Return the prompt's states, computed unless they are in memory.

        Args:
            token_ids: The prompt.
            needs: What must have been captured; if something is missing, the prefill runs again.
        """
        needs &= PREFILL_NEEDS
        key = tuple(token_ids)
        states = self._states.get(key)
        if states is None or not needs <= states.needs:
            states = self._states[key] = self.compute_states(token_ids, needs, states)
        return states

    def cache(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        needs: frozenset[str] = frozenset(),
    ) -> DecodeCache:
        """Return a cache that holds prompts and has free slots, to decode them.

        The keys and values are those of the store, not a copy, unless another cache is in use that
        has the same prompts.

        Args:
            prompts: The token ids of each row.
            new_tokens: Free slots after the longest prompt.
            needs: See ``get``.
        """
        rows = [tuple(ids) for ids in prompts]
        states = [self.get(ids, needs) for ids in rows]
        if self._users:
            return DecodeCache.on(layer_devices(self.model), states, new_tokens)
        shared = self._shared(rows, max(map(len, rows)) + new_tokens)
        cache = DecodeCache(states, new_tokens, shared)
        self._users.add(cache)
        return cache

    def _shared(self, rows: list[tuple[int, ...]], capacity: int) -> Buffers:
        """Return buffers of prompts that other caches may use later."""
        first = _position(rows, self._rows)
        if first is None:
            self._rows, self._buffers, first = rows, None, 0
        if self._buffers is None or self._buffers.capacity < capacity:
            states = [self._states[ids] for ids in self._rows]
            self._buffers = None  # each layer is freed once it has moved
            self._buffers = Buffers.of(states, capacity, layer_devices(self.model), move=True)
        return self._buffers.rows(first, first + len(rows))

    def release(self) -> None:
        """Drop the states that are not kept."""
        self._buffers, self._rows = None, []
        self.shared.clear()
        left = self.kept_bytes
        for key, states in list(self._states.items()):
            left -= states.num_bytes
            del self._states[key]
            if left >= 0:
                with contextlib.suppress(MemoryError, RuntimeError):  # memory for them is short
                    self._states[key] = states.copied()

    def compute_states(
        self, token_ids: Sequence[int], needs: frozenset[str], stored: Prefill | None = None
    ) -> Prefill:
        """Compute a prefill, or only the captures that ``stored`` lacks."""
        self.forwards += 1
        if stored is None:
            return self._compute(self.model, token_ids, needs)
        captured = self._compute(self.model, token_ids, needs - stored.needs).captured
        if stored.captured:
            captured = {at: one.merged(captured[at]) for at, one in stored.captured.items()}
        return replace(stored, captured=captured)


def _position(some: Sequence[object], all_: Sequence[object]) -> int | None:
    """Return where some items are in a sequence, one after the other; None if they are not."""
    starts = range(len(all_) - len(some) + 1)
    return next((at for at in starts if all_[at : at + len(some)] == some), None)
