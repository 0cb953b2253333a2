"""What changed between two results: what is worse is found, and what is not gives no alarm."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from topkbench.analysis.comparison.changes import Change, find_changes, least_losses
from topkbench.analysis.comparison.configurations import Comparison, compare
from topkbench.analysis.comparison.stats import MEAN
from topkbench.analysis.record.csv_file import csv_bytes
from topkbench.analysis.record.store import RecordError, Status, frame
from topkbench.analysis.report.compare_command import least_losses_in_words, main
from topkbench.tests.analysis.conftest import make_row
from topkbench.tests.analysis.hostile import ESCAPES

METHODS = ("hata", "quest", "loki")
BUDGETS = (64, 128)
SUBTASKS = ("niah_single", "vt", "cwe")
N = 25

Scores = dict[tuple[str, int], np.ndarray]


def scores_of(seed: int = 0) -> Scores:
    """Return 0 or 100 for each sample of each cell, [sub-tasks, samples]."""
    draws = np.random.default_rng([7, seed])
    return {
        cell: 100.0 * (draws.random((len(SUBTASKS), N)) < 0.7)
        for cell in itertools.product(METHODS, BUDGETS)
    }


def results(scores: Scores, **columns: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return rows and samples of some cells; columns may be functions of the method's name."""
    rows, samples = [], []
    for (method, k), values in scores.items():
        own = {name: one(method) if callable(one) else one for name, one in columns.items()}
        known = {"protocol": "unified", "prompts": "topkbench 1", "recall_at_k": 0.5}
        known |= {"bytes_read_per_step": 2.0**20, "density": 0.1, "speedup_vs_full": 1.5}
        run_id = f"{method}{k}"
        common: dict[str, Any] = {"run_id": run_id, "method": method, "k": k, **known, **own}
        for subtask, score in [*zip(SUBTASKS, values.mean(axis=1), strict=True),
                               (MEAN, values.mean())]:  # fmt: skip
            rows.append(make_row(subtask=subtask, score=float(score), **common))
        for (i, j), score in np.ndenumerate(values):
            name = {"run_id": run_id, "subtask": SUBTASKS[i], "sample_id": f"{SUBTASKS[i]}-{j}"}
            samples.append({**name, "score": score, "references": ["w1"]})
    return frame(rows), pd.DataFrame(samples)


def compared(scores: Scores, **columns: Any) -> Comparison:
    return compare(*results(scores, **columns), resampled=False)


def worse(changes: list[Change]) -> set[tuple[str, str, tuple[str, ...]]]:
    return {(one.name, one.subtask, one.worse) for one in changes if one.worse}


def with_noise(scores: Scores, seed: int, share: float = 0.06) -> Scores:
    """Return scores of which some flip, either way: what other rounding does to answers."""
    draws = np.random.default_rng([11, seed])
    return {
        cell: np.where(draws.random(values.shape) < share, 100.0 - values, values)
        for cell, values in scores.items()
    }


@pytest.mark.parametrize("seed", range(20))
def test_no_change_is_no_alarm(seed: int) -> None:
    """Of 24 scores, each with a few answers that flip either way, none is worse; 20 times."""
    scores = scores_of(seed)
    changes = find_changes(compared(scores), compared(with_noise(scores, seed)))
    assert len(changes) == 6 * 4
    assert any(one.difference and one.difference.estimate for one in changes)
    assert worse(changes) == set()


def test_the_same_results_in_another_order_have_no_difference() -> None:
    rows, samples = results(scores_of())
    shuffled = rows.iloc[::-1].reset_index(drop=True), samples.sample(frac=1, random_state=0)
    changes = find_changes(compare(rows, samples), compare(*shuffled))
    assert [one.difference.estimate for one in changes if one.difference] == [0.0] * 24
    assert worse(changes) == set()


def test_a_method_that_lost_half_of_its_answers_is_found_by_sub_task() -> None:
    before = scores_of()
    after = {cell: values.copy() for cell, values in before.items()}
    after["quest", 64][0] = 0.0
    changes = find_changes(compared(before), compared(after))
    assert worse(changes) == {
        ("Quest, k=64", "niah_single", ("score",)),
        ("Quest, k=64", MEAN, ("score",)),
    }
    (one,) = [c for c in changes if c.worse and c.subtask == MEAN]
    assert one.scores is not None
    assert one.difference is not None
    assert one.scores == (before["quest", 64].mean(), after["quest", 64].mean())
    assert one.difference.high < 0
    assert one.difference.n == 75
    # A tolerance of all that was lost, and more.
    assert worse(find_changes(compared(before), compared(after), tolerance=80)) == set()
    # What is better is no alarm.
    assert worse(find_changes(compared(after), compared(before))) == set()


