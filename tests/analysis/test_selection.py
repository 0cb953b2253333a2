import pandas as pd
import pytest

from topkbench.analysis.record import RecordError
from topkbench.analysis.selection import by_prompt, selection_table


def _sweep() -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = pd.DataFrame(
        {
            "run_id": ["a" * 16, "b" * 16],
            "method": "hata",
            "rbit": [32, 64],
            "seed": 0,
            "p_weights": ["random", "random"],
            "p_use_norm": [True, False],
        }
    )
    samples = pd.DataFrame(
        [
            # two prompts, two layers each; the mean over layers comes before the mean over prompts
            ("a" * 16, "one", 256, 0.2, 0.5, 0.1),
            ("a" * 16, "one", 256, 0.4, 0.7, 0.3),
            ("a" * 16, "two", 256, 0.9, 1.0, 0.0),
            ("a" * 16, "two", 32, 0.0, 0.0, 9.0),
            ("b" * 16, "one", 256, 1.0, 1.0, 0.0),
        ],
        columns=[
            *("run_id", "sample_id", "k"),
            *("recall_at_k", "attention_mass", "output_rel_error"),
        ],
    )
    return rows, samples


def test_a_prompt_is_one_line_whatever_its_layers_and_other_budgets() -> None:
    lines = by_prompt(*_sweep(), k=256)
    found = {
        (run[0], sample): recall
        for run, sample, recall in zip(
            lines["run_id"], lines["sample_id"], lines["recall_at_k"], strict=True
        )
    }
    assert found == {("a", "one"): pytest.approx(0.3), ("a", "two"): 0.9, ("b", "one"): 1.0}


def test_the_table_names_what_varies_and_gives_intervals_over_prompts() -> None:
    table = selection_table(*_sweep(), k=256)
    assert table.head[:3] == ["method", "use_norm", "rbit"]
    first = next(row for row in table.rows if row[1] == "True")
    assert first[2] == "32"
    assert first[3] == "0.600 [0.300, 0.900]"
    assert first[-1] == "2"


def test_a_budget_that_was_not_measured_is_one_sentence() -> None:
    with pytest.raises(RecordError, match="k must be a budget that was measured, got 100"):
        selection_table(*_sweep(), k=100)
