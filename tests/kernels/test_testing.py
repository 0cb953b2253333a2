import pytest
import torch

from topkbench.kernels.lowrank_score.api import lowrank_score
from topkbench.kernels.sparse_attention.api import sparse_attention
from topkbench.kernels.testing import assert_attended, assert_within_bound, gamma

EPS = 2.0**-23


def test_gamma_counts_roundings() -> None:
    assert gamma(0) == 0
    assert gamma(1) == pytest.approx(EPS)
    assert gamma(2**22) == pytest.approx(1.0)  # half of the digits are lost


def test_an_error_of_twice_the_bound_fails_and_one_within_it_passes() -> None:
    exact = torch.tensor([1.0, -3.0, 0.0]).double()
    bound = gamma(8) * torch.tensor([4.0, 3.0, 10.0]).double()
    # 8 float32 operations on terms of 4, 3 and 10, and rounding of results of 1, 3 and 0
    allowed = torch.tensor([32 * EPS + EPS / 2, 24 * EPS + 3 * EPS / 2, 80 * EPS]).double()
    for place in range(3):
        for sign in (-1.0, 1.0):
            error = torch.zeros(3).double()
            error[place] = sign * allowed[place]
            assert_within_bound((exact + 0.9 * error).float(), exact, bound)
            with pytest.raises(AssertionError, match=rf"in element {place} of \[3\]; 1 elements"):
                assert_within_bound((exact + 2 * error).float(), exact, bound)


def test_a_narrow_result_may_be_rounded_once() -> None:
    exact = torch.tensor([1.0 + 2.0**-8]).double()  # halfway between two bfloat16 numbers
    assert_within_bound(torch.tensor([1.0]).bfloat16(), exact, 0.0)
    with pytest.raises(AssertionError, match=r"must be at most 0\.00392, got 0\.0117"):
        assert_within_bound(torch.tensor([1.0 - 2.0**-7]).bfloat16(), exact, 0.0)


def test_infinite_elements_and_nan_are_detected() -> None:
    exact = torch.tensor([0.0, -torch.inf]).double()
    assert_within_bound(exact.float(), exact, torch.tensor([0.0, -torch.inf]))
    with pytest.raises(AssertionError, match="must be infinite exactly where"):
        assert_within_bound(torch.zeros(2), exact, 0.0)
    with pytest.raises(AssertionError, match="got nan in element 0"):
        assert_within_bound(torch.tensor([torch.nan, -torch.inf]), exact, 1.0)


def test_the_bound_allows_for_terms_that_cancel() -> None:
    query, keys = torch.tensor([[[[2.0**24, 1.0, -(2.0**24)]]]]), torch.ones(1, 1, 1, 3)
    exact = lowrank_score(query.double(), keys.double(), impl="reference")
    terms = lowrank_score(query.double().abs(), keys.double(), impl="reference")
    assert exact.item() == 1.0
    lost = torch.zeros(1, 1, 1, 1)  # 2^24 + 1 is 2^24 in float32
    assert_within_bound(lost, exact, gamma(3) * terms)
    with pytest.raises(AssertionError, match="got 1 in element 0"):
        assert_within_bound(lost, exact, gamma(3) * exact.abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_that_misses_a_token_or_its_weight_is_wrong(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    states = (torch.randn(2, 4, 64), torch.randn(2, 2, 90, 64), torch.randn(2, 2, 90, 64))
    states = (states[0].to(dtype), states[1].to(dtype), states[2].to(dtype))
    indices = torch.arange(70, dtype=torch.int32).expand(2, 2, 70).clone()
    weight = torch.randn(2, 4, 70)
    out, lse = sparse_attention(*states, indices, 0.125, None, weight, impl="reference")
    assert_attended(out, lse, *states, indices, 0.125, None, weight)
    nan = torch.full_like(lse, torch.nan)
    for wrong_out, wrong_lse, match in (
        (out * 1.05, lse, r"of \[2, 4, 64\]"),
        (out, lse + 1e-3, r"of \[2, 4\]"),
        (out, nan, r"of \[2, 4\]"),
    ):
        with pytest.raises(AssertionError, match=match):
            assert_attended(wrong_out, wrong_lse, *states, indices, 0.125, None, weight)
    rest = (0.125, None, weight[..., 1:])
    fewer, _ = sparse_attention(*states, indices[..., 1:], *rest, impl="reference")
    with pytest.raises(AssertionError, match=r"of \[2, 4, 64\]"):
        assert_attended(fewer, None, *states, indices, 0.125, None, weight)
