"""The commit of the code that made rows, where there is no configuration to record it."""

import subprocess
from pathlib import Path
from typing import Any


def commit_of(folder: Path, stated: str | None) -> dict[str, Any]:
    """Return the columns ``git_commit`` and ``git_dirty`` of the code in a checkout.

    Args:
        folder: The checkout's root. If it is not the root of a repository, as in site-packages, it
            counts as outside git: a repository further up is another project's.
        stated: The commit given by the user, for code outside git; may be abbreviated.

    Returns:
        The commit, and whether a tracked file was changed since; without git only the stated
        commit, or nothing.

    Raises:
        ValueError: If the stated commit is not the one checked out.
    """

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            return None
        return None if done.returncode else done.stdout.strip()

    root, head = git("rev-parse", "--show-toplevel"), git("rev-parse", "HEAD")
    if root is None or head is None or Path(root).resolve() != folder.resolve():
        return {"git_commit": stated} if stated else {}
    if stated and not head.startswith(stated):
        raise ValueError(f"--commit must be the checked out {head}, got {stated}.")
    return {"git_commit": head, "git_dirty": git("status", "--porcelain", "-uno") != ""}
