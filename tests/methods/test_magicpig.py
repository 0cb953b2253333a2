"""MagicPIG: keys are sampled as often as their weights assume, and the mean output is right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from topkbench.methods.base import (
    CacheView,
    Geometry,
    Policy,
    PrefillInputs,
    Selection,
    StepContext,
)
from topkbench.methods.magicpig import MagicPIG

Score = Callable[..., Tensor]
FREE: dict[str, Any] = {"num_sink": 0, "num_recent": 0}
NATIVE = Policy(k=5, protocol="native", **FREE)


def inputs(keys: Tensor, **rows: Any) -> PrefillInputs:
    settings = {"capacity": keys.shape[2], "layer": 0, "num_layers": 1, **rows}
    return PrefillInputs(key_states=keys, value_states=keys, **settings)


def choose(method: MagicPIG, queries: Tensor, keys: Tensor, policy: Policy) -> Selection:
    index = method.build_index(inputs(keys))
    step = method.step(index, StepContext(queries, CacheView(keys, keys), policy, 1.0))
    assert step.selection is not None
    return step.selection


def pairs_at(degrees: float, count: int, head_dim: int = 16) -> tuple[Tensor, Tensor]:
    """Return a query, and unit keys at an angle to it, each followed by its negative."""
    generator = torch.Generator().manual_seed(1)
    query = normalize(torch.randn(head_dim, generator=generator), dim=0)
    beside = torch.randn(count, head_dim, generator=generator)
    beside = normalize(beside - (beside @ query)[:, None] * query, dim=1)
    angle = torch.deg2rad(torch.tensor(degrees))
    keys = angle.cos() * query + angle.sin() * beside
    return query.view(1, 1, 1, -1), torch.stack((keys, -keys), 1).flatten(0, 1)[None, None]


def test_probability_by_hand() -> None:
    # u = 1 - 60/180; 1 - (1 - p)**150 - 150 p (1 - p)**149 at p = u**10 is 0.7355.
    collision = torch.tensor([[(2 / 3) ** 10, 1.0, 0.0]])
    found = MagicPIG().probability(collision, torch.tensor([2]), torch.ones(1))
    torch.testing.assert_close(found, torch.tensor([[0.7355, 1.0, 0.0]]), atol=1e-4, rtol=0)
    # Two fair coins: 0 hits 1/4, 1 hit 1/2, 2 hits 1/4; a third of those with 1 hit are kept.
    coins = MagicPIG(num_tables=2, min_collisions=1)
    found = coins.probability(torch.tensor([[0.5]]), torch.tensor([1]), torch.tensor([1 / 3]))
    torch.testing.assert_close(found, torch.tensor([[0.25 + 0.5 / 3]]))


@pytest.mark.parametrize("degrees", [45.0, 60.0, 75.0])
def test_keys_are_sampled_as_often_as_their_weights_say(degrees: float) -> None:
    """Averaged over hyperplanes, both for the keys at the angle and for their negatives."""
    query, keys = pairs_at(degrees, 60)
    trials, included = 80, torch.zeros(120)
    for seed in range(trials):
        method = MagicPIG(seed=seed, native_local=0)
        selection = choose(method, query, keys, NATIVE)
        included[selection.indices[0, 0].long()] += 1
    for part, angle in ((included[0::2], degrees), (included[1::2], 180 - degrees)):
        collision = torch.tensor([[(1 - angle / 180) ** 10]])
        wanted = MagicPIG().probability(collision, torch.tensor([2]), torch.ones(1)).item()
        # Keys of one trial share hyperplanes, so only trials are independent.
        deviation = (wanted * (1 - wanted) / trials) ** 0.5
        assert abs(part.mean().item() / trials - wanted) < max(3 * deviation, 1e-3)


def test_the_weights_are_of_the_angle_to_the_centred_key() -> None:
    query, keys = pairs_at(60.0, 20)
    moved = keys + 5.0  # removed again by centring
    selection = choose(MagicPIG(native_local=0), query, moved, NATIVE)
    assert selection.log_weight is not None
    near = selection.indices[0, 0] % 2 == 0
    assert near.sum() > 5
    weight = -torch.log(torch.tensor(0.7355 + 1e-4)).item()
    torch.testing.assert_close(
        selection.log_weight[0, 0, near], torch.full((int(near.sum()),), weight), atol=2e-3, rtol=0
    )


@pytest.mark.parametrize("k", [None, 24])
def test_the_estimate_is_right_on_average(k: int | None) -> None:
    """The mean over hyperplanes is close to full attention, capped or not; without weights not."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 100, 8, generator=generator)
    query = normalize(torch.randn(1, 1, 1, 8, generator=generator), dim=-1)
    values = keys + 0.3 * torch.randn(1, 1, 100, 8, generator=generator)
    view = CacheView(keys, values)
    policy = NATIVE if k is None else Policy(k=k, head_scope="query_head", **FREE)
    full = ((query @ keys.mT).softmax(-1) @ values).flatten()
    weighted, plain = [], []
    for seed in range(60):
        # Large samples, as a quotient of two estimates is unbiased only for large samples.
        method = MagicPIG(hash_bits=4, num_tables=20, seed=seed, native_local=0)
        index = method.build_index(inputs(keys))
        context = StepContext(query, view, policy, 1.0)
        step = method.step(index, context)
        assert step.selection is not None
        weighted.append(step.out.flatten())
        bare = Selection(step.selection.indices)
        plain.append(method.attend(context, bare)[0].flatten())
    error = (torch.stack(weighted).mean(0) - full).norm() / full.norm()
    bias = (torch.stack(plain).mean(0) - full).norm() / full.norm()
    assert error < 0.15
    assert bias > 2 * error


