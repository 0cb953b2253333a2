from __future__ import annotations

import ast
import errno
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topkbench.analysis.record.files import NotWritableError, remove_left_over, write_atomic
from topkbench.analysis.record.store import (
    COLUMNS,
    CellStore,
    PartStore,
    RecordError,
    Row,
    Status,
    Sweep,
    frame,
    identity,
    one_row_a_cell,
)

SAMPLES = [
    {
        "sample_id": "a",
        "subtask": "vt",
        "length": 64,
        "score": 100.0,
        "prediction": "x",
        "references": ["x", "y"],
        "num_generated": 2,
    }
]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_identity_is_fixed_and_independent_of_the_order_of_keys() -> None:
    assert identity({"k": 512, "method": "hata"}) == "58c565b0c26a178b"
    assert identity({"method": "hata", "k": 512}) == identity({"k": 512, "method": "hata"})
    assert identity({"k": 1}) != identity({"k": 1.0})
    assert identity({"k": (1, 2)}) == identity({"k": [1, 2]})


@given(st.dictionaries(st.text(), PLAIN, max_size=4))
def test_identity_survives_json(payload: dict[str, object]) -> None:
    assert identity(payload) == identity(json.loads(json.dumps(payload)))


def test_identity_is_the_same_in_another_process() -> None:
    module = "topkbench.analysis.record.store"
    code = f"from {module} import identity; print(identity({{'a': [1, 'é', None]}}))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == identity({"a": [1, "é", None]})


@pytest.mark.parametrize("value", [float("nan"), Path("x"), {1: 2}, object()])
def test_identity_refuses_values_without_a_canonical_form(value: object) -> None:
    with pytest.raises(RecordError, match=r"payload\.a"):
        identity({"a": value})


DESIGN = """
run_id status reason model task subtask length method method_label method_colour
impl full_backend protocol question known_tokens
k kv_len prompts_per_batch batch_size rbit seed num_samples prompts
wanted_samples source_samples skipped_samples truncated_samples
judged_prompts judged_tokens timed_prompts
score score_ci_low score_ci_high delta_full delta_ci_low delta_ci_high
turn_change turn_change_ci_low turn_change_ci_high full_note
generated_tokens generated_delta generated_delta_ci_low generated_delta_ci_high
cut_off_share cut_off_delta cut_off_delta_ci_low cut_off_delta_ci_high
nll nll_delta nll_delta_ci_low nll_delta_ci_high kl_full kl_full_ci_low kl_full_ci_high
top1_agreement scored_tokens
recall_at_k recall_prompt recall_generated
attention_mass output_rel_error density density_all sparse_step_share
bytes_read_per_step index_bytes_per_token kv_cache_mib peak_memory_mib
memory_needed_mib
prefill_ms build_ms decode_ms_p50 decode_ms_p20 decode_ms_p80 decode_ms_warm_p50
encode_ms append_ms score_ms select_ms attend_ms tokens_per_s
full_ms_p50 full_ms_p20 full_ms_p80 speedup_vs_full speedup_ci_low speedup_ci_high
sdpa_ms_p50 speedup_vs_sdpa sdpa_ci_low sdpa_ci_high
other_load timing_note
bandwidth_fraction bandwidth_gb_s
fit_s loss_first loss_last calibration artifact_path
device clock_mhz driver torch threads huge_pages omp_wait_policy
numba triton transformers tokenizers numpy
git_commit git_dirty started_at code_digest model_digest reused artifact_code artifact_digest
config_digest full_run_id
"""


def test_a_row_has_exactly_the_columns_of_the_design() -> None:
    assert list(COLUMNS) == DESIGN.split()


def test_a_colour_is_a_hexadecimal_triple(row: Callable[..., Row]) -> None:
    assert row(method_colour="#12aBcD").method_colour == "#12aBcD"
    with pytest.raises(RecordError, match="a colour must be a quoted '#RRGGBB', got 'red'"):
        row(method_colour="red")


def test_every_column_has_a_docstring() -> None:
    source = (Path(__file__).parents[2] / "analysis" / "record" / "row.py").read_text()
    (row,) = (
        one for one in ast.parse(source).body if isinstance(one, ast.ClassDef) and one.name == "Row"
    )
    documented = {
        ast.unparse(first.target)
        for first, then in itertools.pairwise(row.body)
        if isinstance(first, ast.AnnAssign)
        and isinstance(then, ast.Expr)
        and isinstance(then.value, ast.Constant)
    }
    assert documented == {*COLUMNS, "parameters"}


