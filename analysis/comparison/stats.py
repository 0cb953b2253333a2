"""Intervals for scores and for paired differences to full attention.

Scores are 0 to 100. The mean over sub-tasks gives each sub-task the same weight. Sources: Miller
2024 (arXiv:2411.00640) for pairing, and for resampling scores over questions; Wilson 1927 for
scores of right or wrong; Newcombe 1998 for combining the intervals of independent parts; Agresti
and Min 2005 (Stat. Med. 24, 729) for adding samples to paired differences, of which we add as many
as make the interval Wilson's where no sample differs. We also differ if all scores are equal, so
that a bootstrap has no spread: a width of zero would claim certainty from a few samples, so the
width is Wilson's for an outcome that never occurred in n samples.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from topkbench.analysis.record.row import Row, Status

Array = NDArray[np.float64]

RESAMPLES = 10_000
SCALE = 100.0
Z_95 = 1.959963984540054
# 97.5% points of Student's t for 1 to 10 degrees of freedom.
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
_TURN_CHANGE = ("turn_change", "turn_change_ci_low", "turn_change_ci_high")
MEAN = "mean"
"""Name, in the column ``subtask``, of the mean over sub-tasks."""


class Interval(NamedTuple):
    """An estimate with its 95% interval, and the number of samples behind it."""

    estimate: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


def wilson(successes: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Return Wilson's interval for a proportion, both ends in 0 to 1.

    Raises:
        ValueError: If n is not positive or successes do not lie in 0 to n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0 to n with n >= 1, got {successes} of {n}.")
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


@functools.lru_cache(maxsize=16)
def _counts(n: int, stratum: int, resamples: int, seed: int) -> Array:
    """Return how often each of n samples is drawn in each resample: [resamples, n]."""
    generator = np.random.default_rng([seed, stratum, n])
    return generator.multinomial(n, np.full(n, 1.0 / n), size=resamples).astype(np.float64)


def _resampled_means(values: Array, stratum: int, resamples: int, seed: int) -> Array:
    """Return the mean of each resample of one stratum: [resamples]."""
    if len(values) <= 256:
        means: Array = _counts(len(values), stratum, resamples, seed) @ values / len(values)
        return means
    # Many samples: the table of draws would be too large, so draw in parts and cache nothing.
    generator = np.random.default_rng([seed, stratum, len(values)])
    parts = [
        values[generator.integers(len(values), size=(250, len(values)))].mean(axis=1)
        for _ in range(-(-resamples // 250))
    ]
    return np.concatenate(parts)[:resamples]


def _split(values: Array, strata: ArrayLike | None) -> list[Array]:
    if strata is None:
        return [values]
    labels = np.asarray(strata).astype(str)
    return [values[labels == label] for label in np.unique(labels)]


def _finite(values: ArrayLike) -> Array:
    """Return values as an array.

    Raises:
        ValueError: If there is no value, or one is not finite.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not data.size or not np.isfinite(data).all():
        raise ValueError(f"values must be one or more finite numbers, got shape {data.shape}.")
    return data


def _unseen_half_width(parts: Sequence[Array], weight: float) -> float:
    """Return the half width, on a scale of 0 to 1, of a mean of parts that have no spread.

    Each part's is that of an outcome that never occurred in its samples; ``weight`` is the weight
    of each part in the mean.
    """
    return math.sqrt(sum((weight * wilson(0, len(part))[1]) ** 2 for part in parts))


