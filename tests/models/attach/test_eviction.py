"""Evicting methods in a model: masked and compact give the same, and compact frees memory."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from topkbench.harness.reads import ReadCounter
from topkbench.methods import eviction
from topkbench.methods.base import AnyMethod, Policy
from topkbench.methods.eviction import SPARE, Evicting
from topkbench.methods.h2o import H2O
from topkbench.methods.snapkv import SnapKV
from topkbench.methods.streaming_llm import StreamingLLM
from topkbench.methods.twilight import Twilight
from topkbench.models import cache as models_cache
from topkbench.models import layer_index
from topkbench.models.attach import attach
from topkbench.models.cache import DecodeCache
from topkbench.models.compat import cache_keyword
from topkbench.models.prefill import prefill

Make = Callable[..., Any]
METHODS: dict[str, Callable[..., Evicting[Any]]] = {
    "h2o": H2O,
    "snapkv": lambda **more: SnapKV(window=8, **more),
    "streaming_llm": StreamingLLM,
}
ADAPTIVE = sorted(
    path.stem
    for path in (Path(__file__).parents[3] / "conf" / "method").glob("*.yaml")
    # Where the traits depend on the settings, the class has a property.
    if getattr(get_class(OmegaConf.load(path)["_target_"]).traits, "index", None) == "history"
)
LENGTHS = {1: (120,), 3: (120, 18, 70)}
STEPS = 30


def texts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 61, (n,), generator=generator).tolist() for n in lengths]


def decode(
    model: PreTrainedModel, method: AnyMethod, policy: Policy, prompts: list[list[int]], steps: int
) -> tuple[Tensor, DecodeCache, float]:
    """Decode greedily; return the logits ``[steps, B, vocabulary]``, the cache and the density."""
    states = [prefill(model, ids, method.traits.needs) for ids in prompts]
    cache = DecodeCache(states, steps)
    token = torch.stack([one.logits for one in states]).argmax(-1, keepdim=True)
    counter, logits = ReadCounter(), []
    with attach(model, method, policy, counter), torch.no_grad():
        for _ in range(steps):
            cache.extend()
            ids = {"input_ids": token, "position_ids": cache.positions}
            logits.append(model(**ids, **cache_keyword(model, cache)).logits[:, -1])
            token = logits[-1].argmax(-1, keepdim=True)
    assert counter.count.density is not None
    return torch.stack(logits), cache, counter.count.density


@pytest.mark.parametrize("protocol", ["unified", "native"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("which", sorted(METHODS))
def test_compact_gives_the_same_as_masked_in_less_memory(
    models: dict[str, PreTrainedModel],
    make_method: Make,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    family: str,
    rows: int,
    protocol: Any,
) -> None:
    """As published, except that SnapKV selects per KV head, as memory is freed per KV head."""
    spare = 8  # so that it is freed several times in few steps
    for module in (eviction, models_cache):
        monkeypatch.setattr(module, "SPARE", spare)
    model, lengths = models[family], LENGTHS[rows]
    policy = Policy(k=24, protocol=protocol)
    results = {}
    for mode in ("masked", "compact"):
        settings = {"window": 8} if which == "snapkv" else {}
        method = make_method(which, mode=mode, native={"head_scope": "kv_head"}, **settings)
        results[mode] = decode(model, method, policy, texts(*lengths), STEPS)
    masked, compact = results["masked"], results["compact"]
    torch.testing.assert_close(compact[0], masked[0], atol=1e-4, rtol=1e-3)
    assert compact[2] == pytest.approx(masked[2])
    assert masked[1].num_bytes == sum(2 * layer.keys.nbytes for layer in masked[1].layers)
    grown = STEPS if (which, protocol) == ("snapkv", "native") else 0
    for layer in compact[1].layers:
        assert layer.keys.shape[2] <= 24 + grown + spare
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes  # not a view
    assert compact[1].num_bytes < (0.9 if grown else 0.3) * masked[1].num_bytes


def test_freed_tokens_are_counted(llama: PreTrainedModel) -> None:
    _, cache, _ = decode(llama, H2O(mode="compact"), Policy(k=24), texts(120, 18, 70), 50)
    for layer in cache.layers:
        ends = layer.kv_len if layer.kv_len is not None else layer.get_seq_length()
        assert (layer.freed + ends).tolist() == [170, 68, 120]
    assert cache.topkbench_captured(0) is None


def test_dense_layers_free_nothing(llama: PreTrainedModel) -> None:
    policy = Policy(k=24, dense_layers=(0,))
    _, cache, _ = decode(llama, StreamingLLM(mode="compact"), policy, texts(120), 40)
    assert [layer.keys.shape[2] for layer in cache.layers] == [160, 24 + SPARE]


@pytest.mark.parametrize("which", sorted(METHODS))
def test_a_budget_of_all_tokens_frees_nothing(llama: PreTrainedModel, which: str) -> None:
    logits, cache, _ = decode(llama, METHODS[which](mode="compact"), Policy(k=99), texts(40), 20)
    wanted, _, _ = decode(llama, METHODS[which](), Policy(k=99), texts(40), 20)
    assert torch.equal(logits, wanted)
    assert [layer.keys.shape[2] for layer in cache.layers] == [60, 60]


@pytest.mark.parametrize("which", [*ADAPTIVE, "pqcache", "twilight"])
def test_an_index_grows_with_the_cache(
    llama: PreTrainedModel,
    make_method: Make,
    prompt: Make,
    make_counter: Make,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
) -> None:
    """A transformers cache outgrows the index's capacity; evicted tokens stay evicted."""
    monkeypatch.setattr(layer_index, "LEAST_SPARE", 16)  # so that it does several times
    ids, counter = prompt(1, 30), make_counter()
    method = Twilight(base=SnapKV()) if which == "twilight" else make_method(which)
    greedy: dict[str, Any] = {"max_new_tokens": 70, "do_sample": False}
    with attach(llama, method, Policy(k=16), counter):
        found = llama.generate(ids, **greedy)
    logits, _, _ = decode(llama, method, Policy(k=16), ids.tolist(), 69)  # allocated in advance
    assert found[0, 31:].tolist() == logits[:, 0].argmax(-1).tolist()
    # Capturing counts as a build stage too; the index itself is built once.
    assert counter.count("build", 0) == 1 + bool(method.traits.needs)


