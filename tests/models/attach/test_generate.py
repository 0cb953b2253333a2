"""Methods under generate: greedy, sampled, beams, padded batches, seven model families."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    PreTrainedModel,
)

from topkbench.methods.base import Policy
from topkbench.models.attach import attach

Make = Callable[..., Any]
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("which", ["full", "exact", "hata", "quest", "loki", "streaming_llm"])
def test_k_above_n_generates_the_same_as_the_model(
    model: PreTrainedModel, which: str, method_for: Make, padded_batch: Make
) -> None:
    ids, mask = padded_batch()
    wanted = model.generate(ids, attention_mask=mask, **GREEDY)
    with attach(model, method_for(which, model), Policy(k=200)):
        found = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "temperature": 0.8},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=["sample", "beam", "beam_sample"],
)
@pytest.mark.parametrize("which", ["exact", "hata", "quest"])
def test_sampling_and_beams_with_k_above_n(
    model: PreTrainedModel, which: str, how: dict[str, Any], method_for: Make, padded_batch: Make
) -> None:
    ids, mask = padded_batch()
    torch.manual_seed(3)
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=6, **how)
    with attach(model, method_for(which, model), Policy(k=200)):
        torch.manual_seed(3)
        found = model.generate(ids, attention_mask=mask, max_new_tokens=6, **how)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("which", ["exact", "hata", "quest", "loki", "streaming_llm"])
def test_beam_search_reorders_the_index(
    llama: PreTrainedModel, which: str, method_for: Make, prompt: Make
) -> None:
    """An index kept across a reorder would belong to other rows; compare with rebuilding always."""
    ids = prompt()
    how = {"num_beams": 4, "max_new_tokens": 10, "do_sample": False}
    method = method_for(which, llama)
    with attach(llama, method, Policy(k=16)):
        kept = llama.generate(ids, **how)
    with attach(llama, method, Policy(k=16)) as session:
        session.indices.keep = lambda *args: None  # type: ignore[method-assign]
        rebuilt = llama.generate(ids, **how)
    assert torch.equal(kept, rebuilt)


def test_a_small_budget_changes_what_is_generated(
    llama: PreTrainedModel, method_for: Make, prompt: Make
) -> None:
    ids = prompt()
    wanted = llama.generate(ids, **GREEDY, output_logits=True, return_dict_in_generate=True)
    errors = {}
    for which in ("exact", "streaming_llm"):
        with attach(llama, method_for(which, llama), Policy(k=13)):
            found = llama.generate(ids, **GREEDY, output_logits=True, return_dict_in_generate=True)
        errors[which] = (found.logits[1] - wanted.logits[1]).norm().item()
    assert 1e-3 < errors["exact"] < errors["streaming_llm"]
