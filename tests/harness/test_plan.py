"""What a plan extends from a few measured steps, and what it knows without measuring."""

from pathlib import Path

import pytest

from topkbench.harness.card import Card
from topkbench.harness.decoding import Prompt
from topkbench.harness.pilot import Cost, PrefillTimes, Trial, at_length, copies
from topkbench.harness.plan import answered_share, measured_prompts, shared, worker_counts
from topkbench.harness.samples import Sample
from topkbench.harness.sweep import Steps, decode_steps
from topkbench.harness.task import pilot_sizes
from topkbench.methods.h2o import H2O


def prompt(name: str, prefilled: int, answer: int, subtask: str = "vt") -> Prompt:
    sample = Sample(
        sample_id=name,
        subtask=subtask,
        context="",
        question="",
        answer_prefix="",
        answers=(),
        max_new_tokens=answer,
        length=None,
    )
    return Prompt(sample, tuple(range(prefilled)), (1, 2, 3))


def test_a_prefill_has_a_linear_and_a_quadratic_part() -> None:
    # 0.01 s a token, and 0.0001 s a pair of tokens.
    times = PrefillTimes([(100, Cost(2.0, 2.0)), (200, Cost(6.0, 6.0))])
    assert times.of(400).cpu_s == pytest.approx(4 + 16)
    assert times.of(100).wall_s == pytest.approx(2)
    alike = PrefillTimes([(100, Cost(2.0, 1.0)), (105, Cost(2.1, 1.05))])
    assert alike.of(110).cpu_s == pytest.approx(2.2)
    faster = PrefillTimes([(100, Cost(2.0, 2.0)), (200, Cost(2.0, 2.0))])  # no such parts fit
    assert faster.of(100).cpu_s == pytest.approx(1.5)


def test_a_part_at_another_length_is_on_a_line_through_two() -> None:
    short = Trial(100, 4, Cost(1.0, 1.0), 12, Cost(0.1, 0.1), 50)
    long = Trial(300, 4, Cost(2.0, 3.0), 12, Cost(0.2, 0.2), 90)
    between = at_length([short, long], 200)
    assert (between.cost.cpu_s, between.cost.wall_s) == pytest.approx((1.5, 2.0))
    assert between.per_forward.cpu_s == pytest.approx(0.15)
    assert at_length([long], 100) == long


def test_the_rows_of_a_cell_are_known_from_two_if_they_grow_with_their_size() -> None:
    sizes = [4096, 8192, 16384, 32768, 65536, 131072]
    chosen = pilot_sizes(sizes)
    assert [sizes[place] for place, _ in chosen] == [4096, 32768]
    line = sum(weight * (3 + 0.5 * sizes[place]) for place, weight in chosen)
    assert line == pytest.approx(sum(3 + 0.5 * size for size in sizes))
    assert pilot_sizes([64, 128]) == [(0, 1.0), (1, 1.0)]
    assert pilot_sizes([]) == []


def test_decode_steps_are_counted_by_row_and_by_forward() -> None:
    # The last token of an answer is not fed back.
    questions, answers = [5, 3], [8, 4]
    assert decode_steps("together", questions, answers) == Steps(1 + 7, own=5 + 7 + 3 + 3)
    assert decode_steps("together", [0, 0], answers) == Steps(7, own=7 + 3)
    assert H2O(mode="compact").known_tokens(questions) == "one by one"
    assert decode_steps("one by one", questions, answers) == Steps(5 + 7, own=18)


def test_workers_take_the_longest_batches_first() -> None:
    units = [Cost(1.0, seconds) for seconds in (1.0, 4.0, 2.0, 3.0)]
    assert shared(units, 1, Cost(5.0, 10.0)) == Cost(9.0, 20.0)
    assert shared(units, 2, Cost(5.0, 10.0)) == Cost(14.0, 15.0)
    assert worker_counts(5) == [1, 2, 4]
    assert worker_counts(0) == [1]
    assert worker_counts(10_000)[-1] == 64


def test_a_card_is_bound_by_its_operations_or_its_bandwidth() -> None:
    card = Card(name="any", bf16_tflops=100, bandwidth_gb_s=1000, memory_gb=80)
    assert card.seconds(operations=2e14, num_bytes=1e12) == pytest.approx(2)
    assert card.seconds(operations=1e14, num_bytes=3e12) == pytest.approx(3)


def test_few_prompts_are_measured_and_answered() -> None:
    prompts = [prompt(f"{i}", 100 + i, 8, f"task {i % 4}") for i in range(20)]
    ends, others = measured_prompts(prompts)
    assert [one.sample.sample_id for one in ends] == ["10"]
    assert [one.sample.sample_id for one in others] == ["0", "1"]  # a tenth
    lengths = [prompt("long", 400, 8), prompt("short", 100, 8), prompt("middle", 200, 8)]
    ends, others = measured_prompts(lengths)
    assert [one.sample.sample_id for one in ends] == ["short", "long"]
    assert others == []


def test_answers_are_expected_to_be_as_long_as_the_longest_known_one() -> None:
    prompts = [prompt("a", 10, 10), prompt("b", 10, 20), prompt("c", 10, 4)]
    # The step in which an answer ends counts.
    assert answered_share({"a": [1] * 4, "b": [1] * 5}, prompts) == pytest.approx(0.5)
    assert answered_share({"c": [1] * 4}, prompts) == 1
    assert answered_share({}, prompts) is None


def test_copies_of_a_prompt_are_samples_of_their_own(tmp_path: Path) -> None:
    one = prompt("a", 10, 10)
    assert copies(one, 1) == [one]
    short = copies(one, 3, 4)
    assert [row.sample.max_new_tokens for row in short] == [4, 4, 4]
    assert len({row.sample.sample_id for row in short}) == 3
    assert {row.prefill_ids for row in short} == {one.prefill_ids}
