"""Oracle page selection, by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from topkbench.methods.base import CacheView, Policy, PrefillInputs, StepContext
from topkbench.methods.block_oracle import BlockOracle
from topkbench.methods.exact import ExactTopK
from topkbench.methods.quest import Quest

FREE: dict[str, Any] = {"num_sink": 0, "num_recent": 0}


def inputs(keys: Tensor, kv_start: Tensor | None = None) -> PrefillInputs:
    return PrefillInputs(
        key_states=keys,
        value_states=keys,
        capacity=keys.shape[2],
        layer=0,
        num_layers=1,
        kv_start=kv_start,
    )


@pytest.mark.parametrize(
    ("aggregation", "wanted"),
    [
        # Softmax weights 0.9793, 0.0179, 0.0024, 0.0003 and 0.2412, 0.2412, 0.3977, 0.1198.
        ("sum_softmax", [0.9793 + 0.2412, 0.0024 + 0.3977]),
        ("max_softmax", [0.9793, 0.3977]),
        ("sum_logit", [8.0, 2.5]),
    ],
)
def test_scores_by_hand(aggregation: Any, wanted: list[float]) -> None:
    # Logits 8, 4, 2, 0 and 0, 0, 0.5, -0.7, in pages of two.
    queries = torch.tensor([[8.0, 0.0], [0.0, 1.0]])[None, None]
    keys = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.25, 0.5], [0.0, -0.7]])[None, None]
    method = BlockOracle(page_size=2)
    index = method.build_index(inputs(keys))
    policy = Policy(k=2, aggregation=aggregation, **FREE)
    step = method.step(index, StepContext(queries, CacheView(keys, keys), policy, 1.0))
    assert step.ranking is not None
    found = step.ranking.scores
    torch.testing.assert_close(found, torch.tensor([[wanted]]), atol=2e-4, rtol=0)


def test_pages_of_one_are_the_exact_oracle() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 2, 50, 8, generator=generator)
    queries = torch.randn(2, 2, 3, 8, generator=generator)
    view, policy = CacheView(keys, keys), Policy(k=20, num_sink=1, num_recent=1)
    found = []
    for method in (BlockOracle(page_size=1), ExactTopK()):
        step = method.step(
            method.build_index(inputs(keys)), StepContext(queries, view, policy, 0.3)
        )
        assert step.selection is not None
        found.append(step.selection.indices)
    assert torch.equal(*found)


def test_no_other_pages_have_larger_best_weights() -> None:
    """Quest's selection of as many pages has no larger sum of best weights."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 4, 300, 8, generator=generator)
    queries = torch.randn(1, 4, 3, 8, generator=generator)
    view, policy = CacheView(keys, keys), Policy(k=32, **FREE)
    weights = (queries @ keys.mT).softmax(-1).sum(2)
    best = []
    for method in (BlockOracle(page_size=8), Quest(page_size=8)):
        step = method.step(
            method.build_index(inputs(keys)), StepContext(queries, view, policy, 1.0)
        )
        assert step.selection is not None
        pages = torch.nn.functional.pad(weights, (0, 4)).unflatten(-1, (38, 8)).amax(-1)
        best.append(pages.gather(-1, step.selection.indices.long()).sum(-1))
    assert (best[0] >= best[1]).all()
    assert (best[0] > best[1]).any()


def test_pages_begin_at_the_first_token_of_a_row() -> None:
    keys = torch.tensor([9.0, 9.0, 9.0, 1.0, 2.0, 3.0])[None, None, :, None]
    start = torch.tensor([3], dtype=torch.int32)
    method = BlockOracle(page_size=2)
    index = method.build_index(inputs(keys, start))
    policy = Policy(k=2, head_scope="query_head", **FREE)
    view = CacheView(keys, keys, start)
    step = method.step(index, StepContext(torch.ones(1, 1, 1, 1), view, policy, 1.0))
    assert step.ranking is not None
    assert step.ranking.scores.tolist() == [[[2.0, 3.0, -torch.inf]]]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="page_size must be at least 1, got 0"):
        BlockOracle(page_size=0)


def test_bytes_equal_the_reads_counted(geometry: Any) -> None:
    """All keys once, then keys and values of whole pages, counted from the tensors' shapes."""
    method = BlockOracle(page_size=16)
    keys = torch.zeros(1, 2, 100, 32)
    index = method.build_index(inputs(keys))
    context = StepContext(torch.zeros(1, 2, 3, 32), CacheView(keys, keys), Policy(k=40), 1.0)
    selection = method.step(index, context).selection
    assert selection is not None
    chosen = selection.indices.shape[2] * selection.unit_size
    assert chosen == 32
    assert method.bytes_read(geometry, 100, chosen) == keys.nbytes + 2 * chosen * 2 * 32 * 4
