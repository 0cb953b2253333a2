"""The ranking recipe: hash projections learned from the order that attention gives to keys."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

# Share of the keys drawn that count as a query's top: from the budgets of long contexts, where one
# key in a hundred is kept, to those of short ones.
TOP_SHARES = (1 / 128, 1 / 8)
LATE_TOKENS = 48  # at a sequence's end: its question and answer
WARM_UP = 20  # steps
LAST_RATE = 0.02  # of the learning rate, at the last step
TEMPERATURE_RATE = 0.125  # of the learning rate


@dataclass(frozen=True, kw_only=True)
class RankingRecipe:
    """Learn one layer's hash projections by ranking the keys of calibration sequences.

    Keys and queries have projections of their own, ``W`` and ``V_1 .. V_c``, ``c`` being
    ``query_codes``. A key is scored as it is when decoding, by the codes of its group's queries::

        s(k) = sum over the group's queries q, and i = 1 .. c, of  sign(q V_i) . sign(k W)

    Of each sequence ``pool`` queries of its second half and its last 48 are kept. A step draws a
    sequence, ``queries`` of those and ``keys`` of its keys. With T the keys
    among them that attention ranks highest, by its softmax summed over the group, the loss is the
    cross-entropy between the uniform distribution on T and a softmax of the scores::

        loss = mean over queries of  -1 / |T| * sum over k in T of  log softmax(t s)(k)

    where the factor ``t`` is learned too. The share of T is drawn anew at each step, evenly in its
    logarithm, since one code serves all budgets. A sign has no slope and is given that of ``tanh``
    (straight-through), so the loss is the true codes', and its gradient an estimate.

    Attributes:
        rbit: Bits of a code.
        query_codes: Codes of a query.
        use_norm: Weigh scores by the keys' lengths, as they will be when decoding.
        centre_keys: Hash keys less their sequence's mean, as they will be when decoding.
        steps: Of Adam.
        learning_rate: For projections whose entries are about 1; it rises for 20 steps, then falls
            along half a cosine.
        pool: Queries drawn once from each sequence's second half.
        queries: Drawn at a step.
        keys: Drawn at a step; all where a sequence has fewer.
        late_share: Share of a step's queries that are from a sequence's last 48 tokens, question
            and answer, as those that decoding has to serve; the others are from the pool.

    Source:
        Ours. HATA's own loss (arXiv:2506.02572, equation 9) weighs pairs, each by itself. Separate
        codes for queries and keys are HashAttention's (arXiv:2412.14468), which learns networks by
        binary cross-entropy. The slope is of arXiv:1308.3432.
    """

    rbit: int
    query_codes: int
    use_norm: bool
    centre_keys: bool
    steps: int
    learning_rate: float
    pool: int
    queries: int
    keys: int
    late_share: float

    def positions(self, lengths: Sequence[int], generator: torch.Generator) -> list[list[int]]:
        """Return the positions of the queries kept of each sequence: the pool, then the late."""
        return [
            [
                *torch.randint(length // 2, length, (self.pool,), generator=generator).tolist(),
                *range(max(length - LATE_TOKENS, length // 2), length),
            ]
            for length in lengths
        ]

    def fit_layer(
        self,
        states: list[tuple[Tensor, Tensor]],
        generator: torch.Generator,
        report: Callable[[int, int, float], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return projections of keys, ``[Hkv, d, rbit]``, and queries, ``[Hkv, d, c * rbit]``.

        Args:
            states: One layer's ``[Hq, m, d]`` queries at the ``m`` positions of each sequence, and
                its ``[Hkv, n, d]`` keys.
            generator: Draws the rest, and the positions again: in the state in which they were
                drawn before.
            report: Told steps done, steps in all and the loss after each step.
        """
        num_kv_heads, _, head_dim = states[0][1].shape
        positions = self.positions([keys.shape[1] for _, keys in states], generator)
        sequences = [
            (torch.tensor(at), queries, keys)
            for at, (queries, keys) in zip(positions, states, strict=True)
        ]
        # A factor changes no sign; these bring what is projected to where a tanh has its slope.
        first = self.draw(sequences, generator)
        shrink = (head_dim * first.keys.square().mean((1, 2), keepdim=True)).rsqrt()
        query_shrink = (head_dim * first.queries.square().mean((1, 2, 3))).rsqrt()[:, None, None]
        key_weight, query_weight = (
            weight.to(first.keys.device).requires_grad_()
            for weight in self._start(num_kv_heads, head_dim, generator)
        )
        start = math.log(1.2 / self.rbit**0.5)
        log_factor = torch.full((num_kv_heads, 1, 1), start, device=shrink.device).requires_grad_()
        groups: list[dict[str, Any]] = [
            {"params": [key_weight, query_weight]},
            {"params": [log_factor], "lr": TEMPERATURE_RATE * self.learning_rate},
        ]
        optimiser = torch.optim.Adam(groups, self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, self._rate)
        for step in range(self.steps):
            batch = self.draw(sequences, generator)
            loss = self.loss(key_weight * shrink, query_weight * query_shrink, log_factor, batch)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            if report is not None:
                report(step + 1, self.steps, loss.item())
        return key_weight.detach(), query_weight.detach()

    def _start(
        self, num_kv_heads: int, head_dim: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw Gaussian projections, alike for keys and queries; further codes are blurred."""
        key_weight = torch.randn(num_kv_heads, head_dim, self.rbit, generator=generator)
        further = self.query_codes - 1
        blur = torch.randn(num_kv_heads, head_dim, further * self.rbit, generator=generator)
        blurred = key_weight.repeat(1, 1, further) + 0.5 * blur
        return key_weight, torch.cat([key_weight, blurred], 2)

    def _rate(self, step: int) -> float:
        falling = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min(1.0, (step + 1) / WARM_UP) * (LAST_RATE + (1 - LAST_RATE) * falling)

    def draw(
        self, sequences: list[tuple[Tensor, Tensor, Tensor]], generator: torch.Generator
    ) -> "RankingBatch":
        """Draw a sequence, some of its queries and keys, and how many keys are a query's top.

        Args:
            sequences: Of each: positions of its queries, as from ``positions``; its queries; keys.
            generator: Draws.
        """
        drawn = int(torch.randint(len(sequences), (1,), generator=generator).item())
        positions, query_states, key_states = sequences[drawn]
        num_kv_heads, length, head_dim = key_states.shape
        late = round(self.late_share * self.queries)
        chosen = torch.cat(
            [
                torch.randint(self.pool, (self.queries - late,), generator=generator),
                torch.randint(self.pool, len(positions), (late,), generator=generator),
            ]
        )
        slots = torch.randperm(length, generator=generator)[: self.keys]
        low, high = TOP_SHARES
        share = low * (high / low) ** torch.rand((), generator=generator).item()

        visible = (slots <= positions[chosen][:, None]).to(key_states.device)
        queries = query_states[:, chosen.to(query_states.device)].float()
        queries = queries.unflatten(0, (num_kv_heads, -1))
        keys = key_states[:, slots.to(key_states.device)].float()
        if self.centre_keys:  # attention ranks the same keys highest
            keys = keys - keys.mean(1, keepdim=True)
        logits = queries @ keys[:, None].mT * head_dim**-0.5
        weights = logits.masked_fill(~visible, -torch.inf).softmax(-1).sum(1)
        # A top may hold no key that its query does not see.
        count = min(max(1, int(share * len(slots))), int(visible.sum(1).min()))
        return RankingBatch(queries, keys, visible, weights.topk(count).indices)

    def loss(
        self, key_weight: Tensor, query_weight: Tensor, log_factor: Tensor, batch: "RankingBatch"
    ) -> Tensor:
        """Return the mean over queries and heads of the cross-entropy above.

        Args:
            key_weight: ``[Hkv, d, rbit]``.
            query_weight: ``[Hkv, d, c * rbit]``.
            log_factor: ``[Hkv, 1, 1]`` logarithm of t; scores are divided by the codes summed.
            batch: What ``draw`` returned.
        """
        hashed = signs(batch.queries @ query_weight[:, None])
        hashed = hashed.unflatten(-1, (self.query_codes, self.rbit)).mean((1, 3))
        scores = hashed @ signs(batch.keys @ key_weight).mT
        if self.use_norm:
            norms = torch.linalg.vector_norm(batch.keys, dim=-1)
            scores = scores * (norms / norms.mean(-1, keepdim=True))[:, None]
        scores = (log_factor.exp() * scores).masked_fill(~batch.visible, -torch.inf)
        return -log_softmax(scores, -1).gather(-1, batch.top).mean()


@dataclass
class RankingBatch:
    """Queries and keys of one sequence, and which keys attention ranks highest.

    Attributes:
        queries: float32 ``[Hkv, G, Q, d]``.
        keys: float32 ``[Hkv, K, d]``.
        visible: bool ``[Q, K]``: keys not behind the query.
        top: int64 ``[Hkv, Q, m]`` indices of keys, highest first.
    """

    queries: Tensor
    keys: Tensor
    visible: Tensor
    top: Tensor


def signs(projected: Tensor) -> Tensor:
    """Return 1 where positive and -1 elsewhere, with the slope of ``tanh``."""
    relaxed = torch.tanh(projected)
    return relaxed + ((projected > 0).to(relaxed.dtype) * 2 - 1 - relaxed).detach()
