"""What is particular to SpAtten: importance over layers and steps, and a cascade that is nested."""

from typing import Any

import pytest
import torch
from torch import Tensor

from topkbench.methods.base import CacheView, Geometry, Policy, PrefillInputs, StepResult
from topkbench.methods.spatten import SpAtten, SpAttenIndex, in_four_bits

FREE: dict[str, Any] = {"num_sink": 0, "num_recent": 0}


def stack(
    method: SpAtten, keys: Tensor, sums: Tensor, layers: int, capacity: int
) -> list[SpAttenIndex]:
    """Build the indices of one cache's layers, which share a dict."""
    shared: dict[str, Any] = {}
    return [
        method.build_index(
            PrefillInputs(
                key_states=keys,
                value_states=keys,
                capacity=capacity,
                layer=layer,
                num_layers=layers,
                column_sums=sums,
                shared=shared,
            )
        )
        for layer in range(layers)
    ]


def run(
    method: SpAtten, indices: list[SpAttenIndex], queries: Tensor, keys: Tensor, policy: Policy
) -> list[StepResult]:
    return [method.step(queries, one, CacheView(keys, keys), policy, 1.0) for one in indices]


def test_importance_by_hand() -> None:
    # Column sums of two heads add up; then a step's probabilities are added, those of all heads.
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])[None, None]
    sums = torch.tensor([[[2.0, 0.5, 0.0], [1.0, 0.25, 0.125]]])
    method = SpAtten()
    (index,) = stack(method, keys, sums, 1, 3)
    assert index.importance.tolist() == [[[3.0, 0.75, 0.125]]]
    queries = torch.tensor([[[[0.0, 0.0], [0.0, torch.tensor(3.0).log()]]]])
    method.step(queries, index, CacheView(keys, keys), Policy(k=2, **FREE), 1.0)
    # Of tokens 0 and 1: a half each, then a quarter and three of them; token 2 was dropped.
    torch.testing.assert_close(index.importance, torch.tensor([[[3.75, 2.0, 0.125]]]))
    assert index.pruned.tolist() == [[[False, False, True]]]


def test_later_layers_add_to_the_importance() -> None:
    sums = torch.tensor([[[1.0, 2.0, 4.0]]])
    indices = stack(SpAtten(), torch.zeros(1, 1, 3, 2), sums, 3, 4)
    assert indices[0].importance is indices[2].importance
    assert indices[0].importance.tolist() == [[[3.0, 6.0, 12.0, 0.0]]]


@pytest.mark.parametrize("last_keep", [0.4, 1.0])
def test_kept_sets_are_nested_over_layers_and_nothing_comes_back(last_keep: float) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 2, 70, 8, generator=generator)
    sums = torch.rand(2, 6, 60, generator=generator)
    method = SpAtten(last_keep=last_keep)
    indices = stack(method, keys[:, :, :60], sums, 4, 70)
    policy = Policy(k=20, num_sink=2, num_recent=3)
    dropped: list[set[int]] = [set() for _ in range(4)]
    for n in range(61, 70):
        queries = torch.randn(2, 2, 3, 8, generator=generator)
        for index in indices:
            method.append(index, keys[:, :, :1], keys[:, :, :1])
        above = set(range(n))
        for layer, result in enumerate(run(method, indices, queries, keys[:, :, :n], policy)):
            assert result.selection is not None
            heads = result.selection.indices[0]
            assert torch.equal(heads[0], heads[1])
            kept = {slot for slot in heads[0].tolist() if slot >= 0}
            size = round(20 * (1 - layer / 3 * (1 - last_keep)))
            assert len(kept) == size
            assert kept <= above
            assert not kept & dropped[layer]
            assert {0, 1, n - 3, n - 2, n - 1} <= kept
            dropped[layer] |= set(range(n)) - kept
            above = kept


def test_heads_are_pruned_by_what_they_gave_and_stay_pruned() -> None:
    """Six heads; the last layer keeps half of them, once their outputs are known."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 30, 8, generator=generator)
    method = SpAtten(last_heads=0.5)
    indices = stack(method, keys, torch.rand(1, 6, 30, generator=generator), 3, 30)
    policy = Policy(k=10, **FREE)
    queries = torch.randn(1, 2, 3, 8, generator=generator)
    alive: list[set[int]] = [set(range(6)) for _ in range(3)]
    for step in range(3):
        before = indices[0].cascade.head_importance[0].clone()
        above = set(range(6))
        for layer, result in enumerate(run(method, indices, queries, keys, policy)):
            assert result.selection is not None
            weight = result.selection.head_weight
            kept = set(range(6)) if weight is None else set(weight[0].nonzero()[:, 0].tolist())
            assert kept <= above & alive[layer]
            zeros = (result.out[0] == 0).all(-1).nonzero()[:, 0].tolist()
            assert set(zeros) == set(range(6)) - kept
            alive[layer] = above = kept
        if step:
            assert before.min() > 0
            assert [len(kept) for kept in alive] == [6, 4, 3]


def test_four_bits_by_hand() -> None:
    keys = torch.tensor([[7.0, -7.0, 3.4, 0.6], [0.0, 0.0, 0.0, 0.0], [-1.4, 0.31, 0.1, 0.0]])
    wanted = torch.tensor([[7.0, -7.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0], [-1.4, 0.4, 0.0, 0.0]])
    torch.testing.assert_close(in_four_bits(keys), wanted)


def test_flat_heads_are_attended_to_with_whole_keys() -> None:
    """A head that is sure of a token takes 4 bits, one that is not takes the keys themselves."""
    keys = torch.tensor([[7.0, 0.4], [0.4, 7.0], [-7.0, -3.4]])[None, None]
    queries = torch.tensor([[[[2.0, 0.0], [0.01, 0.02]]]])
    view, policy = CacheView(keys, keys), Policy(k=2, **FREE)
    sums = torch.tensor([[[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]])
    found = {}
    for threshold in (None, 0.9):
        method = SpAtten(requantise_below=threshold)
        (index,) = stack(method, keys, sums, 1, 3)
        found[threshold] = method.step(queries, index, view, policy, 1.0).out[0]
    coarse = (queries @ in_four_bits(keys[:, :, :2]).mT).softmax(-1) @ keys[:, :, :2]
    torch.testing.assert_close(found[0.9][0], coarse[0, 0, 0])
    assert not torch.equal(found[0.9][0], found[None][0])
    assert torch.equal(found[0.9][1], found[None][1])


def test_bytes_by_hand(geometry: Geometry) -> None:
    # 4 bytes of importance and a mark a token; keys, values, and keys again of 32 tokens.
    read = 1000 * 5 + 3 * 32 * 2 * 32 * 4
    assert SpAtten().bytes_read_per_step(geometry, 1000, 32) == read


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"last_keep": 0.0}, "last_keep must be above 0 and at most 1, got 0.0"),
        ({"last_heads": 1.5}, "last_heads must be above 0 and at most 1, got 1.5"),
        ({"requantise_below": 0.0}, "requantise_below must be above 0 and at most 1, or None"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SpAtten(**settings)


def test_column_sums_are_needed() -> None:
    with pytest.raises(ValueError, match="needs the prompt's column sums, got none"):
        stack(SpAtten(), torch.zeros(1, 1, 3, 2), None, 1, 3)  # type: ignore[arg-type]
