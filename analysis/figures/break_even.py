"""Break-even: from which length a method is faster, and how much a whole decode step can gain.

Both follow from rows of one layer's decode step (``task=decode_latency``) at several lengths. The
time of a whole model's step is at least that of reading its weights once, at the measured memory
bandwidth, plus the measured attention step of every layer. The speed-up of that sum is an upper
bound on the speed-up of the step, since everything else in a step takes the same time with any
method.

Intervals follow from those of the speed-ups. The break-even length lies between the length from
which the upper ends stay above 1 and the length from which the lower ends do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from topkbench.analysis import style
from topkbench.analysis.comparison.metrics import METRICS
from topkbench.analysis.comparison.timings import (
    NO_INTERVAL,
    UNSTEADY,
    is_unsteady,
    lacks_interval,
    timed_text,
    timing_notes,
)
from topkbench.analysis.figures.curves import from_zero, hollow, legend, log2_axis, spread
from topkbench.analysis.figures.highlight import draw_line, highlighted, marked, name_ends
from topkbench.analysis.record.row import RecordError
from topkbench.analysis.tables.table import Table

_DTYPE_BYTES = {"float32": 4}  # every other dtype of a model is of 16 bits


@dataclass(frozen=True)
class ModelSize:
    """The size of a model, as far as the bound on a decode step needs it.

    Attributes:
        parameters: Number of weights, all read once per step.
        layers: Number of decoder layers, each taking the measured attention step.
    """

    parameters: float
    layers: int

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RecordError: If there is no weight or no layer.
        """
        if self.parameters <= 0 or self.layers < 1:
            raise RecordError(
                f"a model must have parameters and layers, got {self.parameters:g} and "
                f"{self.layers}."
            )


MODELS: Mapping[str, ModelSize] = {
    "1B": ModelSize(1.24e9, 16),
    "8B": ModelSize(8.03e9, 32),
    "70B": ModelSize(70.6e9, 80),
}
"""Sizes of Llama 3.1 and 3.2; the layer is always the one that was timed."""


def model_sizes(texts: Sequence[str]) -> dict[str, ModelSize]:
    """Parse models given on a command line as NAME=PARAMETERS/LAYERS, such as ``8B=8.03e9/32``.

    Raises:
        RecordError: If a text has another form.
    """
    sizes = {}
    for text in texts:
        name, _, numbers = text.partition("=")
        parameters, _, layers = numbers.partition("/")
        try:
            sizes[name] = ModelSize(float(parameters), int(layers))
        except ValueError:
            raise RecordError(
                "a model must be given as NAME=PARAMETERS/LAYERS, such as 8B=8.03e9/32, got "
                f"{text!r}."
            ) from None
    return sizes


def crossing(lengths: Sequence[float], speedups: Sequence[float]) -> float:
    """Return the length from which the speed-up stays at or above 1.

    Between two measured lengths it is interpolated on logarithmic axes.

    Args:
        lengths: Measured lengths, ascending.
        speedups: The speed-up at each, above 0.

    Returns:
        0 where it is at least 1 at every length; infinity where it is below 1 at the longest.
    """
    below = [place for place, value in enumerate(speedups) if value < 1]
    if not below:
        return 0.0
    last = below[-1]
    if last == len(lengths) - 1:
        return math.inf
    low, high = math.log(speedups[last]), math.log(speedups[last + 1])
    ends = math.log(lengths[last]), math.log(lengths[last + 1])
    return math.exp(ends[0] - low / (high - low) * (ends[1] - ends[0]))


def crossing_interval(points: pd.DataFrame) -> tuple[float, float] | None:
    """Return the interval of a curve's `crossing`: where the ends of the speed-ups cross 1.

    Returns:
        The crossing of the speed-ups' upper ends and that of their lower ends; None if a speed-up
        has no interval.
    """
    if lacks_interval(points).any():
        return None
    lengths = list(points["length"])
    upper, lower = points["speedup_ci_high"], points["speedup_ci_low"]
    return crossing(lengths, list(upper)), crossing(lengths, list(lower))


