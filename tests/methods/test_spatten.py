"""SpAtten: importance over layers and steps, and nested cascade pruning."""

from typing import Any

import pytest
import torch
from torch import Tensor

from topkbench.methods import spatten
from topkbench.methods.base import (
    CacheView,
    Geometry,
    Policy,
    PrefillInputs,
    StepContext,
    StepResult,
)
from topkbench.methods.four_bits import dequantise, quantise
from topkbench.methods.learning import check_ready
from topkbench.methods.spatten import SpAtten, SpAttenIndex

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
    return [
        method.step(one, StepContext(queries, CacheView(keys, keys), policy, 1.0))
        for one in indices
    ]


def test_importance_by_hand() -> None:
    # The column sums of two heads are added, then the step's probabilities of all heads.
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])[None, None]
    sums = torch.tensor([[[2.0, 0.5, 0.0], [1.0, 0.25, 0.125]]])
    method = SpAtten()
    (index,) = stack(method, keys, sums, 1, 3)
    assert index.importance.tolist() == [[[3.0, 0.75, 0.125]]]
    queries = torch.tensor([[[[0.0, 0.0], [0.0, torch.tensor(3.0).log()]]]])
    method.step(index, StepContext(queries, CacheView(keys, keys), Policy(k=2, **FREE), 1.0))
    # Tokens 0 and 1 get 1/2 each, then 1/4 and 3/4; token 2 was dropped.
    torch.testing.assert_close(index.importance, torch.tensor([[[3.75, 2.0, 0.125]]]))
    assert index.pruned.tolist() == [[[False, False, True]]]


def test_later_layers_add_to_the_importance() -> None:
    sums = torch.tensor([[[1.0, 2.0, 4.0]]])
    indices = stack(SpAtten(), torch.zeros(1, 1, 3, 2), sums, 3, 4)
    assert indices[0].importance is indices[2].importance
    assert indices[0].importance.tolist() == [[[3.0, 6.0, 12.0, 0.0]]]


@pytest.mark.parametrize("last_keep", [0.4, 1.0])
def test_kept_sets_are_nested_over_layers_and_dropped_tokens_never_return(last_keep: float) -> None:
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


def test_heads_are_pruned_by_their_outputs_and_stay_pruned() -> None:
    """Of six heads the last layer keeps half, once their outputs are known."""
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


