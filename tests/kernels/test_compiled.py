"""Machine code is cached by everything it depends on; without a cache kernels still work."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from topkbench.kernels import compiled

KERNELS = Path(__file__).parents[2] / "kernels"
PROBE = """
import numpy as np
from numba import prange
from topkbench.kernels.compiled import entry_point
from topkbench.kernels.softmax import exp

@entry_point
def powers(out):
    for place in prange(len(out)):
        out[place] = exp(-np.float32(place))

def first(count):
    out = np.zeros(count, np.float32)
    powers(out)
    return [round(float(one), 3) for one in out]
"""
# Two functions of the same name and type, too long to be inlined.
STEP = "        state = (state ^ (state >> 3)) * 5 + value\n"
HELPERS = f"""
import numpy as np
from numba import njit, prange
from topkbench.kernels.compiled import entry_point

def helper(value):
    @njit
    def walk(state):
{STEP * 50}        return state % 1000
    return walk

one, two = helper(1), helper(2)

@entry_point
def rising(out):
    for _ in prange(1):
        out[0] = one(len(out))
        out[1] = two(len(out))

@entry_point
def falling(out):
    for _ in prange(1):
        out[0] = two(len(out))
        out[1] = one(len(out))

def run(*functions):
    for function in functions:
        out = np.zeros(2, np.int64)
        function(out)
        expected = [one.py_func(np.int64(2)), two.py_func(np.int64(2))]
        print(out.tolist() == (expected if function is rising else expected[::-1]))
"""
RUN_PROBE = "from topkbench.kernels.probe import first; print(first(3))"
RIGHT = "[1.0, 0.368, 0.135]"
EDITED = "[2.0, 0.736, 0.271]"  # computed with twice the power
POWER = "power = series *"


class Checkout:
    """A copy of the kernels with a small entry point added, and a cache folder."""

    def __init__(self, folder: Path) -> None:
        self.kernels = folder / "topkbench" / "kernels"
        self.cache = folder / "cache"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(KERNELS, self.kernels, ignore=ignored)
        (self.kernels / "probe.py").write_text(PROBE)
        self.softmax = self.kernels / "softmax.py"

    def run(self, program: str = RUN_PROBE, **settings: str) -> tuple[str, str]:
        """Run a program in a new process; return its standard output and its warnings."""
        dropped = ("NUMBA_CACHE_DIR", "TOPKBENCH_CACHE")
        environment = {name: text for name, text in os.environ.items() if name not in dropped}
        environment |= {"TOPKBENCH_CACHE": str(self.cache), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": str(self.kernels.parents[1]), **settings}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr

    def files(self, cache: Path | None = None) -> list[Path]:
        """Return the files of machine code."""
        return sorted(path for path in (cache or self.cache).rglob("*") if path.is_file())


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_cached_code_is_seen_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.config, "CACHE_DIR", str(tmp_path))
    assert not compiled.are_cached()
    compiled._folder().mkdir(parents=True)
    assert not compiled.are_cached()
    (compiled._folder() / "kernel").touch()
    assert compiled.are_cached()


def test_an_edit_of_a_function_that_a_kernel_calls_and_its_undoing_take_effect(
    checkout: Checkout,
) -> None:
    before, text = checkout.softmax.stat(), checkout.softmax.read_text()
    assert text.count(POWER) == 1
    assert checkout.run() == (RIGHT, "")
    checkout.softmax.write_text(text.replace(POWER, "power = np.float32(2.0) * series *"))
    assert checkout.run() == (EDITED, "")
    # Undo the edit, as git checkout does, but with the file's first modification time.
    checkout.softmax.write_text(text)
    os.utime(checkout.softmax, (before.st_atime, before.st_mtime))
    kept = checkout.files()
    times = [path.stat().st_mtime_ns for path in kept]
    assert checkout.run() == (RIGHT, "")
    assert len(kept) == 2
    assert checkout.files() == kept
    assert [path.stat().st_mtime_ns for path in kept] == times  # reused, not compiled again


def test_cached_code_calls_its_own_helpers_next_to_newly_compiled_code(
    checkout: Checkout,
) -> None:
    (checkout.kernels / "helpers.py").write_text(HELPERS)
    load = "from topkbench.kernels.helpers import falling, rising, run;"
    quiet = "import numpy as np; np.seterr(over='ignore');"
    assert checkout.run(quiet + load + "run(rising)") == ("True", "")
    # This process compiles the helpers in another order, so numba would swap their names.
    assert checkout.run(quiet + load + "run(falling, rising)") == ("True\nTrue", "")
    assert checkout.run(quiet + load + "run(rising, falling)") == ("True\nTrue", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_numbers_functions_from_another_number(checkout: Checkout) -> None:
    program = """
