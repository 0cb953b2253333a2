"""Files of samples: Parquet with lists as lists, so that a file can be read by itself."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet

JSON_BEFORE = ("references", "tokens")
"""Columns of lists, which files written before lists were stored as such hold as JSON text."""


def samples_bytes(samples: pd.DataFrame) -> bytes:
    """Return samples as a Parquet file that `read_samples_file` reads.

    Lists become Parquet's lists, also nested ones, and mappings JSON text. A column whose values
    have no type in common, as two tasks may use one name for different things, becomes text.

    Args:
        samples: One row per sample; cells may be lists.
    """
    data, lists = samples.copy(), {}
    for name in data.columns:
        if data[name].dtype != object:
            continue
        values = [_stored(value) for value in data[name]]
        kinds = {type(value) for value in values if value is not None}
        if list in kinds:
            try:
                lists[name] = pyarrow.array(values)
                continue
            except (pyarrow.ArrowException, OverflowError):
                kinds.add(str)
        if len(kinds) > 1:
            values = [None if value is None else _text(value) for value in values]
        data[name] = pd.Series(
            values, data.index, dtype="Int64" if kinds == {int} else object
        )  # whole numbers stay whole where some are missing
    table = pyarrow.Table.from_pandas(data.drop(columns=list(lists)), preserve_index=False)
    for name, values in lists.items():
        table = table.append_column(name, values)
    file = io.BytesIO()
    pyarrow.parquet.write_table(table.select(list(data.columns)), file)
    return file.getvalue()


def read_samples_file(path: Path) -> pd.DataFrame:
    """Return the samples of a file as they were given, lists as lists; see `samples_bytes`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no Parquet file.
    """
    table = pyarrow.parquet.read_table(path)
    data: pd.DataFrame = table.to_pandas()
    for field in table.schema:
        name = field.name
        if pyarrow.types.is_list(field.type):
            data[name] = pd.Series(table[name].to_pylist(), data.index, dtype=object)
        elif name in JSON_BEFORE and not pyarrow.types.is_null(field.type):
            data[name] = pd.Series(map(_list, data[name]), data.index, dtype=object)
    return data


def _stored(value: Any) -> Any:
    """Return a value with lists for all sequences, JSON text for mappings and None for missing."""
    if isinstance(value, Mapping):
        return json.dumps(value)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_stored(one) if isinstance(one, list | tuple | Mapping) else one for one in value]
    return None if pd.isna(value) else value


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)


def _list(value: Any) -> Any:
    """Return the list that a text is JSON of; anything else as it is."""
    try:
        found = json.loads(value)
    except (TypeError, ValueError):
        return value
    return found if isinstance(found, list) else value