def test_a_document_that_is_asked_several_times_counts_once_in_the_mean() -> None:
    sides = []
    for seed in (0, 1):
        rows, samples = results(with_noise(scores_of(), seed))
        documents = samples["sample_id"].str.rpartition("-")[2]
        sides.append(compare(rows, samples.assign(document=documents), resampled=False))
    counted = {
        one.subtask: one.difference.n for one in find_changes(*sides) if one.difference is not None
    }
    assert counted == {**dict.fromkeys(SUBTASKS, N), MEAN: N}  # not of each turn


def test_numbers_without_sampling_error_are_worse_beyond_a_share_of_them() -> None:
    scores = scores_of()
    later = {
        "recall_at_k": lambda method: 0.49 if method == "loki" else 0.51,
        "bytes_read_per_step": lambda method: 2.0**20 * (1.02 if method == "hata" else 0.9),
        "density": 0.1009,
        "speedup_vs_full": 0.1,  # of another moment: for information
    }
    changes = find_changes(compared(scores), compared(scores, **later))
    assert {(one.label, one.worse) for one in changes} == {
        ("Loki", ("recall_at_k",)),
        ("HATA", ("bytes_read_per_step",)),
        ("Quest", ()),
    }
    assert worse(find_changes(compared(scores), compared(scores, **later), relative=0.03)) == set()


def test_what_ran_before_and_fails_now_is_worse() -> None:
    before = scores_of()
    rows, samples = results({cell: one for cell, one in before.items() if cell != ("loki", 64)})
    failed = make_row(
        run_id="loki64", method="loki", k=64, protocol="unified", status=Status.FAILED,
        reason="rank must not exceed head_dim.",
    )  # fmt: skip
    both = pd.concat([rows, frame([failed])], ignore_index=True)
    changes = find_changes(compared(before), compare(both, samples, resampled=False))
    assert worse(changes) == {
        ("Loki, k=64", MEAN, ("failed: rank must not exceed head_dim.",)),
    }


def test_samples_and_cells_that_are_missing_are_refused_or_left_out() -> None:
    scores = scores_of()
    fewer = {cell: one[:, :20] for cell, one in scores.items()}
    with pytest.raises(RecordError, match=r"HATA, k=64 lacks 15 of 75; .* --common"):
        find_changes(compared(scores), compared(fewer))
    changes = find_changes(compared(scores), compared(fewer), only_common=True)
    assert {one.difference.n for one in changes if one.difference} == {60, 20}
    assert len(find_changes(compared(fewer), compared(scores))) == 24  # more is no matter
    without = {cell: one for cell, one in scores.items() if cell[0] != "hata"}
    with pytest.raises(RecordError, match="but lack HATA, k=64; HATA, k=128; run them"):
        find_changes(compared(scores), compared(without))
    assert len(find_changes(compared(scores), compared(without), only_common=True)) == 16


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompts": "topkbench 2"}, "differ in prompts: topkbench 1 and topkbench 2; run the"),
        ({"model": "other"}, "differ in model: tiny and other"),
        ({"k": 32}, "must have a configuration in common .*, but have none"),
    ],
)
def test_nothing_in_common_is_refused(columns: dict[str, Any], message: str) -> None:
    scores = {("hata", 64): scores_of()["hata", 64]}
    with pytest.raises(RecordError, match=message):
        find_changes(compared(scores), compared(scores, **columns))


def test_other_references_are_other_prompts() -> None:
    scores = scores_of()
    rows, samples = results(scores)
    other = samples.assign(references=[["w2"]] * len(samples))
    with pytest.raises(RecordError, match=r"HATA, k=64 cannot be paired: .* same references"):
        find_changes(compared(scores), compare(rows, other, resampled=False))


def test_scores_without_samples_are_refused() -> None:
    scores = scores_of()
    with pytest.raises(RecordError, match="the later results have no samples of HATA, k=64"):
        find_changes(compared(scores), compare(results(scores)[0]))


def test_configurations_of_one_name_are_paired_by_machine_or_refused() -> None:
    scores = {("hata", 64): scores_of()["hata", 64]}
    here, there = (results(scores, device=device, run_id=device) for device in ("first", "second"))
    samples = pd.concat(
        [one.assign(run_id=name) for name, (_, one) in (("first", here), ("second", there))]
    )
    both = compare(pd.concat([here[0], there[0]], ignore_index=True), samples, resampled=False)
    assert len(find_changes(both, both)) == 8
    with pytest.raises(RecordError, match="lack HATA, k=64; run them"):
        find_changes(both, compare(*here, resampled=False))