import os, sys
from topkbench.kernels import compiled
for child in range(2):
    sys.stdout.flush()
    if os.fork() == 0:
        print(next(compiled.FunctionIdentity._unique_ids) >> 16, flush=True)
        os._exit(0)
    os.wait()
print(next(compiled.FunctionIdentity._unique_ids) >> 16)
"""
    printed, _ = checkout.run(program)
    assert len(set(printed.split())) == 3


def test_code_for_other_numba_settings_is_cached_separately(checkout: Checkout) -> None:
    assert checkout.run() == (RIGHT, "")
    assert checkout.run(NUMBA_OPT="1") == (RIGHT, "")
    assert len({path.parent for path in checkout.files()}) == 2


def test_without_a_writable_cache_it_compiles_and_warns_once(checkout: Checkout) -> None:
    checkout.cache.write_text("a file, so that no folder can be made here")
    twice = f"{RUN_PROBE}; import numpy as np; import topkbench.kernels.probe as probe;"
    twice += "out = np.zeros(2, np.float64); probe.powers(out); print(out.round(3).tolist())"
    printed, warned = checkout.run(twice)
    assert printed == f"{RIGHT}\n[1.0, 0.368]"
    assert (
        warned.count("compiled kernels cannot be cached, so each process compiles them again") == 1
    )
    assert "set TOPKBENCH_CACHE to a writable folder." in warned
    assert checkout.run("import topkbench.kernels.probe") == ("", "")


def test_a_missing_home_folder_is_no_error(checkout: Checkout) -> None:
    printed, warned = checkout.run(TOPKBENCH_CACHE="", HOME="/dev/null")
    assert printed == RIGHT
    assert warned.count("compiled kernels cannot be cached") == 1


def test_code_is_cached_in_numba_cache_dir_if_the_user_sets_it(
    checkout: Checkout, tmp_path: Path
) -> None:
    before = sorted(checkout.kernels.rglob("*"))
    chosen = tmp_path / "numba"
    settings = {"NUMBA_CACHE_DIR": str(chosen), "PYTHONDONTWRITEBYTECODE": "1"}
    assert checkout.run(**settings) == (RIGHT, "")
    assert sorted(checkout.kernels.rglob("*")) == before
    (path,) = checkout.files(chosen)
    assert path.parents[1] == chosen / "topkbench"
    assert checkout.files() == []


def test_a_truncated_cache_file_is_compiled_again(checkout: Checkout) -> None:
    assert checkout.run() == (RIGHT, "")
    (path,) = checkout.files()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert checkout.run() == (RIGHT, "")
    assert checkout.files() == [path]
    digest, _, content = path.read_bytes().partition(b"\n")
    assert digest.decode() == hashlib.sha256(content).hexdigest()


def test_code_edited_while_a_process_runs_is_not_cached(checkout: Checkout) -> None:
    edit = "from topkbench.kernels.probe import first; import topkbench.kernels.softmax as softmax;"
    edit += "open(softmax.__file__, 'a').write('# edited'); print(first(3))"
    assert checkout.run(edit) == (RIGHT, "")
    assert checkout.files() == []


def test_folders_unused_for_long_are_removed(checkout: Checkout) -> None:
    ages = {"old": 31, "young": 29}
    for name, days in ages.items():
        folder = checkout.cache / "numba" / name
        folder.mkdir(parents=True)
        (folder / "code").touch()
        used = folder.stat().st_mtime - days * 24 * 3600
        os.utime(folder, (used, used))
    assert checkout.run() == (RIGHT, "")
    names = {path.name for path in (checkout.cache / "numba").iterdir()}
    (mine,) = {path.parent.name for path in checkout.files()} - {"young"}
    assert names == {"young", mine}
    # Reading machine code counts as using it.
    folder = checkout.cache / "numba" / mine
    os.utime(folder, (0, 0))
    assert checkout.run() == (RIGHT, "")
    assert folder.stat().st_mtime > 0


def test_no_kernel_uses_numbas_own_cache() -> None:
    found = [path for path in KERNELS.rglob("*.py") if "cache=True" in path.read_text()]
    assert found == []
