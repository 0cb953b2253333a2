"""The device that a plan is for: the one at hand, or a card that is known by published figures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ThisDevice:
    """The device of the run, on which a plan measures a few steps."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """An accelerator's published figures.

    Attributes:
        name: Its name.
        bf16_tflops: Dense bfloat16 operations per second, in 1e12.
        bandwidth_gb_s: Bandwidth of its memory, in 1e9 bytes per second.
        memory_gb: Its memory, in 1e9 bytes.
    """

    name: str
    bf16_tflops: float
    bandwidth_gb_s: float
    memory_gb: float

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("name must not be empty.")
        for figure in ("bf16_tflops", "bandwidth_gb_s", "memory_gb"):
            if getattr(self, figure) <= 0:
                raise ValueError(f"{figure} must be above 0, got {getattr(self, figure)}.")

    def seconds(self, operations: float, num_bytes: float) -> float:
        """Return the seconds that some work takes at least: the roofline of both figures.

        Args:
            operations: Floating-point operations.
            num_bytes: Bytes read from its memory.
        """
        return max(operations / (self.bf16_tflops * 1e12), num_bytes / (self.bandwidth_gb_s * 1e9))
