"""A paper's published numbers, and ours beside them: what can be compared, and what not and why."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

from topkbench.analysis.metrics import METRICS
from topkbench.analysis.stats import MEAN
from topkbench.analysis.tables import Table

FOLDER = Path(__file__).with_name("published")
SAME_LENGTH = 0.05
"""Lengths that differ by less than this share are one: prompts do not fill theirs exactly."""

# The paper's layers, by the attention geometry that our timings are called by.
_GEOMETRIES = {"32/32 heads of 128": "llama2_7b_32k", "32/8 heads of 128": "llama31_8b"}
# The paper prefills the question, keeps no sinks or recents, and leaves the first layers dense.
_QUESTION, _PROTOCOL = "dense", "native"


@dataclass(frozen=True)
class _Benchmark:
    """How a published benchmark is found among our rows."""

    task: str
    """Our task."""
    difference: str = ""
    """What always tells the two apart, if anything does."""


_BENCHMARKS = {
    "ruler": _Benchmark("ruler"),
    "niah": _Benchmark("needle", "haystack: books there, random words here"),
    "layer_latency": _Benchmark("decode_latency"),
}
# Our column of a published metric, and what the published value is multiplied by.
_METRICS = {
    "score": ("score", 1.0),
    "cells_of_150": ("score", 100 / 150),
    "latency_ms": ("decode_ms_p50", 1.0),
}


@cache
def _read() -> pd.DataFrame:
    parts = [
        pd.read_csv(path, dtype={"source": str}, keep_default_na=False, na_values={"value": [""]})
        for path in sorted(FOLDER.glob("*.csv"))
    ]
    data = pd.concat(parts, ignore_index=True)
    for name in ("length", "k", "rbit"):
        data[name] = pd.to_numeric(data[name]).astype("Int64")
    return data


def published() -> pd.DataFrame:
    """Return every published number: one line each, with the columns of the folder's README."""
    return _read().copy()


def beside(lines: pd.DataFrame, numbers: pd.DataFrame | None = None) -> pd.DataFrame:
    """Lay the nearest of our lines beside each published number.

    Args:
        lines: Lines of a comparison (`lines.Comparison.lines`), sub-tasks included.
        numbers: What `published` returns, or some of it.

    Returns:
        The numbers with ``published`` (in our unit), ``ours``, ``ours_is`` (its setting in words),
        ``comparable``, and ``why`` not, every difference after the word for it.
    """
    data = published() if numbers is None else numbers
    parts = [_beside(line, lines, data) for _, line in data.iterrows()]
    return pd.concat(
        [data.reset_index(drop=True), pd.DataFrame.from_records(parts)], axis=1
    ).astype({"ours": "float64", "published": "float64"})


def _beside(number: pd.Series, lines: pd.DataFrame, numbers: pd.DataFrame) -> dict[str, Any]:
    metric, factor = _METRICS.get(number["metric"], ("", 1.0))
    known: dict[str, Any] = {"published": number["value"] * factor, "ours": None, "ours_is": ""}
    benchmark = _BENCHMARKS.get(number["benchmark"])
    reasons: list[str]
    if benchmark is None:
        reasons = [f"{number['benchmark']} is no task of this project"]
    else:
        found = lines[(lines["task"] == benchmark.task) & lines[metric].notna()]
        steps = (
            (f"task={benchmark.task} was not run", found.index == found.index),
            (f"method={number['method']} was not run", found["method"] == number["method"]),
            ("the sub-task was not run", _same_subtask(number, found)),
        )
        reasons = []
        for reason, mask in steps:
            found = found[pd.Series(mask, found.index).reindex(found.index).astype(bool)]
            if not len(found):
                reasons = [reason]
                break
        else:
            nearest = min((line for _, line in found.iterrows()), key=partial(_distance, number))
            known |= {"ours": float(nearest[metric]), "ours_is": _setting(nearest)}
            reasons = _differences(number, nearest, lines, numbers)
            reasons += [benchmark.difference] if benchmark.difference else []
    return {**known, "comparable": not reasons, "why": "; ".join(reasons)}


def _same_subtask(number: pd.Series, lines: pd.DataFrame) -> pd.Series:
    task = str(number["task"])
    if task.startswith("batch_"):
        return (lines["batch_size"] == int(task.removeprefix("batch_"))).fillna(False)
    return lines["subtask"] == (MEAN if task == "mean" else task)


def _model(line: pd.Series) -> str:
    return _GEOMETRIES.get(str(line["model"]), str(line["model"]))


def _length(line: pd.Series) -> float:
    """Return a line's length, of its own or as cached; NaN where neither is known."""
    for name in ("length", "kv_len"):
        if not pd.isna(line[name]):
            return float(line[name])
    return math.nan


def _share(k: Any, length: Any) -> float:
    """Return a budget as a share of the context, or of one token where no length is known."""
    if pd.isna(k):
        return math.nan
    return float(k) / (1.0 if pd.isna(length) else float(length))


def _apart(first: float, second: float) -> float:
    """Return how many times two numbers differ, as a logarithm; 0 where one is unknown."""
    if math.isnan(first) or math.isnan(second):
        return 0.0
    return abs(math.log(first / second))


