"""The results on disk: cells, each written atomically, and sweeps, which are lists of cells."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from topkbench.analysis.record import kept_file
from topkbench.analysis.record.files import (
    check_writable,
    json_bytes,
    locked,
    read_json,
    translate_os_error,
    write_atomic,
)
from topkbench.analysis.record.row import (
    COLUMNS,
    MEASURED,
    PARAMETER_PREFIX,
    SPEED_COLUMNS,
    RecordError,
    Row,
    Scalar,
    Status,
)
from topkbench.analysis.record.samples_file import read_samples_file, samples_bytes

__all__ = [
    "COLUMNS",
    "SPEED_COLUMNS",
    "Cell",
    "CellStore",
    "PartStore",
    "RecordError",
    "Row",
    "Scalar",
    "Status",
    "Sweep",
    "check_experiment_name",
    "checked_results_dir",
    "frame",
    "identity",
    "named_values",
]

_IDENTITY = re.compile(r"[0-9a-f]{16}")
_SHARED = (
    "cells",
    "parts",
    "claims",
    "batch_sizes",
    "studies",
)  # folders of results that all sweeps share
_PLACE = "results_dir.txt"
"""File of a sweep that holds the path from its folder to the results."""
_OF_CELL = ("model", "task", "method", "k", "rbit", "protocol", "question", "seed")
"""Columns of a cell's rows that are beside each of its samples, too."""
_TRIALS, _SEARCH = "trials.json", "search.json"
"""Files of a sweep that is a search: the cells of its trials, and all that a report shows."""


