"""Runs an attached method's decode steps of one layer, of one token or of several known ones."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from topkbench.kernels.full_attention.api import full_attention
from topkbench.methods.base import (
    AnyMethod,
    CacheView,
    Index,
    Observer,
    StepContext,
    StepResult,
)
from topkbench.models.cache_watch import Lengths
from topkbench.models.layer_index import LayerIndices
from topkbench.models.step_guard import StepGuard

MOST_TOGETHER = 64  # known tokens in one call, which bounds the memory of their scores


@dataclass
class LayerForward:
    """One layer's forward of tokens that follow those in a cache.

    Attributes:
        cache: The cache.
        key: The keys that the cache's layer returned.
        query: ``[B, Hq, q, d]``.
        speculated: ``[B, Hq, q, d]`` queries from the previous layer's input, or None.
        context: The step of the newest token. Its cache says how many tokens are new.
        lengths: The cache's valid slots.
        counts: How many of the new tokens each row has; the others are padding behind them.
    """

    cache: Any
    key: Tensor
    query: Tensor
    speculated: Tensor | None
    context: StepContext
    lengths: Lengths
    counts: Sequence[int]

    @property
    def layer(self) -> int:
        """Index of the layer."""
        return self.context.layer

    @property
    def num_new(self) -> int:
        """New tokens of each row, padding included."""
        return self.query.shape[2]

    def cache_at(self, token: int) -> CacheView:
        """Return the cache as it is at the step of one of the new tokens."""
        return self.context.cache.without_newest(self.num_new - 1 - token)

    def step(self, token: int) -> StepContext:
        """Return the step of one of the new tokens, in all rows."""
        queries, speculated = self._queries(lambda states: states[:, :, token])
        view = self.cache_at(token)
        return replace(self.context, query_states=queries, previous_query=speculated, cache=view)

    def steps(self, row: int, first: int, end: int) -> StepContext:
        """Return the steps of one row's tokens ``first`` to ``end - 1`` as the rows of one step."""

        def of_tokens(states: Tensor) -> Tensor:
            return states[row, :, first:end].transpose(0, 1)

        queries, speculated = self._queries(of_tokens)
        view = self.context.cache.by_token(row, self.ends(row)[first:end])
        return replace(self.context, query_states=queries, previous_query=speculated, cache=view)

    def ends(self, row: int) -> list[int]:
        """Return the cached tokens at the step of each of a row's own new tokens."""
        begin = self._padded_ends[row] - self.num_new
        return list(range(begin + 1, begin + self.counts[row] + 1))

    @functools.cached_property
    def _padded_ends(self) -> list[int]:
        """Each row's slots, padding included; read once, as a GPU would wait each time."""
        return self.lengths.ends(len(self.counts))

    def without_padding(self) -> Lengths:
        """Return the valid slots without the padding."""
        padded = self._padded_ends
        ends = [end - self.num_new + count for end, count in zip(padded, self.counts, strict=True)]
        if ends == padded:
            return self.lengths
        kv_len = torch.tensor(ends, dtype=torch.int32, device=self.key.device)
        return replace(self.lengths, n=max(ends), kv_len=kv_len)

    def _queries(self, of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return a part of the queries and of the speculated ones, grouped by KV head."""
        num_kv_heads = self.key.shape[1]
        queries = of(self.query).unflatten(1, (num_kv_heads, -1))
        if self.speculated is None:
            return queries, None
        return queries, of(self.speculated).unflatten(1, (num_kv_heads, -1))


class Steps:
    """Runs the decode steps of an attached method.

    Args:
        method: The method.
        observer: Called at each stage, and after each step or call of several steps, whose rows
            are then the tokens of one row.
        guard: Counts the steps.
        indices: The method's indices.
    """

    def __init__(
        self, method: AnyMethod, observer: Observer, guard: StepGuard, indices: LayerIndices
    ) -> None:
        self.method, self.observer, self.guard, self.indices = method, observer, guard, indices

    def run(self, forward: LayerForward) -> Tensor:
        """Run the steps of a layer's new tokens; return ``[B, q, Hq, d]``, zeros for padding."""
        layer = forward.layer
        if layer in self.guard.dense:
            return self._dense(forward)
        if not self.method.selects:
            context = forward.step(0)
            with self.observer.stage("full", layer):
                result = self.method.step(None, context)
            self.observer.on_step(context, result)
            return result.out[:, None]
        index = self.indices.before_new_tokens(forward.cache, forward.context, forward.lengths)
        if forward.num_new > 1 and self.method.known_tokens(forward.counts) == "together":
            return self._together(forward, index)
        return self._in_turn(forward, index)

    def observe_dense(self, forward: LayerForward, out: Tensor) -> None:
        """Show the observer full attention's steps, which ran in one dense forward.

        Args:
            forward: The forward.
            out: ``[B, q, Hq, d]``.
        """
        for row, count in enumerate(forward.counts):
            if count:
                result = StepResult(out[row, :count], None, None)
                self.observer.on_step(forward.steps(row, 0, count), result)

    def _dense(self, forward: LayerForward) -> Tensor:
        """Run one step of a layer that the policy keeps dense."""
        cache = forward.context.cache
        with self.observer.stage("full", forward.layer):
            out = full_attention(
                forward.query[:, :, 0],
                cache.key_states,
                cache.value_states,
                forward.context.scale,
                cache.kv_start,
                cache.kv_len,
                forward.context.softcap,
                forward.context.sinks,
            )
        return out[:, None]

    def _in_turn(self, forward: LayerForward, index: Index) -> Tensor:
        outs = []
        for token in range(forward.num_new):
            context = forward.step(token)
            with self.observer.stage("append", forward.layer):
                self.method.append(index, *context.cache.newest())
            if token == forward.num_new - 1:
                self.indices.keep(forward.cache, forward.layer, index, forward.key, forward.lengths)
            result = self._step(index, context)
            outs.append(result.out)
            # Where tokens were freed the step is sparse, however few tokens are left.
            can_select = context.cache.n > context.policy.k or context.cache.freed is not None
            is_taken = can_select and result.selection is not None
            rows = len(forward.counts)
            self.guard.step(forward.layer, rows * is_taken, rows * (not can_select))
            if self.method.compacts and result.selection is not None:
                with self.observer.stage("append", forward.layer):
                    self.indices.compact(forward.cache, index, result.selection, context)
        return torch.stack(outs, 1)

    def _together(self, forward: LayerForward, index: Index) -> Tensor:
        """Append all tokens, and run the steps of each row's tokens as rows of one step."""
        with self.observer.stage("append", forward.layer):
            for token in range(forward.num_new):
                self.method.append(index, *forward.cache_at(token).newest())
        lengths = forward.without_padding()
        shape = forward.query.transpose(1, 2).shape[:3]
        out = forward.query.new_zeros(*shape, forward.context.cache.value_states.shape[3])
        for row, count in enumerate(forward.counts):
            for first in range(0, count, MOST_TOGETHER):
                end = min(first + MOST_TOGETHER, count)
                ends = forward.ends(row)[first:end]
                context = forward.steps(row, first, end)
                result = self._step(index.by_token(row, ends), context)
                out[row, first:end] = result.out
                taken = sum(n > context.policy.k for n in ends)
                self.guard.step(forward.layer, taken, len(ends) - taken)
        if lengths.kv_len is not None and lengths is not forward.lengths:
            index.end_at(lengths.kv_len, lengths.n)
        self.indices.keep(forward.cache, forward.layer, index, forward.key, lengths)
        return out

    def _step(self, index: Index, context: StepContext) -> StepResult:
        layer = context.layer
        result = self.method.step(index, context, lambda name: self.observer.stage(name, layer))
        self.observer.on_step(context, result)
        return result
