"""The command in a container whose code and home cannot be written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("analysis", "conf", "harness", "kernels", "methods", "models", "tasks")
SETTINGS = ("method=exact", "k=64", "num_samples=1", "task.length=512")
SETTINGS = (*SETTINGS, "task.subtasks=[niah_single]", "task.timed_prompts=0")


def without_roots_rights() -> list[str]:
    """Return the beginning of a command line that respects permissions, also if root calls it."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root may write anywhere, unless setpriv takes that right away")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


@pytest.mark.slow
def test_a_checkout_and_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    for folder in CODE:
        shutil.copytree(ROOT / folder, checkout / folder)
    (checkout / ".types").mkdir()
    (checkout / ".types" / "topkbench").symlink_to("..", target_is_directory=True)
    shutil.copy(ROOT / "run.py", checkout)
    home.mkdir()
    places = [checkout, home, *(path for path in checkout.rglob("*") if path.is_dir())]

    def run(*settings: str, **environment: str) -> tuple[int, str, str]:
        unknown = ("TOPKBENCH_CACHE", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR")
        unknown = (*unknown, "MPLCONFIGDIR", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")
        known = {name: one for name, one in os.environ.items() if name not in unknown}
        known["WANDB_MODE"] = "offline"
        known |= {"PYTHONPATH": str(checkout / ".types"), "HOME": str(home), **environment}
        done = subprocess.run(
            [*without_roots_rights(), sys.executable, "run.py", *SETTINGS, *settings],
            cwd=checkout,
            env={**known, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr.rstrip("\n")

    for path in places:
        path.chmod(0o555)
    try:
        results = f"results_dir={tmp_path / 'results'}"
        status, out, error = run(results, TOPKBENCH_CACHE=str(tmp_path / "cache"))
        lines = [line for line in error.splitlines() if not line.endswith("about 0 min left")]
        assert (status, lines) == (0, [])  # nothing of W&B or matplotlib either
        assert [*tmp_path.glob("results/sweep/*/wandb/offline-run-*")] != []
        assert "method=exact k=64 protocol=unified question=sparse: score" in out
        status, _, error = run(results)
        assert status == 1
        assert error == (
            f"error: the cache folder must be writable, but {home}/.cache/topkbench/samples is not"
            " (Permission denied); choose another with cache_dir=PATH or the environment variable"
            " TOPKBENCH_CACHE."
        )
        status, _, error = run(TOPKBENCH_CACHE=str(tmp_path / "cache"))
        assert status == 1
        assert error == (
            f"error: the results folder must be writable, but results is not ({checkout} is"
            " read-only); choose another with results_dir=PATH."
        )
    finally:
        for path in places:
            path.chmod(0o755)
