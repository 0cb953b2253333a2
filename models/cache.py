"""The cache that decoding writes to: allocated once, rows of different lengths, never joined."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from topkbench.methods.capture import Captured
from topkbench.models.prefill import Prefill


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """Return where each layer's attention runs: several devices, where a model is spread."""
    found: dict[int, torch.device] = {}
    for module in model.modules():
        layer: Any = getattr(module, "layer_idx", None)
        if isinstance(layer, int):
            found[layer] = next(module.parameters()).device
    return [found[layer] for layer in sorted(found)]


class DecodeLayer(CacheLayerMixin):
    """One layer's keys and values, ``[B, Hkv, capacity, d]``, written in place."""

    keys: Tensor
    values: Tensor

    def __init__(self, owner: "DecodeCache", keys: Tensor, values: Tensor) -> None:
        super().__init__()
        # Else the two would hold each other, and gigabytes wait for the garbage collector.
        self.owner = weakref.proxy(owner)
        self.keys = keys
        self.values = values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the layer is allocated when it is made."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token a row to the slots that ``DecodeCache.extend`` opened.

        Args:
            key_states: ``[B, Hkv, 1, d]``.
            value_states: ``[B, Hkv, 1, d]``.
            args: Ignored.
            kwargs: Ignored.

        Returns:
            The used part of the buffers, ``[B, Hkv, n, d]``, as views.
        """
        owner = self.owner
        rows, slots = owner.rows.to(self.keys.device), owner.slots.to(self.keys.device)
        self.keys[rows, :, slots] = key_states[:, :, 0]
        self.values[rows, :, slots] = value_states[:, :, 0]
        return self.keys[:, :, : owner.n], self.values[:, :, : owner.n]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many slots a mask would cover, and where they begin."""
        return self.owner.n, 0

    def get_seq_length(self) -> int:
        """Return the slots in use in the longest row."""
        return self.owner.n

    def get_max_length(self) -> int:
        """Return the slots there are."""
        return self.keys.shape[2]


class DecodeCache(Cache):
    """A batch of prefilled prompts, left-aligned, and room for what is decoded.

    Row ``b`` uses the slots below ``kv_len[b]``; a slot is a position, so ``positions`` are RoPE's.
    Call ``extend`` before each forward of one token a row.

    Args:
        prefills: One a row.
        new_tokens: Tokens that will be decoded, the longest row counts.
        devices: Where each layer's buffers live, the counters with the first; None for the CPU.
    """

    def __init__(
        self,
        prefills: Sequence[Prefill],
        new_tokens: int,
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        if devices is None:
            devices = [torch.device("cpu")] * prefills[0].num_layers
        lengths = [prefill.num_tokens for prefill in prefills]
        self.n = max(lengths)
        self._level = min(lengths) == self.n
        self.capacity = self.n + new_tokens
        self.kv_len = torch.tensor(lengths, dtype=torch.int32, device=devices[0])
        self.rows = torch.arange(len(prefills), device=devices[0])
        self.slots = self.kv_len.long() - 1
        layers: list[Any] = []
        for layer, device in enumerate(devices):
            keys = self._stack([prefill.key_states[layer] for prefill in prefills], device)
            values = self._stack([prefill.value_states[layer] for prefill in prefills], device)
            layers.append(DecodeLayer(self, keys, values))
        super().__init__(layers=layers)
        self._captured: list[Captured] = []
        if all(prefill.captured for prefill in prefills):
            for layer, device in enumerate(devices):
                parts = [prefill.captured[layer] for prefill in prefills]
                self._captured.append(Captured.batch(parts, self.n, device))

    def topkbench_captured(self, layer: int) -> Captured | None:
        """Return what was captured of a layer while the prompts were read, None if nothing."""
        return self._captured[layer] if self._captured else None

    def _stack(self, rows: Sequence[Tensor], device: torch.device) -> Tensor:
        num_heads, _, head_dim = rows[0].shape
        shape = (len(rows), num_heads, self.capacity, head_dim)
        buffer = torch.empty(shape, dtype=rows[0].dtype, device=device)
        for index, states in enumerate(rows):
            buffer[index, :, : states.shape[1]] = states
            buffer[index, :, states.shape[1] :].zero_()  # a slot never written must not hold NaN
        return buffer

    def extend(self) -> None:
        """Open one slot in every row for the token that is decoded next.

        Raises:
            ValueError: If there is no room.
        """
        if self.n >= self.capacity:
            raise ValueError(
                f"the cache must have room for one token more, got capacity={self.capacity} with "
                "all in use; build it with more new_tokens."
            )
        self.n += 1
        self.kv_len += 1
        self.slots = self.kv_len.long() - 1

    @property
    def positions(self) -> Tensor:
        """int64 ``[B, 1]`` position of each row's newest token."""
        return self.slots[:, None]

    @property
    def topkbench_lengths(self) -> tuple[None, Tensor | None]:
        """The valid slots of each row: from 0 to ``kv_len``, int32 ``[B]``; None if all are."""
        return None, None if self._level else self.kv_len
