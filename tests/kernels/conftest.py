"""Shared settings of the kernel tests."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# The first example of a kernel compiles it, which takes seconds.
settings.register_profile(
    "kernels", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kernels")


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
