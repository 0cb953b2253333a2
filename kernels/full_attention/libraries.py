"""Full attention by the CUDA libraries of serving systems."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

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
    library = imported("flash_attn", "flash-attn")
    # The library needs lengths if there is left padding.
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


def flash_attn_3(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    scale: float,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Return ``[B, Hq, d]`` from FlashAttention-3's decoding kernel; float16 or bfloat16, Hopper.

    Source:
        FlashAttention-3 (arXiv:2407.08608), ``flash_attn_interface.flash_attn_with_kvcache``.
    """
    library = imported("flash_attn_interface", "flash-attn-3")
    if kv_start is not None and kv_len is None:
        kv_len = torch.full_like(kv_start, key_states.shape[2])
    found = library.flash_attn_with_kvcache(
        query_states[:, None],
        key_states.transpose(1, 2),
        value_states.transpose(1, 2),
        cache_seqlens=kv_len,
        cache_leftpad=kv_start,
        softmax_scale=scale,
        softcap=softcap or 0.0,
    )
    # Its first releases also return the log-sum-exp.
    out: Tensor = found[0] if isinstance(found, tuple) else found
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

    Its batched kernel needs a paged cache, which ours is not. Valid ranges are read on the host,
    with one synchronisation per call.

    Source:
        FlashInfer (arXiv:2501.01005), ``single_decode_with_kv_cache``.
    """
    library = imported("flashinfer", "flashinfer-python")
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


class FlashInferBatch:
    """FlashInfer's batched decoding kernel over a paged copy of the cache, planned once.

    A call reads nothing back to the host, so that it can be captured in a CUDA graph.

    Args:
        query_states: ``[B, Hq, d]``, read again at each call.
        key_states: ``[B, Hkv, n, d]``, ``n`` a multiple of ``page_size``; copied into pages.
        value_states: ``[B, Hkv, n, d]``, likewise.
        scale: Factor on the dot products.
        page_size: Tokens of a page.

    Raises:
        ValueError: If FlashInfer is not installed, or ``n`` is no multiple of ``page_size``.

    Source:
        FlashInfer (arXiv:2501.01005), ``BatchDecodeWithPagedKVCacheWrapper``, in the matrix units.
    """

    def __init__(
        self,
        query_states: Tensor,
        key_states: Tensor,
        value_states: Tensor,
        scale: float,
        page_size: int = 16,
    ) -> None:
        library = imported("flashinfer", "flashinfer-python")
        batch_size, num_kv_heads, num_slots, head_dim = key_states.shape
        if num_slots % page_size:
            raise ValueError(f"n must be a multiple of page_size={page_size}, got {num_slots}.")
        pages, device = num_slots // page_size, key_states.device

        def paged(states: Tensor) -> Tensor:
            parts = states.unflatten(2, (pages, page_size)).transpose(1, 2)
            return parts.reshape(batch_size * pages, num_kv_heads, page_size, head_dim)

        self.query_states = query_states
        self.cache = (paged(key_states), paged(value_states))
        numbers: dict[str, Any] = {"dtype": torch.int32, "device": device}
        offsets = torch.arange(batch_size + 1, **numbers) * pages
        indices = torch.arange(batch_size * pages, **numbers)
        last = torch.full((batch_size,), page_size, **numbers)
        self.wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(2**28, dtype=torch.uint8, device=device),
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=torch.empty_like(offsets),
            paged_kv_indices_buffer=torch.empty_like(indices),
            paged_kv_last_page_len_buffer=torch.empty_like(last),
        )
        self.wrapper.plan(
            *(offsets, indices, last, query_states.shape[1], num_kv_heads, head_dim, page_size),
            pos_encoding_mode="NONE",
            q_data_type=query_states.dtype,
            kv_data_type=key_states.dtype,
            sm_scale=scale,
        )

    def __call__(self) -> Tensor:
        """Return ``[B, Hq, d]``."""
        out: Tensor = self.wrapper.run(self.query_states, self.cache)
        return out


def library_version(module: str, distribution: str) -> str:
    """Return an optional library's version.

    Raises:
        ValueError: If it cannot be imported; the message has the reason.
    """
    library = imported(module, distribution)
    try:
        return version(distribution)
    except PackageNotFoundError:
        return str(getattr(library, "__version__", "of unknown version"))


def imported(module: str, distribution: str) -> ModuleType:
    """Import an optional library, or raise a ValueError of one sentence if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"this backend needs the package {distribution}, which cannot be imported "
            f"({error}); install it or use backend='sdpa'."
        ) from None
