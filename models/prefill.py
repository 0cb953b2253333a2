"""A prompt's prefill: computed once and shared by every cell that needs it."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from topkbench.methods.captured import Captured
from topkbench.models.compat import token_logits
from topkbench.models.watch import LayerCall, watched_attention


@dataclass(frozen=True)
class Prefill:
    """The states of one prompt.

    Attributes:
        key_states: For each layer ``[Hkv, n, d]`` post-RoPE keys.
        value_states: For each layer ``[Hkv, n, d]``. A store replaces keys and values by equal
            ones in the cache that its cells decode in, one layer after the other.
        logits: ``[vocabulary]`` of the last token.
        milliseconds: Time of the forward, without capturing.
        captured: For each layer a query tail ``[1, Hq, w, d]`` and column sums ``[1, Hq, n]``;
            empty if nothing was captured.
    """

    key_states: list[Tensor]
    value_states: list[Tensor]
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

    def copied(self) -> Self:
        """Return the same states, keys and values in host memory of their own."""
        if not self.key_states[0]._is_view() and self.key_states[0].is_cpu:
            return self
        host = torch.device("cpu")
        keys = [states.to(host, copy=True) for states in self.key_states]
        values = [states.to(host, copy=True) for states in self.value_states]
        return replace(self, key_states=keys, value_states=values)

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
        states, shape = (call.query_states, call.key_states), (call.softcap, call.sinks)
        one.update(*states, call.scale, None, *shape)
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
        [layer.keys[0].cpu() for layer in layers],
        [layer.values[0].cpu() for layer in layers],
        logits.float().cpu(),
        milliseconds,
        tuple(one.to(torch.device("cpu")) for one in captured),
    )
