"""4-bit keys, by hand."""

import torch

from topkbench.methods.four_bits import bytes_per_token, dequantise, quantise


def test_quantised_by_hand() -> None:
    # From 0 to 15 in steps of 1; from -1 to 2 in steps of 0.2; all alike.
    keys = torch.tensor([[0.0, 15.0, 7.4, 3.6], [-1.0, 2.0, 0.09, 0.11], [3.0, 3.0, 3.0, 3.0]])
    codes, ranges = quantise(keys)
    # Channels 0 and 2 share the first byte, 1 and 3 the second.
    assert codes.tolist() == [[0 + 16 * 7, 15 + 16 * 4], [0 + 16 * 5, 15 + 16 * 6], [0, 0]]
    wanted = torch.tensor([[0.0, 15.0, 7.0, 4.0], [-1.0, 2.0, 0.0, 0.2], [3.0, 3.0, 3.0, 3.0]])
    torch.testing.assert_close(dequantise(codes, ranges), wanted, atol=2e-3, rtol=0)
    assert codes[0].nbytes + ranges[0].nbytes == bytes_per_token(4)
