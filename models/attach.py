"""Replace a Hugging Face model's decode attention by a method, inside a ``with`` block."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from topkbench.methods.base import (
    PREVIOUS_QUERY,
    AnyMethod,
    CacheView,
    Geometry,
    Observer,
    OtherLayer,
    Policy,
    StepContext,
)
from topkbench.methods.learning import check_ready
from topkbench.models import speculation
from topkbench.models.cache_watch import LengthReader, Lengths, is_decode_cache, new_tokens
from topkbench.models.compat import (
    AttentionCall,
    attention_modules,
    cache_layer,
    cached_tokens,
    is_cache,
    layer_of,
    partial_layers,
    read_call,
    register_attention,
    speculate_queries,
    using_attention,
    watching_caches,
    watching_prefill,
)
from topkbench.models.dense_attention import SINKS, attend_to_all
from topkbench.models.layer_index import LayerIndices
from topkbench.models.step_count import StepCount
from topkbench.models.step_guard import StepGuard
from topkbench.models.steps import LayerForward, Steps

IMPLEMENTATION = "topkbench"
"""The name under which our attention function is registered with transformers.

Outside a block of ``attach`` it is dense attention: torch's SDPA, or ours where a model has capped
logits or learned sinks, which transformers' own SDPA function ignores or refuses, by the release.
"""

# The tensors besides queries, keys, values and mask that an attention function may be passed: they
# do not change its result. Others (biases, bounds of packed texts, the model's own
# selections) would, and a decode step here cannot honour them.
_WITHOUT_EFFECT = {"position_ids", "cache_position"}

# The session of each attention module: transformers passes the attention function only the module.
_SESSIONS: "WeakKeyDictionary[nn.Module, Session]" = WeakKeyDictionary()


def geometry_of(model: PreTrainedModel, model_digest: str = "") -> Geometry:
    """Read the shape of a model's attention.

    Args:
        model: A decoder-only model.
        model_digest: Digest of its weights; artifacts are tied to it.

    Raises:
        ValueError: If topkbench cannot serve such a model; one sentence says why.
    """
    config = model.config.get_text_config(decoder=True)
    num_layers, name = int(config.num_hidden_layers), type(model).__name__
    modules = attention_modules(model)
    found = [layer_of(module) for module in modules]
    if not found or found != sorted(set(found)) or found[-1] >= num_layers:
        raise ValueError(
            "a model must have one attention module, which names its layer and how many query heads"
            f" share a KV head (layer_idx, num_key_value_groups), in each layer with attention,"
            f" found {len(found)} for {num_layers} layers in {name}, which topkbench does not"
            " support; docs/families.md lists the models that it does."
        )
    num_heads = int(config.num_attention_heads)
    sharing = [layer_of(one) for one in modules if getattr(one, "is_kv_shared_layer", False)]
    if sharing:
        raise ValueError(
            f"each attention layer must have keys and values of its own, and layer {sharing[0]} of"
            f" {name} uses those of an earlier one, which topkbench does not support."
        )
    shapes = {layer_of(module): _shape(module, config) for module in modules}
    partial = partial_layers(model)
    # Of a model without a layer that attends to the whole past all are described.
    left = {layer: one for layer, one in shapes.items() if layer not in partial} or shapes
    same = set(left.values())
    if len(same) != 1:
        heads = ", ".join(sorted(f"{one.num_kv_heads} of {one.head_dim} channels" for one in same))
        raise ValueError(
            f"the layers that attend to the whole past must have the same KV heads, got {heads} in"
            f" {name}, which topkbench does not support."
        )
    shape = same.pop()
    return Geometry(
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        value_dim=shape.value_dim,
        other_layers={
            layer: shapes.get(layer, OtherLayer())
            for layer in range(num_layers)
            if layer in partial or layer not in shapes
        },
        dtype_bytes=torch.empty(0, dtype=model.dtype).element_size(),
        device=model.device,
        model_digest=model_digest,
    )


def _shape(module: nn.Module, config: Any) -> OtherLayer:
    """Return the KV heads of an attention module.

    Configurations name them in several ways or not at all, and layers may differ. Under multi-head
    latent attention (DeepSeek) ``head_dim`` is that of the rotary part.
    """
    attention: Any = module
    num_heads = int(config.num_attention_heads)
    head_dim = getattr(attention, "head_dim", None) or config.hidden_size // num_heads
    head_dim = int(getattr(attention, "qk_head_dim", head_dim))
    value_dim = int(getattr(attention, "v_head_dim", head_dim))
    return OtherLayer(
        num_kv_heads=num_heads // int(attention.num_key_value_groups),
        head_dim=head_dim,
        value_dim=None if value_dim == head_dim else value_dim,
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

    Tokens that follow a filled cache are decode steps, one or several in a forward; everything
    else runs dense, with torch's SDPA. Several tokens give what they give one by one. A prompt
    that is read in several forwards is read inside ``with session.prefill():``; ``generate`` does
    so by itself. No gradient flows through a decode step. Layers with a sliding window stay dense,
    see ``Session.dense``.

    Each layer's index is built at its first decode step and kept on the cache object until the
    block ends: a copy of the cache, or a pickled one, has its own. It follows the cache's own
    methods. Reordering, repeating and selecting rows take its rows along, and a crop shortens it;
    if that is impossible, it is built again from the keys. A method that depends on the prompt or
    on its steps so far (``Traits.index``) cannot be built again in all cases, and then the next
    step raises: after a crop into the prompt, if decoded tokens were cropped, or if the cache was
    changed by other means.

    Every decode step is counted, one for each token of each row (``Session.count``). Leaving the
    block raises if decode steps over more than ``k`` tokens did not go through the method. Causes
    are generation without a cache, a mask with holes or one that is not causal, the likelihood of
    a whole text in one forward, and several tokens at once with a method that takes one at a time
    (``TopKMethod.known_tokens``). A block that only runs a prefill does not raise.

    Args:
        model: A decoder-only model of transformers 5, such as Llama, Mistral, Qwen2, Qwen3, Phi-3,
            Gemma-2, Gemma-3, gpt-oss, DeepSeek-V2 or DeepSeek-V3.
        method: The method, its artifact loaded.
        policy: Budget and rules; the native protocol replaces them by the method's own.
        observer: Is called around stages and after steps.
        allow_dense_forwards: Let forwards of several tokens over a filled cache attend to
            everything, with a warning.

    Yields:
        The session.

    Raises:
        ValueError: If the model is not supported, by attach or by the method, or the method does
            not support the policy, or, inside the block, the cache; one sentence says why.
        MethodBypassedError: When the block ends, if decode steps did not go through the method.

    When the block is left, also by an exception, the model is restored.
    """
    session = Session(model, method, policy, observer or Observer(), allow_dense_forwards)
    eager = torch.compiler.disable  # it would trace through the bookkeeping
    hooks = []
    try:
        for module in session.modules:
            hook = eager(partial(_before_attention, session))
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            _SESSIONS[module] = session
        model_hook = partial(_before_forward, session)
        hooks.append(model.register_forward_pre_hook(model_hook, with_kwargs=True))
        with (
            using_attention(model, IMPLEMENTATION),
            watching_caches(session),
            watching_prefill(model, session.prefill),
        ):
            yield session
        session.end()
    finally:
        for module in session.modules:
            _SESSIONS.pop(module, None)
        for hook_handle in hooks:
            hook_handle.remove()
        session.indices.store.close()


