"""Methods over every kind of cache: grown in chunks, cropped, reset, static, several at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import Cache, DynamicCache

from topkbench.methods.base import Policy, PrefillInputs
from topkbench.methods.h2o import H2O
from topkbench.methods.snapkv import SnapKV
from topkbench.methods.spatten import SpAtten, SpAttenIndex
from topkbench.models.attach import Session, attach
from topkbench.models.compat import cache_keyword

Make = Callable[..., Any]
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def logits_by_chunks(model: PreTrainedModel, ids: Tensor, sizes: list[int], cache: Cache) -> Tensor:
    parts = []
    with torch.no_grad():
        for chunk in ids.split(sizes, 1):
            parts.append(model(chunk, **cache_keyword(model, cache), use_cache=True).logits)
    return torch.cat(parts, 1)


def test_chunked_prefill_ends_in_a_chunk_of_one(
    llama: PreTrainedModel, method_for: Make, prompt: Make, make_counter: Make
) -> None:
    ids = prompt(2, 35)
    counter, cache = make_counter(), DynamicCache(config=llama.config)
    with attach(llama, method_for("hata", llama), Policy(k=200), counter) as session:
        with session.prefill():
            read = logits_by_chunks(llama, ids[:, :33], [16, 16, 1], cache)
        decoded = logits_by_chunks(llama, ids[:, 33:], [1, 1], cache)
    with torch.no_grad():
        wanted = llama(ids).logits
    torch.testing.assert_close(torch.cat([read, decoded], 1), wanted, atol=2e-5, rtol=1e-4)
    assert counter.count("build", 0) == 1
    assert counter.count("append", 0) == 2


@pytest.mark.parametrize("which", ["hata", "snapkv"])
def test_generate_reads_its_prompt_in_chunks(
    llama: PreTrainedModel, method_for: Make, prompt: Make, which: str
) -> None:
    ids = prompt(1, 35)
    method = SnapKV(window=8) if which == "snapkv" else method_for("hata", llama)
    with attach(llama, method, Policy(k=16)) as session:
        wanted = llama.generate(ids, **GREEDY)
    steps = session.count.taken
    with attach(llama, method, Policy(k=16)) as session:
        found = llama.generate(ids, prefill_chunk_size=8, **GREEDY)
    assert torch.equal(found, wanted)
    assert session.count.taken == steps == {0: 7, 1: 7}


@pytest.mark.filterwarnings("ignore:.*allow_dense_forwards")
def test_a_chunk_after_decoding_rebuilds_the_index(
    llama: PreTrainedModel, method_for: Make, prompt: Make, make_counter: Make
) -> None:
    """Single tokens between dense forwards of several are decode steps."""
    ids = prompt(2, 40)
    counter = make_counter()
    method = method_for("exact", llama)
    with attach(llama, method, Policy(k=16), counter, allow_dense_forwards=True) as session:
        cache = DynamicCache(config=llama.config)
        found = logits_by_chunks(llama, ids, [20, 1, 1, 10, 1, 7], cache)[:, 32]
        assert isinstance(session, Session)
    assert counter.count("build", 1) == 2
    fresh = DynamicCache(config=llama.config)
    with attach(llama, method, Policy(k=200)):
        logits_by_chunks(llama, ids[:, :20], [20], fresh)
    with attach(llama, method, Policy(k=16), allow_dense_forwards=True):
        wanted = logits_by_chunks(llama, ids[:, 20:33], [1, 1, 10, 1], fresh)[:, 12]
    torch.testing.assert_close(found, wanted)


def test_cropping_restricts_the_index_and_resetting_rebuilds_it(
    llama: PreTrainedModel, method_for: Make, prompt: Make, make_counter: Make
) -> None:
    ids = prompt(2, 40)
    counter = make_counter()
    with attach(llama, method_for("hata", llama), Policy(k=16), counter):
        cache = DynamicCache(config=llama.config)
        first = logits_by_chunks(llama, ids[:, :32], [30, 1, 1], cache)[:, -1]
        cache.crop(-1)
        again = logits_by_chunks(llama, ids[:, 31:32], [1], cache)[:, -1]
        assert counter.count("build", 0) == 1
        cache.reset()
        if cache.get_seq_length():  # before about 5.24 a reset cache keeps its slots, as zeros
            cache = DynamicCache(config=llama.config)
        third = logits_by_chunks(llama, ids[:, :32], [30, 1, 1], cache)[:, -1]
    assert counter.count("build", 0) == 2
    torch.testing.assert_close(again, first)
    torch.testing.assert_close(third, first)


def importance_when_built(method: SpAtten, heads: int) -> list[float]:
    """Return a list that records the importance per row and query head after each build."""
    sums, build = [], method.build_index

    def recording(prefill: PrefillInputs) -> SpAttenIndex:
        index = build(prefill)
        sums.append(round(index.importance.sum().item() / len(index.importance) / heads, 3))
        return index

    method.build_index = recording  # type: ignore[method-assign]
    return sums


def test_indices_that_share_state_are_dropped_together_on_a_crop(
    llama: PreTrainedModel, prompt: Make
) -> None:
    """Each query adds 1: 30 queries per layer, and one decode step of the layer before."""
    ids, method = prompt(2, 31), SpAtten()
    sums = importance_when_built(method, 4)
    with attach(llama, method, Policy(k=16)):
        cache = DynamicCache(config=llama.config)
        first = logits_by_chunks(llama, ids, [30, 1], cache)[:, -1]
        cache.crop(-1)
        again = logits_by_chunks(llama, ids[:, 30:], [1], cache)[:, -1]
    assert sums == [30.0, 61.0, 30.0, 61.0]
    torch.testing.assert_close(again, first)


def test_a_beam_search_builds_indices_that_share_state_once(
    llama: PreTrainedModel, prompt: Make
) -> None:
    method = SpAtten()
    sums = importance_when_built(method, 4)
    with attach(llama, method, Policy(k=16)):
        llama.generate(prompt(2, 30), num_beams=3, max_new_tokens=6, do_sample=False)
    assert sums == [30.0, 61.0]


@pytest.mark.parametrize("which", ["full", "exact", "hata", "quest", "loki", "streaming_llm"])
@pytest.mark.parametrize("k", [16, 200])
def test_a_static_cache_gives_the_same_as_a_growing_one(
    llama: PreTrainedModel,
    which: str,
    k: int,
    method_for: Make,
    padded_batch: Make,
    make_counter: Make,
) -> None:
    ids, mask = padded_batch()
    method = method_for(which, llama)
    counter = make_counter()
    with attach(llama, method, Policy(k=k), counter):
        grown = llama.generate(ids, attention_mask=mask, **GREEDY)
        cache = StaticCache(config=llama.config, max_cache_len=64)
        static = llama.generate(ids, attention_mask=mask, **cache_keyword(llama, cache), **GREEDY)
        assert torch.equal(static, grown)
        cache.reset()
        again = llama.generate(ids, attention_mask=mask, **cache_keyword(llama, cache), **GREEDY)
    assert torch.equal(again, grown)
    if method.selects:
        assert counter.count("build", 0) == 3


class CopyingCache(DynamicCache):
    """Returns copies of its keys and values, as a quantised cache does."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*args, **kwargs)
        return keys.clone(), values.clone()


