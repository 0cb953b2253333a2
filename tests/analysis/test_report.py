from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from topkbench.analysis.comparison.configurations import Comparison, compare
from topkbench.analysis.comparison.metrics import METRICS
from topkbench.analysis.figures.bars import ablation
from topkbench.analysis.figures.curves import context_curve, curve
from topkbench.analysis.figures.pareto import pareto
from topkbench.analysis.figures.plots import draw_all
from topkbench.analysis.record.samples_file import samples_bytes
from topkbench.analysis.record.store import RecordError, Row, Sweep, frame
from topkbench.analysis.report import build as report
from topkbench.analysis.report import contents
from topkbench.analysis.tables.overview import main_table, summary_table

FIGURES = {
    "score_vs_rbit",
    "recall_vs_rbit",
    "decode_vs_rbit",
    "score_vs_bytes",
    "stages",
    "subtasks",
}


def test_a_report_writes_all_files(big_report: Path) -> None:
    folder = big_report.parent
    names = FIGURES | {"score_vs_k", "recall_vs_k", "decode_vs_k"}
    for name in ("rows.parquet", "rows.csv", "samples.parquet", "report.md", "report.html"):
        assert (folder / name).stat().st_size > 1000, name
    for ending in ("png", "svg", "csv"):
        assert {one.stem for one in (folder / "figures").glob(f"*.{ending}")} == names
    assert len(pd.read_parquet(folder / "rows.parquet")) == 33 * 6 + 2
    assert len(pd.read_parquet(folder / "samples.parquet")) == 33 * 125


@pytest.mark.usefixtures("pictures")
def test_a_page_stays_small(small_sweep: Sweep, tmp_path: Path) -> None:
    """The league's page, of 28 figures with up to 4,000 marks, must be below 8 MB: 280 kB each."""
    page = report.build(small_sweep.folder, tmp_path)
    number = page.read_text().count('class="picture')
    assert number >= 6
    assert page.stat().st_size < 100_000 * number


def test_the_html_report_is_a_single_file(big_report: Path) -> None:
    page = big_report.read_text()
    assert re.findall(r'(?:src|@import|url)=?"?\(?"?(?:https?:)?//', page) == []
    assert page.count('class="picture') == 9
    assert re.findall(r"<script[^>]*src", page) == []
    assert "page_size must divide the capacity, got 17." in page
    assert "1 failed, 1 skipped" in page
    assert "Methods: Full attention, Exact top-k, HATA, Quest, Loki, StreamingLLM." in page
    for text in ("tiny, ruler, 4,096 tokens, question=sparse", "n = 125 samples", "fb6212e9d0c1"):
        assert text in page


def test_a_caption_counts_what_its_figure_shows(
    big_sweep: Sweep, big: Comparison, tmp_path: Path
) -> None:
    captions = {one.name: one.caption for one in draw_all(big.configurations, tmp_path, "words")}
    pattern = re.compile(r"(?:\w+: )?n = [\w ]+")
    numbers = {name: ", ".join(pattern.findall(one)) for name, one in captions.items()}
    assert numbers == {
        **dict.fromkeys(("score_vs_k", "score_vs_rbit", "score_vs_bytes"), "n = 125 samples"),
        **dict.fromkeys(("recall_vs_k", "recall_vs_rbit"), "n = 8 prompts"),
        **dict.fromkeys(("decode_vs_k", "decode_vs_rbit", "stages"), "n = 3 prompts"),
        "subtasks": "n = 25 samples",
    }
    assert pd.read_csv(tmp_path / "recall_vs_k.csv")["judged_prompts"].unique().tolist() == [8]
    notes = main_table(big.overall).notes
    assert notes[0] == (
        "Scores: n = 125 samples; selection quality: n = 8 prompts; times: n = 3 prompts."
    )
    older = big_sweep.rows().assign(judged_prompts=None, timed_prompts=None)
    drawn = draw_all(compare(older, big_sweep.samples()).configurations, tmp_path, "words")
    assert [one.name for one in drawn if " n = " in one.caption] == [
        *("score_vs_k", "score_vs_rbit", "score_vs_bytes", "subtasks"),
    ]


def test_a_figures_data_have_each_column_once(big_report: Path) -> None:
    for one in (big_report.parent / "figures").glob("*.csv"):
        names = one.read_text().splitlines()[0].split(",")
        assert len(names) == len(set(names)), one.name


