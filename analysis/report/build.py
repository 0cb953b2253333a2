"""Build a sweep's report: ``python -m topkbench.analysis.report RESULTS... [--out DIR]``.

Needs neither torch nor the model: it reads the rows and samples that the cells wrote.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from topkbench.analysis import style
from topkbench.analysis.comparison.configurations import Comparison, compare
from topkbench.analysis.comparison.stats import paired_columns
from topkbench.analysis.console import console, say, say_error, say_progress, visible
from topkbench.analysis.figures.break_even import MODELS, ModelSize, model_sizes
from topkbench.analysis.record import kept_file
from topkbench.analysis.record.csv_file import csv_bytes
from topkbench.analysis.record.files import translate_os_error, write_atomic
from topkbench.analysis.record.row import PARAMETER_PREFIX
from topkbench.analysis.record.rows_file import read_rows, read_samples
from topkbench.analysis.record.samples_file import samples_bytes
from topkbench.analysis.record.store import (
    CellStore,
    RecordError,
    Sweep,
    frame,
    samples_of,
    typed,
)
from topkbench.analysis.report import contents, kernels
from topkbench.analysis.report.page import html
from topkbench.analysis.report.samples import load_kept
from topkbench.analysis.report.samples_page import page as samples_page
from topkbench.analysis.report.section import markdown
from topkbench.analysis.tables.paper import compare_with_published

__all__ = ["Report", "build", "load", "main", "paired_columns", "write"]

_MOST_CHARACTERS = 300
"""Longest text of a row that a report shows."""
_ROWS = ("rows.parquet", "rows.csv")
"""Files of rows, of which the first that exists is read."""


def load(path: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return rows and samples of a sweep's folder, a results folder, or a file of rows.

    Args:
        path: A folder with ``cells.json`` (a sweep), with ``cells/`` (all results), with
            ``rows.parquet`` or ``rows.csv``, or such a file itself.

    Raises:
        RecordError: If there are no results, or a file of them is damaged.
    """
    folder = Path(path)
    if not folder.exists():
        raise RecordError(f"results must be a folder or a file of rows, but {path} does not exist.")
    if (folder / "cells.json").is_file():
        sweep = Sweep.open(folder)
        # A report copied without results/cells/ is read from its own tables.
        if sweep.store.folder.is_dir() or not (folder / "rows.parquet").is_file():
            return sweep.rows(), sweep.samples()
    if (folder / "cells").is_dir():
        cells = CellStore(folder).cells()
        return frame([row for cell in cells for row in cell.read()]), samples_of(cells)
    for file in [folder] if folder.is_file() else [folder / name for name in _ROWS]:
        if file.is_file() and file.suffix in (".parquet", ".csv"):
            return read_rows(file), read_samples(file.with_name("samples.parquet"))
    raise RecordError(
        f"{path} must hold cells.json, cells/, rows.parquet or rows.csv, but holds none of them; "
        "name a sweep's folder under results/."
    )


