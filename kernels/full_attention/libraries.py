"""Full attention by the CUDA libraries that serving systems use."""

import importlib
from types import ModuleType

import torch
from torch import Tensor


def flash_attn(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    scale: float,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Return ``[B, Hq, d]`` from FlashAttention's decoding kernel; float16 or bfloat16.

    Source:
        FlashAttention-2 (arXiv:2307.08691), ``flash_attn_with_kvcache``.
    """
    library = _library("flash_attn", "flash-attn")
    # The library wants lengths wherever it is told of left padding.
    if kv_start is not None and kv_len is None:
        kv_len = torch.full_like(kv_start, key_states.shape[2])
    out: Tensor = library.flash_attn_with_kvcache(
        query_states[:, None],
        key_states.transpose(1, 2),
        value_states.transpose(1, 2),
        cache_seqlens=kv_len,
        cache_leftpad=kv_start,
        softmax_scale=scale,
        softcap=softcap or 0.0,
    )
    return out[:, 0]


def flashinfer(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    scale: float,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Return ``[B, Hq, d]`` from FlashInfer's single-request decoding kernel, row by row.

    Its batched kernel wants a paged cache, which ours is not. Ranges are read on the host, one
    synchronisation a call.

    Source:
        FlashInfer (arXiv:2501.01005), ``single_decode_with_kv_cache``.
    """
    library = _library("flashinfer", "flashinfer-python")
    batch_size, num_slots = len(query_states), key_states.shape[2]
    starts = [0] * batch_size if kv_start is None else kv_start.tolist()
    ends = [num_slots] * batch_size if kv_len is None else kv_len.tolist()
    out = torch.zeros_like(query_states)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if start < end:
            out[row] = library.single_decode_with_kv_cache(
                query_states[row],
                key_states[row, :, start:end],
                value_states[row, :, start:end],
                kv_layout="HND",
                sm_scale=scale,
                logits_soft_cap=softcap,
            )
    return out


def _library(module: str, distribution: str) -> ModuleType:
    """Import an optional library, or say in one sentence that it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"backend={module!r} needs the package {distribution}, which cannot be imported "
            f"({error}); install it or use backend='sdpa'."
        ) from None
