import subprocess
import sys
from pathlib import Path

import pytest
import torch

import topkbench.kernels.dispatch as dispatch
from topkbench.kernels.dispatch import resolve

ROOM = Path(dispatch.__file__).parent
OPS = (
    "hash_encode",
    "hamming_score",
    "page_score",
    "lowrank_score",
    "channel_score",
    "code_score",
    "topk_select",
    "sparse_attention",
)
CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_the_fastest_available(op: str) -> None:
    assert resolve(op, "auto", CPU) == "cpu"
    assert resolve(op, "auto", META) == "reference"
    has_triton = (ROOM / op / "fused.py").is_file()
    assert resolve(op, "auto", CUDA) == ("triton" if has_triton else "reference")
    assert resolve(op, "reference", CPU) == "reference"


def test_a_named_implementation_is_used_or_refused() -> None:
    with pytest.raises(ValueError, match="auto, reference, cpu, triton, got 'numba'"):
        resolve("topk_select", "numba", CPU)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'cpu' of topk_select needs tensors on a cpu device"):
        resolve("topk_select", "cpu", CUDA)


@pytest.mark.parametrize("op", OPS)
def test_triton_runs_on_a_cpu_only_in_its_interpreter(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve(op, "triton", CPU) == "triton"
    assert resolve(op, "auto", CPU) == "cpu"
    with pytest.raises(ValueError, match="needs tensors on a cuda device, got meta"):
        resolve(op, "triton", META)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="needs tensors on a cuda device, got cpu"):
        resolve(op, "triton", CPU)


def test_without_triton_a_gpu_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    dispatch._choose.cache_clear()
    try:
        assert resolve("topk_select", "auto", CUDA) == "reference"
        with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
            resolve("topk_select", "triton", CUDA)
    finally:
        dispatch._choose.cache_clear()


def test_the_number_of_threads_follows_torch() -> None:
    import numba

    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            resolve("topk_select", "auto", CPU)
            assert torch.get_num_threads() == count
            assert numba.get_num_threads() == min(count, numba.config.NUMBA_NUM_THREADS)
    finally:
        torch.set_num_threads(threads)


def test_importing_every_api_loads_no_compiler() -> None:
    apis = sorted(f"topkbench.kernels.{path.parent.name}.api" for path in ROOM.glob("*/api.py"))
    assert len(apis) == 10
    # torch may load triton itself if it is installed: our modules must not add anything.
    program = (
        "import importlib, sys, torch\n"
        "before = set(sys.modules)\n"
        f"for name in {apis!r}: importlib.import_module(name)\n"
        "print(sorted({'triton', 'numba'} & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_implementations_never_import_each_other() -> None:
    for path in ROOM.glob("*/*.py"):
        if path.stem in ("reference", "cpu", "fused"):
            others = {"reference", "cpu", "fused"} - {path.stem}
            for line in path.read_text().splitlines():
                if line.startswith(("import ", "from ")):
                    assert not others & set(line.replace(".", " ").replace(",", " ").split())
