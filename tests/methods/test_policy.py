"""The rules around the budget, and the aggregation of a group's scores."""

import math

import pytest
import torch

from topkbench.methods.base import CacheView, Policy, Selection, aggregate


@pytest.mark.parametrize("k", [0, -5])
def test_k_must_be_positive(k: int) -> None:
    with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
        Policy(k=k)


def test_forced_tokens_must_fit_into_k() -> None:
    with pytest.raises(ValueError, match=r"at most k=8, got 4 \+ 8; raise k"):
        Policy(k=8)
    assert Policy(k=12).k == 12


@pytest.mark.parametrize(
    ("field", "word"), [("head_scope", "head"), ("aggregation", "mean"), ("protocol", "mine")]
)
def test_unknown_options_are_refused(field: str, word: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be one of .*, got '{word}'"):
        Policy(k=16, **{field: word})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dense", "num_layers", "wanted"),
    [
        (None, 4, set()),
        (None, 15, set()),
        (None, 16, {0, 1}),
        (0, 32, set()),
        (3, 32, {0, 1, 2}),
        (9, 4, {0, 1, 2, 3}),
        ([0, 5], 6, {0, 5}),
        ("::16", 4, {0}),
        ("::16", 32, {0, 16}),
        ("::16", 64, {0, 16, 32, 48}),
        ("-1:", 6, {5}),
    ],
)
def test_dense_layers(
    dense: int | tuple[int, ...] | str | None, num_layers: int, wanted: set[int]
) -> None:
    assert Policy(k=16, dense_layers=dense).resolve_dense_layers(num_layers) == wanted


def test_a_dense_layer_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 3, got 4"):
        Policy(k=16, dense_layers=(4,)).resolve_dense_layers(4)


@pytest.mark.parametrize("text", ["16", "::0", "a:b", "1:2:3:4", ""])
def test_an_invalid_slice_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a number, a list, or a slice such as '::16', got"):
        Policy(k=16, dense_layers=text)


def test_aggregation_by_hand() -> None:
    # Two queries, three units: weights (1/2, 1/4, 1/4) and (1/4, 1/4, 1/2) at scale 1/2.
    two = 2 * math.log(2.0)
    scores = torch.tensor([[[[two, 0.0, 0.0], [0.0, 0.0, two]]]])
    softmax = aggregate(scores, "native", "logit", 0.5)
    torch.testing.assert_close(softmax, torch.tensor([[[0.75, 0.5, 0.75]]]))
    most = aggregate(scores, "max_softmax", "count", 0.5)
    torch.testing.assert_close(most, torch.tensor([[[0.5, 0.25, 0.5]]]))
    summed = aggregate(scores, "native", "count", 0.5)
    torch.testing.assert_close(summed, torch.tensor([[[two, 0.0, two]]]))


def test_softcap_flattens_the_softmax() -> None:
    scores = torch.tensor([[[[100.0, 0.0]]]])
    weight = 1 / (1 + math.exp(-2.0))
    found = aggregate(scores, "sum_softmax", "logit", 1.0, softcap=2.0)
    torch.testing.assert_close(found, torch.tensor([[[weight, 1 - weight]]]))


def test_an_empty_row_aggregates_to_zeros() -> None:
    scores = torch.full((1, 1, 2, 3), -torch.inf)
    assert aggregate(scores, "native", "logit", 1.0).tolist() == [[[0.0, 0.0, 0.0]]]


def cache(kv_start: list[int], kv_len: list[int], n: int) -> CacheView:
    states = torch.zeros(len(kv_len), 1, n, 4)
    start, end = (torch.tensor(x, dtype=torch.int32) for x in (kv_start, kv_len))
    return CacheView(states, states, start, end)


def test_selecting_everything_in_rows_of_different_lengths() -> None:
    view = cache([0, 2], [3, 4], 4)
    selection = Selection.everything(view)
    assert selection.indices.tolist() == [[[0, 1, 2, -1]], [[2, 3, -1, -1]]]
    assert selection.tokens_read(view).tolist() == [[3], [2]]


def test_short_rows_keep_every_page() -> None:
    view = cache([0, 3], [12, 8], 12)
    chosen = Selection(torch.tensor([[[2]], [[0]]], dtype=torch.int32), unit_size=4)
    whole = chosen.with_all_of_short_rows(view, 7)
    # The second row has five tokens: pages 0 and 1, of which one token is in page 1.
    assert whole.indices.tolist() == [[[2, -1]], [[0, 1]]]
    assert whole.tokens_read(view).tolist() == [[4], [5]]


def test_tokens_of_an_open_page_and_a_count() -> None:
    indices = torch.tensor([[[0, 2, 1]]], dtype=torch.int32)
    view = cache([0], [10], 10)
    assert Selection(indices, unit_size=4).tokens_read(view).tolist() == [[10]]
    count = torch.tensor([[2]], dtype=torch.int32)
    assert Selection(indices, count, unit_size=4).tokens_read(view).tolist() == [[6]]


def test_query_heads_that_select_separately_read_the_union() -> None:
    states = torch.zeros(1, 2, 8, 4)  # two KV heads of two queries each
    indices = torch.tensor([[[0, 1], [1, 2], [5, 6], [5, 6]]], dtype=torch.int32)
    assert Selection(indices).tokens_read(CacheView(states, states)).tolist() == [[3, 2]]
