"""Specification of topk_select."""

import torch
from torch import Tensor

from topkbench.kernels.shapes import valid_slots


def topk_select(
    scores: Tensor,
    k: int,
    num_sink: int,
    num_recent: int,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
) -> Tensor:
    """Return ``[B, H, min(k, U)]`` int32 indices, ascending, -1 where a row has fewer."""
    batch_size, _, num_units = scores.shape
    device = scores.device
    units = torch.arange(num_units, device=device)
    zero = torch.zeros(batch_size, dtype=torch.int32, device=device)
    start = (zero if kv_start is None else kv_start).clamp(0, num_units)[:, None]
    end = (zero + num_units if kv_len is None else kv_len).clamp(0, num_units)[:, None]
    valid = valid_slots(start[:, 0], end[:, 0], num_units, device)
    forced = valid & ((units < start + num_sink) | (units >= end - num_recent))

    if scores.is_floating_point():
        absent = scores == -torch.inf
    else:
        absent = scores == torch.iinfo(scores.dtype).min
    # Forced units first, then by score, absent units last; each sort is stable, so that the lower
    # index comes first among equals.
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    rank = torch.where(forced[:, None], 0, torch.where(absent | ~valid[:, None], 2, 1))
    by_rank = torch.sort(rank.gather(-1, order), dim=-1, stable=True)
    best = order.gather(-1, by_rank.indices)[..., :k]

    missing = by_rank.values[..., :k] == 2
    ascending = best.masked_fill(missing, num_units).sort(-1).values
    return ascending.masked_fill(ascending == num_units, -1).to(torch.int32)
