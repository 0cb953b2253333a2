"""Specification of group_softmax."""

import torch
from torch import Tensor


def group_softmax(
    scores: Tensor, scale: float, rule: str, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Return ``[B, Hkv, U]``: each query's softmax over the units, summed or maximised."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    logits = scores.to(wide) * scale
    if softcap is not None:
        absent = logits == -torch.inf
        logits = (softcap * torch.tanh(logits / softcap)).masked_fill(absent, -torch.inf)
    if sinks is not None:  # a further logit
        column = sinks.to(wide).view(*scores.shape[1:3], 1)
        logits = torch.cat([logits, column.expand(len(logits), -1, -1, 1)], -1)
    weights = logits.softmax(-1).nan_to_num(0.0)  # a softmax over nothing is undefined
    weights = weights[..., : scores.shape[3]]
    return weights.sum(2) if rule == "sum" else weights.amax(2)
