"""What attach does to a model, what it refuses, and what an observer receives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from topkbench.methods.base import Policy, PrefillInputs
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.loki import Loki
from topkbench.methods.quest import Quest
from topkbench.methods.sparq import SparQ, SparQIndex
from topkbench.methods.streaming_llm import StreamingLLM
from topkbench.models.attach import attach

Make = Callable[..., Any]
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def test_sliding_layers_stay_dense_and_are_reported(
    models: dict[str, PreTrainedModel], prompt: Make, make_counter: Make
) -> None:
    for family in ("gemma2", "gemma3"):
        counter = make_counter()
        with attach(models[family], ExactTopK(), Policy(k=16), counter) as session:
            models[family].generate(prompt(), **GREEDY)
        assert session.dense == {0: "its kind is sliding_attention"}
        assert {layer for layer, _, _ in counter.steps} == {1}


def test_a_model_of_sliding_layers_alone_is_refused(
    prompt: Make, seeded: Make, small: dict[str, Any]
) -> None:
    model = seeded(lambda: MistralForCausalLM(MistralConfig(sliding_window=16, **small)))
    with (
        pytest.raises(ValueError, match=r"left to exact, but all 2 are dense \(.* slides"),
        attach(model, ExactTopK(), Policy(k=16)),
    ):
        pass
    wanted = model.generate(prompt(), **GREEDY)
    with attach(model, FullAttention(), Policy(k=16)):
        assert torch.equal(model.generate(prompt(), **GREEDY), wanted)


def test_dense_layers_follow_the_policy(
    llama: PreTrainedModel, prompt: Make, make_counter: Make
) -> None:
    counter = make_counter()
    with attach(llama, ExactTopK(), Policy(k=16, dense_layers=1), counter) as session:
        llama.generate(prompt(), **GREEDY)
    assert session.dense == {0: "dense by the policy"}
    assert counter.count("full", 0) == 7  # eight tokens, the first from prefill
    assert counter.count("attend", 1) == 7


def test_the_model_is_restored_after_the_block(model: PreTrainedModel, prompt: Make) -> None:
    ids = prompt()
    names = [c._attn_implementation for c in (model.config,)]
    wanted = model.generate(ids, **GREEDY)
    attributes = [set(vars(module)) for module in model.modules()]

    def assert_unchanged() -> None:
        assert [c._attn_implementation for c in (model.config,)] == names
        assert all(not module._forward_pre_hooks for module in model.modules())
        assert [set(vars(module)) for module in model.modules()] == attributes
        assert torch.equal(model.generate(ids, **GREEDY), wanted)

    with attach(model, ExactTopK(), Policy(k=16)):
        assert model.config._attn_implementation == "topkbench"
        model.generate(ids, **GREEDY)
    assert_unchanged()
    with pytest.raises(KeyError, match="on purpose"), attach(model, ExactTopK(), Policy(k=16)):
        raise KeyError("on purpose")
    assert_unchanged()


def test_a_second_method_is_refused(llama: PreTrainedModel) -> None:
    with (
        attach(llama, ExactTopK(), Policy(k=16)),
        pytest.raises(ValueError, match="one method attached"),
        attach(llama, StreamingLLM(), Policy(k=16)),
    ):
        pass


def test_a_missing_artifact_is_one_sentence(llama: PreTrainedModel) -> None:
    with (
        pytest.raises(ValueError, match="loki needs its artifact"),
        attach(llama, Loki(), Policy(k=16)),
    ):
        pass


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(
        vocab_size=20, d_model=16, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config)
    with (
        pytest.raises(ValueError, match="decoder-only models, got the encoder-decoder T5"),
        attach(model, ExactTopK(), Policy(k=16)),
    ):
        pass


def test_observer_sees_stages_in_order(
    llama: PreTrainedModel, method_for: Make, prompt: Make, make_counter: Make
) -> None:
    counter = make_counter()
    with attach(llama, method_for("hata", llama), Policy(k=16), counter):
        llama.generate(prompt(), **{**GREEDY, "max_new_tokens": 3})
    one = ["append", "encode", "score", "select", "attend"]
    names = [name for name, layer in counter.stages if layer == 0]
    assert names == ["build", *one, *one]
    assert [(layer, n) for layer, n, _ in counter.steps] == [(0, 38), (1, 38), (0, 39), (1, 39)]


def test_native_protocol_is_in_force(llama: PreTrainedModel, prompt: Make) -> None:
    method = Quest(page_size=4, native={"head_scope": "query_head", "dense_layers": (1,)})
    with attach(llama, method, Policy(k=16, protocol="native")) as session:
        llama.generate(prompt(), **GREEDY)
    assert session.policy.head_scope == "query_head"
    assert set(session.dense) == {1}


def test_an_index_gets_the_layers_scale_and_softcap(
    models: dict[str, PreTrainedModel], prompt: Make
) -> None:
    received = []

    class Recording(SparQ):
        def build_index(self, prefill: PrefillInputs) -> SparQIndex:
            received.append((prefill.layer, prefill.scale, prefill.softcap))
            return super().build_index(prefill)

    with attach(models["gemma2"], Recording(), Policy(k=16)):
        models["gemma2"].generate(prompt(1), **GREEDY)
    assert received == [(1, pytest.approx(24**-0.5), 2.0)]


@pytest.mark.parametrize("name", ["s_aux", "sinks", "position_bias", "cu_seq_lens_q"])
def test_attention_with_other_inputs_is_refused(
    llama: PreTrainedModel, prompt: Make, name: str
) -> None:
    """Whatever a model passes to its attention function, a decode step must not ignore."""
    message = rf"one sink per query head only, and LlamaAttention also passes {name} \[5\]\."
    block = attach(llama, ExactTopK(), Policy(k=16))
    with block, torch.no_grad(), pytest.raises(ValueError, match=message):
        llama(prompt(), **{name: torch.zeros(5)})
