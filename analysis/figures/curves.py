"""Figures with a metric on each axis: curves over a budget, hash bits, length or batch size."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogFormatter, NullLocator

from topkbench.analysis import style
from topkbench.analysis.comparison.configurations import called_by_shape
from topkbench.analysis.comparison.counts import counted
from topkbench.analysis.comparison.metrics import CURVES, METRICS, ends_of
from topkbench.analysis.comparison.stats import MEAN
from topkbench.analysis.comparison.timings import RATIOS, TIMED, is_unsteady
from topkbench.analysis.figures.highlight import draw_line, highlighted, marked, name_ends
from topkbench.analysis.figures.names import short_names


def new_figure(width: float = 7.2, height: float = 4.1) -> tuple[Figure, Axes]:
    """Return an empty figure and its axes; sizes in inches."""
    figure = Figure(figsize=style.figure_size(width, height))
    return figure, figure.add_subplot()


def lay_out(figure: Figure) -> RendererAgg:
    """Lay a figure out, unless it is already: it takes as long as drawing."""
    canvas, engine = FigureCanvasAgg(figure), figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.execute(figure)  # without a drawing for it
        figure.set_layout_engine("none")
    return canvas.get_renderer()


def log2_axis(axis: Any, values: Sequence[float], number: str = ",.0f", most: int = 9) -> None:
    """Label an axis with plain numbers at given values, every second one where they would touch.

    Args:
        axis: The axis.
        values: Candidate positions of ticks.
        number: Format of the numbers; ``"k"`` counts in units of 1,024.
        most: Largest number of ticks.
    """

    def text(value: float, _: Any = None) -> str:
        return f"{value / 1024:g}K" if number == "k" else format(value, number)

    ticks = sorted(set(values))
    characters = round(36 * style.share_of_width())
    while len(ticks) > max(2, min(most, characters // max(len(text(one)) for one in ticks))):
        ticks = ticks[::2]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())

    axis.set_major_formatter(FuncFormatter(text))


def plain_number(value: float) -> str:
    """Return a number of an axis with three digits and no exponent: 1,024 and 0.00001."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return np.format_float_positional(float(f"{value:.3g}"), trim="-").replace("-", "−")


class _PlainNumbers(LogFormatter):
    """Labels of a logarithmic axis as plain numbers, where matplotlib would show any.

    Its own are formulas, which figures do not have (`style.RC_PARAMS`).
    """

    def __call__(self, x: float, pos: int | None = None) -> str:
        return plain_number(x) if super().__call__(x, pos) else ""


def vertical_scale(axes: Axes, scale: str) -> None:
    """Make the vertical axis linear, logarithmic, or on both sides of 0 (see ``Metric.scale``)."""
    if scale == "linear":
        return
    if scale == "symlog":
        axes.set_yscale("symlog", linthresh=LINEAR)
    else:
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_PlainNumbers())
    axes.yaxis.set_minor_formatter(_PlainNumbers())


def _series(
    configurations: pd.DataFrame, x: str, fixed: Sequence[str]
) -> list[tuple[str, str, pd.DataFrame, float, Any]]:
    """Split configurations into curves over `x`, one per value of the ``fixed`` columns.

    Returns:
        (method, label, points, lightness, line style) of each.
    """
    other, *further = fixed
    found: list[tuple[str, str, pd.DataFrame, float, Any]] = []
    for method in sorted(configurations["method"].unique(), key=style.order):
        own = configurations[configurations["method"] == method]
        kept = sorted((int(v) for v in own[other].dropna().unique()), reverse=True)
        texts = own.apply(
            lambda configuration: curve_label(configuration, fixed, "subtask" in configuration),
            axis=1,
        )
        names = short_names(texts)
        for position, text in enumerate(dict.fromkeys(texts)):
            points = own[texts == text].sort_values(x, kind="stable")
            value = points[other].iloc[0]
            rank = 0 if pd.isna(value) else kept.index(int(value))
            lightness = rank / max(len(kept) - 1, 1) if len(kept) > 1 else 0.0
            line_style = style.style(method).line
            also = [] if not further else sorted(own[further[0]].dropna().unique())
            if len(kept) > 1 and len(also) > 1:  # lightness shows one, the line's style the other
                value = points[further[0]].iloc[0]
                line_style = style.turn(0 if pd.isna(value) else also.index(value))
            elif len(kept) > 1 or len(set(texts)) > 1:
                line_style = style.turn(max(rank, position if len(kept) <= 1 else 0))
            found.append((method, names[text], points, lightness, line_style))
    return found


