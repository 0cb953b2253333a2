"""Shared fixtures of the harness tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = (
    *("transformers", "tokenizers", "huggingface_hub", "accelerate", "hydra", "omegaconf", "yaml"),
    *("wandb", "pandas", "matplotlib", "jinja2", "pyarrow", "filelock", "psutil", "safetensors"),
    *("tabulate", "tqdm", "wonderwords", "pytest", "hypothesis"),
)
HIDE = f"""
import sys
from importlib.machinery import PathFinder
class Present(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.partition(".")[0] in {ABSENT!r} else super().find_spec(name, *rest)
sys.meta_path = [Present if one is PathFinder else one for one in sys.meta_path]
"""


@pytest.fixture
def bare_machine(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a process that finds only torch, numba, triton and what they need.

    The checkout's own code is imported, wherever the process runs.
    """
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDE)
    path = os.pathsep.join([str(folder), str(ROOT / ".types")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
