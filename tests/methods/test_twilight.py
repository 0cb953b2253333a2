"""Twilight: the fewest tokens of a base's selection that hold the mass."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from topkbench.methods.base import (
    AnyMethod,
    CacheView,
    Geometry,
    Policy,
    PrefillInputs,
    StepContext,
    Traits,
)
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.hata import HATA
from topkbench.methods.learning import LearningMethod, check_ready
from topkbench.methods.loki import Loki
from topkbench.methods.policy import Protocol
from topkbench.methods.quest import Quest
from topkbench.methods.snapkv import SnapKV
from topkbench.methods.streaming_llm import StreamingLLM
from topkbench.methods.twilight import Twilight, smallest_set

FREE: dict[str, Any] = {"num_sink": 0, "num_recent": 0}


def inputs(keys: Tensor, **settings: Any) -> PrefillInputs:
    return PrefillInputs(
        key_states=keys,
        value_states=keys,
        capacity=keys.shape[2] + 2,
        layer=0,
        num_layers=2,
        **settings,
    )


@pytest.mark.parametrize(
    ("p", "k", "wanted"),
    [
        (0.25, 5, [1]),
        (0.40625, 5, [1]),
        (0.5, 5, [1, 3]),
        (0.875, 5, [0, 1, 3]),
        (0.9, 5, [0, 1, 3, 4]),
        (0.875, 2, [1, 3]),
        (1.0, 5, [0, 1, 2, 3, 4]),
    ],
)
def test_the_smallest_set_by_hand(p: float, k: int, wanted: list[int]) -> None:
    weights = torch.tensor([[[0.15625, 0.40625, 0.03125, 0.3125, 0.09375]]])
    everything, nothing = torch.ones_like(weights, dtype=torch.bool), weights < 0
    kept = smallest_set(weights, everything, nothing, p, k)
    assert kept[0, 0].nonzero().flatten().tolist() == wanted


def test_the_smallest_set_with_forced_tokens_and_padding() -> None:
    weights = torch.tensor([[[0.25, 0.5, 0.125, 0.125, 0.0]]])
    is_token = torch.tensor([[[True, True, True, True, False]]])
    forced = torch.tensor([[[False, False, False, True, False]]])
    # The forced 0.125 counts: 0.5 more reaches 0.6.
    assert smallest_set(weights, is_token, forced, 0.6, 4)[0, 0].tolist() == [0, 1, 0, 1, 0]
    assert smallest_set(weights, is_token, forced, 1.0, 5)[0, 0].tolist() == [1, 1, 1, 1, 0]
    # Of equal weights the first is kept.
    equal = torch.full((1, 1, 4), 0.25)
    some, none = equal > 0, equal < 0
    assert smallest_set(equal, some, none, 0.5, 4)[0, 0].tolist() == [1, 1, 0, 0]


def test_keeps_the_smallest_set_with_the_mass() -> None:
    """With exact candidates and keys that 4 bits represent exactly, the set is the smallest."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(0, 16, (1, 2, 60, 8), generator=generator).float()
    keys[..., 0], keys[..., 1] = 0, 15  # every token's range
    queries = 0.2 * torch.randn(1, 2, 3, 8, generator=generator)
    method = Twilight(base=ExactTopK(), base_k=2, p=0.8)
    index = method.build_index(inputs(keys, scale=0.5))
    policy = Policy(k=20, head_scope="query_head", **FREE)
    step = method.step(index, StepContext(queries, CacheView(keys, keys), policy, 0.5))
    assert step.selection is not None
    weights = (queries @ keys.mT * 0.5).softmax(-1).flatten(1, 2)[0]
    sizes = set()
    for head in range(6):
        slots = [slot for slot in step.selection.indices[0, head].tolist() if slot >= 0]
        of_base = weights[head] / weights[head].topk(40).values.sum()
        falling = of_base.sort(descending=True).values.cumsum(0)
        wanted = min(int((falling < 0.8).sum()) + 1, 20)
        assert set(slots) == set(of_base.topk(wanted).indices.tolist())
        sizes.add(len(slots))
    assert len(sizes) > 1


@pytest.mark.parametrize(("protocol", "wanted"), [("unified", 6), ("native", 18)])
def test_natively_only_the_mass_bounds_the_set(protocol: Protocol, wanted: int) -> None:
    """Flat attention: three quarters of the base's 24 tokens hold 0.75, and k is 6."""
    keys = torch.zeros(1, 1, 60, 8)
    method = Twilight(base=ExactTopK(), base_k=4, p=0.75)
    index = method.build_index(inputs(keys))
    policy = Policy(k=6, protocol=protocol, head_scope="query_head", **FREE)
    step = method.step(
        index, StepContext(torch.ones(1, 1, 2, 8), CacheView(keys, keys), policy, 1.0)
    )
    assert step.selection is not None
    assert (step.selection.indices >= 0).sum(-1).tolist() == [[wanted, wanted]]


