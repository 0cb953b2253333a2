"""Write ``docs/real_league.md``, its figure and README's table: every method on SmolLM2.

python tools/make_real_league.py

The parts of ``experiment=real_league`` are files in ``analysis/measured/epyc_zen4_league``: a
sub-task each, and the loss on text.
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
from topkbench.analysis.comparison.stats import MEAN, pair, paired_interval  # noqa: E402
from topkbench.analysis.figures.pareto import FRONT_WORDS, OVERLAP_WORDS  # noqa: E402
from topkbench.analysis.figures.plots import draw_all  # noqa: E402
from topkbench.analysis.report.build import load  # noqa: E402
from topkbench.analysis.tables.overview import subtask_table  # noqa: E402
from topkbench.analysis.tables.table import Table, with_interval  # noqa: E402
from topkbench.tools.readme import with_table  # noqa: E402

FOLDER = ROOT / "analysis" / "measured" / "epyc_zen4_league"
SUBTASKS = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multivalue")
BUDGETS = (64, 256)
NATIVE = "niah_single_2"
README = ROOT / "README.md"
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
means over four sub-tasks of RULER with 8 samples each: a needle in repeated sentences
(`niah_single_1`) and in prose (`niah_single_2`), a long one in prose (`niah_single_3`), and four
values of one key (`niah_multivalue`); on the others full attention [scores less](ruler.md) at this
length. The loss on text is that of 8 windows, over full attention's. The first two of 30 layers
are dense for every method (`protocol=unified`), and all keep the same sinks and recents. All
learned weights are of 7 texts of 4,096 tokens, HATA's of 128 bits, one seed; those of HATA as
published, of the ranking recipe, Loki and Double Sparsity [ship](../models/smollm2/README.md).
Read/step is what one decode step reads in all layers. Brackets are 95% intervals.

{table}

![Score against bytes read for each token, four sub-tasks, unified protocol]({figure})

{front} {overlap} The three curves of HATA are, from left to right, the orthonormal projection, as
published, and the ranking recipe. Grey: methods that are not compared more closely.

{read}

## By sub-task

{subtasks}

Bold: the best score of a budget and those that are not significantly below it, where any is.

## Under the published rules

`protocol=native k={large}` on `{native}` alone: each method as its paper has it, with its own dense
layers, sinks and recents, beside the scores of the unified protocol. 8 samples, HATA's ranking
recipe before its weights were rounded; the other sub-tasks were not measured under these rules.

{under}
"""
READ = """To read it:

- With {small} of 4,096 tokens no method answers all that full attention answers, the exact top-k
  included. With {large}, the interval of the difference to full attention excludes 0 for
  {below}; it does not for {level}.
- Finding more of the exact top-k need not be answering more. HATA's ranking recipe finds {recall}
  of the exact top {large} and its orthonormal projection {plain_recall}; the orthonormal
  projection's score is higher by {gap} points at `k={small}` and by {gap_large} at `k={large}`. On
  text the ranking recipe is ahead: its loss at `k={small}` is below that of all methods but
  {better}.
- SnapKV, H2O and SpAtten drop tokens before the question is known, which is decoded with the
  method here; they score {dropped} at most.
- Methods next to one another are rarely told apart by 4 × 8 answers.
"""


@functools.cache
def league_of(task: str) -> Comparison:
    """Return the comparison of the parts of a task, ``ruler`` or ``perplexity``, as one sweep."""
    names = SUBTASKS if task == "ruler" else ("perplexity",)
    rows = pd.concat([load(FOLDER / f"{name}.csv")[0] for name in names], ignore_index=True)
    samples = [pd.read_parquet(FOLDER / "samples.parquet")]
    # The ranking recipe was measured again with the weights that ship.
    by_ranking = load(FOLDER / f"ranking_{task}.csv")[0]
    by_ranking = by_ranking[by_ranking["method"].eq("hata") & by_ranking["rbit"].eq(128)]
    rows = pd.concat([rows[rows["p_recipe"].ne("ranking")], by_ranking], ignore_index=True)
    samples.append(pd.read_parquet(FOLDER / f"ranking_{task}.samples.parquet"))
    # In rows of the first commit the digest depends on the sub-tasks; now it does not.
    rows["config_digest"] = None
    return compare(rows, pd.concat(samples, ignore_index=True))


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


def league(short: bool = False) -> Table:
    """Return the page's first table, ranked by the score at the larger budget.

    Args:
        short: Leave out columns, as for README.
    """
    unified, text = league_of("ruler"), league_of("perplexity")
    columns = [
        *((f"Score, k={k}", means(unified, k), "score") for k in BUDGETS),
        *((f"Loss on text, k={k} (nats/token)", means(text, k), "nll_delta") for k in BUDGETS),
        ("Recall@256", means(unified, 256), "recall_at_k"),
        ("Read/step, k=256 (MiB)", means(unified, 256), "bytes_read_per_step"),
    ]
    if short:
        columns = [one for one in columns if one[2] != "recall_at_k"]
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
    if column in ("score", "nll_delta"):
        return with_interval(configuration, column)[0]
    return METRICS[column].text(configuration[column].iloc[0])


