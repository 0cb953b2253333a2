"""Learned sinks and narrower values in the methods, by hand.

With queries of zeros every token has the logit 0; a sink of log m takes half of the attention on m
tokens, and each of them gets 1 / (2 m).
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from topkbench.methods.base import (
    CacheView,
    Geometry,
    Policy,
    PrefillInputs,
    StepContext,
    key_bytes,
    kv_bytes,
    value_bytes,
)
from topkbench.methods.captured import Captured, column_sums
from topkbench.methods.exact import ExactTopK
from topkbench.methods.h2o import H2O
from topkbench.methods.policy import aggregate
from topkbench.methods.sinks import softmax
from topkbench.methods.snapkv import SnapKV
from topkbench.methods.sparq import SparQ
from topkbench.methods.spatten import SpAtten

FREE = {"num_sink": 0, "num_recent": 0}
KEYS = torch.randn(1, 1, 12, 8, generator=torch.Generator().manual_seed(0))
VALUES = torch.randn(1, 1, 12, 6, generator=torch.Generator().manual_seed(1))
SINKS = torch.full((2,), math.log(4.0))


def prompt(**more: Any) -> PrefillInputs:
    sizes = {"capacity": 12, "layer": 0, "num_layers": 1}
    return PrefillInputs(key_states=KEYS, value_states=VALUES, **sizes, **more)


def step(k: int, query: Tensor, sinks: Tensor | None = SINKS) -> StepContext:
    return StepContext(query, CacheView(KEYS, VALUES), Policy(k=k, **FREE), 1.0, sinks=sinks)


def test_the_weights_of_a_query_and_its_sink_add_up_to_one() -> None:
    logits = torch.tensor([[[[0.0, math.log(3.0)]], [[0.0, -torch.inf]], [[-torch.inf] * 2]]])
    found = softmax(logits.view(1, 3, 1, 2), torch.tensor([math.log(4.0), 0.0, 0.0]))
    expected = torch.tensor([[1 / 8, 3 / 8], [1 / 2, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(found[0, :, 0], expected)


def test_a_head_whose_sink_takes_much_counts_for_less() -> None:
    # Weights (3/4, 1/4) and (1/4, 3/4); the second head's sink takes half.
    scores = torch.tensor([[[[math.log(3.0), 0.0], [0.0, math.log(3.0)]]]])
    sinks = torch.tensor([-torch.inf, math.log(4.0)])
    for rule, expected in (("sum_softmax", [7 / 8, 5 / 8]), ("max_softmax", [3 / 4, 3 / 8])):
        found = aggregate(scores, rule, "logit", 1.0, sinks=sinks)
        torch.testing.assert_close(found, torch.tensor([[expected]]))
    query = torch.zeros(1, 1, 2, 8)
    context = step(4, query, sinks)
    found = ExactTopK().aggregate(scores, context)
    torch.testing.assert_close(found, torch.tensor([[[7 / 8, 5 / 8]]]))


def test_column_sums_have_the_sink_in_their_denominators() -> None:
    query, key = torch.zeros(1, 2, 2, 8), KEYS[:, :, :2]
    sinks = torch.tensor([0.0, math.log(2.0)])
    # The first query sees one token, the second two; the sinks count for 1 and for 2 of them.
    expected = torch.tensor([[[1 / 2 + 1 / 3, 1 / 3], [1 / 3 + 1 / 4, 1 / 4]]])
    torch.testing.assert_close(column_sums(query, key, 1.0, sinks=sinks), expected)
    captured = Captured(frozenset({"column_sums"}))
    captured.update(query, key, 1.0, sinks=sinks)
    torch.testing.assert_close(captured.column_sums, expected)


def test_h2o_adds_the_probabilities_with_the_sink() -> None:
    method = H2O()
    index = method.build_index(prompt(column_sums=torch.zeros(1, 2, 12)))
    method.step(index, step(4, torch.zeros(1, 1, 2, 8)))
    kept = index.sums[index.sums > -torch.inf]
    torch.testing.assert_close(kept, torch.full((4,), 2 / 8))


@pytest.mark.parametrize("requantise_below", [None, 1e-6, 1.0])
def test_spatten_attends_and_adds_with_the_sink(requantise_below: float | None) -> None:
    method = SpAtten(requantise_below=requantise_below)
    index = method.build_index(prompt(column_sums=torch.zeros(1, 2, 12)))
    found = method.step(index, step(4, torch.zeros(1, 1, 2, 8)))
    assert found.selection is not None
    kept = found.selection.indices[0, 0].long()
    torch.testing.assert_close(index.importance[0, 0, kept], torch.full((4,), 2 / 8))
    torch.testing.assert_close(found.out[0], (VALUES[0, 0, kept].mean(0) / 2).expand(2, -1))
    torch.testing.assert_close(found.lse, torch.full((1, 2), math.log(8.0)))


def test_snapkvs_votes_have_the_sink_in_their_denominators() -> None:
    method = SnapKV(window=1, kernel=1)
    given = {"query_tail": torch.zeros(1, 2, 1, 8), "sinks": torch.tensor([math.log(12.0), 0.0])}
    index = method.build_index(prompt(**given))
    assert index.importance is not None
    torch.testing.assert_close(index.importance[0, :, 0], torch.tensor([1 / 24, 1 / 13]))


def test_the_context_passes_its_sinks_to_the_index() -> None:
    assert step(4, torch.zeros(1, 1, 2, 8)).prompt(12, {}).sinks is SINKS


def test_sparqs_mean_value_leaves_the_sink_its_share() -> None:
    """With constant values and exact logits the output is full attention's."""
    values = torch.tensor([1.0, -2.0, 3.0]).expand(1, 1, 12, 3)
    query = torch.randn(1, 1, 2, 8, generator=torch.Generator().manual_seed(2))
    method = SparQ(rank=8)
    index = method.build_index(
        PrefillInputs(key_states=KEYS, value_states=values, capacity=12, layer=0, num_layers=1)
    )
    context = StepContext(query, CacheView(KEYS, values), Policy(k=3, **FREE), 0.2, sinks=SINKS)
    found = method.step(index, context)
    tokens = softmax(0.2 * query @ KEYS.mT, SINKS).sum(-1)
    assert bool((tokens < 0.9).all())
    torch.testing.assert_close(found.out, tokens[0, ..., None] * values[:, :, 0])


def test_bytes_count_keys_and_values_by_their_own_widths() -> None:
    shape = Geometry(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=24, value_dim=16)
    assert key_bytes(shape, 10) == 10 * 2 * 24 * 2
    assert value_bytes(shape, 10) == 10 * 2 * 16 * 2
    assert kv_bytes(shape, 10) == 10 * 2 * (24 + 16) * 2
    assert ExactTopK().bytes_read(shape, 100, 10) == 100 * 2 * 24 * 2 + kv_bytes(shape, 10)
    equal = Geometry(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=24)
    assert kv_bytes(equal, 10) == 2 * key_bytes(equal, 10) == 2 * value_bytes(equal, 10)
    assert "value_dim" not in equal.identity
