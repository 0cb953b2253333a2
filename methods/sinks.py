"""Learned attention sinks, as in gpt-oss."""

import torch
from torch import Tensor


def softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Return each query's attention weights on its tokens, with its head's sink in the denominator.

    With a sink the weights of a query add up to less than 1. A query whose tokens are all minus
    infinity has weights of zero; without a sink they are NaN.

    Args:
        logits: ``[B, Hkv, G, n]`` or ``[B, Hkv, G, q, n]``, as the attention has them: scaled,
            capped, and minus infinity for tokens that are not attended to.
        sinks: ``[Hkv * G]`` the logit of each query head's sink; None for no sinks.
    """
    if sinks is None:
        return logits.softmax(-1)
    column = sinks.to(logits).view(*logits.shape[1:3], *[1] * (logits.ndim - 3))
    together = torch.cat([logits, column.expand(*logits.shape[:-1], 1)], -1)
    return together.softmax(-1)[..., :-1]
