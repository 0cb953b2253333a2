"""How many prompts decode together if the setting is auto: chosen once, kept with the results.

Rows of a batch are not bit for bit those of single prompts, so the batches of a cell must not
depend on the memory that happens to be free when it runs again, or on another machine.
"""

from collections.abc import Callable
from pathlib import Path

from topkbench.analysis.record.files import json_bytes, locked, read_json, write_atomic

MOST = 32
"""More prompts than this hardly decode faster."""


def most_prompts(bytes_per_prompt: int, free: int) -> int:
    """Return the largest power of two of prompts whose states take at most half of the memory.

    The other half is for what methods keep beside the states, and for a forward's own needs.

    Args:
        bytes_per_prompt: Keys and values of the longest prompt and its answer.
        free: Free bytes.

    Returns:
        Between 1 and ``MOST``.
    """
    fitting = max(1, free // 2 // bytes_per_prompt)
    return int(min(MOST, 1 << (fitting.bit_length() - 1)))


def found_in(path: Path) -> int | None:
    """Return the batch size that a file has; None if there is no such file."""
    found = read_json(path)
    size = found.get("batch_size") if isinstance(found, dict) else None
    return size if isinstance(size, int) and 1 <= size <= MOST else None


def recorded(path: Path, measure: Callable[[], tuple[int, int]]) -> int:
    """Return the batch size that a file has; if there is none, choose and record it.

    Args:
        path: The file.
        measure: Returns the arguments of ``most_prompts``; called only if there is no file.

    Raises:
        NotWritableError: If the file cannot be written.
    """
    with locked(path.with_suffix(".lock"), -1):
        size = found_in(path)
        if size is not None:
            return size
        bytes_per_prompt, free = measure()
        size = most_prompts(bytes_per_prompt, free)
        content = {"batch_size": size, "bytes_per_prompt": bytes_per_prompt, "free_bytes": free}
        write_atomic(path, json_bytes(content))
        return size
