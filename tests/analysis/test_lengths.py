"""The table of long answers: how long they are and what was found among prompt and answer."""

from collections.abc import Callable

from topkbench.analysis.comparison.configurations import compare
from topkbench.analysis.record.row import Row
from topkbench.analysis.record.store import frame
from topkbench.analysis.tables.lengths import length_table

RowMaker = Callable[..., Row]


def rows(row: RowMaker, generated: float) -> list[Row]:
    known = {"score": 50.0, "generated_tokens": generated, "cut_off_share": 0.25}
    paired = {
        "generated_delta": 30.0,
        "generated_delta_ci_low": -2.0,
        "generated_delta_ci_high": 62.0,
        "cut_off_delta": 0.25,
        "cut_off_delta_ci_low": 0.1,
        "cut_off_delta_ci_high": 0.4,
    }
    found = {"recall_at_k": 0.8, "recall_prompt": 0.9, "recall_generated": 0.6}
    return [
        row(run_id="1" * 16, **known),
        row(run_id="2" * 16, method="quest", k=64, **known, **paired, **found),
    ]


def test_answers_are_shown_with_their_lengths_and_recall_apart(row: RowMaker) -> None:
    table = length_table(compare(frame(rows(row, 410.0))).overall)
    assert table is not None
    assert table.head == [
        *("Method", "k", "Generated (tokens)", "Over full (tokens)", "Cut off (%)"),
        *("Over full (points)", "Recall@k", "of the prompt's tokens", "of the generated"),
    ]
    assert table.rows == [
        ["Full attention", "–", "410.0", "–", "25.0", "–", "–", "–", "–"],
        [
            *("Quest", "64", "410.0", "+30.0 [−2.0, +62.0]", "25.0", "+25.0 [+10.0, +40.0]"),
            *("0.800", "0.900", "0.600"),
        ],
    ]


def test_short_answers_say_nothing_of_their_length(row: RowMaker) -> None:
    assert length_table(compare(frame(rows(row, 63.0))).overall) is None
    assert length_table(compare(frame([row(score=50.0)])).overall) is None
