"""A prompt's prefill: computed once and shared by every cell that needs it."""

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from topkbench.methods.base import PREFILL_NEEDS
from topkbench.methods.captured import Captured
from topkbench.models.compat import token_logits
from topkbench.models.digests import states_digest
from topkbench.models.watch import LayerCall, watched_attention


@dataclass(frozen=True)
class Prefill:
    """The states of one prompt, in host memory, as many prompts exceed an accelerator's.

    Attributes:
        key_states: For each layer ``[Hkv, n, d]`` post-RoPE keys.
        value_states: For each layer ``[Hkv, n, d]``.
        logits: ``[vocabulary]`` of the last token.
        milliseconds: Time of the forward, without capturing.
        captured: For each layer a query tail ``[1, Hq, w, d]`` and column sums ``[1, Hq, n]``;
            empty if nothing was captured.
    """

    key_states: tuple[Tensor, ...]
    value_states: tuple[Tensor, ...]
    logits: Tensor
    milliseconds: float
    captured: tuple[Captured, ...] = ()

    @property
    def needs(self) -> frozenset[str]:
        """What was captured beyond keys and values."""
        return self.captured[0].needs if self.captured else frozenset()

    def needs_ms(self, needs: frozenset[str]) -> float:
        """Return the milliseconds that capturing ``needs`` took, over all layers."""
        return sum(one.milliseconds.get(need, 0.0) for one in self.captured for need in needs)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return int(self.key_states[0].shape[1])

    @property
    def num_layers(self) -> int:
        """Number of layers of the model."""
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
    """Run the model over one prompt with dense attention.

    Args:
        model: A decoder-only model with an ordinary attention implementation.
        token_ids: The prompt, special tokens included.
        needs: What to capture beyond keys and values: ``query_tail``, ``column_sums``.
    """
    cache = DynamicCache()
    ids = torch.tensor([list(token_ids)], device=model.device)
    captured: list[Captured] = []

    def capture(call: LayerCall) -> None:
        one = Captured(needs)
        one.update(call.query_states, call.key_states, call.scale, softcap=call.softcap)
        captured.append(one)

    began = time.perf_counter()
    with watched_attention(model, capture) if needs else nullcontext():
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
    """Prefills by prompt: in memory up to a limit, then in files that several workers can share.

    Every cell goes through the prompts in the same order, so evicting the oldest would always drop
    the one needed next. Prompts beyond the limit therefore go to disk, and are memory-mapped.

    Args:
        model: The model; each store serves one model.
        folder: Folder of the files; stores with the same folder share them.
        memory_limit: Bytes to keep in memory; None for half of the free memory. With 0 every
            prompt goes to a file.
        identity: Digest of everything that the states depend on besides the prompt. Files are
            named by it, so that stores share only files of the same identity. None to compute it
            from the model's configuration and weights when the first file is needed.
        compute: Replaces ``prefill`` in tests.

    Attributes:
        forwards: Number of prompts that this store computed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        folder: Path,
        memory_limit: int | None = None,
        identity: str | None = None,
        compute: Callable[[PreTrainedModel, Sequence[int], frozenset[str]], Prefill] = prefill,
    ) -> None:
        self.model = model
        self.folder = folder
        self.forwards = 0
        self._compute = compute
        self._identity = identity
        self._checked: set[tuple[Path, int, int]] = set()
        self._in_memory: dict[str, Prefill] = {}
        self._bytes_left = (
            psutil.virtual_memory().available // 2 if memory_limit is None else memory_limit
        )

    def get(self, token_ids: Sequence[int], needs: frozenset[str] = frozenset()) -> Prefill:
        """Return the prompt's states, computing them unless a store has already.

        Args:
            token_ids: The prompt.
            needs: What must have been captured; if something is missing, the prefill runs again.
        """
        needs &= PREFILL_NEEDS
        key = hashlib.sha256(" ".join(map(str, token_ids)).encode()).hexdigest()[:32]
        if key in self._in_memory:
            states = self._in_memory[key]
            if not needs <= states.needs:
                states = self._in_memory[key] = self.compute_states(token_ids, needs, states)
            return states
        spilled = not self._bytes_left or self.folder.exists()
        stored = self._load(self._path(key)) if spilled else None
        if stored is not None and needs <= stored.needs:
            return stored
        if stored is None and self._bytes_left > 0:
            states = self.compute_states(token_ids, needs)
            if states.num_bytes <= self._bytes_left:
                self._bytes_left -= states.num_bytes
                self._in_memory[key] = states
                return states
            # From here on every prompt goes to a file, so that all workers can use it.
            self._bytes_left = 0
            _save(states, self._path(key))
            return states
        path = self._path(key)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            stored = self._load(path)
            if stored is not None and needs <= stored.needs:
                return stored
            states = self.compute_states(token_ids, needs, stored)
            _save(states, path)
            return states

    def release(self) -> None:
        """Drop all states that are in memory."""
        self._in_memory.clear()

    def _path(self, key: str) -> Path:
        """Return a prompt's file, named by everything that its states depend on."""
        if self._identity is None:
            self._identity = states_digest(self.model)
        digest = hashlib.sha256(f"{self._identity} {key}".encode()).hexdigest()[:32]
        return self.folder / f"{digest}.safetensors"

    def _load(self, path: Path) -> Prefill | None:
        """Return a file's prefill; None if there is no file, it is damaged or of another prompt.

        Each store checks a file's digest once, and again if the file is replaced.
        """
        try:
            status = path.stat()
            stored, metadata = _read(path)
            state = (path, status.st_ino, status.st_ctime_ns)
            if state not in self._checked:
                if metadata != _metadata(stored, path):
                    return None
                self._checked.add(state)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        return stored

    def compute_states(
        self, token_ids: Sequence[int], needs: frozenset[str], stored: Prefill | None = None
    ) -> Prefill:
        """Compute a prefill, or only the captures that ``stored`` lacks."""
        self.forwards += 1
        if stored is None:
            return self._compute(self.model, token_ids, needs)
        captured = self._compute(self.model, token_ids, needs - stored.needs).captured
        if stored.captured:
            pairs = zip(stored.captured, captured, strict=True)
            captured = tuple(old.merged(new) for old, new in pairs)
        return replace(stored, captured=captured)


