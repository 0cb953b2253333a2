"""The commit of the code that makes rows, and whether it has uncommitted changes."""

import subprocess
from pathlib import Path
from typing import Any


def git_state(folder: Path, digits: int = 12) -> dict[str, Any]:
    """Return ``git_commit`` and ``git_dirty`` of a checkout; both None if it is none.

    Args:
        folder: The checkout's root. If it is not the root of a repository, as in site-packages, it
            counts as outside git: a repository further up is another project's.
        digits: Digits of the commit.
    """

    def git(*words: str) -> str | None:
        try:
            found = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return found.stdout.strip() if found.returncode == 0 else None

    commit = git("rev-parse", f"--short={digits}", "HEAD")
    if commit is None or git("rev-parse", "--show-toplevel") != str(folder.resolve()):
        return {"git_commit": None, "git_dirty": None}
    return {"git_commit": commit, "git_dirty": git("status", "--porcelain", "-uno") != ""}


def commit_of(folder: Path, stated: str | None) -> dict[str, Any]:
    """Return the columns ``git_commit`` and ``git_dirty`` of code that may lie outside git.

    Args:
        folder: The checkout's root.
        stated: The commit given by the user, for code outside git; may be abbreviated.

    Returns:
        The commit, and whether a tracked file was changed since; without git only the stated
        commit, or nothing.

    Raises:
        ValueError: If the stated commit is not the one checked out.
    """
    state = git_state(folder, digits=40)
    head = state["git_commit"]
    if head is None:
        return {"git_commit": stated} if stated else {}
    if stated and not head.startswith(stated):
        raise ValueError(f"--commit must be the checked out {head}, got {stated}.")
    return state
