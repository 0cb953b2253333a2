"""Methods that need more than a score, decoding with real model families under both protocols."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from topkbench.methods.attach import attach
from topkbench.methods.base import Policy, TopKMethod
from topkbench.methods.block_oracle import BlockOracle
from topkbench.methods.magicpig import MagicPIG
from topkbench.methods.quest import Quest
from topkbench.methods.random import RandomSelection
from topkbench.methods.spatten import SpAtten
from topkbench.methods.twilight import Twilight

METHODS: dict[str, Callable[[], TopKMethod]] = {
    "block_oracle": lambda: BlockOracle(page_size=4),
    "magicpig": lambda: MagicPIG(native_local=4),
    "random": RandomSelection,
    "spatten": lambda: SpAtten(last_keep=0.5, last_heads=0.75),
    "twilight": lambda: Twilight(base=Quest(page_size=4), base_k=2, p=0.7),
}


def decode(model: PreTrainedModel, method: TopKMethod, policy: Policy, batch: int) -> torch.Tensor:
    """Return the logits of four steps after a prompt; rows of a batch are padded on the left."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(2, 61, (batch, 44), generator=generator)
    mask = torch.ones_like(tokens)
    for row in range(1, batch):
        mask[row, : 7 * row] = 0
    found = []
    with torch.no_grad(), attach(model, method, policy):
        out = model(tokens[:, :40], attention_mask=mask[:, :40], use_cache=True)
        for place in range(40, 44):
            out = model(
                tokens[:, place : place + 1],
                attention_mask=mask[:, : place + 1],
                past_key_values=out.past_key_values,
            )
            found.append(out.logits[:, -1])
    return torch.stack(found, 1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("protocol", ["unified", "native"])
@pytest.mark.parametrize("method", METHODS)
def test_decodes_alone_and_in_a_padded_batch(
    models: dict[str, PreTrainedModel], family: str, protocol: str, method: str
) -> None:
    model = models[family]
    policy = Policy(k=16, num_sink=2, num_recent=4, protocol=protocol)  # type: ignore[arg-type]
    alone = decode(model, METHODS[method](), policy, 1)
    assert torch.isfinite(alone).all()
    together = decode(model, METHODS[method](), policy, 3)
    assert torch.isfinite(together).all()
    torch.testing.assert_close(together[:1], alone, atol=2e-4, rtol=2e-4)
    whole = decode(model, METHODS[method](), Policy(k=64), 3)
    dense = decode(model, METHODS[method](), Policy(k=1000), 3)
    torch.testing.assert_close(whole, dense, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(together, dense, atol=1e-3)  # what was dropped mattered
