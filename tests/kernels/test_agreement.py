"""The three implementations agree: on random shapes they select the same units, and their errors
are within derived bounds.

On a CPU the numba and the Triton kernels are compared with the reference, Triton in its
interpreter, where a launch takes a tenth of a second: examples are few, and the same in every run.
On a GPU the compiled Triton kernels are. Each operator's own tests compare the reference with brute
force.
"""

import os
from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from topkbench.kernels.channel_score.api import channel_score
from topkbench.kernels.code_score.api import code_score
from topkbench.kernels.dispatch import Impl
from topkbench.kernels.hamming_score.api import hamming_score
from topkbench.kernels.hash_encode.api import encode_step, hash_encode
from topkbench.kernels.lowrank_score.api import lowrank_score
from topkbench.kernels.page_score.api import page_score
from topkbench.kernels.sparse_attention.api import sparse_attention
from topkbench.kernels.testing import (
    assert_attended,
    assert_same_bits,
    assert_within_bound,
    gamma,
)
from topkbench.kernels.topk_select.api import topk_select

# A failing example is not shrunk, which would take minutes in the interpreter.
PHASES = (Phase.explicit, Phase.generate)
few = settings(max_examples=10, derandomize=True, phases=PHASES)
many = settings(max_examples=20, derandomize=True, phases=PHASES)

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIZES = st.sampled_from([1, 2, 15, 33, 64, 101, 257, 300])
# Sizes of models, and others at which a kernel's tile or vector is not full.
DIMS = st.one_of(st.integers(1, 16).map(lambda part: 16 * part), st.sampled_from([1, 20, 37]))
RBITS = st.integers(1, 16).map(lambda words: 32 * words)


class Place(NamedTuple):
    """A device and the implementations that run on it besides the reference."""

    device: torch.device
    impls: tuple[Impl, ...]

    def reading(self, dtype: torch.dtype) -> tuple[Impl, ...]:
        """Return the implementations that read a cache of a dtype, the reference included."""
        narrow = dtype == torch.float16
        return ("reference", *(impl for impl in self.impls if not (narrow and impl == "cpu")))


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> Place:
    device = torch.device(request.param)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return Place(device, ("triton",))
    pytest.importorskip("triton")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return Place(device, ("cpu", "triton") if interpreted else ("cpu",))


