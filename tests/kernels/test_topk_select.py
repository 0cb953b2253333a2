from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topkbench.kernels.testing import assert_same_selection
from topkbench.kernels.topk_select.api import topk_select

INT32_MIN = -(2**31)


def brute_force(
    scores: list[float], k: int, sink: int, recent: int, start: int, end: int
) -> list[int]:
    """Select with Python's sort: forced units first, then by score, then by index."""
    units = range(start, end)
    forced = [u for u in units if u < start + sink or u >= end - recent]
    absent = (-torch.inf, INT32_MIN)
    free = [u for u in units if u not in forced and scores[u] not in absent]
    free.sort(key=lambda unit: (-scores[unit], unit))
    kept = min(k, len(scores))
    chosen = sorted((forced + free)[:kept])
    return chosen + [-1] * (kept - len(chosen))


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, int, int, int, list[int], list[int]]:
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    size = draw(st.sampled_from([1, 2, 7, 16, 17, 64, 101, 700]))
    k = draw(st.sampled_from([1, 2, 3, 8, 50, size, size + 3]))
    sink = draw(st.integers(0, min(4, k)))
    recent = draw(st.integers(0, min(5, k - sink)))
    torch.manual_seed(draw(st.integers(0, 9999)))
    kind = draw(
        st.sampled_from(["ties", "all int32", "int16", "float", "absent", "zeros", "bfloat16"])
    )
    shape = (batch, heads, size)
    if kind == "ties":
        scores = torch.randint(-3, 4, shape, dtype=torch.int32)
    elif kind == "int16":
        scores = torch.randint(-(2**15), 2**15, shape).to(torch.int16)
    elif kind == "all int32":
        scores = torch.randint(-(2**31), 2**31, shape).to(torch.int32)
    elif kind == "zeros":  # negative zero equals zero
        scores = torch.zeros(shape) * torch.randint(-1, 2, shape)
    else:
        scores = torch.randn(shape)
    if kind == "absent":
        scores[torch.rand(shape) < 0.4] = -torch.inf
        scores[torch.rand(shape) < 0.1] = torch.inf
    if kind == "bfloat16":
        scores = scores.bfloat16()
    starts = [draw(st.integers(0, size)) for _ in range(batch)]
    ends = [draw(st.integers(0, size)) for _ in range(batch)]
    return scores, k, sink, recent, starts, ends


@given(cases())
def test_reference_and_cpu_equal_brute_force(
    case: tuple[torch.Tensor, int, int, int, list[int], list[int]],
) -> None:
    scores, k, sink, recent, starts, ends = case
    start, end = torch.tensor(starts).int(), torch.tensor(ends).int()
    expected = [
        [brute_force(row, k, sink, recent, starts[batch], ends[batch]) for row in heads]
        for batch, heads in enumerate(scores.tolist())
    ]
    for impl in ("reference", "cpu"):
        actual = topk_select(scores, k, sink, recent, start, end, impl)
        assert actual.dtype == torch.int32
        assert actual.tolist() == expected, impl


def test_written_out_selection() -> None:
    scores = torch.tensor([[[5, 1, 7, 7, 7, 0, 9, 2]]], dtype=torch.int32)
    for impl in ("reference", "cpu"):
        assert topk_select(scores, 3, impl=impl).tolist() == [[[2, 3, 6]]]
        assert topk_select(scores, 3, 1, 1, impl=impl).tolist() == [[[0, 6, 7]]]
        start, end = torch.tensor([1]).int(), torch.tensor([6]).int()
        assert topk_select(scores, 3, 1, 1, start, end, impl).tolist() == [[[1, 2, 5]]]
        assert topk_select(scores, 9, 0, 0, start, end, impl).tolist() == [
            [[1, 2, 3, 4, 5, -1, -1, -1]]
        ]


@pytest.mark.parametrize("kind", ["ties", "spread", "equal"])
def test_block_maxima_give_the_same_selection(kind: str) -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 2, 5003)
    if kind == "ties":
        scores = (scores * 3).int()
    elif kind == "equal":
        scores = torch.zeros(2, 2, 5003)
    end = torch.tensor([5003, 3001], dtype=torch.int32)
    for k in (1, 13, 50, 78, 79, 400):
        expected = topk_select(scores, k, 0, 1, None, end, "reference")
        assert torch.equal(topk_select(scores, k, 0, 1, None, end, "cpu"), expected)


def test_a_strided_view_of_scores_is_read_in_place() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 90)[:, 1:, :71]
    assert torch.equal(topk_select(scores, 9, impl="cpu"), topk_select(scores, 9, impl="reference"))


def test_selections_are_the_same_when_their_scores_are() -> None:
    scores = torch.tensor([[[1.0, 3.0, 3.0, 2.0]]])

    def row(*units: int) -> torch.Tensor:
        return torch.tensor([[units]], dtype=torch.int32)

    assert_same_selection(row(2, 3), row(1, 3), scores)
    with pytest.raises(AssertionError, match="must agree"):
        assert_same_selection(row(0, 3), row(1, 3), scores)
    with pytest.raises(AssertionError, match="twice"):
        assert_same_selection(row(1, 1), row(1, 3), scores)
    with pytest.raises(AssertionError, match="units"):
        assert_same_selection(row(1, -1), row(1, 3), scores)


def test_bad_input_is_refused() -> None:
    scores = torch.zeros(1, 2, 9)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        topk_select(scores, 0)
    with pytest.raises(ValueError, match=r"between 0 and k=4, got 3 \+ 2"):
        topk_select(scores, 4, 3, 2)
    with pytest.raises(ValueError, match=r"scores must be \[B, H, U\] .* got \[2, 9\]"):
        topk_select(scores[0], 4)
    with pytest.raises(TypeError, match=r"scores must be int16 or int32 or float32 .* got int64"):
        topk_select(scores.long(), 4)


@pytest.mark.parametrize(
    ("num_units", "finite", "expected"),
    [
        (1024, [0, 1, 2, 3], [1, 2, 3]),
        (1030, [1026, 1027, 1028, 1029], [1027, 1028, 1029]),
        (2048, [5, 700, 1900], [5, 700, 1900]),
        (2048, [900], [900, -1, -1]),
    ],
)
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_few_units_among_many_absent_ones_are_found(
    num_units: int, finite: list[int], expected: list[int], impl: Any
) -> None:
    scores = torch.full((1, 1, num_units), -torch.inf)
    scores[0, 0, finite] = torch.arange(1.0, len(finite) + 1)
    assert topk_select(scores, 3, impl=impl)[0, 0].tolist() == expected
