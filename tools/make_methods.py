"""Write README's list of methods, ``docs/methods.md`` and a page for each: ``docs/methods/``.

python tools/make_methods.py

They are made from the methods' docstrings, from ``conf/method/`` and from measured rows.
``--figures`` also draws the pages' figures.
"""

import functools
import inspect
import re
import shutil
import sys
import tempfile
import textwrap
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # lets the script run without installing the package, as run.py does
    sys.path[0] = str(ROOT / ".types")

import pandas as pd  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from topkbench.analysis import style  # noqa: E402
from topkbench.analysis.comparison.configurations import Comparison, compare  # noqa: E402
from topkbench.analysis.comparison.stats import MEAN  # noqa: E402
from topkbench.analysis.figures.plots import draw_all  # noqa: E402
from topkbench.analysis.report.build import load  # noqa: E402
from topkbench.analysis.tables.overview import main_table  # noqa: E402
from topkbench.analysis.tables.table import Table  # noqa: E402
from topkbench.harness.main import make_method  # noqa: E402
from topkbench.harness.settings import APPEARANCE  # noqa: E402
from topkbench.methods.base import AnyMethod, Geometry, kv_bytes  # noqa: E402
from topkbench.methods.learning import LearningMethod, artifact_spec  # noqa: E402
from topkbench.tasks.ruler_words_prompts import SUBTASKS, CalibrationPrompts  # noqa: E402
from topkbench.tasks.words import word_pools  # noqa: E402
from topkbench.tools.readme import with_table  # noqa: E402

PAGE, PAGES, README = ROOT / "docs" / "methods.md", ROOT / "docs" / "methods", ROOT / "README.md"
LLAMA = Geometry(num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128)
LENGTH, BUDGET = 131_072, 2_048
# Settings that are the same for every method, or described in a separate paragraph.
NO_KNOB = {"_target_", "impl", "native", "defaults", *APPEARANCE}
# A setting, or an inner method that the list of defaults includes: name, value, comment.
KNOB = re.compile(r"(?:  - /method@)?(\w+):\s*(.*?)(?:\s+#\s*(.*))?$")
READ = "Read to select, per token and KV head"
NEEDS = {
    "query_tail": "the prompt's last queries",
    "column_sums": "the attention that each token of the prompt received",
    "previous_query": "this layer's queries, speculated from the previous layer",
}
SECTION = re.compile(r"^([A-Z][\w' ]*):$")

HEAD = """# Methods

`method=NAME` chooses the method. Each has a page: what it keeps and reads, its settings, where it
comes from, where the authors' code differs from their paper and which of the two is followed here,
and what was measured. `full` is the baseline of all comparisons, `exact` is what the other methods
approximate, and `random` is what any method should beat. `d` is the number of channels of a head.

This page and those of the methods are made by `python tools/make_methods.py` from the methods'
docstrings, from `conf/method/` and from measured rows; edit those.
"""

TAIL = f"""
The class of a method, for your own script, is the `_target_` of `conf/method/NAME.yaml`: `exact` is
`topkbench.methods.exact.ExactTopK`. A method of your own is [two files](add_a_method.md), in the
repository or in a folder of yours.

`method@method.base=loki` chooses the method inside `twilight`, and `method.base.rank=8` changes its
settings.

## How costs are given

Bytes are given for one layer at Llama-3.1-8B's geometry in 16 bits ({LLAMA.num_kv_heads} KV
heads of {LLAMA.head_dim}), where a token's keys and values take {kv_bytes(LLAMA, 1):,}. The bytes
that a step reads are given at {LENGTH:,} tokens and `k={BUDGET}` with one selection per KV head,
as a share of what full attention reads. The policy of `protocol=native` is in each method's
configuration file; under `protocol=unified` all methods share `conf/protocol/unified.yaml`. The
time to capture data at prefill and to compute on it is part of `build_ms`.

## Methods that drop tokens

Three methods drop tokens for good (`h2o`, `snapkv`, `streaming_llm`). They have two modes:

- `method.mode=masked` leaves every key and value in the cache, but the method reads only those it
  has kept. Recall and output error can be measured, and any cache works.
- `method.mode=compact` frees the memory of dropped tokens, with the same answers; the column
  `kv_cache_mib` shows the memory used. It needs topkbench's own cache and one selection per KV
  head; cells in which query heads select, as in SnapKV's native policy, are skipped. Selection
  quality cannot be measured on freed tokens, so its columns stay empty, and `selection`,
  `decode_latency` and `decode_throughput` skip this mode.

## Methods that learn

A method that learns is fitted the first time any task needs it, on the texts that `calibration=`
names: by default prompts that share no key, value or filler word with any test
(`tasks/ruler_words_prompts.py`). What it has learned is stored in a file, its artifact, and reused.
An artifact is identified by the model's weights and dtype, the tokens of the calibration prompts,
the method's settings and the version of its fit. Artifacts in your cache take precedence over those
that ship. Each layer is kept when it is fitted, so a fit that is killed goes on with the layer that
it was at.

`task=fit` only fits. It shows the loss at each step and the seconds, or says that an artifact was
found; the artifact stores its losses, data, seed, seconds and versions. `task=fit force=true` fits
again.

`calibration_memory_gib` limits the memory of captured queries and keys during a fit, by default to
half of the free memory. The model reads the prompts once for each group of layers that fits within
the limit. If the model is on a GPU, layers are fitted on all GPUs. The limit does not include one
forward pass of the model, nor what a method computes while it fits a layer.
"""

