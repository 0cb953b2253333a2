"""Training curves: the loss at each step, per layer and as the mean over layers."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from topkbench.analysis import style
from topkbench.analysis.comparison.metrics import METRICS
from topkbench.analysis.figures.curves import curve_label, legend, new_figure, vertical_scale

_BY = ["layer", "step"]


def losses(samples: pd.DataFrame) -> pd.DataFrame:
    """Return the recorded losses, one per layer and step; means if there are several seeds."""
    if not {*_BY, "loss"} <= set(samples.columns):
        return pd.DataFrame(columns=[*_BY, "loss"])
    found = samples[samples["loss"].notna()]
    return found.groupby(_BY)["loss"].mean().reset_index()


def loss_points(samples: pd.DataFrame) -> list[dict[str, float]]:
    """Return one mapping per step: ``step``, ``loss/layer_00``, ..., and their ``loss/mean``."""
    points: list[dict[str, float]] = []
    for step, part in losses(samples).groupby("step"):
        found = dict(zip(part["layer"].astype(int), part["loss"].astype(float), strict=True))
        by_layer = {f"loss/layer_{layer:02d}": loss for layer, loss in found.items()}
        mean = sum(found.values()) / len(found)
        points.append({"step": float(str(step)), **by_layer, "loss/mean": mean})
    return points


def loss_curve(
    configurations: pd.DataFrame, samples: pd.DataFrame
) -> tuple[Figure, pd.DataFrame] | None:
    """Draw each configuration's loss over the steps: the mean over layers, and faintly each layer.

    The mean is smoothed by a running mean over a fiftieth of the steps: if each step samples its
    own queries and keys, single losses hide the trend. The returned data are not smoothed.

    Args:
        configurations: `Comparison.overall` of one setting.
        samples: The samples of their cells.

    Returns:
        The figure and its data, or None if nothing was trained in steps.
    """
    found: list[tuple[Any, pd.DataFrame]] = []
    for _, configuration in configurations.iterrows():
        curves = losses(samples[samples["run_id"].isin(configuration["run_ids"])])
        if len(curves):
            found.append((configuration, curves))
    if not found:
        return None
    figure, axes = new_figure()
    data: list[pd.DataFrame] = []
    for place, (configuration, curves) in enumerate(found):
        look = style.style(str(configuration["method"]))
        colour = style.shade(look.colour, place / max(len(found) - 1, 1))
        table = curves.pivot(index="step", columns="layer", values="loss")
        axes.plot(table.index, table.to_numpy(), color=colour, lw=0.5, alpha=0.2)
        label = curve_label(configuration, ("rbit",), with_subtask=False)
        window = max(1, len(table) // 50)
        mean = table.mean(axis=1).rolling(window, min_periods=1, center=True).mean()
        axes.plot(table.index, mean, color=colour, ls=style.turn(place), label=label)
        data.append(
            curves.assign(
                method=configuration["method"],
                variant=configuration["variant"],
                rbit=configuration["rbit"],
            )
        )
    table = pd.concat(data, ignore_index=True)
    if (table["loss"] > 0).all():
        vertical_scale(axes, METRICS["loss"].scale)
        low, high = axes.get_ylim()
        axes.yaxis.set_major_formatter("{x:g}")
        # Over less than a decade a logarithmic axis has hardly any major tick.
        axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())
    axes.set_xlabel(METRICS["step"].axis)
    axes.set_ylabel(METRICS["loss"].axis)
    legend(figure, axes)
    return figure, table[["method", "variant", "rbit", *_BY, "loss"]]
