"""Access to transformers' internals, by type and behaviour rather than by name.

Releases rename arguments: 5.24 passes an attention module its cache as ``cache``, 5.23 as
``past_key_values``, and some models use other names. So a cache is recognised by its type among the
arguments, or when it is written to.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    PreTrainedModel,
)
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = [
    "AttentionCall",
    "CacheLayerMixin",
    "LinearAttentionLayer",
    "PartialAttention",
    "PreTrainedModel",
    "attention_modules",
    "cache_keyword",
    "configs_of",
    "context_window",
    "empty_cache",
    "has_recurrent_layers",
    "is_cache",
    "is_recurrent",
    "layer_of",
    "length_change",
    "max_slots",
    "partial_attention",
    "read_call",
    "register_attention",
    "sdpa_attention_forward",
    "token_logits",
    "watching_caches",
    "watching_prefill",
]


# The model ----------------------------------------------------------------------------------------


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return a model's attention modules: those with layer_idx and num_key_value_groups."""
    return [module for module in model.modules() if _is_attention(module)]


def layer_of(module: nn.Module) -> int:
    """Return the index of an attention module's layer."""
    layer: Any = module.layer_idx
    return int(layer)


def _is_attention(module: nn.Module) -> bool:
    index = getattr(module, "layer_idx", None)
    return isinstance(index, int) and hasattr(module, "num_key_value_groups")


@dataclass(frozen=True)
class PartialAttention:
    """The attention pattern of a layer that does not attend to the whole past.

    Attributes:
        reason: The pattern, in words.
        size: Tokens of its window or chunk; None if unknown.
        is_chunked: True if a query sees the tokens of its own chunk, False if the last ``size``.
    """

    reason: str
    size: int | None
    is_chunked: bool = False

    def first_visible(self, slots: Tensor) -> Tensor:
        """Return the first slot visible to the query at each slot, int64, of the same shape."""
        if self.size is None:
            return torch.zeros_like(slots)
        if self.is_chunked:
            return slots // self.size * self.size
        return (slots - self.size + 1).clamp_min(0)

    def tokens_read(self, n: int) -> int:
        """Return how many of ``n`` cached tokens are visible to the last one."""
        return n - int(self.first_visible(torch.tensor(n - 1)))


def context_window(config: Any) -> int | None:
    """Return the longest sequence that a model is made for, in tokens; None if nothing says it.

    It is the configuration's number of positions, or what the scaling of rotary positions extends
    them to if that is more: the scaling's factor times the positions of the training
    (``original_max_position_embeddings``). Where those are not given, YaRN and dynamic scaling
    extend the configuration's positions; with linear scaling these may or may not be extended
    already, and are taken as they are. Those of ``llama3`` and ``longrope`` always are extended.

    A tokenizer's ``model_max_length`` says when it truncates, and is no limit of the model.

    Args:
        config: The model's configuration.
    """
    config = config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    scaling = getattr(config, "rope_parameters", None) or {}
    if "rope_type" not in scaling:  # one entry for each kind of layer
        scaling = scaling.get("full_attention") or {}
    kind, factor = scaling.get("rope_type"), scaling.get("factor")
    original = scaling.get("original_max_position_embeddings")
    if original is None and kind != "linear":
        original = positions
    if kind not in ("yarn", "dynamic", "linear") or factor is None or original is None:
        return positions
    return max(positions, int(original * factor))


