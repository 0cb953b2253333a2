"""InfiniGen in a model: a layer's queries are speculated from the previous layer's input."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from topkbench.methods.base import Observer, Policy, StepContext, StepResult
from topkbench.methods.infinigen import InfiniGen
from topkbench.models.attach import attach, geometry_of
from topkbench.models.compat import cache_keyword

Make = Callable[..., Any]


def fitted(model: PreTrainedModel, method: InfiniGen) -> InfiniGen:
    """Fit on random queries instead of the model's, which makes no difference here."""
    shape = geometry_of(model)
    generator = torch.Generator().manual_seed(0)

    class Drawn:
        num_layers, sequences = shape.num_layers, 1

        def states(self, layer: int) -> list[tuple[Tensor, Tensor]]:
            queries = torch.randn(shape.num_heads, 50, shape.head_dim, generator=generator)
            return [(queries, torch.zeros(shape.num_kv_heads, 50, shape.head_dim))]

    method.load_artifact(method.fit(Drawn()))
    return method


class Views(Observer):
    """Records in which layers queries were speculated, and the most tokens selected."""

    def __init__(self) -> None:
        self.speculated: dict[int, bool] = {}
        self.most = 0

    def on_step(self, context: StepContext, result: StepResult) -> None:
        self.speculated[context.layer] = context.previous_query is not None
        if result.selection is not None:
            self.most = max(self.most, int(result.selection.slots(context.cache).sum(-1).max()))


@pytest.mark.parametrize("protocol", ["unified", "native"])
def test_queries_are_speculated_in_all_layers_but_the_first(
    seeded: Make, small: dict[str, Any], make_method: Make, prompt: Make, protocol: Any
) -> None:
    """Natively the first two layers are dense; unified, the first layer uses its own queries."""
    shape = {**small, "num_hidden_layers": 3}
    model = seeded(lambda: LlamaForCausalLM(LlamaConfig(**shape)))
    method, views = fitted(model, make_method("infinigen", fit=False)), Views()
    with attach(model, method, Policy(k=14, protocol=protocol), views):
        model.generate(prompt(1), max_new_tokens=6, do_sample=False)
    unified = {0: False, 1: True, 2: True}
    assert views.speculated == ({2: True} if protocol == "native" else unified)
    assert views.most == 14


class Scores(Observer):
    """Records each layer's scores, and the exact dot products of its own queries."""

    def __init__(self) -> None:
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def on_step(self, context: StepContext, result: StepResult) -> None:
        assert result.ranking is not None
        exact = (context.query_states @ context.cache.key_states.mT).flatten(1, 2)
        self.pairs[context.layer] = (result.ranking.scores, exact)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_with_the_layers_own_input_and_all_channels_scores_are_exact_logits(
    models: dict[str, PreTrainedModel], prompt: Make, family: str
) -> None:
    """If a layer adds nothing to its input, the next layer's speculated queries are exact."""
    policy = Policy(k=16, head_scope="query_head")
    ids = prompt(2, 40)
    for silent in (True, False):
        model, scores = copy.deepcopy(models[family]), Scores()
        if silent:
            first: Any = model.get_submodule("model.layers.0")
            for linear in (first.self_attn.o_proj, first.mlp.down_proj):
                torch.nn.init.zeros_(linear.weight)
        method = fitted(model, InfiniGen(partial_ratio=1.0))
        with torch.no_grad(), attach(model, method, policy, scores):
            cache = DynamicCache()
            model(ids[:, :-1], **cache_keyword(model, cache))
            model(ids[:, -1:], **cache_keyword(model, cache))
        torch.testing.assert_close(*scores.pairs[0], atol=1e-4, rtol=1e-4)  # not speculated
        found, exact = scores.pairs[1]
        assert torch.allclose(found, exact, atol=1e-4, rtol=1e-4) is silent
