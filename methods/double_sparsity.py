"""Double Sparsity: keys ranked by a few fixed channels, of which a separate copy is kept."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, get_args

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
)
from topkbench.methods.four_bits import bytes_per_token, dequantise, quantise
from topkbench.methods.learning import ArtifactSpec, LayerStates, LearningMethod, LossReport

LabelScope = Literal["kv_head", "query_head"]


@dataclass(kw_only=True)
class DoubleSparsityIndex(Index):
    """The label cache: the keys' heavy channels. ``H`` is the KV heads, or the query heads.

    Attributes:
        labels: ``[B, H, capacity, r]`` in the keys' dtype, or uint8 ``[B, H, capacity, r / 2]``
            4-bit labels, packed by ``four_bits.quantise``.
        ranges: float16 ``[B, H, capacity, 2]`` a token's lowest label and the step between two
            levels; None for labels in the keys' dtype.
        channels: int64 ``[H, r]`` heavy channels of each head, ascending.
        num_kv_heads: KV heads of the layer.
    """

    labels: Tensor
    ranges: Tensor | None
    channels: Tensor
    num_kv_heads: int

    without_rows: ClassVar[frozenset[str]] = frozenset({"channels"})


@dataclass(kw_only=True)
class DoubleSparsity(
    LearningMethod[DoubleSparsityIndex, Tensor], ScoringMethod[DoubleSparsityIndex, Tensor]
):
    """Rank keys by the dot product over the channels that calibration found heavy.

    Calibration measures, for each query head, how much each channel contributes to a logit: the
    mean of ``|q_c k_c|``, with each token's query and its own key. The channels that contribute
    most are the heavy channels; a second, contiguous copy of their key entries is kept as labels.

    Attributes:
        channels: Heavy channels per head; None for a quarter of ``head_dim``.
        label_scope: Which heads have channels of their own. ``kv_head`` sums the statistics over
            the group, so that a KV head has one label cache; ``query_head`` gives each query head
            its own, as published, which multiplies the bytes by the queries per group. None uses
            the policy's ``head_scope``: query heads under the native policy, KV heads under the
            unified one and without a policy.
        label_bits: 16 keeps labels in the keys' dtype; 4 rounds a token's labels to 16 levels
            between their minimum and maximum, for a smaller index. Here each step dequantises them
            before scoring, so that it takes longer than its bytes suggest.
        calibration_queries: Tokens of each calibration sequence that are measured, evenly spaced.

    Source:
        Double Sparsity (arXiv:2408.07092), section 3, with the statistics that its code calls
        ``qk``, post-RoPE like the keys that they apply to. That code overwrites them with each
        block of 512 tokens, so that only the last block counts; here all sequences count. Its ``q``
        and ``k`` statistics are not implemented here: they are pre-RoPE, and those of ``k`` are
        wrong with grouped queries. The code keeps a quarter of the channels in 16 bits, or in 4;
        the paper's text a sixteenth for each query head, the same bytes at four queries per group.
        The code also rounds queries, which are not rounded here, and divides logits by the root of
        the number of channels kept: for one head the order is the same, and for a sum over a group
        attention's own scale, used here, is closer to its weights. The native policy selects per
        query head, without sinks or recents.

    Compared with the authors' code:
        ``evaluation/modify_llama.py``, ``config/offline_calibration.py``
        (andy-yang-1/DoubleSparse): results agree when run on the same tensors. Differences: the
        statistics are of all sequences, there of the last block; queries are not rounded.
        ``LongBench/longbench_ds.sh`` has other settings than the paper and these defaults: half of
        the channels (``--group_factor 2``), 2 bits, and only the queries' statistics (``--channel
        q``).
    """

    name: ClassVar[str] = "double_sparsity"
    score_kind: ClassVar[ScoreKind] = "logit"

    channels: int | None = None
    label_scope: LabelScope | None = None
    label_bits: Literal[4, 16] = 16
    calibration_queries: int = 512

    def __post_init__(self) -> None:
        if self.channels is not None:
            check_whole("channels", self.channels)
        check_whole("calibration_queries", self.calibration_queries)
        if self.label_scope not in (None, *get_args(LabelScope)):
            words = ", ".join(get_args(LabelScope))
            raise ValueError(
                f"label_scope must be one of {words}, or null to follow the protocol, got "
                f"{self.label_scope!r}."
            )
        if self.label_bits not in (4, 16):
            raise ValueError(f"label_bits must be 4 or 16, got {self.label_bits!r}.")

    def resolve(self, policy: Policy) -> tuple[Self, Policy]:
        method, policy = super().resolve(policy)
        if self.label_scope is None:
            method = copy.copy(self)
            method.label_scope = policy.head_scope
        return method, policy

    def num_channels(self, head_dim: int) -> int:
        """Return the number of heavy channels for a head of size ``head_dim``."""
        return max(1, head_dim // 4) if self.channels is None else self.channels

    def unsupported_reason(self, geometry: Geometry, policy: Policy | None = None) -> str | None:
        channels = self.num_channels(geometry.head_dim)
        if channels > geometry.head_dim:
            return f"channels must be at most head_dim={geometry.head_dim}, got {channels}."
        if self.label_bits == 4 and channels % 2:
            return f"channels must be even for labels of 4 bits, got {channels}; set channels."
        return super().unsupported_reason(geometry, policy)

    # Calibration --------------------------------------------------------------------------------

    def artifact_spec(self, geometry: Geometry) -> ArtifactSpec:
        # It holds the statistics, not the channels: one artifact serves every number of channels.
        return self.spec_of(geometry, "calibration_queries")

    def artifact_layout(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        return {"magnitude": (geometry.num_layers, geometry.num_heads, geometry.head_dim)}

    def query_positions(self, layer: int, lengths: Sequence[int]) -> list[list[int]]:
        return [
            [i * n // count for i in range(count)]
            for n in lengths
            for count in [min(n, self.calibration_queries)]
        ]

    fit_version: ClassVar[int] = 1

    def fit_layer(
        self, layer: int, states: LayerStates, report: LossReport | None = None
    ) -> dict[str, Tensor]:
        """Return ``magnitude [Hq, d]``, the mean of ``|q_c k_c|`` for each channel."""
        positions = self.query_positions(layer, [keys.shape[1] for _, keys in states])
        total = torch.zeros(())
        for (queries, keys), at in zip(states, positions, strict=True):
            grouped = queries.float().unflatten(0, (len(keys), -1))
            same_tokens = keys[:, None, at].float()
            total = total.to(keys.device) + (grouped * same_tokens).abs().sum(2).flatten(0, 1)
        return {"magnitude": (total / sum(map(len, positions))).cpu()}

    def heavy_channels(self, magnitude: Tensor, num_kv_heads: int) -> Tensor:
        """Return int64 ``[H, r]``, the heavy channels by a layer's magnitudes ``[Hq, d]``."""
        if self.label_scope != "query_head":
            magnitude = magnitude.unflatten(0, (num_kv_heads, -1)).sum(1)
        # Stable sort: of equal channels the lower one is kept.
        order = magnitude.sort(dim=1, descending=True, stable=True).indices
        return order[:, : self.num_channels(magnitude.shape[1])].sort(dim=1).values

    # Decode -------------------------------------------------------------------------------------

    def build_index(self, prefill: PrefillInputs) -> DoubleSparsityIndex:
        keys = prefill.key_states
        batch_size, num_kv_heads, n, head_dim = keys.shape
        magnitude = self.artifact.get("magnitude")
        if magnitude is None:
            raise ValueError(
                "double_sparsity needs its statistics, got no artifact; call load_artifact first."
            )
        shape = tuple(magnitude.shape)
        if shape[0] != prefill.num_layers or shape[1] % num_kv_heads or shape[2] != head_dim:
            raise ValueError(
                f"double_sparsity's magnitude must be [L, Hq, d] with L={prefill.num_layers}, Hq a "
                f"multiple of {num_kv_heads} and d={head_dim}, got {list(shape)}; fit it on this "
                "model."
            )
        channels = self.heavy_channels(magnitude[prefill.layer], num_kv_heads).to(keys.device)
        labels, ranges = self._labels(keys, channels)
        buffer_shape = (batch_size, len(channels), prefill.capacity)
        label_buffer = labels.new_zeros(*buffer_shape, labels.shape[3])
        label_buffer[:, :, :n] = labels
        range_buffer = None
        if ranges is not None:
            range_buffer = ranges.new_zeros(*buffer_shape, 2)
            range_buffer[:, :, :n] = ranges
        return DoubleSparsityIndex(
            labels=label_buffer,
            ranges=range_buffer,
            channels=channels,
            num_kv_heads=num_kv_heads,
            **Index.counts(prefill),
        )

    def append(self, index: DoubleSparsityIndex, key_states: Tensor, value_states: Tensor) -> None:
        slot = index.advance()
        labels, ranges = self._labels(key_states, index.channels)
        index.put(index.labels, slot, labels[:, :, 0])
        if index.ranges is not None and ranges is not None:
            index.put(index.ranges, slot, ranges[:, :, 0])

    def _labels(self, keys: Tensor, channels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the labels of ``[B, Hkv, n, d]`` keys and, if 4-bit, their ranges, else None."""
        labels = _in_channels(keys[:, :, None], channels)
        return (labels, None) if self.label_bits == 16 else quantise(labels)

    def encode(self, index: DoubleSparsityIndex, context: StepContext) -> Tensor:
        """Return the queries' heavy channels, ``[B, Hkv, G, r]`` or ``[B, Hq, 1, r]``."""
        queries = context.query_states
        if len(index.channels) == index.num_kv_heads:
            return _in_channels(queries[:, :, None], index.channels)
        return _in_channels(queries[..., None, :], index.channels)

    def score(self, encoded: Tensor, index: DoubleSparsityIndex, context: StepContext) -> Tensor:
        labels = index.labels[:, :, : index.length]
        if index.ranges is not None:  # takes longer than the bytes counted for it suggest
            labels = dequantise(labels, index.ranges[:, :, : index.length])
        impl = self.impl_for("lowrank_score")
        scores = lowrank_score(encoded, labels, index.kv_start, index.kv_len, impl=impl)
        return scores.reshape(len(scores), index.num_kv_heads, -1, index.length)

    def index_bytes_per_token(self, geometry: Geometry) -> float:
        per_query = self.label_scope == "query_head"
        heads = geometry.num_heads if per_query else geometry.num_kv_heads
        channels = self.num_channels(geometry.head_dim)
        if self.label_bits == 4:
            return float(heads * bytes_per_token(channels))
        return float(heads * channels * geometry.dtype_bytes)


def _in_channels(states: Tensor, channels: Tensor) -> Tensor:
    """Return selected channels of ``[B, Hkv, G or 1, n, d]`` states: ``[B, H, n, r]``.

    ``channels [H, r]`` has one row per KV head, or per query head (which shares its KV head's
    states).
    """
    grouped = channels.unflatten(0, (states.shape[1], -1))[None, :, :, None]
    shape = (len(states), states.shape[1], grouped.shape[2], states.shape[3])
    expanded = states.expand(*shape, -1)
    return expanded.gather(4, grouped.expand(*shape, -1)).flatten(1, 2)