# The command -------------------------------------------------------------------------------------

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_results(name: str, scores: Scores, **columns: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rows, samples = results(scores, **columns)
        (folder / "rows.csv").write_bytes(csv_bytes(rows))
        samples.to_parquet(folder / "samples.parquet", index=False)
        return folder

    return write_results


def test_the_command_prints_what_is_worse_and_the_rule(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {("quest", 64): scores_of()["quest", 64]}
    after = {("quest", 64): before["quest", 64] * np.array([[0.0], [1.0], [1.0]])}
    first = write("first", before)
    second = write("second", after, recall_at_k=0.25)
    assert main([str(first), str(second)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(
        "tiny, ruler_words, 4,096 tokens, prompts of topkbench 1, question=sparse,"
    )
    (line,) = [one for one in out.splitlines() if " niah_single " in one]
    lost = before["quest", 64][0].mean()
    assert line.split()[:6] == ["Quest", "64", "–", "niah_single", f"{lost:.1f}", "0.0"]
    assert line.endswith("worse: Score, Recall@k")
    assert "−0.250" in line
    assert "Holm's procedure over all 4 differences" in out
    assert out.splitlines()[-1] == "4 of 4 comparisons (1 configurations) are worse."
    assert main([str(first), str(first)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Nothing is worse: 4 comparisons")


def test_the_least_loss_that_is_found_is_said_and_true() -> None:
    """Of 25 samples that were all right, so many lost are found, and one less is not."""
    before = {("quest", 64): np.full((3, N), 100.0)}
    unchanged = find_changes(compared(before), compared(before))
    losses = least_losses(unchanged)
    assert set(losses) == {(N,), (N, N, N)}
    least = losses[(N,)]
    assert least is not None
    lost = round(least / 100 * N)
    for number, found in ((lost, True), (lost - 1, False)):
        after = {("quest", 64): before["quest", 64].copy()}
        after["quest", 64][0, :number] = 0.0
        names = {
            one.subtask for one in find_changes(compared(before), compared(after)) if one.worse
        }
        assert ("niah_single" in names) is found
    words = least_losses_in_words(unchanged, 0.0)
    assert f"{least:.1f} points in a score of 25 samples" in words
    assert "in a mean over 3 sub-tasks of 25 samples each" in words
    assert "not even" not in words


def test_too_few_samples_to_find_anything_are_no_silent_pass(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {("quest", 64): np.full((3, 3), 100.0)}
    after = {("quest", 64): before["quest", 64] * np.array([[0.0], [1.0], [1.0]])}
    assert main([str(write("first", before)), str(write("second", after))]) == 0
    assert (
        "In a score of 3 samples not even the loss of all answers is found: compare more samples."
        in capsys.readouterr().out
    )


def test_two_commits_in_one_folder_are_compared(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {("quest", 64): scores_of()["quest", 64]}
    parts = [
        results(scores, run_id=commit, git_commit=commit * 8, recall_at_k=recall)
        for commit, recall in (("abcde", 0.5), ("12345", 0.4))
    ]
    folder = write("both", scores)
    rows = pd.concat([rows for rows, _ in parts], ignore_index=True)
    (folder / "rows.csv").write_bytes(csv_bytes(rows))
    samples = pd.concat(
        [one.assign(run_id=name) for name, (_, one) in zip(("abcde", "12345"), parts, strict=True)]
    )
    samples.to_parquet(folder / "samples.parquet", index=False)
    assert main([f"{folder}@abcdea", f"{folder}@1234512"]) == 1
    assert "worse: Recall@k" in capsys.readouterr().out
    assert main([f"{folder}@1234512", f"{folder}@abcdea"]) == 0
    capsys.readouterr()
    assert main([f"{folder}@77", str(folder)]) == 2
    assert capsys.readouterr().err == (
        f"error: {folder} must have rows of commit '77', but has those of 123451234512,"
        " abcdeabcdeab.\n"
    )


def test_what_cannot_be_compared_is_one_sentence_and_status_2(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write("first", {("quest", 64): scores_of()["quest", 64]})
    for arguments, message in (
        ((str(tmp_path / "none"), str(folder)), "none does not exist."),
        ((str(folder), str(folder), "--tolerance=-1"), "--tolerance must be 0 or more, got -1.0."),
        ((str(folder), str(folder), "--percent=nan"), "--percent must be 0 or more, got nan."),
    ):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.endswith(f"{message}\n")
        assert err.count("\n") == 1


def test_hostile_names_stay_text(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write("first", {("quest", 64): scores_of()["quest", 64]}, model=ESCAPES)
    assert main([str(folder), str(folder)]) == 0
    assert "\x1b" not in capsys.readouterr().out
