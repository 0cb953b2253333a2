"""The prompts that methods are fitted on: a seed and words of their own, so never a test's.

Source: HATA samples its pairs from long documents (arXiv:2506.02572, appendix B.1). Its documents
come from the benchmark it is evaluated on; ours share no key, value or filler word with any test.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from topkbench.methods.attach import geometry_of
from topkbench.methods.base import Progress
from topkbench.models.load import LoadedModel
from topkbench.tasks.ruler_prompts import SUBTASKS, make_prompt
from topkbench.tasks.words import CALIBRATION_NAMES, word_pools

SEED = 90210
NUM_SEQUENCES = 14
MAX_LENGTH = 4096
CAPTURE = "topkbench_capture"


@dataclass
class CapturedStates:
    """Post-RoPE queries and keys of calibration prompts; see ``methods.base.CalibrationStates``.

    Attributes:
        layers: For each layer and sequence, float32 ``[Hq, n, d]`` queries, ``[Hkv, n, d]`` keys.
        description: What the prompts are, for an artifact's provenance.
    """

    layers: list[list[tuple[Tensor, Tensor]]]
    description: str

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.layers)

    @property
    def sequences(self) -> int:
        """Calibration sequences."""
        return len(self.layers[0])

    def states(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Return each sequence's queries and keys in one layer."""
        return self.layers[layer]


def calibration_texts(loaded: LoadedModel, length: int, num_sequences: int, seed: int) -> list[str]:
    """Return prompts with their answers, the sub-tasks in turn, of calibration words alone."""

    def count(text: str) -> int:
        return len(loaded.tokenizer.encode(text, add_special_tokens=False))

    texts = []
    for index in range(num_sequences):
        rng = random.Random(f"calibration-{seed}-{index}")
        subtask = SUBTASKS[index % len(SUBTASKS)]
        prompt = make_prompt(subtask, rng, word_pools()[1], length - 2, count, CALIBRATION_NAMES)
        texts.append(prompt.context + prompt.question + prompt.answer_prefix + prompt.reference)
    return texts


@contextmanager
def watched_attention(
    model: PreTrainedModel, see: Callable[[int, Tensor, Tensor, Tensor], None]
) -> Iterator[None]:
    """Let ``see`` have each layer's index and post-RoPE states in every forward of the block.

    Args:
        model: A decoder-only model; it is what it was once the block is left.
        see: Called with the layer, ``[B, Hq, n, d]`` queries, and ``[B, Hkv, n, d]`` keys and
            values.
    """

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        see(int(module.layer_idx), query, key, value)  # type: ignore[arg-type]
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)  # type: ignore[arg-type]

    before = model.config._attn_implementation
    AttentionInterface.register(CAPTURE, attend)
    AttentionMaskInterface.register(CAPTURE, sdpa_mask)
    model.set_attn_implementation(CAPTURE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def capture(
    loaded: LoadedModel,
    num_sequences: int = NUM_SEQUENCES,
    max_length: int = MAX_LENGTH,
    seed: int = SEED,
    progress: Progress | None = None,
) -> CapturedStates:
    """Run the model over calibration prompts and keep each layer's queries and keys.

    Args:
        loaded: The model.
        num_sequences: Prompts.
        max_length: Tokens of a prompt at most; less where the model's window is smaller.
        seed: Of the prompts.
        progress: Called with the prompts read and how many there are.

    Raises:
        ValueError: If the states of all layers would not fit into memory.
    """
    length = min(max_length, loaded.window)
    shape = geometry_of(loaded.model)
    channels = shape.num_layers * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    need, free = 4 * num_sequences * length * channels, psutil.virtual_memory().available
    if need > free:
        raise ValueError(
            f"fitting must hold {need / 2**30:.0f} GiB of queries and keys, found"
            f" {free / 2**30:.0f} GiB of free memory; fit where there is more, and point"
            " artifact_dir at what it wrote."
        )
    texts = calibration_texts(loaded, length, num_sequences, seed)
    model = loaded.model
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    layers: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(num_layers)]

    def keep(layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        queries, keys = (one[0].to("cpu", torch.float32, copy=True) for one in (query, key))
        layers[layer].append((queries, keys))

    with watched_attention(model, keep):
        for done, text in enumerate(texts, start=1):
            ids: Sequence[int] = loaded.tokenizer.encode(text)
            model.base_model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
            if progress is not None:
                progress(done, len(texts))
    description = (
        f"{num_sequences} prompts of {length} tokens, {', '.join(SUBTASKS)} in turn, seed {seed},"
        f" {len(word_pools()[1])} words that no test uses"
    )
    return CapturedStates(layers, description)
