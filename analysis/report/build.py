"""Build a sweep's report: ``python -m topkbench.analysis.report RESULTS... [--out DIR]``.

Needs neither torch nor the model: it reads the rows and samples that the cells wrote.
"""

from __future__ import annotations

import argparse
import base64
import html
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from topkbench.analysis import style
from topkbench.analysis.comparison.configurations import Comparison, compare
from topkbench.analysis.comparison.stats import paired_columns
from topkbench.analysis.console import console, say, say_error, visible
from topkbench.analysis.figures import search
from topkbench.analysis.figures.break_even import MODELS, ModelSize, break_even_table, model_sizes
from topkbench.analysis.figures.plots import Drawn, draw_all, smallest_batch
from topkbench.analysis.figures.variants import difference_table, ladder_tables
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
    one_row_a_cell,
    samples_of,
    typed,
)
from topkbench.analysis.report import kernels
from topkbench.analysis.report.samples import load_kept
from topkbench.analysis.tables import overview
from topkbench.analysis.tables.answered import answered_table
from topkbench.analysis.tables.matched import MATCHED, matched_table
from topkbench.analysis.tables.paper import (
    compare_with_published,
    published_table,
    without_counterpart,
)
from topkbench.analysis.tables.table import in_markdown, setting

__all__ = ["Report", "build", "load", "main", "paired_columns", "write"]

