"""Files of rows and samples that are cut, edited or damaged are refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from topkbench.analysis.comparison.configurations import compare
from topkbench.analysis.record.rows_file import read_rows, read_samples
from topkbench.analysis.record.store import RecordError, Row, frame
from topkbench.analysis.report import build as report


@pytest.fixture
def file(tmp_path: Path, row: Callable[..., Row]) -> Path:
    """Three rows; of the last, the last field is a method's setting."""
    numbers: dict[str, float] = {"speedup_vs_full": 1.5, "speedup_ci_low": 1.25}
    rows = [
        row(run_id=f"{place:016x}", method="quest", k=64, score=50.0 + place, **numbers)
        for place in range(3)
    ]
    path = tmp_path / "rows.csv"
    frame([one.replace(parameters={"page_size": 16}) for one in rows]).to_csv(path, index=False)
    return path


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("score", "good", "score must be a finite number or empty, but row 2 of FILE has 'good'"),
        ("score", "inf", "score must be a finite number or empty, but row 2 of FILE has 'inf'"),
        ("k", "64.5", "k must be a whole number or empty, but row 2 of FILE has '64.5'"),
        ("status", "fine", "row 2 of FILE is not as a run wrote it: status must be one of ok,"),
        ("status", "wrong", "row 2 of FILE is not as a run wrote it: columns of scores,"),
        ("status", "", "row 2 of FILE is not as a run wrote it: status must be one of ok,"),
        ("git_dirty", "maybe", "row 2 of FILE is not as a run wrote it: git_dirty must be bool"),
    ],
)
def test_a_value_that_no_row_has_is_named_with_its_row_and_column(
    file: Path,
    capsys: pytest.CaptureFixture[str],
    column: str,
    value: str,
    message: str,
) -> None:
    data = pd.read_csv(file, dtype=str)
    data.loc[1, column] = value
    data.to_csv(file, index=False)
    data.to_parquet(file.with_suffix(".parquet"))
    for edited in (file, file.with_suffix(".parquet")):
        assert report.main([str(edited)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: " + message.replace("FILE", str(edited)))
        assert error.count("\n") == 1
    assert not (file.parent / "report.html").exists()


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (1, "must end with the end of a line, but line 4 has none"),
        (2, "must end with the end of a line, but line 4 has none"),
        (3, "must end with the end of a line, but line 4 has none"),
        (40, "fields in every line, as in its head, but line 4 has"),
    ],
)
def test_a_file_that_was_cut_is_refused(file: Path, cut: int, message: str) -> None:
    whole = file.read_text()
    file.write_text(whole[:-cut])
    with pytest.raises(RecordError, match=message):
        read_rows(file)
    file.write_text(whole + "\n")  # a blank line at the end is no damage
    assert read_rows(file)["score"].tolist() == [50.0, 51.0, 52.0]


def test_a_csv_file_gives_the_rows_of_the_parquet_file(
    row: Callable[..., Row], tmp_path: Path
) -> None:
    settings: list[dict[str, object]] = [
        {"rank": 16, "share": 1.0, "use_norm": True, "texts": "None", "layers": 2, "p": 0.5},
        {"rank": 32, "share": 2.0, "use_norm": False, "texts": "NA", "layers": "::16", "p": 1},
        {},
    ]
    rows = frame(
        [
            row(run_id=f"{n:016x}", method="loki", k=64, score=100 / (3 + n), parameters=one)
            for n, one in enumerate(settings)
        ]
    )
    rows.to_csv(tmp_path / "rows.csv", index=False)
    rows.to_parquet(tmp_path / "rows.parquet")
    found, expected = (read_rows(tmp_path / f"rows.{kind}") for kind in ("csv", "parquet"))
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert [str(one) for one in found["p_rank"]] == ["16", "32", "None"]


def test_a_field_that_holds_a_line_end_is_no_damage(file: Path) -> None:
    data = pd.read_csv(file).assign(device="two\nlines, and a \u2028 sign")
    data.to_csv(file, index=False)
    assert read_rows(file)["device"].unique().tolist() == ["two\nlines, and a \u2028 sign"]


