"""Logit softcapping, as in Gemma 2."""

import torch
from torch import Tensor


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return ``softcap * tanh(logits / softcap)``, or the logits if there is no cap.

    Mask invalid tokens with minus infinity afterwards, as the cap would make it finite.
    """
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