def test_a_cache_that_cannot_be_watched(
    llama: PreTrainedModel, method_for: Make, prompt: Make, make_counter: Make
) -> None:
    """Indices are rebuilt at every step, so a history-dependent method is refused."""
    ids, counter = prompt(2, 33), make_counter()
    found = {}
    for kind in (CopyingCache, DynamicCache):
        with attach(llama, method_for("hata", llama), Policy(k=16), counter):
            cache = kind(config=llama.config)
            found[kind] = logits_by_chunks(llama, ids, [30, 1, 1, 1], cache)
    assert counter.count("build", 0) == 3 + 1
    torch.testing.assert_close(found[CopyingCache], found[DynamicCache])
    for method in (SpAtten(), H2O()):
        sentence = (
            f"{method.name} needs its index kept from step to step, and a CopyingCache returns "
            "other keys than it stores, .*; use a DynamicCache"
        )
        cache = CopyingCache(config=llama.config)
        with attach(llama, method, Policy(k=16)), pytest.raises(ValueError, match=sentence):
            logits_by_chunks(llama, ids, [32, 1], cache)


def test_inference_mode(llama: PreTrainedModel, method_for: Make, prompt: Make) -> None:
    ids = prompt()
    with attach(llama, method_for("hata", llama), Policy(k=16)):
        wanted = llama.generate(ids, **GREEDY)
        with torch.inference_mode():
            found = llama.generate(ids, **GREEDY)
    assert torch.equal(found, wanted)


def test_two_caches_keep_two_indices(
    llama: PreTrainedModel, method_for: Make, prompt: Make
) -> None:
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
