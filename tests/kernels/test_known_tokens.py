"""Rows over one cache: many queries of one prompt read its keys without a copy of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from topkbench.kernels.channel_score.api import channel_score
from topkbench.kernels.code_score.api import code_score
from topkbench.kernels.dispatch import Impl
from topkbench.kernels.hamming_score.api import hamming_score
from topkbench.kernels.lowrank_score.api import lowrank_score
from topkbench.kernels.page_score.api import page_score
from topkbench.kernels.sparse_attention.api import sparse_attention

HEADS, GROUP, DIM = 2, 2, 32
Operator = Callable[[Tensor, Tensor, Tensor, Impl], Tensor]
"""Given queries ``[rows, HEADS, GROUP, DIM]``, what is cached and each row's end."""


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


def codes(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(shape[-1])
    return torch.randint(-(2**31), 2**31 - 1, shape, generator=generator).to(torch.int32)


def attend(queries: Tensor, cached: Tensor, ends: Tensor, impl: Impl) -> Tensor:
    slots = torch.arange(4, dtype=torch.int32) * (cached.shape[2] // 8)
    indices = slots.expand(len(queries), HEADS, -1).contiguous()
    flat = queries.flatten(1, 2)
    return sparse_attention(flat, cached, cached, indices, 0.2, kv_len=ends, impl=impl)[0]


OPERATORS: dict[str, tuple[Callable[[int], Tensor], Operator]] = {
    "lowrank_score": (
        lambda n: drawn(1, HEADS, n, DIM),
        lambda q, cached, ends, impl: lowrank_score(q, cached, None, ends, impl=impl),
    ),
    "channel_score": (
        lambda n: drawn(1, HEADS, DIM, n),
        lambda q, cached, ends, impl: channel_score(
            q[..., :8],
            cached,
            torch.arange(8).expand(len(q), HEADS, -1),
            None,
            ends,
            impl=impl,
        ),
    ),
    "hamming_score": (
        lambda n: codes(1, HEADS, n, 8),
        lambda q, cached, ends, impl: hamming_score(
            q.view(torch.int32)[..., :8], cached, None, None, ends, impl=impl
        ),
    ),
    "code_score": (
        lambda n: codes(1, HEADS, n, 16).to(torch.uint8) % 4,
        lambda q, cached, ends, impl: code_score(
            q.unflatten(3, (16, 2)).permute(0, 1, 3, 2, 4).repeat(1, 1, 1, 1, 2),
            cached,
            None,
            ends,
            impl=impl,
        ),
    ),
    "page_score": (
        lambda n: drawn(1, HEADS, n, DIM),
        lambda q, cached, ends, impl: page_score(q, cached, cached, None, ends, impl=impl),
    ),
    "sparse_attention": (lambda n: drawn(1, HEADS, n, DIM), attend),
}


@pytest.mark.parametrize("name", sorted(OPERATORS))
@pytest.mark.parametrize(
    ("impl", "rows", "n"), [("cpu", 32, 4096), ("reference", 5, 70), ("triton", 5, 70)]
)
def test_rows_over_one_cache_equal_single_rows(name: str, impl: Impl, rows: int, n: int) -> None:
    make, run = OPERATORS[name]
    cached, queries = make(n), drawn(rows, HEADS, GROUP, DIM)
    ends = torch.arange(n - rows, n, dtype=torch.int32)
    shared = cached.expand(rows, -1, -1, -1)
    together = run(queries, shared, ends, impl)
    for row in range(rows):
        alone = run(queries[[row]], cached, ends[[row]], impl)
        # Torch multiplies matrices of other sizes in another order.
        tolerance = {"atol": 1e-4, "rtol": 1e-5} if impl == "reference" else {"atol": 0, "rtol": 0}
        torch.testing.assert_close(together[[row]], alone, **tolerance)


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_rows_over_one_cache_do_not_copy_it(name: str) -> None:
    make, run = OPERATORS[name]
    rows, n = 16, 4096
    cached, queries = make(n), drawn(rows, HEADS, GROUP, DIM)
    ends = torch.arange(n - rows, n, dtype=torch.int32)
    shared = cached.expand(rows, -1, -1, -1)
    run(queries, shared, ends, "cpu")  # compiles
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        found = run(queries, shared, ends, "cpu")
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profiled.events())
    assert allocated < 2 * found.nbytes + 8 * queries.nbytes + cached.nbytes / 4
