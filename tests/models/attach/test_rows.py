"""Every method of conf/method in three model families: a row in a batch equals the row alone."""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicCache

from topkbench.methods.base import AnyMethod, Observer, Policy, StepContext, StepResult
from topkbench.models.attach import attach
from topkbench.models.cache import DecodeCache
from topkbench.models.compat import cache_keyword
from topkbench.models.prefill import prefill
from topkbench.models.step_count import MethodBypassedError

ROOT = Path(__file__).parents[3]
Make = Callable[..., Any]
METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
FAMILIES: dict[str, Callable[[dict[str, Any]], PreTrainedModel]] = {
    "llama": lambda small: LlamaForCausalLM(LlamaConfig(**small)),
    "phi3": lambda small: Phi3ForCausalLM(Phi3Config(**small)),
    "qwen3": lambda small: Qwen3ForCausalLM(Qwen3Config(head_dim=24, **small)),
}
LENGTHS = (96, 72, 85)  # more than the 64 last tokens and 4 sinks that MagicPIG keeps natively
STEPS = 3
K = 40
BRIEF: dict[str, dict[str, Any]] = {"hash_attention": {"steps": 2}}  # its quality does not matter
UNEVEN = {"spatten": {"last_keep": 0.75, "last_heads": 0.5}}  # later layers keep less
CLOSE: dict[str, Any] = {"atol": 2e-4, "rtol": 2e-4}


@pytest.fixture(scope="session")
def deep(seeded: Make, small: dict[str, Any]) -> dict[str, PreTrainedModel]:
    """Models of three layers, so that one is sparse if the first two are dense, as natively."""
    shape, models = {**small, "num_hidden_layers": 3}, {}
    for family, make in FAMILIES.items():
        models[family] = seeded(partial(make, shape))
        for name, weight in models[family].named_parameters():
            if "norm" in name:  # else Qwen3's keys have equal norms, and rounding ranks them
                torch.nn.init.uniform_(weight, 0.5, 1.5)
    return models


@pytest.fixture(scope="session")
def method_in(make_method: Make, fitted_on: Make, deep: dict[str, PreTrainedModel]) -> Make:
    """Return a method as its YAML makes it, fitted on a family's model once."""
    made: dict[str, AnyMethod] = {}

    def get(name: str, family: str, **settings: Any) -> AnyMethod:
        known = f"{name} {family} {settings}"
        if known not in made:
            method = make_method(name, fit=False, **BRIEF.get(name, {}), **settings)
            made[known] = fitted_on(method, deep[family])
        return made[known]

    return get


@pytest.fixture(scope="session")
def dense(deep: dict[str, PreTrainedModel], method_in: Make) -> Callable[[str], Tensor]:
    """Return a family's logits for the three rows with a budget of all tokens."""

    @functools.cache
    def logits(family: str) -> Tensor:
        exact, rows = method_in("exact", family), texts(LENGTHS, STEPS)
        return decode(deep[family], exact, Policy(k=1000), rows, STEPS)[0]

    return logits


class Chosen(Observer):
    """Records each step's, layer's and row's selection, counted from the row's first token."""

    def __init__(self) -> None:
        self.rows: dict[int, list[list[list[list[int]]]]] = {}
        self.found: dict[int, list[tuple[int, list[list[int]]]]] = {}
        self.reads_less = True

    def on_step(self, context: StepContext, result: StepResult) -> None:
        if result.selection is None:
            return
        start, end = context.cache.bounds()
        slots = result.selection.slots(context.cache)
        self.reads_less &= bool((slots.sum(-1) < (end - start)[:, None]).all())
        step = [
            [(head.nonzero()[:, 0] - start[row]).tolist() for head in slots[row]]
            for row in range(len(slots))
        ]
        self.rows.setdefault(context.layer, []).append(step)
        lengths = (end - start).tolist()
        self.found.setdefault(context.layer, []).extend(zip(lengths, step, strict=True))

    def by_length(self, layer: int) -> list[tuple[int, list[list[int]]]]:
        """Return all selections of a layer by the tokens that they were made from, sorted."""
        return sorted(self.found[layer])

    def of(self, row: int) -> dict[int, list[list[list[int]]]]:
        return {layer: [step[row] for step in steps] for layer, steps in self.rows.items()}


def texts(lengths: Sequence[int], steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 61, (n + steps,), generator=generator) for n in lengths]


def decode(
    model: PreTrainedModel,
    method: AnyMethod,
    policy: Policy,
    rows: list[Tensor],
    steps: int,
    known: bool = False,
) -> tuple[Tensor, Chosen]:
    """Decode the last tokens of each row, padded on the left; return ``[steps, B, vocabulary]``.

    With ``known`` they are decoded in one forward.
    """
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = (ids > 0).long()
    places = (mask.cumsum(1) - 1).clamp_min(0)
    seen, found = Chosen(), []
    begin, size = longest - steps, steps if known else 1
    parts = [slice(0, begin), *(slice(at, at + size) for at in range(begin, longest, size))]
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), attach(model, method, policy, seen):
        for part in parts:
            out = model(
                ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=places[:, part],
                **cache_keyword(model, cache),
            )
            found.append(out.logits[:, -min(size, part.stop - part.start) :])
    return torch.cat(found[1:], 1).transpose(0, 1), seen


