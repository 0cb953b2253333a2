"""The states that methods are fitted on: of texts that no test uses, read by the model.

Source: HATA samples its pairs from long documents (arXiv:2506.02572, appendix B.1). Its documents
come from the benchmark it is evaluated on; here the configuration names the texts
(``conf/calibration/``), which share nothing with any test.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch
from torch import Tensor

from topkbench.methods.base import LayerStates, Progress, TopKMethod
from topkbench.models.attach import geometry_of
from topkbench.models.capture import LayerCall, watched_attention
from topkbench.models.load import LoadedModel

NUM_SEQUENCES = 14
MAX_LENGTH = 4096


class CalibrationTexts(Protocol):
    """Texts to fit methods on."""

    @property
    def name(self) -> str:
        """What rows call them."""

    @property
    def seed(self) -> int | None:
        """Of what is drawn; None if nothing is."""

    def sequences(self, loaded: LoadedModel, length: int, count: int) -> list[list[int]]:
        """Return the token ids of ``count`` texts of at most ``length`` tokens each."""

    def describe(self, length: int, count: int) -> str:
        """Say what they are, in words, with a digest of what was read from outside."""


@dataclass
class Calibration:
    """Calibration prompts, and the states that a method learns from, a few layers at a time.

    The states of all layers may exceed a machine's memory, so the model reads the prompts once for
    each group of layers. Of queries and keys never more than ``memory_limit`` bytes are held: a
    group is as many layers as fit, their keys whole, their queries at the positions that the method
    asks for, all in the model's dtype. Beside them stand what one forward of the model needs, and
    on each device that learns, one layer's states and what the method makes of them.

    Attributes:
        loaded: The model.
        method: Says which queries are kept.
        prompts: Token ids of each prompt.
        memory_limit: Bytes of queries and keys that may be held at once.
        description: What the prompts are, for an artifact's provenance.

    Artifacts are tied to ``digest``, so to the tokens of the prompts and with them to the
    tokenizer.
    """

    loaded: LoadedModel
    method: TopKMethod
    prompts: list[list[int]]
    memory_limit: int
    description: str

    @classmethod
    def draw(
        cls,
        loaded: LoadedModel,
        method: TopKMethod,
        texts: CalibrationTexts,
        num_sequences: int = NUM_SEQUENCES,
        max_length: int = MAX_LENGTH,
        memory_limit: int | None = None,
    ) -> "Calibration":
        """Make the prompts; nothing is read yet.

        Args:
            loaded: The model.
            method: The method that learns.
            texts: What the model reads.
            num_sequences: Texts.
            max_length: Tokens of a text at most; less where the model's window is smaller.
            memory_limit: See the class; None for half of the free memory.
        """
        length = min(max_length, loaded.window)
        if memory_limit is None:
            memory_limit = psutil.virtual_memory().available // 2
        return cls(
            loaded,
            method,
            texts.sequences(loaded, length, num_sequences),
            memory_limit,
            texts.describe(length, num_sequences),
        )

    @property
    def digest(self) -> str:
        """16 hex digits of the prompts' tokens: of all that a fit reads beside the model."""
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()[:16]

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return geometry_of(self.loaded.model).num_layers

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return [len(ids) for ids in self.prompts]

    def num_bytes(self, layer: int) -> int:
        """Return the bytes of one layer's queries and keys that are held while it is learned."""
        shape = geometry_of(self.loaded.model)
        queries = sum(map(len, self.method.query_positions(layer, self.lengths)))
        rows = shape.num_kv_heads * sum(self.lengths) + shape.num_heads * queries
        return rows * shape.head_dim * shape.dtype_bytes

    def groups(self) -> list[list[int]]:
        """Return the layers in groups, in order, each within the memory limit.

        Raises:
            ValueError: If a single layer exceeds it.
        """
        groups: list[list[int]] = []
        room = 0
        for layer in range(self.num_layers):
            need = self.num_bytes(layer)
            if need > self.memory_limit:
                raise ValueError(
                    f"the queries and keys of a layer must fit calibration_memory_gib, got"
                    f" {need / 2**30:.3g} GiB for {self.memory_limit / 2**30:.3g} GiB; raise it, or"
                    " fit where there is more memory and point artifact_dir at what it wrote."
                )
            if not groups or need > room:
                groups.append([])
                room = self.memory_limit
            groups[-1].append(layer)
            room -= need
        return groups

    @torch.no_grad()
    def capture(
        self, layers: Sequence[int], progress: Progress | None = None
    ) -> dict[int, LayerStates]:
        """Let the model read the prompts, and return the states of some layers, on the CPU.

        Args:
            layers: Indices of the layers.
            progress: Called with the prompts read and how many there are.
        """
        model = self.loaded.model
        wanted = {layer: self.method.query_positions(layer, self.lengths) for layer in layers}
        held: dict[int, LayerStates] = {layer: [] for layer in layers}

        def keep(call: LayerCall) -> None:
            if call.layer in held:
                states = held[call.layer]
                chosen = call.query_states[0][:, wanted[call.layer][len(states)]]
                states.append((own(chosen), own(call.key_states[0])))

        def own(states: Tensor) -> Tensor:
            return states.to("cpu", model.dtype, copy=True)

        with watched_attention(model, keep):
            for done, ids in enumerate(self.prompts, start=1):
                given = torch.tensor([ids], device=model.device)
                model.base_model(input_ids=given, use_cache=False)
                if progress is not None:
                    progress(done, len(self.prompts))
        return held
