"""Write ``docs/methods.md`` from docstrings and settings: python tools/make_methods.py."""

import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # lets the script run without installing the package, as run.py does
    sys.path[0] = str(ROOT / ".types")

from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from hydra.utils import instantiate  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from topkbench.analysis import style  # noqa: E402
from topkbench.harness.calibration import MAX_LENGTH, NUM_SEQUENCES  # noqa: E402
from topkbench.methods.base import AnyMethod, Geometry, kv_bytes  # noqa: E402
from topkbench.methods.learning import LearningMethod, artifact_spec  # noqa: E402
from topkbench.tasks.ruler_prompts import SUBTASKS, CalibrationPrompts  # noqa: E402
from topkbench.tasks.words import word_pools  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
LLAMA = Geometry(num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128)
LENGTH, BUDGET = 131_072, 2_048
# Settings that are the same for every method, or described in a separate paragraph.
NO_KNOB = {"_target_", "impl", "native", "defaults"}
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
share no key, value or filler word with any test (`tasks/ruler_prompts.py`). The time to capture
data at prefill and to compute on it is part of `build_ms`.
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
    """Return the page's section on one method."""
    text = (ROOT / "conf" / "method" / f"{name}.yaml").read_text(encoding="utf-8")
    config = compose("config", overrides=[f"method={name}"]).method
    method: AnyMethod = instantiate(config)
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
        # A setting, or an inner method that the list of defaults includes.
        found = re.match(r"(?:  - /method@)?(\w+):\s*(.*?)(?:\s+#\s*(.*))?$", line)
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
    positions = method.query_positions(0, [MAX_LENGTH] * NUM_SEQUENCES)
    (count,) = {len(at) for at in positions}
    queries = f"{count:,} quer{'y' if count == 1 else 'ies'} of each head" if count else "no query"
    return (
        f"{NUM_SEQUENCES} prompts of {MAX_LENGTH:,} tokens, fewer if the model's window is"
        f" smaller: {', '.join(f'`{name}`' for name in SUBTASKS)} in turn, seed"
        f" {CalibrationPrompts().seed}; made of {len(word_pools()[1])} words, and of the half of"
        " the random names, that no test sample draws from. In each layer it is fitted on every key"
        f" of a prompt and {queries}."
    )


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
