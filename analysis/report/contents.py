"""What a report has, in order: each setting's figures and tables, the kernels, what failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from topkbench.analysis import style
from topkbench.analysis.comparison.configurations import (
    BASELINES,
    SETTING,
    Comparison,
    without_parameters,
)
from topkbench.analysis.figures import search
from topkbench.analysis.figures.break_even import ModelSize, break_even_table
from topkbench.analysis.figures.plots import draw_all, smallest_batch
from topkbench.analysis.figures.variants import difference_table, ladder_tables
from topkbench.analysis.record.store import Sweep, one_row_a_cell
from topkbench.analysis.report import kernels
from topkbench.analysis.report.section import Part, Section
from topkbench.analysis.tables import overview
from topkbench.analysis.tables.answered import answered_table
from topkbench.analysis.tables.lengths import length_table
from topkbench.analysis.tables.matched import MATCHED, matched_table
from topkbench.analysis.tables.paper import published_table, without_counterpart
from topkbench.analysis.tables.table import Table, setting
from topkbench.analysis.tables.turns import turn_table

HOW_TO_READ = (
    "Brackets are 95% intervals. Scores: Wilson's for right-or-wrong scores of one sub-task, else "
    "a bootstrap of 10,000 resamples drawn within each sub-task; recall, attention mass and output "
    "error: Student's over seeds, where there are several; likelihoods: Student's over windows of "
    "text, and over several seeds from the lowest end to the highest. Δ NLL and KL compare each "
    "predicted token with full attention's prediction at the same "
    "place. Δ full is paired with full attention on "
    "the same samples. Its interval allows for differences that these samples do not show: with n "
    "samples of which none differs it is ± 384 / (n + 3.84) points, and wider where some differ. "
    "Bold: the best score at each budget and those whose paired "
    "difference to it does not exclude 0; nothing is bold if that holds for all. Full attention "
    "and the oracles, exact top-k and exact pages, are references and never bold; nor are times "
    "and speed-ups. A speed-up is the ratio of the median times of full attention and the method, "
    "timed alternately, with a bootstrap interval over those pairs. k counts all selected tokens "
    "per KV head, including sinks and recent tokens. Recall@k is the share of the k tokens with "
    "the most attention that was selected: where sinks and recent tokens are always "
    "kept, even exact top-k misses as many of the k as these take the place of, and its recall is "
    "below 1."
)

OF_ANSWERED = "Mean of the sub-tasks that full attention answers"

HOW_TO_TURN = (
    "A change is a later turn's score minus that of the first turn about the same documents, with "
    "its interval over documents. Full attention's shows what the questions themselves change."
)

HOW_TO_RANK = (
    "Ranked by score at each budget. The worst sub-task is the one with the largest loss to full "
    "attention. Brackets and bold are explained under Results."
)

HOW_TO_MATCH = (
    "Each method's score is interpolated between its budgets, over the logarithm of the cost, "
    "sample by sample; – where the cost lies outside the range of its budgets. Bold as under "
    "Results, but at equal decode time only among methods whose times are steady and have "
    "intervals; costs closer together than these intervals cannot be distinguished."
)

HOW_LONG = (
    "Differences are paired with full attention on the same samples, with 95% intervals. An answer "
    "is cut off if it reaches its limit without an end: a method that loses its thread rarely "
    "ends. Recall is over full attention's answer, which every method is given; among the prompt's "
    "and the generated tokens apart it is the share found of those of the exact top-k."
)

HOW_TO_COMPARE = (
    "Each number that the paper published is shown beside the most similar of ours: the same "
    "method and sub-task, then the nearest model, length, budget relative to the context, and bits."
    " The two are not comparable if they differ in anything that affects results; published.csv "
    "lists each difference in full."
)


def what_ran(rows: pd.DataFrame, sweeps: Sequence[Sweep]) -> list[str]:
    """Return what ran, one sentence each."""
    cells = one_row_a_cell(rows)
    counts = cells["status"].value_counts()
    commands = [one for sweep in sweeps for one in sweep.commands()]
    methods = sorted(set(cells["method"].astype(str)), key=style.order)
    return [
        f"{len(cells)} cell{'' if len(cells) == 1 else 's'}: "
        + ", ".join(f"{n} {name}" for name, n in counts.items())
        + ".",
        f"Methods: {', '.join(style.style(name).label for name in methods)}.",
        *(
            f"{label}: {', '.join(str(int(v)) for v in sorted(cells[name].dropna().unique()))}."
            for name, label in (("k", "Budgets k"), ("rbit", "Hash bits rbit"))
            if cells[name].notna().any()
        ),
        *(f"Command: {one}" for one in dict.fromkeys(commands)),
    ]


def searches(sweeps: Sequence[Sweep], rows: pd.DataFrame, folder: Path) -> list[Section]:
    """Return a section for each of some sweeps that is a search."""
    return [
        Section(
            "Search",
            one["slug"],
            (one["words"],),
            [Section(one["title"], f"{one['slug']}-best", (one["table"], one["figures"]))],
        )
        for one in search.sections(sweeps, rows, folder)
    ]


def settings(
    compared: Comparison,
    samples: pd.DataFrame,
    folder: Path,
    models: Mapping[str, ModelSize],
    methods: Sequence[str] | None,
    progress: Callable[[str], None],
) -> list[Section]:
    """Return a section for each setting, with its figures drawn.

    Args:
        compared: The configurations.
        samples: The samples behind them.
        folder: Folder of the figures.
        models: Whole models for which the bound on a decode step is shown.
        methods: Methods to highlight in figures of many; None for the references and the best.
        progress: What is told which setting is at work.
    """
    found = list(compared.by_setting())
    varying = [name for name in SETTING if len({str(key.get(name)) for key, _ in found}) > 1]
    sections: list[Section] = []
    for place, (key, configurations) in enumerate(found):
        words = setting(key)
        progress(f"report: setting {place + 1} of {len(found)}, {words}")
        top = configurations[configurations.index.isin(compared.overall.index)]
        suffix = f"-{place + 1}" if len(found) > 1 else ""
        context = _context(words, top)
        given = (context, suffix, models, samples)
        drawn = draw_all(configurations, folder, *given, methods=methods)
        own = _of_setting(f"setting-{place + 1}", compared, configurations, top, models)
        if drawn:
            own.insert(0, Section("Figures", f"setting-{place + 1}-figures", (drawn,)))
        link = ", ".join(_value(name, key[name]) for name in varying if key.get(name) is not None)
        alone = f"{key['model']}, {key['task']}"
        sections.append(
            Section(
                words,
                f"setting-{place + 1}",
                sections=own,
                link=link or alone,
                folded=place > 0,
            )
        )
    return sections


def _value(name: str, value: Any) -> str:
    return f"{int(value):,} tokens" if name == "length" else str(value)


def _of_setting(
    slug: str,
    compared: Comparison,
    configurations: pd.DataFrame,
    top: pd.DataFrame,
    models: Mapping[str, ModelSize],
) -> list[Section]:
    """Return the tables of a setting, of which those of single sub-tasks are folded."""
    plain, every = without_parameters(top), without_parameters(configurations)
    bold = _without_bold(top, compared.answers)
    tabled: list[tuple[str, Table | None, str, bool]] = [
        ("League", overview.league_table(every), bold + HOW_TO_RANK, False),
        ("Results", overview.main_table(plain), bold + HOW_TO_READ, False),
        *(
            (f"Score at equal {words}", matched_table(plain, cost, compared.answers),
             bold + HOW_TO_MATCH, False)
            for cost, words in MATCHED.items()
        ),
        ("Long answers", length_table(plain), HOW_LONG, False),
        ("Score by turn", turn_table(every), HOW_TO_TURN, False),
        ("Score by sub-task", overview.subtask_table(every), bold.strip(), True),
        (OF_ANSWERED, answered_table(every, compared.answers), "", True),
        *((title, table, "", False) for title, table in ladder_tables(top)),
        ("Differences, paired by seed", difference_table(top), "", False),
        ("Break-even", break_even_table(smallest_batch(top), models), "", False),
    ]  # fmt: skip
    shown = [(title, table, words, folded) for title, table, words, folded in tabled if table]
    return [
        Section(title, f"{slug}-{place + 1}", (table, words) if words else (table,), folded=folded)
        for place, (title, table, words, folded) in enumerate(shown)
    ]


def _without_bold(configurations: pd.DataFrame, answers: Mapping[str, pd.DataFrame]) -> str:
    """Return a sentence, with a space after it, if some scores cannot be bold; else ""."""
    rivals = configurations[
        configurations["score"].notna() & ~configurations["method"].isin(BASELINES)
    ]
    ids = set(rivals["configuration_id"])
    missing = ids - set(answers)
    if not missing:
        return ""
    which = "these rows have" if missing == ids else f"{len(missing)} of {len(ids)} rows here have"
    return f"A score is bold only if its samples are there, and {which} none. "


def of_kernels(rows: pd.DataFrame, folder: Path) -> list[Section]:
    """Return the results of the kernels' check on a GPU, if there are any.

    Args:
        rows: All rows.
        folder: Folder of the figures.
    """
    found = rows[kernels.of_kernels(rows)]
    if not len(found):
        return []
    commits = sorted({str(one)[:12] for one in found["git_commit"].dropna()})
    devices = ", ".join(dict.fromkeys(found["device"].dropna().astype(str)))
    context = f"{devices}; commit {', '.join(commits) or 'unknown'}."
    tabled = (
        ("Are they right?", kernels.check_table(found)),
        ("Operators", kernels.time_table(found, kernels.TIMES)),
        ("Dense attention", kernels.time_table(found, kernels.DENSE)),
        ("Decode steps", kernels.speedup_table(rows)),
    )
    own = [
        Section(title, f"kernels-{place + 1}", (table,))
        for place, (title, table) in enumerate(tabled)
        if table is not None
    ]
    drawn = kernels.draw(rows, folder, context)
    return [Section("Kernels", "kernels", (kernels.HOW_TO_READ, drawn), own)]


def beside_published(numbers: pd.DataFrame) -> list[Section]:
    """Return the paper's published numbers beside ours, and those that have no counterpart."""
    table, alone = published_table(numbers), without_counterpart(numbers)
    parts: list[Part] = [HOW_TO_COMPARE, *([table] if table is not None else []), *alone]
    return [Section("Published numbers beside ours", "published", parts)]


def at_the_end(rows: pd.DataFrame) -> list[Section]:
    """Return what failed, if anything did, and the machine."""
    failures = overview.failure_table(rows)
    found = [Section("Failures and skips", "failures", (failures,))] if failures else []
    return [*found, Section("Environment", "environment", (overview.environment_table(rows),))]


def _context(words: str, configurations: pd.DataFrame) -> str:
    commits = sorted(
        {part for one in configurations["git_commit"] for part in one.split(", ") if part}
    )
    return f"{words}; commit {', '.join(commits) or 'unknown'}."
