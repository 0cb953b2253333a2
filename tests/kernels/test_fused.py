"""The Triton kernels against the references: in the interpreter, and on a GPU if there is one.

An interpreted launch takes a tenth of a second, so examples are few; the references they are
compared with are held to brute force in the tests of each operator.
"""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import topkbench.kernels.dispatch as dispatch
from topkbench.kernels.hamming_score.api import hamming_score
from topkbench.kernels.hash_encode.api import encode_step, hash_encode
from topkbench.kernels.lowrank_score.api import lowrank_score
from topkbench.kernels.page_score.api import page_score
from topkbench.kernels.sparse_attention.api import sparse_attention
from topkbench.kernels.testing import assert_as_accurate, assert_same_bits
from topkbench.kernels.topk_select.api import topk_select

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 9999)


def random_codes(device: torch.device, *shape: int) -> torch.Tensor:
    codes = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64)
    return codes.to(torch.int32).to(device)


def int32(device: torch.device, *numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


@settings(max_examples=12)
@given(
    st.sampled_from([1, 2, 3, 4, 7, 8, 16]),
    st.sampled_from([1, 2, 3, 4, 5, 8, 16]),
    st.sampled_from([1, 53, 300]),
    SEEDS,
)
def test_hamming_scores_are_the_same_to_the_bit(
    triton_device: torch.device, group: int, words: int, size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    query_codes = random_codes(triton_device, 3, 2, group, words)
    # A cache laid out by slots or by heads, longer than what is read of it.
    cache = random_codes(triton_device, 3, 2, size + 7, words)
    if seed % 2:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    norms = torch.rand(3, 2, size + 7, device=triton_device)[:, :, :size]
    kv_start = int32(triton_device, 5, 0, 30)
    kv_len = int32(triton_device, 50, size + 1, 20)  # the last row is empty
    for given_norms in (None, norms):
        arguments = (query_codes, cache[:, :, :size], given_norms, kv_start, kv_len)
        actual = hamming_score(*arguments, impl="triton")
        assert torch.equal(actual, hamming_score(*arguments, impl="reference"))


def test_many_hamming_scores_need_no_bounds(triton_device: torch.device) -> None:
    torch.manual_seed(0)
    query_codes = random_codes(triton_device, 1, 1, 4, 4)
    key_codes = random_codes(triton_device, 1, 1, 2500, 4)
    actual = hamming_score(query_codes, key_codes, impl="triton")
    assert torch.equal(actual, hamming_score(query_codes, key_codes, impl="reference"))


@st.composite
def selections(draw: st.DrawFn) -> tuple[torch.Tensor, int, int, int, list[int], list[int]]:
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    size = draw(st.sampled_from([1, 2, 17, 101, 700, 2100, 5003]))
    k = draw(st.sampled_from([1, 2, 8, 50, size // 2 + 1, size, size + 3]))
    sink = draw(st.integers(0, min(4, k)))
    recent = draw(st.integers(0, min(5, k - sink)))
    torch.manual_seed(draw(SEEDS))
    kinds = ["ties", "scores", "all int32", "float", "absent", "zeros", "bfloat16", "float16"]
    kind = draw(st.sampled_from(kinds))
    shape = (batch, heads, size)
    if kind == "ties":
        scores = torch.randint(-3, 4, shape, dtype=torch.int32)
    elif kind == "scores":
        scores = 2 * torch.randint(-64, 65, shape, dtype=torch.int32)
    elif kind == "all int32":
        scores = torch.randint(-(2**31), 2**31, shape).to(torch.int32)
    elif kind == "zeros":  # negative zero equals zero
        scores = torch.zeros(shape) * torch.randint(-1, 2, shape)
    else:
        scores = torch.randn(shape)
    if kind == "absent":
        scores[torch.rand(shape) < 0.7] = -torch.inf
        scores[torch.rand(shape) < 0.1] = torch.inf
    if kind in ("bfloat16", "float16"):
        scores = scores.to(getattr(torch, kind))
    starts = [draw(st.integers(0, size // 2)) for _ in range(batch)]
    ends = [draw(st.integers(0, size)) for _ in range(batch)]
    return scores, k, sink, recent, starts, ends


@settings(max_examples=25)
@given(selections(), st.booleans())
def test_selections_are_the_same_ties_included(
    triton_device: torch.device,
    case: tuple[torch.Tensor, int, int, int, list[int], list[int]],
    ragged: bool,
) -> None:
    scores, k, sink, recent, starts, ends = case
    scores = scores.to(triton_device)
    bounds = (int32(triton_device, *starts), int32(triton_device, *ends)) if ragged else ()
    actual = topk_select(scores, k, sink, recent, *bounds, impl="triton")
    assert actual.dtype == torch.int32
    assert torch.equal(actual, topk_select(scores, k, sink, recent, *bounds, impl="reference"))


def test_extreme_scores_are_chosen_or_absent(triton_device: torch.device) -> None:
    whole = torch.tensor([[[2**31 - 1, -(2**31), 2**31 - 1, -(2**31) + 1]]], dtype=torch.int32)
    tiny = torch.finfo(torch.float32).tiny
    real = torch.tensor([[[-torch.inf, torch.inf, -3e38, -tiny, 0.0, -0.0, tiny, torch.inf]]])
    for scores in (whole.to(triton_device), real.to(triton_device)):
        for k in range(1, scores.shape[2] + 2):
            expected = topk_select(scores, k, impl="reference")
            assert torch.equal(topk_select(scores, k, impl="triton"), expected)


def test_a_strided_view_of_scores_is_selected_from_in_place(triton_device: torch.device) -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 180, device=triton_device)[:, 1:, :142:2]
    expected = topk_select(scores, 9, impl="reference")
    assert torch.equal(topk_select(scores, 9, impl="triton"), expected)


@settings(max_examples=12)
@given(
    st.integers(1, 2),
    st.sampled_from([1, 3, 4, 16]),
    st.sampled_from([16, 20, 64, 80, 128, 256]),
    st.sampled_from([1, 101, 600]),
    st.sampled_from([1, 33, 300]),
    st.sampled_from([1, 3, 16]),
    DTYPES,
    st.booleans(),
    SEEDS,
)
def test_attention_is_as_accurate_as_the_reference(
    triton_device: torch.device,
    batch: int,
    group: int,
    dim: int,
    size: int,
    tokens: int,
    unit: int,
    dtype: torch.dtype,
    extras: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    kv_heads, entries = 2, tokens // unit + 1
    heads = kv_heads * group
    index_heads = kv_heads if seed % 2 else heads
    query = torch.randn(batch, heads, dim).to(dtype)
    cache = torch.randn(2, batch, kv_heads, size + 5, dim).to(dtype)
    cache[:, :, :, size:] = torch.nan
    keys, values = cache[0, :, :, :size], cache[1, :, :, :size]
    indices = torch.randint(-1, size // unit + 1, (batch, index_heads, entries)).int()
    count = torch.randint(0, entries + 1, (batch, index_heads)).int() if extras else None
    weight = torch.randn(batch, heads, entries) if extras else None
    start = torch.randint(0, size, (batch,)).int() if extras else None
    end = torch.randint(0, size + 1, (batch,)).int() if seed % 3 else None
    softcap = 5.0 if seed % 5 == 0 else None

    def moved(tensor: torch.Tensor | None) -> Any:
        return None if tensor is None else tensor.to(triton_device)

    states = [moved(tensor) for tensor in (query, keys, values)]
    tensors = [moved(tensor) for tensor in (indices, count, weight, start, end)]
    indices, count, weight, start, end = tensors
    selection = (indices, dim**-0.5, count, weight, unit, start, end, softcap)
    wide = [state.double() for state in states]
    exact = sparse_attention(*wide, *selection, "reference")
    expected = sparse_attention(*states, *selection, "reference")
    actual = sparse_attention(*states, *selection, "triton")
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.float32
    assert_as_accurate(actual[0], expected[0], exact[0])
    assert_as_accurate(actual[1], expected[1], exact[1])


def test_parts_of_a_selection_merge_to_the_whole(triton_device: torch.device) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 3, 16, device=triton_device)
    keys, values = torch.randn(2, 1, 1, 1500, 16, device=triton_device)
    # The largest logit lies in the last part, and one part holds nothing.
    keys[0, 0, 1490] = 5 * query[0, 0]
    indices = torch.arange(1500, dtype=torch.int32, device=triton_device)[None, None].clone()
    indices[..., :400] = -1
    actual = sparse_attention(query, keys, values, indices, 1.0, impl="triton")
    expected = sparse_attention(query, keys, values, indices, 1.0, impl="reference")
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_nothing_to_attend_to_gives_zeros_and_minus_infinity(triton_device: torch.device) -> None:
    query = torch.ones(2, 4, 16, device=triton_device)
    cache = torch.ones(2, 2, 9, 16, device=triton_device)
    nothing = torch.full((2, 2, 3), -1, dtype=torch.int32, device=triton_device)
    for indices, states in (
        (nothing, cache),
        (nothing[:, :, :0], cache),
        (nothing, cache[:, :, :0]),
    ):
        out, lse = sparse_attention(query, states, states, indices, 1.0, impl="triton")
        assert out.tolist() == torch.zeros(2, 4, 16).tolist()
        assert lse.tolist() == [[-math.inf] * 4] * 2


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.1, 0.5, 3.0, 60.0])
def test_a_soft_cap_is_precise_for_small_and_large_logits(
    triton_device: torch.device, size: float
) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 2, 16, device=triton_device) * size
    keys, values = torch.randn(2, 1, 2, 40, 16, device=triton_device)
    indices = torch.arange(40, dtype=torch.int32, device=triton_device).expand(1, 2, 40)
    rest = (indices, 0.25, None, None, 1, None, None, 20.0)
    states = (query, keys, values)
    exact = sparse_attention(*(state.double() for state in states), *rest, "reference")
    expected = sparse_attention(*states, *rest, "reference")
    actual = sparse_attention(*states, *rest, "triton")
    assert_as_accurate(actual[0], expected[0], exact[0])
    assert_as_accurate(actual[1], expected[1], exact[1])


@settings(max_examples=12)
@given(
    st.integers(1, 2),
    st.sampled_from([1, 4, 16, 17, 101]),
    st.sampled_from([16, 20, 80, 128, 256]),
    st.sampled_from([32, 64, 96, 256, 512]),
    DTYPES,
    st.booleans(),
    SEEDS,
)
def test_hash_codes_differ_only_where_a_projection_is_rounding(
    triton_device: torch.device,
    batch: int,
    size: int,
    dim: int,
    rbit: int,
    dtype: torch.dtype,
    narrow: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    states = torch.randn(batch, size + 3, 2, dim).to(dtype).transpose(1, 2)[:, :, :size]
    weight = torch.randn(2, dim, rbit).to(dtype if narrow else torch.float32)
    states, weight = states.to(triton_device), weight.to(triton_device)
    codes = hash_encode(states, weight, impl="triton")
    assert codes.dtype == torch.int32
    assert codes.shape == (batch, 2, size, rbit // 32)
    assert_same_bits(codes, states, weight)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_a_step_writes_its_keys_code_and_norm_into_the_cache(
    triton_device: torch.device, impl: Any
) -> None:
    if impl == "cpu" and triton_device.type != "cpu":
        pytest.skip("cpu runs on a CPU")
    torch.manual_seed(0)
    query = torch.randn(3, 2, 4, 80, device=triton_device)
    key = torch.randn(3, 2, 1, 80, device=triton_device)
    weight = torch.randn(2, 80, 96, device=triton_device)
    before = random_codes(triton_device, 3, 2, 9, 3)
    codes, norms = before.clone(), torch.zeros(3, 2, 12, device=triton_device)[:, :, 1:10]
    kv_len = int32(triton_device, 1, 9, 4)
    query_codes = encode_step(query, key, weight, codes, kv_len, norms, impl)
    assert_same_bits(query_codes, query, weight)
    rows, slots = torch.arange(3, device=triton_device), kv_len.long() - 1
    assert_same_bits(codes[rows, :, slots][:, :, None], key, weight)
    expected = torch.zeros_like(norms)
    expected[rows, :, slots] = key[:, :, 0].norm(dim=-1)
    torch.testing.assert_close(norms, expected)
    # No other slot is touched.
    codes[rows, :, slots] = before[rows, :, slots]
    assert torch.equal(codes, before)
    assert torch.equal(encode_step(query, key, weight, codes, kv_len, impl=impl), query_codes)


@settings(max_examples=12)
@given(
    st.sampled_from([1, 3, 16]),
    st.sampled_from([7, 31, 300]),
    st.sampled_from([16, 20, 80, 256]),
    DTYPES,
    SEEDS,
)
def test_page_scores_are_as_accurate_as_the_reference(
    triton_device: torch.device, group: int, pages: int, dim: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    query = torch.randn(2, 2, group, dim).to(dtype).to(triton_device)
    low = torch.randn(2, 2, pages + 3, dim).to(dtype).to(triton_device)[:, :, :pages]
    high = low + torch.rand(2, 2, pages, dim).to(dtype).to(triton_device)
    kv_len = torch.randint(0, pages + 1, (2,)).int().to(triton_device)
    exact = page_score(query.double(), low.double(), high.double(), None, kv_len, "reference")
    expected = page_score(query, low, high, None, kv_len, "reference")
    assert_as_accurate(page_score(query, low, high, None, kv_len, "triton"), expected, exact)


@settings(max_examples=12)
@given(
    st.sampled_from([1, 3, 16]),
    st.sampled_from([7, 31, 300]),
    st.sampled_from([1, 16, 20, 80, 256]),
    DTYPES,
    SEEDS,
)
def test_lowrank_scores_are_as_accurate_as_the_reference(
    triton_device: torch.device, group: int, size: int, rank: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    query = torch.randn(2, 2, group, rank).to(dtype).to(triton_device)
    keys = torch.randn(2, 2, size + 3, rank + 7).to(dtype).to(triton_device)[:, :, :size, :rank]
    start = torch.randint(0, size + 1, (2,)).int().to(triton_device)
    exact = lowrank_score(query.double(), keys.double(), start, None, "reference")
    expected = lowrank_score(query, keys, start, None, "reference")
    assert_as_accurate(lowrank_score(query, keys, start, None, "triton"), expected, exact)


def test_what_the_kernels_do_not_read_is_refused(triton_device: torch.device) -> None:
    states = torch.zeros(1, 2, 3, 16, device=triton_device).double()
    indices = torch.zeros(1, 2, 1, dtype=torch.int32, device=triton_device)
    match = "must be float32, bfloat16 or float16 for impl='triton', got float64"
    with pytest.raises(TypeError, match=f"states {match}"):
        hash_encode(states, states[0, :, :1].mT.expand(-1, -1, 32), impl="triton")
    with pytest.raises(TypeError, match=f"scores {match}"):
        topk_select(states[..., 0], 1, impl="triton")
    with pytest.raises(TypeError, match=f"query_states {match}"):
        sparse_attention(states[:, :, 0], states, states, indices, 1.0, impl="triton")
    with pytest.raises(TypeError, match=f"query_states {match}"):
        page_score(states, states, states, impl="triton")
    with pytest.raises(TypeError, match=f"query {match}"):
        lowrank_score(states, states, impl="triton")
    wide = torch.zeros(1, 2, 1, 512, device=triton_device)
    with pytest.raises(ValueError, match="head_dim must be at most 256 for impl='triton', got 512"):
        sparse_attention(wide[:, :, 0], wide, wide, indices, 1.0, impl="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_decode_step_serves_every_length() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda")
    batch, heads, group, dim, rbit, capacity = 2, 2, 4, 128, 128, 3000
    query = torch.randn(batch, heads, group, dim, device=device).bfloat16()
    keys, values = torch.randn(2, batch, heads, capacity, dim, device=device).bfloat16()
    weight = torch.randn(heads, dim, rbit, device=device)
    codes = hash_encode(keys, weight, impl="triton")
    norms = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
    kv_start, kv_len = int32(device, 3, 0), int32(device, 1000, 2000)
    new_key = torch.randn(batch, heads, 1, dim, device=device).bfloat16()

    def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        encoded = encode_step(query, new_key, weight, codes, kv_len, norms, impl="triton")
        bounds = (kv_start, kv_len)
        scores = hamming_score(encoded, codes, norms, *bounds, impl="triton")
        indices = topk_select(scores, 64, 4, 8, *bounds, impl="triton")
        flat = (query.flatten(1, 2), keys, values, indices, dim**-0.5)
        out, _ = sparse_attention(*flat, kv_start=kv_start, kv_len=kv_len, impl="triton")
        return scores, indices, out

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    for first, second in ((1000, 2000), (1001, 2001), (70, 3000), (10, 2)):
        kv_len.copy_(int32(device, first, second))
        new_key.normal_()
        graph.replay()
        scores, indices, out = (tensor.clone() for tensor in recorded)
        encoded = hash_encode(query, weight, impl="triton")
        bounds = (kv_start, kv_len)
        assert torch.equal(scores, hamming_score(encoded, codes, norms, *bounds, impl="reference"))
        assert torch.equal(indices, topk_select(scores, 64, 4, 8, *bounds, impl="reference"))
        rows = torch.arange(batch, device=device)
        assert_same_bits(codes[rows, :, kv_len.long() - 1][:, :, None], new_key, weight)
        flat = (query.flatten(1, 2), keys, values)
        rest = (indices, dim**-0.5, None, None, 1, *bounds, None, "reference")
        exact, _ = sparse_attention(*(state.double() for state in flat), *rest)
        expected, _ = sparse_attention(*flat, *rest)
        assert_as_accurate(out, expected, exact)


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    program = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert {name.split(".")[0] for name in done.stdout.split()} == set(dispatch.OPERATORS)
    assert len(done.stdout.split()) == 9
