"""The published recipe: learns a hash projection from labelled pairs of a query and a key."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from topkbench.methods.learning import LayerStates, LossReport

Optimiser = Literal["sgd", "adam"]
LATE_TOKENS = 48  # tokens at a sequence's end, its question and answer
WARM_UP = 20  # steps of Adam
LAST_RATE = 0.02  # learning rate of Adam's last step, relative to the setting
BLOCK = 1024  # pairs per block, so that their hashes stay in a core's cache during a training step


def rate(step: int, steps: int) -> float:
    """Return Adam's learning rate at a step, relative to the setting."""
    falling = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / WARM_UP) * (LAST_RATE + (1 - LAST_RATE) * falling)


def rising_and_falling(
    optimiser: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a schedule whose learning rate rises at first, then falls along half a cosine."""
    return torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, steps))


@dataclass(frozen=True, kw_only=True)
class PublishedRecipe:
    """Learn one layer's hash projection from calibration sequences, as HATA's authors do.

    Queries are drawn from the second half of each sequence, and each is paired with every key of
    its prefix. The keys that a query attends to most are its positives. Keys and queries share one
    projection, trained by SGD on chunks of the pairs, see `loss_and_gradient`.

    Attributes:
        rbit: Bits per code.
        sigma: Sharpness of the relaxed hash ``2 * sigmoid(sigma * x W) - 1``.
        epsilon: Weight of the similarity term.
        balance_weight: Weight of the bit-balance term; 1.0 in the code, 2.0 in the paper's text.
        decorrelation_weight: Weight of ``||W'W - I||``; 2.0 in the code, 1.0 in the paper's text.
        balance_queries: Balance the queries' bits too, as in the code; the paper balances only the
            keys'.
        optimiser: ``sgd`` as published, or ``adam``, whose learning rate rises for 20 steps, then
            falls along half a cosine.
        learning_rate: Learning rate of either.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        epochs: How often chunks are drawn.
        steps_per_epoch: Full-batch steps on the chunks drawn.
        chunks_per_epoch: Chunks drawn per epoch.
        chunk_size: Pairs per chunk.
        positive_ratio: Share of a prefix's keys that are positives.
        positive_label: Label of the best key; labels of positives fall linearly to 1, the others
            are -1.
        queries_per_sequence: Queries drawn from the second half of each sequence.
        late_share: Share of these that are drawn from its last 48 tokens; 0 as published.

    Source:
        HATA (arXiv:2506.02572), section 3.1 and appendix B, with the constants and the balance term
        of the released code; `HATA` says what differs.
    """

    rbit: int
    sigma: float
    epsilon: float
    balance_weight: float
    decorrelation_weight: float
    balance_queries: bool
    optimiser: Optimiser
    learning_rate: float
    momentum: float
    weight_decay: float
    epochs: int
    steps_per_epoch: int
    chunks_per_epoch: int
    chunk_size: int
    positive_ratio: float
    positive_label: float
    queries_per_sequence: int
    late_share: float

    def positions(self, lengths: Sequence[int], generator: torch.Generator) -> list[list[int]]:
        """Return the positions of each sequence's queries, drawn from its second half."""
        late = round(self.late_share * self.queries_per_sequence)
        return [
            [
                int(torch.randint(first, length, (1,), generator=generator).item())
                for first, count in (
                    (length // 2, self.queries_per_sequence - late),
                    (max(length - LATE_TOKENS, length // 2), late),
                )
                for _ in range(count)
            ]
            for length in lengths
        ]

    def fit_layer(
        self, states: LayerStates, generator: torch.Generator, report: LossReport | None = None
    ) -> dict[str, Tensor]:
        """Return ``hash_weight [Hkv, d, rbit]``, the projection of keys and queries.

        Args:
            states: One layer's ``[Hq, m, d]`` queries at the ``m`` positions of each sequence, and
                its ``[Hkv, n, d]`` keys.
            generator: Must be in the state in which ``positions`` was called to choose the queries,
                as it draws the same positions again; then draws the rest.
            report: Called after each step with the steps done, the total and the loss.
        """
        pairs = self.draw_pairs(states, generator)
        num_kv_heads, _, head_dim = pairs.keys.shape
        start = torch.randn(num_kv_heads, head_dim, self.rbit, generator=generator)
        weight = start.to(pairs.keys.device).requires_grad_()
        steps = self.epochs * self.steps_per_epoch
        optimiser: torch.optim.Optimizer = torch.optim.SGD(
            [weight], self.learning_rate, self.momentum, weight_decay=self.weight_decay
        )
        schedule = None
        if self.optimiser == "adam":
            optimiser = torch.optim.Adam([weight], self.learning_rate)
            schedule = rising_and_falling(optimiser, steps)
        for step in range(steps):
            if step % self.steps_per_epoch == 0:
                batch = self.draw(pairs, generator)
            loss, weight.grad = self.loss_and_gradient(weight.detach(), batch)
            optimiser.step()
            if schedule is not None:
                schedule.step()
            if report is not None:
                report(step + 1, steps, loss.item())
        return {"hash_weight": weight.detach()}

    def draw_pairs(self, states: LayerStates, generator: torch.Generator) -> "HashPairs":
        """Pair each query with the keys of its prefix, and label them.

        Args:
            states: Each sequence's queries at ``positions``, and all its keys.
            generator: Must be in the state in which ``positions`` was called to choose the queries,
                as it draws the same positions again.
        """
        return self.pair(states, self.positions([one.shape[1] for _, one in states], generator))

    def pair(self, states: LayerStates, positions: Sequence[Sequence[int]]) -> "HashPairs":
        """Do what ``draw_pairs`` does for queries whose positions are given."""
        queries: list[Tensor] = []
        keys: list[Tensor] = []
        labels: list[Tensor] = []
        query_of: list[Tensor] = []
        for (query_states, key_states), drawn in zip(states, positions, strict=True):
            grouped = query_states.float().unflatten(0, (len(key_states), -1))
            for i, last in enumerate(drawn):
                query, prefix = grouped[:, :, i], key_states[:, : last + 1].float()
                labels.append(self.labels(query @ prefix.mT))
                query_of.append(torch.full((last + 1,), len(queries), device=query.device))
                queries.append(query)
                keys.append(prefix)
        return HashPairs(
            torch.stack(queries, 2), torch.cat(keys, 1), torch.cat(labels, 2), torch.cat(query_of)
        )

    def labels(self, logits: Tensor) -> Tensor:
        """Return the labels of one query's keys, by their rank; both ``[Hkv, G, n]``."""
        count = int(self.positive_ratio * logits.shape[2])
        best = logits.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        falling = torch.linspace(self.positive_label, 1.0, count, device=logits.device)
        return torch.full_like(logits, -1.0).scatter_(2, best, falling.expand_as(best))

    def draw(self, pairs: "HashPairs", generator: torch.Generator) -> "HashPairs":
        """Draw the chunks of one epoch, without replacement."""
        chunks = torch.arange(pairs.keys.shape[1]).split(self.chunk_size)
        order = torch.randperm(len(chunks), generator=generator).tolist()
        drawn = torch.cat([chunks[i] for i in sorted(order[: self.chunks_per_epoch])])
        drawn = drawn.to(pairs.keys.device)
        keys, labels = pairs.keys[:, drawn], pairs.labels[:, :, drawn]
        return HashPairs(pairs.queries, keys, labels, pairs.query_of[drawn])

    def loss_and_gradient(self, weight: Tensor, pairs: "HashPairs") -> tuple[Tensor, Tensor]:
        """Return the training loss of a projection ``[Hkv, d, rbit]``, and its gradient.

        With ``h(x) = 2 sigmoid(sigma x W) - 1`` and N pairs, the loss is the sum of::

            epsilon              * sum over heads and pairs of label ||h(q) - h(k)||^2 / N
            balance_weight       * sum over heads of || sum over pairs of (h(q) + h(k)) / (N r) ||^2
            decorrelation_weight * ||W'W - I||, one norm over all heads of the layer

        The gradient is written out so that each block of pairs is read once and then dropped;
        autograd would store every pair's hash.
        """
        num_pairs, rbit = pairs.keys.shape[1], weight.shape[2]
        similarity = weight.new_zeros(())
        by_similarity, by_bits = torch.zeros_like(weight), torch.zeros_like(weight)
        # h(x) = 2 * sigmoid(sigma * xW) - 1 = tanh(sigma / 2 * xW), with tanh' = 1 - h(x)^2.
        query_hash = torch.tanh(0.5 * self.sigma * (pairs.queries @ weight[:, None]))
        by_query = torch.zeros_like(query_hash)
        counts = torch.bincount(pairs.query_of, minlength=query_hash.shape[2]).to(weight.dtype)
        key_bits = weight.new_zeros(weight.shape[0], rbit)
        for query, block in pairs.blocks():
            keys, labels = pairs.keys[:, block], pairs.labels[:, :, block]
            one_query_hash, key_hash = (
                query_hash[:, :, query],
                torch.tanh(0.5 * self.sigma * (keys @ weight)),
            )
            squared = key_hash.square()
            query_labels, key_labels = labels.sum(2)[..., None], labels.sum(1)[..., None]
            labelled = labels @ key_hash
            similarity += (
                query_labels * one_query_hash.square() - 2 * one_query_hash * labelled
            ).sum()
            similarity += (key_labels * squared).sum()
            by_query[:, :, query] += query_labels * one_query_hash - labelled
            slope = 1 - squared
            by_key = (key_labels * key_hash).baddbmm_(labels.mT, one_query_hash, alpha=-1)
            by_similarity += keys.mT @ by_key.mul_(slope)
            by_bits += keys.mT @ slope
            key_bits += key_hash.sum(1)

        bits = key_bits[:, None].expand(-1, query_hash.shape[1], -1)
        if self.balance_queries:
            bits = bits + (query_hash * counts[:, None]).sum(2)
        bits = bits / (num_pairs * rbit)
        excess = weight.mT @ weight - torch.eye(rbit, dtype=weight.dtype, device=weight.device)
        distance = torch.linalg.vector_norm(excess)
        loss = (
            self.epsilon * similarity / num_pairs
            + self.balance_weight * bits.square().sum()
            + self.decorrelation_weight * distance
        )

        similarity_factor = 2 * self.epsilon / num_pairs
        balance_factor = 2 * self.balance_weight / (num_pairs * rbit)
        by_query *= similarity_factor
        if self.balance_queries:
            by_query += balance_factor * bits[:, :, None] * counts[:, None]
        by_query *= 1 - query_hash.square()
        by_hash = (
            similarity_factor * by_similarity + balance_factor * bits.sum(1)[:, None] * by_bits
        )
        by_hash += pairs.queries.flatten(1, 2).mT @ by_query.flatten(1, 2)
        # The norm has no gradient at zero; zero is in its subgradient.
        tiny = torch.finfo(weight.dtype).tiny
        decorrelation_factor = 2 * self.decorrelation_weight / distance.clamp_min(tiny)
        return loss, 0.5 * self.sigma * by_hash + decorrelation_factor * (weight @ excess)


@dataclass
class HashPairs:
    """Labelled training pairs of one layer: a drawn query with each key of its prefix.

    Attributes:
        queries: float32 ``[Hkv, G, Q, d]``.
        keys: float32 ``[Hkv, N, d]``.
        labels: float32 ``[Hkv, G, N]``: high for keys that the query attends to most, else -1.
        query_of: int64 ``[N]`` index of the query that each key is paired with.
    """

    queries: Tensor
    keys: Tensor
    labels: Tensor
    query_of: Tensor

    def blocks(self) -> Iterator[tuple[int, slice]]:
        """Yield (query, slice of pairs) for blocks of at most ``BLOCK`` pairs of one query."""
        begin = 0
        queries, lengths = self.query_of.unique_consecutive(return_counts=True)
        for query, length in zip(queries.tolist(), lengths.tolist(), strict=True):
            for start in range(begin, begin + length, BLOCK):
                yield query, slice(start, min(start + BLOCK, begin + length))
            begin += length
