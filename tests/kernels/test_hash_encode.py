import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topkbench.kernels.hash_encode.api import encode_step, hash_encode
from topkbench.kernels.testing import assert_same_bits

HEAD_DIMS = st.sampled_from([16, 20, 64, 80, 128])


def test_bit_j_of_word_w_is_the_sign_of_projection_32w_plus_j() -> None:
    weight = torch.zeros(1, 1, 64)
    weight[0, 0, 0] = 1.0
    weight[0, 0, 31] = 1.0
    weight[0, 0, 33] = 1.0
    weight[0, 0, 34] = -1.0
    states = torch.tensor([2.0, -2.0, 0.0]).reshape(1, 1, 3, 1)
    expected = [[1 - 2**31, 2], [0, 4], [0, 0]]
    for impl in ("reference", "cpu"):
        assert hash_encode(states, weight, impl=impl)[0, 0].tolist() == expected


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 4, 16, 17, 101]),
    HEAD_DIMS,
    st.sampled_from([32, 64, 96, 128, 256]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 999),
)
def test_cpu_differs_from_float64_only_where_a_projection_is_rounding_error(
    batch: int, heads: int, size: int, dim: int, rbit: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    states = torch.randn(batch, size + 3, heads, dim).to(dtype).transpose(1, 2)[:, :, :size]
    weight = torch.randn(heads, dim, rbit)
    for impl in ("reference", "cpu"):
        codes = hash_encode(states, weight, impl=impl)
        assert codes.dtype == torch.int32
        assert codes.shape == (batch, heads, size, rbit // 32)
        assert_same_bits(codes, states, weight)


def test_a_prompt_longer_than_one_chunk_is_encoded_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from topkbench.kernels.hash_encode import cpu

    monkeypatch.setattr(cpu, "_CHUNK", 2 * 2 * 32 * 10)  # ten states at a time
    states, weight = torch.randn(2, 2, 37, 16), torch.randn(2, 16, 32)
    assert_same_bits(hash_encode(states, weight, impl="cpu"), states, weight)


def test_bad_input_is_refused() -> None:
    states = torch.zeros(2, 4, 8, 16)
    with pytest.raises(ValueError, match=r"a positive multiple of 32, got 100"):
        hash_encode(states, torch.zeros(4, 16, 100))
    with pytest.raises(ValueError, match=r"hash_weight must be .* = \[4, 16, \*\], got \[2, 16"):
        hash_encode(states, torch.zeros(2, 16, 32))
    with pytest.raises(TypeError, match="states must be floating point, got int32"):
        hash_encode(states.int(), torch.zeros(4, 16, 32))


def test_a_key_beyond_the_cache_is_not_written() -> None:
    weight = torch.randn(2, 32, 64)
    codes = torch.full((2, 2, 5, 2), 7, dtype=torch.int32)
    norms = torch.full((2, 2, 5), 7.0)
    ends = torch.tensor([0, 6], dtype=torch.int32)
    queries, keys = torch.randn(2, 2, 3, 32), torch.randn(2, 2, 1, 32)
    found = encode_step(queries, keys, weight, codes, ends, norms, impl="cpu")
    assert (codes == 7).all()
    assert (norms == 7).all()
    assert torch.equal(found, hash_encode(queries, weight, impl="reference"))


def test_no_batch_has_no_codes() -> None:
    states, weight = torch.empty(0, 2, 40, 32), torch.randn(2, 32, 64)
    assert hash_encode(states, weight, impl="cpu").shape == (0, 2, 40, 2)
