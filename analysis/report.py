"""Build a sweep's report: ``python -m topkbench.analysis.report RESULTS... [--out DIR]``.

Needs neither torch nor the model: it reads the rows and samples that the cells left.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import html
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from topkbench.analysis import kernels, tables
from topkbench.analysis.break_even import MODELS, ModelSize, break_even_table, model_sizes
from topkbench.analysis.configurations import Comparison, compare
from topkbench.analysis.files import translate_os_error, write_atomic
from topkbench.analysis.matched import MATCHED, matched_table
from topkbench.analysis.paper import beside, left_out, published_table
from topkbench.analysis.plots import Drawn, draw_all, smallest_batch
from topkbench.analysis.record import CellStore, RecordError, Sweep, frame, samples_of, typed
from topkbench.analysis.row import COLUMNS, PARAMETER_PREFIX, Row
from topkbench.analysis.stats import paired_columns
from topkbench.analysis.variants import difference_table

__all__ = ["build", "load", "main", "paired_columns", "summary_table"]

summary_table = tables.summary_table

_HOW_TO_READ = (
    "Brackets are 95% intervals: Wilson's for right-or-wrong scores of one sub-task, else a "
    "bootstrap of 10,000 resamples drawn within each sub-task; those of recall, attention mass and "
    "output error are Student's over seeds, where there are several. Δ full is paired with full "
    "attention on the same samples. Bold: the best score at each budget and those whose paired "
    "difference to it does not exclude 0; nothing is bold where nothing can be told apart, and "
    "full attention and the oracles, exact top-k and exact pages, are yardsticks that do not "
    "compete. Bold is about scores: no time and no speed-up is ever bold. A speed-up is the ratio "
    "of the medians of full attention and the method, timed in turn, with a bootstrap interval "
    "over those pairs. k counts all kept tokens per KV head, sinks and recent ones included."
)

_HOW_TO_RANK = (
    "Ranked by score at each budget. The worst sub-task is the one that lost most to full "
    "attention, and how much."
)

_HOW_TO_MATCH = (
    "Each method's score is read off between its own budgets, over the logarithm of the cost, "
    "sample by sample; – where no budget of it costs as little or as much. Bold as above, but "
    "at equal decode time only methods whose times are steady and have intervals compete: what "
    "lies nearer together than those cannot be told apart."
)

_HOW_TO_COMPARE = (
    "Beside each number the paper published stands the nearest of ours: same method and sub-task, "
    "then model, length, budget as a share of the context, and bits. Where the two differ in "
    "anything that decides results they are not comparable; published.csv says each difference in "
    "full."
)


_ROWS = ("rows.parquet", "rows.csv")
"""Files of rows, the first that is there is read."""


def load(path: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return rows and samples of a sweep's folder, a results folder, or a file of rows.

    Args:
        path: A folder with ``cells.json`` (a sweep), with ``cells/`` (all results), with
            ``rows.parquet`` or ``rows.csv``, or such a file itself.

    Raises:
        RecordError: If there are no results.
    """
    folder = Path(path)
    if not folder.exists():
        raise RecordError(f"results must be a folder or a file of rows, but {path} does not exist.")
    if (folder / "cells.json").is_file():
        sweep = Sweep.open(folder)
        # A copied report has no store beside it: then its own tables are what there is.
        if sweep.store.folder.is_dir() or not (folder / "rows.parquet").is_file():
            return sweep.rows(), sweep.samples()
    if (folder / "cells").is_dir():
        cells = CellStore(folder).cells()
        return frame([row for cell in cells for row in cell.read()]), samples_of(cells)
    for file in [folder] if folder.is_file() else [folder / name for name in _ROWS]:
        if file.is_file() and file.suffix in (".parquet", ".csv"):
            return _read_rows(file), _read_samples(file.with_name("samples.parquet"))
    raise RecordError(
        f"{path} must hold cells.json, cells/, rows.parquet or rows.csv, but holds none of them; "
        "name a sweep's folder under results/."
    )


