"""Pool the rows of a sweep into configurations and pair each with full attention.

Cells that differ only in their seed belong to one configuration, and cells that differ only in
their sub-tasks, of which they share none: a sweep that was measured in parts. Cells of different
machines, or two cells of one seed and sub-task, never share one.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from topkbench.analysis import style
from topkbench.analysis.comparison import stats
from topkbench.analysis.comparison.metrics import ends_of
from topkbench.analysis.record.provenance import pinned_versions
from topkbench.analysis.record.row import (
    DECLARED,
    PARAMETER_PREFIX,
    Status,
    same_under_each_seed,
)
from topkbench.analysis.record.store import typed

DEFAULTS = {"question": "sparse", "protocol": "unified"}
"""What conf/ has by default of a setting: shown before the others."""
BASELINES = ("full", "exact", "block_oracle")
"""Methods that serve as references; they do not compete for the best score."""

SETTING = ("model", "task", "prompts", "question", "protocol", "device", "length")
"""Columns that must agree in compared configurations; full attention suits any protocol."""
_OF_ALL_LENGTHS = tuple(name for name in SETTING if name not in ("protocol", "length"))
_CONFIGURATION = (
    *("method", "k", "rbit", "impl", "full_backend", "batch_size", "config_digest"),
    "repeat",
)
_OF_FULL = (
    *("run_id", "model", "task", "prompts", "length", "question", "seed", "device", "num_samples"),
    "started_at",
)
"""Columns by which full attention's cell of a configuration is found."""
_LIBRARIES = ("torch", "numba", "triton", "transformers", "tokenizers", "numpy")
_MOST_NAMED = 3
"""If more parameters than this vary, a label names only those with an unusual value."""
_NAMED_APART = {"repeat": "{}", "config_digest": "config {:.8}"}
"""What is added to a label only if nothing else distinguishes two configurations."""
_MEANS, _MEDIANS = (
    tuple(name for name, one in DECLARED.items() if one.pooled == how) for how in ("mean", "median")
)
_RATIO_ENDS = (*ends_of("speedup_vs_full"), *ends_of("decode_vs_full"))
OVER_WINDOWS, OVER_SEEDS = (
    tuple(name for name, one in DECLARED.items() if one.interval == over)
    for over in ("windows", "seeds")
)
"""Metrics with an interval over windows of text, which rows record, and those that are not recorded
per sample: their intervals are over a configuration's seeds."""
_OF_TIMES = (*_MEDIANS, *_RATIO_ENDS, "decode_vs_full", "bandwidth_fraction", "bandwidth_gb_s")
"""Columns that depend on the number of threads."""
_ENDS = tuple(end for name in (*OVER_SEEDS, *OVER_WINDOWS) for end in ends_of(name))
_OF_SAMPLES = (
    *("score", "delta_full", "turn_change"),
    *("generated_tokens", "generated_delta", "cut_off_share", "cut_off_delta"),
)
"""What is a mean over samples, as far as an interval is not over windows or seeds."""
_COUNTS = ("judged_prompts", "judged_tokens", "timed_prompts", "scored_tokens")
_SCORES = (
    *_OF_SAMPLES,
    *(end for name in _OF_SAMPLES for end in ends_of(name) if end in DECLARED),
)


def without_parameters(configurations: pd.DataFrame) -> pd.DataFrame:
    """Return configurations without their methods' parameters.

    These are hundreds of columns, and slow every selection of rows down.
    """
    own = [name for name in configurations if not str(name).startswith(PARAMETER_PREFIX)]
    return configurations[own].copy()


