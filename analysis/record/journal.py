"""What a sweep has measured so far, on disk, so that a killed one goes on where it was.

A part of a cell is measured batch by batch. Each writer appends one line per batch to a file of its
own; when the last batch is in, the lines become the part's file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from topkbench.analysis.record.files import (
    LockedError,
    json_bytes,
    locked,
    read_json,
    translate_os_error,
)
from topkbench.analysis.record.row import RecordError

Records = list[dict[str, Any]]

MOST_DEATHS = 3
"""How often a process may die while it measures the same before the measurement is given up."""

MOST_OOM_DEATHS = 2
"""The same, if the system has killed processes for want of memory each time."""


class DisagreementError(RecordError):
    """Two processes measured the same and found different results."""


class GivenUpError(MemoryError):
    """A measurement has killed its process too often."""


class Journal:
    """The records of one part of one cell, by number of the batch.

    Args:
        folder: The part's own folder.
        same: Returns whether two measurements of one batch agree.
    """

    def __init__(self, folder: Path, same: Callable[[Records, Records], bool]) -> None:
        self._folder = folder
        self._same = same
        self._path = folder / f"{socket.gethostname()}-{os.getpid()}.jsonl"

    def read(self) -> dict[int, Records]:
        """Return all records; a line that was cut off when its writer died is left out.

        Raises:
            DisagreementError: If two measurements of one batch differ.
        """
        found: dict[int, Records] = {}
        for path in sorted(self._folder.glob("*.jsonl")):
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # its part has become whole
                continue
            for line in content.split(b"\n"):
                try:
                    entry = json.loads(line)
                    number, records = entry["batch"], entry["records"]
                except (ValueError, TypeError, KeyError):
                    continue
                if number in found and not self._same(found[number], records):
                    raise DisagreementError(self.disagreement(number))
                found.setdefault(number, records)
        return found

    def disagreement(self, number: int) -> str:
        """Return in one sentence that a batch was measured twice with different results."""
        return (
            f"two processes that measure the same must agree, but batch {number} was measured"
            f" twice with different results in {self._folder}; run the command again with"
            " force=true."
        )

    def written_by_others(self) -> dict[str, int]:
        """Return the sizes of other writers' files, to see whether they have added anything."""
        sizes = {}
        for path in self._folder.glob("*.jsonl"):
            with contextlib.suppress(FileNotFoundError):  # its part is whole now
                if path != self._path:
                    sizes[path.name] = path.stat().st_size
        return sizes

    def append(self, number: int, records: Records) -> None:
        """Add a batch's records; they are on disk when this returns.

        Raises:
            NotWritableError: If the folder cannot be written.
        """
        line = json.dumps({"batch": number, "records": records}, allow_nan=False)
        with translate_os_error(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                # The beginning of a line that was cut off by a full disk must not spoil this one.
                file.write(f"\n{line}\n")
                file.flush()
                os.fsync(file.fileno())

    def measuring(self, number: int) -> AbstractContextManager[None]:
        """Record that a batch is being measured, inside the block, in case this kills the process.

        Raises:
            GivenUpError: If that has killed its process before, too often.
        """
        return counting_deaths(self._folder / f"measuring-{number}.json")

    def remove(self) -> None:
        """Delete all records."""
        with translate_os_error(self._folder), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._folder)


@contextlib.contextmanager
def counting_deaths(path: Path) -> Iterator[None]:
    """Have a file, inside the block, that counts how often the process died there.

    Raises:
        GivenUpError: If it died too often; the next command tries again.
        NotWritableError: If the file cannot be written.
    """
    before = read_json(path)
    killed, deaths, oom_deaths = oom_kills(), 0, 0
    if isinstance(before, dict):
        deaths = int(before.get("deaths", 0)) + 1
        was_oom = None not in (killed, before.get("oom_kills")) and killed > before["oom_kills"]
        oom_deaths = int(before.get("oom_deaths", 0)) + was_oom
    if deaths >= MOST_DEATHS or oom_deaths >= MOST_OOM_DEATHS:
        path.unlink(missing_ok=True)
        raise GivenUpError(
            f"the process was killed {deaths} times while it measured this, "
            + ("for want of memory." if oom_deaths else "perhaps for want of memory.")
        )
    content = {"deaths": deaths, "oom_deaths": oom_deaths, "oom_kills": killed}
    with translate_os_error(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(json_bytes(content))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def oom_kills() -> int | None:
    """Return how many processes Linux has killed for want of memory since it started; else None."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


class Claims:
    """Who measures which batch of a group of cells, so that no two processes measure the same.

    Args:
        folder: The group's own folder.
        note: Told in one sentence which process measures a batch that is waited for.
    """

    def __init__(self, folder: Path, note: Callable[[str], None] = lambda text: None) -> None:
        self._folder = folder
        self._note = note

    @contextlib.contextmanager
    def claim(self, number: int, wait: bool) -> Iterator[bool]:
        """Claim a batch, inside the block; the system releases it if the process dies.

        Args:
            number: The batch.
            wait: Whether to wait for another process that measures it.

        Yields:
            False if another process measures it.
        """
        path, claimed = self._folder / f"{number}.lock", self._folder / f"{number}.json"
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(path, 0))
                is_mine = True
            except LockedError:
                is_mine = False
            if wait and not is_mine:
                holder = read_json(claimed)
                if isinstance(holder, dict) and {"host", "pid", "since"} <= holder.keys():
                    self._note(
                        f"batch {number} is measured by process {holder['pid']} on"
                        f" {holder['host']} since {holder['since']}: waiting for it"
                    )
                stack.enter_context(locked(path, -1))
                is_mine = True
            if is_mine:
                since = datetime.now(UTC).isoformat(timespec="seconds")
                holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
                with translate_os_error(self._folder):
                    claimed.write_bytes(json_bytes(holder))
                stack.callback(claimed.unlink, missing_ok=True)
            yield is_mine

    def prefilling(self, number: int) -> AbstractContextManager[None]:
        """Record that a batch is being prefilled, inside the block, in case this kills the process.

        Raises:
            GivenUpError: If that has killed its process before, too often.
        """
        return counting_deaths(self._folder / f"prefilling-{number}.json")