def test_sinks_recents_and_decoded_tokens_are_kept_without_a_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 110, 8, generator=generator)
    method = MagicPIG(native_local=5)
    index = method.build_index(inputs(keys[:, :, :100], capacity=110))
    for slot in range(100, 110):
        method.append(index, keys[:, :, slot, None], keys[:, :, slot, None])
    view = CacheView(keys, keys)
    queries = torch.randn(1, 2, 3, 8, generator=generator)
    for policy, first in (
        # Natively the prompt's last five stay, however many tokens were decoded since.
        (Policy(k=20, num_sink=2, num_recent=3, protocol="native"), 95),
        (Policy(k=20, num_sink=2, num_recent=3), 100),
        (Policy(k=8, num_sink=2, num_recent=3), 104),  # all but the newest six are cut
    ):
        selection = method.step(index, StepContext(queries, view, policy, 1.0)).selection
        assert selection is not None
        assert selection.log_weight is not None
        for head in range(6):
            slots = selection.indices[0, head].tolist()
            weights = dict(zip(slots, selection.log_weight[0, head].tolist(), strict=True))
            assert {0, 1, *range(first, 110)} <= set(slots)
            assert not set(slots) & set(range(100, first))
            assert all(weights[slot] == 0 for slot in (0, 1, *range(first, 110)))
            assert all(weight != 0 for slot, weight in weights.items() if 2 <= slot < first)


def test_natively_the_local_tokens_are_the_prompts_last_at_every_step() -> None:
    """Four tokens of two rows of 8 and 6; decoded tokens are kept in addition."""
    keys = torch.full((2, 1, 12, 4), -4.0)
    keys[:, :, 0] = 20.0  # once centred, the others are opposite to the query and never sampled
    end = torch.tensor([8, 6], dtype=torch.int32)
    method = MagicPIG(native_local=4)
    index = method.build_index(inputs(keys[:, :, :8], kv_len=end, capacity=12))
    query = torch.ones(2, 1, 1, 4)
    policy = Policy(k=2, num_sink=1, num_recent=0, protocol="native")
    steps = []
    for step in range(1, 4):
        method.append(index, keys[:, :, 8:9], keys[:, :, 8:9])
        view = CacheView(keys[:, :, : 8 + step], keys[:, :, : 8 + step], kv_len=end + step)
        selection = method.step(index, StepContext(query, view, policy, 1.0)).selection
        assert selection is not None
        steps.append([[s for s in row if s >= 0] for row in selection.indices[:, 0].tolist()])
    assert steps == [
        [[0, 4, 5, 6, 7, 8], [0, 2, 3, 4, 5, 6]],
        [[0, 4, 5, 6, 7, 8, 9], [0, 2, 3, 4, 5, 6, 7]],
        [[0, 4, 5, 6, 7, 8, 9, 10], [0, 2, 3, 4, 5, 6, 7, 8]],
    ]


