import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import topkbench.kernels.dispatch as dispatch
from topkbench.kernels.dispatch import OPERATORS, implementation, resolve

ROOM = Path(dispatch.__file__).parent
CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


@pytest.mark.parametrize("op", OPERATORS)
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


@pytest.mark.parametrize("op", OPERATORS)
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
    dispatch.choose.cache_clear()
    try:
        assert resolve("topk_select", "auto", CUDA) == "reference"
        with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
            resolve("topk_select", "triton", CUDA)
    finally:
        dispatch.choose.cache_clear()


def test_an_implementation_is_the_function_of_the_references_name() -> None:
    from topkbench.kernels.hash_encode import cpu, reference

    assert implementation(reference.encode_step, "auto", CPU) is cpu.encode_step
    assert implementation(reference.hash_encode, "cpu", CPU) is cpu.hash_encode
    assert implementation(reference.hash_encode, "reference", CPU) is reference.hash_encode
    assert implementation(reference.hash_encode, "auto", META) is reference.hash_encode
    with pytest.raises(ValueError, match="'cpu' of hash_encode needs tensors on a cpu device"):
        implementation(reference.hash_encode, "cpu", CUDA)


STATES = ("page_score", "lowrank_score", "channel_score", "sparse_attention")


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize(
    ("device", "dtype", "channels", "slow"),
    [
        (CPU, torch.float32, 128, ()),
        (CPU, torch.bfloat16, 512, ()),
        (CPU, torch.float16, 128, STATES),
        (CPU, torch.float64, 128, STATES),
        (CUDA, torch.float16, 256, ()),
        (CUDA, torch.float16, 512, ("sparse_attention",)),
        (CUDA, torch.float64, 128, STATES),
    ],
)
def test_auto_takes_what_can_read_the_states(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    channels: int,
    slow: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    dispatch.choose.cache_clear()
    fast = {CPU: "cpu", CUDA: "triton"}[device]
    expected = "reference" if op in slow else fast
    assert resolve(op, "auto", device, dtype, channels) == expected
    dispatch.choose.cache_clear()


@pytest.mark.parametrize("file", ["cpu", "fused"])
@pytest.mark.parametrize("op", OPERATORS)
def test_all_implementations_take_the_references_parameters(op: str, file: str) -> None:
    """The api passes them by position, to whichever implementation is chosen."""
    if file == "fused":
        pytest.importorskip("triton")
    reference = import_module(f"topkbench.kernels.{op}.reference")
    other = import_module(f"topkbench.kernels.{op}.{file}")
    functions = [
        (name, function)
        for name, function in inspect.getmembers(reference, inspect.isfunction)
        if function.__module__ == reference.__name__ and not name.startswith("_")
    ]
    assert op in dict(functions)
    for name, function in functions:
        assert inspect.signature(getattr(other, name)) == inspect.signature(function)


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
