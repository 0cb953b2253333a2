"""H2O by hand: what is kept, the sums after a step, and that evicted tokens never return."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from topkbench.methods.base import (
    CacheView,
    Geometry,
    Policy,
    PrefillInputs,
    Selection,
    StepContext,
    StepResult,
)
from topkbench.methods.captured import column_sums
from topkbench.methods.h2o import H2O, H2OIndex

FREE = {"num_sink": 0, "num_recent": 0}


def prefill(sums: Tensor, capacity: int, kv_start: Tensor | None = None) -> PrefillInputs:
    """One KV head for every two query heads, keys of zeros."""
    states = torch.zeros(len(sums), sums.shape[1] // 2, sums.shape[2], 2)
    return PrefillInputs(
        key_states=states,
        value_states=states,
        capacity=capacity,
        layer=0,
        num_layers=1,
        kv_start=kv_start,
        column_sums=sums,
    )


def step(method: H2O, index: H2OIndex, query: Tensor, keys: Tensor, policy: Policy) -> StepResult:
    """Append the newest of ``keys`` and decode."""
    method.append(index, keys[:, :, -1:], keys[:, :, -1:])
    return method.step(index, StepContext(query, CacheView(keys, keys), policy, 1.0))


def test_heavy_hitters_and_recents_are_half_each() -> None:
    # Sums over the group: 5 1 4 2 9 3 0; the newest token, slot 7, has none.
    first = torch.tensor([[5.0, 0.0, 3.0, 1.0, 4.0, 2.0, 0.0]])
    second = torch.tensor([[0.0, 1.0, 1.0, 1.0, 5.0, 1.0, 0.0]])
    method = H2O()
    index = method.build_index(prefill(torch.stack([first, second], 1), 10))
    assert index.sums[0, 0].tolist() == [5, 1, 4, 2, 9, 3, 0, 0, 0, 0]
    keys, query = torch.zeros(1, 1, 8, 2), torch.zeros(1, 1, 2, 2)
    chosen = step(method, index, query, keys, Policy(k=4, **FREE)).selection
    assert chosen is not None
    assert chosen.indices.tolist() == [[[0, 4, 6, 7]]]
    # Two queries gave each of the four tokens a quarter; the others are gone.
    gone = -math.inf
    assert index.sums[0, 0, :8].tolist() == [5.5, gone, gone, gone, 9.5, gone, 0.5, 0.5]


def test_the_probabilities_of_what_is_attended_to_are_added() -> None:
    method = H2O()
    index = method.build_index(prefill(torch.tensor([[[3.0, 2.0, 1.0], [0.0, 0.0, 0.0]]]), 5))
    # The first query sees logits 0, log 3 and 0 on slots 0, 1 and 3; the second sees zeros.
    keys = torch.tensor([[[[0.0, 0.0], [math.log(3), 0.0], [9.0, 9.0], [0.0, 0.0]]]])
    query = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    found = step(method, index, query, keys, Policy(k=3, num_sink=0, num_recent=1))
    assert found.selection is not None
    assert found.selection.indices.tolist() == [[[0, 2, 3]]]  # 2 recents, 1 heavy
    third = 1 / 3
    weights = torch.tensor([1.0, 0.0, math.exp(9.0), 1.0]) / (2 + math.exp(9.0))
    wanted = torch.tensor([3.0, 0.0, 1.0, 0.0]) + weights + third
    torch.testing.assert_close(index.sums[0, 0, [0, 2, 3]], wanted[[0, 2, 3]])
    assert index.sums[0, 0, 1] == -math.inf


def test_sums_equal_column_sums_while_everything_is_attended_to() -> None:
    """Decoding the last tokens with a budget of all tokens gives the sums of a full prefill."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 2, 12, 8, generator=generator)
    queries = torch.randn(2, 4, 12, 8, generator=generator)
    before = column_sums(queries[:, :, :9], keys[:, :, :9], 1.0)
    inputs = prefill(before, 12)
    inputs.key_states = inputs.value_states = keys[:, :, :9]
    method = H2O()
    index = method.build_index(inputs)
    for n in (10, 11, 12):
        query = queries[:, :, n - 1].unflatten(1, (2, 2))
        step(method, index, query, keys[:, :, :n], Policy(k=40))
    whole = column_sums(queries, keys, 1.0).unflatten(1, (2, 2)).sum(2)
    torch.testing.assert_close(index.sums, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("start", [None, torch.tensor([0, 11], dtype=torch.int32)])
def test_an_evicted_token_never_returns(start: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(1)
    keys = 3 * torch.randn(2, 2, 60, 8, generator=generator)
    inputs = prefill(torch.rand(2, 4, 40, generator=generator), 60, start)
    inputs.key_states = inputs.value_states = keys[:, :, :40]
    method, policy = H2O(), Policy(k=16, num_sink=1, num_recent=2)
    index = method.build_index(inputs)
    gone = torch.zeros(2, 2, 60, dtype=torch.bool)
    changed = 0
    for n in range(41, 61):
        method.append(index, keys[:, :, n - 1 : n], keys[:, :, n - 1 : n])
        query = torch.randn(2, 2, 2, 8, generator=generator)
        view = CacheView(keys[:, :, :n], keys[:, :, :n], start)
        chosen = method.step(index, StepContext(query, view, policy, 1.0)).selection
        assert chosen is not None
        slots = chosen.slots(view)
        assert (slots.sum(-1) == 16).all()
        assert not (slots & gone[..., :n]).any()
        assert slots[..., -8:].all()  # recents
        changed += int((~slots & ~gone[..., :n])[..., :-8].any())
        gone[..., :n] |= ~slots
    assert changed == 20


def test_bytes_equal_the_reads_of_the_reference() -> None:
    geometry = Geometry(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, dtype_bytes=4)
    inputs = prefill(torch.rand(1, 4, 40), 64)
    keys = torch.randn(1, 2, 41, 8)
    inputs.key_states = inputs.value_states = keys[:, :, :40]
    method = H2O()
    index = method.build_index(inputs)
    found = step(method, index, torch.randn(1, 2, 2, 8), keys, Policy(k=16)).selection
    assert isinstance(found, Selection)
    sums = index.sums[:, :, : index.length].nbytes
    kept = keys[:, :, :1].nbytes * found.indices.shape[2]
    # Keys and values to attend, and the keys once more for the probabilities.
    assert method.bytes_read(geometry, 41, 16) == sums + 2 * kept + kept
    compact = H2O(mode="compact")
    assert compact.bytes_read(geometry, 4096, 16) == (48 * 8 + 3 * kept + 2 * kept // 32)


def test_bad_settings_are_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"heavy_share must be from 0 to below 1, .* got 1.0"):
        H2O(heavy_share=1.0)
    with pytest.raises(ValueError, match="mode must be masked or compact, got 'evict'"):
        H2O(mode="evict")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["masked", "compact"])
def test_selection_per_query_head_is_refused(mode: Any, geometry: Geometry) -> None:
    method = H2O(mode=mode)
    reason = method.unsupported_reason(geometry, Policy(k=4, head_scope="query_head", **FREE))
    assert reason is not None
    assert reason.startswith("head_scope must be kv_head for h2o, which selects per KV head")
    assert method.unsupported_reason(geometry, Policy(k=4, **FREE)) is None
