"""The pre-allocated KV cache for decoding a batch of prompts of different lengths."""

import copy
import weakref
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache

from topkbench.methods.captured import Captured
from topkbench.models.compat import CacheLayerMixin, LinearAttentionLayer, is_recurrent
from topkbench.models.prefill import Prefill
from topkbench.models.recurrent import LayerState

SPARE = 32  # free slots in a compacted layer: it takes this many new tokens between compactions


class DecodeLayer(CacheLayerMixin):
    """One layer's keys and values, ``[B, Hkv, capacity, d]``, written in place.

    Attributes:
        freed: int32 ``[B]`` tokens of each row that ``keep`` dropped; None before the first call.
        kv_len: Set by ``keep``: int32 ``[B]`` end of each row's slots in this layer, None if all
            rows end at the same slot.
    """

    keys: Tensor
    values: Tensor
    freed: Tensor | None = None
    kv_len: Tensor | None

    def __init__(self, owner: "DecodeCache", keys: Tensor, values: Tensor) -> None:
        super().__init__()
        # A weak reference: a cycle would leave gigabytes to the garbage collector.
        self.owner = weakref.proxy(owner)
        self.keys = keys
        self.values = values
        self.is_initialized = True
        self._n = 0  # slots in use after ``keep``

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the layer is allocated on construction."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens to the slots that ``DecodeCache.extend`` opened.

        Args:
            key_states: ``[B, Hkv, q, d]``; of one token in a layer that has freed tokens.
            value_states: ``[B, Hkv, q, d]``.
            args: Ignored.
            kwargs: Ignored.

        Returns:
            The used part of the buffers, ``[B, Hkv, n, d]``, as views.
        """
        owner = self.owner
        rows, slots = owner.rows.to(self.keys.device), owner.positions.to(self.keys.device)
        if self.freed is not None:
            self._n += 1
            if self.kv_len is not None:
                self.kv_len = self.kv_len + 1
            last = self._n - 1 if self.kv_len is None else self.kv_len[:, None].long() - 1
            slots = torch.zeros_like(slots) + last
        self.keys[rows[:, None], :, slots] = key_states.transpose(1, 2)
        self.values[rows[:, None], :, slots] = value_states.transpose(1, 2)
        n = self.get_seq_length()
        return self.keys[:, :, :n], self.values[:, :, :n]

    def keep(self, slots: Tensor) -> None:
        """Free all tokens except those at ``slots``, which move to the first slots.

        Args:
            slots: int32 ``[B, Hkv, m]`` slots that each KV head keeps, ascending, the same number
                for each head of a row, padded with -1 at the end.
        """
        batch_size, num_heads, m = slots.shape
        level = self.owner.topkbench_lengths[1] is None
        count = (slots[:, 0] >= 0).sum(-1, dtype=torch.int32)
        before = self._ends()
        self.freed = before - count + (0 if self.freed is None else self.freed)
        at = slots.clamp(min=0).long()[..., None]

        def moved(states: Tensor) -> Tensor:
            kept = states.new_zeros(batch_size, num_heads, m + SPARE, states.shape[3])
            kept[:, :, :m] = torch.take_along_dim(states, at, 2)
            return kept

        # One after the other, so that only one of the two large buffers is copied at a time.
        self.keys = moved(self.keys)
        self.values = moved(self.values)
        self.kv_len = None if level else count
        self._n = m

    def _ends(self) -> Tensor:
        """Return int32 ``[B]`` end of each row's slots in this layer."""
        if self.freed is None:
            return self.owner.kv_len.to(self.keys.device)
        if self.kv_len is not None:
            return self.kv_len
        return torch.full_like(self.freed, self._n)

    @property
    def is_full(self) -> bool:
        """Whether every slot is used."""
        return self.get_seq_length() >= self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many slots a mask covers, and the offset of the first."""
        return self.owner.n, 0

    def get_seq_length(self) -> int:
        """Return the slots in use in the longest row."""
        return self.owner.n if self.freed is None else self._n

    def get_max_length(self) -> int:
        """Return the number of allocated slots."""
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length  # its name in transformers 5.5


class HybridLayer(DecodeLayer, LinearAttentionLayer):  # type: ignore[misc]  # never initialised
    """A layer that has keys and values and, beside them, a state that each token changes."""


class Buffers:
    """The keys and values of a batch of prompts, left-aligned, with free slots after them.

    Args:
        keys: For each layer with attention ``[B, Hkv, capacity, d]``.
        values: Likewise ``[B, Hkv, capacity, dv]``.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        self.keys = keys
        self.values = values

    @classmethod
    def of(
        cls,
        prefills: Sequence[Prefill],
        capacity: int,
        devices: Sequence[torch.device],
        move: bool = False,
    ) -> Self:
        """Allocate buffers and copy prompts into them.

        Args:
            prefills: One per row.
            capacity: Slots of each row.
            devices: Each layer's device.
            move: Make the prefills views of the buffers, so that a layer's states are there once
                before the next one is copied.
        """
        buffers = cls([], [])
        for layer, device in enumerate(devices):
            for name, kept in (("key_states", buffers.keys), ("value_states", buffers.values)):
                rows = [getattr(prefill, name) for prefill in prefills]
                num_heads, _, head_dim = rows[0][layer].shape
                shape = (len(rows), num_heads, capacity, head_dim)
                buffer = torch.empty(shape, dtype=rows[0][layer].dtype, device=device)
                for index, states in enumerate(rows):
                    n = states[layer].shape[1]
                    buffer[index, :, :n] = states[layer]
                    if move:
                        states[layer] = buffer[index, :, :n]
                kept.append(buffer)
        return buffers

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        return self.keys[0].shape[2]

    def rows(self, first: int, end: int) -> Self:
        """Return the same buffers restricted to the rows from ``first`` to ``end - 1``."""
        keys = [states[first:end] for states in self.keys]
        return type(self)(keys, [states[first:end] for states in self.values])


