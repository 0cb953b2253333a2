"""Recall, attention mass and output error, against numbers computed by hand."""

import math
from dataclasses import replace

import pytest
import torch

from topkbench.harness.generation import recall_by_part, selection_means
from topkbench.harness.quality import DenseReference, SelectionMeter, quality
from topkbench.harness.reads import ReadCounter
from topkbench.methods.base import CacheView, Policy, Selection, StepContext, StepResult

# Two queries of one KV head. Each looks at one channel, in which the keys hold logarithms, so that
# the softmax is 0.4 0.3 0.2 0.1 for the first query and 0.1 0.1 0.1 0.7 for the second.
QUERIES = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
KEYS = torch.tensor([[[[math.log(a), math.log(b)] for a, b in ((4, 1), (3, 1), (2, 1), (1, 7))]]])
VALUES = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]]])
CACHE = CacheView(KEYS, VALUES)
FULL_OUT = torch.tensor([[[0.4, 0.3], [0.1, 0.1]]])


def step_at(k: int, layer: int = 0, softcap: float | None = None) -> StepContext:
    policy = Policy(k=k, num_sink=0, num_recent=0)
    return StepContext(QUERIES, CACHE, policy, scale=1.0, softcap=softcap, layer=layer)


def pick(*slots: int, **more: object) -> Selection:
    return Selection(torch.tensor([[list(slots)]], dtype=torch.int32), **more)  # type: ignore[arg-type]


def measured(selection: Selection, k: int, out: torch.Tensor = FULL_OUT) -> tuple[float, ...]:
    step = step_at(k)
    found = quality(DenseReference.of(step), step, StepResult(out, None, selection))
    parts = (found.recall_at_k, found.attention_mass, found.output_rel_error, found.tokens)
    return tuple(round(part.item(), 5) for part in parts)


def test_full_attention_is_the_reference() -> None:
    reference = DenseReference.of(step_at(2))
    expected = torch.tensor([[[[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]]]])
    torch.testing.assert_close(reference.weights, expected)
    torch.testing.assert_close(reference.group_weights, torch.tensor([[[0.5, 0.4, 0.3, 0.8]]]))
    torch.testing.assert_close(reference.out[:, 0], FULL_OUT)


def test_the_reference_of_a_model_with_softcap_has_capped_logits() -> None:
    reference = DenseReference.of(step_at(2, softcap=1.0))
    capped = [math.exp(math.tanh(math.log(part))) for part in (4, 3, 2, 1)]
    torch.testing.assert_close(reference.weights[0, 0, 0], torch.tensor(capped) / sum(capped))


def test_a_sink_lowers_weights_and_outputs_but_not_the_mass_of_a_selection() -> None:
    # The first head's tokens have a denominator of 10, the second's too: sinks of 10 and 30.
    step = replace(step_at(4), sinks=torch.tensor([math.log(10.0), math.log(30.0)]))
    reference = DenseReference.of(step)
    expected = torch.tensor([[[[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]]]])
    torch.testing.assert_close(reference.weights, expected)
    own = expected * torch.tensor([1 / 2, 1 / 4])[:, None]
    torch.testing.assert_close(reference.group_weights, own.sum(2))
    out = FULL_OUT * torch.tensor([1 / 2, 1 / 4])[:, None]
    torch.testing.assert_close(reference.out[:, 0], out)
    found = quality(reference, step, StepResult(out, None, pick(0, 1, 2, 3)))
    assert found.attention_mass.item() == pytest.approx(1.0)
    assert found.output_rel_error.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("k", "expected"), [(1, [3]), (2, [0, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3])]
)
def test_the_exact_top_k_ranks_by_the_groups_summed_weights(k: int, expected: list[int]) -> None:
    exact = DenseReference.of(step_at(k)).exact(k)
    assert exact[0, 0].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize(
    ("slots", "recall", "mass"),
    [
        ((0, 3), 1.0, (0.5 + 0.8) / 2),
        ((0, 1), 0.5, (0.7 + 0.2) / 2),
        ((1, 2), 0.0, (0.5 + 0.2) / 2),
        ((0, 1, 2, 3), 1.0, 1.0),
    ],
)
def test_recall_and_mass(slots: tuple[int, ...], recall: float, mass: float) -> None:
    assert measured(pick(*slots), 2) == pytest.approx((recall, mass, 0.0, len(slots)), abs=1e-5)


def test_the_output_error_is_relative_to_each_querys_output() -> None:
    out = torch.tensor([[[0.4, 0.0], [0.1, 0.1]]])
    # |(0, 0.3)| / |(0.4, 0.3)| = 0.6 for the first query, 0 for the second
    assert measured(pick(0), 1, out)[2] == pytest.approx(0.3, abs=1e-5)


def test_a_selected_page_counts_as_its_tokens() -> None:
    assert measured(pick(1, unit_size=2), 2) == pytest.approx((0.5, (0.3 + 0.8) / 2, 0.0, 2.0))
    # The second page of three reaches past the last token.
    assert measured(pick(1, unit_size=3), 2) == pytest.approx((0.5, (0.1 + 0.7) / 2, 0.0, 1.0))


