from __future__ import annotations

import http.server
import json
import os
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

from topkbench.analysis.record.store import Row, Sweep, frame
from topkbench.analysis.report import build as report
from topkbench.analysis.report.sweep_report import SweepReport
from topkbench.analysis.tracking import tracker as tracking
from topkbench.analysis.tracking.tracker import NoTracker, Session, WandbTracker, dashboard, session
from topkbench.analysis.tracking.wandb_payload import (
    cell_config,
    curves,
    plain_config,
    run_name,
    summary,
)


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
    assert first["name"] == "hata-ruler-L4096-k512-r32"
    assert f"{cell.identity}-2" in found
    (sweep,) = (one for one in found.values() if one["name"] == "default/first")
    assert sweep["summary"]["by_rbit/score/hata-k512"] == 79.2
    assert sweep["summary"]["cells/ok"] == 5
    assert "figures/score_vs_rbit" in sweep["summary"]


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


def test_names_configuration_and_summary(row: Callable[..., Row]) -> None:
    mean = row(method="hata", k=64, rbit=32, score=50.0, parameters={"use_norm": True})
    part = row(method="hata", k=64, rbit=32, subtask="vt", score=25.0)
    assert run_name(mean) == "hata-ruler-L4096-k64-r32"
    config = cell_config(mean, {"a.b": Path("x")})
    assert (config["p_use_norm"], config["resolved"]) == (True, {"a_b": "x"})
    values = summary([part, mean])
    assert (values["score"], values["score/vt"], values["status"]) == (50.0, 25.0, "ok")
    assert "k" not in values
    assert plain_config({"x": [1, (2, None)]}) == {"x": [1, [2, None]]}


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
    spec = dashboard("team", "topkbench")._to_model().model_dump(by_alias=True)["spec"]
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
