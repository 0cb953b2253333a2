"""What is noted of the machine a cell ran on."""

import torch

from topkbench.tasks.cell import peak_memory_mib, reset_peak_memory

CPU = torch.device("cpu")


def test_the_peak_is_of_what_ran_since_it_was_reset() -> None:
    reset_peak_memory(CPU)
    before = peak_memory_mib(CPU)
    large = torch.ones(128, 2**18)  # 128 MiB
    during = peak_memory_mib(CPU)
    assert during >= before + 120
    assert large.sum() == large.numel()
    del large
    reset_peak_memory(CPU)
    assert peak_memory_mib(CPU) < during - 100
