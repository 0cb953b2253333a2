"""No decode step bypasses a method silently: what is counted, and what raises."""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from topkbench.methods.base import Policy
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.spatten import SpAtten
from topkbench.models.attach import attach
from topkbench.models.compat import cache_keyword, partial_attention
from topkbench.models.step_count import SMALL, MethodBypassedError

Make = Callable[..., Any]
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


@pytest.mark.filterwarnings("error")
def test_steps_are_counted_by_layer(llama: PreTrainedModel, prompt: Make) -> None:
    with attach(llama, ExactTopK(), Policy(k=16)) as session:
        llama.generate(prompt(1, 30), **GREEDY)
    assert session.count.taken == {0: 7, 1: 7}  # eight tokens, the first from prefill
    assert session.count.share_taken == 1.0
    session.require_steps(7)


@pytest.mark.filterwarnings("error")
def test_dense_layers_and_short_prompts_do_not_raise(llama: PreTrainedModel, prompt: Make) -> None:
    with attach(llama, ExactTopK(), Policy(k=33, dense_layers=1)) as session:
        llama.generate(prompt(1, 30), **GREEDY)
    # 31 to 37 cached tokens: three steps have at most k, four have more.
    assert session.count.taken == {1: 4}
    assert session.count.dense == {
        (0, "dense by the policy"): 7,
        (1, "k is at least the number of cached tokens"): 3,
    }
    assert session.count.share_taken == 4 / 14


def test_a_mask_with_holes_warns_once_and_raises_when_the_block_ends(
    llama: PreTrainedModel, method_for: Make, prompt: Make, make_counter: Make
) -> None:
    ids = prompt(1, 30)
    mask = torch.ones(1, 32, dtype=torch.long)
    mask[0, 12] = 0
    counter, cache = make_counter(), DynamicCache()

    def decode() -> None:
        with torch.no_grad(), attach(llama, method_for("hata", llama), Policy(k=16), counter):
            for part, length in ((ids, 30), (ids[:, :1], 31), (ids[:, :1], 32)):
                llama(part, attention_mask=mask[:, :length], **cache_keyword(llama, cache))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(MethodBypassedError, match=r"of 4 steps .* 4 attended .*pad on one"):
            decode()
    assert len(caught) == 1
    assert "hata does not act on a mask with holes" in str(caught[0].message)
    assert counter.stages == []


@pytest.mark.filterwarnings("ignore:.*does not act")
def test_generating_without_a_cache_raises(llama: PreTrainedModel, prompt: Make) -> None:
    with (
        pytest.raises(MethodBypassedError, match="must go through exact"),
        attach(llama, ExactTopK(), Policy(k=16)),
    ):
        llama.generate(prompt(1, 30), use_cache=False, **GREEDY)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("drafts", ["prompt lookup", "assistant"])
def test_drafts_are_verified_by_steps_of_the_method(
    llama: PreTrainedModel, prompt: Make, drafts: str
) -> None:
    ids = prompt(1, 30).repeat(1, 3)  # repeated text, so that prompt lookup finds drafts
    options: dict[str, Any] = {"assistant_model": llama}
    if drafts == "prompt lookup":
        options = {"prompt_lookup_num_tokens": 3, "eos_token_id": 60}
    with attach(llama, ExactTopK(), Policy(k=89)) as session:
        found = llama.generate(ids, **GREEDY, **options)
    wanted = llama.generate(ids, **GREEDY, eos_token_id=60)
    # Nearly all tokens are selected. The first drafts are verified in the forward of the prompt.
    assert torch.equal(found[:, :92], wanted[:, :92])
    assert session.count.taken[0] == session.count.taken[1] > 3


@pytest.mark.filterwarnings("error")
def test_tokens_after_a_filled_cache_are_steps(llama: PreTrainedModel, prompt: Make) -> None:
    """A likelihood in one forward equals that of one token at a time, also after a crop."""
    ids = prompt(2, 40)

    def likelihood(sizes: list[int]) -> tuple[Tensor, Counter[int]]:
        cache, logits = DynamicCache(), []
        with torch.no_grad(), attach(llama, ExactTopK(), Policy(k=16)) as session:
            llama(ids[:, :30], **cache_keyword(llama, cache))
            for part in ids[:, 30:].split(sizes, 1):
                logits.append(llama(part, **cache_keyword(llama, cache)).logits)
            cache.crop(-10)
            again = llama(ids[:, 30:], **cache_keyword(llama, cache)).logits
        torch.testing.assert_close(again, torch.cat(logits, 1), atol=2e-5, rtol=1e-4)
        return torch.cat(logits, 1), session.count.taken

    one_by_one, steps = likelihood([1] * 10)
    assert steps == {0: 40, 1: 40}  # two rows
    for sizes in ([10], [4, 1, 5]):
        found, counted = likelihood(sizes)
        torch.testing.assert_close(found, one_by_one, atol=2e-5, rtol=1e-4)
        assert counted == steps
    with torch.no_grad():
        dense = llama(ids).logits[:, 30:]
    assert (dense - one_by_one).abs().max() > 0.1


