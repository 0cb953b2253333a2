"""Replace a Hugging Face model's decode attention by a method, inside a ``with`` block."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from topkbench.kernels.full_attention.api import full_attention
from topkbench.methods.base import (
    PREFILL_NEEDS,
    PREVIOUS_QUERY,
    AnyMethod,
    CacheView,
    Geometry,
    Index,
    Observer,
    Policy,
    Selection,
    StepContext,
)
from topkbench.methods.captured import Captured, missing
from topkbench.methods.learning import check_ready
from topkbench.models.cache_watch import (
    IndexStore,
    LengthReader,
    Lengths,
    can_watch,
    is_decode_cache,
)
from topkbench.models.compat import (
    AttentionCall,
    attention_modules,
    cache_layer,
    cached_tokens,
    is_cache,
    layer_of,
    max_slots,
    partial_layers,
    read_call,
    register_attention,
    sdpa_attention_forward,
    speculate_queries,
    speculation_unsupported_reason,
    using_attention,
    watching_writes,
)
from topkbench.models.softcap import softcap_attention
from topkbench.models.step_count import (
    HOLES,
    LIKELIHOOD,
    NO_CACHE,
    REMEDIES,
    SMALL,
    UNREACHED,
    PromptReading,
    StepCount,
)

IMPLEMENTATION = "topkbench"
"""The name under which our attention function is registered with transformers."""

# Attention inputs that a decode step here cannot honour: sink logits, biases, paged caches and the
# model's own selections.
_OTHER_INPUTS = ("s_aux", "position_bias", "cache", "indices")

# The session of each attention module: transformers passes the attention function only the module.
_SESSIONS: "WeakKeyDictionary[nn.Module, Session]" = WeakKeyDictionary()


def geometry_of(model: PreTrainedModel, model_digest: str = "") -> Geometry:
    """Read the shape of a model's attention.

    Args:
        model: A decoder-only model.
        model_digest: Digest of its weights; artifacts are tied to it.
    """
    config = model.config.get_text_config(decoder=True)
    num_heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    # Configurations name the number of KV heads in several ways or not at all; read the modules.
    groups = {int(module.num_key_value_groups) for module in attention_modules(model)}  # type: ignore[arg-type]
    if len(groups) > 1:
        raise ValueError(
            f"all layers must have the same number of query heads per KV head, got "
            f"{sorted(groups)} in {type(model).__name__}, which topkbench does not support."
        )
    return Geometry(
        num_layers=int(config.num_hidden_layers),
        num_heads=num_heads,
        num_kv_heads=num_heads // groups.pop() if groups else num_heads,
        head_dim=int(head_dim),
        dtype_bytes=torch.empty(0, dtype=model.dtype).element_size(),
        device=model.device,
        model_digest=model_digest,
    )


@contextmanager
def attach(
    model: PreTrainedModel,
    method: AnyMethod,
    policy: Policy,
    observer: Observer | None = None,
    allow_dense_forwards: bool = False,
) -> Iterator["Session"]:
    """Let a method choose what a model's decode steps attend to, inside a ``with`` block.

    A forward of one token over a filled cache is a decode step; everything else runs dense, with
    torch's SDPA. No gradient flows through a decode step. Each layer's index is built at its first
    decode step, lives as long as the cache object, and is rebuilt if the cache was changed in
    between (crop, reset, beam search). Layers with a sliding window stay dense, see
    ``Session.dense``.

    Every decode step is counted (``Session.count``). Leaving the block raises if decode steps over
    more than ``k`` tokens did not go through the method. Causes are generation without a cache, a
    mask with holes, and forwards of several tokens over a filled cache (computing a likelihood,
    prompt lookup, assisted decoding, a later turn). A block that only runs a prefill does not
    raise.

    Args:
        model: A decoder-only model of transformers 5, such as Llama, Mistral, Qwen2, Qwen3, Phi-3,
            Gemma-2 or Gemma-3.
        method: The method, its artifact loaded.
        policy: Budget and rules; the native protocol replaces them by the method's own.
        observer: Is called around stages and after steps.
        allow_dense_forwards: Accept forwards of several tokens over a filled cache, which attend
            to everything, instead of raising.

    Yields:
        The session.

    Raises:
        ValueError: If the model is not supported, by attach or by the method, or the method does
            not support the policy; one sentence says why.
        MethodBypassedError: When the block ends, if decode steps did not go through the method.

    When the block is left, also by an exception, the model is restored.
    """
    session = Session(model, method, policy, observer or Observer(), allow_dense_forwards)
    # Excluded from torch.compile, which would trace through the bookkeeping.
    eager = torch.compiler.disable
    register_attention(IMPLEMENTATION, eager(_attention))
    hooks = []
    try:
        for module in session.modules:
            hook = eager(partial(_before_attention, session))
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            _SESSIONS[module] = session
        model_hook = partial(_before_forward, session)
        hooks.append(model.register_forward_pre_hook(model_hook, with_kwargs=True))
        with using_attention(model, IMPLEMENTATION), watching_writes(session.before_write):
            yield session
        session.require_all_steps()
    finally:
        for module in session.modules:
            _SESSIONS.pop(module, None)
        for hook_handle in hooks:
            hook_handle.remove()


class Session:
    """One method attached to one model.

    Attributes:
        geometry: The model's.
        method: The method, with its policy-dependent defaults filled in.
        policy: The effective policy.
        dense: The reason why a layer is always dense, for each such layer.
        partial: The attention pattern of each layer that does not attend to the whole past.
        modules: The model's attention modules.
        count: The decode steps so far, by layer.
        scores_text: Whether the running forward was given ``labels``, and so computes the
            likelihood of its own tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: AnyMethod,
        policy: Policy,
        observer: Observer,
        allow_dense_forwards: bool = False,
    ) -> None:
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"attach supports decoder-only models, got the encoder-decoder "
                f"{type(model).__name__}."
            )
        self.geometry = geometry_of(model)
        self.method, self.policy = method.resolve(policy)
        self.observer = observer
        self.modules = attention_modules(model)
        if len(self.modules) != self.geometry.num_layers:
            raise ValueError(
                f"attach needs one attention module with layer_idx and num_key_value_groups in "
                f"each of the {self.geometry.num_layers} layers, found {len(self.modules)} in "
                f"{type(model).__name__}."
            )
        if any(module in _SESSIONS for module in self.modules):
            raise ValueError(
                "a model can have one method attached at a time, and this one already has one; "
                "leave the other attach block first."
            )
        check_ready(self.method, self.geometry)
        reason = self.method.unsupported_reason(self.geometry, self.policy)
        if reason is not None:
            raise ValueError(reason)
        self._needs = method.traits.needs | observer.needs
        for module in self.modules if PREVIOUS_QUERY in self._needs else ():
            reason = speculation_unsupported_reason(module)
            if reason is not None:
                raise ValueError(reason)
        self.partial = partial_layers(model)
        self.dense = self._dense_layers()
        self.count = StepCount()
        self._reading = PromptReading(self._miss)
        self._allow_dense_forwards = allow_dense_forwards
        self._running = threading.local()
        # By layer, the queries of an attention call that has not reached ``attend`` yet.
        self._unfinished_queries: dict[int, int] = {}
        self.scores_text = False
        if method.selects and len(self.dense) == self.geometry.num_layers:
            raise ValueError(
                f"at least one layer must be left to {method.name}, but all "
                f"{self.geometry.num_layers} are dense ({self.dense[0]})."
            )
        self.indices = IndexStore()
        self._reader = LengthReader()
        self._cache: dict[int, Any] = {}
        self._captured: WeakKeyDictionary[Any, dict[int, Captured]] = WeakKeyDictionary()
        self._speculated: dict[int, Tensor] = {}
        self._warned: set[str] = set()

    def forget(self, cache: object) -> None:
        """Drop the indices of a cache, for a caller that rewrote it where writes go unnoticed."""
        self.indices.forget(cache)

    @property
    def sparse_layers(self) -> list[int]:
        """The layers in which the method selects; none if it reads the whole cache."""
        if not self.method.selects:
            return []
        return [layer for layer in range(self.geometry.num_layers) if layer not in self.dense]

    def require_all_steps(self) -> None:
        """Raise if decode steps that should have gone through the method did not.

        Raises:
            MethodBypassedError: With the counts, the reasons and the remedy.
        """
        if self.method.selects:
            for layer in list(self._unfinished_queries):
                self._end_unreached(layer)
            self._reading.end()
            layers = self.sparse_layers
            self.count.require_none_missed(self.method.name, self.policy.k, layers)

    def require_steps(self, steps: int) -> None:
        """Raise unless the method took exactly ``steps`` decode steps in each of its layers.

        Args:
            steps: Decode steps that the caller ran over more than ``k`` tokens.

        Raises:
            MethodBypassedError: With both counts.
        """
        if self.method.selects:
            self.count.require(self.method.name, self.policy.k, self.sparse_layers, steps)

    def undo_append(self, cache: object) -> None:
        """Remove the newest token from the indices, for a caller that decodes it once more.

        The same token must follow, as an index may have accumulated it already. The indices are
        kept only for tensors made in inference mode, whose writes are not counted; elsewhere the
        rewritten cache makes them be rebuilt.
        """
        self.indices.undo_append(cache)

    def _dense_layers(self) -> dict[int, str]:
        dense: dict[int, str] = {}
        # A method that reads the whole cache ignores the policy, so do not validate it.
        if self.method.selects:
            for layer in sorted(self.policy.resolve_dense_layers(self.geometry.num_layers)):
                dense[layer] = "dense by the policy"
        return dense | {layer: kind.reason for layer, kind in self.partial.items()}

    def before_attention(self, layer: int, call: AttentionCall) -> None:
        """Record that a layer's attention begins, and its cache if it is among the arguments.

        Args:
            layer: Index of the layer.
            call: The arguments of its attention module.
        """
        self._end_unreached(layer)
        self._running.layer = layer
        self._cache.pop(layer, None)
        if call.cache is not None:
            self._note_cache(layer, call.cache)
        hidden, next_layer = call.hidden_states, layer + 1
        if hidden is not None:
            self._unfinished_queries[layer] = hidden.shape[1]
        if PREVIOUS_QUERY not in self._needs or next_layer >= len(self.modules) or hidden is None:
            return
        if hidden.shape[1] == 1 and call.rotary is not None:
            with torch.no_grad(), self.observer.stage("encode", next_layer):
                self._speculated[next_layer] = speculate_queries(
                    self.modules[next_layer], hidden.detach(), call.rotary
                )

    def _end_unreached(self, layer: int) -> None:
        """Count a decode step as missed if the layer's module never called our attention."""
        q_len = self._unfinished_queries.pop(layer, None)
        cache = self._cache.get(layer)
        if q_len is None or cache is None or layer in self.dense or not self.method.selects:
            return
        cached = cached_tokens(cache, layer)
        if cached is not None and cached > max(q_len, self.policy.k):
            self._miss(layer, UNREACHED)

    def before_write(self, cache: Any) -> None:
        """Record which cache the running layer is about to write to, if no argument showed it."""
        layer = getattr(self._running, "layer", None)
        if layer is not None:
            self._note_cache(layer, cache)

    def _note_cache(self, layer: int, cache: Any) -> None:
        self._cache[layer] = cache
        self.indices.check(cache, layer)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        options: dict[str, Any],
    ) -> Tensor:
        """Attend from ``query [B, Hq, q, d]``; return ``[B, q, Hq, d]``."""
        layer, q_len = layer_of(module), query.shape[2]
        self._running.layer = None
        self._unfinished_queries.pop(layer, None)
        cache = self._cache.pop(layer, None)
        lengths = None
        if cache is not None and (q_len == 1 or is_decode_cache(cache)):
            lengths = self._reader.lengths(cache, cache_layer(cache, layer), key, mask)
        self._count(layer, cache, lengths, q_len, key)
        is_step = q_len == 1 and lengths is not None and lengths.n > 1
        if not is_step or lengths is None or layer in self.partial:
            self.indices.drop(cache, layer)
            if lengths is not None and lengths.is_decode_cache:
                # Rows may end at different slots, which transformers' masks do not express.
                kind = self.partial.get(layer)
                mask = lengths.causal_mask(q_len, key.shape[2], kind)
                if kind is not None and q_len == 1 and lengths.kv_start is lengths.kv_len is None:
                    # All rows end at the same slot, so it is enough to read the window.
                    first = lengths.n - kind.tokens_read(lengths.n)
                    key, value, mask = key[:, :, first:], value[:, :, first:], None
                mask = None if mask is None else mask.to(key.device)
            is_prompt = q_len > 1 or (lengths is not None and lengths.n == 1)
            captures = self.method.traits.needs & PREFILL_NEEDS and layer not in self.dense
            if cache is not None and is_prompt and captures:
                self._capture(layer, cache, query, key, mask, scale, options.get("softcap"))
            return _dense(module, query, key, value, mask, scale, options)
        with torch.no_grad():
            out = self._step(layer, cache, query, key, value, lengths, scale, options)
        return out[:, None].to(query.dtype)

    def _count(
        self, layer: int, cache: Any, lengths: Lengths | None, q_len: int, key: Tensor
    ) -> None:
        """Count a layer's forward as dense or missed; steps of the method count in ``_step``."""
        k = self.policy.k
        if not self.method.selects:
            return
        if q_len > 1:
            if layer in self.dense:
                return
            if cache is None:
                if key.shape[2] > k:
                    self._miss(layer, NO_CACHE)
            elif self.scores_text and key.shape[2] > k and not self._allow_dense_forwards:
                self._miss(layer, LIKELIHOOD)
            elif not self._allow_dense_forwards:
                cached = cached_tokens(cache, layer)
                after = key.shape[2] if cached is None else cached
                self._reading.multi_token_forward(cache, layer, after - q_len, after, k)
            return
        n = key.shape[2] if lengths is None else lengths.n
        if n <= 1:
            return
        if layer in self.dense:
            self.count.dense[layer, self.dense[layer]] += 1
        elif cache is None or lengths is None:
            if n > k:
                self._miss(layer, NO_CACHE if cache is None else HOLES)
            else:
                self.count.dense[layer, SMALL] += 1
        else:
            self._reading.step(cache, layer, n)

    def _miss(self, layer: int, reason: str, steps: int = 1) -> None:
        """Count steps that should have gone through the method; warn once per reason."""
        self.count.missed[layer, reason] += steps
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"{self.method.name} does not act on {reason}, which attends to everything: "
                f"{REMEDIES[reason]}.",
                stacklevel=2,
            )

    def _capture(
        self,
        layer: int,
        cache: Any,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> None:
        """Store what the method needs from a dense forward, alongside the cache."""
        newest = None if mask is None else mask[:, :, -1:]
        lengths = self._reader.lengths(cache, cache_layer(cache, layer), key, newest)
        if lengths is None or lengths.kv_len is not None:
            raise ValueError(
                f"{self.method.name} reads queries of the prompt, so all rows must end at the same "
                "slot without holes, got a mask with holes or padding on the right; pad on the "
                "left."
            )
        layers = self._captured.setdefault(cache, {})
        captured = layers.setdefault(layer, Captured(self.method.traits.needs & PREFILL_NEEDS))
        with torch.no_grad(), self.observer.stage("build", layer):
            captured.update(query, key[:, :, : lengths.n], scale, lengths.kv_start, softcap)

    def _step(
        self,
        layer: int,
        cache: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Lengths,
        scale: float,
        options: dict[str, Any],
    ) -> Tensor:
        """Run one decode step; return ``[B, Hq, d]``."""
        n, kv_start, kv_len = lengths.n, lengths.kv_start, lengths.kv_len
        view = CacheView(key[:, :, :n].detach(), value[:, :, :n].detach(), kv_start, kv_len)
        view.freed = getattr(cache_layer(cache, layer), "freed", None)
        softcap, method, policy = options.get("softcap"), self.method, self.policy
        query = query.detach()[:, :, 0]
        if layer in self.dense:
            with self.observer.stage("full", layer):
                states = (query, view.key_states, view.value_states)
                return full_attention(*states, scale, kv_start, kv_len, softcap)
        speculated = self._speculated.pop(layer, None)
        context = StepContext(
            query_states=query.unflatten(1, (key.shape[1], -1)),
            cache=view,
            policy=policy,
            scale=scale,
            softcap=softcap,
            layer=layer,
            num_layers=self.geometry.num_layers,
            previous_query=(
                None if speculated is None else speculated[:, :, 0].unflatten(1, (key.shape[1], -1))
            ),
        )
        if method.selects:
            index = self._index(cache, key, context, lengths)
            result = method.step(index, context, partial(self._stage, layer))
            # Where tokens were freed the step is sparse, however few tokens are left.
            if view.n > policy.k or view.freed is not None:
                self.count.taken[layer] += result.selection is not None
            else:
                self.count.dense[layer, SMALL] += 1
            if method.compacts and result.selection is not None:
                with self.observer.stage("append", layer):
                    self._compact(layer, cache, index, result.selection, view)
        else:
            with self.observer.stage("full", layer):
                result = method.step(None, context)
        self.observer.on_step(context, result)
        return result.out

    def _index(self, cache: Any, key: Tensor, context: StepContext, lengths: Lengths) -> Index:
        """Return the layer's index, built if needed, with the current token appended."""
        layer = context.layer
        index = self.indices.get(cache, layer, lengths)
        capacity = 0 if index is None else self.indices.capacity(cache, layer)
        if capacity < lengths.n:
            capacity = _capacity(cache_layer(cache, layer), lengths.n)
            if index is not None and self.method.traits.index == "history":
                index.grow(capacity)  # rebuilding would lose the accumulated history
            else:
                index = None
        if index is None:
            self.indices.drop(cache, layer)
            self._check_can_build(cache, layer, key)
            context.shared = self.indices.shared(cache)
            captured = self.captured(cache, layer, lengths.n - 1)
            with self.observer.stage("build", layer):
                index = self.method.index_prompt(context, capacity, captured)
        with self.observer.stage("append", layer):
            self.method.append(index, *context.cache.newest())
        self.indices.keep(cache, layer, index, capacity, key, lengths)
        return index

    def _check_can_build(self, cache: Any, layer: int, key: Tensor) -> None:
        """Check that an index built now sees every token and, if it compacts, can free memory.

        Args:
            cache: The cache.
            layer: Index of the layer.
            key: The keys that the cache's layer returned.

        Raises:
            ValueError: If steps would go unnoticed, tokens are missing, or the cache frees nothing.
        """
        if self.method.traits.index == "history" and not can_watch(cache, layer, key):
            raise ValueError(
                f"{self.method.name} needs its index kept from step to step, and a "
                f"{type(cache).__name__} returns other keys than it stores, so that changes to it "
                "cannot be detected; use a DynamicCache or topkbench's DecodeCache."
            )
        stored = cache_layer(cache, layer)
        if getattr(stored, "freed", None) is not None:
            raise ValueError(
                f"{self.method.name} must see the whole prompt, and tokens of this cache have been "
                "freed; prefill a new one."
            )
        if self.method.compacts and not hasattr(cache, "topkbench_keep"):
            raise ValueError(
                f"mode=compact can free memory only of topkbench's own DecodeCache, got a "
                f"{type(cache).__name__}; use mode=masked, which selects the same."
            )

    def _compact(
        self, layer: int, cache: Any, index: Index, selection: Selection, view: CacheView
    ) -> None:
        """Free the tokens that a step did not select, at the first step and whenever full."""
        stored = cache_layer(cache, layer)
        kept = selection.indices
        is_due = kept.shape[2] < view.n if stored.freed is None else stored.is_full
        if not is_due:
            return
        cache.topkbench_keep(layer, kept)
        capacity = max_slots(stored)
        assert capacity is not None  # the cache is topkbench's own
        index.renumber(kept, capacity)
        lengths = self._reader.lengths(cache, stored, stored.keys, None)
        assert lengths is not None  # the cache is topkbench's own
        self.indices.keep(cache, layer, index, capacity, stored.keys, lengths)

    def captured(self, cache: Any, layer: int, n: int) -> dict[str, Tensor | None]:
        """Return what was captured for the first ``n`` slots, as arguments of ``PrefillInputs``.

        Raises:
            ValueError: If something that the method needs was not captured.
        """
        if is_decode_cache(cache):
            captured = cache.topkbench_captured(layer)
        else:
            captured = self._captured.get(cache, {}).get(layer)
        inputs = {} if captured is None else captured.inputs(n)
        lacking = missing(self.method.traits.needs, inputs)
        if lacking:
            raise ValueError(
                f"{self.method.name} needs {' and '.join(lacking)} of the prompt, and this cache "
                "was filled without capturing them; prefill it inside the with block of attach."
            )
        return inputs

    def _stage(self, layer: int, stage: str) -> AbstractContextManager[Any]:
        return self.observer.stage(stage, layer)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls, with queries ``[B, Hq, q, d]``.

    Keys and values are ``[B, Hkv, n, d]``, not repeated for the query heads.
    """
    options = {name: value for name, value in options.items() if not is_cache(value)}
    for name in _OTHER_INPUTS:
        if options.get(name) is not None:
            raise ValueError(
                f"attach supports attention of queries, keys and values only, and "
                f"{type(module).__name__} also passes {name}."
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    session = _SESSIONS.get(module)
    if session is None:  # a model that shares the config object but is not attached
        return _dense(module, query, key, value, attention_mask, scale, options), None
    return session.attend(module, query, key, value, attention_mask, scale, options), None


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    options: dict[str, Any],
) -> Tensor:
    """Attend to everything that the mask allows; return ``[B, q, Hq, d]``."""
    softcap = options.get("softcap")
    if softcap is not None:
        return softcap_attention(query, key, value, mask, scale, softcap).transpose(1, 2)
    out, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scale, **options)
    return out


def _before_attention(
    session: Session, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    session.before_attention(layer_of(module), read_call(args, kwargs))


def _before_forward(
    session: Session, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    session.scores_text = kwargs.get("labels") is not None


def _capacity(stored: Any, n: int) -> int:
    """Return the slots to allocate: the cache layer's, or ``n`` and spare ones if it grows."""
    slots = max_slots(stored)
    return n + max(256, n // 4) if slots is None else max(slots, n)