def faster_from(points: pd.DataFrame) -> str:
    """Return in words from which length a method is faster, with the interval or a mark.

    The words always and never are used only if the whole interval agrees and the times are steady.
    """
    lengths = list(points["length"])
    place = crossing(lengths, list(points["speedup_vs_full"]))
    ends = crossing_interval(points)
    unsteady = is_unsteady(points).any()
    if ends == (0, 0) and not unsteady:
        return f"always, {lengths[0]:,} and more"
    if ends == (math.inf, math.inf) and not unsteady:
        return f"never, up to {lengths[-1]:,}"

    def text(length: float) -> str:
        if length == 0:
            return f"≤ {lengths[0]:,}"
        return f"> {lengths[-1]:,}" if math.isinf(length) else f"{length:,.0f}"

    interval = NO_INTERVAL if ends is None else f" [{text(ends[0])}, {text(ends[1])}]"
    return text(place) + interval + (UNSTEADY if unsteady else "")


def curves(configurations: pd.DataFrame) -> list[tuple[pd.Series, pd.DataFrame]]:
    """Return each method's points over the length, for methods that have two or more.

    Args:
        configurations: Configurations of one setting and one batch size.

    Returns:
        For each method its first configuration, which names it, and its points, with an added
        column ``full_ms``: full attention's step, timed alternately with the method's.
    """
    data = configurations[
        configurations["speedup_vs_full"].notna() & configurations["length"].notna()
    ]
    data = data.assign(full_ms=data["full_ms_p50"])
    groups = data.groupby(["label", "rbit"], dropna=False, sort=False)
    found = [(part.iloc[0], part.sort_values("length")) for _, part in groups]
    return [one for one in found if one[1]["length"].is_unique and len(one[1]) > 1]


def step_ms(points: pd.DataFrame, attention: str, size: ModelSize) -> pd.Series:
    """Return the least time of a whole step, milliseconds: weights read once, all attention.

    Args:
        points: What `curves` returns.
        attention: The column of one layer's step, ``full_ms`` or ``decode_ms_p50``.
        size: The model.
    """
    width = points["p_dtype"].map(lambda dtype: _DTYPE_BYTES.get(str(dtype), 2))
    weights = size.parameters * width / (points["bandwidth_gb_s"] * 1e6)
    return weights + size.layers * points[attention]


def _bounded(configurations: pd.DataFrame) -> list[tuple[pd.Series, pd.DataFrame]]:
    """Return the curves of rows that record the machine's memory bandwidth."""
    return [
        one
        for one in curves(configurations)
        if one[1]["bandwidth_gb_s"].notna().all() and "p_dtype" in configurations
    ]


def break_even_table(
    configurations: pd.DataFrame, models: Mapping[str, ModelSize] = MODELS
) -> Table | None:
    """Return a table of each method's break-even length and its bound at the longest length.

    Args:
        configurations: Configurations of one setting and one batch size.
        models: Whole models for which the bound is shown.
    """
    found = curves(configurations)
    if not found:
        return None
    bounded = {configuration["configuration_id"] for configuration, _ in _bounded(configurations)}
    longest = max(int(points["length"].iloc[-1]) for _, points in found)
    heads = ["Method", "Faster than full from (tokens)", f"Speed-up at {longest:,} (×)"]
    for name, size in models.items() if bounded else ():
        shares = [
            size.layers * points["full_ms"].iloc[-1] / step_ms(points, "full_ms", size).iloc[-1]
            for configuration, points in found
            if configuration["configuration_id"] in bounded and points["length"].iloc[-1] == longest
        ]
        share = f", of which attention {np.median(shares):.0%}" if shares else ""
        heads.append(f"At most, {name} step{share} (×)")
    rows = []
    for configuration, points in found:
        last = points.tail(1)
        at_end = int(last["length"].iloc[0]) == longest
        cells = [_curve_name(configuration), faster_from(points)]
        cells += timed_text(last, "speedup_vs_full") if at_end else ["–"]
        for size in models.values() if bounded else ():
            known = at_end and configuration["configuration_id"] in bounded
            cells += timed_text(_step_speedup(last, size), "speedup_vs_full") if known else ["–"]
        rows.append(cells)
    every = pd.concat([points for _, points in found])
    return Table(heads, rows, words={0, 1}, notes=timing_notes(every))


