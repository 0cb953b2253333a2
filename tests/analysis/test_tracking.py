from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pytest
import wandb
from matplotlib.figure import Figure
from PIL import Image

from topkbench.analysis.record.rows_file import read_rows
from topkbench.analysis.record.store import Row, Status, Sweep, frame, named_values
from topkbench.analysis.report import build as report
from topkbench.analysis.report.sweep_report import SweepReport
from topkbench.analysis.tracking import tracker as tracking
from topkbench.analysis.tracking.tracker import NoTracker, Session, WandbTracker, dashboard, session
from topkbench.analysis.tracking.wandb_payload import (
    Names,
    cell_config,
    curves,
    plain_config,
    shown_of,
    summary,
)

LEAGUE = Path(__file__).parents[2] / "analysis" / "measured" / "epyc_2_threads" / "league.csv"


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of a user of W&B who has no account, in a process that has not used it yet."""
    home = tmp_path / "home"
    home.mkdir()
    for name in [one for one in os.environ if one.startswith("WANDB_") or one == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    wandb.teardown()
    session.cache_clear()
    yield home
    wandb.teardown()
    session.cache_clear()


@pytest.fixture
def offline(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def inspect(run: Path) -> dict[str, Any]:
    """Read an offline run with W&B's command line tool."""
    found = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(run)],
        capture_output=True,
        text=True,
        check=True,
    )
    return cast(dict[str, Any], json.loads(found.stdout))


@pytest.mark.usefixtures("offline", "pictures")
def test_cells_and_sweep_are_read_back_with_wandbs_tool(small_sweep: Sweep) -> None:
    tracker = WandbTracker()
    cell = small_sweep.cells()[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="W&B tracking stopped")
        for attempt in (1, 2):
            tracker.log_cell(
                small_sweep.folder,
                small_sweep.title,
                cell.read(),
                cell.samples(),
                {"impl.score": "cpu", "nested": {"a.b": (1, 2)}},
                attempt,
            )
        report.build(small_sweep.folder)
        tracker.log_sweep(
            small_sweep.folder, small_sweep.title, small_sweep.rows(), small_sweep.samples()
        )
    runs = sorted((small_sweep.folder / "wandb").glob("offline-run-*"))
    assert len(runs) == 3
    found = {one["run_id"]: one for one in map(inspect, runs)}
    first = found[f"{cell.identity}-1"]
    assert first["config"]["rbit"] == 32
    assert first["config"]["resolved"] == {"impl_score": "cpu", "nested": {"a_b": [1, 2]}}
    assert first["summary"]["score"] == 76.8
    assert first["summary"]["score/vt"] == 60
    assert first["summary"]["samples"]["nrows"] == 125
    assert first["summary"]["rows"]["nrows"] == 6  # of its sub-tasks and their mean
    assert first["name"] == "hata-k512-r32"
    assert f"{cell.identity}-2" in found
    (sweep,) = (one for one in found.values() if one["name"] == "default/first")
    assert sweep["summary"]["by_rbit/score/hata-k512"] == 79.2
    assert sweep["summary"]["cells/ok"] == 5
    assert "figures/score_vs_rbit" in sweep["summary"]
    assert sweep["summary"]["rows"]["nrows"] == len(small_sweep.rows())


def records(run: Path) -> list[dict[str, Any]]:
    """Read the records of an offline run with W&B's command line tool."""
    found = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in found.stdout.splitlines()]


