"""Compare ablation variants of one method: hash functions over bits, and changed settings (arms).

Compared is the quality of the selections, with intervals over seeds. Differences are paired by
seed, since the cells of one seed use the same prompts.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Hashable
from typing import Any, cast

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from topkbench.analysis import style
from topkbench.analysis.comparison.configurations import varies
from topkbench.analysis.comparison.metrics import METRICS
from topkbench.analysis.comparison.stats import seed_interval
from topkbench.analysis.figures.curves import legend, log2_axis, spread, table
from topkbench.analysis.figures.names import short_names
from topkbench.analysis.figures.points import describe
from topkbench.analysis.record.row import PARAMETER_PREFIX
from topkbench.analysis.tables.table import Table, with_interval

MEASURES = ("recall_at_k", "attention_mass")
UNTRAINED = ("random", "orthonormal")
_PUBLISHED = "published"
_WIDEST_ARM = 46  # characters; a longer name leaves no space for the dots


def _text(configuration: pd.Series, name: str) -> str:
    value = configuration.get(name)
    return "" if value is None or pd.isna(value) else str(value)


def ablation_variant(configuration: pd.Series) -> style.Style | None:
    """Return the style of a configuration's hash; None if the method has no hash."""
    projection = _text(configuration, "p_weights")
    if not projection:
        return None
    recipe = _text(configuration, "p_recipe")
    if projection not in UNTRAINED and recipe not in ("", _PUBLISHED):
        projection = recipe
    centred, normed = (
        _text(configuration, name) == "True" for name in ("p_centre_keys", "p_use_norm")
    )
    codes = int(float(_text(configuration, "p_query_codes") or 1))
    return style.ablation_variant(projection, centred, normed, codes)


def _two_axes(width: float, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=style.figure_size(width, height))
    return figure, list(figure.subplots(1, 2, **shared))


