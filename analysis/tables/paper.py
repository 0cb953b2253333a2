"""Compare a paper's published numbers with ours, and say why where they are not comparable."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

from topkbench.analysis.comparison.metrics import METRICS
from topkbench.analysis.comparison.stats import MEAN
from topkbench.analysis.tables.table import Table

FOLDER = Path(__file__).resolve().parents[1] / "published"
SAME_LENGTH = 0.05
"""Lengths within this fraction count as equal, since prompts do not fill theirs exactly."""

_LONG = "of at least 4,096 tokens"
"""What rows say of their prompts where only documents of so many tokens were asked."""

# The paper's layers, by the attention geometry that names our timings.
_GEOMETRIES = {"32/32 heads of 128": "llama2_7b_32k", "32/8 heads of 128": "llama31_8b"}
# The paper prefills the question, keeps no sinks or recents, and leaves the first layers dense.
_QUESTION, _PROTOCOL = "dense", "native"


@dataclass(frozen=True)
class _Benchmark:
    """The task of ours that corresponds to a published benchmark."""

    task: str
    """Our task."""
    difference: str = ""
    """A difference between the two that always holds, if there is one."""
    subtasks: Mapping[str, str] = field(default_factory=dict)
    """Our names of its sub-tasks, where they are others."""
    prefix: str = ""
    """How the names of its sub-tasks begin, in a task that has those of several benchmarks."""
    of: str = ""
    """The benchmark's name in a sentence, where it has a printed mean over its sub-tasks."""

    def subtask(self, name: str) -> str:
        """Return our name of a published sub-task."""
        return MEAN if name == "mean" else self.subtasks.get(name, name)


_LONGBENCH_E = {
    "LCC": "lcc",
    "PRetr": "passage_retrieval_en",
    "HQA": "hotpotqa",
    "TQA": "triviaqa",
    "Repo": "repobench-p",
    "Sam": "samsum",
    "Trec": "trec",
    "MQA": "multifieldqa_en",
    "2Wiki": "2wikimqa",
    "Gov": "gov_report",
    "PCnt": "passage_count",
    "MltN": "multi_news",
    "Qaspr": "qasper",
}
_INFINITEBENCH = {
    "Sum": "longbook_sum_en",
    "Choice": "longbook_choice_en",
    "BookQA": "longbook_qa_en",
    "DialQA": "longdialogue_qa_en",
    "ZhQA": "longbook_qa_chn",
    "NumStr": "number_string",
    "Passkey": "passkey",
    "Debug": "code_debug",
    "MathFind": "math_find",
}
_BENCHMARKS = {
    "ruler": _Benchmark("ruler", of="RULER's 13"),
    "longbench_e": _Benchmark(
        "lm_eval",
        "stops: a line break ends answers to questions there, as LongBench has it; lm-eval's not",
        {name: f"longbench_{ours}_e" for name, ours in _LONGBENCH_E.items()},
        "longbench_",
        "LongBench-E's 13",
    ),
    "infinitebench": _Benchmark(
        "lm_eval",
        "prompts: lm-eval's wording and limits here",
        {name: f"infinitebench_{ours}" for name, ours in _INFINITEBENCH.items()},
        "infinitebench_",
        "InfiniteBench's 12",
    ),
    "longbench_v2": _Benchmark(
        "lm_eval",
        "answers: a letter in a generated text there, the likeliest letter here",
        prefix="longbench2_",
        of="the paper's 6",
    ),
    "niah": _Benchmark("needle", "haystack: books there, random words here"),
    "layer_latency": _Benchmark("decode_latency"),
}
# Our column for each published metric, and the factor that converts the published value.
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
    """Return all published numbers, one per row; the folder's README describes the columns."""
    return _read().copy()