def test_samples_have_numbers_as_scores(tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    assert read_samples(path).empty
    pd.DataFrame({"run_id": ["a", "b"], "score": ["100", "half"]}).to_parquet(path)
    with pytest.raises(RecordError, match=f"score must be a finite number .* row 2 of {path} has"):
        read_samples(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RecordError, match="must be a table of samples, but cannot be read"):
        read_samples(path)


@pytest.mark.parametrize(
    ("scores", "missing"), [([100.0, None, 0.0], "1 of 3"), ([None] * 3, "3 of 3")]
)
def test_answers_without_a_score_are_refused(
    file: Path, capsys: pytest.CaptureFixture[str], scores: list[float | None], missing: str
) -> None:
    path = file.with_name("samples.parquet")
    ids = [f"{place:016x}" for place in range(3)]
    given = pd.DataFrame({"run_id": ids, "subtask": "vt", "sample_id": "vt-0", "score": scores})
    given.assign(prediction="an answer").to_parquet(path)
    assert report.main([str(file)]) == 2
    assert capsys.readouterr().err == (
        f"error: {path} must have a score for every answer, but {missing} have none; copy or write"
        " it again, or remove it: without that file the report has no intervals.\n"
    )
    # Without answers in words, a cell has scores for all of its samples or for none.
    given.assign(run_id=ids[0]).to_parquet(path)
    if missing == "1 of 3":
        with pytest.raises(RecordError, match="but 1 of 3 have none"):
            read_samples(path)
    else:
        assert len(read_samples(path)) == 3


def test_a_report_of_samples_without_any_score_is_one_of_rows_alone(
    tmp_path: Path, row: Callable[..., Row]
) -> None:
    given = {"method": "quest", "score": 50.0, "device": "AMD EPYC, 2 cores"}
    rows = [
        row(run_id=f"{k:016x}", k=k, bytes_read_per_step=1000 * k, **given) for k in (64, 128, 256)
    ]
    samples = pd.DataFrame(
        {"run_id": [one.run_id for one in rows], "subtask": "vt", "sample_id": "vt-0"}
    )
    without = compare(frame(rows))
    found = compare(frame(rows), samples.assign(score=float("nan")))
    assert (found.answers, found.notes) == (without.answers, without.notes)


def test_samples_of_perplexity_have_no_score_beside_those_that_do(tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    samples = [
        {"run_id": "a", "sample_id": "text-0", "nll": 2.5},
        {"run_id": "b", "sample_id": "vt-0", "score": 50.0, "prediction": "an answer"},
    ]
    pd.DataFrame(samples).to_parquet(path)
    assert read_samples(path)["score"].tolist()[1] == 50.0
    pd.DataFrame(samples[:1]).to_parquet(path)
    assert read_samples(path)["nll"].tolist() == [2.5]


@pytest.mark.parametrize(
    ("columns", "task"),
    [
        ({"task": "ruler", "length": 4096, "prompts": "topkbench 1"}, "ruler_words"),
        ({"task": "ruler", "length": None, "prompts": "RULER 00112233 (raw)"}, "ruler"),
        ({"task": "ruler", "length": 4096, "prompts": "RULER written by topkbench 1"}, "ruler"),
        ({"task": "ruler", "length": 4096, "prompts": None}, "ruler"),  # failed before its prompts
        ({"task": "ruler", "length": 4096}, "ruler_words"),  # older than the column
        ({"task": "ruler", "length": None}, "ruler"),
        ({"task": "needle", "length": 4096}, "needle"),
    ],
)
def test_rows_over_our_own_words_load_under_the_tasks_present_name(
    row: Callable[..., Row], tmp_path: Path, columns: dict[str, object], task: str
) -> None:
    path = tmp_path / "rows.csv"
    flat = {**row().flat(), **columns}
    if "prompts" not in columns:
        del flat["prompts"]
    data = pd.DataFrame([flat])
    data.to_csv(path, index=False)
    assert read_rows(path)["task"].tolist() == [task]
    data.to_parquet(tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet")["task"].tolist() == [task]
    assert Row.from_flat(flat).task == task
