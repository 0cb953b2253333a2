"""full_attention in Triton: split-K, so that a decode step of few heads occupies the whole GPU.

One program processes a part of a KV head's tokens. The queries of the group form one tile of at
least 16 rows, so that each tile of keys and values is loaded once for all of them. The program
keeps a running maximum, denominator and weighted sum (online softmax), and a second kernel merges
the parts by their log-sum-exp. The valid range is divided into parts on the device.

It provides a dense decode step as the baseline on machines that have only torch and Triton, where
torch's kernels may not split the keys.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from topkbench.kernels.split_k import merge, store_part, tanh
from topkbench.kernels.tiles import (
    check_readable,
    on_device_of,
    padded,
    product_dtype,
    valid_range,
)

# Least number of tokens per part.
_PART = 256
_MERGED = 32  # parts merged at a time; there are more parts than in sparse_attention


@dataclass(frozen=True)
class Blocks:
    """Sizes of the pieces of work, which affect results only in their rounding.

    Attributes:
        tile_bytes: Bytes of keys read at a time, and as many of values.
        warps: Warps per program.
        stages: Tiles in flight at once.
        programs: Number of programs; about four waves on a large GPU.
    """

    tile_bytes: int = 2**14
    warps: int = 4
    stages: int = 3
    programs: int = 1024


DEFAULT = Blocks()


def full_attention(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    scale: float,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    blocks: Blocks = DEFAULT,
) -> Tensor:
    """Return ``[B, Hq, dv]``; see the api.

    Raises:
        ValueError: If keys or values have more than 256 channels.
        TypeError: If a dtype is not float32, bfloat16 or float16.
    """
    for argument, states in (
        ("query_states", query_states),
        ("key_states", key_states),
        ("value_states", value_states),
    ):
        check_readable(argument, states)
    batch_size, num_heads, head_dim = query_states.shape
    widest = max(head_dim, value_states.shape[3])
    if widest > 256:
        raise ValueError(
            f"head_dim must be at most 256 for backend='triton', got {widest}; use backend='sdpa'."
        )
    _, num_kv_heads, num_slots, _ = key_states.shape
    device, rows = query_states.device, batch_size * num_kv_heads
    value_dim = value_states.shape[3]
    out = query_states.new_empty(batch_size, num_heads, value_dim)
    if out.numel() == 0:
        return out
    group, padded_dim = num_heads // num_kv_heads, padded(head_dim)
    parts = max(1, min(-(-blocks.programs // rows), -(-num_slots // _PART)))
    means = torch.empty(parts, batch_size, num_heads, value_dim, device=device)
    part_lse = torch.empty(parts, batch_size, num_heads, device=device)
    lse = torch.empty(batch_size, num_heads, device=device)
    tile = max(16, min(256, blocks.tile_bytes // (padded(widest) * key_states.element_size())))
    with on_device_of(out):
        _attend_part[(parts, rows)](
            query_states.contiguous(), key_states, value_states, means, part_lse, kv_start, kv_len,
            float(scale), float(softcap or 0.0), *key_states.stride(), *value_states.stride(),
            num_kv_heads, num_slots, rows * group,
            GROUP=group, HEAD_DIM=head_dim, VALUE_DIM=value_dim, SOFTCAP=softcap is not None,
            PADDED_GROUP=padded(group), PADDED_DIM=padded_dim,
            PADDED_VALUE_DIM=padded(value_dim), TILE=tile,
            PRODUCT=product_dtype(query_states, key_states, value_states),
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        merge(means, part_lse, sinks, out, lse, _MERGED)
    return out


@triton.jit(do_not_specialize=["num_slots", "num_queries"])
def _attend_part(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    means: tl.tensor,
    lse: tl.tensor,
    kv_start: tl.tensor,
    kv_len: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    key_batch_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_slot_stride: tl.tensor,
    key_dim_stride: tl.tensor,
    value_batch_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_slot_stride: tl.tensor,
    value_dim_stride: tl.tensor,
    num_kv_heads: tl.tensor,
    num_slots: tl.tensor,
    num_queries: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    TILE: tl.constexpr,
    PRODUCT: tl.constexpr,
) -> None:
    """Attend from the queries of one KV head to one part of its tokens."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // num_kv_heads, row % num_kv_heads
    start, end = valid_range(kv_start, kv_len, batch, num_slots)
    # Whole tiles for every part.
    length = tl.cdiv(tl.cdiv(end - start, tl.num_programs(0)), TILE) * TILE
    first_token = start + part * length
    last_token = tl.minimum(first_token + length, end)

    query = tl.arange(0, PADDED_GROUP)
    dims, value_dims = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_VALUE_DIM)
    is_query, is_dim = query < GROUP, dims < HEAD_DIM
    query_tile = tl.load(
        queries + (row * GROUP + query[:, None]) * HEAD_DIM + dims[None, :],
        mask=is_query[:, None] & is_dim[None, :],
        other=0.0,
    ).to(PRODUCT)
    head_keys = keys + batch * key_batch_stride + head * key_head_stride
    head_values = values + batch * value_batch_stride + head * value_head_stride

    maximum = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    denominator = tl.zeros([PADDED_GROUP], tl.float32)
    sums = tl.zeros([PADDED_GROUP, PADDED_VALUE_DIM], tl.float32)
    for first in range(first_token, last_token, TILE):
        tokens = first + tl.arange(0, TILE)
        is_token = tokens < last_token
        slots = tokens.to(tl.int64)
        is_read = is_token[:, None] & is_dim[None, :]
        is_value = is_token[:, None] & (value_dims < VALUE_DIM)[None, :]
        key_tile = tl.load(
            head_keys + slots[:, None] * key_slot_stride + dims[None, :] * key_dim_stride,
            mask=is_read,
            other=0.0,
        ).to(PRODUCT)
        value_tile = tl.load(
            head_values
            + slots[:, None] * value_slot_stride
            + value_dims[None, :] * value_dim_stride,
            mask=is_value,
            other=0.0,
        ).to(PRODUCT)
        logits = tl.dot(query_tile, tl.trans(key_tile), input_precision="ieee") * scale
        if SOFTCAP:
            logits = softcap * tanh(logits / softcap)
        logits = tl.where(is_token[None, :], logits, float("-inf"))
        # A tile holds at least one token, so the maximum is finite.
        raised = tl.maximum(maximum, tl.max(logits, axis=1))
        weights = tl.exp(logits - raised[:, None])
        shrink = tl.exp(maximum - raised)
        denominator = denominator * shrink + tl.sum(weights, axis=1)
        sums = sums * shrink[:, None]
        sums = tl.dot(weights.to(PRODUCT), value_tile, sums, input_precision="ieee")
        maximum = raised

    # Parts are ordered [part, B, Hq], which is [part, row, GROUP].
    place = part.to(tl.int64) * num_queries + row * GROUP + query
    store_part(means, lse, place, is_query, value_dims, maximum, denominator, sums, VALUE_DIM)
