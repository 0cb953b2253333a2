"""Write README's table of methods and ``docs/methods.md``: python tools/make_methods.py.

Both are made from the methods' docstrings and from ``conf/method/``.
"""

import inspect
import re
import sys
import textwrap
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # lets the script run without installing the package, as run.py does
    sys.path[0] = str(ROOT / ".types")

from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from topkbench.analysis import style  # noqa: E402
from topkbench.harness.main import make_method  # noqa: E402
from topkbench.harness.settings import APPEARANCE  # noqa: E402
from topkbench.methods.base import AnyMethod, Geometry, kv_bytes  # noqa: E402
from topkbench.methods.learning import LearningMethod, artifact_spec  # noqa: E402
from topkbench.tasks.ruler_words_prompts import SUBTASKS, CalibrationPrompts  # noqa: E402
from topkbench.tasks.words import word_pools  # noqa: E402
from topkbench.tools.readme import with_table  # noqa: E402

PAGE, README = ROOT / "docs" / "methods.md", ROOT / "README.md"
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

HEAD = f"""# Methods

Generated from the methods' docstrings and from `conf/method/` by `python tools/make_methods.py`;
edit those, not this page. The [README](../README.md) describes how to compare methods,
[CONTRIBUTING.md](../CONTRIBUTING.md#a-method) what a method consists of.

Bytes are given for one layer at Llama-3.1-8B's geometry in 16 bits ({LLAMA.num_kv_heads} KV
heads of {LLAMA.head_dim}), where a token's keys and values take {kv_bytes(LLAMA, 1):,}. The bytes
that a step reads are given at {LENGTH:,} tokens and `k={BUDGET}` with one selection per KV head,
as a share of what full attention reads. The policy of `protocol=native` is in each method's
configuration file; under `protocol=unified` all methods share `conf/protocol/unified.yaml`.

A method that learns is fitted on the texts that `calibration=` names: by default prompts that
share no key, value or filler word with any test (`tasks/ruler_words_prompts.py`). The time to
capture data at prefill and to compute on it is part of `build_ms`.
"""


def page() -> str:
    """Return the page on methods."""
    with composing():
        return "\n".join([joined(HEAD.splitlines()) + "\n", *map(entry, style.shipped())])


def readme(text: str) -> str:
    """Return README's text with the table of methods between its marks."""
    heads = ["`method=`", "Idea", "Settings", READ, "Source"]
    with composing():
        lines = [f"| {' | '.join(cells)} |" for cells in (heads, *map(row, style.shipped()))]
    table = "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])
    return with_table(text, "make_methods.py", "methods", table)


def composing() -> AbstractContextManager[None]:
    """Return a context in which Hydra composes the configuration of this checkout."""
    GlobalHydra.instance().clear()
    return initialize_config_dir(str(ROOT / "conf"), version_base="1.3")


def configured(name: str) -> tuple[str, DictConfig, AnyMethod]:
    """Return the text of a method's YAML, its composed settings, and the method."""
    text = (ROOT / "conf" / "method" / f"{name}.yaml").read_text(encoding="utf-8")
    config = compose("config", overrides=[f"method={name}"]).method
    return text, config, make_method(config)


def row(name: str) -> list[str]:
    """Return the cells of a method's row in README: name, idea, settings, bytes, paper."""
    text, _, method = configured(name)
    sections = docstring(type(method))
    idea = re.split(r"(?<=[.])\s", sections[""])[0].removesuffix(".")
    paper = re.search(r"arXiv:(\d{4}\.\d{4,5})", sections.get("Source", ""))
    source = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else ""
    read = re.search(rf"^# {READ}: (.+)$", text, re.MULTILINE)
    if read is None:
        raise ValueError(f"conf/method/{name}.yaml must have a line '# {READ}: ...'.")
    cells = [f"`{name}`", idea, ", ".join(main_knobs(text, type(method))), read[1], source]
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
    """Return the page's section on one method."""
    text, config, method = configured(name)
    sections = docstring(type(method))
    parts = [f"## {style.style(name).label}", f"`method={name}`, [code](../methods/{name}.py)"]
    parts.append(sections.pop(""))
    sections.pop("Attributes", None)
    parts += [f"**{title}.** {content}" for title, content in sections.items()]
    if rows := knobs(text, config):
        parts.append("\n".join(["| Knob | Default | Meaning |", "|---|---|---|", *rows]))
    parts.append(f"**Costs.** {costs(method)}")
    if isinstance(method, LearningMethod) and method.artifact_spec(LLAMA) is not None:
        parts.append(f"**Calibration.** {calibration(method)}")
    if method.selects:
        native = ", ".join(f"`{key}={value}`" for key, value in config.native.items())
        parts.append(f"**Native policy.** {native or 'The defaults of `protocol=native`.'}")
    return "\n\n".join(parts) + "\n"


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
    """Write the page and README's table."""
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE, README, sep="\n")


if __name__ == "__main__":
    main()
