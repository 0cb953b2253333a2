"""Tables and figures of a GPU check: correct kernels, their times, and dense attention's times."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from topkbench.analysis import style
from topkbench.analysis.comparison.metrics import METRICS
from topkbench.analysis.comparison.timings import UNSTEADY, is_unsteady
from topkbench.analysis.figures.plots import Drawn, save
from topkbench.analysis.record.row import Status
from topkbench.analysis.tables.table import Table

GOAL_PERCENT = 70
"""Target share of the memory bandwidth for the Hamming score on a GPU."""

CHECK, TIMES, DENSE = "kernel_check", "kernel_times", "kernel_dense"
"""Tasks of the rows of single kernels; rows of methods' steps have task ``decode_latency``."""

_TITLE_WIDTH = 32  # characters in a line of a panel's title

HOW_TO_READ = (
    "Right: equal to the reference within its rounding-error bound at every length tried, and the "
    "whole result within its dtype's tolerance. Times are medians of replayed CUDA graphs, with "
    "the caches emptied before each replay; bandwidth shares are of the bandwidth measured in the "
    "same process. A wrong result has no time. A speed-up is over the fastest of the dense kernels "
    "that were timed in turn with the step."
)


def of_kernels(rows: pd.DataFrame) -> pd.Series:
    """Return for each row whether it is about a kernel, not about a method."""
    return rows["task"].isin([CHECK, TIMES, DENSE])


def check_table(rows: pd.DataFrame) -> Table | None:
    """Return the number of settings in which each operator was right; None without checks.

    Args:
        rows: Rows of kernels.
    """
    checks = rows[rows["task"] == CHECK]
    if not len(checks):
        return None
    heads = ["Operator", "Settings", "Right", "Wrong", "Failed", "Not done", "Longest (tokens)"]
    cells = []
    for operator, part in checks.groupby("method", sort=False):
        counts = part["status"].value_counts()
        right, wrong, skipped = (
            int(counts.get(one.value, 0)) for one in (Status.OK, Status.WRONG, Status.SKIPPED)
        )
        longest = part.loc[part["status"] == Status.OK.value, "kv_len"].max()
        numbers = [len(part), right, wrong, len(part) - right - wrong - skipped, skipped]
        tokens = "–" if pd.isna(longest) else f"{int(longest):,}"
        cells.append([str(operator), *(str(number) for number in numbers), tokens])
    return Table(heads, cells)


def time_table(rows: pd.DataFrame, task: str) -> Table | None:
    """Return each kernel's time and its share of the bandwidth; None where nothing was timed.

    Args:
        rows: Rows of kernels.
        task: ``TIMES`` for the operators, ``DENSE`` for full attention's kernels.
    """
    timed = _timed(rows[rows["task"] == task])
    if not len(timed):
        return None
    heads = [
        "Operator" if task == TIMES else "Kernel",
        "Heads",
        "Tokens",
        "Batch",
        "Median (ms)",
        "20% (ms)",
        "80% (ms)",
    ]
    heads.append("Of bandwidth (%)")
    cells = []
    for _, row in timed.iterrows():
        times = [f"{row[f'decode_ms_{end}']:.4f}" for end in ("p50", "p20", "p80")]
        times[0] += "" if pd.isna(row["timing_note"]) else UNSTEADY
        place = [str(row["model"]), f"{int(row['length']):,}", str(row["batch_size"])]
        name = row["method" if task == TIMES else "full_backend"]
        cells.append([str(name), *place, *times, f"{100 * row['bandwidth_fraction']:.0f}"])
    return Table(heads, cells, words={0, 1}, notes=_notes(timed))


