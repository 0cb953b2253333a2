from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from topkbench.analysis.comparison.configurations import DEFAULTS, Comparison, compare
from topkbench.analysis.record.provenance import pinned_versions
from topkbench.analysis.record.store import Row, Sweep, frame
from topkbench.analysis.tables.overview import (
    failure_table,
    main_table,
    subtask_table,
    summary_table,
)

RowMaker = Callable[..., Row]


def samples(run_id: str, scores: list[float], subtask: str = "vt") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "run_id": run_id,
            "sample_id": [f"s{i}" for i in range(len(scores))],
            "subtask": subtask,
            "score": scores,
            "references": '["r"]',
        }
    )


@pytest.fixture
def trio(row: RowMaker) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = frame(
        [
            row(run_id="f" * 16, bytes_read_per_step=16 * 2**20, decode_ms_p50=2.0),
            row(run_id="a" * 16, method="quest", k=64, decode_ms_p50=1.0, recall_at_k=0.5),
            row(run_id="b" * 16, method="hata", k=64, rbit=128, recall_at_k=0.875),
        ]
    )
    outcomes = pd.concat(
        [
            samples("f" * 16, [100.0] * 20),
            samples("a" * 16, [100.0] * 5 + [0.0] * 15),
            samples("b" * 16, [100.0] * 18 + [0.0] * 2),
        ]
    )
    return rows, outcomes


def test_rows_timed_with_other_waits_are_said_to_be(row: RowMaker) -> None:
    usual = row(decode_ms_p50=2.0, omp_wait_policy="not set")
    passive = row(run_id="p" * 16, decode_ms_p50=2.0, omp_wait_policy="passive")
    older = row(run_id="o" * 16, decode_ms_p50=2.0)
    untimed = row(run_id="u" * 16, omp_wait_policy="passive")
    assert not [one for one in compare(frame([usual, older, untimed])).notes if "OMP" in one]
    (note,) = [one for one in compare(frame([usual, passive])).notes if "OMP" in one]
    assert note == "These rows mix values of OMP_WAIT_POLICY: not set, passive."


def test_lines_left_out_and_samples_that_files_lack_are_said(row: Callable[..., Row]) -> None:
    rows = [
        row(run_id=run_id, method=method, subtask=subtask, prompts="RULER 01ab (raw)", **numbers)
        for run_id, method in (("a" * 16, "full"), ("b" * 16, "quest"))
        for subtask, numbers in (
            ("vt", {"wanted_samples": 500, "source_samples": 3}),
            ("cwe", {"wanted_samples": 500, "source_samples": 500}),
            ("mean", {"wanted_samples": 1000, "source_samples": 503, "skipped_samples": 2}),
        )
    ]
    assert compare(frame(rows)).notes == [
        "ruler, prompts of RULER 01ab (raw): task.skip_bad left out 2 bad lines of the files; "
        "task.skip_bad=false names the first.",
        "ruler/vt: the files hold 3 of the 500 samples that num_samples asks for.",
    ]


