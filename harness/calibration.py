"""The queries and keys that methods are fitted on, captured while the model reads texts.

Source: HATA samples its pairs from long documents (arXiv:2506.02572, appendix B.1). Its documents
come from the benchmark it is evaluated on; here the configuration names the texts
(``conf/calibration/``): by default prompts whose words no test uses.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch
from torch import Tensor

from topkbench.methods.learning import AnyLearningMethod, LayerStates, Progress
from topkbench.models.attach import geometry_of
from topkbench.models.load import LoadedModel
from topkbench.models.watch import LayerCall, watched_attention


class CalibrationTexts(Protocol):
    """Texts to fit methods on."""

    @property
    def name(self) -> str:
        """The texts' name in rows."""

    @property
    def seed(self) -> int | None:
        """Seed of random texts; None if nothing is drawn at random."""

    @property
    def num_sequences(self) -> int:
        """Number of texts."""

    @property
    def max_length(self) -> int:
        """At most this many tokens per text, and no more than the model's window."""

    def sequences(self, loaded: LoadedModel, length: int, count: int) -> list[list[int]]:
        """Return the token ids of ``count`` texts of at most ``length`` tokens each."""

    def describe(self, length: int, count: int) -> str:
        """Return a description of the texts, with a digest of any files they were read from."""


class CapturedStates:
    """What a model's layers received of some texts, for several fits on the same texts.

    A sweep fits a method once for each setting of its recipe and each seed, on the same texts, and
    reading them takes a model longer than many a fit. Only the last texts of one model are kept.
    """

    def __init__(self) -> None:
        self._texts: tuple[str, str] | None = None
        self._layers: dict[int, LayerStates] = {}

    def of(self, texts: tuple[str, str]) -> dict[int, LayerStates]:
        """Return the queries and keys of all positions, by layer, as far as they are kept.

        Args:
            texts: Digests of the model and of the texts' tokens; others are forgotten.
        """
        if self._texts != texts:
            self._texts, self._layers = texts, {}
        return self._layers

    def clear(self) -> None:
        """Forget all."""
        self._texts, self._layers = None, {}


