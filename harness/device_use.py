"""Lets processes of one machine measure time alone: the others wait while one of them does.

Several processes of a sweep may share a device, or a processor. What they measure at the same time
is right, except for time.
"""

import contextlib
import functools
import getpass
import json
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from filelock import ReadWriteLock, Timeout

from topkbench.analysis.console import say

WAIT_S = 0.5
"""Seconds of one attempt to get the device, between which the process can be interrupted."""

PATIENCE_S = 60
"""Seconds of waiting after which the user is told."""


@contextlib.contextmanager
def using(device: torch.device, alone: bool) -> Iterator[None]:
    """Use a device, inside the block, together with other processes or alone.

    Where the machine has no folder for temporary files that can be locked, nobody waits; a row's
    column ``other_load`` still says how busy the machine was.

    Args:
        device: The device.
        alone: Whether other processes that use it must wait, as when time is measured.
    """
    lock = _lock(_name(device))
    if lock is None:
        yield
        return
    began, is_said = time.monotonic(), False
    while True:
        try:
            (lock.acquire_write if alone else lock.acquire_read)(WAIT_S)
            break
        except Timeout:
            if not is_said and time.monotonic() - began > PATIENCE_S:
                say(f"waiting for {device}{_used_by(lock)}")
                is_said = True
    _remove_notes_of_killed(lock)
    note = _note(lock, os.getpid())
    with contextlib.suppress(OSError):  # others are told less then
        since = datetime.now(UTC).isoformat(timespec="seconds")
        what = "measures" if alone else "works"
        holder = {"pid": os.getpid(), "folder": str(Path.cwd()), "since": since, "what": what}
        note.write_text(json.dumps(holder), encoding="utf-8")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)
        lock.release()


def _note(lock: ReadWriteLock, pid: int | str) -> Path:
    """Return the file in which a process says that it holds a lock."""
    return Path(f"{lock.lock_file}-{pid}.json")


def _notes(lock: ReadWriteLock) -> list[Path]:
    """Return the notes of all processes, which may have been killed since."""
    return sorted(Path(lock.lock_file).parent.glob(_note(lock, "*").name))


def _remove_notes_of_killed(lock: ReadWriteLock) -> None:
    for note in _notes(lock):
        pid = note.stem.rpartition("-")[2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            with contextlib.suppress(OSError):  # of another user, or removed meanwhile
                note.unlink(missing_ok=True)


def _used_by(lock: ReadWriteLock) -> str:
    """Return in words which process uses a device, as far as it has said so."""
    for note in _notes(lock):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            holder = json.loads(note.read_text(encoding="utf-8"))
            os.kill(holder["pid"], 0)  # raises an OSError if it was killed and left its note
            return (
                f", on which process {holder['pid']} {holder['what']} since {holder['since']}, in"
                f" {holder['folder']}"
            )
    return ", which another process uses"


def _name(device: torch.device) -> str:
    """Return a name that is one device's alone, whichever devices a process sees."""
    if device.type != "cuda":
        return device.type
    return str(torch.cuda.get_device_properties(device).uuid)


@functools.cache
def _lock(device: str) -> ReadWriteLock | None:
    try:
        folder = Path(tempfile.gettempdir(), f"topkbench-{getpass.getuser()}")
        folder.mkdir(exist_ok=True)
        return ReadWriteLock(folder / f"{device}.lock")
    except (OSError, KeyError, ValueError, sqlite3.Error):
        return None


def load_warning() -> str | None:
    """Return a sentence if other processes keep all processors busy; None if they do not.

    Threads that run a step together wait for the slowest of them, which waits for a processor. They
    keep theirs busy meanwhile, unless OpenMP is told to wait passively.
    """
    load = psutil.getloadavg()[0]  # of the last minute, in which this process hardly ran
    affinity = getattr(psutil.Process(), "cpu_affinity", None)  # macOS has none
    processors = len(affinity()) if affinity is not None else psutil.cpu_count() or 1
    if load <= processors:
        return None
    threads = torch.get_num_threads()
    ways = "; OMP_NUM_THREADS=1 or OMP_WAIT_POLICY=passive is often faster meanwhile"
    way_out = ways if threads > 1 else ""
    return (
        f"other processes keep the processors busy (load {load:.1f} on {processors}): what is timed"
        f" now may be marked unsteady{way_out}"
    )
