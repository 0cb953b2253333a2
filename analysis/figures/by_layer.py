"""Selection quality by layer: one curve per configuration, and how far its KV heads spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
from matplotlib.figure import Figure

from topkbench.analysis import style
from topkbench.analysis.figures.curves import curve_label, legend
from topkbench.analysis.figures.highlight import draw_line, highlighted, marked, name_ends
from topkbench.analysis.figures.variants import ablation_variant, by_calibration, rank

_COLUMNS = {"run_id", "k", "layer", "kv_head", "recall_at_k"}
MOST_CURVES = 12


def layers(samples: pd.DataFrame) -> pd.DataFrame:
    """Return the mean recall of each cell, budget, layer and KV head over prompts and steps."""
    if not set(samples.columns) >= _COLUMNS:
        return pd.DataFrame(columns=sorted(_COLUMNS))
    found = samples[samples["kv_head"].notna()]
    by = ["run_id", "k", "layer", "kv_head"]
    return found.groupby(by)["recall_at_k"].mean().reset_index()


def _look(configuration: pd.Series) -> style.Style:
    """Return the style of a hash's variant, else of the method, with the configuration's label."""
    look = ablation_variant(configuration)
    if look is not None:
        return look
    label = curve_label(configuration, ("rbit",), with_subtask=False)
    return replace(style.style(str(configuration["method"])), label=label)


def recall_by_layer(
    configurations: pd.DataFrame, samples: pd.DataFrame, methods: Sequence[str] | None = None
) -> tuple[Figure, pd.DataFrame] | None:
    """Draw the recall of the exact top-k in each layer, at the middle budget and hash width.

    A curve is the mean over KV heads and seeds; the bars reach from the worst head to the best.

    Args:
        configurations: `Comparison.overall` of one setting.
        samples: The samples of their cells.
        methods: Methods to highlight; None for the default of `highlight.highlighted`.

    Returns:
        The figure and its data, or None without recall by layer, of a single layer, or with more
        configurations than can be told apart.
    """
    quality = layers(samples)
    data = configurations[configurations["recall_at_k"].notna()]
    if quality.empty or data.empty or quality["layer"].nunique() < 2:
        return None
    for axis in ("k", "rbit"):
        values = sorted(data[axis].dropna().unique())
        if values:
            middle = values[len(values) // 2]
            data = data[(data[axis] == middle) | (data[axis].isna() & (axis == "rbit"))]
    chosen = highlighted(data, "recall_at_k", "k", methods)
    parts = by_calibration(data)
    if any(len(part) > MOST_CURVES for part in parts.values()):
        return None
    figure = Figure(figsize=style.figure_size(9.6, 0.5 + 3.4 * len(parts)))
    axes = figure.subplots(len(parts), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    tables = []
    ticks = sorted(int(one) for one in quality["layer"].unique())
    for panel, (calibration, part) in zip(axes, parts.items(), strict=True):
        looks = [(one, _look(one)) for _, one in part.iterrows()]
        looks.sort(key=lambda one: rank(one[1].label))
        ends: list[tuple[float, float, str]] = []
        for place, (configuration, look) in enumerate(looks):
            own = quality[
                quality["run_id"].isin(configuration["run_ids"])
                & (quality["k"] == configuration["k"])
            ]
            by_head = own.groupby(["layer", "kv_head"])["recall_at_k"].mean()
            heads = by_head.unstack()
            mean = heads.mean(axis=1)
            shift = 0.08 * (place - (len(part) - 1) / 2)
            in_grey = configuration["method"] not in chosen
            if in_grey:
                ends.append((mean.index[-1] + shift, float(mean.iloc[-1]), look.label))
            draw_line(
                panel,
                [layer + shift for layer in mean.index],
                mean,
                [mean - heads.min(axis=1), heads.max(axis=1) - mean],
                rows=pd.DataFrame([configuration] * len(mean)).assign(
                    subtask=[f"layer {layer}" for layer in mean.index],
                    recall_at_k=list(mean),
                    recall_at_k_ci_low=None,
                ),
                shows=("recall_at_k",),
                in_grey=in_grey,
                look=look,
                elinewidth=0.7,
                capsize=0,
                markersize=4,
                label=look.label,
            )
            long = by_head.reset_index()
            named = {"method": configuration["method"], "configuration": look.label}
            tables.append(long.assign(**named, calibration=calibration))
        name_ends(panel, ends)
        panel.set_ylabel(f"Recall@{int(data['k'].iloc[0])}")
        if len(parts) > 1:
            panel.set_title(f"Learned on calibration={calibration}", loc="left", fontsize="medium")
    axes[-1].set_xticks(ticks)
    axes[-1].set_xlabel("Layer")
    legend(figure, axes[0])
    return figure, marked(pd.concat(tables, ignore_index=True), chosen)
