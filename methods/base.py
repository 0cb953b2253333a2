"""The interface of a top-k attention method: what it implements and what its callers rely on.

`TopKMethod` is the contract. Most methods score every cached token with the current query and
derive from `ScoringMethod`; those whose selection does not depend on the query derive from
`QueryIndependentMethod`. What few methods need stands in bases of its own: `LearningMethod`
(``methods/learning.py``) for those that are fitted, `FollowsAttention` for those that track the
attention of their own steps, ``Evicting`` (``methods/eviction.py``) for those that drop tokens.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, cast

import torch
from torch import Tensor

from topkbench.kernels.dispatch import Impl, Operator
from topkbench.kernels.sparse_attention.api import sparse_attention
from topkbench.kernels.topk_select.api import topk_select
from topkbench.methods.policy import (
    NativePolicy,
    Policy,
    aggregate,
    check_list,
    check_multiple,
    check_whole,
)
from topkbench.methods.states import (
    CacheView,
    Index,
    PrefillInputs,
    Ranking,
    Remainder,
    Selection,
    SharedState,
    StepContext,
    StepResult,
)

__all__ = [
    "PREFILL_NEEDS",
    "PREVIOUS_QUERY",
    "QUERY_TAIL",
    "AnyMethod",
    "CacheView",
    "FollowsAttention",
    "Geometry",
    "Index",
    "IndexKind",
    "IndexT",
    "KnownTokens",
    "Observer",
    "OtherLayer",
    "Policy",
    "PrefillInputs",
    "QueryIndependentMethod",
    "QueryT",
    "Ranking",
    "Remainder",
    "ScoreKind",
    "ScoringMethod",
    "Selection",
    "SharedState",
    "StageTimer",
    "StepContext",
    "StepResult",
    "TopKMethod",
    "Traits",
    "cache_bytes",
    "check_list",
    "check_multiple",
    "check_whole",
    "copy_of",
    "key_bytes",
    "kv_bytes",
    "top_units",
    "value_bytes",
    "with_impl",
]

StageTimer = Callable[[str], AbstractContextManager[object]]
"""Given a stage's name, returns the context manager that times it."""

QUERY_TAIL = 64
"""How many of a prompt's last queries are captured for ``query_tail``."""

PREFILL_NEEDS = frozenset({"query_tail", "column_sums"})
"""Those of a method's needs that are captured at prefill."""

PREVIOUS_QUERY = "previous_query"
"""The one of a method's needs that is captured at each decode step."""

ScoreKind = Literal["logit", "count"]
"""What scores are: dot products up to the attention's scale, or anything else."""

IndexKind = Literal["token", "running", "prompt", "history"]

KnownTokens = Literal["together", "in turn", "one by one"]
"""How tokens that are known beforehand go through a method, see ``TopKMethod.known_tokens``."""

IndexT = TypeVar("IndexT", bound=Index)
QueryT = TypeVar("QueryT")


