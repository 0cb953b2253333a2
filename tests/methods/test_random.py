"""Random selection: it is uniform, and depends on position and length only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from topkbench.methods.base import CacheView, Geometry, Policy, PrefillInputs, StepContext
from topkbench.methods.draws import draw
from topkbench.methods.random import RandomSelection

FREE = {"num_sink": 0, "num_recent": 0}
Build = Callable[..., Any]


def test_draws_are_splitmix64() -> None:
    """The generator's first outputs for the state 1234567, from its authors' C code."""
    state = 1234567
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    found = draw(state, torch.arange(4)).tolist()
    assert [number % 2**64 for number in found] == expected


def selected(keys: Tensor, policy: Policy, layer: int = 0, seed: int = 0, **rows: Tensor) -> Tensor:
    method = RandomSelection(seed=seed)
    prefill = PrefillInputs(
        key_states=keys,
        value_states=keys,
        capacity=keys.shape[2],
        layer=layer,
        num_layers=2,
        **rows,
    )
    index = method.build_index(prefill)
    queries = torch.zeros(len(keys), keys.shape[1], 3, keys.shape[3])
    view = CacheView(keys, keys, rows.get("kv_start"), rows.get("kv_len"))
    step = method.step(index, StepContext(queries, view, policy, 1.0, layer=layer))
    assert step.selection is not None
    return step.selection.indices


def test_every_token_is_drawn_equally_often() -> None:
    # 4,000 heads draw 5 of 20 each: a token is in 1,000 of them, with a deviation of 27.
    counts = selected(torch.zeros(1, 4000, 20, 1), Policy(k=5, **FREE)).flatten().bincount()
    assert counts.sum() == 20_000
    assert (counts - 1000).abs().max() < 4 * 27.4
    # Pairs are uniform too: 4 / 19 of the heads that drew a token also drew a given other one.
    both = selected(torch.zeros(1, 4000, 20, 1), Policy(k=5, **FREE))[0]
    chosen = torch.zeros(4000, 20).scatter_(1, both.long(), 1.0)
    pairs = (chosen.mT @ chosen)[~torch.eye(20, dtype=torch.bool)]
    assert (pairs - 4000 * 5 / 20 * 4 / 19).abs().max() < 5 * 14.2


def test_a_draw_differs_by_seed_layer_head_and_length() -> None:
    policy = Policy(k=10, **FREE)
    keys = torch.zeros(1, 2, 200, 1)
    first = selected(keys, policy)
    assert not torch.equal(first[:, 0], first[:, 1])
    assert torch.equal(first, selected(keys, policy))
    assert not torch.equal(first, selected(keys, policy, seed=1))
    assert not torch.equal(first, selected(keys, policy, layer=1))
    assert not torch.equal(first, selected(keys[:, :, :199], policy))


def test_a_draw_depends_on_positions_and_not_on_torchs_generator() -> None:
    policy = Policy(k=12)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    alone = selected(torch.zeros(1, 2, 40, 1), policy)
    start = torch.tensor([60, 0], dtype=torch.int32)
    padded = selected(torch.zeros(2, 2, 100, 1), policy, kv_start=start)
    assert torch.equal(padded[:1] - 60, alone)
    assert torch.equal(torch.get_rng_state(), before)
    assert {0, 1, 2, 3, *range(32, 40)} <= set(alone[0, 0].tolist())


def test_each_query_head_draws_independently() -> None:
    policy = Policy(k=10, head_scope="query_head", **FREE)
    heads = selected(torch.zeros(1, 2, 200, 1), policy)
    assert heads.shape == (1, 6, 10)
    assert len({tuple(head) for head in heads[0].tolist()}) == 6


def test_bytes_by_hand(geometry: Geometry) -> None:
    # 2 KV heads of 32 channels in 4 bytes, keys and values, of 16 tokens.
    assert RandomSelection().bytes_read(geometry, 1000, 16) == 16 * 2 * 32 * 4 * 2
    assert RandomSelection().index_bytes_per_token(geometry) == 0
