"""Fixtures for the tests of methods: every method, small random states, and an index over them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from topkbench.methods.base import (
    AnyMethod,
    CacheView,
    Geometry,
    Policy,
    PrefillInputs,
    StepContext,
)
from topkbench.methods.captured import column_sums

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "method").glob("*.yaml"))

TAIL = 16  # length of the query tail


@pytest.fixture(scope="session")
def methods(make_method: Callable[..., AnyMethod]) -> dict[str, AnyMethod]:
    """Every method of conf/method, made once."""
    return {name: make_method(name) for name in NAMES}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes ``name`` over every method of conf/method."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", NAMES)


@pytest.fixture
def states(geometry: Geometry) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    heads, head_dim = geometry.num_kv_heads, geometry.head_dim
    group = geometry.num_heads // heads

    def draw(batch_size: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries ``[B, Hkv, G, d]``, keys and values ``[B, Hkv, n, d]``."""
        generator = torch.Generator().manual_seed(seed)
        queries = torch.randn(batch_size, heads, group, head_dim, generator=generator)
        keys = torch.randn(batch_size, heads, n, head_dim, generator=generator)
        values = torch.randn(batch_size, heads, n, head_dim, generator=generator)
        return queries, keys, values

    return draw


@pytest.fixture
def build(geometry: Geometry) -> Callable[..., Any]:
    def build_index(
        method: AnyMethod,
        keys: Tensor,
        values: Tensor,
        kv_start: Tensor | None = None,
        kv_len: Tensor | None = None,
        capacity: int | None = None,
        captured: int | None = None,
    ) -> Any:
        """Build layer 1's index over the states.

        The prompt's queries are its keys, repeated for each query head of a group. Slots from
        ``captured`` on count as decoded: they are not part of what is captured.
        """
        slots = keys.shape[2] + 8 if capacity is None else capacity
        batch_size, _, n, _ = keys.shape
        starts = [0] * batch_size if kv_start is None else kv_start.tolist()
        ends = [n] * batch_size if kv_len is None else kv_len.tolist()
        tails, sums = [], []
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            end = end if captured is None else min(end, captured)
            row_keys = keys[row : row + 1, :, start:end]
            row_queries = row_keys.repeat_interleave(geometry.num_heads // geometry.num_kv_heads, 1)
            tail = row_queries[:, :, -TAIL:]
            tails.append(pad(tail, (0, 0, TAIL - tail.shape[2], 0), value=7.0))  # padding
            sums.append(
                pad(column_sums(row_queries, row_keys, geometry.head_dim**-0.5), (start, n - end))
            )
        return method.build_index(
            PrefillInputs(
                key_states=keys,
                value_states=values,
                capacity=slots,
                layer=1,
                num_layers=geometry.num_layers,
                kv_start=kv_start,
                kv_len=kv_len,
                query_tail=torch.cat(tails) if "query_tail" in method.traits.needs else None,
                column_sums=torch.cat(sums) if "column_sums" in method.traits.needs else None,
            )
        )

    return build_index


@pytest.fixture(scope="session")
def score() -> Callable[..., Tensor]:
    def raw_scores(method: Any, index: Any, queries: Tensor, keys: Tensor, **policy: Any) -> Tensor:
        """Return what ``score`` gives for encoded queries over the cached keys."""
        context = StepContext(queries, CacheView(keys, keys), Policy(k=12, **policy), 1.0)
        scores: Tensor = method.score(method.encode(index, context), index, context)
        return scores

    return raw_scores
