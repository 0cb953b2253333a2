"""Names of hundreds of characters, which anybody may choose, leave figures as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from topkbench.analysis import style
from topkbench.analysis.comparison.configurations import compare
from topkbench.analysis.figures.bars import stages
from topkbench.analysis.figures.names import short_names
from topkbench.analysis.figures.plots import Drawn, draw_all
from topkbench.analysis.figures.points import points_of
from topkbench.analysis.record.store import Row, frame


def test_a_long_name_keeps_its_ends_and_stays_apart_from_others() -> None:
    long = ["a" * 20 + middle + "z" * 20 for middle in ("1", "2", "3")]
    names = short_names([*long, "short", "x" * 12], most=12)
    assert names == {
        "short": "short",
        "x" * 12: "x" * 12,
        long[0]: "aaaaaa…zzzzz",
        long[1]: "aaaa…zzz (2)",
        long[2]: "aaaa…zzz (3)",
    }
    assert max(map(len, names.values())) == 12


def rows_of(row: Callable[..., Row], label: str, subtask: str, note: str) -> pd.DataFrame:
    """Return rows of two methods that only they know, with two budgets and two sub-tasks."""
    made = []
    for method in ("mine", "other"):
        for k in (64, 256):
            for name in (f"{subtask}1", f"{subtask}2", "mean"):
                columns: dict[str, Any] = {
                    **{"run_id": f"{method}-{k}", "method": method, "k": k, "subtask": name},
                    **{"method_label": f"{label}{method}", "score": 50.0 + k / 10},
                    **{"bytes_read_per_step": 2.0**20 * k, "decode_ms_p50": 2.0, "score_ms": 1.0},
                    **{"protocol": "unified", "parameters": {"note": f"{note}{k}"}},
                }
                made.append(row(**columns))
    return frame(made)


def test_names_of_300_characters_leave_a_figures_layout_as_it_is(
    row: Callable[..., Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, Any] = {}

    def keep(figure: Any, data: pd.DataFrame, drawn: Drawn) -> Drawn:
        figure.draw_without_rendering()
        kept[drawn.name] = figure
        return drawn

    monkeypatch.setattr("topkbench.analysis.figures.plots.save", keep)
    long = "an endless name " * 18
    rows = rows_of(row, long, f"{long}_", long)
    with style.recorded(rows):
        drawn = draw_all(compare(rows).configurations, tmp_path, "words")
    assert {one.name for one in drawn} == {"score_vs_k", "score_vs_bytes", "stages", "subtasks"}
    for name, figure in kept.items():
        width = figure.get_size_inches()[0] * figure.dpi
        axes = figure.axes[0]
        assert axes.get_window_extent().width > 0.25 * width, name
        for legend in figure.legends:
            texts = [one.get_text() for one in legend.get_texts()]
            assert len(set(texts)) == len(texts), name
        for axis in (axes.xaxis, axes.yaxis):
            boxes = [one.get_window_extent() for one in axis.get_ticklabels() if one.get_text()]
            for place, box in enumerate(boxes):
                assert not any(box.overlaps(other) for other in boxes[:place]), name
    # A point has the whole name.
    texts = [one.text for one in points_of(kept["score_vs_bytes"])]
    assert len(texts) == 2  # both methods have the same numbers
    for text in texts:
        assert [one.count(long[:250]) for one in text.split("\n\n")] == [2, 2]  # with its note


def test_bars_name_the_commits_that_most_bars_do_not_have(row: Callable[..., Row]) -> None:
    rows = rows_of(row, "M ", "", "")
    most = pd.Series("a" * 12, index=rows.index)
    for commits, named in (
        (most, 0),
        (most.mask((rows["method"] == "other") & (rows["k"] == 64), "b" * 12), 1),
    ):
        with style.recorded(rows):
            found = stages(compare(rows.assign(git_commit=commits)).overall)
        assert found is not None
        axes = found[0].axes[0]
        ticks = [one.get_text().replace("\n", " ") for one in axes.get_yticklabels()]
        assert [one.count("commit bbbbbbb") for one in ticks].count(1) == named
        assert not any("aaaaaaa" in one for one in ticks)
        words = "\ncommit aaaaaaa where none is named" if named else ""
        assert axes.get_xlabel() == f"Time within one decode step (ms){words}"
