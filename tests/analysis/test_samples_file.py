"""Files of samples: what is written is read back, here and by pandas alone; older files, too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topkbench.analysis.record import store as record
from topkbench.analysis.record.kept_file import packed, unpacked
from topkbench.analysis.record.samples_file import read_samples_file, samples_bytes
from topkbench.analysis.record.store import Cell, CellStore, RecordError, Row, Sweep
from topkbench.analysis.report import build as report
from topkbench.analysis.report.samples import load_kept

ANSWER: dict[str, Any] = {
    "sample_id": "vt-0",
    "subtask": "vt",
    "length": 512,
    "score": 50.0,
    "prediction": '["no list"]',
    "references": ["Blue", "b, c"],
    "tokens": [5, 9, 300],
    "question_text": "Which?",
}
EMPTY = ANSWER | {"sample_id": "vt-1", "prediction": "", "references": ["x"], "tokens": []}


def again(data: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Return samples written and read."""
    path = folder / "samples.parquet"
    path.write_bytes(samples_bytes(data))
    return read_samples_file(path)


def values(data: pd.DataFrame) -> list[dict[str, Any]]:
    """Return rows without what is missing in them."""
    return [
        {name: value for name, value in one.items() if isinstance(value, list) or pd.notna(value)}
        for one in data.astype(object).to_dict("records")
    ]


def test_pandas_alone_reads_an_answer_with_its_settings_and_references(
    tmp_path: Path, row: Callable[..., Row]
) -> None:
    cell = CellStore(tmp_path).cell("0" * 16)
    cell.write([row(method="hata", k=64, rbit=128)], [ANSWER, EMPTY], {}, "")
    data = pd.read_parquet(cell.folder / "samples.parquet")
    settings = ["tiny", "ruler", "hata", 64, 128, None, "sparse", 0]
    assert data.columns[:8].tolist() == [
        *("model", "task", "method", "k", "rbit", "protocol", "question", "seed"),
    ]
    assert data.iloc[0, :8].astype(object).tolist() == settings
    assert data["k"].dtype == "Int64"  # full attention's k is missing, and the others stay whole
    assert [list(one) for one in data["references"]] == [["Blue", "b, c"], ["x"]]
    assert [list(one) for one in data["tokens"]] == [[5, 9, 300], []]
    schema = pyarrow.parquet.read_schema(cell.folder / "samples.parquet")
    assert str(schema.field("references").type) == "list<element: string>"
    assert str(schema.field("tokens").type) == "list<element: int64>"


def test_a_setting_that_rows_do_not_share_is_a_samples_own_or_missing(
    tmp_path: Path, row: Callable[..., Row]
) -> None:
    cell = CellStore(tmp_path).cell("0" * 16)
    cell.write([row(k=32), row(k=64)], [{"sample_id": "a", "step": 1}], {}, "")
    assert cell.samples()["k"].isna().all()
    cell.write([row(k=32), row(k=64)], [{"sample_id": "a", "k": 64}], {}, "")
    assert cell.samples()["k"].tolist() == [64]


def in_json(samples: list[dict[str, Any]]) -> bytes:
    """Return a file of samples as it was written when lists were JSON text."""
    plain = [
        {name: json.dumps(one) if isinstance(one, list) else one for name, one in sample.items()}
        for sample in samples
    ]
    content: bytes = pd.DataFrame(plain).to_parquet(None, index=False)
    return content


def make_old(cell: Cell, samples: list[dict[str, Any]]) -> None:
    """Replace a cell's samples by a file in the older form."""
    data = in_json(samples)
    (cell.folder / "samples.parquet").write_bytes(data)
    content = json.loads((cell.folder / "rows.json").read_text())
    content["files"]["samples.parquet"] = hashlib.sha256(data).hexdigest()
    content["digest"] = record._digest(content["rows"], content["files"])
    (cell.folder / "rows.json").write_text(json.dumps(content))


def test_cells_with_lists_as_json_text_are_read_as_others(
    tmp_path: Path, row: Callable[..., Row]
) -> None:
    """Of one sweep, an older cell and a newer one: both have the same columns and values."""
    sweep = Sweep(tmp_path / "default" / "one", tmp_path)
    for name in ("0" * 16, "1" * 16):
        settings: dict[str, Any] = {"run_id": name, "method": "hata", "k": 64}
        sweep.store.cell(name).write([row(**settings)], [ANSWER, EMPTY], {}, "")
        sweep.append(name)
    make_old(sweep.store.cell("0" * 16), [ANSWER, EMPTY])
    old, new = (sweep.store.cell(name).samples() for name in ("0" * 16, "1" * 16))
    assert values(old) == values(new)
    assert list(old.columns) == list(new.columns)
    assert old["references"].tolist() == [["Blue", "b, c"], ["x"]]
    assert old["tokens"].tolist() == [[5, 9, 300], []]
    assert old["prediction"].tolist() == ['["no list"]', ""]
    report.build(sweep.folder)
    written = pd.read_parquet(sweep.folder / "samples.parquet")
    assert [list(one) for one in written["references"]] == [["Blue", "b, c"], ["x"]] * 2


