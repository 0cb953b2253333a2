"""page_score on a CPU.

``max(q * low, q * high)`` is ``q * high`` for a positive ``q`` and ``q * low`` for a negative one,
so the bound is two dot products: the positive part of the query with the maxima and the negative
part with the minima. Both are linear in these parts: the sum over a group's queries is the bound
of the sums of their parts, as much work as for one query.
"""

from torch import Tensor

from topkbench.kernels.addresses import check_cache
from topkbench.kernels.row_scores import row_scores


def page_score(
    query_states: Tensor,
    page_min: Tensor,
    page_max: Tensor,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
    sum_group: bool,
) -> Tensor:
    """Return ``[B, Hkv, G, P]`` float32, or ``[B, Hkv, P]``; see the api."""
    if check_cache("page_min", page_min) != check_cache("page_max", page_max):
        raise TypeError(
            f"page_max must have page_min's dtype {page_min.dtype}, got {page_max.dtype}."
        )
    query = query_states.float().contiguous()
    above, below = query.clamp(min=0.0), query.clamp(max=0.0)
    if sum_group:
        above, below = above.sum(2, keepdim=True), below.sum(2, keepdim=True)
    bound = row_scores(above, page_max, kv_start, kv_len, 256, below, page_min)
    return bound[:, :, 0] if sum_group else bound
