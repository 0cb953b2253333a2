"""What is kept beside a cache follows it: rows are taken along, copies have copies, crops restrict.

What can be neither followed nor built again from keys and values is refused in one sentence.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, DynamicCache

from topkbench.methods.base import AnyMethod, Policy
from topkbench.methods.h2o import H2O
from topkbench.methods.hata import HATA
from topkbench.methods.magicpig import MagicPIG
from topkbench.methods.pqcache import PQCache
from topkbench.methods.quest import Quest
from topkbench.methods.snapkv import SnapKV
from topkbench.methods.sparq import SparQ
from topkbench.methods.spatten import SpAtten
from topkbench.methods.twilight import Twilight
from topkbench.models.attach import attach
from topkbench.models.cache_state import ATTRIBUTE
from topkbench.models.compat import cache_keyword

pytestmark = pytest.mark.filterwarnings("ignore:.*allow_dense_forwards")

Make = Callable[..., Any]
POLICY = Policy(k=16, num_sink=1, num_recent=2)
METHODS: dict[str, Callable[[], AnyMethod]] = {
    "h2o": H2O,
    "snapkv": lambda: SnapKV(window=8),
    "spatten": SpAtten,
    "magicpig": lambda: MagicPIG(num_tables=20, hash_bits=4),
    "pqcache": lambda: PQCache(bits=3),
    "quest": lambda: Quest(page_size=4),
    "sparq": lambda: SparQ(rank=8),
    "hata": lambda: HATA(weights="random", rbit=64),
    "hata, centred": lambda: HATA(weights="random", rbit=64, centre_keys=True),
    "twilight over snapkv": lambda: Twilight(base=SnapKV(window=8), base_k=2),
}
NEEDY = {"h2o", "snapkv", "spatten", "twilight over snapkv"}  # queries of the prompt
DEPENDING = NEEDY | {"magicpig", "pqcache", "hata, centred"}
Change = Callable[[Cache], Cache | None]


@pytest.fixture(params=sorted(METHODS))
def which(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def method(which: str, llama: PreTrainedModel, fitted_on: Make) -> AnyMethod:
    made: AnyMethod = fitted_on(METHODS[which](), llama)
    return made


def read(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Read tokens at once; return the logits of the last, ``[B, vocabulary]``."""
    with torch.no_grad():
        logits: Tensor = model(ids, **cache_keyword(model, cache), use_cache=True).logits
    return logits[:, -1]