def test_a_budget_keeps_the_most_collisions_and_draws_among_ties() -> None:
    """32 equal keys collide equally often; 10 are drawn, and weighted by the share 10 / 32."""
    query = torch.ones(1, 1, 1, 4)
    keys = torch.ones(1, 1, 40, 4)
    keys[:, :, 32:] = -4.0  # opposite, once centred: they never collide
    method = MagicPIG()
    selection = choose(method, query, keys, Policy(k=10, **FREE))
    assert selection.indices.shape == (1, 1, 10)
    assert (selection.indices < 32).all()
    assert selection.log_weight is not None
    wanted = torch.full((1, 1, 10), -torch.log(torch.tensor(10 / 32 + 1e-4)).item())
    torch.testing.assert_close(selection.log_weight, wanted, atol=1e-3, rtol=1e-3)
    # Another length gives another draw.
    longer = choose(method, query, keys[:, :, :39], Policy(k=10, **FREE))
    assert not torch.equal(longer.indices, selection.indices)


def test_a_group_shares_its_budget() -> None:
    keys = torch.ones(1, 1, 40, 4)
    keys[:, :, 32:] = -4.0
    selection = choose(MagicPIG(), torch.ones(1, 1, 3, 4), keys, Policy(k=10, **FREE))
    assert (selection.indices >= 0).sum(-1).tolist() == [[3, 3, 3]]
    own = Policy(k=10, head_scope="query_head", **FREE)
    selection = choose(MagicPIG(), torch.ones(1, 1, 3, 4), keys, own)
    assert (selection.indices >= 0).sum(-1).tolist() == [[10, 10, 10]]


def test_the_tables_count_the_codes_that_agree(score: Score) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3, 2, 50, 8, generator=generator)
    queries = torch.randn(3, 2, 3, 8, generator=generator)
    start = torch.tensor([0, 7, 20], dtype=torch.int32)
    end = torch.tensor([50, 44, 50], dtype=torch.int32)
    method = MagicPIG(hash_bits=3, num_tables=20)
    index = method.build_index(inputs(keys, kv_start=start, kv_len=end))
    found = score(method, index, queries, keys)
    for row in range(3):
        own = slice(int(start[row]), int(end[row]))
        centred = keys[row, :, own] - keys[row, :, own].mean(1, keepdim=True)
        codes = method.codes(centred, index.planes)
        agree = method.codes(queries[row], index.planes)[:, :, None] == codes[:, None]
        wanted = torch.zeros(2, 3, 50)
        wanted[..., own] = agree.sum(-1).float()
        assert torch.equal(found[row], wanted)


def test_bytes_equal_the_reads_counted() -> None:
    """Isotropic keys collide on average as at right angles, keys near the query more often."""
    geometry = Geometry(num_layers=1, num_heads=6, num_kv_heads=2, head_dim=256, dtype_bytes=4)
    generator = torch.Generator().manual_seed(0)
    isotropic = torch.randn(1, 2, 3000, 256, generator=generator)
    queries = torch.randn(1, 2, 3, 256, generator=generator)
    near = isotropic.clone()
    near[:, :, :500] += queries[:, :, :1]
    method = MagicPIG(hash_bits=6, num_tables=60)
    ends, planes = 2 * 4 * 6 * 60, 256 * 60 * 6 * 4
    chosen = 3 * 40 * 2 * 256 * 4  # keys for the angles, then keys and values
    analytic = method.bytes_read(geometry, 3000, 40) - ends - planes - chosen
    for keys, least, most in ((isotropic, 0.9, 1.1), (near, 1.2, 3.0)):
        index = method.build_index(inputs(keys))
        context = StepContext(queries, CacheView(keys, keys), Policy(k=40), 1.0)
        encoded = method.encode(index, context)
        slots, query = method.walk(encoded, index)
        selection = choose(method, queries, keys, Policy(k=40))
        assert selection.scanned is not None
        walked = [int((query // 3 == head).sum()) for head in range(2)]
        assert selection.scanned.tolist() == [walked]
        assert encoded.numel() == 6 * 60  # a query's buckets, of two ends each
        read = planes + ends + 4 * len(slots) + chosen
        assert abs(method.bytes_read(geometry, 3000, 40, sum(walked) // 2) - read) <= 8
        assert least < 4 * len(slots) / analytic < most


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"hash_bits": 0}, "hash_bits must be at least 1, got 0"),
        ({"hash_bits": 15}, "hash_bits must be at most 14, got 15"),
        ({"num_tables": 3, "min_collisions": 4}, "at most num_tables=3, got 4"),
        ({"native_local": -1}, "native_local must be at least 0, got -1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MagicPIG(**settings)
