"""Names in figures: one of hundreds of characters leaves no space for what is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from topkbench.analysis import style

MOST = 72
"""Characters of a configuration's name."""
MOST_METHOD = 32
"""Characters of a method's name."""
MOST_SUBTASK = 28
"""Characters of a sub-task's name."""


def short_names(names: Iterable[str], most: int = MOST) -> dict[str, str]:
    """Return each distinct name, those that are too long with an ellipsis in their middle.

    Different names stay different: those whose ends are the same are numbered.

    Args:
        names: The names.
        most: Characters of the longest name that is left as it is.
    """
    found: dict[str, str] = {}
    for name in sorted(set(names), key=lambda one: (len(one) > most, one)):
        text, number = _with_ellipsis(name, most, ""), 1
        while text in found.values():
            number += 1
            text = _with_ellipsis(name, most, f" ({number})")
        found[name] = text
    return found


def _with_ellipsis(name: str, most: int, number: str) -> str:
    if len(name) <= most:
        return name
    left = most - len(number) - 1
    return f"{name[: left - left // 2].rstrip()}…{name[len(name) - left // 2 :].lstrip()}{number}"


def short_methods() -> AbstractContextManager[None]:
    """Within the block, methods that only the rows know have short names."""
    return style.relabelled(short_names(style.labels(), MOST_METHOD))