def test_natively_the_base_has_its_own_policy() -> None:
    """Natively Quest always keeps the page being filled; the unified policy here forces nothing."""
    keys = torch.zeros(1, 1, 66, 8)
    keys[:, :, :60] = torch.randint(1, 9, (60, 8), generator=torch.Generator().manual_seed(0))
    method = Twilight(base=Quest(page_size=4, native={"num_recent": 1}), base_k=2, p=1.0)
    index = method.build_index(inputs(keys, scale=1e-3))
    newest = {}
    for protocol in ("unified", "native"):
        policy = Policy(k=8, protocol=protocol, **FREE)  # type: ignore[arg-type]
        step = method.step(
            index, StepContext(torch.ones(1, 1, 2, 8), CacheView(keys, keys), policy, 1e-3)
        )
        assert step.selection is not None
        newest[protocol] = 65 in step.selection.indices[0, 0].tolist()
    assert newest == {"unified": False, "native": True}


def test_the_mass_depends_on_the_attentions_scale_and_softcap() -> None:
    keys = torch.tensor([[0.0, 15.0], [2.0, 15.0], [4.0, 15.0], [15.0, 0.0]])[None, None]
    query = torch.tensor([[[[1.0, 0.0]]]])
    method = Twilight(base=ExactTopK(), p=0.9)
    view, policy = CacheView(keys, keys), Policy(k=3, **FREE)
    sizes = []
    for scale, softcap in ((1.0, None), (0.01, None), (1.0, 0.1)):
        index = method.build_index(inputs(keys, scale=scale, softcap=softcap))
        step = method.step(index, StepContext(query, view, policy, scale, softcap))
        assert step.selection is not None
        sizes.append((step.selection.indices >= 0).sum().item())
    assert sizes == [1, 3, 3]


def test_twilight_uses_the_bases_artifact(make_method: Callable[..., AnyMethod]) -> None:
    geometry = Geometry(num_layers=2, num_heads=6, num_kv_heads=2, head_dim=32, dtype_bytes=4)
    loki = make_method("loki")
    method = Twilight(base=Loki())
    assert method.artifact_spec(geometry) == loki.artifact_spec(geometry)
    with pytest.raises(ValueError, match="needs its artifact"):
        check_ready(method, geometry)
    method.load_artifact(loki.artifact, "digest")
    check_ready(method, geometry)
    assert method.base.artifact_digest == method.artifact_digest == "digest"
    keys = torch.randn(1, 2, 50, 32)
    view = CacheView(keys, keys)
    index = method.build_index(inputs(keys))
    step = method.step(index, StepContext(torch.randn(1, 2, 3, 32), view, Policy(k=14), 0.2))
    assert step.selection is not None
    assert {0, 1, 2, 3, *range(42, 50)} <= set(step.selection.indices[0, 0].tolist())


def test_a_base_that_learns_nothing_has_no_fit() -> None:
    with pytest.raises(ValueError, match="quest learns nothing, so it has no fit"):
        Twilight(base=Quest()).fit_layer(0, [])


def test_twilight_declares_what_the_base_declares() -> None:
    class Watching(ExactTopK):
        traits: ClassVar[Traits] = Traits(needs=frozenset({"query_tail"}), index="history")

    watching = Traits(needs=frozenset({"query_tail"}), index="history", variable_budget=True)
    assert Twilight(base=Watching()).traits == watching
    assert Twilight(base=Quest()).traits == Traits(index="running", variable_budget=True)
    # Each query head may keep its own part of what HATA selects for a KV head.
    assert Twilight(base=HATA()).traits == Traits(index="token", variable_budget=True)
    assert Twilight(base=HATA(centre_keys=True)).traits.index == "prompt"


@pytest.mark.parametrize("protocol", ["unified", "native"])
def test_every_base_is_supported_or_refused(
    name: str,
    protocol: Protocol,
    methods: dict[str, AnyMethod],
    states: Callable[..., tuple[Tensor, Tensor, Tensor]],
    build: Callable[..., Any],
) -> None:
    base = methods[name]
    refused = {
        "full": "another method that selects, got full",
        "twilight": "another method that selects, got twilight",
        "h2o": "must not update its index by attention, as h2o does",
        "spatten": "must not update its index by attention, as spatten does",
    }
    if name in refused:
        with pytest.raises(ValueError, match=refused[name]):
            Twilight(base=base)
        return
    method = Twilight(base=base, native={**FREE, "head_scope": "query_head"})
    if isinstance(base, LearningMethod):
        method.load_artifact(base.artifact)
    method, policy = method.resolve(Policy(k=20, protocol=protocol))
    queries, keys, values = states(2, 161)
    ends = torch.tensor([160, 16], dtype=torch.int32)
    index = build(method, keys[:, :, :160], values[:, :, :160], None, ends, capacity=161)
    index.grow(165)
    rows = torch.arange(2)
    newest = keys[rows, :, ends.long(), None], values[rows, :, ends.long(), None]
    method.append(index, *newest)
    view = CacheView(keys, values, None, ends + 1)
    step = method.step(index, StepContext(queries, view, policy, 0.2, previous_query=queries))
    assert step.out.isfinite().all()
    assert step.selection is not None
    scanned = step.selection.scanned
    assert scanned is not None
    sizes = step.selection.slots(view).sum(-1)
    assert sizes.shape[1] == 6 if protocol == "native" else sizes.shape[1] in (2, 6)
    # Every token of the short row is kept, without reading the index.
    assert sizes[1].tolist() == [17] * sizes.shape[1]
    assert scanned[1].tolist() == [0, 0]
    if protocol == "unified":
        assert sizes[0].max() <= 20
    assert (scanned[0] >= step.selection.tokens_read(view)[0]).all()


