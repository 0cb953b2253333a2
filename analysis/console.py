"""What commands print: on any console, into a pipe that is closed early, onto a full disk."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

CLOSED_PIPE_STATUS = 141
"""Exit status if the reader of the output has gone: 128 + SIGPIPE, as a shell reports it."""


_PLAIN = {"−": "-", "–": "-", "×": "x", "≤": "<=", "Δ": "D", "†": "*", "‡": "#"}
"""What is printed for the tables' signs where a console lacks them; a minus must not get lost."""


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    missing = error.object[error.start : error.end]
    return "".join(_PLAIN.get(sign, "?") for sign in missing), error.end


codecs.register_error("topkbench.plain", _plain)


@contextlib.contextmanager
def console() -> Iterator[None]:
    """Print other signs for those that a console lacks; end with a status if nobody reads them.

    Raises:
        SystemExit: If the output cannot be written.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="topkbench.plain")
    try:
        yield
    except BrokenPipeError as error:  # of another library's print
        raise SystemExit(_give_up(sys.stdout, error)) from None
    finally:
        with _printing(sys.stdout) as stream:
            stream.flush()


def visible(text: object) -> str:
    """Return a text in which signs that nobody sees, such as a terminal's commands, are escapes.

    Control and format characters, such as marks that turn the direction of writing, and surrogates
    become Python's escapes. Line breaks stay.
    """
    return "".join(
        one if one == "\n" or unicodedata.category(one) not in _UNSEEN else _escape(one)
        for one in str(text)
    )


_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control and format characters, surrogates, and separators of lines."""


def _escape(sign: str) -> str:
    return sign.encode("unicode_escape", "surrogatepass").decode("ascii")


def say(text: object, is_visible: bool = False) -> None:
    """Print a line to standard output at once.

    Args:
        text: The text.
        is_visible: Whether what is not ours in it has been through `visible`; it may then have
            colours. All other text is made visible here.

    Raises:
        SystemExit: If it cannot be written.
    """
    with _printing(sys.stdout) as stream:
        print(text if is_visible else visible(text), file=stream, flush=True)


def say_progress(text: object) -> None:
    """Print a line to standard error at once: what is at work, not what came out.

    Raises:
        SystemExit: If it cannot be written.
    """
    with _printing(sys.stderr) as stream:
        print(visible(str(text)), file=stream, flush=True)


def say_error(sentence: object) -> None:
    """Print ``error:`` and a sentence to standard error.

    Raises:
        SystemExit: If it cannot be written.
    """
    with _printing(sys.stderr) as stream:
        print(f"error: {visible(sentence)}", file=stream, flush=True)


@contextlib.contextmanager
def _printing(stream: TextIO | None) -> Iterator[TextIO]:
    """Yield a stream to print to; a closed one is replaced by one that drops everything."""
    try:
        yield io.StringIO() if stream is None else stream
    except OSError as error:
        raise SystemExit(_give_up(stream, error)) from None


def _give_up(stream: TextIO | None, error: OSError) -> int:
    """Send what a stream still holds nowhere, and return the exit status for its error."""
    if stream is not None:  # else Python would complain when it flushes it at the end
        with contextlib.suppress(OSError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
    if isinstance(error, BrokenPipeError):
        return CLOSED_PIPE_STATUS
    if stream is sys.stdout:
        say_error(f"the output must be writable, but is not ({error.strerror}).")
    return 1
