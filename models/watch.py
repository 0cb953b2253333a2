"""Watches the post-RoPE states that a model's attention layers receive."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from topkbench.models.compat import (
    layer_of,
    register_attention,
    using_attention,
)
from topkbench.models.dense_attention import SINKS, attend_to_all

WATCHED = "topkbench_watched"


@dataclass(frozen=True)
class LayerCall:
    """The inputs of one layer's attention at prefill.

    Attributes:
        layer: Index of the layer.
        query_states: ``[B, Hq, n, d]``, post-RoPE.
        key_states: ``[B, Hkv, n, d]``, post-RoPE.
        value_states: ``[B, Hkv, n, dv]``.
        scale: The attention's factor on dot products.
        softcap: The attention's logit cap, or None.
        sinks: ``[Hq]`` the logits of the attention's learned sinks, or None.
    """

    layer: int
    query_states: Tensor
    key_states: Tensor
    value_states: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None


@contextmanager
def watched_attention(
    model: PreTrainedModel, observe: Callable[[LayerCall], None]
) -> Iterator[None]:
    """Call ``observe`` with each layer's post-RoPE states in every forward of the block.

    Args:
        model: A decoder-only model; it is restored when the block is left.
        observe: Called with the inputs of each layer's attention.
    """

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        shape = (options.get("softcap"), options.get(SINKS))
        observe(LayerCall(layer_of(module), query, key, value, scale, *shape))
        return attend_to_all(module, query, key, value, attention_mask, scale, options), None

    register_attention(WATCHED, attend)
    with using_attention(model, WATCHED):
        yield
