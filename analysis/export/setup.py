"""What was run, in one sentence for each model and task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from topkbench.analysis import style
from topkbench.analysis.comparison.stats import MEAN
from topkbench.analysis.export.latex import listed
from topkbench.analysis.record.row import Status

_QUESTIONS = {"sparse": "decoded with the method", "dense": "prefilled"}
_LIBRARIES = ("torch", "transformers", "numba", "triton")


def sentences(rows: pd.DataFrame, version: str) -> list[str]:
    """Return one sentence for each model, task and origin of prompts of the rows that are ok.

    Args:
        rows: The rows.
        version: topkbench's own.
    """
    good = rows[rows["status"] == Status.OK.value]
    groups = good.groupby(["model", "task", "prompts"], sort=False, dropna=False)
    return [_sentence(part, version) for _, part in groups]


def _sentence(rows: pd.DataFrame, version: str) -> str:
    first = rows.iloc[0]
    methods = sorted(set(rows["method"]), key=style.order)
    parts = [f"We ran {listed([style.style(one).label for one in methods])} on {first['model']}"]
    prompts = "" if pd.isna(first["prompts"]) else f" (prompts: {first['prompts']})"
    parts.append(f"with the task {first['task']}{prompts}")
    lengths = _values(rows, "length")
    if lengths:
        parts.append(f"at {listed([f'{one:,}' for one in lengths])} tokens")
    counted = rows[rows["score"].notna()] if rows["score"].notna().any() else rows
    of_subtasks = counted[counted["subtask"] != MEAN]
    samples = _values(of_subtasks if len(of_subtasks) else counted, "num_samples")
    if samples:
        number = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
        parts.append(f"n = {number} {'samples per sub-task' if len(of_subtasks) else 'samples'}")
    questions = _values(rows, "question")
    if questions:
        parts.append(f"the question {listed([_QUESTIONS.get(one, one) for one in questions])}")
    protocols = _values(rows, "protocol")
    if protocols:
        parts.append(f"the {listed(protocols)} protocol{'s' if len(protocols) > 1 else ''}")
    for name in ("k", "rbit"):
        values = _values(rows, name)
        if values:
            parts.append(f"{name} = {listed(values)}")
    seeds = _values(rows, "seed")
    if seeds:
        parts.append(f"seed{'s' if len(seeds) > 1 else ''} {listed(seeds)}")
    machines = _values(rows, "device")
    if machines:
        parts.append(f"on {listed(machines)}")
    commits = [str(one)[:12] for one in _values(rows, "git_commit")]
    commit = f" (commit{'s' if len(commits) > 1 else ''} {listed(commits)})" if commits else ""
    changed = ", with uncommitted changes" if rows["git_dirty"].eq(True).any() else ""
    parts.append(f"using topkbench {version}{commit}{changed}")
    libraries = [f"{name} {listed(found)}" for name in _LIBRARIES if (found := _values(rows, name))]
    return ", ".join([" ".join(parts[:2]), *parts[2:], *libraries]) + "."


def _values(rows: pd.DataFrame, name: str) -> Sequence[Any]:
    return sorted(rows[name].dropna().unique())
