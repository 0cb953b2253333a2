"""Says how far a fit or a sweep is: a bar on a terminal, else a line at most every 30 s."""

import time
from collections.abc import Callable
from typing import Any, Self

from tqdm import tqdm

from topkbench.analysis.console import say

INTERVAL_S = 30.0
"""Seconds between two lines."""


class Bar:
    """A bar or lines; nothing before the first update.

    Args:
        name: What the bar is called.
        line: Returns what a line says of the units done and their total.
        also: Called whenever a line is due, on a terminal too.
        lines: Print lines on a terminal too, as several processes do that share it.

    Attributes:
        before: Units that were done before, and so say nothing of the time that is left.
    """

    def __init__(
        self,
        name: str,
        line: Callable[[int, int], str],
        also: Callable[[], None] = lambda: None,
        lines: bool = False,
    ) -> None:
        self.before: int | None = None
        self._name, self._line, self._also, self._lines = name, line, also, lines
        self._bar: Any = None
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, total: int) -> None:
        """Show the units done, of their total.

        Where nothing else is known, those of the first update were done before.
        """
        if self._bar is None:
            self._bar = tqdm(desc=self._name, disable=self._lines or None, leave=False)
        if self.before is None:
            self.before = done
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        now = time.monotonic()
        if now - self._said < INTERVAL_S:
            return
        self._said = now
        self._also()
        if self._bar.disable:
            left = self._time_left(done - self.before, total - done, now)
            say(f"{self._line(done, total)}{left}")

    def _time_left(self, done: int, left: int, now: float) -> str:
        """Return in words how long the rest takes; nothing if nothing is done."""
        if done < 1:
            return ""
        minutes = (now - self._began) / done * left / 60
        return f", about {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"