def test_padding_in_a_selection_does_not_count() -> None:
    assert measured(pick(3, -1), 1) == pytest.approx((1.0, (0.1 + 0.7) / 2, 0.0, 1.0))
    few = pick(3, 0, count=torch.tensor([[1]], dtype=torch.int32))
    assert measured(few, 1) == pytest.approx((1.0, (0.1 + 0.7) / 2, 0.0, 1.0))


def test_selections_per_query_head_are_measured_per_head() -> None:
    selection = Selection(torch.tensor([[[0, 3], [1, 2]]], dtype=torch.int32))
    # Read are the tokens of both heads.
    expected = ((1.0 + 0.0) / 2, (0.5 + 0.2) / 2, 0.0, 4.0)
    assert measured(selection, 2) == pytest.approx(expected)
    overlapping = Selection(torch.tensor([[[0, 3], [1, 3]]], dtype=torch.int32))
    assert measured(overlapping, 2)[3] == 3


@pytest.mark.parametrize(
    "selection",
    [
        None,
        pick(0, 3),
        pick(1, unit_size=3),
        Selection(torch.tensor([[[0, 3], [1, 3]]], dtype=torch.int32)),
    ],
)
def test_quality_and_counter_agree_on_the_tokens_read(selection: Selection | None) -> None:
    step, result = step_at(2), StepResult(FULL_OUT, None, selection)
    counter = ReadCounter()
    counter.on_step(step, result)
    found = quality(DenseReference.of(step), step, result)
    assert counter.count.density == found.tokens.mean().item() / 4


def test_slots_outside_a_row_are_neither_exact_nor_selected() -> None:
    keys, values = KEYS.repeat(2, 1, 1, 1), VALUES.repeat(2, 1, 1, 1)
    kv_len = torch.tensor([4, 3], dtype=torch.int32)
    cache = CacheView(keys, values, None, kv_len)
    queries = QUERIES.repeat(2, 1, 1, 1)
    reference = DenseReference.of(replace(step_at(4), query_states=queries, cache=cache))
    torch.testing.assert_close(reference.weights[1, 0, 0], torch.tensor([4 / 9, 3 / 9, 2 / 9, 0.0]))
    assert reference.exact(4)[:, 0].tolist() == [[True] * 4, [True, True, True, False]]
    both = Selection(torch.tensor([[[2, 3]], [[2, 3]]], dtype=torch.int32))
    assert both.slots(cache)[:, 0].tolist() == [
        [False, False, True, True],
        [False, False, True, False],
    ]


def test_the_meter_takes_the_mean_over_steps_and_layers() -> None:
    meter = SelectionMeter()
    assert selection_means([meter.values()]) == {
        "recall_at_k": None,
        "attention_mass": None,
        "output_rel_error": None,
    }
    for layer, selection in enumerate((pick(0, 3), pick(0, 1), pick(1, 2))):
        meter.on_step(step_at(2, layer), StepResult(FULL_OUT, None, selection))
    found = selection_means([meter.values()])
    assert found["recall_at_k"] == pytest.approx(0.5)
    assert found["attention_mass"] == pytest.approx((0.65 + 0.45 + 0.35) / 3)
    assert found["output_rel_error"] == pytest.approx(0.0, abs=1e-6)


def test_recall_among_the_prompts_and_the_generated_tokens_apart() -> None:
    # The exact top 2 are slots 0 and 3; the prompt has 3 tokens, so slot 3 was generated.
    meter = SelectionMeter(prompt_tokens=3)
    for layer, selection in enumerate((pick(0, 3), pick(0, 1), pick(1, 2))):
        meter.on_step(step_at(2, layer), StepResult(FULL_OUT, None, selection))
    found = recall_by_part([meter.values()])
    assert found == {
        "recall_prompt": pytest.approx(2 / 3),
        "recall_generated": pytest.approx(1 / 3),
    }
    # Of four tokens that were all read as a prompt, none was generated.
    meter = SelectionMeter(prompt_tokens=4)
    meter.on_step(step_at(2), StepResult(FULL_OUT, None, pick(0, 3)))
    assert recall_by_part([meter.values()]) == {"recall_prompt": None, "recall_generated": None}


def test_the_meter_keeps_what_each_layers_heads_kept_at_the_last_step() -> None:
    meter = SelectionMeter(frozenset({3, 4}), keeps=True)
    for layer, n, selection in ((0, 3, pick(0)), (0, 4, pick(0, 3)), (1, 4, pick(1, 2))):
        context = step_at(2, layer)
        cache = CacheView(KEYS[:, :, :n], VALUES[:, :, :n])
        meter.on_step(replace(context, cache=cache), StepResult(FULL_OUT, None, selection))
    assert {layer: kept.tolist() for layer, kept in meter.kept.items()} == {
        0: [[True, False, False, True]],
        1: [[False, True, True, False]],
    }
    per_query = Selection(torch.tensor([[[0, 1], [1, 3]]], dtype=torch.int32))
    meter.on_step(step_at(2), StepResult(FULL_OUT, None, per_query))
    assert meter.kept[0].tolist() == [[True, True, False, True]]
    assert SelectionMeter().kept == {}