class Session:
    """One method attached to one model.

    Attributes:
        geometry: The model's.
        method: The method, as ``resolve`` returned it.
        policy: The policy, as ``resolve`` returned it.
        dense: The reason why a layer is always dense, for each such layer.
        partial: The attention pattern of each layer that does not attend to the whole past.
        modules: The model's attention modules.
        guard: Counts the decode steps and refuses those that bypassed the method.
        indices: The method's indices.
        steps: Runs the method's steps.
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
        self._by_layer = {layer_of(module): module for module in self.modules}
        if any(module in _SESSIONS for module in self.modules):
            raise ValueError(
                "a model can have one method attached at a time, and this one already has one; "
                "leave the other attach block first."
            )
        check_ready(self.method, self.geometry, self.policy)
        self._speculates = PREVIOUS_QUERY in method.traits.needs | observer.needs
        reason = speculation.unsupported_reason(model) if self._speculates else None
        if reason is not None:
            raise ValueError(reason)
        self.partial = partial_layers(model)
        self.dense = self._dense_layers()
        if method.selects and not self.sparse_layers:
            first = next(iter(self.dense.values()), "none has attention")
            raise ValueError(
                f"at least one layer must be left to {method.name}, but all "
                f"{self.geometry.num_layers} are dense ({first})."
            )
        self.guard = StepGuard(
            method.name, self.policy.k, self.sparse_layers, self.dense, allow_dense_forwards
        )
        self._reader = LengthReader()
        self.indices = LayerIndices(self.method, observer, self._reader)
        self.steps = Steps(self.method, observer, self.guard, self.indices)
        self._running = threading.local()
        self._cache: dict[int, Any] = {}
        self._speculated: dict[int, Tensor] = {}
        # Inside ``prefill``, the caches that were empty.
        self._prompts: WeakSet[Any] | None = None

    @property
    def count(self) -> StepCount:
        """The decode steps so far, by layer."""
        return self.guard.count

    @property
    def sparse_layers(self) -> list[int]:
        """The layers in which the method selects; none if it reads the whole cache."""
        if not self.method.selects:
            return []
        return [layer for layer in self.geometry.global_layers if layer not in self.dense]

    def require_steps(self, steps: int) -> None:
        """Raise unless the method took exactly ``steps`` decode steps in each of its layers.

        Args:
            steps: Decode steps that the caller ran over more than ``k`` tokens, one for each token
                of each row.

        Raises:
            MethodBypassedError: With both counts.
        """
        self.guard.require(steps)

    def undo_append(self, cache: object) -> None:
        """Remove the newest token from the indices, for a caller that decodes it once more.

        The same token must follow, as an index may have accumulated it already. The indices are
        kept only for tensors made in inference mode, whose writes are not counted; elsewhere the
        rewritten cache makes them be rebuilt.
        """
        self.indices.store.undo_append(cache)

    def end(self) -> None:
        """Raise if decode steps that should have gone through the method did not.

        Raises:
            MethodBypassedError: With the counts, the reasons and the remedy.
        """
        self.guard.require_all(self._cache)

    def _dense_layers(self) -> dict[int, str]:
        dense: dict[int, str] = {}
        # A method that reads the whole cache ignores the policy, so do not validate it.
        if self.method.selects:
            kept = self.geometry.kept_dense(self.policy)
            dense = dict.fromkeys(kept, "dense by the policy")
        return dense | {layer: kind.reason for layer, kind in self.partial.items()}

    def before_attention(self, layer: int, call: AttentionCall) -> None:
        """Record that a layer's attention begins, and its cache if it is among the arguments.

        Args:
            layer: Index of the layer.
            call: The arguments of its attention module.
        """
        hidden, next_layer = call.hidden_states, layer + 1
        batch_size, q_len = (0, 0) if hidden is None else hidden.shape[:2]
        self.guard.begin(layer, batch_size, q_len, self._cache.pop(layer, None))
        self._running.layer = layer
        if call.cache is not None:
            self._note_cache(layer, call.cache)
        if not self._speculates or next_layer not in self._by_layer or hidden is None:
            return
        if call.rotary is not None and self._may_step(call.cache, layer, q_len):
            with torch.no_grad(), self.observer.stage("encode", next_layer):
                self._speculated[next_layer] = speculate_queries(
                    self._by_layer[next_layer], hidden.detach(), call.rotary
                )

    def _may_step(self, cache: Any, layer: int, q_len: int) -> bool:
        """Return whether a forward that begins may be decode steps, as far as it is known."""
        if q_len == 1 or cache is None:
            return True
        cached = cached_tokens(cache, layer)
        if cached is None:
            return True
        before = cached - q_len if is_decode_cache(cache) else cached
        return before > 0 and (self._prompts is None or cache not in self._prompts)

    def before_write(self, cache: Any) -> None:
        """Record which cache the running layer is about to write to, if no argument showed it."""
        layer = getattr(self._running, "layer", None)
        if layer is not None:
            self._note_cache(layer, cache)

    def before_change(self, cache: Any) -> None:
        """Check what is kept beside a cache before one of the cache's methods changes it."""
        self.indices.store.before_change(cache)

    def took_rows(self, cache: Any, rows: Tensor) -> None:
        """Follow a cache whose row ``b`` has become its former row ``rows[b]``."""
        self.indices.store.took_rows(cache, rows)

    def was_cropped(self, cache: Any) -> None:
        """Follow a cache that may have lost its newest tokens."""
        self.indices.store.was_cropped(cache)

    def _note_cache(self, layer: int, cache: Any) -> None:
        self._cache[layer] = cache
        self.indices.store.check(cache, layer)

    @contextmanager
    def prefill(self) -> Iterator[None]:
        """Let later forwards over a cache be parts of its prompt, inside the block.

        The cache must be empty when the block begins. ``generate`` does this for its prompt by
        itself. Elsewhere the tokens that follow a filled cache are decode steps.
        """
        before, self._prompts = self._prompts, WeakSet()
        try:
            yield
        finally:
            self._prompts = before

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
        layer, (batch_size, _, q_len, _) = layer_of(module), query.shape
        self._running.layer = None
        self.guard.reached(layer)
        cache, speculated = self._cache.pop(layer, None), self._speculated.pop(layer, None)
        is_prompt = cache is not None and self._is_prompt(cache, layer, q_len, key.shape[2])
        lengths = None
        if cache is not None and (not is_prompt or is_decode_cache(cache)):
            lengths = self._reader.lengths(cache, cache_layer(cache, layer), key, mask, q_len)
        counts = new_tokens(cache, batch_size, q_len)
        how = self.method.known_tokens(counts) if q_len > 1 else None
        slots = key.shape[2]
        is_step = self.guard.forward(layer, cache, lengths, sum(counts), slots, is_prompt, how)
        if not is_step or lengths is None or layer in self.partial:
            self.indices.store.drop(cache, layer)
            if lengths is not None and lengths.is_decode_cache:
                # Rows may end at different slots, which transformers' masks do not express.
                kind = self.partial.get(layer)
                mask = lengths.causal_mask(q_len, slots, kind)
                if kind is not None and q_len == 1 and lengths.kv_start is lengths.kv_len is None:
                    # All rows end at the same slot, so it is enough to read the window.
                    first = lengths.n - kind.tokens_read(lengths.n)
                    key, value, mask = key[:, :, first:], value[:, :, first:], None
                mask = None if mask is None else mask.to(key.device)
            if cache is not None and layer not in self.dense:
                is_read = is_prompt or q_len > 1 or (lengths is not None and lengths.n == 1)
                if is_read and self.indices.captures:
                    shape = (options.get("softcap"), options.get(SINKS))
                    self.indices.capture(layer, cache, query, key, mask, scale, *shape)
                self.indices.store.saw(cache, layer)
            out = attend_to_all(module, query, key, value, mask, scale, options)
            if self.method.selects or layer in self.dense or is_prompt or lengths is None:
                return out
        context = self._context(layer, query, key, value, scale, lengths, options)
        context.cache.freed = getattr(cache_layer(cache, layer), "freed", None)
        states = query.detach()
        forward = LayerForward(cache, key, states, speculated, context, lengths, counts)
        if not is_step:
            self.steps.observe_dense(forward, out)
            return out
        with torch.no_grad():
            return self.steps.run(forward).to(query.dtype)

    def _is_prompt(self, cache: Any, layer: int, q_len: int, slots: int) -> bool:
        """Return whether a forward's tokens are a prompt, or the next part of one.

        Args:
            cache: The cache, in which the tokens are already.
            layer: Index of the layer.
            q_len: New tokens of each row.
            slots: Slots that are attended to.
        """
        cached = None if q_len == 1 else cached_tokens(cache, layer)
        if (slots if cached is None else cached) > q_len:
            return self._prompts is not None and cache in self._prompts
        if self._prompts is not None:
            self._prompts.add(cache)
        return True

    def _context(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        lengths: Lengths,
        options: dict[str, Any],
    ) -> StepContext:
        """Return the step of a forward's newest token."""
        n, num_kv_heads, sinks = lengths.n, key.shape[1], options.get(SINKS)
        return StepContext(
            query_states=query[:, :, -1].detach().unflatten(1, (num_kv_heads, -1)),
            cache=CacheView(
                key[:, :, :n].detach(),
                value[:, :, :n].detach(),
                lengths.kv_start,
                lengths.kv_len,
                new_tokens=query.shape[2],
            ),
            policy=self.policy,
            scale=scale,
            softcap=options.get("softcap"),
            sinks=None if sinks is None else sinks.detach(),
            layer=layer,
            num_layers=self.geometry.num_layers,
        )


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
    for name, option in options.items():
        is_sinks = name == SINKS and isinstance(option, Tensor) and option.shape == query.shape[1:2]
        if isinstance(option, Tensor) and name not in _WITHOUT_EFFECT and not is_sinks:
            raise ValueError(
                f"attach supports attention of queries, keys, values and one sink per query head "
                f"only, and {type(module).__name__} also passes {name} {list(option.shape)}."
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    session = _SESSIONS.get(module)
    if session is None:  # the model is not attached
        return attend_to_all(module, query, key, value, attention_mask, scale, options), None
    return session.attend(module, query, key, value, attention_mask, scale, options), None


register_attention(IMPLEMENTATION, torch.compiler.disable(_attention))


def _before_attention(
    session: Session, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    session.before_attention(layer_of(module), read_call(args, kwargs))


def _before_forward(
    session: Session, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    session.guard.scores_text = kwargs.get("labels") is not None