def _save(states: Prefill, path: Path) -> None:
    """Write a prefill to a temporary file and rename it, so that readers see only whole files."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        save_file(_tensors(states), unfinished, metadata=_metadata(states, path))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _tensors(states: Prefill) -> dict[str, Tensor]:
    """Return a prefill as named tensors."""
    tensors = {"logits": states.logits, "milliseconds": torch.tensor(states.milliseconds)}
    for layer in range(states.num_layers):
        tensors[f"keys.{layer}"] = states.key_states[layer]
        tensors[f"values.{layer}"] = states.value_states[layer]
    for layer, one in enumerate(states.captured):
        for need in one.needs:
            tensors[f"{need}.{layer}"] = getattr(one, need)
            tensors[f"{need}_ms.{layer}"] = torch.tensor(one.milliseconds[need])
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}


def _metadata(states: Prefill, path: Path) -> dict[str, str]:
    """Return a file's metadata: its name, number of tokens and tensors, and a digest."""
    tensors = _tensors(states)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)} ".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    counts = {"tokens": str(states.num_tokens), "tensors": str(len(tensors))}
    return {"name": path.stem, **counts, "digest": digest.hexdigest()}


def _read(path: Path) -> tuple[Prefill, dict[str, str]]:
    """Return a file's prefill and its metadata."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        num_layers = sum(name.startswith("keys.") for name in names)
        needs = frozenset(need for need in PREFILL_NEEDS if f"{need}.0" in names)
        captured = []
        for layer in range(num_layers if needs else 0):
            tensors = {need: file.get_tensor(f"{need}.{layer}") for need in needs}
            took = {need: float(file.get_tensor(f"{need}_ms.{layer}")) for need in needs}
            captured.append(Captured(needs, milliseconds=took, **tensors))
        stored = Prefill(
            tuple(file.get_tensor(f"keys.{layer}") for layer in range(num_layers)),
            tuple(file.get_tensor(f"values.{layer}") for layer in range(num_layers)),
            file.get_tensor("logits"),
            float(file.get_tensor("milliseconds")),
            tuple(captured),
        )
        return stored, dict(file.metadata() or {})