def decode(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Decode tokens one by one; return the logits, ``[B, n, vocabulary]``."""
    return torch.stack([read(model, token, cache) for token in ids.split(1, 1)], 1)


def dynamic(model: PreTrainedModel) -> Cache:
    return DynamicCache(config=model.config)


def static(model: PreTrainedModel) -> Cache:
    return StaticCache(config=model.config, max_cache_len=64)


def as_before(cache: Cache) -> None:
    cache.reorder_cache(torch.arange(2))


def swapped_twice(cache: Cache) -> None:
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))


def repeated_and_selected(cache: Cache) -> None:
    cache.batch_repeat_interleave(2)  # rows 0, 0, 1, 1
    cache.batch_select_indices(torch.tensor([1, 2]))


def pickled(cache: Cache) -> Cache:
    file = io.BytesIO()
    pickle.dump(cache, file)
    file.seek(0)
    loaded: Cache = pickle.load(file)
    return loaded


CHANGES: dict[str, Change] = {
    "reordered as before": as_before,
    "swapped twice": swapped_twice,
    "repeated and selected": repeated_and_selected,
    "copied": copy.deepcopy,
    "pickled": pickled,
}


@pytest.mark.parametrize("make_cache", [dynamic, static])
@pytest.mark.parametrize("decoded", [0, 3])
def test_a_change_that_leaves_the_rows_changes_no_logits(
    llama: PreTrainedModel,
    method: AnyMethod,
    prompt: Make,
    make_cache: Callable[[PreTrainedModel], Cache],
    decoded: int,
) -> None:
    """A beam search reorders its cache at every step, often into the order that it has."""
    ids = prompt(2, 40)

    def logits(change: Change) -> torch.Tensor:
        cache = make_cache(llama)
        with attach(llama, method, POLICY):
            read(llama, ids[:, :30], cache)
            if decoded:
                decode(llama, ids[:, 30 : 30 + decoded], cache)
            return decode(llama, ids[:, 30 + decoded :], change(cache) or cache)

    unchanged = logits(lambda cache: cache)
    # SparQ's sum of values that is built again is rounded otherwise.
    near = 1e-4 if method.name == "sparq" else 0.0
    for name, change in CHANGES.items():
        if make_cache is static and name == "repeated and selected":
            continue  # a static cache has a fixed number of rows
        assert torch.allclose(logits(change), unchanged, atol=near, rtol=near), name


def test_rows_are_taken_along(
    llama: PreTrainedModel, method: AnyMethod, which: str, prompt: Make, make_counter: Make
) -> None:
    ids, rows, counter = prompt(3, 40), torch.tensor([2, 0, 0]), make_counter()
    with attach(llama, method, POLICY):
        cache = dynamic(llama)
        read(llama, ids[:, :30], cache)
        wanted = decode(llama, ids[:, 30:], cache)[:, 4:]
    with attach(llama, method, POLICY, counter):
        cache = dynamic(llama)
        read(llama, ids[:, :30], cache)
        decode(llama, ids[:, 30:34], cache)
        built = counter.count("build", 0)
        cache.reorder_cache(rows)
        found = decode(llama, ids[rows, 34:], cache)
        if which in DEPENDING:
            assert counter.count("build", 0) == built
    torch.testing.assert_close(found, wanted[rows], atol=1e-5, rtol=1e-5)


def test_left_padding_is_taken_along(
    llama: PreTrainedModel, method: AnyMethod, padded_batch: Make
) -> None:
    """Three beams of each row choose tokens as generate's beam search does without a method."""
    ids, mask = padded_batch()
    found = {}
    for k in (16, 200):
        with attach(llama, method, Policy(k=k)):
            found[k] = llama.generate(
                ids, attention_mask=mask, num_beams=3, max_new_tokens=6, do_sample=False
            )
    without = llama.generate(
        ids, attention_mask=mask, num_beams=3, max_new_tokens=6, do_sample=False
    )
    assert torch.equal(found[200], without)
    assert found[16].shape[0] == 3


def test_several_questions_on_copies_of_one_context(
    llama: PreTrainedModel, method: AnyMethod, prompt: Make
) -> None:
    """Each copy answers as a cache of its own, and does not change the others."""
    context, questions = prompt(1, 30), prompt(3, 45)[:, 30:]
    alone, copies = [], []
    with attach(llama, method, POLICY, allow_dense_forwards=True):
        for question in questions.split(1):
            cache = dynamic(llama)
            read(llama, context, cache)
            read(llama, question[:, :9], cache)
            alone.append(decode(llama, question[:, 9:], cache))
        cache = dynamic(llama)
        read(llama, context, cache)
        for question in questions.split(1):
            copied = copy.deepcopy(cache)
            read(llama, question[:, :9], copied)
            copies.append(decode(llama, question[:, 9:], copied))
    for one, other in zip(alone, copies, strict=True):
        assert torch.equal(one, other)


# Crops --------------------------------------------------------------------------------------------


def test_cropping_to_the_prompt_decodes_as_the_first_time(
    llama: PreTrainedModel, method: AnyMethod, prompt: Make
) -> None:
    ids = prompt(2, 40)
    with attach(llama, method, POLICY):
        cache = dynamic(llama)
        read(llama, ids[:, :30], cache)
        first = decode(llama, ids[:, 30:], cache)
        cache.crop(-10)
        again = decode(llama, ids[:, 30:], cache)
    torch.testing.assert_close(again, first, atol=1e-5, rtol=1e-5)


def test_cropping_decoded_tokens_is_followed_or_refused(
    llama: PreTrainedModel, method: AnyMethod, which: str, prompt: Make
) -> None:
    ids, cache = prompt(2, 40), dynamic(llama)
    refused = which in NEEDY | {"magicpig"}
    with attach(llama, method, POLICY):
        read(llama, ids[:, :30], cache)
        first = decode(llama, ids[:, 30:], cache)
        cache.crop(-4)
        if refused:
            message = (
                f"{method.name} depends on the steps so far, and the index that held those after "
                "the 30 tokens of the prompt was lost when the cache was changed; prefill the "
                "prompt again instead of decoding token 37 of this cache"
            )
            with pytest.raises(ValueError, match=message):
                decode(llama, ids[:, 36:], cache)
            return
        again = decode(llama, ids[:, 36:], cache)
    torch.testing.assert_close(again, first[:, 6:], atol=1e-5, rtol=1e-5)


def test_cropping_into_the_prompt_is_a_shorter_prompt_or_refused(
    llama: PreTrainedModel, method: AnyMethod, which: str, prompt: Make
) -> None:
    ids = prompt(2, 40)
    with attach(llama, method, POLICY):
        short, cropped = dynamic(llama), dynamic(llama)
        read(llama, ids[:, :28], short)
        wanted = decode(llama, ids[:, 28:], short)
        read(llama, ids[:, :34], cropped)
        cropped.crop(-6)
        if which in NEEDY:
            message = (
                f"{method.name} needs what was captured of a prompt, and this cache was cropped "
                "to 28 of its 34 tokens; prefill the shorter prompt again"
            )
            with pytest.raises(ValueError, match=message):
                decode(llama, ids[:, 28:], cropped)
            return
        found = decode(llama, ids[:, 28:], cropped)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


# Other changes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["keys", "values"])
def test_a_cache_changed_by_other_means_is_built_again_or_refused(
    llama: PreTrainedModel, method: AnyMethod, which: str, prompt: Make, changed: str
) -> None:
    ids = prompt(2, 40)
    with attach(llama, method, POLICY):
        cache: Any = dynamic(llama)
        read(llama, ids[:, :30], cache)
        wanted = decode(llama, ids[:, 30:], cache)
        cache = dynamic(llama)
        read(llama, ids[:, :30], cache)
        decode(llama, ids[:, 30:33], cache)
        for layer in cache.layers:
            setattr(layer, changed, getattr(layer, changed).clone())
        if which in DEPENDING:
            message = (
                f"{method.name} depends on which tokens were the prompt, and this cache was "
                "changed by other means than its own methods"
            )
            with pytest.raises(ValueError, match=message):
                decode(llama, ids[:, 33:], cache)
            return
        found = decode(llama, ids[:, 33:], cache)
    torch.testing.assert_close(found, wanted[:, 3:], atol=1e-5, rtol=1e-5)


def test_a_context_read_before_attach_is_the_prompt_or_refused(
    llama: PreTrainedModel, method: AnyMethod, which: str, prompt: Make
) -> None:
    ids = prompt(2, 40)
    with attach(llama, method, POLICY):
        cache = dynamic(llama)
        read(llama, ids[:, :30], cache)
        wanted = decode(llama, ids[:, 30:], cache)
    for question in (0, 5):  # tokens of it that are read inside the block
        cache = dynamic(llama)
        read(llama, ids[:, : 30 - question], cache)
        with attach(llama, method, POLICY, allow_dense_forwards=True):
            if question:
                read(llama, ids[:, 30 - question : 30], cache)
            if which in NEEDY:
                with pytest.raises(ValueError, match=f"{method.name} needs .*without capturing"):
                    decode(llama, ids[:, 30:], cache)
                continue
            found = decode(llama, ids[:, 30:], cache)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_nothing_is_left_on_the_cache(
    llama: PreTrainedModel, method: AnyMethod, prompt: Make
) -> None:
    """Two sessions over one cache keep their states apart, and each removes its own."""
    ids, cache = prompt(2, 40), dynamic(llama)
    with attach(llama, method, POLICY):
        read(llama, ids[:, :30], cache)
        copied = copy.deepcopy(cache)
        decode(llama, ids[:, 30:], cache)
        decode(llama, ids[:, 30:], copied)
        assert hasattr(cache, ATTRIBUTE)
    assert not hasattr(cache, ATTRIBUTE)
    assert not hasattr(copied, ATTRIBUTE)
