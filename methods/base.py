"""The interface of a top-k attention method: what it implements and what its callers rely on."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from topkbench.kernels.dispatch import Impl
from topkbench.kernels.sparse_attention.api import sparse_attention
from topkbench.kernels.topk_select.api import topk_select
from topkbench.methods.policy import Policy, aggregate, check_whole
from topkbench.methods.states import (
    CacheView,
    Index,
    PrefillInputs,
    Remainder,
    Selection,
    StepResult,
)

__all__ = [
    "PREFILL_NEEDS",
    "PREVIOUS_QUERY",
    "QUERY_TAIL",
    "CacheView",
    "CalibrationStates",
    "Geometry",
    "Index",
    "LayerStates",
    "LossReport",
    "Observer",
    "Policy",
    "PrefillInputs",
    "Remainder",
    "Selection",
    "StageTimer",
    "StepResult",
    "TopKMethod",
    "aggregate",
    "check_whole",
]

StageTimer = Callable[[str], AbstractContextManager[Any]]
"""Given a stage's name, returns the context manager that times it."""

Progress = Callable[[int, int], None]
"""Called with the units of work done so far and the total."""

LayerStates = list[tuple[Tensor, Tensor]]
"""One layer's ``[Hq, m, d]`` queries and ``[Hkv, n, d]`` keys, for each calibration sequence."""

QUERY_TAIL = 64
"""How many of a prompt's last queries are captured for ``query_tail``."""

PREFILL_NEEDS = frozenset({"query_tail", "column_sums"})
"""Those of a method's ``needs`` that are captured at prefill."""

PREVIOUS_QUERY = "previous_query"
"""The one of a method's ``needs`` that is captured at each decode step."""