def curve_label(configuration: pd.Series, fixed: Sequence[str], with_subtask: bool) -> str:
    """Return the name of a configuration's curve: its label and the settings fixed along it."""
    words = [str(configuration["label"])]
    if with_subtask and configuration["subtask"] not in (MEAN, "", configuration["task"]):
        words.append(str(configuration["subtask"]))
    if "rbit" in fixed and not pd.isna(configuration["rbit"]):
        words.append(f"{configuration['rbit']} bits")
    if "k" in fixed and not pd.isna(configuration["k"]):
        words.append(f"k = {configuration['k']}")
    return ", ".join(words)


def spread(points: pd.DataFrame, y: str) -> np.ndarray | None:
    """Return the distances from each point to the ends of its interval, [2, points]."""
    if y == "tokens_per_s":  # inversely proportional to the step's time
        slow, fast = (
            points["decode_ms_p50"] / points[f"decode_ms_{end}"] for end in ("p80", "p20")
        )
        if points[["decode_ms_p20", "decode_ms_p80"]].isna().any(axis=None):
            return None
        return np.array([points[y] * (1 - slow), points[y] * (fast - 1)], dtype=float)
    ends = _bars_of(y)
    if ends[0] not in points:
        return None
    missing = points[list(ends)].isna()
    if missing.all(axis=None) if y in RATIOS else missing.any(axis=None):
        return None  # of ratios, some may lack an interval
    low, high = points[y] - points[ends[0]], points[ends[1]] - points[y]
    return np.clip(np.array([low, high], dtype=float), 0, None)


def _bars_of(y: str) -> tuple[str, str]:
    """Return the columns with the ends of a metric's bars, of a time its percentiles."""
    return ("decode_ms_p20", "decode_ms_p80") if y == "decode_ms_p50" else ends_of(y)


def hollow(axes: Axes, points: pd.DataFrame, x: str, y: str, in_grey: bool = False) -> None:
    """Draw hollow markers over the points whose times are unsteady."""
    for _, point in points[is_unsteady(points)].iterrows():
        look = style.style(point["method"])
        axes.plot(
            [float(point[x])],
            [point[y]],
            ls="none",
            marker=look.marker,
            markerfacecolor="white",
            markeredgecolor=style.OTHERS if in_grey else look.colour,
            markeredgewidth=1.2,
            zorder=1.7 if in_grey else 5,
        )


_BOUND: dict[str, Any] = {
    **{"color": style.BOUND_COLOUR, "ls": style.BOUND, "lw": 1.0, "zorder": 1.4},
}

_WIDEST = 50
"""Characters of a line of the legend; a wider legend leaves no space for the axes."""

_PANEL = 4.7
"""Width in inches of a figure of one panel without its legend.

A phone shows that alone, the legend below: on 340 pixels type of 8 points then has 8 pixels.
"""

_CHARACTERS = 14.0
"""Characters of 8-point type in an inch, and"""
_LEGEND_LINE = 0.16
"""the height of a line of the legend in inches."""

LINEAR = 0.01
"""Losses up to this, in nats, are on the linear part of their axis, which also shows gains."""


def legend(figure: Figure, axes: Axes) -> None:
    """Put the legend outside the axes, where it covers nothing; on print's narrow paper below."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [textwrap.fill(one, _WIDEST) for one in labels]
    if style.print_width() is not None:
        legend_below(figure, handles, labels)
        return
    found = figure.legend(handles, labels, loc="outside right upper")
    if len(figure.axes) == 1:
        figure.set_figwidth(_PANEL + found.get_window_extent().width / figure.dpi)


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Put a legend below the axes, in as many columns as fit; the figure grows by its height."""
    if not labels:
        return
    width, height = figure.get_size_inches()
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = max(1, min(len(labels), int(width * _CHARACTERS / (longest + 7))))
    rows = -(-len(labels) // columns)
    figure.set_size_inches(width, height + rows * _LEGEND_LINE)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.0)


