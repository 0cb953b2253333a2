"""Put a method into a Hugging Face model for the length of a ``with`` block."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from topkbench.kernels.full_attention.api import full_attention
from topkbench.methods.base import (
    CacheView,
    Geometry,
    Observer,
    Policy,
    PrefillInputs,
    Selection,
    TopKMethod,
)
from topkbench.methods.cache_watch import (
    IndexStore,
    LengthReader,
    Lengths,
    cache_layer,
    can_watch,
    is_own,
)
from topkbench.methods.capture import (
    PREFILL_NEEDS,
    PREVIOUS_QUERY,
    Captured,
    cannot_foretell,
    foretell_queries,
    missing,
)
from topkbench.methods.softcap import softcap_attention

IMPLEMENTATION = "topkbench"
"""The name under which transformers knows our attention."""

# Which session serves an attention module; transformers gives the attention function no more.
_SESSIONS: "WeakKeyDictionary[nn.Module, Session]" = WeakKeyDictionary()


def geometry_of(model: PreTrainedModel, model_digest: str = "") -> Geometry:
    """Read the shape of a model's attention.

    Args:
        model: A decoder-only model.
        model_digest: What identifies its weights; artifacts are tied to it.
    """
    config = model.config.get_text_config(decoder=True)
    num_heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return Geometry(
        num_layers=int(config.num_hidden_layers),
        num_heads=num_heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
        head_dim=int(head_dim),
        dtype_bytes=torch.empty(0, dtype=model.dtype).element_size(),
        device=model.device,
        model_digest=model_digest,
    )


@contextmanager
def attach(
    model: PreTrainedModel,
    method: TopKMethod,
    policy: Policy,
    observer: Observer | None = None,
) -> Iterator["Session"]:
    """Let a method choose what a model's decode steps attend to, inside a ``with`` block.

    A forward of one token over a longer cache is a decode step; everything else is dense, by
    torch's SDPA. No gradient flows through a decode step. Each layer's index is built at its first
    decode step, lives with the cache object, and is built anew where the cache changed in between
    (crop, reset, beam search). Layers with a sliding window stay dense, see ``Session.dense``.

    Args:
        model: A decoder-only model of transformers 5, such as Llama, Mistral, Qwen2, Qwen3, Phi-3,
            Gemma-2 or Gemma-3.
        method: The method, its artifact loaded.
        policy: Budget and rules; under the native protocol the method's own take their place.
        observer: Watches stages and steps.

    Yields:
        The session.

    Raises:
        ValueError: If the model, or the method on it, cannot be served, or the method cannot follow
            the policy; one sentence says why.

    On leaving the block, also by an exception, the model is what it was.
    """
    session = Session(model, method, policy, observer or Observer())
    # A graph compiler would trace through the bookkeeping; decode steps stay eager.
    eager = torch.compiler.disable
    AttentionInterface.register(IMPLEMENTATION, eager(_attention))
    # Without a mask function of that name transformers makes no mask, also for padded batches.
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    configs = _configs(model)
    before = [config._attn_implementation_internal for config in configs]
    hooks = []
    try:
        for module in session.modules:
            hook = eager(partial(_see_cache, session))
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            _SESSIONS[module] = session
        model.set_attn_implementation(IMPLEMENTATION)
        yield session
    finally:
        for module in session.modules:
            _SESSIONS.pop(module, None)
        for registered in hooks:
            registered.remove()
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


class Session:
    """One method attached to one model.

    Attributes:
        geometry: The model's.
        method: The method, as it runs under the policy.
        policy: The policy in force.
        dense: Why a layer is always dense, for each such layer.
        modules: The model's attention modules.
    """

    def __init__(
        self, model: PreTrainedModel, method: TopKMethod, policy: Policy, observer: Observer
    ) -> None:
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"attach serves decoder-only models, got the encoder-decoder "
                f"{type(model).__name__}."
            )
        self.geometry = geometry_of(model)
        self.policy = method.policy_in_force(policy)
        self.method = method.under(self.policy)
        self.observer = observer
        self.modules = [m for m in model.modules() if _is_attention(m)]
        if len(self.modules) != self.geometry.num_layers:
            raise ValueError(
                f"attach needs one attention module with layer_idx and num_key_value_groups in "
                f"each of the {self.geometry.num_layers} layers, found {len(self.modules)} in "
                f"{type(model).__name__}."
            )
        if any(module in _SESSIONS for module in self.modules):
            raise ValueError("a model can have one method attached, and this one has; leave it.")
        reason = method.refuses(self.policy)
        if reason is not None:
            raise ValueError(reason)
        method.check_ready(self.geometry)
        self._needs = method.needs | observer.needs
        for module in self.modules if PREVIOUS_QUERY in self._needs else ():
            reason = cannot_foretell(module)
            if reason is not None:
                raise ValueError(reason)
        self.dense = self._dense_layers()
        if method.selects and len(self.dense) == self.geometry.num_layers:
            raise ValueError(
                f"at least one layer must be left to {method.name}, but all "
                f"{self.geometry.num_layers} are dense ({self.dense[0]})."
            )
        self.indices = IndexStore()
        self._reader = LengthReader()
        self._cache: dict[int, Any] = {}
        self._captured: WeakKeyDictionary[Any, dict[int, Captured]] = WeakKeyDictionary()
        self._foretold: dict[int, Tensor] = {}
        self._said = False

    def forget(self, cache: object) -> None:
        """Drop the indices of a cache, for a caller that rewrote it unseen."""
        self.indices.forget(cache)

    def take_back(self, cache: object) -> None:
        """Take the newest token back from the indices, for a caller that decodes it once more.

        The token must be the same again: an index may have folded it into what it keeps. Only
        where writes are not watched, in inference mode, are the indices then kept.
        """
        self.indices.take_back(cache)

    def _dense_layers(self) -> dict[int, str]:
        dense: dict[int, str] = {}
        # A method that reads everything has no policy, and so none that could be wrong.
        if self.method.selects:
            for layer in sorted(self.policy.resolve_dense_layers(self.geometry.num_layers)):
                dense[layer] = "dense by the policy"
        for module in self.modules:
            kind = _partial_attention(module)
            if kind is not None:
                dense[_layer(module)] = kind
        return dense

    def see(self, layer: int, given: dict[str, Any]) -> None:
        """Note which cache a layer is about to write to, before it does.

        Args:
            layer: Index of the layer.
            given: What its attention module is called with.
        """
        cache = self._cache[layer] = given.get("past_key_values")
        if cache is not None:
            self.indices.check(cache, layer)
        hidden = given.get("hidden_states")
        following = layer + 1
        if PREVIOUS_QUERY not in self._needs or following >= len(self.modules) or hidden is None:
            return
        if hidden.shape[1] == 1:
            with torch.no_grad(), self.observer.stage("encode", following):
                self._foretold[following] = foretell_queries(
                    self.modules[following], hidden.detach(), given["position_embeddings"]
                )

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
        layer, q_len = _layer(module), query.shape[2]
        cache = self._cache.pop(layer, None)
        lengths = None
        if cache is not None and (q_len == 1 or is_own(cache)):
            lengths = self._reader.lengths(cache, cache_layer(cache, layer), key, mask)
        if cache is not None and q_len == 1 and lengths is None and not self._said:
            self._said = True
            warnings.warn(
                f"{self.method.name} needs each row's valid slots to be one range, and this mask "
                "has holes or is no boolean one: such steps attend to everything.",
                stacklevel=2,
            )
        is_step = q_len == 1 and lengths is not None and lengths.n > 1
        if not is_step or lengths is None or _partial_attention(module) is not None:
            self.indices.drop(cache, layer)
            if lengths is not None and lengths.is_own:
                # Rows may end at different slots, which no mask of transformers knows.
                mask = lengths.causal_mask(q_len, key.shape[2])
                mask = None if mask is None else mask.to(key.device)
            is_prompt = q_len > 1 or (lengths is not None and lengths.n == 1)
            wanted = self.method.needs & PREFILL_NEEDS and layer not in self.dense
            if cache is not None and is_prompt and wanted:
                self._capture(layer, cache, query, key, mask, scale, options.get("softcap"))
            return _dense(module, query, key, value, mask, scale, options)
        with torch.no_grad():
            out = self._step(layer, cache, query, key, value, lengths, scale, options)
        return out[:, None].to(query.dtype)

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
        """Keep what the method needs of a dense forward, beside the cache."""
        newest = None if mask is None else mask[:, :, -1:]
        lengths = self._reader.lengths(cache, cache_layer(cache, layer), key, newest)
        if lengths is None or lengths.kv_len is not None:
            raise ValueError(
                f"{self.method.name} reads queries of the prompt, whose rows must end together "
                "without holes, got a mask that says otherwise; pad on the left."
            )
        held = self._captured.setdefault(cache, {})
        captured = held.setdefault(layer, Captured(self.method.needs & PREFILL_NEEDS))
        with torch.no_grad(), self.observer.stage("build", layer):
            captured.see(query, key[:, :, : lengths.n], scale, lengths.kv_start, softcap)

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
        foretold = self._foretold.pop(layer, None)
        if foretold is not None:
            view.previous_query = foretold[:, :, 0].unflatten(1, (key.shape[1], -1))
        softcap, method, policy = options.get("softcap"), self.method, self.policy
        query = query.detach()[:, :, 0]
        if layer in self.dense:
            with self.observer.stage("full", layer):
                states = (query, view.key_states, view.value_states)
                return full_attention(*states, scale, kv_start, kv_len, softcap)
        grouped = query.unflatten(1, (key.shape[1], -1))
        if method.selects:
            index = self._index(layer, cache, key, view, lengths, scale, softcap)
            watch = partial(self._stage, layer)
            result = method.step(grouped, index, view, policy, scale, softcap, watch)
            if method.compacts and result.selection is not None:
                with self.observer.stage("append", layer):
                    self._compact(layer, cache, index, result.selection, view)
        else:
            with self.observer.stage("full", layer):
                result = method.step(grouped, None, view, policy, scale, softcap)
        self.observer.on_step(layer, grouped, view, result, scale, softcap)
        return result.out

    def _index(
        self,
        layer: int,
        cache: Any,
        key: Tensor,
        view: CacheView,
        lengths: Lengths,
        scale: float,
        softcap: float | None,
    ) -> Any:
        """Return the layer's index with the current token in it."""
        index = self.indices.get(cache, layer, lengths)
        capacity = 0 if index is None else self.indices.capacity(cache, layer)
        if capacity < lengths.n:
            capacity = _capacity(cache_layer(cache, layer), lengths.n)
            if index is not None and self.method.adaptive:
                index.grow(capacity)  # built anew it would have forgotten what it learnt
            else:
                index = None
        if index is None:
            self.indices.drop(cache, layer)
            self._check_whole(cache, layer, key)
            prefill = PrefillInputs(
                key_states=view.key_states[:, :, :-1],
                value_states=view.value_states[:, :, :-1],
                capacity=capacity,
                layer=layer,
                num_layers=self.geometry.num_layers,
                kv_start=view.kv_start,
                kv_len=None if view.kv_len is None else view.kv_len - 1,
                shared=self.indices.shared(cache),
                scale=scale,
                softcap=softcap,
                **self.captured(cache, layer, lengths.n - 1),
            )
            with self.observer.stage("build", layer):
                index = self.method.build_index(prefill)
        with self.observer.stage("append", layer):
            self.method.append(index, *_newest(view))
        self.indices.keep(cache, layer, index, capacity, key, lengths)
        return index

    def _check_whole(self, cache: Any, layer: int, key: Tensor) -> None:
        """Refuse to build an index that would miss tokens or steps, or could not free as it should.

        Args:
            cache: The cache.
            layer: Index of the layer.
            key: What the layer returned.
        """
        if self.method.adaptive and not can_watch(cache, layer, key):
            raise ValueError(
                f"{self.method.name} needs its index kept from step to step, and a "
                f"{type(cache).__name__} returns other keys than it stores, so that nobody sees it "
                "change; use a DynamicCache or topkbench's DecodeCache."
            )
        stored = cache_layer(cache, layer)
        if getattr(stored, "freed", None) is not None:
            raise ValueError(
                f"{self.method.name} must see the whole prompt, and tokens of this cache have been "
                "freed; prefill a new one."
            )
        if self.method.compacts and not hasattr(cache, "topkbench_keep"):
            raise ValueError(
                f"mode=compact frees memory of topkbench's own DecodeCache alone, got a "
                f"{type(cache).__name__}; use mode=masked, which selects the same."
            )

    def _compact(
        self, layer: int, cache: Any, index: Any, selection: Selection, view: CacheView
    ) -> None:
        """Free what a step did not select: at the first time, then when the slots are used up."""
        stored = cache_layer(cache, layer)
        kept = selection.indices
        is_due = kept.shape[2] < view.n if stored.freed is None else stored.is_full
        if not is_due:
            return
        cache.topkbench_keep(layer, kept)
        capacity = int(stored.get_max_length())
        self.method.compact(index, kept, capacity)
        lengths = self._reader.lengths(cache, stored, stored.keys, None)
        assert lengths is not None  # the cache is topkbench's own
        self.indices.keep(cache, layer, index, capacity, stored.keys, lengths)

    def captured(self, cache: Any, layer: int, n: int) -> dict[str, Any]:
        """Return what was captured of the first ``n`` slots: arguments of ``PrefillInputs``.

        Raises:
            ValueError: If the method needs what nobody captured.
        """
        if is_own(cache):
            kept = cache.topkbench_captured(layer)
        else:
            kept = self._captured.get(cache, {}).get(layer)
        found = {} if kept is None else kept.inputs(n)
        lacking = missing(self.method.needs, found)
        if lacking:
            raise ValueError(
                f"{self.method.name} needs {' and '.join(lacking)} of the prompt, and this cache "
                "was filled without; prefill it inside the with block of attach."
            )
        return found

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
    """The function transformers calls; ``query`` is ``[B, Hq, q, d]``, keys are not repeated."""
    for name in ("s_aux", "position_bias", "cache"):
        if options.get(name) is not None:
            raise ValueError(
                f"attach serves attention of queries, keys and values alone, and "
                f"{type(module).__name__} also passes {name}."
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    session = _SESSIONS.get(module)
    if session is None:  # another model that shares the config object
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
    """Attend to everything the mask shows; return ``[B, q, Hq, d]``."""
    softcap = options.get("softcap")
    if softcap is not None:
        return softcap_attention(query, key, value, mask, scale, softcap).transpose(1, 2)
    out, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scale, **options)
    return out


