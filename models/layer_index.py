"""Builds an attached method's indices, and captures what they need of the prompt."""

from contextlib import nullcontext
from typing import Any

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
from topkbench.models.cache_state import StateStore
from topkbench.models.cache_watch import (
    LengthReader,
    Lengths,
    can_watch,
    is_decode_cache,
    stores_latents,
)
from topkbench.models.compat import cache_layer, max_slots

LEAST_SPARE = 256  # slots that an index gets beyond the tokens of a cache that grows


class LayerIndices:
    """One method's indices of the layers of each cache, built when a layer first decodes.

    Args:
        method: The method.
        observer: Is called around building, appending and capturing.
        reader: Reads the valid slots of a cache.

    Attributes:
        store: Keeps indices and captures beside their caches.
        captures: Whether prompts are captured: what the method needs of them, or where they end.
    """

    def __init__(self, method: AnyMethod, observer: Observer, reader: LengthReader) -> None:
        self.method, self.observer, self.reader = method, observer, reader
        self.store = StateStore(method.traits)
        self._needs = method.traits.needs & PREFILL_NEEDS
        self.captures = bool(self._needs) or method.traits.depends_on_prompt

    def before_new_tokens(self, cache: Any, context: StepContext, lengths: Lengths) -> Index:
        """Return a layer's index of the tokens before the new ones, built if needed.

        Args:
            cache: The cache.
            context: The step of the newest token.
            lengths: The cache's valid slots.

        Raises:
            ValueError: If the index must be built and cannot be; one sentence says why.
        """
        layer, num_new = context.layer, context.cache.new_tokens
        index = self.store.index(cache, layer, lengths, num_new)
        capacity = 0 if index is None else self.store.layer(cache, layer).capacity
        if capacity < lengths.n:
            capacity = _capacity(cache_layer(cache, layer), lengths.n)
            if index is not None and self.method.traits.depends_on_prompt:
                index.grow(capacity)
                self.store.layer(cache, layer).capacity = capacity
            else:
                index = None
        if index is not None:
            known: Index = index
            return known
        self.store.drop(cache, layer)
        self._check_can_build(cache, layer, context.cache.key_states)
        captured = self._inputs(cache, layer, lengths.n - num_new)
        shared = self.store.shared(cache)
        with self.observer.stage("build", layer):
            built: Index = self.method.index_prompt(context, capacity, captured, shared)
        self.store.layer(cache, layer).capacity = capacity
        return built

    def keep(self, cache: Any, layer: int, index: Index, key: Tensor, lengths: Lengths) -> None:
        """Keep an index that now covers the whole layer; see ``StateStore.keep``."""
        capacity = self.store.layer(cache, layer).capacity
        self.store.keep(cache, layer, index, capacity, key, lengths)

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
        sinks: Tensor | None,
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
            sinks: ``[Hq]`` the logits of the attention's learned sinks, or None.

        Raises:
            ValueError: If the method needs queries, and rows of the prompt end at different slots
                or have holes.
        """
        newest = None if mask is None else mask[:, :, -1:]
        lengths = self.reader.lengths(cache, cache_layer(cache, layer), key, newest)
        if self._needs and (lengths is None or lengths.kv_len is not None):
            raise ValueError(
                f"{self.method.name} reads queries of the prompt, so all rows must end at the same "
                "slot without holes, got a mask with holes or padding on the right; pad on the "
                "left."
            )
        n = key.shape[2] if lengths is None else lengths.n
        kv_start = None if lengths is None else lengths.kv_start
        known = self.store.layer(cache, layer)
        if known.captured is None:
            known.captured = Captured(self._needs)
        stage = self.observer.stage("build", layer) if self._needs else nullcontext()
        with torch.no_grad(), stage:
            known.captured.update(query, key[:, :, :n], scale, kv_start, softcap, sinks)
        if known.captured.begin == 0:  # a new prompt
            known.is_lost = False

    def _inputs(self, cache: Any, layer: int, n: int) -> dict[str, Tensor | None]:
        """Return what was captured of the first ``n`` slots, as arguments of ``PrefillInputs``.

        Raises:
            ValueError: If the method depends on the prompt, and what was captured is not of exactly
                these slots.
        """
        name = self.method.name
        if is_decode_cache(cache):  # filled with whole prefills by topkbench's own loop
            captured = cache.topkbench_captured(layer)
        else:
            known = self.store.layer(cache, layer)
            if known.is_lost and self.captures:
                raise ValueError(
                    f"{name} depends on which tokens were the prompt, and this cache was changed "
                    "by other means than its own methods (crop, reorder_cache, ...); prefill a new "
                    "one."
                )
            captured = known.captured
            if captured is None and not self._needs and self.captures:
                captured = known.captured = Captured(self._needs, end=n)  # all of it is the prompt
            if captured is not None:
                self._check_covers(captured, n)
        inputs = {} if captured is None else captured.inputs(n)
        lacking = missing(self._needs, inputs)
        if lacking:
            raise ValueError(
                f"{name} needs {' and '.join(lacking)} of the prompt, and this cache was filled "
                "without capturing them; prefill it inside the with block of attach."
            )
        return inputs

    def _check_covers(self, captured: Captured, n: int) -> None:
        """Check that what was captured is of exactly the first ``n`` slots.

        Raises:
            ValueError: If it is not.
        """
        name, part = self.method.name, captured.of_part()
        if part:
            raise ValueError(
                f"{name} needs {' and '.join(part)} of all tokens, and the first {captured.begin} "
                "of this cache were read or decoded without capturing them; prefill the whole "
                "prompt inside the with block of attach."
            )
        if n > captured.end:
            raise ValueError(
                f"{name} depends on the steps so far, and the index that held those after the "
                f"{captured.end} tokens of the prompt was lost when the cache was changed; prefill "
                f"the prompt again instead of decoding token {n + 1} of this cache."
            )
        if n < captured.end:
            if self._needs:
                raise ValueError(
                    f"{name} needs what was captured of a prompt, and this cache was cropped to "
                    f"{n} of its {captured.end} tokens; prefill the shorter prompt again."
                )
            captured.end = n  # the rest is the prompt

    def _check_can_build(self, cache: Any, layer: int, key: Tensor) -> None:
        """Check that an index built now sees every token and, if it compacts, can free memory.

        Raises:
            ValueError: If steps would go unnoticed, tokens are missing, or the cache frees nothing.
        """
        if self.captures and not can_watch(cache, layer, key):
            raise ValueError(
                f"{self.method.name} needs its index kept from step to step, and a "
                f"{type(cache).__name__} returns other keys than it stores, so that changes to it "
                "cannot be detected; use a DynamicCache or topkbench's DecodeCache."
            )
        stored = cache_layer(cache, layer)
        if self.method.compacts and stores_latents(cache, layer, key):
            raise ValueError(
                "mode=compact can free keys and values only where the cache stores them, and this "
                "model's stores latent vectors, which all heads share; use mode=masked, which "
                "selects the same."
            )
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
    return n + max(LEAST_SPARE, n // 4) if slots is None else max(slots, n)