_HOW_TO_READ = (
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

_ANSWERED = "Mean of the sub-tasks that full attention answers"

_HOW_TO_RANK = (
    "Ranked by score at each budget. The worst sub-task is the one with the largest loss to full "
    "attention."
)

_HOW_TO_MATCH = (
    "Each method's score is interpolated between its budgets, over the logarithm of the cost, "
    "sample by sample; – where the cost lies outside the range of its budgets. Bold as above, but "
    "at equal decode time only among methods whose times are steady and have intervals; costs "
    "closer together than these intervals cannot be distinguished."
)

_HOW_TO_COMPARE = (
    "Each number that the paper published is shown beside the most similar of ours: the same "
    "method and sub-task, then the nearest model, length, budget relative to the context, and bits."
    " The two are not comparable if they differ in anything that affects results; published.csv "
    "lists each difference in full."
)


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


def _merge(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
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
) -> Path:
    """Do what `write` does; return the absolute path of ``report.html``."""
    return write(sources, out, models, published).page


def write(
    sources: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    models: Mapping[str, ModelSize] = MODELS,
    published: bool = False,
) -> Report:
    """Write tables, figures and the report of one sweep, or of several merged.

    Args:
        sources: One or more of what `load` reads.
        out: Folder to write to; by default the sweep's own, or ``merged`` beside the first of
            several. If rows were read from a file in that folder, none are written.
        models: Whole models for which the bound on a decode step is shown.
        published: Show the paper's published numbers beside ours; all of them, with the reasons why
            they are not comparable, go to ``published.csv``.

    Raises:
        RecordError: If a source is missing, holds no row, or the folder cannot be written.
    """
    paths = [Path(sources)] if isinstance(sources, str | Path) else [Path(one) for one in sources]
    if not paths:
        raise RecordError("a report needs at least one folder of results, got none.")
    loaded = [load(path) for path in paths]
    rows = typed(_merge([rows for rows, _ in loaded]))
    samples = _merge([samples for _, samples in loaded]).infer_objects()
    if not len(rows):
        raise RecordError(f"{paths[0]} must hold at least one row, but no cell has begun.")
    kept = _merge([load_kept(path) for path in paths])
    with style.recorded(rows):
        return _write(rows, samples, kept, paths, out, models, published)


def _write(
    rows: pd.DataFrame,
    samples: pd.DataFrame,
    kept: pd.DataFrame,
    paths: Sequence[Path],
    out: str | Path | None,
    models: Mapping[str, ModelSize],
    published: bool,
) -> Report:
    """Write what `write` says, from rows that were read from paths."""
    first = paths[0] if paths[0].is_dir() else paths[0].parent
    place = Path(out) if out is not None else first if len(paths) == 1 else first.parent / "merged"
    folder = place.absolute()
    with translate_os_error(folder):
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    of_kernels = rows[kernels.of_kernels(rows)]
    compared = compare(rows.drop(of_kernels.index), samples)
    ordered = [name for name in rows.columns if not name.startswith(PARAMETER_PREFIX)]
    parameters = sorted(set(rows.columns) - set(ordered))
    shown = typed(_merge([compared.rows, of_kernels]))[[*ordered, *parameters]]
    if not any(_is_read_from(path, folder) for path in paths):
        write_atomic(folder / "rows.parquet", shown.to_parquet(None, index=False))
        write_atomic(folder / "rows.csv", csv_bytes(shown))
        write_atomic(folder / "samples.parquet", samples_bytes(samples))
        if len(kept):
            write_atomic(folder / kept_file.NAME, samples_bytes(kept))
    sweeps = [Sweep.open(path) for path in paths if path.is_dir()]
    content = _content(compared, shown, samples, folder, models)
    content["searches"] = search.sections(sweeps, shown, folder / "figures")
    commands = [one for sweep in sweeps for one in sweep.commands()]
    content["ran"] += [f"Command: {one}" for one in dict.fromkeys(commands)]
    if published:
        numbers = compare_with_published(compared.configurations)
        content |= {
            "published": published_table(numbers),
            "without_counterpart": without_counterpart(numbers),
        }
        write_atomic(folder / "published.csv", csv_bytes(numbers))
    write_atomic(folder / "report.md", _markdown(content).encode())
    path = folder / "report.html"
    write_atomic(path, _html(content).encode())
    return Report(path, rows, samples, compared)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _is_read_from(path: Path, folder: Path) -> bool:
    """Return whether a source is read from a file that a report in a folder would overwrite."""
    file = path.absolute()
    if file.is_dir() and not (file / "cells.json").is_file() and not (file / "cells").is_dir():
        file = next(file / name for name in _ROWS if (file / name).is_file())
    return file.parent == folder and file.name in _ROWS


def _content(
    compared: Comparison,
    rows: pd.DataFrame,
    samples: pd.DataFrame,
    folder: Path,
    models: Mapping[str, ModelSize],
) -> dict[str, Any]:
    """Return the contents of a report, in order."""
    panels: list[dict[str, Any]] = []
    settings = list(compared.by_setting())
    for place, (key, configurations) in enumerate(settings):
        words = setting(key)
        top = configurations[configurations.index.isin(compared.overall.index)]
        suffix = f"-{place + 1}" if len(settings) > 1 else ""
        context = _context(words, top)
        drawn = draw_all(configurations, folder / "figures", context, suffix, models, samples)
        panels.append(
            {
                "title": words,
                "slug": f"setting-{place + 1}",
                "table": overview.main_table(top),
                "league": overview.league_table(configurations),
                "matched": [
                    (f"Score at equal {words}", found)
                    for cost, words in MATCHED.items()
                    if (found := matched_table(top, cost, compared.answers)) is not None
                ],
                "subtasks": overview.subtask_table(configurations),
                "answered": answered_table(configurations, compared.answers),
                "ladder": ladder_tables(top),
                "differences": difference_table(top),
                "break_even": break_even_table(smallest_batch(top), models),
                "figures": drawn,
            }
        )
    cells = one_row_a_cell(rows)
    counts = cells["status"].value_counts()
    return {
        "title": visible(f"topkbench: {folder.parent.name}/{folder.name}"),
        "ran": [
            f"{len(cells)} cell{'' if len(cells) == 1 else 's'}: "
            + ", ".join(f"{n} {name}" for name, n in counts.items())
            + ".",
            f"Methods: {', '.join(dict.fromkeys(cells['method'].astype(str)))}.",
            *(
                f"{label}: {', '.join(str(int(v)) for v in sorted(cells[name].dropna().unique()))}."
                for name, label in (("k", "Budgets k"), ("rbit", "Hash bits rbit"))
                if cells[name].notna().any()
            ),
        ],
        "notes": compared.notes,
        "how_to_read": _HOW_TO_READ,
        "how_to_rank": _HOW_TO_RANK,
        "how_to_match": _HOW_TO_MATCH,
        "of_answered": _ANSWERED,
        "panels": panels,
        "kernels": _kernels(rows, folder),
        "published": None,
        "how_to_compare": _HOW_TO_COMPARE,
        "without_counterpart": [],
        "failures": overview.failure_table(rows),
        "environment": overview.environment_table(rows),
    }


def _kernels(rows: pd.DataFrame, folder: Path) -> dict[str, Any] | None:
    """Return the results of the kernels' check on a GPU, or None if there are none."""
    found = rows[kernels.of_kernels(rows)]
    if not len(found):
        return None
    commits = sorted({str(one)[:12] for one in found["git_commit"].dropna()})
    devices = ", ".join(dict.fromkeys(found["device"].dropna().astype(str)))
    context = f"{devices}; commit {', '.join(commits) or 'unknown'}."
    tabled = (
        ("Are they right?", kernels.check_table(found)),
        ("Operators", kernels.time_table(found, kernels.TIMES)),
        ("Dense attention", kernels.time_table(found, kernels.DENSE)),
        ("Decode steps", kernels.speedup_table(rows)),
    )
    return {
        "tables": [(title, table) for title, table in tabled if table is not None],
        "figures": kernels.draw(rows, folder / "figures", context),
        "how_to_read": kernels.HOW_TO_READ,
    }


def _context(words: str, configurations: pd.DataFrame) -> str:
    commits = sorted(
        {part for one in configurations["git_commit"] for part in one.split(", ") if part}
    )
    return f"{words}; commit {', '.join(commits) or 'unknown'}."


def _markdown(content: dict[str, Any]) -> str:
    parts = [
        f"# {in_markdown(content['title'])}",
        "## What ran",
        *(f"- {in_markdown(one)}" for one in content["ran"]),
    ]
    parts += [f"- **Note:** {in_markdown(one)}" for one in content["notes"]]
    for one in content["searches"]:
        parts += [
            "## Search",
            in_markdown(one["words"]),
            f"### {in_markdown(one['title'])}",
            one["table"].markdown(),
        ]
        parts += map(_shown, one["figures"])
    for panel in content["panels"]:
        parts += [f"## {in_markdown(panel['title'])}", panel["table"].markdown()]
        if panel["league"] is not None:
            parts += ["### League", panel["league"].markdown(), content["how_to_rank"]]
        for title, found in panel["matched"]:
            parts += [f"### {in_markdown(title)}", found.markdown(), content["how_to_match"]]
        if panel["subtasks"] is not None:
            parts += ["### Score by sub-task", panel["subtasks"].markdown()]
        if panel["answered"] is not None:
            parts += [f"### {_ANSWERED}", panel["answered"].markdown()]
        for title, found in panel["ladder"]:
            parts += [f"### {in_markdown(title)}", found.markdown()]
        if panel["differences"] is not None:
            parts += ["### Differences, paired by seed", panel["differences"].markdown()]
        if panel["break_even"] is not None:
            parts += ["### Break-even", panel["break_even"].markdown()]
        for one in panel["figures"]:
            parts.append(_shown(one))
    if content["kernels"] is not None:
        parts += ["## Kernels", content["kernels"]["how_to_read"]]
        for title, table in content["kernels"]["tables"]:
            parts += [f"### {in_markdown(title)}", table.markdown()]
        parts += [_shown(one) for one in content["kernels"]["figures"]]
    if content["without_counterpart"]:
        parts += ["## Published numbers beside ours", content["how_to_compare"]]
        parts += [content["published"].markdown()] if content["published"] is not None else []
        parts += [f"- {in_markdown(one)}" for one in content["without_counterpart"]]
    if content["failures"] is not None:
        parts += ["## Failures and skips", content["failures"].markdown()]
    parts += ["## Environment", content["environment"].markdown()]
    parts += ["## How to read this", content["how_to_read"]]
    text = "\n\n".join(parts) + "\n"
    return re.sub(r"(\n- [^\n]*)\n(?=\n- )", r"\1", text)


def _shown(one: Drawn) -> str:
    link = f"figures/{one.name}"
    title, caption = in_markdown(one.title), in_markdown(one.caption)
    words = f"**{title}.** {caption} [svg]({link}.svg), [data]({link}.csv)"
    return f"![{title}]({link}.png)\n\n{words}"


def _html(content: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["picture"] = _picture
    return environment.get_template("report.html").render(content)


def _picture(drawn: Drawn) -> str:
    """Return a figure as a data URI, so that the report is a single file."""
    data = base64.b64encode(drawn.svg.read_bytes()).decode()
    return html.escape(f"data:image/svg+xml;base64,{data}")


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
                print(f"{one} is empty and left out.", file=sys.stderr)
        say(build(results or options.results, options.out, models, options.published))
    except RecordError as error:
        say_error(error)
        return 2
    return 0
