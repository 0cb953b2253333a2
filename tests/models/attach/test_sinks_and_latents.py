"""Learned sinks (gpt-oss), and values of another width than keys (DeepSeek), in small models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
)

from topkbench.methods.base import AnyMethod, Policy, StepContext, StepResult
from topkbench.methods.captured import column_sums
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.h2o import H2O
from topkbench.methods.snapkv import SnapKV
from topkbench.methods.streaming_llm import StreamingLLM
from topkbench.models.attach import attach, geometry_of
from topkbench.models.cache import DecodeCache
from topkbench.models.compat import token_logits
from topkbench.models.prefill import prefill
from topkbench.models.watch import LayerCall, watched_attention

Make = Callable[..., Any]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
# Keys of 8 + 16 channels and values of 12; the latent vectors have 10.
LATENT: dict[str, Any] = {
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 16, "v_head_dim": 12, "kv_lora_rank": 10},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    **{"first_k_dense_replace": 1, "moe_intermediate_size": 16, "num_key_value_heads": 4},
}
MAKERS: dict[str, Callable[[dict[str, Any]], PreTrainedModel]] = {
    "gpt-oss": lambda small: GptOssForCausalLM(
        GptOssConfig(
            **{**small, "intermediate_size": 16},
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["full_attention"] * 2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            attn_implementation="eager",
        )
    ),
    "deepseek-v2": lambda small: DeepseekV2ForCausalLM(
        DeepseekV2Config(**{**small, **LATENT}, q_lora_rank=None, attn_implementation="eager")
    ),
    "deepseek-v3": lambda small: DeepseekV3ForCausalLM(
        DeepseekV3Config(**{**small, **LATENT}, q_lora_rank=14, attn_implementation="eager")
    ),
}


def name_of(method: AnyMethod) -> str:
    return method.name


@pytest.fixture(scope="module")
def built(seeded: Make, small: dict[str, Any]) -> dict[str, PreTrainedModel]:
    return {name: seeded(lambda make=make: make(small)) for name, make in MAKERS.items()}


@pytest.fixture(params=sorted(MAKERS))
def model(request: pytest.FixtureRequest, built: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return built[request.param]


@pytest.fixture
def gpt_oss(built: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return built["gpt-oss"]


def test_widths_are_those_of_the_modules(built: dict[str, PreTrainedModel]) -> None:
    for name in ("deepseek-v2", "deepseek-v3"):
        shape = geometry_of(built[name])
        assert (shape.num_kv_heads, shape.head_dim, shape.value_dim) == (4, 24, 12)
    shape = geometry_of(built["gpt-oss"])
    assert (shape.num_kv_heads, shape.head_dim, shape.value_dim) == (2, 16, None)


@pytest.mark.parametrize("method", [ExactTopK(), FullAttention(), SnapKV(), H2O()], ids=name_of)
def test_selecting_everything_gives_what_the_model_generates(
    model: PreTrainedModel, method: AnyMethod, prompt: Make, padded_batch: Make
) -> None:
    """The model's own eager attention is the reference, sinks and all."""
    ids, mask = padded_batch()
    for given in ({"input_ids": prompt(1)}, {"input_ids": ids, "attention_mask": mask}):
        wanted = model.generate(**given, **GREEDY)
        with attach(model, method, Policy(k=64)):
            found = model.generate(**given, **GREEDY)
        assert torch.equal(found, wanted)
    assert model.config._attn_implementation == "eager"


