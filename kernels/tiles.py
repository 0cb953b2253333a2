"""Shared by the Triton kernels: a row's valid range, bit counts, and choices made at launch.

A kernel is decorated when its file is imported. If ``TRITON_INTERPRET=1`` is in the environment by
then, Triton runs it in Python on a CPU, which is how it is tested without a GPU.

Parameters of a kernel in lower case are its arguments: pointers, strides and sizes. Kernels are not
specialised on those that change from step to step, so that no step recompiles. Parameters in upper
case are compile-time constants.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


@triton.jit
def valid_range(
    kv_start: tl.tensor, kv_len: tl.tensor, batch: tl.tensor, size: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Return a row's valid range, clipped to 0 to ``size``; either bound may be None."""
    start = 0
    end = size
    if kv_start is not None:
        start = tl.minimum(tl.maximum(tl.load(kv_start + batch), 0), size)
    if kv_len is not None:
        end = tl.minimum(tl.maximum(tl.load(kv_len + batch), 0), size)
    return start, tl.maximum(start, end)


@triton.jit
def popcount(words: tl.tensor) -> tl.tensor:
    """Count the set bits of int32 words; LLVM recognises this form as the GPU's instruction."""
    count = words.to(tl.uint32, bitcast=True)
    count = count - ((count >> 1) & 0x55555555)
    count = (count & 0x33333333) + ((count >> 2) & 0x33333333)
    count = (count + (count >> 4)) & 0x0F0F0F0F
    return ((count * 0x01010101) >> 24).to(tl.int32)


_INTERPRETED = not isinstance(valid_range, triton.JITFunction)


def check_readable(argument: str, tensor: Tensor) -> None:
    """Raise unless the kernels can read a tensor's dtype.

    Raises:
        TypeError: If the dtype is not float32, bfloat16 or float16.
    """
    if tensor.dtype not in _DTYPES:
        found = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(
            f"{argument} must be float32, bfloat16 or float16 for impl='triton', got {found}; "
            "use impl='reference'."
        )


def product_dtype(*tensors: Tensor) -> Any:
    """Return the dtype in which tensors are multiplied: theirs if they share one, else float32.

    Products of 16-bit numbers are exact in the matrix units, which accumulate in float32. The
    interpreter, which stores bfloat16 as its bits, multiplies in float32.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    return tl.float32 if _INTERPRETED or len(dtypes) > 1 else _DTYPES[dtypes.pop()]


def padded(size: int) -> int:
    """Return the tile size for an axis: a power of two, at least 16 as matrix units need."""
    return max(16, triton.next_power_of_2(size))


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make a CUDA tensor's device the current one: Triton launches there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