def compare_with_published(
    configurations: pd.DataFrame, numbers: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Return each published number with the most similar of our configurations.

    Args:
        configurations: `Comparison.configurations`, sub-tasks included.
        numbers: What `published` returns, or some of it.

    Returns:
        The numbers with ``published`` (in our unit), ``ours``, ``ours_is`` (its setting in words),
        ``comparable``, and ``why`` not: each difference as ``KIND: DETAILS``.
    """
    data = published() if numbers is None else numbers
    parts = [
        _compare_number(configuration, configurations, data) for _, configuration in data.iterrows()
    ]
    return pd.concat(
        [data.reset_index(drop=True), pd.DataFrame.from_records(parts)], axis=1
    ).astype({"ours": "float64", "published": "float64"})


def _compare_number(
    number: pd.Series, configurations: pd.DataFrame, numbers: pd.DataFrame
) -> dict[str, Any]:
    metric, factor = _METRICS.get(number["metric"], ("", 1.0))
    known: dict[str, Any] = {"published": number["value"] * factor, "ours": None, "ours_is": ""}
    benchmark = _BENCHMARKS.get(number["benchmark"])
    reasons: list[str]
    if benchmark is None:
        reasons = [f"{number['benchmark']} is no task of this project"]
    else:
        found = configurations[
            (configurations["task"] == benchmark.task) & configurations[metric].notna()
        ]
        steps = (
            (f"task={benchmark.task} was not run", found.index == found.index),
            (f"method={number['method']} was not run", found["method"] == number["method"]),
            ("the sub-task was not run", _same_subtask(number, benchmark, found)),
        )
        reasons = []
        for reason, mask in steps:
            found = found[pd.Series(mask, found.index).reindex(found.index).astype(bool)]
            if not len(found):
                reasons = [reason]
                break
        else:
            nearest = min(
                (configuration for _, configuration in found.iterrows()),
                key=partial(_distance, number),
            )
            known |= {"ours": float(nearest[metric]), "ours_is": _setting(nearest)}
            reasons = _differences(number, benchmark, nearest, configurations, numbers)
            reasons += [benchmark.difference] if benchmark.difference else []
    return {**known, "comparable": not reasons, "why": "; ".join(reasons)}


def _same_subtask(
    number: pd.Series, benchmark: _Benchmark, configurations: pd.DataFrame
) -> pd.Series:
    task = str(number["task"])
    if task.startswith("batch_"):
        return (configurations["batch_size"] == int(task.removeprefix("batch_"))).fillna(False)
    same = configurations["subtask"] == benchmark.subtask(task)
    if task != "mean" or not benchmark.prefix:
        return same
    # A mean of lm-eval's tasks is this benchmark's only if it has no others.
    names = configurations["subtask"]
    own = names.eq(MEAN) | names.str.startswith(benchmark.prefix)
    of_others = configurations.loc[~own, "configuration_id"]
    return same & ~configurations["configuration_id"].isin(of_others)


def _model(configuration: pd.Series) -> str:
    return _GEOMETRIES.get(str(configuration["model"]), str(configuration["model"]))


def _length(configuration: pd.Series) -> float:
    """Return the prompt length, or else the cached tokens; NaN if neither is known."""
    for name in ("length", "kv_len"):
        if not pd.isna(configuration[name]):
            return float(configuration[name])
    return math.nan


def _share(k: Any, length: Any) -> float:
    """Return a budget as a fraction of the context; the budget itself if no length is known."""
    if pd.isna(k):
        return math.nan
    return float(k) / (1.0 if pd.isna(length) else float(length))


def _log_ratio(first: float, second: float) -> float:
    """Return the absolute logarithm of the ratio of two numbers; 0 if one is unknown."""
    if math.isnan(first) or math.isnan(second):
        return 0.0
    return abs(math.log(first / second))


def _distance(number: pd.Series, configuration: pd.Series) -> tuple[float, ...]:
    """Return a sort key, smallest for the most similar: model, length, relative budget, bits."""
    length = math.nan if pd.isna(number["length"]) else float(number["length"])
    length_distance = _log_ratio(length, _length(configuration))
    budget = _log_ratio(
        _share(number["k"], number["length"]), _share(configuration["k"], _length(configuration))
    )
    bits = (
        abs(float(number["rbit"]) - float(configuration["rbit"]))
        if _both(number, configuration, "rbit")
        else 0.0
    )
    return float(_model(configuration) != number["model"]), length_distance, budget, bits


def _both(number: pd.Series, configuration: pd.Series, name: str) -> bool:
    return not pd.isna(number[name]) and not pd.isna(configuration[name])


def _differences(
    number: pd.Series,
    benchmark: _Benchmark,
    configuration: pd.Series,
    configurations: pd.DataFrame,
    numbers: pd.DataFrame,
) -> list[str]:
    """Return every reason why a configuration of ours is not comparable to a published number."""
    reasons = []
    if _model(configuration) != number["model"]:
        reasons.append(f"model: {number['model']} there, {configuration['model']} here")
    length = _length(configuration)
    if not pd.isna(number["length"]) and not (
        abs(length - number["length"]) <= SAME_LENGTH * number["length"]
    ):
        here = "unknown" if math.isnan(length) else f"{length:,.0f}"
        reasons.append(f"length: {number['length']:,} tokens there, {here} here")
    for name in ("k", "rbit"):
        if _both(number, configuration, name) and number[name] != configuration[name]:
            reasons.append(f"{name}: {number[name]} there, {configuration[name]} here")
    if number["metric"] == "latency_ms":
        if not pd.isna(configuration["timing_note"]):
            reasons.append(f"time: unsteady here, {configuration['timing_note']}")
        return [*reasons, f"machine: {configuration['device']} here"]
    if number["task"] == "mean" and benchmark.of and (there := _subtasks(numbers, number)):
        there = {benchmark.subtask(one) for one in there}
        here_tasks = set(
            configurations.loc[
                configurations["configuration_id"] == configuration["configuration_id"], "subtask"
            ]
        ) - {MEAN}
        if here_tasks != there:
            reasons.append(
                f"sub-tasks: {len(there)} of {benchmark.of} in the mean there, {len(here_tasks)}"
                " here"
            )
    if number["benchmark"] == "longbench_e" and _LONG not in str(configuration["prompts"]):
        reasons.append("samples: those of more than 4,096 tokens there, all here")
    ours = not pd.isna(configuration["length"])  # older rows do not say whose prompts they have
    if not pd.isna(configuration["prompts"]):
        ours = not str(configuration["prompts"]).startswith("RULER")
    if number["benchmark"] == "ruler" and ours:
        reasons.append("prompts: RULER's there, ours of random words here (task=ruler has RULER's)")
    if configuration["question"] != _QUESTION:
        reasons.append(f"question: prefilled there, {configuration['question']} here")
    if not pd.isna(configuration["protocol"]) and configuration["protocol"] != _PROTOCOL:
        reasons.append(f"protocol: the paper's there, protocol={configuration['protocol']} here")
    return reasons


def _subtasks(numbers: pd.DataFrame, number: pd.Series) -> set[str]:
    same = numbers[
        (numbers["place"] == number["place"])
        & (numbers["model"] == number["model"])
        & (numbers["method"] == number["method"])
    ]
    return set(same["task"]) - {"mean"}


def _setting(configuration: pd.Series) -> str:
    words = [str(configuration["model"])]
    length = _length(configuration)
    words += [] if math.isnan(length) else [f"{length:,.0f} tokens"]
    words += [
        f"{name}={configuration[name]}"
        for name in ("k", "rbit")
        if not pd.isna(configuration[name])
    ]
    return ", ".join(words)


def published_table(compared: pd.DataFrame) -> Table | None:
    """Return the table of published numbers that have one of ours beside them; None if none has."""
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
        values = (text(one["published"]), text(one["ours"]), one["ours_is"])
        differs = ", ".join(reason.partition(":")[0] for reason in one["why"].split("; "))
        verdict = "yes" if one["comparable"] else "no"
        rows.append([*named, *knobs, *values, verdict, differs, one["caveat"]])
    return Table(heads, rows, words={0, 1, 2, 3, 5, 8, 11, 12, 13, 14})


def without_counterpart(compared: pd.DataFrame) -> list[str]:
    """Return, per table or figure, a sentence on its numbers without a counterpart of ours."""
    data = compared[compared["ours"].isna()]
    sentences = []
    for place in sorted(data["place"].unique(), key=_by_kind):
        part = data[data["place"] == place]
        reasons = _distinct(part["why"])
        caveats = _distinct(caveat for caveat in part["caveat"] if caveat)
        caveat_text = f" Caveats: {'; '.join(caveats)}." if caveats else ""
        sentences.append(
            f"{place}: {len(part)} numbers without one of ours: {'; '.join(reasons)}.{caveat_text}"
        )
    return sentences


def _distinct(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def _by_kind(place: str) -> tuple[str, int]:
    kind, _, number = place.partition(" ")
    return kind, int(number)


def _whole(value: Any) -> str:
    return "–" if pd.isna(value) else f"{int(value)}"
