"""lowrank_score on a CPU: each key is read once for all queries of its group."""

from torch import Tensor

from topkbench.kernels.addresses import check_cache
from topkbench.kernels.row_scores import row_scores


def lowrank_score(
    query: Tensor, keys: Tensor, kv_start: Tensor | None, kv_len: Tensor | None
) -> Tensor:
    """Return ``[B, Hkv, G, n]`` float32; see the api."""
    check_cache("keys", keys)
    return row_scores(query.float().contiguous(), keys, kv_start, kv_len, block=512)