def identity(payload: Mapping[str, Any]) -> str:
    """Return a digest of 16 hexadecimal digits that names a payload, the same in every process.

    Args:
        payload: Mappings with string keys, sequences, strings, numbers, booleans and None. The
            order of keys does not matter; ``1`` and ``1.0`` are different.

    Raises:
        RecordError: If a value has no canonical form (NaN, a path, an object).
    """
    text = json.dumps(
        _canonical(payload, "payload"), sort_keys=True, separators=(",", ":"), ensure_ascii=True
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _canonical(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RecordError(f"keys of {where} must be strings, got {key!r}.")
        return {key: _canonical(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise RecordError(f"{where} must be plain and finite to be digested, got {value!r}.")


def named_values(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested settings, each under its name, such as ``method.page_size``."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= named_values(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def checked_results_dir(value: Any) -> Path:
    """Return the folder of results that a setting names, without making it.

    Raises:
        RecordError: If the setting names no folder, or the folder cannot be written.
    """
    if not isinstance(value, str) or not value.strip():
        found = "null" if value is None else repr(value)
        raise RecordError(
            f"results_dir must name a folder, got {found}; the default is results_dir=results."
        )
    folder = Path(value)
    check_writable(folder)
    return folder


def check_experiment_name(name: str) -> None:
    """Check the setting that says where in the folder of results a sweep's folder is.

    Raises:
        RecordError: If it leads out of the folder of results, or into what all sweeps share.
    """
    place = Path(os.path.normpath(name))
    if place.is_absolute() or {*place.parts[:1]} & {"..", *_SHARED}:
        raise RecordError(
            "experiment_name must name a folder inside results_dir, and none of"
            f" {', '.join(_SHARED)}, got {name!r}."
        )


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Return rows as a frame: the columns of `Row` in order, then ``p_*`` sorted by name."""
    flat = [row.flat() for row in rows]
    extra = sorted({name for row in flat for name in row if name.startswith(PARAMETER_PREFIX)})
    # object: numpy would turn integers into floats where a row lacks a value
    return typed(pd.DataFrame(flat, columns=[*COLUMNS, *extra], dtype=object))


def one_row_a_cell(rows: pd.DataFrame) -> pd.DataFrame:
    """Return each cell's mean, or its first row where there is none: its status is the cell's."""
    first = rows["subtask"].ne("mean").sort_values(kind="stable").index
    return rows.loc[rows.loc[first].drop_duplicates("run_id").index.sort_values()]


def typed(data: pd.DataFrame) -> pd.DataFrame:
    """Return rows whose column types, Int64, float64 or object, do not depend on missing values."""
    # Set one by one in a frame, hundreds of columns take most of a small report's time.
    columns: dict[str, pd.Series] = {}
    for name in data.columns:
        values = data[name]
        kind = Row.__annotations__.get(name, "")
        if name.startswith(PARAMETER_PREFIX):
            present = {type(value) for value in values.dropna()}
            kind = {frozenset({int}): "int", frozenset({int, float}): "float"}.get(
                frozenset(present), "float" if present == {float} else "mixed"
            )
            if len(present) > 1 and kind == "mixed":
                texts = [None if pd.isna(one) else str(one) for one in values]
                values = pd.Series(texts, values.index, dtype=object)
        if kind.startswith("int"):
            if values.dtype != "Int64":
                values = pd.to_numeric(values).astype("Int64")
        elif kind.startswith("float"):
            if values.dtype != "float64":
                values = pd.to_numeric(values).astype("float64")
        else:
            missing = values.isna()
            values = values.astype(object)
            if missing.any():
                values = values.where(~missing, "" if name == "reason" else None)
        columns[name] = values
    return pd.DataFrame(columns, data.index, data.columns, copy=True)


@dataclass(frozen=True)
class Cell:
    """One folder ``results/cells/<identity>/``; ``rows.json`` is written last."""

    folder: Path

    @property
    def identity(self) -> str:
        """The identity, which is the folder's name."""
        return self.folder.name

    def lock(self, timeout_s: float = -1) -> contextlib.AbstractContextManager[None]:
        """Return a context that locks the cell for one process; waits forever by default (-1)."""
        return locked(self.folder / "lock", timeout_s)

    def begin(self, row: Row) -> int:
        """Record that an attempt begins, so that a killed one leaves a row. Hold the lock.

        Args:
            row: The names and parameters known so far. Its status and reason are replaced.

        Returns:
            The number of this attempt, from 1.
        """
        attempt = self.attempt + 1
        placeholder = row.replace(
            status=Status.INTERRUPTED,
            reason="the attempt had not finished when the report was made.",
            **dict.fromkeys(MEASURED),
        )
        content = {"attempt": attempt, "row": placeholder.flat()}
        write_atomic(self.folder / "begun.json", json_bytes(content))
        # A new attempt deletes the old result: otherwise a kill would leave a stale one.
        with translate_os_error(self.folder):
            (self.folder / "rows.json").unlink(missing_ok=True)
            (self.folder / "tracked").unlink(missing_ok=True)
        return attempt

    @property
    def tracked(self) -> bool:
        """Whether the tracker has a copy of the finished cell; false if killed before that."""
        return (self.folder / "tracked").exists()

    def mark_tracked(self) -> None:
        """Record that the tracker has a copy of the cell."""
        write_atomic(self.folder / "tracked", b"")

    @property
    def attempt(self) -> int:
        """The number of attempts begun so far."""
        begun = read_json(self.folder / "begun.json")
        return int(begun["attempt"]) if isinstance(begun, dict) and "attempt" in begun else 0

    def read(self) -> list[Row]:
        """Return the rows of the last attempt, one ``interrupted`` row, or an empty list."""
        rows = self._intact_rows()
        if rows is not None:
            return rows
        begun = read_json(self.folder / "begun.json")
        try:
            row = Row.from_flat(begun["row"])
            if (self.folder / "rows.json").exists():
                row.reason = "the cell's files were changed after it ended; run the command again."
            return [row]
        except (TypeError, KeyError, RecordError):
            return []

    def _intact_rows(self) -> list[Row] | None:
        """Return the rows of a finished attempt whose files are unchanged, else None."""
        content = read_json(self.folder / "rows.json")
        try:
            if content["digest"] != _digest(content["rows"], content["files"]):
                return None
            for name, digest in content["files"].items():
                if hashlib.sha256((self.folder / name).read_bytes()).hexdigest() != digest:
                    return None
            return [Row.from_flat(row) for row in content["rows"]] or None
        except (TypeError, KeyError, AttributeError, OSError, RecordError):
            return None

    @property
    def status(self) -> Status | None:
        """The worst status of the cell's rows; None if no attempt has begun."""
        found = {row.status for row in self.read()}
        order = [s for s in reversed(Status) if not s.settled] + [Status.OK, Status.SKIPPED]
        return next((status for status in order if status in found), None)

    def has_ended(self) -> bool:
        """Return whether the last attempt has ended, whatever its rows say."""
        return self._intact_rows() is not None

    def finished(self) -> bool:
        """Return whether the cell need not run again: complete, and each of its rows settled."""
        rows = self.read()
        return bool(rows) and all(row.settled for row in rows)

    def samples(self) -> pd.DataFrame:
        """Return the samples passed to `write`, one row each; empty if there are none.

        The first columns are the cell's settings: model, task, method, k, rbit, protocol, question
        (sparse or dense) and seed.
        """
        rows = self._intact_rows()
        if rows is None:
            return pd.DataFrame()
        return _with_settings(read_samples_file(self.folder / "samples.parquet"), rows)

    def kept(self) -> pd.DataFrame:
        """Return which tokens the heads kept, see `kept_file`; empty if it was not recorded."""
        if self._intact_rows() is None:
            return pd.DataFrame()
        return kept_file.read_kept_file(self.folder / kept_file.NAME)

    def config(self) -> dict[str, Any]:
        """Return the resolved configuration, empty if there is none."""
        found = read_json(self.folder / "config.json")
        return found if isinstance(found, dict) else {}

    def write(
        self,
        rows: Sequence[Row],
        samples: Sequence[Mapping[str, Any]],
        config: Mapping[str, Any],
        log: str,
        kept: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write the cell's results atomically. Hold the lock.

        Args:
            rows: One per sub-task and one for the mean; at least one.
            samples: One mapping per sample: sample_id, subtask, length, score (0 to 100),
                prediction, references (a list), num_generated and any others.
            config: The resolved configuration, plain values only.
            log: Text of the cell's log.
            kept: Which tokens the heads kept, one mapping per prompt, see `kept_file`.

        Raises:
            RecordError: If the folder cannot be written, or there is no row.
        """
        if not rows:
            raise RecordError(f"a cell must leave at least one row, got none for {self.identity}.")
        with translate_os_error(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "rows.json").unlink(missing_ok=True)
            (self.folder / kept_file.NAME).unlink(missing_ok=True)
        content = {
            "samples.parquet": samples_bytes(_samples_frame(samples, rows)),
            "config.json": json_bytes(_canonical(config, "config")),
            "log.txt": log.encode(errors="replace"),
        }
        if kept:
            content[kept_file.NAME] = samples_bytes(pd.DataFrame(list(kept)))
        for name, data in content.items():
            write_atomic(self.folder / name, data)
        files = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
        flat = [row.flat() for row in rows]
        ended = {"digest": _digest(flat, files), "files": files, "rows": flat}
        write_atomic(self.folder / "rows.json", json_bytes(ended))


def _digest(rows: Sequence[Mapping[str, Any]], files: Mapping[str, str]) -> str:
    """Return a digest of rows and of the digests of the cell's other files."""
    text = json.dumps([list(rows), dict(files)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _samples_frame(samples: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> pd.DataFrame:
    """Return the samples of a cell, one row each, with the cell's settings."""
    columns = ["sample_id", "subtask", "length", "score", "prediction", "references"]
    data = pd.DataFrame(list(samples)) if samples else pd.DataFrame(columns=columns)
    return _with_settings(data, rows)


def _with_settings(samples: pd.DataFrame, rows: Sequence[Row]) -> pd.DataFrame:
    """Return samples with the settings of their cell in front, where they have none of their own.

    Args:
        samples: The samples; those of older versions lack the settings.
        rows: The cell's rows. A setting in which they differ stays empty.
    """
    for place, name in enumerate([name for name in _OF_CELL if name not in samples]):
        values = {getattr(row, name) for row in rows}
        value = values.pop() if len(values) == 1 else None
        kind = "Int64" if Row.__annotations__[name].startswith("int") else object
        samples.insert(place, name, pd.Series([value] * len(samples), samples.index, dtype=kind))
    return samples


class CellStore:
    """The folder ``results/cells/``, shared by every sweep."""

    def __init__(self, results_dir: str | Path) -> None:
        self.folder = Path(results_dir) / "cells"

    def cell(self, identity: str) -> Cell:
        """Return the cell of an identity; it need not exist yet.

        Raises:
            RecordError: If the identity is not 16 hexadecimal digits.
        """
        if not _IDENTITY.fullmatch(identity):
            raise RecordError(f"identity must be 16 hexadecimal digits, got {identity!r}.")
        return Cell(self.folder / identity)

    def cells(self) -> list[Cell]:
        """Return all cells, sorted by identity."""
        if not self.folder.is_dir():
            return []
        return [
            Cell(path) for path in sorted(self.folder.iterdir()) if _IDENTITY.fullmatch(path.name)
        ]


class PartStore:
    """The folder ``results/parts/``: results of parts of cells, one file per part and key."""

    def __init__(self, results_dir: str | Path) -> None:
        self.folder = Path(results_dir) / "parts"

    def read(self, part: str, key: str) -> dict[str, Any] | None:
        """Return a part's result, or None if it was never computed or its file is damaged.

        Args:
            part: Name of the part.
            key: Digest of everything that the result depends on.
        """
        found = read_json(self._path(part, key))
        try:
            intact = found["digest"] == _digest([found["content"]], {part: key})
        except (TypeError, KeyError):
            return None
        return dict(found["content"]) if intact else None

    def written_at(self, part: str, key: str) -> int | None:
        """Return when a part's file was written, in nanoseconds; None if there is none."""
        try:
            return self._path(part, key).stat().st_mtime_ns
        except OSError:
            return None

    def write(self, part: str, key: str, content: Mapping[str, Any]) -> None:
        """Store a part's result atomically; a result with a number that is not finite is dropped.

        Raises:
            RecordError: If the folder cannot be written.
        """
        try:
            plain = json.loads(json.dumps(content, allow_nan=False))
        except ValueError:
            return
        stored = {"digest": _digest([plain], {part: key}), "content": plain}
        write_atomic(self._path(part, key), json_bytes(stored))

    def remove(self, part: str, key: str) -> None:
        """Delete a part's result, if there is one."""
        with translate_os_error(self.folder):
            self._path(part, key).unlink(missing_ok=True)

    def _path(self, part: str, key: str) -> Path:
        return self.folder / f"{part}-{key}.json"


class Sweep:
    """A sweep's folder: a list of cells, which are kept in the folder of results, and the report.

    The sweep's folder may be anywhere: it records where the results are.
    """

    def __init__(self, folder: str | Path, results_dir: str | Path) -> None:
        self.folder = Path(folder)
        self.results_dir = Path(results_dir)
        self.store = CellStore(results_dir)

    @classmethod
    def open(cls, folder: str | Path) -> Sweep:
        """Return the sweep of a folder; without its record of the results it has no cell."""
        path = Path(folder).absolute()
        record = path / _PLACE
        place = record.read_text(encoding="utf-8") if record.is_file() else "."
        return cls(path, path / place)

    @property
    def title(self) -> str:
        """The sweep's name for a tracker: its folder's place in the results, if it is there."""
        folder, results = self.folder.resolve(), self.results_dir.resolve()
        inside = results in folder.parents
        return folder.relative_to(results).as_posix() if inside else folder.name

    @property
    def _list(self) -> Path:
        return self.folder / "cells.json"

    def identities(self) -> list[str]:
        """Return the identities of the sweep's cells in the order in which they were added.

        Raises:
            RecordError: If the list exists but cannot be read.
        """
        if not self._list.exists():
            return []
        found = read_json(self._list)
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise RecordError(
                f"{self._list} must be a list of identities, but is damaged; delete it and run "
                "the sweep again (finished cells are not run again)."
            )
        return found

    def append(self, identity: str) -> None:
        """Add a cell to the sweep unless it is in it. Safe between processes."""
        self.store.cell(identity)
        with locked(self.folder / ".cells.lock", timeout_s=60):
            known = self.identities()
            if not known:  # relative, so that results can be moved as a whole
                place = os.path.relpath(self.results_dir.resolve(), self.folder.resolve())
                write_atomic(self.folder / _PLACE, place.encode())
            if identity not in known:
                write_atomic(self._list, json_bytes([*known, identity]))

    def note_trial(self, number: int, identity: str) -> None:
        """Record which cell a trial of a search is. Safe between processes."""
        with locked(self.folder / ".cells.lock", timeout_s=60):
            write_atomic(
                self.folder / _TRIALS, json_bytes({**self.trials(), str(number): identity})
            )

    def trials(self) -> dict[str, str]:
        """Return the cells of the trials that have begun in this sweep, by the trial's number."""
        found = read_json(self.folder / _TRIALS)
        return found if isinstance(found, dict) else {}

    def note_search(self, content: Mapping[str, Any]) -> None:
        """Record the state of a search; `figures.search.outcome` says what it holds."""
        write_atomic(self.folder / _SEARCH, json_bytes(content))

    def search(self) -> dict[str, Any] | None:
        """Return what was recorded of the sweep's search; None if it is none."""
        found = read_json(self.folder / _SEARCH)
        return found if isinstance(found, dict) else None

    def commands(self) -> list[str]:
        """Return the command lines that ran the sweep, in order."""
        path = self.folder / "commands.txt"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def note_command(self, command: str) -> None:
        """Add a command line unless it is recorded. Safe between processes."""
        with locked(self.folder / ".cells.lock", timeout_s=60):
            known = self.commands()
            if command not in known:
                write_atomic(self.folder / "commands.txt", "\n".join([*known, command]).encode())

    def cells(self) -> list[Cell]:
        """Return the sweep's cells in order."""
        return [self.store.cell(one) for one in self.identities()]

    def rows(self) -> pd.DataFrame:
        """Return all rows of the sweep: one of an interrupted cell, none of a cell not begun."""
        return frame([row for cell in self.cells() for row in cell.read()])

    def samples(self) -> pd.DataFrame:
        """Return all samples of the sweep, with the cell as ``run_id`` in the first column."""
        return samples_of(self.cells())


def samples_of(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return the samples of some cells, with the cell as ``run_id`` in the first column."""
    return _joined(cells, [cell.samples() for cell in cells])


def kept_of(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return which tokens the heads kept in some cells, with ``run_id`` in the first column."""
    return _joined(cells, [cell.kept() for cell in cells])


def _joined(cells: Sequence[Cell], tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the tables of some cells as one, with the cell as ``run_id`` in the first column."""
    parts: list[pd.DataFrame] = []
    for cell, data in zip(cells, tables, strict=True):
        if len(data):
            data.insert(0, "run_id", cell.identity)
            parts.append(data)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"run_id": []})
