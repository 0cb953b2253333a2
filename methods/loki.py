"""Loki: keys rotated by their principal components, ranked by the first few channels."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from topkbench.kernels.lowrank_score.api import lowrank_score
from topkbench.methods.base import (
    Geometry,
    Index,
    Policy,
    PrefillInputs,
    ScoreKind,
    ScoringMethod,
    StepContext,
    check_whole,
    kv_bytes,
)
from topkbench.methods.learning import ArtifactSpec, LayerStates, LearningMethod, LossReport


@dataclass(kw_only=True)
class LokiIndex(Index):
    """The keys' leading principal channels.

    Attributes:
        low_keys: ``[B, Hkv, capacity, rank]`` in the keys' dtype.
        rotation: float32 ``[Hkv, d, rank]`` leading components of the layer.
    """

    low_keys: Tensor
    rotation: Tensor

    without_rows: ClassVar[frozenset[str]] = frozenset({"rotation"})


@dataclass(kw_only=True)
class Loki(LearningMethod[LokiIndex, Tensor], ScoringMethod[LokiIndex, Tensor]):
    """Rank keys by the dot product over ``rank`` principal components, then attend exactly.

    Attributes:
        rank: Channels scored; None for a quarter of ``head_dim``.

    Source:
        Loki (arXiv:2406.02542), algorithm 1. The components are those of centred post-RoPE keys,
        per layer and KV head. The mean is not subtracted when scoring, as it shifts all scores of a
        query by the same amount. Attention reads the original keys, so the rotated channels are
        side information; the paper stores only rotated keys.

    Compared with the authors' code:
        ``methods/pca_topk/modify_llama.py``, ``pca_analysis/pca.py`` (hpcgroup/loki): results agree
        when run on the same tensors. Differences: prefill is dense, where that code selects for the
        prompt's queries too; the rotated channels are stored in addition to the keys, there instead
        of them.
    """

    name: ClassVar[str] = "loki"
    score_kind: ClassVar[ScoreKind] = "logit"

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_whole("rank", self.rank)

    def channels(self, head_dim: int) -> int:
        """Return the number of channels scored for a head of size ``head_dim``."""
        return max(1, head_dim // 4) if self.rank is None else self.rank

    def unsupported_reason(self, geometry: Geometry, policy: Policy | None = None) -> str | None:
        if self.channels(geometry.head_dim) > geometry.head_dim:
            return f"rank must be at most head_dim={geometry.head_dim}, got {self.rank}."
        return super().unsupported_reason(geometry, policy)

    def artifact_spec(self, geometry: Geometry) -> ArtifactSpec:
        # It holds all components, so one artifact serves every rank.
        return {
            "method": self.name,
            "fit_version": self.fit_version,
            "model_digest": geometry.model_digest,
            "num_layers": geometry.num_layers,
            "num_kv_heads": geometry.num_kv_heads,
            "head_dim": geometry.head_dim,
            "keys": "post_rope_centred",
            **geometry.fitted_layers,
        }

    def artifact_layout(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        heads = (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim)
        return {"components": (*heads, geometry.head_dim), "mean": heads, "variance": heads}

    fit_version: ClassVar[int] = 1

    def fit_layer(
        self, layer: int, states: LayerStates, report: LossReport | None = None
    ) -> dict[str, Tensor]:
        """Return ``components [Hkv, d, d]``, one per column, with ``mean`` and ``variance``."""
        tokens = sum(keys.shape[1] for _, keys in states)
        # Sequence by sequence, to avoid a copy of all keys: [Hkv, 1, d], [Hkv, d, d].
        sums = [keys.double().sum(1, keepdim=True) for _, keys in states]
        mean = torch.stack(sums).sum(0) / tokens
        covariance = torch.zeros_like(mean) * mean.mT
        for _, keys in states:
            centred = keys.double() - mean
            covariance += centred.mT @ centred / tokens
        variance, components = torch.linalg.eigh(covariance)
        components = components.flip(-1)
        # An eigenvector's sign is arbitrary; make the largest entry positive.
        largest = components.abs().argmax(1, keepdim=True)
        components = components * components.gather(1, largest).sign()
        return {
            "components": components.float().cpu(),
            "mean": mean[:, 0].float().cpu(),
            "variance": variance.flip(-1).clamp(min=0).float().cpu(),
        }

    def load_artifact(self, tensors: dict[str, Tensor], digest: str = "") -> None:
        components = tensors.get("components")
        if components is None or components.ndim != 4 or components.shape[2] != components.shape[3]:
            actual = "none" if components is None else list(components.shape)
            raise ValueError(f"Loki's artifact must hold components [L, Hkv, d, d], got {actual}.")
        super().load_artifact(tensors, digest)

    def build_index(self, prefill: PrefillInputs) -> LokiIndex:
        keys = prefill.key_states
        _, num_kv_heads, _, head_dim = keys.shape
        components = self.artifact.get("components")
        if components is None:
            raise ValueError(
                "Loki needs its components, got no artifact; call load_artifact first."
            )
        expected = (prefill.num_layers, num_kv_heads, head_dim, head_dim)
        if tuple(components.shape) != expected:
            raise ValueError(
                f"Loki's components must be [L, Hkv, d, d] = {list(expected)}, "
                f"got {list(components.shape)}; fit them on this model."
            )
        rank = self.channels(head_dim)
        rotation = components[prefill.layer, :, :, :rank].to(keys.device, torch.float32)
        rotation = rotation.contiguous()
        low_keys = keys.new_zeros(*keys.shape[:2], prefill.capacity, rank)
        low_keys[:, :, : prefill.n] = keys.float() @ rotation
        return LokiIndex(low_keys=low_keys, rotation=rotation, **Index.counts(prefill))

    def append(self, index: LokiIndex, key_states: Tensor, value_states: Tensor) -> None:
        slot = index.advance()
        index.put(index.low_keys, slot, (key_states.float() @ index.rotation)[:, :, 0])

    def encode(self, index: LokiIndex, context: StepContext) -> Tensor:
        queries = context.query_states
        return (queries.float() @ index.rotation).to(queries.dtype)

    def score(self, encoded: Tensor, index: LokiIndex, context: StepContext) -> Tensor:
        impl = self.impl_for("lowrank_score")
        keys = index.low_keys[:, :, : index.length]
        return lowrank_score(encoded, keys, index.kv_start, index.kv_len, impl=impl)

    def index_bytes_per_token(self, geometry: Geometry) -> float:
        rank = self.channels(geometry.head_dim)
        return float(geometry.num_kv_heads * rank * geometry.dtype_bytes)

    def bytes_read(self, geometry: Geometry, n: int, read: int, scanned: int | None = None) -> int:
        rank = self.channels(geometry.head_dim)
        rotation = 4 * geometry.num_kv_heads * geometry.head_dim * rank
        side = round(n * self.index_bytes_per_token(geometry))
        return side + rotation + kv_bytes(geometry, read)
