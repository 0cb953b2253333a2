"""Write README's league, ``docs/league.md`` and its figures from the rows of a league.

The rows of ``experiment=matched_bytes`` stand beside it.

python tools/make_league.py analysis/measured/MACHINE/league.csv
"""

import functools
import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # a bare checkout works too, as for run.py
    sys.path[0] = str(ROOT / ".types")

from topkbench.analysis import style  # noqa: E402
from topkbench.analysis.configurations import Comparison, compare  # noqa: E402
from topkbench.analysis.matched import MATCHED, matched_table  # noqa: E402
from topkbench.analysis.metrics import METRICS  # noqa: E402
from topkbench.analysis.plots import draw_all  # noqa: E402
from topkbench.analysis.report import load  # noqa: E402
from topkbench.analysis.stats import MEAN  # noqa: E402
from topkbench.analysis.tables import Table, league_table, with_interval  # noqa: E402
from topkbench.analysis.timings import timed_text, timing_notes  # noqa: E402

BEGIN, END = "<!-- league: made by tools/make_league.py -->", "<!-- end of league -->"
BUDGETS = (64, 512)  # that README shows; the page has all
SHOWN = (
    ("Unified", "sparse", "unified"),
    ("Native", "sparse", "native"),
    ("Question prefilled", "dense", "unified"),
)
QUESTIONS = {"sparse": "the question decoded with the method", "dense": "the question prefilled"}
HEAD = """# League

Made from the rows in [`{rows}`](../{rows}) by `python tools/make_league.py {rows}`; what made them
is said [beside them](../{folder}/README.md). Scores are means over the sub-tasks of RULER with 95%
intervals over samples; the worst sub-task is the one where a method loses most to full attention.
Decode time is that of the whole model's step, in multiples of full attention's, timed in turn with
it, with 95% intervals over those pairs; below 1 is faster. In the figures faint points are
dominated, and points that coincide step aside.
"""
EQUAL = """## At equal cost

The same, unified and with the question decoded, at budgets from 32 to 1,024 tokens
([rows](../{rows})): each method's score between its own budgets, over the logarithm of the cost;
– where no budget of it costs as little or as much. The report of `experiment=matched_bytes` has
intervals over samples, too.

![Score against cost, six budgets](matched_bytes.png)
"""


def page(rows: Path) -> str:
    """Return the whole page."""
    path = rows.resolve().relative_to(ROOT)
    parts = [HEAD.format(rows=path.as_posix(), folder=path.parent.as_posix())]
    # A section is of one question setting.
    notes = [note for note in compared(rows).notes if "question settings" not in note]
    parts += [f"{note}\n" for note in notes]
    for key, lines in compared(rows).by_setting():
        league = league_table(lines)
        if league is not None:
            title = f"{key['protocol'].capitalize()}, {QUESTIONS[key['question']]}"
            figure = f"![{title}: score against cost]({figure_name(key)})"
            parts.append(f"## {title}\n\n{figure}\n\n{league.markdown()}\n")
    parts.append(equal_costs(path.with_name("matched_bytes.csv")))
    return "\n".join(parts)


def equal_costs(path: Path) -> str:
    """Return what the page says of methods at equal cost."""
    lines = compared(ROOT / path).overall
    parts = [EQUAL.format(rows=path.as_posix())]
    for cost, words in MATCHED.items():
        found = matched_table(lines, cost, {})
        assert found is not None  # budgets are swept
        parts.append(f"### Score at equal {words}\n\n{found.markdown()}\n")
    return "\n".join(parts)


@functools.cache
def compared(rows: Path) -> Comparison:
    """Return the lines of a file of rows."""
    return compare(load(rows)[0])


def figure_name(key: dict[str, str]) -> str:
    """Return the file name of a setting's figure."""
    return f"league_{key['protocol']}_{key['question']}.png"


def readme_table(lines: pd.DataFrame) -> Table:
    """Return the league in short: each method's scores, its worst sub-task, and what it costs."""
    means = lines[lines["subtask"] == MEAN]
    first, question, protocol = SHOWN[0]
    heads = ["Method", *(f"{name}, `k={k}`" for name, _, _ in SHOWN for k in BUDGETS)]
    heads += [f"{first}, `k={BUDGETS[0]}`: worst sub-task", "Read/step (MiB)", "Step (× full)"]
    ranked: list[tuple[float, list[str]]] = []
    priced: list[pd.DataFrame] = []
    for method in means["method"].unique():
        own = means[means["method"] == method]
        cells = [style.style(method).label]
        for _, asked, rules in SHOWN:
            for k in BUDGETS:
                cells.append(_score(own, asked, rules, k))
        known = _found(own, question, protocol, BUDGETS[0])
        line = known.iloc[0]
        lost = lines[
            (lines["configuration_id"] == line["configuration_id"]) & lines["delta_full"].notna()
        ]
        lost = lost[lost["subtask"] != MEAN].sort_values("delta_full", kind="stable")
        worst = "–"
        if len(lost):
            points = METRICS["delta_full"].text(lost["delta_full"].iloc[0])
            worst = f"{points} ({lost['subtask'].iloc[0]})"
        cells += [worst, METRICS["bytes_read_per_step"].text(line["bytes_read_per_step"])]
        cells += timed_text(known.head(1), "decode_vs_full")
        priced.append(known.head(1))
        ranked.append((-1 if method == "full" else 100 - line["score"], cells))
    rows = [cells for _, cells in sorted(ranked)]
    notes = timing_notes(pd.concat(priced))
    return Table(heads, rows, words={0, len(heads) - 3}, notes=notes)


def _found(own: pd.DataFrame, question: str, protocol: str, k: int) -> pd.DataFrame:
    """Return a method's line at a budget; full attention has one for all of them."""
    chosen = own[own["question"] == question]
    if own["k"].isna().all():
        return chosen
    return chosen[(chosen["protocol"] == protocol) & (chosen["k"] == k)]


def _score(own: pd.DataFrame, question: str, protocol: str, k: int) -> str:
    chosen = _found(own, question, protocol, k)
    return with_interval(chosen, "score", "score_ci")[0] if len(chosen) else "–"


def readme(rows: Path, text: str) -> str:
    """Return README with the league between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README must hold the marks {BEGIN} and {END}, and lacks one.")
    table = readme_table(compared(rows).configurations).markdown()
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def draw(lines: pd.DataFrame, name: str) -> None:
    """Draw a setting's figure of score against cost."""
    with tempfile.TemporaryDirectory() as folder:
        (figure,) = draw_all(lines, Path(folder), "", only="score_vs_cost")
        shutil.copy(figure.png, ROOT / "docs" / name)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    (ROOT / "docs" / "league.md").write_text(page(source), encoding="utf-8")
    document = ROOT / "README.md"
    document.write_text(readme(source, document.read_text(encoding="utf-8")), encoding="utf-8")
    for key, lines in compared(source).by_setting():
        draw(lines, figure_name(key))
    draw(compared(source.with_name("matched_bytes.csv")).configurations, "matched_bytes.png")