def curve(
    configurations: pd.DataFrame, y: str, x: str, methods: Sequence[str] | None = None
) -> tuple[Figure, pd.DataFrame] | None:
    """Draw a metric over the budget or the hash bits, a curve per method and value of the other.

    Args:
        configurations: `Comparison.overall` of one setting.
        y: A metric that is declared with a curve.
        x: ``k`` or ``rbit``.
        methods: Methods to highlight; None for the default of `highlight.highlighted`.

    Returns:
        The figure and its data, or None where no curve has two points.
    """
    data = configurations[configurations[y].notna() & configurations[x].notna()]
    if data.groupby("method")[x].nunique().max() in (0, 1) or not len(data):
        return None
    figure, axes = new_figure()
    metric, of_full = METRICS[y], CURVES[y].of_full
    look = style.style("full")
    full = configurations[(configurations["method"] == "full") & configurations[y].notna()]
    full = full if of_full == "measured" else data[:0]
    if of_full == 0:
        axes.axhline(0, color=look.colour, lw=1.4, label=look.label)
    for _, configuration in full.head(1).iterrows():
        ends = spread(full.head(1), y)
        if ends is not None:
            axes.axhspan(
                configuration[y] - ends[0, 0],
                configuration[y] + ends[1, 0],
                color=look.colour,
                alpha=0.14,
                lw=0,
            )
        axes.axhline(configuration[y], color=look.colour, lw=1.4, label=look.label)
    curves = _series(data, x, ("rbit",) if x == "k" else ("k",))
    chosen = highlighted(data, y, x, methods)
    last_points: list[tuple[float, float, str]] = []
    num_coloured, place = sum(method in chosen for method, *_ in curves), 0
    for method, label, points, lightness, line_style in curves:
        look = style.style(method)
        colour = style.shade(look.colour, lightness)
        in_grey = method not in chosen
        at = points[x].astype(float)
        if in_grey:
            last_points.append((float(at.iloc[-1]), float(points[y].iloc[-1]), label))
        else:  # a small horizontal shift keeps intervals from covering one another
            at *= 2.0 ** (0.035 * (place - (num_coloured - 1) / 2) / max(num_coloured / 6, 1))
            place += 1
        draw_line(
            axes,
            at,
            points[y],
            spread(points, y),
            rows=points,
            shows=(y, "bytes_read_per_step"),
            in_grey=in_grey,
            look=look,
            color=colour,
            linestyle=line_style,
            ecolor=to_rgba(colour, 0.55),
            markeredgecolor="white",
            markeredgewidth=0.5,
            label=label,
        )
        if y in RATIOS:
            hollow(axes, points.assign(shifted=at), "shifted", y, in_grey)
    axes.set_xscale("log", base=2)
    log2_axis(axes.xaxis, [float(v) for v in data[x]])
    axes.set_xlabel(METRICS[x].axis)
    axes.set_ylabel(metric.axis)
    if y in RATIOS:
        from_zero(axes)
    elif metric.most is not None:
        share_axis(axes, metric.most)
    elif metric.scale == "symlog":
        vertical_scale(axes, "symlog")
        axes.set_ylim(bottom=min(axes.dataLim.y0, -LINEAR / 4))
    elif metric.scale == "log":
        vertical_scale(axes, "log")
        axes.set_ylim(bottom=float(data[y].min()) / 3)  # an interval may begin at zero
    name_ends(axes, last_points)
    legend(figure, axes)
    return figure, marked(table(pd.concat([full.head(1), data]), x, y), {*chosen, "full"})


def share_axis(axes: Axes, whole: float) -> None:
    """Fit the vertical axis to what is drawn with its intervals, to a tenth of ``whole`` or more.

    Args:
        axes: The axes, with everything drawn.
        whole: Largest possible value; the smallest is 0.
    """
    low, high = axes.dataLim.y0, axes.dataLim.y1
    margin = max(0.06 * (high - low), (0.1 * whole - (high - low)) / 2)
    axes.set_ylim(max(low - margin, -0.02 * whole), min(high + margin, 1.02 * whole))


def from_zero(*panels: Axes) -> None:
    """Begin the vertical axes at zero, and end all of them above the highest point of any."""
    highest = max(axes.dataLim.y1 for axes in panels)
    for axes in panels:
        axes.set_ylim(0, 1.06 * highest)


