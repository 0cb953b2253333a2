"""Full attention over every cached token, the baseline of all comparisons."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from topkbench.kernels.full_attention.api import (
    BACKENDS,
    Backend,
    full_attention,
    resolve_backend,
)
from topkbench.methods.base import (
    Geometry,
    Index,
    PrefillInputs,
    QueryIndependentMethod,
    Ranking,
    Selection,
    StageTimer,
    StepContext,
    StepResult,
    kv_bytes,
)


@dataclass(kw_only=True)
class FullAttention(QueryIndependentMethod[Index]):
    """Attend to everything.

    Attributes:
        backend: ``"sdpa"``, ``"auto"`` (as `resolve_backend` chooses), on a CPU ``"cpu"``, or on
            CUDA ``"triton"``, ``"flash_attn"``, ``"flash_attn_3"`` or ``"flashinfer"``. It is used
            for timing only; answers always come from ``"sdpa"``.

    Compared with the authors' code:
        None to compare with: it is torch's attention, or that of the named package.
    """

    name: ClassVar[str] = "full"
    selects: ClassVar[bool] = False

    backend: Backend = "sdpa"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}.")

    def on(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Return full attention with the backend that runs on a device, in place of ``auto``."""
        return replace(self, backend=resolve_backend(self.backend, device, dtype))

    def build_index(self, prefill: PrefillInputs) -> Index:
        return Index.of(prefill)

    def append(self, index: Index, key_states: Tensor, value_states: Tensor) -> None:
        index.advance()

    def select(self, index: Index, context: StepContext) -> Selection:
        return Selection.everything(context.cache)

    def step(
        self,
        index: Index | None,
        context: StepContext,
        watch: StageTimer | None = None,
        given: Ranking[None] | None = None,
    ) -> StepResult:
        """Attend to the whole cache; there is nothing to select, and no index is needed."""
        cache = context.cache
        out = full_attention(
            context.query_states.flatten(1, 2),
            cache.key_states,
            cache.value_states,
            context.scale,
            kv_start=cache.kv_start,
            kv_len=cache.kv_len,
            softcap=context.softcap,
            sinks=context.sinks,
            backend=self.backend,
        )
        return StepResult(out, None, None)

    def bytes_read(self, geometry: Geometry, n: int, read: int, scanned: int | None = None) -> int:
        return kv_bytes(geometry, n)
