"""The dense decode steps that methods are compared with: all that a machine has.

The fastest one whose result is right is the baseline. All read the same cache, except that
FlashInfer needs a paged copy of it.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from topkbench.harness.outcome import Unavailable
from topkbench.harness.planted import PlantedStates
from topkbench.kernels.full_attention.api import Backend, full_attention
from topkbench.kernels.full_attention.libraries import FlashInferBatch, library_version

Call = Callable[[], Tensor]
# How torch's errors begin when a backend is missing or lacks these shapes, on CUDA and on a CPU.
_NO_KERNEL = ("No available kernel", "No viable backend")


@dataclass(frozen=True)
class Baseline:
    """A dense decode step.

    Attributes:
        version: Returns the library's version; raises ValueError, with the reason, if it is not
            installed.
        make: Returns the call ``() -> [B, Hq, d]`` on a layer's states, planned once where it needs
            a plan.
    """

    version: Callable[[], str]
    make: Callable[[PlantedStates], Call]


def attention_inputs(states: PlantedStates) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return the arguments of `full_attention`: queries ``[B, Hq, d]``, keys, values and scale."""
    keys = states.key_states
    return states.query_states.flatten(1, 2), keys, states.value_states, keys.shape[-1] ** -0.5


def _sdpa(backend: SDPBackend) -> Baseline:
    def make(states: PlantedStates) -> Call:
        inputs = attention_inputs(states)

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return full_attention(*inputs)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                call()
            except RuntimeError as error:
                if not str(error).startswith(_NO_KERNEL):
                    raise
                # Only warnings say what each kernel lacks.
                reasons = [str(one.message).partition(" (Triggered")[0] for one in caught]
                text = " ".join([str(error), *reasons])
                raise Unavailable(f"this torch has no such kernel here: {text}") from None
        return call

    def versions() -> str:
        cudnn = torch.backends.cudnn.version() if backend == SDPBackend.CUDNN_ATTENTION else None
        return f"torch {torch.__version__}" + (f", cudnn {cudnn}" if cudnn else "")

    return Baseline(versions, make)


def _library(backend: Backend, module: str, distribution: str) -> Baseline:
    def make(states: PlantedStates) -> Call:
        inputs = attention_inputs(states)
        return lambda: full_attention(*inputs, backend=backend)

    return Baseline(lambda: library_version(module, distribution), make)


def _flashinfer() -> Baseline:
    def make(states: PlantedStates) -> Call:
        return FlashInferBatch(*attention_inputs(states))

    return Baseline(lambda: library_version("flashinfer", "flashinfer-python"), make)


def _triton(tile_bytes: int, warps: int, stages: int) -> Baseline:
    def make(states: PlantedStates) -> Call:
        from topkbench.kernels.full_attention import fused

        inputs, blocks = attention_inputs(states), fused.Blocks(tile_bytes, warps, stages)
        return lambda: fused.full_attention(*inputs, None, None, None, None, blocks)

    return Baseline(lambda: version("triton"), make)


BASELINES: dict[str, Baseline] = {
    "sdpa flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa memory-efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa math": _sdpa(SDPBackend.MATH),
    "flash_attn": _library("flash_attn", "flash_attn", "flash-attn"),
    "flash_attn_3": _library("flash_attn_3", "flash_attn_interface", "flash-attn-3"),
    "flashinfer": _flashinfer(),
    "triton": _triton(2**14, 4, 3),
    "triton, tiles of 8 KiB": _triton(2**13, 4, 4),
    "triton, tiles of 32 KiB": _triton(2**15, 8, 2),
}
"""Every dense decode step, by name; our own kernel runs with three fixed tile sizes."""
