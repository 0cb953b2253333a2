import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topkbench.kernels.hamming_score.api import hamming_score

INT16_MIN = -(2**15)


def random_codes(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def brute_force(query_codes: torch.Tensor, key_codes: torch.Tensor) -> list[list[list[int]]]:
    """Count differing bits with Python integers."""
    rbit = 32 * query_codes.shape[-1]
    out = []
    for queries, keys in zip(query_codes.tolist(), key_codes.tolist(), strict=True):
        heads = []
        for head_queries, head_keys in zip(queries, keys, strict=True):
            row = []
            for key in head_keys:
                score = 0
                for query in head_queries:
                    pairs = zip(query, key, strict=True)
                    ham = sum(((a ^ b) & 0xFFFFFFFF).bit_count() for a, b in pairs)
                    score += rbit - 2 * ham
                row.append(score)
            heads.append(row)
        out.append(heads)
    return out


def test_written_out_scores() -> None:
    query_codes = torch.tensor([[[[0], [-1]]]], dtype=torch.int32)
    key_codes = torch.tensor([[[[0], [-1], [1], [0b111]]]], dtype=torch.int32)
    for impl in ("reference", "cpu"):
        # against zeros and against ones: the two scores are opposite
        both = hamming_score(query_codes, key_codes, impl=impl)
        assert both.tolist() == [[[0, 0, 0, 0]]]
        one = hamming_score(query_codes[:, :, :1], key_codes, impl=impl)
        assert one.tolist() == [[[32, -32, 30, 26]]]
        norms = torch.tensor([[[2.0, 2.0, 1.0, 0.0]]])
        scaled = hamming_score(query_codes[:, :, :1], key_codes, norms, impl=impl)
        assert scaled.tolist() == [[[2.0, -2.0, 0.9375, 0.0]]]


@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 8),
    st.sampled_from([1, 2, 3, 4, 5, 8]),
    st.sampled_from([1, 2, 31, 101]),
    st.integers(0, 999),
)
def test_reference_and_cpu_equal_brute_force(
    batch: int, heads: int, group: int, words: int, size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    query_codes, cache = (
        random_codes(batch, heads, group, words),
        random_codes(batch, heads, size + 4, words),
    )
    key_codes = cache[:, :, :size]
    expected = brute_force(query_codes, key_codes)
    for impl in ("reference", "cpu"):
        assert hamming_score(query_codes, key_codes, impl=impl).tolist() == expected


@given(st.integers(1, 8), st.sampled_from([1, 2, 3, 4, 8]), st.integers(0, 999))
def test_ranges_and_norms_are_the_same_to_the_bit(group: int, words: int, seed: int) -> None:
    torch.manual_seed(seed)
    query_codes, key_codes = random_codes(3, 2, group, words), random_codes(3, 2, 53, words)
    norms = torch.rand(3, 2, 60)[:, :, :53]
    kv_start = torch.tensor([5, 0, 30], dtype=torch.int32)
    kv_len = torch.tensor([50, 53, 20], dtype=torch.int32)  # the last row is empty
    for given_norms in (None, norms):
        arguments = (query_codes, key_codes, given_norms, kv_start, kv_len)
        actual = hamming_score(*arguments, impl="cpu")
        assert torch.equal(actual, hamming_score(*arguments, impl="reference"))
        absent = INT16_MIN if given_norms is None else -torch.inf
        assert bool((actual[0, :, :5] == absent).all())
        assert bool((actual[0, :, 50:] == absent).all())
        assert bool((actual[2] == absent).all())


def test_long_rows_cross_block_borders() -> None:
    torch.manual_seed(0)
    query_codes, key_codes = random_codes(1, 1, 4, 4), random_codes(1, 1, 9001, 4)
    kv_start = torch.tensor([4097], dtype=torch.int32)
    arguments = (query_codes, key_codes, None, kv_start)
    expected = hamming_score(*arguments, impl="reference")
    assert torch.equal(hamming_score(*arguments, impl="cpu"), expected)


def test_bad_input_is_refused() -> None:
    codes = torch.zeros(2, 4, 3, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"key_codes must be .* = \[2, 4, \*, 4\], got \[2, 4, 9"):
        hamming_score(codes, torch.zeros(2, 4, 9, 2, dtype=torch.int32))
    with pytest.raises(TypeError, match="key_codes must be int32, got int64"):
        hamming_score(codes, torch.zeros(2, 4, 9, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"kv_len must be \[B\] = \[2\], got \[3\]"):
        hamming_score(codes, codes, kv_len=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(TypeError, match="kv_start must be int32, got int64"):
        hamming_score(codes, codes, kv_start=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"key_codes must have a contiguous last axis"):
        hamming_score(codes, torch.zeros(2, 4, 9, 8, dtype=torch.int32)[..., ::2], impl="cpu")
