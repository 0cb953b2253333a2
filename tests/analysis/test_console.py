"""What commands print reaches its reader, or ends the command with a status."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest

from topkbench.analysis.console import console, say, say_error


def closed_pipe() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.fixture
def full_disk() -> Iterator[TextIO]:
    with Path("/dev/full").open("w") as stream:
        yield stream


def test_signs_that_a_console_lacks_are_replaced_and_a_minus_stays_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for encoding, expected in (
        ("ascii", b"-3.5 [-4-2] <= 2 x D ? * #\n"),
        ("latin-1", b"-3.5 [-4-2] <= 2 \xd7 D ? * #\n"),
        ("utf-8", "−3.5 [−4–2] ≤ 2 × Δ 永 † ‡\n".encode()),
    ):
        content = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding=encoding))
        with console():
            say("−3.5 [−4–2] ≤ 2 × Δ 永 † ‡")
        assert content.getvalue() == expected


@pytest.mark.parametrize("print_one", [say, print])
def test_a_closed_pipe_ends_with_the_status_of_its_signal(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    print_one: Callable[[str], None],
) -> None:
    with closed_pipe() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as caught, console():
            print_one("a line")
    assert caught.value.code == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("print_one", [say, print])
def test_a_full_disk_behind_the_output_is_said(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    full_disk: TextIO,
    print_one: Callable[[str], None],
) -> None:
    monkeypatch.setattr(sys, "stdout", full_disk)
    with pytest.raises(SystemExit) as caught, console():
        print_one("a line")
    assert caught.value.code == 1
    message = "error: the output must be writable, but is not (No space left on device).\n"
    assert capsys.readouterr().err == message


def test_errors_that_nobody_reads_end_the_command_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_pipe() as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with pytest.raises(SystemExit) as caught:
            say_error("a sentence.")
    assert caught.value.code == 141


def test_a_command_without_output_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it if it is started without one
    monkeypatch.setattr(sys, "stderr", None)
    with console():
        say("a line")
        say_error("a sentence.")
