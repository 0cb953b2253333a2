"""Write ``docs/league.md`` and its figures from measured rows.

python tools/make_league.py analysis/measured/MACHINE/league.csv

The rows of ``experiment=matched_bytes`` are read from ``matched_bytes.csv`` in the same folder.
"""

import functools
import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # lets the script run without installing the package, as run.py does
    sys.path[0] = str(ROOT / ".types")

from topkbench.analysis import style  # noqa: E402
from topkbench.analysis.comparison.configurations import Comparison, compare  # noqa: E402
from topkbench.analysis.comparison.metrics import METRICS  # noqa: E402
from topkbench.analysis.comparison.stats import MEAN  # noqa: E402
from topkbench.analysis.comparison.timings import timed_text, timing_notes  # noqa: E402
from topkbench.analysis.figures.plots import draw_all  # noqa: E402
from topkbench.analysis.report.build import load  # noqa: E402
from topkbench.analysis.tables.matched import MATCHED, matched_table  # noqa: E402
from topkbench.analysis.tables.overview import league_table  # noqa: E402
from topkbench.analysis.tables.table import Table, with_interval  # noqa: E402

BUDGETS = (64, 512)  # the budgets of the page's first table; the others have all
SHOWN = (
    ("Unified", "sparse", "unified"),
    ("Native", "sparse", "native"),
    ("Question prefilled", "dense", "unified"),
)
QUESTIONS = {"sparse": "the question decoded with the method", "dense": "the question prefilled"}
HEAD = """# League

Made by `python tools/make_league.py {rows}` from the rows in [`{rows}`](../{rows}); their
[README](../{folder}/README.md) names the machine and the commands that measured them. Scores are
means over seven sub-tasks in the manner of RULER with 95% intervals over samples; the worst
sub-task is the one where a method loses most to full attention. Decode time is that of the whole
model's step as a multiple of full attention's, timed alternately with it, with 95% intervals over
those pairs; below 1 is faster. In the figures, faint points are dominated, of points that overlap
one is drawn smaller, on top of the other, and the vertical bars of the front are 95% intervals of
its scores. The differences were recorded with bootstrap intervals, which are narrower where few
samples differ than those that a run gives now.
"""
FIRST = """## Every method at a glance

The league ranks every method by score, under both protocols and at four budgets, with the question
either decoded with the method or prefilled: `python run.py experiment=league` (10 samples per
sub-task, 4,096 tokens; 35 min on 2 threads of an AMD EPYC, commit f244a86). InfiniGen, and MagicPIG
and PQCache under the native protocol, were measured again at commit e3cb3c3 on an older EPYC, after
they were changed to do what their authors' code does. Scores have 95% intervals. The last three
columns are for the first score column (unified, `k=64`, question decoded). The model is
[the shipped one](../models/tiny/README.md), of 1.4 M parameters; on a real one there are
[likelihoods of text](perplexity.md) and [RULER](ruler.md). The mean is near 55 because the model
answers the four retrieval sub-tasks well and the other three hardly at all.

{table}

To read the table:

- **Unified protocol.** No layer of this model is dense, all methods keep the same sinks and
  recents, and the queries of a KV head share one selection.
- **Native protocol.** Each method follows its paper, except that StreamingLLM keeps the tokens'
  original positions. Layers 0 and 1, half of this model, are dense for HATA, Quest, Double
  Sparsity, Twilight, InfiniGen and the exact top-k, and layer 0 is dense for MagicPIG. These native
  rows read 6 to 13 MiB per step, so do not compare them with others at the same `k`.
- **MagicPIG** attends to a sample of tokens, weighted so that the sample stands for all tokens.
- **SnapKV** selects at the end of the prefill, so it has not seen a question that is decoded. With
  the question prefilled it loses 12.6 points at `k=64` and half a point at 512.
- **H2O and SpAtten** keep tokens that received attention earlier, which favours early tokens. This
  model attends to the requested tokens only when it answers. SpAtten also has no recents of its own
  that would keep the question.
- **Times** are those of a small model at 4,096 tokens, where attention is a small part of a step.
  [Time of a decode step](speed.md) shows what a method gains in an attention layer.
"""
EQUAL = """## At equal cost

The unified protocol with the question decoded, at budgets from 32 to 1,024 tokens
([rows](../{rows})): each method's score at a given cost, interpolated between its budgets over the
logarithm of the cost; – if all its budgets cost more or all cost less. The report of
`experiment=matched_bytes` also has intervals over samples.

![Score against cost, six budgets](matched_bytes.png)
"""