MEASURED = ROOT / "analysis" / "measured"
TEXTS = MEASURED / "epyc_zen3_1_thread" / "perplexity.csv"
ANSWERS = MEASURED / "epyc_2_threads" / "league.csv"
TEXTS_HEAD = (
    "**On SmolLM2**, likelihood of text, 4,096 tokens: `python run.py experiment=perplexity`, one "
    "thread of an AMD EPYC, commit {commit} ([all methods, and how it was measured]"
    "(../perplexity.md)). Δ NLL is the loss over full attention."
)
TEXTS_NOTES = {
    "hash_attention": " Its networks were trained for 1,000 steps a layer, a quarter of the "
    "default.",
}
ANSWERS_HEAD = (
    "**On the shipped model**, scores of answers to prompts in the manner of RULER, 4,096 tokens, "
    "unified protocol, the question decoded with the method: `python run.py experiment=league`, 2 "
    "threads of an AMD EPYC, commit {commit} ([all methods and settings](../league.md))."
)


def page() -> str:
    """Return the page on all methods."""
    heads = ["`method=`", "Idea", "Settings", READ, "Source"]
    with composing():
        rows = [row(name, "methods") for name in style.shipped()]
    return "\n".join([paragraphs(HEAD), "", table(heads, rows), "", paragraphs(TAIL), ""])


def pages() -> dict[str, str]:
    """Return the page of each method by its name."""
    with composing():
        return {name: entry(name) for name in style.shipped()}


def readme(text: str) -> str:
    """Return README's text with the list of methods between its marks."""
    with composing():
        rows = [row(name, "docs/methods") for name in style.shipped()]
    listed = table(["`method=`", "Idea", "Source"], [[*one[:2], one[-1]] for one in rows])
    return with_table(text, "make_methods.py", "methods", listed)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def paragraphs(text: str) -> str:
    """Return Markdown with each paragraph and each point of a list on one line."""
    return re.sub(r"(?<=\S)\n *(?=[^\s#-])", " ", text.strip())


def composing() -> AbstractContextManager[None]:
    """Return a context in which Hydra composes the configuration of this checkout."""
    GlobalHydra.instance().clear()
    return initialize_config_dir(str(ROOT / "conf"), version_base="1.3")


@functools.cache
def configured(name: str) -> tuple[str, DictConfig, AnyMethod]:
    """Return the text of a method's YAML, its composed settings, and the method."""
    text = (ROOT / "conf" / "method" / f"{name}.yaml").read_text(encoding="utf-8")
    config = compose("config", overrides=[f"method={name}"]).method
    return text, config, make_method(config)


