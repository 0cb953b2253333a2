"""Published retrieval methods, as their YAMLs make them, in models of three families.

What is learnt by thousands of steps is learnt by a few: what it finds, the contract asks.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from topkbench.methods.attach import attach
from topkbench.methods.base import Policy, PrefillInputs, TopKMethod
from topkbench.methods.sparq import SparQ, SparQIndex

PUBLISHED = ["double_sparsity", "hash_attention", "pqcache", "sparq"]
Make = Callable[..., Any]


@pytest.fixture(params=PUBLISHED)
def published(
    request: pytest.FixtureRequest, make_method: Make, fitted_on: Make, family: str, models: Any
) -> TopKMethod:
    fewer = {"steps": 20} if request.param == "hash_attention" else {}
    method: TopKMethod = fitted_on(make_method(request.param, **fewer), models[family])
    return method


@pytest.fixture(params=["llama", "phi3", "qwen3"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def generate(model: PreTrainedModel, ids: Tensor) -> Tensor:
    tokens: Tensor = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    ).logits
    return torch.stack(list(tokens))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("protocol", ["unified", "native"])
def test_decodes_in_a_model(
    published: TopKMethod,
    family: str,
    models: dict[str, PreTrainedModel],
    prompt: Make,
    make_counter: Make,
    batch_size: int,
    protocol: Any,
) -> None:
    """With a budget above the length it is full attention, with a small one it selects."""
    model, ids = models[family], prompt(batch_size)
    plain = generate(model, ids)
    published.native = {**published.native, "dense_layers": 0}
    with attach(model, published, Policy(k=1000, protocol=protocol)):
        torch.testing.assert_close(generate(model, ids), plain, atol=1e-4, rtol=1e-4)
    counter = make_counter()
    with attach(model, published, Policy(k=16, protocol=protocol), counter):
        sparse = generate(model, ids)
    assert sparse.isfinite().all()
    assert not torch.allclose(sparse, plain, atol=1e-3)
    assert {layer for layer, _, _ in counter.steps} == {0, 1}
    for _, _, result in counter.steps:
        assert (result.selection.indices >= 0).sum(-1).eq(16).all()


def test_an_index_is_told_the_layers_scale_and_softcap(
    models: dict[str, PreTrainedModel], prompt: Make
) -> None:
    told = []

    class Told(SparQ):
        def build_index(self, prefill: PrefillInputs) -> SparQIndex:
            told.append((prefill.layer, prefill.scale, prefill.softcap))
            return super().build_index(prefill)

    with attach(models["gemma2"], Told(), Policy(k=16)):
        generate(models["gemma2"], prompt(1))
    assert told == [(1, pytest.approx(24**-0.5), 2.0)]