def by_hand(context: StepContext, kept: list[int], sinks: Tensor | None) -> Tensor:
    """Return ``[Hq, dv]``, attention to a few tokens of one row."""
    cache, group = context.cache, context.query_states.shape[2]
    outs = []
    for head, query in enumerate(context.query_states[0].flatten(0, 1)):
        keys, values = (
            one[0, head // group, kept] for one in (cache.key_states, cache.value_states)
        )
        powers = (keys @ query * context.scale).double().exp()
        sink = 0.0 if sinks is None else sinks[head].double().exp()
        outs.append((powers / (powers.sum() + sink)).float() @ values)
    return torch.stack(outs)


def test_a_step_attends_to_the_tokens_kept_and_the_sink(
    model: PreTrainedModel, prompt: Make, make_counter: Make
) -> None:
    seen: list[tuple[StepContext, StepResult]] = []
    counter = make_counter()
    counter.on_step = lambda context, result: seen.append((context, result))
    with attach(model, StreamingLLM(), Policy(k=5, num_sink=2, num_recent=1), counter):
        model.generate(prompt(1), **{**GREEDY, "max_new_tokens": 3})
    assert len(seen) == 4  # two steps of two layers
    for context, result in seen:
        n = context.cache.n
        attention: Any = model.model.layers[context.layer].self_attn
        wanted = by_hand(context, [0, 1, n - 3, n - 2, n - 1], getattr(attention, "sinks", None))
        torch.testing.assert_close(result.out[0], wanted, atol=1e-5, rtol=1e-4)


def test_a_prefill_outside_attach_is_dense(model: PreTrainedModel, prompt: Make) -> None:
    """What a loaded model runs, and what watches its attention, equal its own eager attention."""
    ids = prompt(1, 300)  # more queries than are attended to at once
    with torch.no_grad():
        wanted = model(ids).logits
        model.set_attn_implementation("topkbench")
        try:
            found = model(ids).logits
        finally:
            model.set_attn_implementation("eager")
        calls: list[LayerCall] = []
        with watched_attention(model, calls.append):
            watched = model(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(watched, wanted, atol=1e-4, rtol=1e-4)
    has_sinks = [
        "sinks" in dict(layer.self_attn.named_parameters()) for layer in model.model.layers
    ]
    assert [call.sinks is not None for call in calls] == has_sinks


def test_column_sums_are_the_models_own_attention(gpt_oss: PreTrainedModel, prompt: Make) -> None:
    ids = prompt(1)
    with torch.no_grad():
        wanted = gpt_oss(ids, output_attentions=True).attentions
    captured = prefill(gpt_oss, ids[0].tolist(), frozenset({"column_sums"})).captured
    for one, weights in zip(captured.values(), wanted, strict=True):
        torch.testing.assert_close(one.column_sums, weights.sum(2), atol=1e-4, rtol=1e-4)
        assert float(weights.sum()) < 0.99 * weights[..., 0].numel()  # the sinks take the rest


def test_a_padding_query_adds_nothing_to_column_sums() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 2, 5, 8, generator=draw)
    start = torch.tensor([0, 3], dtype=torch.int32)
    sinks = torch.tensor([0.5, -1.0])
    sums = column_sums(query, key, 1.0, start, None, sinks)
    alone = column_sums(query[1:, :, 3:], key[1:, :, 3:], 1.0, None, None, sinks)
    torch.testing.assert_close(sums[1:, :, 3:], alone)
    assert not bool(sums[1, :, :3].any())


@pytest.mark.parametrize("method", [ExactTopK(), SnapKV(), H2O()], ids=name_of)
def test_topkbenchs_own_cache_holds_what_the_model_caches(
    model: PreTrainedModel, method: AnyMethod, prompt: Make
) -> None:
    """Prompts of different lengths, decoded together, as ``generate`` decodes each alone."""
    prompts = [row[:length].tolist() for row, length in zip(prompt(2), (37, 21), strict=True)]
    prefills = [prefill(model, ids, method.traits.needs) for ids in prompts]
    cache = DecodeCache(prefills, 4)
    tokens = torch.stack([one.logits.argmax() for one in prefills])
    found = [tokens]
    with attach(model, method, Policy(k=16)):
        for _ in range(3):
            cache.extend()
            logits = token_logits(model, tokens[:, None], cache, cache.positions)
            tokens = logits.argmax(-1)
            found.append(tokens)
    for row, ids in enumerate(prompts):
        with attach(model, method, Policy(k=16)):
            wanted = model.generate(torch.tensor([ids]), **{**GREEDY, "max_new_tokens": 4})
        assert [int(token[row]) for token in found] == wanted[0, len(ids) :].tolist()


def test_an_index_of_latents_is_kept_from_step_to_step(
    model: PreTrainedModel, prompt: Make, make_counter: Make
) -> None:
    counter = make_counter()
    with attach(model, ExactTopK(), Policy(k=16), counter):
        model.generate(prompt(1), **GREEDY)
    assert (counter.count("build", 0), counter.count("append", 0)) == (1, 5)


def test_latents_are_not_freed(built: dict[str, PreTrainedModel], prompt: Make) -> None:
    model, ids = built["deepseek-v3"], prompt(1)[0].tolist()
    method = H2O(mode="compact")
    start = prefill(model, ids, method.traits.needs)
    if len(start.key_states[0]) > 1:
        pytest.skip("this transformers caches keys and values, which are freed")
    cache = DecodeCache([start], 4)
    cache.extend()
    with (
        pytest.raises(ValueError, match="stores latent vectors, which all heads share; use mode="),
        attach(model, method, Policy(k=16)),
    ):
        token_logits(model, torch.tensor([[5]]), cache, cache.positions)