def _see_cache(
    session: Session, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    named = {"hidden_states": args[0]} if args else {}
    session.see(_layer(module), {**named, **kwargs})


def _configs(model: PreTrainedModel) -> list[Any]:
    """Return every config object that carries the model's attention implementation."""
    found = {id(model.config): model.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            found[id(config)] = config
    for config in list(found.values()):
        for name in getattr(config, "sub_configs", ()):
            part = getattr(config, name, None)
            if part is not None:
                found[id(part)] = part
    return [c for c in found.values() if hasattr(c, "_attn_implementation_internal")]


def _layer(module: nn.Module) -> int:
    layer: Any = module.layer_idx
    return int(layer)


def _is_attention(module: nn.Module) -> bool:
    index = getattr(module, "layer_idx", None)
    return isinstance(index, int) and hasattr(module, "num_key_value_groups")


def _partial_attention(module: nn.Module) -> str | None:
    """Say why a layer does not see the whole past, None if it does."""
    config: Any = module.config
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        kind = kinds[_layer(module)]
        return None if kind == "full_attention" else f"its kind is {kind}"
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    return None if window is None else f"its attention slides over {window} tokens"


def _capacity(stored: Any, n: int) -> int:
    """Return the slots an index needs: the layer's, or some spare ones where the layer grows."""
    told = stored.get_max_length() if hasattr(stored, "get_max_length") else -1
    return max(int(told), n) if told > 0 else n + max(256, n // 4)


def _newest(view: CacheView) -> tuple[Tensor, Tensor]:
    """Return the current token's ``[B, Hkv, 1, d]`` key and value."""
    if view.kv_len is None:
        return view.key_states[:, :, -1:].detach(), view.value_states[:, :, -1:].detach()
    rows = torch.arange(len(view.kv_len), device=view.kv_len.device)
    slots = view.kv_len.long() - 1
    return view.key_states[rows, :, slots, None], view.value_states[rows, :, slots, None]
