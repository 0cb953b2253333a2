"""Published numbers are the paper's, name their table or figure, and are compared correctly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from topkbench.analysis.comparison.configurations import compare
from topkbench.analysis.record.row import Row
from topkbench.analysis.record.store import frame
from topkbench.analysis.report.build import main
from topkbench.analysis.tables.paper import (
    FOLDER,
    compare_with_published,
    published,
    published_table,
    without_counterpart,
)

RowMaker = Callable[..., Row]
RULER_11 = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2"),
    *("niah_multivalue", "niah_multiquery", "vt", "fwe", "qa_1", "qa_2"),
)


def number(place: str, model: str, task: str, method: str, **knobs: int) -> float:
    data = published()
    named = {"place": place, "model": model, "task": task, "method": method, **knobs}
    for name, value in named.items():
        data = data[data[name] == value]
    (value,) = data["value"]
    return float(value)


@pytest.mark.parametrize(
    ("place", "model", "task", "method", "knobs", "value"),
    [
        ("Table 1", "llama2_7b_32k", "LCC", "hata", {"k": 512}, 68.42),
        ("Table 1", "llama31_8b", "mean", "snapkv", {}, 51.00),
        ("Table 2", "llama2_7b_32k", "niah_single_3", "hata", {"k": 1024}, 83.33),
        ("Table 2", "llama31_8b", "fwe", "streaming_llm", {"k": 2048}, 67.7),
        ("Table 2", "llama31_8b", "mean", "hata", {"length": 131072}, 80.57),
        ("Table 3", "llama31_8b", "decode", "hata_off", {}, 15.86),
        ("Table 6", "llama31_8b", "NumStr", "hata", {}, 96.44),
        ("Table 7", "llama31_8b", "easy_long", "exact", {"k": 1024}, 33.33),
        ("Table 8", "qwen25_14b_1m", "PCnt", "hata", {}, 20.50),
        ("Table 9", "qwen25_32b", "mean", "full", {}, 53.52),
        ("Table 10", "qwen25_14b_1m", "mean", "hata", {"k": 4096}, 88.05),
        ("Figure 4", "llama31_8b", "total", "hata", {}, 225.4),
        ("Figure 5", "llama2_7b_32k", "batch_8", "full", {"length": 32768}, 8.26),
        ("Figure 5", "llama31_8b", "batch_1", "hata", {"length": 262144}, 0.85),
        ("Figure 6", "llama2_7b_32k", "mean", "hata", {"k": 512}, 112),
        ("Figure 7", "llama31_8b", "fwe", "quest", {"k": 1536}, 63.89),
        ("Figure 8", "llama2_7b_32k", "gov_report", "hata", {"rbit": 32}, 16.75),
        ("Figure 9", "llama2_7b_32k", "plus_encode", "hata", {}, 264.74),
    ],
)
def test_a_published_number_is_the_papers(
    place: str, model: str, task: str, method: str, knobs: dict[str, int], value: float
) -> None:
    assert number(place, model, task, method, **knobs) == value


def test_every_number_has_its_source() -> None:
    for path in sorted(FOLDER.glob("*.csv")):
        data = pd.read_csv(path, dtype=str, keep_default_na=False)
        kind, digits = path.stem.removeprefix("hata_").rstrip("0123456789"), path.stem
        place = f"{kind.title()} {digits.removeprefix(f'hata_{kind}')}"
        assert set(data["place"]) == {place}
        assert set(data["source"]) == {"2506.02572"}
        for name in ("model", "benchmark", "task", "method", "metric", "value", "origin"):
            assert (data[name] != "").all(), f"{path.name}: {name}"
    data = published()
    knobs = ["place", "model", "benchmark", "task", "length", "method", "k", "rbit", "metric"]
    # Figure 5 shows batch 1 at 32K in both of its halves.
    twice = data[data.duplicated(knobs, keep=False)]
    assert set(twice["place"]) == {"Figure 5"}
    assert set(twice["length"]) == {32768}


def test_published_averages_match_their_entries_with_one_exception() -> None:
    data = published()
    data = data[(data["origin"] == "printed") & (data["metric"] == "score")]
    data = data[data["place"] != "Table 7"]  # its total weighs by the number of questions
    odd = []
    for (place, model, method), part in data.groupby(["place", "model", "method"]):
        mean = part.loc[part["task"] == "mean", "value"].item()
        entries = part.loc[part["task"] != "mean", "value"]
        if abs(entries.mean() - mean) > 0.06:
            odd.append((place, model, method))
    assert odd == [("Table 10", "qwen25_14b_1m", "hata")]


def ruler_rows(row: RowMaker, subtasks: tuple[str, ...], **settings: object) -> pd.DataFrame:
    known = {"model": "llama31_8b", "method": "hata", "k": 2048, "rbit": 128, "kv_len": 131000}
    known |= {"length": None, "question": "dense", "protocol": "native", **settings}
    return frame([row(subtask=name, score=80.0, **known) for name in (*subtasks, "mean")])


def verdict(rows: pd.DataFrame, task: str = "mean") -> pd.Series:
    numbers = published()
    for name, value in (("place", "Table 2"), ("model", "llama31_8b"), ("method", "hata")):
        numbers = numbers[numbers[name] == value]
    compared = compare_with_published(compare(rows).configurations, numbers)
    (found,) = [one for _, one in compared.iterrows() if one["task"] == task]
    return found


@pytest.mark.parametrize("prompts", [None, "RULER 00112233 (chat template)"])
def test_the_papers_own_setting_is_comparable(row: RowMaker, prompts: str | None) -> None:
    found = verdict(ruler_rows(row, RULER_11, prompts=prompts))
    assert (found["comparable"], found["why"]) == (True, "")
    assert (found["published"], found["ours"]) == (80.57, 80.0)
    assert found["ours_is"] == "llama31_8b, 131,000 tokens, k=2048, rbit=128"
    assert found["caveat"] == "11 of RULER's 13 sub-tasks: not niah_multikey_3 and cwe"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"model": "tiny"}, "model: llama31_8b there, tiny here"),
        ({"kv_len": 4096}, "length: 131,072 tokens there, 4,096 here"),
        ({"kv_len": None}, "length: 131,072 tokens there, unknown here"),
        ({"k": 512}, "k: 2048 there, 512 here"),
        ({"rbit": 256}, "rbit: 128 there, 256 here"),
        ({"question": "sparse"}, "question: prefilled there, sparse here"),
        ({"protocol": "unified"}, "protocol: the paper's there, protocol=unified here"),
        (
            {"length": 131072},
            "prompts: RULER's there, ours of random words here (task=ruler has RULER's)",
        ),
        (
            {"prompts": "topkbench 1"},
            "prompts: RULER's there, ours of random words here (task=ruler has RULER's)",
        ),
    ],
)
def test_each_difference_to_the_paper_is_reported(
    row: RowMaker, settings: dict[str, object], why: str
) -> None:
    found = verdict(ruler_rows(row, RULER_11, **settings))
    assert (found["comparable"], found["why"]) == (False, why)


def test_a_mean_over_other_sub_tasks_is_reported_as_a_difference(row: RowMaker) -> None:
    rows = ruler_rows(row, ("vt", "fwe", "cwe"))
    why = "sub-tasks: 11 of RULER's 13 in the mean there, 3 here"
    assert verdict(rows)["why"] == why
    assert verdict(rows, "vt")["comparable"]
    missing = verdict(rows, "qa_1")
    assert pd.isna(missing["ours"])
    assert missing["why"] == "the sub-task was not run"


def test_longbench_e_is_compared_with_lm_evals_tasks(row: RowMaker) -> None:
    lm_eval = "lm-eval 0.4.13: longbench_lcc_e 5.0 (0123456789abcdef, raw)"
    known = {"task": "lm_eval", "model": "llama31_8b", "method": "hata", "k": 512, "rbit": 128}
    known |= {"question": "dense", "protocol": "native", "length": None}

    def found(prompts: str, subtask: str = "LCC") -> pd.Series:
        rows = frame(
            [
                row(**known, prompts=prompts, subtask=name, score=60.0)
                for name in ("longbench_lcc_e", "mean")
            ]
        )
        numbers = published()
        for name, value in (("place", "Table 1"), ("model", "llama31_8b"), ("method", "hata")):
            numbers = numbers[numbers[name] == value]
        data = compare_with_published(compare(rows).configurations, numbers)
        data = data[data["task"] == subtask]
        return data.iloc[0]

    stops = (
        "stops: a line break ends answers to questions there, as LongBench has it; lm-eval's not"
    )
    long = found(f"{lm_eval}, of at least 4,096 tokens")
    assert (long["ours"], long["why"]) == (60.0, stops)
    every = found(lm_eval)
    assert every["why"] == f"samples: those of more than 4,096 tokens there, all here; {stops}"
    mean = found(f"{lm_eval}, of at least 4,096 tokens", "mean")
    assert mean["why"].startswith("sub-tasks: 13 of LongBench-E's 13 in the mean there, 1 here")
    # A mean of other tasks is none of LongBench-E's.
    rows = frame(
        [row(**known, prompts=lm_eval, subtask=name, score=60.0) for name in ("gsm8k", "mean")]
    )
    numbers = published()[published()["benchmark"] == "longbench_e"]
    data = compare_with_published(compare(rows).configurations, numbers)
    assert data["ours"].isna().all()


def test_a_published_number_is_compared_with_our_nearest(row: RowMaker) -> None:
    parts = [
        ruler_rows(row, RULER_11, run_id=name * 16, k=k, model=model)
        for name, k, model in (("1", 2048, "tiny"), ("2", 512, "llama31_8b"))
    ]
    assert verdict(pd.concat(parts, ignore_index=True))["ours_is"].startswith("llama31_8b")


def test_numbers_without_a_counterpart_are_listed_by_table(row: RowMaker) -> None:
    sentences = without_counterpart(
        compare_with_published(compare(ruler_rows(row, RULER_11)).configurations)
    )
    assert sentences[-1].startswith("Table 10: 24 numbers without one of ours")
    first = next(one for one in sentences if one.startswith("Table 1:"))
    assert "task=lm_eval was not run" in first
    assert "Caveats: samples of more than 4,096 tokens alone" in first
    assert (
        published_table(compare_with_published(compare(frame([row(task="none")])).configurations))
        is None
    )


def test_the_report_shows_published_numbers_on_request(row: RowMaker, tmp_path: Path) -> None:
    rows = ruler_rows(row, ("vt", "fwe"), model="tiny")
    rows.to_csv(tmp_path / "rows.csv", index=False)
    assert main([str(tmp_path), "--published", "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Published numbers beside ours" in text
    line = next(one for one in text.splitlines() if "Table 2" in one and "| mean" in one)
    assert [cell.strip() for cell in line.split("|")][10:15] == [
        *("63.9", "80.0", "tiny, 131,000 tokens, k=2048, rbit=128", "no"),
        "model, length, k, sub-tasks",
    ]
    assert len(pd.read_csv(tmp_path / "out" / "published.csv")) == len(published())
    assert "Published numbers" in (tmp_path / "out" / "report.html").read_text()
    assert main([str(tmp_path), "--out", str(tmp_path / "plain")]) == 0
    assert "Published" not in (tmp_path / "plain" / "report.md").read_text()
    assert not (tmp_path / "plain" / "published.csv").exists()
