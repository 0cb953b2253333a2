"""The table of scores turn by turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pandas as pd

from topkbench.analysis.comparison.configurations import compare
from topkbench.analysis.comparison.stats import MEAN, paired_columns
from topkbench.analysis.record.store import Row, frame
from topkbench.analysis.tables.turns import turn_table

FULL = {"a": (100, 100), "b": (100, 100), "c": (100, 100), "d": (100, 0)}
SNAPKV = {"a": (100, 0), "b": (100, 0), "c": (100, 100), "d": (0, 0)}


def cell(
    row: Callable[..., Row], number: int, method: str, scores: dict[str, tuple[int, ...]]
) -> tuple[list[Row], list[dict[str, Any]]]:
    run_id = f"{number:016x}"
    samples = [
        {
            **{"run_id": run_id, "sample_id": f"{name} turn {turn}", "subtask": f"turn_{turn}"},
            **{"score": float(score), "references": ["x"], "document": name, "turn": turn},
        }
        for name, of_document in scores.items()
        for turn, score in enumerate(of_document, start=1)
    ]
    known = {"run_id": run_id, "task": "multi_turn", "method": method}
    if method != "full":
        known |= {"k": 64, "protocol": "unified"}
    found = paired_columns(samples, None)
    rows = [row(**known, subtask=name, **values) for name, values in found.items()]
    return rows, samples


def test_each_turn_has_its_score_and_its_change_since_the_first(row: Callable[..., Row]) -> None:
    cells = [cell(row, 0, "full", FULL), cell(row, 1, "snapkv", SNAPKV)]
    rows = frame([one for made, _ in cells for one in made])
    samples = pd.DataFrame([one for _, made in cells for one in made])
    tables = []
    for given in (samples, None):  # the rows alone have the same intervals
        configurations = compare(rows, given).configurations
        means = configurations[configurations["subtask"] == MEAN].set_index("method")["score"]
        assert means["snapkv"] == statistics.fmean([50, 50, 100, 0])
        tables.append(turn_table(configurations))
    found = tables[0]
    assert found == tables[1]
    assert found is not None
    assert found.head == [
        *("Method", "k", "rbit", "turn_1 (0–100)", "turn_2 (0–100)", "turn_1 to turn_2 (points)"),
    ]
    full, snapkv = found.rows
    assert full[:3] == ["Full attention", "–", "–"]
    assert snapkv[:3] == ["SnapKV", "64", "–"]
    assert snapkv[3] == "75.0 [30.1, 95.4]"
    assert snapkv[4] == "25.0 [4.6, 69.9]"
    assert snapkv[5].startswith("−50.0 [")
    assert full[5].startswith("−25.0 [")


def test_other_tasks_have_no_such_table(row: Callable[..., Row]) -> None:
    rows = frame([row(subtask=name, score=50.0) for name in ("vt", "cwe", MEAN)])
    assert turn_table(compare(rows).configurations) is None
