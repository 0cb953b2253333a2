"""Tables as CSV in which a spreadsheet runs nothing.

A spreadsheet takes a field that begins with ``=``, ``+``, ``-``, ``@``, a tab or a line's end as a
formula. A text that does is written behind an apostrophe, which spreadsheets take as the mark of a
text; `as_written` takes it off again.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def csv_bytes(data: pd.DataFrame) -> bytes:
    """Return a table as a CSV file without its index; numbers stay as they are."""
    return _each_text(data, _guarded).to_csv(index=False, lineterminator="\n").encode()


def as_written(data: pd.DataFrame) -> pd.DataFrame:
    """Return a table read from CSV without the apostrophes that `csv_bytes` has put in."""
    return _each_text(data, lambda text: text[1:] if _is_guarded(text) else text)


def _each_text(data: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    """Return a table with each text changed; other values stay as they are."""
    changed = {
        name: values.map(lambda one: change(one) if isinstance(one, str) else one)
        for name, values in data.items()
        if values.dtype == object or isinstance(values.dtype, pd.StringDtype)
    }
    return data.assign(**{str(name): values for name, values in changed.items()})


def _guarded(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) or _is_guarded(text) else text


def _is_guarded(text: str) -> bool:
    """Return whether a text is apostrophes before what a spreadsheet takes as a formula."""
    return text.startswith("'") and text.lstrip("'").startswith(_FORMULA)
