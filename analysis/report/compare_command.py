"""``topkbench compare A B``: what became worse between two results, as a gate for CI."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from topkbench.analysis import style
from topkbench.analysis.comparison.changes import (
    EXACT,
    FALSE_ALARMS,
    Change,
    find_changes,
    least_losses,
)
from topkbench.analysis.comparison.configurations import compare
from topkbench.analysis.comparison.metrics import METRICS
from topkbench.analysis.comparison.stats import Interval
from topkbench.analysis.console import console, say, say_error
from topkbench.analysis.record.store import RecordError
from topkbench.analysis.report.build import load, readable
from topkbench.analysis.tables.table import Table, setting, whole

WORSE_STATUS, UNUSABLE_STATUS = 1, 2
"""Exit statuses if something is worse, and if the results cannot be compared."""


def results_of(place: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return rows and samples of ``RESULTS``, or of one commit in them: ``RESULTS@COMMIT``.

    Raises:
        RecordError: If there are no results, or none of the commit.
    """
    folder, sign, commit = place.rpartition("@")
    if not sign or Path(place).exists():
        return load(place)
    rows, samples = load(folder)
    own = rows[rows["git_commit"].fillna("").str.startswith(commit)] if commit else rows[:0]
    if not len(own):
        known = ", ".join(sorted({one[:12] for one in rows["git_commit"].dropna()}))
        raise RecordError(
            f"{folder} must have rows of commit {commit!r}, but has those of {known or 'none'}."
        )
    return own, samples[samples["run_id"].isin(own["run_id"])]


def change_table(changes: Sequence[Change]) -> Table:
    """Return one row per configuration and sub-task of one setting: what changed, what is worse."""
    scored = any(one.scores for one in changes)
    exact = [name for name in EXACT if any(name in one.exact for one in changes)]
    timed = any(one.speedups for one in changes)
    head = ["Method", "k", "rbit", "Sub-task"]
    head += ["Score A", "Score B", "B − A (points)"] if scored else []
    for name in exact:
        metric = METRICS[name]
        head.append(f"{metric.label}, B − A" + (f" ({metric.unit})" if metric.unit else ""))
    head += ["Speed-up A", "Speed-up B"] if timed else []
    rows, strong = [], set()
    for place, one in enumerate(changes):
        cells = [one.label, whole(one.k), whole(one.rbit), one.subtask]
        if scored:
            cells += [METRICS["score"].text(value) for value in one.scores or (None, None)]
            cells.append(_interval_text(one.difference))
        for name in exact:
            first, last = one.exact.get(name, (float("nan"), float("nan")))
            cells.append(_difference_text(name, last - first))
        if timed:
            cells += [METRICS["speedup_vs_full"].text(one) for one in one.speedups or (None, None)]
        names = [METRICS[name].label if name in METRICS else name for name in one.worse]
        cells.append(f"worse: {', '.join(names)}" if names else "")
        if names:
            strong.add((place, len(cells) - 1))
        rows.append(cells)
    return Table([*head, ""], rows, strong, words={0, 3, len(head)})


def _interval_text(one: Interval | None) -> str:
    text = METRICS["delta_full"].text
    return "–" if one is None else f"{text(one.estimate)} [{text(one.low)}, {text(one.high)}]"


def _difference_text(name: str, difference: float) -> str:
    text = METRICS[name].text(difference)
    return text if text.startswith(("−", "–")) or float(text.replace(",", "")) == 0 else f"+{text}"


def rule(changes: Sequence[Change], tolerance: float, percent: float) -> str:
    """Return what counts as worse, in words."""
    number = sum(one.difference is not None for one in changes)
    words = (
        f"A score is worse if it lost more than {tolerance:g} points by more than chance allows:"
        f" Holm's procedure over all {number} differences, by which at most"
        f" {100 * FALSE_ALARMS:g} of 100 comparisons in which nothing changed finds anything worse."
        " Brackets are 95% intervals of single differences. "
        if number
        else ""
    )
    return (
        f"{words}Numbers without sampling error are worse if they moved by more than {percent:g}%"
        " of A's. Times are for information: A and B ran at different moments."
    )


