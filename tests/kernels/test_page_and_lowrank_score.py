import pytest
import torch

from topkbench.kernels.lowrank_score.api import lowrank_score
from topkbench.kernels.page_score.api import page_score


def test_page_score_written_out() -> None:
    query = torch.tensor([[[[1.0, -2.0]]]])
    page_min = torch.tensor([[[[-1.0, 3.0], [0.0, -4.0]]]])
    page_max = torch.tensor([[[[2.0, 5.0], [0.5, -1.0]]]])
    # page 0: max(-1, 2) + max(-6, -10); page 1: max(0, 0.5) + max(8, 2)
    for impl in ("reference", "cpu"):
        assert page_score(query, page_min, page_max, impl=impl).tolist() == [[[[-4.0, 8.5]]]]


def test_page_scores_are_summed_over_a_group() -> None:
    query = torch.tensor([[[[1.0, -2.0], [-1.0, 1.0]]]])
    page_min = torch.tensor([[[[-1.0, 3.0], [0.0, -4.0]]]])
    page_max = torch.tensor([[[[2.0, 5.0], [0.5, -1.0]]]])
    # The second query's: max(1, -2) + max(3, 5), which is 6, and max(0, -0.5) + max(-4, -1).
    for impl in ("reference", "cpu"):
        scores = page_score(query, page_min, page_max, impl=impl, sum_group=True)
        assert scores.tolist() == [[[2.0, 7.5]]]
        ends = torch.tensor([1], dtype=torch.int32)
        scores = page_score(query, page_min, page_max, None, ends, impl, sum_group=True)
        assert scores.tolist() == [[[2.0, -torch.inf]]]


def test_page_score_bounds_every_logit_of_its_page() -> None:
    torch.manual_seed(0)
    query, keys = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 5, 4, 16)
    bound = page_score(query, keys.amin(3), keys.amax(3))
    logits = torch.einsum("bhgd,bhpsd->bhgps", query, keys)
    assert bool((bound >= logits.amax(-1) - 1e-5).all())


def test_lowrank_score_written_out() -> None:
    query = torch.tensor([[[[1.0, 2.0], [0.0, -1.0]]]])
    keys = torch.tensor([[[[3.0, 4.0], [5.0, 6.0], [0.0, 1.0]]]])
    for impl in ("reference", "cpu"):
        score = lowrank_score(query, keys, impl=impl)
        assert score.tolist() == [[[[11.0, 17.0, 2.0], [-4.0, -6.0, -1.0]]]]


def test_bad_input_is_refused() -> None:
    query, keys = torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 9, 16)
    with pytest.raises(ValueError, match=r"keys must be .* = \[1, 2, \*, 16\], got \[1, 2, 9, 8\]"):
        lowrank_score(query, keys[..., :8])
    with pytest.raises(ValueError, match=r"page_max must be .* = \[1, 2, 9, 16\]"):
        page_score(query, keys, keys[:, :, :8])
    with pytest.raises(TypeError, match="must be float32 or bfloat16 for impl='cpu', got float16"):
        lowrank_score(query, keys.half(), impl="cpu")
    with pytest.raises(TypeError, match="page_max must have page_min's dtype"):
        page_score(query, keys, keys.bfloat16(), impl="cpu")
