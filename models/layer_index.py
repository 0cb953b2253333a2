"""Builds an attached method's indices, and captures what they need of the prompt."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from topkbench.methods.base import (
    PREFILL_NEEDS,
    AnyMethod,
    Index,
    Observer,
    Selection,
    StepContext,
)
from topkbench.methods.captured import Captured, missing
from topkbench.models.cache_watch import (
    IndexStore,
    LengthReader,
    Lengths,
    can_watch,
    is_decode_cache,
)
from topkbench.models.compat import cache_layer, max_slots


class LayerIndices:
    """One method's indices of the layers of each cache, built when a layer first decodes.

    Args:
        method: The method.
        observer: Is called around building, appending and capturing.
        reader: Reads the valid slots of a cache.

    Attributes:
        store: Keeps the indices beside their caches.
    """

    def __init__(self, method: AnyMethod, observer: Observer, reader: LengthReader) -> None:
        self.method, self.observer, self.reader = method, observer, reader
        self.store = IndexStore()
        self.needs = method.traits.needs & PREFILL_NEEDS
        self.has_history = method.traits.index == "history"
        self._captured: WeakKeyDictionary[Any, dict[int, Captured]] = WeakKeyDictionary()

    def index(self, cache: Any, key: Tensor, context: StepContext, lengths: Lengths) -> Index:
        """Return a layer's index, built if needed, with the current token appended.

        Args:
            cache: The cache.
            key: The keys that the cache's layer returned.
            context: The step.
            lengths: The cache's valid slots.
        """
        layer = context.layer
        index = self.store.get(cache, layer, lengths)
        capacity = 0 if index is None else self.store.capacity(cache, layer)
        if capacity < lengths.n:
            capacity = _capacity(cache_layer(cache, layer), lengths.n)
            if index is not None and self.has_history:
                index.grow(capacity)  # rebuilding would lose the accumulated history
            else:
                index = None
        if index is None:
            self.store.drop(cache, layer)
            self._check_can_build(cache, layer, key)
            captured, shared = self._inputs(cache, layer, lengths.n - 1), self.store.shared(cache)
            with self.observer.stage("build", layer):
                index = self.method.index_prompt(context, capacity, captured, shared)
        with self.observer.stage("append", layer):
            self.method.append(index, *context.cache.newest())
        self.store.keep(cache, layer, index, capacity, key, lengths)
        built: Index = index
        return built

    def compact(self, cache: Any, index: Index, selection: Selection, context: StepContext) -> None:
        """Free the tokens that a step did not select, at the first step and whenever full."""
        layer, kept = context.layer, selection.indices
        stored = cache_layer(cache, layer)
        is_due = kept.shape[2] < context.cache.n if stored.freed is None else stored.is_full
        if not is_due:
            return
        cache.topkbench_keep(layer, kept)
        capacity = max_slots(stored)
        assert capacity is not None  # the cache is topkbench's own
        index.renumber(kept, capacity)
        lengths = self.reader.lengths(cache, stored, stored.keys, None)
        assert lengths is not None  # the cache is topkbench's own
        self.store.keep(cache, layer, index, capacity, stored.keys, lengths)

    def capture(
        self,
        layer: int,
        cache: Any,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> None:
        """Store what the method needs from a dense forward, alongside the cache.

        Args:
            layer: Index of the layer.
            cache: The cache.
            query: ``[B, Hq, q, d]``.
            key: ``[B, Hkv, n, d]``.
            mask: The forward's mask.
            scale: The attention's factor on dot products.
            softcap: The attention's logit cap, or None.

        Raises:
            ValueError: If rows of the prompt end at different slots or have holes.
        """
        newest = None if mask is None else mask[:, :, -1:]
        lengths = self.reader.lengths(cache, cache_layer(cache, layer), key, newest)
        if lengths is None or lengths.kv_len is not None:
            raise ValueError(
                f"{self.method.name} reads queries of the prompt, so all rows must end at the same "
                "slot without holes, got a mask with holes or padding on the right; pad on the "
                "left."
            )
        layers = self._captured.setdefault(cache, {})
        captured = layers.setdefault(layer, Captured(self.needs))
        with torch.no_grad(), self.observer.stage("build", layer):
            captured.update(query, key[:, :, : lengths.n], scale, lengths.kv_start, softcap)

    def _inputs(self, cache: Any, layer: int, n: int) -> dict[str, Tensor | None]:
        """Return what was captured for the first ``n`` slots, as arguments of ``PrefillInputs``.

        Raises:
            ValueError: If something that the method needs was not captured.
        """
        if is_decode_cache(cache):
            captured = cache.topkbench_captured(layer)
        else:
            captured = self._captured.get(cache, {}).get(layer)
        inputs = {} if captured is None else captured.inputs(n)
        lacking = missing(self.needs, inputs)
        if lacking:
            raise ValueError(
                f"{self.method.name} needs {' and '.join(lacking)} of the prompt, and this cache "
                "was filled without capturing them; prefill it inside the with block of attach."
            )
        return inputs

    def _check_can_build(self, cache: Any, layer: int, key: Tensor) -> None:
        """Check that an index built now sees every token and, if it compacts, can free memory.

        Raises:
            ValueError: If steps would go unnoticed, tokens are missing, or the cache frees nothing.
        """
        if self.has_history and not can_watch(cache, layer, key):
            raise ValueError(
                f"{self.method.name} needs its index kept from step to step, and a "
                f"{type(cache).__name__} returns other keys than it stores, so that changes to it "
                "cannot be detected; use a DynamicCache or topkbench's DecodeCache."
            )
        stored = cache_layer(cache, layer)
        if getattr(stored, "freed", None) is not None:
            raise ValueError(
                f"{self.method.name} must see the whole prompt, and tokens of this cache have been "
                "freed; prefill a new one."
            )
        if self.method.compacts and not hasattr(cache, "topkbench_keep"):
            raise ValueError(
                f"mode=compact can free memory only of topkbench's own DecodeCache, got a "
                f"{type(cache).__name__}; use mode=masked, which selects the same."
            )


def _capacity(stored: Any, n: int) -> int:
    """Return the slots to allocate: the cache layer's, or ``n`` and spare ones if it grows."""
    slots = max_slots(stored)
    return n + max(256, n // 4) if slots is None else max(slots, n)
