"""The environment of all tests, and the order in which they run.

Tests use no network, and Triton's interpreter if there is no GPU. The fixtures that several folders
share are in ``fixtures.py``.
"""

import gc
import os
from pathlib import Path

import pytest

gc.disable()  # until all is imported, of which nothing is garbage: a fifth of the time

# Read when torch is imported: several processes at a time, one thread each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when huggingface_hub is imported, so it is set before any test is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read when numba is imported; keeps compiled kernels for commands that use an empty cache_dir.
_cache = Path(os.environ.get("TOPKBENCH_CACHE") or "~/.cache/topkbench").expanduser()
os.environ.setdefault("NUMBA_CACHE_DIR", str(_cache / "numba"))


def pytest_configure(config: pytest.Config) -> None:
    """Import the fixtures where tests run, which in a parallel run is not the first process."""
    if "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("tx", None):
        config.pluginmanager.import_plugin("topkbench.tests.fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with slow tests first, so that none of them is what a process ends with."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what is imported out of the garbage collections that follow: a second for each."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Let the interpreter free what is imported, without which libraries report leaks."""
    gc.unfreeze()
