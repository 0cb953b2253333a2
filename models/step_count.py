"""Counts the decode steps that go through a method, those that bypass it, and the reasons."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

NO_CACHE = "generation without a cache"
HOLES = "a mask with holes"
SEVERAL = "a forward of several tokens over a filled cache"
ALLOWED = "a forward of several tokens that allow_dense_forwards leaves dense"
LIKELIHOOD = "a likelihood of several tokens in one forward"
UNREACHED = "an attention that never reached the method"
SMALL = "k is at least the number of cached tokens"
REMEDIES = {
    NO_CACHE: "generate with use_cache=True",
    HOLES: "pad on one side only",
    LIKELIHOOD: "read a context first, and then the tokens that are scored",
    UNREACHED: "leave the model's attention implementation as attach sets it",
    SEVERAL: "decode one token at a time with this method, or pass allow_dense_forwards=True if"
    " these forwards are meant to attend to everything",
}


class MethodBypassedError(RuntimeError):
    """Decode steps that should have gone through a method did not; one sentence says why."""


@dataclass
class StepCount:
    """Decode steps of one attached method, by layer: one for each token of each row.

    A step is taken if the method made a selection. Otherwise it is dense by design (the policy or
    the model keeps the layer dense, or there are no more than ``k`` tokens), or it was missed.

    Attributes:
        taken: By layer, steps with a selection among more than ``k`` tokens.
        dense: By layer and reason, steps that are dense by design.
        missed: By layer and reason, steps that should have gone through the method and did not.
    """

    taken: Counter[int] = field(default_factory=Counter)
    dense: Counter[tuple[int, str]] = field(default_factory=Counter)
    missed: Counter[tuple[int, str]] = field(default_factory=Counter)

    def add(self, other: "StepCount") -> None:
        """Add the counts of another."""
        self.taken += other.taken
        self.dense += other.dense
        self.missed += other.missed

    @property
    def num_steps(self) -> int:
        """Number of steps, of all layers together."""
        return self.taken.total() + self.dense.total() + self.missed.total()

    @property
    def share_taken(self) -> float | None:
        """Share of all layers' steps that the method took; None before the first step."""
        return self.taken.total() / self.num_steps if self.num_steps else None

    def require_none_missed(self, method: str, k: int, layers: Iterable[int]) -> None:
        """Raise if a step was missed, or a layer took fewer steps than another.

        Args:
            method: Its name.
            k: The budget.
            layers: The layers in which the method selects.

        Raises:
            MethodBypassedError: With the counts and the remedy.
        """
        layers = sorted(layers)
        reasons: Counter[str] = Counter()
        for (_, reason), steps in self.missed.items():
            reasons[reason] += steps
        if reasons:
            causes = "; ".join(f"{steps} by {reason}" for reason, steps in sorted(reasons.items()))
            remedies = "; ".join(REMEDIES[reason] for reason in sorted(reasons))
            where = ", ".join(map(str, sorted({layer for layer, _ in self.missed})))
            raise MethodBypassedError(
                f"every decode step over more than k={k} tokens must go through {method}, but of "
                f"{self.taken.total() + reasons.total()} steps of single layers {reasons.total()} "
                f"attended to everything ({causes}; in layer {where}): {remedies}."
            )
        # Steps that were taken, or that had no more than k tokens.
        counts = {layer: self.taken[layer] + self.dense[layer, SMALL] for layer in layers}
        _require_equal(method, k, counts, max(counts.values(), default=0))

    def require(self, method: str, k: int, layers: Iterable[int], steps: int) -> None:
        """Raise unless the method took exactly ``steps`` steps in each of the layers.

        Args:
            method: Its name.
            k: The budget.
            layers: The layers in which the method selects.
            steps: Decode steps that were run over more than ``k`` tokens.

        Raises:
            MethodBypassedError: With both counts.
        """
        self.require_none_missed(method, k, layers)
        _require_equal(method, k, {layer: self.taken[layer] for layer in sorted(layers)}, steps)


def _require_equal(method: str, k: int, counts: dict[int, int], steps: int) -> None:
    """Raise unless each layer has exactly ``steps`` steps."""
    if all(count == steps for count in counts.values()):
        return
    fewest = min(counts, key=lambda layer: (counts[layer], layer))
    raise MethodBypassedError(
        f"{len(counts)} layers must take {steps} decode steps each through {method} with k={k}, "
        f"{steps * len(counts)} in all, got {sum(counts.values())}: layer {fewest} took "
        f"{counts[fewest]}, the rest of its steps never reached the method."
    )
