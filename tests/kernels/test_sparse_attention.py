import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topkbench.kernels.dispatch import Impl
from topkbench.kernels.sparse_attention.api import sparse_attention


def test_written_out_step() -> None:
    query = torch.tensor([[[2.0, 0.0]]])
    keys = torch.tensor([[[[0.0, 9.0], [math.log(3.0), 0.0], [50.0, 0.0]]]])
    values = torch.tensor([[[[4.0, 0.0], [0.0, 8.0], [100.0, 100.0]]]])
    indices = torch.tensor([[[0, 1, -1]]], dtype=torch.int32)
    for impl in ("reference", "cpu"):
        # logits 0 and ln 3: weights 1/4 and 3/4
        out, lse = sparse_attention(query, keys, values, indices, 0.5, impl=impl)
        torch.testing.assert_close(out, torch.tensor([[[1.0, 6.0]]]))
        torch.testing.assert_close(lse, torch.tensor([[math.log(4.0)]]))


def test_written_out_step_with_sinks_and_wider_values(triton_device: torch.device) -> None:
    queries = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
    keys = torch.tensor([[[[0.0, 9.0], [math.log(3.0), 0.0], [50.0, 0.0]]]])
    values = torch.tensor([[[[8.0, 0.0, 0.0], [0.0, 16.0, 8.0], [100.0, 100.0, 100.0]]]])
    indices = torch.tensor([[[0, 1, -1]]], dtype=torch.int32)
    sinks = torch.tensor([math.log(4.0), math.log(2.0)])
    # first query: logits 0, ln 3 and ln 4, weights 1/8, 3/8 and 1/2 for the sink
    # second: logits 0, 0 and ln 2, weights 1/4, 1/4 and 1/2
    expected = torch.tensor([[[1.0, 6.0, 3.0], [2.0, 4.0, 2.0]]])
    where: list[tuple[Impl, torch.device]] = [("reference", queries.device)]
    where += [("cpu", queries.device), ("triton", triton_device)]
    for impl, device in where:
        given = [one.to(device) for one in (queries, keys, values, indices)]
        out, lse = sparse_attention(*given, 0.5, sinks=sinks.to(device), impl=impl)
        torch.testing.assert_close(out.cpu(), expected)
        torch.testing.assert_close(lse.cpu(), torch.tensor([[math.log(8.0), math.log(4.0)]]))


def brute_force(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: list[tuple[int, float]],
    scale: float,
    softcap: float | None,
    sink: float | None,
) -> tuple[torch.Tensor, float]:
    """Compute one head's step in float64; ``slots`` has each slot with its log weight."""
    logits = []
    for slot, weight in slots:
        logit = scale * float(query.double() @ keys[slot].double())
        if softcap is not None:
            logit = softcap * math.tanh(logit / softcap)
        logits.append(logit + weight)
    out = torch.zeros(values.shape[1], dtype=torch.float64)
    terms = logits if sink is None else [*logits, sink]
    if not terms:
        return out, -math.inf
    top = max(terms)
    total = sum(math.exp(term - top) for term in terms)
    for logit, (slot, _) in zip(logits, slots, strict=True):
        out += math.exp(logit - top) / total * values[slot].double()
    return out, top + math.log(total)


