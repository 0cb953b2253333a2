"""The outcome of a search: the front of its trials, and what is shown of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from topkbench.analysis.figures import search
from topkbench.analysis.record.store import Row, Status, Sweep
from topkbench.analysis.report import build as report

MIB = 2.0**20
# For each trial: its page size, its cell, and the cell's score and MiB read per step.
TRIALS = [
    ("8", "a" * 16, 50.0, 1.0),
    ("16", "b" * 16, 80.0, 2.0),
    ("32", "c" * 16, 80.0, 3.0),  # no better than the one before, and reads more
    ("16", "b" * 16, 80.0, 2.0),  # the same again
    ("64", "d" * 16, 90.0, 4.0),
    ("128", "e" * 16, None, None),  # failed
    ("256", "f" * 16, 40.0, 1.0),  # reads as much as the first, and is worse
]


@pytest.fixture
def searched(tmp_path: Path, row: Callable[..., Row]) -> Callable[..., Sweep]:
    """Make the sweep of a search with some objectives."""

    def make(*objectives: str, half: float = 5) -> Sweep:
        sweep = Sweep(tmp_path / "search" / "now", tmp_path)
        for page_size, name, score, read in TRIALS:
            found: dict[str, Any] = {"status": Status.FAILED, "reason": "it failed."}
            if score is not None and read is not None:
                ends = {"score_ci_low": score - half, "score_ci_high": score + half}
                found = {"score": score, "bytes_read_per_step": read * MIB, **ends}
            own = row(run_id=name, method="quest", k=16, protocol="unified", **found)
            own.parameters = {"page_size": int(page_size)}
            cell = sweep.store.cell(name)
            cell.begin(own)
            cell.write([own], [], {}, "")
            sweep.append(name)
        sweep.note_search(
            {
                "objectives": list(objectives),
                "trials": 24,
                "knobs": {"method.page_size": "8, 16, 32, 64, 128, 256"},
                "ended": [
                    {"trial": number, "run_id": name, "knobs": {"method.page_size": page_size}}
                    for number, (page_size, name, _, _) in enumerate(TRIALS)
                ],
            }
        )
        return sweep

    return make


def test_the_front_has_what_no_trial_dominates(searched: Callable[..., Sweep]) -> None:
    sweep = searched("score", "bytes_read_per_step")
    found = search.outcome(sweep, sweep.rows())
    assert found is not None
    assert found.num_trials == len(TRIALS)
    assert list(found.best["trials"]) == ["4", "1, 3", "0"]
    assert search.words(found) == (
        "7 of 24 trials, 6 configurations, 1 of them without a result. Searched: method.page_size:"
        " 8, 16, 32, 64, 128, 256. Objectives: Score (higher is better) and Read per decode step"
        " (lower is better)."
    )
    table = search.best_table(found)
    assert table.head == [
        "Trial",
        "method.page_size",
        "Score (0–100)",
        "Read per decode step (MiB)",
    ]
    assert table.rows == [
        ["4", "64", "90.0 [85.0, 95.0]", "4"],
        ["1, 3", "16", "80.0 [75.0, 85.0]", "2"],
        ["0", "8", "50.0 [45.0, 55.0]", "1"],
    ]
    assert table.notes[0] == "n = 25 samples."
    assert search.values(found).to_dict("list") == {
        "trials": ["4", "1, 3", "0"],
        "method.page_size": ["64", "16", "8"],
        "score": [90.0, 80.0, 50.0],
        "bytes_read_per_step": [4 * MIB, 2 * MIB, 1 * MIB],
    }


def test_a_trial_says_its_settings(searched: Callable[..., Sweep], tmp_path: Path) -> None:
    sweep = searched("score", "bytes_read_per_step")
    found = search.outcome(sweep, sweep.rows())
    assert found is not None
    drawn = search.draw(found, tmp_path)
    assert drawn is not None
    texts = [one.text for one in drawn.points]
    assert len(texts) == 5  # one configuration has no result
    (said,) = [one for one in texts if "trial 1, 3" in one]
    assert said.splitlines() == [
        "Quest",
        "trial 1, 3",
        "method.page_size = 16",
        "Score: 80.0 0–100",
        "Read per decode step: 2 MiB",
    ]


def test_the_front_has_only_what_intervals_tell_apart(searched: Callable[..., Sweep]) -> None:
    """With 10 to either side, 90 is not told from 80, nor 50 from 40, which reads as much."""
    sweep = searched("score", "bytes_read_per_step", half=10)
    found = search.outcome(sweep, sweep.rows())
    assert found is not None
    assert list(found.best["trials"]) == ["1, 3", "0", "6"]


def test_one_objective_has_its_best_trials(searched: Callable[..., Sweep]) -> None:
    sweep = searched("bytes_read_per_step")
    found = search.outcome(sweep, sweep.rows())
    assert found is not None
    assert list(found.best["trials"]) == ["0", "6", "1, 3", "2", "4"]
    assert list(found.best["best"]) == [True, True, False, False, False]
    head = ["Trial", "method.page_size", "Read per decode step (MiB)", "Score (0–100)"]
    assert search.best_table(found).head == head


@pytest.mark.parametrize("objectives", [("score", "bytes_read_per_step"), ("score",)])
def test_the_report_begins_with_the_search(
    searched: Callable[..., Sweep], objectives: tuple[str, ...]
) -> None:
    sweep = searched(*objectives)
    path = report.build(sweep.folder)
    text = path.with_suffix(".md").read_text()
    assert text.index("## What ran") < text.index("## Search") < text.index("## tiny, ruler")
    assert ("### Pareto front" in text) == (len(objectives) == 2)
    assert '<section id="search">' in path.read_text()
    data = pd.read_csv(path.parent / "figures" / "search.csv")
    assert list(data["trials"]) == (["4", "1, 3", "2", "0", "6"])
    assert list(data["best"]) == [True, len(objectives) == 2, False, len(objectives) == 2, False]
    for suffix in ("png", "svg"):
        assert (path.parent / "figures" / f"search.{suffix}").stat().st_size > 0


def test_a_search_without_a_result_is_shown_without_a_figure(
    searched: Callable[..., Sweep],
) -> None:
    sweep = searched("kl_full")  # which no trial has
    path = report.build(sweep.folder)
    text = path.with_suffix(".md").read_text()
    assert "7 of 24 trials, 6 configurations, 6 of them without a result." in text
    assert not (path.parent / "figures" / "search.png").exists()


def test_a_sweep_that_is_no_search_has_none(small_sweep: Sweep) -> None:
    assert search.outcome(small_sweep, small_sweep.rows()) is None
    assert "## Search" not in report.build(small_sweep.folder).with_suffix(".md").read_text()
