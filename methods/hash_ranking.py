"""The ranking recipe: learns hash projections from the order of keys by attention weight."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from topkbench.methods.hash_training import LATE_TOKENS, rising_and_falling

# Range of the share of drawn keys that count as a query's top keys: from the budgets of long
# contexts, where one key in a hundred is kept, to those of short ones.
TOP_SHARES = (1 / 128, 1 / 8)
TEMPERATURE_RATE = 0.125  # learning rate of the factor t, relative to the setting


@dataclass(frozen=True, kw_only=True)
class RankingRecipe:
    """Learn one layer's hash projections by ranking the keys of calibration sequences.

    Keys and queries have separate projections, ``W`` and ``V_1 .. V_c``, where ``c`` is
    ``query_codes``. A key is scored as in decoding, by the codes of its group's queries::

        s(k) = sum over the group's queries q, and i = 1 .. c, of  sign(q V_i) . sign(k W)

    Of each sequence, ``pool`` queries of its second half and its last 48 queries are kept. A step
    draws a sequence, ``queries`` of these queries and ``keys`` of its keys. Let T be the drawn keys
    that attention ranks highest, by its softmax summed over the group. The loss is the
    cross-entropy between the uniform distribution on T and a softmax of the scores::

        loss = mean over queries of  -1 / |T| * sum over k in T of  log softmax(t s)(k)

    where the factor ``t`` is learned too. The share of keys in T is drawn again at each step,
    log-uniformly, since one code serves all budgets. With several ``widths`` the loss is the mean
    over them, each with the first bits of the codes and a factor of its own, so that a prefix of a
    code is a code. The sign's gradient is replaced by that of
    ``tanh`` (straight-through), so the loss is that of the true codes and its gradient an estimate.

    Attributes:
        widths: Numbers of bits at which codes are used, ascending; the last one is all bits.
        query_codes: Codes per query.
        use_norm: Multiply scores by the keys' norms, as in decoding.
        centre_keys: Subtract the sequence's mean from its keys before hashing, as in decoding.
        steps: Steps of Adam.
        learning_rate: For projections whose entries are about 1; it rises for 20 steps, then falls
            along half a cosine.
        pool: Queries drawn once from each sequence's second half.
        queries: Queries drawn per step.
        keys: Keys drawn per step; all if a sequence has fewer.
        late_share: Share of a step's queries from the sequence's last 48 tokens (question and
            answer), which resemble the queries of decoding; the others are from the pool.

    Source:
        Ours. HATA's loss (arXiv:2506.02572, equation 9) weighs each pair of query and key by
        itself. Separate codes for queries and keys are from HashAttention (arXiv:2412.14468), which
        trains networks by binary cross-entropy. The straight-through estimator is from
        arXiv:1308.3432. That one fit serves several widths is Matryoshka representation learning
        (arXiv:2205.13147), here of bits.
    """

    widths: Sequence[int]
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
        """Return the positions of each sequence's kept queries: the pool, then the last ones."""
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
    ) -> dict[str, Tensor]:
        """Return ``hash_weight [Hkv, d, rbit]`` of keys, ``query_weight [Hkv, d, c * rbit]``.

        Args:
            states: One layer's ``[Hq, m, d]`` queries at the ``m`` positions of each sequence, and
                its ``[Hkv, n, d]`` keys.
            generator: Must be in the state in which ``positions`` was called to choose the queries,
                as it draws the same positions again; then draws the rest.
            report: Called after each step with the steps done, the total and the loss.
        """
        num_kv_heads, _, head_dim = states[0][1].shape
        positions = self.positions([keys.shape[1] for _, keys in states], generator)
        sequences = [
            (torch.tensor(at), queries, keys)
            for at, (queries, keys) in zip(positions, states, strict=True)
        ]
        # A factor changes no sign; these scale the projections to where tanh has its slope.
        first = self.draw(sequences, generator)
        shrink = (head_dim * first.keys.square().mean((1, 2), keepdim=True)).rsqrt()
        query_shrink = (head_dim * first.queries.square().mean((1, 2, 3))).rsqrt()[:, None, None]
        key_weight, query_weight = (
            weight.to(first.keys.device).requires_grad_()
            for weight in self._start(num_kv_heads, head_dim, generator)
        )
        log_factors = [
            torch.full(
                (num_kv_heads, 1, 1), math.log(1.2 / width**0.5), device=shrink.device
            ).requires_grad_()
            for width in self.widths
        ]
        groups: list[dict[str, Any]] = [
            {"params": [key_weight, query_weight]},
            {"params": log_factors, "lr": TEMPERATURE_RATE * self.learning_rate},
        ]
        optimiser = torch.optim.Adam(groups, self.learning_rate)
        schedule = rising_and_falling(optimiser, self.steps)
        for step in range(self.steps):
            batch = self.draw(sequences, generator)
            loss = self.loss(key_weight * shrink, query_weight * query_shrink, log_factors, batch)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            if report is not None:
                report(step + 1, self.steps, loss.item())
        return {"hash_weight": key_weight.detach(), "query_weight": query_weight.detach()}

    def _start(
        self, num_kv_heads: int, head_dim: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw Gaussian projections, the same for keys and queries; extra codes get noise."""
        key_weight = torch.randn(num_kv_heads, head_dim, self.rbit, generator=generator)
        extra = self.query_codes - 1
        noise = torch.randn(num_kv_heads, head_dim, extra * self.rbit, generator=generator)
        noisy = key_weight.repeat(1, 1, extra) + 0.5 * noise
        return key_weight, torch.cat([key_weight, noisy], 2)

    @property
    def rbit(self) -> int:
        """Bits per code."""
        return self.widths[-1]

    def draw(
        self, sequences: list[tuple[Tensor, Tensor, Tensor]], generator: torch.Generator
    ) -> "RankingBatch":
        """Draw a sequence, some of its queries and keys, and the number of top keys.

        Args:
            sequences: For each sequence the positions of its queries, as returned by
                ``positions``, its queries, and its keys.
            generator: Random generator.
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
        if self.centre_keys:  # does not change attention's ranking of keys
            keys = keys - keys.mean(1, keepdim=True)
        logits = queries @ keys[:, None].mT * head_dim**-0.5
        weights = logits.masked_fill(~visible, -torch.inf).softmax(-1).sum(1)
        # A query's top keys must be visible to it.
        count = min(max(1, int(share * len(slots))), int(visible.sum(1).min()))
        return RankingBatch(queries, keys, visible, weights.topk(count).indices)

    def loss(
        self,
        key_weight: Tensor,
        query_weight: Tensor,
        log_factors: Sequence[Tensor],
        batch: "RankingBatch",
    ) -> Tensor:
        """Return the mean over queries, heads and widths of the cross-entropy above.

        Args:
            key_weight: ``[Hkv, d, rbit]``.
            query_weight: ``[Hkv, d, c * rbit]``.
            log_factors: For each width ``[Hkv, 1, 1]`` logarithm of t. Here scores are means over
                the group's queries and codes, not sums.
            batch: What ``draw`` returned.
        """
        hashed = signs(batch.queries @ query_weight[:, None])
        hashed = hashed.unflatten(-1, (self.query_codes, self.rbit)).mean((1, 3))
        keys = signs(batch.keys @ key_weight)
        losses: list[Tensor] = []
        scores, first = None, 0
        for width, log_factor in zip(self.widths, log_factors, strict=True):
            more = hashed[..., first:width] @ keys[..., first:width].mT
            scores, first = (more if scores is None else scores + more), width
            weighted = scores
            if self.use_norm:
                norms = torch.linalg.vector_norm(batch.keys, dim=-1)
                weighted = scores * (norms / norms.mean(-1, keepdim=True))[:, None]
            logits = (log_factor.exp() * weighted).masked_fill(~batch.visible, -torch.inf)
            losses.append(-log_softmax(logits, -1).gather(-1, batch.top).mean())
        return torch.stack(losses).mean()


@dataclass
class RankingBatch:
    """Queries and keys of one sequence, and which keys attention ranks highest.

    Attributes:
        queries: float32 ``[Hkv, G, Q, d]``.
        keys: float32 ``[Hkv, K, d]``.
        visible: bool ``[Q, K]``: keys at or before the query's position.
        top: int64 ``[Hkv, Q, m]`` indices of the top keys, highest first.
    """

    queries: Tensor
    keys: Tensor
    visible: Tensor
    top: Tensor


def signs(projected: Tensor) -> Tensor:
    """Return 1 where positive and -1 elsewhere, with the gradient of ``tanh``."""
    relaxed = torch.tanh(projected)
    return relaxed + ((projected > 0).to(relaxed.dtype) * 2 - 1 - relaxed).detach()
