"""Which tokens the heads kept at one decode step of a prompt, as ``kept.parquet`` holds them.

The file has a row for each prompt: ``run_id`` (not in a cell's own file), ``sample_id``,
``subtask``, ``cached`` (tokens in the cache at that step), ``layers`` and ``heads`` (two lists: the
layers in which the method selected, and the KV heads of each), ``texts`` (a list of the cached
tokens' texts as JSON) and ``kept``, which `unpacked` reads.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from topkbench.analysis.record.row import RecordError
from topkbench.analysis.record.samples_file import read_samples_file

NAME = "kept.parquet"


def packed(slots: Any) -> str:
    """Return bits as text: eight to a byte, compressed with zlib, in base64.

    Args:
        slots: bool ``[heads of all layers, cached]``: whether each head kept each token.
    """
    bits = np.packbits(np.asarray(slots, dtype=bool))
    return base64.b64encode(zlib.compress(bits.tobytes(), 9)).decode()


def unpacked(kept: str, heads: Sequence[int], cached: int) -> np.ndarray:
    """Return what `packed` packed: bool ``[heads of all layers, cached]``, layer after layer."""
    count = sum(heads) * cached
    bits = np.frombuffer(zlib.decompress(base64.b64decode(kept)), dtype=np.uint8)
    return np.unpackbits(bits, count=count).astype(bool).reshape(-1, cached)


def read_kept_file(file: Path) -> pd.DataFrame:
    """Return the rows of a file, an empty table if there is none.

    Raises:
        RecordError: If the file cannot be read.
    """
    if not file.is_file():
        return pd.DataFrame({"run_id": []})
    try:
        return read_samples_file(file)
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{file} must be a table of kept tokens, but cannot be read: {error}; without that file"
            " the report does not show which tokens the heads kept."
        ) from None
