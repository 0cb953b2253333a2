"""group_softmax: written-out weights, and the three implementations against each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from topkbench.kernels.group_softmax.api import group_softmax

LN3 = math.log(3)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_written_out_weights(impl: str) -> None:
    scores = torch.tensor([[[[0.0, 2 * LN3, -torch.inf], [0.0, 0.0, 0.0]]]])
    added = group_softmax(scores, 0.5, impl=impl)  # 1/4 + 1/3, 3/4 + 1/3, 0 + 1/3
    torch.testing.assert_close(added, torch.tensor([[[7 / 12, 13 / 12, 1 / 3]]]))
    most = group_softmax(scores, 0.5, "max", impl=impl)
    torch.testing.assert_close(most, torch.tensor([[[1 / 3, 3 / 4, 1 / 3]]]))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_sink_is_in_its_query_heads_denominator(impl: str) -> None:
    scores = torch.tensor([[[[0.0, 2 * LN3, -torch.inf], [0.0, 0.0, 0.0]]]])
    sinks = torch.tensor([math.log(4), -torch.inf])
    added = group_softmax(scores, 0.5, sinks=sinks, impl=impl)  # 1/8 + 1/3, 3/8 + 1/3, 0 + 1/3
    torch.testing.assert_close(added, torch.tensor([[[11 / 24, 17 / 24, 1 / 3]]]))
    nothing = torch.full((1, 1, 2, 3), -torch.inf)
    assert group_softmax(nothing, 0.5, sinks=sinks, impl=impl).eq(0).all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_soft_cap_keeps_absent_units_out(impl: str) -> None:
    scores = torch.tensor([[[[1e9, 0.0, -torch.inf]]]])
    found = group_softmax(scores, 1.0, softcap=LN3, impl=impl)  # the first logit becomes ln 3
    torch.testing.assert_close(found, torch.tensor([[[0.75, 0.25, 0.0]]]))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_absent_units_have_no_weight(impl: str) -> None:
    scores = torch.full((1, 2, 3, 5), -torch.inf)
    assert group_softmax(scores, 1.0, impl=impl).eq(0).all()
    assert group_softmax(scores[..., :0], 1.0, impl=impl).shape == (1, 2, 0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    heads=st.integers(1, 3),
    group=st.integers(1, 16),
    size=st.sampled_from([1, 7, 100, 1024, 2049, 5000]),
    rule=st.sampled_from(["sum", "max"]),
    softcap=st.sampled_from([None, 5.0]),
    sunk=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_the_implementations_agree(
    heads: int,
    group: int,
    size: int,
    rule: str,
    softcap: float | None,
    sunk: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    scores = 20 * torch.randn(2, heads, group, size)
    scores[torch.rand_like(scores) < 0.2] = -torch.inf
    scores[0, 0, 0] = -torch.inf
    scores = scores.to(dtype)
    sinks = 10 * torch.randn(heads * group) if sunk else None
    exact = group_softmax(scores.double(), 0.3, rule, softcap, sinks, "reference")
    # exp turns the rounding of its argument, at most 2^-24 of about 40, into a relative error.
    for impl in ("reference", "cpu", "triton"):
        found = group_softmax(scores, 0.3, rule, softcap, sinks, impl)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=1e-30)


def test_bad_input_is_refused() -> None:
    scores = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"scores must be \[B, Hkv, G, U\] .* got \[2, 3, 4\]"):
        group_softmax(scores[0], 1.0)
    with pytest.raises(ValueError, match="rule must be sum or max, got 'mean'"):
        group_softmax(scores, 1.0, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"softcap must be positive or None, got 0.0"):
        group_softmax(scores, 1.0, softcap=0.0)
    with pytest.raises(ValueError, match=r"sinks must be \[Hq\] = \[6\], got \[3\]"):
        group_softmax(scores, 1.0, sinks=torch.zeros(3))
    with pytest.raises(TypeError, match="scores must be floating point, got int32"):
        group_softmax(scores.int(), 1.0)