def test_other_caches_are_refused(llama: PreTrainedModel, prompt: Make) -> None:
    ids = prompt(1, 30)
    message = "mode=compact can free memory only of topkbench's own DecodeCache, got a DynamicCache"
    with attach(llama, H2O(mode="compact"), Policy(k=16)), torch.no_grad():
        cache = DynamicCache(config=llama.config)
        llama(ids[:, :-1], **cache_keyword(llama, cache))
        with pytest.raises(ValueError, match=message):
            llama(ids[:, -1:], **cache_keyword(llama, cache))


def test_a_cache_with_freed_tokens_is_refused_by_another_session(llama: PreTrainedModel) -> None:
    _, cache, _ = decode(llama, StreamingLLM(mode="compact"), Policy(k=16), texts(60), 3)
    cache.capacity += 1
    cache.extend()
    ids = {"input_ids": torch.ones(1, 1, dtype=torch.long), "position_ids": cache.positions}
    message = "streaming_llm must see the whole prompt, and tokens of this cache have been freed"
    with (
        attach(llama, StreamingLLM(), Policy(k=16)),
        torch.no_grad(),
        pytest.raises(ValueError, match=message),
    ):
        llama(**ids, **cache_keyword(llama, cache))


def test_decoding_does_not_change_the_method(llama: PreTrainedModel) -> None:
    """A method keeps no state of a prompt."""
    method = SnapKV(window=8)
    before = copy.deepcopy(method)
    decode(llama, method, Policy(k=24), texts(60), 4)
    assert method == before
