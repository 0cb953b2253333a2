"""The tables that every report has: results, ranks, sub-tasks, failures, the machine."""

from __future__ import annotations

import pandas as pd

from topkbench.analysis.comparison.configurations import Comparison, called_by_shape
from topkbench.analysis.comparison.counts import measured_on
from topkbench.analysis.comparison.metrics import METRICS
from topkbench.analysis.comparison.stats import MEAN
from topkbench.analysis.comparison.timings import TIMED, timed_text, timing_notes
from topkbench.analysis.record.row import DECLARED, Status
from topkbench.analysis.tables.table import Table, setting, whole, with_interval

LEAGUE = 6
"""If a setting has more methods than this, they are also ranked in a table."""


def main_table(configurations: pd.DataFrame) -> Table:
    """Return one row per configuration: score and difference with intervals, quality, cost.

    Each method's decode step is shown with that of full attention timed alternately with it; the
    times of full attention's own cell, measured minutes before or after, are then omitted.

    Args:
        configurations: `Comparison.overall` of one setting.
    """
    columns: list[tuple[str, list[str]]] = [
        ("Method", [str(one) for one in configurations["label"]])
    ]
    words = {0}
    named = (configurations["subtask"] != MEAN) & ~called_by_shape(configurations)
    if named.any() and configurations["subtask"].nunique() > 1:
        words.add(len(columns))
        columns.append(("Sub-task", [str(one) for one in configurations["subtask"]]))
    for name, head in (("length", "Length"), ("kv_len", "Context")):
        if configurations[name].nunique() > 1 and (
            name == "length" or not configurations["length"].nunique() > 1
        ):
            columns.append((f"{head} (tokens)", [whole(one) for one in configurations[name]]))
    if configurations["batch_size"].nunique() > 1:
        columns.append(("Batch", [whole(one) for one in configurations["batch_size"]]))
    for name in ("k", "rbit"):
        if configurations[name].notna().any():
            columns.append((name, [whole(one) for one in configurations[name]]))
    strong, minor = set(), set()
    scored = bool(configurations["score"].notna().any())
    fits = configurations["task"].eq("fit")
    is_full = configurations["method"].eq("full")
    paired = bool(configurations.loc[~is_full, "full_ms_p50"].notna().any())
    for name, declared in DECLARED.items():
        head = declared.head
        if not head:
            continue
        if name == "full_ms_p50" and not paired:
            continue
        if configurations[name].notna().any() or (name == "fit_s" and fits.any()):
            label = f"{head} ({declared.unit})" if declared.unit else head
            if name in TIMED:
                shown = configurations.assign(**{name: configurations[name].mask(is_full & paired)})
                cells = timed_text(shown, name)
            else:
                cells = with_interval(configurations, name)
            if name == "fit_s":
                was_found = fits & configurations[name].isna()
                cells = [
                    "found" if one else cell for one, cell in zip(was_found, cells, strict=True)
                ]
            # In a table without scores, which is about speed, the throughput is no minor matter.
            if declared.minor and (scored or name != "tokens_per_s"):
                minor.add(len(columns))
            if name == "score":
                strong = {
                    (i, len(columns)) for i, best in enumerate(configurations["best"]) if best
                }
            columns.append((label, cells))
    if scored:
        minor.add(len(columns))
        columns.append(("n", [whole(one) for one in configurations["n"]]))
    heads = [head for head, _ in columns]
    rows = [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]
    notes = [*filter(None, [measured_on(configurations)]), *timing_notes(configurations)]
    return Table(heads, rows, strong, words, minor, notes)


def subtask_table(configurations: pd.DataFrame) -> Table | None:
    """Return scores by sub-task, one row per configuration; None if there are fewer than two."""
    data = configurations[(configurations["subtask"] != MEAN) & configurations["score"].notna()]
    if data["subtask"].nunique() < 2:
        return None
    subtasks = list(dict.fromkeys(data["subtask"]))
    heads = ["Method", "k", "rbit", *subtasks]
    rows: list[list[str]] = []
    strong: set[tuple[int, int]] = set()
    for _, part in data.groupby("configuration_id", sort=False):
        first = part.iloc[0]
        cells = [str(first["label"]), whole(first["k"]), whole(first["rbit"])]
        found = part.set_index("subtask")
        for subtask in subtasks:
            if subtask not in found.index:
                cells.append("–")
                continue
            if bool(found.loc[subtask, "best"]):
                strong.add((len(rows), len(cells)))
            cells.append(METRICS["score"].text(found.loc[subtask, "score"]))
        rows.append(cells)
    return Table(heads, rows, strong)