def test_a_wrong_result_has_no_speed(row: Callable[..., Row]) -> None:
    with pytest.raises(RecordError, match="empty unless status is ok, got decode_ms_p50"):
        row(status="wrong", reason="it differs.", decode_ms_p50=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "fine"}, "status must be one of ok, skipped"),
        ({"status": "failed"}, "reason must say why"),
        ({"k": "512"}, "k must be int or None, got '512'"),
        ({"k": True}, "k must be int or None, got True"),
        ({"score": float("inf")}, "score must be float or None"),
        ({"parameters": {"a.b": 1}}, "identifier, got 'a.b'"),
        ({"parameters": {"a": [1]}}, "parameter a must be a number"),
    ],
)
def test_a_row_refuses_invalid_values(
    row: Callable[..., Row], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(RecordError, match=message):
        row(**changes)


def test_a_row_can_be_flattened_and_rebuilt(row: Callable[..., Row]) -> None:
    one = row(method="hata", k=64, score=float("nan"), parameters={"use_norm": True, "alpha": 2})
    flat = one.flat()
    assert list(flat)[-2:] == ["p_alpha", "p_use_norm"]
    assert flat["score"] is None
    assert Row.from_flat(flat) == one
    with pytest.raises(RecordError, match="no column 'budget'"):
        Row.from_flat({**flat, "budget": 1})


def test_a_frame_keeps_types_where_values_are_missing(row: Callable[..., Row]) -> None:
    data = frame([row(k=None), row(k=64, parameters={"rank": 16, "mix": 1}), row()])
    data.loc[0, "p_mix"] = 5
    assert list(data.columns[:-2]) == list(COLUMNS)
    assert str(data["k"].dtype) == str(data["p_rank"].dtype) == "Int64"
    assert str(data["score"].dtype) == "float64"
    assert frame([]).columns.tolist() == list(COLUMNS)


def test_a_written_cell_is_read_back(store: CellStore, row: Callable[..., Row]) -> None:
    cell = store.cell("0123456789abcdef")
    assert (cell.status, cell.finished(), cell.read(), cell.attempt) == (None, False, [], 0)
    with cell.lock():
        assert cell.begin(row()) == 1
        cell.write([row(score=50.0)], SAMPLES, {"k": 1}, "what happened\n")
    assert cell.finished()
    assert cell.read() == [row(score=50.0)]
    assert cell.samples()["references"].tolist() == [["x", "y"]]
    assert cell.config() == {"k": 1}
    assert (cell.folder / "log.txt").read_text() == "what happened\n"


def test_a_killed_attempt_leaves_an_interrupted_row(
    store: CellStore, row: Callable[..., Row]
) -> None:
    cell = store.cell("0123456789abcdef")
    cell.begin(row(method="hata", k=64, decode_ms_p50=3.0))
    (found,) = cell.read()
    assert (found.status, found.method, found.k) == (Status.INTERRUPTED, "hata", 64)
    assert found.decode_ms_p50 is None
    assert cell.status is Status.INTERRUPTED
    assert not cell.finished()
    assert cell.begin(row()) == 2


@pytest.mark.parametrize("status", ["wrong", "failed", "out_of_memory", "interrupted"])
def test_a_cell_that_failed_runs_again(
    store: CellStore, row: Callable[..., Row], status: str
) -> None:
    cell = store.cell("0123456789abcdef")
    cell.write([row(), row(subtask="vt", status=status, reason="why.")], [], {}, "")
    assert cell.status == status
    assert not cell.finished()
    cell.write([row(status="skipped", reason="why.")], [], {}, "")
    assert cell.finished()


def test_a_row_skipped_for_want_of_memory_is_tried_again(
    store: CellStore, row: Callable[..., Row]
) -> None:
    cell = store.cell("0123456789abcdef")
    skipped = row(subtask="65536", status="skipped", reason="why.", memory_needed_mib=3.5)
    cell.write([row(), skipped], [], {}, "")
    assert cell.status == "ok"
    assert not cell.finished()


@pytest.mark.parametrize("keep", [0, 1, 40, -3])
def test_a_truncated_cell_is_not_finished(
    store: CellStore, row: Callable[..., Row], keep: int
) -> None:
    cell = store.cell("0123456789abcdef")
    cell.write([row()], SAMPLES, {}, "log")
    content = (cell.folder / "rows.json").read_bytes()
    (cell.folder / "rows.json").write_bytes(content[:keep])
    assert not cell.finished()
    (cell.folder / "rows.json").write_bytes(content)
    assert cell.finished()
    (cell.folder / "samples.parquet").write_bytes(b"PAR1")
    assert not cell.finished()
    assert cell.samples().empty


def test_a_new_attempt_deletes_the_old_result(store: CellStore, row: Callable[..., Row]) -> None:
    cell = store.cell("0123456789abcdef")
    cell.write([row()], SAMPLES, {}, "")
    cell.begin(row())
    assert not cell.finished()


def test_a_folder_that_cannot_be_written_gives_an_error_of_one_sentence(
    tmp_path: Path, row: Callable[..., Row]
) -> None:
    (tmp_path / "results").write_text("in the way")
    cell = CellStore(tmp_path / "results").cell("0123456789abcdef")
    for action in (
        lambda: cell.write([row()], [], {}, ""),
        lambda: cell.begin(row()),
        lambda: cell.lock().__enter__(),
        lambda: Sweep(tmp_path / "results" / "a", tmp_path / "results").append("0123456789abcdef"),
    ):
        with pytest.raises(RecordError, match="results folder must be writable") as caught:
            action()
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_gives_an_error_of_one_sentence(
    tmp_path: Path, row: Callable[..., Row]
) -> None:
    tmp_path.chmod(0o500)
    cell = CellStore(tmp_path).cell("0123456789abcdef")
    with pytest.raises(RecordError, match="results folder must be writable"):
        cell.begin(row())


def test_an_invalid_identity_is_refused(store: CellStore) -> None:
    with pytest.raises(RecordError, match="must be 16 hexadecimal digits"):
        store.cell("../x")


def spawn(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
    )


def test_a_lock_is_released_when_its_process_is_killed(tmp_path: Path) -> None:
    code = """
import sys, time
from topkbench.analysis.record.store import CellStore
with CellStore(sys.argv[1]).cell("0123456789abcdef").lock():
    print("held", flush=True)
    time.sleep(600)
"""
    with spawn(code, str(tmp_path)) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        cell = CellStore(tmp_path).cell("0123456789abcdef")
        with pytest.raises(RecordError, match="another process holds it"):
            cell.lock(timeout_s=0.05).__enter__()
        other.kill()
        other.wait()
        with cell.lock(timeout_s=5):
            pass


def test_parallel_writers_lose_no_cell_and_add_none_twice(tmp_path: Path) -> None:
    code = """
import sys
from topkbench.analysis.record.store import Sweep
for i in range(int(sys.argv[2]), int(sys.argv[2]) + 10):
    Sweep(f"{sys.argv[1]}/default/one", sys.argv[1]).append(f"{i:016x}")
"""
    writers = [spawn(code, str(tmp_path), str(start)) for start in (0, 5, 10)]
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    found = Sweep(tmp_path / "default" / "one", tmp_path).identities()
    assert sorted(found) == [f"{i:016x}" for i in range(20)]


def test_a_cell_killed_during_its_write_is_complete_or_absent(tmp_path: Path) -> None:
    code = """
import sys
from topkbench.analysis.record.store import CellStore, Row
row = Row(run_id="0123456789abcdef", status="ok", model="m", task="t", subtask="s", method="x")
cell = CellStore(sys.argv[1]).cell(row.run_id)
sample = {"sample_id": "a", "subtask": "s", "score": 1.0, "references": []}
print("go", flush=True)
while True:
    cell.begin(row)
    cell.write([row], [sample] * 50, {}, "log")
"""
    cell = CellStore(tmp_path).cell("0123456789abcdef")
    for delay_s in (0.0, 0.013, 0.029, 0.051):
        with spawn(code, str(tmp_path)) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(delay_s)
            writer.kill()
        assert cell.status in (None, Status.OK, Status.INTERRUPTED)
        assert len(cell.samples()) == (50 if cell.finished() else 0)


def test_a_temporary_file_is_removed_once_its_process_has_ended(tmp_path: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
from topkbench.analysis.record import files
os.fsync = lambda descriptor: (print("writes", flush=True), time.sleep(600))
files.write_atomic(Path(sys.argv[1]) / "cells" / "rows.json", b"half")
"""
    with spawn(code, str(tmp_path)) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writes\n"
        (part,) = (tmp_path / "cells").iterdir()
        assert re.fullmatch(r"\.rows\.json\.[0-9a-f]{16}\.part", part.name)
        remove_left_over(tmp_path)
        assert part.exists()
        writer.kill()
        writer.wait()
    remove_left_over(tmp_path)
    assert not part.exists()


def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.json"
    write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotWritableError) as caught:
        write_atomic(path, b"new")
    assert str(caught.value) == (
        f"the results folder must be writable, but {tmp_path} is not (No space left on device); "
        "choose another with results_dir=PATH."
    )
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("rows.json", b"old")]


@pytest.mark.parametrize(
    ("folder", "title"),
    [
        ("results/a/now", "a/now"),
        ("results/now", "now"),
        ("results/a/b/now", "a/b/now"),
        ("x", "x"),
    ],
)
def test_a_sweeps_folder_may_be_anywhere(
    tmp_path: Path, row: Callable[..., Row], folder: str, title: str
) -> None:
    before = tmp_path / "before"
    sweep = Sweep(before / folder, before / "results")
    sweep.store.cell("0" * 16).write([row(score=50.0)], SAMPLES, {}, "")
    sweep.append("0" * 16)
    assert sweep.title == title
    assert (before / "results" / "cells" / ("0" * 16) / "rows.json").is_file()
    moved = before.rename(tmp_path / "after")  # all of it
    again = Sweep.open(moved / folder)
    assert again.rows()["score"].tolist() == [50.0]
    assert again.title == title


def test_a_sweep_gathers_its_cells_in_order(tmp_path: Path, row: Callable[..., Row]) -> None:
    sweep = Sweep(tmp_path / "default" / "one", tmp_path)
    for i in (2, 1, 2):
        name = f"{i:016x}"
        sweep.store.cell(name).write([row(run_id=name, k=i * 64)], SAMPLES, {}, "")
        sweep.append(name)
    again = Sweep.open(tmp_path / "default" / "one")
    assert again.title == "default/one"
    assert again.rows()["k"].tolist() == [128, 64]
    samples = again.samples()
    assert samples["run_id"].tolist() == [f"{2:016x}", f"{1:016x}"]
    assert isinstance(samples, pd.DataFrame)


def test_a_damaged_list_gives_an_error_of_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "cells.json").write_text('["012')
    with pytest.raises(RecordError, match="must be a list of identities, but is damaged"):
        Sweep(tmp_path / "a" / "b", tmp_path).rows()


@pytest.mark.parametrize("edit", ["score", "digest", "samples", "config"])
def test_an_edited_cell_is_detected(store: CellStore, row: Callable[..., Row], edit: str) -> None:
    cell = store.cell("0123456789abcdef")
    cell.begin(row())
    cell.write([row(score=50.0)], SAMPLES, {"k": 4}, "")
    assert cell.finished()
    path = cell.folder / "rows.json"
    content = json.loads(path.read_text())
    if edit == "score":
        content["rows"][0]["score"] = 99.0
    elif edit == "digest":
        del content["digest"]
    elif edit == "samples":
        samples = cell.folder / "samples.parquet"
        data = bytearray(samples.read_bytes())
        data[len(data) // 2] ^= 1
        samples.write_bytes(data)
    else:
        (cell.folder / "config.json").write_text('{"k": 5}')
    path.write_text(json.dumps(content))
    assert not cell.finished()
    (found,) = cell.read()
    assert (found.status, found.score) == (Status.INTERRUPTED, None)
    assert found.reason == "the cell's files were changed after it ended; run the command again."
    assert cell.samples().empty
    cell.begin(row())
    cell.write([row(score=50.0)], SAMPLES, {"k": 4}, "")
    assert cell.finished()


def test_an_intact_part_is_found_by_its_key(tmp_path: Path) -> None:
    parts = PartStore(tmp_path)
    content = {"samples": [{"score": 0.1 + 0.2, "tokens": [1, 2], "note": None}], "share": 1.0}
    assert parts.read("answers", "aa") is None
    parts.write("answers", "aa", content)
    assert parts.read("answers", "aa") == content
    assert parts.read("answers", "bb") is None
    assert parts.read("speed", "aa") is None
    # An edited, truncated or renamed file is not used.
    path = tmp_path / "parts" / "answers-aa.json"
    text = path.read_text()
    path.rename(tmp_path / "parts" / "answers-bb.json")
    assert parts.read("answers", "bb") is None
    for damaged in (text.replace("1.0", "0.5"), text[:-9], "", "[]", '{"content": {}}'):
        path.write_text(damaged)
        assert parts.read("answers", "aa") is None
    path.write_text(text)
    assert parts.read("answers", "aa") == content
    parts.write("speed", "aa", {"decode_ms": float("nan")})
    assert parts.read("speed", "aa") is None


def test_a_cells_status_is_that_of_its_mean(row: Callable[..., Row]) -> None:
    rows = frame(
        [
            row(run_id="a" * 16, subtask="qa_1", status="skipped", reason="No questions."),
            row(run_id="a" * 16, subtask="vt", score=50.0),
            row(run_id="a" * 16, subtask="mean", score=50.0),
            row(run_id="b" * 16, subtask="mean", status="failed", reason="It broke."),
            row(run_id="c" * 16, subtask="4096", decode_ms_p50=1.0),
            row(run_id="c" * 16, subtask="8192", decode_ms_p50=2.0),
        ]
    )
    kept = one_row_a_cell(rows)
    assert list(zip(kept["subtask"], kept["status"], strict=True)) == [
        ("mean", "ok"),
        ("mean", "failed"),
        ("4096", "ok"),
    ]