def under_published_rules() -> Table:
    """Return the table of one sub-task's scores under both protocols, and the bytes."""
    own = FOLDER / f"native_{NATIVE}.csv"
    native = compare(load(own)[0], pd.read_parquet(own.with_suffix(".samples.parquet")))
    configurations = league_of("ruler").configurations
    unified = configurations[configurations["subtask"].eq(NATIVE)]
    # The mean of one sub-task, which has the bytes.
    both = unified, native.configurations[native.configurations["subtask"].eq(MEAN)]
    under = [
        {name_of(one): part.loc[[index]] for index, one in part.iterrows()}
        for part in (one[one["k"].eq(BUDGETS[1]) | one["k"].isna()] for one in both)
    ]
    names = sorted(under[1], key=lambda one: -float(under[1][one]["score"].iloc[0]))
    heads = ["Score, unified", "Score, native", "Read/step, native (MiB)"]
    columns = ((under[0], "score"), (under[1], "score"), (under[1], "bytes_read_per_step"))
    rows = [[name, *(cell_of(of[name], column) for of, column in columns)] for name in names]
    return Table(["Method", *heads], rows, words={0})


def read() -> str:
    """Return what the tables say, in words."""
    unified, text = league_of("ruler"), league_of("perplexity")
    small, large = (means(unified, k) for k in BUDGETS)
    methods = [name for name in large if name != "Full attention"]
    assert all(
        one["score"].iloc[0] < small["Full attention"]["score"].iloc[0]
        for name, one in small.items()
        if name in methods
    )
    below = [name for name in methods if large[name]["delta_ci_high"].iloc[0] < 0]
    level = [name for name in methods if name not in below]
    ranking, plain = HATA["trained", "ranking"], HATA["orthonormal", "published"]
    losses = {name: float(one["nll_delta"].iloc[0]) for name, one in means(text, 64).items()}
    ahead = [
        name for name in sorted(methods, key=losses.__getitem__) if losses[name] < losses[ranking]
    ]
    return READ.format(
        small=BUDGETS[0],
        large=BUDGETS[1],
        below=listed(below),
        level=listed(level),
        recall=METRICS["recall_at_k"].text(large[ranking]["recall_at_k"].iloc[0]),
        plain_recall=METRICS["recall_at_k"].text(large[plain]["recall_at_k"].iloc[0]),
        gap=difference(small[plain], small[ranking]),
        gap_large=difference(large[plain], large[ranking]),
        dropped=max(
            f"{one[name]['score'].iloc[0]:.1f}"
            for one in (small, large)
            for name in ("SnapKV", "H2O", "SpAtten")
        ),
        better=listed(ahead),
    )


def listed(names: list[str]) -> str:
    """Return names as a list in a sentence; those with a comma of their own keep it in brackets."""
    shown = [one.replace(", ", " (", 1) + ")" if ", " in one else one for one in names]
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else "".join(shown)


def difference(one: pd.DataFrame, other: pd.DataFrame) -> str:
    """Return the paired difference of two configurations' scores, with its interval."""
    answers = league_of("ruler").answers
    first, second = (answers[part["configuration_id"].iloc[0]] for part in (one, other))
    pairs = pair(first, second)
    found = paired_interval(pairs["score"], pairs["other"], pairs["subtask"])
    return f"{found.estimate:.1f} [{found.low:.1f}, {found.high:.1f}]".replace("-", "−")


def page() -> str:
    """Return the whole page."""
    unified = league_of("ruler")
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
        front=FRONT_WORDS,
        overlap=OVERLAP_WORDS,
        read=read(),
        subtasks=table.markdown(),
        large=BUDGETS[1],
        native=NATIVE,
        under=under_published_rules().markdown(),
    )


def readme(text: str) -> str:
    """Return README's text with the table between its marks."""
    return with_table(text, "make_real_league.py", "league", league(short=True).markdown())


def draw() -> None:
    """Draw the figure of score against cost, and copy it to ``docs/``."""
    with tempfile.TemporaryDirectory() as folder:
        ((_, configurations),) = league_of("ruler").by_setting()
        (figure,) = draw_all(configurations, Path(folder), "", only="score_vs_bytes")
        shutil.copy(figure.png, ROOT / "docs" / FIGURE)


if __name__ == "__main__":
    (ROOT / "docs" / "real_league.md").write_text(page(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    draw()
