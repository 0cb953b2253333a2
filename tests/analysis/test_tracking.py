from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from topkbench.analysis import report, tracking
from topkbench.analysis.record import Row, Sweep, frame
from topkbench.analysis.sweep_callback import ReportCallback
from topkbench.analysis.tracking import NoTracker, WandbTracker, account_configured, dashboard
from topkbench.analysis.wandb_payload import cell_config, curves, plain_config, run_name, summary


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


def inspect(run: Path) -> dict[str, Any]:
    """Read an offline run with W&B's command line tool."""
    found = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(run)],
        capture_output=True,
        text=True,
        check=True,
    )
    return cast(dict[str, Any], json.loads(found.stdout))


@pytest.mark.usefixtures("offline")
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


def test_a_failing_tracker_gives_one_warning(
    small_sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "sideways")
    tracker = WandbTracker()
    cell = small_sweep.cells()[0]
    with pytest.warns(UserWarning, match="W&B tracking stopped, the results folder has every"):
        tracker.log_cell(small_sweep.folder, "s", cell.read(), [], {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.log_cell(small_sweep.folder, "s", cell.read(), [], {})
        tracker.log_sweep(small_sweep.folder, "s", small_sweep.rows(), small_sweep.samples())


def test_an_account_is_a_key_or_a_netrc_entry_of_the_host(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert not account_configured(home)
    assert account_configured({**home, "WANDB_API_KEY": "x"})
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    assert account_configured(home)
    assert not account_configured({**home, "WANDB_BASE_URL": "https://wandb.example.org"})
    assert not account_configured({**home, "NETRC": str(tmp_path / "nowhere")})


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


def test_saving_the_workspace_needs_an_account(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "account_configured", lambda: False)
    assert tracking.main(["dashboard"]) == 2
    error = capsys.readouterr().err
    assert "run `wandb login` first" in error
    assert error.count("\n") == 1


def hydra_config(folder: Path, **more: object) -> Any:
    given = {"task": ["method=hata"], "hydra": []}
    hydra = {"sweep": {"dir": str(folder)}, "run": {"dir": str(folder)}, "overrides": given}
    return OmegaConf.create({"hydra": hydra, **more})


def test_the_last_line_is_the_path_of_the_report(
    tmp_path: Path, row: Callable[..., Row], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = Sweep(tmp_path, "default", "one")
    sweep.store.cell("0" * 16).write([row(method="hata", k=64, score=1.0)], [], {}, "")
    sweep.append("0" * 16)
    tracker = {"_target_": "topkbench.analysis.tracking.NoTracker"}
    ReportCallback().on_multirun_end(hydra_config(sweep.folder, tracker=tracker))
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[-1] == str(sweep.folder / "report.html")
    assert any(line.startswith("HATA") for line in lines)


@pytest.mark.parametrize(
    "status", ["failed", "wrong", "out_of_memory", "interrupted", "skipped", "ok"]
)
def test_a_cell_that_failed_makes_the_sweep_fail(
    tmp_path: Path, row: Callable[..., Row], status: str
) -> None:
    sweep = Sweep(tmp_path, "default", "one")
    sweep.store.cell("0" * 16).write([row(status=status, reason="why.")], [], {}, "")
    sweep.append("0" * 16)
    if status in ("ok", "skipped"):
        ReportCallback().on_run_end(hydra_config(sweep.folder))
    else:
        with pytest.raises(SystemExit) as caught:
            ReportCallback().on_run_end(hydra_config(sweep.folder))
        assert caught.value.code == 3
    assert (sweep.folder / "report.html").exists()


def test_a_report_that_cannot_be_written_gives_an_error_of_one_sentence(
    small_sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_sweep.folder / "figures").write_text("in the way")
    with pytest.raises(SystemExit) as caught:
        ReportCallback().on_multirun_end(hydra_config(small_sweep.folder))
    assert caught.value.code == 2
    assert "results folder must be writable" in capsys.readouterr().err


def test_nothing_is_reported_where_no_cell_ran_or_the_job_raised(
    tmp_path: Path, small_sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    ReportCallback().on_multirun_end(hydra_config(tmp_path / "a" / "b"))
    failed = cast(JobReturn, SimpleNamespace(status=JobStatus.FAILED))
    ReportCallback().on_run_end(hydra_config(small_sweep.folder), job_return=failed)
    assert capsys.readouterr().out == ""


def test_the_empty_tracker_accepts_every_call() -> None:
    NoTracker().log_cell("f", "s", [], [], {}, 1)
    NoTracker().log_sweep("f", "s", None, None)