@dataclass
class Comparison:
    """Configurations that can be shown side by side.

    Attributes:
        rows: The rows behind the configurations, without repeated cells of one machine.
        configurations: One entry per setting, configuration and sub-task: the columns that name
            them, ``configuration_id``, ``label``, ``variant``, scores with intervals, metrics,
            ``decode_vs_full`` (decode time relative to full attention) with its interval,
            ``timing_note`` (why the times are unreliable), ``by_seed`` (the selection's quality:
            metric to seed to value), ``n`` samples, ``judged_prompts``, ``judged_tokens`` and
            ``timed_prompts`` over all seeds, ``cells``, their ``run_ids``, and ``best``.
        notes: Sentences about what is mixed or could not be compared.
        answers: The scored samples of each configuration that has any, with their seeds.
    """

    rows: pd.DataFrame
    configurations: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    answers: dict[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def overall(self) -> pd.DataFrame:
        """One entry per configuration: its mean, or each sub-task where there is no mean."""
        if not len(self.configurations):
            return self.configurations
        is_mean = self.configurations["subtask"] == stats.MEAN
        with_mean = set(self.configurations.loc[is_mean, "configuration_id"])
        return self.configurations[
            is_mean | ~self.configurations["configuration_id"].isin(with_mean)
        ]

    def by_setting(self) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
        """Yield each setting with its configurations, of each task the default one first.

        Where answers are scored, each length is a setting of its own; else all lengths share one.
        Configurations without a protocol appear in the setting of every protocol. A setting without
        full attention has that of another number of threads of the same machine, without its times.
        """
        for key, part in self._by_setting_of_all_lengths():
            if part["score"].notna().any():
                for length, one in _groups(part, ("length",)):
                    yield {**key, **length}, one
            elif len(part):
                yield {**key, "length": None}, part

    def _by_setting_of_all_lengths(self) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
        """Yield each setting, lengths not separated, with its configurations."""
        for key, own in _groups(self.configurations, _OF_ALL_LENGTHS):
            part = self._with_full(key, own)
            free = part["protocol"].isna()
            names = part["protocol"].dropna().unique()
            for name in sorted(names, key=lambda one: _rank("protocol", one)) or [None]:
                yield {**key, "protocol": name}, part[free | (part["protocol"] == name)]

    def _with_full(self, key: Mapping[str, Any], part: pd.DataFrame) -> pd.DataFrame:
        """Return a setting's configurations, with full attention of other threads if it has none.

        Answers do not depend on the number of threads, but times do, so that these are left out.
        """
        if (part["method"] == "full").any():
            return part
        every = self.configurations
        same = every["method"].eq("full")
        same &= every["device"].map(_machine) == _machine(key["device"])
        for name in _OF_ALL_LENGTHS:
            if name != "device":
                same &= every[name].isna() if key[name] is None else every[name].eq(key[name])
        found = every[same & every["score"].notna() & every["length"].isin(part["length"])]
        # Of several numbers of threads, one stands for all.
        found = found[found["device"] == found["device"].min()]
        untimed = found.assign(**dict.fromkeys(_OF_TIMES, math.nan), timing_note=None)
        return pd.concat([untimed.astype(part.dtypes), part]) if len(found) else part


def _machine(device: Any) -> str:
    """Return a device's name without its number of threads, which does not change answers."""
    return re.sub(r", \d+ threads$", "", str(device))


def called_by_shape(configurations: pd.DataFrame) -> pd.Series:
    """Return for each configuration whether its sub-task names only its length or its shape.

    A shape is ``LENGTH x BATCH``.
    """
    return configurations["subtask"].str.partition(" x ")[0] == configurations["length"].astype(str)


def compare(
    rows: pd.DataFrame, samples: pd.DataFrame | None = None, *, resampled: bool = True
) -> Comparison:
    """Pool rows into configurations and pair these with full attention on the same samples.

    Args:
        rows: What `store.Sweep.rows` returns, of one sweep or of several.
        samples: What `store.Sweep.samples` returns; without them the rows' own intervals are used.
        resampled: Whether scores get intervals from the samples, which takes most of the time; else
            they are those of the rows, and nothing is best.
    """
    data = _drop_duplicates(typed(rows))
    notes = _mixed(data) + _missing_samples(data) + _skipped(data) + _without_full(data)
    good = data[data["status"] == Status.OK.value] if len(data) else data
    if not len(good):
        return Comparison(
            data, pd.DataFrame(columns=["configuration_id", "subtask", "score"]), notes
        )
    # Sub-tasks of older rows lack it where no time was measured.
    backend = good["full_backend"]
    of_cell = backend.groupby(good["run_id"]).transform("first")
    good = good.assign(full_backend=backend.where(backend.notna(), of_cell))
    parameters = [name for name in good.columns if name.startswith(PARAMETER_PREFIX)]
    outcomes = _with_seed(samples, good)
    notes += _without_samples(good, outcomes) + _other_threads(good)
    records: list[dict[str, Any]] = []
    pools: dict[str, pd.DataFrame] = {}
    # A task without a prompt length is grouped by its number of cached tokens instead.
    context = good["length"].where(good["length"].notna(), good["kv_len"])
    # Copied to defragment: rows of many methods have hundreds of columns, added one by one.
    good = good.copy().assign(context=context)
    good = good.assign(repeat=_repeats(good, parameters))
    answered = good["method"].eq("full") & good["run_id"].isin(outcomes["run_id"])
    full_cells = good.loc[answered, list(_OF_FULL)]
    # Plain values: in a frame of hundreds of columns each look-up takes a millisecond.
    every: list[dict[str, Any]] = good.to_dict("records")  # type: ignore[assignment]
    for index, (key, places) in enumerate(
        _places(good, (*SETTING, *_CONFIGURATION, *parameters, "context"))
    ):
        name = f"configuration{index:04d}"
        cells = [every[place] for place in places]
        run_ids = tuple(dict.fromkeys(one["run_id"] for one in cells))
        pool = outcomes[outcomes["run_id"].isin(run_ids)]
        scores: dict[str, dict[str, float | None]] = {}
        if len(pool) and not resampled:
            pools[name] = pool
        elif len(pool):
            full = _full_samples(cells, full_cells, outcomes) if key["method"] != "full" else None
            if same_under_each_seed(key["prompts"]):
                pool, full = once(pool), None if full is None else once(full)
            try:
                scores = stats.paired_columns(pool, full)
                pools[name] = pool
            except ValueError as error:
                notes.append(f"{key['method']} (k={key['k']}) is not paired: {error}")
        by_subtask: dict[str, list[Mapping[str, Any]]] = {}
        for one in cells:
            by_subtask.setdefault(one["subtask"], []).append(one)
        if by_subtask.pop(stats.MEAN, None):  # it comes last
            by_subtask[stats.MEAN] = _one_mean_per_seed(cells)
        for subtask, part in by_subtask.items():
            # Samples of older files do not say how long answers are.
            own = dict.fromkeys(_SCORES) | (scores.get(subtask) or _own_scores(part))
            known = {"configuration_id": name, "run_ids": run_ids}
            values = _metrics(part)
            if subtask == stats.MEAN:  # of all parts
                values["cells"] = len(run_ids)
                values["git_commit"] = _commits(cells)
            records.append({**known, **key, "subtask": subtask, **own, **values})
    configurations = _labelled(pd.DataFrame.from_records(records), parameters)
    configurations["n"] = _count(configurations, pools)
    notes += _unequal_means(configurations)
    configurations["best"] = _best(configurations, pools if resampled else {})
    return Comparison(data, _sorted(configurations), notes, pools)


def _rank(name: str, value: Any) -> tuple[bool, str]:
    """Return a sort key of a setting's value: the default first, others by name."""
    return value != DEFAULTS[name], "" if pd.isna(value) else str(value)


def _groups(
    data: pd.DataFrame, columns: tuple[str, ...]
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Yield the groups of rows that agree in some columns; missing values equal each other."""
    for key, places in _places(data, columns):
        yield key, data if len(places) == len(data) else data.iloc[places]


def _places(
    data: pd.DataFrame, columns: tuple[str, ...]
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Yield what `_groups` does, with the positions of the rows in place of the rows."""
    if not len(data):
        return
    plain = pd.DataFrame(
        {name: [None if pd.isna(value) else value for value in data[name]] for name in columns},
        dtype=object,
    )
    records: list[dict[str, Any]] = plain.to_dict("records")  # type: ignore[assignment]
    positions: dict[str, list[int]] = {}
    for position, record in enumerate(records):
        positions.setdefault(json.dumps(record, default=str), []).append(position)
    for members in positions.values():
        yield records[members[0]], members


def _drop_duplicates(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep the latest of the rows of one cell on one machine."""
    if not len(rows):
        return rows
    ordered = rows.sort_values("started_at", kind="stable", na_position="first")
    # A cell whose task covers all budgets has one mean per budget.
    kept = ordered.drop_duplicates(["run_id", "subtask", "k", "device"], keep="last")
    return rows.loc[sorted(kept.index)] if rows.index.is_unique else kept


def _mixed(rows: pd.DataFrame) -> list[str]:
    """Return a sentence for each property that should be the same in all rows and is not."""
    if not len(rows):
        return []
    notes = []
    for column, word in (
        ("git_commit", "commits"),
        ("device", "machines"),
        ("driver", "drivers"),
        *((name, f"versions of {name}") for name in _LIBRARIES),
        ("model", "models"),
        ("prompts", "prompts"),
        ("question", "question settings"),
    ):
        found = sorted(str(one) for one in rows[column].dropna().unique())
        if len(found) > 1:
            shown = ", ".join(one[:12] if column == "git_commit" else one for one in found)
            notes.append(f"These rows mix {word}: {shown}.")
    timed = rows[rows["decode_ms_p50"].notna()]
    policies = sorted(timed["omp_wait_policy"].dropna().unique())
    if len(policies) > 1:
        notes.append(f"These rows mix values of OMP_WAIT_POLICY: {', '.join(policies)}.")
    for column, word in (("code_digest", "the code of"), ("model_digest", "the files of model")):
        kind = ["task", "method"] if column == "code_digest" else ["model"]
        several = rows.groupby(kind)[column].nunique()
        names = dict.fromkeys(
            key if isinstance(key, str) else str(key[-1]) for key in several.index[several > 1]
        )
        if names:
            notes.append(f"Between these rows {word} {', '.join(names)} changed.")
    refitted = rows.loc[rows["artifact_code"].isin(["other", "unknown"]), "method"]
    if len(refitted):
        notes.append(
            f"The artifact of {', '.join(sorted(refitted.unique()))} was fitted by an earlier state"
            " of its code, under the same version of the fit."
        )
    if rows["git_dirty"].eq(True).any():
        notes.append("Some rows were made with uncommitted changes in the working tree.")
    return notes + _untested(rows)


def _untested(rows: pd.DataFrame) -> list[str]:
    """Return a sentence if rows were made with versions other than those of constraints.txt."""
    tested = pinned_versions()
    others = []
    for package in ("torch", "transformers", "numba", "triton"):
        found = (
            {str(one).partition("+")[0] for one in rows[package].dropna()} if len(rows) else set()
        )
        found -= {tested.get(package)}
        if found and package in tested:
            others.append(f"{package} {', '.join(sorted(found))} (tested: {tested[package]})")
    if not others:
        return []
    return [f"Made with versions other than those of constraints.txt: {'; '.join(others)}."]


def _missing_samples(rows: pd.DataFrame) -> list[str]:
    """Return a sentence per set of files of which lines were left out, or that hold too few."""
    notes = []
    of_files = rows[rows["source_samples"].notna()] if len(rows) else rows
    for (task, prompts), part in of_files.groupby(["task", "prompts"], sort=False):
        skipped = part["skipped_samples"].max()
        if not pd.isna(skipped) and skipped > 0:
            lines = "1 bad line" if skipped == 1 else f"{skipped} bad lines"
            notes.append(
                f"{task}, prompts of {prompts}: task.skip_bad left out {lines} of the files; "
                "task.skip_bad=false names the first."
            )
        short = part[
            part["subtask"].ne(stats.MEAN) & (part["source_samples"] < part["wanted_samples"])
        ]
        for _, row in short.drop_duplicates(["subtask", "wanted_samples"]).iterrows():
            notes.append(
                f"{task}/{row['subtask']}: the files hold {row['source_samples']} of the "
                f"{row['wanted_samples']} samples that num_samples asks for."
            )
    return notes


def _skipped(rows: pd.DataFrame) -> list[str]:
    """Return a sentence for each reason why a mean is not of all sub-tasks."""
    if not len(rows):
        return []
    of_subtask = rows["subtask"].ne(stats.MEAN) & rows["status"].eq(Status.SKIPPED.value)
    notes = []
    for (task, reason), part in rows[of_subtask].groupby(["task", "reason"], sort=False):
        names = ", ".join(dict.fromkeys(part["subtask"]))
        notes.append(f"{task}: means are without {names}, skipped there: {reason}")
    return notes


def _without_full(rows: pd.DataFrame) -> list[str]:
    """Return a sentence per reason why a difference to full attention is not informative."""
    if not len(rows) or "full_note" not in rows:
        return []
    own = rows[rows["subtask"] != stats.MEAN].groupby("run_id")["subtask"].nunique()
    # The mean of one sub-task says what that does, and may be of a part.
    of_one = rows["subtask"].eq(stats.MEAN) & rows["run_id"].map(own).eq(1)
    noted = rows[rows["full_note"].notna() & rows["method"].ne("full") & ~of_one]
    notes = []
    for note, part in noted.groupby("full_note", sort=False):
        where = ", ".join(sorted({f"{row.task}/{row.subtask}" for row in part.itertuples()}))
        notes.append(f"{where}: {note}")
    return notes


def _without_samples(rows: pd.DataFrame, outcomes: pd.DataFrame) -> list[str]:
    """Return a sentence if scores have no samples, and what is therefore missing."""
    scored = set(rows.loc[rows["score"].notna() & ~rows["method"].isin(BASELINES), "run_id"])
    missing = scored - set(outcomes["run_id"])
    if not missing:
        return []
    number = "these scores" if missing == scored else f"{len(missing)} of {len(scored)} cells"
    return [
        f"There are no samples of {number}, as where samples.parquet is not beside the rows: two"
        " methods cannot be paired without them, so that none of these is bold, their scores at"
        " equal cost have no intervals, and scores over several seeds have none."
    ]


def _unequal_means(configurations: pd.DataFrame) -> list[str]:
    """Return a sentence for each setting in which means are over different sub-tasks."""
    notes = []
    means = configurations.loc[configurations["subtask"] == stats.MEAN, "configuration_id"]
    named = configurations[configurations["configuration_id"].isin(means)]
    for _, part in _groups(named[named["subtask"] != stats.MEAN], (*_OF_ALL_LENGTHS, "length")):
        own = part.groupby("configuration_id", sort=False)["subtask"].agg(frozenset)
        every = frozenset(part["subtask"])
        labels = dict(zip(part["configuration_id"], part["label"], strict=True))
        lacking: dict[str, list[str]] = {}
        for name, subtasks in own.items():
            if subtasks != every:
                lacking.setdefault(", ".join(sorted(every - subtasks)), []).append(labels[name])
        for missing, names in lacking.items():
            shown = ", ".join(dict.fromkeys(names))
            notes.append(
                f"Means of {shown} are not over the others' sub-tasks, they lack {missing}."
            )
    return notes


def _other_threads(rows: pd.DataFrame) -> list[str]:
    """Return a sentence if full attention was run with another number of threads than a method."""
    full = rows["method"].eq("full") & rows["score"].notna()
    of_full, others = (set(rows.loc[one, "device"].dropna()) for one in (full, ~full))
    apart = [
        device
        for device in sorted(others - of_full)
        if _machine(device) in {_machine(one) for one in of_full}
    ]
    if not apart:
        return []
    return [
        f"Full attention was not run on {', '.join(apart)}: its answers there are those with"
        f" another number of threads ({', '.join(sorted(of_full))}), and it has no times there."
    ]


def _repeats(rows: pd.DataFrame, parameters: list[str]) -> pd.Series:
    """Return what tells apart the cells of a configuration that has several per seed, else None.

    That is the artifact that each used, or the run where they used none or the same one. Cells that
    share no sub-task are no repeats but parts. Seeds whose parts have unlike sub-tasks are no seeds
    of one configuration; their sub-tasks tell them apart.
    """
    names = pd.Series(None, index=rows.index, dtype=object)
    known = [name for name in _CONFIGURATION if name != "repeat"]
    columns = (*SETTING, *known, *parameters, "seed", "context")
    cells = rows[["run_id", "artifact_digest", "subtask"]]
    for _, places in _places(rows, columns):
        part = cells.iloc[places] if len(places) > 1 else cells[:0]
        if part["run_id"].nunique() > 1 and not _are_parts(part):
            digests = part.drop_duplicates("run_id")["artifact_digest"]
            fitted_apart = digests.notna().all() and digests.is_unique
            word, name = ("artifact", "artifact_digest") if fitted_apart else ("run", "run_id")
            names[part.index] = [f"{word} {str(one)[:8]}" for one in part[name]]
    unnamed = rows[names.isna()]
    for _, places in _places(unnamed, tuple(name for name in columns if name != "seed")):
        part = unnamed.iloc[places]
        own = part[part["subtask"] != stats.MEAN].groupby("seed", dropna=False)["subtask"].agg(set)
        if len(own) > 1 and any(one != own.iloc[0] for one in own):
            of_seed = {seed: ", ".join(sorted(one)) for seed, one in own.items()}
            names[part.index] = part["seed"].map(of_seed)
    return names


def _are_parts(rows: pd.DataFrame) -> bool:
    """Return whether the cells of rows share no sub-task, and each has one."""
    own = rows[rows["subtask"] != stats.MEAN]
    return set(own["run_id"]) == set(rows["run_id"]) and not own.duplicated("subtask").any()


def _one_mean_per_seed(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the mean rows of a configuration, those of one seed's parts as one row.

    It gives each sub-task the same weight, as a cell's mean does. Intervals of scores and of
    windows need the samples, and are missing in it.
    """
    of_seeds: dict[Any, list[Mapping[str, Any]]] = {}
    for one in cells:
        if one["subtask"] == stats.MEAN:
            of_seeds.setdefault(None if pd.isna(one["seed"]) else one["seed"], []).append(one)
    sizes = Counter(one["run_id"] for one in cells if one["subtask"] != stats.MEAN)
    return [
        part[0] if len(part) == 1 else _pooled(part, [sizes[one["run_id"]] for one in part])
        for part in of_seeds.values()
    ]


def _pooled(part: Sequence[Mapping[str, Any]], weights: Sequence[int]) -> dict[str, Any]:
    """Return one row for the mean rows of several parts, weighted."""
    row: dict[str, Any] = {**part[0], **dict.fromkeys((*_SCORES, *_ENDS, *_RATIO_ENDS))}
    for name in (*_MEANS, *_MEDIANS, *_OF_SAMPLES, "kv_len"):
        values = _numbers(part, name)
        row[name] = float((values * weights).sum(skipna=False)) / sum(weights)
    for name in (*_COUNTS, "num_samples"):
        counts = _present(part, name)
        row[name] = sum(counts) if len(counts) == len(part) else None
    low, high = (_present(part, end) for end in ends_of("speedup_vs_full"))
    if len(low) == len(high) == len(part):
        row["speedup_ci_low"], row["speedup_ci_high"] = min(low), max(high)
    row["timing_note"] = "; ".join(dict.fromkeys(_present(part, "timing_note"))) or None
    return row


def _with_seed(samples: pd.DataFrame | None, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the samples of these rows that have a score, with their seed."""
    if samples is None or not len(samples) or "score" not in samples:
        return pd.DataFrame({"run_id": []})
    seeds = rows.drop_duplicates("run_id").set_index("run_id")["seed"]
    is_known = samples["run_id"].isin(seeds.index) & samples["score"].notna()
    known = samples[is_known].drop_duplicates(["run_id", "subtask", "sample_id"], keep="last")
    return known.assign(seed=known["run_id"].map(seeds).astype("Int64"))


def once(outcomes: pd.DataFrame) -> pd.DataFrame:
    """Average the scores of a sample over seeds: a file's samples are the same under each."""
    names = ["subtask", "sample_id"]
    if not len(outcomes) or not outcomes.duplicated(names).any():
        return outcomes
    kept = {name: "first" for name in ("references",) if name in outcomes}
    return outcomes.groupby(names, sort=False, as_index=False).agg({"score": "mean", **kept})


def _full_samples(
    cells: Sequence[Mapping[str, Any]], full_cells: pd.DataFrame, outcomes: pd.DataFrame
) -> pd.DataFrame | None:
    """Return full attention's samples for each cell of a configuration.

    They are those of the cell that the row names as its reference. If that cell is not among the
    rows, as after a merge, they are those of the cell that answered most of the same prompts,
    preferably on the same machine, and of others the prompts that it lacks.

    Args:
        cells: The configuration's rows.
        full_cells: The columns ``_OF_FULL`` of full attention's rows that have samples.
        outcomes: All samples.
    """
    chosen: list[pd.DataFrame] = []
    of_runs: dict[str, Mapping[str, Any]] = {}  # of each seed and part
    for one in cells:
        of_runs.setdefault(one["run_id"], one)
    recorded = set(full_cells["run_id"])
    for first in of_runs.values():
        answered = _sample_names(outcomes, first["run_id"])
        if first["full_run_id"] in recorded:
            chosen.append(_named(outcomes, str(first["full_run_id"]), answered))
            continue
        candidates = full_cells
        for name in ("model", "task", "prompts", "length", "question", "seed"):
            same = candidates[name].eq(first[name]).fillna(False).astype(bool)
            candidates = candidates[candidates[name].isna() if pd.isna(first[name]) else same]
        if len(candidates):
            rank = candidates.assign(
                near=candidates["device"] == first["device"],
                common=[
                    len(answered & _sample_names(outcomes, run_id))
                    for run_id in candidates["run_id"]
                ],
            )
            rank = rank.sort_values(["common", "near", "num_samples", "started_at"], kind="stable")
            for run_id in rank["run_id"].unique()[::-1]:  # several, if they are parts
                if not answered:
                    break
                found = _named(outcomes, str(run_id), answered)
                answered -= _sample_names(found, str(run_id))
                chosen.append(found)
    return pd.concat(chosen) if chosen else None


def _named(outcomes: pd.DataFrame, run_id: str, names: set[tuple[str, str]]) -> pd.DataFrame:
    """Return the samples of a cell that have one of these names (sub-task, sample_id)."""
    own = outcomes[outcomes["run_id"] == run_id]
    return own[[one in names for one in zip(own["subtask"], own["sample_id"], strict=True)]]


def _sample_names(outcomes: pd.DataFrame, run_id: str) -> set[tuple[str, str]]:
    """Return the (sub-task, sample_id) of each sample of a cell."""
    own = outcomes[outcomes["run_id"] == run_id]
    return set(zip(own["subtask"], own["sample_id"], strict=True)) if len(own) else set()


def _own_scores(part: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the score columns of the rows; over several seeds, means without intervals."""
    if len(part) == 1:
        return {name: _number(part[0][name]) for name in _SCORES}
    return {
        name: _number(_numbers(part, name).mean()) if name in _OF_SAMPLES else None
        for name in _SCORES
    }


def _number(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)


def _numbers(part: Sequence[Mapping[str, Any]], name: str) -> pd.Series:
    """Return a column of rows, NaN where a value is missing."""
    found = [math.nan if pd.isna(one[name]) else float(one[name]) for one in part]
    return pd.Series(found, dtype="float64")


def _present(part: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """Return the values of a column that are not missing."""
    return [one[name] for one in part if not pd.isna(one[name])]


def _metrics(part: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if len(part) == 1:  # the usual case, and the mean of a column takes pandas 0.1 ms
        values: dict[str, Any] = {name: _number(part[0][name]) for name in (*_MEANS, *_MEDIANS)}
    else:
        values = {name: _number(_numbers(part, name).mean()) for name in _MEANS}
        values |= {name: _number(_numbers(part, name).median()) for name in _MEDIANS}
    for name in OVER_SEEDS:
        known = _present(part, name)
        found = stats.seed_interval(known) if known else None
        most = math.inf if (bound := DECLARED[name].most) is None else bound
        for end, value in zip(("low", "high"), found[1:3] if found else (None, None), strict=True):
            # Two seeds allow anything, but no share below 0 or above 1.
            kept = value if value is None or math.isnan(value) else min(max(value, 0.0), most)
            values[f"{name}_ci_{end}"] = _number(kept)
    for name in OVER_WINDOWS:  # over several seeds, from the lowest end to the highest
        for end, pick in (("low", min), ("high", max)):
            ends = _present(part, f"{name}_ci_{end}")
            values[f"{name}_ci_{end}"] = _number(pick(ends)) if len(ends) == len(part) else None
    values["by_seed"] = {name: {one["seed"]: one[name] for one in part} for name in OVER_SEEDS}
    values |= _relative_to_full(part, values)
    kv_len = _number(_numbers(part, "kv_len").mean())
    # Each seed draws its own prompts, but those of a file are the same under each.
    from_files = same_under_each_seed(part[0]["prompts"])
    for name in _COUNTS:
        counts = _present(part, name)
        number = max(counts, default=0) if from_files else sum(counts)
        values[name] = None if len(counts) < len(part) else int(number)
    values["kv_len"] = None if kv_len is None else round(kv_len)
    values["num_samples"] = int(sum(_present(part, "num_samples")))
    values["cells"] = len(part)
    values["git_commit"] = _commits(part)
    return values


def _commits(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the commits of rows, 12 digits each."""
    return ", ".join(sorted({str(one)[:12] for one in _present(rows, "git_commit")}))


def _relative_to_full(
    part: Sequence[Mapping[str, Any]], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the columns that compare a decode step with full attention timed alternately with it.

    The times of full attention's own cell are not used: they were measured at another moment, and
    moments may differ by more than methods do. Over several seeds an interval reaches from the
    lowest end to the highest.
    """
    found: dict[str, Any] = dict.fromkeys((*_RATIO_ENDS, "decode_vs_full"))
    notes = _present(part, "timing_note")
    found["timing_note"] = "; ".join(dict.fromkeys(notes)) if notes else None
    step, speedup = values["decode_ms_p50"], values["speedup_vs_full"]
    if part[0]["method"] == "full":
        own = {f"full_ms_{end}": values[f"decode_ms_{end}"] for end in ("p50", "p20", "p80")}
        return {**found, **own, "decode_vs_full": None if step is None else 1.0}
    if not speedup:
        return found
    found["decode_vs_full"] = 1 / speedup
    if values["full_ms_p50"] is None and step is not None:
        found["full_ms_p50"] = step * speedup  # older rows lack the column
    compared = [one for one in part if not pd.isna(one["speedup_vs_full"])]
    lows, highs = (_present(compared, f"speedup_ci_{end}") for end in ("low", "high"))
    if len(lows) == len(highs) == len(compared):
        low, high = float(min(lows)), float(max(highs))
        found["speedup_ci_low"], found["speedup_ci_high"] = low, high
        found["decode_vs_full_ci_low"], found["decode_vs_full_ci_high"] = 1 / high, 1 / low
    return found


def varies(values: pd.Series) -> bool:
    """Return whether a parameter tells configurations apart.

    That weights which are not learned have no calibration texts does not.
    """
    if str(values.name).startswith(f"{PARAMETER_PREFIX}calibration"):
        values = values.dropna()
    return bool(values.astype(str).nunique() > 1)


def _labelled(configurations: pd.DataFrame, parameters: list[str]) -> pd.DataFrame:
    """Label each configuration by its method and the parameters that vary within the method."""
    configurations = configurations.drop(columns="context")
    for name in ("k", "rbit", "length", "kv_len", "batch_size", *parameters):
        if pd.api.types.is_float_dtype(configurations[name]) and name not in parameters:
            configurations[name] = configurations[name].astype("Int64")
    for name in ("k", "rbit", "length", "kv_len", "batch_size", *_COUNTS):
        configurations[name] = pd.to_numeric(configurations[name]).astype("Int64")
    for name in (*_SCORES, *_MEANS, *_MEDIANS, *_ENDS, *_RATIO_ENDS, "decode_vs_full"):
        configurations[name] = pd.to_numeric(configurations[name]).astype("float64")
    # Each replaced column is a block of its own; copied, they are few again. pandas warns of many.
    configurations = configurations.copy()
    variants: dict[Hashable, str] = {}
    labels: dict[Hashable, str] = {}  # what stands after the method's name,
    aside: dict[Hashable, list[str]] = {}  # and after that in brackets
    for key, part in _groups(configurations, ("model", "task", "protocol", "method")):
        options = [*parameters, "impl", "full_backend"]
        varying = [name for name in options if varies(part[name])]
        usual = {name: part[name].astype(str).mode()[0] for name in varying}
        # object: rows of numbers alone would have their integers turned into floats
        for index, configuration in part[varying].astype(object).iterrows():
            named = {
                str(name).removeprefix(PARAMETER_PREFIX): value
                for name, value in configuration.items()
                if not pd.isna(value)
                and (len(varying) <= _MOST_NAMED or str(value) != usual[str(name)])
            }
            words, others = _in_words(key["method"], named)
            variants[index] = ", ".join([*words, *others])
            labels[index] = f" {', '.join(words)}" if words else ""
            aside[index] = others
    configurations["variant"] = pd.Series(variants)
    for name, form in _NAMED_APART.items():
        same = configurations.duplicated(
            [*SETTING, "method", "k", "rbit", "kv_len", "batch_size", "subtask", "variant"],
            keep=False,
        )
        same = same.groupby(configurations["configuration_id"]).transform("any")
        for index in configurations.index[same & configurations[name].notna()]:
            apart = form.format(configurations.at[index, name])
            before = str(configurations.at[index, "variant"])
            configurations.at[index, "variant"] = f"{before}, {apart}" if before else apart
            aside[index].append(apart)
    configurations["label"] = [
        style.style(method).label
        + labels[index]
        + (f" ({', '.join(aside[index])})" if aside[index] else "")
        for index, method in configurations["method"].items()
    ]
    return configurations


def _in_words(method: str, settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return a variant's settings in its method's words, and those that it has no words for.

    The latter are a text alone, or ``NAME=VALUE``.
    """
    words, others = [], []
    for name, value in settings.items():
        found = style.setting_words(method, name, value)
        if found is not None:
            words.append(found)
        else:
            others.append(str(value) if isinstance(value, str) else f"{name}={value}")
    return words, others


def _count(configurations: pd.DataFrame, pools: Mapping[str, pd.DataFrame]) -> pd.Series:
    counts = []
    for name, subtask, stated in zip(
        configurations["configuration_id"],
        configurations["subtask"],
        configurations["num_samples"],
        strict=True,
    ):
        pool = pools.get(name)
        if pool is None:
            counts.append(stated)
        else:
            counts.append(
                len(pool) if subtask == stats.MEAN else int((pool["subtask"] == subtask).sum())
            )
    return pd.Series(counts, index=configurations.index, dtype="Int64")


def _best(configurations: pd.DataFrame, pools: Mapping[str, pd.DataFrame]) -> pd.Series:
    """Mark, per setting and budget, the best score and those not significantly below it.

    If none is significantly below the best, none is marked.
    """
    marks = pd.Series(False, index=configurations.index)
    rivals = configurations[
        ~configurations["method"].isin(BASELINES)
        & configurations["configuration_id"].isin(list(pools))
    ]
    known: dict[tuple[str, str], pd.DataFrame] = {}

    def both(first: str, other: str, subtask: str) -> pd.DataFrame:
        if (first, other) not in known:
            known[first, other] = stats.pair(pools[first], pools[other])
        pairs = known[first, other]
        return pairs if subtask == stats.MEAN else pairs[pairs["subtask"] == subtask]

    for key, part in _groups(rivals, (*SETTING, "subtask", "k")):
        if len(part) < 2 or not part["score"].notna().all():
            continue
        ranked = part.sort_values("score", ascending=False, kind="stable")
        top = str(ranked.iloc[0]["configuration_id"])
        tied = [ranked.index[0]]
        for index, configuration in ranked.iloc[1:].iterrows():
            pairs = both(top, str(configuration["configuration_id"]), key["subtask"])
            pairs = stats.independent(pairs) if len(pairs) else pairs
            gap = (
                stats.paired_interval(pairs["score"], pairs["other"], pairs["subtask"])
                if len(pairs)
                else None
            )
            if gap is None or not gap.excludes_zero:
                tied.append(index)
        if len(tied) < len(part):
            marks[tied] = True
    return marks


def _sorted(configurations: pd.DataFrame) -> pd.DataFrame:
    methods = sorted(configurations["method"].unique(), key=style.order)
    rank = configurations["method"].map({name: place for place, name in enumerate(methods)})
    asked = configurations["question"].map(lambda value: _rank("question", value))
    ordered = configurations.assign(rank=rank, question_rank=asked).sort_values(
        [
            *("model", "task", "prompts", "question_rank", "device", "length"),
            *("rank", "variant", "k", "rbit", "batch_size"),
        ],
        kind="stable",
        na_position="first",
    )
    return ordered.drop(columns=["rank", "question_rank"]).reset_index(drop=True)
