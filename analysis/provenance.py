"""Which code ran: the commit of the checkout, and whether it was changed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any


def git_state(folder: Path) -> dict[str, Any]:
    """Return ``git_commit`` and ``git_dirty`` of a checkout; both None where there is none.

    Args:
        folder: The checkout's root.
    """

    def git(*words: str) -> str | None:
        try:
            found = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return found.stdout.strip() if found.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    if commit is None or git("rev-parse", "--show-toplevel") != str(folder.resolve()):
        return {"git_commit": None, "git_dirty": None}
    return {"git_commit": commit, "git_dirty": bool(git("status", "--porcelain", "-uno"))}