def row(name: str, folder: str) -> list[str]:
    """Return the cells of a method's row: name, idea, settings, bytes, paper.

    Args:
        name: The method's name.
        folder: The folder of the methods' pages, from the document of the table.
    """
    text, _, method = configured(name)
    sections = docstring(type(method))
    idea = re.split(r"(?<=[.])\s", sections[""])[0].removesuffix(".")
    paper = re.search(r"arXiv:(\d{4}\.\d{4,5})", sections.get("Source", ""))
    source = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else ""
    read = re.search(rf"^# {READ}: (.+)$", text, re.MULTILINE)
    if read is None:
        raise ValueError(f"conf/method/{name}.yaml must have a line '# {READ}: ...'.")
    cells = [
        f"[`{name}`]({folder}/{name}.md)",
        idea,
        ", ".join(main_knobs(text, type(method))),
        read[1],
        source,
    ]
    return [cell.replace("|", "\\|") for cell in cells]


def main_knobs(text: str, kind: type) -> list[str]:
    """Return a method's settings above the first heading between them, and their choices."""
    hints = get_type_hints(kind)
    found: list[str] = []
    for line in text.splitlines():
        if found and line.startswith("# ") and not line.startswith(f"# {READ}"):
            break
        knob = KNOB.match(line)
        if knob is not None and knob[1] not in NO_KNOB:
            of = [hints[knob[1]], *get_args(hints[knob[1]])]  # the type, and those of a union
            choices = [
                str(one) for kind in of if get_origin(kind) is Literal for one in get_args(kind)
            ]
            found.append(f"`{knob[1]}{': ' if choices else ''}{', '.join(choices)}`")
    return found


def entry(name: str) -> str:
    """Return the page of one method."""
    text, config, method = configured(name)
    sections = docstring(type(method))
    parts = [f"# {style.style(name).label}", f"`method={name}`, [code](../../methods/{name}.py)"]
    parts.append(sections.pop(""))
    sections.pop("Attributes", None)
    parts += [f"**{title}.** {content}" for title, content in sections.items()]
    if rows := knobs(text, config):
        parts.append("\n".join(["| Setting | Default | Meaning |", "|---|---|---|", *rows]))
    parts.append(f"**[Costs](../methods.md#how-costs-are-given).** {costs(method)}")
    if isinstance(method, LearningMethod) and method.artifact_spec(LLAMA) is not None:
        parts.append(f"**[Calibration](../methods.md#methods-that-learn).** {calibration(method)}")
    if method.selects:
        native = ", ".join(f"`{key}={value}`" for key, value in config.native.items())
        parts.append(f"**Native policy.** {native or 'The defaults of `protocol=native`.'}")
        parts += measured(name)
    return "\n\n".join(parts) + "\n"


def measured(name: str) -> list[str]:
    """Return what a method's page shows of measured rows; nothing if there are none."""
    parts = []
    head = TEXTS_HEAD + TEXTS_NOTES.get(name, "")
    if shown := measured_on(TEXTS, name, head, ("Δ NLL", "KL", "Same token", "Read/step")):
        parts += [*shown, f"![Loss over full attention against budget, SmolLM2]({name}.svg)"]
    parts += measured_on(ANSWERS, name, ANSWERS_HEAD, ("Score", "Δ full", "Read/step"))
    return ["## Measured", *parts] if parts else []


def measured_on(path: Path, name: str, head: str, names: tuple[str, ...]) -> list[str]:
    """Return a sentence on a file of rows, and the table of a method's; nothing if it has none.

    Args:
        path: The file of rows.
        name: The method.
        head: The sentence, with a place for the rows' commits.
        names: How the headings of the columns begin that are shown besides budget and bits.
    """
    every = compared(path)
    own = settings(every.configurations)
    own = own[own["method"].eq(name)].sort_values("k", kind="stable")
    if not len(own):
        return []
    rows = settings(every.rows)
    commits = sorted({str(one)[:7] for one in rows.loc[rows["method"].eq(name), "git_commit"]})
    whole = main_table(own)
    kept = [i for i, one in enumerate(whole.head) if one in ("k", "rbit") or one.startswith(names)]
    cells = [[row[i] for i in kept] for row in whole.rows]
    shown = Table([whole.head[i] for i in kept], cells, words=set())
    return [head.format(commit=" and ".join(commits)), shown.markdown()]


def settings(data: pd.DataFrame) -> pd.DataFrame:
    """Return the means that a method's page shows: unified protocol, the question decoded."""
    unified = data["protocol"].eq("unified") | data["protocol"].isna()
    return data[data["subtask"].eq(MEAN) & data["question"].ne("dense") & unified]


@functools.cache
def compared(path: Path) -> Comparison:
    """Return the comparison computed from a file of rows."""
    return compare(load(path)[0])