def artifacts(read: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the artifacts of a run by name, without those of its tables."""
    made = [one["artifact"] for one in read if one["type"] == "artifact"]
    return {one["name"]: one for one in made if one["type"] != "run_table"}


def contents(artifact: dict[str, Any]) -> list[str]:
    return sorted(one["path"] for one in artifact["manifest"]["contents"])


@pytest.mark.usefixtures("offline")
def test_rows_report_and_weights_are_artifacts_and_a_file_of_weights_is_copied_once(
    small_sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    folder, title, rows = small_sweep.folder, small_sweep.title, small_sweep.rows()
    weights, large = tmp_path / "hata-0123.safetensors", tmp_path / "loki-45.safetensors"
    weights.write_bytes(b"weights")
    large.write_bytes(bytes(2 * 2**20))
    tracker = WandbTracker(artifact_mib=1.5)
    tracker.begin_sweep(folder, title, "python run.py -m")
    for cell, path in zip(small_sweep.cells()[:3], (weights, weights, large), strict=True):
        assert tracker.log_cell(folder, title, cell.read(), [], {}, artifact=path)
    (folder / "figures").mkdir()
    Image.new("RGB", (1, 1)).save(folder / "figures" / "score.png")
    for name in ("report.html", "report.md", "rows.csv", "rows.parquet", "samples.parquet"):
        (folder / name).write_text(name)
    tracker.log_sweep(folder, title, rows, small_sweep.samples())

    read = list(map(records, sorted((folder / "wandb").glob("offline-run-*"))))
    found = sorted(map(artifacts, read), key=len)
    assert found[:2] == [{}, {}]
    assert contents(found[2]["hata-0123"]) == ["hata-0123.safetensors"]
    assert found[2]["hata-0123"]["type"] == "weights"
    assert sorted(found[3]["default-rows"]["aliases"]) == ["first", "latest"]
    assert contents(found[3]["default-rows"]) == ["rows.csv", "rows.parquet", "samples.parquet"]
    assert contents(found[3]["default-report"]) == [
        *("figures/score.png", "report.html", "report.md")
    ]
    told = [[one["run"] for one in each if one["type"] == "run"][-1] for each in read]
    assert {one["notes"] for one in told} == {"python run.py -m"}
    (live,) = (one for one in told if one["display_name"] == title)
    assert live["tags"] == ["sweep", "tiny", "ruler", "sparse", "unified"]

    where = tracker.where(folder, rows)
    (command,) = re.findall(r"(wandb sync .+?)  #", where)
    listed = subprocess.run(
        [sys.executable, "-m", *shlex.split(command), "--dry-run"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert "Would sync 4 run(s)" in listed.stdout + listed.stderr
    assert "dashboard --model tiny --task ruler --question sparse --protocol unified  #" in where


@pytest.mark.usefixtures("offline")
def test_with_artifact_mib_0_nothing_is_an_artifact(small_sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    cell = small_sweep.cells()[0]
    assert WandbTracker(artifact_mib=0).log_cell(
        small_sweep.folder, "s", cell.read(), [], {}, artifact=tmp_path / "a.safetensors"
    )
    (run,) = (small_sweep.folder / "wandb").glob("offline-run-*")
    assert artifacts(records(run)) == {}


@pytest.mark.usefixtures("user")
def test_a_sweep_without_runs_names_no_commands(small_sweep: Sweep) -> None:
    assert WandbTracker().where(small_sweep.folder, small_sweep.rows()) == ""


@pytest.mark.usefixtures("offline")
def test_the_run_of_a_search_has_its_best_trials(small_sweep: Sweep) -> None:
    cells = [cell.identity for cell in small_sweep.cells()]
    ended = [
        {"trial": number, "run_id": name, "knobs": {"rbit": "32"}}
        for number, name in enumerate(cells)
    ]
    content = {"objectives": ["score"], "trials": 5, "knobs": {"rbit": "32, 64"}, "ended": ended}
    small_sweep.note_search(content)
    rows, samples = small_sweep.rows(), small_sweep.samples()
    WandbTracker().log_sweep(small_sweep.folder, small_sweep.title, rows, samples)
    (run,) = (small_sweep.folder / "wandb").glob("offline-run-*")
    best = inspect(run)["summary"]["search/best"]
    assert (best["nrows"], best["ncols"]) == (5, 4)  # trials, rbit, score and bytes read


@pytest.mark.usefixtures("offline")
def test_a_sweep_has_one_run_from_its_start_to_its_end(small_sweep: Sweep) -> None:
    tracker, cell = WandbTracker(), small_sweep.cells()[1]
    tracker.begin_sweep(small_sweep.folder, small_sweep.title)
    print("a line of the console")
    cells = [{"cell": "tiny ruler method=hata", "samples": 5, "score": 60.0, "ended": False}]
    tracker.log_progress(5, 20, cells)
    content = (cell.read(), cell.samples(), {})
    assert tracker.log_cell(small_sweep.folder, small_sweep.title, *content)
    tracker.log_progress(20, 20, [{**cells[0], "samples": 20, "ended": True}])
    tracker.log_sweep(
        small_sweep.folder, small_sweep.title, small_sweep.rows(), small_sweep.samples()
    )
    runs = sorted((small_sweep.folder / "wandb").glob("offline-run-*"))
    of_cell, of_sweep = sorted(map(inspect, runs), key=lambda one: one["name"] == "default/first")
    assert of_cell["run_id"] == f"{cell.identity}-1"
    found = of_sweep["summary"]
    assert (found["samples/done"], found["samples/all"]) == (20, 20)
    assert (found["cells/so far"]["nrows"], found["cells/ok"]) == (1, 5)
    logs = [path.read_text() for path in small_sweep.folder.glob("wandb/*/files/output.log")]
    assert logs == ["a line of the console\n"]


@pytest.mark.usefixtures("offline")
def test_a_sweep_whose_run_breaks_has_one_at_its_end(
    small_sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = WandbTracker()
    tracker.begin_sweep(small_sweep.folder, small_sweep.title)
    monkeypatch.setattr(tracker._live, "log", lambda *given: 1 / 0)
    monkeypatch.setattr(session("auto"), "mode", "online")  # so that it can go on offline
    monkeypatch.setattr(tracker, "_live_mode", "online")
    with pytest.warns(UserWarning, match="offline from here on.*division by zero"):
        tracker.log_progress(1, 2, [{"cell": "one"}])
    tracker.log_progress(2, 2, [{"cell": "one"}])  # nothing is left to copy it to
    tracker.log_sweep(
        small_sweep.folder, small_sweep.title, small_sweep.rows(), small_sweep.samples()
    )
    runs = [inspect(path) for path in (small_sweep.folder / "wandb").glob("offline-run-*")]
    assert sorted("cells/ok" in one["summary"] for one in runs) == [False, True]


@pytest.mark.usefixtures("offline")
def test_training_losses_are_read_back_step_by_step(
    small_sweep: Sweep, row: Callable[..., Row]
) -> None:
    losses = [
        {"layer": layer, "step": step, "loss": 4.0 / step + layer}
        for layer in (0, 1)
        for step in (1, 2, 4)
    ]
    fitted = row(run_id="f" * 16, task="fit", method="hata", loss_last=1.5)
    assert WandbTracker().log_cell(small_sweep.folder, "fit", [fitted], losses, {})
    (run,) = (small_sweep.folder / "wandb").glob("offline-run-*")
    totals = inspect(run)["summary"]
    assert (totals["step"], totals["loss/layer_00"], totals["loss/layer_01"]) == (4, 1.0, 2.0)
    assert (totals["loss/mean"], totals["loss_last"]) == (1.5, 1.5)


KEY = "0" * 40


class Host(http.server.BaseHTTPRequestHandler):
    """A host of W&B that refuses every key, and counts the requests."""

    requests = 0

    def do_POST(self) -> None:
        Host.requests += 1
        self.send_error(401)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Host.requests = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


def offline_runs(sweep: Sweep) -> list[str]:
    return [path.name for path in sorted((sweep.folder / "wandb").glob("offline-run-*"))]


@pytest.mark.usefixtures("user", "host")
def test_a_host_is_asked_once_a_process_and_then_runs_are_offline(
    small_sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    cells = small_sweep.cells()[:2]
    asked = []

    def track() -> None:
        for cell in cells:  # each of them has a tracker of its own
            rows, samples = cell.read(), cell.samples()
            assert WandbTracker().log_cell(small_sweep.folder, "s", rows, samples, {})
            asked.append(Host.requests)
        WandbTracker().log_sweep(small_sweep.folder, "s", small_sweep.rows(), small_sweep.samples())

    with pytest.warns(UserWarning, match="runs are offline from here on, `wandb sync`") as said:
        track()
    assert len(said) == 1
    assert asked[0] == asked[1] == Host.requests > 0
    found = offline_runs(small_sweep)
    assert len(found) == 3
    assert all(any(cell.identity in name for name in found) for cell in cells)


@pytest.mark.usefixtures("user")
def test_a_cell_whose_run_fails_is_copied_offline(
    small_sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host has answered, but the run cannot be made."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb, "login", lambda: True)
    start, modes = wandb.init, []

    def init(**options: Any) -> Any:
        modes.append(options["settings"].mode)
        if modes[-1] != "offline":
            raise wandb.errors.CommError("the connection\nis lost")
        return start(**options)

    monkeypatch.setattr(wandb, "init", init)
    cell = small_sweep.cells()[0]

    def track() -> None:
        for attempt in (1, 2):
            assert WandbTracker().log_cell(small_sweep.folder, "s", cell.read(), [], {}, attempt)

    with pytest.warns(
        UserWarning, match="offline from here on, .*: the connection is lost$"
    ) as said:
        track()
    assert len(said) == 1
    assert modes == ["online", "offline", "offline"]
    assert len(offline_runs(small_sweep)) == 2


@pytest.mark.usefixtures("offline")
def test_tracking_that_fails_offline_too_gives_one_warning_and_no_exception(
    small_sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb, "init", init)
    cell = small_sweep.cells()[0]

    def track() -> None:
        for _ in range(2):
            assert not WandbTracker().log_cell(small_sweep.folder, "s", cell.read(), [], {})
        WandbTracker().log_sweep(small_sweep.folder, "s", small_sweep.rows(), small_sweep.samples())

    with pytest.warns(UserWarning, match="W&B tracking stopped, the results folder has") as said:
        track()
    assert len(said) == 1


def test_without_account_and_request_runs_are_offline_without_a_word(user: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Session("auto").mode == "offline"


def test_who_asks_for_online_runs_without_account_is_told(user: Path) -> None:
    with pytest.warns(UserWarning, match="offline from here on, .*: No API key configured"):
        assert Session("online").mode == "offline"


@pytest.mark.parametrize(
    ("variable", "mode", "found"),
    [
        (None, "auto", "offline"),  # of the settings file
        (None, "disabled", "disabled"),
        ("dryrun", "auto", "dryrun"),
        ("disabled", "auto", "disabled"),
        ("dryrun", "disabled", "dryrun"),
    ],
)
def test_the_mode_of_wandbs_own_settings_is_honoured(
    user: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, mode: str, found: str
) -> None:
    """An account alone does not switch on what was switched off."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (user / "wandb").mkdir()
    (user / "wandb" / "settings").write_text("[default]\nmode = offline\n")  # by `wandb offline`
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Session(mode).mode == found


@pytest.mark.usefixtures("user")
def test_nothing_is_copied_if_wandb_is_disabled(
    small_sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    cell = small_sweep.cells()[0]
    # Later, when it is enabled, the cell is copied.
    assert not WandbTracker().log_cell(small_sweep.folder, "s", cell.read(), [], {})
    assert not (small_sweep.folder / "wandb").exists()


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize(
    ("given", "variable", "message"),
    [
        ({"mode": "foo"}, None, r"tracker\.mode must be one of auto, online, .*, got 'foo'\.$"),
        ({"mode": None}, None, r"tracker\.mode must be one of auto, .*, got None\.$"),
        ({"mode": ["offline"]}, None, r"tracker\.mode must be one of auto, .*, got \['offline'\]"),
        ({"project": 7}, None, r"tracker\.project must be a name that W&B accepts, got 7: "),
        ({"project": "a/b"}, None, r"tracker\.project must be .*, got 'a/b': .* cannot contain"),
        ({"artifact_mib": -1}, None, r"artifact_mib must be at least 0, got -1\.$"),
        ({"entity": True}, None, r"tracker\.entity must be a name that W&B accepts, got True: "),
        ({}, "sideways", r"variable WANDB_MODE must be one of online, .*, got 'sideways'\.$"),
        ({}, "auto", r"variable WANDB_MODE must be one of online, .*, got 'auto'\.$"),
        ({}, "", r"variable WANDB_MODE must be one of online, .*, got ''\.$"),
    ],
)
def test_settings_that_wandb_does_not_accept_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], variable: str | None, message: str
) -> None:
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    with pytest.raises(ValueError, match=message):
        WandbTracker(**given)


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("mode", ["online", "offline", "shared", "disabled", "dryrun", "run"])
def test_every_mode_of_wandb_is_accepted(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    WandbTracker(mode=mode)
    monkeypatch.setenv("WANDB_MODE", mode)
    WandbTracker()


def test_configuration_and_summary(row: Callable[..., Row]) -> None:
    mean = row(method="hata", k=64, rbit=32, score=50.0, parameters={"use_norm": True})
    part = row(method="hata", k=64, rbit=32, subtask="vt", score=25.0)
    config = cell_config(mean, {"a.b": Path("x")}, "hata-k64")
    assert (config["p_use_norm"], config["resolved"]) == (True, {"a_b": "x"})
    assert config["configuration"] == "hata-k64"
    values = summary([part, mean])
    assert (values["score"], values["score/vt"], values["status"]) == (50.0, 25.0, "ok")
    assert "k" not in values
    assert plain_config({"x": [1, (2, None)]}) == {"x": [1, [2, None]]}


def settings(**method: Any) -> dict[str, Any]:
    return {"method": {"_target_": "Hata", **method}, "question": "sparse"}


def flat(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [named_values(one) for one in cells]


def test_a_name_has_what_varies_and_leaves_out_what_most_cells_of_the_method_have(
    row: Callable[..., Row],
) -> None:
    cells = [settings(sigma=0.1, use_norm=True), settings(sigma=0.1, use_norm=False)]
    cells += [settings(sigma=0.3, use_norm=True), {**settings(sigma=0.1, use_norm=True), "seed": 1}]
    cells[0]["seed"] = cells[1]["seed"] = cells[2]["seed"] = 0
    names = Names(flat(cells))
    found = [
        names.run_name(
            row(run_id=f"{place:016x}", method="hata", k=64, rbit=32, seed=one["seed"]), one
        )
        for place, one in enumerate(cells)
    ]
    assert found == [
        "hata-k64-r32-s0",
        "hata-k64-r32-s0-use_norm=false",
        "hata-k64-r32-s0-sigma=0.3",
        "hata-k64-r32-s1",
    ]
    # A bar averages neither over numbers of samples nor over commits.
    known = row(method="hata", k=64, rbit=32, seed=1, num_samples=3, git_commit="0123456789ab")
    assert names.configuration(known, cells[2]) == "hata-L4096-k64-r32-sigma=0.3-n3-0123456"


def test_what_varies_without_an_effect_on_a_cell_is_not_in_its_name(
    row: Callable[..., Row],
) -> None:
    cells: list[dict[str, Any]] = [
        {"protocol": {"protocol": name, "num_sink": sinks}, "calibration": {"num_sequences": n}}
        for name in ("unified", "native")
        for sinks in (0, 4)
        for n in (7, 14)
    ]
    names = Names(flat(cells))
    assert names.run_name(row(method="full", protocol=None), cells[0]) == "full"
    exact = row(run_id="1" * 16, method="exact", k=64, protocol="native")
    assert names.run_name(exact, cells[-1]) == "exact-k64-native-num_sink=4"
    learned = exact.replace(run_id="2" * 16, artifact_digest="ab")
    assert names.run_name(learned, cells[-1]) == "exact-k64-native-num_sink=4-num_sequences=14"


def test_cells_that_words_cannot_tell_apart_are_named_by_their_identity(
    row: Callable[..., Row],
) -> None:
    names = Names()
    first, other = (row(run_id=digit * 16, method="quest", k=64) for digit in "ab")
    assert names.run_name(first, {}) == "quest-k64"
    assert names.run_name(other, {}) == "quest-k64-bbbbbb"
    assert names.run_name(first, {}) == "quest-k64"  # the next attempt


def test_each_cell_of_the_league_has_a_name_of_its_own() -> None:
    rows = [one for one in read_rows(LEAGUE).to_dict("records") if one["subtask"] == "mean"]
    cells = [
        {
            "model": {"name": one["model"]},
            "method": {"_target_": one["method"]},
            "protocol": {"protocol": one["protocol"] if pd.notna(one["protocol"]) else "unified"},
            "question": one["question"],
        }
        for one in rows
    ]
    names = Names(flat(cells))
    columns = ("model", "task", "method", "protocol", "question", "k", "rbit", "run_id")
    found = []
    for one, cell in zip(rows, cells, strict=True):
        known = {name: None if pd.isna(one[name]) else one[name] for name in columns}
        some = Row(status=Status.OK, subtask="mean", **known)
        found.append(names.run_name(some, cell))
    assert len(set(found)) == len(rows) > 250
    assert "quest-k128-native-dense" in found
    assert max(map(len, found)) <= 45


def test_tags_have_protocol_question_seed_and_what_was_given(row: Callable[..., Row]) -> None:
    cell = {**settings(use_norm=False), "num_samples": 5, "task": {"subtasks": ["vt", "cwe"]}}
    names = Names(flat([cell]), given=["method.use_norm", "num_samples", "task.subtasks", "method"])
    known = row(method="hata", k=64, rbit=32, protocol="native", question="dense", seed=3)
    assert names.tags(known, cell) == [
        *("hata", "tiny", "ruler", "ok", "native", "dense", "seed3", "L4096", "k64", "rbit32"),
        *("use_norm=false", "num_samples=5", "subtasks=[vt, cwe]"),
    ]
    assert names.run_name(known, cell) == "hata-k64-r32-use_norm=false"
    assert max(map(len, Names().tags(row(model="m" * 80), {}))) == 64


def test_the_summary_has_every_budget_and_every_length_of_a_cell(row: Callable[..., Row]) -> None:
    budgets = [row(method="hata", k=k, recall_at_k=share) for k, share in ((32, 0.25), (64, 0.5))]
    values = summary(budgets)
    assert (values["recall_at_k"], values["recall_at_k/k64"]) == (0.25, 0.5)
    lengths = [row(subtask=str(n), decode_ms_p50=n / 1e3) for n in (4096, 8192)]
    values = summary(lengths)
    assert (values["decode_ms_p50"], values["decode_ms_p50/8192"]) == (4.096, 8.192)


def test_curves_over_k_and_rbit(row: Callable[..., Row]) -> None:
    rows = frame(
        [
            row(run_id=f"{k:016x}", method="quest", k=k, score=score, parameters={"page_size": 16})
            for k, score in ((128, 70.0), (64, 50.0))
        ]
    )
    assert curves(rows, frame([])[[]]) == [
        {"k": 64.0, "by_k/score/quest": 50.0},
        {"k": 128.0, "by_k/score/quest": 70.0},
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb_workspaces")
def test_the_workspace_is_specified_offline() -> None:
    shown = {"model": "tiny", "protocol": "native"}
    spec = dashboard("team", "topkbench", shown)._to_model().model_dump(by_alias=True)["spec"]
    sections = spec["section"]["panelBankConfig"]["sections"]
    names = [one["name"] for one in sections]
    assert names == ["Quality", "Why", "Cost", "Training", "Sweeps"]
    assert sections[0]["panels"][0]["config"]["xAxis"] == "config:k.value"
    assert sections[0]["panels"][1]["config"]["yAxis"] == "summary:score"
    drawn = [one["panels"][0]["config"] for one in sections[3:]]
    assert [(curve["xAxis"], curve["metricRegex"]) for curve in drawn] == [
        ("step", "loss/.*"),
        ("k", "by_k/score/.*"),
    ]
    grouping = spec["section"]["runSets"][0]["grouping"]
    assert [one["name"] for one in grouping] == ["group", "jobType"]
    filters = spec["section"]["runSets"][0]["filters"]["filters"]
    assert [(one["key"]["name"], one["op"], one["value"]) for one in filters] == [
        ("tags", "IN", ["tiny"]),
        ("tags", "IN", ["native", "full"]),
    ]
    bars = sections[0]["panels"][2]["config"]
    assert (bars["metrics"], bars["groupBy"]) == (["score"], "configuration.value")


def test_a_workspace_shows_one_of_each_of_a_sweeps_settings(row: Callable[..., Row]) -> None:
    several = [row(model=one, protocol="native", question=None) for one in ("tiny", "other")]
    assert shown_of(frame(several)) == {
        **{"model": "tiny", "task": "ruler", "question": "all", "protocol": "native"}
    }


@pytest.mark.usefixtures("user")
def test_saving_the_workspace_needs_an_account(capsys: pytest.CaptureFixture[str]) -> None:
    assert tracking.main(["dashboard"]) == 2
    error = capsys.readouterr().err
    assert "run `wandb login` first" in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("offline")
def test_saving_the_workspace_needs_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert tracking.main(["dashboard"]) == 2
    assert capsys.readouterr().err == (
        "error: a workspace is saved online, but W&B's mode is offline; run `wandb online` first.\n"
    )


def finish(sweep: Sweep) -> int:
    return SweepReport().finish(sweep, "python run.py", NoTracker())


def test_the_last_line_is_the_path_of_the_report(
    tmp_path: Path, row: Callable[..., Row], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = Sweep(tmp_path / "default" / "one", tmp_path)
    sweep.store.cell("0" * 16).write([row(method="hata", k=64, score=1.0)], [], {}, "")
    sweep.append("0" * 16)
    assert finish(sweep) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[-1] == str(sweep.folder / "report.html")
    assert any(line.startswith("HATA") for line in lines)


@pytest.mark.parametrize(
    "status", ["failed", "wrong", "out_of_memory", "interrupted", "skipped", "ok"]
)
def test_a_cell_that_failed_makes_the_sweep_fail(
    tmp_path: Path, row: Callable[..., Row], status: str
) -> None:
    sweep = Sweep(tmp_path / "default" / "one", tmp_path)
    sweep.store.cell("0" * 16).write([row(status=status, reason="why.")], [], {}, "")
    sweep.append("0" * 16)
    assert finish(sweep) == (0 if status in ("ok", "skipped") else 3)
    assert (sweep.folder / "report.html").exists()


def test_a_report_that_cannot_be_written_gives_an_error_of_one_sentence(
    small_sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_sweep.folder / "figures").write_text("in the way")
    with pytest.raises(SystemExit) as caught:
        finish(small_sweep)
    assert caught.value.code == 1
    assert "results folder must be writable" in capsys.readouterr().err


@pytest.mark.usefixtures("pictures")
def test_a_report_that_fails_for_any_reason_gives_an_error_of_one_sentence(
    small_sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("no font\nwas found")

    monkeypatch.setattr(Figure, "draw", fail)
    with pytest.raises(SystemExit) as caught:
        finish(small_sweep)
    assert caught.value.code == 1
    assert capsys.readouterr().err == (
        "error: the report could not be made (RuntimeError: no font was found), but all rows are in"
        f" {small_sweep.store.folder};"
        f" `python -m topkbench.analysis.report {small_sweep.folder}` makes it.\n"
    )
    assert len(pd.read_parquet(small_sweep.folder / "rows.parquet")) == len(small_sweep.rows()) > 0
    assert all(cell.finished() for cell in small_sweep.cells())


def test_the_empty_tracker_accepts_every_call() -> None:
    NoTracker().log_cell("f", "s", [], [], {}, 1)
    NoTracker().log_sweep("f", "s", None, None)
