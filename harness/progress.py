"""Says how far a fit or a sweep is: a bar on a terminal, else a line at most every 30 s."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Self

from tqdm import tqdm

from topkbench.analysis.console import say

INTERVAL_S = 30.0
"""Seconds between two lines."""

RECENT_S = 300.0
"""The time that is left follows from the work of as many seconds, or of half the time if longer."""


class Bar:
    """A bar or lines; nothing before the first update.

    Args:
        name: What the bar is called.
        line: Returns what a line says of the units done and their total.
        also: Called whenever a line is due, on a terminal too.
        lines: Print lines on a terminal too, as several processes do that share it.
    """

    def __init__(
        self,
        name: str,
        line: Callable[[int, int], str],
        also: Callable[[], None] = lambda: None,
        lines: bool = False,
    ) -> None:
        # When the latest steps ended, and the units of this process's work that were done by then.
        self._steps: deque[tuple[float, int]] = deque()
        self._found: int | None = None
        self._name, self._line, self._also, self._lines = name, line, also, lines
        self._bar: Any = None
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def find(self, units: int) -> None:
        """Add units that were done before, and so say nothing of the time that is left."""
        self._found = (self._found or 0) + units

    def update(self, done: int, total: int, is_step: bool = True) -> None:
        """Show the units done, of their total; those of the first update were done before.

        Args:
            done: Units done, with those that were found.
            total: Units in all.
            is_step: Whether a step has ended, of those that each take about as long for a unit; the
                time that is left follows from whole steps alone.
        """
        if self._bar is None:
            self._bar = tqdm(desc=self._name, disable=self._lines or None, leave=False)
        if self._found is None:
            self._found = done
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        now = time.monotonic()
        if is_step:
            self._note(now, done - self._found)
        if now - self._said < INTERVAL_S:
            return
        self._said = now
        self._also()
        if self._bar.disable:
            say(f"{self._line(done, total)}{self._time_left(total - self._found, now)}")

    def _note(self, now: float, worked: int) -> None:
        """Keep that a step has ended, if it did any work, and forget those long ago."""
        if worked <= (self._steps[-1][1] if self._steps else 0):
            return
        self._steps.append((now, worked))
        since = now - max(RECENT_S, (now - self._began) / 2)
        while len(self._steps) > 2 and self._steps[1][0] <= since:
            self._steps.popleft()

    def _time_left(self, total: int, now: float) -> str:
        """Return in words how long the rest takes; nothing if too little has been done to know.

        The first step is left out: it also sets up what all steps use.
        """
        if len(self._steps) < 2:
            return ""
        (start, before), (end, after) = self._steps[0], self._steps[-1]
        seconds = (end - start) / (after - before) * (total - after) - (now - end)
        minutes = seconds / 60
        return f", about {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"