def merge(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return several frames of rows or samples as one."""
    full = [part.astype(object) for part in parts if len(part)]
    return pd.concat(full, ignore_index=True) if full else parts[0]


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Attributes:
        page: The absolute path of ``report.html``.
        rows: The rows that were read.
        samples: Their samples.
        compared: The configurations that it shows.
    """

    page: Path
    rows: pd.DataFrame
    samples: pd.DataFrame
    compared: Comparison


def build(
    sources: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    models: Mapping[str, ModelSize] = MODELS,
    published: bool = False,
    methods: Sequence[str] | None = None,
) -> Path:
    """Do what `write` does; return the absolute path of ``report.html``."""
    return write(sources, out, models, published, methods).page


def write(
    sources: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    models: Mapping[str, ModelSize] = MODELS,
    published: bool = False,
    methods: Sequence[str] | None = None,
    progress: Callable[[str], None] = say_progress,
) -> Report:
    """Write tables, figures and the report of one sweep, or of several merged.

    Args:
        sources: One or more of what `load` reads.
        out: Folder to write to; by default the sweep's own, or ``merged`` beside the first of
            several. If rows were read from a file in that folder, none are written.
        models: Whole models for which the bound on a decode step is shown.
        published: Show the paper's published numbers beside ours; all of them, with the reasons why
            they are not comparable, go to ``published.csv``.
        methods: Methods to highlight in figures of many, by name; None for the references and the
            best.
        progress: What is told which setting is at work.

    Raises:
        RecordError: If a source is missing, holds no row, or the folder cannot be written, or there
            is no method of a name.
    """
    paths = [Path(sources)] if isinstance(sources, str | Path) else [Path(one) for one in sources]
    if not paths:
        raise RecordError("a report needs at least one folder of results, got none.")
    loaded = [load(path) for path in paths]
    rows = typed(merge([rows for rows, _ in loaded]))
    samples = merge([samples for _, samples in loaded]).infer_objects()
    if not len(rows):
        raise RecordError(f"{paths[0]} must hold at least one row, but no cell has begun.")
    known = {*style.shipped(), *rows["method"]}
    for name in methods or ():
        if name not in known:
            raise RecordError(
                f"methods must name methods, got {name!r}; these rows have"
                f" {', '.join(sorted(set(rows['method']), key=style.order))}."
            )
    kept = merge([load_kept(path) for path in paths])
    shown = readable(rows)
    with style.recorded(shown):
        return _write(rows, shown, samples, kept, paths, out, models, published, methods, progress)


def _write(
    rows: pd.DataFrame,
    shown: pd.DataFrame,
    samples: pd.DataFrame,
    kept: pd.DataFrame,
    paths: Sequence[Path],
    out: str | Path | None,
    models: Mapping[str, ModelSize],
    published: bool,
    methods: Sequence[str] | None,
    progress: Callable[[str], None],
) -> Report:
    """Write what `write` says, from rows that were read from paths, as they are and as shown."""
    first = paths[0] if paths[0].is_dir() else paths[0].parent
    place = Path(out) if out is not None else first if len(paths) == 1 else first.parent / "merged"
    folder = place.absolute()
    with translate_os_error(folder):
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    of_kernels = shown[kernels.of_kernels(shown)]
    progress(f"report: {len(rows):,} rows are compared")
    compared = compare(shown.drop(of_kernels.index), samples)
    ordered = [name for name in rows.columns if not name.startswith(PARAMETER_PREFIX)]
    parameters = sorted(set(rows.columns) - set(ordered))
    # Without the repeated cells, which a comparison leaves out.
    places = [*compared.rows.index, *of_kernels.index]
    written, shown = (
        typed(one.loc[places].reset_index(drop=True))[[*ordered, *parameters]]
        for one in (rows, shown)
    )
    if not any(_is_read_from(path, folder) for path in paths):
        write_atomic(folder / "rows.parquet", written.to_parquet(None, index=False))
        write_atomic(folder / "rows.csv", csv_bytes(written))
        write_atomic(folder / "samples.parquet", samples_bytes(samples))
        if len(kept):
            write_atomic(folder / kept_file.NAME, samples_bytes(kept))
    sweeps = [Sweep.open(path) for path in paths if path.is_dir()]
    figures = folder / "figures"
    sections = contents.searches(sweeps, shown, figures)
    sections += contents.settings(compared, samples, figures, models, methods, progress)
    sections += contents.of_kernels(shown, figures)
    if published:
        numbers = compare_with_published(compared.configurations)
        sections += contents.beside_published(numbers)
        write_atomic(folder / "published.csv", csv_bytes(numbers))
    sections += contents.at_the_end(shown)
    progress("report: the page is written")
    title = visible(f"topkbench: {folder.parent.name}/{folder.name}")
    ran = contents.what_ran(shown, sweeps)
    write_atomic(folder / "report.md", markdown(title, ran, compared.notes, sections).encode())
    path = folder / "report.html"
    answers = samples_page(compared, samples, kept)
    write_atomic(path, html(title, ran, compared.notes, sections, answers).encode())
    return Report(path, rows, samples, compared)


def readable(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows whose texts can be shown: control characters as escapes, and cut if very long.

    A page, a table and a figure show names that anybody may have chosen.
    """
    texts = [name for name in rows if rows[name].dtype == object]
    return rows.assign(**{str(name): rows[name].map(_readable) for name in texts})


def _readable(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    cut = value if len(value) <= _MOST_CHARACTERS else f"{value[:_MOST_CHARACTERS]}…"
    return visible(cut)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _is_read_from(path: Path, folder: Path) -> bool:
    """Return whether a source is read from a file that a report in a folder would overwrite."""
    file = path.absolute()
    if file.is_dir() and not (file / "cells.json").is_file() and not (file / "cells").is_dir():
        file = next(file / name for name in _ROWS if (file / name).is_file())
    return file.parent == folder and file.name in _ROWS


def main(arguments: Sequence[str] | None = None) -> int:
    """Rebuild or merge reports; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m topkbench.analysis.report",
        description="Rebuild the report of a sweep, or merge several into one.",
    )
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="sweep folder or rows file")
    parser.add_argument("--out", metavar="DIR", help="where to write the report")
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME=PARAMETERS/LAYERS",
        default=[f"{name}={one.parameters:g}/{one.layers}" for name, one in MODELS.items()],
        help="whole models for which the bound on a decode step is shown (default: %(default)s)",
    )
    parser.add_argument(
        "--published",
        action="store_true",
        help="show the paper's published numbers beside ours, and say which are comparable",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="methods to highlight in figures of many (default: references and the best)",
    )
    options = parser.parse_args(arguments)
    with console():
        return _report(options)


def _report(options: argparse.Namespace) -> int:
    """Build the report that the command line asks for; return the exit status."""
    try:
        models = model_sizes(options.models)
        # A run that was stopped before its first cell leaves an empty folder.
        results = [one for one in options.results if not _is_empty(Path(one))]
        for one in options.results if results else ():
            if one not in results:
                say_progress(f"{one} is empty and left out.")
        sources = results or options.results
        say(build(sources, options.out, models, options.published, options.methods))
    except RecordError as error:
        say_error(error)
        return 2
    return 0
