"""Every family of models: what `generate` gives, padded or not, and what a method changes."""

from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from topkbench.methods.base import AnyMethod, Policy
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.h2o import H2O
from topkbench.methods.quest import Quest
from topkbench.methods.snapkv import SnapKV
from topkbench.models.attach import attach, geometry_of
from topkbench.models.cache import DecodeCache
from topkbench.models.compat import layer_devices, token_logits, using_attention
from topkbench.models.prefill import Prefill, prefill
from topkbench.models.speculation import unsupported_reason
from topkbench.tests.models.families import REFUSED, SERVED, VOCABULARY, Family, Refused

LENGTHS = (30, 21, 14)  # prompts of one batch
NEW = 3  # tokens decoded after each
K = 6
CAPTURED = frozenset({"query_tail", "column_sums"})


def policy(k: int) -> Policy:
    return Policy(k=k, num_sink=1, num_recent=2, dense_layers=0)


@pytest.fixture(params=SERVED, ids=lambda family: f"{family.name}-{family.models.split(',')[0]}")
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    if not found.is_known:
        pytest.skip(f"this transformers has no {found.name}")
    return found


@cache
def model_of(family: Family) -> PreTrainedModel:
    return family.model()


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (3, max(LENGTHS) + NEW), generator=generator)


def test_generate_is_that_of_transformers(family: Family) -> None:
    model, ids = model_of(family), tokens()[:, :20]
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :3] = 0  # padding on the left
    for inputs in ({"inputs": ids[:1]}, {"inputs": ids, "attention_mask": mask}):
        arguments = {**inputs, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        with using_attention(model, "eager"):
            expected = model.generate(**arguments)
        with attach(model, ExactTopK(), policy(64)):
            assert model.generate(**arguments).tolist() == expected.tolist()
        # H2O captures the attention that tokens received.
        for method in (ExactTopK(), H2O())[: len(inputs["inputs"])]:
            with attach(model, method, policy(K)) as session:
                model.generate(**arguments)
            assert session.sparse_layers == list(family.global_layers)
            session.require_steps(3 * len(inputs["inputs"]))


def decoded(model: PreTrainedModel, prompts: list[Prefill], method: AnyMethod, k: int) -> Tensor:
    """Decode the given tokens after each prompt; return the logits ``[3, NEW, vocabulary]``."""
    cache, ids, logits = DecodeCache.on(layer_devices(model), prompts, NEW), tokens(), []
    with attach(model, method, policy(k)) as session:
        for step in range(NEW):
            cache.extend()
            new = torch.stack([ids[row, n + step] for row, n in enumerate(LENGTHS)])[:, None]
            logits.append(token_logits(model, new, cache, cache.positions))
    if method.selects and k == K:
        session.require_steps(NEW * len(LENGTHS))
    return torch.stack(logits, 1)


def test_topkbenchs_own_cache_gives_the_logits_of_one_forward(family: Family) -> None:
    model, ids = model_of(family), tokens()
    assert geometry_of(model).global_layers == list(family.global_layers)
    prompts = [prefill(model, ids[row, :n].tolist(), CAPTURED) for row, n in enumerate(LENGTHS)]
    with using_attention(model, "eager"):
        expected = torch.stack(
            [
                token_logits(model, ids[row : row + 1, : n + NEW], keep=torch.arange(n, n + NEW))[0]
                for row, n in enumerate(LENGTHS)
            ]
        )

    def error(logits: Tensor) -> float:
        return float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max())

    assert error(decoded(model, prompts, FullAttention(), 64)) < 1e-5
    cache = DecodeCache.on(layer_devices(model), prompts, NEW)
    with attach(model, ExactTopK(), policy(64)):
        if not cache.is_recurrent:  # else each token changes the states
            cache.extend([NEW] * len(LENGTHS))
            rows = [ids[row, n : n + NEW] for row, n in enumerate(LENGTHS)]
            keep = torch.arange(NEW)
            together = token_logits(model, torch.stack(rows), cache, cache.positions, keep)
            assert error(together) < 1e-5
    # The prompts' states are as they were: those of layers without attention, too.
    assert error(decoded(model, prompts, ExactTopK(), 64)) < 1e-5
    few = {
        method.name: decoded(model, prompts, method, K)
        for method in (ExactTopK(), Quest(page_size=4), SnapKV(), H2O())
    }
    for name, logits in few.items():
        assert logits.isfinite().all(), name
        assert error(logits) > 1e-4, name  # the method acts


def test_infinigen_is_refused_where_queries_cannot_be_speculated(family: Family) -> None:
    assert (unsupported_reason(model_of(family)) is None) == family.speculates


@pytest.mark.parametrize("refused", REFUSED, ids=lambda one: one.family.name)
def test_a_family_that_is_not_served_says_why(refused: Refused) -> None:
    if not refused.family.is_known:
        pytest.skip(f"this transformers has no {refused.family.name}")
    with pytest.raises(ValueError, match=refused.why):
        geometry_of(refused.family.model())
