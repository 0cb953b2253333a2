"""What is taken from the insides of transformers, found by type and behaviour.

Releases rename arguments: 5.24 hands an attention module its cache as ``cache``, 5.23 as
``past_key_values``, and some models under names of their own. So nothing here trusts a name where a
type can be asked: a cache is an argument that is a cache, or is seen where it is written.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = [
    "AttentionCall",
    "PartialAttention",
    "PreTrainedModel",
    "attention_modules",
    "cache_keyword",
    "configs_of",
    "is_cache",
    "layer_of",
    "max_slots",
    "partial_attention",
    "read_call",
    "register_attention",
    "sdpa_attention_forward",
    "token_logits",
    "watching_writes",
]


# The model ----------------------------------------------------------------------------------------


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return a model's attention modules: those with a layer's index and groups of KV heads."""
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
    """How a layer attends that does not see the whole past.

    Attributes:
        reason: What it does, in words.
        size: Tokens of its window or chunk; None where that is unknown.
        is_chunked: Whether it sees the tokens of its own chunk, instead of the last ones.
    """

    reason: str
    size: int | None
    is_chunked: bool = False

    def first_seen(self, slots: Tensor) -> Tensor:
        """Return the first slots that queries at some slots see, int64, of the same shape."""
        if self.size is None:
            return torch.zeros_like(slots)
        if self.is_chunked:
            return slots // self.size * self.size
        return (slots - self.size + 1).clamp_min(0)

    def tokens_read(self, n: int) -> int:
        """Return how many of ``n`` cached tokens a step at the last of them sees."""
        return n - int(self.first_seen(torch.tensor(n - 1)))


def partial_attention(module: nn.Module) -> PartialAttention | None:
    """Say how a layer attends that does not see the whole past, None if it sees all of it."""
    config: Any = module.config
    kinds = getattr(config, "layer_types", None)
    # A module that has the attribute knows best: None there is a layer that does not slide.
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    if kinds is None:
        if window is None:
            return None
        return PartialAttention(f"its attention slides over {window} tokens", int(window))
    kind = kinds[layer_of(module)]
    if kind == "full_attention":
        return None
    sizes = {
        "sliding_attention": window or getattr(config, "sliding_window", None),
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }
    size = sizes.get(kind)
    return PartialAttention(
        f"its kind is {kind}", None if size is None else int(size), kind == "chunked_attention"
    )


def partial_layers(model: PreTrainedModel) -> dict[int, PartialAttention]:
    """Return how those of a model's layers attend that do not see the whole past."""
    found = {layer_of(module): partial_attention(module) for module in attention_modules(model)}
    return {layer: kind for layer, kind in found.items() if kind is not None}


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """Return where each layer's attention runs: several devices, where a model is spread."""
    found = {layer_of(one): next(one.parameters()).device for one in attention_modules(model)}
    return [found[layer] for layer in sorted(found)]


@contextmanager
def using_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let a model attend by a function that ``register_attention`` knows, inside the block."""
    configs = configs_of(model)
    before = [config._attn_implementation_internal for config in configs]
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def configs_of(model: PreTrainedModel) -> list[Any]:
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


def register_attention(name: str, attention: Callable[..., Any]) -> None:
    """Let transformers know an attention function, and make its masks as for torch's SDPA.

    Without a mask function of that name transformers makes no mask, also for padded batches.
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
) -> Tensor:
    """Run a model over tokens that follow a cache; return the last one's logits.

    Args:
        model: A decoder-only model.
        token_ids: int64 ``[B, m]``.
        cache: Is read and written; None to keep nothing.
        position_ids: int64 ``[B, m]``; None to let the model count.

    Returns:
        ``[B, vocabulary]`` in the model's dtype.

    Raises:
        ValueError: If the model's forward takes no cache.
    """
    names = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {"input_ids": token_ids, "use_cache": cache is not None}
    if cache is not None:
        given |= cache_keyword(model, cache)
    if position_ids is not None:
        given["position_ids"] = position_ids
    if "logits_to_keep" in names:
        given["logits_to_keep"] = 1
    logits: Tensor = model(**given).logits
    return logits[:, -1]


