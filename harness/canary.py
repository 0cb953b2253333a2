"""A check before a model's first cell: are the logits right, and does a selection change them?

A few steps of full attention, on two prompts of different lengths together, are compared with
transformers' own forwards over the same tokens, and then with those of a canary, a method whose
selections have a known effect.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor

from topkbench.harness.decoding import NotFiniteError
from topkbench.harness.task import Context
from topkbench.methods.base import (
    AnyMethod,
    Index,
    Policy,
    PrefillInputs,
    QueryIndependentMethod,
    Selection,
    StepContext,
)
from topkbench.models.attach import attach
from topkbench.models.cache import DecodeCache
from topkbench.models.compat import layer_devices, token_logits, using_attention
from topkbench.models.prefill import Prefill, prefill
from topkbench.models.step_count import MethodBypassedError

PROMPTS = (48, 31)  # tokens of each, drawn at random
STEPS = 3
FEW = 2  # tokens; a selection this small must change the logits
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # relative to the logits' norm; else 5e-2

_CHECKED: "WeakSet[Any]" = WeakSet()


@dataclass(kw_only=True)
class Canary(QueryIndependentMethod[Index]):
    """Selects every token or only the first few, ignoring the policy.

    Attributes:
        keep: Number of tokens to select; None for all.
    """

    name: ClassVar[str] = "canary"

    keep: int | None = None

    def build_index(self, prefill: PrefillInputs) -> Index:
        return Index.of(prefill)

    def append(self, index: Index, key_states: Tensor, value_states: Tensor) -> None:
        index.advance()

    def select(self, index: Index, context: StepContext) -> Selection:
        num_kept = index.length if self.keep is None else self.keep
        slots = torch.arange(num_kept, dtype=torch.int32, device=context.cache.device)
        batch_size, num_kv_heads = context.query_states.shape[:2]
        return Selection(slots.expand(batch_size, num_kv_heads, -1).contiguous())


def check_acting(context: Context) -> None:
    """Check, once for each loaded model, that a decode step attends to the selected tokens only.

    Full attention must give the logits of transformers' own forward over all tokens of a prompt at
    once, by its own attention and without a cache, also when the prompts are decoded again: a model
    may keep states that are not in its cache. Selecting all tokens must give full attention's
    logits, and selecting two tokens must not. That a method's answers equal full attention's would
    not show this, since a good method's do too.

    Args:
        context: The cell's context; its method is not used.

    Raises:
        MethodBypassedError: If selecting a few tokens does not change the logits, or selecting all
            tokens does.
        ValueError: If full attention's logits are not transformers'.
        NotFiniteError: If full attention's logits are not finite.
    """
    loaded = context.loaded
    if loaded.model in _CHECKED or not context.geometry.global_layers:
        return
    expected = _expected(context)
    try:
        prefills = [prefill(loaded.model, ids[:-STEPS]) for ids in _tokens(context)]
        dense = _logits(context, context.full, prefills)
    except (MethodBypassedError, NotFiniteError, torch.OutOfMemoryError):
        raise
    except Exception as failure:  # of any kind: a model's own forward may need another cache
        found = " ".join(str(failure).split())[:200].rstrip(".")
        raise ValueError(
            f"{loaded.name} must decode with topkbench's cache, got in"
            f" {type(loaded.model).__name__} {type(failure).__name__}: {found}; topkbench does not"
            " support this model."
        ) from failure
    if not dense.isfinite().all():
        raise NotFiniteError(
            f"the logits of {loaded.name} must be finite, got infinity or NaN in"
            f" {str(loaded.model.dtype).removeprefix('torch.')}; use dtype=float32, or check the"
            " weights."
        )
    tolerance = TOLERANCE.get(loaded.model.dtype, 5e-2)
    every = _logits(context, Canary(), prefills)
    few = _logits(context, Canary(keep=FEW), prefills)
    again = _logits(context, context.full, prefills)
    difference = max(_difference(one, expected) for one in (dense, again))
    if not difference <= tolerance:
        raise ValueError(
            f"the logits of {loaded.name} decoded with topkbench's cache must be those of"
            f" transformers' forward without one within {tolerance}, got a difference of"
            f" {difference:.3g}; topkbench does not support this model."
        )
    error, change = (_difference(one, dense) for one in (every, few))
    if not error <= tolerance:
        raise MethodBypassedError(
            f"with every token selected the logits of {loaded.name} must be full attention's within"
            f" {tolerance}, got a difference of {error:.3g}; topkbench does not support this model."
        )
    if not change > 2 * error:
        raise MethodBypassedError(
            f"with {FEW} of {PROMPTS[0]} tokens selected the logits of {loaded.name} must differ"
            f" from full attention's by more than with all of them ({error:.3g}), got {change:.3g}:"
            " what a method selects does not reach them; topkbench does not support this model."
        )
    _CHECKED.add(loaded.model)


def _difference(logits: Tensor, expected: Tensor) -> float:
    """Return the largest difference of a row, relative to the logits' norm.

    In a low precision a token may be routed to other experts, so the best step of a row counts.
    """
    errors = (logits.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    steps = errors.amax(1) if logits.dtype in TOLERANCE else errors.amin(1)
    return float(steps.max())


def _tokens(context: Context) -> list[list[int]]:
    """Return the tokens of the check's prompts, those that are decoded last."""
    vocabulary = int(context.loaded.model.config.get_text_config(decoder=True).vocab_size)
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(vocabulary, (prompt + STEPS,), generator=generator).tolist()
        for prompt in PROMPTS
    ]


def _expected(context: Context) -> Tensor:
    """Return ``[prompts, STEPS, vocabulary]`` as transformers computes them for all tokens at once.

    Its eager attention has what a model's attention may have: capped logits, sinks, windows.
    """
    model = context.loaded.model
    found = []
    with using_attention(model, "eager"):
        for ids in _tokens(context):
            last = torch.arange(len(ids) - STEPS, len(ids), device=model.device)
            row = torch.tensor([ids], device=model.device)
            found.append(token_logits(model, row, keep=last)[0])
    return torch.stack(found)


@torch.no_grad()
def _logits(context: Context, method: AnyMethod, prefills: Sequence[Prefill]) -> Tensor:
    """Return ``[prompts, STEPS, vocabulary]`` of a few decode steps with a method."""
    model, ids = context.loaded.model, _tokens(context)
    cache = DecodeCache.on(layer_devices(model), prefills, STEPS)
    policy = Policy(k=FEW, num_sink=0, num_recent=0, dense_layers=0)
    logits = []
    with attach(model, method, policy) as session:
        for step in torch.tensor([one[-STEPS:] for one in ids], device=model.device).unbind(1):
            cache.extend()
            logits.append(token_logits(model, step[:, None], cache, cache.positions))
    session.require_steps(STEPS * len(prefills))
    return torch.stack(logits, 1)