@pytest.mark.parametrize("base", [StreamingLLM(mode="compact"), SnapKV(mode="compact")])
def test_bases_that_free_memory_are_refused(base: AnyMethod) -> None:
    with pytest.raises(ValueError, match="base must leave all tokens in the cache"):
        Twilight(base=base)


def test_growing_the_index_grows_the_bases_too() -> None:
    keys = torch.randn(1, 2, 20, 8)
    method = Twilight(base=SnapKV(window=4))
    index = method.build_index(inputs(keys, query_tail=torch.randn(1, 6, 4, 8)))
    index.grow(24)
    assert (index.capacity, index.base.capacity) == (24, 24)
    for _ in range(4):
        method.append(index, keys[:, :, :1], keys[:, :, :1])
    assert (index.length, index.base.length) == (24, 24)


def test_undoing_an_append_undoes_it_in_the_base_too() -> None:
    keys = torch.randn(1, 2, 20, 8)
    method = Twilight(base=Quest())
    index = method.build_index(inputs(keys))
    method.append(index, keys[:, :, :1], keys[:, :, :1])
    assert (index.length, index.base.length) == (21, 21)
    index.undo_append()
    assert (index.length, index.base.length) == (20, 20)


def test_bytes_equal_the_reads_counted() -> None:
    """The base's reads, the 4-bit keys of its selection, and keys and values of the kept tokens."""
    geometry = Geometry(num_layers=1, num_heads=6, num_kv_heads=2, head_dim=32, dtype_bytes=4)
    keys = torch.randn(1, 2, 400, 32)
    method = Twilight(base=Quest(page_size=16), base_k=4)
    index = method.build_index(inputs(keys))
    pages = 2 * index.base.page_min[:, :, : index.base.num_pages].nbytes
    slots = torch.zeros(1, 2, 4 * 32, dtype=torch.long)
    per_token = index.codes[0, 0, 0].nbytes + index.ranges[0, 0, 0].nbytes
    read = pages + slots.numel() * per_token + 2 * 32 * 2 * 32 * 4
    assert method.bytes_read(geometry, 400, 32) == read
    assert method.index_bytes_per_token(geometry) == 2 * (2 * 32 * 4 / 16 + 16 + 4)


@pytest.mark.parametrize("base", [ExactTopK(), Quest(page_size=16)])
def test_bytes_include_the_candidates_of_all_query_heads(
    base: AnyMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three query heads per KV head, each with its own candidates, of which few are kept."""
    geometry = Geometry(num_layers=1, num_heads=6, num_kv_heads=2, head_dim=32, dtype_bytes=4)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 405, 32, generator=generator)
    queries = 8 * torch.randn(1, 2, 3, 32, generator=generator)
    method = Twilight(base=base, base_k=4, p=0.5)
    touched: list[set[int]] = []
    estimate = method.estimate

    def watched(context: StepContext, index: Any, slots: Tensor, is_token: Tensor) -> Tensor:
        for head in range(2):
            own = slice(3 * head, 3 * head + 3)
            touched.append(set(slots[0, own][is_token[0, own]].tolist()))
        return estimate(context, index, slots, is_token)

    monkeypatch.setattr(method, "estimate", watched)
    index = method.build_index(inputs(keys))
    view = CacheView(keys, keys)
    policy = Policy(k=16, head_scope="query_head", **FREE)
    step = method.step(index, StepContext(queries, view, policy, 32**-0.5))
    assert step.selection is not None
    assert step.selection.scanned is not None
    counts = [len(one) for one in touched]
    assert step.selection.scanned.tolist() == [counts]
    assert min(counts) > 64  # more than one query's candidates
    kept = int(step.selection.tokens_read(view).float().mean())
    assert kept < 48
    scanned = sum(counts) // 2
    small = index.codes[0, 0, 0].nbytes + index.ranges[0, 0, 0].nbytes
    side = keys.nbytes if isinstance(base, ExactTopK) else 2 * 2 * 26 * 32 * 4
    read = side + 2 * scanned * small + 2 * 2 * kept * 32 * 4
    assert method.bytes_read(geometry, 405, kept, scanned) == read


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"p": 0.0}, "p must be above 0 and at most 1, got 0.0"),
        ({"p": 1.01}, "p must be above 0 and at most 1, got 1.01"),
        ({"base_k": 0}, "base_k must be at least 1, got 0"),
        ({"base": FullAttention()}, "base must be another method that selects, got full"),
        ({"base": Twilight(base=Quest())}, "another method that selects, got twilight; give"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Twilight(**{"base": Quest(), **settings})
    odd = Geometry(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=3)
    with pytest.raises(ValueError, match="head_dim must be even for twilight, got 3"):
        check_ready(Twilight(base=Quest()), odd)
