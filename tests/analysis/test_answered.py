"""Means over the sub-tasks that full attention answers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import pytest

from topkbench.analysis.comparison.configurations import compare
from topkbench.analysis.comparison.stats import MEAN
from topkbench.analysis.record.store import Row, frame
from topkbench.analysis.tables.answered import answered_table
from topkbench.analysis.tables.overview import failure_table
from topkbench.analysis.tables.table import Table

FULL = {"niah_single_1": (100, 100), "vt": (60, 40), "cwe": (50, 40), "fwe": (0, 0)}
HATA = {"niah_single_1": (100, 0), "vt": (40, 40), "cwe": (100, 100), "fwe": (100, 100)}


@pytest.fixture
def table(row: Callable[..., Row]) -> Callable[..., Table | None]:
    def made(
        samples: bool = True,
        references: Mapping[str, list[str]] | None = None,
        **scores: Mapping[str, tuple[int, ...]],
    ) -> Table | None:
        rows: list[Row] = []
        outcomes: list[dict[str, Any]] = []
        for number, (method, of_method) in enumerate(scores.items()):
            known: dict[str, Any] = {"run_id": f"{number:016x}", "method": method}
            if method != "full":
                known |= {"k": 64, "protocol": "unified"}
            means = {name: statistics.fmean(values) for name, values in of_method.items()}
            means[MEAN] = statistics.fmean(means.values())
            rows += [row(**known, subtask=name, score=mean) for name, mean in means.items()]
            outcomes += [
                {"run_id": known["run_id"], "subtask": name, "sample_id": f"{name}-{place}"}
                | {"score": float(score), "references": (references or {}).get(method, ["a"] * 5)}
                for name, values in of_method.items()
                for place, score in enumerate(values)
            ]
        found = compare(frame(rows), pd.DataFrame(outcomes) if samples else None)
        return answered_table(found.configurations, found.answers)

    return made


def test_sub_tasks_that_full_attention_fails_are_shown_and_left_out_of_the_mean(
    table: Callable[..., Table | None],
) -> None:
    found = table(full=FULL, hata=HATA)
    assert found is not None
    assert found.head == ["Method", "k", "rbit", "Score (0–100)", "Δ full (points)"]
    full, hata = found.rows
    # (100 + 50) / 2, and (50 + 40) / 2 in the same sub-tasks, whose two means differ by 30.
    assert full[:3] == ["Full attention", "–", "–"]
    assert full[3].startswith("75.0 [")
    assert full[4] == "–"
    assert hata[:2] == ["HATA", "64"]
    assert hata[3].startswith("45.0 [")
    assert hata[4].startswith("−30.0 [")
    assert found.notes == [
        "Means of niah_single_1, vt. Left out, since full attention scores below 50 there:"
        " cwe (45.0), fwe (0.0). The other tables and the figures have means of all sub-tasks."
    ]


def test_a_configuration_without_one_of_them_has_no_mean(
    table: Callable[..., Table | None],
) -> None:
    found = table(full=FULL, hata={name: HATA[name] for name in ("vt", "cwe", "fwe")})
    assert found is not None
    assert [one[0] for one in found.rows] == ["Full attention"]
    assert found.notes[1] == "Without all of these sub-tasks, and so without such a mean: HATA."


def test_there_is_no_such_mean_if_all_or_none_are_answered(
    table: Callable[..., Table | None],
) -> None:
    hata = {name: HATA[name] for name in ("vt", "cwe")}
    assert table(full={"vt": (50, 50), "cwe": (100, 100)}, hata=hata) is None
    found = table(full={"vt": (40, 50), "cwe": (0, 0)}, hata=hata)
    assert found is not None
    assert found.rows == []
    assert found.notes == [
        "Full attention scores below 50 on every sub-task: vt (45.0), cwe (0.0)."
    ]


def test_what_cannot_be_paired_with_full_attention_has_no_such_mean(
    table: Callable[..., Table | None],
) -> None:
    found = table(full=FULL, hata=HATA, references={"hata": ["x"]})
    assert found is not None
    assert [row[0] for row in found.rows] == ["Full attention"]


def test_there_is_no_such_mean_without_full_attention_or_samples(
    table: Callable[..., Table | None],
) -> None:
    assert table(hata=HATA) is None
    assert table(samples=False, full=FULL, hata=HATA) is None


def test_skipped_sub_tasks_are_in_the_notes_and_their_cell_is_one_configuration(
    row: Callable[..., Row],
) -> None:
    """Sub-tasks of older rows lack the backend where no time was measured."""
    reason = "qa_1 needs questions."
    rows = frame(
        [
            row(subtask="qa_1", status="skipped", reason=reason, full_backend="sdpa"),
            row(subtask="vt", score=40.0, full_backend=None),
            row(subtask=MEAN, score=40.0, full_backend="sdpa"),
        ]
    )
    found = compare(rows)
    assert found.configurations["configuration_id"].nunique() == 1
    assert len(found.overall) == 1
    assert f"ruler: means are without qa_1, skipped there: {reason}" in found.notes
    assert failure_table(rows) is None
    failed = frame([row(subtask=MEAN, status="skipped", reason="All of it.")])
    assert failure_table(failed) is not None
