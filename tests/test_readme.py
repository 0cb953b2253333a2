"""README's script and its example method run as printed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("kernels", "models", "harness", "analysis", "tasks", "tools")


def blocks() -> list[str]:
    """Return the blocks of code that README prints."""
    text = (ROOT / "README.md").read_text()
    return re.findall(r"```(?:python|yaml)\n(.*?)```", text, re.DOTALL)


def test_the_script_that_readme_prints_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (script,) = [block for block in blocks() if "with attach(" in block]
    names: dict[str, Any] = {}
    exec(compile(script, "README.md", "exec"), names)
    assert names["method"].artifact_digest
    assert list(tmp_path.iterdir()) == []  # the artifact ships with the model: nothing was fitted


@pytest.mark.slow
def test_the_method_that_readme_adds_passes_the_contract_as_printed(tmp_path: Path) -> None:
    """In a checkout with this method and full attention alone, the contract tests run over it."""
    (code,) = [block for block in blocks() if "class Mine(AnyMethod)" in block]
    (settings,) = [block for block in blocks() if "topkbench.methods.mine.Mine" in block]
    for folder in LINKED:
        (tmp_path / folder).symlink_to(ROOT / folder, target_is_directory=True)
    shutil.copytree(ROOT / "methods", tmp_path / "methods")
    (tmp_path / "methods" / "mine.py").write_text(code)
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "mine.yaml").write_text(settings)
    shutil.copy(ROOT / "conf" / "method" / "full.yaml", tmp_path / "conf" / "method")
    (tmp_path / ".types").mkdir()
    (tmp_path / ".types" / "topkbench").symlink_to("..", target_is_directory=True)
    (tmp_path / "tests" / "methods").mkdir(parents=True)
    for name in ("conftest.py", "methods/conftest.py", "methods/test_contract.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {name: one for name, one in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "mine"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 30
