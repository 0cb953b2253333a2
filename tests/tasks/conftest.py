"""A small model of random weights with a tokenizer of the prompts' own words."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from topkbench.models.load import LoadedModel
from topkbench.models.prefill import PrefillStore
from topkbench.models.tiny_tokenizer import build_tokenizer
from topkbench.tasks.words import TEMPLATE_WORDS, random_names, word_pools

WINDOW = 1024


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    words = [*TEMPLATE_WORDS, *word_pools()[0], *word_pools()[1]]
    words += [*random_names(5, upper=True), *random_names(6, upper=False)]
    tokenizer = build_tokenizer([f" {word}" for word in words], WINDOW)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return LoadedModel(
        name="random",
        model=model,
        tokenizer=tokenizer,
        digest="0" * 16,
        window=WINDOW,
        short_answers=True,
    )


@pytest.fixture
def store(loaded: LoadedModel, tmp_path: Path) -> PrefillStore:
    return PrefillStore(loaded.model, tmp_path / "prefill", 2**30)


@pytest.fixture(scope="session")
def count() -> Callable[[str], int]:
    """Count words and marks: tokens that add up over pieces of text."""

    def count_words(text: str) -> int:
        return len(re.findall(r"\w+|[^\w\s]", text))

    return count_words