def length_change(config: Any) -> tuple[str, int] | None:
    """Return how attention depends on the whole sequence's length, and from how many tokens on.

    ``"longrope"`` (Phi-3, Phi-4-mini): a sequence longer than that is rotated by other frequencies.
    ``"dynamic"``: the frequencies change with every token beyond it. ``"temperature"`` (Llama 4):
    queries of layers without positions are scaled by the number of tokens in the cache.

    Args:
        config: The model's configuration.
    """
    config = config.get_text_config(decoder=True)
    if getattr(config, "attn_temperature_tuning", False) and hasattr(config, "floor_scale"):
        return "temperature", int(config.floor_scale)
    scaling = getattr(config, "rope_parameters", None) or {}
    of_kinds = [scaling] if "rope_type" in scaling else list(scaling.values())
    for one in of_kinds:
        kind = one.get("rope_type") if isinstance(one, dict) else None
        if kind in ("longrope", "dynamic"):
            at = one.get("original_max_position_embeddings") or config.max_position_embeddings
            return kind, int(at)
    return None


def partial_attention(module: nn.Module, positions: int | None = None) -> PartialAttention | None:
    """Return a layer's attention pattern, or None if it attends to the whole past.

    A window or chunk of at least as many tokens as the model has positions is the whole past.

    Args:
        module: The layer's attention module.
        positions: The longest sequence; None for what the model's configuration says.
    """
    pattern = _configured_pattern(module)
    if positions is None:
        positions = context_window(module.config)
    if pattern is None or pattern.size is None or positions is None or pattern.size < positions:
        return pattern
    return None


# A hybrid layer has both attention and a state-space model.
_WHOLE_PAST = {"full_attention", "attention", "hybrid"}


def _configured_pattern(module: nn.Module) -> PartialAttention | None:
    """Return the attention pattern that a module or its configuration names, or None."""
    config: Any = module.config
    kinds = getattr(config, "layer_types", None)
    # A module's own attribute overrides the configuration: None there means no sliding window.
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    if kinds is None:
        if window is None:
            return None
        return PartialAttention(f"its attention slides over {window} tokens", int(window))
    kind = kinds[layer_of(module)]
    if kind in _WHOLE_PAST:
        return None
    sizes = {
        "sliding_attention": window or getattr(config, "sliding_window", None),
        "hybrid_sliding": window or getattr(config, "sliding_window", None),
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }
    size = sizes.get(kind)
    return PartialAttention(
        f"its kind is {kind}", None if size is None else int(size), kind == "chunked_attention"
    )


_WINDOWS: "WeakKeyDictionary[PreTrainedModel, int]" = WeakKeyDictionary()


def set_window(model: PreTrainedModel, window: int) -> None:
    """Record the longest sequence that a model is run on, if its configuration says another."""
    _WINDOWS[model] = window


def partial_layers(model: PreTrainedModel) -> dict[int, PartialAttention]:
    """Return the attention patterns of the layers that do not attend to the whole past."""
    positions = _WINDOWS.get(model) or context_window(model.config)
    kinds = {layer_of(one): partial_attention(one, positions) for one in attention_modules(model)}
    return {layer: kind for layer, kind in kinds.items() if kind is not None}


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """Return the device of each layer's attention, as a model may be spread over several."""
    devices = {layer_of(one): _device_of(one) for one in attention_modules(model)}
    return [devices[layer] for layer in sorted(devices)]


def _device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module computes."""
    for one in module.modules():
        # accelerate's: the weights are elsewhere until they are used.
        execution = getattr(getattr(one, "_hf_hook", None), "execution_device", None)
        if execution is not None:
            return torch.device(execution)
    return next(module.parameters()).device


@contextmanager
def using_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Make a model use a registered attention function, inside the block."""
    configs = configs_of(model)
    before = [config._attn_implementation_internal for config in configs]
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def configs_of(model: PreTrainedModel) -> list[Any]:
    """Return every config object that names the model's attention implementation."""
    configs = {id(model.config): model.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            configs[id(config)] = config
    for config in list(configs.values()):
        for name in getattr(config, "sub_configs", ()):
            part = getattr(config, name, None)
            if part is not None:
                configs[id(part)] = part
    return [c for c in configs.values() if hasattr(c, "_attn_implementation_internal")]


def register_attention(name: str, attention: Callable[..., Any]) -> None:
    """Register an attention function with transformers, with the same masks as torch's SDPA.

    Without a mask function of that name transformers makes no mask, not even for padded batches.
    """
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)