def bootstrap(
    values: ArrayLike,
    strata: ArrayLike | None = None,
    *,
    bounds: tuple[float, float],
    scale: float = SCALE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the mean with its percentile bootstrap interval, resampled within each stratum.

    Args:
        values: ``[n]`` one value per sample.
        strata: ``[n]`` labels; every stratum has the same weight in the mean. None: one stratum.
        bounds: Lowest and highest possible value, to which the interval is clipped.
        scale: Range of a value; scales the width of the interval if all values are equal.
        resamples: Number of resamples.
        seed: Seed of the resampling.

    Raises:
        ValueError: If there is no value, or one is not finite.
    """
    data = _finite(values)
    parts = _split(data, strata)
    estimate = float(np.mean([part.mean() for part in parts]))
    if all(np.ptp(part) == 0 for part in parts):
        flat = [data] if np.ptp(data) == 0 else parts
        half = scale * _unseen_half_width(flat, 1.0 / len(flat))
        low, high = estimate - half, estimate + half
    else:
        means = np.mean(
            [_resampled_means(part, i, resamples, seed) for i, part in enumerate(parts)], axis=0
        )
        low, high = (float(end) for end in np.percentile(means, [2.5, 97.5]))
    low, high = min(low, estimate), max(high, estimate)
    return Interval(estimate, max(low, bounds[0]), min(high, bounds[1]), data.size)


def seed_interval(values: ArrayLike) -> Interval:
    """Return the mean over seeds with Student's t interval.

    The interval of two seeds is wide; one seed has none.

    Args:
        values: ``[n]`` one value per seed.

    Returns:
        The estimate; both ends are NaN for one seed.

    Raises:
        ValueError: If there is no value, or one is not finite.
    """
    data = _finite(values)
    estimate, freedom = float(data.mean()), data.size - 1
    if not freedom:
        return Interval(estimate, math.nan, math.nan, 1)
    # Beyond the table: first terms of the expansion about the normal quantile (within 0.003).
    point = (
        _STUDENT[freedom - 1]
        if freedom <= len(_STUDENT)
        else Z_95 + (Z_95**3 + Z_95) / (4 * freedom) + 2.8 / freedom**2
    )
    half = point * float(data.std(ddof=1)) / math.sqrt(data.size)
    return Interval(estimate, estimate - half, estimate + half, data.size)


def window_columns(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the intervals of a row's likelihoods over its windows of text.

    The tokens of one window depend on each other, so Student's interval is over the windows' means.

    Args:
        samples: One mapping per window with its mean ``nll``, ``full_nll`` and ``kl_full``.

    Returns:
        The columns ``nll_delta_ci_*`` and ``kl_full_ci_*``; none for a single window.
    """
    if len(samples) < 2:
        return {}
    found = {
        "nll_delta": seed_interval([one["nll"] - one["full_nll"] for one in samples]),
        "kl_full": seed_interval([one["kl_full"] for one in samples]),
    }
    return {
        f"{name}_ci_{end}": value
        for name, interval in found.items()
        for end, value in (
            # A divergence is never negative.
            ("low", max(interval.low, 0.0) if name == "kl_full" else interval.low),
            ("high", interval.high),
        )
    }


def quotient(first: Iterable[float], second: Iterable[float]) -> tuple[float, float, float]:
    """Return the ratio of two positive, independent estimates with its 95% interval.

    On each side, the distances to the ends of the two intervals are combined on a logarithmic scale
    by Newcombe's rule. Source: Donner and Zou 2012 (Stat. Methods Med. Res. 21, 347), section 3.

    Args:
        first: The numerator, and the lower and upper end of its interval.
        second: The same of the denominator.

    Returns:
        The ratio and the ends of its interval, NaN where an end of the inputs is.
    """
    (top, top_low, top_high), (bottom, bottom_low, bottom_high) = first, second
    ratio = top / bottom
    down = math.hypot(math.log(top / top_low), math.log(bottom_high / bottom))
    up = math.hypot(math.log(top_high / top), math.log(bottom / bottom_low))
    return ratio, ratio * math.exp(-down), ratio * math.exp(up)


def score_interval(
    scores: ArrayLike, strata: ArrayLike | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the mean score with its interval: Wilson's for scores of 0 or 100, else a bootstrap.

    Sub-tasks without spread widen the interval by Newcombe's rule: its lower end if they score
    above 0, its upper end if they score below 100.

    Args:
        scores: ``[n]`` 0 to 100.
        strata: ``[n]`` sub-tasks; None for one sub-task.
        resamples: Number of resamples.
        seed: Seed of the resampling.
    """
    data = np.asarray(scores, dtype=np.float64)
    one_stratum = strata is None or len(np.unique(np.asarray(strata).astype(str))) == 1
    if one_stratum and data.size and np.isin(data, (0.0, SCALE)).all():
        low, high = wilson(float(data.sum() / SCALE), data.size)
        return Interval(float(data.mean()), SCALE * low, SCALE * high, data.size)
    seen = bootstrap(data, strata, bounds=(0.0, SCALE), resamples=resamples, seed=seed)
    parts = _split(data, strata)
    flat = [part for part in parts if np.ptp(part) == 0]
    if len(flat) == len(parts):
        return seen
    # A sub-task that is all correct may fail on other samples, and one all wrong may succeed.
    below = [part for part in flat if part[0] > 0]
    above = [part for part in flat if part[0] < SCALE]
    down, up = (SCALE * _unseen_half_width(side, 1.0 / len(parts)) for side in (below, above))
    low = seen.estimate - math.hypot(seen.estimate - seen.low, down)
    high = seen.estimate + math.hypot(seen.high - seen.estimate, up)
    return Interval(seen.estimate, max(low, 0.0), min(high, SCALE), seen.n)


def paired_interval(
    scores: ArrayLike,
    others: ArrayLike,
    strata: ArrayLike | None = None,
    *,
    z: float = Z_95,
) -> Interval:
    """Return the mean of ``scores - others`` on the same samples with its interval.

    The interval is that of the samples and ``z**2`` more, shared out evenly over the sub-tasks,
    half of which differ by +100 and half by -100. Of two methods with equally many samples, the one
    that differs nowhere thus has the narrowest interval: Wilson's for an outcome that never
    occurred. A bootstrap would resample only the differences that were seen, and exclude zero after
    4 right answers lost and none won, where the exact test has p = 0.125.

    Args:
        scores: ``[n]`` 0 to 100.
        others: ``[n]`` 0 to 100, the same samples in the same order.
        strata: ``[n]`` sub-tasks, each with the same weight in the mean; None for one.
        z: Standard deviations on either side, above 0; by default those of a 95% interval.

    Raises:
        ValueError: If the two do not have the same length, or a value is not finite.
    """
    first, second = np.asarray(scores, np.float64), np.asarray(others, np.float64)
    if first.shape != second.shape:
        raise ValueError(
            f"paired scores must have one shape, got {first.shape} and {second.shape}."
        )
    data = _finite(first - second)
    parts = _split(data, strata)
    added = z**2 / len(parts)
    estimate = float(np.mean([part.mean() for part in parts]))
    centre = float(np.mean([part.sum() / (len(part) + added) for part in parts]))
    variance = 0.0  # of the sum of the parts' means
    for part in parts:
        own = part.var(ddof=1) if len(part) > 1 else part[0] ** 2
        variance += (len(part) * float(own) + added * SCALE**2) / (len(part) + added) ** 2
    half = z * math.sqrt(variance) / len(parts)
    low, high = min(centre - half, estimate), max(centre + half, estimate)
    return Interval(estimate, max(low, -SCALE), min(high, SCALE), data.size)


def pair(samples: pd.DataFrame, others: pd.DataFrame, of: str = "score") -> pd.DataFrame:
    """Join two sets of samples on seed and document (where present), sub-task and sample_id.

    Args:
        samples: The one set.
        others: The other.
        of: The column whose values are paired.

    Returns:
        The keys, ``of`` and ``other`` (its values in the second set), one row per common sample.

    Raises:
        ValueError: If a set has a sample twice, or the references of a sample differ.
    """
    names = ("seed", "subtask", "document", "sample_id")
    keys = [name for name in names if name in samples and name in others]
    keep = [*keys, of, *(["references"] if "references" in samples else [])]
    others = others[[name for name in keep if name in others]]
    for part in (samples, others):
        if part.duplicated(keys).any():
            raise ValueError("a sample_id must name one sample of its sub-task, got two.")
    joined = samples[keep].merge(others, on=keys, suffixes=("", "_other"), how="inner")
    joined = joined.dropna(subset=[of, f"{of}_other"]).sort_values(keys, kind="stable")
    if "references_other" in joined:
        differ = joined["references"].astype(str) != joined["references_other"].astype(str)
        if differ.any():
            raise ValueError(
                "paired samples must have the same references, but "
                f"{joined.loc[differ, 'sample_id'].iloc[0]} differs; run full attention again."
            )
    return joined.rename(columns={f"{of}_other": "other"})[[*keys, of, "other"]]


def paired_columns(
    samples: pd.DataFrame | Sequence[Mapping[str, Any]],
    full_samples: pd.DataFrame | Sequence[Mapping[str, Any]] | None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, float | None]]:
    """Return the interval and difference columns of a row, for each sub-task and their mean.

    Args:
        samples: The cell's samples: sample_id, subtask, score (0 to 100), references.
        full_samples: Full attention's samples on the same prompts; None or empty if there are none.
        resamples: Number of resamples of scores.
        seed: Seed of the resampling.

    Returns:
        ``{subtask: {score, score_ci_low, score_ci_high, delta_full, delta_ci_low, delta_ci_high,
        turn_change, turn_change_ci_low, turn_change_ci_high}}``, with ``mean`` among the sub-tasks,
        and where answers were generated what `_lengths` returns; the differences are None without a
        common sample, the change where it is not a later turn.
    """
    data = _with_text(samples)
    if "score" in data:
        data = data[data["score"].notna()]
    if not len(data):
        return {}
    full = _with_text(full_samples)
    pairs = pair(data, full) if len(full) else pd.DataFrame()
    columns: dict[str, dict[str, float | None]] = {}
    for subtask in [*dict.fromkeys(data["subtask"]), MEAN]:
        part = data if subtask == MEAN else data[data["subtask"] == subtask]
        apart = independent(part)
        score = score_interval(apart["score"], apart["subtask"], resamples=resamples, seed=seed)
        values: dict[str, float | None] = {
            "score": score.estimate,
            "score_ci_low": score.low,
            "score_ci_high": score.high,
            "delta_full": None,
            "delta_ci_low": None,
            "delta_ci_high": None,
            **_turn_change(data, part),
        }
        both = pairs if subtask == MEAN or not len(pairs) else pairs[pairs["subtask"] == subtask]
        if len(both) and set(both["subtask"]) == set(part["subtask"]):
            both = independent(both)
            delta = paired_interval(both["score"], both["other"], both["subtask"])
            values["delta_full"] = delta.estimate
            values["delta_ci_low"], values["delta_ci_high"] = delta.low, delta.high
        columns[subtask] = values | _lengths(part, full)
    return columns


def _lengths(samples: pd.DataFrame, full: pd.DataFrame) -> dict[str, float | None]:
    """Return how many tokens were generated and which share of the answers was cut off.

    Of both the mean gives each sub-task the same weight, and the difference to full attention's on
    the same samples has an interval: of the tokens a bootstrap, whose width without any difference
    is that of an outcome that never occurred, over the longest answer; of the share as of scores.

    Args:
        samples: Samples of one sub-task or of several.
        full: Full attention's, of these and of others.
    """
    if "is_cut" not in samples or samples["is_cut"].isna().any():
        return {}
    known = samples.assign(is_cut=samples["is_cut"].astype(float))
    means = known.groupby("subtask")[["num_generated", "is_cut"]].mean().mean()
    found: dict[str, float | None] = {
        "generated_tokens": float(means["num_generated"]),
        "cut_off_share": float(means["is_cut"]),
    }
    names = ("generated_delta", "cut_off_delta")
    found |= {f"{name}{end}": None for name in names for end in ("", "_ci_low", "_ci_high")}
    if "is_cut" not in full or full["is_cut"].isna().any():
        return found
    full = full.assign(is_cut=full["is_cut"].astype(float))
    tokens, share = (
        pair(known, full, of).rename(columns={of: "score"}) for of in ("num_generated", "is_cut")
    )
    if set(tokens["subtask"]) != set(known["subtask"]):
        return found
    tokens, share = independent(tokens), independent(share)
    most = float(tokens[["score", "other"]].to_numpy().max())
    lengths = tokens["score"] - tokens["other"]
    intervals = (
        (bootstrap(lengths, tokens["subtask"], bounds=(-most, most), scale=most), 1.0),
        (
            paired_interval(SCALE * share["score"], SCALE * share["other"], share["subtask"]),
            SCALE,
        ),
    )
    for name, (interval, scale) in zip(names, intervals, strict=True):
        found[name] = interval.estimate / scale
        found[f"{name}_ci_low"] = interval.low / scale
        found[f"{name}_ci_high"] = interval.high / scale
    return found


def independent(samples: pd.DataFrame) -> pd.DataFrame:
    """Return samples that do not depend on each other, as intervals need them.

    Samples of several sub-tasks about one document (``document``) depend on each other: they become
    one with their mean, so that the document is what counts. Other samples are returned as they
    are.

    Args:
        samples: ``score``, perhaps ``other``, and ``subtask`` of each.
    """
    if "document" not in samples or samples["subtask"].nunique() < 2:
        return samples
    if samples["document"].isna().any():
        return samples
    keys = [name for name in ("seed", "document") if name in samples]
    values = [name for name in ("score", "other") if name in samples]
    means = samples.groupby(keys, sort=False, dropna=False)[values].mean()
    return means.reset_index(drop=True).assign(subtask=MEAN)


def _turn_change(data: pd.DataFrame, part: pd.DataFrame) -> dict[str, float | None]:
    """Return the columns of the change since the first turn about the same documents.

    Args:
        data: The samples of all turns.
        part: Those of one turn, or all for the mean.
    """
    none: dict[str, float | None] = dict.fromkeys(_TURN_CHANGE)
    if "turn" not in data or part["turn"].nunique() != 1 or part["turn"].iloc[0] == 1:
        return none
    keys = [name for name in ("seed", "document") if name in data]
    columns = [*keys, "score"]
    both = part[columns].merge(data.loc[data["turn"] == 1, columns], on=keys)
    if not len(both):
        return none
    change = paired_interval(both["score_x"], both["score_y"])
    return dict(zip(_TURN_CHANGE, change[:3], strict=True))


def full_note(rows: Sequence[Row], subtask: str) -> str | None:
    """Return why a sub-task's difference to full attention is missing or not informative, or None.

    Args:
        rows: Full attention's rows; a cell that is not ok has only one, for the mean.
        subtask: The sub-task, or ``mean``.
    """
    found = {row.subtask: row for row in rows}
    row = found.get(subtask, found.get(MEAN))
    if row is None:
        return None
    if row.status is Status.SKIPPED and row.subtask == subtask != MEAN:
        return None  # its own row says so, and there is no method's either
    if row.status is not Status.OK:
        return (
            f"full attention ended {row.status.value} here, so there is no difference to it: "
            f"{row.reason}"
        )
    if row.subtask == subtask and row.score == 0:
        return "full attention scores 0 here, so a difference to it says nothing of the method."
    return None


def _with_text(samples: pd.DataFrame | Sequence[Mapping[str, Any]] | None) -> pd.DataFrame:
    """Return samples as a frame with references as JSON text, so that they can be compared."""
    if samples is None:
        return pd.DataFrame()
    data = samples.copy() if isinstance(samples, pd.DataFrame) else pd.DataFrame(list(samples))
    if "references" in data:
        data["references"] = [
            one if isinstance(one, str) else _json_text(one) for one in data["references"]
        ]
    return data


def _json_text(value: Any) -> str:

    return json.dumps(value.tolist() if isinstance(value, np.ndarray) else value)
