"""Pages of consecutive tokens: their slots, their number, and their selection.

Page ``p`` of a row starts at its first token, ``kv_start + p * page_size``, so that a left-padded
row has the pages of an unpadded one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from topkbench.kernels.dispatch import Impl
from topkbench.kernels.topk_select.api import topk_select
from topkbench.methods.policy import Policy
from topkbench.methods.states import Index, Selection, row_bounds


@dataclass(kw_only=True)
class PagedIndex(Index):
    """An index whose units are pages.

    Attributes:
        page_size: Tokens per page.
    """

    page_size: int

    @property
    def num_pages(self) -> int:
        """Pages in use in the longest row, including the one being filled."""
        return -(-self.length // self.page_size)

    def page_count(self) -> Tensor | None:
        """Return int32 ``[B]`` pages in use in each row; None if all rows have ``num_pages``."""
        if self.kv_start is None and self.kv_len is None:
            return None
        end = self.length if self.kv_len is None else self.kv_len
        tokens = end - self.kv_start if self.kv_start is not None else self.kv_len
        assert isinstance(tokens, Tensor)
        count = torch.div(tokens + self.page_size - 1, self.page_size, rounding_mode="floor")
        return count.to(torch.int32)


def page_slots(
    n: int,
    batch_size: int,
    page_size: int,
    device: torch.device,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the slots of each row's pages, and which of them hold a token.

    Returns:
        int64 slots below ``n`` and a bool mask, each ``[B, pages * page_size]``.
    """
    start, end = row_bounds(n, batch_size, device, kv_start, kv_len)
    positions = torch.arange(-(-n // page_size) * page_size, device=device)
    slots = positions + start[:, None].long()
    return slots.clamp(max=max(n - 1, 0)), slots < end[:, None]


def select_pages(scores: Tensor, index: PagedIndex, policy: Policy, impl: Impl) -> Selection:
    """Keep the ``k // page_size`` best pages, at least one.

    If the policy has sinks the first page is always kept, if it has recents the page being filled;
    with a budget of one page it is the page being filled. Older recents compete like other tokens.

    Args:
        scores: ``[B, H, pages]``.
        index: The index, with the number of pages of each row.
        policy: Budget and forced tokens.
        impl: Implementation of ``topk_select``.
    """
    budget = pages_kept(policy.k, index.page_size)
    num_recent = min(policy.num_recent, 1)
    num_sink = min(policy.num_sink, 1, budget - num_recent)
    count = index.page_count()
    indices = topk_select(scores, budget, num_sink, num_recent, kv_len=count, impl=impl)
    return Selection(indices, unit_size=index.page_size)


def pages_kept(k: int, page_size: int) -> int:
    """Return how many whole pages fit into a budget of ``k`` tokens, at least one."""
    return max(1, k // page_size)