# One forward --------------------------------------------------------------------------------------


@torch.no_grad()
def token_logits(
    model: PreTrainedModel,
    token_ids: Tensor,
    cache: Any = None,
    position_ids: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Run a model over tokens that follow those in a cache; return logits.

    Args:
        model: A decoder-only model.
        token_ids: int64 ``[B, m]``.
        cache: Is read and written; None for no cache.
        position_ids: int64 ``[B, m]``; None to let the model count them.
        keep: int64 ``[kept]`` the tokens whose logits are returned; None for the last.

    Returns:
        ``[B, vocabulary]`` in the model's dtype; with ``keep`` ``[B, kept, vocabulary]``.

    Raises:
        ValueError: If the model's forward takes no cache.
    """
    names = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"input_ids": token_ids, "use_cache": cache is not None}
    if cache is not None:
        arguments |= cache_keyword(model, cache)
    if position_ids is not None:
        arguments["position_ids"] = position_ids
    if "logits_to_keep" in names:
        arguments["logits_to_keep"] = 1 if keep is None else keep
    logits: Tensor = model(**arguments).logits
    if keep is None:
        return logits[:, -1]
    return logits if "logits_to_keep" in names else logits[:, keep]


def cache_keyword(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """Return ``{name: cache}``, with the name that the model's forward gives to its cache.

    Raises:
        ValueError: If no parameter of the forward is declared to be a cache.
    """
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if _declares_cache(parameter.annotation):
            return {name: cache}
    raise ValueError(
        f"a model's forward must declare a parameter of transformers' type Cache, and that of "
        f"{type(model).__name__} has none; topkbench cannot decode with it."
    )


def _declares_cache(annotation: Any) -> bool:
    """Return whether an annotation is, or includes, a cache class of transformers."""
    if isinstance(annotation, str):
        return "Cache" in annotation.replace("|", " ").replace("[", " ").replace("]", " ").split()
    if isinstance(annotation, type):
        return issubclass(annotation, Cache)
    return any(_declares_cache(part) for part in getattr(annotation, "__args__", ()))


@contextmanager
def watching_prefill(
    model: PreTrainedModel, block: Callable[[], AbstractContextManager[object]]
) -> Iterator[None]:
    """Enter a context whenever ``generate`` reads its prompt, which it may do in several forwards.

    Args:
        model: The model.
        block: Returns the context.
    """
    read_prompt = getattr(model, "_prefill", None)
    if read_prompt is None:  # then later forwards over the prompt's cache count as decode steps
        yield
        return

    @functools.wraps(read_prompt)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with block():
            return read_prompt(*args, **kwargs)

    before = vars(model).get("_prefill")
    vars(model)["_prefill"] = watched
    try:
        yield
    finally:
        if before is None:
            del vars(model)["_prefill"]
        else:
            vars(model)["_prefill"] = before


# One call of an attention module ------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of an attention module's call that matter here.

    Attributes:
        cache: The cache; None if there is none.
        hidden_states: ``[B, m, hidden]``, the first floating-point tensor of three dimensions.
        rotary: Cosines and sines of the tokens' positions; None if no pair of tensors was passed.
    """

    cache: Any
    hidden_states: Tensor | None
    rotary: tuple[Tensor, Tensor] | None


def read_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
    """Pick the arguments that matter from an attention module's call, by their types."""
    cache = hidden = rotary = None
    for value in (*args, *kwargs.values()):
        if cache is None:
            cache = _cache_in(value)
        if isinstance(value, Tensor):
            if hidden is None and value.ndim == 3 and value.is_floating_point():
                hidden = value
        elif rotary is None and _is_pair(value):
            rotary = cast(tuple[Tensor, Tensor], tuple(value))
    return AttentionCall(cache, hidden, rotary)


def _cache_in(value: Any) -> Any:
    """Return the value if it is a cache, else a cache directly inside it; None if none."""
    if is_cache(value):
        return value
    inside: Iterable[Any] = ()
    if isinstance(value, tuple | list):
        inside = value
    elif isinstance(value, dict):
        inside = value.values()
    return next((one for one in inside if is_cache(one)), None)


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(isinstance(one, Tensor) and one.is_floating_point() for one in value)
    )


