"""Checks and addresses of tensors that the CPU operators pass to numba."""

import torch
from torch import Tensor


def bound_address(bound: Tensor | None) -> tuple[int, Tensor | None]:
    """Return the address of an int32 ``[B]`` bound, 0 for None, and the tensor to keep alive."""
    if bound is None:
        return 0, None
    contiguous = bound.contiguous()
    return contiguous.data_ptr(), contiguous


def check_rows(argument: str, tensor: Tensor) -> None:
    """Raise unless a tensor's last axis is contiguous.

    Raises:
        ValueError: If the last axis is strided.
    """
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{argument} must have a contiguous last axis for impl='cpu', got stride "
            f"{tensor.stride(-1)}; copy it once with .contiguous()."
        )


def check_cache(argument: str, tensor: Tensor) -> bool:
    """Check a cached tensor's dtype and last axis; return whether it is bfloat16.

    Raises:
        TypeError: If the dtype is neither float32 nor bfloat16.
        ValueError: If the last axis is strided.
    """
    check_rows(argument, tensor)
    if tensor.dtype == torch.float32:
        return False
    if tensor.dtype == torch.bfloat16:
        return True
    found = str(tensor.dtype).removeprefix("torch.")
    raise TypeError(
        f"{argument} must be float32 or bfloat16 for impl='cpu', got {found}; use impl='reference'."
    )