@pytest.mark.filterwarnings("error")
def test_at_most_k_tokens_after_a_filled_cache_are_dense(
    llama: PreTrainedModel, prompt: Make
) -> None:
    ids, cache = prompt(1, 40), DynamicCache()
    with torch.no_grad(), attach(llama, ExactTopK(), Policy(k=35)) as session:
        llama(ids[:, :30], **cache_keyword(llama, cache))
        found = llama(ids[:, 30:], **cache_keyword(llama, cache)).logits[:, :5]
    assert session.count.taken == {0: 5, 1: 5}
    assert session.count.dense == {(layer, SMALL): 5 for layer in (0, 1)}
    with torch.no_grad():
        torch.testing.assert_close(found, llama(ids).logits[:, 30:35], atol=2e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*does not act")
def test_a_later_turn_may_be_left_dense(llama: PreTrainedModel, prompt: Make) -> None:
    ids = prompt(1, 40)

    def converse(**options: Any) -> Counter[int]:
        cache = DynamicCache()
        with torch.no_grad(), attach(llama, ExactTopK(), Policy(k=16), **options) as session:
            for begin, end in ((0, 20), (20, 21), (21, 30), (30, 31)):
                llama(ids[:, begin:end], **cache_keyword(llama, cache))
        return session.count.taken

    assert converse() == {0: 11, 1: 11}
    with pytest.warns(UserWarning, match="that allow_dense_forwards leaves dense"):
        assert converse(allow_dense_forwards=True) == {0: 2, 1: 2}


@pytest.mark.filterwarnings("ignore:.*does not act")
@pytest.mark.parametrize("what", ["spatten", "a mask that is not causal"])
def test_several_tokens_that_cannot_be_steps_raise(
    llama: PreTrainedModel, prompt: Make, what: str
) -> None:
    """Each of SpAtten's steps changes what its layers share; a tree of drafts has no order."""
    ids, cache = prompt(1, 40), DynamicCache()
    options = {}
    if what != "spatten":
        mask = torch.ones(10, 40, dtype=torch.bool).tril(30)
        mask[5, 32] = False
        options = {"attention_mask": mask[None, None]}

    def likelihood() -> None:
        method = SpAtten() if what == "spatten" else ExactTopK()
        with torch.no_grad(), attach(llama, method, Policy(k=16)):
            llama(ids[:, :30], **cache_keyword(llama, cache))
            llama(ids[:, 30:], **cache_keyword(llama, cache), **options)

    reason = "several tokens over a filled cache" if what == "spatten" else "a mask with holes"
    with pytest.raises(MethodBypassedError, match=f"20 by .*{reason}"):
        likelihood()


@pytest.mark.filterwarnings("error")
def test_a_block_that_only_runs_a_prefill_does_not_raise(
    llama: PreTrainedModel, prompt: Make
) -> None:
    with torch.no_grad(), attach(llama, ExactTopK(), Policy(k=16)) as session:
        llama(prompt(1, 40), **cache_keyword(llama, DynamicCache()))
    assert session.count.share_taken is None


@pytest.mark.filterwarnings("error")
def test_full_attention_cannot_be_bypassed(llama: PreTrainedModel, prompt: Make) -> None:
    with attach(llama, FullAttention(), Policy(k=16)):
        llama.generate(prompt(1, 30), use_cache=False, **GREEDY)


@pytest.mark.filterwarnings("ignore:.*does not act")
def test_an_error_inside_the_block_is_not_hidden(llama: PreTrainedModel, prompt: Make) -> None:
    def fail() -> None:
        with attach(llama, ExactTopK(), Policy(k=16)):
            llama.generate(prompt(1, 30), use_cache=False, **GREEDY)
            raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        fail()


# Where the cache is ---------------------------------------------------------------------------


def hide_the_cache(model: PreTrainedModel, layer: int) -> None:
    """Pass a layer's attention its cache by another way than an argument."""
    attention: Any = model.get_submodule(f"model.layers.{layer}.self_attn")
    forward = attention.forward
    (name,) = cache_keyword(attention, None)
    caches: list[Any] = []

    def called(*args: Any, **kwargs: Any) -> Any:
        caches.append(kwargs.pop(name))
        return attention(*args, **kwargs)

    attention.forward = lambda *args, **kwargs: forward(*args, **{name: caches.pop()}, **kwargs)
    decoder: Any = model.get_submodule(f"model.layers.{layer}")
    decoder.self_attn = Passing(called)


class Passing(nn.Module):
    def __init__(self, called: Callable[..., Any]) -> None:
        super().__init__()
        self.called = called

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.called(*args, **kwargs)


@pytest.mark.filterwarnings("error")
def test_a_cache_passed_by_no_argument_is_found_when_it_is_written(
    seeded: Make, small: dict[str, Any], prompt: Make
) -> None:
    plain = seeded(lambda: LlamaForCausalLM(LlamaConfig(**small)))
    hidden = seeded(lambda: LlamaForCausalLM(LlamaConfig(**small)))
    attention = hidden.get_submodule("model.layers.1.self_attn")
    hide_the_cache(hidden, 1)
    hidden.get_submodule("model.layers.1.self_attn").add_module("inner", attention)
    with attach(plain, ExactTopK(), Policy(k=16)):
        wanted = plain.generate(prompt(1, 30), **GREEDY)
    with attach(hidden, ExactTopK(), Policy(k=16)) as session:
        found = hidden.generate(prompt(1, 30), **GREEDY)
    assert session.count.taken == {0: 7, 1: 7}
    assert torch.equal(found, wanted)


@pytest.mark.filterwarnings("error")
def test_a_cache_under_another_name_is_found() -> None:
    torch.manual_seed(0)
    config = GPTBigCodeConfig(
        vocab_size=61,
        n_positions=128,
        n_embd=64,
        n_layer=2,
        n_head=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.2,
    )
    model = GPTBigCodeForCausalLM(config).eval()
    ids = torch.randint(2, 61, (1, 30))
    wanted = model.generate(ids, **GREEDY)
    with attach(model, ExactTopK(), Policy(k=12)) as session:
        found = model.generate(ids, **GREEDY)
    assert session.count.taken == {0: 7, 1: 7}
    assert session.geometry.num_kv_heads == 1  # its configuration has another name for it
    assert not torch.equal(found, wanted)


@pytest.mark.filterwarnings("ignore:.*does not act")
def test_a_layer_that_never_reaches_the_method_raises(
    seeded: Make, small: dict[str, Any], prompt: Make
) -> None:
    """One layer of four uses SDPA instead of the attached attention."""
    model = seeded(lambda: LlamaForCausalLM(LlamaConfig(**{**small, "num_hidden_layers": 4})))
    attention: Any = model.get_submodule("model.layers.2.self_attn")
    forward = attention.forward

    def by_itself(*args: Any, **kwargs: Any) -> Any:
        chosen = attention.config._attn_implementation
        attention.config._attn_implementation = "sdpa"
        try:
            return forward(*args, **kwargs)
        finally:
            attention.config._attn_implementation = chosen

    attention.forward = by_itself
    with (
        pytest.raises(MethodBypassedError, match=r"of 28 steps of single layers 7 .* in layer 2\)"),
        attach(model, ExactTopK(), Policy(k=16)),
    ):
        model.generate(prompt(1, 30), **GREEDY)


@pytest.mark.filterwarnings("ignore:.*does not act")
def test_an_attention_that_never_reaches_the_method_raises(
    seeded: Make, small: dict[str, Any], prompt: Make
) -> None:
    """All layers use SDPA, from the beginning or from some step on."""
    model = seeded(lambda: LlamaForCausalLM(LlamaConfig(**small)))
    ids, cache = prompt(1, 30), DynamicCache()

    def whole() -> None:
        with attach(model, ExactTopK(), Policy(k=16)):
            model.set_attn_implementation("sdpa")
            model.generate(ids, **GREEDY)

    def later() -> None:
        with torch.no_grad(), attach(model, ExactTopK(), Policy(k=16)):
            for part in (ids, ids[:, :1], ids[:, :1]):
                model(part, **cache_keyword(model, cache))
            model.set_attn_implementation("sdpa")
            model(ids[:, :1], **cache_keyword(model, cache))

    with pytest.raises(MethodBypassedError, match="14 by an attention that never reached"):
        whole()
    with pytest.raises(MethodBypassedError, match=r"of 6 steps .*\(2 by an attention that"):
        later()
    with attach(model, ExactTopK(), Policy(k=16)) as session:  # no effect of the two remains
        model.generate(ids, **GREEDY)
    assert session.count.taken == {0: 7, 1: 7}


@pytest.mark.filterwarnings("ignore:.*does not act")
def test_a_likelihood_of_a_whole_text_raises(llama: PreTrainedModel, prompt: Make) -> None:
    ids = prompt(1, 40)

    def likelihood() -> None:
        with torch.no_grad(), attach(llama, ExactTopK(), Policy(k=16)):
            llama(ids, labels=ids)

    with pytest.raises(MethodBypassedError, match="2 by a likelihood of several tokens"):
        likelihood()
    with torch.no_grad(), attach(llama, ExactTopK(), Policy(k=40)):
        llama(ids, labels=ids)  # k is enough for all of it


# Layers that attend to a part of the past -----------------------------------------------------


def test_a_sliding_layer_attends_to_its_window(models: dict[str, PreTrainedModel]) -> None:
    first: Any = models["gemma2"].get_submodule("model.layers.0.self_attn")
    second: Any = models["gemma2"].get_submodule("model.layers.1.self_attn")
    kind = partial_attention(first)
    assert kind is not None
    assert (kind.reason, kind.size) == ("its kind is sliding_attention", 16)
    assert [kind.tokens_read(n) for n in (1, 16, 17, 100)] == [1, 16, 16, 16]
    assert partial_attention(second) is None
