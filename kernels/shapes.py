"""Checks of the operators' arguments: cheap if they pass, an error of one sentence if not."""

import torch
from torch import Tensor


def check_shape(argument: str, tensor: Tensor, notation: str, *sizes: int | None) -> None:
    """Raise if the shape differs.

    Args:
        argument: The argument's name, for the message.
        tensor: The argument's value.
        notation: The shape in letters, such as ``"[B, Hkv, n, d]"``.
        sizes: The required size of each axis; ``None`` accepts any.

    Raises:
        ValueError: If the number of axes or a size differs.
    """
    shape = tensor.shape
    if len(shape) == len(sizes):
        for size, required in zip(shape, sizes, strict=True):
            if required is not None and size != required:
                break
        else:
            return
    stars = ", ".join("*" if size is None else str(size) for size in sizes)
    raise ValueError(f"{argument} must be {notation} = [{stars}], got {list(shape)}.")


def check_dtype(argument: str, tensor: Tensor, *accepted: torch.dtype) -> None:
    """Raise if the dtype is none of those accepted.

    Raises:
        TypeError: If the dtype is none of ``accepted``.
    """
    if tensor.dtype not in accepted:
        words = " or ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        found = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{argument} must be {words}, got {found}.")


def check_floating(argument: str, tensor: Tensor) -> None:
    """Raise unless a tensor is floating point.

    Raises:
        TypeError: If the dtype is not a floating point one.
    """
    if not tensor.is_floating_point():
        found = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{argument} must be floating point, got {found}.")


def check_range(
    kv_start: Tensor | None, kv_len: Tensor | None, batch_size: int, device: torch.device
) -> None:
    """Raise unless the bounds of the valid range are int32 ``[B]`` on the operator's device.

    Raises:
        ValueError: If a shape or device is wrong.
        TypeError: If a dtype is wrong.
    """
    for argument, tensor in (("kv_start", kv_start), ("kv_len", kv_len)):
        if tensor is not None:
            check_shape(argument, tensor, "[B]", batch_size)
            check_dtype(argument, tensor, torch.int32)
            check_device(argument, tensor, device)


def check_sinks(sinks: Tensor | None, num_heads: int, device: torch.device) -> None:
    """Raise unless learned sinks are floating point ``[Hq]`` on the operator's device.

    Raises:
        ValueError: If the shape or device is wrong.
        TypeError: If they are not floating point.
    """
    if sinks is not None:
        check_shape("sinks", sinks, "[Hq]", num_heads)
        check_floating("sinks", sinks)
        check_device("sinks", sinks, device)


def check_device(argument: str, tensor: Tensor, device: torch.device) -> None:
    """Raise unless a tensor is on the device of the operator's first argument.

    Raises:
        ValueError: If the devices differ.
    """
    if tensor.device != device:
        raise ValueError(f"{argument} must be on {device}, got {tensor.device}.")


def count_dtype(group: int, words: int) -> torch.dtype:
    """Return the narrowest dtype for a sum over ``group`` queries of ``32 * words`` bits each.

    int16 halves the bytes that a selection reads; its lowest value is never a score, and marks
    units outside the valid range.
    """
    return torch.int16 if group * 32 * words < 2**15 else torch.int32


def valid_slots(
    kv_start: Tensor | None, kv_len: Tensor | None, num_slots: int, device: torch.device
) -> Tensor:
    """Return which slots of each row hold a token: ``kv_start <= slot < kv_len``.

    Returns:
        ``[B, n]`` bool, or ``[1, n]`` when neither bound is given.
    """
    slots = torch.arange(num_slots, device=device)
    valid = torch.ones(1, num_slots, dtype=torch.bool, device=device)
    if kv_start is not None:
        valid = valid & (slots >= kv_start[:, None])
    if kv_len is not None:
        valid = valid & (slots < kv_len[:, None])
    return valid
