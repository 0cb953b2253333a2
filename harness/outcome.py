"""The status and the reason of a row whose step raised an exception."""

import torch

from topkbench.kernels.testing import WrongResult
from topkbench.kernels.timing import NotCaptured

_LONGEST_REASON = 400


class Unavailable(Exception):
    """Something cannot run on this machine or with these shapes; the message says why."""


def outcome(error: BaseException) -> dict[str, str]:
    """Return the columns ``status`` and ``reason``."""
    if isinstance(error, WrongResult):
        status = "wrong"
    elif isinstance(error, torch.OutOfMemoryError | MemoryError):
        status = "out_of_memory"
    elif isinstance(error, Unavailable | NotCaptured):
        status = "skipped"
    else:
        status = "failed"
    expected = status in ("wrong", "skipped")  # so the message needs no exception's name
    message = " ".join(str(error).split()) or "no reason was given."
    return {
        "status": status,
        "reason": (message if expected else f"{type(error).__name__}: {message}")[:_LONGEST_REASON],
    }
