from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topkbench.analysis.comparison import stats
from topkbench.analysis.record.row import Row, Status


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(100, 100, 0.9630, 1.0), (0, 100, 0.0, 0.0370), (5, 10, 0.2366, 0.7634), (1, 1, 0.2065, 1.0)],
)
def test_wilsons_interval_as_published(successes: int, n: int, low: float, high: float) -> None:
    assert stats.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilsons_interval_refuses_invalid_counts() -> None:
    for successes, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="successes must lie in 0 to n"):
            stats.wilson(successes, n)


def test_binary_scores_get_wilsons_interval_and_partial_credit_a_bootstrap() -> None:
    assert stats.score_interval([100.0] * 5 + [0.0] * 5)[:3] == pytest.approx(
        (50.0, 23.66, 76.34), abs=0.01
    )
    found = stats.score_interval([0.0, 50.0, 50.0, 100.0] * 25)
    # standard error of the mean: sd 35.36 over 10
    assert found.low == pytest.approx(50 - 1.96 * 3.536, abs=0.6)
    assert found.high == pytest.approx(50 + 1.96 * 3.536, abs=0.6)


def test_the_mean_gives_sub_tasks_equal_weight() -> None:
    found = stats.score_interval([100.0] * 30 + [0.0, 100.0] * 5, ["a"] * 30 + ["b"] * 10)
    assert found.estimate == 75.0
    assert found.n == 40


def test_resampling_stays_within_sub_tasks() -> None:
    scores = [100.0] * 50 + [0.0] * 49 + [100.0]
    strata = ["easy"] * 50 + ["hard"] * 50
    within = stats.score_interval(scores, strata)
    across = stats.score_interval([*scores[:-1], 50.0])
    # Half of Wilson's width of 50 correct samples, without the spread between the sub-tasks.
    assert within.high - within.low < 10 < across.high - across.low


def test_equal_samples_do_not_give_certainty() -> None:
    same = stats.paired_interval([100.0] * 25, [100.0] * 25)
    assert same.estimate == 0.0
    assert (same.low, same.high) == pytest.approx((-13.32, 13.32), abs=0.01)
    perfect = stats.score_interval([100.0] * 20, ["a"] * 10 + ["b"] * 10)
    assert perfect.high == 100.0
    assert perfect.low == pytest.approx(83.89, abs=0.01)


def test_pairing_narrows_the_interval() -> None:
    full = np.array([100.0, 0.0] * 50)
    method = full.copy()
    method[:13:2] = 0.0
    paired = stats.paired_interval(method, full)
    assert paired.estimate == -7.0
    assert paired.excludes_zero
    # 7 lost of 103.84: -6.74, and 1.96 standard errors of sqrt(7 * 93 / 99 + 3.84) / 103.84
    assert paired[1:3] == pytest.approx((-12.83, -0.65), abs=0.01)
    unpaired = stats.score_interval(method)
    assert paired.high - paired.low < unpaired.high - unpaired.low


def test_a_method_that_differs_nowhere_has_the_narrowest_interval() -> None:
    """A small difference in one of 12 samples, or a whole one, widens it."""
    widths = []
    for lost in (0.0, 12.5, 50.0, 100.0):
        found = stats.paired_interval([100.0 - lost] + [100.0] * 11, [100.0] * 12)
        widths.append(found.high - found.low)
    assert widths[0] == pytest.approx(2 * 24.25, abs=0.01)  # 3.84 / (12 + 3.84)
    assert widths == sorted(widths)
    assert widths[-1] > widths[0] + 5
    one, seven = (
        stats.paired_interval([50.0] * 175, [50.0] * 175, strata)
        for strata in (None, np.repeat(list("abcdefg"), 25))
    )
    assert one == pytest.approx(seven)


@pytest.mark.parametrize(("lost", "excludes"), [(4, False), (5, False), (6, True)])
def test_a_difference_excludes_zero_where_the_exact_test_does(lost: int, excludes: bool) -> None:
    """McNemar's exact test has p = 0.125, 0.0625 and 0.031 for 4, 5 and 6 lost and none won."""
    method = np.array([0.0] * lost + [100.0] * (20 - lost))
    assert stats.paired_interval(method, [100.0] * 20).excludes_zero is excludes


@pytest.mark.parametrize(
    ("lost", "won", "n"),
    [(0.02, 0.01, 25), (0.002, 0.0, 25), (0.1, 0.1, 25), (0.3, 0.02, 10), (0.5, 0.5, 4)],
)
def test_the_paired_interval_covers_the_true_difference(lost: float, won: float, n: int) -> None:
    """Of 400 tables of 7 sub-tasks, 95% or more hold the true difference."""
    generator = np.random.default_rng(5)
    strata = np.repeat([str(i) for i in range(7)], n)
    covered = 0
    for _ in range(400):
        drawn = generator.random(7 * n)
        difference = np.where(drawn < lost, -100.0, np.where(drawn > 1 - won, 100.0, 0.0))
        found = stats.paired_interval(difference, np.zeros(7 * n), strata)
        covered += found.low <= 100 * (won - lost) <= found.high
    assert covered >= 376


