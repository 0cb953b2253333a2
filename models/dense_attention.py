"""Dense attention with capped logits or learned sinks, which torch's SDPA does not offer."""

from typing import Any

import torch
from torch import Tensor, nn

from topkbench.methods.sinks import softmax
from topkbench.methods.softcap import capped
from topkbench.models.compat import sdpa_attention_forward

SINKS = "s_aux"
"""The keyword by which transformers passes learned sinks ``[Hq]`` to an attention function."""

# Queries per block: bounds the logits in memory to this many rows per head.
_QUERY_BLOCK = 256


def attend_to_all(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    options: dict[str, Any],
) -> Tensor:
    """Attend to everything that the mask allows, by torch's SDPA if it offers it.

    Args:
        module: The attention module.
        query: ``[B, Hq, q, d]``.
        key: ``[B, Hkv, n, d]``.
        value: ``[B, Hkv, n, dv]``.
        mask: As in ``dense_attention``.
        scale: Factor on the dot products.
        options: What else transformers passes to an attention function, by name.

    Returns:
        ``[B, q, Hq, dv]``.
    """
    softcap, sinks = options.get("softcap"), options.get(SINKS)
    if softcap is not None or sinks is not None:
        return dense_attention(query, key, value, mask, scale, softcap, sinks).transpose(1, 2)
    out, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scale, **options)
    return out


def dense_attention(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend to everything that a mask allows, a block of queries at a time.

    Args:
        query_states: ``[B, Hq, q, d]``.
        key_states: ``[B, Hkv, n, d]``.
        value_states: ``[B, Hkv, n, dv]``.
        mask: bool ``[B or 1, 1, q, n]``, True where a query sees a key; None for a causal prefill
            of the first ``q`` slots, or for a single query that sees everything.
        scale: Factor on the dot products.
        softcap: Logits become ``softcap * tanh(logits / softcap)``; None for no cap.
        sinks: ``[Hq]`` the logit of each query head's learned sink, which is in the softmax's
            denominator and has no value; None for no sinks.

    Returns:
        ``[B, Hq, q, dv]`` in the query's dtype.

    Source:
        Capped logits: Gemma 2 (arXiv:2408.00118), section 2. Sinks: gpt-oss (arXiv:2508.10925),
        section 2.
    """
    q_len = query_states.shape[2]
    is_causal = mask is None and q_len > 1
    if is_causal:
        key_states, value_states = key_states[:, :, :q_len], value_states[:, :, :q_len]
    slots = torch.arange(key_states.shape[2], device=query_states.device)
    num_kv_heads = key_states.shape[1]
    wide = torch.promote_types(query_states.dtype, torch.float32)
    keys = key_states[:, :, None].to(wide)
    blocks = []
    for first in range(0, q_len, _QUERY_BLOCK):
        block = query_states[:, :, first : first + _QUERY_BLOCK].to(wide)
        # [B, Hkv, G, q, n]
        logits = capped(block.unflatten(1, (num_kv_heads, -1)) @ keys.mT * scale, softcap)
        if is_causal:  # not of all queries at once, which would be n² numbers
            hidden = slots > slots[first : first + _QUERY_BLOCK, None]
        elif mask is not None:
            hidden = ~mask[:, :, None, first : first + _QUERY_BLOCK]
        if is_causal or mask is not None:
            # Not -inf: a padding query with every key masked must not become NaN.
            logits = logits.masked_fill(hidden, torch.finfo(wide).min)
        weights = softmax(logits, sinks).to(value_states.dtype)
        blocks.append((weights @ value_states[:, :, None]).flatten(1, 2))
    return torch.cat(blocks, 2).to(query_states.dtype)