@dataclass
class Calibration:
    """Calibration prompts, and the states that a method is fitted on, a few layers at a time.

    The states of all layers may exceed a machine's memory, so the model reads the prompts once for
    each group of layers. Queries and keys never take more than ``memory_limit`` bytes: a group is
    as many layers as fit, with all their keys, and their queries at the positions that the method
    asks for, in the model's dtype. In addition there is what one forward pass of the model needs,
    and on each fitting device, one layer's states and what the method computes from them.

    Attributes:
        loaded: The model.
        method: Selects which queries are kept.
        prompts: Token ids of each prompt.
        memory_limit: Bytes of queries and keys that may be in memory at once.
        description: Description of the prompts, for an artifact's provenance.
        layers: The layers that are fitted.

    An artifact's identity includes ``digest``, and so depends on the prompts' tokens and therefore
    on the tokenizer.
    """

    loaded: LoadedModel
    method: AnyLearningMethod
    prompts: list[list[int]]
    memory_limit: int
    description: str
    layers: Sequence[int]

    @classmethod
    def draw(
        cls,
        loaded: LoadedModel,
        method: AnyLearningMethod,
        texts: CalibrationTexts,
        memory_limit: int | None = None,
        layers: Sequence[int] | None = None,
    ) -> "Calibration":
        """Make the prompts; the model does not read them yet.

        Args:
            loaded: The model.
            method: The method to be fitted.
            texts: The texts that the model will read.
            memory_limit: See the class; None for half of the free memory.
            layers: The layers to fit; None for all that attend to the whole past.
        """
        length, count = min(texts.max_length, loaded.window), texts.num_sequences
        if memory_limit is None:
            memory_limit = psutil.virtual_memory().available // 2
        return cls(
            loaded,
            method,
            texts.sequences(loaded, length, count),
            memory_limit,
            texts.describe(length, count),
            geometry_of(loaded.model).global_layers if layers is None else layers,
        )

    @property
    def digest(self) -> str:
        """Digest of the prompts' tokens, all that a fit reads besides the model; 16 hex digits."""
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()[:16]

    @property
    def num_layers(self) -> int:
        """Number of the model's layers."""
        return geometry_of(self.loaded.model).num_layers

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each prompt."""
        return [len(ids) for ids in self.prompts]

    def num_bytes(self, layer: int, every_query: bool = False) -> int:
        """Return the bytes of one layer's queries and keys that fitting it keeps in memory.

        Args:
            layer: Index of the layer.
            every_query: Count all queries, not those alone that the method reads.
        """
        geometry = geometry_of(self.loaded.model)
        queries = sum(self.lengths)
        if not every_query:
            queries = sum(map(len, self.method.query_positions(layer, self.lengths)))
        rows = geometry.num_kv_heads * sum(self.lengths) + geometry.num_heads * queries
        return rows * geometry.head_dim * geometry.dtype_bytes

    def groups(self) -> list[list[int]]:
        """Return the layers, in order, in groups that each fit the memory limit.

        Raises:
            ValueError: If a single layer exceeds it.
        """
        groups: list[list[int]] = []
        bytes_left = 0
        for layer in self.layers:
            need = self.num_bytes(layer)
            if need > self.memory_limit:
                raise ValueError(
                    f"the queries and keys of a layer must fit calibration_memory_gib, got"
                    f" {need / 2**30:.3g} GiB for {self.memory_limit / 2**30:.3g} GiB; raise it, or"
                    " fit on a machine with more memory and set artifact_dir to its artifacts."
                )
            if not groups or need > bytes_left:
                groups.append([])
                bytes_left = self.memory_limit
            groups[-1].append(layer)
            bytes_left -= need
        return groups

    def capture(
        self,
        layers: Sequence[int],
        progress: Progress | None = None,
        states: CapturedStates | None = None,
    ) -> dict[int, LayerStates]:
        """Return the states of the given layers, on the CPU.

        Args:
            layers: Indices of the layers.
            progress: Called with the number of prompts read and their total.
            states: Has the states of fits before, and keeps these if the queries and keys of all
                layers together take no more than the memory limit.
        """
        positions = {layer: self.method.query_positions(layer, self.lengths) for layer in layers}
        if states is None:
            return self._read(layers, positions, progress)
        kept = states.of((self.loaded.digest, self.digest))
        together = {*self.layers, *kept}
        if sum(self.num_bytes(one, every_query=True) for one in together) > self.memory_limit:
            states.clear()
            return self._read(layers, positions, progress)
        missing = [layer for layer in layers if layer not in kept]
        if missing:
            every = {layer: [list(range(n)) for n in self.lengths] for layer in missing}
            kept |= self._read(missing, every, progress)
        return {
            layer: [
                (queries[:, at], keys)
                for (queries, keys), at in zip(kept[layer], positions[layer], strict=True)
            ]
            for layer in layers
        }

    @torch.no_grad()
    def _read(
        self,
        layers: Sequence[int],
        positions: Mapping[int, Sequence[Sequence[int]]],
        progress: Progress | None,
    ) -> dict[int, LayerStates]:
        """Run the model on the prompts; return the layers' states, queries at positions alone."""
        model = self.loaded.model
        captured: dict[int, LayerStates] = {layer: [] for layer in layers}

        def keep(call: LayerCall) -> None:
            if call.layer in captured:
                states = captured[call.layer]
                queries = call.query_states[0][:, positions[call.layer][len(states)]]
                # Methods learn from logits of 1/sqrt(d) times the dot products, as Llama's are.
                factor = call.scale * queries.shape[-1] ** 0.5
                if abs(factor - 1) > 1e-6:
                    queries = queries * factor
                states.append((copied(queries), copied(call.key_states[0])))

        def copied(states: Tensor) -> Tensor:
            return states.to("cpu", model.dtype, copy=True)

        with watched_attention(model, keep):
            for done, ids in enumerate(self.prompts, start=1):
                input_ids = torch.tensor([ids], device=model.device)
                model.base_model(input_ids=input_ids, use_cache=False)
                if progress is not None:
                    progress(done, len(self.prompts))
        return captured
