"""An upper bound on the logits inside a page, from the page's channel-wise extremes."""

from torch import Tensor

from topkbench.kernels.dispatch import Impl, implementation
from topkbench.kernels.page_score import reference
from topkbench.kernels.shapes import check_device, check_floating, check_range, check_shape


def page_score(
    query_states: Tensor,
    page_min: Tensor,
    page_max: Tensor,
    kv_start: Tensor | None = None,
    kv_len: Tensor | None = None,
    impl: Impl = "auto",
    *,
    sum_group: bool = False,
) -> Tensor:
    """Bound each page's largest logit: ``sum_j max(q_j * min_j, q_j * max_j)``.

    Args:
        query_states: ``[B, Hkv, G, d]``.
        page_min: ``[B, Hkv, P, d]`` smallest key value of each channel, ``page_min <= page_max``.
        page_max: ``[B, Hkv, P, d]`` largest key value of each channel.
        kv_start: ``[B]`` int32 first valid page of each row, or None for 0.
        kv_len: ``[B]`` int32 end of each row's valid pages, or None for ``P``.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``; never falls back.
        sum_group: Return the sum of the bounds over each group's queries.

    Returns:
        ``[B, Hkv, G, P]`` float32, or ``[B, Hkv, P]`` if summed, unscaled; -inf outside the valid
        range.

    Raises:
        ValueError: If a shape or device does not fit.
        TypeError: If an argument is not floating point.

    Source:
        Quest (arXiv:2406.10774), section 3.3.
    """
    check_shape("query_states", query_states, "[B, Hkv, G, d]", None, None, None, None)
    batch_size, num_heads, _, head_dim = query_states.shape
    check_shape("page_min", page_min, "[B, Hkv, P, d]", batch_size, num_heads, None, head_dim)
    num_pages = page_min.shape[2]
    sizes = (batch_size, num_heads, num_pages, head_dim)
    check_shape("page_max", page_max, "[B, Hkv, P, d]", *sizes)
    device = query_states.device
    check_floating("query_states", query_states)
    for argument, tensor in (("page_min", page_min), ("page_max", page_max)):
        check_floating(argument, tensor)
        check_device(argument, tensor, device)
    check_range(kv_start, kv_len, batch_size, device)
    run = implementation(reference.page_score, impl, device, page_min)
    return run(query_states, page_min, page_max, kv_start, kv_len, sum_group)
