"""Ablation variants of a method, differences paired by seed, and the needle heat map."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from topkbench.analysis.comparison.configurations import compare
from topkbench.analysis.figures.bars import needle_heatmap
from topkbench.analysis.figures.by_layer import recall_by_layer
from topkbench.analysis.figures.plots import draw_all
from topkbench.analysis.figures.points import points_of
from topkbench.analysis.figures.variants import arms, difference_table, ladder, ladder_tables
from topkbench.analysis.record.row import Row
from topkbench.analysis.record.store import frame
from topkbench.analysis.report.build import build
from topkbench.analysis.tables.overview import main_table

RowMaker = Callable[..., Row]
VARIANTS = (("random", False), ("orthonormal", False), ("orthonormal", True), ("trained", True))


def selection(row: RowMaker, settings: list[tuple[dict[str, object], int, int, float]]) -> Row:
    rows = [
        row(
            run_id=f"{index:016x}",
            task="selection",
            method="hata",
            protocol="unified",
            k=128,
            rbit=rbit,
            seed=seed,
            recall_at_k=recall,
            attention_mass=recall + 0.2,
            parameters=parameters,
            config_digest=f"{parameters}{rbit}",
        )
        for index, (parameters, rbit, seed, recall) in enumerate(settings)
    ]
    return frame(rows)  # type: ignore[return-value]


def ladder_rows(row: RowMaker) -> pd.DataFrame:
    """Recall grows by 0.1 per variant and per doubling of the bits, and by 0.02 for seed 1."""
    settings = []
    for (rank, (weights, normed)), (place, rbit), seed in itertools.product(
        enumerate(VARIANTS), enumerate((64, 128)), (0, 1)
    ):
        parameters = {"weights": weights, "use_norm": normed, "centre_keys": False}
        settings.append((parameters, rbit, seed, 0.2 + 0.1 * (rank + place) + 0.02 * seed))
    return selection(row, settings)  # type: ignore[return-value, arg-type]


def arm_rows(row: RowMaker) -> pd.DataFrame:
    unchanged = {"sigma": 0.1, "epsilon": 0.01, "balance_weight": 1.0, "epochs": 15}
    changes: list[dict[str, object]] = [
        {},
        {"epsilon": 0.0},
        {"balance_weight": 0.0},
        {"sigma": 1.0},
        {"sigma": 0.3},
        {"epochs": 5},
    ]
    return selection(  # type: ignore[return-value]
        row,
        [
            ({**unchanged, **change}, 128, seed, 0.4 - 0.01 * place + 0.02 * seed * (1 + place))
            for place, change in enumerate(changes)
            for seed in (0, 1, 2)
        ],
    )


def test_seeds_give_recall_an_interval(row: RowMaker) -> None:
    configurations = compare(ladder_rows(row)).overall
    first = configurations[configurations["variant"].str.contains("Gaussian")].iloc[0]
    # 0.20 and 0.22: the mean, and 12.7062 * 0.0141421 / sqrt(2) on either side
    assert first["recall_at_k"] == pytest.approx(0.21)
    assert first["recall_at_k_ci_low"] == pytest.approx(0.21 - 0.127062, abs=1e-6)
    assert first["recall_at_k_ci_high"] == pytest.approx(0.21 + 0.127062, abs=1e-6)
    table = main_table(configurations)
    assert table.rows[0][table.head.index("Recall@k")].count("[") == 1


def test_one_seed_has_no_interval(row: RowMaker) -> None:
    rows = ladder_rows(row)
    configurations = compare(rows[rows["seed"] == 0].reset_index(drop=True)).overall
    assert configurations["recall_at_k_ci_low"].isna().all()
    table = main_table(configurations)
    assert table.rows[0][table.head.index("Recall@k")].count("[") == 0
    assert difference_table(configurations) is None


def test_the_hash_ladder_has_one_curve_per_variant(row: RowMaker, tmp_path: Path) -> None:
    configurations = compare(ladder_rows(row)).overall
    made = ladder(configurations)
    assert made is not None
    figure, data = made
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *("Gaussian", "Orthonormal", "Orthonormal, key norms", "Learned as published, key norms"),
    ]
    assert [axes.get_ylabel() for axes in figure.axes] == [
        *("Recall@128", "Attention mass kept, k = 128"),
    ]
    assert len(data) == 8
    drawn = {one.name for one in draw_all(configurations, tmp_path, "words")}
    assert "hash_ladder" in drawn
    assert not drawn & {"recall_vs_rbit", "recall_vs_k", "arms"}


def test_a_hash_ladder_with_scored_answers_shows_scores(row: RowMaker) -> None:
    rows = ladder_rows(row).assign(task="ruler", score=50.0, score_ci_low=40.0, score_ci_high=60.0)
    made = ladder(compare(rows).overall)
    assert made is not None
    labels = [axes.get_ylabel() for axes in made[0].axes]
    assert labels == ["Score (0–100), k = 128", "Recall@128"]


def test_a_recipe_is_an_ablation_variant_of_its_own(row: RowMaker) -> None:
    rows = ladder_rows(row)
    trained = rows["p_weights"] == "trained"
    ours = rows[trained].assign(p_recipe="ranked")
    ours = ours.assign(run_id=[f"f{one[1:]}" for one in ours["run_id"]], config_digest="ours")
    both = pd.concat([rows.assign(p_recipe="published"), ours], ignore_index=True)
    made = ladder(compare(both).overall)
    assert made is not None
    labels = [text.get_text() for text in made[0].legends[0].get_texts()]
    assert labels[-2:] == ["Learned as published, key norms", "Learned, ranked, key norms"]


def test_differences_between_hashes_are_to_the_best_untrained_one(row: RowMaker) -> None:
    table = difference_table(compare(ladder_rows(row)).overall)
    assert table is not None
    first = [line for line in table.rows if line[2] == "64"]
    assert {line[3] for line in first} == {"Orthonormal, key norms"}
    found = {line[0]: line[4] for line in first}
    # Each seed has the same effect on all variants, which pairing removes.
    assert found == {
        "Gaussian": "−0.200 [−0.200, −0.200]",
        "Orthonormal": "−0.100 [−0.100, −0.100]",
        "Learned as published, key norms": "+0.100 [+0.100, +0.100]",
    }
    assert {line[6] for line in table.rows} == {"2"}


def rows_of_two_texts(row: RowMaker) -> pd.DataFrame:
    """The ladder's rows with weights learned on two texts; on the second recall is 0.05 less."""
    rows = ladder_rows(row)
    learned = rows["p_weights"] == "trained"
    rows["p_calibration"] = pd.Series("prompts", index=rows.index).where(learned)
    other = rows[learned].assign(p_calibration="text", config_digest="text")
    other["recall_at_k"] -= 0.05
    other["run_id"] = [f"e{one[1:]}" for one in other["run_id"]]
    return pd.concat([rows, other], ignore_index=True)


