"""Properties that every method of conf/method must have."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from topkbench.methods.base import (
    PREFILL_NEEDS,
    AnyMethod,
    CacheView,
    Geometry,
    Index,
    Policy,
    Ranking,
    Selection,
    StepContext,
    StepResult,
)
from topkbench.methods.learning import LearningMethod, artifact_spec, check_ready

SCALE = 32**-0.5
States = Callable[..., tuple[Tensor, Tensor, Tensor]]
Build = Callable[..., Any]

FEWER = {
    "magicpig": "its hash tables determine the size of the sample",
    "twilight": "it stops once the mass is reached",
}
"""Why a method may select fewer than ``k`` tokens under the unified protocol."""


@pytest.fixture
def method(name: str, methods: dict[str, AnyMethod]) -> AnyMethod:
    return methods[name]


@pytest.fixture
def selecting(method: AnyMethod) -> AnyMethod:
    if not method.selects:
        pytest.skip(f"{method.name} reads everything")
    return method


@pytest.fixture
def steady(selecting: AnyMethod) -> AnyMethod:
    if selecting.traits.index == "history":
        pytest.skip(f"{selecting.name} has its own test below")
    return selecting


@pytest.fixture
def with_history(selecting: AnyMethod) -> AnyMethod:
    if selecting.traits.index != "history":
        pytest.skip(f"{selecting.name} has the stricter test above")
    return selecting


@pytest.fixture
def of_k(selecting: AnyMethod) -> AnyMethod:
    if selecting.name in FEWER:
        pytest.skip(f"{selecting.name} may select fewer: {FEWER[selecting.name]}")
    return selecting


def full(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return full attention in float64, ``[B, Hq, d]``."""
    logits = queries.double() @ keys.double().mT * SCALE
    return (logits.softmax(-1) @ values.double()).flatten(1, 2)


def kept(selection: Selection, row: int, head: int, start: int, end: int) -> list[int]:
    """Return a head's selected slots, pages expanded."""
    size = selection.unit_size
    units = [u for u in selection.indices[row, head].tolist() if u >= 0]
    offset = start if size > 1 else 0
    slots = [offset + u * size + i for u in units for i in range(size)]
    return [slot for slot in slots if slot < end]


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def untimed(stage: str) -> AbstractContextManager[None]:
    return nullcontext()


@pytest.mark.parametrize("protocol", ["unified", "native"])
@pytest.mark.parametrize("k", [12, 17, 32, 44])
@pytest.mark.parametrize("n", [45, 64])
def test_selects_at_most_k_distinct_slots_in_range(
    selecting: AnyMethod, states: States, build: Build, n: int, k: int, protocol: Any
) -> None:
    queries, keys, values = states(2, n)
    selecting, policy = selecting.resolve(Policy(k=k, protocol=protocol))
    index = build(selecting, keys, values)
    step = selecting.step(index, StepContext(queries, CacheView(keys, values), policy, SCALE))
    assert step.selection is not None
    size = step.selection.unit_size
    may_keep_fewer = selecting.traits.variable_budget and (
        protocol == "native" or selecting.name in FEWER
    )
    exactly = size == 1 and not may_keep_fewer
    # Natively MagicPIG's tables and Twilight's mass determine the number, without a cap.
    uncapped = protocol == "native" and selecting.name in FEWER
    most = n if uncapped else max(k, size)
    heads = step.selection.indices.shape[1]
    for row in range(2):
        for head in range(heads):
            slots = kept(step.selection, row, head, 0, n)
            assert slots == sorted(set(slots))
            assert slots[0] >= 0
            assert slots[-1] < n
            assert len(slots) == k if exactly else len(slots) <= most
    assert step.out.shape == (2, 6, 32)
    for read in step.selection.tokens_read(CacheView(keys, values)).flatten().tolist():
        if heads == 6 and protocol == "native":  # each query head selects k; some are shared
            assert (k if exactly else 1) <= read <= min(n, 3 * most)
        else:
            assert read == k if exactly else 0 < read <= most


@pytest.mark.parametrize("k", [29, 30, 1000])
def test_with_k_at_or_above_n_equals_full_attention(
    method: AnyMethod, states: States, build: Build, k: int
) -> None:
    queries, keys, values = states(2, 29)
    index = build(method, keys, values)
    step = method.step(index, StepContext(queries, CacheView(keys, values), Policy(k=k), SCALE))
    torch.testing.assert_close(step.out.double(), full(queries, keys, values), atol=2e-6, rtol=1e-5)
    if step.selection is not None:
        assert (step.selection.tokens_read(CacheView(keys, values)) == 29).all()


