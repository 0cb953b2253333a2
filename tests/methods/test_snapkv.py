"""SnapKV by hand: votes, pooling, and what counts against the budget."""

import math
from typing import Any

import pytest
import torch

from topkbench.methods.base import CacheView, Geometry, Policy, PrefillInputs, StepContext
from topkbench.methods.snapkv import SnapKV, SnapKVIndex

FREE: dict[str, Any] = {"num_sink": 0, "num_recent": 0}
LOG = math.log(10.0)


def prompt(peaks: dict[int, float], n: int = 20, group: int = 1, **more: Any) -> PrefillInputs:
    """Return a prompt with two last queries along channel 0, and keys with peaks along it."""
    keys = torch.zeros(1, 1, n, 1)
    for slot, weight in peaks.items():
        keys[0, 0, slot] = math.log(weight)
    tail = torch.ones(1, group, 2, 1)
    return PrefillInputs(
        key_states=keys,
        value_states=keys,
        capacity=n + 12,
        layer=0,
        num_layers=1,
        query_tail=tail,
        **more,
    )


def chosen(
    method: SnapKV, index: SnapKVIndex, policy: Policy, steps: int = 0, heads: int = 1
) -> Any:
    """Append some tokens; return what the last step selects."""
    token = torch.zeros(1, 1, 1, 1)
    for _ in range(steps):
        method.append(index, token, token)
    states = torch.zeros(1, 1, index.length, 1)
    query = torch.zeros(1, 1, heads, 1)
    found = method.step(index, StepContext(query, CacheView(states, states), policy, 1.0)).selection
    assert found is not None
    return found.indices.tolist()[0]


def test_votes_by_hand() -> None:
    """The first query of the window does not see the last token."""
    method = SnapKV(window=2, kernel=1)
    index = method.build_index(prompt({1: 5.0, 3: 2.0}, n=6))
    assert index.importance is not None
    first, second = 5 + 2 + 3, 5 + 2 + 4  # sums of exponentials over 5 and 6 tokens
    once = 1 / first + 1 / second
    wanted = torch.tensor([once, 5 * once, once, 2 * once, 0.0, 0.0])
    torch.testing.assert_close(index.importance[0, 0, :6], wanted)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_votes_use_the_layers_scale_and_softcap(softcap: float | None) -> None:
    """A scale of 2 squares the weight; a cap c replaces a logit x by ``c tanh(x / c)``."""
    method = SnapKV(window=2, kernel=1)
    index = method.build_index(prompt({1: 5.0}, n=6, scale=2.0, softcap=softcap))
    assert index.importance is not None
    peak = 25.0 if softcap is None else math.exp(3 * math.tanh(2 * math.log(5.0) / 3))
    once = 1 / (peak + 4) + 1 / (peak + 5)
    wanted = torch.tensor([once, peak * once, once, once, 0.0, 0.0])
    torch.testing.assert_close(index.importance[0, 0, :6], wanted)


@pytest.mark.parametrize(
    ("pooling", "wanted"), [("max", [0, 6, 6, 6, 1, 3]), ("avg", [0, 2, 2, 2, 1, 1])]
)
def test_pooling_by_hand(pooling: Any, wanted: list[int]) -> None:
    tall, small = 6e4, 3e4
    method = SnapKV(window=2, kernel=3, pooling=pooling)
    index = method.build_index(prompt({2: tall, 6: small}, n=10))
    assert index.importance is not None
    found = index.importance[0, 0, :6] / index.importance[0, 0, 2] * wanted[2]
    found[4] = found[4] if pooling == "avg" else 1.0
    expected = torch.tensor([float(x) for x in wanted])
    if pooling == "avg":
        expected[4] = 0.0
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_keeps_exactly_k_of_the_prompt_with_its_window() -> None:
    method = SnapKV(window=2, kernel=1)
    index = method.build_index(prompt({3: 50.0, 7: 40.0, 11: 30.0, 15: 20.0}))
    assert chosen(method, index, Policy(k=5, **FREE)) == [[3, 7, 11, 18, 19]]
    index = method.build_index(prompt({3: 50.0, 7: 40.0, 11: 30.0, 15: 20.0}))
    assert chosen(method, index, Policy(k=5, num_sink=1, num_recent=3)) == [[0, 3, 17, 18, 19]]
    index = method.build_index(prompt({}))
    assert chosen(method, index, Policy(k=2, **FREE)) == [[18, 19]]
    index = method.build_index(prompt({}))
    assert chosen(method, index, Policy(k=1, **FREE)) == [[19]]


