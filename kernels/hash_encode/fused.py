"""hash_encode in Triton: projection, signs and packing in one kernel, which may write the cache.

A decode step hashes a few queries and one new key with the same weight. ``encode_step`` puts them
into one tile, so that the weight is read once, and writes the key's code and norm into the cache.
The slot is read on the device, so that a step captured in a CUDA graph works for every length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topkbench.kernels.tiles import check_readable, on_device_of, padded, product_dtype

# States, bits and channels per matrix product, for a prompt. In a decode step, which has few
# states, each program computes one word, to occupy as much of the GPU as possible.
_STATES, _BITS, _CHANNELS = 64, 64, 32


def hash_encode(states: Tensor, hash_weight: Tensor) -> Tensor:
    """Return ``[B, Hkv, n, rbit // 32]`` int32; see the api."""
    check_readable("states", states)
    check_readable("hash_weight", hash_weight)
    codes = _empty_codes(states, hash_weight)
    _launch(states, hash_weight, codes)
    return codes


def encode_step(
    query_states: Tensor,
    key_states: Tensor,
    hash_weight: Tensor,
    key_codes: Tensor,
    key_norms: Tensor | None,
    kv_len: Tensor | None,
) -> Tensor:
    """Return the queries' codes ``[B, Hkv, G, rbit // 32]`` and write the key's; see the api."""
    for argument, tensor in (
        ("query_states", query_states),
        ("key_states", key_states),
        ("hash_weight", hash_weight),
    ):
        check_readable(argument, tensor)
    codes = _empty_codes(query_states, hash_weight)
    _launch(query_states, hash_weight, codes, key_states, key_codes, key_norms, kv_len)
    return codes


def _empty_codes(states: Tensor, hash_weight: Tensor) -> Tensor:
    words = hash_weight.shape[2] // 32
    return torch.empty(*states.shape[:3], words, dtype=torch.int32, device=states.device)


def _launch(
    states: Tensor,
    hash_weight: Tensor,
    codes: Tensor,
    key_states: Tensor | None = None,
    key_codes: Tensor | None = None,
    key_norms: Tensor | None = None,
    kv_len: Tensor | None = None,
) -> None:
    """Encode the states into ``codes`` and, if given, the newest key into the cache."""
    batch_size, num_heads, num_states, head_dim = states.shape
    rbit = hash_weight.shape[2]
    num_rows = num_states if key_states is None else num_states + 1
    if batch_size * num_heads * num_rows == 0:
        return
    few = num_rows <= _STATES // 2
    tile, bits = (padded(num_rows), 32) if few else (_STATES, min(_BITS, rbit & -rbit))
    inputs = [states, hash_weight]
    key_strides: tuple[int, ...] = (0, 0, 0)
    code_strides: tuple[int, ...] = (0, 0, 0, 0)
    norm_strides: tuple[int, ...] = (0, 0, 0)
    capacity = 0
    if key_states is not None and key_codes is not None:
        inputs.append(key_states)
        batch_stride, head_stride, _, dim_stride = key_states.stride()
        key_strides, code_strides = (batch_stride, head_stride, dim_stride), key_codes.stride()
        capacity = key_codes.shape[2]
    if key_norms is not None:
        norm_strides = key_norms.stride()
    with on_device_of(codes):
        _encode[(triton.cdiv(num_rows, tile) * (rbit // bits), batch_size * num_heads)](
            states, hash_weight, codes, key_states, key_codes, key_norms, kv_len,
            *states.stride(), *hash_weight.stride(), *key_strides, *code_strides, *norm_strides,
            num_heads, num_states, capacity,
            HEAD_DIM=head_dim, WORDS=rbit // 32, TILE=tile, BITS=bits,
            CHANNELS=min(_CHANNELS, padded(head_dim)), PRODUCT=product_dtype(*inputs),
        )  # fmt: skip


@triton.jit(
    do_not_specialize=(
        "num_states",
        "capacity",
        # These grow with the cache's capacity.
        "code_batch_stride",
        "code_head_stride",
        "norm_batch_stride",
        "norm_head_stride",
    )
)
def _encode(
    states: tl.tensor,
    weights: tl.tensor,
    codes: tl.tensor,
    new_keys: tl.tensor,
    key_codes: tl.tensor,
    key_norms: tl.tensor,
    kv_len: tl.tensor,
    state_batch_stride: tl.tensor,
    state_head_stride: tl.tensor,
    state_stride: tl.tensor,
    state_dim_stride: tl.tensor,
    weight_head_stride: tl.tensor,
    weight_dim_stride: tl.tensor,
    weight_bit_stride: tl.tensor,
    new_batch_stride: tl.tensor,
    new_head_stride: tl.tensor,
    new_dim_stride: tl.tensor,
    code_batch_stride: tl.tensor,
    code_head_stride: tl.tensor,
    code_slot_stride: tl.tensor,
    code_word_stride: tl.tensor,
    norm_batch_stride: tl.tensor,
    norm_head_stride: tl.tensor,
    norm_slot_stride: tl.tensor,
    num_heads: tl.tensor,
    num_states: tl.tensor,
    capacity: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRODUCT: tl.constexpr,
) -> None:
    """Encode a tile of a head's states; the new key, if any, is the state after the last."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // num_heads, row % num_heads
    # Programs that share states are adjacent, so that they read these from the second-level cache.
    chunks: tl.constexpr = WORDS * 32 // BITS
    state = tl.program_id(0) // chunks * TILE + tl.arange(0, TILE)
    first_bit = tl.program_id(0) % chunks * BITS
    offsets = state.to(tl.int64)
    is_state, is_key = state < num_states, state == num_states
    bits = first_bit + tl.arange(0, BITS)
    head_states = states + batch * state_batch_stride + head * state_head_stride
    head_weights = weights + head * weight_head_stride
    projected = tl.zeros([TILE, BITS], tl.float32)
    squares = tl.zeros([TILE], tl.float32)
    for first in range(0, HEAD_DIM, CHANNELS):
        dims = first + tl.arange(0, CHANNELS)
        is_dim = dims < HEAD_DIM
        tile = tl.load(
            head_states + offsets[:, None] * state_stride + dims[None, :] * state_dim_stride,
            mask=is_state[:, None] & is_dim[None, :],
            other=0.0,
        ).to(PRODUCT)
        if new_keys is not None:
            key = tl.load(
                new_keys
                + batch * new_batch_stride
                + head * new_head_stride
                + dims * new_dim_stride,
                mask=is_dim,
                other=0.0,
            ).to(PRODUCT)
            tile = tl.where(is_key[:, None], key[None, :], tile)
        weight = tl.load(
            head_weights + dims[:, None] * weight_dim_stride + bits[None, :] * weight_bit_stride,
            mask=is_dim[:, None],
            other=0.0,
        ).to(PRODUCT)
        projected = tl.dot(tile, weight, projected, input_precision="ieee")
        if key_norms is not None:
            wide = tile.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)

    positive = tl.reshape((projected > 0).to(tl.int32), [TILE, BITS // 32, 32])
    packed = tl.sum(positive << tl.arange(0, 32)[None, None, :], axis=2)
    words = first_bit // 32 + tl.arange(0, BITS // 32)
    tl.store(
        codes + (row * num_states + offsets[:, None]) * WORDS + words[None, :],
        packed,
        mask=is_state[:, None] & (words >= 0)[None, :],
    )
    if new_keys is not None:
        end = capacity
        if kv_len is not None:
            end = tl.load(kv_len + batch)
        slots = tl.zeros([TILE], tl.int64) + end - 1
        is_written = is_key & (slots >= 0) & (slots < capacity)
        head_codes = key_codes + batch * code_batch_stride + head * code_head_stride
        tl.store(
            head_codes + slots[:, None] * code_slot_stride + words[None, :] * code_word_stride,
            packed,
            mask=is_written[:, None] & (words >= 0)[None, :],
        )
        if key_norms is not None:
            head_norms = key_norms + batch * norm_batch_stride + head * norm_head_stride
            if first_bit == 0:  # only one of the programs that share the key
                tl.store(
                    head_norms + slots * norm_slot_stride, tl.sqrt_rn(squares), mask=is_written
                )
