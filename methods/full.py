"""Full attention over every cached token, the baseline of all comparisons."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from topkbench.kernels.full_attention.api import BACKENDS, Backend, full_attention
from topkbench.methods.base import (
    CacheView,
    Geometry,
    Index,
    Policy,
    PrefillInputs,
    StageTimer,
    StepResult,
    TopKMethod,
    kv_bytes,
)


@dataclass(kw_only=True)
class FullAttention(TopKMethod):
    """Attend to everything.

    Attributes:
        backend: ``"sdpa"``, or on CUDA ``"triton"``, ``"flash_attn"``, ``"flash_attn_3"`` or
            ``"flashinfer"``. It is used for timing only; answers always come from ``"sdpa"``.

    Compared with the authors' code:
        None to compare with: it is torch's attention, or that of the named package.
    """

    name: ClassVar[str] = "full"
    selects: ClassVar[bool] = False

    backend: Backend = "sdpa"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}.")

    def for_answers(self) -> Self:
        return replace(self, backend="sdpa")  # answers must not depend on installed packages

    def build_index(self, prefill: PrefillInputs) -> Index:
        return Index.of(prefill)

    def append(self, index: Index, key_states: Tensor, value_states: Tensor) -> None:
        index.advance()

    def score(self, encoded: Tensor, index: Index) -> None:
        return None

    def step(
        self,
        query_states: Tensor,
        index: Index | None,
        cache: CacheView,
        policy: Policy,
        scale: float,
        softcap: float | None = None,
        watch: StageTimer | None = None,
    ) -> StepResult:
        """Attend to the whole cache; ``index`` and ``policy`` are ignored."""
        out = full_attention(
            query_states.flatten(1, 2),
            cache.key_states,
            cache.value_states,
            scale,
            kv_start=cache.kv_start,
            kv_len=cache.kv_len,
            softcap=softcap,
            backend=self.backend,
        )
        return StepResult(out, None, None, None)

    def bytes_read_per_step(self, geometry: Geometry, n: int, k: int) -> int:
        return kv_bytes(geometry, n)
