"""The commit of the code, whether it has uncommitted changes, and the tested library versions."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parents[1] / "conf" / "constraints.txt"
"""The exact versions that passed all tests; in a checkout a link to the file at its root."""


def pinned_versions() -> dict[str, str]:
    """Return the tested version of each package; empty if the constraints file is missing."""
    if not CONSTRAINTS.is_file():
        return {}
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = (line.partition("==") for line in lines if not line.startswith("#"))
    return {name.strip(): version.strip() for name, found, version in pins if found}


def git_state(folder: Path) -> dict[str, Any]:
    """Return ``git_commit`` and ``git_dirty`` of a checkout; both None if it is none.

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