def _distance(number: pd.Series, line: pd.Series) -> tuple[float, ...]:
    """Rank our lines by how near they are: in model, length, share of the context and bits."""
    length = math.nan if pd.isna(number["length"]) else float(number["length"])
    near = _apart(length, _length(line))
    budget = _apart(_share(number["k"], number["length"]), _share(line["k"], _length(line)))
    bits = abs(float(number["rbit"]) - float(line["rbit"])) if _both(number, line, "rbit") else 0.0
    return float(_model(line) != number["model"]), near, budget, bits


def _both(number: pd.Series, line: pd.Series, name: str) -> bool:
    return not pd.isna(number[name]) and not pd.isna(line[name])


def _differences(
    number: pd.Series, line: pd.Series, lines: pd.DataFrame, numbers: pd.DataFrame
) -> list[str]:
    """Return every reason why a line of ours cannot be held against a published number."""
    reasons = []
    if _model(line) != number["model"]:
        reasons.append(f"model: {number['model']} there, {line['model']} here")
    length = _length(line)
    if not pd.isna(number["length"]) and not (
        abs(length - number["length"]) <= SAME_LENGTH * number["length"]
    ):
        here = "unknown" if math.isnan(length) else f"{length:,.0f}"
        reasons.append(f"length: {number['length']:,} tokens there, {here} here")
    for name in ("k", "rbit"):
        if _both(number, line, name) and number[name] != line[name]:
            reasons.append(f"{name}: {number[name]} there, {line[name]} here")
    if number["metric"] == "latency_ms":
        if not pd.isna(line["timing_note"]):
            reasons.append(f"time: unsteady here, {line['timing_note']}")
        return [*reasons, f"machine: {line['device']} here"]
    if number["task"] == "mean" and number["benchmark"] == "ruler":
        there = _subtasks(numbers, number)
        here_tasks = set(lines.loc[lines["line"] == line["line"], "subtask"]) - {MEAN}
        if here_tasks != there:
            reasons.append(
                f"sub-tasks: {len(there)} of RULER's 13 in the mean there, {len(here_tasks)} here"
            )
    if number["benchmark"] == "ruler" and not pd.isna(line["length"]):
        reasons.append(
            "prompts: of RULER's generator there, of ours here (task.source reads theirs)"
        )
    if line["question"] != _QUESTION:
        reasons.append(f"question: prefilled there, {line['question']} here")
    if not pd.isna(line["protocol"]) and line["protocol"] != _PROTOCOL:
        reasons.append(f"rules: the paper's there, protocol={line['protocol']} here")
    return reasons


def _subtasks(numbers: pd.DataFrame, number: pd.Series) -> set[str]:
    same = numbers[
        (numbers["place"] == number["place"])
        & (numbers["model"] == number["model"])
        & (numbers["method"] == number["method"])
    ]
    return set(same["task"]) - {"mean"}


def _setting(line: pd.Series) -> str:
    words = [str(line["model"])]
    length = _length(line)
    words += [] if math.isnan(length) else [f"{length:,.0f} tokens"]
    words += [f"{name}={line[name]}" for name in ("k", "rbit") if not pd.isna(line[name])]
    return ", ".join(words)


def published_table(compared: pd.DataFrame) -> Table | None:
    """Return the published numbers that have one of ours beside them; None where none has."""
    data = compared[compared["ours"].notna()]
    if not len(data):
        return None
    heads = ["From", "Model", "Benchmark", "Sub-task", "Tokens", "Method", "k", "rbit", "Metric"]
    heads += ["Published", "Ours", "Ours is", "Comparable", "Differs in", "Caveat"]
    rows = []
    for _, one in data.iterrows():
        metric, _ = _METRICS[one["metric"]]
        named = (one["place"], one["model"], one["benchmark"], one["task"], _whole(one["length"]))
        knobs = (one["method"], _whole(one["k"]), _whole(one["rbit"]), METRICS[metric].axis)
        text = METRICS[metric].text
        told = (text(one["published"]), text(one["ours"]), one["ours_is"])
        differs = ", ".join(reason.partition(":")[0] for reason in one["why"].split("; "))
        verdict = "yes" if one["comparable"] else "no"
        rows.append([*named, *knobs, *told, verdict, differs, one["caveat"]])
    return Table(heads, rows, words={0, 1, 2, 3, 5, 8, 11, 12, 13, 14})


def left_out(compared: pd.DataFrame) -> list[str]:
    """Return, for each table or figure, a sentence on its numbers with none of ours beside them."""
    data = compared[compared["ours"].isna()]
    sentences = []
    for place in sorted(data["place"].unique(), key=_by_kind):
        part = data[data["place"] == place]
        reasons = _each(part["why"])
        caveats = _each(caveat for caveat in part["caveat"] if caveat)
        told = f" Caveats: {'; '.join(caveats)}." if caveats else ""
        sentences.append(
            f"{place}: {len(part)} numbers without one of ours: {'; '.join(reasons)}.{told}"
        )
    return sentences


def _each(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def _by_kind(place: str) -> tuple[str, int]:
    kind, _, number = place.partition(" ")
    return kind, int(number)


def _whole(value: Any) -> str:
    return "–" if pd.isna(value) else f"{int(value)}"
