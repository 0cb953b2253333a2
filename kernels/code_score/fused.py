"""code_score in Triton: codes and tables are read in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topkbench.kernels.tiles import on_device_of, valid_range

_TILE = 256  # keys in one program


def code_score(
    tables: Tensor, key_codes: Tensor, kv_start: Tensor | None, kv_len: Tensor | None
) -> Tensor:
    """Return ``[B, Hkv, G, n]`` float32; see the api."""
    batch_size, num_heads, parts, group, count = tables.shape
    num_slots = key_codes.shape[2]
    out = torch.empty(batch_size, num_heads, group, num_slots, device=tables.device)
    if out.numel() == 0:
        return out
    batch_stride, head_stride, slot_stride, part_stride = key_codes.stride()
    with on_device_of(out):
        _score[(triton.cdiv(num_slots, _TILE), batch_size * num_heads)](
            tables.contiguous(), key_codes, out, kv_start, kv_len,
            batch_stride, head_stride, num_heads, num_slots,
            SLOT_STRIDE=slot_stride, PART_STRIDE=part_stride,
            PARTS=parts, GROUP=group, COUNT=count, TILE=_TILE,
        )  # fmt: skip
    return out


# The first two grow with the cache's capacity.
@triton.jit(do_not_specialize=("batch_stride", "head_stride", "num_slots"))
def _score(
    tables: tl.tensor,
    key_codes: tl.tensor,
    out: tl.tensor,
    kv_start: tl.tensor,
    kv_len: tl.tensor,
    batch_stride: tl.tensor,
    head_stride: tl.tensor,
    num_heads: tl.tensor,
    num_slots: tl.tensor,
    SLOT_STRIDE: tl.constexpr,
    PART_STRIDE: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // num_heads, row % num_heads
    start, end = valid_range(kv_start, kv_len, batch, num_slots)
    slots = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = (slots >= start) & (slots < end)
    offsets = slots.to(tl.int64)
    keys = key_codes + batch * batch_stride + head * head_stride + offsets * SLOT_STRIDE
    # The tables are small and stay in the first-level cache; every query but the first reads the
    # codes from there as well.
    for query in range(GROUP):
        scores = tl.zeros([TILE], tl.float32)
        for part in tl.static_range(PARTS):
            codes = tl.load(keys + part * PART_STRIDE, mask=valid, other=0).to(tl.int32)
            table = tables + ((row * PARTS + part) * GROUP + query) * COUNT
            scores += tl.load(table + codes, mask=valid, other=0.0)
        tl.store(
            out + (row * GROUP + query) * num_slots + offsets,
            tl.where(valid, scores, float("-inf")),
            mask=slots < num_slots,
        )