def _read_rows(file: Path) -> pd.DataFrame:
    try:
        # Named: an identity of digits only would be read as a number.
        words = {name: str for name in COLUMNS if Row.__annotations__[name].startswith("str")}
        data = (
            pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file, dtype=words)
        )
    except (OSError, ValueError) as error:
        raise RecordError(f"{file} must be a table of rows, but cannot be read: {error}.") from None
    known = [one for one in dataclasses.fields(Row) if one.name in COLUMNS]
    required = [one.name for one in known if one.default is dataclasses.MISSING]
    missing = [name for name in required if name not in data.columns]
    if missing:
        raise RecordError(f"{file} must have {', '.join(required)}, but lacks {missing[0]}.")
    # What was not recorded when the file was written, or where, is empty.
    extra = [name for name in data.columns if name not in COLUMNS]
    return typed(data.reindex(columns=[*COLUMNS, *extra]))


def _read_samples(file: Path) -> pd.DataFrame:
    return pd.read_parquet(file) if file.is_file() else pd.DataFrame({"run_id": []})


def _merge(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    full = [part.astype(object) for part in parts if len(part)]
    return pd.concat(full, ignore_index=True) if full else parts[0]


def build(
    sources: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    models: Mapping[str, ModelSize] = MODELS,
    published: bool = False,
) -> Path:
    """Write tables, figures and the report of one sweep, or of several merged.

    Args:
        sources: One or more of what `load` reads.
        out: Where to write; by default into the sweep's folder, or ``merged`` beside the
            first of several. Where rows were read from a file in that folder, none are written.
        models: Whole models that the bound on a decode step is told for.
        published: Lay the paper's published numbers beside ours; all of them, with what makes each
            comparable or not, go to ``published.csv``.

    Returns:
        The absolute path of ``report.html``.

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
    first = paths[0] if paths[0].is_dir() else paths[0].parent
    place = Path(out) if out is not None else first if len(paths) == 1 else first.parent / "merged"
    folder = place.absolute()
    with translate_os_error(folder):
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    of_kernels = rows[kernels.of_kernels(rows)]
    compared = compare(rows.drop(of_kernels.index), samples)
    ordered = [name for name in rows.columns if not name.startswith(PARAMETER_PREFIX)]
    parameters = sorted(set(rows.columns) - set(ordered))
    rows = typed(_merge([compared.rows, of_kernels]))[[*ordered, *parameters]]
    if not any(_is_read_from(path, folder) for path in paths):
        write_atomic(folder / "rows.parquet", rows.to_parquet(None, index=False))
        write_atomic(folder / "rows.csv", rows.to_csv(index=False, lineterminator="\n").encode())
        write_atomic(folder / "samples.parquet", _plain(samples).to_parquet(None, index=False))
    content = _content(compared, rows, samples, folder, models)
    commands = [one for path in paths if path.is_dir() for one in Sweep.open(path).commands()]
    content["ran"] += [f"Command: {one}" for one in dict.fromkeys(commands)]
    if published:
        numbers = beside(compared.lines)
        content |= {"published": published_table(numbers), "left_out": left_out(numbers)}
        text = numbers.to_csv(index=False, lineterminator="\n")
        write_atomic(folder / "published.csv", text.encode())
    write_atomic(folder / "report.md", _markdown(content).encode())
    path = folder / "report.html"
    write_atomic(path, _html(content).encode())
    return path


def _is_read_from(path: Path, folder: Path) -> bool:
    """Say whether the rows of a source are a file that a report in a folder would replace."""
    file = path.absolute()
    if file.is_dir() and not (file / "cells.json").is_file() and not (file / "cells").is_dir():
        file = next(file / name for name in _ROWS if (file / name).is_file())
    return file.parent == folder and file.name in _ROWS


def _plain(samples: pd.DataFrame) -> pd.DataFrame:
    """Make columns of several types text: tasks may give one name to different things."""
    data = samples.copy()
    for name in data.columns:
        if data[name].dtype == object:
            kinds = {type(one) for one in data[name].dropna()}
            if len(kinds) > 1:
                data[name] = [None if pd.isna(one) else str(one) for one in data[name]]
    return data


def _content(
    compared: Comparison,
    rows: pd.DataFrame,
    samples: pd.DataFrame,
    folder: Path,
    models: Mapping[str, ModelSize],
) -> dict[str, Any]:
    """Return what a report says, in the order it says it."""
    panels: list[dict[str, Any]] = []
    settings = list(compared.panels())
    for place, (key, lines) in enumerate(settings):
        words = tables.setting(key)
        top = lines[lines.index.isin(compared.headline.index)]
        suffix = f"-{place + 1}" if len(settings) > 1 else ""
        context = _context(words, top)
        drawn = draw_all(lines, folder / "figures", context, suffix, models, samples)
        panels.append(
            {
                "title": words,
                "slug": f"setting-{place + 1}",
                "table": tables.main_table(top),
                "league": tables.league_table(lines),
                "matched": [
                    (f"Score at equal {words}", found)
                    for cost, words in MATCHED.items()
                    if (found := matched_table(top, cost, compared.answers)) is not None
                ],
                "subtasks": tables.subtask_table(lines),
                "differences": difference_table(top),
                "break_even": break_even_table(smallest_batch(top), models),
                "figures": drawn,
            }
        )
    cells = rows.drop_duplicates("run_id")
    counts = cells["status"].value_counts()
    return {
        "title": f"topkbench: {folder.parent.name}/{folder.name}",
        "ran": [
            f"{len(cells)} cells: " + ", ".join(f"{n} {name}" for name, n in counts.items()) + ".",
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
        "panels": panels,
        "kernels": _kernels(rows, folder),
        "published": None,
        "how_to_compare": _HOW_TO_COMPARE,
        "left_out": [],
        "failures": tables.failure_table(rows),
        "environment": tables.environment_table(rows),
    }


def _kernels(rows: pd.DataFrame, folder: Path) -> dict[str, Any] | None:
    """Return what a check of the kernels on a GPU found, or None without one."""
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


def _context(words: str, lines: pd.DataFrame) -> str:
    parts = [words]
    counts = sorted({int(one) for one in lines["n"].dropna()})
    if counts and lines["score"].notna().any():
        shown = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        parts.append(f"n = {shown} samples")
    commits = sorted({part for one in lines["git_commit"] for part in one.split(", ") if part})
    return "; ".join([*parts, f"commit {', '.join(commits) or 'unknown'}"]) + "."


def _markdown(content: dict[str, Any]) -> str:
    parts = [f"# {content['title']}", "## What ran", *(f"- {one}" for one in content["ran"])]
    parts += [f"- **Note:** {one}" for one in content["notes"]]
    for panel in content["panels"]:
        parts += [f"## {panel['title']}", panel["table"].markdown()]
        if panel["league"] is not None:
            parts += ["### League", panel["league"].markdown(), content["how_to_rank"]]
        for title, table in panel["matched"]:
            parts += [f"### {title}", table.markdown(), content["how_to_match"]]
        if panel["subtasks"] is not None:
            parts += ["### Score by sub-task", panel["subtasks"].markdown()]
        if panel["differences"] is not None:
            parts += ["### Differences, paired by seed", panel["differences"].markdown()]
        if panel["break_even"] is not None:
            parts += ["### Break-even", panel["break_even"].markdown()]
        for one in panel["figures"]:
            parts.append(_shown(one))
    if content["kernels"] is not None:
        parts += ["## Kernels", content["kernels"]["how_to_read"]]
        for title, table in content["kernels"]["tables"]:
            parts += [f"### {title}", table.markdown()]
        parts += [_shown(one) for one in content["kernels"]["figures"]]
    if content["left_out"]:
        parts += ["## Published numbers beside ours", content["how_to_compare"]]
        parts += [content["published"].markdown()] if content["published"] is not None else []
        parts += [f"- {one}" for one in content["left_out"]]
    if content["failures"] is not None:
        parts += ["## Failures and skips", content["failures"].markdown()]
    parts += ["## Environment", content["environment"].markdown()]
    parts += ["## How to read this", content["how_to_read"]]
    text = "\n\n".join(parts) + "\n"
    return re.sub(r"(\n- [^\n]*)\n(?=\n- )", r"\1", text)


def _shown(one: Drawn) -> str:
    link = f"figures/{one.name}"
    words = f"**{one.title}.** {one.caption} [svg]({link}.svg), [data]({link}.csv)"
    return f"![{one.title}]({link}.png)\n\n{words}"


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
    """Return a figure as a data address: the file needs nothing beside it."""
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
        help="whole models that the bound on a decode step is told for (default: %(default)s)",
    )
    parser.add_argument(
        "--published",
        action="store_true",
        help="lay the paper's published numbers beside ours, and say what can be compared",
    )
    options = parser.parse_args(arguments)
    try:
        models = model_sizes(options.models)
        print(build(options.results, options.out, models, options.published))
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
