"""Write ``docs/methods.md`` from docstrings and settings: python tools/make_methods.py."""

import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # a bare checkout works too, as for run.py
    sys.path[0] = str(ROOT / ".types")

from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from hydra.utils import instantiate  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from topkbench.analysis import style  # noqa: E402
from topkbench.harness.calibration import MAX_LENGTH, NUM_SEQUENCES  # noqa: E402
from topkbench.methods.base import Geometry, TopKMethod, kv_bytes  # noqa: E402
from topkbench.tasks.ruler_prompts import SUBTASKS, CalibrationPrompts  # noqa: E402
from topkbench.tasks.words import word_pools  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
LLAMA = Geometry(num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128)
LENGTH, BUDGET = 131_072, 2_048
# Settings that are the same for every method, or have a paragraph of their own.
NO_KNOB = {"_target_", "impl", "native", "defaults"}
NEEDS = {
    "query_tail": "the prompt's last queries",
    "column_sums": "the attention that each token of the prompt received",
    "previous_query": "this layer's queries, foretold from the layer before",
}
SECTION = re.compile(r"^([A-Z][\w' ]*):$")

HEAD = f"""# Methods

Made from the methods' docstrings and from `conf/method/` by `python tools/make_methods.py`; edit
those, not this page. How to compare them is in the [README](../README.md), what a method
consists of in [CONTRIBUTING.md](../CONTRIBUTING.md#a-method).

Bytes are those of one layer at Llama-3.1-8B's geometry in 16 bits ({LLAMA.num_kv_heads} KV
heads of {LLAMA.head_dim}), where a token's keys and values take {kv_bytes(LLAMA, 1):,}. What a
step reads is at {LENGTH:,} tokens and `k={BUDGET}`, one selection per KV head, as a share of
what full attention reads. The policy of `protocol=native` is what a method's file names; under
`protocol=unified` all share `conf/protocol/unified.yaml`.

A method that learns is fitted on the texts that `calibration=` names: by default prompts that
share no key, value or filler word with any test (`tasks/ruler_prompts.py`). What is captured at
prefill, or computed from it, is timed in `build_ms`.
"""


def page() -> str:
    """Return the whole page."""
    names = [path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return "\n".join(
            [
                joined(HEAD.splitlines()) + "\n",
                *(entry(name) for name in sorted(names, key=style.order)),
            ]
        )


def entry(name: str) -> str:
    """Return what the page says of one method."""
    text = (ROOT / "conf" / "method" / f"{name}.yaml").read_text(encoding="utf-8")
    config = compose("config", overrides=[f"method={name}"]).method
    method: TopKMethod = instantiate(config)
    sections = docstring(type(method))
    parts = [f"## {style.style(name).label}", f"`method={name}`, [code](../methods/{name}.py)"]
    parts.append(sections.pop(""))
    sections.pop("Attributes", None)
    parts += [f"**{title}.** {words}" for title, words in sections.items()]
    if rows := knobs(text, config):
        parts.append("\n".join(["| Knob | Default | Meaning |", "|---|---|---|", *rows]))
    parts.append(f"**Costs.** {costs(method)}")
    if method.artifact_spec(LLAMA) is not None:
        parts.append(f"**Calibration.** {calibration(method)}")
    if method.selects:
        own = ", ".join(f"`{key}={value}`" for key, value in config.native.items())
        parts.append(f"**Native policy.** {own or 'The defaults of `protocol=native`.'}")
    return "\n\n".join(parts) + "\n"


def docstring(kind: type) -> dict[str, str]:
    """Return the sections of a docstring by their titles, the description under an empty one.

    Paragraphs are one line each; the name in double backquotes is one in single ones.
    """
    sections: dict[str, list[str]] = {"": []}
    title = ""
    for line in (inspect.getdoc(kind) or "").splitlines():
        if found := SECTION.match(line):
            title = found.group(1)
            sections[title] = []
        elif line and not line.startswith(" ") and title:
            title = ""  # back to the description
            sections[title] += ["", line]
        else:
            sections[title].append(line)
    return {title: joined(lines) for title, lines in sections.items()}


def joined(lines: list[str]) -> str:
    """Return paragraphs, each in one line."""
    text = textwrap.dedent("\n".join(lines)).strip().replace("``", "`")
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text))


def knobs(text: str, config: DictConfig) -> list[str]:
    """Return a row for each setting, with the comment of its line."""
    rows = []
    for line in text.splitlines():
        # A setting, or another method that is set in the list of defaults.
        found = re.match(r"(?:  - /method@)?(\w+):\s*(.*?)(?:\s+#\s*(.*))?$", line)
        if found is None or found.group(1) in NO_KNOB:
            continue
        name, meaning = found.group(1), (found.group(3) or "").replace("|", "\\|")
        value = found.group(2) if line.startswith(" ") else config[name]
        rows.append(f"| `{name}` | {shown(value)} | {meaning} |")
    return rows


def shown(value: Any) -> str:
    """Return a default as YAML writes it."""
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[value] if value is None or isinstance(value, bool) else value}`"


def costs(method: TopKMethod) -> str:
    """Return what a method keeps and reads, and what it needs beforehand."""
    said = []
    per_token = method.index_bytes_per_token(LLAMA)
    if per_token:
        said.append(f"Side information: {per_token:,.4g} bytes a token.")
    else:
        said.append("No side information that grows with the context.")
    if method.selects:
        share = method.bytes_read_per_step(LLAMA, LENGTH, BUDGET) / kv_bytes(LLAMA, LENGTH)
        said.append(f"A step reads {share:.1%} of what full attention does.")
    if method.artifact_spec(LLAMA) is not None:
        said.append("Learns before it is used.")
    if method.needs:
        said.append(f"Needs {' and '.join(NEEDS[one] for one in sorted(method.needs))}.")
    if method.history_dependent:
        said.append("Its index depends on what was decoded since the prompt.")
    if method.variable_budget:
        said.append("May select fewer than `k` tokens.")
    return " ".join(said)


def calibration(method: TopKMethod) -> str:
    """Return what a method that learns is fitted on, with its default settings."""
    positions = method.query_positions(0, [MAX_LENGTH] * NUM_SEQUENCES)
    (queries,) = {len(at) for at in positions}
    seen = (
        f"{queries:,} quer{'y' if queries == 1 else 'ies'} of each head" if queries else "no query"
    )
    return (
        f"{NUM_SEQUENCES} prompts of {MAX_LENGTH:,} tokens, less where the model's window is"
        f" smaller: {', '.join(f'`{name}`' for name in SUBTASKS)} in turn, seed"
        f" {CalibrationPrompts().seed}; of their own {len(word_pools()[1])} words, and of the half"
        " of the random names that no test sample draws from. In each layer it is shown every key"
        f" of a prompt and {seen}."
    )


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
