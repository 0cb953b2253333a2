"""Counts an attached method's decode steps, and refuses a block in which some bypassed it."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from topkbench.models.cache_watch import Lengths
from topkbench.models.compat import cached_tokens
from topkbench.models.step_count import (
    HOLES,
    LIKELIHOOD,
    NO_CACHE,
    REMEDIES,
    SMALL,
    UNREACHED,
    PromptReading,
    StepCount,
)


class StepGuard:
    """The decode steps of one attached method: those it took, those it did not, and why.

    Args:
        method: The method's name.
        k: The budget.
        layers: The layers in which the method selects; none if it reads the whole cache, and
            nothing is then counted.
        dense: The reason why a layer is always dense, for each such layer.
        allow_dense_forwards: Accept forwards of several tokens over a filled cache.

    Attributes:
        count: The decode steps so far, by layer.
        scores_text: Whether the running forward was given ``labels``, and so computes the
            likelihood of its own tokens.
    """

    def __init__(
        self,
        method: str,
        k: int,
        layers: Sequence[int],
        dense: Mapping[int, str],
        allow_dense_forwards: bool,
    ) -> None:
        self.method, self.k, self.layers, self.dense = method, k, layers, dense
        self.allow_dense_forwards = allow_dense_forwards
        self.count = StepCount()
        self.scores_text = False
        self._reading = PromptReading(self._miss)
        # By layer, the queries of an attention call that has not reached our function yet.
        self._unfinished_queries: dict[int, int] = {}
        self._warned: set[str] = set()

    def begin(self, layer: int, q_len: int, cache: Any) -> None:
        """Record that a layer's attention begins; the one before it must have reached us.

        Args:
            layer: Index of the layer.
            q_len: Queries of each row; 0 if unknown.
            cache: The cache that the layer's last attention wrote to, if known.
        """
        self._end_unreached(layer, cache)
        if q_len:
            self._unfinished_queries[layer] = q_len

    def reached(self, layer: int) -> None:
        """Record that a layer's attention has called our function."""
        self._unfinished_queries.pop(layer, None)

    def forward(
        self, layer: int, cache: Any, lengths: Lengths | None, q_len: int, key: Tensor
    ) -> None:
        """Count a layer's forward as dense or missed; ``step`` counts steps of the method.

        Args:
            layer: Index of the layer.
            cache: The cache; None without one.
            lengths: Its valid slots; None if a row's are not one range.
            q_len: Queries of each row.
            key: ``[B, Hkv, n, d]`` the keys that are attended to.
        """
        if not self.layers:
            return
        if q_len > 1:
            if layer not in self.dense:
                self._several_tokens(layer, cache, q_len, key.shape[2])
            return
        n = key.shape[2] if lengths is None else lengths.n
        if n <= 1:
            return
        if layer in self.dense:
            self.count.dense[layer, self.dense[layer]] += 1
        elif cache is None or lengths is None:
            if n > self.k:
                self._miss(layer, NO_CACHE if cache is None else HOLES)
            else:
                self.count.dense[layer, SMALL] += 1
        else:
            self._reading.step(cache, layer, n)

    def step(self, layer: int, has_selection: bool, can_select: bool) -> None:
        """Count a decode step of the method.

        Args:
            layer: Index of the layer.
            has_selection: Whether the method selected tokens.
            can_select: Whether there were more than ``k`` tokens to choose from.
        """
        if can_select:
            self.count.taken[layer] += has_selection
        else:
            self.count.dense[layer, SMALL] += 1

    def require_all(self, caches: Mapping[int, Any]) -> None:
        """Raise if decode steps that should have gone through the method did not.

        Args:
            caches: The cache that each layer's last attention wrote to, if known.

        Raises:
            MethodBypassedError: With the counts, the reasons and the remedy.
        """
        if self.layers:
            for layer in list(self._unfinished_queries):
                self._end_unreached(layer, caches.get(layer))
            self._reading.end()
            self.count.require_none_missed(self.method, self.k, self.layers)

    def require(self, steps: int) -> None:
        """Raise unless the method took exactly ``steps`` decode steps in each of its layers.

        Args:
            steps: Decode steps that the caller ran over more than ``k`` tokens.

        Raises:
            MethodBypassedError: With both counts.
        """
        if self.layers:
            self.count.require(self.method, self.k, self.layers, steps)

    def _several_tokens(self, layer: int, cache: Any, q_len: int, slots: int) -> None:
        if cache is None:
            if slots > self.k:
                self._miss(layer, NO_CACHE)
        elif self.allow_dense_forwards:
            return
        elif self.scores_text and slots > self.k:
            self._miss(layer, LIKELIHOOD)
        else:
            cached = cached_tokens(cache, layer)
            after = slots if cached is None else cached
            self._reading.multi_token_forward(cache, layer, after - q_len, after, self.k)

    def _end_unreached(self, layer: int, cache: Any) -> None:
        """Count a decode step as missed if the layer's module never called our attention."""
        q_len = self._unfinished_queries.pop(layer, None)
        if q_len is None or cache is None or layer not in self.layers:
            return
        cached = cached_tokens(cache, layer)
        if cached is not None and cached > max(q_len, self.k):
            self._miss(layer, UNREACHED)

    def _miss(self, layer: int, reason: str, steps: int = 1) -> None:
        """Count steps that should have gone through the method; warn once per reason."""
        self.count.missed[layer, reason] += steps
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"{self.method} does not act on {reason}, which attends to everything: "
                f"{REMEDIES[reason]}.",
                stacklevel=2,
            )