def least_losses_in_words(changes: Sequence[Change], tolerance: float) -> str:
    """Return which losses of a score would be found, and which not even if all answers were lost.

    Empty without scores.
    """
    found, blind = [], []
    for sizes, least in least_losses(changes, tolerance).items():
        least_size, most = sizes[0], sizes[-1]
        samples = f"{most} samples" if least_size == most else f"{least_size} to {most} samples"
        place = f"a score of {samples}"
        if len(sizes) > 1:
            place = f"a mean over {len(sizes)} sub-tasks of {samples} each"
        if least is None:
            blind.append(place)
        else:
            found.append(f"{METRICS['delta_full'].text(least).lstrip('+')} points in {place}")
    words = f"The least loss that is found: {', '.join(found)}." if found else ""
    if blind:
        words += (
            f" In {' and in '.join(blind)} not even the loss of all answers is found: compare more"
            " samples."
        )
    return words.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two results; return 0 if nothing is worse, 1 if something is, 2 if unusable."""
    parser = argparse.ArgumentParser(
        prog="topkbench compare",
        description="Compare the results B with the earlier results A, paired by sample, for each"
        " configuration and sub-task. Exit status: 0 if nothing is worse, 1 if something is, 2 if"
        " the results cannot be compared.",
    )
    place = "sweep folder or rows file; RESULTS@COMMIT is one commit's rows in it"
    parser.add_argument("before", metavar="A", help=place)
    parser.add_argument("after", metavar="B", help="likewise")
    parser.add_argument(
        "--tolerance",
        metavar="POINTS",
        type=float,
        default=0.0,
        help="points, of 100, that a score may lose (default: 0, as far as samples can tell)",
    )
    parser.add_argument(
        "--percent",
        metavar="P",
        type=float,
        default=1.0,
        help="percent of A's value by which recall, likelihood, density and bytes, which have no"
        " sampling error, may become worse (default: 1)",
    )
    parser.add_argument(
        "--common", action="store_true", help="compare what both have, where B lacks some of A"
    )
    options = parser.parse_args(arguments)
    with console():
        return _compare(options)


def _compare(options: argparse.Namespace) -> int:
    """Print what changed; return the exit status."""
    for name in ("tolerance", "percent"):
        if not 0 <= getattr(options, name) < float("inf"):
            say_error(f"--{name} must be 0 or more, got {getattr(options, name)}.")
            return UNUSABLE_STATUS
    try:
        sides = [results_of(place) for place in (options.before, options.after)]
        shown = [(readable(rows), samples) for rows, samples in sides]
        with style.recorded(shown[0][0]):
            changes = find_changes(
                *(compare(rows, samples, resampled=False) for rows, samples in shown),
                tolerance=options.tolerance,
                relative=options.percent / 100,
                only_common=options.common,
            )
    except RecordError as error:
        say_error(error)
        return UNUSABLE_STATUS
    by_setting: dict[str, list[Change]] = {}
    for one in changes:
        by_setting.setdefault(setting(dict(one.setting)), []).append(one)
    for words, part in by_setting.items():
        say(f"{words}\n\n{change_table(part).text()}\n")
    say(rule(changes, options.tolerance, options.percent))
    say(least_losses_in_words(changes, options.tolerance))
    worse = [one for one in changes if one.worse]
    cells = len({(one.name, *map(str, one.setting.values())) for one in changes})
    say(
        f"{len(worse)} of {len(changes)} comparisons ({cells} configurations) are worse."
        if worse
        else f"Nothing is worse: {len(changes)} comparisons of {cells} configurations."
    )
    return WORSE_STATUS if worse else 0
