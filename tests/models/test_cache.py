"""The decode cache and the prefill store: written in place, computed once."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from topkbench.models.cache import DecodeCache
from topkbench.models.compat import cache_keyword
from topkbench.models.prefill import Prefill, prefill
from topkbench.models.prefill_store import PrefillStore

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 8


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def states(tokens: int, value: float) -> Prefill:
    keys = torch.full((KV_HEADS, tokens, HEAD_DIM), value)
    return Prefill([keys] * LAYERS, [-keys] * LAYERS, torch.zeros(50), 1.0)


def token(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, KV_HEADS, 1, HEAD_DIM)


def test_rows_are_written_in_place_where_each_ends() -> None:
    cache = DecodeCache([states(3, 1.0), states(5, 2.0)], new_tokens=2)
    layer = cache.layers[0]
    address = layer.keys.data_ptr()
    assert (cache.n, cache.capacity, cache.kv_len.tolist()) == (5, 7, [3, 5])
    for step, (first, second) in enumerate([(10.0, 20.0), (11.0, 21.0)], start=1):
        cache.extend()
        assert cache.positions.tolist() == [[2 + step], [4 + step]]
        keys, values = layer.update(token(first, second), token(-first, -second))
        assert keys.data_ptr() == address  # still a view of the same buffer
        assert keys.shape == (2, KV_HEADS, 5 + step, HEAD_DIM)
        assert torch.equal(values, -keys)
    assert layer.keys[0, 0, :, 0].tolist() == [1, 1, 1, 10, 11, 0, 0]
    assert layer.keys[1, 0, :, 0].tolist() == [2, 2, 2, 2, 2, 20, 21]
    assert cache.kv_len.tolist() == [5, 7]
    assert cache.topkbench_lengths[0] is None
    assert cache.topkbench_lengths[1].dtype == torch.int32


def test_rows_of_one_length_need_no_mask() -> None:
    cache = DecodeCache([states(3, 1.0), states(3, 2.0)], new_tokens=1)
    cache.extend()
    assert cache.topkbench_lengths == (None, None)
    assert cache.kv_len.tolist() == [4, 4]


def test_a_dropped_cache_is_freed_at_once() -> None:
    cache = DecodeCache([states(3, 1.0)], new_tokens=1)
    buffer = weakref.ref(cache.layers[0].keys)
    gc.disable()  # nothing may wait for the collector
    try:
        del cache
        assert buffer() is None
    finally:
        gc.enable()


def test_a_full_cache_is_one_sentence() -> None:
    cache = DecodeCache([states(3, 1.0)], new_tokens=1)
    cache.extend()
    with pytest.raises(ValueError, match=r"got capacity=4 with 4 in use; build it with more"):
        cache.extend()
    assert (cache.n, cache.kv_len.tolist()) == (4, [4])


def test_slots_that_were_never_written_hold_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def dirty(*args: Any, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", dirty)
    cache = DecodeCache([states(3, 1.0), states(5, 2.0)], new_tokens=4)
    for layer in cache.layers:
        assert not layer.keys.isnan().any()
        assert not layer.values.isnan().any()


def test_the_prompts_states_are_copied(model: LlamaForCausalLM) -> None:
    own = states(3, 1.0)
    cache = DecodeCache([own], new_tokens=1)
    cache.layers[0].keys.fill_(9.0)
    assert own.key_states[0].unique().tolist() == [1.0]


# The store ------------------------------------------------------------------------------------


def test_a_prefill_equals_the_models_forward(model: LlamaForCausalLM) -> None:
    ids = list(range(1, 12))
    found = prefill(model, ids)
    cache = DynamicCache()
    whole = model(torch.tensor([ids]), **cache_keyword(model, cache))
    assert (found.num_tokens, found.num_layers) == (11, LAYERS)
    assert found.num_bytes == 2 * LAYERS * KV_HEADS * 11 * HEAD_DIM * 4
    torch.testing.assert_close(found.logits, whole.logits[0, -1], rtol=1e-4, atol=1e-5)
    for layer in range(LAYERS):
        torch.testing.assert_close(found.key_states[layer], cache.layers[layer].keys[0])
    assert found.milliseconds > 0


def same(left: Prefill, right: Prefill) -> None:
    for one, other in zip(left.key_states, right.key_states, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(left.value_states, right.value_states, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(left.logits, right.logits)


def test_each_prompt_is_computed_once(model: LlamaForCausalLM) -> None:
    store = PrefillStore(model)
    for ids in ([1, 2, 3], [1, 2, 4], [1, 2, 3], (1, 2, 3), [12, 3]):
        store.get(ids)
    assert store.forwards == 3


@pytest.mark.parametrize(("kept_bytes", "again"), [(0, 3), (3 * 256 + 100, 2), (2**20, 0)])
def test_released_states_are_dropped_beyond_what_is_kept(
    model: LlamaForCausalLM, kept_bytes: int, again: int
) -> None:
    store = PrefillStore(model, kept_bytes)
    prompts: list[Sequence[int]] = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    made = [store.get(ids) for ids in prompts]
    for _ in range(2):
        store.release()
    for ids, states_ in zip(prompts, made, strict=True):
        same(store.get(ids), states_)
    assert store.forwards == 3 + again


def step(cache: DecodeCache, *values: float) -> None:
    cache.extend()
    for layer in cache.layers:
        layer.update(token(*values), token(*values))


def test_cells_decode_in_the_same_buffers_one_after_the_other(model: LlamaForCausalLM) -> None:
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10]]
    store = PrefillStore(model)
    alone = [prefill(model, ids).key_states for ids in prompts]
    cache = store.cache(prompts, new_tokens=4)
    address = cache.layers[0].keys.data_ptr()
    step(cache, float("nan"), 1.0, 2.0)  # what an earlier cell wrote, whatever it was
    del cache

    cache = store.cache(prompts, new_tokens=2)
    assert cache.layers[0].keys.data_ptr() == address
    assert cache.layers[0].keys.shape[2] == 7
    assert cache.kv_len.tolist() == [3, 5, 2]
    for layer in range(LAYERS):
        for row, states in enumerate(alone):
            n = len(prompts[row])
            assert torch.equal(cache.layers[layer].keys[row, :, :n], states[layer])
            assert not cache.layers[layer].keys[row, :, n:].any()
    del cache

    one = store.cache(prompts[1:2], new_tokens=1)
    two = store.cache(prompts[1:], new_tokens=1)
    base = one.layers[0].keys
    assert base.untyped_storage().data_ptr() == address
    # The prompts are in use, so these have memory of their own.
    assert two.layers[0].keys.untyped_storage().data_ptr() != address
    step(two, 7.0, 8.0)
    step(one, 9.0)
    assert base[0, 0, 5, 0] == 9
    assert two.layers[0].keys[0, 0, 5, 0] == 7


def test_more_free_slots_move_all_prompts_once(model: LlamaForCausalLM) -> None:
    prompts = [[1, 2, 3], [4, 5, 6]]
    store = PrefillStore(model)
    store.cache(prompts, new_tokens=1)
    address = store.cache(prompts[:1], new_tokens=30).layers[0].keys.data_ptr()
    assert store.cache(prompts, new_tokens=9).layers[0].keys.data_ptr() == address
    for ids in prompts:
        of_store, alone = store.get(ids), prefill(model, ids)
        assert of_store.key_states[0].untyped_storage().data_ptr() == address
        assert torch.equal(of_store.value_states[1], alone.value_states[1])
    assert store.forwards == 2


def test_kept_states_outlive_their_buffers(model: LlamaForCausalLM) -> None:
    store = PrefillStore(model, kept_bytes=10**6)
    cache = store.cache([[1, 2, 3]], new_tokens=1)
    address = cache.layers[0].keys.data_ptr()
    del cache
    store.release()
    kept = store.get([1, 2, 3])
    assert kept.key_states[0].untyped_storage().data_ptr() != address
    assert torch.equal(kept.key_states[0], prefill(model, [1, 2, 3]).key_states[0])
    assert store.forwards == 1


def test_a_method_that_frees_tokens_leaves_the_prompts_as_they_are(model: LlamaForCausalLM) -> None:
    store = PrefillStore(model)
    cache = store.cache([[1, 2, 3, 4]], new_tokens=2)
    cache.topkbench_keep(0, torch.tensor([[[1, 3]] * KV_HEADS], dtype=torch.int32))
    step(cache, 5.0)
    del cache
    again = store.cache([[1, 2, 3, 4]], new_tokens=2).layers[0].keys[0, :, :4]
    assert torch.equal(again, prefill(model, [1, 2, 3, 4]).key_states[0])
