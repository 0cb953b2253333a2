"""A prompt's prefill: computed once and shared by every cell that needs it."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from topkbench.methods.captured import Captured
from topkbench.models.compat import empty_cache, is_recurrent, partial_layers, token_logits
from topkbench.models.recurrent import LayerState
from topkbench.models.watch import LayerCall, watched_attention


@dataclass(frozen=True)
class Prefill:
    """The states of one prompt.

    Attributes:
        key_states: For each layer with attention ``[Hkv, n, d]`` post-RoPE keys.
        value_states: Likewise ``[Hkv, n, dv]``. A store replaces keys and values by equal ones in
            the cache that its cells decode in, one layer after the other.
        logits: ``[vocabulary]`` of the last token.
        milliseconds: Time of the forward, without capturing.
        captured: For each layer that attends to the whole past a query tail ``[1, Hq, w, d]`` and
            column sums ``[1, Hq, n]``; empty if nothing was captured.
        layers: The model's layers that ``key_states`` is of; None for the first ones.
        states: What the model's other layers keep.
    """

    key_states: list[Tensor]
    value_states: list[Tensor]
    logits: Tensor
    milliseconds: float
    captured: Mapping[int, Captured] = field(default_factory=dict)
    layers: Sequence[int] | None = None
    states: Mapping[int, LayerState] = field(default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        """What was captured beyond keys and values."""
        return next((one.needs for one in self.captured.values()), frozenset())

    def needs_ms(self, needs: frozenset[str]) -> float:
        """Return the milliseconds that capturing ``needs`` took, over all layers."""
        return sum(
            one.milliseconds.get(need, 0.0) for one in self.captured.values() for need in needs
        )

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return int(self.key_states[0].shape[1])

    @property
    def num_layers(self) -> int:
        """Number of layers with keys and values."""
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
        captured = (
            states for one in self.captured.values() for states in (one.query_tail, one.column_sums)
        )
        states = (*self.key_states, *self.value_states, *captured)
        own = sum(one.nbytes for one in states if one is not None)
        return own + sum(state.num_bytes for state in self.states.values())


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
    cache = empty_cache(model)
    ids = torch.tensor([list(token_ids)], device=model.device)
    captured: dict[int, Captured] = {}
    partial = partial_layers(model)

    def capture(call: LayerCall) -> None:
        if call.layer in partial:
            return
        one = captured[call.layer] = Captured(needs)
        states, shape = (call.query_states, call.key_states), (call.softcap, call.sinks)
        one.update(*states, call.scale, None, *shape)

    began = time.perf_counter()
    with watched_attention(model, capture) if needs else nullcontext():
        logits = token_logits(model, ids, cache)[0]
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
    milliseconds = (time.perf_counter() - began) * 1e3
    milliseconds -= sum(sum(one.milliseconds.values()) for one in captured.values())
    host = torch.device("cpu")
    stored: dict[int, Any] = dict(enumerate(cache.layers))
    layers = [at for at, one in stored.items() if getattr(one, "keys", None) is not None]
    return Prefill(
        [stored[at].keys[0].cpu() for at in layers],
        [stored[at].values[0].cpu() for at in layers],
        logits.float().cpu(),
        milliseconds,
        {at: one.to(host) for at, one in captured.items()},
        layers,
        {
            at: LayerState.of(one)
            for at, one in stored.items()
            if is_recurrent(one) or at not in layers
        },
    )