LossReport = Callable[[int, int, float], None]
"""Called after each training step with the steps done, the total and the step's loss."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The shape of a model's attention, read from the model itself.

    Attributes:
        num_layers: Number of decoder layers.
        num_heads: Query heads per layer.
        num_kv_heads: KV heads per layer.
        head_dim: Channels per head.
        dtype_bytes: Bytes per cached number.
        device: The model's device.
        model_digest: Digest of the weights, empty if unknown; artifacts are tied to it.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype_bytes: int = 2
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    model_digest: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """The model's digest and attention shape, by which an artifact is tied to its model."""
        names = ("model_digest", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        return {name: getattr(self, name) for name in names}


class CalibrationStates(Protocol):
    """Queries and keys of the texts a method is fitted on; no evaluation task uses these texts."""

    @property
    def num_layers(self) -> int:
        """Number of layers of the model."""

    @property
    def sequences(self) -> int:
        """Number of calibration sequences."""

    def states(self, layer: int) -> LayerStates:
        """Return one layer's post-RoPE queries and keys at all positions of each sequence."""


class Observer:
    """Callbacks for timing stages and inspecting decode steps; by default they do nothing.

    Attributes:
        needs: What ``on_step`` requires in its ``CacheView`` beyond keys and values.
    """

    needs: frozenset[str] = frozenset()

    def stage(self, name: str, layer: int) -> AbstractContextManager[Any]:
        """Return a context manager that is entered for one stage of one layer.

        Args:
            name: ``build``, ``append``, ``encode``, ``score``, ``select``, ``attend``, or ``full``
                for a whole dense decode step.
            layer: Index of the layer.
        """
        return nullcontext()

    def on_step(
        self,
        layer: int,
        query_states: Tensor,
        cache: CacheView,
        result: StepResult,
        scale: float,
        softcap: float | None,
    ) -> None:
        """Inspect one finished sparse decode step; ``query_states`` is ``[B, Hkv, G, d]``."""


@dataclass(kw_only=True)
class TopKMethod(ABC):
    """A method that chooses, at every decode step, which cached tokens each head attends to.

    A method object holds no per-prompt state. That is in the index, one per layer, which
    ``build_index`` returns and ``append`` updates in place. A scoring method implements ``score``
    and, if it keeps side information, ``build_index`` and ``append``; the rest has defaults.

    Attributes:
        name: The method's name in rows, files and figures.
        selects: False for a method that reads the whole cache, and so has no budget.
        score_kind: ``"logit"`` if scores are dot products up to the attention's scale (so that a
            softmax over them is meaningful), else ``"count"``.
        needs: What must be captured beyond keys and values: at prefill ``query_tail`` and
            ``column_sums``, at every step ``previous_query``.
        history_dependent: True if a selection depends on earlier selections, so that appending
            tokens differs from rebuilding the index, and each budget needs its own index.
        variable_budget: True if a head may select fewer tokens than ``k``.
        fits_prompt: True if the index keeps statistics of the prompt alone (a mean, a codebook), so
            that appending tokens differs from rebuilding the index.
        fit_version: Version of ``fit_layer``; increased whenever it learns something else from
            the same states and settings. Artifacts of other versions are not used.
        impl: Implementation of every operator, or a mapping from operator to implementation.
        native: The policy the method was published with: overrides of ``Policy`` fields.
        artifact: What ``fit`` returned, once loaded.
        artifact_digest: Digest of the loaded artifact, empty without one.
    """

    name: ClassVar[str]
    selects: ClassVar[bool] = True
    score_kind: ClassVar[Literal["logit", "count"]] = "count"
    needs: ClassVar[frozenset[str]] = frozenset()
    history_dependent: ClassVar[bool] = False
    variable_budget: ClassVar[bool] = False
    fits_prompt: ClassVar[bool] = False
    fit_version: ClassVar[int] = 1

    impl: Impl | Mapping[str, Impl] = "auto"
    native: Mapping[str, Any] = field(default_factory=dict, repr=False)
    artifact: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    artifact_digest: str = field(default="", init=False, repr=False)

    def impl_for(self, op: str) -> Impl:
        """Return the implementation requested for one operator."""
        return self.impl if isinstance(self.impl, str) else self.impl.get(op, "auto")

    def effective_policy(self, policy: Policy) -> Policy:
        """Return the policy, with the method's native values under the native protocol."""
        return replace(policy, **self.native) if policy.protocol == "native" else policy

    def with_policy(self, policy: Policy) -> Self:
        """Return self, or a copy with its policy-dependent defaults filled in.

        Call it with the effective policy before building an index or counting bytes. A copy shares
        the loaded artifact.
        """
        return self

    def for_answers(self) -> Self:
        """Return the method to generate answers with: self, unless a setting is for timing only."""
        return self

    def policy_unsupported_reason(self, policy: Policy) -> str | None:
        """Return one sentence saying why an effective policy is not supported, or None."""
        return None

    def model_unsupported_reason(self, geometry: Geometry) -> str | None:
        """Return one sentence saying why a model is not supported, or None."""
        return None

    # Fitting ------------------------------------------------------------------------------------

    def artifact_spec(self, geometry: Geometry) -> dict[str, Any] | None:
        """Return the settings that identify the artifact, or None if the method learns nothing.

        They include ``fit_version``, so that each version of the fit has its own artifact.
        """
        return None

    def artifact_layout(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the artifact's float32 tensors; the first axis is the layer."""
        return {}

    def query_positions(self, layer: int, lengths: Sequence[int]) -> list[list[int]]:
        """Return the positions in each sequence whose queries ``fit_layer`` reads; none by default.

        Only these are kept during calibration, as the queries of all positions need more memory
        than the keys.

        Args:
            layer: Index of the layer.
            lengths: Tokens of each calibration sequence.
        """
        return [[] for _ in lengths]

    def fit_layer(
        self, layer: int, states: LayerStates, report: LossReport | None = None
    ) -> dict[str, Tensor]:
        """Fit one layer. Layers are independent: any order, several at a time.

        Args:
            layer: Index of the layer.
            states: For each sequence, the post-RoPE queries at ``query_positions``, in that order,
                and all keys; in the model's dtype, on the device that fits.
            report: Called with the loss after each training step, if there are steps.

        Returns:
            The artifact's tensors for this layer, on the CPU.
        """
        raise ValueError(f"{self.name} learns nothing, so it has no fit.")

    def fit(self, calibration: CalibrationStates) -> dict[str, Tensor]:
        """Fit every layer in turn from states in memory; return the artifact's tensors."""
        layers = []
        for layer in range(calibration.num_layers):
            states = calibration.states(layer)
            positions = self.query_positions(layer, [keys.shape[1] for _, keys in states])
            needed = [
                (queries[:, at], keys)
                for (queries, keys), at in zip(states, positions, strict=True)
            ]
            layers.append(self.fit_layer(layer, needed))
        return stack_layers(layers)

    def load_artifact(self, tensors: dict[str, Tensor], digest: str = "") -> None:
        """Load tensors that ``fit`` returned, in this process or an earlier one.

        Args:
            tensors: The artifact.
            digest: The artifact's digest, which is reported with the results.
        """
        self.artifact = dict(tensors)
        self.artifact_digest = digest

    def check_ready(self, geometry: Geometry) -> None:
        """Check that the method supports the model and that a matching artifact is loaded.

        Raises:
            ValueError: With the reason, or with what the artifact must hold.
        """
        reason = self.model_unsupported_reason(geometry)
        if reason is not None:
            raise ValueError(reason)
        if self.artifact_spec(geometry) is None:
            return
        if not self.artifact:
            raise ValueError(
                f"{self.name} needs its artifact, and none is loaded; "
                "call load_artifact with a shipped one or with what fit returns."
            )
        for name, shape in self.artifact_layout(geometry).items():
            tensor = self.artifact.get(name)
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                actual = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(
                    f"{self.name}'s artifact must hold {name} as torch.float32 {list(shape)} for"
                    f" this model, got {actual}; fit it on this model."
                )

    # The index ----------------------------------------------------------------------------------

    @abstractmethod
    def build_index(self, prefill: PrefillInputs) -> Any:
        """Return one layer's side information, an ``Index`` with ``prefill.capacity`` slots."""

    @abstractmethod
    def append(self, index: Any, key_states: Tensor, value_states: Tensor) -> None:
        """Add one decoded token to the index, in place.

        The result equals ``build_index`` on the longer sequence, unless ``history_dependent`` or
        ``fits_prompt`` is set.

        Args:
            index: What ``build_index`` returned.
            key_states: ``[B, Hkv, 1, d]``.
            value_states: ``[B, Hkv, 1, d]``.
        """

    def bind(self, index: Any, cache: CacheView) -> None:
        """Give the index this step's view of the cache; for methods that score cached keys."""
        return

    @property
    def compacts(self) -> bool:
        """Whether tokens that a step did not select are freed; ``compact`` is then called."""
        return False

    def compact(self, index: Any, kept: Tensor, capacity: int) -> None:
        """Renumber the index, in place, after the cache has freed all but the kept tokens.

        Args:
            index: What ``build_index`` returned.
            kept: int32 ``[B, Hkv, m]`` old slots of the kept tokens, ascending, padded with -1 at
                the end; they have moved to the first ``m`` slots.
            capacity: Slots that the cache has now.
        """
        raise NotImplementedError(f"{self.name} frees nothing.")

    # One decode step ----------------------------------------------------------------------------

    def encode(self, query_states: Tensor, index: Any) -> Any:
        """Return the queries in the form that ``score`` takes; by default unchanged.

        Args:
            query_states: ``[B, Hkv, G, d]``.
            index: The layer's index.
        """
        return query_states

    @abstractmethod
    def score(self, encoded: Any, index: Any) -> Tensor | None:
        """Score every unit (token or page); the highest scores are kept.

        Returns:
            ``[B, Hkv, G, U]``, or ``[B, Hkv, U]`` if the method sums over the group itself, or
            None if the selection does not depend on the query.
        """

    def select(self, scores: Tensor | None, encoded: Any, index: Any, policy: Policy) -> Selection:
        """Choose the units to attend to; by default sinks, recents and the best of the rest.

        Args:
            scores: ``[B, H, U]``, ``H`` being the KV heads, or the query heads under
                ``head_scope="query_head"``; None if ``score`` returned None.
            encoded: What ``encode`` returned.
            index: The layer's index.
            policy: Budget and forced tokens.
        """
        if scores is None:
            raise ValueError(f"{self.name} must override select, since it has no scores.")
        indices = topk_select(
            scores,
            policy.k,
            policy.num_sink,
            policy.num_recent,
            index.kv_start,
            index.kv_len,
            impl=self.impl_for("topk_select"),
        )
        return Selection(indices)

    def attend(
        self,
        query_states: Tensor,
        cache: CacheView,
        selection: Selection,
        scale: float,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the selection; return ``out [B, Hq, d]`` and ``lse [B, Hq]``."""
        out, lse = sparse_attention(
            query_states.flatten(1, 2),
            cache.key_states,
            cache.value_states,
            selection.indices,
            scale,
            count=selection.count,
            log_weight=selection.log_weight,
            unit_size=selection.unit_size,
            kv_start=cache.kv_start,
            kv_len=cache.kv_len,
            softcap=softcap,
            impl=self.impl_for("sparse_attention"),
        )
        if selection.remainder is not None:
            value, weight = selection.remainder.value, selection.remainder.weight[..., None]
            group = out.shape[1] // value.shape[1]
            rest = value.float().repeat_interleave(group, 1)
            out = torch.lerp(out.float(), rest, weight).to(out.dtype)
        if selection.head_weight is not None:
            out = (out.float() * selection.head_weight[..., None]).to(out.dtype)
        return out, lse

    def update_after_step(
        self,
        result: StepResult,
        query_states: Tensor,
        index: Any,
        cache: CacheView,
        policy: Policy,
        scale: float,
        softcap: float | None = None,
    ) -> None:
        """Update the index, in place, from a finished step; for methods that track attention.

        Args:
            result: The step's output, selection and scores.
            query_states: ``[B, Hkv, G, d]``.
            index: The layer's index.
            cache: The layer's cached states.
            policy: Budget and forced tokens.
            scale: The attention's factor on dot products.
            softcap: The attention's logit cap, or None.
        """
        return

    def aggregate_over_group(
        self, scores: Tensor | None, policy: Policy, scale: float, softcap: float | None = None
    ) -> Tensor | None:
        """Reduce scores to one row per selecting head: ``[B, H, U]``.

        Raises:
            ValueError: If the policy selects per query head and the method scores per KV head.
        """
        if scores is None:
            return None
        if scores.ndim == 4:
            if policy.head_scope == "query_head":
                return scores.flatten(1, 2)
            impl = self.impl_for("group_softmax")
            return aggregate(scores, policy.aggregation, self.score_kind, scale, softcap, impl)
        if policy.head_scope == "query_head":
            raise ValueError(
                f"head_scope must be kv_head for {self.name}, whose scores are per KV head, "
                "got query_head."
            )
        return scores

    def step(
        self,
        query_states: Tensor,
        index: Any,
        cache: CacheView,
        policy: Policy,
        scale: float,
        softcap: float | None = None,
        watch: StageTimer | None = None,
    ) -> StepResult:
        """Run one decode step of one layer; the current token is already cached and appended.

        If ``k`` is at least the number of tokens, every token is selected and the method is not
        called: every method then equals full attention. In a batch this holds for each row.

        Args:
            query_states: ``[B, Hkv, G, d]``.
            index: The layer's index.
            cache: The layer's cached states.
            policy: Budget and forced tokens.
            scale: The attention's factor on dot products.
            softcap: Logits become ``softcap * tanh(logits / softcap)``; None for no cap.
            watch: Times the stages ``encode``, ``score``, ``select`` and ``attend``.
        """
        watch = _unwatched if watch is None else watch
        raw: Tensor | None = None
        scores: Tensor | None = None
        if policy.k >= cache.n:
            with watch("select"):
                selection = Selection.everything(cache)
        else:
            self.bind(index, cache)
            with watch("encode"):
                encoded = self.encode(query_states, index)
            with watch("score"):
                raw = self.score(encoded, index)
                scores = self.aggregate_over_group(raw, policy, scale, softcap)
            with watch("select"):
                selection = self.select(scores, encoded, index, policy)
                if type(self).select is not TopKMethod.select:  # the default does so already
                    selection = selection.with_all_of_short_rows(cache, policy.k)
        with watch("attend"):
            out, lse = self.attend(query_states, cache, selection, scale, softcap)
            result = StepResult(out, lse, selection, scores, raw)
            if index is not None:
                self.update_after_step(result, query_states, index, cache, policy, scale, softcap)
        return result

    # Accounting ---------------------------------------------------------------------------------

    def index_bytes_per_token(self, geometry: Geometry) -> float:
        """Return the bytes of side information per token, in one layer, over all KV heads."""
        return 0.0

    def bytes_read_per_step(self, geometry: Geometry, n: int, k: int) -> int:
        """Return the bytes that one decode step of one layer reads, for one batch row.

        These are the side information, whatever else scoring reads, and the keys and values of the
        selected tokens, once per KV head.

        Args:
            geometry: The model's.
            n: Cached tokens.
            k: Tokens that a KV head's queries attend to: the budget, or the size of the union if
                each query head selects its own.
        """
        return round(n * self.index_bytes_per_token(geometry)) + kv_bytes(geometry, min(k, n))

    def bytes_read_by(self, geometry: Geometry, n: int, read: int, scanned: int | None) -> int:
        """Return the same as ``bytes_read_per_step``, for a step whose reads were counted.

        Args:
            geometry: The model's.
            n: Cached tokens.
            read: Distinct tokens that a KV head's queries attended to.
            scanned: What else a KV head read, as counted in ``Selection.scanned``; None if it was
                not counted.
        """
        return self.bytes_read_per_step(geometry, n, read)


def stack_layers(layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack what ``fit_layer`` returned for each layer into the artifact's tensors."""
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}


def kv_bytes(geometry: Geometry, tokens: int) -> int:
    """Return the bytes of the keys and values of ``tokens`` tokens, in one layer, all KV heads."""
    return 2 * tokens * geometry.num_kv_heads * geometry.head_dim * geometry.dtype_bytes


def _unwatched(stage: str) -> AbstractContextManager[None]:
    return nullcontext()
