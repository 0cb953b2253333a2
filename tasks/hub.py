"""Data sets of the hub, by id and revision."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

PREFIX = "hub:"


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub, as a setting names it: ``hub:OWNER/NAME[/CONFIG][@REVISION]``.

    Attributes:
        name: Its id, ``OWNER/NAME``.
        config: Its configuration; None for the only one.
        revision: A commit, branch or tag; None for the newest.
    """

    name: str
    config: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        config = "" if self.config is None else f"/{self.config}"
        return f"{self.name}{config}" + ("" if self.revision is None else f"@{self.revision}")


def parse_hub(setting: str, value: str) -> HubDataset:
    """Return the data set that a setting's value names.

    Raises:
        ValueError: If the value is not ``hub:OWNER/NAME[/CONFIG][@REVISION]``.
    """
    found = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:@([\w./-]+))?", value)
    if found is None or not all(re.search(r"\w", part) for part in found[1].split("/")):
        raise ValueError(
            f"{setting} must name a data set as hub:OWNER/NAME, hub:OWNER/NAME/CONFIG or either"
            f" with @REVISION, got {value!r}."
        )
    return HubDataset(*found.groups())


@cache
def hub_rows(
    setting: str, wanted: HubDataset, splits: Sequence[str], named: re.Pattern[str] | None = None
) -> list[dict[str, Any]]:
    """Return the rows of a data set, fetched once and then read from the hub's cache.

    Args:
        setting: The setting that names it, for messages.
        wanted: The data set.
        splits: Names of the split to read; the first that it has, or its only one.
        named: If all splits have such names, all are read, and a row's ``task`` is its split's name
            unless it has one.

    Raises:
        ValueError: If the package ``datasets`` is missing, the data set cannot be read, or it has
            none of the splits.
    """
    try:
        import datasets  # optional, and slow to import
    except ImportError:
        raise ValueError(
            f"{setting}={PREFIX}{wanted} needs the package datasets, which is not installed: pip"
            " install 'topkbench[datasets]'."
        ) from None
    try:
        loaded = datasets.load_dataset(wanted.name, wanted.config, revision=wanted.revision)
    except Exception as error:  # its errors have no class in common
        raise ValueError(
            f"{setting} must name a data set of the hub that can be read, got {wanted}:"
            f" {' '.join(str(error).split())[:300]}"
        ) from None
    names = [str(name) for name in loaded]
    if named is not None and all(map(named.fullmatch, names)):
        return [{"task": name, **row} for name in names for row in loaded[name]]
    chosen = next((name for name in splits if name in names), names[0] if len(names) == 1 else None)
    if chosen is None:
        raise ValueError(
            f"{setting} must name a data set with the split {' or '.join(splits)}, or with one"
            f" split alone, but {wanted} has {', '.join(names)}."
        )
    return list(loaded[chosen])
