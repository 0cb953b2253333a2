"""Captures what some methods need of a prompt beyond keys and values.

That is its last queries and the attention that each token received. Captured only if a method
declares it in its traits.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from topkbench.methods.base import PREFILL_NEEDS, QUERY_TAIL
from topkbench.methods.sinks import softmax
from topkbench.methods.softcap import capped

BLOCK = 256  # queries per block, at most
WEIGHTS = 2**27  # attention weights in memory at once, unless a single query has more


@dataclass
class Captured:
    """What was captured of one layer during a dense forward over a prompt.

    Attributes:
        needs: Which of the two to capture.
        query_tail: ``[B, Hq, w, d]`` the last queries, at most ``QUERY_TAIL``; None if not needed.
        column_sums: float32 ``[B, Hq, n]`` attention weight that each token received, summed over
            all queries; None if not needed.
        milliseconds: How long capturing each took.
        begin: First slot of the tokens whose queries were captured, without a gap, up to ``end``.
        end: Slots of the cache that were filled after the last chunk.
    """

    needs: frozenset[str]
    query_tail: Tensor | None = None
    column_sums: Tensor | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)
    begin: int = 0
    end: int = 0

    def update(
        self,
        query: Tensor,
        key: Tensor,
        scale: float,
        kv_start: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """Add the queries of the last ``m`` tokens; a prompt may be prefilled in several chunks.

        A chunk that does not follow the previous one directly (a new prompt, or one after tokens
        that were decoded, cropped or not seen) discards what was captured before.

        Args:
            query: ``[B, Hq, m, d]``.
            key: ``[B, Hkv, n, d]`` of all tokens so far, ending with those of the queries.
            scale: The attention's factor on dot products.
            kv_start: int32 ``[B]`` first valid slot of each row; None for 0.
            softcap: The attention's logit cap, or None.
            sinks: ``[Hq]`` the logits of the attention's learned sinks, or None.
        """
        begin = key.shape[2] - query.shape[2]
        if begin == 0 or begin != self.end:
            self.query_tail = self.column_sums = None
            self.milliseconds.clear()
            self.begin = begin
        self.end = key.shape[2]
        if "query_tail" in self.needs:
            with self._timed("query_tail", query.device):
                tail = query[:, :, -QUERY_TAIL:]
                if self.query_tail is not None:
                    tail = torch.cat([self.query_tail, tail], 2)[:, :, -QUERY_TAIL:]
                self.query_tail = tail.clone()
        if "column_sums" in self.needs:
            with self._timed("column_sums", query.device):
                sums = column_sums(query, key, scale, kv_start, softcap, sinks)
                if self.column_sums is not None:
                    earlier = self.column_sums[:, :, :begin]
                    sums[:, :, : earlier.shape[2]] += earlier
                self.column_sums = sums

    @contextmanager
    def _timed(self, need: str, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = (time.perf_counter() - began) * 1e3
        self.milliseconds[need] = self.milliseconds.get(need, 0.0) + took

    def to(self, device: torch.device) -> "Captured":
        """Return a copy on another device."""
        tail = None if self.query_tail is None else self.query_tail.to(device)
        sums = None if self.column_sums is None else self.column_sums.to(device)
        return replace(self, query_tail=tail, column_sums=sums)

    def take_rows(self, rows: Tensor) -> None:
        """Let row ``b`` become the present row ``rows[b]``; rows may repeat or be left out."""
        for need in ("query_tail", "column_sums"):
            states = getattr(self, need)
            if states is not None:
                setattr(self, need, states.index_select(0, rows.to(states.device)))

    def of_part(self) -> list[str]:
        """Return the needs that were captured of a part of the first ``end`` tokens only."""
        if self.begin == 0:
            return []
        has_tail = self.end - self.begin >= QUERY_TAIL
        return sorted(self.needs - {"query_tail"} if has_tail else self.needs)

    def merged(self, other: "Captured") -> "Captured":
        """Return the union of two captures of the same prompt."""
        return replace(
            self,
            needs=self.needs | other.needs,
            query_tail=other.query_tail if self.query_tail is None else self.query_tail,
            column_sums=other.column_sums if self.column_sums is None else self.column_sums,
            milliseconds=self.milliseconds | other.milliseconds,
        )

    @classmethod
    def batch(cls, rows: Sequence["Captured"], n: int, device: torch.device) -> "Captured":
        """Join captures of single prompts into one batch with rows of ``n`` slots.

        Query tails are right-aligned: shorter ones are padded with zeros in front.
        """
        tails = [row.query_tail for row in rows if row.query_tail is not None]
        sums = [row.column_sums for row in rows if row.column_sums is not None]
        tail = column = None
        if tails:
            width = max(one.shape[2] for one in tails)
            tail = torch.cat([pad(one, (0, 0, width - one.shape[2], 0)) for one in tails])
            tail = tail.to(device)
        if sums:
            column = torch.cat([pad(one, (0, n - one.shape[2])) for one in sums]).to(device)
        return cls(rows[0].needs, tail, column)

    def inputs(self, n: int) -> dict[str, Tensor | None]:
        """Return arguments of ``PrefillInputs`` for the first ``n`` slots.

        Tokens decoded after the prompt have column sums of zero.
        """
        sums = self.column_sums
        if sums is not None:
            sums = pad(sums[:, :, :n], (0, max(0, n - sums.shape[2])))
        return {"query_tail": self.query_tail, "column_sums": sums}


def column_sums(
    query: Tensor,
    key: Tensor,
    scale: float,
    kv_start: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Sum the causal attention weights over the queries, a block of queries at a time.

    Args:
        query: ``[B, Hq, m, d]``, of the last ``m`` tokens.
        key: ``[B, Hkv, n, d]``.
        scale: The attention's factor on dot products.
        kv_start: int32 ``[B]`` first valid slot of each row; None for 0.
        softcap: The attention's logit cap, or None.
        sinks: ``[Hq]`` the logits of the attention's learned sinks, or None.

    Returns:
        float32 ``[B, Hq, n]``.
    """
    batch_size, num_heads, m, _ = query.shape
    num_kv_heads, n = key.shape[1], key.shape[2]
    grouped = query.float().unflatten(1, (num_kv_heads, -1))
    keys = key.float().mT[:, :, None]
    total = grouped.new_zeros(batch_size, num_kv_heads, num_heads // num_kv_heads, n)
    slots = torch.arange(n, device=key.device)
    start = torch.zeros(batch_size, dtype=torch.int32, device=key.device)
    start = start if kv_start is None else kv_start
    block = max(1, min(BLOCK, WEIGHTS // (batch_size * num_heads * n)))
    for begin in range(0, m, block):
        part = grouped[:, :, :, begin : begin + block]
        positions = n - m + begin + torch.arange(part.shape[3], device=key.device)
        visible = int(positions[-1]) + 1  # no query of the block sees later keys
        logits = capped((part * scale) @ keys[..., :visible], softcap)
        causal = slots[:visible] <= positions[:, None]
        allowed = causal & (slots[:visible] >= start[:, None, None])
        weights = softmax(logits.masked_fill_(~allowed[:, None, None], -torch.inf), sinks)
        # A padding query attends to nothing: its softmax may be NaN, and must add zero.
        total[..., :visible] += weights.nan_to_num(0.0).sum(3)
    return total.flatten(1, 2)


def missing(needs: frozenset[str], captured: Mapping[str, Tensor | None]) -> list[str]:
    """Return which of a method's prefill needs were not captured."""
    return sorted(need for need in needs & PREFILL_NEEDS if captured.get(need) is None)