def test_generated_tokens_replace_the_least_important() -> None:
    peaks = {3: 50.0, 7: 40.0, 11: 30.0, 15: 20.0}
    method, policy = SnapKV(window=2, kernel=1), Policy(k=6, num_sink=1, num_recent=1)
    index = method.build_index(prompt(peaks))
    steps = [chosen(method, index, policy, 1)[0] for _ in range(7)]
    assert steps == [
        [0, 3, 7, 18, 19, 20],
        [0, 3, 18, 19, 20, 21],
        [0, 18, 19, 20, 21, 22],
        [0, 19, 20, 21, 22, 23],
        [0, 20, 21, 22, 23, 24],
        [0, 21, 22, 23, 24, 25],
        [0, 22, 23, 24, 25, 26],
    ]


def test_natively_generated_tokens_are_kept_in_addition() -> None:
    peaks = {3: 50.0, 7: 40.0, 11: 30.0, 15: 20.0}
    method, policy = SnapKV(window=2, kernel=1), Policy(k=4, protocol="native", **FREE)
    index = method.build_index(prompt(peaks))
    steps = [chosen(method, index, policy, 1)[0] for _ in range(3)]
    assert steps == [[3, 7, 18, 19, *range(20, 20 + t)] for t in (1, 2, 3)]


def test_a_short_prompt_is_kept_whole() -> None:
    method = SnapKV(window=2, kernel=1)
    index = method.build_index(prompt({}, n=5))
    native = Policy(k=6, protocol="native", **FREE)
    assert chosen(method, index, native, 3) == [list(range(8))]
    assert chosen(method, index, native, 4) == [list(range(12))]


def test_one_selection_per_query_head_or_per_group() -> None:
    """Each query of the group uses its own channel."""
    keys = torch.zeros(1, 1, 9, 2)
    keys[0, 0, 2] = torch.tensor([3 * LOG, 0.0])
    keys[0, 0, 4] = torch.tensor([0.0, 2.99 * LOG])  # a little less, so that nothing ties
    keys[0, 0, 6] = torch.tensor([2.8 * LOG, 2.8 * LOG])
    tail = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2) * 2**0.5
    inputs = PrefillInputs(
        key_states=keys,
        value_states=keys,
        capacity=9,
        layer=0,
        num_layers=1,
        query_tail=tail,
    )
    method, query, view = SnapKV(window=1, kernel=1), torch.zeros(1, 1, 2, 2), CacheView(keys, keys)

    def pick(**more: Any) -> Any:
        policy = Policy(k=2, **FREE, **more)
        found = method.step(
            method.build_index(inputs), StepContext(query, view, policy, 1.0)
        ).selection
        assert found is not None
        return found.indices.tolist()[0]

    assert pick(head_scope="query_head") == [[2, 8], [4, 8]]
    assert pick() == [[6, 8]]  # 0.39 twice, against 0.61 once
    assert pick(aggregation="max_softmax") == [[2, 8]]


def test_index_and_bytes() -> None:
    geometry = Geometry(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, dtype_bytes=4)
    assert SnapKV().index_bytes_per_token(geometry) == 16
    assert SnapKV().bytes_read(geometry, 100, 30) == 30 * 2 * 2 * 8 * 4
    moved = 32 * 2 * 2 * 8 * 4 // 32  # once in 32 steps
    compact = SnapKV(mode="compact").bytes_read(geometry, 100, 32)
    assert compact == 32 * 2 * 2 * 8 * 4 + moved
    # After the first step the importance has been freed.
    method = SnapKV(window=2)
    index = method.build_index(prompt({}))
    chosen(method, index, Policy(k=5, **FREE))
    assert index.importance is None
    assert index.ranked is not None
    assert index.ranked.shape == (1, 1, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 65}, "window must be at most 64, the queries that are captured .* got 65"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"kernel": 4}, "kernel must be odd, got 4"),
        ({"pooling": "sum"}, "pooling must be avg or max, got 'sum'"),
    ],
)
def test_bad_settings_are_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SnapKV(**settings)


def test_compact_needs_one_selection_per_kv_head(geometry: Geometry) -> None:
    policy = Policy(k=5, head_scope="query_head", **FREE)
    message = SnapKV(mode="compact").unsupported_reason(geometry, policy)
    assert message is not None
    assert message.startswith("head_scope must be kv_head for snapkv with mode=compact")
    assert SnapKV(mode="compact").unsupported_reason(geometry, Policy(k=5, **FREE)) is None
    assert SnapKV().unsupported_reason(geometry, policy) is None