def test_texts_that_weights_were_learned_on_have_a_panel_each(row: RowMaker) -> None:
    configurations = compare(rows_of_two_texts(row)).overall
    made = ladder(configurations)
    assert made is not None
    figure, data = made
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        *("Learned on calibration=prompts",) * 2,
        *("Learned on calibration=text",) * 2,
    ]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[-1] == "Learned as published, key norms"
    assert len(labels) == 4
    learned = data[data["calibration"].notna() & (data["rbit"] == 64)]
    assert learned["recall_at_k"].tolist() == pytest.approx([0.51, 0.46])
    table = difference_table(configurations)
    assert table is not None
    found = {line[0]: line[4] for line in table.rows if line[2] == "64"}
    assert found["Learned as published, key norms, on prompts"] == "+0.100 [+0.100, +0.100]"
    assert found["Learned as published, key norms, on text"] == "+0.050 [+0.050, +0.050]"


def test_texts_of_learned_weights_alone_are_not_in_names(row: RowMaker) -> None:
    rows = ladder_rows(row)
    learned = rows["p_weights"] == "trained"
    plain = set(compare(rows).overall["label"])
    rows["p_calibration"] = pd.Series("text", index=rows.index).where(learned)
    rows["p_calibration_sequences"] = pd.Series(14, index=rows.index).where(learned)
    configurations = compare(rows).overall
    assert set(configurations["label"]) == plain
    table = difference_table(configurations)
    assert table is not None
    assert {line[0] for line in table.rows} >= {"Gaussian", "Learned as published, key norms"}


