"""Pages of tokens: where they lie in a row, how many there are, and which are kept.

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
        page_size: Tokens of a page.
    """

    page_size: int

    @property
    def num_pages(self) -> int:
        """Pages in use in the longest row, the open one included."""
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
        ``[B, pages * page_size]`` each, int64 slots below ``n``, and bool.
    """
    start, end = row_bounds(n, batch_size, device, kv_start, kv_len)
    places = torch.arange(-(-n // page_size) * page_size, device=device)
    slots = places + start[:, None].long()
    return slots.clamp(max=max(n - 1, 0)), slots < end[:, None]


def select_pages(scores: Tensor, index: PagedIndex, policy: Policy, impl: Impl) -> Selection:
    """Keep the ``k // page_size`` best pages, at least one.

    With sinks in the policy the first page is kept, with recents the page being filled; where the
    budget is one page, the one being filled. Older recents compete like every other token.

    Args:
        scores: ``[B, H, pages]``.
        index: Says how many pages each row has.
        policy: Budget and forced tokens.
        impl: Of ``topk_select``.
    """
    budget = pages_kept(policy.k, index.page_size)
    num_recent = min(policy.num_recent, 1)
    num_sink = min(policy.num_sink, 1, budget - num_recent)
    count = index.page_count()
    indices = topk_select(scores, budget, num_sink, num_recent, kv_len=count, impl=impl)
    return Selection(indices, unit_size=index.page_size)


def pages_kept(k: int, page_size: int) -> int:
    """Return how many pages a budget of ``k`` tokens buys: whole ones, at least one."""
    return max(1, k // page_size)


def page_tokens_read(n: int, k: int, page_size: int) -> int:
    """Return the most tokens that the pages bought by ``k`` hold, of ``n``."""
    return n if k >= n else min(pages_kept(k, page_size) * page_size, n)