def page(rows: Path) -> str:
    """Return the whole page."""
    path = rows.resolve().relative_to(ROOT)
    parts = [HEAD.format(rows=path.as_posix(), folder=path.parent.as_posix())]
    # Each section has one question setting, so notes on a mix of them do not apply; the page says
    # itself what is missing without samples.
    unneeded = ("question settings", "no samples")
    notes = [one for one in compared(rows).notes if not any(word in one for word in unneeded)]
    parts += [f"{note}\n" for note in notes]
    parts.append(FIRST.format(table=first_table(compared(rows).configurations).markdown()))
    for key, configurations in compared(rows).by_setting():
        league = league_table(configurations)
        if league is not None:
            title = f"{key['protocol'].capitalize()}, {QUESTIONS[key['question']]}"
            figure = f"![{title}: score against cost]({figure_name(key)})"
            parts.append(f"## {title}\n\n{figure}\n\n{league.markdown()}\n")
    parts.append(equal_costs(path.with_name("matched_bytes.csv")))
    return "\n".join(parts)


def equal_costs(path: Path) -> str:
    """Return the page's section that compares methods at equal cost."""
    configurations = compared(ROOT / path).overall
    parts = [EQUAL.format(rows=path.as_posix())]
    for cost, label in MATCHED.items():
        table = matched_table(configurations, cost, {})
        assert table is not None  # budgets are swept
        parts.append(f"### Score at equal {label}\n\n{table.markdown()}\n")
    return "\n".join(parts)


@functools.cache
def compared(rows: Path) -> Comparison:
    """Return the comparison computed from a file of rows."""
    return compare(load(rows)[0])


def figure_name(key: dict[str, str]) -> str:
    """Return the file name of the figure for a protocol and question setting."""
    return f"league_{key['protocol']}_{key['question']}.png"


def first_table(configurations: pd.DataFrame) -> Table:
    """Return the page's first table: each method's scores, worst sub-task, bytes and time."""
    means = configurations[configurations["subtask"] == MEAN]
    first, question, protocol = SHOWN[0]
    heads = ["Method", *(f"{name}, k={k}" for name, _, _ in SHOWN for k in BUDGETS)]
    heads += [f"{first}, k={BUDGETS[0]}: worst sub-task", "Read/step (MiB)", "Step (× full)"]
    ranked: list[tuple[float, list[str]]] = []
    timed: list[pd.DataFrame] = []
    for method in means["method"].unique():
        of_method = means[means["method"] == method]
        cells = [style.style(method).label]
        for _, shown_question, shown_protocol in SHOWN:
            for k in BUDGETS:
                cells.append(_score(of_method, shown_question, shown_protocol, k))
        at_budget = _at_budget(of_method, question, protocol, BUDGETS[0])
        configuration = at_budget.iloc[0]
        losses = configurations[
            (configurations["configuration_id"] == configuration["configuration_id"])
            & configurations["delta_full"].notna()
        ]
        losses = losses[losses["subtask"] != MEAN].sort_values("delta_full", kind="stable")
        worst = "–"
        if len(losses):
            points = METRICS["delta_full"].text(losses["delta_full"].iloc[0])
            worst = f"{points} ({losses['subtask'].iloc[0]})"
        cells += [worst, METRICS["bytes_read_per_step"].text(configuration["bytes_read_per_step"])]
        cells += timed_text(at_budget.head(1), "decode_vs_full")
        timed.append(at_budget.head(1))
        ranked.append((-1 if method == "full" else 100 - configuration["score"], cells))
    rows = [cells for _, cells in sorted(ranked)]
    notes = timing_notes(pd.concat(timed))
    return Table(heads, rows, words={0, len(heads) - 3}, notes=notes)


def _at_budget(of_method: pd.DataFrame, question: str, protocol: str, k: int) -> pd.DataFrame:
    """Return a method's configuration at a budget; full attention has one for all budgets."""
    configurations = of_method[of_method["question"] == question]
    if of_method["k"].isna().all():
        return configurations
    return configurations[(configurations["protocol"] == protocol) & (configurations["k"] == k)]


def _score(of_method: pd.DataFrame, question: str, protocol: str, k: int) -> str:
    configurations = _at_budget(of_method, question, protocol, k)
    return with_interval(configurations, "score")[0] if len(configurations) else "–"


def draw(configurations: pd.DataFrame, name: str) -> None:
    """Draw the figure of score against cost and copy it to ``docs/``."""
    with tempfile.TemporaryDirectory() as folder:
        (figure,) = draw_all(configurations, Path(folder), "", only="score_vs_cost")
        shutil.copy(figure.png, ROOT / "docs" / name)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    (ROOT / "docs" / "league.md").write_text(page(source), encoding="utf-8")
    for key, configurations in compared(source).by_setting():
        draw(configurations, figure_name(key))
    draw(compared(source.with_name("matched_bytes.csv")).configurations, "matched_bytes.png")
