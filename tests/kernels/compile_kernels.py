"""Compile every Triton kernel for a Hopper GPU, as it is launched, on a machine that has none.

Run as a program, since the interpreter of the other tests must be off. Triton's compiler needs no
GPU: only its driver is replaced, and every launch by its compilation. Prints the kernels' names.
"""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from topkbench.kernels.channel_score import fused as channel
from topkbench.kernels.code_score import fused as code
from topkbench.kernels.full_attention import fused as full
from topkbench.kernels.group_softmax import fused as softmax
from topkbench.kernels.hamming_score import fused as hamming
from topkbench.kernels.hash_encode import fused as encode
from topkbench.kernels.lowrank_score import fused as lowrank
from topkbench.kernels.page_score import fused as page
from topkbench.kernels.sparse_attention import fused as attention
from topkbench.kernels.topk_select import fused as topk


class Hopper:
    """What the compiler asks of a driver."""

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launch_all(size: int) -> None:
    """Launch each operator over so many slots with the options that change what is compiled."""
    bound = torch.zeros(1, dtype=torch.int32)
    codes, norms = torch.zeros(1, 2, size, 4, dtype=torch.int32), torch.zeros(1, 2, size)
    for words in (3, 4):
        for given in (None, norms):
            hamming.hamming_score(codes[:, :, :4, :words], codes[..., :words], given, bound, bound)
    tables, bytes_of_keys = torch.zeros(1, 2, 2, 4, 64), torch.zeros(1, 2, size, 2).byte()
    code.code_score(tables, bytes_of_keys, bound, bound)
    for scores in (norms, norms.bfloat16(), norms.int()):
        topk.topk_select(scores, 8, 1, 1, bound, bound)
    for rule in ("sum", "max"):
        for cap in (None, 30.0):
            softmax.group_softmax(norms[:, :, None].expand(-1, -1, 4, -1), 0.1, rule, cap)
    for dtype, dim in ((torch.bfloat16, 128), (torch.float16, 80), (torch.float32, 256)):
        weight, entries = torch.zeros(2, dim, 128), size // 8
        query, cache = torch.zeros(1, 8, dim).to(dtype), torch.zeros(1, 2, size, dim).to(dtype)
        grouped, indices = query.unflatten(1, (2, 4)), torch.zeros(1, 2, entries).int()
        rest = (torch.zeros(1, 2).int(), torch.zeros(1, 8, entries), 16, bound, bound, 30.0)
        attention.sparse_attention(query, cache, cache, indices, 1.0, *rest)
        rest = (None, None, 1, None, bound, None)
        attention.sparse_attention(query, cache, cache, indices, 1.0, *rest)
        for bounds in ((bound, bound, 30.0), (None, None, None)):
            full.full_attention(query, cache, cache, 1.0, *bounds)
        page.page_score(grouped, cache, cache, bound, bound)
        lowrank.lowrank_score(grouped[..., :32], cache[..., :32], bound, bound)
        chosen = torch.zeros(1, 2, 32, dtype=torch.int64)
        turned = cache.mT.contiguous()
        channel.channel_score(grouped[..., :32], turned, chosen, bound, bound)
        channel.channel_score(grouped[..., :32].float(), turned, chosen, bound, bound)
        encode.hash_encode(cache, weight.to(dtype))
        encode.encode_step(grouped, cache[:, :, :1], weight, codes, norms, bound)


def main() -> None:
    """Compile what a cache of 77 slots launches, then see that longer ones launch the same."""
    compiled: dict[str, set[str]] = {}
    launch = JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found = launch(kernel, *arguments, grid=grid, warmup=True, **options)
        name = f"{kernel.__module__.split('.')[-2]}.{kernel.__name__}"
        compiled.setdefault(name, set()).add(found.hash)

    driver.set_active(Hopper())
    JITFunction.run = compile_only
    launch_all(77)
    counts = {name: len(hashes) for name, hashes in compiled.items()}
    for size in (96, 1000):  # a multiple of 16 and none
        launch_all(size)
        for name, hashes in compiled.items():
            assert len(hashes) == counts[name], f"{name} compiles anew at {size} slots."
    print(*sorted(compiled))


if __name__ == "__main__":
    main()