def cache_keyword(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """Return a cache as the keyword argument by which a model's forward and output name it.

    Raises:
        ValueError: If no parameter of the forward is declared to be a cache.
    """
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if _declares_cache(parameter.annotation):
            return {name: cache}
    raise ValueError(
        f"a model's forward must declare a parameter of transformers' type Cache, and "
        f"{type(model).__name__} has none; topkbench cannot decode with it."
    )


def _declares_cache(annotation: Any) -> bool:
    """Whether an annotation is, or offers, one of transformers' caches."""
    if isinstance(annotation, str):
        return "Cache" in annotation.replace("|", " ").replace("[", " ").replace("]", " ").split()
    if isinstance(annotation, type):
        return issubclass(annotation, Cache)
    return any(_declares_cache(part) for part in getattr(annotation, "__args__", ()))


# One call of an attention module ------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionCall:
    """What an attention module was called with.

    Attributes:
        cache: The cache among the arguments; None if there is none.
        hidden_states: ``[B, m, hidden]``, its first tensor of three dimensions.
        rotary: Cosines and sines of the tokens' positions; None if no pair of tensors was passed.
    """

    cache: Any
    hidden_states: Tensor | None
    rotary: tuple[Tensor, Tensor] | None


def read_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
    """Find by their types what matters among the arguments of an attention module."""
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
    """Return a value that is a cache, or a cache one level inside it; None if there is none."""
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


def is_cache(value: Any) -> bool:
    """Say whether a value is a cache: transformers' class, or what behaves as one."""
    if isinstance(value, Cache):
        return True
    return all(callable(getattr(value, name, None)) for name in ("update", "get_seq_length"))


def cache_layer(cache: Any, layer: int) -> Any:
    """Return the part of a transformers cache that holds a layer, None if it has none yet."""
    layers = getattr(cache, "layers", None)
    return layers[layer] if layers is not None and layer < len(layers) else None


def cached_tokens(cache: Any, layer: int) -> int | None:
    """Return the tokens that a layer of a cache holds; None where it does not tell."""
    stored = cache_layer(cache, layer)
    if stored is not None:
        return int(stored.get_seq_length())
    return 0 if hasattr(cache, "layers") else None


def written_slots(stored: Any) -> int | None:
    """Return how far a layer of a static cache is written; None for one that grows."""
    written = getattr(stored, "cumulative_length", None)
    return int(written) if isinstance(written, Tensor) else None


def max_slots(stored: Any) -> int | None:
    """Return the slots that a layer of a cache is allocated with; None if it grows."""
    for name in ("get_max_length", "get_max_cache_shape"):
        ask = getattr(stored, name, None)
        if ask is not None:
            told = int(ask())
            return told if told > 0 else None
    return None


# Another layer's queries --------------------------------------------------------------------------


def speculate_queries(
    module: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the post-RoPE queries that an attention module would make of another layer's input.

    Args:
        module: The attention module whose queries are wanted.
        hidden_states: ``[B, m, hidden]`` normed input of an earlier layer's attention.
        position_embeddings: The cosines and sines of the tokens, as transformers passes them.

    Returns:
        ``[B, Hq, m, d]``.

    Source:
        InfiniGen (arXiv:2406.19707), section 4.3: the inputs of neighbouring layers are alike.
    """
    own: Any = module
    device = own.o_proj.weight.device  # an earlier layer may lie on another
    hidden_states = hidden_states.to(device)
    cosines, sines = (one.to(device) for one in position_embeddings)
    if hasattr(own, "q_proj"):
        projected = own.q_proj(hidden_states)
    else:
        width = own.o_proj.in_features  # of the queries, the first of the joint projection
        projected = own.qkv_proj(hidden_states)[..., :width]
    queries = projected.unflatten(-1, (-1, own.head_dim))
    if hasattr(own, "q_norm"):
        queries = own.q_norm(queries)
    queries = queries.transpose(1, 2)
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
    rotated: Tensor = rotate(queries, queries, cosines, sines)[0]
    return rotated


def speculation_unsupported_reason(module: nn.Module) -> str | None:
    """Say why a module's queries cannot be foretold, None if they can."""
    known = hasattr(module, "q_proj") or hasattr(module, "qkv_proj")
    rotates = hasattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb")
    if known and rotates and hasattr(module, "head_dim"):
        return None
    return (
        f"queries can be foretold where attention has q_proj or qkv_proj and rotary positions, and "
        f"{type(module).__name__} has not."
    )


# Writes to caches ---------------------------------------------------------------------------------

_LOCK = threading.Lock()
_LISTENERS: list[Callable[[Any], None]] = []
_ORIGINAL: dict[type[Cache], Any] = {}


@contextmanager
def watching_writes(listener: Callable[[Any], None]) -> Iterator[None]:
    """Call ``listener`` with a transformers cache before each write to it, inside the block."""
    with _LOCK:
        _LISTENERS.append(listener)
        for kind in _cache_classes():
            if kind not in _ORIGINAL:
                _ORIGINAL[kind] = kind.__dict__["update"]
                kind.update = _told(_ORIGINAL[kind])  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _LOCK:
            _LISTENERS.remove(listener)
            if not _LISTENERS:
                for kind, update in _ORIGINAL.items():
                    kind.update = update  # type: ignore[method-assign]
                _ORIGINAL.clear()


def _cache_classes() -> list[type[Cache]]:
    """Return every class of caches that has an ``update`` of its own."""
    found, waiting = [], [Cache]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if "update" in kind.__dict__:
            found.append(kind)
    return found


def _told(update: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(update)
    def watched(self: Cache, *args: Any, **kwargs: Any) -> Any:
        for listener in tuple(_LISTENERS):
            listener(self)
        return update(self, *args, **kwargs)

    return watched