@dataclass(frozen=True, kw_only=True)
class OtherLayer:
    """A layer that is not left to methods: its attention is local, or it has none.

    Attributes:
        num_kv_heads: Its KV heads; 0 without attention.
        head_dim: Its channels per head, of queries and keys; 0 without attention.
        value_dim: Its channels per value; None: as ``head_dim``.
    """

    num_kv_heads: int = 0
    head_dim: int = 0
    value_dim: int | None = None


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The shape of a model's attention, read from the model itself.

    Attributes:
        num_layers: Number of decoder layers.
        num_heads: Query heads per layer.
        num_kv_heads: KV heads per layer.
        head_dim: Channels per head, of queries and keys.
        other_layers: The layers that do not attend to the whole past, which are not left to
            methods: in most models none.
        dtype_bytes: Bytes per cached number.
        device: The model's device.
        model_digest: Digest of the weights, empty if unknown; artifacts are tied to it.
        value_dim: Channels of a value; None if they are as many as ``head_dim``.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    other_layers: Mapping[int, OtherLayer] = field(default_factory=dict, hash=False)
    dtype_bytes: int = 2
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    model_digest: str = ""
    value_dim: int | None = None

    @property
    def value_width(self) -> int:
        """Channels of a value, with the default filled in."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def global_layers(self) -> list[int]:
        """The layers that attend to the whole past, in which methods act."""
        return [layer for layer in range(self.num_layers) if layer not in self.other_layers]

    def sparse_layers(self, policy: Policy | None) -> list[int]:
        """Return the layers that a policy, as ``resolve`` returned it, leaves to the method."""
        dense = frozenset() if policy is None else policy.resolve_dense_layers(self.num_layers)
        return [layer for layer in self.global_layers if layer not in dense]

    @property
    def attention_layers(self) -> list[int]:
        """The layers with attention, local or to the whole past."""
        others = self.other_layers
        return [
            layer
            for layer in range(self.num_layers)
            if layer not in others or others[layer].num_kv_heads
        ]

    def kept_dense(self, policy: Policy) -> list[int]:
        """Return the layers with attention that a policy keeps dense."""
        named = policy.resolve_dense_layers(self.num_layers)
        return [layer for layer in self.attention_layers if layer in named]

    def of_layer(self, layer: int) -> "Geometry":
        """Return the geometry with the shape of one layer, which may be another in local layers."""
        other = self.other_layers.get(layer)
        return self if other is None else replace(self, **vars(other))

    @property
    def identity(self) -> dict[str, object]:
        """The model's digest and attention shape, by which an artifact is tied to its model."""
        names = ("model_digest", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        return {**{name: getattr(self, name) for name in names}, **self.fitted_layers}

    @property
    def fitted_layers(self) -> dict[str, object]:
        """For which layers a method learns; empty if for all of them.

        Which layers attend to the whole past may depend on the window that a model is run with.
        """
        layers = ", ".join(map(str, self.global_layers))
        return {"global_layers": layers} if self.other_layers else {}


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a method declares about itself; the contract's tests hold it to that.

    Attributes:
        needs: What must be captured beyond keys and values: at prefill ``query_tail`` and
            ``column_sums``, at every step ``previous_query``.
        index: What the index keeps.
            ``"token"``: for each token, what depends on that token alone.
            ``"running"``: also what covers several tokens (a page's bounds, a sum), so that an
            index of more tokens does not contain those of fewer.
            ``"prompt"``: also statistics of the prompt alone (a mean, a codebook), so that
            appending tokens differs from rebuilding the index, which is then never rebuilt from
            tokens that were decoded.
            ``"history"``: what depends on earlier selections or on which tokens were decoded, so
            that it cannot be rebuilt, and each budget needs its own index.
        variable_budget: Whether a head may select fewer tokens than ``k``.
        per_kv_head: Whether scores are those of a KV head's group, so that query heads cannot
            select separately.
        across_layers: Whether each step changes what the layers share, so that a step must go
            through all layers before the next one begins.
    """

    needs: frozenset[str] = frozenset()
    index: IndexKind = "token"
    variable_budget: bool = False
    per_kv_head: bool = False
    across_layers: bool = False

    @property
    def depends_on_prompt(self) -> bool:
        """Whether the index depends on which of its tokens were the prompt."""
        return self.index in ("prompt", "history")

    @property
    def restricts(self) -> bool:
        """Whether the index after more tokens, restricted to its first n slots, equals that at n.

        Tokens known beforehand can then be appended at once, and each query reads its own part.
        """
        return self.index in ("token", "prompt")


class Observer:
    """Callbacks for timing stages and inspecting decode steps; by default they do nothing.

    Attributes:
        needs: What ``on_step`` requires in its ``StepContext`` beyond keys and values.
    """

    needs: frozenset[str] = frozenset()

    def stage(self, name: str, layer: int) -> AbstractContextManager[object]:
        """Return a context manager that is entered for one stage of one layer.

        Args:
            name: ``build``, ``append``, ``encode``, ``score``, ``select``, ``attend``, or ``full``
                for a whole dense decode step.
            layer: Index of the layer.
        """
        return nullcontext()

    def on_step(self, context: StepContext, result: StepResult) -> None:
        """Inspect one finished decode step of one layer."""


@dataclass(kw_only=True)
class TopKMethod(ABC, Generic[IndexT, QueryT]):
    """A method that chooses, at every decode step, which cached tokens each head attends to.

    A method object holds no per-prompt state. That is in the index, one per layer, which
    ``build_index`` returns and ``append`` updates in place. ``IndexT`` is its type, ``QueryT`` that
    of the encoded queries.

    Attributes:
        name: The method's name in rows, files and figures.
        selects: False for a method that reads the whole cache, and so has no budget.
        traits: What the method needs, keeps and may select.
        impl: Implementation of every operator, or a mapping from operator to implementation.
        native: The policy the method was published with: overrides of ``Policy`` fields.
    """

    name: ClassVar[str]
    selects: ClassVar[bool] = True

    impl: Impl | Mapping[Operator, Impl] = "auto"
    native: NativePolicy = field(default_factory=NativePolicy, repr=False)

    @property
    def traits(self) -> Traits:
        """What the method needs, keeps and may select."""
        return Traits()

    def impl_for(self, op: Operator) -> Impl:
        """Return the implementation requested for one operator."""
        return self.impl if isinstance(self.impl, str) else self.impl.get(op, "auto")

    @property
    def compacts(self) -> bool:
        """Whether tokens that a step did not select are freed, and the index is renumbered."""
        return False

    # The policy and the model -------------------------------------------------------------------

    def resolve(self, policy: Policy) -> tuple[Self, Policy]:
        """Return the method and the policy as they act together.

        Under the native protocol the policy has the method's published values. The method is self,
        or a copy with the settings filled in that depend on the policy; a copy shares the loaded
        artifact. Resolving the result again changes nothing.
        """
        return self, self.native_policy(policy) if policy.protocol == "native" else policy

    def on(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Return the method with what it leaves to the device and the dtype of the states chosen.

        That is full attention's kernel; other methods choose theirs operator by operator.
        """
        return self

    def native_policy(self, policy: Policy) -> Policy:
        """Return a policy with the method's published values; the budget stays."""
        return replace(policy, **self.native)

    def unsupported_reason(self, geometry: Geometry, policy: Policy | None = None) -> str | None:
        """Return one sentence saying why a model or a resolved policy is not supported, or None.

        Args:
            geometry: The model's.
            policy: As ``resolve`` returned it; None to ask about the model alone.
        """
        if policy is not None and policy.head_scope == "query_head" and self.traits.per_kv_head:
            return _per_kv_head_reason(self.name)
        return None

    # The index ----------------------------------------------------------------------------------

    @abstractmethod
    def build_index(self, prefill: PrefillInputs) -> IndexT:
        """Return one layer's side information, with ``prefill.capacity`` slots."""

    def index_prompt(
        self,
        context: StepContext,
        capacity: int,
        captured: Mapping[str, Tensor | None],
        shared: dict[str, SharedState] | None = None,
    ) -> IndexT:
        """Build the index of all tokens before a step's current one; ``append`` adds that.

        Args:
            context: The step.
            capacity: Slots to allocate.
            captured: What the method needs of the prompt beyond keys and values, by name.
            shared: What the indices of all layers of the cache share.
        """
        return self.build_index(context.prompt(capacity, captured, shared))

    @abstractmethod
    def append(self, index: IndexT, key_states: Tensor, value_states: Tensor) -> None:
        """Add one decoded token to the index, in place.

        The result equals ``build_index`` on the longer sequence, unless ``traits.index`` is
        ``"prompt"`` or ``"history"``.

        Args:
            index: What ``build_index`` returned.
            key_states: ``[B, Hkv, 1, d]``.
            value_states: ``[B, Hkv, 1, dv]``.
        """

    def known_tokens(self, counts: Sequence[int]) -> KnownTokens:
        """Return how tokens that are known beforehand go through the method.

        ``"together"``: in one forward of the model, and in one step of each layer.
        ``"in turn"``: in one forward of the model, one step after the other in each layer.
        ``"one by one"``: in a forward each.

        Args:
            counts: How many tokens each row of the batch has.
        """
        if not self.selects or (self.traits.restricts and not self.compacts):
            return "together"
        if self.compacts or self.traits.across_layers or len(set(counts)) > 1:
            return "one by one"
        return "in turn"

    # One decode step ----------------------------------------------------------------------------

    @abstractmethod
    def choose(
        self,
        index: IndexT,
        context: StepContext,
        watch: StageTimer,
        given: Ranking[QueryT] | None = None,
    ) -> tuple[Selection, Ranking[QueryT] | None]:
        """Return the units to attend to, and by which scores they were chosen, if by any.

        Args:
            index: The layer's index.
            context: The step.
            watch: Times the stages.
            given: How a step at another budget ranked the same queries; it is not computed again.
        """

    def attend(self, context: StepContext, selection: Selection) -> tuple[Tensor, Tensor | None]:
        """Attend to the selection; return ``out [B, Hq, dv]`` and ``lse [B, Hq]``."""
        cache = context.cache
        out, lse = sparse_attention(
            context.query_states.flatten(1, 2),
            cache.key_states,
            cache.value_states,
            selection.indices,
            context.scale,
            count=selection.count,
            log_weight=selection.log_weight,
            unit_size=selection.unit_size,
            kv_start=cache.kv_start,
            kv_len=cache.kv_len,
            softcap=context.softcap,
            sinks=context.sinks,
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

    def step(
        self,
        index: IndexT,
        context: StepContext,
        watch: StageTimer | None = None,
        given: Ranking[QueryT] | None = None,
    ) -> StepResult:
        """Run one decode step of one layer; the current token is already cached and appended.

        If ``k`` is at least the number of tokens, every token is selected and the method is not
        called: every method then equals full attention. In a batch this holds for each row.

        Args:
            index: The layer's index.
            context: The step.
            watch: Times the stages ``encode``, ``score``, ``select`` and ``attend``.
            given: How a step at another budget ranked the same queries on the same index; None to
                score them.
        """
        watch = _unwatched if watch is None else watch
        ranking: Ranking[QueryT] | None = None
        cache, k = context.cache, context.policy.k
        if k >= cache.n:
            with watch("select"):
                selection = Selection.everything(cache)
        else:
            if context.policy.head_scope == "query_head" and self.traits.per_kv_head:
                raise ValueError(_per_kv_head_reason(self.name))
            selection, ranking = self.choose(index, context, watch, given)
        with watch("attend"):
            out, lse = self.attend(context, selection)
            result = StepResult(out, lse, selection, ranking)
            if isinstance(self, FollowsAttention):
                self.update_after_step(result, index, context)
        return result

    # Accounting ---------------------------------------------------------------------------------

    def index_bytes_per_token(self, geometry: Geometry) -> float:
        """Return the bytes of side information per token, in one layer, over all KV heads."""
        return 0.0

    def bytes_read(self, geometry: Geometry, n: int, read: int, scanned: int | None = None) -> int:
        """Return the bytes that one decode step of one layer reads, for one batch row.

        These are the side information, whatever else scoring reads, and the keys and values of the
        selected tokens, once per KV head.

        Args:
            geometry: The model's.
            n: Cached tokens.
            read: Distinct tokens that a KV head's queries attend to, at most ``n``: counted, or the
                budget.
            scanned: What else a KV head read, as counted in ``Selection.scanned``; None if it was
                not counted.
        """
        return round(n * self.index_bytes_per_token(geometry)) + kv_bytes(geometry, read)


AnyMethod = TopKMethod[Any, Any]
"""Some method, for callers that only pass its index back to it."""

MethodT = TypeVar("MethodT", bound=AnyMethod)


@dataclass(kw_only=True)
class ScoringMethod(TopKMethod[IndexT, QueryT]):
    """A method that scores every unit (token or page) with the current queries.

    It implements ``score`` and, if it keeps side information, ``build_index`` and ``append``.

    Attributes:
        score_kind: ``"logit"`` if scores are dot products up to the attention's scale (so that a
            softmax over them is meaningful), else ``"count"``.
    """

    score_kind: ClassVar[ScoreKind] = "count"

    def encode(self, index: IndexT, context: StepContext) -> QueryT:
        """Return the queries in the form that ``score`` takes; by default ``[B, Hkv, G, d]``."""
        return cast(QueryT, context.query_states)

    @abstractmethod
    def score(self, encoded: QueryT, index: IndexT, context: StepContext) -> Tensor:
        """Score every unit; the highest scores are kept.

        Returns:
            ``[B, Hkv, G, U]``, or ``[B, Hkv, U]`` if the method sums over the group itself.
        """

    def aggregate(self, scores: Tensor, context: StepContext) -> Tensor:
        """Reduce what ``score`` returned to one row per selecting head: ``[B, H, U]``.

        Raises:
            ValueError: If the method has not declared ``per_kv_head`` and its scores have no axis
                of query heads.
        """
        policy = context.policy
        if scores.ndim == 4:
            if policy.head_scope == "query_head":
                return scores.flatten(1, 2)
            impl = self.impl_for("group_softmax")
            rule = (policy.aggregation, self.score_kind)
            shape = (context.softcap, context.sinks)
            return aggregate(scores, *rule, context.scale, *shape, impl)
        if policy.head_scope == "query_head":
            raise ValueError(
                f"{self.name} must declare per_kv_head in its traits, as its scores have no axis "
                "of query heads."
            )
        return scores

    def select(self, ranking: Ranking[QueryT], index: IndexT, context: StepContext) -> Selection:
        """Choose the units to attend to; by default sinks, recents and the best of the rest."""
        return top_units(ranking.scores, index, context.policy, self.impl_for("topk_select"))

    def choose(
        self,
        index: IndexT,
        context: StepContext,
        watch: StageTimer,
        given: Ranking[QueryT] | None = None,
    ) -> tuple[Selection, Ranking[QueryT] | None]:
        if given is None:
            with watch("encode"):
                encoded = self.encode(index, context)
            with watch("score"):
                raw = self.score(encoded, index, context)
                ranking = Ranking(encoded, raw, self.aggregate(raw, context))
        else:  # only the reduction over the group may depend on the budget
            scores = self.aggregate(given.raw_scores, context)
            ranking = Ranking(given.encoded, given.raw_scores, scores)
        with watch("select"):
            selection = self.select(ranking, index, context)
            selection = selection.with_all_of_short_rows(context.cache, context.policy.k)
        return selection, ranking


@dataclass(kw_only=True)
class QueryIndependentMethod(TopKMethod[IndexT, None]):
    """A method whose selection does not depend on the current queries."""

    @abstractmethod
    def select(self, index: IndexT, context: StepContext) -> Selection:
        """Choose the units to attend to."""

    def choose(
        self,
        index: IndexT,
        context: StepContext,
        watch: StageTimer,
        given: Ranking[None] | None = None,
    ) -> tuple[Selection, None]:
        with watch("select"):
            selection = self.select(index, context)
            return selection.with_all_of_short_rows(context.cache, context.policy.k), None


class FollowsAttention(ABC, Generic[IndexT]):
    """A method whose index changes with what its own steps attended to."""

    @abstractmethod
    def update_after_step(self, result: StepResult, index: IndexT, context: StepContext) -> None:
        """Update the index, in place, from a finished step."""


def top_units(scores: Tensor, index: Index, policy: Policy, impl: Impl) -> Selection:
    """Select sinks, recents and the units with the highest of ``[B, H, U]`` scores."""
    indices = topk_select(
        scores,
        policy.k,
        policy.num_sink,
        policy.num_recent,
        index.kv_start,
        index.kv_len,
        impl=impl,
    )
    return Selection(indices, complete=True)


def copy_of(method: MethodT, **settings: object) -> MethodT:
    """Return a copy of a method, and of a method inside it; both share the loaded artifact.

    Args:
        method: The method.
        settings: Settings that both get.
    """
    copied = copy.copy(method)
    for name, value in vars(method).items():
        if isinstance(value, TopKMethod):
            setattr(copied, name, copy_of(value, **settings))
    for name, setting in settings.items():
        setattr(copied, name, setting)
    return copied


def with_impl(method: MethodT, impl: Impl | Mapping[Operator, Impl]) -> MethodT:
    """Return a copy of a method that runs other implementations of the operators."""
    return copy_of(method, impl=impl)


def kv_bytes(geometry: Geometry, tokens: int) -> int:
    """Return the bytes of the keys and values of ``tokens`` tokens, in one layer, all KV heads.

    They are those that attention reads. Under multi-head latent attention (DeepSeek) a cache may
    hold a latent vector for each token, from which transformers computes keys and values before it
    attends; what is counted are the expanded keys and values.
    """
    return key_bytes(geometry, tokens) + value_bytes(geometry, tokens)


def key_bytes(geometry: Geometry, tokens: int) -> int:
    """Return the bytes of the keys of ``tokens`` tokens, in one layer, all KV heads."""
    return tokens * geometry.num_kv_heads * geometry.head_dim * geometry.dtype_bytes


def value_bytes(geometry: Geometry, tokens: int) -> int:
    """Return the bytes of the values of ``tokens`` tokens, in one layer, all KV heads."""
    return tokens * geometry.num_kv_heads * geometry.value_width * geometry.dtype_bytes


def cache_bytes(geometry: Geometry, tokens: int) -> int:
    """Return the bytes of the keys and values of ``tokens`` tokens, in all layers and KV heads.

    Those of a layer with local attention are kept too, though it reads only its window.
    """
    layers = geometry.attention_layers
    return sum(kv_bytes(geometry.of_layer(layer), tokens) for layer in layers)


def _per_kv_head_reason(name: str) -> str:
    return f"head_scope must be kv_head for {name}, which selects per KV head, got query_head."


def _unwatched(stage: str) -> AbstractContextManager[None]:
    return nullcontext()
