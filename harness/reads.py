"""What decode steps read: tokens and index entries are counted, bytes follow from the counts."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from topkbench.harness.quality import check_finite
from topkbench.harness.task import Context
from topkbench.methods.base import (
    AnyMethod,
    Geometry,
    Observer,
    StepContext,
    StepResult,
    kv_bytes,
)
from topkbench.models.compat import partial_layers
from topkbench.models.step_count import StepCount


@dataclass(frozen=True)
class Reads:
    """What a KV head reads in one step of one sparse layer, on average.

    Attributes:
        tokens: Distinct cached tokens.
        scanned: Index entries; None if their number does not depend on the data.
    """

    tokens: float
    scanned: float | None = None

    @classmethod
    def mean(cls, reads: Sequence["Reads"]) -> "Reads | None":
        """Return the mean, or None for an empty sequence."""
        if not reads:
            return None
        scanned = [one.scanned for one in reads if one.scanned is not None]
        tokens = statistics.fmean(one.tokens for one in reads)
        return cls(tokens, statistics.fmean(scanned) if scanned else None)


@dataclass
class ReadCount:
    """What decode steps read, summed over steps, rows and layers.

    Attributes:
        layer_steps: Steps of the layers in which the method selects; each counts once per layer and
            row.
        read: Distinct tokens that a KV head read, summed over these.
        scanned: Index entries that it read, likewise; None if they do not depend on the data.
        cached: Cached tokens, likewise.
        taken: Steps of single layers with a selection among more than ``k`` tokens.
        all_steps: Steps of all layers.
        longest: Most cached tokens at any step.
    """

    layer_steps: int = 0
    read: float = 0.0
    scanned: float | None = None
    cached: float = 0.0
    taken: int = 0
    all_steps: int = 0
    longest: int = 0

    def add(self, other: "ReadCount") -> None:
        """Add the counts of other steps."""
        for name in ("layer_steps", "read", "cached", "taken", "all_steps"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if other.scanned is not None:
            self.scanned = other.scanned + (self.scanned or 0.0)
        self.longest = max(self.longest, other.longest)

    @property
    def density(self) -> float | None:
        """Share of the cached tokens that were read, 0 to 1; None before the first step."""
        return self.read / self.cached if self.cached else None

    def mean_cached(self, otherwise: int) -> int:
        """Return the cached tokens at a step, on average; ``otherwise`` before the first step."""
        return round(self.cached / self.layer_steps) if self.layer_steps else otherwise

    @property
    def step_reads(self) -> "Reads | None":
        """What a KV head read per step, on average; None before the first step."""
        if not self.layer_steps:
            return None
        return Reads(
            self.read / self.layer_steps,
            None if self.scanned is None else self.scanned / self.layer_steps,
        )

    @property
    def share_taken(self) -> float | None:
        """Share of all layers' steps that the method took; None before the first step."""
        return self.taken / self.all_steps if self.all_steps else None


class ReadCounter(Observer):
    """Counts what a KV head reads in the sparse layers of decode steps.

    Attributes:
        count: The counts so far, without the steps' own, which the caller adds.
    """

    def __init__(self) -> None:
        self.count = ReadCount()

    def on_step(self, context: StepContext, result: StepResult) -> None:
        check_finite(result, context.layer)
        cache, count = context.cache, self.count
        start, end = cache.bounds()
        cached = (end - start).double().sum().item()
        if cache.freed is not None:
            cached += cache.freed.double().sum().item()
        count.layer_steps += len(start)
        count.cached += cached
        if result.selection is None:
            count.read += cached
        else:
            count.read += result.selection.tokens_read(cache).double().mean(1).sum().item()
            if result.selection.scanned is not None:
                scanned = result.selection.scanned.double().mean(1).sum().item()
                count.scanned = scanned + (count.scanned or 0.0)

    def add_steps(self, steps: StepCount, lengths: Sequence[int]) -> None:
        """Add the counts of a session's steps, and the cached tokens at each."""
        self.count.taken += steps.taken.total()
        self.count.all_steps += steps.num_steps
        self.count.longest = max(self.count.longest, *lengths, 0)


def accounting(context: Context, n: int, reads: Reads | None) -> dict[str, Any]:
    """Return the columns for the bytes read by a decode step, from the method's own cost model.

    Args:
        context: The cell's context.
        n: Cached tokens.
        reads: Counted reads; None if no step was counted.
    """
    geometry, method = context.geometry, context.method
    k = context.effective_policy.k
    sparse, dense = layers_read(context, n)
    layer_bytes = layer_bytes_read(method, geometry, n, k, reads)
    total = sparse * layer_bytes + dense_bytes(geometry, dense)
    return {
        "kv_len": n,
        "bytes_read_per_step": float(total),
        "index_bytes_per_token": float(sparse * method.index_bytes_per_token(geometry)),
    }


def dense_bytes(geometry: Geometry, tokens: Mapping[int, int]) -> int:
    """Return the bytes of the keys and values that dense layers read, given each one's tokens."""
    return sum(kv_bytes(geometry.of_layer(layer), n) for layer, n in tokens.items())


def layers_read(context: Context, n: int) -> tuple[int, dict[int, int]]:
    """Return the number of sparse layers, and how many of ``n`` tokens each dense layer reads.

    A layer is dense if the policy or the model's design keeps it dense; a sliding-window layer
    reads no more than its window.
    """
    geometry, method = context.geometry, context.method
    dense: dict[int, int] = {}
    if method.selects:
        dense = dict.fromkeys(geometry.kept_dense(context.effective_policy), n)
    partial = partial_layers(context.loaded.model)
    dense |= {layer: kind.tokens_read(n) for layer, kind in partial.items()}
    return len(geometry.attention_layers) - len(dense), dense


def density_of_all_layers(context: Context, n: int, density: float | None) -> float | None:
    """Return the share of ``n`` cached tokens read by all layers, given that of the sparse layers.

    Args:
        context: The cell's context.
        n: Cached tokens at the steps over which ``density`` was counted, on average.
        density: Share read by the sparse layers; None if it was not counted.
    """
    sparse, dense = layers_read(context, n)
    if sparse and density is None:
        return None
    return (sparse * (density or 0.0) + sum(dense.values()) / n) / (sparse + len(dense))


def no_sparse_step_reason(k: int, longest: int) -> str:
    """Return why a cell is skipped in which no decode step had more than ``k`` cached tokens."""
    return (
        f"a method acts at decode steps over more than k tokens, and no step had more than k={k} "
        f"(at most {longest} were cached), so it would equal full attention; use a smaller k or "
        "longer prompts."
    )


def layer_bytes_read(
    method: AnyMethod, geometry: Geometry, n: int, k: int, reads: Reads | None
) -> int:
    """Return the bytes that one decode step of one sparse layer reads, for one batch row.

    If ``k >= n`` a step reads all keys and values and no index. Otherwise the counted reads are
    charged, which differ from ``k`` if query heads select separately, if fewer tokens are enough,
    if a page is partly filled, or if generated tokens are kept on top of the budget.

    Args:
        method: The method.
        geometry: The model's geometry.
        n: Cached tokens.
        k: The budget.
        reads: Counted reads; None only for a step that reads everything.
    """
    if not method.selects or k >= n:
        return kv_bytes(geometry, n)
    assert reads is not None  # the steps of a method that selects have been counted
    scanned = None if reads.scanned is None else round(reads.scanned)
    return method.bytes_read(geometry, n, round(reads.tokens), scanned)
