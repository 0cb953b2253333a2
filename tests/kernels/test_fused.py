"""Tests specific to the Triton kernels: in the interpreter, and on a GPU if there is one.

That they agree with the references on drawn shapes is in ``test_agreement.py``.
"""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import topkbench.kernels.dispatch as dispatch
from topkbench.kernels.channel_score.api import channel_score
from topkbench.kernels.hamming_score.api import hamming_score
from topkbench.kernels.hash_encode.api import encode_step, hash_encode
from topkbench.kernels.lowrank_score.api import lowrank_score
from topkbench.kernels.page_score.api import page_score
from topkbench.kernels.sparse_attention.api import sparse_attention
from topkbench.kernels.testing import assert_attended, assert_same_bits
from topkbench.kernels.topk_select.api import topk_select


def random_codes(device: torch.device, *shape: int) -> torch.Tensor:
    codes = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64)
    return codes.to(torch.int32).to(device)


def int32(device: torch.device, *numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def test_many_hamming_scores_need_no_bounds(triton_device: torch.device) -> None:
    torch.manual_seed(0)
    query_codes = random_codes(triton_device, 1, 1, 4, 4)
    key_codes = random_codes(triton_device, 1, 1, 2500, 4)
    actual = hamming_score(query_codes, key_codes, impl="triton")
    assert torch.equal(actual, hamming_score(query_codes, key_codes, impl="reference"))


def test_extreme_scores_are_selected_or_absent(triton_device: torch.device) -> None:
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


def test_parts_of_a_selection_merge_to_the_whole(triton_device: torch.device) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 3, 16, device=triton_device)
    keys, values = torch.randn(2, 1, 1, 1500, 16, device=triton_device)
    # The largest logit is in the last part, and one part is empty.
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
    out, lse = sparse_attention(*states, *rest, impl="triton")
    assert_attended(out, lse, *states, *rest)


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
    # No other slot is written.
    codes[rows, :, slots] = before[rows, :, slots]
    assert torch.equal(codes, before)
    assert torch.equal(encode_step(query, key, weight, codes, kv_len, impl=impl), query_codes)


def test_dtypes_that_the_kernels_cannot_read_are_refused(triton_device: torch.device) -> None:
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
    with pytest.raises(TypeError, match=f"query {match}"):
        channel_score(states, states, indices[..., :1].expand(-1, -1, 16), impl="triton")
    wide = torch.zeros(1, 2, 1, 512, device=triton_device)
    with pytest.raises(ValueError, match="head_dim must be at most 256 for impl='triton', got 512"):
        sparse_attention(wide[:, :, 0], wide, wide, indices, 1.0, impl="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_decode_step_works_for_every_length() -> None:
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
        assert_attended(out, None, *flat, indices, dim**-0.5, None, None, 1, *bounds)


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    types = str(Path(__file__).parents[2] / ".types")  # the checkout's own code
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": types}
    environment.pop("TRITON_INTERPRET", None)
    program = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    # The kernel that merges parts is shared by several operators.
    folders = {*dispatch.OPERATORS, "full_attention", "kernels"}
    assert {name.split(".")[0] for name in done.stdout.split()} == folders
    assert len(done.stdout.split()) == 14
