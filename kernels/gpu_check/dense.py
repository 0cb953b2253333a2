"""The dense decode steps that methods are measured against: all that a machine has.

The fastest of them that is right is the baseline. Each takes its time on the same cache; FlashInfer
alone needs a paged copy of it.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from topkbench.kernels.full_attention.api import Backend, full_attention
from topkbench.kernels.full_attention.libraries import FlashInferBatch, library_version
from topkbench.kernels.gpu_check.rows import Unavailable
from topkbench.kernels.steps import Layer

Call = Callable[[], Tensor]
# How torch says that a backend does not do these shapes, or is not there, on CUDA and on a CPU.
_NO_KERNEL = ("No available kernel", "No viable backend")


@dataclass(frozen=True)
class Baseline:
    """A dense decode step.

    Attributes:
        version: Returns the name of what runs and its version; raises ValueError, with the reason,
            where it is not there.
        make: Makes the call ``() -> [B, Hq, d]`` on a layer; what is planned once is planned here.
    """

    version: Callable[[], str]
    make: Callable[[Layer], Call]


def _states(layer: Layer) -> tuple[Tensor, Tensor, Tensor, float]:
    return layer.query.flatten(1, 2), layer.keys, layer.values, layer.keys.shape[-1] ** -0.5


def _sdpa(backend: SDPBackend) -> Baseline:
    def make(layer: Layer) -> Call:
        states = _states(layer)

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return full_attention(*states)

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                call()
            except RuntimeError as error:
                if not str(error).startswith(_NO_KERNEL):
                    raise
                # What each kernel lacks is told by warnings alone.
                why = [str(one.message).partition(" (Triggered")[0] for one in said]
                words = " ".join([str(error), *why])
                raise Unavailable(f"this torch has no such kernel here: {words}") from None
        return call

    def named() -> str:
        own = torch.backends.cudnn.version() if backend == SDPBackend.CUDNN_ATTENTION else None
        return f"torch {torch.__version__}" + (f", cudnn {own}" if own else "")

    return Baseline(named, make)


def _library(backend: Backend, module: str, distribution: str) -> Baseline:
    def make(layer: Layer) -> Call:
        states = _states(layer)
        return lambda: full_attention(*states, backend=backend)

    return Baseline(lambda: library_version(module, distribution), make)


def _flashinfer() -> Baseline:
    def make(layer: Layer) -> Call:
        return FlashInferBatch(*_states(layer))

    return Baseline(lambda: library_version("flashinfer", "flashinfer-python"), make)


def _triton(tile_bytes: int, warps: int, stages: int) -> Baseline:
    def make(layer: Layer) -> Call:
        from topkbench.kernels.full_attention import fused

        states, blocks = _states(layer), fused.Blocks(tile_bytes, warps, stages)
        return lambda: fused.full_attention(*states, None, None, None, blocks)

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
"""Every dense decode step, by its name; the block sizes of our own are fixed, three of them."""
