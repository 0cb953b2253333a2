import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


def brute_force(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: list[tuple[int, float]],
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, float]:
    """Compute one head's step in float64; ``slots`` has each slot with its log weight."""
    logits = []
    for slot, weight in slots:
        logit = scale * float(query.double() @ keys[slot].double())
        if softcap is not None:
            logit = softcap * math.tanh(logit / softcap)
        logits.append(logit + weight)
    if not logits:
        return torch.zeros(query.shape[0], dtype=torch.float64), -math.inf
    top = max(logits)
    total = sum(math.exp(logit - top) for logit in logits)
    out = torch.zeros(query.shape[0], dtype=torch.float64)
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
    st.integers(0, 9999),
)
def test_float64_reference_equals_brute_force(
    batch: int, kv_heads: int, group: int, shared: bool, unit: int, extras: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    size, dim, entries = 29, 16, 5
    heads = kv_heads * group
    index_heads = kv_heads if shared else heads
    query = torch.randn(batch, heads, dim).double()
    keys = torch.randn(batch, kv_heads, size, dim).double()
    values = torch.randn(batch, kv_heads, size, dim).double()
    indices = torch.randint(-1, size // unit + 1, (batch, index_heads, entries)).int()
    count = torch.randint(0, entries + 1, (batch, index_heads)).int()
    weight = torch.randn(batch, heads, entries) if extras else None
    start = torch.randint(0, 10, (batch,)).int()
    end = torch.randint(5, size + 1, (batch,)).int()
    softcap = 2.0 if extras else None
    out, lse = sparse_attention(
        query, keys, values, indices, 0.25, count, weight, unit, start, end, softcap, "reference"
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
            expected, expected_lse = brute_force(*states, slots, 0.25, softcap)
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
    expected = sparse_attention(query, keys, values, indices, 1.0, impl="reference")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            actual = sparse_attention(query, keys, values, indices, 1.0, impl="cpu")
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


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_nan_is_not_hidden(impl: str) -> None:
    draw = torch.Generator().manual_seed(0)
    query, keys = torch.randn(1, 2, 16, generator=draw), torch.randn(1, 1, 50, 16, generator=draw)
    indices = torch.arange(40, dtype=torch.int32)[None, None]
    for sign in (1.0, -1.0):
        for spoilt in (query, keys):
            kept = spoilt[0, 0, 0].clone()
            spoilt[0, 0, 0] = torch.copysign(torch.tensor(torch.nan), torch.tensor(sign))
            out, lse = sparse_attention(query, keys, keys, indices, 0.25, impl=impl)
            assert out[0, 0].isnan().all()
            assert lse[0, 0].isnan()
            spoilt[0, 0, 0] = kept