def empty_cache(model: PreTrainedModel) -> DynamicCache:
    """Return a cache for a prompt that keeps every token, those that a window hides included."""
    cache = DynamicCache(config=model.config)
    for layer, stored in enumerate(cache.layers):
        if type(stored) is DynamicSlidingWindowLayer:
            cache.layers[layer] = DynamicLayer()
    return cache


def is_recurrent(stored: Any) -> bool:
    """Return whether a cache's layer has a state that each token changes, as a hybrid model's."""
    return isinstance(stored, LinearAttentionCacheLayerMixin)


def has_recurrent_layers(model: PreTrainedModel) -> bool:
    """Return whether some of a model's layers keep such a state."""
    return any(is_recurrent(stored) for stored in empty_cache(model).layers)


def is_cache(value: Any) -> bool:
    """Return whether a value is a transformers cache, or has a cache's methods."""
    if isinstance(value, Cache):
        return True
    return all(callable(getattr(value, name, None)) for name in ("update", "get_seq_length"))


def cache_layer(cache: Any, layer: int) -> Any:
    """Return a transformers cache's object for one layer, or None if there is none yet."""
    layers = getattr(cache, "layers", None)
    return layers[layer] if layers is not None and layer < len(layers) else None


def cached_tokens(cache: Any, layer: int) -> int | None:
    """Return the number of tokens in a layer of a cache; None if it cannot be known."""
    stored = cache_layer(cache, layer)
    if stored is not None:
        return int(stored.get_seq_length())
    return 0 if hasattr(cache, "layers") else None


def written_slots(stored: Any) -> int | None:
    """Return the number of slots written in a static cache's layer; None for one that grows."""
    written = getattr(stored, "cumulative_length", None)
    return int(written) if isinstance(written, Tensor) else None


def max_slots(stored: Any) -> int | None:
    """Return the number of slots allocated in a layer of a cache; None if it grows."""
    for name in ("get_max_length", "get_max_cache_shape"):
        length = getattr(stored, name, None)
        if length is not None:
            slots = int(length())
            return slots if slots > 0 else None
    return None


# Speculated queries -------------------------------------------------------------------------------


def speculate_queries(
    module: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the post-RoPE queries that an attention module computes from another layer's input.

    It repeats what the forward of Llama's, Qwen's, Phi-3's and similar modules does to a query;
    ``speculation.unsupported_reason`` checks whether a model's modules do the same.

    Args:
        module: The attention module whose query projection is applied.
        hidden_states: ``[B, m, hidden]`` normed input of an earlier layer's attention.
        position_embeddings: The cosines and sines of the tokens, as transformers passes them.

    Returns:
        ``[B, Hq, m, d]``.

    Source:
        InfiniGen (arXiv:2406.19707), section 4.3: the inputs of neighbouring layers are alike.
    """
    attention: Any = module
    device = attention.o_proj.weight.device  # the earlier layer may be on another device
    hidden_states = hidden_states.to(device)
    cosines, sines = (one.to(device) for one in position_embeddings)
    if hasattr(attention, "q_proj"):
        projected = attention.q_proj(hidden_states)
    else:
        width = attention.o_proj.in_features  # queries come first in the joint projection
        projected = attention.qkv_proj(hidden_states)[..., :width]
    queries = projected.unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, "q_norm"):
        queries = attention.q_norm(queries)
    queries = queries.transpose(1, 2)
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
    rotated: Tensor = rotate(queries, queries, cosines, sines)[0]
    return rotated


# Changes of caches --------------------------------------------------------------------------------

_LOCK = threading.Lock()
_LISTENERS: list["CacheListener"] = []
_ORIGINAL: dict[tuple[type[Cache], str], Any] = {}
_CHANGING = threading.local()
"""The caches whose methods are running in a thread: a method may call that of its base class."""


class CacheListener(Protocol):
    """Is told of changes to transformers' caches."""

    def before_write(self, cache: Any) -> None:
        """A cache is about to get states of new tokens."""

    def before_change(self, cache: Any) -> None:
        """One of a cache's methods is about to change its rows, or crop it."""

    def took_rows(self, cache: Any, rows: Tensor) -> None:
        """Row ``b`` of a cache has become its former row ``rows[b]``, int64 ``[B']``."""

    def was_cropped(self, cache: Any) -> None:
        """A cache may have lost its newest tokens."""


# For each method that changes rows: given the former rows and its argument, the rows it leaves.
_ROWS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": lambda rows, beams: rows[_on_cpu(beams)],
    "batch_select_indices": lambda rows, indices: rows[_on_cpu(indices)],
    "batch_repeat_interleave": lambda rows, repeats: rows.repeat_interleave(repeats),
}


