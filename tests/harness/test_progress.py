"""How long a fit or a sweep still takes follows from what this process did lately."""

from __future__ import annotations

import pytest

from topkbench.harness import progress
from topkbench.harness.progress import Bar


class Clock:
    """A clock that stands still, and what was said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.said: list[str] = []
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(progress, "say", self.said.append)
        self.bar = Bar("fit", lambda done, total: f"{done / total:.0%}", lines=True)

    def update(self, seconds: float, done: int, total: int = 1000, is_step: bool = True) -> None:
        """Let time pass and then update the bar."""
        self.now += seconds
        self.bar.update(done, total, is_step)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_work_that_was_found_and_set_up_say_nothing_of_the_time_left(clock: Clock) -> None:
    """Of 1,000 units 800 were found; texts are read for 10 minutes; a step of 10 takes 60 s."""
    for _ in range(10):
        clock.update(60, 800)
    assert clock.said == ["80%"] * 10
    clock.update(300, 810)  # the first step, with what it sets up
    for done in (820, 830):
        clock.update(60, done)
    assert clock.said[10:] == ["81%", "82%, about 18 min left", "83%, about 17 min left"]
    clock.update(30, 830)  # a time that is left passes
    assert clock.said[-1] == "83%, about 16 min left"


def test_the_time_left_follows_from_recent_steps(clock: Clock) -> None:
    for done in range(0, 100, 10):
        clock.update(60, done)
    for done in range(100, 900, 10):  # six times as fast
        clock.update(10, done)
    assert clock.said[-1] == "87%, about 2 min left"
    clock.update(30, 990)
    assert clock.said[-1].endswith("%, less than a minute left")


def test_a_batch_counts_when_it_is_done_with_all_cells(clock: Clock) -> None:
    """A batch is prefilled for 50 s and then decoded with five cells, 10 s each."""
    clock.bar.find(0)
    for batch in range(3):
        for cell in range(5):
            clock.update(60 if cell == 0 else 10, 5 * batch + cell + 1, 50, is_step=False)
        clock.update(0, 5 * (batch + 1), 50)
    assert clock.said[:3] == ["2%", "8%", "12%"]
    assert clock.said[-2:] == ["22%, about 12 min left", "28%, about 12 min left"]