def draw(name: str) -> None:
    """Draw the figure of a method's page: its curve among those of the other methods."""
    with tempfile.TemporaryDirectory() as folder:
        (figure,) = draw_all(
            settings(compared(TEXTS).configurations),
            Path(folder),
            "",
            only="nll_vs_k",
            methods=("exact", name),
        )
        shutil.copy(figure.svg, PAGES / f"{name}.svg")


def docstring(kind: type) -> dict[str, str]:
    """Return the sections of a docstring by title; the description has the empty title.

    Each paragraph becomes one line, and double backquotes become single ones.
    """
    sections: dict[str, list[str]] = {"": []}
    title = ""
    for line in (inspect.getdoc(kind) or "").splitlines():
        if found := SECTION.match(line):
            title = found.group(1)
            sections[title] = []
        elif line and not line.startswith(" ") and title:
            title = ""  # an unindented line continues the description
            sections[title] += ["", line]
        else:
            sections[title].append(line)
    return {title: joined(lines) for title, lines in sections.items()}


def joined(lines: list[str]) -> str:
    """Return text with each paragraph joined into one line."""
    text = textwrap.dedent("\n".join(lines)).strip().replace("``", "`")
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text))


def knobs(text: str, config: DictConfig) -> list[str]:
    """Return a table row for each setting, with the comment on its line as the meaning."""
    rows = []
    for line in text.splitlines():
        found = KNOB.match(line)
        if found is None or found.group(1) in NO_KNOB:
            continue
        name, meaning = found.group(1), (found.group(3) or "").replace("|", "\\|")
        value = found.group(2) if line.startswith(" ") else config[name]
        rows.append(f"| `{name}` | {shown(value)} | {meaning} |")
    return rows


def shown(value: Any) -> str:
    """Return a default as YAML writes it."""
    names = {None: "null", True: "true", False: "false"}
    return f"`{names[value] if value is None or isinstance(value, bool) else value}`"


def costs(method: AnyMethod) -> str:
    """Return sentences on what a method stores, reads per step, and needs beforehand."""
    sentences = []
    per_token = method.index_bytes_per_token(LLAMA)
    if per_token:
        sentences.append(f"The index takes {per_token:,.4g} bytes per token.")
    else:
        sentences.append("No index that grows with the context.")
    if method.selects:
        share = method.bytes_read(LLAMA, LENGTH, BUDGET) / kv_bytes(LLAMA, LENGTH)
        sentences.append(f"A step reads {share:.1%} of what full attention does.")
    if artifact_spec(method, LLAMA) is not None:
        sentences.append("Must be fitted before use.")
    traits = method.traits
    if traits.needs:
        sentences.append(f"Needs {' and '.join(NEEDS[one] for one in sorted(traits.needs))}.")
    if traits.index == "history":
        sentences.append("Its index depends on the decode steps so far.")
    if traits.variable_budget:
        sentences.append("May select fewer than `k` tokens.")
    return " ".join(sentences)


def calibration(method: LearningMethod[Any, Any]) -> str:
    """Return a sentence on what a method that learns is fitted on by default."""
    prompts = CalibrationPrompts()
    positions = method.query_positions(0, [prompts.max_length] * prompts.num_sequences)
    (count,) = {len(at) for at in positions}
    queries = f"{count:,} quer{'y' if count == 1 else 'ies'} of each head" if count else "no query"
    return (
        f"{prompts.num_sequences} prompts of {prompts.max_length:,} tokens, fewer if the model's"
        f" window is smaller: {', '.join(f'`{name}`' for name in SUBTASKS)} in turn, seed"
        f" {prompts.seed}; made of {len(word_pools()[1])} words, and of the half of"
        " the random names, that no test sample draws from. In each layer it is fitted on every key"
        f" of a prompt and {queries}."
    )


def main() -> None:
    """Write the pages and README's list; with ``--figures`` draw the pages' figures."""
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    PAGES.mkdir(exist_ok=True)
    for name, text in pages().items():
        (PAGES / f"{name}.md").write_text(text, encoding="utf-8")
        if "--figures" in sys.argv and f"]({name}.svg)" in text:
            draw(name)
    print(PAGE, PAGES, README, sep="\n")


if __name__ == "__main__":
    main()