def test_a_score_axis_follows_what_is_drawn(small_sweep: Sweep) -> None:
    """Scores of 54 to 55 are not drawn on an axis to 100, and full attention's line is on it."""
    configurations = compare(small_sweep.rows(), small_sweep.samples()).overall
    near = configurations.assign(
        score=[54.9, 54.3, 55.3, 55.1, 55.1],
        score_ci_low=[51.6, 51.6, 52.7, 51.8, 51.7],
        score_ci_high=[58.1, 57.4, 58.3, 58.3, 58.2],
    )
    made = curve(near, "score", "rbit")
    assert made is not None
    bottom, top = made[0].axes[0].get_ylim()
    assert 48 < bottom < 51.6
    assert 58.3 < top < 62
    assert top - bottom >= 10
    perfect = near.assign(score=100.0, score_ci_low=96.0, score_ci_high=100.0)
    made = curve(perfect, "score", "rbit")
    assert made is not None
    assert made[0].axes[0].get_ylim() == pytest.approx((93, 102))


def test_seeds_add_up_their_prompts_unless_a_file_has_them(row: Callable[..., Row]) -> None:
    def pooled(prompts: str) -> int:
        rows = frame(
            [
                row(run_id=f"{seed:016x}", method="quest", k=64, seed=seed, prompts=prompts)
                for seed in range(3)
            ]
        )
        (found,) = compare(rows.assign(judged_prompts=8)).overall["judged_prompts"]
        return int(found)

    assert pooled("topkbench 2") == 24
    assert pooled("RULER 0123abcd (raw)") == 8


def test_markdown_has_the_same_table(big_report: Path) -> None:
    text = big_report.with_name("report.md").read_text()
    assert "| Full attention |   – |      – |" in text
    assert "## Failures and skips" in text
    assert "![Score against budget](figures/score_vs_k.png)" in text


def test_only_what_varies_is_drawn(small_sweep: Sweep) -> None:
    folder = report.build(small_sweep.folder).parent / "figures"
    assert {one.stem for one in folder.glob("*.png")} == FIGURES


@pytest.mark.usefixtures("pictures")
def test_a_report_built_twice_is_identical_to_the_byte(small_sweep: Sweep, tmp_path: Path) -> None:
    folders = [tmp_path / "1", tmp_path / "2"]
    for folder in folders:
        report.build(small_sweep.folder, folder)
    for one in sorted(folders[0].rglob("*.*")):
        other = folders[1] / one.relative_to(folders[0])
        if one.suffix in (".csv", ".svg", ".png", ".parquet"):
            assert one.read_bytes() == other.read_bytes(), one.name


def test_reports_are_merged_and_rebuilt_from_their_own_tables(
    small_sweep: Sweep, tmp_path: Path
) -> None:
    report.build(small_sweep.folder, tmp_path / "copy")
    rows, samples = report.load(tmp_path / "copy" / "rows.csv")
    pd.testing.assert_frame_equal(rows, report.load(small_sweep.folder)[0])
    assert len(samples) == 5 * 125
    merged = report.build([small_sweep.folder, tmp_path / "copy"], tmp_path / "merged")
    assert len(pd.read_parquet(merged.with_name("rows.parquet"))) == 5 * 6
    assert len(report.load(small_sweep.store.folder.parent)[0]) == 5 * 6


def test_a_report_says_the_same_of_rows_from_csv_and_what_is_missing_without_samples(
    big_sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "draw_all", lambda *_, **__: [])  # they take most of the time
    rows, samples = report.load(big_sweep.folder)
    few = rows["method"].isin(["full", "quest", "streaming_llm"]) & ~rows["k"].isin([256, 512])
    written = tmp_path / "written"
    written.mkdir()
    rows[few].to_parquet(written / "rows.parquet", index=False)
    rows[few].to_csv(written / "rows.csv", index=False)
    samples = samples[samples["run_id"].isin(rows.loc[few, "run_id"])]
    (written / "samples.parquet").write_bytes(samples_bytes(samples))
    texts = {}
    for name, files in {
        "both": ("rows.parquet", "samples.parquet"),
        "csv": ("rows.csv", "samples.parquet"),
        "alone": ("rows.csv",),
    }.items():
        (tmp_path / name).mkdir()
        for one in files:
            shutil.copy(written / one, tmp_path / name / one)
        page = report.build(tmp_path / name, tmp_path / "reports" / "same")
        texts[name] = page.with_name("report.md").read_text()
    assert texts["csv"] == texts["both"]
    assert re.search(r"\| \*\*\d+\.\d \[", texts["both"])  # a bold score
    words = "**Note:** There are no samples of these scores"
    assert words not in texts["both"]
    assert words in texts["alone"]
    bold = "A score is bold only if its samples are there, and these rows have none."
    assert bold not in texts["both"]
    *_, results = texts["alone"].partition("### Results")
    assert bold in results.partition("###")[0]

    def numbers(text: str) -> list[str]:
        """Return what a report shows but what needs pairs: bold, and scores at equal cost."""
        parts = re.split(r"^#", text.replace("**", ""), flags=re.MULTILINE)
        kept = "#".join(one for one in parts if "Score at equal" not in one)
        kept = kept.replace(f"{bold} ", "").replace(f"{bold}\n\n", "")
        lines = [re.sub(r"[ :-]*\|[ :-]*", "|", line) for line in kept.splitlines()]
        return [line for line in lines if "There are no samples" not in line]

    assert numbers(texts["alone"]) == numbers(texts["both"])