def decode_own(
    model: PreTrainedModel, method: AnyMethod, policy: Policy, rows: list[Tensor], steps: int
) -> tuple[Tensor, Chosen]:
    """Do the same with topkbench's DecodeCache, whose rows begin at the same slot."""
    states = [prefill(model, row[:-steps].tolist(), method.traits.needs) for row in rows]
    cache, seen, found = DecodeCache(states, steps), Chosen(), []
    with torch.no_grad(), attach(model, method, policy, seen):
        for step in range(steps):
            cache.extend()
            ids = torch.stack([row[len(row) - steps + step, None] for row in rows])
            given = {
                "input_ids": ids,
                "position_ids": cache.positions,
                **cache_keyword(model, cache),
            }
            found.append(model(**given).logits[:, -1])
    return torch.stack(found), seen


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("protocol", ["unified", "native"])
def test_a_row_selects_in_a_batch_what_it_selects_alone(
    deep: dict[str, PreTrainedModel],
    method_in: Make,
    dense: Callable[[str], Tensor],
    name: str,
    family: str,
    protocol: Any,
) -> None:
    """Alone, padded on the left, and in DecodeCache, with a budget below every row's length."""
    model, method, rows = deep[family], method_in(name, family), texts(LENGTHS, STEPS)
    policy = Policy(k=K, protocol=protocol)
    alone = [decode(model, method, policy, [row], STEPS) for row in rows]
    padded, by_padded = decode(model, method, policy, rows, STEPS)
    own, by_own = decode_own(model, method, policy, rows, STEPS)
    for row, (logits, seen) in enumerate(alone):
        torch.testing.assert_close(padded[:, row], logits[:, 0], **CLOSE)
        torch.testing.assert_close(own[:, row], logits[:, 0], **CLOSE)
        assert by_padded.of(row) == seen.of(0)
        assert by_own.of(row) == seen.of(0)
    if not method.selects:
        torch.testing.assert_close(padded, dense(family), **CLOSE)
        return
    assert by_padded.reads_less
    assert not torch.allclose(padded, dense(family), atol=1e-3)  # dropping tokens has an effect
    _, effective = method.resolve(policy)
    selecting = set(range(3)) - effective.resolve_dense_layers(3)
    assert set(by_padded.rows) == selecting
    # MagicPIG's query heads sample separately under either protocol.
    heads = 4 if effective.head_scope == "query_head" or name == "magicpig" else 2
    for steps in by_padded.rows.values():
        assert all(len(step[row]) == heads for step in steps for row in range(3))


@pytest.mark.filterwarnings("ignore:.*does not act")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("protocol", ["unified", "native"])
@pytest.mark.parametrize("lengths", [LENGTHS[:1], LENGTHS])
def test_known_tokens_in_one_forward_select_what_they_select_one_by_one(
    deep: dict[str, PreTrainedModel],
    method_in: Make,
    name: str,
    family: str,
    protocol: Any,
    lengths: tuple[int, ...],
) -> None:
    model, method, rows = deep[family], method_in(name, family), texts(lengths, STEPS)
    policy = Policy(k=K, protocol=protocol)
    wanted, one_by_one = decode(model, method, policy, rows, STEPS)
    if method.known_tokens([STEPS] * len(rows)) == "one by one":
        assert name == "spatten"
        with pytest.raises(MethodBypassedError, match="several tokens over a filled cache"):
            decode(model, method, policy, rows, STEPS, known=True)
        return
    logits, together = decode(model, method, policy, rows, STEPS, known=True)
    torch.testing.assert_close(logits, wanted, **CLOSE)
    assert set(together.found) == set(one_by_one.found)
    for layer in one_by_one.found:
        assert together.by_length(layer) == one_by_one.by_length(layer)


@pytest.mark.parametrize("protocol", ["unified", "native"])
@pytest.mark.parametrize("which", ["h2o", "snapkv", "spatten"])
def test_a_prompt_shorter_than_the_window_does_not_shorten_other_rows(
    deep: dict[str, PreTrainedModel], method_in: Make, which: str, protocol: Any
) -> None:
    """Rows of 120 and 18 tokens: the second keeps all tokens, the first the same as alone."""
    model, rows = deep["llama"], texts((120, 18), STEPS)
    method = method_in(which, "llama", **UNEVEN.get(which, {}))
    policy = Policy(k=48, protocol=protocol)
    alone = [decode(model, method, policy, [row], STEPS) for row in rows]
    for by in (decode, decode_own):
        logits, seen = by(model, method, policy, rows, STEPS)
        for row in range(2):
            torch.testing.assert_close(logits[:, row], alone[row][0][:, 0], **CLOSE)
        assert seen.of(0) == alone[0][1].of(0)
        for steps in seen.of(1).values():
            assert all(
                head == list(range(19 + at)) for at, step in enumerate(steps) for head in step
            )
