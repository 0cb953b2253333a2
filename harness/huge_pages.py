"""Huge pages for large tensors on a CPU.

A step that reads rows here and there in a large cache is slower where every few rows are in another
page of 4 KiB. Full attention and all methods have the same pages.
"""

import os
import re
from functools import cache
from pathlib import Path

_PROBE_BYTES = 2**25


def ask_for_huge_pages() -> None:
    """Let torch keep tensors of 2 MiB and more in huge pages, where the system gives them.

    It has an effect before the process's first tensor, on processes that it starts, and none where
    ``THP_MEM_ALLOC_ENABLE`` is set already.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@cache
def has_huge_pages() -> bool | None:
    """Return whether large tensors of this process are in huge pages, as tried on one of 32 MiB.

    None where the system does not say, which Linux does.
    """
    import torch  # here, as ``ask_for_huge_pages`` comes before it

    before = _huge_kib()
    tried = torch.ones(_PROBE_BYTES // 4)
    after = _huge_kib()
    if before is None or after is None:
        return None
    return after - before > tried.nbytes / 2 / 1024


def _huge_kib() -> int | None:
    """Return how much of the process's memory is in huge pages, in KiB."""
    try:
        text = Path("/proc/self/smaps_rollup").read_text()
    except OSError:
        return None
    found = re.search(r"AnonHugePages:\s+(\d+) kB", text)
    return None if found is None else int(found[1])