def league_table(configurations: pd.DataFrame) -> Table | None:
    """Return the configurations ranked by score at each budget, with each one's worst sub-task.

    Args:
        configurations: Configurations of one setting, sub-tasks included.

    Returns:
        None if ``LEAGUE`` methods or fewer have scores.
    """
    top = configurations[(configurations["subtask"] == MEAN) & configurations["score"].notna()]
    if top["method"].nunique() <= LEAGUE:
        return None
    top = top.sort_values(
        ["k", "score"], ascending=[True, False], kind="stable", na_position="first"
    )
    subtasks = configurations[
        (configurations["subtask"] != MEAN) & configurations["delta_full"].notna()
    ]
    worst = subtasks.sort_values("delta_full", kind="stable").drop_duplicates("configuration_id")
    losses = {
        str(
            configuration["configuration_id"]
        ): f"{METRICS['delta_full'].text(configuration['delta_full'])} ({configuration['subtask']})"
        for _, configuration in worst.iterrows()
    }
    columns = [("k", [whole(one) for one in top["k"]])]
    columns.append(("Method", [str(one) for one in top["label"]]))
    if top["rbit"].nunique() > 1:
        columns.append(("rbit", [whole(one) for one in top["rbit"]]))
    place = len(columns)
    columns.append(("Score (0–100)", with_interval(top, "score")))
    columns.append(("Δ full (points)", with_interval(top, "delta_full")))
    columns.append(
        ("Worst sub-task (points)", [losses.get(str(one), "–") for one in top["configuration_id"]])
    )
    if top["bytes_read_per_step"].notna().any():
        read = METRICS["bytes_read_per_step"]
        cells = [read.text(one) for one in top["bytes_read_per_step"]]
        columns.append((f"Read/step ({read.unit})", cells))
    if top["decode_vs_full"].notna().any():
        columns.append(("Decode time (× full attention)", timed_text(top, "decode_vs_full")))
    rows = [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]
    strong = {(i, place) for i, best in enumerate(top["best"]) if best}
    return Table([head for head, _ in columns], rows, strong, {1}, notes=timing_notes(top))


def failure_table(rows: pd.DataFrame) -> Table | None:
    """Return the cells that are not ok, with the reason; None if all are.

    Sub-tasks that are skipped in a cell with a mean of the others are in the notes instead.
    """
    bad = rows[rows["status"] != Status.OK.value] if len(rows) else rows
    if len(bad):
        has_mean = rows.loc[rows["subtask"].eq(MEAN) & rows["status"].eq(Status.OK.value), "run_id"]
        of_others = bad["status"].eq(Status.SKIPPED.value) & bad["run_id"].isin(has_mean)
        bad = bad[~of_others]
    if not len(bad):
        return None
    heads = ["Status", "Method", "k", "rbit", "Task", "Sub-task", "Length", "Reason", "Cell"]
    names = ["status", "method", "k", "rbit", "task", "subtask", "length", "reason", "run_id"]
    bad = bad.drop_duplicates(["run_id", "status", "reason"])
    cells = [
        [
            whole(value) if name in ("k", "rbit", "length") else str(value)
            for name, value in zip(names, row, strict=True)
        ]
        for row in bad[names].itertuples(index=False, name=None)
    ]
    return Table(heads, cells, words={0, 1, 4, 5, 7, 8})


def environment_table(rows: pd.DataFrame) -> Table:
    """Return the machine and software of the rows, with all values that occur."""
    names = {
        "device": "Machine",
        "threads": "Threads",
        "huge_pages": "Huge pages",
        "omp_wait_policy": "OMP_WAIT_POLICY",
        "driver": "Driver",
        "clock_mhz": "Clock (MHz)",
        "git_commit": "Commit",
        "torch": "torch",
        "numba": "numba",
        "triton": "triton",
        "transformers": "transformers",
        "tokenizers": "tokenizers",
        "numpy": "numpy",
        "impl": "Kernels",
        "full_backend": "Full attention's kernel",
        "seed": "Seeds",
        "started_at": "Started",
    }
    cells = []
    for name, label in names.items():
        values = list(rows[name].dropna()) if len(rows) else []
        if name == "clock_mhz":
            values = [round(one) for one in values]
        found = [str(one) for one in sorted(set(values))]
        if name in ("started_at", "clock_mhz") and len(found) > 1:
            found = [f"{found[0]} to {found[-1]}"]
        if found:
            cells.append([label, ", ".join(found)])
    return Table(["What", "Value"], cells, words={0, 1})


_SPEEDUP_NOTE = (
    "Speed-ups are over full attention timed alternately with each method, in brackets their 95% "
    "intervals over those pairs. Do not compare the milliseconds of two rows: they were measured "
    "minutes apart."
)


def summary_table(compared: Comparison) -> str:
    """Return the tables for the terminal at the end of a sweep, from its configurations."""
    parts: list[str] = []
    for key, configurations in compared.by_setting():
        top = configurations[configurations.index.isin(compared.overall.index)]
        parts.append(f"{setting(key)}\n\n{narrow(main_table(top)).text()}")
    if compared.configurations.get("speedup_vs_full", pd.Series(dtype=float)).notna().any():
        parts.append(_SPEEDUP_NOTE)
    failures = failure_table(compared.rows)
    if failures is not None:
        parts.append(f"Not ok:\n\n{failures.text()}")
    return "\n\n".join([*parts, *compared.notes]) or "No cell has a row yet."


def narrow(table: Table) -> Table:
    """Return the table without its minor columns, as a terminal and a paper have it."""
    keep = [j for j in range(len(table.head)) if j not in table.minor]
    rows = [[row[j] for j in keep] for row in table.rows]
    words = {place for place, j in enumerate(keep) if j in table.words}
    strong = {(i, keep.index(j)) for i, j in table.strong if j in keep}
    return Table([table.head[j] for j in keep], rows, strong, words, notes=table.notes)
