"""HATA: keys ranked by hash codes, whose projection is learnt from the model's own attention."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from topkbench.kernels.hamming_score.api import hamming_score
from topkbench.kernels.hash_encode.api import hash_encode
from topkbench.methods.base import (
    CalibrationStates,
    Geometry,
    Index,
    PrefillInputs,
    Progress,
    TopKMethod,
    kv_bytes,
)

HashWeights = Literal["trained", "random", "orthonormal"]


@dataclass(kw_only=True)
class HATAIndex(Index):
    """The keys' hash codes.

    Attributes:
        key_codes: int32 ``[B, Hkv, capacity, rbit // 32]``.
        key_norms: float32 ``[B, Hkv, capacity]`` lengths of the keys; None without ``use_norm``.
        hash_weight: float32 ``[Hkv, d, rbit]`` projection of the layer.
    """

    key_codes: Tensor
    key_norms: Tensor | None
    hash_weight: Tensor


@dataclass
class HashPairs:
    """Labelled pairs of one layer: each key of a sequence's prefix with the query drawn from it.

    Attributes:
        queries: float32 ``[Hkv, G, Q, d]``.
        keys: float32 ``[Hkv, N, d]``.
        labels: float32 ``[Hkv, G, N]``: high for keys that the query attends to most, else -1.
        query_of: int64 ``[N]`` which of the Q queries a key is paired with.
    """

    queries: Tensor
    keys: Tensor
    labels: Tensor
    query_of: Tensor

    # What the loss needs at every step and no step changes.

    @cached_property
    def spread(self) -> Tensor:
        """Labels at the pairs of each query, zero elsewhere: ``[Hkv, G * Q, N]``."""
        paired = one_hot(self.query_of, self.queries.shape[2]).to(self.keys.dtype)
        return (self.labels[:, :, None] * paired.T).flatten(1, 2)

    @cached_property
    def query_labels(self) -> Tensor:
        """Sum of each query's labels: ``[Hkv, G, Q]``."""
        return self.spread.sum(2).view(self.queries.shape[:3])

    @cached_property
    def key_labels(self) -> Tensor:
        """Sum of each key's labels over the group: ``[Hkv, N]``."""
        return self.labels.sum(1)

    @cached_property
    def query_pairs(self) -> Tensor:
        """Pairs of each query: ``[Q]``."""
        counts = torch.bincount(self.query_of, minlength=self.queries.shape[2])
        return counts.to(self.keys.dtype)


@dataclass(kw_only=True)
class HATA(TopKMethod):
    """Keep the tokens whose keys share most hash bits with the group's queries.

    Attributes:
        rbit: Hash bits of a head, a multiple of 32.
        weights: ``trained`` by ``fit``; ``random`` draws a Gaussian projection, ``orthonormal`` one
            of orthonormal columns (in blocks of ``head_dim``), per layer and KV head.
        use_norm: Weigh the agreement by the key's length, as every released run of the authors.
        seed: Draws untrained weights, and the training's start, queries and chunks.
        sigma: Sharpness of the relaxed hash ``2 * sigmoid(sigma * x W) - 1``.
        epsilon: Weight of the similarity term.
        balance_weight: Weight of the bit-balance term; 1.0 in the code, 2.0 by the paper's text.
        decorrelation_weight: Weight of ``||W'W - I||``; 2.0 in the code, 1.0 by the paper's text.
        balance_queries: Balance queries' bits with the keys', as the code; the paper, keys alone.
        learning_rate: Of SGD.
        momentum: Of SGD.
        weight_decay: Of SGD.
        epochs: Times that chunks are drawn.
        steps_per_epoch: Full-batch steps on the chunks drawn.
        chunks_per_epoch: Chunks drawn at a time.
        chunk_size: Pairs of a chunk.
        positive_ratio: Share of a prefix's keys that are positives.
        positive_label: Label of the best key; positives fall linearly to 1, the others are -1.
        queries_per_sequence: Queries drawn from the second half of each sequence.

    Source:
        HATA (arXiv:2506.02572), sections 3.1 and 3.2 and appendix B. Constants and the balance
        term are those of the released code, whose names for the last two weights are swapped
        against the paper's. We train in float32, where the code trains in bfloat16. Untrained
        weights differ per layer and head; the production system that ships orthonormal ones
        shares a single one.
    """

    name: ClassVar[str] = "hata"

    rbit: int = 128
    weights: HashWeights = "trained"
    use_norm: bool = True
    seed: int = 0
    sigma: float = 0.1
    epsilon: float = 0.01
    balance_weight: float = 1.0
    decorrelation_weight: float = 2.0
    balance_queries: bool = True
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-6
    epochs: int = 15
    steps_per_epoch: int = 20
    chunks_per_epoch: int = 3
    chunk_size: int = 32768
    positive_ratio: float = 0.1
    positive_label: float = 20.0
    queries_per_sequence: int = 1
    _drawn: dict[tuple[int, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.rbit < 32 or self.rbit % 32:
            raise ValueError(f"rbit must be a positive multiple of 32, got {self.rbit}.")
        if self.weights not in get_args(HashWeights):
            words = ", ".join(get_args(HashWeights))
            raise ValueError(f"weights must be one of {words}, got {self.weights!r}.")

    # Weights ------------------------------------------------------------------------------------

    def artifact_spec(self, geometry: Geometry) -> dict[str, Any] | None:
        if self.weights != "trained":
            return None
        settings = (
            "rbit seed sigma epsilon balance_weight decorrelation_weight balance_queries "
            "learning_rate momentum weight_decay epochs steps_per_epoch chunks_per_epoch "
            "chunk_size positive_ratio positive_label queries_per_sequence"
        )
        return {
            "method": self.name,
            "model_digest": geometry.model_digest,
            "num_layers": geometry.num_layers,
            "num_heads": geometry.num_heads,
            "num_kv_heads": geometry.num_kv_heads,
            "head_dim": geometry.head_dim,
            **{name: getattr(self, name) for name in settings.split()},
        }

    def load_artifact(self, tensors: dict[str, Tensor], digest: str = "") -> None:
        weight = tensors.get("hash_weight")
        if weight is None or weight.ndim != 4 or weight.shape[3] != self.rbit:
            found = "none" if weight is None else list(weight.shape)
            raise ValueError(
                f"HATA's artifact must hold hash_weight [L, Hkv, d, rbit] with rbit={self.rbit}, "
                f"got {found}."
            )
        super().load_artifact(tensors, digest)
        self._drawn.clear()

    def hash_weight(
        self, layer: int, num_layers: int, num_kv_heads: int, head_dim: int, device: torch.device
    ) -> Tensor:
        """Return one layer's projection, float32 ``[Hkv, d, rbit]``.

        Raises:
            ValueError: If it must be trained and is not, or belongs to a model of another shape.
        """
        shape = (num_kv_heads, head_dim, self.rbit)
        known = self._drawn.get((layer, device))
        if known is not None and known.shape == shape:
            return known
        if self.weights == "trained":
            stacked = self.artifact.get("hash_weight")
            if stacked is None:
                raise ValueError(
                    "HATA needs its trained hash_weight, got no artifact; call load_artifact "
                    "first, or take weights=random or orthonormal."
                )
            if tuple(stacked.shape) != (num_layers, *shape):
                raise ValueError(
                    f"HATA's hash_weight must be [L, Hkv, d, rbit] = {[num_layers, *shape]}, "
                    f"got {list(stacked.shape)}; train it on this model."
                )
            weight = stacked[layer]
        else:
            weight = self._draw(layer, num_kv_heads, head_dim)
        weight = weight.to(device, torch.float32).contiguous()
        self._drawn[layer, device] = weight
        return weight

    def _draw(self, layer: int, num_kv_heads: int, head_dim: int) -> Tensor:
        generator = self._generator(layer)
        if self.weights != "orthonormal":
            return torch.randn(num_kv_heads, head_dim, self.rbit, generator=generator)
        blocks = -(-self.rbit // head_dim)
        gaussian = torch.randn(num_kv_heads, blocks, head_dim, head_dim, generator=generator)
        basis, upper = torch.linalg.qr(gaussian)
        # The sign of R's diagonal makes the basis uniform over rotations and reflections.
        basis = basis * upper.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
        return basis.transpose(1, 2).flatten(2)[..., : self.rbit]

    def _generator(self, layer: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + layer)

    # Training -----------------------------------------------------------------------------------

    def fit(
        self, calibration: CalibrationStates, progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """Return ``hash_weight [L, Hkv, d, rbit]``; layers are independent of each other."""
        weights = []
        for layer in range(calibration.num_layers):
            generator = self._generator(layer)
            pairs = self.draw_pairs(calibration.states(layer), generator)
            num_kv_heads, _, head_dim = pairs.keys.shape
            start = torch.randn(num_kv_heads, head_dim, self.rbit, generator=generator)
            weight = start.to(pairs.keys.device).requires_grad_()
            optimiser = torch.optim.SGD(
                [weight], self.learning_rate, self.momentum, weight_decay=self.weight_decay
            )
            for epoch in range(self.epochs):
                batch = self._batch(pairs, generator)
                for _ in range(self.steps_per_epoch):
                    optimiser.zero_grad()
                    with torch.enable_grad():
                        self.loss(weight, batch).backward()
                    optimiser.step()
                if progress is not None:
                    done = layer * self.epochs + epoch + 1
                    progress(done, calibration.num_layers * self.epochs)
            weights.append(weight.detach().cpu())
        return {"hash_weight": torch.stack(weights)}

    def draw_pairs(
        self, states: list[tuple[Tensor, Tensor]], generator: torch.Generator
    ) -> HashPairs:
        """Draw queries from each sequence's second half and label the keys before them.

        Args:
            states: One layer's ``[Hq, n, d]`` queries and ``[Hkv, n, d]`` keys of each sequence.
            generator: Draws the queries' positions.
        """
        queries: list[Tensor] = []
        keys: list[Tensor] = []
        labels: list[Tensor] = []
        query_of: list[Tensor] = []
        for query_states, key_states in states:
            num_kv_heads, length, _ = key_states.shape
            grouped = query_states.float().unflatten(0, (num_kv_heads, -1))
            for _ in range(self.queries_per_sequence):
                drawn = torch.randint(length // 2, length, (1,), generator=generator)
                last = int(drawn.item())
                query, prefix = grouped[:, :, last], key_states[:, : last + 1].float()
                labels.append(self._labels(query @ prefix.mT))
                query_of.append(torch.full((last + 1,), len(queries), device=query.device))
                queries.append(query)
                keys.append(prefix)
        return HashPairs(
            torch.stack(queries, 2), torch.cat(keys, 1), torch.cat(labels, 2), torch.cat(query_of)
        )

    def _labels(self, logits: Tensor) -> Tensor:
        """Label the keys of one query by their rank; ``[Hkv, G, n]`` to the same."""
        count = int(self.positive_ratio * logits.shape[2])
        best = logits.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        falling = torch.linspace(self.positive_label, 1.0, count, device=logits.device)
        return torch.full_like(logits, -1.0).scatter_(2, best, falling.expand_as(best))

    def _batch(self, pairs: HashPairs, generator: torch.Generator) -> HashPairs:
        """Draw the chunks of one epoch, without repetition."""
        chunks = torch.arange(pairs.keys.shape[1]).split(self.chunk_size)
        order = torch.randperm(len(chunks), generator=generator).tolist()
        drawn = torch.cat([chunks[i] for i in sorted(order[: self.chunks_per_epoch])])
        drawn = drawn.to(pairs.keys.device)
        keys, labels = pairs.keys[:, drawn], pairs.labels[:, :, drawn]
        return HashPairs(pairs.queries, keys, labels, pairs.query_of[drawn])

    def loss(self, weight: Tensor, pairs: HashPairs) -> Tensor:
        """Return the training loss of a projection ``[Hkv, d, rbit]`` over labelled pairs.

        The similarity term sums ``label * ||h(q) - h(k)||^2`` over query heads and pairs. A query
        is shared by all keys of its prefix, so the square is multiplied out and summed per query.
        """
        num_pairs, rbit = pairs.keys.shape[1], weight.shape[2]
        # h(x) = 2 * sigmoid(sigma * xW) - 1 = tanh(sigma / 2 * xW).
        key_hash = torch.tanh(0.5 * self.sigma * (pairs.keys @ weight))
        query_hash = torch.tanh(0.5 * self.sigma * (pairs.queries @ weight[:, None]))

        query_part = (pairs.query_labels * query_hash.square().sum(3)).sum()
        key_part = (pairs.key_labels * key_hash.square().sum(2)).sum()
        cross_part = (query_hash * (pairs.spread @ key_hash).view_as(query_hash)).sum()
        similarity = (query_part + key_part - 2 * cross_part) / num_pairs

        bits = key_hash.sum(1)[:, None].expand(-1, query_hash.shape[1], -1)
        if self.balance_queries:
            bits = bits + (query_hash * pairs.query_pairs[:, None]).sum(2)
        balance = (bits / (num_pairs * rbit)).square().sum()

        identity = torch.eye(rbit, device=weight.device)
        decorrelation = torch.linalg.vector_norm(weight.mT @ weight - identity)
        return (
            self.epsilon * similarity
            + self.balance_weight * balance
            + self.decorrelation_weight * decorrelation
        )

    # Decode -------------------------------------------------------------------------------------

    def build_index(self, prefill: PrefillInputs) -> HATAIndex:
        keys = prefill.key_states
        batch_size, num_kv_heads, n, head_dim = keys.shape
        weight = self.hash_weight(
            prefill.layer, prefill.num_layers, num_kv_heads, head_dim, keys.device
        )
        shape = (batch_size, num_kv_heads, prefill.capacity)
        codes = torch.zeros(*shape, self.rbit // 32, dtype=torch.int32, device=keys.device)
        codes[:, :, :n] = hash_encode(keys, weight, impl=self.impl_for("hash_encode"))
        norms = None
        if self.use_norm:
            norms = torch.zeros(shape, device=keys.device)
            norms[:, :, :n] = _norm(keys)
        counts = Index.counts(prefill)
        return HATAIndex(key_codes=codes, key_norms=norms, hash_weight=weight, **counts)

    def append(self, index: HATAIndex, key_states: Tensor, value_states: Tensor) -> None:
        slot = index.advance()
        codes = hash_encode(key_states, index.hash_weight, impl=self.impl_for("hash_encode"))
        index.put(index.key_codes, slot, codes[:, :, 0])
        if index.key_norms is not None:
            index.put(index.key_norms, slot, _norm(key_states)[:, :, 0])

    def encode(self, query_states: Tensor, index: HATAIndex) -> Tensor:
        return hash_encode(query_states, index.hash_weight, impl=self.impl_for("hash_encode"))

    def score(self, encoded: Tensor, index: HATAIndex) -> Tensor:
        norms = index.key_norms
        return hamming_score(
            encoded,
            index.key_codes[:, :, : index.length],
            None if norms is None else norms[:, :, : index.length],
            index.kv_start,
            index.kv_len,
            impl=self.impl_for("hamming_score"),
        )

    def index_bytes_per_token(self, geometry: Geometry) -> float:
        norm = 4 if self.use_norm else 0
        return float(geometry.num_kv_heads * (self.rbit // 8 + norm))

    def bytes_read_per_step(self, geometry: Geometry, n: int, k: int) -> int:
        projection = 4 * geometry.num_kv_heads * geometry.head_dim * self.rbit
        side = round(n * self.index_bytes_per_token(geometry))
        return side + projection + kv_bytes(geometry, min(k, n))


def _norm(states: Tensor) -> Tensor:
    """Return the states' lengths, float32."""
    return torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32)
