import pytest
import torch

from topkbench.kernels.channel_score.api import channel_score
from topkbench.kernels.code_score.api import code_score
from topkbench.kernels.lowrank_score.api import lowrank_score

IMPLS = ("reference", "cpu")
NONE = -float("inf")


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_channel_score_written_out() -> None:
    query = torch.tensor([[[[1.0, 2.0], [0.0, -1.0]]]])
    channel_keys = torch.tensor([[[[3.0, 5.0, 0.0], [torch.nan] * 3, [4.0, 6.0, 1.0]]]])
    for dtype in (torch.int64, torch.int32):
        channels = torch.tensor([[[0, 2]]], dtype=dtype)  # channel 1 is not read
        for impl in IMPLS:
            score = channel_score(query, channel_keys, channels, impl=impl)
            assert score.tolist() == [[[[11.0, 17.0, 2.0], [-4.0, -6.0, -1.0]]]]
            bounded = channel_score(query, channel_keys, channels, int32(1), int32(2), impl)
            assert bounded.tolist() == [[[[NONE, 17.0, NONE], [NONE, -6.0, NONE]]]]


def test_all_channels_in_order_give_full_dot_products() -> None:
    torch.manual_seed(0)
    query, keys = torch.randn(2, 3, 5, 20), torch.randn(2, 3, 1100, 20)
    channels = torch.arange(20).expand(2, 3, 20)
    for impl in IMPLS:
        score = channel_score(query, keys.mT.contiguous(), channels, impl=impl)
        whole = lowrank_score(query, keys, impl="reference")
        torch.testing.assert_close(score, whole, atol=1e-5, rtol=1e-5)


def test_code_score_written_out() -> None:
    # Two parts, two queries, three centroids.
    tables = torch.tensor([[[[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]], [[10.0, 20.0, 30.0], [0, 4, 8]]]])
    codes = torch.tensor([[0, 2], [2, 2], [1, 0], [255, 255]], dtype=torch.uint8)
    for impl in IMPLS:
        # The last key is outside the range, so its codes may be invalid.
        score = code_score(tables[None], codes[None, None], None, int32(3), impl)
        assert score.tolist() == [[[[31.0, 33.0, 12.0, NONE], [8.5, 7.0, 0.0, NONE]]]]
        later = code_score(tables[None], codes[None, None], int32(1), int32(2), impl)
        assert later.tolist() == [[[[NONE, 33.0, NONE, NONE], [NONE, 7.0, NONE, NONE]]]]


def test_bad_input_is_refused() -> None:
    query, keys, channels = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 16, 9), torch.zeros(1, 2, 8)
    with pytest.raises(TypeError, match="channels must be int64 or int32, got float32"):
        channel_score(query, keys, channels)
    with pytest.raises(ValueError, match=r"channels must be .* = \[1, 2, 8\], got \[1, 2, 7\]"):
        channel_score(query, keys, channels[..., :7].long())
    with pytest.raises(TypeError, match="must be float32 or bfloat16 for impl='cpu', got float16"):
        channel_score(query, keys.half(), channels.long(), impl="cpu")
    with pytest.raises(ValueError, match="channel_keys must have a contiguous last axis"):
        channel_score(query, keys.mT.contiguous().mT, channels.long(), impl="cpu")
    tables, codes = torch.zeros(1, 2, 4, 3, 257), torch.zeros(1, 2, 9, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="1 to 256 centroids, as a code is a byte, got 257"):
        code_score(tables, codes)
    with pytest.raises(TypeError, match="key_codes must be uint8, got int64"):
        code_score(tables[..., :64], codes.long())
    with pytest.raises(TypeError, match="tables must be float32, got bfloat16"):
        code_score(tables[..., :64].bfloat16(), codes)
    with pytest.raises(ValueError, match=r"key_codes must be .* = \[1, 2, \*, 4\]"):
        code_score(tables[..., :64], codes[..., :3])