def _on_cpu(indices: Any) -> Any:
    return indices.cpu() if isinstance(indices, Tensor) else indices


@contextmanager
def watching_caches(listener: CacheListener) -> Iterator[None]:
    """Tell a listener of each change to a transformers cache, inside the block.

    Only changes by the cache's own methods are seen, not those of its layers' methods or tensors.
    """
    with _LOCK:
        _LISTENERS.append(listener)
        for kind, name in _cache_methods():
            if (kind, name) not in _ORIGINAL:
                method = _ORIGINAL[kind, name] = kind.__dict__[name]
                watched = _watched_update if name == "update" else _watched_change
                setattr(kind, name, watched(method))
    try:
        yield
    finally:
        with _LOCK:
            _LISTENERS.remove(listener)
            if not _LISTENERS:
                for (kind, name), method in _ORIGINAL.items():
                    setattr(kind, name, method)
                _ORIGINAL.clear()


def _cache_methods() -> list[tuple[type[Cache], str]]:
    """Return the watched methods of every cache class, where a class defines its own."""
    found, waiting = [], [Cache]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        found += [(kind, name) for name in ("update", "crop", *_ROWS) if name in kind.__dict__]
    return found


def _watched_update(update: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a cache's ``update`` so that it calls every listener first."""

    @functools.wraps(update)
    def watched(self: Cache, *args: Any, **kwargs: Any) -> Any:
        for listener in tuple(_LISTENERS):
            listener.before_write(self)
        return update(self, *args, **kwargs)

    return watched


def _watched_change(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method that crops a cache or changes its rows so that listeners can follow."""
    rows_after = _ROWS.get(method.__name__)

    @functools.wraps(method)
    def watched(self: Cache, *args: Any, **kwargs: Any) -> Any:
        running = vars(_CHANGING).setdefault("caches", [])
        if any(cache is self for cache in running):
            return method(self, *args, **kwargs)
        running.append(self)
        try:
            for listener in tuple(_LISTENERS):
                listener.before_change(self)
            batch_size = _batch_size(self)
            result = method(self, *args, **kwargs)
        finally:
            running.pop()
        for listener in tuple(_LISTENERS):
            if rows_after is None:
                listener.was_cropped(self)
            elif batch_size is not None:
                (argument,) = (*args, *kwargs.values())
                listener.took_rows(self, rows_after(torch.arange(batch_size), argument))
        return result

    return watched


def _batch_size(cache: Any) -> int | None:
    """Return the number of a cache's rows; None if it is empty."""
    for stored in getattr(cache, "layers", ()):
        keys = getattr(stored, "keys", None)
        if isinstance(keys, Tensor) and keys.ndim == 4:
            return len(keys)
    return None