def table(configurations: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Return the columns that a figure shows, with those that name a configuration."""
    names = ["method", "variant", "subtask", "k", "rbit"]
    for one in columns:
        names += [one, *(_bars_of(one) if one in METRICS else ())]
        if one == "tokens_per_s":
            names += ["decode_ms_p50", *_bars_of("decode_ms_p50")]
        if one in ("decode_ms_p50", "tokens_per_s"):
            names += ["full_ms_p50"]
        names += ["timing_note"] if one in TIMED else []
        names += counted(one)
    known = [name for name in dict.fromkeys(names) if name in configurations]
    return configurations[known].reset_index(drop=True)


def context_curve(
    configurations: pd.DataFrame,
    y: str,
    x: str = "kv_len",
    methods: Sequence[str] | None = None,
) -> tuple[Figure, pd.DataFrame] | None:
    """Draw decode latency or throughput over context length or batch size.

    Full attention is drawn once per method, as timed alternately with it: the times of its own
    cell were measured at another moment. If the achieved fraction of the memory bandwidth is known,
    a thin grey dotted line, which ends at the method's marker, shows the time that the same bytes
    would take at the full bandwidth.

    Args:
        configurations: Configurations of one setting, and of one batch size or length.
        y: ``decode_ms_p50`` or ``tokens_per_s``.
        x: ``kv_len`` or ``batch_size``.
        methods: Methods to highlight; None for the default of `highlight.highlighted`.
    """
    data = configurations[configurations[x].notna() & configurations[y].notna()]
    if not len(data) or data.groupby("method")[x].nunique().max() < 2:
        return None
    figure, axes = new_figure()
    bounded = drawn_full = False
    lowest, highest = data[y].min(), data[y].max()
    is_full = data["method"] == "full"
    if data.loc[~is_full, "full_ms_p50"].notna().any():
        data = data[~is_full]
    # A sub-task that only names the shape must not split a curve; a budget may grow with length.
    data = data.assign(subtask=data["subtask"].mask(called_by_shape(data), ""))
    budgets = data.groupby(["label", "rbit", x], dropna=False)["k"].nunique()
    series = _series(data, x, ("k", "rbit") if budgets.max() > 1 else ("rbit",))
    chosen = highlighted(data, y, x, methods)
    last_points: list[tuple[float, float, str]] = []
    for method, label, points, lightness, line_style in series:
        look = style.style(method)
        colour = style.shade(look.colour, lightness)
        in_grey = method not in chosen
        if in_grey:
            last_points.append((float(points[x].iloc[-1]), float(points[y].iloc[-1]), label))
        draw_line(
            axes,
            points[x].astype(float),
            points[y],
            spread(points, y),
            rows=points,
            shows=(y, "speedup_vs_full"),
            in_grey=in_grey,
            look=look,
            color=colour,
            linestyle=line_style,
            label=label,
        )
        hollow(axes, points, x, y, in_grey)
        if method != "full" and points["full_ms_p50"].notna().any():
            slower = points["full_ms_p50"] / points["decode_ms_p50"]
            other = points[y] * slower if y == "decode_ms_p50" else points[y] / slower
            baseline = style.style("full")
            axes.plot(
                points[x].astype(float),
                other,
                color=baseline.colour,
                marker=baseline.marker,
                ms=3.5,
                lw=0.9,
                alpha=0.6,
                zorder=1.5,
                label=None if drawn_full else f"{baseline.label}, timed alternately with each",
            )
            drawn_full = True
            highest, lowest = max(highest, other.max()), min(lowest, other.min())
        bound = points[y] * points["bandwidth_fraction"]
        if y == "decode_ms_p50" and bound.notna().sum() > 1 and not in_grey:
            own: dict[str, Any] = {
                "marker": look.marker,
                "ms": 3.5,
                "mfc": "none",
                "markevery": [-1],
            }
            axes.plot(points[x].astype(float), bound, **_BOUND, **own)
            bounded = True
    if bounded:
        speed = data["bandwidth_gb_s"].median()
        speed_text = "" if pd.isna(speed) else f" ({speed:.0f} GB/s)"
        axes.plot([], [], **_BOUND, label=f"Bandwidth bound{speed_text}")
    axes.set_xscale("log", base=2)
    in_units = x == "kv_len" and (data[x] % 1024 == 0).all()
    log2_axis(axes.xaxis, [float(v) for v in data[x]], "k" if in_units else ",.0f")
    if highest >= 10 * lowest:
        vertical_scale(axes, "log")
    else:  # on a logarithmic axis a small difference would look large
        from_zero(axes)
    axes.set_xlabel(METRICS[x].axis)
    axes.set_ylabel(METRICS[y].axis)
    name_ends(axes, last_points)
    legend(figure, axes)
    data = pd.concat([points for _, _, points, _, _ in series])
    bound_by = ("bandwidth_fraction", "bandwidth_gb_s") if y == "decode_ms_p50" else ()
    return figure, marked(table(data, x, y, *bound_by), chosen)