def test_select_keeps_everything_if_k_is_n(of_k: AnyMethod, states: States, build: Build) -> None:
    """Called directly, as step does not ask the method for a budget of all tokens."""
    queries, keys, values = states(2, 64)
    context = StepContext(queries, CacheView(keys, values), Policy(k=64), SCALE)
    selection, _ = of_k.choose(build(of_k, keys, values), context, untimed)
    assert selection.slots(context.cache).all()
    out, _ = of_k.attend(context, selection)
    torch.testing.assert_close(out.double(), full(queries, keys, values), atol=2e-6, rtol=1e-5)


def test_attends_to_its_selection_and_nothing_else(
    selecting: AnyMethod, states: States, build: Build
) -> None:
    queries, keys, values = states(1, 45)
    index = build(selecting, keys, values)
    step = selecting.step(index, StepContext(queries, CacheView(keys, values), Policy(k=16), SCALE))
    assert step.selection is not None
    selection = step.selection
    for head in range(6):
        own = head * selection.indices.shape[1] // 6
        slots = kept(selection, 0, own, 0, 45)
        logits = (queries.flatten(1, 2)[0, head] @ keys[0, head // 3, slots].mT).double() * SCALE
        if selection.log_weight is not None:
            logits += selection.log_weight[0, head, selection.indices[0, own] >= 0]
        part = logits.softmax(-1) @ values[0, head // 3, slots].double()
        remainder = selection.remainder
        if remainder is not None:  # the output's share that belongs to no selected token
            share = remainder.weight[0, head].double()
            part = torch.lerp(part, remainder.value[0, head // 3].double(), share)
        torch.testing.assert_close(step.out[0, head].double(), part, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("start", [None, int32(0, 5, 18)])
@pytest.mark.parametrize("end", [None, int32(40, 38, 33)])
def test_appending_equals_rebuilding(
    steady: AnyMethod, states: States, build: Build, start: Tensor | None, end: Tensor | None
) -> None:
    if steady.traits.index == "prompt":
        pytest.skip(f"{steady.name} fits its index to the prompt")
    queries, keys, values = states(3, 48)
    steps = 8
    n = 40
    index = build(steady, keys[:, :, :n], values[:, :, :n], start, end, capacity=48)
    ends = torch.full((3,), n) if end is None else end.long()
    rows = torch.arange(3)
    for step in range(steps):
        slot = ends + step
        steady.append(index, keys[rows, :, slot, None], values[rows, :, slot, None])
    longer = None if end is None else end + steps
    view = CacheView(keys, values, start, longer)
    rebuilt = build(steady, keys, values, start, longer, capacity=48)
    policy = Policy(k=20)
    once = steady.step(index, StepContext(queries, view, policy, SCALE))
    again = steady.step(rebuilt, StepContext(queries, view, policy, SCALE))
    assert once.selection is not None
    assert again.selection is not None
    assert torch.equal(once.selection.indices, again.selection.indices)
    if once.ranking is not None and again.ranking is not None:
        torch.testing.assert_close(once.ranking.scores, again.ranking.scores)


def test_an_index_after_a_thousand_decoded_tokens_is_that_of_all(
    steady: AnyMethod, states: States, build: Build
) -> None:
    if steady.traits.index == "prompt":
        pytest.skip(f"{steady.name} fits its index to the prompt")
    queries, keys, values = states(1, 1045)
    index = build(steady, keys[:, :, :45], values[:, :, :45], capacity=1045)
    for slot in range(45, 1045):
        one = slice(slot, slot + 1)
        steady.append(index, keys[:, :, one], values[:, :, one])
    rebuilt = build(steady, keys, values, capacity=1045)
    context = StepContext(queries, CacheView(keys, values), Policy(k=64), SCALE)
    once, again = steady.step(index, context), steady.step(rebuilt, context)
    assert once.selection is not None
    assert again.selection is not None
    assert torch.equal(once.selection.indices, again.selection.indices)
    torch.testing.assert_close(once.out, again.out)  # a sum of values is added up in another order


@pytest.mark.parametrize(
    ("start", "end"), [(None, None), (int32(0, 5, 18), None), (None, int32(48, 41, 46))]
)
def test_the_index_of_a_prompt_holds_the_tokens_before_the_current_one(
    selecting: AnyMethod, states: States, build: Build, start: Tensor | None, end: Tensor | None
) -> None:
    if selecting.traits.needs & PREFILL_NEEDS:
        pytest.skip(f"{selecting.name} needs what is captured at prefill")
    queries, keys, values = states(3, 48)
    view = CacheView(keys, values, start, end)
    context = StepContext(queries, view, Policy(k=20), SCALE, layer=1, num_layers=2)
    rows, newest = torch.arange(3), torch.full((3,), 47) if end is None else end.long() - 1
    before = None if end is None else end - 1
    index = selecting.index_prompt(context, 48, {})
    selecting.append(index, *view.newest())
    built = build(selecting, keys[:, :, :47], values[:, :, :47], start, before, capacity=48)
    selecting.append(built, keys[rows, :, newest, None], values[rows, :, newest, None])
    found, wanted = selecting.step(index, context), selecting.step(built, context)
    assert found.selection is not None
    assert wanted.selection is not None
    assert torch.equal(found.selection.indices, wanted.selection.indices)
    assert torch.equal(found.out, wanted.out)


def grown(
    method: AnyMethod,
    keys: Tensor,
    values: Tensor,
    build: Build,
    appended: int,
    start: Tensor | None = None,
    end: Tensor | None = None,
) -> Any:
    """Return an index of 90 slots, or of each row's own, after tokens were appended one by one."""
    index = build(method, keys[:, :, :90], values[:, :, :90], start, end, capacity=96)
    rows = torch.arange(len(keys))
    ends = torch.full((len(keys),), 90) if end is None else end.long()
    for at in (ends + step for step in range(appended)):
        method.append(index, keys[rows, :, at, None], values[rows, :, at, None])
    return index


def restricted_and_grown(
    method: AnyMethod,
    policy: Policy,
    states: States,
    build: Build,
    start: Tensor | None = None,
    end: Tensor | None = None,
) -> Iterator[tuple[StepResult, StepResult]]:
    """Decode at 90 to 96 tokens, by part of an index of 96 tokens and by one of as many."""
    queries, keys, values = states(3, 96)
    whole = grown(method, keys, values, build, 6, start, end)
    for appended in range(7):
        n = 90 + appended
        now = None if end is None else end + appended
        view = CacheView(keys[:, :, :n], values[:, :, :n], start, now)
        context = StepContext(queries, view, policy, SCALE, previous_query=queries.flip(-1))
        yield (
            method.step(whole.first(n), context),
            method.step(grown(method, keys, values, build, appended, start, end), context),
        )


@pytest.mark.parametrize("protocol", ["unified", "native"])
@pytest.mark.parametrize(
    ("start", "end"), [(None, None), (int32(0, 5, 18), None), (None, int32(90, 83, 88))]
)
def test_an_index_restricted_to_its_first_slots_is_the_index_of_fewer_tokens(
    selecting: AnyMethod,
    states: States,
    build: Build,
    start: Tensor | None,
    end: Tensor | None,
    protocol: Any,
) -> None:
    """So known tokens may be appended at once, and each query read its own part."""
    if not selecting.traits.restricts:
        pytest.skip(f"{selecting.name} declares that its index does not restrict")
    method, policy = selecting.resolve(Policy(k=20, protocol=protocol))
    for found, wanted in restricted_and_grown(method, policy, states, build, start, end):
        assert found.selection is not None
        assert wanted.selection is not None
        assert torch.equal(found.selection.indices, wanted.selection.indices)
        assert torch.equal(found.out, wanted.out)
        assert (found.ranking is None) == (wanted.ranking is None)
        if found.ranking is not None and wanted.ranking is not None:
            assert torch.equal(found.ranking.raw_scores, wanted.ranking.raw_scores)
            assert torch.equal(found.ranking.scores, wanted.ranking.scores)


@pytest.mark.parametrize("protocol", ["unified", "native"])
@pytest.mark.parametrize(
    ("start", "end"), [(None, None), (int32(0, 5, 18), None), (None, int32(90, 83, 88))]
)
def test_known_tokens_as_rows_of_one_step_equal_a_step_each(
    selecting: AnyMethod,
    states: States,
    build: Build,
    start: Tensor | None,
    end: Tensor | None,
    protocol: Any,
) -> None:
    """Six queries over one row's cache and index, of which nothing is copied."""
    if not selecting.traits.restricts:
        pytest.skip(f"{selecting.name} declares that its index does not restrict")
    method, policy = selecting.resolve(Policy(k=20, protocol=protocol))
    _, keys, values = states(3, 96)
    index = grown(method, keys, values, build, 6, start, end)
    row = 1
    begin = 90 if end is None else int(end[row])
    first = 0 if start is None else int(start[row])
    ends = list(range(begin + 1, begin + 7))
    queries = states(6, 1, seed=3)[0]
    whole = CacheView(keys, values, start, None if end is None else end + 6)
    view = whole.by_token(row, ends)
    assert view.key_states.data_ptr() == keys[row].data_ptr()
    assert view.key_states.stride(0) == 0
    together = method.step(
        index.by_token(row, ends),
        StepContext(queries, view, policy, SCALE, previous_query=queries.flip(-1)),
    )
    assert together.selection is not None
    for token, n in enumerate(ends):
        one = slice(row, row + 1)
        bounds = (None if bound is None else bound[one] for bound in (start, end))
        alone = grown(method, keys[one], values[one], build, n - begin, *bounds)
        own = CacheView(keys[one, :, :n], values[one, :, :n], None if start is None else start[one])
        query = queries[token : token + 1]
        context = StepContext(query, own, policy, SCALE, previous_query=query.flip(-1))
        step = method.step(alone, context)
        assert step.selection is not None
        for head in range(step.selection.indices.shape[1]):
            assert kept(together.selection, token, head, first, n) == kept(
                step.selection, 0, head, first, n
            )
        assert torch.equal(
            together.selection.take_rows([token]).tokens_read(view.take_rows([token])),
            step.selection.tokens_read(own),
        )
        torch.testing.assert_close(together.out[[token]], step.out, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("running", ["quest", "sparq"])
def test_a_running_index_contains_later_tokens(
    running: str, methods: dict[str, AnyMethod], states: States, build: Build
) -> None:
    """The bounds of the page being filled, and the sum of the values, are those of all tokens."""
    method = methods[running]
    assert (method.traits.index, method.traits.restricts) == ("running", False)
    equal = []
    for found, wanted in restricted_and_grown(method, Policy(k=20), states, build):
        assert found.ranking is not None
        assert wanted.ranking is not None
        same_scores = torch.equal(found.ranking.raw_scores, wanted.ranking.raw_scores)
        equal.append(same_scores and torch.equal(found.out, wanted.out))
    assert equal == [False] * 6 + [True]


@pytest.mark.parametrize("protocol", ["unified", "native"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_history_dependent_row_in_a_batch_equals_the_row_alone(
    with_history: AnyMethod, states: States, build: Build, padded: bool, protocol: Any
) -> None:
    """Eight steps, each of which may change the next; other rows have no influence."""
    with_history, policy = with_history.resolve(Policy(k=20, protocol=protocol))
    queries, keys, values = states(3, 48)
    starts = int32(0, 5, 18) if padded else None
    ends = None if padded else int32(40, 38, 33)
    rows = [(0, 40), (5, 40), (18, 40)] if padded else [(0, 40), (0, 38), (0, 33)]
    index = build(with_history, keys[:, :, :40], values[:, :, :40], starts, ends, capacity=48)
    alone = [
        build(with_history, keys[[row], :, start:end], values[[row], :, start:end], capacity=48)
        for row, (start, end) in enumerate(rows)
    ]
    for done in range(1, 9):
        now = None if ends is None else ends + done
        slots = [end + done - 1 for _, end in rows]
        view = CacheView(keys[:, :, : 40 + done], values[:, :, : 40 + done], starts, now)
        newest = (keys[[0, 1, 2], :, slots, None], values[[0, 1, 2], :, slots, None])
        with_history.append(index, *newest)
        together = with_history.step(index, StepContext(queries, view, policy, SCALE))
        for row, (start, end) in enumerate(rows):
            own = (keys[[row], :, start : end + done], values[[row], :, start : end + done])
            with_history.append(alone[row], own[0][:, :, -1:], own[1][:, :, -1:])
            step = with_history.step(
                alone[row], StepContext(queries[[row]], CacheView(*own), policy, SCALE)
            )
            torch.testing.assert_close(together.out[[row]], step.out, atol=2e-6, rtol=1e-5)
            assert step.selection is not None
            assert together.selection is not None
            slots_alone = step.selection.slots(CacheView(*own))
            found = together.selection.slots(view)[[row], :, start : end + done]
            assert torch.equal(found, slots_alone)


def test_appending_without_a_step_adds_no_history(
    with_history: AnyMethod, states: States, build: Build
) -> None:
    """Tokens are appended without steps in between.

    A method that ranks by column sums then selects as if its index were built later, with the sums
    of the prompt only. Others keep the newest tokens; of the prompt SnapKV keeps the same tokens as
    before, and MagicPIG has the same scores (its draws among ties change with the length).
    """
    queries, keys, values = states(2, 55)
    index = build(with_history, keys[:, :, :40], values[:, :, :40], capacity=55)
    for at in range(40, 55):  # more than H2O's recents, which are half of k
        with_history.append(index, keys[:, :, at, None], values[:, :, at, None])
    view, policy = CacheView(keys, values), Policy(k=24, num_recent=0)
    found = with_history.step(index, StepContext(queries, view, policy, SCALE))
    assert found.selection is not None
    if "column_sums" in with_history.traits.needs:
        later = build(with_history, keys, values, captured=40)
        wanted = with_history.step(later, StepContext(queries, view, policy, SCALE))
        assert wanted.selection is not None
        assert torch.equal(found.selection.slots(view), wanted.selection.slots(view))
        return
    assert found.selection.slots(view)[:, :, 40:].all()
    read = build(with_history, keys[:, :, :40], values[:, :, :40])
    prompt = CacheView(keys[:, :, :40], values[:, :, :40])
    wanted = with_history.step(read, StepContext(queries, prompt, replace(policy, k=9), SCALE))
    assert wanted.selection is not None
    if found.ranking is not None and wanted.ranking is not None:
        assert torch.equal(found.ranking.scores[..., :40], wanted.ranking.scores)
        assert (found.ranking.scores[..., 40:] == 0).all()
        return
    kept = found.selection.slots(view)[:, :, :40]
    assert torch.equal(kept, wanted.selection.slots(prompt))


@pytest.mark.parametrize("ends", [None, int32(40, 33, 38)])
def test_an_undone_append_can_be_repeated(
    selecting: AnyMethod, states: States, build: Build, ends: Tensor | None
) -> None:
    queries, keys, values = states(3, 41)
    before = None if ends is None else ends - 1
    index = build(selecting, keys[:, :, :40], values[:, :, :40], None, before, capacity=41)
    slots = torch.full((3,), 40) if ends is None else ends.long() - 1
    newest = (keys[torch.arange(3), :, slots, None], values[torch.arange(3), :, slots, None])
    view = CacheView(keys, values, None, ends)
    steps = []
    for _ in range(3):
        selecting.append(index, *newest)
        steps.append(selecting.step(index, StepContext(queries, view, Policy(k=20), SCALE)))
        index.undo_append()
    assert torch.equal(steps[0].out, steps[2].out)
    assert steps[0].selection is not None
    assert torch.equal(steps[0].selection.indices, steps[2].selection.indices)


@pytest.mark.parametrize("ends", [None, int32(40, 33, 38)])
def test_rows_taken_select_what_they_selected(
    selecting: AnyMethod, states: States, build: Build, ends: Tensor | None
) -> None:
    """A cache's rows may be reordered, repeated or left out, and the index takes them along."""
    (queries, keys, values), rows = states(3, 40), torch.tensor([2, 0, 0, 1])
    steps = []
    for taken in (torch.arange(3), rows):
        index = build(selecting, keys, values, None, ends, capacity=41)
        if len(taken) > 3:
            for shared in {id(one): one for one in vars(index).values()}.values():
                if hasattr(shared, "take_rows") and not isinstance(shared, Index):
                    shared.take_rows(taken)
            index.take_rows(taken)
        view = CacheView(keys[taken], values[taken], None, None if ends is None else ends[taken])
        steps.append(selecting.step(index, StepContext(queries[taken], view, Policy(k=20), SCALE)))
    before, after = steps
    torch.testing.assert_close(after.out, before.out[rows])
    assert before.selection is not None
    assert after.selection is not None
    kept_before = before.selection.slots(CacheView(keys, values, None, ends))
    assert torch.equal(after.selection.slots(view), kept_before[rows])


def test_appending_beyond_capacity_is_refused(
    selecting: AnyMethod, states: States, build: Build
) -> None:
    _, keys, values = states(1, 20)
    index = build(selecting, keys, values, capacity=20)
    with pytest.raises(ValueError, match="room for one slot more, got capacity=20"):
        selecting.append(index, keys[:, :, :1], values[:, :, :1])


@pytest.mark.parametrize("protocol", ["unified", "native"])
@pytest.mark.parametrize("appended", [False, True])
def test_finds_a_planted_needle(
    selecting: AnyMethod, states: States, build: Build, appended: bool, protocol: Any
) -> None:
    """A needle in the prompt, or among decoded tokens that are no longer recent."""
    selecting, policy = selecting.resolve(Policy(k=48, protocol=protocol))
    queries, keys, values = states(1, 300)
    # One direction that all queries of a group share, and one key along it.
    direction = torch.nn.functional.normalize(queries[:, :, :1], dim=-1)
    queries = 3 * direction + 0.3 * queries
    needle, n = (273, 260) if appended else (137, 300)
    keys[:, :, needle] = 16 * direction[:, :, 0]
    index = build(selecting, keys[:, :, :n], values[:, :, :n], capacity=300)
    for at in range(n, 300):
        selecting.append(index, keys[:, :, at, None], values[:, :, at, None])
    view = CacheView(keys, values)
    step = selecting.step(index, StepContext(queries, view, policy, SCALE))
    assert step.selection is not None
    if step.ranking is None:
        pytest.skip(f"{selecting.name} does not use the query")
    found = step.selection.slots(view)[..., needle]
    if selecting.name == "hash_attention":  # one head's 32 bits, trained briefly, may miss it
        found = found.unflatten(1, (2, -1)).any(2)
    assert found.all()


@pytest.mark.parametrize("protocol", ["unified", "native"])
@pytest.mark.parametrize("k", [20, 100])
def test_constant_values_give_a_constant_output(
    method: AnyMethod, states: States, build: Build, k: int, protocol: Any
) -> None:
    """All weights, including log weights and remainders, sum to one; padding has none."""
    method, policy = method.resolve(Policy(k=k, protocol=protocol))
    queries, keys, values = states(3, 90)
    starts = int32(0, 31, 74)
    constant = torch.linspace(-2, 3, 32)
    values[:] = constant
    for row, start in enumerate(starts.tolist()):
        values[row, :, :start] = 1e3
    index = build(method, keys[:, :, :85], values[:, :, :85], starts, capacity=90)
    for at in range(85, 90):
        method.append(index, keys[:, :, at, None], values[:, :, at, None])
    out = method.step(
        index, StepContext(queries, CacheView(keys, values, starts), policy, SCALE)
    ).out
    torch.testing.assert_close(out, constant.expand_as(out), atol=1e-5, rtol=1e-5)


def test_keeps_sinks_and_the_current_token(
    selecting: AnyMethod, states: States, build: Build
) -> None:
    queries, keys, values = states(2, 300)
    index = build(selecting, keys, values)
    step = selecting.step(index, StepContext(queries, CacheView(keys, values), Policy(k=64), SCALE))
    assert step.selection is not None
    for row in range(2):
        for head in range(2):
            slots = kept(step.selection, row, head, 0, 300)
            assert {0, 1, 2, 3, 299} <= set(slots)
            if step.selection.unit_size == 1:
                assert set(range(292, 300)) <= set(slots)


@pytest.mark.parametrize("protocol", ["unified", "native"])
@pytest.mark.parametrize("k", [16, 22, 40])
def test_other_rows_and_padding_do_not_matter(
    method: AnyMethod, states: States, build: Build, k: int, protocol: Any
) -> None:
    """Rows of 17, 50 and 33 tokens give the same left-aligned, left-padded and alone."""
    method, policy = method.resolve(Policy(k=k, protocol=protocol))
    queries, keys, values = states(3, 50)
    lengths = (17, 50, 33)
    ends = int32(*lengths)
    aligned = build(method, keys, values, None, ends)
    in_batch = method.step(
        aligned, StepContext(queries, CacheView(keys, values, None, ends), policy, SCALE)
    )

    starts = int32(*(50 - length for length in lengths))
    moved_keys, moved_values = torch.full_like(keys, 9.0), torch.full_like(values, 9.0)
    for row, length in enumerate(lengths):
        moved_keys[row, :, 50 - length :] = keys[row, :, :length]
        moved_values[row, :, 50 - length :] = values[row, :, :length]
    padded = build(method, moved_keys, moved_values, starts, None)
    view = CacheView(moved_keys, moved_values, starts, None)
    left_padded = method.step(padded, StepContext(queries, view, policy, SCALE))

    for row, length in enumerate(lengths):
        own = slice(row, row + 1)
        cut = (keys[own, :, :length], values[own, :, :length])
        alone = method.step(
            build(method, *cut), StepContext(queries[own], CacheView(*cut), policy, SCALE)
        )
        torch.testing.assert_close(in_batch.out[own], alone.out, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(left_padded.out[own], alone.out, atol=2e-6, rtol=1e-5)
        if alone.selection is None or in_batch.selection is None or left_padded.selection is None:
            continue
        for head in range(alone.selection.indices.shape[1]):
            slots = kept(alone.selection, 0, head, 0, length)
            assert kept(in_batch.selection, row, head, 0, length) == slots
            first = 50 - length
            moved = [slot - first for slot in kept(left_padded.selection, row, head, first, 50)]
            assert moved == slots


def test_the_same_seed_gives_the_same_output(
    name: str, make_method: Callable[..., AnyMethod], states: States, build: Build
) -> None:
    queries, keys, values = states(1, 45)
    outputs = []
    for _ in range(2):
        method = make_method(name)
        index = build(method, keys, values)
        view = CacheView(keys, values)
        outputs.append(method.step(index, StepContext(queries, view, Policy(k=16), SCALE)).out)
    assert torch.equal(*outputs)


def test_inputs_are_not_modified(method: AnyMethod, states: States, build: Build) -> None:
    queries, keys, values = states(2, 45)
    before = [tensor.clone() for tensor in (queries, keys, values)]
    kv_len = int32(45, 30)
    index = build(method, keys, values, None, kv_len)
    method.step(
        index, StepContext(queries, CacheView(keys, values, None, kv_len), Policy(k=16), SCALE)
    )
    method.append(index, keys[:, :, :1], values[:, :, :1])
    for tensor, copy in zip((queries, keys, values), before, strict=True):
        assert torch.equal(tensor, copy)
    assert kv_len.tolist() == [45, 30]


def test_permuting_keys_permutes_scores(
    name: str, make_method: Callable[..., AnyMethod], states: States, build: Build
) -> None:
    method = make_method(name)
    if hasattr(method, "page_size"):
        method = make_method(name, page_size=1)
    elif hasattr(getattr(method, "base", None), "page_size"):
        method = make_method(name, base={"page_size": 1})
    queries, keys, values = states(2, 45)
    order = torch.randperm(45, generator=torch.Generator().manual_seed(1))
    first, second = build(method, keys, values), build(method, keys[:, :, order], values)
    # Four times k are fewer than the 45 tokens, so that Twilight's base ranks them.
    policy = Policy(k=10, num_sink=0, num_recent=0)
    found = []
    for index, at in ((first, torch.arange(45)), (second, order)):
        view = CacheView(keys[:, :, at], values[:, :, at])
        ranking = method.step(index, StepContext(queries, view, policy, SCALE)).ranking
        if ranking is None:
            pytest.skip(f"{name} has no scores")
        found.append(ranking.raw_scores)
    plain, moved = found
    torch.testing.assert_close(moved, plain[..., order])


@pytest.mark.parametrize("protocol", ["unified", "native"])
@pytest.mark.parametrize(("k", "other"), [(20, 16), (16, 20), (16, 40)])
def test_a_step_given_the_ranking_of_another_budget_equals_the_step_itself(
    selecting: AnyMethod, states: States, build: Build, k: int, other: int, protocol: Any
) -> None:
    queries, keys, values = states(2, 100)
    stages: list[str] = []

    def watch(stage: str) -> AbstractContextManager[None]:
        stages.append(stage)
        return nullcontext()

    def step(k: int, given: Ranking[Any] | None = None) -> StepResult:
        method, policy = selecting.resolve(Policy(k=k, protocol=protocol))
        context = StepContext(queries, CacheView(keys, values), policy, SCALE)
        return method.step(build(method, keys, values), context, watch, given)

    ranking = step(other).ranking
    if ranking is None:
        pytest.skip(f"{selecting.name} has no scores, or its base selects everything")
    alone = step(k)
    stages.clear()
    found = step(k, ranking)
    assert stages[-2:] == ["select", "attend"]
    assert not {"encode", "score"} & set(stages)
    assert torch.equal(found.out, alone.out)
    assert found.selection is not None
    assert alone.selection is not None
    assert torch.equal(found.selection.indices, alone.selection.indices)
    if found.ranking is not None and alone.ranking is not None:
        assert torch.equal(found.ranking.scores, alone.ranking.scores)


def test_select_at_k_one_below_n(of_k: AnyMethod, states: States, build: Build) -> None:
    """The single token or page that is dropped is the worst that is not forced."""
    queries, keys, values = states(2, 64)
    context = StepContext(queries, CacheView(keys, values), Policy(k=63), SCALE)
    step = of_k.step(build(of_k, keys, values), context)
    selection = step.selection
    assert selection is not None
    for row in range(2):
        for head in range(2):
            units = 64 // selection.unit_size
            missing = set(range(units)) - set(selection.indices[row, head].tolist())
            assert len(missing) == 1
            free = range(4, 56) if units == 64 else range(1, units - 1)
            if step.ranking is None:
                if of_k.name == "streaming_llm":
                    assert missing == {4}  # the oldest token that is not a sink
                assert missing <= set(free)
                continue
            # Of equal scores the lower index wins, so the highest is dropped.
            scores = step.ranking.scores[row, head].tolist()
            worst = min(free, key=lambda u: (scores[u], -u))
            assert missing == {worst}


def side_bytes(index: Index) -> int:
    """Count the bytes of side information in an index and in indices inside it."""
    total = 0
    for field in fields(index):
        value = getattr(index, field.name)
        if isinstance(value, Index):
            total += side_bytes(value)
        if isinstance(value, Tensor) and value.ndim >= 3 and value.shape[0] == 1:
            total += value.nbytes
    return total


@pytest.mark.parametrize("protocol", ["unified", "native"])
def test_index_bytes_equal_the_formula(
    selecting: AnyMethod, geometry: Geometry, states: States, build: Build, protocol: Any
) -> None:
    selecting, _ = selecting.resolve(Policy(k=32, protocol=protocol))
    _, keys, values = states(1, 45)
    sizes = [
        # The difference leaves out what does not grow with the length, as a codebook or a mean.
        side_bytes(build(selecting, keys, values, capacity=capacity))
        for capacity in (64, 128)
    ]
    assert sizes[1] - sizes[0] == 64 * selecting.index_bytes_per_token(geometry)


def test_reads_more_with_more_tokens_and_less_than_full(
    selecting: AnyMethod, methods: dict[str, AnyMethod], geometry: Geometry
) -> None:
    everything = methods["full"].bytes_read(geometry, 4096, 4096)
    if selecting.name in ("exact", "block_oracle"):  # they read every key
        assert everything // 2 < selecting.bytes_read(geometry, 4096, 256) < everything
    else:
        assert selecting.bytes_read(geometry, 4096, 256) < everything // 2
    fewer = selecting.bytes_read(geometry, 4096, 64)
    assert fewer < selecting.bytes_read(geometry, 4096, 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_and_auto_agree(
    name: str,
    make_method: Callable[..., AnyMethod],
    states: States,
    build: Build,
    dtype: torch.dtype,
) -> None:
    queries, keys, values = (tensor.to(dtype) for tensor in states(2, 45))
    outputs = []
    for impl in ("auto", "reference"):
        method = make_method(name)
        method.impl = impl  # type: ignore[assignment]
        index = build(method, keys, values)
        view = CacheView(keys, values)
        outputs.append(
            method.step(index, StepContext(queries, view, Policy(k=16), SCALE)).out.float()
        )
    tolerance = 2e-6 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(*outputs, atol=tolerance, rtol=tolerance)


def test_the_native_policy_is_valid(method: AnyMethod) -> None:
    unified = Policy(k=64)
    native = method.resolve(replace(unified, protocol="native"))[1]
    assert method.resolve(unified)[1] == unified
    assert native.k == 64
    assert native.protocol == "native"
    if method.selects:  # without the YAML file's values it would equal the unified policy
        assert replace(native, protocol="unified") != unified


@pytest.mark.parametrize("protocol", ["unified", "native"])
def test_resolving_twice_changes_nothing(method: AnyMethod, protocol: Any) -> None:
    once, policy = method.resolve(Policy(k=64, protocol=protocol))
    twice, same = once.resolve(policy)
    assert same == policy
    assert repr(twice) == repr(once)  # the settings, also those of a method inside


def test_scores_of_a_kv_head_cannot_select_per_query_head(
    selecting: AnyMethod, geometry: Geometry, states: States, build: Build
) -> None:
    if not selecting.traits.per_kv_head:
        pytest.skip(f"{selecting.name} does not declare that its scores are per KV head")
    policy = Policy(k=20, head_scope="query_head")
    reason = f"head_scope must be kv_head for {selecting.name}, which selects per KV head"
    assert (selecting.unsupported_reason(geometry, policy) or "").startswith(reason)
    queries, keys, values = states(1, 45)
    context = StepContext(queries, CacheView(keys, values), policy, SCALE)
    with pytest.raises(ValueError, match=reason):
        selecting.step(build(selecting, keys, values), context)


def test_native_policy_selects(selecting: AnyMethod, states: States, build: Build) -> None:
    queries, keys, values = states(2, 64)
    selecting, policy = selecting.resolve(Policy(k=32, protocol="native"))
    index = build(selecting, keys, values)
    step = selecting.step(index, StepContext(queries, CacheView(keys, values), policy, SCALE))
    assert step.selection is not None
    heads = 6 if policy.head_scope == "query_head" else 2
    assert step.selection.indices.shape[1] == heads
    # Three query heads that select separately read the union.
    read = step.selection.tokens_read(CacheView(keys, values))
    assert (read >= (1 if selecting.traits.variable_budget else 32)).all()
    assert (read <= (64 if heads == 6 else 32)).all()


def test_supports_an_ordinary_model(method: AnyMethod, geometry: Geometry) -> None:
    assert method.unsupported_reason(geometry) is None
    check_ready(method, geometry)


def test_an_artifact_matches_its_layout(
    name: str, make_method: Callable[..., AnyMethod], geometry: Geometry
) -> None:
    fitted = make_method(name)
    if not isinstance(fitted, LearningMethod):
        assert artifact_spec(fitted, geometry) is None
        return
    layout = fitted.artifact_layout(geometry)
    assert bool(layout) == (fitted.artifact_spec(geometry) is not None)
    whole = fitted.artifact
    for tensor, shape in layout.items():
        assert tuple(whole[tensor].shape) == shape
        others = {key: value for key, value in whole.items() if key != tensor}
        for wrong, found in ((whole[tensor][:1], "float32"), (whole[tensor].double(), "float64")):
            fitted.artifact = {**others, tensor: wrong}
            with pytest.raises(ValueError, match=rf"must hold {tensor} as .* got torch\.{found}"):
                check_ready(fitted, geometry)
        fitted.artifact = {**others, "something": torch.zeros(1)}
        with pytest.raises(ValueError, match=f"must hold {tensor} as .* got none; fit it on this"):
            check_ready(fitted, geometry)


def test_query_positions_are_fixed_and_equally_many_in_each_layer(
    name: str, make_method: Callable[..., AnyMethod], geometry: Geometry
) -> None:
    method = make_method(name)
    if not isinstance(method, LearningMethod) or method.artifact_spec(geometry) is None:
        pytest.skip(f"{name} learns nothing")
    lengths = [33, 1, 48]
    named = [method.query_positions(layer, lengths) for layer in range(2)]
    assert named == [method.query_positions(layer, lengths) for layer in range(2)]
    for positions in named:  # memory is planned for the same number in each layer
        assert [len(at) for at in positions] == [len(at) for at in named[0]]
        assert all(0 <= place < n for at, n in zip(positions, lengths, strict=True) for place in at)
