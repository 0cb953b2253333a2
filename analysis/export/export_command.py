"""``topkbench export RESULTS``: tables, figures, set-up and references for a paper."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd

from topkbench.analysis import style
from topkbench.analysis.comparison.configurations import Comparison, compare, without_parameters
from topkbench.analysis.console import console, say, say_error, say_progress
from topkbench.analysis.export import latex, printed, sources
from topkbench.analysis.export.setup import sentences
from topkbench.analysis.record.files import translate_os_error, write_atomic
from topkbench.analysis.record.store import RecordError
from topkbench.analysis.report import kernels
from topkbench.analysis.report.build import load, merge, readable
from topkbench.analysis.tables.overview import main_table, narrow, subtask_table
from topkbench.analysis.tables.table import Table, setting

INTERVALS = "Brackets: 95% intervals."
BEST = (
    "Bold: the best score at each budget and those whose paired difference to it does not exclude"
    " 0, full attention and oracles, which read all keys, left out."
)


def export(sources_of: Sequence[str | Path], out: str | Path | None = None) -> list[str]:
    """Write everything that a paper takes from results; return what was written, in lines.

    Args:
        sources_of: What `load` reads, one or more, which are merged.
        out: Folder to write to; by default ``paper`` in the first of the results.

    Raises:
        RecordError: If there are no results, or the folder cannot be written.
    """
    paths = [Path(one) for one in sources_of]
    loaded = [load(path) for path in paths]
    rows = readable(merge([rows for rows, _ in loaded]))
    samples = merge([samples for _, samples in loaded]).infer_objects()
    first = paths[0] if paths[0].is_dir() else paths[0].parent
    folder = Path(out) if out is not None else first / "paper"
    with translate_os_error(folder):
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    with style.recorded(rows):
        compared = compare(rows[~kernels.of_kernels(rows)], samples)
        if not len(compared.configurations):
            raise RecordError(f"{paths[0]} must hold a cell that ran, but holds none.")
        return _write(compared, samples, folder)


def _write(compared: Comparison, samples: pd.DataFrame, folder: Path) -> list[str]:
    rows = compared.rows
    drawn: list[printed.Printed] = []
    tables = 0
    settings = list(compared.by_setting())
    for place, (key, configurations) in enumerate(settings):
        words = setting(key)
        say_progress(f"export: setting {place + 1} of {len(settings)}, {words}")
        suffix = f"-{place + 1}" if len(settings) > 1 else ""
        top = configurations[configurations.index.isin(compared.overall.index)]
        shown = {
            "results": narrow(main_table(without_parameters(top))),
            "subtasks": subtask_table(without_parameters(configurations)),
        }
        for name, table in shown.items():
            if table is not None:
                title = "Results" if name == "results" else "Score by sub-task"
                caption = " ".join([f"{title}: {words}.", *_how_to_read(table)])
                text = latex.table(table, caption, f"tab:{name}{suffix}")
                write_atomic(folder / f"{name}{suffix}.tex", text.encode())
                tables += 1
        drawn.append(
            printed.draw(configurations, folder / "figures", f"{words}.", suffix, samples, None)
        )
    said = [latex.latex(one) for one in sentences(rows, _version())]
    write_atomic(folder / "setup.tex", ("\n\n".join(said) + "\n").encode())
    captions = [
        f"% {path.name}\n{latex.latex(text)}\n"
        for one in drawn
        for path, text in one.captions.items()
    ]
    write_atomic(folder / "captions.tex", "\n".join(captions).encode())
    cited = sources.cited(rows)
    write_atomic(folder / "sources.bib", ("\n\n".join(cited.values()) + "\n").encode())
    left_out = [name for one in drawn for name in one.left_out]
    number = sum(len(one.files) for one in drawn)
    lines = [f"{tables} tables, {number} figures, setup.tex, captions.tex, and"
             f" {len(cited)} entries in sources.bib: {folder.absolute()}"]  # fmt: skip
    if left_out:
        lines.append(f"Left out, as 8-point type does not fit: {', '.join(left_out)}.")
    without = sorted(set(rows["method"]) - set(cited) - _OWN, key=style.order)
    if without:
        lines.append(f"Without an entry, as they do not ship: {', '.join(without)}.")
    return lines


_OWN = {"full", "exact", "random"}
"""Methods that are from no paper."""


def _version() -> str:
    try:
        return version("topkbench")
    except PackageNotFoundError:
        return "of a checkout"


def _how_to_read(table: Table) -> list[str]:
    """Return sentences on the signs that a table has."""
    has_intervals = any(" [" in cell for row in table.rows for cell in row)
    return [*([INTERVALS] if has_intervals else []), *([BEST] if table.strong else [])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Export the results that the command line names; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="topkbench export",
        description="Write what a paper takes from results: LaTeX tables (booktabs, graphicx),"
        " figures as PDF of 3.3 and 7 inches with type of 8 points, their captions, the set-up in a"
        " sentence, and BibTeX of the methods and benchmarks that appear.",
    )
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="sweep folder or rows file")
    parser.add_argument(
        "--out", metavar="DIR", help="where to write (default: paper/ in the first of the results)"
    )
    options = parser.parse_args(arguments)
    with console():
        try:
            for line in export(options.results, options.out):
                say(line)
        except RecordError as error:
            say_error(error)
            return 2
    return 0
