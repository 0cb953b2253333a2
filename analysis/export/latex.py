"""Tables and sentences as LaTeX, for packages booktabs, graphicx and, for names, UTF-8 input."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd

from topkbench.analysis.console import visible
from topkbench.analysis.tables.table import Table

_SIGNS = {
    **{"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}"},
    **{"^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}"},
    **{"|": r"\textbar{}", '"': r"\textquotedbl{}", "`": r"\textasciigrave{}"},
    **{sign: f"\\{sign}" for sign in "&%$#_"},
    # Behind the end of a row, these would belong to it.
    **{sign: f"{{{sign}}}" for sign in "[]*"},
    **{"−": "$-$", "×": r"$\times$", "±": r"$\pm$", "≤": r"$\leq$", "≥": r"$\geq$"},
    **{"Δ": r"$\Delta$", "–": "--", "—": "---", "†": r"\dag{}", "‡": r"\ddag{}"},
    **{"…": r"\dots{}", "’": "'"},
}
_INTERVAL = re.compile(r" (\{\[\}.*?\{\]\})")


def latex(text: object) -> str:
    """Return a text as LaTeX that shows it as it is, in one line."""
    line = " ".join(visible(text).split())
    return "".join(_SIGNS.get(sign, sign) for sign in line)


def table(shown: Table, caption: str, label: str) -> str:
    """Return a table as LaTeX: best values bold, intervals small, rules of booktabs.

    Args:
        shown: The table; its notes go below the caption.
        caption: What it shows, one sentence or more.
        label: What it is referred to by.
    """
    words = shown.words
    cells = [
        [latex(text) if j in words else _number(text) for j, text in enumerate(row)]
        for row in shown.rows
    ]
    # Numbered columns: two may have one heading.
    data = pd.DataFrame(cells, columns=range(len(shown.head)))
    bold = pd.DataFrame(
        [
            ["textbf: --rwrap;" if (i, j) in shown.strong else "" for j in range(len(shown.head))]
            for i in range(len(cells))
        ],
        columns=data.columns,
    )
    styler = data.style.apply(lambda _: bold, axis=None).hide(axis="index")
    styler = styler.format_index(lambda j: latex(shown.head[int(str(j))]), axis="columns")
    text: str = styler.to_latex(
        column_format="".join("l" if j in words else "r" for j in range(len(shown.head))),
        caption=" ".join([latex(caption), *map(latex, shown.notes)]),
        label=label,
        position="t",
        position_float="centering",
        hrules=True,
        environment="table*" if len(shown.head) > _MOST_IN_COLUMN else "table",
    )
    text = text.replace("\\centering\n", "\\centering\n\\footnotesize\n", 1)
    text = text.replace("\\begin{tabular}", AT_MOST_AS_WIDE + "\\begin{tabular}", 1)
    return text.replace("\\end{tabular}\n", "\\end{tabular}%\n}\n", 1)


AT_MOST_AS_WIDE = "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
"""A table that is wider than the text is scaled to its width."""

_MOST_IN_COLUMN = 5
"""Columns of a table that fits one of two columns of text."""


def _number(text: str) -> str:
    """Return a cell of numbers as LaTeX, its interval in small type."""
    return _INTERVAL.sub(r" {\\scriptsize \1}", latex(text))


def listed(values: Sequence[object]) -> str:
    """Return values in words: ``1, 2 and 3``."""
    texts = [str(one) for one in values]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