def test_a_report_with_lists_as_json_text_is_read(tmp_path: Path, row: Callable[..., Row]) -> None:
    record.frame([row(score=50.0)]).to_parquet(tmp_path / "rows.parquet")
    samples = [one | {"run_id": "0123456789abcdef"} for one in (ANSWER, EMPTY)]
    (tmp_path / "samples.parquet").write_bytes(in_json(samples))
    _, found = report.load(tmp_path)
    assert found["references"].tolist() == [["Blue", "b, c"], ["x"]]
    assert found["tokens"].tolist() == [[5, 9, 300], []]


def test_samples_of_several_tasks_are_in_one_file(tmp_path: Path, row: Callable[..., Row]) -> None:
    """Each keeps its own columns; in one that they use for different things, all are texts."""
    sweep = Sweep(tmp_path / "default" / "one", tmp_path)
    theirs = {
        "ruler": [ANSWER, EMPTY],
        "perplexity": [{"sample_id": "w-0", "nll": 2.5, "by_layer": [[0.5, 1.0], []]}],
        "mine": [{"sample_id": "a", "references": "one text", "by_layer": None}],
        "fit": [{"layer": 1, "step": 1, "loss": 0.25}],
    }
    for place, (task, samples) in enumerate(theirs.items()):
        name = f"{place:016x}"
        one = row(run_id=name, task=task, question=None, k=64 if task == "ruler" else None)
        sweep.store.cell(name).write([one], samples, {}, "")
        sweep.append(name)
    report.build(sweep.folder)
    found = read_samples_file(sweep.folder / "samples.parquet").set_index("task")
    assert found["k"].dtype == "Int64"
    assert found.loc["perplexity", "by_layer"] == [[0.5, 1.0], []]
    assert found.loc["mine", "by_layer"] is None
    assert found.loc["ruler", "tokens"].tolist() == [[5, 9, 300], []]
    assert found.loc["ruler", "references"].tolist() == [["Blue", "b, c"], ["x"]]
    assert found.loc["mine", "references"] == "one text"
    assert found.loc["fit", ["layer", "step", "loss"]].tolist() == [1, 1, 0.25]
    assert found.loc["fit", ["references", "tokens", "sample_id"]].isna().all()
    plain = pd.read_parquet(sweep.folder / "samples.parquet").set_index("task")
    assert plain.loc["ruler", "references"].tolist() == ['["Blue", "b, c"]', '["x"]']


LISTS = {
    "references": st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=3),
    "tokens": st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
    "by_token": st.lists(st.none() | st.floats(allow_nan=False), max_size=3),
    "by_layer": st.lists(st.lists(st.floats(allow_nan=False), max_size=2), max_size=2),
    "k": st.integers(1, 2**31),
    "note": st.text(st.characters(exclude_categories=["Cs"])),
}


@given(
    st.lists(
        st.fixed_dictionaries({"sample_id": st.text("ab")}, optional=LISTS), min_size=1, max_size=4
    )
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, samples: list[dict[str, Any]]
) -> None:
    """Empty lists, lists beside nothing, nothing inside lists, and lists inside lists."""
    data = pd.DataFrame(samples, dtype=object)
    found = again(data, tmp_path_factory.mktemp("samples"))
    assert list(found.columns) == list(data.columns)
    assert values(found) == samples


def test_a_mapping_and_lists_of_unlike_values_are_json_text(tmp_path: Path) -> None:
    data = pd.DataFrame({"counts": [{"a": 1}, None], "unlike": [["a", ["b"]], [1]]})
    found = again(data, tmp_path)
    assert found["counts"].tolist()[0] == '{"a": 1}'
    assert found["counts"].isna().tolist() == [False, True]
    assert found["unlike"].tolist() == ['["a", ["b"]]', "[1]"]


def test_the_tokens_that_heads_kept_are_beside_the_samples_and_read_back(
    tmp_path: Path, row: Callable[..., Row]
) -> None:
    slots = np.random.default_rng(0).random((5, 1001)) < 0.1
    kept = {
        **{"sample_id": "vt-0", "subtask": "vt", "cached": 1001, "layers": [0, 3]},
        **{"heads": [2, 3], "texts": '["a"]', "kept": packed(slots)},
    }
    assert (unpacked(kept["kept"], kept["heads"], 1001) == slots).all()
    sweep = Sweep(tmp_path / "results" / "one", tmp_path / "results")
    made = row(method="hata", k=64, rbit=128)
    cell = sweep.store.cell(made.run_id)
    cell.write([made], [ANSWER], {}, "")
    sweep.append(made.run_id)
    assert len(cell.kept()) == len(load_kept(sweep.folder)) == 0
    cell.write([made], [ANSWER], {}, "", [kept])
    expected = [{"run_id": made.run_id, **kept}]
    for place in (sweep.folder, tmp_path / "results"):
        assert load_kept(place).to_dict("records") == expected
    report.build(sweep.folder)
    (sweep.folder / "cells.json").unlink()
    assert load_kept(sweep.folder).to_dict("records") == expected
    (cell.folder / "kept.parquet").write_bytes(b"changed")
    assert [one.status.value for one in cell.read()] == ["interrupted"] or not cell.finished()
    cell.write([made], [ANSWER], {}, "")
    assert cell.finished()
    assert not (cell.folder / "kept.parquet").exists()
    (sweep.folder / "kept.parquet").write_bytes(b"no table")
    with pytest.raises(RecordError, match=r"kept.parquet must be a table of kept tokens, but"):
        load_kept(sweep.folder)