def test_a_ladder_has_a_table_for_each_measure(row: RowMaker) -> None:
    found = ladder_tables(compare(rows_of_two_texts(row)).overall)
    assert [title for title, _ in found] == [
        "Recall@k by hash bits, k = 128",
        "Attention mass kept by hash bits, k = 128",
    ]
    recall = found[0][1]
    assert recall.head == ["Hash", "64 bits", "128 bits"]
    # Means of two seeds that differ by 0.02: 12.7062 * 0.01 on either side.
    assert recall.rows == [
        ["Gaussian", "0.210 [0.083, 0.337]", "0.310 [0.183, 0.437]"],
        ["Orthonormal", "0.310 [0.183, 0.437]", "0.410 [0.283, 0.537]"],
        ["Orthonormal, key norms", "0.410 [0.283, 0.537]", "0.510 [0.383, 0.637]"],
        [
            "Learned as published, key norms, on prompts",
            *("0.510 [0.383, 0.637]", "0.610 [0.483, 0.737]"),
        ],
        [
            "Learned as published, key norms, on text",
            *("0.460 [0.333, 0.587]", "0.560 [0.433, 0.687]"),
        ],
    ]
    assert recall.strong == {(3, 1), (3, 2)}
    rows = ladder_rows(row)
    assert ladder_tables(compare(rows[rows["rbit"] == 64]).overall) == []


def test_a_setting_that_is_null_tells_configurations_apart(row: RowMaker) -> None:
    rows = ladder_rows(row)
    learned = rows[rows["p_weights"] == "trained"].reset_index(drop=True)
    nested = learned.assign(p_fit_rbit=128, config_digest="nested")
    nested["run_id"] = [f"e{one[1:]}" for one in nested["run_id"]]
    both = pd.concat([learned.assign(p_fit_rbit=None), nested], ignore_index=True)
    assert compare(both).overall["label"].nunique() == 2


def test_two_configurations_of_one_variant_are_no_ladder(row: RowMaker) -> None:
    rows = ladder_rows(row)
    learned = rows[(rows["p_weights"] == "trained") & (rows["rbit"] == 64)]
    nested = learned.assign(p_fit_rbit=128, config_digest="nested")
    nested["run_id"] = [f"e{one[1:]}" for one in nested["run_id"]]
    both = pd.concat([rows.assign(p_fit_rbit=None), nested], ignore_index=True)
    configurations = compare(both).overall
    assert ladder(configurations) is None
    assert ladder_tables(configurations) == []


def test_several_codes_a_query_are_a_variant_of_their_own(row: RowMaker) -> None:
    rows = ladder_rows(row).assign(p_recipe="ranking", p_query_codes=1)
    learned = rows["p_weights"] == "trained"
    more = rows[learned].assign(p_query_codes=4, config_digest="more")
    more["run_id"] = [f"e{one[1:]}" for one in more["run_id"]]
    made = ladder(compare(pd.concat([rows, more], ignore_index=True)).overall)
    assert made is not None
    labels = [text.get_text() for text in made[0].legends[0].get_texts()]
    assert labels[-2:] == [
        "Learned, ranking, key norms",
        "Learned, ranking, 4 codes a query, key norms",
    ]


def layer_samples(rows: pd.DataFrame) -> pd.DataFrame:
    """Recall of two heads in two layers: that of the row, lower in layer 6 and in head 1."""
    return pd.DataFrame(
        [
            {
                "run_id": cell["run_id"],
                "k": cell["k"],
                "layer": layer,
                "kv_head": head,
                "step": step,
                "recall_at_k": cell["recall_at_k"] - 0.1 * (layer == 6) - 0.02 * head,
            }
            for _, cell in rows.iterrows()
            for layer in (2, 6)
            for head in (0, 1)
            for step in (0, 1)
        ]
    )


def test_recall_is_drawn_by_layer_at_the_middle_width(row: RowMaker) -> None:
    rows = rows_of_two_texts(row)
    made = recall_by_layer(compare(rows).overall, layer_samples(rows))
    assert made is not None
    figure, data = made
    assert [axes.get_ylabel() for axes in figure.axes] == ["Recall@128"] * 2
    assert [tick.get_text() for tick in figure.axes[1].get_xticklabels()] == ["2", "6"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        *("Gaussian", "Orthonormal", "Orthonormal, key norms", "Learned as published, key norms"),
    ]
    # 128 bits are the middle of two widths; the mean over seeds of Gaussian is 0.31 there.
    gaussian = data[(data["configuration"] == "Gaussian") & (data["calibration"] == "text")]
    assert gaussian["recall_at_k"].tolist() == pytest.approx([0.31, 0.29, 0.21, 0.19])
    learned = data[data["configuration"] == "Learned as published, key norms"]
    assert learned[(learned["layer"] == 2) & (learned["kv_head"] == 0)][
        "recall_at_k"
    ].tolist() == pytest.approx([0.61, 0.56])


