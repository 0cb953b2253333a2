"""Atomic file writes, and file locks that the system releases when their process ends."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from topkbench.analysis.row import RecordError


@contextlib.contextmanager
def translate_os_error(path: Path) -> Iterator[None]:
    """Turn an OSError into a RecordError of one sentence."""
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"the results folder must be writable, but {path} is not "
            f"({error.strerror or error}); choose another with results_dir=PATH."
        ) from error


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file atomically: after a crash it is either complete or absent.

    Raises:
        RecordError: If the folder cannot be written.
    """
    with translate_os_error(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        if os.name == "posix":  # the rename is durable only once the folder is synced
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextlib.contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold a file lock; the system releases it when the process ends, even by a crash.

    Raises:
        RecordError: If the folder cannot be written, or the lock is not acquired in time.
    """
    lock = filelock.FileLock(path)
    with translate_os_error(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=timeout_s)
        except filelock.Timeout:
            raise RecordError(
                f"the lock {path} must come free within {timeout_s:g} s, but another process "
                "holds it; wait for that one to end."
            ) from None
        except NotImplementedError:
            raise RecordError(
                f"the results folder must allow file locks, but {path.parent} does not; "
                "choose a local disk with results_dir=PATH."
            ) from None
    try:
        yield
    finally:
        lock.release()


def json_bytes(value: Any) -> bytes:
    """Return a value as indented JSON that ends with a newline."""
    return (json.dumps(value, indent=1, sort_keys=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Return a JSON file's value, or None if it is missing, truncated or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
