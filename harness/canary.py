"""A check before a model's first cell: are the logits right, and does a selection change them?

A few steps of full attention are compared with transformers' own forward over the same tokens, and
then with those of a canary, a method whose selections have a known effect.
"""

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
from topkbench.models.prefill import prefill
from topkbench.models.step_count import MethodBypassedError

PROMPT = 48  # tokens, drawn at random
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

    Full attention must give the logits of transformers' own forward over all tokens at once, by its
    own attention and without a cache. Selecting all tokens must give full attention's logits, and
    selecting two tokens must not. That a method's answers equal full attention's would not show
    this, since a good method's do too.

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
        dense = _logits(context, context.full)
    except (MethodBypassedError, NotFiniteError, torch.OutOfMemoryError):
        raise
    except Exception as failure:  # of any kind: a model's own forward may need another cache
        found = " ".join(str(failure).split())[:200]
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
    # In a low precision a token may be routed to other experts, so the best of the steps counts.
    errors = (dense - expected).norm(dim=-1) / expected.norm(dim=-1)
    error = errors.max() if loaded.model.dtype in TOLERANCE else errors.min()
    if not error <= tolerance:
        raise ValueError(
            f"the logits of {loaded.name} decoded with topkbench's cache must be those of"
            f" transformers' forward without one within {tolerance}, got a difference of"
            f" {error:.3g}; topkbench does not support this model."
        )
    every = _logits(context, Canary())
    few = _logits(context, Canary(keep=FEW))
    error, change = ((one - dense).norm() / dense.norm() for one in (every, few))
    if not error <= tolerance:
        raise MethodBypassedError(
            f"with every token selected the logits of {loaded.name} must be full attention's within"
            f" {tolerance}, got a difference of {error:.3g}; topkbench does not support this model."
        )
    if not change > 2 * error:
        raise MethodBypassedError(
            f"with {FEW} of {PROMPT} tokens selected the logits of {loaded.name} must differ from"
            f" full attention's by more than with all of them ({error:.3g}), got {change:.3g}: what"
            " a method selects does not reach them; topkbench does not support this model."
        )
    _CHECKED.add(loaded.model)


def _tokens(context: Context) -> list[int]:
    """Return the tokens of the check."""
    vocabulary = int(context.loaded.model.config.get_text_config(decoder=True).vocab_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (PROMPT + STEPS,), generator=generator).tolist()


def _expected(context: Context) -> Tensor:
    """Return float32 ``[STEPS, vocabulary]`` as transformers computes them for all tokens at once.

    Its eager attention has what a model's attention may have: capped logits, sinks, windows.
    """
    model = context.loaded.model
    ids = torch.tensor([_tokens(context)], device=model.device)
    with using_attention(model, "eager"):
        return token_logits(model, ids, keep=torch.arange(PROMPT, PROMPT + STEPS))[0].float()


@torch.no_grad()
def _logits(context: Context, method: AnyMethod) -> Tensor:
    """Return float32 ``[STEPS, vocabulary]`` of a few decode steps with a method."""
    model, ids = context.loaded.model, _tokens(context)
    cache = DecodeCache.on(layer_devices(model), [prefill(model, ids[:PROMPT])], STEPS)
    policy = Policy(k=FEW, num_sink=0, num_recent=0, dense_layers=0)
    logits = []
    with attach(model, method, policy) as session:
        for token in ids[PROMPT:]:
            cache.extend()
            input_ids = torch.tensor([[token]], device=model.device)
            logits.append(token_logits(model, input_ids, cache, cache.positions)[0].float())
    session.require_steps(STEPS)
    return torch.stack(logits)