def test_recall_by_layer_needs_layers(row: RowMaker) -> None:
    rows = ladder_rows(row)
    configurations = compare(rows).overall
    samples = layer_samples(rows)
    assert recall_by_layer(configurations, samples[samples["layer"] == 2]) is None
    assert recall_by_layer(configurations, samples.drop(columns="kv_head")) is None


def test_an_arm_is_named_by_what_it_changes(row: RowMaker) -> None:
    configurations = compare(arm_rows(row)).overall
    made = arms(configurations)
    assert made is not None
    figure, data = made
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        *("as configured", "balance_weight=0.0", "epochs=5", "epsilon=0.0"),
        *("sigma=0.3", "sigma=1.0"),
    ]
    assert len(data) == 6
    table = difference_table(configurations)
    assert table is not None
    assert {line[3] for line in table.rows} == {"HATA"}
    (epsilon,) = (line for line in table.rows if line[0] == "HATA (epsilon=0.0)")
    # by seed: -0.01, +0.01, +0.03; mean 0.01, 4.3027 * 0.02 / sqrt(3) on either side
    assert epsilon[4:] == ["+0.010 [−0.040, +0.060]", "+0.010 [−0.040, +0.060]", "3"]


def test_an_ablation_needs_a_reference_and_two_arms(row: RowMaker) -> None:
    rows = arm_rows(row)
    two = rows[rows["p_epsilon"].eq(0.0) | rows["p_sigma"].eq(1.0)].reset_index(drop=True)
    assert arms(compare(two).overall) is None


def needle_rows(row: RowMaker) -> pd.DataFrame:
    rows = []
    for name, method, k in (("1", "full", None), ("2", "hata", 128)):
        for length, depth in itertools.product((1024, 2048), (0, 50, 100)):
            score = 100.0 if method == "full" else depth / 2
            rows.append((name, method, k, f"{length} x {depth}%", score))
        rows.append((name, method, k, "mean", 50.0))
    return frame(
        [
            row(
                run_id=name * 16,
                task="needle",
                method=method,
                k=k,
                length=None,
                subtask=subtask,
                score=score,
            )
            for name, method, k, subtask, score in rows
        ]
    )


def test_lengths_and_depths_give_a_heatmap(row: RowMaker, tmp_path: Path) -> None:
    configurations = compare(needle_rows(row)).configurations
    made = needle_heatmap(configurations)
    assert made is not None
    figure, data = made
    full, hata, _ = figure.axes
    assert [text.get_text() for text in full.texts] == ["100"] * 6
    assert [text.get_text() for text in hata.texts] == ["0", "0", "25", "25", "50", "50"]
    assert [text.get_text() for text in full.get_yticklabels()] == ["0%", "50%", "100%"]
    assert [text.get_text() for text in full.get_xticklabels()] == ["1K", "2K"]
    assert len(data) == 12
    figure.draw_without_rendering()
    said = [one.text for one in points_of(figure)]
    assert len(said) == 12  # every cell can be pointed at
    assert said[0].splitlines()[0] == "Full attention"
    assert sum("\nScore: 25.0" in one for one in said) == 2
    drawn = {one.name for one in draw_all(configurations, tmp_path, "words")}
    assert "needle_heatmap" in drawn
    # A score that lies between two whole numbers is not rounded to the even one.
    half = configurations.assign(score=configurations["score"].replace({25.0: 0.5, 50.0: 62.5}))
    made = needle_heatmap(half)
    assert made is not None
    numbers = [text.get_text() for text in made[0].axes[1].texts]
    assert numbers == ["0", "0", "0.5", "0.5", "62.5", "62.5"]
    assert "subtasks" not in drawn


def test_one_depth_is_no_heatmap(row: RowMaker) -> None:
    rows = needle_rows(row)
    one = rows[rows["subtask"].isin(["1024 x 0%", "2048 x 0%"])].reset_index(drop=True)
    assert needle_heatmap(compare(one).configurations) is None


def test_a_report_can_be_built_without_times(row: RowMaker, tmp_path: Path) -> None:
    """The figure of the stages is empty without times, and must not fail."""
    ladder_rows(row).to_csv(tmp_path / "rows.csv", index=False)
    text = build(tmp_path / "rows.csv", tmp_path / "out").with_name("report.md").read_text()
    assert "### Differences, paired by seed" in text
    assert "hash_ladder.png" in text
