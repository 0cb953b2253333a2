"""Specification of page_score."""

import torch
from torch import Tensor

from topkbench.kernels.shapes import valid_slots


def page_score(
    query_states: Tensor,
    page_min: Tensor,
    page_max: Tensor,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
    sum_group: bool,
) -> Tensor:
    """Return ``[B, Hkv, G, P]`` float32 bounds (float64 when the inputs are), or their sum."""
    wide = torch.promote_types(query_states.dtype, torch.float32)
    query = query_states.to(wide)[:, :, :, None]
    low, high = page_min.to(wide)[:, :, None], page_max.to(wide)[:, :, None]
    bound = torch.maximum(query * low, query * high).sum(-1)
    valid = valid_slots(kv_start, kv_len, page_min.shape[2], page_min.device)
    bound = bound.masked_fill(~valid[:, None, None], -torch.inf)
    return bound.sum(2) if sum_group else bound
