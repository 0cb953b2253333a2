"""Specification of sparse_attention."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def sparse_attention(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    indices: Tensor,
    scale: float,
    count: Tensor | None,
    log_weight: Tensor | None,
    unit_size: int,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, Hq, dv]`` and the log-sum-exp ``[B, Hq]``."""
    batch_size, num_heads, _ = query_states.shape
    num_slots = key_states.shape[2]
    group = num_heads // key_states.shape[1]
    device = query_states.device
    wide = torch.promote_types(query_states.dtype, torch.float32)

    # One selection for each query head: [B, Hq, m].
    repeats = num_heads // indices.shape[1]
    units = indices.repeat_interleave(repeats, dim=1).long()
    kept = units >= 0
    if count is not None:
        entries = torch.arange(units.shape[2], device=device)
        kept &= entries < count.repeat_interleave(repeats, dim=1)[..., None]

    # The slots of all units: [B, Hq, m * unit_size].
    zero = torch.zeros(batch_size, dtype=torch.int32, device=device)
    start = (zero if kv_start is None else kv_start).clamp(min=0)[:, None, None]
    end = (zero + num_slots if kv_len is None else kv_len).clamp(max=num_slots)[:, None, None]
    slots = units[..., None] * unit_size + torch.arange(unit_size, device=device)
    slots = slots.flatten(-2) + (start if unit_size > 1 else 0)
    kept = kept.repeat_interleave(unit_size, dim=-1) & (slots >= start) & (slots < end)
    gather = slots.where(kept, 0)[..., None]
    if num_slots == 0:  # an empty cache
        gather = gather[:, :, :0]
        kept = kept[:, :, :0]

    def chosen(states: Tensor) -> Tensor:
        """Gather the selected states of each query head, without a copy of all states for each."""
        shared = states[:, :, None].expand(-1, -1, group, -1, -1)
        at = gather.unflatten(1, (-1, group)).expand(*[-1] * 4, states.shape[3])
        return shared.gather(3, at).flatten(1, 2).to(wide)

    keys, values = chosen(key_states), chosen(value_states)
    logits = (keys @ query_states.to(wide)[..., None])[..., 0] * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if log_weight is not None:
        logits = logits + log_weight.repeat_interleave(unit_size, dim=-1)[..., : kept.shape[-1]]
    logits = logits.masked_fill(~kept, -torch.inf)
    if sinks is not None:  # a further logit, whose value is zero
        logits = torch.cat([logits, sinks.to(wide)[:, None].expand(batch_size, -1, 1)], -1)
        values = pad(values, (0, 0, 0, 1))

    lse = torch.logsumexp(logits, dim=-1)
    empty = lse == -torch.inf
    weights = torch.exp(logits - lse.masked_fill(empty, 0.0)[..., None])
    out = (weights[..., None, :] @ values)[..., 0, :]
    return out.to(query_states.dtype), lse