class DecodeCache(Cache):
    """A batch of prefilled prompts, left-aligned, with slots for the tokens to decode.

    Row ``b`` uses the slots below ``kv_len[b]``. A token's slot is its position, so ``positions``
    are the position ids. Call ``extend`` before each forward. If that gives rows different numbers
    of tokens, shorter ones are padded behind; call ``drop_padding`` after it.

    Args:
        prefills: One per row.
        new_tokens: Slots for tokens after the longest prompt.
        buffers: Keys and values of the same prompts, in which the tokens are decoded; None
            allocates them, on the CPU. The counters are on the first layer's device.

    Attributes:
        n: Slots in use in the longest row.
        kv_len: int32 ``[B]`` end of each row's slots.
        ends: The same as Python's integers.
        positions: int64 ``[B, q]`` slots of the newest forward's tokens.
        new_tokens: How many of them each row has, without padding.
    """

    n: int
    ends: list[int]
    kv_len: Tensor
    positions: Tensor
    new_tokens: list[int]

    def __init__(
        self, prefills: Sequence[Prefill], new_tokens: int, buffers: Buffers | None = None
    ) -> None:
        lengths = [prefill.num_tokens for prefill in prefills]
        self.n = max(lengths)
        self.capacity = self.n + new_tokens
        if buffers is None:
            devices = [torch.device("cpu")] * prefills[0].num_layers
            buffers = Buffers.of(prefills, self.capacity, devices)
        devices = [states.device for states in buffers.keys]
        self._set_ends(lengths, devices[0])
        self.rows = torch.arange(len(prefills), device=devices[0])
        self.positions = self.kv_len[:, None].long() - 1
        self.new_tokens = [1] * len(prefills)
        own = prefills[0].layers or range(len(buffers.keys))
        made: dict[int, Any] = {}
        for layer, pair in zip(own, zip(buffers.keys, buffers.values, strict=True), strict=True):
            keys, values = (states[:, :, : self.capacity] for states in pair)
            for row, length in enumerate(lengths):  # slots to be written must not hold NaN
                keys[row, :, length:].zero_()
                values[row, :, length:].zero_()
            kind = HybridLayer if layer in prefills[0].states else DecodeLayer
            made[layer] = kind(self, keys, values)
        for layer, one in prefills[0].states.items():
            rows = [prefill.states[layer] for prefill in prefills]
            stored = made.setdefault(layer, copy.copy(one.layer))
            vars(stored).update(LayerState.batch(rows))
        super().__init__(layers=[made[layer] for layer in sorted(made)])
        self._captured: dict[int, Captured] = {}
        if all(prefill.captured for prefill in prefills):
            for layer, device in zip(own, devices, strict=True):
                if layer in prefills[0].captured:  # a window is not captured
                    parts = [prefill.captured[layer] for prefill in prefills]
                    self._captured[layer] = Captured.batch(parts, self.n, device)

    @classmethod
    def on(
        cls, devices: Sequence[torch.device], prefills: Sequence[Prefill], new_tokens: int
    ) -> Self:
        """Return a cache with buffers of its own, each layer on its device."""
        capacity = max(prefill.num_tokens for prefill in prefills) + new_tokens
        return cls(prefills, new_tokens, Buffers.of(prefills, capacity, devices))

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for keys and values, unused slots included."""
        layers: list[Any] = [one for one in self.layers if isinstance(one, DecodeLayer)]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    @property
    def is_recurrent(self) -> bool:
        """Whether some layer has a state that each token changes, padding included."""
        return any(is_recurrent(layer) for layer in self.layers)

    def topkbench_keep(self, layer: int, slots: Tensor) -> None:
        """Keep only ``slots`` of a layer, see ``DecodeLayer.keep``, and drop its captures."""
        stored: Any = self.layers[layer]
        stored.keep(slots)
        self._captured.pop(layer, None)

    def topkbench_captured(self, layer: int) -> Captured | None:
        """Return what was captured of a layer at prefill, or None."""
        return self._captured.get(layer)

    def extend(self, new_tokens: Sequence[int] | None = None) -> None:
        """Open slots for the tokens of the next forward.

        Args:
            new_tokens: How many each row has; None for one.

        Raises:
            ValueError: If there are not as many slots.
        """
        self.new_tokens = [1] * len(self.ends) if new_tokens is None else list(new_tokens)
        q = max(self.new_tokens)
        if self.n + q > self.capacity:
            raise ValueError(
                f"the cache must have room for {q} more in each row, got capacity={self.capacity}"
                f" with {self.n} in use; build it with more new_tokens."
            )
        begin = self.kv_len[:, None].long()
        self.positions = begin + torch.arange(q, device=begin.device)
        # In place, as a recorded CUDA graph reads the same tensor at each step.
        self.kv_len += q
        self.n += q
        self.ends = [end + q for end in self.ends]

    def drop_padding(self) -> None:
        """Let each row end at the last of its own new tokens."""
        q = max(self.new_tokens)
        ends = [end - q + count for end, count in zip(self.ends, self.new_tokens, strict=True)]
        if ends != self.ends:
            self._set_ends(ends, self.kv_len.device)

    def _set_ends(self, ends: list[int], device: torch.device) -> None:
        self.ends = ends
        self.n = max(ends)
        self._level = min(ends) == self.n
        self.kv_len = torch.tensor(ends, dtype=torch.int32, device=device)

    @property
    def topkbench_lengths(self) -> tuple[None, Tensor | None]:
        """Bounds of each row's valid slots: (None for 0, int32 ``[B]`` ends or None for all)."""
        return None, None if self._level else self.kv_len
