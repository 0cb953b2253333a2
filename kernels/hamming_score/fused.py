"""hamming_score in Triton: one pass over the codes, in reads of 16 bytes.

Scoring a key against each of ``G`` queries would count bits ``G`` times per word. If ``c`` of the
queries have a bit set, a key's bit adds ``min(c, G - c)`` to the distance in either case, plus
``|G - 2c|`` if it differs from the majority's, so

    sum_g ham_g = base + unit * sum_j 2^j * popcount((key ^ majority) & plane_j)

where ``plane_j`` holds the j-th binary digit of the weights ``|G - 2c| / unit``, and ``unit`` is 2
for an even ``G``, whose weights are even, else 1. Four queries take two counts per word, sixteen
take four. Every program computes the planes itself, from the few words of its head's queries.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from topkbench.kernels.shapes import count_dtype
from topkbench.kernels.tiles import on_device_of, popcount, valid_range

# Words of keys per program: 16 KiB, 128 bytes for each of 128 threads.
_TILE_WORDS = 4096


def hamming_score(
    query_codes: Tensor,
    key_codes: Tensor,
    key_norms: Tensor | None,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
) -> Tensor:
    """Return ``[B, Hkv, n]`` int16 or int32, or float32 with norms; see the api."""
    batch_size, num_heads, num_slots, words = key_codes.shape
    group = query_codes.shape[2]
    dtype = count_dtype(group, words) if key_norms is None else torch.float32
    out = torch.empty(batch_size, num_heads, num_slots, dtype=dtype, device=key_codes.device)
    if out.numel() == 0:
        return out
    padded_words = triton.next_power_of_2(words)
    tile = max(64, _TILE_WORDS // padded_words)
    batch_stride, head_stride, slot_stride, word_stride = key_codes.stride()
    norm_strides = (0, 0, 0) if key_norms is None else key_norms.stride()
    with on_device_of(out):
        _score[(triton.cdiv(num_slots, tile), batch_size * num_heads)](
            query_codes.contiguous(), key_codes, key_norms, out, kv_start, kv_len,
            batch_stride, head_stride, *norm_strides, num_heads, num_slots,
            SLOT_STRIDE=slot_stride, WORD_STRIDE=word_stride,
            ALIGNED=math.gcd(batch_stride, head_stride, 4),
            GROUP=group, WORDS=words, PADDED_WORDS=padded_words,
            PLANES=(group if group % 2 else group // 2).bit_length(), TILE=tile,
        )  # fmt: skip
    return out


@triton.jit(
    do_not_specialize=(
        "num_slots",
        # These grow with the cache's capacity; ALIGNED promises their alignment instead.
        "key_batch_stride",
        "key_head_stride",
        "norm_batch_stride",
        "norm_head_stride",
    )
)
def _score(
    query_codes: tl.tensor,
    key_codes: tl.tensor,
    key_norms: tl.tensor,
    out: tl.tensor,
    kv_start: tl.tensor,
    kv_len: tl.tensor,
    key_batch_stride: tl.tensor,
    key_head_stride: tl.tensor,
    norm_batch_stride: tl.tensor,
    norm_head_stride: tl.tensor,
    norm_slot_stride: tl.tensor,
    num_heads: tl.tensor,
    num_slots: tl.tensor,
    SLOT_STRIDE: tl.constexpr,
    WORD_STRIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    PADDED_WORDS: tl.constexpr,
    PLANES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // num_heads, row % num_heads
    start, end = valid_range(kv_start, kv_len, batch, num_slots)
    slots = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = (slots >= start) & (slots < end)
    offsets = slots.to(tl.int64)
    words = tl.arange(0, PADDED_WORDS)
    # With the last strides as constants and this promise, LLVM may read 16 bytes at a time.
    first = tl.multiple_of(batch * key_batch_stride + head * key_head_stride, ALIGNED)
    keys = tl.load(
        key_codes + first + offsets[:, None] * SLOT_STRIDE + words[None, :] * WORD_STRIDE,
        mask=valid[:, None] & (words < WORDS)[None, :],
        other=0,
    )

    # Number of queries that have each bit set: [PADDED_WORDS, 32]. Padding words are 0.
    bits = tl.arange(0, 32)[None, :]
    ones = tl.zeros([PADDED_WORDS, 32], tl.int32)
    for query in tl.static_range(GROUP):
        code = tl.load(
            query_codes + (row * GROUP + query) * WORDS + words, mask=words < WORDS, other=0
        )
        ones += (code[:, None] >> bits) & 1
    base = tl.sum(tl.sum(tl.minimum(ones, GROUP - ones), axis=1), axis=0)
    majority = tl.sum((2 * ones > GROUP).to(tl.int32) << bits, axis=1)
    weights = tl.abs(GROUP - 2 * ones)
    unit: tl.constexpr = 2 - GROUP % 2
    weights = weights // unit

    differing = keys ^ majority[None, :]
    distance = tl.zeros([TILE], tl.int32)
    for plane in tl.static_range(PLANES):
        counted = tl.sum(((weights >> plane) & 1) << bits, axis=1)
        distance += tl.sum(popcount(differing & counted[None, :]), axis=1) << plane
    scores = GROUP * 32 * WORDS - 2 * (base + unit * distance)

    place = out + row * num_slots + offsets
    if key_norms is None:
        absent: tl.constexpr = -(2 ** (out.dtype.element_ty.primitive_bitwidth - 1))
        counted = tl.where(valid, scores, absent).to(out.dtype.element_ty)
        tl.store(place, counted, mask=slots < num_slots)
    else:
        norms = tl.load(
            key_norms
            + (batch * norm_batch_stride + head * norm_head_stride)
            + offsets * norm_slot_stride,
            mask=valid,
            other=0.0,
        )
        if WORDS == PADDED_WORDS:  # multiplying by a power of two's reciprocal is exact
            share = scores.to(tl.float32) * (1.0 / (32 * WORDS))
        else:  # IEEE division, not the GPU's faster approximation: ties must stay ties
            share = tl.div_rn(scores.to(tl.float32), tl.full([TILE], 32 * WORDS, tl.float32))
        tl.store(place, tl.where(valid, share * norms, float("-inf")), mask=slots < num_slots)
