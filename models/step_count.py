"""Counts the decode steps that go through a method, and those that do not, and why."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

NO_CACHE = "generation without a cache"
HOLES = "a mask with holes"
SEVERAL = "a forward of several tokens over a filled cache"
LIKELIHOOD = "a likelihood of several tokens in one forward"
UNREACHED = "an attention that never reached the method"
SMALL = "k is at least the number of cached tokens"
WAYS_OUT = {
    NO_CACHE: "generate with use_cache=True",
    HOLES: "pad on one side only",
    LIKELIHOOD: "read a context first, then one token at a time",
    UNREACHED: "leave the model's attention implementation as attach sets it",
    SEVERAL: "decode one token at a time, or pass allow_dense_forwards=True if these forwards are"
    " meant to attend to everything",
}


class MethodBypassedError(RuntimeError):
    """Decode steps that should have gone through a method did not; the message is one sentence."""


@dataclass
class StepCount:
    """Decode steps of one attached method, by layer.

    A step that the method takes has a selection. One that it does not take is either meant so (a
    layer that the policy or the model's design leaves dense, or no more than ``k`` tokens) or
    missed.

    Attributes:
        taken: By layer, steps with a selection among more than ``k`` tokens.
        dense: By layer and reason, steps that are dense as they should be.
        missed: By layer and reason, steps that should have been taken and were not.
    """

    taken: Counter[int] = field(default_factory=Counter)
    dense: Counter[tuple[int, str]] = field(default_factory=Counter)
    missed: Counter[tuple[int, str]] = field(default_factory=Counter)

    def add(self, other: "StepCount") -> None:
        """Add what another has counted."""
        self.taken += other.taken
        self.dense += other.dense
        self.missed += other.missed

    @property
    def share_taken(self) -> float | None:
        """Share of all steps of all layers that the method took; None before the first."""
        all_steps = self.taken.total() + self.dense.total() + self.missed.total()
        return self.taken.total() / all_steps if all_steps else None

    def require_none_missed(self, method: str, k: int, layers: Iterable[int]) -> None:
        """Raise if a step was missed, or a layer took fewer steps than another.

        Args:
            method: Its name.
            k: The budget.
            layers: The layers that are left to the method.

        Raises:
            MethodBypassedError: With the counts and the way out.
        """
        layers = sorted(layers)
        reasons: Counter[str] = Counter()
        for (_, reason), steps in self.missed.items():
            reasons[reason] += steps
        if reasons:
            told = "; ".join(f"{steps} by {reason}" for reason, steps in sorted(reasons.items()))
            ways = "; ".join(WAYS_OUT[reason] for reason in sorted(reasons))
            where = ", ".join(map(str, sorted({layer for layer, _ in self.missed})))
            raise MethodBypassedError(
                f"every decode step over more than k={k} tokens must go through {method}, but of "
                f"{self.taken.total() + reasons.total()} steps of single layers {reasons.total()} "
                f"attended to everything ({told}; in layer {where}): {ways}."
            )
        # What the method took or needed not to.
        seen = {layer: self.taken[layer] + self.dense[layer, SMALL] for layer in layers}
        _require_equal(method, k, seen, max(seen.values(), default=0))

    def require(self, method: str, k: int, layers: Iterable[int], steps: int) -> None:
        """Raise unless each of some layers took exactly as many steps as were run.

        Args:
            method: Its name.
            k: The budget.
            layers: The layers that are left to the method.
            steps: Decode steps that were run over more than ``k`` tokens.

        Raises:
            MethodBypassedError: With both counts.
        """
        self.require_none_missed(method, k, layers)
        _require_equal(method, k, {layer: self.taken[layer] for layer in sorted(layers)}, steps)


def _require_equal(method: str, k: int, found: dict[int, int], steps: int) -> None:
    """Raise unless each layer has so many steps."""
    if all(count == steps for count in found.values()):
        return
    fewest = min(found, key=lambda layer: (found[layer], layer))
    raise MethodBypassedError(
        f"{len(found)} layers must take {steps} decode steps each through {method} with k={k}, "
        f"{steps * len(found)} in all, got {sum(found.values())}: layer {fewest} took "
        f"{found[fewest]}, the others of its steps never reached the method."
    )


@dataclass
class _Filling:
    """How far one layer of a cache has been read, and forwards that may have been its prompt's."""

    length: int = 0
    decoding: bool = False
    pending: int = 0


class PromptReading:
    """Tells a prompt that is read in parts from several tokens that should have been steps.

    Parts of a prompt follow one another from the first slot on, before the first decode step, and
    decode steps follow them. Whatever else has several tokens over a filled cache (a likelihood,
    the verification of a draft, a later turn of a conversation) is no part of a prompt.

    Args:
        miss: Called with the layer, the reason, and how many forwards should have been steps.
    """

    def __init__(self, miss: Callable[[int, str, int], None]) -> None:
        self._report = miss
        self._seen: WeakKeyDictionary[Any, dict[int, _Filling]] = WeakKeyDictionary()
        self._unresolved: Counter[int] = Counter()

    def several(self, cache: Any, layer: int, before: int, after: int, k: int) -> None:
        """Note a forward of several tokens.

        Args:
            cache: The cache.
            layer: Index of the layer.
            before: Tokens that were cached.
            after: Tokens that are cached now.
            k: The budget.
        """
        filling = self._filling(cache, layer)
        if before == 0:
            self._miss(layer, filling)
            self._seen[cache][layer] = _Filling(after)
            return
        continues = not filling.decoding and before in (filling.length, filling.length or before)
        if after > k:
            if continues:
                filling.pending += 1
                self._unresolved[layer] += 1
            else:
                self._miss(layer, filling)
                self._report(layer, SEVERAL, 1)
        filling.length = after

    def step(self, cache: Any, layer: int, after: int) -> None:
        """Note a decode step; ``after`` tokens are cached now."""
        filling = self._filling(cache, layer)
        if filling.pending and after != filling.length + 1:
            self._miss(layer, filling)
        self._unresolved[layer] -= filling.pending
        filling.pending = 0
        filling.decoding, filling.length = True, after

    def end(self) -> None:
        """Count as missed what no decode step followed."""
        for layer, forwards in self._unresolved.items():
            if forwards:
                self._report(layer, SEVERAL, forwards)
        self._unresolved.clear()
        self._seen.clear()

    def _filling(self, cache: Any, layer: int) -> _Filling:
        return self._seen.setdefault(cache, {}).setdefault(layer, _Filling())

    def _miss(self, layer: int, filling: _Filling) -> None:
        """Count as missed what was taken for parts of a prompt until now."""
        if filling.pending:
            self._report(layer, SEVERAL, filling.pending)
            self._unresolved[layer] -= filling.pending
            filling.pending = 0
