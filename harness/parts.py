"""Parts of cells on disk: a journal while they are measured, then one file."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from topkbench.analysis.record.journal import DisagreementError, Journal
from topkbench.analysis.record.store import PartStore
from topkbench.harness.sweep import Record

_APART = ("prefill_ms", "kept")
"""What two measurements of one batch need not agree in."""


class MeasuredPart:
    """What was measured of one part, shared by all cells of this process that have the part.

    Args:
        store: The parts' folder.
        part: Name of the part.
        key: Digest of everything that it depends on.
        force: Delete what was measured before.

    Attributes:
        records: By number of the batch; one object for as long as this one is used.
        journal: The lines that this and other processes have written.
    """

    def __init__(self, store: PartStore, part: str, key: str, force: bool) -> None:
        self.records: dict[int, list[Record]] = {}
        self.journal = Journal(store.folder / f"{part}-{key}", same_records)
        self._store, self._part, self._key = store, part, key
        self._seen: Any = None
        self._is_stored = False
        if force:
            self.journal.remove()
            store.remove(part, key)

    def refresh(self) -> None:
        """Add what other processes have measured since.

        Raises:
            DisagreementError: If something was measured twice with different results.
        """
        seen = (self._store.written_at(self._part, self._key), self.journal.written_by_others())
        if seen == self._seen:
            return
        # The journal first: it is deleted once the part's file is there.
        found = self.journal.read()
        whole = self._store.read(self._part, self._key)
        self._is_stored = whole is not None
        if whole is not None:
            found = {int(number): records for number, records in whole["records"].items()}
        for number, records in found.items():
            if not same_records(self.records.setdefault(number, records), records):
                raise DisagreementError(self.journal.disagreement(number))
        self._seen = seen

    def keep(self, number: int, records: list[Record]) -> None:
        """Add a batch's records; they are on disk when this returns.

        Raises:
            NotWritableError: If the folder cannot be written.
            ValueError: If a number is not finite.
        """
        self.journal.append(number, records)
        self.records[number] = records

    def close(self) -> None:
        """Write the whole part as one file, unless that was done, and delete its journal."""
        if not self._is_stored:
            records = {str(number): one for number, one in sorted(self.records.items())}
            self._store.write(self._part, self._key, {"records": records})
            self._is_stored = True
        self.journal.remove()


def same_records(one: Sequence[Record], other: Sequence[Record]) -> bool:
    """Return whether two measurements of one batch agree in everything except times.

    Measured values may differ in rounding, as on a GPU, and with them which of two tokens with
    nearly equal scores was kept; tokens, texts and counts may not.
    """
    return _same(_comparable(one), _comparable(other))


def _comparable(records: Sequence[Record]) -> Any:
    """Return records without times of prefills and decode steps, and without the tokens kept."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(one) for name, one in value.items() if name not in _APART}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [plain(one) for one in value if not _is_timing(one)]
        return value

    return plain(records)


def _is_timing(value: Any) -> bool:
    return isinstance(value, Mapping) and "turn_ms" in value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-6)
    return bool(one == other)
