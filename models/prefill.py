"""What one prompt's prefill leaves, computed once and shared by every cell that needs it."""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from topkbench.methods.capture import PREFILL_NEEDS, Captured, watched_attention
from topkbench.methods.compat import token_logits


@dataclass(frozen=True)
class Prefill:
    """The states of one prompt, in the machine's memory: many prompts exceed an accelerator's.

    Attributes:
        key_states: For each layer ``[Hkv, n, d]`` post-RoPE keys.
        value_states: For each layer ``[Hkv, n, d]``.
        logits: ``[vocabulary]`` of the last token.
        milliseconds: What the forward took, without what is captured.
        captured: For each layer, ``[1, Hq, w, d]`` and ``[1, Hq, n]`` of it; empty for nothing.
    """

    key_states: tuple[Tensor, ...]
    value_states: tuple[Tensor, ...]
    logits: Tensor
    milliseconds: float
    captured: tuple[Captured, ...] = ()

    @property
    def needs(self) -> frozenset[str]:
        """What was captured beside keys and values."""
        return self.captured[0].needs if self.captured else frozenset()

    def needs_ms(self, needs: frozenset[str]) -> float:
        """Return the milliseconds that capturing took, over all layers."""
        return sum(one.milliseconds.get(need, 0.0) for one in self.captured for need in needs)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return int(self.key_states[0].shape[1])

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.key_states)

    @property
    def num_bytes(self) -> int:
        """Bytes of all states."""
        captured = [states for one in self.captured for states in (one.query_tail, one.column_sums)]
        states = (*self.key_states, *self.value_states, *captured)
        return sum(one.nbytes for one in states if one is not None)


@torch.no_grad()
def prefill(
    model: PreTrainedModel, token_ids: Sequence[int], needs: frozenset[str] = frozenset()
) -> Prefill:
    """Run the model densely over one prompt.

    Args:
        model: A decoder-only model with an ordinary attention implementation.
        token_ids: The prompt, special tokens included.
        needs: What to capture beside keys and values: ``query_tail``, ``column_sums``.
    """
    cache = DynamicCache()
    ids = torch.tensor([list(token_ids)], device=model.device)
    captured: list[Captured] = []
    scales: dict[int, float] = {
        module.layer_idx: module.scaling  # type: ignore[misc]
        for module in model.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "scaling")
    }
    softcap = getattr(model.config, "attn_logit_softcapping", None)

    def see(layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        one = Captured(needs)
        one.see(query, key, scales.get(layer, query.shape[-1] ** -0.5), softcap=softcap)
        captured.append(one)

    began = time.perf_counter()
    with watched_attention(model, see) if needs else nullcontext():
        logits = token_logits(model, ids, cache)[0]
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
    milliseconds = (time.perf_counter() - began) * 1e3
    milliseconds -= sum(sum(one.milliseconds.values()) for one in captured)
    layers: list[Any] = cache.layers
    return Prefill(
        tuple(layer.keys[0].cpu() for layer in layers),
        tuple(layer.values[0].cpu() for layer in layers),
        logits.float().cpu(),
        milliseconds,
        tuple(one.to(torch.device("cpu")) for one in captured),
    )


class PrefillStore:
    """Prefills by prompt: in memory up to a limit, beyond it in files that workers share.

    Every cell scans the prompts in the same order, so evicting would always drop what is needed
    next. Past the limit later prompts therefore go to disk and stay there, memory-mapped.

    Args:
        model: The model; one store serves one model.
        folder: Where spilled prompts live; stores that share it share them.
        memory_limit: Bytes to hold in memory; None for half of what is free. 0 shares everything.
        compute: Stands in for ``prefill`` in tests.

    Attributes:
        forwards: Prompts computed by this store: the cost of a sweep that the cells share.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        folder: Path,
        memory_limit: int | None = None,
        compute: Callable[[PreTrainedModel, Sequence[int], frozenset[str]], Prefill] = prefill,
    ) -> None:
        self.model = model
        self.folder = folder
        self.forwards = 0
        self._compute = compute
        self._kept: dict[str, Prefill] = {}
        self._room = (
            psutil.virtual_memory().available // 2 if memory_limit is None else memory_limit
        )

    def get(self, token_ids: Sequence[int], needs: frozenset[str] = frozenset()) -> Prefill:
        """Return the prompt's states, computing them if nobody has.

        Args:
            token_ids: The prompt.
            needs: What must have been captured; a prompt that lacks it is read once more.
        """
        needs &= PREFILL_NEEDS
        key = hashlib.sha256(" ".join(map(str, token_ids)).encode()).hexdigest()[:32]
        if key in self._kept:
            states = self._kept[key]
            if not needs <= states.needs:
                states = self._kept[key] = self._run(token_ids, needs, states)
            return states
        path = self.folder / f"{key}.safetensors"
        found = _load(path) if path.exists() else None
        if found is not None and needs <= found.needs:
            return found
        if found is None and self._room > 0:
            states = self._run(token_ids, needs)
            if states.num_bytes <= self._room:
                self._room -= states.num_bytes
                self._kept[key] = states
                return states
            self._room = 0  # from here on everything spills, so that files are found by all workers
            _save(states, path)
            return states
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            found = _load(path) if path.exists() else None
            if found is not None and needs <= found.needs:
                return found
            states = self._run(token_ids, needs, found)
            _save(states, path)
            return states

    def _run(
        self, token_ids: Sequence[int], needs: frozenset[str], found: Prefill | None = None
    ) -> Prefill:
        """Compute a prompt, or what ``found`` lacks of it."""
        self.forwards += 1
        if found is None:
            return self._compute(self.model, token_ids, needs)
        captured = self._compute(self.model, token_ids, needs - found.needs).captured
        if found.captured:
            pairs = zip(found.captured, captured, strict=True)
            captured = tuple(old.joined(new) for old, new in pairs)
        return replace(found, captured=captured)


def _save(states: Prefill, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"logits": states.logits, "milliseconds": torch.tensor(states.milliseconds)}
    for layer in range(states.num_layers):
        tensors[f"keys.{layer}"] = states.key_states[layer]
        tensors[f"values.{layer}"] = states.value_states[layer]
    for layer, one in enumerate(states.captured):
        for need in one.needs:
            tensors[f"{need}.{layer}"] = getattr(one, need)
            tensors[f"{need}_ms.{layer}"] = torch.tensor(one.milliseconds[need])
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, unfinished)
    unfinished.replace(path)


def _load(path: Path) -> Prefill:
    """Return what a file holds."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        num_layers = sum(name.startswith("keys.") for name in names)
        held = frozenset(need for need in PREFILL_NEEDS if f"{need}.0" in names)
        captured = []
        for layer in range(num_layers if held else 0):
            tensors = {need: file.get_tensor(f"{need}.{layer}") for need in held}
            took = {need: float(file.get_tensor(f"{need}_ms.{layer}")) for need in held}
            captured.append(Captured(held, milliseconds=took, **tensors))
        return Prefill(
            tuple(file.get_tensor(f"keys.{layer}") for layer in range(num_layers)),
            tuple(file.get_tensor(f"values.{layer}") for layer in range(num_layers)),
            file.get_tensor("logits"),
            float(file.get_tensor("milliseconds")),
            tuple(captured),
        )
