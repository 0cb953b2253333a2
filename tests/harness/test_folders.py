"""Where a sweep writes: checked before anything is composed, cleaned of what killed runs left."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from topkbench.analysis.record.files import keep_off_read_only_home
from topkbench.analysis.record.store import Sweep
from topkbench.harness.main import SweepFolders


@pytest.fixture(autouse=True)
def forget_folders() -> None:
    SweepFolders.noted.clear()


def hydra_config(sweep: Sweep, **more: object) -> Any:
    given = {"task": ["method=hata"], "hydra": []}
    folder = str(sweep.folder)
    hydra = {"sweep": {"dir": folder}, "run": {"dir": folder}, "overrides": given}
    settings = {"results_dir": str(sweep.results_dir), "cache_dir": str(sweep.results_dir)}
    settings["experiment_name"] = "sweep"
    return OmegaConf.create({"hydra": hydra, **settings, **more})


@pytest.mark.parametrize(
    ("results_dir", "message"),
    [
        ("", "results_dir must name a folder, got ''; the default is results_dir=results."),
        (" ", "results_dir must name a folder, got ' '; the default is results_dir=results."),
        (None, "results_dir must name a folder, got null; the default is results_dir=results."),
        (7, "results_dir must name a folder, got 7; the default is results_dir=results."),
        (
            "{tmp}/file",
            "the results folder must be writable, but {tmp}/file is not ({tmp}/file is not a"
            " folder); choose another with results_dir=PATH.",
        ),
        (
            "{tmp}/file/below/it",
            "the results folder must be writable, but {tmp}/file/below/it is not ({tmp}/file is not"
            " a folder); choose another with results_dir=PATH.",
        ),
        (  # whose permissions allow root everything
            "/proc/none/of/it",
            "the results folder must be writable, but /proc/none/of/it is not (No such file or"
            " directory); choose another with results_dir=PATH.",
        ),
    ],
)
def test_a_folder_of_results_is_checked_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], results_dir: Any, message: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    if isinstance(results_dir, str):
        results_dir = results_dir.format(tmp=tmp_path)
    config = hydra_config(Sweep(tmp_path / "a", tmp_path), results_dir=results_dir)
    for start in (SweepFolders().on_run_start, SweepFolders().on_multirun_start):
        with pytest.raises(SystemExit) as caught:
            start(config)
        assert caught.value.code == (1 if "writable" in message else 2)
        assert capsys.readouterr().err == f"error: {message.format(tmp=tmp_path)}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_killed_processes_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    left = [
        tmp_path / "results" / "cells" / "0123456789abcdef" / ".rows.json.0123456789abcdef.part",
        tmp_path / "results" / "parts" / ".speed-1.json.0123456789abcdef.part",
        tmp_path / "results" / "a" / "b" / "now" / "figures" / ".x.png.0123456789abcdef.part",
        tmp_path / "cache" / "samples" / ".ruler-1.jsonl.0123456789abcdef.part",
    ]
    kept = [
        tmp_path / "results" / "cells" / "0123456789abcdef" / "rows.json",
        tmp_path / "results" / ".film.mkv.part",  # of somebody else
    ]
    for path in (*left, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    sweep = Sweep(tmp_path / "results" / "sweep" / "now", tmp_path / "results")
    SweepFolders().on_run_start(hydra_config(sweep, cache_dir=str(tmp_path / "cache")))
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


@pytest.mark.parametrize(
    ("folder", "results_dir", "run_setting", "sweep_setting"),
    [
        ("file/sweep/now", "results", "hydra.run.dir=PATH", "hydra.sweep.dir=PATH"),
        ("results/file/now", "results", "results_dir=PATH", "results_dir=PATH"),
    ],
)
def test_a_sweeps_own_folder_is_checked_too(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    results_dir: str,
    run_setting: str,
    sweep_setting: str,
) -> None:
    (tmp_path / "results").mkdir()
    for file in (tmp_path / "file", tmp_path / "results" / "file"):
        file.write_text("in the way")
    config = hydra_config(Sweep(tmp_path / folder, tmp_path / results_dir))
    in_the_way = tmp_path / folder.removesuffix("/now").removesuffix("/sweep")
    kind = "results" if "results" in folder else "sweep"
    for start, setting in (
        (SweepFolders().on_run_start, run_setting),
        (SweepFolders().on_multirun_start, sweep_setting),
    ):
        with pytest.raises(SystemExit) as caught:
            start(config)
        assert caught.value.code == 1
        assert capsys.readouterr().err == (
            f"error: the {kind} folder must be writable, but {tmp_path / folder} is not"
            f" ({in_the_way} is not a folder); choose another with {setting}.\n"
        )


def test_an_empty_sweeps_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = hydra_config(Sweep(tmp_path, tmp_path))
    config.hydra.run.dir = config.hydra.sweep.dir = ""
    for start, setting in (
        (SweepFolders().on_run_start, "hydra.run.dir"),
        (SweepFolders().on_multirun_start, "hydra.sweep.dir"),
    ):
        with pytest.raises(SystemExit) as caught:
            start(config)
        assert caught.value.code == 2
        assert capsys.readouterr().err == f"error: {setting} must name a folder, got ''.\n"


MOVED = ("WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "MPLCONFIGDIR")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which nothing can be made, also by root, and no variable that moves anything."""
    for name in (*MOVED, "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # so that it is restored, whatever the test does
        monkeypatch.delenv(name)
    folder = tmp_path / "home"
    monkeypatch.setenv("HOME", str(folder))
    folder.mkdir()
    for name in (".local", ".config", ".cache"):
        (folder / name).write_text("in the way")
    return folder


def moved() -> dict[str, str]:
    return {name: os.environ[name] for name in MOVED if name in os.environ}


def test_what_the_home_does_not_take_is_written_below_the_cache(home: Path, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "results" / "sweep" / "now", tmp_path / "results")
    SweepFolders().on_run_start(hydra_config(sweep, cache_dir=str(tmp_path / "cache")))
    assert moved() == {name: str(tmp_path / "cache" / "home" / name.lower()) for name in MOVED}


def test_without_a_cache_folder_it_is_a_temporary_one(home: Path, tmp_path: Path) -> None:
    keep_off_read_only_home(home / ".cache" / "topkbench")
    places = {Path(place).parent for place in moved().values()}
    assert len(moved()) == 4
    assert [place.parent for place in places] == [Path(tempfile.gettempdir())]


def test_what_can_be_written_or_is_named_already_stays(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".cache").unlink()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("MPLCONFIGDIR", "elsewhere")
    keep_off_read_only_home(tmp_path / "cache")
    assert moved() == {
        "WANDB_CONFIG_DIR": str(tmp_path / "cache" / "home" / "wandb_config_dir"),
        "MPLCONFIGDIR": "elsewhere",
    }


def test_settings_of_wandb_are_read_where_they_are(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nmode = offline\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("topkbench.analysis.record.files._can_write", lambda folder: False)
    keep_off_read_only_home(tmp_path / "cache")
    assert sorted(moved()) == ["MPLCONFIGDIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"]