def _at_one_budget(configurations: pd.DataFrame) -> pd.DataFrame:
    """Return the configurations of the middle budget that have a recall."""
    data = configurations[configurations["recall_at_k"].notna() & configurations["rbit"].notna()]
    budgets = sorted(data["k"].dropna().unique())
    return data[data["k"] == budgets[len(budgets) // 2]] if budgets else data


def _axis_label(measure: str, configurations: pd.DataFrame) -> str:
    """Return the axis label of a measure, with the budget."""
    k = int(configurations["k"].iloc[0])
    return f"Recall@{k}" if measure == "recall_at_k" else f"{METRICS[measure].axis}, k = {k}"


def is_ladder(configurations: pd.DataFrame) -> bool:
    """Return whether at least two ablation variants of a hash have two widths each."""
    return bool(_of_ladder(configurations)[0])


def _of_ladder(
    configurations: pd.DataFrame,
) -> tuple[dict[str, pd.DataFrame], dict[Hashable, style.Style]]:
    """Return a ladder's configurations by calibration, ``variant`` their name, and their styles.

    There are none if they are no ladder.
    """
    data = _at_one_budget(configurations)
    found = {index: ablation_variant(configuration) for index, configuration in data.iterrows()}
    looks = {index: look for index, look in found.items() if look is not None}
    data = data.loc[list(looks)]
    names = pd.Series({index: look.label for index, look in looks.items()}, dtype=str)
    parts = by_calibration(data.assign(variant=names))
    for part in parts.values():
        if part.empty:
            return {}, {}
        widths = part.groupby("variant")["rbit"].nunique()
        points = part.groupby(["variant", "rbit"])["configuration_id"].nunique()
        if (widths > 1).sum() < 2 or points.max() > 1:  # a point has one configuration
            return {}, {}
    return parts, looks


def ladder(configurations: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """Draw the quality of selections against hash bits, one curve per ablation variant.

    Drawn are recall and attention mass, or score and recall if answers are scored.

    Returns:
        The figure and its data, or None if fewer than two variants have two widths each.
    """
    parts, looks = _of_ladder(configurations)
    if not parts:
        return None
    data = configurations.loc[list(looks)].assign(
        variant=pd.Series({index: look.label for index, look in looks.items()})
    )
    figure = Figure(figsize=style.figure_size(9.6, 0.5 + 3.6 * len(parts)))
    axes = figure.subplots(len(parts), 2, squeeze=False, sharex=True, sharey="col")
    order = sorted(data["variant"].unique(), key=rank)
    measures = ("score", "recall_at_k") if data["score"].notna().all() else MEASURES
    for row, (calibration, part) in zip(axes, parts.items(), strict=True):
        for axis, measure in zip(row, measures, strict=True):
            for place, name in enumerate(order):
                points = part[part["variant"] == name].sort_values("rbit", kind="stable")
                if points.empty:
                    continue
                look = looks[points.index[0]]
                shift = 2.0 ** (0.03 * (place - (len(order) - 1) / 2))
                drawn = axis.errorbar(
                    points["rbit"].astype(float) * shift,
                    points[measure],
                    yerr=spread(points, measure),
                    color=look.colour,
                    marker=look.marker,
                    linestyle=look.line,
                    elinewidth=0.9,
                    capsize=1.8,
                    markeredgecolor="white",
                    markeredgewidth=0.5,
                    label=name,
                )
                describe(drawn.lines[0], points, measure)
            axis.set_xscale("log", base=2)
            log2_axis(axis.xaxis, [float(one) for one in data["rbit"]])
            axis.set_ylabel(_axis_label(measure, data))
            if len(parts) > 1:
                axis.set_title(
                    f"Learned on calibration={calibration}", loc="left", fontsize="medium"
                )
    for axis in axes[-1]:
        axis.set_xlabel(METRICS["rbit"].axis)
    legend(figure, axes[0, 0])
    drawn = table(data, *measures)
    if len(parts) > 1:
        drawn.insert(2, "calibration", data["p_calibration"].to_numpy())
    return figure, drawn


def ladder_tables(configurations: pd.DataFrame) -> list[tuple[str, Table]]:
    """Return recall and attention mass of each ablation variant by hash bits, at every budget.

    The best of each width is bold; there is no table where `ladder` draws nothing.
    """
    if not is_ladder(configurations):
        return []
    data = configurations[configurations["recall_at_k"].notna() & configurations["rbit"].notna()]
    names = _display_names(data)
    data = data.assign(name=names).sort_values("rbit", kind="stable")
    widths = sorted(int(one) for one in data["rbit"].unique())
    order = sorted(dict.fromkeys(names), key=rank)
    tables = []
    for k in sorted(int(one) for one in data["k"].dropna().unique()):
        for measure in MEASURES:
            part = data[data["k"] == k]
            texts = pd.Series(with_interval(part, measure), index=part.index)
            table = Table(["Hash", *(f"{one} bits" for one in widths)], [])
            for place, name in enumerate(order):
                own = part["name"] == name
                cells = [texts[own & (part["rbit"] == width)] for width in widths]
                table.rows.append([name, *(cell.iloc[0] if len(cell) else "–" for cell in cells)])
                for column, width in enumerate(widths, start=1):
                    values = part.loc[part["rbit"] == width].set_index("name")[measure]
                    if name in values.index and values[name] == values.max():
                        table.strong.add((place, column))
            tables.append((f"{METRICS[measure].label} by hash bits, k = {k}", table))
    return tables


def by_calibration(configurations: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the configurations by the texts that they were fitted on.

    Those that learn nothing are in each part. The only part is that of all configurations, without
    a name, if texts do not vary.
    """
    names = configurations.get("p_calibration", pd.Series(index=configurations.index, dtype=str))
    found = sorted(names.dropna().unique())
    if len(found) < 2:
        return {"": configurations}
    return {name: configurations[names.isna() | (names == name)] for name in found}


def rank(label: str) -> tuple[int, int, str]:
    """Return a sort key of an ablation variant: its projection, then the additions to it."""
    projections = [words for words, _ in style.PROJECTIONS.values()]
    found = [i for i, words in enumerate(projections) if label.startswith(words)]
    return (found[0] if found else len(projections)), label.count(","), label


def arms(configurations: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """Draw recall and attention mass of each arm of an ablation as a dot with its interval.

    A vertical line marks the reference arm, whose settings the other arms change.

    Returns:
        The figure and its data, or None if there is no reference arm, or fewer than two others.
    """
    data = _at_one_budget(configurations)
    if (
        data["variant"].nunique() < 3
        or not (data["variant"] == "").any()
        or is_ladder(configurations)
    ):
        return None
    labels = sorted(set(data["variant"]), key=_by_number)
    widths = sorted(int(one) for one in data["rbit"].unique())
    figure, axes = _two_axes(9.6, 1.3 + 0.31 * len(labels), sharey=True)
    for axis, measure in zip(axes, MEASURES, strict=True):
        for place, width in enumerate(widths):
            part = data[data["rbit"] == width].drop_duplicates("variant").set_index("variant")
            part = part.reindex([one for one in labels if one in part.index])
            colour = style.shade(style.RED, 1 - (place + 1) / len(widths))
            shift = 0.22 * (place - (len(widths) - 1) / 2)
            axis.errorbar(
                part[measure],
                [labels.index(one) + shift for one in part.index],
                xerr=spread(part, measure),
                color=colour,
                marker="o",
                linestyle="none",
                elinewidth=1.1,
                capsize=2.0,
                label=f"{width} bits",
            )
            if "" in part.index:
                reference = part[measure].loc[""]
                axis.axvline(float(reference), color=colour, lw=0.8, ls=(0, (3, 2)), zorder=0)
        axis.set_xlabel(_axis_label(measure, data))
        axis.grid(axis="y", visible=False)
    names = short_names(labels)
    axes[0].set_yticks(
        range(len(labels)),
        [textwrap.fill(names[one] or "as configured", _WIDEST_ARM) for one in labels],
    )
    axes[0].invert_yaxis()
    axes[0].tick_params(axis="y", length=0)
    axes[1].tick_params(axis="y", length=0)
    if len(widths) > 1:
        legend(figure, axes[0])
    return figure, table(data, *MEASURES)


def _by_number(variant: str) -> tuple[str, float, str]:
    """Return a sort key of an arm: the changed setting, then its value; the reference is first."""
    name, _, value = variant.partition("=")
    try:
        return name, float(value), variant
    except ValueError:
        return name, math.inf, variant


def _reference(part: pd.DataFrame) -> pd.Series | None:
    """Return the configuration that the others of one width and budget are compared with.

    Where projections vary it is the best untrained one, else the arm that changes nothing.
    """
    if "p_weights" in part and part["p_weights"].nunique() > 1:
        untrained = part[part["p_weights"].isin(UNTRAINED)]
        return untrained.sort_values("recall_at_k", kind="stable").iloc[-1]
    unchanged = part[part["variant"] == ""]
    return unchanged.iloc[0] if len(unchanged) and part["variant"].nunique() > 1 else None


def _display_names(part: pd.DataFrame) -> list[str]:
    """Return the names of configurations of a method: their ablation variants, or their labels.

    They are variants if nothing varies but what the name of one says.
    """
    varying = {
        name for name in part.columns if name.startswith(PARAMETER_PREFIX) and varies(part[name])
    }
    said = {"weights", "recipe", "use_norm", "centre_keys", "query_codes", "calibration"}
    looks = [ablation_variant(configuration) for _, configuration in part.iterrows()]
    is_ladder = "p_weights" in varying and varying <= {f"p_{one}" for one in said}
    if not is_ladder or None in looks:
        return list(part["label"])
    names = []
    for look, (_, configuration) in zip(looks, part.iterrows(), strict=True):
        texts = _text(configuration, "p_calibration") if "p_calibration" in varying else ""
        label = cast(style.Style, look).label
        names.append(f"{label}, on {texts}" if texts else label)
    return names


def difference_table(configurations: pd.DataFrame) -> Table | None:
    """Return a table of each variant's difference to its reference, at the middle budget.

    Differences are paired by seed. None if no method has variants and two common seeds.
    """
    rows: list[list[str]] = []
    for _, part in _at_one_budget(configurations).groupby(["method", "rbit"], sort=True):
        reference = _reference(part)
        if reference is None:
            continue
        names = dict(zip(part.index, _display_names(part), strict=True))
        for index, configuration in part.iterrows():
            if index == reference.name:
                continue
            cells = [
                names[index],
                f"{configuration['k']}",
                f"{configuration['rbit']}",
                names[reference.name],
            ]
            for measure in MEASURES:
                own, other = configuration["by_seed"][measure], reference["by_seed"][measure]
                both = sorted(set(own) & set(other))
                gaps = [own[seed] - other[seed] for seed in both]
                cells.append(_signed([gap for gap in gaps if not math.isnan(gap)]))
            rows.append([*cells, str(len(both))])
    if not any("[" in row[4] for row in rows):
        return None
    heads = ["Method", "k", "rbit", "Compared with", "Δ recall@k", "Δ attention mass", "Seeds"]
    return Table(heads, rows, words={0, 3})


def _signed(gaps: list[float]) -> str:
    if not gaps:
        return "–"
    found = seed_interval(gaps)
    mean, low, high = (
        f"{one:+.3f}".replace("-", "−") for one in (found.estimate, found.low, found.high)
    )
    return mean if math.isnan(found.low) else f"{mean} [{low}, {high}]"