def speedup_table(rows: pd.DataFrame) -> Table | None:
    """Return each method's step and the dense attention it is compared with; None without any.

    Args:
        rows: All rows of a report.
    """
    compared = _compared(rows)
    if not len(compared):
        return None
    heads = ["Method", "Heads", "Tokens", "Batch", "Fastest dense attention", "Step (ms)"]
    heads += ["Dense (ms)", "Speed-up"]
    cells = []
    for _, row in compared.iterrows():
        place = [str(row["model"]), f"{int(row['length']):,}", str(row["batch_size"])]
        speedup = f"{row['speedup_vs_full']:.2f}"
        if pd.notna(row["speedup_ci_low"]):
            speedup += f" [{row['speedup_ci_low']:.2f}, {row['speedup_ci_high']:.2f}]"
        speedup += "" if pd.isna(row["timing_note"]) else UNSTEADY
        times = [f"{row[name]:.4f}" for name in ("decode_ms_p50", "full_ms_p50")]
        cells.append([row["name"], *place, str(row["full_backend"]), *times, speedup])
    return Table(heads, cells, words={0, 1, 4}, notes=_notes(compared))


def draw(rows: pd.DataFrame, folder: Path, context: str) -> list[Drawn]:
    """Draw the speed-ups over the best dense baseline, and the baselines' and operators' bandwidth.

    Args:
        rows: All rows of a report.
        folder: Where the files go.
        context: What it was measured on.

    Returns:
        The figures drawn; none where there is no row of a kernel.
    """
    if not of_kernels(rows).any():
        return []
    plans: list[tuple[str, str, str, Callable[[], tuple[Figure, pd.DataFrame] | None]]] = [
        (
            "speedup_over_best_dense",
            "One decode step against the fastest dense attention",
            "Times the speed of the fastest dense attention of each shape, timed in turn; bars: "
            "95% intervals over the pairs.",
            lambda: speedups(rows),
        ),
        (
            "dense_baselines",
            "Dense attention: share of the memory bandwidth",
            "Each timed alone. Orange: the fastest of its shape, "
            "among the steady ones if there are any.",
            lambda: bandwidth_shares(rows[rows["task"] == DENSE]),
        ),
        (
            "operator_bandwidth",
            "Operators: share of the memory bandwidth",
            "Bytes that the operator must move, over its time and the measured bandwidth. "
            f"The dashed line is the target for the Hamming score, {GOAL_PERCENT}%.",
            lambda: bandwidth_shares(rows[rows["task"] == TIMES]),
        ),
    ]
    drawn = []
    with matplotlib.rc_context(cast(Any, style.RC_PARAMS)):
        for name, title, reading, make in plans:
            made = make()
            if made is not None:
                figure, data = made
                figure.suptitle(title, fontweight="bold", fontsize=10, x=0.01, ha="left")
                words = " ".join([reading, *_notes(data), context])
                drawn.append(save(figure, data, Drawn(name, title, words, folder)))
    return drawn


def _notes(timed: pd.DataFrame) -> list[str]:
    note = f"{UNSTEADY} Unsteady time, do not cite it; see column timing_note."
    return [note] if is_unsteady(timed).any() else []


