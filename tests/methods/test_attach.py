"""Methods inside Hugging Face models: random weights, every way of generating."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import Cache, DynamicCache

from topkbench.methods.attach import Session, attach, geometry_of
from topkbench.methods.base import CacheView, Observer, Policy, StepResult, TopKMethod
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.hata import HATA
from topkbench.methods.loki import Loki
from topkbench.methods.quest import Quest
from topkbench.methods.streaming_llm import StreamingLLM

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,  # peaked attention, so that what is selected matters
}
SLIDING = ["sliding_attention", "full_attention"]
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=None, **SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=24, **SMALL)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            head_dim=16,
            sliding_window=16,
            layer_types=SLIDING,
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=24,
            **SMALL,
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            head_dim=16,
            sliding_window=16,
            layer_types=SLIDING,
            query_pre_attn_scalar=24,
            **SMALL,
        )
    ),
}
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def seeded(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    return build().eval()


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {family: seeded(build) for family, build in MODELS.items()}


@pytest.fixture
def llama(models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return models["llama"]


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest, models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return models[request.param]


class ModelStates:
    """Random states of a model's shape, to fit on."""

    sequences = 1

    def __init__(self, model: PreTrainedModel) -> None:
        self.shape = geometry_of(model)
        self.num_layers = self.shape.num_layers

    def states(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(layer)
        shape = self.shape
        return [
            (
                torch.randn(shape.num_heads, 50, shape.head_dim, generator=generator),
                torch.randn(shape.num_kv_heads, 50, shape.head_dim, generator=generator),
            )
        ]


def method_for(which: str, model: PreTrainedModel) -> TopKMethod:
    makers: dict[str, Callable[[], TopKMethod]] = {
        "full": FullAttention,
        "exact": ExactTopK,
        "hata": lambda: HATA(weights="random", rbit=64),
        "quest": lambda: Quest(page_size=4),
        "loki": lambda: Loki(rank=8),
        "streaming_llm": StreamingLLM,
    }
    method = makers[which]()
    if which == "loki":
        method.load_artifact(method.fit(ModelStates(model)))
    return method


ALL = ["full", "exact", "hata", "quest", "loki", "streaming_llm"]


def prompt(batch_size: int = 2, length: int = 37) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(1, 61, (batch_size, length), generator=generator)


def padded_batch() -> tuple[Tensor, Tensor]:
    """Return prompts of 37, 20 and 5 tokens, padded on the left, and their mask."""
    ids, mask = prompt(3), torch.ones(3, 37, dtype=torch.long)
    for row, pads in ((1, 17), (2, 32)):
        ids[row, :pads], mask[row, :pads] = 0, 0
    return ids, mask


class Counter(Observer):
    """Counts stages and sees steps."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.steps: list[tuple[int, int, StepResult]] = []

    @contextmanager
    def stage(self, name: str, layer: int) -> Iterator[None]:
        self.stages.append((name, layer))
        yield

    def on_step(
        self, layer: int, query_states: Tensor, cache: CacheView, result: StepResult, scale: float
    ) -> None:
        self.steps.append((layer, cache.n, result))

    def count(self, name: str, layer: int) -> int:
        return self.stages.count((name, layer))


@pytest.mark.parametrize("which", ALL)
def test_k_above_n_generates_what_the_model_generates(model: PreTrainedModel, which: str) -> None:
    ids, mask = padded_batch()
    wanted = model.generate(ids, attention_mask=mask, **GREEDY)
    with attach(model, method_for(which, model), Policy(k=200)):
        found = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "temperature": 0.8},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=["sample", "beam", "beam_sample"],
)
@pytest.mark.parametrize("which", ["exact", "hata", "quest"])
def test_sampling_and_beams_with_k_above_n(
    model: PreTrainedModel, which: str, how: dict[str, Any]
) -> None:
    ids, mask = padded_batch()
    torch.manual_seed(3)
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=6, **how)
    with attach(model, method_for(which, model), Policy(k=200)):
        torch.manual_seed(3)
        found = model.generate(ids, attention_mask=mask, max_new_tokens=6, **how)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("which", ["exact", "hata", "quest", "loki", "streaming_llm"])
def test_beam_search_reorders_the_index(llama: PreTrainedModel, which: str) -> None:
    """An index kept across a reorder would answer for other rows than one built at every step."""
    ids = prompt()
    how = {"num_beams": 4, "max_new_tokens": 10, "do_sample": False}
    method = method_for(which, llama)
    with attach(llama, method, Policy(k=16)):
        kept = llama.generate(ids, **how)
    with attach(llama, method, Policy(k=16)) as session:
        session.indices.keep = lambda *args: None  # type: ignore[method-assign]
        rebuilt = llama.generate(ids, **how)
    assert torch.equal(kept, rebuilt)


def test_a_small_budget_changes_what_is_generated(llama: PreTrainedModel) -> None:
    ids = prompt()
    wanted = llama.generate(ids, **GREEDY, output_logits=True, return_dict_in_generate=True)
    errors = {}
    for which in ("exact", "streaming_llm"):
        with attach(llama, method_for(which, llama), Policy(k=13)):
            found = llama.generate(ids, **GREEDY, output_logits=True, return_dict_in_generate=True)
        errors[which] = (found.logits[1] - wanted.logits[1]).norm().item()
    assert 1e-3 < errors["exact"] < errors["streaming_llm"]


@pytest.mark.parametrize("which", ["full", "exact", "hata", "quest", "loki", "streaming_llm"])
@pytest.mark.parametrize("k", [16, 24])
def test_a_padded_batch_equals_its_rows_alone(llama: PreTrainedModel, which: str, k: int) -> None:
    ids, mask = padded_batch()
    method = method_for(which, llama)
    with attach(llama, method, Policy(k=k)):
        together = llama.generate(ids, attention_mask=mask, **GREEDY)
        for row, pads in ((0, 0), (1, 17), (2, 32)):
            alone = llama.generate(ids[row : row + 1, pads:], **GREEDY)
            assert torch.equal(together[row, 37:], alone[0, 37 - pads :])


def logits_by_chunks(model: PreTrainedModel, ids: Tensor, sizes: list[int], cache: Cache) -> Tensor:
    parts = []
    with torch.no_grad():
        for chunk in ids.split(sizes, 1):
            parts.append(model(chunk, past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, 1)


def test_chunked_prefill_ends_in_a_chunk_of_one(llama: PreTrainedModel) -> None:
    ids = prompt(2, 35)
    counter = Counter()
    with attach(llama, method_for("hata", llama), Policy(k=200), counter):
        sizes = [16, 16, 1, 1, 1]
        found = logits_by_chunks(llama, ids, sizes, DynamicCache(config=llama.config))
    with torch.no_grad():
        wanted = llama(ids).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert counter.count("build", 0) == 1
    assert counter.count("append", 0) == 3


def test_a_chunk_after_decoding_rebuilds_the_index(llama: PreTrainedModel) -> None:
    """Single steps in the middle of a chunked prefill are steps over what is cached."""
    ids = prompt(2, 40)
    counter = Counter()
    method = method_for("exact", llama)
    with attach(llama, method, Policy(k=16), counter) as session:
        cache = DynamicCache(config=llama.config)
        found = logits_by_chunks(llama, ids, [20, 1, 1, 10, 1, 7], cache)[:, 32]
        assert isinstance(session, Session)
    assert counter.count("build", 1) == 2
    fresh = DynamicCache(config=llama.config)
    with attach(llama, method, Policy(k=200)):
        logits_by_chunks(llama, ids[:, :20], [20], fresh)
    with attach(llama, method, Policy(k=16)):
        wanted = logits_by_chunks(llama, ids[:, 20:33], [1, 1, 10, 1], fresh)[:, 12]
    torch.testing.assert_close(found, wanted)


def test_cropping_and_resetting_rebuild_the_index(llama: PreTrainedModel) -> None:
    ids = prompt(2, 40)
    counter = Counter()
    with attach(llama, method_for("hata", llama), Policy(k=16), counter):
        cache = DynamicCache(config=llama.config)
        first = logits_by_chunks(llama, ids[:, :32], [30, 1, 1], cache)[:, -1]
        cache.crop(-1)
        again = logits_by_chunks(llama, ids[:, 31:32], [1], cache)[:, -1]
        assert counter.count("build", 0) == 2
        cache.reset()
        third = logits_by_chunks(llama, ids[:, :32], [30, 1, 1], cache)[:, -1]
    assert counter.count("build", 0) == 3
    torch.testing.assert_close(again, first)
    torch.testing.assert_close(third, first)


@pytest.mark.parametrize("which", ["full", "exact", "hata", "quest", "loki", "streaming_llm"])
@pytest.mark.parametrize("k", [16, 200])
def test_a_static_cache_gives_what_a_growing_one_gives(
    llama: PreTrainedModel, which: str, k: int
) -> None:
    ids, mask = padded_batch()
    method = method_for(which, llama)
    counter = Counter()
    with attach(llama, method, Policy(k=k), counter):
        grown = llama.generate(ids, attention_mask=mask, **GREEDY)
        cache = StaticCache(config=llama.config, max_cache_len=64)
        static = llama.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        assert torch.equal(static, grown)
        cache.reset()
        again = llama.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(again, grown)
    if method.selects:
        assert counter.count("build", 0) == 3


def test_inference_mode(llama: PreTrainedModel) -> None:
    ids = prompt()
    with attach(llama, method_for("hata", llama), Policy(k=16)):
        wanted = llama.generate(ids, **GREEDY)
        with torch.inference_mode():
            found = llama.generate(ids, **GREEDY)
    assert torch.equal(found, wanted)


def test_two_caches_keep_two_indices(llama: PreTrainedModel) -> None:
    one, two = prompt(1, 30), prompt(2, 45)[1:]
    with attach(llama, method_for("hata", llama), Policy(k=16)):
        caches = [DynamicCache(config=llama.config) for _ in range(2)]
        alone = [
            logits_by_chunks(llama, ids, [ids.shape[1] - 2, 1, 1], DynamicCache())
            for ids in (one, two)
        ]
        for ids, cache in zip((one, two), caches, strict=True):
            logits_by_chunks(llama, ids[:, :-2], [ids.shape[1] - 2], cache)
        for step in (-2, -1):
            for ids, cache, wanted in zip((one, two), caches, alone, strict=True):
                piece = ids[:, step:][:, :1]
                found = logits_by_chunks(llama, piece, [1], cache)
                torch.testing.assert_close(found[:, 0], wanted[:, step])


def test_without_a_cache_everything_is_dense(llama: PreTrainedModel) -> None:
    ids = prompt(1, 30)
    counter = Counter()
    with torch.no_grad():
        wanted = [llama(ids[:, :length], use_cache=False).logits for length in (1, 30)]
        with attach(llama, method_for("hata", llama), Policy(k=16), counter):
            found = [llama(ids[:, :length], use_cache=False).logits for length in (1, 30)]
    torch.testing.assert_close(found, wanted)
    assert counter.stages == []


def test_sliding_layers_stay_dense_and_are_reported(models: dict[str, PreTrainedModel]) -> None:
    for family in ("gemma2", "gemma3"):
        counter = Counter()
        with attach(models[family], ExactTopK(), Policy(k=16), counter) as session:
            models[family].generate(prompt(), **GREEDY)
        assert session.dense == {0: "its kind is sliding_attention"}
        assert {layer for layer, _, _ in counter.steps} == {1}


def test_a_model_of_sliding_layers_alone_is_refused() -> None:
    model = seeded(lambda: MistralForCausalLM(MistralConfig(sliding_window=16, **SMALL)))
    with (
        pytest.raises(ValueError, match=r"left to exact, but all 2 are dense \(.* slides"),
        attach(model, ExactTopK(), Policy(k=16)),
    ):
        pass
    wanted = model.generate(prompt(), **GREEDY)
    with attach(model, FullAttention(), Policy(k=16)):
        assert torch.equal(model.generate(prompt(), **GREEDY), wanted)


def test_dense_layers_follow_the_policy(llama: PreTrainedModel) -> None:
    counter = Counter()
    with attach(llama, ExactTopK(), Policy(k=16, dense_layers=1), counter) as session:
        llama.generate(prompt(), **GREEDY)
    assert session.dense == {0: "dense by the policy"}
    assert counter.count("full", 0) == 7  # eight tokens, the first from prefill
    assert counter.count("attend", 1) == 7


def test_the_model_is_given_back_unchanged(model: PreTrainedModel) -> None:
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


def test_observer_sees_stages_in_order(llama: PreTrainedModel) -> None:
    counter = Counter()
    with attach(llama, method_for("hata", llama), Policy(k=16), counter):
        llama.generate(prompt(), **{**GREEDY, "max_new_tokens": 3})
    one = ["append", "encode", "score", "select", "attend"]
    names = [name for name, layer in counter.stages if layer == 0]
    assert names == ["build", *one, *one]
    assert [(layer, n) for layer, n, _ in counter.steps] == [(0, 38), (1, 38), (0, 39), (1, 39)]


def test_native_protocol_is_in_force(llama: PreTrainedModel) -> None:
    method = Quest(page_size=4, native={"head_scope": "query_head", "dense_layers": (1,)})
    with attach(llama, method, Policy(k=16, protocol="native")) as session:
        llama.generate(prompt(), **GREEDY)
    assert session.policy.head_scope == "query_head"
    assert set(session.dense) == {1}
