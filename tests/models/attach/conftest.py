"""Small models with random weights in seven families, and methods to attach to them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from topkbench.methods.base import AnyMethod, Observer, StepContext, StepResult
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.hata import HATA
from topkbench.methods.learning import LearningMethod, artifact_spec
from topkbench.methods.loki import Loki
from topkbench.methods.quest import Quest
from topkbench.methods.streaming_llm import StreamingLLM
from topkbench.models.attach import geometry_of

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,  # peaked attention, so that what is selected matters
}
SLIDING = ["sliding_attention", "full_attention"]
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=None, **SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=24, **SMALL)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            head_dim=16,
            sliding_window=16,
            layer_types=SLIDING,
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=24,
            attn_implementation="eager",  # in their SDPA function, some releases cap nothing
            **SMALL,
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            head_dim=16,
            sliding_window=16,
            layer_types=SLIDING,
            query_pre_attn_scalar=24,
            **SMALL,
        )
    ),
}


@pytest.fixture(scope="session")
def seeded() -> Callable[..., Any]:
    def draw(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """Make a model of random weights, the same ones every time."""
        torch.manual_seed(0)
        return make().eval()

    return draw


@pytest.fixture(scope="session")
def models(seeded: Callable[..., Any]) -> dict[str, PreTrainedModel]:
    return {family: seeded(build) for family, build in MODELS.items()}


@pytest.fixture
def llama(models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return models["llama"]


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest, models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return models[request.param]


class ModelStates:
    """Random states of a model's shape, to fit on."""

    sequences = 1

    def __init__(self, model: PreTrainedModel) -> None:
        self.shape = geometry_of(model)
        self.num_layers = self.shape.num_layers

    def states(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(layer)
        shape = self.shape
        return [
            (
                torch.randn(shape.num_heads, 50, shape.head_dim, generator=generator),
                torch.randn(shape.num_kv_heads, 50, shape.head_dim, generator=generator),
            )
        ]


def fitted(method: AnyMethod, model: PreTrainedModel) -> AnyMethod:
    """Fit a method on random states of a model's shape, if it learns."""
    if artifact_spec(method, geometry_of(model)) is not None:
        assert isinstance(method, LearningMethod)  # it has a spec
        method.load_artifact(method.fit(ModelStates(model)))
    return method


@pytest.fixture(scope="session")
def method_for() -> Callable[..., Any]:
    def build(which: str, model: PreTrainedModel) -> AnyMethod:
        makers: dict[str, Callable[[], AnyMethod]] = {
            "full": FullAttention,
            "exact": ExactTopK,
            "hata": lambda: HATA(weights="random", rbit=64),
            "quest": lambda: Quest(page_size=4),
            "loki": lambda: Loki(rank=8),
            "streaming_llm": StreamingLLM,
        }
        return fitted(makers[which](), model)

    return build


@pytest.fixture(scope="session")
def fitted_on() -> Callable[..., Any]:
    return fitted


@pytest.fixture(scope="session")
def prompt() -> Callable[..., Any]:
    def build(batch_size: int = 2, length: int = 37) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return torch.randint(1, 61, (batch_size, length), generator=generator)

    return build


@pytest.fixture(scope="session")
def padded_batch(prompt: Callable[..., Tensor]) -> Callable[..., Any]:
    def build() -> tuple[Tensor, Tensor]:
        """Return prompts of 37, 20 and 5 tokens, padded on the left, and their mask."""
        ids, mask = prompt(3), torch.ones(3, 37, dtype=torch.long)
        for row, pads in ((1, 17), (2, 32)):
            ids[row, :pads], mask[row, :pads] = 0, 0
        return ids, mask

    return build


class Counter(Observer):
    """Records stages and steps."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.steps: list[tuple[int, int, StepResult]] = []

    @contextmanager
    def stage(self, name: str, layer: int) -> Iterator[None]:
        self.stages.append((name, layer))
        yield

    def on_step(self, context: StepContext, result: StepResult) -> None:
        self.steps.append((context.layer, context.cache.n, result))

    def count(self, name: str, layer: int) -> int:
        return self.stages.count((name, layer))


@pytest.fixture(scope="session")
def make_counter() -> type[Counter]:
    return Counter


@pytest.fixture(scope="session")
def small() -> dict[str, Any]:
    """Return the settings that the configs share."""
    return SMALL
