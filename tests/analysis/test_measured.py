"""The numbers in README, docs and the model card are those of the committed rows."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from topkbench.analysis.comparison.configurations import compare
from topkbench.analysis.comparison.metrics import METRICS
from topkbench.analysis.comparison.stats import MEAN, pair, paired_interval, seed_interval
from topkbench.analysis.figures.variants import difference_table, ladder_tables
from topkbench.analysis.record.row import COLUMNS, PARAMETER_PREFIX, Status
from topkbench.analysis.report.build import load
from topkbench.analysis.report.kernels import of_kernels
from topkbench.analysis.tables.answered import answered_table
from topkbench.analysis.tables.overview import main_table, narrow, subtask_table
from topkbench.analysis.tables.table import with_interval
from topkbench.analysis.tables.turns import turn_table

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "analysis" / "measured"
FILES = sorted(MEASURED.glob("*/*.csv"))
CPU = MEASURED / "xeon_2_threads"
CORE = MEASURED / "epyc_1_thread"


@functools.cache
def rows(path: Path) -> pd.DataFrame:
    """Read a file of rows as a report does: columns missing from it are empty."""
    return load(path)[0]


def allowed(data: pd.DataFrame) -> set[str]:
    """Return the statuses that committed rows may have; rows of kernels on a GPU may have any."""
    return {*Status} if of_kernels(data).any() else {"ok", "skipped"}


def test_only_files_of_gpu_rows_may_contain_failures() -> None:
    statuses = ["ok", "wrong", "failed", "out_of_memory", "skipped"]
    on_gpu = pd.DataFrame({"task": ["kernel_check", *["decode_latency"] * 4], "status": statuses})
    assert {*statuses} <= allowed(on_gpu)
    assert allowed(on_gpu[on_gpu["task"] == "decode_latency"]) == {"ok", "skipped"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_measured_rows_record_commit_and_machine(path: Path) -> None:
    data = rows(path)
    extra = set(data.columns) - set(COLUMNS)
    assert all(name.startswith(PARAMETER_PREFIX) for name in extra)
    assert data["device"].nunique() == 1
    assert not data["git_dirty"].fillna(False).astype(bool).any()
    assert set(data["status"]) <= allowed(data)
    note = (path.parent / "README.md").read_text()
    assert path.name in note
    assert [commit for commit in data["git_commit"].unique() if commit[:7] not in note] == []
    assert data["device"].iloc[0].partition(",")[0] in note


def numbers(line: str) -> list[str]:
    return [cell.strip(" *`") for cell in line.strip().strip("|").split("|")]


def test_the_table_of_the_quick_start_is_the_main_jobs() -> None:
    table = main_table(compare(rows(MEASURED / "epyc_zen4_1_core" / "main_job.csv")).overall)
    headings = ("Method", "k", "rbit", "Score (0–100)", "Δ full (points)", "Recall@k")
    columns = [*(table.head.index(name) for name in headings), table.head.index("Read/step (MiB)")]
    expected = [[row[place] for place in columns] for row in table.rows]
    text = (ROOT / "docs" / "index.md").read_text()
    block = text[text.index("| Method | `k` | `rbit` |") :].splitlines()
    found = [numbers(line) for line in block[2 : 2 + len(expected)]]
    assert found == expected


def test_the_page_on_perplexity_shows_the_measured_rows() -> None:
    path = MEASURED / "epyc_zen3_1_thread" / "perplexity.csv"
    table = main_table(compare(rows(path)).overall)
    lines = (ROOT / "docs" / "perplexity.md").read_text().splitlines()
    found = [numbers(line) for line in lines if line.startswith("| ")]
    assert found == [list(table.head), *map(list, table.rows)]
    (hata,) = [row for row in found if row[:2] == ["HATA", "64"]]
    assert hata[3:7] == [
        *("2.4010", "+0.1871 [+0.1117, +0.2625]", "0.1693 [0.1345, 0.2040]", "0.810"),
    ]


def test_the_page_on_ruler_shows_the_measured_rows() -> None:
    found = compare(*load(MEASURED / "epyc_zen3_ruler" / "ruler_small.csv"))
    page = (ROOT / "docs" / "ruler.md").read_text(encoding="utf-8")
    exact = {}
    for key, configurations in found.by_setting():
        answered = answered_table(configurations, found.answers)
        by_subtask = subtask_table(configurations)
        assert answered is not None
        assert by_subtask is not None
        assert answered.markdown() in page
        assert by_subtask.markdown() in page
        (row,) = [row for row in answered.rows if row[:2] == ["Exact top-k", "64"]]
        exact[key["question"], int(key["length"])] = row[3]
    assert exact == {
        ("sparse", 2048): "75.0 [57.1, 87.0]",
        ("dense", 2048): "91.0 [71.9, 100.0]",
        ("sparse", 4096): "46.7 [27.0, 66.4]",
    }


def test_the_page_on_turns_shows_what_snapkv_loses_on_a_real_model() -> None:
    folder = MEASURED / "epyc_zen4_1_thread"
    page = (ROOT / "docs" / "turns.md").read_text(encoding="utf-8")
    for file in ("multi_turn", "multi_turn_24_documents", "multi_turn_fresh_prefill"):
        table = turn_table(compare(rows(folder / f"{file}.csv")).configurations)
        assert table is not None
        assert table.markdown() in page
        if file == "multi_turn":
            (row,) = [one for one in table.rows if one[0] == "SnapKV"]
            assert f"{row[6]} and {row[7]} points. What it selected" in page
    # A cache of several turns against a prefill of its own, by document.
    kept, fresh = (
        pd.read_parquet(folder / f"{file}.samples.parquet").query("method == 'exact'")
        for file in ("multi_turn_24_documents", "multi_turn_fresh_prefill")
    )
    for turn, said in ((2, "−4.2 [−19.1, +11.9] points"), (3, "0.0 [−13.8, +13.8].")):
        on = [one[one["turn"] == turn].set_index("document")["score"] for one in (kept, fresh)]
        assert len(on[0]) == 24
        found = paired_interval(on[0], on[1].loc[on[0].index])
        low, estimate, high = map(
            METRICS["delta_full"].text, (found.low, found.estimate, found.high)
        )
        assert said.startswith(f"{estimate} [{low}, {high}]")
        assert said in page


def test_the_page_on_turns_shows_the_measured_rows() -> None:
    page = (ROOT / "docs" / "turns.md").read_text(encoding="utf-8")
    changes = {}
    for file in ("multi_turn", "multi_turn_native"):
        found = compare(rows(MEASURED / "epyc_zen3_1_thread" / f"{file}.csv"))
        for key, configurations in found.by_setting():
            table = turn_table(configurations)
            assert table is not None
            assert table.markdown() in page
            kind = (key["model"], key["question"], key["protocol"], "prefilled" in key["prompts"])
            for name, *cells in table.rows:
                if name in ("Exact top-k", "SnapKV"):  # the first turn, the change to the second
                    changes[(*kind, name, cells[0])] = (cells[2], cells[5])
    assert changes == {
        ("smollm2_135m", "sparse", "unified", False, "Exact top-k", "64"): (
            "66.7 [30.0, 90.3]",
            "0.0 [−39.0, +39.0]",
        ),
        ("smollm2_135m", "sparse", "unified", False, "SnapKV", "64"): (
            "0.0 [0.0, 39.0]",
            "0.0 [−39.0, +39.0]",
        ),
        ("smollm2_135m", "dense", "unified", False, "Exact top-k", "64"): (
            "66.7 [30.0, 90.3]",
            "0.0 [−39.0, +39.0]",
        ),
        ("smollm2_135m", "dense", "unified", False, "SnapKV", "64"): (
            "0.0 [0.0, 39.0]",
            "0.0 [−39.0, +39.0]",
        ),
        ("smollm2_135m", "dense", "unified", False, "SnapKV", "256"): (
            "33.3 [9.7, 70.0]",
            "0.0 [−58.5, +58.5]",
        ),
        ("tiny", "sparse", "unified", False, "Exact top-k", "64"): (
            "100.0 [94.0, 100.0]",
            "0.0 [−6.0, +6.0]",
        ),
        ("tiny", "sparse", "unified", False, "SnapKV", "64"): (
            "0.0 [0.0, 6.0]",
            "0.0 [−6.0, +6.0]",
        ),
        ("tiny", "dense", "unified", False, "Exact top-k", "64"): (
            "100.0 [94.0, 100.0]",
            "0.0 [−6.0, +6.0]",
        ),
        ("tiny", "dense", "unified", False, "SnapKV", "64"): (
            "100.0 [94.0, 100.0]",
            "−100.0 [−100.0, −88.0]",
        ),
        ("tiny", "sparse", "unified", True, "Exact top-k", "64"): (
            "100.0 [94.0, 100.0]",
            "0.0 [−6.0, +6.0]",
        ),
        ("tiny", "dense", "native", False, "SnapKV", "64"): (
            "100.0 [94.0, 100.0]",
            "−96.7 [−98.2, −83.5]",
        ),
    }


def test_the_page_on_hata_shows_the_measured_ladder_of_the_real_model() -> None:
    found = compare(rows(MEASURED / "epyc_zen3_ladder" / "real_ladder.csv"))
    page = (ROOT / "docs" / "hata.md").read_text(encoding="utf-8")
    shown = {}
    for key, configurations in found.by_setting():
        tables = dict(ladder_tables(configurations))
        table = tables["Recall@k by hash bits, k = 64"]
        assert table.markdown() in page
        shown[key["task"]] = [row[1:] for row in table.rows if row[0] == "Learned, ranking"]
    assert shown == {
        "selection": [["0.591 [0.588, 0.594]", "0.627 [0.621, 0.633]", "0.660 [0.659, 0.660]"]],
        "selection_text": [
            ["0.544 [0.522, 0.567]", "0.585 [0.571, 0.600]", "0.614 [0.603, 0.625]"]
        ],
    }


def test_the_page_on_hata_shows_what_was_measured_in_all_layers_of_the_real_model() -> None:
    data = rows(MEASURED / "epyc_zen4_ladder" / "real_ladder_all_layers.csv")
    data = data[data["subtask"].eq(MEAN) & data["k"].eq(64)]
    found: dict[str, list[float]] = {}
    for name, *cells in hata_page("| Hash, all 30 layers |"):
        kinds = VARIANTS | {"Learned, ranking, centred keys": ("trained", "ranking", True, False)}
        weights, recipe, centred, _ = kinds[name]
        own = data[data["p_weights"].eq(weights)]
        own = own[own["p_centre_keys"].astype(str).eq(str(centred))]
        own = own[own["p_recipe"].eq(recipe or "published")].sort_values(["task", "rbit"])
        assert cells == [METRICS["recall_at_k"].text(one) for one in own["recall_at_k"]]
        found[name] = list(own["recall_at_k"])
    page = (ROOT / "docs" / "hata.md").read_text(encoding="utf-8")
    plain, centred, published, ranking = found.values()
    for better, worse, words in (
        (published, plain, "by {} and {} on prompts and by {} and {} on prose over"),
        (centred, plain, "centring changes it by {} and {}, and {} and {}."),
    ):
        gains = [f"{one - other:+.3f}" for one, other in zip(better, worse, strict=True)]
        assert words.format(*gains) in page
    gains = [f"{ranking[place] - published[place + 1]:.3f}" for place in (0, 2)]
    assert "by ranking find {} and {} more than 128".format(*gains) in page


def test_what_loss_and_queries_add_is_as_measured() -> None:
    data = rows(MEASURED / "epyc_zen4_ladder" / "loss_or_queries.csv")
    data = data[data["subtask"].eq(MEAN)]
    arms = (
        *(
            data["p_recipe"].eq("published") & data["p_optimiser"].eq(one)
            for one in ("sgd", "adam")
        ),
        *(data["p_recipe"].eq("ranking") & data["p_ranking_pool"].eq(one) for one in (1, 512)),
    )
    found = []
    for line, arm in zip(hata_page("| Loss | Queries |"), arms, strict=True):
        small, large = (data[arm & data["k"].eq(k)] for k in (64, 256))
        assert line[2:] == [
            *(METRICS["recall_at_k"].text(one["recall_at_k"].item()) for one in (small, large)),
            METRICS["attention_mass"].text(small["attention_mass"].item()),
        ]
        found.append(small["recall_at_k"].item())
    added = [f"{one - found[0]:.3f}" for one in found[1:]]
    page = (ROOT / "docs" / "hata.md").read_text(encoding="utf-8")
    assert "alone add {}, its loss alone {}, and both together {}.".format(*added) in page


def test_why_learning_changes_little_is_as_measured() -> None:
    folder = MEASURED / "epyc_zen4_ladder" / "gradients"
    found = [pd.read_csv(folder / f"{name}.csv") for name in ("text", "ruler_words")]
    assert [len(one) for one in found] == [24, 24]
    columns = (
        *(
            f"{term}_gaussian_{keys}"
            for term, keys in (("similarity", "all"), ("similarity", "no_sink"))
        ),
        *("balance_gaussian_all", "decorrelation_gaussian_all"),
        *(f"similarity_orthonormal_{keys}" for keys in ("all", "no_sink")),
        *("balance_orthonormal_all", "decorrelation_orthonormal_all"),
        *("sink_attention", "mean_share", "directions", "imbalance", "imbalance_centred"),
    )
    means = [one[list(columns)].mean() for one in found]
    for line, column in zip(hata_page("| Means over 8 layers"), columns, strict=True):
        digits = len(line[1].partition(".")[2])
        assert line[1:] == [f"{one[column]:.{digits}f}" for one in means]
    page = (ROOT / "docs" / "hata.md").read_text(encoding="utf-8")
    ratios = [
        f"{one[f'decorrelation_{at}_all'] / one[f'similarity_{at}_all']:.0f}"
        for at in ("gaussian", "orthonormal")
        for one in means
    ]
    assert "pulls {} and {} times as strongly".format(*ratios[:2]) in page
    assert "still {} and {} times at an orthonormal".format(*ratios[2:]) in page
    changes = [
        abs(one[f"similarity_{at}_no_sink"] / one[f"similarity_{at}_all"] - 1)
        for at in ("gaussian", "orthonormal")
        for one in means
    ]
    assert f"changes by at most {100 * max(changes):.0f}%" in page


def test_the_latencies_in_docs_are_the_measured_ones() -> None:
    data = rows(MEASURED / "epyc_2_threads" / "layer_latency.csv")
    text = (ROOT / "docs" / "speed.md").read_text()
    block = text[text.index("| Method | 4,096 tokens |") :].splitlines()
    lengths = [int(cell.split()[0].replace(",", "")) for cell in numbers(block[0])[1:]]
    methods = (("exact", None), ("hata", False), ("hata", True))
    methods = (*methods, ("quest", None), ("loki", None), ("streaming_llm", None))
    for line, (method, use_norm) in zip(block[2:], methods, strict=False):
        for length, cell in zip(lengths, numbers(line)[1:], strict=True):
            own = data[data["method"].eq(method) & data["subtask"].eq(str(length))]
            if use_norm is not None:
                own = own[own["p_use_norm"].astype(str) == str(use_norm)]
            (row,) = own.to_dict("records")
            step, speedup = row["decode_ms_p50"], row["speedup_vs_full"]
            taken, full = map(METRICS["decode_ms_p50"].text, (step, step * speedup))
            assert cell == f"{taken} of {full} ({speedup:.1f}×†)"


ZEN4 = MEASURED / "epyc_zen4_2_threads"


def interval(row: dict[str, Any], of: str, ends: str) -> str:
    """Return a speed-up as the tables of times have it."""
    low, high = (row[f"{ends}_ci_{end}"] for end in ("low", "high"))
    mark = "" if pd.isna(row["timing_note"]) else "‡"
    return f"{row[of]:.1f}× [{low:.1f}, {high:.1f}]{mark}"


def test_the_steps_in_docs_are_the_measured_ones() -> None:
    text = (ROOT / "docs" / "speed.md").read_text()
    block = text[text.index("| Method | dtype |") :].split("\n\n")[0].splitlines()
    methods = (("exact", None), ("hata", False), ("hata", True))
    methods = (*methods, ("quest", None), ("loki", None), ("streaming_llm", None))
    wanted = [(dtype, *one) for dtype in ("float32", "bfloat16") for one in methods]
    for line, (dtype, method, use_norm) in zip(block[2:], wanted, strict=True):
        data = rows(ZEN4 / f"steps_{dtype}.csv")
        _, shown, *cells = numbers(line)
        assert shown == dtype
        for place, length in enumerate((32768, 131072)):
            own = data[data["method"].eq(method) & data["length"].eq(length)]
            if use_norm is not None:
                own = own[own["p_use_norm"].astype(str) == str(use_norm)]
            (row,) = own.to_dict("records")
            taken, full = (
                METRICS["decode_ms_p50"].text(row[f"{one}_ms_p50"]) for one in ("decode", "full")
            )
            times = f"{taken} of {full} ({interval(row, 'speedup_vs_full', 'speedup')})"
            assert cells[2 * place] == times
            assert cells[2 * place + 1] == f"{row['speedup_vs_sdpa']:.1f}×"


def test_the_whole_models_in_docs_are_the_measured_ones() -> None:
    data = rows(ZEN4 / "decode_throughput.csv")
    text = (ROOT / "docs" / "speed.md").read_text()
    block = text[text.index("| Method | 1B, 32,768 tokens |") :].split("\n\n")[0].splitlines()
    methods = "exact block_oracle hata quest loki streaming_llm sparq magicpig infinigen"
    methods += " double_sparsity snapkv twilight pqcache random"
    places = (("1b", 32768, 1), ("1b", 131072, 1), ("1b", 32768, 4), ("3b", 32768, 1))
    for line, method in zip(block[2:], methods.split(), strict=True):
        for cell, (model, length, batch) in zip(numbers(line)[1:], places, strict=True):
            own = data[data["method"].eq(method) & data["model"].eq(f"random_{model}")]
            own = own[own["length"].eq(length) & own["batch_size"].eq(batch)]
            own = own[own["status"].eq("ok")]
            if cell == "–":
                assert own.empty
                continue
            (row,) = own.to_dict("records")
            taken, full = (
                METRICS["decode_ms_p50"].text(row[f"{one}_ms_p50"]) for one in ("decode", "full")
            )
            low, high = (row[f"speedup_ci_{end}"] for end in ("low", "high"))
            assert (
                cell == f"{taken} of {full} ({row['speedup_vs_full']:.2f}× [{low:.2f}, {high:.2f}])"
            )


def test_the_shares_of_the_bandwidth_in_docs_are_those_measured_in_turn() -> None:
    data = rows(ZEN4 / "in_turn.csv").sort_values("p_round")
    assert (data["status"] == "ok").all()
    text = (ROOT / "docs" / "speed.md").read_text()
    block = text[text.index("| Method | dtype | Speed-up |") :].split("\n\n")[0].splitlines()
    wanted = [(one, dtype) for one in ("hata", "quest") for dtype in ("float32", "bfloat16")]
    for line, (method, dtype) in zip(block[2:], wanted, strict=True):
        own = data[data["method"].eq(method) & data["p_dtype"].eq(dtype)]
        assert len(own) == 3
        shares = zip(own["bandwidth_fraction"], own["bandwidth_gb_s"], strict=True)
        assert numbers(line)[1:] == [
            dtype,
            ", ".join(f"{one:.1f}×" for one in own["speedup_vs_full"]),
            ", ".join(f"{share:.0%} of {speed:.0f} GB/s" for share, speed in shares),
        ]


def test_the_dense_kernels_shares_of_the_bandwidth_are_those_measured_in_turn() -> None:
    data = rows(ZEN4 / "dense_kernels.csv")
    data = data[data["subtask"].eq("131072")]
    text = (ROOT / "kernels" / "README.md").read_text()
    for dtype in ("float32", "bfloat16"):
        said = []
        for num_kv_heads in (32, 8, 4):
            own = data[data["model"].str.startswith(f"32/{num_kv_heads} heads")]
            (row,) = own[own["p_dtype"].eq(dtype)].to_dict("records")
            said.append(f"{row['bandwidth_fraction']:.0%} of {row['bandwidth_gb_s']:.0f} GB/s")
        assert "at {}, {} and {} in {}".format(*said, dtype) in text


def test_the_changes_in_docs_are_the_measured_ones() -> None:
    data = rows(ZEN4 / "changes.csv")
    text = (ROOT / "docs" / "speed.md").read_text()
    block = text[text.index("| Method | dtype | before |") :].split("\n\n")[0].splitlines()
    wanted = [(one, dtype) for one in ("hata", "quest") for dtype in ("float32", "bfloat16")]
    for line, (method, dtype) in zip(block[2:], wanted, strict=True):
        _, shown, *cells = numbers(line)
        assert shown == dtype
        for cell, variant in zip(cells, ("before", "after", "small_pages", "passive"), strict=True):
            own = data[data["method"].eq(method) & data["p_dtype"].eq(dtype)]
            found = own[own["p_variant"].eq(variant)]["speedup_vs_full"]
            assert len(found) == 3
            assert cell == f"{found.median():.1f}× [{found.min():.1f}, {found.max():.1f}]"
    for variant, digits in (
        *(("busy", 1), ("busy_passive", 1)),
        *(("one_runtime", 2), ("two_runtimes", 2)),
    ):
        own = data[data["p_variant"].eq(variant)].sort_values("p_round")
        first, second, third = (f"{taken:.{digits}f}" for taken in own["decode_ms_p50"])
        assert f"{first}, {second} and {third}" in text


def test_the_dense_kernels_times_are_the_measured_ones_and_it_is_never_the_slower() -> None:
    """``full_backend=auto`` rests on it."""
    data = rows(ZEN4 / "dense_kernels.csv")
    data = data[(data["subtask"] != MEAN) & (data["status"] == "ok")]
    assert len(data) == 46
    assert data["speedup_vs_sdpa"].min() > 1.8
    assert data["sdpa_ci_low"].min() > 1.4
    text = (ROOT / "kernels" / "README.md").read_text()
    block = text[text.index("| Tokens × batch |") :].split("\n\n")[0].splitlines()
    heads = [re.findall(r"G = (\d), (\w+)", head)[0] for head in numbers(block[0])[1:]]
    assert len(block) == 10
    for line in block[2:]:
        place, *cells = numbers(line)
        length, batch = (int(one.replace(",", "")) for one in place.split(" × "))
        for cell, (group, dtype) in zip(cells, heads, strict=True):
            own = data[data["length"].eq(length) & data["batch_size"].eq(batch)]
            own = own[own["model"].str.startswith(f"32/{32 // int(group)} heads")]
            own = own[own["p_dtype"].eq(dtype)]
            if cell == "–":
                assert own.empty
                continue
            (row,) = own.to_dict("records")
            taken = METRICS["decode_ms_p50"].text(row["decode_ms_p50"])
            assert cell == f"{taken} ({interval(row, 'speedup_vs_sdpa', 'sdpa')})"


def test_the_model_cards_scores_are_the_measured_ones() -> None:
    data = rows(CPU / "tiny_accuracy.csv")
    text = (ROOT / "models" / "tiny" / "README.md").read_text()
    block = text[text.index("| Sub-task |") :].splitlines()
    found = {numbers(line)[0]: numbers(line)[1:] for line in block[2:10]}
    columns = (("full", None, None), ("exact", 512, None), ("hata", 512, 128))
    columns = (*columns, ("streaming_llm", 512, None))
    for subtask, cells in found.items():
        for cell, (method, k, rbit) in zip(cells, columns, strict=True):
            name = MEAN if subtask == "mean" else subtask
            own = data[(data["method"] == method) & (data["subtask"] == name)]
            own = own[own["k"].isna() if k is None else own["k"].eq(k)]
            own = own[own["rbit"].isna() if rbit is None else own["rbit"].eq(rbit)]
            (row,) = own.to_dict("records")
            score = METRICS["score"].text
            low, high = (score(row[f"score_ci_{end}"]) for end in ("low", "high"))
            assert cell == f"{score(row['score'])} [{low}, {high}]"
    assert len(found) == 8


def test_the_model_cards_recall_is_the_measured_one() -> None:
    data = rows(CPU / "hash_selection.csv")
    data = data[data["k"] == 256]
    text = (ROOT / "models" / "tiny" / "README.md").read_text()
    block = text[text.index("| weights |") :].splitlines()
    found = [numbers(line) for line in block[2:26]]
    assert len(data) == len(found) == 24
    for weights, use_norm, rbit, recall in (line[:4] for line in found):
        own = data[data["p_weights"].eq(weights) & data["rbit"].eq(int(rbit))]
        (row,) = own[own["p_use_norm"].astype(str) == use_norm].to_dict("records")
        # A row averages over steps, the card's table over prompts: close, but not equal.
        assert float(recall.split()[0]) == pytest.approx(row["recall_at_k"], abs=0.006)


def hata_page(head: str) -> list[list[str]]:
    """Return the cells of the table of docs/hata.md that begins with ``head``."""
    text = (ROOT / "docs" / "hata.md").read_text()
    lines = text[text.index(head) :].splitlines()[2:]
    end = next(i for i, line in enumerate(lines) if not line.startswith("|"))
    return [[cell.replace("**", "") for cell in numbers(line)] for line in lines[:end]]


@pytest.mark.parametrize(
    ("file", "head", "setting"),
    [
        ("loss_ablation", "| Arm | Δ recall@128 |", "decorrelation_weight=0"),
        ("recipe_ablation", "| Change | Δ recall@128 |", "ranking_late_share=0"),
    ],
)
def test_the_ablations_in_docs_are_the_measured_ones(file: str, head: str, setting: str) -> None:
    table = difference_table(compare(rows(CORE / f"{file}.csv")).configurations)
    assert table is not None
    page = hata_page(head)
    assert sorted(line[1:] for line in page) == sorted(row[4:] for row in table.rows)
    (worst,) = [line for line in page if setting in line[0]]
    (row,) = [row for row in table.rows if setting in row[0]]
    assert worst[1:] == row[4:]


def test_what_hashes_learned_at_their_length_are_worth_is_as_measured() -> None:
    folder = MEASURED / "epyc_zen4_league"
    tables = {
        name: narrow(main_table(compare(rows(folder / f"{name}.csv")).overall))
        for name in ("perplexity", "niah_single_1", "niah_single_2")
    }
    labels = (
        "HATA without centred keys, with key norms",
        "HATA with orthonormal weights",
        "HATA with the ranking recipe",
        "Exact top-k",
    )
    page = hata_page("| Hash, learned at 4,096 tokens | Δ NLL")
    for (_, *cells), label in zip(page, labels, strict=True):
        wanted = []
        for name, table in tables.items():
            column = "Δ NLL (nats/token)" if name == "perplexity" else "Score (0–100)"
            place = list(table.head).index(column)
            for k in ("64", "256"):
                (row,) = [one for one in table.rows if one[0] == label and one[1] == k]
                wanted.append(row[place])
        assert cells == wanted
    data = pd.read_parquet(folder / "perplexity.samples.parquet")
    of_rows = rows(folder / "perplexity.csv").query("method == 'hata'").set_index("run_id")
    text = (ROOT / "docs" / "hata.md").read_text()
    for k, better, worse, said in (
        (64, ("trained", "published"), ("orthonormal", "published"), "0.0605 [0.0205, 0.1005]"),
        (64, ("trained", "ranking"), ("trained", "published"), "0.0636 [0.0521, 0.0751]"),
        (256, ("trained", "ranking"), ("trained", "published"), "0.0137 [0.0014, 0.0260]"),
        (256, ("trained", "published"), ("orthonormal", "published"), "0.0085 [−0.0172, 0.0342]"),
    ):
        losses = []
        for weights, recipe in (better, worse):
            own = of_rows[of_rows["k"].eq(k) & of_rows["p_weights"].eq(weights)]
            (name,) = own[own["p_recipe"].eq(recipe)].index.unique()
            losses.append(data[data["run_id"].eq(name)].set_index("sample_id")["nll"])
        found = seed_interval(losses[1] - losses[0].loc[losses[1].index])
        assert said in text
        numbers_of = (found.estimate, found.low, found.high)
        assert said == "{:.4f} [{:.4f}, {:.4f}]".format(*numbers_of).replace("-", "−")


def test_what_fewer_bits_are_worth_is_as_measured() -> None:
    folder = MEASURED / "epyc_zen4_league"
    text, ruler = ("ranking_perplexity", "ranking_ruler")
    samples = {
        name: pd.read_parquet(folder / f"{name}.samples.parquet")
        for name in (text, ruler, "perplexity")
    }
    samples["league"] = pd.read_parquet(folder / "samples.parquet")
    subtasks = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multivalue")
    league = pd.concat([rows(folder / f"{name}.csv") for name in subtasks], ignore_index=True)
    league = league.assign(config_digest=None)
    overall = {
        text: compare(rows(folder / f"{text}.csv")).overall,
        ruler: compare(rows(folder / f"{ruler}.csv"), samples[ruler]).overall,
        "perplexity": compare(rows(folder / "perplexity.csv")).overall,
        "league": compare(league, samples["league"]).overall,
    }

    def cell(name: str, k: int, weights: str, recipe: str, rbit: int) -> pd.DataFrame:
        data = overall[name]
        own = data[data["method"].eq("hata") & data["k"].eq(k) & data["rbit"].eq(rbit)]
        found = own[own["p_weights"].eq(weights) & own["p_recipe"].eq(recipe)]
        assert len(found) == 1
        return found

    kinds = {
        "Ranking recipe": ("trained", "ranking", text, ruler),
        "As published, key norms": ("trained", "published", "perplexity", "league"),
        "Orthonormal, centred keys": ("orthonormal", "published", "perplexity", "league"),
    }
    shown = hata_page("| Hash, learned at 4,096 tokens | Bits |")
    assert [line[:2] for line in shown] == [
        *(["Ranking recipe", bits] for bits in ("32", "64", "128")),
        *([name, "128"] for name in list(kinds)[1:]),
    ]
    for name, bits, *cells in shown:
        weights, recipe, of_text, of_answers = kinds[name]
        variant = weights, recipe, int(bits)
        assert cells == [
            *(with_interval(cell(of_text, k, *variant), "nll_delta")[0] for k in (64, 256)),
            *(with_interval(cell(of_answers, k, *variant), "score")[0] for k in (64, 256)),
            METRICS["recall_at_k"].text(cell(of_answers, 64, *variant)["recall_at_k"].item()),
        ]

    def own(name: str, k: int, *variant: Any) -> pd.DataFrame:
        (runs,) = cell(name, k, *variant)["run_ids"]
        return samples[name][samples[name]["run_id"].isin(runs)]

    page = (ROOT / "docs" / "hata.md").read_text(encoding="utf-8")
    published, plain = ("trained", "published", 128), ("orthonormal", "published", 128)
    for k, bits, other in ((64, 64, published), (256, 64, published), (64, 32, plain)):
        losses = [
            one.set_index("sample_id")["nll"]
            for one in (own("perplexity", k, *other), own(text, k, "trained", "ranking", bits))
        ]
        gain = seed_interval(losses[0] - losses[1].loc[losses[0].index])
        ends = f"{gain.estimate:.4f} [{gain.low:.4f}, {gain.high:.4f}]".replace("-", "−")
        assert ends in page
    for k in (64, 256):
        pairs = pair(own("league", k, *published), own(ruler, k, "trained", "ranking", 64))
        lost = paired_interval(pairs["score"], pairs["other"], pairs["subtask"])
        assert f"{lost.estimate:.1f} [{lost.low:.1f}, {lost.high:.1f}]" in page


VARIANTS = {
    "Gaussian": ("random", None, False, False),
    "Orthonormal": ("orthonormal", None, False, False),
    "Orthonormal, centred keys": ("orthonormal", None, True, False),
    "Orthonormal, key norms": ("orthonormal", None, False, True),
    "Learned as published": ("trained", "published", False, False),
    "Learned as published, key norms": ("trained", "published", False, True),
    "Learned, ranking": ("trained", "ranking", False, False),
    "Learned, ranking, key norms": ("trained", "ranking", False, True),
}


def test_the_hash_ladder_in_docs_is_the_measured_one() -> None:
    both = [rows(CORE / f"hash_ladder{part}.csv") for part in ("", "_more")]
    data = pd.concat(both, ignore_index=True)
    data = data[data["task"].eq("selection") & data["k"].eq(128)]
    page = hata_page("| Recall@128 | 32 bits |")
    assert [line[0] for line in page] == list(VARIANTS)
    for name, *cells in page:
        weights, recipe, centred, normed = VARIANTS[name]
        own = data[data["p_weights"].eq(weights)]
        own = own[own["p_recipe"].eq(recipe)] if recipe else own
        own = own[own["p_centre_keys"].astype(str).eq(str(centred))]
        own = own[own["p_use_norm"].astype(str).eq(str(normed))]
        for rbit, cell in zip((32, 64, 96, 128, 192, 256), cells, strict=True):
            found = own[own["rbit"].eq(rbit)]["recall_at_k"]
            if cell == "–":
                assert not len(found)
                continue
            interval = seed_interval(list(found))
            assert cell.split()[0] == f"{interval.estimate:.3f}"
            alone = name == "Learned as published" and rbit == 256
            assert len(found) == (5 if "[" in cell else 1 if alone else 2)
            if "[" in cell:
                assert cell.endswith(f"[{interval.low:.3f}, {interval.high:.3f}]")


@pytest.mark.parametrize(
    ("file", "head", "axis"),
    [
        ("budget_ablation", "| `k` | Exact top-k |", "k"),
        ("bit_ablation", "| Bits | Score |", "rbit"),
    ],
)
def test_the_scores_in_docs_are_the_measured_ones(file: str, head: str, axis: str) -> None:
    data = rows(CORE / f"{file}.csv")
    data = data[data["subtask"] == MEAN]
    methods = ("exact", "hata", "loki", "quest") if axis == "k" else ("hata",)
    for line in hata_page(head):
        for method, cell in zip(methods, line[1:], strict=False):
            own = data[data["method"].eq(method) & data[axis].eq(int(line[0]))]
            (row,) = own.to_dict("records")
            score = METRICS["score"].text
            low, high = (score(row[f"score_ci_{end}"]) for end in ("low", "high"))
            assert cell == f"{score(row['score'])} [{low}, {high}]"


def test_the_page_on_hata_shows_what_its_hashes_find_beyond_the_length_they_learned_at() -> None:
    league = MEASURED / "epyc_zen3_league"
    page = (ROOT / "docs" / "hata.md").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    block = page[page.index("| Hash | Recall, 2,048 tokens |") :].splitlines()
    for line in block[2:5]:
        name, *cells = numbers(line)
        found[name] = cells
    kinds = {
        "Learned as published, key norms": ("trained", "False"),
        "Orthonormal, centred keys": ("orthonormal", "True"),
        "Learned, ranking, centred keys": ("trained", "True"),
    }
    first = []
    for name, (weights, centred) in kinds.items():
        cells = []
        for column in ("recall_at_k", "attention_mass"):
            for file in ("niah_single_2_at_2048", "niah_single_2", "niah_single_1"):
                data = rows(league / f"{file}.csv")
                data = data[data["method"].eq("hata") & data["subtask"].eq("mean")]
                data = data[data["k"].eq(64) & data["p_weights"].eq(weights)]
                (row,) = data[data["p_centre_keys"].astype(str).eq(centred)].to_dict("records")
                text = METRICS[column].text(row[column])
                if file != "niah_single_1":
                    cells.append(text)
                elif column == "recall_at_k":
                    first.append(text)
        assert found[name] == cells
    assert f"the same: {first[0]}, {first[1]} and {first[2]}." in page
    block = page[page.index("| Hash, learned at 4,096 tokens |") :].splitlines()
    data = rows(MEASURED / "epyc_zen4_league" / "niah_single_2.csv")
    data = data[data["method"].eq("hata") & data["subtask"].eq("mean") & data["k"].eq(64)]
    for line, (name, (weights, centred)) in zip(block[2:5], kinds.items(), strict=True):
        own = data[data["p_weights"].eq(weights)]
        (row,) = own[own["p_centre_keys"].astype(str).eq(centred)].to_dict("records")
        texts = [METRICS[column].text(row[column]) for column in ("recall_at_k", "attention_mass")]
        assert numbers(line) == [name, *texts]
