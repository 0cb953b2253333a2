"""hash_encode on a CPU: a prompt by torch's matrix product, a decode step in one fused kernel."""

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from topkbench.kernels.addresses import bound_address, check_rows
from topkbench.kernels.compiled import entry_point
from topkbench.kernels.intrinsics import (
    LANES,
    load_float32,
    load_int32,
    load_vector,
    multiply_add,
    positive_bits,
    splat,
    store_float32,
    store_int32,
)
from topkbench.kernels.rows import widen

# Up to this many states per head the fused kernel is faster than a matrix product and reshaping.
_FEW = 16
# Projections in memory at a time, in float32 elements: 32 MiB.
_CHUNK = 2**23


def hash_encode(states: Tensor, hash_weight: Tensor) -> Tensor:
    """Return ``[B, Hkv, n, rbit // 32]`` int32; see the api."""
    batch_size, num_heads, num_states, head_dim = states.shape
    rbit = hash_weight.shape[2]
    weight = hash_weight.float().contiguous()
    codes = torch.empty(batch_size, num_heads, num_states, rbit // 32, dtype=torch.int32)
    if codes.numel() == 0:
        return codes
    if num_states <= _FEW:
        few, rows = _readable(states), torch.empty(batch_size * num_heads, head_dim)
        sizes = (batch_size, num_heads, num_states, head_dim, rbit)
        _encode_few(
            few.data_ptr(), few.dtype == torch.bfloat16, rows.data_ptr(), weight.data_ptr(),
            codes.data_ptr(), sizes,
        )  # fmt: skip
        return codes
    step = max(1, _CHUNK // (batch_size * num_heads * rbit))
    for first in range(0, num_states, step):
        chunk = states[:, :, first : first + step].float()
        for batch in range(batch_size):
            # [Hkv, step, rbit]; one row of the batch at a time, or torch would copy the weight.
            projected = torch.bmm(chunk[batch], weight)
            rows = codes[batch, :, first : first + step]
            _pack(projected.data_ptr(), rows.data_ptr(), rows.stride()[:2], tuple(projected.shape))
    return codes


def encode_step(
    query_states: Tensor,
    key_states: Tensor,
    hash_weight: Tensor,
    key_codes: Tensor,
    key_norms: Tensor | None,
    kv_len: Tensor | None,
) -> Tensor:
    """Return the queries' codes and write the new key's code and norm; see the api."""
    check_rows("key_codes", key_codes)
    batch_size, num_heads, group, head_dim = query_states.shape
    rbit = hash_weight.shape[2]
    queries, keys = _readable(query_states), key_states
    if keys.dtype not in (torch.float32, torch.bfloat16) or keys.stride(-1) != 1:
        keys = _readable(keys)  # a slice of a cache is read where it is
    weight = hash_weight.float().contiguous()
    codes = torch.empty(batch_size, num_heads, group, rbit // 32, dtype=torch.int32)
    rows = torch.empty(batch_size * num_heads, head_dim)
    norms, norm_strides = 0, key_codes.stride()[:3]
    if key_norms is not None:
        norms, norm_strides = key_norms.data_ptr(), key_norms.stride()
    ends, _ends = bound_address(kv_len)
    _encode_step(
        queries.data_ptr(), queries.dtype == torch.bfloat16, keys.data_ptr(),
        keys.dtype == torch.bfloat16, keys.stride()[:2], rows.data_ptr(), weight.data_ptr(),
        codes.data_ptr(), key_codes.data_ptr(), key_codes.stride()[:3], norms, norm_strides, ends,
        (batch_size, num_heads, group, head_dim, rbit), key_codes.shape[2],
    )  # fmt: skip
    return codes


def _readable(states: Tensor) -> Tensor:
    """Return a decode step's states in the form of the kernels: contiguous bfloat16 or float32."""
    return (states if states.dtype == torch.bfloat16 else states.float()).contiguous()


@entry_point
def _pack(
    projected: int, codes: int, strides: tuple[int, int], sizes: tuple[int, int, int]
) -> None:
    """Pack the signs of ``[Hkv, n, rbit]`` projections."""
    num_heads, num_states, rbit = sizes
    words = rbit // 32
    for task in prange(num_heads * num_states):
        head, state = task // num_states, task % num_states
        row = projected + 4 * task * rbit
        code = codes + 4 * (head * strides[0] + state * strides[1])
        for word in range(words):
            low = positive_bits(load_vector(row, 32 * word))
            high = positive_bits(load_vector(row, 32 * word + LANES))
            store_int32(code, word, low | high << LANES)


@entry_point
def _encode_few(
    states: int,
    narrow: bool,
    rows: int,
    weight: int,
    codes: int,
    sizes: tuple[int, int, int, int, int],
) -> None:
    """Project and pack a few states per head; ``rows`` is float32 scratch memory for one each."""
    batch_size, num_heads, num_states, head_dim, rbit = sizes
    for task in prange(batch_size * num_heads):
        head_weight = weight + 4 * (task % num_heads) * head_dim * rbit
        for state in range(num_states):
            place = task * num_states + state
            row = _row(states, place * head_dim, head_dim, narrow, rows + 4 * task * head_dim)
            code = codes + place * rbit // 8
            _encode_row(row, head_weight, code, head_dim, rbit)


@entry_point
def _encode_step(
    queries: int,
    narrow_queries: bool,
    keys: int,
    narrow_keys: bool,
    key_strides: tuple[int, int],
    rows: int,
    weight: int,
    codes: int,
    key_codes: int,
    code_strides: tuple[int, int, int],
    key_norms: int,
    norm_strides: tuple[int, int, int],
    kv_len: int,
    sizes: tuple[int, int, int, int, int],
    capacity: int,
) -> None:
    """Project and pack the queries and the new key of each head, and store the key's norm."""
    batch_size, num_heads, group, head_dim, rbit = sizes
    for task in prange(batch_size * num_heads):
        batch, head = task // num_heads, task % num_heads
        head_weight = weight + 4 * head * head_dim * rbit
        wide = rows + 4 * task * head_dim
        for query in range(group):
            place = task * group + query
            row = _row(queries, place * head_dim, head_dim, narrow_queries, wide)
            code = codes + place * rbit // 8
            _encode_row(row, head_weight, code, head_dim, rbit)
        slot = capacity - 1
        if kv_len != 0:
            slot = int(load_int32(kv_len, batch)) - 1
        if slot < 0 or slot >= capacity:  # no such slot: nothing is written
            continue
        first = batch * key_strides[0] + head * key_strides[1]
        key = _row(keys, first, head_dim, narrow_keys, wide)
        place = batch * code_strides[0] + head * code_strides[1] + slot * code_strides[2]
        _encode_row(key, head_weight, key_codes + 4 * place, head_dim, rbit)
        if key_norms != 0:
            total = 0.0
            for i in range(head_dim):
                total += np.float64(load_float32(key, i)) ** 2
            place = batch * norm_strides[0] + head * norm_strides[1] + slot * norm_strides[2]
            store_float32(key_norms, place, np.float32(np.sqrt(total)))


@njit(nogil=True)
def _row(states: int, first: int, head_dim: int, narrow: bool, wide: int) -> int:
    """Return the address of one state as float32, which begins at element ``first``.

    ``wide`` is scratch memory for it.
    """
    if narrow:
        return widen(states + 2 * first, head_dim, wide)
    return states + 4 * first


@njit(nogil=True)
def _encode_row(row: int, weight: int, code: int, head_dim: int, rbit: int) -> None:
    """Project one state and write its signs."""
    words = rbit // 32
    word = 0
    # Two words at a time: four independent sums hide the latency of an addition.
    while word + 2 <= words:
        sum0 = sum1 = sum2 = sum3 = splat(0.0)
        for i in range(head_dim):
            value = splat(load_float32(row, i))
            base = i * rbit + 32 * word
            sum0 = multiply_add(value, load_vector(weight, base), sum0)
            sum1 = multiply_add(value, load_vector(weight, base + LANES), sum1)
            sum2 = multiply_add(value, load_vector(weight, base + 2 * LANES), sum2)
            sum3 = multiply_add(value, load_vector(weight, base + 3 * LANES), sum3)
        store_int32(code, word, positive_bits(sum0) | positive_bits(sum1) << LANES)
        store_int32(code, word + 1, positive_bits(sum2) | positive_bits(sum3) << LANES)
        word += 2
    if word < words:
        sum0 = sum1 = splat(0.0)
        for i in range(head_dim):
            value = splat(load_float32(row, i))
            base = i * rbit + 32 * word
            sum0 = multiply_add(value, load_vector(weight, base), sum0)
            sum1 = multiply_add(value, load_vector(weight, base + LANES), sum1)
        store_int32(code, word, positive_bits(sum0) | positive_bits(sum1) << LANES)
