"""A prompt's prefill: computed once and shared by every cell that needs it."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from topkbench.methods.base import PREFILL_NEEDS
from topkbench.methods.captured import Captured
from topkbench.models.compat import token_logits
from topkbench.models.watch import LayerCall, watched_attention


@dataclass(frozen=True)
class Prefill:
    """The states of one prompt, in host memory, as many prompts exceed an accelerator's.

    Attributes:
        key_states: For each layer ``[Hkv, n, d]`` post-RoPE keys.
        value_states: For each layer ``[Hkv, n, d]``.
        logits: ``[vocabulary]`` of the last token.
        milliseconds: Time of the forward, without capturing.
        captured: For each layer a query tail ``[1, Hq, w, d]`` and column sums ``[1, Hq, n]``;
            empty if nothing was captured.
    """

    key_states: tuple[Tensor, ...]
    value_states: tuple[Tensor, ...]
    logits: Tensor
    milliseconds: float
    captured: tuple[Captured, ...] = ()

    @property
    def needs(self) -> frozenset[str]:
        """What was captured beyond keys and values."""
        return self.captured[0].needs if self.captured else frozenset()

    def needs_ms(self, needs: frozenset[str]) -> float:
        """Return the milliseconds that capturing ``needs`` took, over all layers."""
        return sum(one.milliseconds.get(need, 0.0) for one in self.captured for need in needs)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return int(self.key_states[0].shape[1])

    @property
    def num_layers(self) -> int:
        """Number of layers of the model."""
        return len(self.key_states)

    @property
    def num_bytes(self) -> int:
        """Bytes of all states."""
        captured = [states for one in self.captured for states in (one.query_tail, one.column_sums)]
        states = (*self.key_states, *self.value_states, *captured)
        return sum(one.nbytes for one in states if one is not None)


@torch.no_grad()
def prefill(
    model: PreTrainedModel, token_ids: Sequence[int], needs: frozenset[str] = frozenset()
) -> Prefill:
    """Run the model over one prompt with dense attention.

    Args:
        model: A decoder-only model with an ordinary attention implementation.
        token_ids: The prompt, special tokens included.
        needs: What to capture beyond keys and values: ``query_tail``, ``column_sums``.
    """
    cache = DynamicCache()
    ids = torch.tensor([list(token_ids)], device=model.device)
    captured: list[Captured] = []

    def capture(call: LayerCall) -> None:
        one = Captured(needs)
        one.update(call.query_states, call.key_states, call.scale, softcap=call.softcap)
        captured.append(one)

    began = time.perf_counter()
    with watched_attention(model, capture) if needs else nullcontext():
        logits = token_logits(model, ids, cache)[0]
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
    milliseconds = (time.perf_counter() - began) * 1e3
    milliseconds -= sum(sum(one.milliseconds.values()) for one in captured)
    layers: list[Any] = cache.layers
    return Prefill(
        tuple(layer.keys[0].cpu() for layer in layers),
        tuple(layer.values[0].cpu() for layer in layers),
        logits.float().cpu(),
        milliseconds,
        tuple(one.to(torch.device("cpu")) for one in captured),
    )


class PrefillStore:
    """The prefills of the prompts that are being decoded, in memory.

    A sweep goes through its prompts batch by batch and calls ``release`` after each, so that the
    states of one batch are in memory.

    Args:
        model: The model; each store serves one model.
        kept_bytes: Bytes of states to keep at ``release``, those of the first prompts, for a sweep
            that goes through few prompts several times.
        compute: Replaces ``prefill`` in tests.

    Attributes:
        forwards: Number of prompts that this store computed.
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
        self._compute = compute
        self._states: dict[tuple[int, ...], Prefill] = {}

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

    def release(self) -> None:
        """Drop the states that are not kept."""
        left = self.kept_bytes
        for key, states in list(self._states.items()):
            left -= states.num_bytes
            if left < 0:
                del self._states[key]

    def compute_states(
        self, token_ids: Sequence[int], needs: frozenset[str], stored: Prefill | None = None
    ) -> Prefill:
        """Compute a prefill, or only the captures that ``stored`` lacks."""
        self.forwards += 1
        if stored is None:
            return self._compute(self.model, token_ids, needs)
        captured = self._compute(self.model, token_ids, needs - stored.needs).captured
        if stored.captured:
            pairs = zip(stored.captured, captured, strict=True)
            captured = tuple(old.merged(new) for old, new in pairs)
        return replace(stored, captured=captured)
