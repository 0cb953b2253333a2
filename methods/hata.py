"""HATA: keys ranked by hash codes, whose projection is trained on the model's own attention."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from topkbench.kernels.hamming_score.api import hamming_score
from topkbench.kernels.hash_encode.api import encode_step, hash_encode
from topkbench.methods.base import (
    Geometry,
    Index,
    IndexKind,
    PrefillInputs,
    ScoringMethod,
    StepContext,
    Traits,
    check_multiple,
    check_whole,
    kv_bytes,
)
from topkbench.methods.hash_ranking import RankingRecipe
from topkbench.methods.hash_training import Optimiser, PublishedRecipe
from topkbench.methods.learning import ArtifactSpec, LayerStates, LearningMethod, LossReport

HashWeights = Literal["trained", "random", "orthonormal"]
Recipe = Literal["published", "ranking"]


@dataclass(kw_only=True)
class HATAIndex(Index):
    """The keys' hash codes.

    Attributes:
        key_codes: int32 ``[B, Hkv, capacity, rbit // 32]``.
        key_norms: float32 ``[B, Hkv, capacity]`` norms of the keys; None without ``use_norm``.
        key_mean: ``[B, Hkv, 1, d]`` subtracted from keys before hashing; None without
            ``centre_keys``.
        hash_weight: float32 ``[Hkv, d, rbit]`` projection of the layer's keys.
        query_weight: float32 ``[Hkv, d, query_codes * rbit]`` projection of its queries; the same
            tensor as ``hash_weight``, except for the ranking recipe.
    """

    key_codes: Tensor
    key_norms: Tensor | None
    key_mean: Tensor | None
    hash_weight: Tensor
    query_weight: Tensor

    without_rows: ClassVar[frozenset[str]] = frozenset({"hash_weight", "query_weight"})

    def filled(self) -> tuple[Tensor, Tensor | None]:
        """Return the codes and norms of the cached tokens, without the free slots after them."""
        codes, norms = self.key_codes, self.key_norms
        if self.length == self.capacity:  # slicing costs a short step time
            return codes, norms
        return codes[:, :, : self.length], None if norms is None else norms[:, :, : self.length]


@dataclass(kw_only=True)
class HATA(LearningMethod[HATAIndex, Tensor], ScoringMethod[HATAIndex, Tensor]):
    """Keep the tokens whose keys share the most hash bits with the group's queries.

    Attributes:
        rbit: Hash bits per key, a multiple of 32.
        weights: ``trained`` by ``fit``; ``random`` draws a Gaussian projection, ``orthonormal`` one
            with orthonormal columns (in blocks of ``head_dim``), per layer and KV head.
        recipe: How ``fit`` trains: as ``published`` (`PublishedRecipe`), or by ``ranking``
            (`RankingRecipe`).
        use_norm: Multiply the number of equal bits by the key's norm, as in every released run of
            the authors.
        centre_keys: Subtract the mean of the prompt's keys from keys before hashing, which shifts
            all exact scores of a query by the same amount; the norm is then that of the centred
            key. Decoded keys use the same mean, so an index rebuilt later differs.
        fit_rbit: Bits that the ranking recipe fits, at least, such that their first half, quarter
            and so on down to 32 bits or an odd multiple of 32 are codes too: one fit for each of
            these ``rbit``. None fits ``rbit`` bits alone.
        query_codes: Codes per query, each with its own projection and all compared with the one
            code of a key: this multiplies the work of counting bits, but not the bytes read per
            key. More than one needs ``recipe="ranking"``.
        seed: Seed of untrained weights, and of the initial weights, queries and chunks in training.
        sigma: As in `PublishedRecipe`, like the next sixteen.
        epsilon: See there.
        balance_weight: See there.
        decorrelation_weight: See there.
        balance_queries: See there.
        optimiser: See there.
        learning_rate: See there.
        momentum: See there.
        weight_decay: See there.
        epochs: See there.
        steps_per_epoch: See there.
        chunks_per_epoch: See there.
        chunk_size: See there.
        positive_ratio: See there.
        positive_label: See there.
        queries_per_sequence: See there.
        late_share: See there.
        ranking_steps: As ``steps`` of `RankingRecipe`, like the next five.
        ranking_learning_rate: See there.
        ranking_pool: See there.
        ranking_queries: See there.
        ranking_keys: See there.
        ranking_late_share: See there.

    Source:
        HATA (arXiv:2506.02572), sections 3.1 and 3.2 and appendix B. Constants and the balance
        term are those of the released code, in which the names of the last two weights are swapped
        compared to the paper. We train in float32, where the code trains in bfloat16. Untrained
        weights differ per layer and head; the production system that ships orthonormal ones
        shares a single one.

    Compared with the authors' code:
        ``src/ham_dist.cu``, ``tasks/hash/learn_hash_weights.py`` (gpzlx1/HATA): results agree when
        run on the same tensors. Differences: training is in float32, there in bfloat16; of equal
        scores the lower index is kept, there any.
    """

    name: ClassVar[str] = "hata"

    rbit: int = 128
    weights: HashWeights = "trained"
    recipe: Recipe = "published"
    use_norm: bool = True
    centre_keys: bool = False
    fit_rbit: int | None = None
    query_codes: int = 1
    seed: int = 0
    sigma: float = 0.1
    epsilon: float = 0.01
    balance_weight: float = 1.0
    decorrelation_weight: float = 2.0
    balance_queries: bool = True
    optimiser: Optimiser = "sgd"
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
    late_share: float = 0.0
    ranking_steps: int = 1500
    ranking_learning_rate: float = 0.15
    ranking_pool: int = 512
    ranking_queries: int = 32
    ranking_keys: int = 1024
    ranking_late_share: float = 0.5
    _cache: dict[tuple[str, int, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name in ("epochs", "steps_per_epoch", "chunks_per_epoch", "chunk_size"):
            check_whole(name, getattr(self, name))
        check_whole("queries_per_sequence", self.queries_per_sequence)
        for name in ("query_codes", "ranking_steps", "ranking_pool", "ranking_queries"):
            check_whole(name, getattr(self, name))
        check_whole("ranking_keys", self.ranking_keys, least=128)
        for name in ("late_share", "ranking_late_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share from 0 to 1, got {getattr(self, name)}.")
        if not 0 < self.positive_ratio <= 1:
            raise ValueError(
                f"positive_ratio must be a share above 0 and up to 1, got {self.positive_ratio}."
            )
        check_multiple("rbit", self.rbit, 32)
        if self.fit_rbit is not None:
            self._check_fit_rbit(self.fit_rbit)
        check_whole("seed", self.seed, least=0)
        for name in ("sigma", "learning_rate", "positive_label", "ranking_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        for name in ("epsilon", "balance_weight", "decorrelation_weight", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be from 0 to below 1, got {self.momentum}.")
        choices = {"weights": HashWeights, "recipe": Recipe, "optimiser": Optimiser}
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                words = ", ".join(get_args(choice))
                raise ValueError(f"{name} must be one of {words}, got {getattr(self, name)!r}.")
        if self.query_codes > 1 and not self._ranking:
            raise ValueError(
                f"query_codes must be 1 unless codes are trained by ranking, got "
                f"{self.query_codes}; set weights=trained and recipe=ranking."
            )

    @property
    def traits(self) -> Traits:
        index: IndexKind = "prompt" if self.centre_keys else "token"  # the prompt's mean
        return Traits(index=index, per_kv_head=True)

    # Weights ------------------------------------------------------------------------------------

    def artifact_spec(self, geometry: Geometry) -> ArtifactSpec | None:
        if self.weights != "trained":
            return None
        settings = (
            "rbit seed sigma epsilon balance_weight decorrelation_weight balance_queries "
            "optimiser learning_rate momentum weight_decay epochs steps_per_epoch "
            "chunks_per_epoch chunk_size positive_ratio positive_label queries_per_sequence "
            "late_share"
        )
        if self.recipe == "ranking":
            settings = (
                "recipe rbit seed use_norm centre_keys query_codes ranking_steps "
                "ranking_learning_rate ranking_pool ranking_queries ranking_keys ranking_late_share"
            )
        spec = self.spec_of(geometry, *settings.split())
        if self.recipe == "ranking":
            spec["fit_version"] = 2  # its weights are rounded to float16
        if self.fit_rbit is not None:  # the same for each rbit
            del spec["rbit"]
            spec["fit_rbit"] = self._widths[-1]
        return spec

    def artifact_layout(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        shape = (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim)
        bits = self._widths[-1]
        layout: dict[str, tuple[int, ...]] = {"hash_weight": (*shape, bits)}
        if self._ranking:
            layout["query_weight"] = (*shape, self.query_codes * bits)
        return layout

    def load_artifact(self, tensors: dict[str, Tensor], digest: str = "") -> None:
        bits = self._widths[-1]
        widths = {"hash_weight": bits}
        if self._ranking:
            widths["query_weight"] = self.query_codes * bits
        for name, columns in widths.items():
            weight = tensors.get(name)
            if weight is None or weight.ndim != 4 or weight.shape[3] != columns:
                actual = "none" if weight is None else list(weight.shape)
                factor = "" if columns == bits else f"{self.query_codes} * "
                raise ValueError(
                    f"HATA's artifact must hold {name} [L, Hkv, d, {factor}rbit] with "
                    f"rbit={bits}, got {actual}."
                )
        if self._ranking:
            tensors = {name: weight.float() for name, weight in tensors.items()}
        super().load_artifact(tensors, digest)
        self._cache = {}  # a copy of the method may share the other

    def hash_weight(
        self, layer: int, num_layers: int, num_kv_heads: int, head_dim: int, device: torch.device
    ) -> Tensor:
        """Return the projection of one layer's keys, float32 ``[Hkv, d, rbit]``.

        Raises:
            ValueError: If trained weights are missing, or belong to a model of another shape.
        """
        shape = (num_layers, num_kv_heads, head_dim, self.rbit)
        return self._projection("hash_weight", layer, shape, device)

    def query_weight(
        self, layer: int, num_layers: int, num_kv_heads: int, head_dim: int, device: torch.device
    ) -> Tensor:
        """Return the projection of one layer's queries, ``[Hkv, d, query_codes * rbit]``."""
        name = "query_weight" if self._ranking else "hash_weight"
        shape = (num_layers, num_kv_heads, head_dim, self.query_codes * self.rbit)
        return self._projection(name, layer, shape, device)

    @property
    def _ranking(self) -> bool:
        return self.weights == "trained" and self.recipe == "ranking"

    @property
    def _widths(self) -> list[int]:
        """The numbers of bits for which weights are fitted, ascending."""
        if self.fit_rbit is None:
            return [self.rbit]
        widths = [max(self.rbit, self.fit_rbit)]
        while widths[0] % 64 == 0:
            widths.insert(0, widths[0] // 2)
        return widths

    def _check_fit_rbit(self, fit_rbit: int) -> None:
        check_multiple("fit_rbit", fit_rbit, 32)
        if self.rbit not in self._widths:
            raise ValueError(
                f"rbit must be one of the widths that fit_rbit={fit_rbit} trains,"
                f" {', '.join(map(str, self._widths))}, got {self.rbit}; fit_rbit=null fits rbit"
                " bits alone."
            )
        if not self._ranking:
            raise ValueError(
                f"fit_rbit must be null unless codes are trained by ranking, got {fit_rbit}; set"
                " weights=trained and recipe=ranking."
            )

    def _projection(
        self, name: str, layer: int, shape: tuple[int, ...], device: torch.device
    ) -> Tensor:
        """Return one layer of a stack ``[L, Hkv, d, columns]``: the artifact's, or drawn."""
        cached = self._cache.get((name, layer, device))
        if cached is not None and cached.shape == shape[1:]:
            return cached
        if self.weights == "trained":
            stacked = self.artifact.get(name)
            if stacked is None:
                raise ValueError(
                    f"HATA needs its trained {name}, got no artifact; call load_artifact "
                    "first, or set weights=random or orthonormal."
                )
            bits = self._widths[-1]
            fitted = (*shape[:3], shape[3] // self.rbit * bits)
            if stacked.shape != fitted:
                raise ValueError(
                    f"HATA's {name} must be [L, Hkv, d, rbit] = {list(fitted)}, "
                    f"got {list(stacked.shape)}; train it on this model."
                )
            weight = stacked[layer].unflatten(2, (-1, bits))[..., : self.rbit].flatten(2)
        else:
            weight = self._draw(layer, shape[1], shape[2])
        weight = weight.to(device, torch.float32).contiguous()
        self._cache[name, layer, device] = weight
        return weight

    def _draw(self, layer: int, num_kv_heads: int, head_dim: int) -> Tensor:
        generator = self._generator(layer)
        if self.weights != "orthonormal":
            return torch.randn(num_kv_heads, head_dim, self.rbit, generator=generator)
        blocks = -(-self.rbit // head_dim)
        gaussian = torch.randn(num_kv_heads, blocks, head_dim, head_dim, generator=generator)
        basis, upper = torch.linalg.qr(gaussian)
        # Fixing the sign of R's diagonal makes the basis uniform over the orthogonal group.
        basis = basis * upper.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
        return basis.transpose(1, 2).flatten(2)[..., : self.rbit]

    def _generator(self, layer: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + layer)

    # Training -----------------------------------------------------------------------------------

    def query_positions(self, layer: int, lengths: Sequence[int]) -> list[list[int]]:
        return self._chosen_recipe().positions(lengths, self._generator(layer))

    fit_version: ClassVar[int] = 1

    def fit_layer(
        self, layer: int, states: LayerStates, report: LossReport | None = None
    ) -> dict[str, Tensor]:
        """Return ``hash_weight [Hkv, d, rbit]``.

        The ranking recipe adds ``query_weight [Hkv, d, query_codes * rbit]``; its two tensors are
        float16, so that they take no more room than the published recipe's one.
        """
        fitted = self._chosen_recipe().fit_layer(states, self._generator(layer), report)
        dtype = torch.float16 if self._ranking else torch.float32
        return {name: weight.to("cpu", dtype) for name, weight in fitted.items()}

    def _chosen_recipe(self) -> PublishedRecipe | RankingRecipe:
        if not self._ranking:
            settings = {one.name: getattr(self, one.name) for one in fields(PublishedRecipe)}
            return PublishedRecipe(**settings)
        return RankingRecipe(
            widths=self._widths,
            query_codes=self.query_codes,
            use_norm=self.use_norm,
            centre_keys=self.centre_keys,
            steps=self.ranking_steps,
            learning_rate=self.ranking_learning_rate,
            pool=self.ranking_pool,
            queries=self.ranking_queries,
            keys=self.ranking_keys,
            late_share=self.ranking_late_share,
        )

    # Decode -------------------------------------------------------------------------------------

    def build_index(self, prefill: PrefillInputs) -> HATAIndex:
        keys = prefill.key_states
        batch_size, num_kv_heads, n, head_dim = keys.shape
        layer = (prefill.layer, prefill.num_layers, num_kv_heads, head_dim, keys.device)
        weight, query_weight = self.hash_weight(*layer), self.query_weight(*layer)
        mean = None
        if self.centre_keys:
            mean = _mean(prefill)
            keys = keys - mean
        shape = (batch_size, num_kv_heads, prefill.capacity)
        codes = torch.zeros(*shape, self.rbit // 32, dtype=torch.int32, device=keys.device)
        codes[:, :, :n] = hash_encode(keys, weight, impl=self.impl_for("hash_encode"))
        norms = None
        if self.use_norm:
            norms = torch.zeros(shape, device=keys.device)
            norms[:, :, :n] = _norm(keys)
        return HATAIndex(
            key_codes=codes,
            key_norms=norms,
            key_mean=mean,
            hash_weight=weight,
            query_weight=query_weight,
            **Index.counts(prefill),
        )

    def append(self, index: HATAIndex, key_states: Tensor, value_states: Tensor) -> None:
        index.advance()
        codes, norms = index.filled()
        if index.key_mean is not None:
            key_states = key_states - index.key_mean
        encode_step(
            key_states[:, :, :0],
            key_states,
            index.hash_weight,
            codes,
            index.kv_len,
            norms,
            impl=self.impl_for("hash_encode"),
        )

    def encode(self, index: HATAIndex, context: StepContext) -> Tensor:
        impl = self.impl_for("hash_encode")
        codes = hash_encode(context.query_states, index.query_weight, impl=impl)
        if self.query_codes == 1:
            return codes
        # For scoring, each code counts as a query of the group.
        return codes.unflatten(-1, (self.query_codes, -1)).flatten(2, 3)

    def score(self, encoded: Tensor, index: HATAIndex, context: StepContext) -> Tensor:
        codes, norms = index.filled()
        return hamming_score(
            encoded,
            codes,
            norms,
            index.kv_start,
            index.kv_len,
            impl=self.impl_for("hamming_score"),
        )

    def index_bytes_per_token(self, geometry: Geometry) -> float:
        norm = 4 if self.use_norm else 0
        return float(geometry.num_kv_heads * (self.rbit // 8 + norm))

    def bytes_read(self, geometry: Geometry, n: int, read: int, scanned: int | None = None) -> int:
        columns = self.rbit * (1 + self.query_codes if self._ranking else 1)
        projection = 4 * geometry.num_kv_heads * geometry.head_dim * columns
        side = round(n * self.index_bytes_per_token(geometry))
        return side + projection + kv_bytes(geometry, read)


def _mean(prefill: PrefillInputs) -> Tensor:
    """Return the mean of each row's valid keys, ``[B, Hkv, 1, d]`` in the keys' dtype."""
    keys = prefill.key_states
    valid = prefill.valid_slots()[:, None, :, None]
    # Mask rather than multiply: an invalid slot may hold NaN or infinity.
    total = keys.float().masked_fill(~valid, 0).sum(2, keepdim=True)
    return (total / valid.sum(2, keepdim=True).clamp_min(1)).to(keys.dtype)


def _norm(states: Tensor) -> Tensor:
    """Return the states' norms, float32."""
    return torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32)