class Case(NamedTuple):
    """The sizes common to all operators on cached keys, and the rows' valid ranges."""

    batch: int
    heads: int
    group: int
    size: int
    starts: list[int] | None
    ends: list[int] | None
    by_slots: bool

    def bounds(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Return ``kv_start`` and ``kv_len``."""
        start, end = (
            None if given is None else torch.tensor(given, dtype=torch.int32, device=device)
            for given in (self.starts, self.ends)
        )
        return start, end

    def outside(self) -> Tensor:
        """Return ``[B, 1, n]``, true where no kernel may read."""
        start, end = self.bounds(torch.device("cpu"))
        slots = torch.arange(self.size).expand(self.batch, 1, -1)
        outside = torch.zeros(slots.shape, dtype=torch.bool)
        if start is not None:
            outside = outside | (slots < start[:, None, None])
        if end is not None:
            outside = outside | (slots >= end[:, None, None])
        return outside

    def cached(self, states: Tensor, place: Place) -> Tensor:
        """Return ``[B, Hkv, n, d]`` states as a view of a larger cache, by heads or by slots."""
        shape = (self.batch, self.heads, self.size + 5, states.shape[-1])
        if states.is_floating_point():
            cache = torch.full(shape, torch.nan, dtype=states.dtype)
        else:
            cache = torch.zeros(shape, dtype=states.dtype)
        cache[:, :, : self.size] = states
        if self.by_slots:
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        return cache.to(place.device)[:, :, : self.size]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    # Rows and heads differ by their strides alone, which two of them show.
    batch, size = draw(st.integers(1, 2)), draw(SIZES)
    torch.manual_seed(draw(st.integers(0, 9999)))

    def bounds(numbers: st.SearchStrategy[int]) -> list[int] | None:
        if draw(st.integers(0, 3)) == 0:
            return None
        return draw(st.lists(numbers, min_size=batch, max_size=batch))

    return Case(
        batch=batch,
        heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 16)),
        size=size,
        # Rows may be empty, and may end beyond the cache.
        starts=bounds(st.integers(0, size // 2)),
        ends=bounds(st.integers(size // 4, size + 2)),
        by_slots=draw(st.booleans()),
    )


def random_codes(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def whole_numbers(*shape: int) -> Tensor:
    """Return small integers, whose products and sums are exact in any order of summation."""
    return torch.randint(-2, 3, shape).float()


@settings(few, max_examples=5)
@given(cases(), DIMS, RBITS, DTYPES, st.booleans())
def test_hash_codes_are_the_same_and_differ_from_float64_only_in_rounding(
    place: Place, case: Case, dim: int, rbit: int, dtype: torch.dtype, narrow: bool
) -> None:
    weight_dtype = dtype if narrow else torch.float32
    shape, weight_shape = (case.batch, case.heads, case.size, dim), (case.heads, dim, rbit)
    states = case.cached(whole_numbers(*shape).to(dtype), place)
    weight = whole_numbers(*weight_shape).to(weight_dtype).to(place.device)
    expected = hash_encode(states, weight, "reference")
    normal = case.cached(torch.randn(shape).to(dtype), place)
    normal_weight = torch.randn(weight_shape).to(weight_dtype).to(place.device)
    for impl in place.impls:
        codes = hash_encode(states, weight, impl)
        assert codes.dtype == expected.dtype
        assert torch.equal(codes, expected), impl
        assert_same_bits(hash_encode(normal, normal_weight, impl), normal, normal_weight)


@few
@given(cases(), DIMS, RBITS, DTYPES, st.booleans(), st.data())
def test_every_encode_step_writes_the_same_cache(
    place: Place,
    case: Case,
    dim: int,
    rbit: int,
    dtype: torch.dtype,
    use_norm: bool,
    data: st.DataObject,
) -> None:
    shape = (case.batch, case.heads)
    query = whole_numbers(*shape, case.group, dim).to(dtype).to(place.device)
    key = whole_numbers(*shape, 3, dim).to(dtype).to(place.device)[:, :, 1:2]  # of a cache
    weight = whole_numbers(case.heads, dim, rbit).to(place.device)
    codes = case.cached(random_codes(*shape, case.size, rbit // 32), place)
    norms = torch.rand(*shape, case.size + 3, device=place.device)[:, :, : case.size]
    lengths = st.lists(st.integers(1, case.size), min_size=case.batch, max_size=case.batch)
    drawn = data.draw(st.none() | lengths)
    ends = torch.tensor(drawn or [case.size] * case.batch, dtype=torch.int32, device=place.device)
    kv_len = None if drawn is None else ends
    exact = norms.double()
    rows, slots = torch.arange(case.batch, device=place.device), ends.long() - 1
    if use_norm:
        exact[rows, :, slots] = key[:, :, 0].double().norm(dim=-1)

    def step(impl: Impl) -> tuple[Tensor, Tensor, Tensor]:
        written, given_norms = codes.clone(), norms.clone()
        return (
            encode_step(
                query, key, weight, written, kv_len, given_norms if use_norm else None, impl
            ),
            written,
            given_norms,
        )

    expected, expected_codes, _ = step("reference")
    for impl in ("reference", *place.impls):
        query_codes, key_codes, key_norms = step(impl)
        assert torch.equal(query_codes, expected), impl
        assert torch.equal(key_codes, expected_codes), impl
        assert_within_bound(key_norms, exact, gamma(dim) * exact)


@few
@given(cases(), st.integers(1, 16), st.booleans())
def test_hamming_scores_are_the_same_to_the_bit(
    place: Place, case: Case, words: int, use_norm: bool
) -> None:
    shape = (case.batch, case.heads)
    query_codes = random_codes(*shape, case.group, words).to(place.device)
    key_codes = case.cached(random_codes(*shape, case.size, words), place)
    # A query's own code, and its opposite, reach the ends of the range.
    key_codes[:, :, 0] = query_codes[:, :, 0]
    key_codes[:, :, -1] = ~query_codes[:, :, 0]
    norms = None
    if use_norm:
        norms = torch.rand(*shape, case.size + 3, device=place.device)[:, :, : case.size]
        norms[torch.rand(norms.shape) < 0.1] = 0.0
    given_codes = (query_codes, key_codes, norms, *case.bounds(place.device))
    expected = hamming_score(*given_codes, impl="reference")
    for impl in place.impls:
        scores = hamming_score(*given_codes, impl=impl)
        assert scores.dtype == expected.dtype
        assert torch.equal(scores, expected), impl


@few
@given(cases(), DIMS, DTYPES, st.booleans())
def test_errors_of_page_scores_are_within_their_bound(
    place: Place, case: Case, dim: int, dtype: torch.dtype, summed: bool
) -> None:
    query = torch.randn(case.batch, case.heads, case.group, dim).to(dtype).to(place.device)
    pages = torch.randn(2, case.batch, case.heads, case.size, dim).to(dtype)
    pages.masked_fill_(case.outside()[..., None], torch.nan)
    low, high = (case.cached(extreme, place) for extreme in (pages.amin(0), pages.amax(0)))
    bounds = case.bounds(place.device)
    wide = (query.double(), low.double(), high.double())
    exact = page_score(*wide, *bounds, "reference", sum_group=summed)
    largest = torch.maximum(low.abs(), high.abs()).double()
    terms = page_score(
        query.double().abs(), largest, largest, *bounds, "reference", sum_group=summed
    )
    added = case.group if summed else 0  # numbers that are added up, beside the products
    for impl in place.reading(dtype):
        scores = page_score(query, low, high, *bounds, impl, sum_group=summed)
        assert scores.dtype == torch.float32
        assert_within_bound(scores, exact, gamma(dim + added) * terms)


@few
@given(cases(), DIMS, DTYPES, st.booleans())
def test_errors_of_lowrank_scores_are_within_their_bound(
    place: Place, case: Case, rank: int, dtype: torch.dtype, mixed: bool
) -> None:
    query = torch.randn(case.batch, case.heads, case.group, rank).to(place.device)
    query = query if mixed else query.to(dtype)
    keys = torch.randn(case.batch, case.heads, case.size, rank).to(dtype)
    keys = case.cached(keys.masked_fill(case.outside()[..., None], torch.nan), place)
    bounds = case.bounds(place.device)
    wide = (query.double(), keys.double())
    exact = lowrank_score(*wide, *bounds, "reference")
    terms = lowrank_score(*(states.abs() for states in wide), *bounds, "reference")
    for impl in place.reading(dtype):
        scores = lowrank_score(query, keys, *bounds, impl)
        assert scores.dtype == torch.float32
        assert_within_bound(scores, exact, gamma(rank) * terms)


@few
@given(cases(), DIMS, DTYPES, st.booleans(), st.booleans())
def test_errors_of_channel_scores_are_within_their_bound(
    place: Place, case: Case, rank: int, dtype: torch.dtype, mixed: bool, short: bool
) -> None:
    shape = (case.batch, case.heads)
    query = torch.randn(*shape, case.group, rank).to(place.device)
    query = query if mixed else query.to(dtype)
    # As many channels again that no kernel may read, and slots beyond the last.
    channel_keys = torch.full((*shape, 2 * rank, case.size + 5), torch.nan)
    channels = torch.rand(*shape, 2 * rank).topk(rank, dim=-1).indices
    keys = torch.randn(*shape, rank, case.size)
    keys.masked_fill_(case.outside()[:, :, None], torch.nan)
    rows = channels[..., None].expand(-1, -1, -1, case.size)
    channel_keys[..., : case.size].scatter_(2, rows, keys)
    channel_keys = channel_keys.to(dtype).to(place.device)[..., : case.size]
    channels = (channels.int() if short else channels).to(place.device)
    bounds = case.bounds(place.device)
    wide = (query.double(), channel_keys.double())
    exact = channel_score(*wide, channels, *bounds, "reference")
    terms = channel_score(*(states.abs() for states in wide), channels, *bounds, "reference")
    for impl in place.reading(dtype):
        scores = channel_score(query, channel_keys, channels, *bounds, impl)
        assert scores.dtype == torch.float32
        assert_within_bound(scores, exact, gamma(rank) * terms)


@few
@given(cases(), st.integers(1, 9), st.sampled_from([1, 3, 64, 256]))
def test_code_scores_are_the_same_to_the_bit(
    place: Place, case: Case, parts: int, count: int
) -> None:
    shape = (case.batch, case.heads)
    tables = torch.randn(*shape, parts, case.group, count).to(place.device)
    codes = torch.randint(0, count, (*shape, case.size, parts)).to(torch.uint8)
    codes.masked_fill_(case.outside()[..., None], 255)
    given_codes = (tables, case.cached(codes, place), *case.bounds(place.device))
    expected = code_score(*given_codes, impl="reference")
    for impl in place.impls:
        scores = code_score(*given_codes, impl=impl)
        assert scores.dtype == torch.float32
        assert torch.equal(scores, expected), impl


KINDS = (
    "equal", "ties", "all integers", "floats", "float ties", "zeros", "absent", "all absent",
    "bfloat16", "float16",
)  # fmt: skip


def random_scores(kind: str, *shape: int) -> Tensor:
    # Integers, as Hamming scores are in every dtype.
    whole = hamming_score(random_codes(1, 1, 1, 1), random_codes(1, 1, 1, 1)).dtype
    limits = torch.iinfo(whole)
    if kind == "equal":
        return torch.full(shape, 7, dtype=whole)
    if kind == "ties":
        return torch.randint(-2, 3, shape).to(whole)
    if kind == "all integers":  # the least one means absent
        scores = torch.randint(limits.min, limits.max + 1, shape).to(whole)
        scores[torch.rand(shape) < 0.2] = limits.min
        return scores
    scores = torch.randn(shape)
    if kind == "float ties":
        return scores.round()
    if kind == "zeros":  # negative zero equals zero
        return scores.sign() * 0.0
    if kind == "absent":
        scores[torch.rand(shape) < 0.7] = -torch.inf
        scores[torch.rand(shape) < 0.1] = torch.inf
    if kind == "all absent":
        scores[:] = -torch.inf
    return scores.to(getattr(torch, kind)) if kind in ("bfloat16", "float16") else scores


@many
@given(cases(), st.sampled_from(KINDS), st.sampled_from([0, 2000, 4097]), st.data())
def test_selections_are_the_same_including_ties(
    place: Place, case: Case, kind: str, more: int, data: st.DataObject
) -> None:
    size = case.size + more  # more than one tile of units
    k = data.draw(st.one_of(st.integers(1, 20), st.integers(1, size), st.just(size + 3)))
    sink = data.draw(st.integers(0, min(4, k)))
    recent = data.draw(st.integers(0, min(9, k - sink)))
    whole = random_scores(kind, case.batch, case.heads + 1, size + 3).to(place.device)
    scores = whole[:, 1:, :size]
    rest = (k, sink, recent, *case.bounds(place.device))
    expected = topk_select(scores, *rest, impl="reference")
    for impl in place.impls:
        assert torch.equal(topk_select(scores, *rest, impl=impl), expected), impl


@settings(many, max_examples=35)
@given(
    cases(),
    DIMS,
    DTYPES,
    st.sampled_from([1, 3, 16]),
    st.sampled_from([300, 40, 9, 1]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 5.0]),
    st.booleans(),
    st.sampled_from([None, None, 20, 64, 128]),
)
def test_errors_of_sparse_attention_are_within_their_bound(
    place: Place,
    case: Case,
    dim: int,
    dtype: torch.dtype,
    unit: int,
    tokens: int,
    shared: bool,
    counted: bool,
    weighted: bool,
    softcap: float | None,
    sunk: bool,
    width: int | None,
) -> None:
    num_heads, entries = case.heads * case.group, tokens // unit + 1
    index_heads = case.heads if shared else num_heads
    query = torch.randn(case.batch, num_heads, dim).to(dtype).to(place.device)
    width = dim if width is None else width
    states = [torch.randn(case.batch, case.heads, case.size, one) for one in (dim, width)]
    # Large enough to show up if it is read; the reference multiplies it by zero.
    states = [part.masked_fill(case.outside()[..., None], 1e4) for part in states]
    keys, values = (case.cached(part.to(dtype), place) for part in states)
    sinks = 3 * torch.randn(num_heads, device=place.device) if sunk else None
    indices = torch.randint(-1, case.size // unit + 1, (case.batch, index_heads, entries)).int()
    count = torch.randint(0, entries + 1, (case.batch, index_heads)).int() if counted else None
    weight = None
    if weighted:
        weight = torch.randn(case.batch, num_heads, entries)
        weight[torch.rand(weight.shape) < 0.1] = -torch.inf
    indices, count, weight = (
        None if tensor is None else tensor.to(place.device) for tensor in (indices, count, weight)
    )
    bounds = case.bounds(place.device)
    selection = (indices, dim**-0.5, count, weight, unit, *bounds, softcap, sinks)
    for impl in place.reading(dtype):
        out, lse = sparse_attention(query, keys, values, *selection, impl)
        assert out.dtype == dtype
        assert lse.dtype == torch.float32
        assert_attended(out, lse, query, keys, values, *selection)
