import pytest
import torch

from topkbench.kernels.full_attention.api import full_attention
from topkbench.kernels.sparse_attention.api import sparse_attention


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("ranged", [False, True])
@pytest.mark.parametrize("group", [1, 4])
def test_full_equals_sparse_over_everything(
    softcap: float | None, ranged: bool, group: int
) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 2 * group, 16)
    keys, values = torch.randn(2, 3, 2, 40, 16)[..., :31, :]
    start = torch.tensor([0, 7, 20], dtype=torch.int32) if ranged else None
    end = torch.tensor([31, 25, 12], dtype=torch.int32) if ranged else None
    everything = torch.arange(31, dtype=torch.int32).expand(3, 2, 31)
    expected, _ = sparse_attention(
        query, keys, values, everything, 0.3, None, None, 1, start, end, softcap, "reference"
    )
    out = full_attention(query, keys, values, 0.3, start, end, softcap)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    if ranged:
        assert not bool(out[2].any())  # nothing is valid there


def test_bad_input_is_refused() -> None:
    query, cache = torch.zeros(1, 4, 16), torch.zeros(1, 2, 9, 16)
    with pytest.raises(ValueError, match="one of sdpa, flash_attn, flashinfer, got 'sdp'"):
        full_attention(query, cache, cache, 1.0, backend="sdp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs tensors on a cuda device, got cpu"):
        full_attention(query, cache, cache, 1.0, backend="flash_attn")
    with pytest.raises(ValueError, match=r"value_states must be .* = \[1, 2, 9, 16\]"):
        full_attention(query, cache, cache[:, :, :8], 1.0)


def test_a_missing_library_is_one_sentence() -> None:
    from topkbench.kernels.full_attention import libraries

    with pytest.raises(ValueError, match=r"needs the package none-such.* use backend='sdpa'"):
        libraries._library("no_such_library", "none-such")
