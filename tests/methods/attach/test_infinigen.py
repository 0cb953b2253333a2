"""InfiniGen in a model: the layer before foretells what a layer attends to."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from topkbench.methods.attach import attach, geometry_of
from topkbench.methods.base import CacheView, Observer, Policy, StepResult
from topkbench.methods.infinigen import InfiniGen

Make = Callable[..., Any]
NATIVE = {"num_sink": 0, "num_recent": 1, "dense_layers": 1, "head_scope": "query_head"}


def fitted(model: PreTrainedModel) -> InfiniGen:
    """Fit on random queries; whose they are does not matter here."""
    shape, method = geometry_of(model), InfiniGen(native=NATIVE)
    generator = torch.Generator().manual_seed(0)

    class Drawn:
        num_layers, sequences = shape.num_layers, 1

        def states(self, layer: int) -> list[tuple[Tensor, Tensor]]:
            queries = torch.randn(shape.num_heads, 50, shape.head_dim, generator=generator)
            return [(queries, torch.zeros(shape.num_kv_heads, 50, shape.head_dim))]

    method.load_artifact(method.fit(Drawn()))
    return method


class Views(Observer):
    """Notes in which layers queries were foretold, and how much was selected."""

    def __init__(self) -> None:
        self.foretold: dict[int, bool] = {}
        self.most = 0

    def on_step(
        self,
        layer: int,
        query_states: Tensor,
        cache: CacheView,
        result: StepResult,
        scale: float,
        softcap: float | None,
    ) -> None:
        self.foretold[layer] = cache.previous_query is not None
        if result.selection is not None:
            self.most = max(self.most, int(result.selection.slots(cache).sum(-1).max()))


@pytest.mark.parametrize("protocol", ["unified", "native"])
def test_the_layer_before_foretells(llama: PreTrainedModel, prompt: Make, protocol: Any) -> None:
    """Natively the first layer is dense; under unified rules it has its own queries."""
    views = Views()
    with attach(llama, fitted(llama), Policy(k=14, protocol=protocol), views):
        llama.generate(prompt(1), max_new_tokens=6, do_sample=False)
    assert views.foretold == ({1: True} if protocol == "native" else {0: False, 1: True})
    assert views.most == 14
