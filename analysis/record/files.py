"""Atomic file writes, and file locks that the system releases when their process ends.

A file is written under a temporary name, ``.NAME.DIGITS.part``, and locked until it is renamed: one
that is not locked was left behind by a killed process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import filelock

from topkbench.analysis.record.row import RecordError

# Elsewhere an open file is safe without a lock: it can be neither removed nor renamed.
_LOCKS_PARTS = os.name == "posix"
if _LOCKS_PARTS:
    import fcntl


class Place(NamedTuple):
    """A folder that the command writes to: its name in a sentence, and the setting to move it."""

    name: str
    setting: str


RESULTS = Place("results", "results_dir=PATH")
CACHE = Place("cache", "cache_dir=PATH or the environment variable TOPKBENCH_CACHE")

# Where W&B and matplotlib write in a home: the variable that moves it, the one that names the
# folder above it, what that one is by default, and the folder.
_IN_HOME = (
    ("WANDB_DATA_DIR", "XDG_DATA_HOME", ".local/share", "wandb"),
    ("WANDB_CONFIG_DIR", "XDG_CONFIG_HOME", ".config", "wandb"),
    ("WANDB_CACHE_DIR", "XDG_CACHE_HOME", ".cache", "wandb"),
    ("MPLCONFIGDIR", "XDG_CONFIG_HOME", ".config", "matplotlib"),
)

_PART = re.compile(r"\..+\.[0-9a-f]{16}\.part")


class NotWritableError(RecordError):
    """A folder cannot be written: it is read-only, its disk is full, or a file is in the way."""

    def __init__(self, place: Place, path: Path, reason: str) -> None:
        super().__init__(
            f"the {place.name} folder must be writable, but {path} is not ({reason}); "
            f"choose another with {place.setting}."
        )


class LockedError(RecordError):
    """A lock is held by another process."""


@contextlib.contextmanager
def translate_os_error(path: Path, place: Place = RESULTS) -> Iterator[None]:
    """Turn an OSError into a NotWritableError, which is one sentence."""
    try:
        yield
    except OSError as error:
        raise NotWritableError(place, path, error.strerror or str(error)) from error


def check_writable(path: Path, place: Place = RESULTS) -> None:
    """Check that a folder can be written or made, without making it.

    Raises:
        NotWritableError: If it cannot.
    """
    existing = path.absolute()
    with translate_os_error(path, place):
        while not os.path.lexists(existing):
            existing = existing.parent
    if not existing.is_dir():
        raise NotWritableError(place, path, f"{existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise NotWritableError(place, path, f"{existing} is read-only")
    with translate_os_error(path, place), tempfile.TemporaryFile(dir=existing):
        pass  # folders of the system, such as /proc, refuse although their permissions do not


def keep_off_read_only_home(cache: Path) -> None:
    """Let W&B and matplotlib write below the cache folder what they cannot write in the home.

    It must be called before they are imported. What the environment says already stays, and so does
    a folder of W&B's with the user's settings, which W&B only reads.

    Args:
        cache: The cache folder; if it cannot be written, a temporary folder is used.
    """
    place: Path | None = None
    for variable, parent_variable, default, name in _IN_HOME:
        # Unlike Path's, it raises nothing where the user has no home.
        home = os.path.expanduser("~")  # noqa: PTH111
        parent = os.environ.get(parent_variable) or f"{home}/{default}"
        own = Path(parent, name)
        if variable in os.environ or (
            variable == "WANDB_CONFIG_DIR" and (own / "settings").exists()
        ):
            continue
        if _can_write(own):
            continue
        if place is None:
            place = cache / "home"
            if not _can_write(place):
                place = Path(tempfile.mkdtemp(prefix="topkbench-"))
                atexit.register(shutil.rmtree, place, ignore_errors=True)
        os.environ[variable] = str((place / variable.lower()).absolute())


def _can_write(folder: Path) -> bool:
    try:
        check_writable(folder)
    except NotWritableError:
        return False
    return True


def write_atomic(path: Path, content: bytes, place: Place = RESULTS) -> None:
    """Write a file atomically: after a crash it is either complete or absent.

    Raises:
        NotWritableError: If the folder cannot be written; nothing is left behind.
    """
    with translate_os_error(path.parent, place):
        path.parent.mkdir(parents=True, exist_ok=True)
        part, file = _open_part(path)
        try:
            with file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                if _LOCKS_PARTS:
                    part.replace(path)
            if not _LOCKS_PARTS:
                part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        if os.name == "posix":  # the rename is durable only once the folder is synced
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _open_part(path: Path) -> tuple[Path, BinaryIO]:
    """Open a new temporary file for a path, locked as long as it is open."""
    while True:
        part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        file = part.open("xb")
        if not _LOCKS_PARTS:
            return part, file
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return part, file
        file.close()  # another process has removed it before it was locked


def remove_left_over(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder and the folders below it.

    Those of a process that still writes are locked, and stay.
    """
    for place, folders, files in os.walk(folder):
        folders[:] = [one for one in folders if one != "wandb" and not one.startswith(".")]
        for name in filter(_PART.fullmatch, files):
            with contextlib.suppress(OSError):
                _remove_unless_locked(Path(place, name))


def _remove_unless_locked(part: Path) -> None:
    if not _LOCKS_PARTS:
        part.unlink()  # refused while it is open
        return
    with part.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises an OSError if it is locked
        part.unlink()


@contextlib.contextmanager
def locked(path: Path, timeout_s: float, place: Place = RESULTS) -> Iterator[None]:
    """Hold a file lock; the system releases it when the process ends, even by a crash.

    Raises:
        NotWritableError: If the folder cannot be written.
        LockedError: If the lock is not acquired in time.
        RecordError: If the disk has no locks.
    """
    lock = filelock.FileLock(path)
    with translate_os_error(path.parent, place):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=timeout_s)
        except filelock.Timeout:
            raise LockedError(
                f"the lock {path} must come free within {timeout_s:g} s, but another process "
                "holds it; wait for that one to end."
            ) from None
        except NotImplementedError:
            raise RecordError(
                f"the {place.name} folder must allow file locks, but {path.parent} does not; "
                f"choose a local disk with {place.setting}."
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
