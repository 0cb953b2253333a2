"""Write ``docs/columns.md``, what the columns of a row mean: python tools/make_columns.py.

It is made from their declarations in ``analysis/record/row.py`` and from
``analysis/comparison/metrics.py``.
"""

import ast
import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # lets the script run without installing the package, as run.py does
    sys.path[0] = str(ROOT / ".types")

from topkbench.analysis.comparison.metrics import METRICS  # noqa: E402
from topkbench.analysis.record.column import Metric  # noqa: E402
from topkbench.analysis.record.row import DECLARED, Row  # noqa: E402
from topkbench.analysis.tables.table import in_markdown  # noqa: E402

PAGE = ROOT / "docs" / "columns.md"
HEAD = """# Columns of a row

A row is one cell and one sub-task; a cell with sub-tasks also has a row `mean`. `rows.csv` and
`rows.parquet` have the columns below, and one `p_NAME` for each setting of the method, the policy
and the fit that has no column of its own. A value that was not requested, not measured or has no
meaning is empty. The page is generated from the declarations in
[`analysis/record/row.py`](../analysis/record/row.py) by `python tools/make_columns.py`; edit those,
not this page.

"Better" says which way is better, "shown as" how tables and figures name the column.
"""
KINDS = {
    "fact": "Names, settings and counts",
    "result": "What came out",
    "paired": "Compared with full attention on the same samples, and intervals",
    "speed": "Times, and what is derived from them",
}


def meanings() -> dict[str, str]:
    """Return the docstring of each field of a row, on one line, with single backquotes."""
    (row,) = ast.parse(inspect.getsource(Row)).body
    assert isinstance(row, ast.ClassDef)
    found: dict[str, str] = {}
    name = ""
    for node in row.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            found[name] = " ".join(str(node.value.value).replace("``", "`").split())
    return found


def page() -> str:
    """Return the page."""
    text = meanings()
    parts = [HEAD]
    for kind, title in KINDS.items():
        rows = [line(name, one, text[name]) for name, one in DECLARED.items() if one.kind == kind]
        parts.append(table(title, rows))
    rows = [
        line(name, one, one.curve.reading)
        for name, one in METRICS.items()
        if name not in DECLARED and one.curve is not None
    ]
    parts.append(table("Derived when a report is made", rows))
    return "\n".join(parts)


def line(name: str, one: Metric, meaning: str) -> str:
    """Return a column's line of a table."""
    shown = in_markdown(one.axis) if one.label else ""
    return f"| `{name}` | {meaning.replace('|', chr(92) + '|')} | {shown} | {one.better or ''} |"


def table(title: str, rows: list[str]) -> str:
    """Return a section with a table."""
    return "\n".join(
        [
            f"## {title}\n",
            "| Column | Meaning | Shown as | Better |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
