"""Files of the cache folder: samples and fitted artifacts."""

from contextlib import AbstractContextManager
from pathlib import Path

from topkbench.analysis.record.files import CACHE, locked, write_atomic


def write_cached(path: Path, content: bytes) -> None:
    """Write a file of the cache atomically, so that no reader sees a partial one.

    Raises:
        NotWritableError: If its folder cannot be written; the message names the setting.
    """
    write_atomic(path, content, CACHE)


def cache_lock(path: Path) -> AbstractContextManager[None]:
    """Return a context that holds a lock of the cache, and waits for it.

    Raises:
        NotWritableError: If its folder cannot be written; the message names the setting.
    """
    return locked(path, -1, CACHE)
