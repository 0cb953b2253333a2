"""The code digest changes with every file that affects results, and with no other file."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels", "methods", "models", "harness", "tasks", "analysis", "tools")

MINE = """
from topkbench.methods.quest import Quest
import numpy
import json
from pieces import scoring
from inner import rules

class Mine(Quest):
    def score(self, encoded, index, context):
        import lazy
        return 1.0 * super().score(encoded, index, context)
"""
FILES = {
    "mine.py": MINE,
    "pieces/__init__.py": "",
    "pieces/scoring.py": "from . import factors\nfrom .deep.more import two\n",
    "pieces/factors.py": "ONE = 1\n",
    "pieces/deep/__init__.py": "",
    "pieces/deep/more.py": "two = 2\n",
    "inner.py": "rules = 3\n",
    "lazy.py": "",
    "unused.py": "",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the code, with a user's folder next to it."""
    root = tmp_path / "checkout"
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder, root / folder, ignore=shutil.ignore_patterns("tiny", "measured", "*.pyc")
        )
    (root / ".types").mkdir()
    (root / ".types" / "topkbench").symlink_to("..", target_is_directory=True)
    for name, text in FILES.items():
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def digest(checkout: Path, *modules: str) -> str:
    """Return the digest as computed by a new process, since a process reads each file once."""
    code = (
        "import sys; from topkbench.harness.sources import code_digest;"
        "print(code_digest(['topkbench.harness.cell', *sys.argv[1:]]))"
    )
    own = checkout.parent / "own"
    done = subprocess.run(
        [sys.executable, "-c", code, *modules],
        env={**os.environ, "PYTHONPATH": f"{checkout / '.types'}{os.pathsep}{own}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "\n1 + 1\n")


def test_editing_code_that_a_method_uses_changes_its_digest(checkout: Path) -> None:
    quest = "topkbench.methods.quest"
    before = digest(checkout, quest)
    assert len(before) == 16
    assert digest(checkout, quest) == before
    used = [
        *("methods/quest.py", "methods/base.py", "models/attach.py", "kernels/softmax.py"),
        *("kernels/rows.py", "kernels/intrinsics.py", "kernels/addresses.py"),
        *(f"kernels/page_score/{file}.py" for file in ("api", "reference", "cpu", "fused")),
        *("kernels/sparse_attention/fused.py", "models/prefill.py", "models/cache.py"),
        *("harness/decoding.py", "harness/quality.py", "harness/reads.py", "harness/task.py"),
    ]
    digests = {before}
    for name in used:
        edit(checkout / name)
        digests.add(digest(checkout, quest))
    assert len(digests) == len(used) + 1


def test_editing_code_that_a_method_does_not_use_keeps_its_digest(checkout: Path) -> None:
    before = digest(checkout, "topkbench.methods.quest")
    for name in (
        *("methods/loki.py", "kernels/hash_encode/cpu.py", "harness/bench.py"),
        *("analysis/report/build.py", "analysis/record/store.py", "tools/train_tiny.py"),
    ):
        edit(checkout / name)
    assert digest(checkout, "topkbench.methods.quest") == before
    assert digest(checkout, "topkbench.methods.loki") != before


def test_editing_a_users_own_files_changes_the_digest(checkout: Path) -> None:
    before = digest(checkout, "mine")
    own = checkout.parent / "own"
    digests = {before}
    used = [name for name in FILES if name != "unused.py"]
    for name in (*used, "../checkout/methods/quest.py"):
        edit(own / name)
        digests.add(digest(checkout, "mine"))
    assert len(digests) == len(used) + 2
    after = digest(checkout, "mine")
    edit(own / "unused.py")
    assert digest(checkout, "mine") == after


def test_an_installed_library_is_ignored_but_a_method_in_one_is_not(checkout: Path) -> None:
    """As with ``pip install --target``, a ``*.dist-info`` folder lies beside the packages."""
    own = checkout.parent / "own"
    (own / "pieces-1.0.dist-info").mkdir()
    before = digest(checkout, "mine")
    edit(own / "pieces" / "factors.py")
    edit(own / "inner.py")
    assert digest(checkout, "mine") == before
    edit(own / "mine.py")
    assert digest(checkout, "mine") != before
