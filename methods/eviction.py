"""Base of the evicting methods, in which a dropped token is never attended to again."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from topkbench.methods.base import Geometry, IndexT, Policy, QueryIndependentMethod, kv_bytes

Mode = Literal["masked", "compact"]

SPARE = 32  # steps between two compactions of topkbench's cache


@dataclass(kw_only=True)
class Evicting(QueryIndependentMethod[IndexT]):
    """A method that drops tokens permanently.

    Attributes:
        mode: ``"masked"`` leaves all keys and values in the cache and reads only the kept ones, so
            that selection quality can be measured; ``"compact"`` frees the others, with the same
            output. Compact needs topkbench's own cache and one selection per KV head.
    """

    mode: Mode = "masked"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be masked or compact, got {self.mode!r}.")

    @property
    def compacts(self) -> bool:
        return self.mode == "compact"

    def unsupported_reason(self, geometry: Geometry, policy: Policy | None = None) -> str | None:
        reason = super().unsupported_reason(geometry, policy)
        if policy is not None and policy.head_scope == "query_head" and self.compacts:
            return reason or (
                f"head_scope must be kv_head for {self.name} with mode=compact, since a KV head's "
                "tokens are freed for all its queries, got query_head; use mode=masked."
            )
        return reason

    def tokens_in_memory(self, n: int, k: int) -> int:
        """Return how many of ``n`` tokens a budget of ``k`` leaves in memory, at most."""
        return min(n, k + SPARE) if self.compacts else n

    def moved_bytes(self, geometry: Geometry, n: int, k: int) -> int:
        """Return the bytes that a step reads for compaction, averaged over steps."""
        return kv_bytes(geometry, min(k, n)) // SPARE if self.compacts and n > k else 0


def ascending(slots: Tensor) -> Tensor:
    """Sort int32 ``[..., m]`` slots, with those of -1 at the end."""
    last = torch.iinfo(torch.int32).max
    ordered = slots.masked_fill(slots < 0, last).sort(-1).values
    return ordered.masked_fill(ordered == last, -1).to(torch.int32)
