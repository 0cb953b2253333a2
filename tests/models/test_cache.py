"""The decode cache and the prefill store: written in place, computed once."""

import copy
import gc
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from topkbench.models.cache import DecodeCache
from topkbench.models.compat import cache_keyword
from topkbench.models.prefill import Prefill, PrefillStore, prefill

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
    return Prefill((keys,) * LAYERS, (-keys,) * LAYERS, torch.zeros(50), 1.0)


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
    with pytest.raises(ValueError, match=r"got capacity=4 with all in use; build it with more"):
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


def test_each_prompt_is_computed_once(model: LlamaForCausalLM, tmp_path: Path) -> None:
    store = PrefillStore(model, tmp_path / "spill")
    for ids in ([1, 2, 3], [1, 2, 4], [1, 2, 3], (1, 2, 3), [12, 3]):
        store.get(ids)
    assert store.forwards == 3
    assert not (tmp_path / "spill").exists()


@pytest.mark.parametrize("limit", [0, 3 * 256 + 100])
def test_prefills_beyond_the_limit_go_to_shared_files(
    model: LlamaForCausalLM, tmp_path: Path, limit: int
) -> None:
    prompts: list[Sequence[int]] = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [3, 2, 1]]
    first = PrefillStore(model, tmp_path, limit)
    made = [first.get(ids) for ids in prompts]
    kept = 0 if limit == 0 else 1  # three tokens of 256 bytes
    assert first.forwards == 4
    assert len(list(tmp_path.glob("*.safetensors"))) == 4 - kept
    for ids, states_ in zip(prompts, made, strict=True):
        same(first.get(ids), states_)  # from memory or from disk
    assert first.forwards == 4
    second = PrefillStore(model, tmp_path, limit)
    for ids, states_ in zip(reversed(prompts), reversed(made), strict=True):
        same(second.get(ids), states_)
    assert second.forwards == kept
    assert second.get(prompts[1]).milliseconds == pytest.approx(made[1].milliseconds, rel=1e-5)


def test_a_spilled_prompt_can_be_decoded(model: LlamaForCausalLM, tmp_path: Path) -> None:
    spilled = PrefillStore(model, tmp_path, 0)
    spilled.get([1, 2, 3])
    cache = DecodeCache([spilled.get([1, 2, 3])], new_tokens=1)
    assert torch.equal(cache.layers[0].keys[0, :, :3], prefill(model, [1, 2, 3]).key_states[0])


def test_a_prefill_of_other_weights_is_never_used(model: LlamaForCausalLM, tmp_path: Path) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 2] += 1
    first = PrefillStore(model, tmp_path, 0).get([1, 2, 3])
    second = PrefillStore(other, tmp_path, 0)
    assert not torch.equal(second.get([1, 2, 3]).logits, first.logits)
    assert second.forwards == 1
    same(PrefillStore(model, tmp_path, 0).get([1, 2, 3]), first)
    # Nor is a prefill of another identity, of code or libraries.
    named = [PrefillStore(model, tmp_path, 0, identity) for identity in ("a", "b", "a")]
    for store in named:
        store.get([1, 2, 3])
    assert [store.forwards for store in named] == [1, 1, 0]


def edit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        edit,
        lambda path: path.write_bytes(path.read_bytes()[:-64]),
        lambda path: path.write_bytes(b""),
        lambda path: shutil.copy(path.with_name("longer"), path),
    ],
    ids=["edited", "cut short", "empty", "of another prompt"],
)
def test_a_damaged_prefill_is_made_again(
    model: LlamaForCausalLM, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    PrefillStore(model, tmp_path, 0).get([1, 2, 3, 4])
    (longer,) = tmp_path.glob("*.safetensors")
    longer.rename(tmp_path / "longer")
    first = PrefillStore(model, tmp_path, 0).get([1, 2, 3])
    (path,) = tmp_path.glob("*.safetensors")
    kept = [states.clone() for states in first.key_states]
    damage(path)
    again = PrefillStore(model, tmp_path, 0)
    found = again.get([1, 2, 3])
    assert again.forwards == 1
    assert all(torch.equal(*pair) for pair in zip(found.key_states, kept, strict=True))
    whole = PrefillStore(model, tmp_path, 0)
    whole.get([1, 2, 3])
    assert whole.forwards == 0


def test_a_killed_writer_leaves_no_prefill(model: LlamaForCausalLM, tmp_path: Path) -> None:
    store = PrefillStore(model, tmp_path, 0)
    store.get([1, 2, 3])
    (path,) = tmp_path.glob("*.safetensors")
    path.rename(path.with_name(f".{path.name}.123"))  # as if it had died before the last step
    again = PrefillStore(model, tmp_path, 0)
    again.get([1, 2, 3])
    assert again.forwards == 1