@given(st.lists(st.sampled_from([0.0, 25.0, 50.0, 100.0]), min_size=1, max_size=40))
def test_an_interval_contains_its_estimate_and_stays_in_range(scores: list[float]) -> None:
    found = stats.score_interval(scores, resamples=200)
    assert 0 <= found.low <= found.estimate <= found.high <= 100
    assert found == stats.score_interval(scores, resamples=200)


def test_many_samples_are_resampled_in_parts() -> None:
    scores = np.arange(600) % 5 * 25.0
    found = stats.score_interval(scores, resamples=1000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 35.36 / np.sqrt(600), rel=0.15)


def test_invalid_values_give_an_error_of_one_sentence() -> None:
    for values in ([], [np.nan], [[1.0]]):
        with pytest.raises(ValueError, match="one or more finite numbers"):
            stats.bootstrap(values, bounds=(0, 100))
    with pytest.raises(ValueError, match="one shape"):
        stats.paired_interval([1.0], [1.0, 2.0])


def test_the_interval_of_a_fraction_is_on_its_scale() -> None:
    certain = stats.bootstrap([1.0] * 14, bounds=(0.0, 1.0), scale=1.0)
    assert (certain.estimate, certain.high) == (1.0, 1.0)
    assert certain.low == pytest.approx(1 - stats.wilson(0, 14)[1])


def test_the_means_interval_covers_its_mean_where_sub_tasks_are_saturated() -> None:
    """Of 200 tables of 7 sub-tasks with 25 samples, about 95% hold the true mean."""
    generator = np.random.default_rng(3)
    shares = (0.98, 0.95, 0.98, 0.5, 0.02, 0.05, 0.02)
    strata = np.repeat([str(i) for i in range(7)], 25)
    covered = 0
    for _ in range(200):
        right = np.concatenate([generator.random(25) < share for share in shares])
        found = stats.score_interval(100.0 * right, strata, resamples=1000)
        covered += found.low <= 100 * np.mean(shares) <= found.high
    assert covered >= 186


def sample(name: str, subtask: str, score: float, **more: object) -> dict[str, object]:
    return {"sample_id": name, "subtask": subtask, "score": score, "references": ["r"], **more}


def test_paired_columns_by_sub_task_and_mean() -> None:
    full = [sample(str(i), t, 100.0) for t in ("a", "b") for i in range(4)]
    mine = [sample(str(i), "a", 100.0) for i in range(4)]
    mine += [sample(str(i), "b", 100.0 if i else 0.0) for i in reversed(range(4))]
    found = stats.paired_columns(mine, full)
    assert list(found) == ["a", "b", "mean"]
    assert found["a"]["delta_full"] == 0.0
    assert found["b"]["delta_full"] == -25.0
    assert found["mean"]["delta_full"] == -12.5
    assert found["mean"]["score"] == 87.5
    assert set(found["mean"]) == {
        "score",
        "score_ci_low",
        "score_ci_high",
        "delta_full",
        "delta_ci_low",
        "delta_ci_high",
        "turn_change",
        "turn_change_ci_low",
        "turn_change_ci_high",
    }


def test_without_full_attention_there_is_only_the_score() -> None:
    mine = [sample("0", "a", 100.0), sample("1", "a", 0.0)]
    assert stats.paired_columns(mine, None)["a"]["delta_full"] is None
    missing = stats.paired_columns([*mine, sample("2", "b", 0.0)], mine)
    assert missing["a"]["delta_full"] == 0.0
    assert missing["mean"]["delta_full"] is None
    assert stats.paired_columns([], mine) == {}


def test_different_samples_are_not_paired() -> None:
    with pytest.raises(ValueError, match="same references, but 0 differs"):
        stats.paired_columns([sample("0", "a", 1.0)], [sample("0", "a", 1.0, references=["q"])])
    with pytest.raises(ValueError, match="must name one sample"):
        stats.paired_columns([sample("0", "a", 1.0)] * 2, [sample("0", "a", 1.0)])


@pytest.mark.parametrize(
    ("values", "half"),
    [
        ([0.2, 0.4], 12.7062 * 0.1),
        ([1.0, 2.0, 3.0], 4.3027 / 3**0.5),
        ([0.0, 1.0] * 6, 2.20099 * 0.522233 / 12**0.5),  # t of 11 degrees of freedom
    ],
)
def test_the_interval_over_seeds_is_students_t(values: list[float], half: float) -> None:
    found = stats.seed_interval(values)
    assert found.estimate == pytest.approx(sum(values) / len(values))
    assert found.high - found.estimate == pytest.approx(half, rel=2e-3)
    assert found.estimate - found.low == pytest.approx(half, rel=2e-3)
    assert found.n == len(values)


