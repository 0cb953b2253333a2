"""hash_encode on a CPU: a prompt by torch's matrix product, a decode step in one fused kernel."""

import torch
from numba import njit, prange
from torch import Tensor

from topkbench.kernels.intrinsics import (
    LANES,
    load_float32,
    load_vector,
    multiply_add,
    positive_bits,
    splat,
    store_int32,
)

# Up to so many states a head, the fused kernel beats a matrix product and its reshaping.
_FEW = 16
# Projections held at a time, in float32 elements: 32 MiB.
_CHUNK = 2**23


def hash_encode(states: Tensor, hash_weight: Tensor) -> Tensor:
    """Return ``[B, Hkv, n, rbit // 32]`` int32; see the api."""
    batch_size, num_heads, num_states, head_dim = states.shape
    rbit = hash_weight.shape[2]
    weight = hash_weight.float().contiguous()
    codes = torch.empty(batch_size, num_heads, num_states, rbit // 32, dtype=torch.int32)
    if num_states <= _FEW:
        few = states.float().contiguous()
        sizes = (batch_size, num_heads, num_states, head_dim, rbit)
        _encode_few(few.data_ptr(), weight.data_ptr(), codes.data_ptr(), sizes)
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


@njit(parallel=True, cache=True, nogil=True)
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


@njit(parallel=True, cache=True, nogil=True)
def _encode_few(
    states: int, weight: int, codes: int, sizes: tuple[int, int, int, int, int]
) -> None:
    """Project and pack a few states of each head."""
    batch_size, num_heads, num_states, head_dim, rbit = sizes
    words = rbit // 32
    for task in prange(batch_size * num_heads):
        head_weight = weight + 4 * (task % num_heads) * head_dim * rbit
        for state in range(num_states):
            row = states + 4 * (task * num_states + state) * head_dim
            code = codes + 4 * (task * num_states + state) * words
            word = 0
            # Two words at a time: four independent sums hide the latency of an addition.
            while word + 2 <= words:
                sum0 = sum1 = sum2 = sum3 = splat(0.0)
                for i in range(head_dim):
                    value = splat(load_float32(row, i))
                    base = i * rbit + 32 * word
                    sum0 = multiply_add(value, load_vector(head_weight, base), sum0)
                    sum1 = multiply_add(value, load_vector(head_weight, base + LANES), sum1)
                    sum2 = multiply_add(value, load_vector(head_weight, base + 2 * LANES), sum2)
                    sum3 = multiply_add(value, load_vector(head_weight, base + 3 * LANES), sum3)
                store_int32(code, word, positive_bits(sum0) | positive_bits(sum1) << LANES)
                store_int32(code, word + 1, positive_bits(sum2) | positive_bits(sum3) << LANES)
                word += 2
            if word < words:
                sum0 = sum1 = splat(0.0)
                for i in range(head_dim):
                    value = splat(load_float32(row, i))
                    base = i * rbit + 32 * word
                    sum0 = multiply_add(value, load_vector(head_weight, base), sum0)
                    sum1 = multiply_add(value, load_vector(head_weight, base + LANES), sum1)
                store_int32(code, word, positive_bits(sum0) | positive_bits(sum1) << LANES)
