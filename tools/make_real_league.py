"""Write ``docs/real_league.md`` and its figure: every method on SmolLM2, from measured rows.

python tools/make_real_league.py

The parts of ``experiment=real_league`` are files in ``analysis/measured/epyc_zen4_league``: a
sub-task each under the unified protocol and under the native one, and the loss on text.
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

from topkbench.analysis.comparison.configurations import Comparison, compare  # noqa: E402
from topkbench.analysis.comparison.metrics import METRICS  # noqa: E402
from topkbench.analysis.comparison.stats import MEAN  # noqa: E402
from topkbench.analysis.figures.plots import draw_all  # noqa: E402
from topkbench.analysis.report.build import load  # noqa: E402
from topkbench.analysis.tables.overview import subtask_table  # noqa: E402
from topkbench.analysis.tables.table import Table, with_interval  # noqa: E402

FOLDER = ROOT / "analysis" / "measured" / "epyc_zen4_league"
SUBTASKS = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multivalue")
BUDGETS = (64, 256)
FIGURE = "real_league.png"
HATA = {  # what tells the variants of hata apart in the rows
    ("trained", "published"): "HATA as published",
    ("orthonormal", "published"): "HATA, orthonormal, centred keys",
    ("trained", "ranking"): "HATA, ranking recipe",
}
TEXT = """# Every method on SmolLM2

Made by `python tools/make_real_league.py` from [these rows](../{folder}/README.md), which name the
machine, commits and commands. SmolLM2-135M-Instruct in 4 bits, 4,096 tokens, the question decoded
with the method (`python run.py experiment=real_league`, and `real_league_perplexity`). Scores are
means over four sub-tasks of RULER with 8 samples each, those that the model answers with full
attention: a needle in repeated sentences (`niah_single_1`) and in prose (`niah_single_2`), a long
one in prose (`niah_single_3`), and four values of one key (`niah_multivalue`). The loss on text is
that of 8 windows, over full attention's. Unified: the first two of 30 layers are dense for every
method, and all keep the same sinks and recents. Native: each as its paper has it. All learned
weights are of 7 texts of 4,096 tokens, HATA's of 128 bits, one seed. Brackets are 95% intervals.

{table}

– Not measured or not defined: full attention has no budget.

![Score against bytes read for each token, four sub-tasks, unified protocol]({figure})

{read}

## By sub-task

{subtasks}

{notes}
"""
READ = ""


@functools.cache
def parts(*names: str) -> Comparison:
    """Return the comparison of some parts as one sweep."""
    found = [load(FOLDER / f"{name}.csv") for name in names]
    rows = pd.concat([one[0] for one in found], ignore_index=True)
    samples = [one[1] for one in found if one[1] is not None]
    # In rows of this commit the digest depends on the sub-tasks; now it does not.
    rows["config_digest"] = None
    return compare(rows, pd.concat(samples, ignore_index=True) if samples else None)


def name_of(configuration: pd.Series) -> str:
    """Return a method's name in the page's tables."""
    if configuration["method"] != "hata":
        return str(configuration["label"]).partition(" (")[0]
    return HATA[configuration["p_weights"], configuration["p_recipe"]]


def means(compared: Comparison, k: int) -> dict[str, pd.DataFrame]:
    """Return each method's mean at a budget, full attention's with every budget."""
    overall = compared.overall
    kept = overall[(overall["subtask"] == MEAN) & (overall["k"].eq(k) | overall["k"].isna())]
    return {name_of(one): kept.loc[[index]] for index, one in kept.iterrows()}


def league() -> Table:
    """Return the page's first table, ranked by the score at the larger budget."""
    unified = parts(*SUBTASKS)
    native = parts(*(f"native_{name}" for name in SUBTASKS))
    text = parts("perplexity")
    columns = [
        *((f"Unified, k={k}", means(unified, k), "score") for k in BUDGETS),
        ("Native, k=256", means(native, 256), "score"),
        *((f"Loss on text, k={k} (nats/token)", means(text, k), "delta_nll") for k in BUDGETS),
        ("Recall@256", means(unified, 256), "recall_at_k"),
        ("Read/step, k=256 (MiB)", means(unified, 256), "bytes_read_per_step"),
    ]
    first = means(unified, 256)
    scores = {name: float(one["score"].iloc[0]) for name, one in first.items()}
    ranked = sorted(scores, key=lambda name: (name != "Full attention", -scores[name]))
    rows = []
    for name in ranked:
        cells = [name]
        for _, found, column in columns:
            one = found.get(name)
            cells.append("–" if one is None else cell_of(one, column))
        rows.append(cells)
    return Table(["Method", *(head for head, _, _ in columns)], rows, words={0})


def cell_of(configuration: pd.DataFrame, column: str) -> str:
    """Return a number with its interval, if it has one."""
    if pd.isna(configuration[column].iloc[0]):
        return "–"
    if column in ("score", "delta_nll"):
        return with_interval(configuration, column)[0]
    return METRICS[column].text(configuration[column].iloc[0])


def page() -> str:
    """Return the whole page."""
    unified = parts(*SUBTASKS)
    configurations = unified.configurations
    configurations = configurations.assign(
        label=[name_of(one) for _, one in configurations.iterrows()]
    )
    table = subtask_table(configurations)
    assert table is not None
    return TEXT.format(
        folder=FOLDER.relative_to(ROOT).as_posix(),
        table=league().markdown(),
        figure=FIGURE,
        read=READ,
        subtasks=table.markdown(),
        notes="\n\n".join(unified.notes),
    )


def draw() -> None:
    """Draw the figure of score against cost, and copy it to ``docs/``."""
    with tempfile.TemporaryDirectory() as folder:
        configurations = parts(*SUBTASKS).configurations
        (figure,) = draw_all(configurations, Path(folder), "", only="score_vs_cost")
        shutil.copy(figure.png, ROOT / "docs" / FIGURE)


if __name__ == "__main__":
    (ROOT / "docs" / "real_league.md").write_text(page(), encoding="utf-8")
    draw()
