"""Counts an attached method's decode steps, and refuses a block in which some bypassed it."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from topkbench.methods.base import KnownTokens
from topkbench.models.cache_watch import Lengths
from topkbench.models.compat import cached_tokens
from topkbench.models.step_count import (
    ALLOWED,
    HOLES,
    LIKELIHOOD,
    NO_CACHE,
    REMEDIES,
    SEVERAL,
    SMALL,
    UNREACHED,
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
        allow_dense_forwards: Leave forwards of several tokens over a filled cache dense.

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
        # By layer, queries and new tokens of an attention call that has not reached our function.
        self._unfinished: dict[int, tuple[int, int]] = {}
        self._warned: set[str] = set()

    def begin(self, layer: int, batch_size: int, q_len: int, cache: Any) -> None:
        """Record that a layer's attention begins; the one before it must have reached us.

        Args:
            layer: Index of the layer.
            batch_size: Rows; 0 if unknown.
            q_len: Queries of each row; 0 if unknown.
            cache: The cache that the layer's last attention wrote to, if known.
        """
        self._end_unreached(layer, cache)
        if q_len:
            self._unfinished[layer] = q_len, batch_size * q_len

    def reached(self, layer: int) -> None:
        """Record that a layer's attention has called our function."""
        self._unfinished.pop(layer, None)

    def forward(
        self,
        layer: int,
        cache: Any,
        lengths: Lengths | None,
        num_tokens: int,
        slots: int,
        is_prompt: bool,
        how: KnownTokens | None,
    ) -> bool:
        """Return whether a layer's forward is decode steps; if not, count it as dense or missed.

        ``step`` counts the method's steps.

        Args:
            layer: Index of the layer.
            cache: The cache; None without one.
            lengths: Its valid slots; None if a row's are not one range.
            num_tokens: New tokens of all rows together.
            slots: Slots that are attended to.
            is_prompt: Whether the tokens are a prompt.
            how: How several tokens go through the method; None for one token of each row.
        """
        n = slots if lengths is None else lengths.n
        if is_prompt:
            if self.scores_text and n > self.k and layer in self.layers and how is not None:
                self._miss(layer, LIKELIHOOD)
            return False
        if not self.layers or layer in self.dense:
            is_step = how is None and cache is not None and lengths is not None and n > 1
            if self.layers and n > 1 and (how is None or cache is not None):
                self.count.dense[layer, self.dense[layer]] += num_tokens
            return is_step
        if n <= 1 or (how is not None and cache is not None and self.allow_dense_forwards):
            if n > self.k:
                self._warn(ALLOWED)
            return False
        reason = None
        if cache is None:
            reason = NO_CACHE
        elif lengths is None:
            reason = HOLES
        elif how == "one by one":
            reason = SEVERAL
        if reason is None:
            return True
        if n > self.k:
            self._miss(layer, reason, num_tokens)
        elif how is None or cache is not None:
            self.count.dense[layer, SMALL] += num_tokens
        return False

    def step(self, layer: int, taken: int, small: int) -> None:
        """Count decode steps of the method, one for each token of each row.

        Args:
            layer: Index of the layer.
            taken: Steps with a selection among more than ``k`` tokens.
            small: Steps with at most ``k`` tokens to choose from.
        """
        if taken:
            self.count.taken[layer] += taken
        if small:
            self.count.dense[layer, SMALL] += small

    def require_all(self, caches: Mapping[int, Any]) -> None:
        """Raise if decode steps that should have gone through the method did not.

        Args:
            caches: The cache that each layer's last attention wrote to, if known.

        Raises:
            MethodBypassedError: With the counts, the reasons and the remedy.
        """
        if self.layers:
            for layer in list(self._unfinished):
                self._end_unreached(layer, caches.get(layer))
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

    def _end_unreached(self, layer: int, cache: Any) -> None:
        """Count a decode step as missed if the layer's module never called our attention."""
        q_len, num_tokens = self._unfinished.pop(layer, (0, 0))
        if not q_len or cache is None or layer not in self.layers:
            return
        cached = cached_tokens(cache, layer)
        if cached is not None and cached > max(q_len, self.k):
            self._miss(layer, UNREACHED, num_tokens)

    def _miss(self, layer: int, reason: str, steps: int = 1) -> None:
        """Count steps that should have gone through the method; warn once per reason."""
        self.count.missed[layer, reason] += steps
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            remedy = f": {REMEDIES[reason]}" if reason in REMEDIES else ""
            warnings.warn(
                f"{self.method} does not act on {reason}, which attends to everything{remedy}.",
                stacklevel=2,
            )
