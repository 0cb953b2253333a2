"""Checks whether queries can be speculated from the previous layer's input (InfiniGen)."""

import itertools
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from topkbench.models.compat import (
    AttentionCall,
    PreTrainedModel,
    attention_modules,
    layer_of,
    read_call,
    speculate_queries,
    token_logits,
)
from topkbench.models.watch import watched_attention

TOKENS = 4  # at the beginning of the model's window, and as many at its end
TOLERANCE = 1e-2  # relative to the queries' norm; another rotation or norm makes 0.1 and more

_REASONS: "WeakKeyDictionary[PreTrainedModel, str | None]" = WeakKeyDictionary()


def unsupported_reason(model: PreTrainedModel) -> str | None:
    """Return one sentence saying why queries cannot be speculated in a model, or None.

    They are computed outside the attention module, which repeats a part of its forward. So it is
    checked, once for each model, that a layer's own input gives the layer's queries, with the
    rotary positions that the previous layer was given.

    Args:
        model: A decoder-only model without an attached method.
    """
    if model not in _REASONS:
        _REASONS[model] = _difference(model)
    return _REASONS[model]


def _difference(model: PreTrainedModel) -> str | None:
    modules = attention_modules(model)
    layers = list(map(layer_of, modules))
    alone = [layer for layer in layers if layer and layer - 1 not in layers]
    if alone:
        return (
            f"queries are speculated from the input of the previous layer's attention, and the"
            f" layer before layer {alone[0]} of {type(model).__name__} has none; use another"
            " method."
        )
    calls, queries = _own_inputs(model)
    for before, module in itertools.pairwise(modules):
        layer = layer_of(module)
        own, previous = calls.get(layer), calls.get(layer_of(before))
        rotary = None if previous is None else previous.rotary
        if own is None or own.hidden_states is None or rotary is None or layer not in queries:
            found = "they are given no rotary positions"
        else:
            try:
                with torch.no_grad():
                    speculated = speculate_queries(module, own.hidden_states, rotary)
                error = _relative_error(speculated, queries[layer])
            # Whatever a forward of another kind makes of it: the repeated part does not fit.
            except Exception as failure:
                found = f"{type(failure).__name__}: {' '.join(str(failure).split())[:80]}"
            else:
                if error <= TOLERANCE:
                    continue
                found = f"they differ by {error:.0%} of the queries' norm"
        return (
            f"a layer's queries must be those that Llama's attention would compute from its input, "
            f"to be speculated from the previous layer's, and in layer {layer} of "
            f"{type(model).__name__} they are not ({found}); use another method."
        )
    return None


def _own_inputs(model: PreTrainedModel) -> tuple[dict[int, AttentionCall], dict[int, Tensor]]:
    """Run a few tokens; return each layer's input and its post-RoPE queries."""
    calls: dict[int, AttentionCall] = {}
    queries: dict[int, Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[layer_of(module)] = read_call(args, kwargs)

    config: Any = model.config.get_text_config(decoder=True)
    window = int(getattr(config, "max_position_embeddings", None) or 2 * TOKENS)
    ids = torch.arange(2 * TOKENS, device=model.device)[None] % int(config.vocab_size)
    positions = torch.arange(2 * TOKENS, device=model.device)[None]
    positions[:, TOKENS:] += max(0, window - 2 * TOKENS)
    hooks = [
        module.register_forward_pre_hook(before, with_kwargs=True)
        for module in attention_modules(model)
    ]
    try:
        with watched_attention(model, lambda call: queries.update({call.layer: call.query_states})):
            token_logits(model, ids, None, positions)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, queries


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference over the norm of what is wanted."""
    if found.shape != wanted.shape:
        raise ValueError(f"queries of shape {list(found.shape)} for {list(wanted.shape)}")
    return float((found - wanted).float().norm() / wanted.float().norm().clamp_min(1e-12))