def test_a_small_frame_gives_the_expected_table(trio: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    table = main_table(compare(*trio).overall)
    assert table.head == [
        "Method",
        "k",
        "rbit",
        "Score (0–100)",
        "Δ full (points)",
        "Recall@k",
        "Read/step (MiB)",
        "Decode step (ms)",
        "n",
    ]
    assert [row[:3] + row[5:] for row in table.rows] == [
        ["Full attention", "–", "–", "–", "16", "2", "20"],
        ["HATA", "64", "128", "0.875", "–", "–", "20"],
        ["Quest", "64", "–", "0.500", "–", "1", "20"],
    ]
    assert table.rows[0][3:5] == ["100.0 [83.9, 100.0]", "–"]
    assert table.rows[1][3] == "90.0 [69.9, 97.2]"
    assert table.rows[1][4] == "−10.0 [−28.1, +11.3]"
    assert table.strong == {(1, 3)}
    assert "**90.0 [69.9, 97.2]**" in table.markdown()


def test_ties_are_all_bold_and_nothing_is_bold_without_a_difference(
    trio: tuple[pd.DataFrame, pd.DataFrame], row: RowMaker
) -> None:
    rows, outcomes = trio
    rows = pd.concat([rows, frame([row(run_id="c" * 16, method="loki", k=64)])])
    outcomes = pd.concat([outcomes, samples("c" * 16, [100.0] * 17 + [0.0] * 3)])
    configurations = compare(rows.reset_index(drop=True), outcomes).overall
    assert configurations.loc[configurations["best"], "method"].tolist() == ["hata", "loki"]
    without = rows["method"] != "quest"
    configurations = compare(rows[without].reset_index(drop=True), outcomes).overall
    assert not configurations["best"].any()


def test_oracles_are_never_bold(trio: tuple[pd.DataFrame, pd.DataFrame], row: RowMaker) -> None:
    rows, outcomes = trio
    rows = pd.concat([rows, frame([row(run_id="c" * 16, method="exact", k=64)])])
    outcomes = pd.concat([outcomes, samples("c" * 16, [100.0] * 20)])
    configurations = compare(rows.reset_index(drop=True), outcomes).overall
    assert configurations.loc[configurations["best"], "method"].tolist() == ["hata"]


def test_seeds_are_pooled_and_each_is_paired_with_its_own_full_attention(row: RowMaker) -> None:
    rows = frame(
        [
            row(run_id=name * 16, method=method, k=k, seed=seed, decode_ms_p50=ms)
            for name, method, k, seed, ms in (
                ("1", "full", None, 1, 2.0),
                ("2", "full", None, 2, 2.0),
                ("3", "hata", 64, 1, 1.0),
                ("4", "hata", 64, 2, 3.0),
            )
        ]
    )
    outcomes = pd.concat(
        [
            samples("1" * 16, [100.0] * 4),
            samples("2" * 16, [0.0] * 4),
            samples("3" * 16, [100.0] * 4),
            samples("4" * 16, [0.0] * 3 + [100.0]),
        ]
    )
    configurations = compare(rows, outcomes).overall
    hata = configurations[configurations["method"] == "hata"].iloc[0]
    assert (hata["cells"], hata["n"], hata["score"], hata["decode_ms_p50"]) == (2, 8, 62.5, 2.0)
    assert hata["delta_full"] == 12.5


def test_two_cells_of_one_seed_are_never_pooled(row: RowMaker) -> None:
    """Cells that differ only in their configuration's or their artifact's digest stay apart."""
    rows = frame(
        [
            row(run_id="f" * 16),
            row(run_id="1" * 16, method="loki", k=64, artifact_digest="a" * 64, config_digest="c"),
            row(run_id="2" * 16, method="loki", k=64, artifact_digest="b" * 64, config_digest="c"),
            row(run_id="3" * 16, method="quest", k=64, config_digest="d" * 16),
            row(run_id="4" * 16, method="quest", k=64, config_digest="e" * 16),
        ]
    )
    outcomes = pd.concat(
        [
            samples("f" * 16, [100.0] * 4),
            samples("1" * 16, [100.0] * 4),
            samples("2" * 16, [0.0] * 4),
            samples("3" * 16, [100.0] * 4),
            samples("4" * 16, [0.0] * 4),
        ]
    )
    configurations = compare(rows, outcomes).overall
    assert configurations[["label", "cells", "score"]].values.tolist() == [
        ["Full attention", 1, 100.0],
        ["Quest (config dddddddd)", 1, 100.0],
        ["Quest (config eeeeeeee)", 1, 0.0],
        ["Loki (artifact aaaaaaaa)", 1, 100.0],
        ["Loki (artifact bbbbbbbb)", 1, 0.0],
    ]


def test_runs_that_learn_nothing_are_told_apart_as_runs(row: RowMaker) -> None:
    """As where the code changed between two sweeps, or only one of two cells has an artifact."""
    cells: list[dict[str, Any]] = [
        {"run_id": "1" * 16, "code_digest": "a" * 16},
        {"run_id": "2" * 16, "code_digest": "b" * 16},
        {"run_id": "3" * 16, "method": "loki", "k": 64, "artifact_digest": "c" * 64},
        {"run_id": "4" * 16, "method": "loki", "k": 64},
    ]
    found = compare(frame([row(**one) for one in cells])).overall
    assert list(found["label"]) == [
        *("Full attention (run 11111111)", "Full attention (run 22222222)"),
        *("Loki (run 33333333)", "Loki (run 44444444)"),
    ]


SUBTASKS = {"niah": [100.0, 0.0, 100.0], "vt": [0.0, 50.0], "cwe": [100.0]}
RECALLS = {"niah": 0.25, "vt": 0.5, "cwe": 0.75}


def cell(row: RowMaker, run_id: str, subtasks: list[str], **named: Any) -> list[Row]:
    """Return the rows of a cell on some sub-tasks, with their mean."""
    quality: dict[str, Any] = {"judged_prompts": 2, "num_samples": 3, "task": "ruler"}
    rows = [
        row(run_id=run_id, subtask=name, recall_at_k=RECALLS[name], **quality, **named)
        for name in subtasks
    ]
    mean = sum(RECALLS[name] for name in subtasks) / len(subtasks)
    quality |= {name: quality[name] * len(subtasks) for name in ("judged_prompts", "num_samples")}
    return [*rows, row(run_id=run_id, subtask="mean", recall_at_k=mean, **quality, **named)]


def answered(run_id: str, subtasks: list[str], offset: float = 0.0) -> pd.DataFrame:
    every = [
        samples(run_id, [max(one - offset, 0.0) for one in SUBTASKS[name]], name)
        for name in subtasks
    ]
    return pd.concat(every)


def test_the_parts_of_a_sweep_are_compared_as_the_whole_is(row: RowMaker) -> None:
    """Two sub-tasks in one command and the third in another, as where each takes an hour."""
    methods: tuple[tuple[str, dict[str, Any]], ...] = (
        ("f", {}),
        ("a", {"method": "quest", "k": 64, "config_digest": "c" * 16}),
    )
    parts = (["niah", "vt"], ["cwe"])
    whole, apart = [], []
    outcomes = []
    for letter, named in methods:
        offset = 0.0 if letter == "f" else 50.0
        whole += cell(row, letter * 16, list(SUBTASKS), **named)
        outcomes.append(answered(letter * 16, list(SUBTASKS), offset))
        for number, subtasks in enumerate(parts):
            run_id = f"{letter}{number}" * 8
            full = {} if letter == "f" else {"full_run_id": f"f{number}" * 8}
            apart += cell(row, run_id, subtasks, **named, **full)
            outcomes.append(answered(run_id, subtasks, offset))
    pooled, one = (
        compare(frame(rows), pd.concat(outcomes)).configurations.drop(
            columns=["run_ids", "cells", "full_run_id"], errors="ignore"
        )
        for rows in (apart, whole)
    )
    assert len(one) == 8
    pd.testing.assert_frame_equal(pooled, one)
    mean = pooled[(pooled["method"] == "quest") & (pooled["subtask"] == "mean")].iloc[0]
    assert (mean["recall_at_k"], mean["judged_prompts"], mean["n"]) == (0.5, 6, 6)
    # Without samples the mean has no interval.
    bare = compare(frame(apart)).overall
    assert list(bare["recall_at_k"]) == [0.5, 0.5]
    assert bare["score_ci_low"].isna().all()


def test_a_parts_note_on_full_attention_is_not_said_of_the_mean(row: RowMaker) -> None:
    named = {"method": "quest", "k": 64, "full_note": "full attention scores 0 here."}
    rows = [
        *cell(row, "e" * 16, ["niah"]),
        *cell(row, "f" * 16, ["vt"]),
        *cell(row, "1" * 16, ["niah"], method="quest", k=64),
        *cell(row, "2" * 16, ["vt"], **named),
    ]
    assert compare(frame(rows)).notes[0].startswith("ruler/vt: full attention scores 0 here.")
    failed = [row(run_id="3" * 16, subtask="mean", task="ruler", **named)]
    assert compare(frame([*rows, *failed])).notes[0].startswith("ruler/mean, ruler/vt: full")


def test_seeds_with_unlike_parts_are_not_pooled(row: RowMaker) -> None:
    """As where the second seed's other part is still to be measured."""
    rows = [
        *cell(row, "1" * 16, ["niah"], method="quest", k=64, seed=0, git_commit="a" * 40),
        *cell(row, "2" * 16, ["cwe"], method="quest", k=64, seed=0, git_commit="b" * 40),
        *cell(row, "3" * 16, ["niah"], method="quest", k=64, seed=1),
    ]
    means = compare(frame(rows)).overall.set_index("label")
    assert list(means.index) == ["Quest (cwe, niah)", "Quest (niah)"]
    whole = means.loc["Quest (cwe, niah)"]
    assert (whole["recall_at_k"], whole["cells"]) == (0.5, 2)
    assert whole["git_commit"] == f"{'a' * 12}, {'b' * 12}"
    rows += cell(row, "4" * 16, ["cwe"], method="quest", k=64, seed=1)
    (one,) = compare(frame(rows)).overall.to_dict("records")
    assert (one["label"], one["recall_at_k"], one["cells"]) == ("Quest", 0.5, 4)
    assert set(one["by_seed"]["recall_at_k"]) == {0, 1}


def test_a_part_is_paired_though_full_attention_answered_more_than_once(row: RowMaker) -> None:
    rows = [
        *cell(row, "e" * 16, ["niah"]),
        *cell(row, "f" * 16, ["niah", "vt"], config_digest="f"),
        *cell(row, "1" * 16, ["niah"], method="quest", k=64, full_run_id="e" * 16),
        *cell(row, "2" * 16, ["vt"], method="quest", k=64, full_run_id="f" * 16),
    ]
    outcomes = [answered("e" * 16, ["niah"]), answered("f" * 16, ["niah", "vt"])]
    outcomes += [answered("1" * 16, ["niah"], 50.0), answered("2" * 16, ["vt"], 50.0)]
    found = compare(frame(rows), pd.concat(outcomes))
    assert not [one for one in found.notes if "paired" in one]
    quest = found.overall[found.overall["method"] == "quest"].iloc[0]
    # 100, 0, 100 against 50, 0, 50, and 0, 50 against 0, 0: the mean of -33.3 and -25.
    assert quest["delta_full"] == pytest.approx(-(100 / 3 + 25) / 2)


def test_means_over_other_subtasks_are_named(row: RowMaker) -> None:
    rows = [
        *cell(row, "f" * 16, ["niah", "vt"]),
        *cell(row, "a" * 16, ["niah"], method="quest", k=64),
        *cell(row, "b" * 16, ["niah", "vt"], method="loki", k=64),
    ]
    (note,) = [one for one in compare(frame(rows)).notes if "Means" in one]
    assert note == "Means of Quest are not over the others' sub-tasks, they lack vt."


def test_cells_that_share_a_subtask_are_no_parts(row: RowMaker) -> None:
    rows = [
        *cell(row, "1" * 16, ["niah", "vt"], method="quest", k=64),
        *cell(row, "2" * 16, ["vt", "cwe"], method="quest", k=64),
    ]
    found = compare(frame(rows)).configurations
    assert set(found["label"]) == {"Quest (run 11111111)", "Quest (run 22222222)"}
    assert found.groupby("label").size().to_list() == [3, 3]


def test_a_cell_is_paired_with_the_full_attention_that_answered_its_prompts(row: RowMaker) -> None:
    """Full attention may have run twice, once on other sub-tasks with more samples."""
    rows = frame(
        [
            row(run_id="1" * 16, num_samples=9, config_digest="a"),
            row(run_id="2" * 16, num_samples=4, config_digest="b"),
            row(run_id="3" * 16, method="quest", k=64),
        ]
    )
    outcomes = pd.concat(
        [
            samples("1" * 16, [0.0] * 9, subtask="cwe"),
            samples("2" * 16, [100.0] * 4),
            samples("3" * 16, [50.0] * 4),
        ]
    )
    configurations = compare(rows, outcomes).overall
    assert configurations.loc[configurations["method"] == "quest", "delta_full"].tolist() == [-50.0]


def test_a_cell_is_paired_with_the_full_attention_that_it_names(row: RowMaker) -> None:
    """Two dtypes, or a model before and after retraining: same prompts, different answers."""
    rows = frame(
        [
            row(run_id="1" * 16, parameters={"dtype": "float32"}),
            row(run_id="2" * 16, parameters={"dtype": "bfloat16"}),
            row(run_id="3" * 16, method="quest", k=64, full_run_id="1" * 16),
            row(run_id="4" * 16, method="quest", k=128, full_run_id="2" * 16),
        ]
    )
    outcomes = pd.concat(
        [
            samples("1" * 16, [100.0] * 4),
            samples("2" * 16, [50.0] * 4),
            samples("3" * 16, [100.0] * 4),
            samples("4" * 16, [50.0] * 4),
        ]
    )
    configurations = compare(rows, outcomes).overall
    assert configurations.loc[configurations["method"] == "quest", "delta_full"].tolist() == [
        0.0,
        0.0,
    ]


def test_machines_are_never_averaged_and_a_mix_is_reported(row: RowMaker) -> None:
    rows = frame(
        [
            row(method="quest", k=64, device="A", decode_ms_p50=1.0),
            row(method="quest", k=64, device="B", decode_ms_p50=9.0, git_commit="0" * 40),
        ]
    )
    found = compare(rows)
    assert found.configurations["decode_ms_p50"].tolist() == [1.0, 9.0]
    assert found.notes == [
        "These rows mix commits: 000000000000, fb6212e9d0c1.",
        "These rows mix machines: A, B.",
    ]
    assert [key["device"] for key, _ in found.by_setting()] == ["A", "B"]


def test_full_attention_with_other_threads_is_compared_by_answers_and_not_by_times(
    row: RowMaker,
) -> None:
    one, two = ("AMD EPYC, 1 threads", "AMD EPYC, 2 threads")
    rows = frame(
        [
            row(run_id="f" * 16, device=two, threads=2, score=75.0, decode_ms_p50=2.0),
            row(run_id="a" * 16, method="quest", k=64, device=one, threads=1, score=50.0),
            row(run_id="b" * 16, method="hata", k=64, device="Xeon, 1 threads", score=50.0),
        ]
    ).assign(config_digest=["1", "2", "3"])
    outcomes = pd.concat(
        [
            samples("f" * 16, [100.0] * 3 + [0.0]),
            samples("a" * 16, [100.0] * 2 + [0.0] * 2),
        ]
    )
    found = compare(rows, outcomes)
    shown = {key["device"]: part.set_index("method") for key, part in found.by_setting()}
    assert list(shown[one].index) == ["full", "quest"]
    assert shown[one]["score"].tolist() == [75.0, 50.0]
    assert shown[one].loc["quest", "delta_full"] == -25.0
    times = ["decode_ms_p50", "full_ms_p50", "decode_vs_full"]
    assert shown[one].loc["full", times].isna().all()
    assert shown[two].loc["full", times].tolist() == [2.0, 2.0, 1.0]  # where it was timed
    assert list(shown["Xeon, 1 threads"].index) == ["hata"]  # another machine
    assert found.notes[-1] == (
        f"Full attention was not run on {one}: its answers there are those with another number of"
        f" threads ({two}), and it has no times there."
    )


def test_different_prompts_are_never_pooled_or_compared(row: RowMaker) -> None:
    kinds = (None, "RULER 00112233 (chat template)", "RULER 00112233 (raw)", "topkbench 1")
    rows = frame(
        [
            row(
                run_id=f"{method[0]}{seed}{place}".ljust(16, "0"),
                method=method,
                k=k,
                prompts=prompts,
                seed=seed,
                score=10.0 * place,
            )
            for place, prompts in enumerate(kinds)
            for seed in (0, 1)
            for method, k in (("full", None), ("quest", 64))
        ]
    )
    found = compare(rows)
    quest = found.overall[found.overall["method"] == "quest"]
    assert quest["score"].tolist() == [0.0, 10.0, 20.0, 30.0]  # of two seeds each
    assert [key["prompts"] for key, _ in found.by_setting()] == list(kinds)
    assert [len(part) for _, part in found.by_setting()] == [2, 2, 2, 2]
    assert found.notes[0] == (
        "These rows mix prompts: RULER 00112233 (chat template), RULER 00112233 (raw), topkbench 1."
    )


def test_a_files_samples_count_once_whatever_the_number_of_seeds(row: RowMaker) -> None:
    rows, outcomes = [], []
    for seed in (0, 1, 2):
        for method, score in (("full", 100.0), ("quest", 50.0)):
            known = {"method": method, "k": 64 if method == "quest" else None, "seed": seed}
            name = f"{method[0]}{seed}".ljust(16, "0")
            rows.append(row(run_id=name, prompts="RULER 00112233 (raw)", **known))
            outcomes.append(samples(name, [score + seed * 10 * (method == "quest")] * 4))
    overall = compare(frame(rows), pd.concat(outcomes)).overall
    assert overall["n"].tolist() == [4, 4]
    (quest,) = overall[overall["method"] == "quest"].to_dict("records")
    assert (quest["score"], quest["delta_full"]) == (60.0, -40.0)


def test_full_attention_on_other_prompts_is_no_reference(row: RowMaker) -> None:
    """After a merge, the cell that a row names as its reference may not be among the rows."""
    rows = frame(
        [
            row(run_id="1" * 16, method="full", prompts="RULER 00112233 (raw)"),
            row(run_id="2" * 16, method="quest", k=64, prompts="topkbench 1", full_run_id="9" * 16),
        ]
    )
    outcomes = pd.concat([samples("1" * 16, [100.0] * 4), samples("2" * 16, [50.0] * 4)])
    overall = compare(rows, outcomes).overall
    (quest,) = overall[overall["method"] == "quest"].to_dict("records")
    assert (quest["score"], pd.isna(quest["delta_full"])) == (50.0, True)


def test_of_repeated_cells_the_latest_counts(row: RowMaker) -> None:
    rows = frame(
        [row(score=10.0, started_at="2026-01-02"), row(score=20.0, started_at="2026-01-01")]
    )
    assert compare(rows).configurations["score"].tolist() == [10.0]


def test_other_parameters_that_vary_are_in_the_label(row: RowMaker) -> None:
    rows = frame(
        [
            row(
                run_id=name * 16,
                method="hata",
                k=64,
                parameters={"weights": word, "use_norm": True},
            )
            for name, word in (("1", "trained"), ("2", "random"))
        ]
    )
    assert compare(rows).configurations["label"].tolist() == [
        "HATA with Gaussian weights",
        "HATA with trained weights",
    ]


def test_a_variant_is_named_in_the_words_of_its_methods_configuration(row: RowMaker) -> None:
    """A setting without words is NAME=VALUE, whichever file the rows are from."""
    settings: list[dict[str, Any]] = [
        {"use_norm": False, "epsilon": 0.5},
        {"use_norm": "True", "epsilon": 0.25},
    ]
    rows = frame(
        [
            row(run_id=f"{n:016x}", method="hata", k=64, parameters=one)
            for n, one in enumerate(settings)
        ]
    )
    configurations = compare(rows).configurations
    assert configurations["label"].tolist() == [
        "HATA with key norms (epsilon=0.25)",
        "HATA without key norms (epsilon=0.5)",
    ]
    assert configurations["variant"].tolist() == [
        "with key norms, epsilon=0.25",
        "without key norms, epsilon=0.5",
    ]


def test_failures_are_listed_with_their_reason_and_not_compared(row: RowMaker) -> None:
    rows = frame([row(), row(run_id="b" * 16, method="quest", status="failed", reason="It broke.")])
    found = compare(rows)
    assert found.configurations["method"].tolist() == ["full"]
    table = failure_table(found.rows)
    assert table is not None
    assert table.rows[0][:2] == ["failed", "quest"]
    assert table.rows[0][7] == "It broke."
    assert failure_table(frame([row()])) is None
    assert "It broke." in summary_table(found)


def test_an_empty_report_says_that_nothing_ran() -> None:
    assert summary_table(compare(frame([]))) == "No cell has a row yet."
    assert compare(frame([])).overall.empty


def test_samples_that_cannot_be_paired_give_a_note(
    trio: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    rows, outcomes = trio
    outcomes = outcomes.assign(
        references=["[]" if name == "a" * 16 else '["r"]' for name in outcomes["run_id"]]
    )
    notes = compare(rows, outcomes).notes
    assert len(notes) == 1
    assert notes[0].startswith("quest (k=64) is not paired: paired samples must have the same")


def test_without_samples_the_rows_intervals_are_shown(row: RowMaker) -> None:
    rows = frame([row(score=50.0, score_ci_low=40.0, score_ci_high=60.0)])
    assert main_table(compare(rows).overall).rows[0][1] == "50.0 [40.0, 60.0]"


def test_sub_tasks_of_a_sweep(big: Comparison) -> None:
    assert len(big.overall) == 33
    assert set(big.overall["subtask"]) == {"mean"}
    table = subtask_table(big.configurations)
    assert table is not None
    assert table.head[3:] == ["niah_single", "niah_multikey", "niah_multivalue", "vt", "cwe"]
    assert table.rows[0] == ["Full attention", "–", "–", "100.0", "92.0", "92.0", "60.0", "56.0"]


def test_the_report_computes_the_same_intervals_as_the_cells(small_sweep: Sweep) -> None:
    rows = small_sweep.rows()
    configurations = compare(rows, small_sweep.samples()).overall
    means = rows[rows["subtask"] == "mean"]
    for name in ("score_ci_low", "score_ci_high", "delta_full", "delta_ci_low", "delta_ci_high"):
        expected = means.set_index("rbit")[name].dropna()
        assert configurations.set_index("rbit")[name].dropna().to_dict() == pytest.approx(
            expected.to_dict()
        )


def test_missing_samples_are_no_error(tmp_path: Path, row: RowMaker) -> None:
    sweep = Sweep(tmp_path / "a" / "b", tmp_path)
    assert sweep.samples().columns.tolist() == ["run_id"]
    assert compare(frame([row()]), sweep.samples()).configurations["method"].tolist() == ["full"]


# Versions, code and models of the rows ----------------------------------------------------------


def test_untested_versions_are_reported(row: RowMaker) -> None:
    tested = pinned_versions()
    pinned = {name: tested[name] for name in ("torch", "transformers")}
    same = frame([row(run_id="f" * 16, torch=f"{pinned['torch']}+cpu", triton=None)])
    assert not any("constraints.txt" in note for note in compare(same).notes)
    other = frame([row(run_id="f" * 16, torch=pinned["torch"], transformers="5.6.0")])
    assert (
        "Made with versions other than those of constraints.txt: transformers 5.6.0 (tested: "
        f"{pinned['transformers']})."
    ) in compare(other).notes


def test_a_failure_of_full_attention_is_reported(row: RowMaker) -> None:
    note = "full attention ended failed here, so there is no difference to it: NaN."
    rows = frame([row(run_id="a" * 16, method="quest", k=64, full_note=note)])
    assert f"ruler/mean: {note}" in compare(rows).notes


def test_a_mix_of_versions_code_and_models_is_reported(row: RowMaker) -> None:
    first = {"torch": "2.13.0", "tokenizers": "0.22.1", "code_digest": "a" * 16}
    rows = frame(
        [
            row(method="quest", run_id="0" * 16, model_digest="c" * 16, **first),
            row(
                method="quest",
                run_id="1" * 16,
                **{**first, "tokenizers": "0.23.0", "code_digest": "b" * 16},
                model_digest="d" * 16,
            ),
            row(method="hata", run_id="2" * 16, artifact_code="other", **first),
            row(method="loki", run_id="3" * 16, artifact_code="same", **first),
        ]
    )
    notes = compare(rows).notes
    assert "These rows mix versions of tokenizers: 0.22.1, 0.23.0." in notes
    assert "Between these rows the code of quest changed." in notes
    assert "Between these rows the files of model tiny changed." in notes
    assert (
        "The artifact of hata was fitted by an earlier state of its code, under the same version of"
        " the fit." in notes
    )
    assert not any("torch" in note and "mix" in note for note in notes)
    alone = compare(rows[rows["method"] == "loki"]).notes
    assert not any("mix" in note or "changed" in note or "artifact" in note for note in alone)


def test_the_setting_that_is_shown_first_is_the_default_of_the_configurations() -> None:
    conf = Path(__file__).parents[2] / "conf"
    config = yaml.safe_load((conf / "config.yaml").read_text())
    (protocol,) = [one["protocol"] for one in config["defaults"] if "protocol" in one]
    assert {"question": config["question"], "protocol": protocol} == DEFAULTS
