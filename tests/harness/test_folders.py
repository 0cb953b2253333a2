"""Where a sweep writes: checked before anything is composed, cleaned of what killed runs left."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from topkbench.analysis.record import Sweep
from topkbench.harness.main import SweepFolders


@pytest.fixture(autouse=True)
def forget_folders() -> None:
    SweepFolders.noted.clear()


def hydra_config(sweep: Sweep, **more: object) -> Any:
    given = {"task": ["method=hata"], "hydra": []}
    folder = str(sweep.folder)
    hydra = {"sweep": {"dir": folder}, "run": {"dir": folder}, "overrides": given}
    return OmegaConf.create({"hydra": hydra, "results_dir": str(sweep.results_dir), **more})


@pytest.mark.parametrize(
    ("results_dir", "message"),
    [
        ("", "results_dir must name a folder, got ''; the default is results_dir=results."),
        (" ", "results_dir must name a folder, got ' '; the default is results_dir=results."),
        (None, "results_dir must name a folder, got None; the default is results_dir=results."),
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