@given(
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from([1, 3, 16]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([16, 10, 20]),
    st.integers(0, 9999),
)
def test_float64_reference_equals_brute_force(
    batch: int,
    kv_heads: int,
    group: int,
    shared: bool,
    unit: int,
    extras: bool,
    sunk: bool,
    width: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    size, dim, entries = 29, 16, 5
    heads = kv_heads * group
    index_heads = kv_heads if shared else heads
    query = torch.randn(batch, heads, dim).double()
    keys = torch.randn(batch, kv_heads, size, dim).double()
    values = torch.randn(batch, kv_heads, size, width).double()
    sinks = torch.randn(heads).double() if sunk else None
    indices = torch.randint(-1, size // unit + 1, (batch, index_heads, entries)).int()
    count = torch.randint(0, entries + 1, (batch, index_heads)).int()
    weight = torch.randn(batch, heads, entries) if extras else None
    start = torch.randint(0, 10, (batch,)).int()
    end = torch.randint(5, size + 1, (batch,)).int()
    softcap = 2.0 if extras else None
    where = (count, weight, unit, start, end)
    out, lse = sparse_attention(
        query, keys, values, indices, 0.25, *where, softcap, sinks, "reference"
    )
    for b in range(batch):
        for h in range(heads):
            row = h * index_heads // heads
            slots = []
            for entry in range(int(count[b, row])):
                index = int(indices[b, row, entry])
                first = index * unit + (int(start[b]) if unit > 1 else 0)
                added = 0.0 if weight is None else float(weight[b, h, entry])
                if index >= 0:
                    slots += [
                        (slot, added)
                        for slot in range(first, first + unit)
                        if int(start[b]) <= slot < int(end[b])
                    ]
            kv_head = h // group
            states = (query[b, h], keys[b, kv_head], values[b, kv_head])
            sink = None if sinks is None else float(sinks[h])
            expected, expected_lse = brute_force(*states, slots, 0.25, softcap, sink)
            torch.testing.assert_close(out[b, h], expected, atol=1e-10, rtol=1e-7)
            assert float(lse[b, h]) == pytest.approx(expected_lse, abs=1e-6)


def test_parts_of_one_head_merge_to_the_whole() -> None:
    torch.manual_seed(0)
    query, keys, values = (
        torch.randn(1, 3, 16),
        torch.randn(1, 1, 3000, 16),
        torch.randn(1, 1, 3000, 16),
    )
    # The largest logit is in the last part, and one part is empty.
    keys[0, 0, 2990] = 5 * query[0, 0]
    indices = torch.arange(3000, dtype=torch.int32)[None, None].clone()
    indices[..., :800] = -1
    sinks = torch.tensor([-2.0, 20.0, 90.0])  # the largest logits are about 80
    given: Any = {"query_states": query, "key_states": keys, "value_states": values[..., :9]}
    given |= {"indices": indices, "scale": 1.0}
    expected = [sparse_attention(**given, sinks=one, impl="reference") for one in (None, sinks)]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            actual = [sparse_attention(**given, sinks=one, impl="cpu") for one in (None, sinks)]
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    finally:
        torch.set_num_threads(threads)


def test_nothing_selected_gives_zeros_and_minus_infinity() -> None:
    query, cache = torch.ones(2, 4, 16), torch.ones(2, 2, 9, 16)
    nothing = torch.full((2, 2, 3), -1, dtype=torch.int32)
    for impl in ("reference", "cpu"):
        out, lse = sparse_attention(query, cache, cache, nothing, 1.0, impl=impl)
        assert out.tolist() == torch.zeros(2, 4, 16).tolist()
        assert lse.tolist() == [[-math.inf] * 4] * 2


def test_nothing_selected_leaves_all_to_the_sink(triton_device: torch.device) -> None:
    for impl, device in (("reference", None), ("cpu", None), ("triton", triton_device)):
        query, cache = torch.ones(2, 4, 16, device=device), torch.ones(2, 2, 9, 16, device=device)
        nothing = torch.full((2, 2, 3), -1, dtype=torch.int32, device=device)
        sinks = torch.tensor([0.0, -3.0, 50.0, -torch.inf], device=device)
        out, lse = sparse_attention(query, cache, cache, nothing, 1.0, sinks=sinks, impl=impl)
        assert not bool(out.any())
        assert lse.tolist() == [[0.0, -3.0, 50.0, -math.inf]] * 2


def test_a_padded_row_has_the_pages_of_an_unpadded_one() -> None:
    torch.manual_seed(0)
    query, keys, values = (
        torch.randn(1, 2, 16),
        torch.randn(1, 1, 20, 16),
        torch.randn(1, 1, 20, 16),
    )
    pages = torch.tensor([[[0, 2]]], dtype=torch.int32)
    plain = sparse_attention(query, keys, values, pages, 1.0, unit_size=8)
    padded = [torch.cat([torch.full((1, 1, 5, 16), 9.0), part], dim=2) for part in (keys, values)]
    start = torch.tensor([5], dtype=torch.int32)
    for impl in ("reference", "cpu"):
        moved = sparse_attention(
            query, padded[0], padded[1], pages, 1.0, unit_size=8, kv_start=start, impl=impl
        )
        torch.testing.assert_close(moved, plain, atol=1e-6, rtol=1e-5)


def test_bad_input_is_refused() -> None:
    query, cache = torch.zeros(2, 6, 16), torch.zeros(2, 3, 9, 16)
    indices = torch.zeros(2, 3, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="Hq, a multiple of Hkv = 3, got 7"):
        sparse_attention(torch.zeros(2, 7, 16), cache, cache, indices, 1.0)
    with pytest.raises(ValueError, match="indices must have Hkv = 3 or Hq = 6 heads, got 2"):
        sparse_attention(query, cache, cache, indices[:, :2], 1.0)
    with pytest.raises(TypeError, match="indices must be int32, got int64"):
        sparse_attention(query, cache, cache, indices.long(), 1.0)
    with pytest.raises(TypeError, match="key_states must be float32, got bfloat16"):
        sparse_attention(query, cache.bfloat16(), cache, indices, 1.0)
    with pytest.raises(ValueError, match=r"count must be \[B, H\] = \[2, 3\], got \[2, 6\]"):
        sparse_attention(query, cache, cache, indices, 1.0, torch.zeros(2, 6).int())
    with pytest.raises(ValueError, match=r"log_weight must be .* = \[2, 6, 4\], got \[2, 3, 4\]"):
        sparse_attention(query, cache, cache, indices, 1.0, log_weight=torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="unit_size must be at least 1, got 0"):
        sparse_attention(query, cache, cache, indices, 1.0, unit_size=0)
    with pytest.raises(ValueError, match="softcap must be positive or None"):
        sparse_attention(query, cache, cache, indices, 1.0, softcap=-1.0)
    with pytest.raises(ValueError, match=r"value_states must be .* = \[2, 3, 9, \*\], got"):
        sparse_attention(query, cache, cache[:, :, :8], indices, 1.0)
    with pytest.raises(ValueError, match=r"sinks must be \[Hq\] = \[6\], got \[3\]"):
        sparse_attention(query, cache, cache, indices, 1.0, sinks=torch.zeros(3))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_nan_is_not_hidden(impl: str) -> None:
    draw = torch.Generator().manual_seed(0)
    query, keys = torch.randn(1, 2, 16, generator=draw), torch.randn(1, 1, 50, 16, generator=draw)
    indices = torch.arange(40, dtype=torch.int32)[None, None]
    for sign in (1.0, -1.0):
        for spoilt in (query, keys):
            kept = spoilt[0, 0, 0].clone()
            spoilt[0, 0, 0] = torch.copysign(torch.tensor(torch.nan), torch.tensor(sign))
            for sinks in (None, torch.zeros(2)):
                given = (query, keys, keys, indices, 0.25)
                out, lse = sparse_attention(*given, sinks=sinks, impl=impl)
                assert out[0, 0].isnan().all()
                assert lse[0, 0].isnan()
            spoilt[0, 0, 0] = kept
