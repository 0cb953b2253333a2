"""Recall by configuration from ``task=selection``, with intervals over prompts.

python -m topkbench.analysis.selection results/hash_selection/* --k 256
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

import pandas as pd

from topkbench.analysis.metrics import METRICS
from topkbench.analysis.record import RecordError
from topkbench.analysis.report import load
from topkbench.analysis.row import PARAMETER_PREFIX
from topkbench.analysis.stats import bootstrap
from topkbench.analysis.tables import Table

MEASURES = ("recall_at_k", "attention_mass", "output_rel_error")


def by_prompt(rows: pd.DataFrame, samples: pd.DataFrame, k: int) -> pd.DataFrame:
    """Return one line per configuration, prompt and seed: the mean over layers, heads and steps.

    Args:
        rows: A sweep's rows.
        samples: Its samples: one per budget, layer, KV head and step.
        k: The budget that is looked at.

    Raises:
        RecordError: If no sample has that budget.
    """
    chosen = samples[samples["k"] == k] if "k" in samples else samples.iloc[:0]
    if not len(chosen):
        raise RecordError(f"k must be a budget that was measured, got {k}; see task.budgets.")
    per_prompt = chosen.groupby(["run_id", "sample_id"], as_index=False)[list(MEASURES)].mean()
    parameters = [name for name in rows.columns if name.startswith(PARAMETER_PREFIX)]
    varying = [name for name in parameters if rows[name].astype(str).nunique() > 1]
    cells = rows.drop_duplicates("run_id")[["run_id", "method", *varying, "rbit", "seed"]]
    return per_prompt.merge(cells, on="run_id")


def selection_table(rows: pd.DataFrame, samples: pd.DataFrame, k: int) -> Table:
    """Return recall, mass and output error of each configuration, with 95% bootstrap intervals.

    A prompt is the unit that is resampled: its layers, heads and steps are not independent.
    """
    prompts = by_prompt(rows, samples, k)
    keys = [str(name) for name in prompts if name not in ("run_id", "sample_id", "seed", *MEASURES)]
    lines = []
    for values, part in prompts.groupby(keys, dropna=False, sort=True):
        cells = ["–" if one is None or one != one else str(one) for one in values]
        for measure in MEASURES:
            most = math.inf if measure == "output_rel_error" else 1.0
            interval = bootstrap(part[measure].to_numpy(), bounds=(0.0, most), scale=1.0)
            text = METRICS[measure].text
            cells.append(f"{text(interval.estimate)} [{text(interval.low)}, {text(interval.high)}]")
        lines.append([*cells, str(len(part))])
    heads = [name.removeprefix(PARAMETER_PREFIX) for name in keys]
    heads += [METRICS[measure].label for measure in MEASURES]
    return Table([*heads, "prompts"], lines, words=set(range(len(keys))))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table in Markdown; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m topkbench.analysis.selection")
    parser.add_argument("results", nargs="+", help="folders of sweeps with task=selection")
    parser.add_argument("--k", type=int, default=256)
    options = parser.parse_args(arguments)
    try:
        loaded = [load(path) for path in options.results]
        rows = pd.concat([one for one, _ in loaded], ignore_index=True)
        samples = pd.concat([one for _, one in loaded], ignore_index=True)
        print(selection_table(rows, samples, options.k).markdown())
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
