"""Full attention by torch alone."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from topkbench.kernels.shapes import valid_slots


def full_attention(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    scale: float,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return ``[B, Hq, dv]``; see the api for the arguments.

    The queries of a KV head are passed as if they were a sequence of queries, so that each key is
    read once for the whole group. ``enable_gqa`` does not do that on a CPU (measured 3 to 10 times
    slower).
    """
    num_kv_heads, num_slots = key_states.shape[1:3]
    grouped = query_states.unflatten(1, (num_kv_heads, -1))
    mask = None
    if kv_start is not None or kv_len is not None:
        valid = valid_slots(kv_start, kv_len, num_slots, key_states.device)
        mask = valid.expand(len(query_states), num_slots)[:, None, None]
    if softcap is None and sinks is None:
        out = scaled_dot_product_attention(
            grouped, key_states, value_states, attn_mask=mask, scale=scale
        )
    else:
        wide = torch.promote_types(query_states.dtype, torch.float32)
        logits = (grouped.to(wide) @ key_states.to(wide).transpose(-1, -2)) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        if sinks is not None:  # a further logit, whose value is zero
            column = sinks.to(wide).view(num_kv_heads, -1, 1)
            logits = torch.cat([logits, column.expand(*logits.shape[:-1], 1)], -1)
        weights = logits.softmax(-1)[..., :num_slots]
        out = (weights @ value_states.to(wide)).to(query_states.dtype)
    if mask is not None:
        # A softmax over no slot is undefined, and torch's backends return different values.
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out.flatten(1, 2)
