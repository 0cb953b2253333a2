"""What is captured beyond keys and values, against an independent computation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from topkbench.methods.base import (
    QUERY_TAIL,
    AnyMethod,
    Index,
    Policy,
    PrefillInputs,
    ScoringMethod,
    StepContext,
    Traits,
)
from topkbench.methods.captured import Captured
from topkbench.methods.snapkv import SnapKV, SnapKVIndex
from topkbench.models.attach import attach
from topkbench.models.cache import DecodeCache
from topkbench.models.compat import cache_keyword, speculate_queries
from topkbench.models.prefill import prefill
from topkbench.models.prefill_store import PrefillStore
from topkbench.models.watch import watched_attention

pytestmark = pytest.mark.filterwarnings("ignore:.*allow_dense_forwards")

Make = Callable[..., Any]
NEEDS = frozenset({"query_tail", "column_sums"})
FAMILIES = ["llama", "qwen3", "phi3", "gemma2"]


@dataclass(kw_only=True)
class Needy(ScoringMethod[Index, Tensor]):
    """Scores all tokens equally, and records what its indices were built from."""

    name: ClassVar[str] = "needy"
    traits: ClassVar[Traits] = Traits(needs=NEEDS | {"previous_query"})

    def __post_init__(self) -> None:
        self.built: dict[int, PrefillInputs] = {}
        self.step_queries: dict[int, tuple[Tensor, Tensor | None]] = {}

    def build_index(self, prefill: PrefillInputs) -> Index:
        self.built[prefill.layer] = prefill
        return Index.of(prefill)

    def append(self, index: Index, key_states: Tensor, value_states: Tensor) -> None:
        index.advance()

    def score(self, encoded: Tensor, index: Index, context: StepContext) -> Tensor:
        self.step_queries[context.layer] = (context.query_states, context.previous_query)
        return encoded.new_zeros(*encoded.shape[:3], index.length)


def truth(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return each layer's queries and attention weights, from a forward with eager attention."""
    queries: dict[int, Tensor] = {}
    with (
        torch.no_grad(),
        watched_attention(model, lambda call: queries.update({call.layer: call.query_states})),
    ):
        model(ids, attention_mask=mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = model(ids, attention_mask=mask, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    return {layer: (queries[layer], weights[layer].float()) for layer in queries}


def expected(weights: Tensor, mask: Tensor | None) -> Tensor:
    """Sum the weights over the queries, without those of padding."""
    if mask is not None:
        weights = weights * mask[:, None, :, None]
    return weights.sum(2)


def run(model: PreTrainedModel, method: AnyMethod, parts: list[Tensor], **more: Any) -> None:
    cache = DynamicCache(config=model.config)
    with attach(model, method, Policy(k=16), allow_dense_forwards=True), torch.no_grad():
        for part in parts:
            model(part, **cache_keyword(model, cache), **more)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", [0, 14, 1])
def test_a_prompts_last_queries_and_column_sums_are_captured(
    models: dict[str, PreTrainedModel], prompt: Make, family: str, cut: int
) -> None:
    model, ids, method = models[family], prompt(2, 90), Needy()
    whole = truth(model, ids[:, :-1])
    parts = [ids[:, :cut], ids[:, cut:-1], ids[:, -1:]]
    run(model, method, [part for part in parts if part.shape[1]])
    assert sorted(method.built) == ([1] if family == "gemma2" else [0, 1])  # no sliding layers
    for layer, built in method.built.items():
        queries, weights = whole[layer]
        assert built.query_tail is not None
        assert built.column_sums is not None
        assert built.query_tail.shape[2] == QUERY_TAIL
        torch.testing.assert_close(
            built.query_tail, queries[:, :, -QUERY_TAIL:], atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(built.column_sums, expected(weights, None), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(built.column_sums.sum(-1), torch.full((2, 4), 89.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_left_out_of_what_is_captured(
    models: dict[str, PreTrainedModel], padded_batch: Make, family: str
) -> None:
    model, (ids, mask), method = models[family], padded_batch(), Needy()
    whole = truth(model, ids, mask)
    cache = DynamicCache(config=model.config)
    with attach(model, method, Policy(k=12)), torch.no_grad():
        model(ids, attention_mask=mask, **cache_keyword(model, cache))
        longer = torch.cat([mask, mask.new_ones(3, 1)], 1)
        model(ids[:, :1] + 3, attention_mask=longer, **cache_keyword(model, cache))
    for layer, built in method.built.items():
        queries, weights = whole[layer]
        assert built.column_sums is not None
        assert built.query_tail is not None
        wanted = expected(weights, mask)
        torch.testing.assert_close(built.column_sums, wanted, atol=1e-4, rtol=1e-4)
        assert (built.column_sums[1, :, :17] == 0).all()
        for row, tokens in enumerate((37, 20, 5)):
            found = built.query_tail[row, :, -tokens:]
            torch.testing.assert_close(found, queries[row, :, -tokens:], atol=1e-5, rtol=1e-4)


def test_a_prompt_of_one_token_is_captured(llama: PreTrainedModel, prompt: Make) -> None:
    ids, method = prompt(1, 20), Needy()
    run(llama, method, [ids[:, :1], ids[:, 1:2]])
    assert method.built[0].column_sums is not None
    assert method.built[0].column_sums.tolist() == [[[1.0]] * 4]


def test_a_new_prompt_in_the_same_cache_restarts_the_capture(
    llama: PreTrainedModel, prompt: Make
) -> None:
    ids, method = prompt(2, 40), Needy()
    whole = truth(llama, ids[:, :30])
    cache = DynamicCache(config=llama.config)
    with attach(llama, method, Policy(k=16)), torch.no_grad():
        llama(ids[:, 5:], **cache_keyword(llama, cache))
        cache.reset()
        cache.crop(0)
        llama(ids[:, :30], **cache_keyword(llama, cache))
        llama(ids[:, 30:31], **cache_keyword(llama, cache))
    for layer, built in method.built.items():
        assert built.query_tail is not None
        assert built.query_tail.shape[2] == 30
        torch.testing.assert_close(built.column_sums, expected(whole[layer][1], None))


def test_a_later_turn_is_refused_where_decoded_queries_are_missing(
    llama: PreTrainedModel, prompt: Make
) -> None:
    """The queries of decoded tokens are not captured, so the sums would not be of all queries."""
    ids = prompt(2, 40)
    turns = [ids[:, :20], ids[:, 20:21], ids[:, 21:22], ids[:, 22:34], ids[:, 34:35]]
    message = (
        "needy needs column_sums and query_tail of all tokens, and the first 22 of this cache were "
        "read or decoded without capturing them"
    )
    with pytest.raises(ValueError, match=message):
        run(llama, Needy(), turns)


def test_a_turn_as_long_as_the_tail_has_a_whole_tail(llama: PreTrainedModel, prompt: Make) -> None:
    ids, method = prompt(2, 30 + QUERY_TAIL), SnapKV(window=8)
    built: list[PrefillInputs] = []
    build = method.build_index

    def recording(prefill: PrefillInputs) -> SnapKVIndex:
        built.append(prefill)
        return build(prefill)

    method.build_index = recording  # type: ignore[method-assign]
    run(llama, method, [ids[:, :20], ids[:, 20:21], ids[:, 21:-1], ids[:, -1:]])
    tails = [one.query_tail.shape[2] for one in built if one.query_tail is not None]
    assert tails == [20, 20, QUERY_TAIL, QUERY_TAIL]


def test_a_cache_filled_outside_the_block_is_refused(llama: PreTrainedModel, prompt: Make) -> None:
    ids = prompt(1, 30)
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(ids[:, :-1], **cache_keyword(llama, cache))
        message = (
            "needy needs column_sums and query_tail of the prompt, and this cache was filled "
            "without capturing them; prefill it inside the with block of attach"
        )
        with attach(llama, Needy(), Policy(k=16)), pytest.raises(ValueError, match=message):
            llama(ids[:, -1:], **cache_keyword(llama, cache))


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2", "mistral", "gemma3"])
def test_speculating_from_a_layers_own_input_gives_its_own_queries(
    models: dict[str, PreTrainedModel], prompt: Make, family: str
) -> None:
    model, ids = models[family], prompt(2, 12)
    seen: dict[int, tuple[Any, ...]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda one, args, given: seen.update(
                {one.layer_idx: (one, given["hidden_states"], given["position_embeddings"])}
            ),
            with_kwargs=True,
        )
        for module in model.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "num_key_value_groups")
    ]
    queries: dict[int, Tensor] = {}
    with (
        torch.no_grad(),
        watched_attention(model, lambda call: queries.update({call.layer: call.query_states})),
    ):
        model(ids)
    for hook in hooks:
        hook.remove()
    assert sorted(seen) == [0, 1]
    for layer, given in seen.items():
        torch.testing.assert_close(speculate_queries(*given), queries[layer])


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_queries_are_speculated_from_the_previous_layer(
    models: dict[str, PreTrainedModel], prompt: Make, family: str
) -> None:
    model, ids, method = models[family], prompt(2, 30), Needy()
    seen: list[Tensor] = []
    modules = [m for m in model.modules() if hasattr(m, "num_key_value_groups")]
    hook = modules[0].register_forward_pre_hook(
        lambda one, args, given: seen.append(
            (given["hidden_states"], given["position_embeddings"])
        ),  # type: ignore[arg-type]
        with_kwargs=True,
    )
    run(model, method, [ids[:, :-1], ids[:, -1:]])
    hook.remove()
    assert method.step_queries[0][1] is None
    real, speculated = method.step_queries[1]
    assert speculated is not None
    with torch.no_grad():
        wanted = speculate_queries(modules[1], *seen[-1])[:, :, 0]
    torch.testing.assert_close(speculated.flatten(1, 2), wanted)
    assert not torch.allclose(speculated, real)


# The harness's path ---------------------------------------------------------------------------


def same(one: Captured | None, other: Captured | None) -> None:
    assert one is not None
    assert other is not None
    torch.testing.assert_close(one.query_tail, other.query_tail, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.column_sums, other.column_sums, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_store_captures_the_same_as_attach(
    models: dict[str, PreTrainedModel], prompt: Make, family: str
) -> None:
    model, ids, method = models[family], prompt(1, 80), Needy()
    run(model, method, [ids[:, :-1], ids[:, -1:]])
    store = PrefillStore(model)
    tokens = ids[0, :-1].tolist()
    with torch.no_grad():
        alone = model(ids[:, :-1]).logits[0, -1]
    first, again = store.get(tokens, NEEDS), store.get(tokens, NEEDS)
    assert store.forwards == 1
    torch.testing.assert_close(again.logits, alone, atol=1e-5, rtol=1e-4)
    cache = DecodeCache([again, first], 1)
    for layer, built in method.built.items():
        wanted = Captured(NEEDS, built.query_tail, built.column_sums)
        same(first.captured[layer], wanted)
        same(again.captured[layer], wanted)
        kept = cache.topkbench_captured(layer)
        assert kept is not None
        assert kept.column_sums is not None
        assert kept.column_sums.shape == (2, 4, 79)
        same(Captured(NEEDS, kept.query_tail[1:], kept.column_sums[1:]), wanted)  # type: ignore[index]
    assert again.needs_ms(NEEDS) > 0


def test_captures_for_two_methods_are_kept_together(llama: PreTrainedModel) -> None:
    store = PrefillStore(llama)
    tokens = list(range(1, 30))
    assert store.get(tokens).captured == {}
    assert store.get(tokens, frozenset({"query_tail"})).needs == {"query_tail"}
    assert store.get(tokens, frozenset({"column_sums"})).needs == NEEDS
    assert store.get(tokens, frozenset({"query_tail", "previous_query"})).needs == NEEDS
    assert store.forwards == 3


def test_captures_of_rows_of_different_lengths_are_right_aligned(llama: PreTrainedModel) -> None:
    short, long = list(range(1, 20)), list(range(30, 60))
    rows = [prefill(llama, ids, NEEDS) for ids in (short, long)]
    cache = DecodeCache(rows, 1)
    kept = cache.topkbench_captured(1)
    assert kept is not None
    assert kept.query_tail is not None
    assert kept.column_sums is not None
    own = [row.captured[1] for row in rows]
    assert own[0].query_tail is not None
    assert own[1].query_tail is not None
    assert kept.query_tail.shape[2] == 30  # the longest row's, not cut to the shorter one's
    assert torch.equal(kept.query_tail[:1, :, 11:], own[0].query_tail)
    assert (kept.query_tail[0, :, :11] == 0).all()
    assert torch.equal(kept.query_tail[1:], own[1].query_tail)
    assert torch.equal(kept.column_sums[:1, :, :19], own[0].column_sums)  # type: ignore[arg-type]
    assert (kept.column_sums[0, :, 19:] == 0).all()
    # Tokens decoded after the prompt have column sums of zero.
    assert kept.inputs(32)["column_sums"].shape == (2, 4, 32)
