"""The tested versions of the libraries."""

from __future__ import annotations

from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[2] / "conf" / "constraints.txt"
"""The exact versions that passed all tests; in a checkout a link to the file at its root."""


def pinned_versions() -> dict[str, str]:
    """Return the tested version of each package; empty if the constraints file is missing."""
    if not CONSTRAINTS.is_file():
        return {}
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = (line.partition("==") for line in lines if not line.startswith("#"))
    return {name.strip(): version.strip() for name, found, version in pins if found}
