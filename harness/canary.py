"""A check before a model's first cell: does a selection change the logits?

The check decodes a few steps with a canary, a method whose selections have a known effect.
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
from topkbench.models.compat import layer_devices, partial_layers, token_logits
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

    Selecting all tokens must give full attention's logits, and selecting two tokens must not. That
    a method's answers equal full attention's would not show this, since a good method's do too.

    Args:
        context: The cell's context; its method is not used.

    Raises:
        MethodBypassedError: If selecting a few tokens does not change the logits, or selecting all
            tokens does.
        NotFiniteError: If full attention's logits are not finite.
    """
    loaded = context.loaded
    all_slide = len(partial_layers(loaded.model)) == context.geometry.num_layers
    if loaded.model in _CHECKED or all_slide:
        return
    dense = _logits(context, context.full)
    if not dense.isfinite().all():
        raise NotFiniteError(
            f"the logits of {loaded.name} must be finite, got infinity or NaN in"
            f" {str(loaded.model.dtype).removeprefix('torch.')}; use dtype=float32, or check the"
            " weights."
        )
    every = _logits(context, Canary())
    few = _logits(context, Canary(keep=FEW))
    tolerance = TOLERANCE.get(loaded.model.dtype, 5e-2)
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


@torch.no_grad()
def _logits(context: Context, method: AnyMethod) -> Tensor:
    """Return float32 ``[STEPS, vocabulary]`` of a few decode steps with a method."""
    model = context.loaded.model
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (PROMPT + STEPS,), generator=generator).tolist()
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