def test_one_seed_has_no_interval_and_zero_seeds_are_refused() -> None:
    found = stats.seed_interval([0.5])
    assert (found.estimate, found.n) == (0.5, 1)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    for values in ([], [0.1, float("nan")]):
        with pytest.raises(ValueError, match="one or more finite numbers"):
            stats.seed_interval(values)


def test_the_interval_of_a_quotient_combines_both_on_a_logarithmic_scale() -> None:
    # Each end is twice or half its estimate: exp(hypot(ln 2, ln 2)) is 2.665.
    found = stats.quotient((8.0, 4.0, 16.0), (2.0, 1.0, 4.0))
    assert found == pytest.approx((4.0, 4 / 2.665144, 4 * 2.665144))
    assert stats.quotient((8.0, 8.0, 8.0), (2.0, 1.0, 2.0)) == pytest.approx((4.0, 4.0, 8.0))
    ratio, low, high = stats.quotient((8.0, math.nan, math.nan), (2.0, 1.0, 4.0))
    assert ratio == 4
    assert math.isnan(low)
    assert math.isnan(high)


# Notes on differences to full attention ---------------------------------------------------------


def test_a_difference_says_why_it_is_not_informative() -> None:
    def row(subtask: str, score: float | None, status: str = "ok", reason: str = "") -> Row:
        return Row(
            run_id="0" * 16, status=Status(status), reason=reason, model="tiny", task="ruler",
            subtask=subtask, method="full", score=score,
        )  # fmt: skip

    answered = [row("niah", 50.0), row("vt", 0.0), row("mean", 25.0)]
    assert stats.full_note(answered, "niah") is None
    assert stats.full_note(answered, "mean") is None
    assert stats.full_note(answered, "vt") == (
        "full attention scores 0 here, so a difference to it says nothing of the method."
    )
    failed = [row("mean", None, "failed", "the logits must be finite.")]
    for subtask in ("niah", "mean"):
        assert stats.full_note(failed, subtask) == (
            "full attention ended failed here, so there is no difference to it: the logits must be"
            " finite."
        )
    assert stats.full_note([row("mean", 0.0)], "niah") is None  # unknown there
    assert stats.full_note([], "mean") is None


def answered(*answers: tuple[str, int, bool], score: float = 100.0) -> list[dict[str, object]]:
    return [
        {
            "sample_id": str(place),
            "subtask": subtask,
            "score": score,
            "references": ["a"],
            "num_generated": generated,
            "is_cut": is_cut,
        }
        for place, (subtask, generated, is_cut) in enumerate(answers)
    ]


def test_lengths_of_answers_are_paired_with_full_attentions() -> None:
    mine = answered(("a", 100, True), ("a", 60, False), ("b", 30, False))
    full = answered(("a", 40, False), ("a", 60, False), ("b", 20, False))
    found = stats.paired_columns(mine, full)
    assert (found["a"]["generated_tokens"], found["a"]["cut_off_share"]) == (80.0, 0.5)
    assert (found["a"]["generated_delta"], found["a"]["cut_off_delta"]) == (30.0, 0.5)
    assert found["a"]["generated_delta_ci_low"] == 0.0
    assert found["a"]["generated_delta_ci_high"] == 60.0
    low, high = found["a"]["cut_off_delta_ci_low"], found["a"]["cut_off_delta_ci_high"]
    assert low is not None
    assert high is not None
    assert -1 <= low < 0.5 < high <= 1
    # Each sub-task counts the same in the mean.
    assert (found["mean"]["generated_tokens"], found["mean"]["cut_off_share"]) == (55.0, 0.25)
    assert found["mean"]["generated_delta"] == 20.0
    # Without any difference an interval has a width: three answers do not show that none differs.
    same = stats.paired_columns(full, full)["mean"]
    assert same["generated_delta"] == 0.0
    assert same["generated_delta_ci_low"] is not None
    assert same["generated_delta_ci_low"] < 0
    alone = stats.paired_columns(mine, None)["mean"]
    assert (alone["generated_tokens"], alone["generated_delta"]) == (55.0, None)


def test_samples_without_answers_have_no_length() -> None:
    choices = [{**one, "is_cut": None} for one in answered(("a", 0, False))]
    assert "generated_tokens" not in stats.paired_columns(choices, choices)["a"]
    older = [{key: one[key] for key in ("sample_id", "subtask", "score")} for one in choices]
    assert "generated_tokens" not in stats.paired_columns(older, older)["a"]
    mine = answered(("a", 5, False))
    assert stats.paired_columns(mine, older)["a"]["generated_delta"] is None
