"""Methods with topkbench's DecodeCache: rows of different lengths, written in place."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from topkbench.methods.base import AnyMethod, Observer, Policy
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.hata import HATA
from topkbench.methods.quest import Quest
from topkbench.methods.streaming_llm import StreamingLLM
from topkbench.models.attach import attach
from topkbench.models.cache import DecodeCache
from topkbench.models.compat import cache_keyword
from topkbench.models.prefill import prefill

METHODS: dict[str, AnyMethod] = {
    "full": FullAttention(),
    "exact": ExactTopK(),
    "hata": HATA(weights="random", rbit=64),
    "quest": Quest(page_size=4),
    "streaming_llm": StreamingLLM(),
}
STEPS = 10


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=None,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 61, (n,), generator=generator).tolist() for n in lengths]


class Builds(Observer):
    """Counts how often an index was built."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def stage(self, name: str, layer: int):  # type: ignore[no-untyped-def]
        if name == "build":
            self.layers.append(layer)
        return super().stage(name, layer)


def decode(
    model: LlamaForCausalLM, method: AnyMethod, rows: list[list[int]], k: int, observer: Observer
) -> Tensor:
    """Decode greedily over the cache; return the tokens ``[B, STEPS]``."""
    states = [prefill(model, row) for row in rows]
    cache = DecodeCache(states, STEPS)
    token = torch.stack([state.logits for state in states]).argmax(-1, keepdim=True)
    tokens = [token]
    with attach(model, method, Policy(k=k), observer), torch.no_grad():
        for _ in range(STEPS - 1):
            cache.extend()
            ids = {"input_ids": token, "position_ids": cache.positions}
            token = (
                model(**ids, **cache_keyword(model, cache)).logits[:, -1].argmax(-1, keepdim=True)
            )
            tokens.append(token)
    return torch.cat(tokens, 1)


@pytest.mark.parametrize("k", [16, 100])
@pytest.mark.parametrize("lengths", [(33, 33), (40, 9, 23)])
@pytest.mark.parametrize("which", sorted(METHODS))
def test_equals_generating_each_row_alone(
    model: LlamaForCausalLM, which: str, lengths: tuple[int, ...], k: int
) -> None:
    method = METHODS[which]
    rows = prompts(*lengths)
    builds = Builds()
    found = decode(model, method, rows, k, builds)
    with attach(model, method, Policy(k=k)):
        for row, ids in enumerate(rows):
            alone = model.generate(torch.tensor([ids]), max_new_tokens=STEPS, do_sample=False)
            assert found[row].tolist() == alone[0, len(ids) :].tolist()
    if method.selects:
        assert sorted(builds.layers) == [0, 1]  # once per layer