def _timed(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[(rows["status"] == Status.OK.value) & rows["decode_ms_p50"].notna()]


def _shapes(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return the rows of each shape, with its name."""
    found = []
    for _, part in rows.groupby(["model", "length", "batch_size"], sort=False):
        model, length, batch = part.iloc[0][["model", "length", "batch_size"]]
        found.append((f"{model}\n{length:,} tokens, batch {batch}", part))
    return found


def _panels(count: int, bars: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(1.2 + 2.6 * count, 1.2 + 0.24 * bars))
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    return figure, list(axes)


def _compared(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the steps that were timed in turn with dense attention, their methods' names added."""
    data = _timed(rows[rows["task"] == "decode_latency"])
    data = data[data["speedup_vs_full"].notna()].copy()
    if len(data):
        data["name"] = [
            _method_name(method, norm)
            for method, norm in zip(data["method"], data["p_use_norm"], strict=True)
        ]
    return data


def speedups(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """Draw each method's speed-up over full attention; None without rows that have one."""
    data = _compared(rows)
    if not len(data):
        return None
    order = sorted(data["method"].unique(), key=style.order)
    names = list(dict.fromkeys(n for m in order for n in data.loc[data["method"] == m, "name"]))
    colours = {name: style.style(data.loc[data["name"] == name, "method"].iloc[0]).colour
               for name in names}  # fmt: skip
    shapes = _shapes(data)
    figure, panels = _panels(len(shapes), len(names) + 2)
    for axes, (title, part) in zip(panels, shapes, strict=True):
        found = part.drop_duplicates("name", keep="last").set_index("name").reindex(names)
        _bars(axes, found, "speedup_vs_full", [colours[name] for name in names], "{:.1f}")
        axes.axvline(1, color="#444444", lw=0.9)
        backends = " or ".join(dict.fromkeys(part["full_backend"].dropna().astype(str)))
        against = textwrap.fill(f"against {backends}", _TITLE_WIDTH)
        axes.set_title(f"{title}\n{against}", fontsize=8.5, fontweight="normal")
        axes.set_xlabel(METRICS["speedup_vs_full"].axis)
    columns = ["model", "length", "batch_size", "name", "full_backend", "decode_ms_p50"]
    columns += ["full_ms_p50", "speedup_vs_full", "speedup_ci_low", "speedup_ci_high"]
    return figure, data[[*columns, "timing_note"]].reset_index(drop=True)


def bandwidth_shares(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """Draw the share of the memory bandwidth that each row reaches; None without timed rows."""
    data = _timed(rows).copy()
    if not len(data):
        return None
    dense = data["task"].eq(DENSE).all()
    data["name"] = data["full_backend" if dense else "method"].astype(str)
    data["percent"] = 100 * data["bandwidth_fraction"]
    names = list(dict.fromkeys(data["name"]))
    shapes = _shapes(data)
    figure, panels = _panels(len(shapes), len(names))
    for axes, (title, part) in zip(panels, shapes, strict=True):
        found = part.drop_duplicates("name", keep="last").set_index("name").reindex(names)
        ranked = part.assign(unsteady=is_unsteady(part)).sort_values(["unsteady", "decode_ms_p50"])
        best = ranked["name"].iloc[0] if dense else None
        colours = [style.RED if name == best else style.BLUE for name in names]
        _bars(axes, found, "percent", colours, "{:.0f}")
        axes.set_title(title, fontsize=8.5, fontweight="normal")
        axes.set_xlabel("of the bandwidth (%)")
        axes.set_xlim(0, 1.18 * max(100.0, float(data["percent"].max())))
        if not dense:
            axes.axvline(GOAL_PERCENT, color="#444444", lw=0.9, ls="--")
    columns = ["model", "length", "batch_size", "name", "decode_ms_p50", "percent", "timing_note"]
    return figure, data[columns].reset_index(drop=True)


def _bars(axes: Axes, found: pd.DataFrame, column: str, colours: list[str], number: str) -> None:
    """Draw a bar with its number for each row, from the top; no bar where there is no value."""
    values, ends = found[column].astype(float), found[column].astype(float)
    axes.barh(range(len(found)), values.fillna(0), color=colours, height=0.7)
    if column == "speedup_vs_full":
        low, high = (found[f"speedup_ci_{end}"].astype(float) for end in ("low", "high"))
        ends = high.fillna(values)
        for place, (left, right) in enumerate(zip(low, high, strict=True)):
            axes.plot([left, right], [place, place], color="#444444", lw=1.2)
    for place, (value, end, marked) in enumerate(
        zip(values, ends, is_unsteady(found), strict=True)
    ):
        text = "–" if pd.isna(value) else number.format(value) + (UNSTEADY if marked else "")
        axes.annotate(
            text, (0 if pd.isna(value) else end, place), (3, 0), va="center", fontsize=8,
            textcoords="offset points",
        )  # fmt: skip
    axes.set_yticks(range(len(found)), list(found.index))
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * max(float(ends.max()), 1e-9))
    axes.grid(axis="y", visible=False)


def _method_name(method: str, norm: Any) -> str:
    label = style.style(method).label
    if pd.isna(norm) or norm in ("", None):
        return label
    return f"{label}, norms" if str(norm) == "True" else f"{label}, integer"