def _curve_name(configuration: pd.Series) -> str:
    bits = "" if pd.isna(configuration["rbit"]) else f", {configuration['rbit']} bits"
    return f"{configuration['label']}{bits}"


def _step_speedup(points: pd.DataFrame, size: ModelSize) -> pd.DataFrame:
    """Return the points with the layer's speed-up and interval replaced by the whole step's."""
    whole = step_ms(points, "full_ms", size)
    gains = {"speedup_vs_full": whole / step_ms(points, "decode_ms_p50", size)}
    for end in ("speedup_ci_low", "speedup_ci_high"):
        layer = points.assign(faster_ms=points["full_ms"] / points[end])
        gains[end] = whole / step_ms(layer, "faster_ms", size)
    return points.assign(**gains)


def break_even(
    configurations: pd.DataFrame, methods: Sequence[str] | None = None
) -> tuple[Figure, pd.DataFrame] | None:
    """Draw each method's speed-up over full attention against length, break-even marked.

    Args:
        configurations: Configurations of one setting and one batch size.
        methods: Methods to highlight; None for the default of `highlight.highlighted`.
    """
    found = curves(configurations)
    if not found:
        return None
    figure = Figure(figsize=style.figure_size(7.2, 4.1))
    axes = figure.add_subplot()
    axes.axhline(1, color=style.style("full").colour, lw=1.4, label=style.style("full").label)
    parts = []
    chosen = _highlighted(found, methods)
    ends_of: list[tuple[float, float, str]] = []
    for configuration, points in found:
        look = style.style(configuration["method"])
        lengths = points["length"].astype(float)
        in_grey = configuration["method"] not in chosen
        if in_grey:
            last = points.iloc[-1]
            at_end = float(last["length"]), float(last["speedup_vs_full"])
            ends_of.append((*at_end, _curve_name(configuration)))
        draw_line(
            axes,
            lengths,
            points["speedup_vs_full"],
            spread(points, "speedup_vs_full"),
            rows=points,
            shows=("speedup_vs_full", "decode_ms_p50"),
            in_grey=in_grey,
            look=look,
            label=_curve_name(configuration),
        )
        hollow(axes, points, "length", "speedup_vs_full", in_grey)
        place = crossing(list(lengths), list(points["speedup_vs_full"]))
        if 0 < place < math.inf and not in_grey:
            axes.plot(place, 1, marker="|", ms=15, mew=2, color=look.colour, ls="none")
        ends = crossing_interval(points) or (math.nan, math.nan)
        inside = np.clip(ends, lengths.min(), lengths.max())
        if inside[0] < inside[1] and not in_grey:
            axes.plot(inside, (1, 1), color=look.colour, lw=4, alpha=0.45, solid_capstyle="butt")
        parts.append(
            points.assign(faster_from=place, faster_from_low=ends[0], faster_from_high=ends[1])
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    data = pd.concat(parts)
    log2_axis(axes.xaxis, [float(one) for one in data["length"]])
    top = math.ceil(math.log2(max(2.0, data["speedup_vs_full"].max())))
    bottom = math.floor(math.log2(min(0.5, data["speedup_vs_full"].min())))
    log2_axis(axes.yaxis, [2.0**power for power in range(bottom, top + 1)], "g")
    axes.set_xlabel(METRICS["kv_len"].axis)
    axes.set_ylabel(METRICS["speedup_vs_full"].axis)
    name_ends(axes, ends_of)
    legend(figure, axes)
    names = ["method", "variant", "rbit", "length", "decode_ms_p50", "full_ms", "speedup_vs_full"]
    names += ["speedup_ci_low", "speedup_ci_high", "timing_note"]
    names += ["faster_from", "faster_from_low", "faster_from_high"]
    return figure, marked(data[names].reset_index(drop=True), chosen)


def _highlighted(
    found: Sequence[tuple[pd.Series, pd.DataFrame]], methods: Sequence[str] | None
) -> frozenset[str]:
    """Return the highlighted methods of what `curves` returns."""
    points = pd.concat([points for _, points in found])
    return highlighted(points, "speedup_vs_full", "length", methods)


def step_bound(
    configurations: pd.DataFrame,
    models: Mapping[str, ModelSize] = MODELS,
    methods: Sequence[str] | None = None,
) -> tuple[Figure, pd.DataFrame] | None:
    """Draw attention's share of a whole step, and the bound on each method's speed-up of it.

    Args:
        configurations: Configurations of one setting and one batch size.
        models: Whole models, one panel each.
        methods: Methods to highlight; None for the default of `highlight.highlighted`.
    """
    found = _bounded(configurations)
    if not found or not models:
        return None
    figure = Figure(figsize=style.figure_size(2.3 * (len(models) + 1) + 1.4, 3.5))
    share_axes, *others = figure.subplots(1, len(models) + 1)
    _, longest = max(found, key=lambda one: len(one[1]))
    parts = []
    named: list[tuple[float, str, str]] = []
    chosen = _highlighted(found, methods)
    ends: list[tuple[float, float, str]] = []
    for place, ((name, size), axes) in enumerate(zip(models.items(), others, strict=True)):
        share = size.layers * longest["full_ms"] / step_ms(longest, "full_ms", size)
        colour = style.shade("#222222", place / max(len(models) - 1, 1))
        share_axes.plot(longest["length"].astype(float), 100 * share, color=colour, marker="o")
        named.append((100 * float(share.iloc[-1]), name, colour))
        axes.axhline(1, color=style.style("full").colour, lw=1.4)
        for configuration, points in found:
            look = style.style(configuration["method"])
            gain = _step_speedup(points, size)
            in_grey = configuration["method"] not in chosen
            if in_grey and axes is others[-1]:
                at_end = float(points["length"].iloc[-1]), float(gain["speedup_vs_full"].iloc[-1])
                ends.append((*at_end, _curve_name(configuration)))
            draw_line(
                axes,
                points["length"].astype(float),
                gain["speedup_vs_full"],
                spread(gain, "speedup_vs_full"),
                rows=gain,
                shows=("speedup_vs_full",),
                in_grey=in_grey,
                look=look,
                label=_curve_name(configuration),
            )
            hollow(axes, gain, "length", "speedup_vs_full", in_grey)
            names = ["method", "variant", "rbit", "length", "decode_ms_p50", "full_ms"]
            own = size.layers * points["full_ms"] / step_ms(points, "full_ms", size)
            parts.append(
                points[[*names, "timing_note"]].assign(
                    model=name,
                    attention_share=own,
                    step_speedup=gain["speedup_vs_full"],
                    step_speedup_low=gain["speedup_ci_low"],
                    step_speedup_high=gain["speedup_ci_high"],
                )
            )
        axes.set_title(f"{name}, {size.layers} layers", fontsize=9, fontweight="normal")
    # One scale for all models, so that a small gain does not look like a large one.
    from_zero(*others)
    from_zero(share_axes)
    lowest, apart = 0.0, 0.055 * share_axes.get_ylim()[1]  # a line of text
    for percent, name, colour in sorted(named):
        lowest = max(percent, lowest)
        share_axes.annotate(
            name,
            (float(longest["length"].iloc[-1]), lowest),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=8,
        )
        lowest += apart
    share_axes.set_ylabel("Attention's share of a step (%)")
    others[0].set_ylabel("Speed-up of the step, at most (×)")
    data = pd.concat(parts)
    for axes in (share_axes, *others):
        axes.set_xscale("log", base=2)
        log2_axis(axes.xaxis, [float(one) for one in data["length"]], "k", most=4)
        axes.set_xlabel(METRICS["kv_len"].label)
    name_ends(others[-1], ends)
    legend(figure, others[0])
    return figure, marked(data.reset_index(drop=True), chosen)