def test_flat_heads_attend_with_full_precision_keys() -> None:
    """A head with one dominant token uses 4-bit keys, a head without the keys themselves."""
    few = [[7.0, 0.4, 3.3, 0.0], [0.4, 7.0, 0.0, 3.3], [-7.0, -3.4, 0.0, 0.0]]
    keys = torch.tensor(few)[None, None]
    queries = torch.tensor([[[[0.5, 0.1, 0.1, 0.0], [0.01, 0.02, 0.0, 0.0]]]])
    view, policy = CacheView(keys, keys), Policy(k=2, **FREE)
    sums = torch.tensor([[[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]])
    found = {}
    for threshold in (None, 0.9):
        method = SpAtten(requantise_below=threshold)
        (index,) = stack(method, keys, sums, 1, 3)
        found[threshold] = method.step(index, StepContext(queries, view, policy, 1.0)).out[0]
    coarse = (queries @ dequantise(*quantise(keys[:, :, :2])).mT).softmax(-1) @ keys[:, :, :2]
    torch.testing.assert_close(found[0.9][0], coarse[0, 0, 0])
    assert not torch.equal(found[0.9][0], found[None][0])
    assert torch.equal(found[0.9][1], found[None][1])


def test_bytes_by_hand(geometry: Geometry) -> None:
    # 4 bytes of importance and a flag per token; keys, values, and keys again of 32 tokens.
    read = 1000 * 5 + 3 * 32 * 2 * 32 * 4
    assert SpAtten().bytes_read(geometry, 1000, 32) == read


def test_bytes_equal_the_reads_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one of two KV heads has a query head below the threshold, and fetches its keys."""
    geometry = Geometry(num_layers=1, num_heads=6, num_kv_heads=2, head_dim=32, dtype_bytes=4)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 60, 32, generator=generator)
    queries = keys[:, :, 7, None] * torch.tensor([4.0, 4.0, 4.0])[:, None]
    queries[0, 1, 2] = 0.0  # uniform over tokens
    method = SpAtten(requantise_below=0.5)
    sums = torch.rand(1, 6, 60, generator=generator)
    sums[:, :, 7] = 2.0
    (index,) = stack(method, keys, sums, 1, 60)
    values = torch.randn(keys.shape, generator=generator)
    touched: list[tuple[Tensor, int, list[int]]] = []
    gather = spatten.at_slots

    def counted(states: Tensor, slots: Tensor) -> Tensor:
        counts = [len(set(head)) for head in slots[0].tolist()]
        touched.append((states, states[0, 0, 0].nbytes, counts))
        return gather(states, slots)

    monkeypatch.setattr(spatten, "at_slots", counted)
    method.step(index, StepContext(queries, CacheView(keys, values), Policy(k=16, **FREE), 1.0))
    # A head that fetches nothing reads one key instead.
    assert [counts for states, _, counts in touched if states is keys] == [[1, 16]]
    assert [id(states) for states, _, _ in touched] == [
        id(one) for one in (index.codes, index.ranges, keys, values)
    ]
    read = sum(size * sum(counts) for _, size, counts in touched) - 32 * 4
    read += 60 * (4 + 1)  # importance and flags
    assert index.codes is not None
    assert index.ranges is not None
    found = method.step(
        index, StepContext(queries, CacheView(keys, values), Policy(k=16, **FREE), 1.0)
    )
    assert found.selection is not None
    assert found.selection.scanned is not None
    assert found.selection.scanned.tolist() == [[0, 16]]
    # A KV head fetches eight tokens on average.
    assert method.bytes_read(geometry, 60, 16, 8) == read
    assert method.bytes_read(geometry, 60, 16, 8) == 300 + 2 * 16 * (128 + 20) + 2 * 8 * 128
    assert method.bytes_read(geometry, 60, 16) == read + 2 * 8 * 128
    per_token = index.codes[0, :, 0].nbytes + index.ranges[0, :, 0].nbytes
    assert method.index_bytes_per_token(geometry) == 4 + 1 + per_token


def test_appended_4_bit_keys_equal_rebuilt_ones() -> None:
    keys = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    method = SpAtten(requantise_below=0.5)
    (whole,) = stack(method, keys, torch.rand(1, 4, 9), 1, 12)
    (grown,) = stack(method, keys[:, :, :8], torch.rand(1, 4, 8), 1, 8)
    grown.grow(12)
    method.append(grown, keys[:, :, 8:], keys[:, :, 8:])
    assert whole.codes is not None
    assert grown.codes is not None
    assert whole.ranges is not None
    assert grown.ranges is not None
    assert torch.equal(whole.codes, grown.codes)
    assert torch.equal(whole.ranges, grown.ranges)


def test_importance_adds_the_probabilities_used_in_attention() -> None:
    """Each head's softmax with 4-bit keys sums to 1, so a step adds the number of heads."""
    keys = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    method = SpAtten(requantise_below=1e-6)
    (index,) = stack(method, keys, torch.rand(1, 6, 40), 1, 40)
    before = index.importance.clone()
    queries = 3 * torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(1))
    method.step(index, StepContext(queries, CacheView(keys, keys), Policy(k=10, **FREE), 1.0))
    assert (index.importance - before).sum().item() == pytest.approx(6.0, abs=1e-4)


def test_a_row_with_all_tokens_selected_equals_full_attention() -> None:
    """A row of nine tokens, all of them kept, next to a longer row uses full-precision keys."""
    keys = torch.randn(2, 1, 30, 8, generator=torch.Generator().manual_seed(0))
    queries = 2 * torch.randn(2, 1, 2, 8, generator=torch.Generator().manual_seed(1))
    start = torch.tensor([0, 21], dtype=torch.int32)
    method = SpAtten(requantise_below=1e-6)
    index = method.build_index(
        PrefillInputs(
            key_states=keys,
            value_states=keys,
            capacity=30,
            layer=0,
            num_layers=1,
            kv_start=start,
            column_sums=torch.rand(2, 2, 30),
        )
    )
    view = CacheView(keys, keys, start)
    found = method.step(index, StepContext(queries, view, Policy(k=12, **FREE), 1.0))
    own = keys[1, 0, 21:]
    torch.testing.assert_close(found.out[1], (queries[1, 0] @ own.mT).softmax(-1) @ own)
    assert found.selection is not None
    assert found.selection.scanned is not None
    assert found.selection.scanned.tolist() == [[0], [9]]


def test_layers_on_several_devices_are_refused() -> None:
    shared: dict[str, Any] = {}
    for device in ("cpu", "meta"):
        keys = torch.zeros(1, 1, 5, 8, device=device)
        prefill = PrefillInputs(
            key_states=keys,
            value_states=keys,
            capacity=5,
            layer=0,
            num_layers=2,
            column_sums=torch.zeros(1, 2, 5, device=device),
            shared=shared,
        )
        if device == "cpu":
            SpAtten().build_index(prefill)
    with pytest.raises(ValueError, match=r"must be on one device, .* got cpu and meta"):
        SpAtten().build_index(prefill)


def test_an_odd_head_dim_with_4_bit_keys_is_refused() -> None:
    geometry = Geometry(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=15)
    assert SpAtten().unsupported_reason(geometry) is None
    with pytest.raises(ValueError, match="head_dim must be even for spatten's 4-bit keys, got 15"):
        check_ready(SpAtten(requantise_below=0.5), geometry)


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
