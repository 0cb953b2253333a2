"""Compile the Triton kernels for a Hopper GPU, as they are launched, on a machine that has none.

``python tests/kernels/compile_kernels.py [--all]``: a program, since the interpreter of the other
tests must be off. Triton's compiler needs no GPU: only its driver is replaced, and every launch by
its compilation. What is launched is what the jobs of `topkbench.harness.gpu_check` launch: a part
of them, or with ``--all`` every one, and options of the operators that they do not use. Prints the
kernels' names.
"""

import gc
import sys
from dataclasses import replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from topkbench.harness import layer
from topkbench.harness.gpu_check import decode, worker
from topkbench.harness.gpu_check.dense import BASELINES
from topkbench.harness.gpu_check.plan import CHECKED, Job, Size, make_plan
from topkbench.harness.gpu_check.workplace import Workplace
from topkbench.kernels import dispatch, operators
from topkbench.kernels.full_attention import api as full_attention_api
from topkbench.kernels.full_attention import fused as full
from topkbench.kernels.group_softmax import fused as softmax
from topkbench.kernels.hamming_score import fused as hamming
from topkbench.kernels.sparse_attention import fused as attention
from topkbench.kernels.topk_select import fused as selection

MOST_SHARED_BYTES = 232448
"""Shared memory that a block can have on Hopper: 227 KiB."""
ATTENTION = ("sparse_attention", "full_attention")
IN_SHORT = {
    "check operators: bfloat16, head_dim 64, 2 x 8 heads": {*CHECKED} - {"topk_select"},
    "time of each operator: 32/8 heads of 128, 131,072 tokens, batch 1": {*CHECKED},
    "every dense baseline: 32/8 heads of 128, 131,072 tokens, batch 1": {*BASELINES},
    "check operators: float32, head_dim 128, 2 x 8 heads": ATTENTION,
}
"""Jobs and their parts that are compiled without ``--all``: every kernel with bounds and without
but selection, which is the same for all, attention with each tile, and in float32."""

DIFFERENT = ("hash_attention", "infinigen", "twilight")
"""Methods whose kernels depend on the cache: codes of one word are aligned as its capacity is, a
rank is learned from the keys, and a base with a wider budget is not asked in a short cache."""


class Hopper:
    """What the compiler asks of a driver."""

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Statuses(list[tuple[str, str]]):
    """A channel that keeps how each part ended."""

    def send(self, message: Any) -> None:
        if message[0] == "row":
            self.append((message[2]["status"], message[2].get("reason", "")))

    def recv(self) -> None:
        return None


def launch(job: Job, tokens: int) -> None:
    """Launch what a job launches, over so many tokens: their number is compiled into no kernel."""
    options, parts = dict(job.options), job.parts
    if job.kind == "check":
        bounded = sorted({one.bounded for one in options["sizes"]})
        options["sizes"] = [Size(tokens, 2, one, False) for one in bounded]
    else:
        options["length"] = tokens
    if job.kind == "dense":
        parts = tuple(part for part in parts if part.startswith("triton"))
    ended = Statuses()
    small = replace(job, options=options, parts=parts)
    worker.run(Workplace(torch.device("cpu"), True, 1), small, [], ended)
    assert {status for status, _ in ended} == {"ok"}, (job.name, ended)


def in_short(job: Job) -> Job:
    """Return the parts of a job that are compiled without ``--all``."""
    sizes = [size for size in job.options.get("sizes", []) if size.bounded]
    parts = tuple(part for part in job.parts if part in IN_SHORT[job.name])
    return replace(job, options={**job.options, **({"sizes": sizes} if sizes else {})}, parts=parts)


def launch_options() -> None:
    """Launch operators with options that no job uses: soft caps, weights, other dimensions."""
    bound = torch.zeros(1, dtype=torch.int32)
    codes, norms = torch.zeros(1, 2, 77, 4, dtype=torch.int32), torch.zeros(1, 2, 77)
    for given in (None, norms):
        hamming.hamming_score(codes[:, :, :4, :3], codes[..., :3], given, bound, bound)
    sinks = torch.zeros(8)
    for rule in ("sum", "max"):
        softmax.group_softmax(norms[:, :, None].expand(-1, -1, 4, -1), 0.1, rule, 30.0, sinks)
    for dtype, dim, width in (
        (torch.bfloat16, 128, 128),
        (torch.float16, 80, 80),
        (torch.float32, 256, 256),
        (torch.bfloat16, 192, 128),
    ):
        query, keys = torch.zeros(1, 8, dim).to(dtype), torch.zeros(1, 2, 77, dim).to(dtype)
        values, indices = keys[..., :width], torch.zeros(1, 2, 9).int()
        rest = (torch.zeros(1, 2).int(), torch.zeros(1, 8, 9), 16, bound, bound, 30.0, sinks)
        attention.sparse_attention(query, keys, values, indices, 1.0, *rest)
        full.full_attention(query, keys, values, 1.0, bound, bound, 30.0, sinks)


def main(everything: bool) -> None:
    """Compile what short caches launch, then see that longer ones launch the same."""
    compiled: dict[str, set[str]] = {}
    run = JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found = run(kernel, *arguments, grid=grid, warmup=True, **options)
        name = f"{kernel.__module__.split('.')[-2]}.{kernel.__name__}"
        compiled.setdefault(name, set()).add(found.hash)
        shared = found.metadata.shared
        assert shared <= MOST_SHARED_BYTES, f"{name} needs {shared} bytes of shared memory."

    gc.freeze()  # as the check's own processes do: garbage is collected after each part
    driver.set_active(Hopper())
    JITFunction.run = compile_only
    # Nothing is computed: every operator runs by Triton on a CPU's tensors, and none is compared.
    dispatch.choose = lambda op, impl, *where: "reference" if impl == "reference" else "triton"
    full_attention_api.interpreted = lambda: True
    for module in (operators, layer, decode):
        for name in ("require", "assert_attended", "assert_near", "assert_same",
                     "assert_same_bits", "assert_within_bound"):  # fmt: skip
            if hasattr(module, name):
                setattr(module, name, lambda *results, **named: None)
    # What a kernel would have written is zero, so that what follows it finds valid slots.
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
    select = selection.topk_select
    selection.topk_select = lambda *given: select(*given).clamp_min(0)

    jobs = make_plan(1, False, []).jobs
    for job in jobs if everything else [in_short(job) for job in jobs if job.name in IN_SHORT]:
        if job.options.get("method") in DIFFERENT:
            launch(job, 1000)
            continue
        launch(job, 77)
        counts = {name: len(hashes) for name, hashes in compiled.items()}
        for tokens in (96, 1000):  # a multiple of 16 and none
            launch(job, tokens)
            for name, hashes in compiled.items():
                assert len(hashes) == counts[name], f"{name} compiles anew at {tokens} tokens."
        print(job.name, sum(counts.values()), file=sys.stderr, flush=True)
    if everything:
        launch_options()
    print(*sorted(compiled))
    gc.unfreeze()


if __name__ == "__main__":
    main("--all" in sys.argv[1:])
