"""Read tables of rows and samples from files, which may be damaged or edited by hand."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from topkbench.analysis.record.csv_file import as_written
from topkbench.analysis.record.row import COLUMNS, PARAMETER_PREFIX, Row, present_task
from topkbench.analysis.record.samples_file import read_samples_file
from topkbench.analysis.record.store import RecordError, typed


def read_rows(file: Path) -> pd.DataFrame:
    """Return the rows of a CSV or Parquet file; columns that are newer than the file are empty.

    Raises:
        RecordError: If the file is cut or cannot be read, lacks a column that every row has, or
            holds what no row may: a text for a number, an unknown status, a speed of a wrong
            result. The message names the row, counted from 1 below the head.
    """
    # Text columns are named, since an identity of only digits would be read as a number. As objects
    # they are Python's own texts, of which pandas' take many times as long to read one by one.
    words = {name: object for name in COLUMNS if Row.__annotations__[name].startswith("str")}
    try:
        if file.suffix == ".csv":
            _check_whole(file)
            head = pd.read_csv(file, nrows=0)
            words |= {str(name): object for name in head if _is_parameter(name)}
            # A text such as None is no missing value.
            texts: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
            data = as_written(pd.read_csv(file, dtype=words, low_memory=False, **texts))
            data = data.assign(
                **{str(one): _parameter(data[one]) for one in data if _is_parameter(one)}
            )
        else:
            data = pd.read_parquet(file)
    except (OSError, ValueError, csv.Error) as error:
        raise RecordError(f"{file} must be a table of rows, but cannot be read: {error}.") from None
    if {"task", "length"} <= {*data.columns}:
        named = [name for name in ("task", "prompts", "length") if name in data.columns]
        data["task"] = [
            present_task({str(name): one for name, one in columns.items()})
            for columns in data[named].astype(object).to_dict("records")
        ]
    known = [one for one in dataclasses.fields(Row) if one.name in COLUMNS]
    required = [one.name for one in known if one.default is dataclasses.MISSING]
    missing = [name for name in required if name not in data.columns]
    if missing:
        raise RecordError(f"{file} must have {', '.join(required)}, but lacks {missing[0]}.")
    extra = [name for name in data.columns if name not in COLUMNS]
    data = data.reindex(columns=[*COLUMNS, *extra])
    for name in COLUMNS:
        kind = Row.__annotations__[name]
        if kind.startswith(("int", "float")):
            data[name] = _numbers(file, data[name], name, whole=kind.startswith("int"))
        elif kind.startswith("bool"):  # beside another text, true and false are read as texts
            data[name] = data[name].replace({"True": True, "False": False})
    data = typed(data)
    recorded = [name for name in data.columns if name in COLUMNS or _is_parameter(name)]
    # An empty text is read as missing; the GPU check's rows of parts that did not run have some.
    empty: dict[str, Any] = {name: "" for name in required if name in words}
    for place, values in enumerate(data[recorded].astype(object).to_dict("records"), start=1):
        try:
            Row.from_flat(
                {str(k): empty.get(str(k)) if pd.isna(v) else v for k, v in values.items()}
            )
        except RecordError as error:
            raise RecordError(f"row {place} of {file} is not as a run wrote it: {error}") from None
    return data


def read_samples(file: Path) -> pd.DataFrame:
    """Return the samples beside a file of rows, an empty table if there are none.

    Raises:
        RecordError: If the file cannot be read, a score is no number, or an answer or one of a
            cell's scored samples has none. Tasks without scores, such as perplexity, have neither.
    """
    if not file.is_file():
        return pd.DataFrame({"run_id": []})
    try:
        data = read_samples_file(file)
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{file} must be a table of samples, but cannot be read: {error}; "
            "without that file the report has no intervals."
        ) from None
    if "score" in data:
        data["score"] = _numbers(file, data["score"], "score", whole=False)
        is_scored = data["score"].notna()
        needed = data["run_id"].isin(data.loc[is_scored, "run_id"])
        if "prediction" in data:
            needed |= data["prediction"].notna()
        if missing := int((needed & ~is_scored).sum()):
            raise RecordError(
                f"{file} must have a score for every answer, but {missing} of {needed.sum()} have"
                " none; copy or write it again, or remove it: without that file the report has no"
                " intervals."
            )
    return data


def _is_parameter(name: object) -> bool:
    return str(name).startswith(PARAMETER_PREFIX)


def _parameter(texts: pd.Series) -> pd.Series:
    """Return a parameter's values from their texts: truth values, numbers or texts, as written.

    Whole numbers stay whole where some values are missing.
    """
    known = {one for one in texts if isinstance(one, str)}
    if known <= {"True", "False"}:
        return texts.map({"True": True, "False": False})
    if all(re.fullmatch(r"[+-]?\d{1,18}", one) for one in known):
        whole = [int(one) if isinstance(one, str) else pd.NA for one in texts]
        return pd.Series(whole, dtype="Int64")
    try:
        return texts.astype(float)
    except ValueError:
        return texts


def _check_whole(file: Path) -> None:
    """Check that a CSV file ends with a line's end and that all its lines have as many fields.

    Raises:
        RecordError: If not, as of a file that was cut or whose copy was not finished.
    """
    with file.open(encoding="utf-8", newline="") as text:
        content = text.read()
    lines = csv.reader(io.StringIO(content, newline=""), strict=True)
    width = len(next(lines, []))
    for line in lines:
        if line and len(line) != width:
            raise RecordError(
                f"{file} must have {width} fields in every line, as in its head, but line "
                f"{lines.line_num} has {len(line)}: it is cut or damaged; copy or write it again."
            )
    if content and not content.endswith("\n"):
        raise RecordError(
            f"{file} must end with the end of a line, but line {lines.line_num} has none: the file "
            "is cut; copy or write it again."
        )


def _numbers(file: Path, values: pd.Series, name: str, whole: bool) -> pd.Series:
    """Return a column as numbers, missing where it is empty.

    Raises:
        RecordError: If a value is no finite number, or no whole one where it must be.
    """
    if values.isna().all():
        return pd.Series(np.nan, index=values.index, dtype=float)
    found: pd.Series = pd.to_numeric(values, errors="coerce").astype("Float64")
    bad = values.notna() & (found.isna() | np.isinf(found.astype(float)))
    bad |= values.map(lambda value: isinstance(value, bool | np.bool_))
    if whole:
        bad |= found.notna() & (found.astype(float) % 1 != 0)
    if bad.any():
        place = int(np.argmax(bad.to_numpy()))
        value: Any = values.iloc[place]
        raise RecordError(
            f"{name} must be a {'whole' if whole else 'finite'} number or empty, but row "
            f"{place + 1} of {file} has {str(value)!r}; correct it, or write the file again."
        )
    return pd.to_numeric(values)
