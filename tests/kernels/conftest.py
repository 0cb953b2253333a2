"""Shared settings of the kernel tests."""

import functools
import importlib
import inspect
import os
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings

# The first example of a kernel compiles it, which takes seconds.
settings.register_profile(
    "kernels", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kernels")


@pytest.fixture(scope="session", autouse=True)
def members_are_listed_once() -> Iterator[None]:
    """List what Triton's modules contain once: its interpreter does at each call of a function."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("triton") is not None:
            once = {**vars(inspect), "getmembers": functools.cache(inspect.getmembers)}
            interpreter = importlib.import_module("triton.runtime.interpreter")
            patch.setattr(interpreter, "inspect", SimpleNamespace(**once))
        yield


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request: pytest.FixtureRequest) -> torch.device:
    """Return a device that runs ``impl="triton"``: a CPU in the interpreter, or a GPU."""
    pytest.importorskip("triton")
    device = torch.device(request.param)
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled for the GPU here, so the interpreter is off")
    return device