def test_an_empty_folder_among_several_is_left_out(
    small_sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "stopped"
    empty.mkdir()
    arguments = [str(empty), str(small_sweep.folder), "--out", str(tmp_path / "merged")]
    assert report.main(arguments) == 0
    error = capsys.readouterr().err
    lines = error.splitlines()
    assert lines[:2] == [f"{empty} is empty and left out.", "report: 30 rows are compared"]
    assert lines[2].startswith("report: setting 1 of 1, tiny, ")
    assert lines[3:] == ["report: the page is written"]  # and nothing else, no warning of a library
    assert len(pd.read_parquet(tmp_path / "merged" / "rows.parquet")) == 5 * 6
    assert report.main([str(empty)]) == 2  # alone it is an error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "does not exist"),
        (".", "must hold cells.json"),
        ("bad.csv", "must have run_id, status, model, task, subtask, method, but lacks"),
    ],
)
def test_a_path_without_results_gives_an_error_of_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    (tmp_path / "bad.csv").write_text("run_id,score\na,1\n")
    assert report.main([str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_empty_sweep_gives_an_error_of_one_sentence(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "a" / "b", tmp_path)
    sweep.append("0" * 16)
    with pytest.raises(RecordError, match="at least one row"):
        report.build(sweep.folder)


def test_the_command_works_without_torch(tmp_path: Path, row: Callable[..., Row]) -> None:
    sweep = Sweep(tmp_path / "default" / "one", tmp_path)
    sweep.store.cell("0" * 16).write([row(run_id="0" * 16, score=1.0)], [], {}, "")
    sweep.append("0" * 16)
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'hydra', 'wandb'): sys.modules[name] = None\n"
        "from topkbench.analysis.report.build import main\n"
        "sys.exit(main([sys.argv[1]]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(sweep.folder)], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "- 1 cell: 1 ok." in (sweep.folder / "report.md").read_text()
    assert found.stdout.strip() == str(sweep.folder / "report.html")


def test_rows_of_several_settings_get_a_section_each(
    tmp_path: Path, row: Callable[..., Row]
) -> None:
    rows = frame(
        [
            row(run_id=f"{i:016x}", method="quest", k=k, question=question, score=50.0)
            for i, (k, question) in enumerate(
                (k, question) for k in (64, 128) for question in ("sparse", "dense")
            )
        ]
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    page = report.build(tmp_path, tmp_path / "out").read_text()
    assert re.findall(r'<a href="#setting-\d">([^<]*)', page) == ["sparse", "dense"]
    assert re.findall(r"<h2>[^<]*question=(\w+)", page) == ["sparse", "dense"]
    assert "These rows mix question settings: dense, sparse." in page
    assert {one.stem for one in (tmp_path / "out" / "figures").glob("*.png")} == {
        "score_vs_k-1",
        "score_vs_k-2",
    }


def latency_rows(
    row: Callable[..., Row], batches: tuple[int, ...] = (), **columns: Any
) -> pd.DataFrame:
    shapes = [(n, 1) for n in (4096, 16384, 65536, 131072)] + [(16384, size) for size in batches]
    return frame(
        [
            row(
                run_id=f"{place:016x}",
                task="decode_latency",
                # As in the task's rows: named by the shape, k proportional to the length.
                subtask=str(n) if batch == 1 else f"{n} x {batch}",
                method=method,
                k=None if method == "full" else n // 64,
                rbit=128 if method == "hata" else None,
                length=n,
                kv_len=n,
                decode_ms_p50=cost * n / 4096 + 0.05,
                decode_ms_p20=cost * n / 4096 + 0.045,
                decode_ms_p80=cost * n / 4096 + 0.06,
                bandwidth_fraction=0.7,
                speedup_vs_full=None
                if method == "full"
                else (2 * n / 4096 + 0.05) / (cost * n / 4096 + 0.05),
                batch_size=batch,
                attend_ms=cost * n / 8192,
                score_ms=None if method == "full" else cost * n / 8192,
                bytes_read_per_step=float(n),
                **columns,
            )
            for place, (method, cost) in enumerate((("full", 2.0), ("hata", 0.2), ("quest", 0.3)))
            for n, batch in shapes
        ]
    )


def test_latency_over_context_is_one_setting_with_one_figure(
    tmp_path: Path, row: Callable[..., Row]
) -> None:
    found = compare(latency_rows(row))
    ((key, configurations),) = found.by_setting()
    assert key["length"] is None
    drawn = {one.name: one for one in draw_all(configurations, tmp_path, "words")}
    assert set(drawn) == {"latency_vs_context", "stages", "break_even"}
    assert "At 131,072 tokens." in drawn["stages"].caption
    assert len(pd.read_csv(drawn["stages"].csv)) == 2
    data = pd.read_csv(drawn["latency_vs_context"].csv)
    assert data["kv_len"].tolist() == [4096, 16384, 65536, 131072] * 2
    assert data["method"].unique().tolist() == ["hata", "quest"]
    made = context_curve(configurations, "decode_ms_p50")
    assert made is not None
    legend = [text.get_text() for text in made[0].legends[0].get_texts()]
    full = "Full attention, timed alternately with each"
    assert legend == [full, "Bandwidth bound", "HATA, 128 bits", "Quest"]
    assert {"Sub-task", "Batch"} & set(main_table(configurations).head) == set()


def test_the_bandwidth_bound_names_the_bandwidth(row: Callable[..., Row]) -> None:
    made = context_curve(
        compare(latency_rows(row, bandwidth_gb_s=19.7)).configurations, "decode_ms_p50"
    )
    assert made is not None
    assert made[0].legends[0].get_texts()[1].get_text() == "Bandwidth bound (20 GB/s)"


def test_batch_sizes_get_a_figure_of_their_own(tmp_path: Path, row: Callable[..., Row]) -> None:
    ((_, configurations),) = compare(latency_rows(row, batches=(2, 8))).by_setting()
    assert set(configurations["label"]) == {"Full attention", "HATA", "Quest"}
    table = main_table(configurations)
    assert "Sub-task" not in table.head
    place = table.head.index("Batch")
    assert [cells[place] for cells in table.rows if cells[0] == "Quest"] == list("112811")
    drawn = {one.name: one for one in draw_all(configurations, tmp_path, "words")}
    batches = pd.read_csv(drawn["latency_vs_batch"].csv)
    assert batches["batch_size"].tolist() == [1, 2, 8] * 2
    assert "At 16,384 tokens." in drawn["latency_vs_batch"].caption
    # The other figures show batch size 1.
    context = pd.read_csv(drawn["latency_vs_context"].csv)
    assert context["kv_len"].tolist() == [4096, 16384, 65536, 131072] * 2
    assert len(pd.read_csv(drawn["stages"].csv)) == 2


def ablation_rows(row: Callable[..., Row], impls: tuple[str, ...]) -> pd.DataFrame:
    return frame(
        [
            row(
                run_id=f"{place:016x}",
                method="hata",
                impl=impl,
                k=512,
                rbit=128,
                decode_ms_p50=8.0 / 2**place,
                # The machine ran at a fifth of its speed during the second step.
                speedup_vs_full=0.5 * 2**place * (5 if place == 1 else 1),
                speedup_ci_low=0.4 * 2**place * (5 if place == 1 else 1) if place < 4 else None,
                speedup_ci_high=0.6 * 2**place * (5 if place == 1 else 1) if place < 4 else None,
                timing_note="others took 38% of the processors' time" if place == 3 else None,
                score_ms=5.0 / 2**place,
                attend_ms=2.0 / 2**place,
            )
            for place, impl in enumerate(impls)
        ]
    )


IMPLS = (
    "reference",
    "cpu, reference: hash_encode topk_select sparse_attention",
    "cpu, reference: hash_encode topk_select",
    "cpu, reference: topk_select",
    "cpu",
)


def test_an_ablation_names_what_each_step_adds(tmp_path: Path, row: Callable[..., Row]) -> None:
    configurations = compare(ablation_rows(row, IMPLS)).overall
    made = ablation(configurations)
    assert made is not None
    figure, data = made
    assert data["step"].tolist() == [
        "simple: all in torch",
        *("+ score", "+ fused attention", "+ encode", "+ select"),
    ]
    assert data["impl"].tolist() == list(IMPLS)
    assert [text.get_text() for text in figure.axes[0].texts] == [
        " 8 ms",
        # Both ends differ by factors 1.25 and 1.2: exp(hypot(ln 1.25, ln 1.2)) = 1.334.
        *(" 4 ms, 10.0× [7.5, 13.3]", " 2 ms, 4.0× [3.0, 5.3]"),
        *(" 1 ms, 8.0× [6.0, 10.7]‡", " 0.5 ms, 16.0×†"),
    ]
    drawn = {one.name: one for one in draw_all(configurations, tmp_path, "words")}
    assert "stages" not in drawn
    assert "cpu, reference: topk_select" in drawn["ablation"].caption


def test_an_operator_ablation_needs_a_chain_of_steps(row: Callable[..., Row]) -> None:
    for impls in (
        IMPLS[:2],
        ("reference", "cpu, reference: topk_select", "cpu, reference: hash_encode"),
    ):
        assert ablation(compare(ablation_rows(row, impls)).overall) is None


def test_throughput_is_drawn_over_context_if_measured(
    tmp_path: Path, row: Callable[..., Row]
) -> None:
    rows = latency_rows(row).assign(task="decode_throughput", bandwidth_fraction=None)
    rows["decode_ms_p50"] = rows["kv_len"].astype(float) / 4096
    rows["tokens_per_s"] = 1000 / rows["decode_ms_p50"]
    rows["speedup_vs_full"] = rows["speedup_vs_full"].mask(rows["method"] != "full", 2.0)
    rows["decode_ms_p20"], rows["decode_ms_p80"] = (
        rows["decode_ms_p50"] / 2,
        rows["decode_ms_p50"] * 4,
    )
    ((_, configurations),) = compare(rows).by_setting()
    drawn = {one.name: one for one in draw_all(configurations, tmp_path, "words")}
    assert set(drawn) == {"latency_vs_context", "throughput_vs_context", "break_even", "stages"}
    assert "At 131,072" not in drawn["throughput_vs_context"].caption
    data = pd.read_csv(drawn["throughput_vs_context"].csv)
    assert data["tokens_per_s"].tolist()[:4] == [1000.0, 250.0, 62.5, 31.25]
    made = context_curve(configurations, "tokens_per_s")
    assert made is not None
    (axes,) = made[0].axes
    assert axes.get_ylabel() == "Throughput (tokens/s)"
    assert axes.get_yscale() == "log"
    near = context_curve(
        configurations[configurations["kv_len"].astype(int) < 30000], "tokens_per_s"
    )
    assert near is not None
    assert near[0].axes[0].get_yscale() == "linear"
    assert near[0].axes[0].get_ylim()[0] == 0
    # From a quarter of the median, as the slow end is four times as long, to twice the median.
    (bars,) = axes.containers[0].lines[2]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [[250.0, 2000.0], [62.5, 500.0], [15.625, 125.0], [7.8125, 62.5]]


def test_the_terminal_shows_throughput_where_nothing_is_scored(row: Callable[..., Row]) -> None:
    timed = row(tokens_per_s=12.5, length=None)
    assert "Throughput (tokens/s)" in summary_table(compare(frame([timed])))
    assert "Throughput" not in summary_table(compare(frame([timed.replace(score=50.0)])))


def test_axes_and_legend_of_a_curve(big: Comparison) -> None:
    made = curve(big.overall, "score", "k")
    assert made is not None
    figure, data = made
    (axes,) = figure.axes
    assert axes.get_xlabel() == "Budget k (tokens kept per KV head)"
    assert axes.get_ylabel() == "Score (0–100)"
    assert axes.get_xscale() == "log"
    ticks = [axes.xaxis.get_major_formatter()(tick, 0) for tick in axes.get_xticks()]
    assert ticks == ["64", "128", "256", "512"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "Full attention",
        "Exact top-k",
        "HATA, 32 bits",
        "HATA, 64 bits",
        "HATA, 128 bits",
        "HATA, 256 bits",
        "Quest",
        "Loki",
        "StreamingLLM",
    ]
    assert len(data) == 33


def test_a_curve_needs_two_points(row: Callable[..., Row]) -> None:
    configurations = compare(frame([row(method="quest", k=64, score=1.0)])).overall
    assert curve(configurations, "score", "k") is None
    assert curve(configurations, "recall_at_k", "k") is None
    assert pareto(configurations) is None


def test_a_percentage_says_of_what() -> None:
    assert METRICS["bandwidth_fraction"].text(0.314) == "31"
    assert METRICS["bandwidth_fraction"].axis == "Memory bandwidth reached (% of measured)"


def test_numbers_are_shown_with_their_metric() -> None:
    assert METRICS["delta_full"].text(-0.04) == "0.0"
    assert METRICS["delta_full"].text(-3.25) == "−3.2"
    assert METRICS["delta_full"].text(3.0) == "+3.0"
    assert METRICS["bytes_read_per_step"].text(2.5 * 2**20) == "2.5"
    assert METRICS["score"].text(float("nan")) == "–"


@pytest.mark.usefixtures("pictures")
def test_likelihoods_of_text_have_figures_and_columns(
    tmp_path: Path, row: Callable[..., Row]
) -> None:
    def one(method: str, k: int | None, delta: float | None) -> Row:
        values: dict[str, Any] = {}
        if delta is not None:
            values = {
                "nll_delta": delta,
                "nll_delta_ci_low": delta - 0.05,
                "nll_delta_ci_high": delta + 0.05,
                "kl_full": abs(delta) / 2,
                "kl_full_ci_low": 0.0,
                "kl_full_ci_high": abs(delta),
                "top1_agreement": 0.9,
            }
        return row(
            run_id=f"{method}-{k}",
            task="perplexity",
            prompts="book.txt (0123)",
            method=method,
            k=k,
            protocol=None if k is None else "unified",
            score=None,
            num_samples=8,
            scored_tokens=2048,
            nll=2.5 + (delta or 0.0),
            **values,
        )

    given = {("exact", 64): 0.02, ("exact", 256): -0.001, ("quest", 64): 0.9, ("quest", 256): 0.1}
    made = [one("full", None, None), *(one(*key, delta) for key, delta in given.items())]
    compared = compare(frame(made))
    drawn = {one.name: one for one in draw_all(compared.configurations, tmp_path, "words")}
    assert set(drawn) == {"nll_vs_k", "kl_vs_k"}
    assert "n = 8 windows" in drawn["nll_vs_k"].caption
    # Numbers of an axis are plain: a formula would be shown with its signs.
    labels = {
        name: set(re.findall("<!-- (.*?) -->", one.svg.read_text())) for name, one in drawn.items()
    }
    assert {"0", "0.01", "0.1", "64", "256"} <= labels["nll_vs_k"]
    assert {"0.001", "0.01", "0.1"} <= labels["kl_vs_k"]
    assert not [text for texts in labels.values() for text in texts if "$" in text]
    data = pd.read_csv(drawn["nll_vs_k"].csv).dropna(subset="nll_delta")
    assert (
        dict(zip(zip(data["method"], data["k"], strict=True), data["nll_delta"], strict=True))
        == given
    )
    assert data["nll_delta_ci_low"].tolist() == pytest.approx([d - 0.05 for d in given.values()])
    table = main_table(compared.overall)
    text = {tuple(line[:2]): line for line in table.rows}
    assert table.head[:2] == ["Method", "k"]
    assert table.head[2:6] == [
        "NLL (nats/token)",
        "Δ NLL (nats/token)",
        "KL (nats/token)",
        "Same token",
    ]
    assert text["Exact top-k", "256"][2:4] == ["2.4990", "−0.0010 [−0.0510, +0.0490]"]
    other = made[1].replace(run_id="other", prompts="book.txt (4567)", nll=9.0)
    apart = compare(frame([*made, other])).configurations
    assert sorted(apart.loc[apart["method"] == "exact", "nll"]) == [2.499, 2.52, 9.0]


@pytest.mark.slow
def test_the_page_of_the_league_is_built_in_a_minute_and_has_8_mb_at_most(tmp_path: Path) -> None:
    """The largest results that are committed: 274 cells, four settings, with their figures."""
    rows = Path(__file__).parents[2] / "analysis" / "measured" / "epyc_2_threads" / "league.csv"
    command = [sys.executable, "-m", "topkbench.analysis.report", str(rows), "--out", str(tmp_path)]
    began = sum(os.times()[2:4])  # processor time of child processes
    subprocess.run(command, check=True, capture_output=True)
    assert sum(os.times()[2:4]) - began < 60
    assert 2e6 < (tmp_path / "report.html").stat().st_size < 8e6
