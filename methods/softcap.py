"""Capped logits, as some models have them."""

import torch
from torch import Tensor


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return ``softcap * tanh(logits / softcap)``, or the logits where there is no cap.

    Logits of no token, minus infinity, are to be set afterwards: the cap makes them finite.
    """
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
