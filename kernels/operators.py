"""All operators on one layer's states: what each reads, its call, and its check.

What `topkbench.harness.bench` and `topkbench.harness.gpu_check` check and time. The inputs of an
operator come from the references, so that a wrong operator spoils no other's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from topkbench.kernels.channel_score.api import channel_score
from topkbench.kernels.code_score.api import code_score
from topkbench.kernels.dispatch import Impl
from topkbench.kernels.full_attention.api import Backend, full_attention, resolve_backend
from topkbench.kernels.group_softmax.api import group_softmax
from topkbench.kernels.hamming_score.api import hamming_score
from topkbench.kernels.hash_encode.api import encode_step, hash_encode
from topkbench.kernels.lowrank_score.api import lowrank_score
from topkbench.kernels.page_score.api import page_score
from topkbench.kernels.sparse_attention.api import sparse_attention
from topkbench.kernels.testing import (
    assert_attended,
    assert_near,
    assert_same_bits,
    assert_within_bound,
    full_attention_bound,
    gamma,
    require,
)
from topkbench.kernels.topk_select.api import topk_select

_PAGE = 16
_RANK = 32
_PARTS, _CENTROIDS = 2, 64  # of a product-quantised key
_SINK, _RECENT = 4, 8


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The shapes of one decode step."""

    batch_size: int
    num_kv_heads: int
    group: int
    head_dim: int
    rbit: int
    kv_len: int
    k: int


class Bounds(TypedDict):
    """Where each row's units begin and end, ``[B]`` int32, or None for all of them."""

    kv_start: Tensor | None
    kv_len: Tensor | None


_WHOLE = Bounds(kv_start=None, kv_len=None)


class Operators:
    """One layer's random states, codes and pages, and the operators that work on them.

    Args:
        shape: The shapes.
        device: Where everything lies.
        dtype: Of queries, keys and values.
        impl: Which implementation runs.
        bounded: Rows begin and end somewhere inside the cache, each elsewhere.
        planted: A few keys, the first and the last among them, outweigh all others: one of them
            that is left out shows in the output, and others that are left out do not.
    """

    def __init__(
        self,
        shape: Geometry,
        device: torch.device,
        dtype: torch.dtype,
        impl: Impl,
        bounded: bool = False,
        planted: bool = False,
    ) -> None:
        self.shape, self.impl = shape, impl
        draw = torch.Generator(device).manual_seed(0)
        heads = (shape.batch_size, shape.num_kv_heads)

        def normal(*sizes: int) -> Tensor:
            # Head by head: nothing of the size of the cache is needed beside it.
            states = torch.empty(*sizes, device=device, dtype=dtype)
            for head in states.flatten(0, -3) if len(sizes) > 3 else states:
                head.normal_(generator=draw)
            return states

        self.scale = shape.head_dim**-0.5
        self.query = normal(*heads, shape.group, shape.head_dim)
        self.keys = normal(*heads, shape.kv_len, shape.head_dim)
        self.values = normal(*heads, shape.kv_len, shape.head_dim)
        self.bounds = self._bounds(shape.kv_len) if bounded else _WHOLE
        if planted:
            self._plant()
        _, self.ends = self._ends()
        rows = torch.arange(shape.batch_size, device=device)
        self.newest = self.keys[rows, :, self.ends.long() - 1][:, :, None]
        self.hash_weight = normal(shape.num_kv_heads, shape.head_dim, shape.rbit).float()
        self.key_codes = self._by_rows(lambda row: hash_encode(row, self.hash_weight, "reference"))
        self.query_codes = hash_encode(self.query, self.hash_weight, "reference")
        self.norms = torch.linalg.vector_norm(self.keys, dim=-1, dtype=torch.float32)
        self.scores = self.hamming("reference")
        self.indices = topk_select(self.scores, shape.k, 0, 0, **self.bounds, impl="reference")
        whole = self.keys[:, :, : shape.kv_len // _PAGE * _PAGE].unflatten(2, (-1, _PAGE))
        self.page_min, self.page_max = whole.amin(3), whole.amax(3)
        pages = self.page_min.shape[2]
        self.page_bounds = self._bounds(pages) if bounded else _WHOLE
        # As a reduced cache holds them: a tensor of its own, not a view of all channels.
        self.reduced = self.keys[..., :_RANK].contiguous()
        self.products = self.lowrank("reference")
        self.channel_keys = self.keys.mT.contiguous()
        drawn = torch.rand(*heads, shape.head_dim, generator=draw, device=device)
        self.channels = drawn.topk(_RANK, dim=-1).indices
        self.tables = normal(*heads, _PARTS, shape.group, _CENTROIDS).float()
        named = (*heads, shape.kv_len, _PARTS)
        self.byte_codes = torch.randint(
            _CENTROIDS, named, generator=draw, device=device, dtype=torch.uint8
        )
        # Of a model with learned sinks, and values that are narrower than keys.
        num_heads = shape.num_kv_heads * shape.group
        self.sinks = torch.randn(num_heads, generator=draw, device=device)
        self.narrow_values = self.values[..., : -(-2 * shape.head_dim // 3)]

    def _bounds(self, size: int) -> Bounds:
        """Cut some units off both ends of each row, as many as of no other row."""
        rows = 1 + torch.arange(self.shape.batch_size, device=self.query.device)
        start, end = (rows * size // 7).int(), (size - rows * size // 9).int()
        return Bounds(kv_start=start, kv_len=end)

    def _ends(self) -> tuple[Tensor, Tensor]:
        """Return the first slot of each row and the end of its slots, ``[B]``."""
        start, end = self.bounds["kv_start"], self.bounds["kv_len"]
        if start is None or end is None:
            start = torch.zeros_like(self.query[:, 0, 0, 0], dtype=torch.int32)
            end = start + self.shape.kv_len
        return start, end

    def _plant(self) -> None:
        """Make each of nine keys of a row weigh more than all that are not planted together."""
        for row, (start, end) in enumerate(zip(*(e.tolist() for e in self._ends()), strict=True)):
            places = torch.linspace(start, end - 1, 9).long().tolist()
            mean = self.query[row].float().mean(1)
            logits = (self.query[row].float() @ mean[..., None]).mean(1) * self.scale
            wanted = torch.log(torch.tensor(float(end - start))) + 1
            self.keys[row][:, places] = (mean * wanted / logits)[:, None].to(self.keys.dtype)

    def _by_rows(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a reference to one batch row after the other: it widens what it reads."""
        return torch.cat([function(row[None]) for row in self.keys])

    def bytes_needed(self) -> dict[str, int]:
        """Return the bytes that each operator cannot do without: what it reads and what it returns.

        Where scores are read more than once, or indices and queries are small, only one reading of
        the large inputs counts.
        """
        chosen = self.indices.numel() * self.shape.head_dim * self.keys.element_size()
        pages = self.page_min.shape[:3].numel() * self.shape.group * 4
        return {
            "hash_encode": self.hash_weight.nbytes,
            "hamming_score": self.key_codes.nbytes + self.scores.nbytes,
            "page_score": self.page_min.nbytes + self.page_max.nbytes + pages,
            "lowrank_score": self.reduced.nbytes + self.products.nbytes,
            "channel_score": self.reduced.nbytes + self.products.nbytes,
            "code_score": self.byte_codes.nbytes + self.products.nbytes,
            "group_softmax": self.products.nbytes + self.products[:, :, 0].nbytes,
            "topk_select": self.scores.nbytes + self.indices.nbytes,
            "sparse_attention": 2 * chosen,
            "full_attention": self.keys.nbytes + self.values.nbytes,
        }

    def calls(self) -> dict[str, Callable[[], Tensor]]:
        """Return what runs each operator once; full attention by the backend that ``auto`` is."""
        return {
            "hash_encode": self.encode,
            "hamming_score": self.hamming,
            "page_score": self.pages,
            "lowrank_score": self.lowrank,
            "channel_score": self.channelled,
            "code_score": self.looked_up,
            "group_softmax": self.softmaxed,
            "topk_select": self.select,
            "sparse_attention": self.attend,
            "full_attention": self.full,
        }

    def encode(self, impl: Impl | None = None) -> Tensor:
        """Encode the queries."""
        return hash_encode(self.query, self.hash_weight, impl=impl or self.impl)

    def hamming(self, impl: Impl | None = None) -> Tensor:
        """Score all keys by their codes."""
        codes = (self.query_codes, self.key_codes)
        return hamming_score(*codes, **self.bounds, impl=impl or self.impl)

    def pages(self, impl: Impl | None = None) -> Tensor:
        """Score all pages."""
        extremes = (self.page_min, self.page_max)
        return page_score(self.query, *extremes, **self.page_bounds, impl=impl or self.impl)

    def lowrank(self, impl: Impl | None = None) -> Tensor:
        """Score all keys by a few channels."""
        query = self.query[..., :_RANK]
        return lowrank_score(query, self.reduced, **self.bounds, impl=impl or self.impl)

    def channelled(self, impl: Impl | None = None) -> Tensor:
        """Score all keys by a few channels that lie anywhere."""
        states = (self.query[..., :_RANK], self.channel_keys, self.channels)
        return channel_score(*states, **self.bounds, impl=impl or self.impl)

    def looked_up(self, impl: Impl | None = None) -> Tensor:
        """Score all keys by product-quantised codes."""
        return code_score(self.tables, self.byte_codes, **self.bounds, impl=impl or self.impl)

    def softmaxed(self, impl: Impl | None = None) -> Tensor:
        """Add up the softmax of a group's queries."""
        return group_softmax(self.products, self.scale, impl=impl or self.impl)

    def select(self, impl: Impl | None = None) -> Tensor:
        """Select k keys of each head."""
        return topk_select(self.scores, self.shape.k, **self.bounds, impl=impl or self.impl)

    def attend(self, impl: Impl | None = None) -> Tensor:
        """Attend to the selected keys."""
        states = (self.query.flatten(1, 2), self.keys, self.values, self.indices, self.scale)
        return sparse_attention(*states, **self.bounds, impl=impl or self.impl)[0]

    def full(self) -> Tensor:
        """Attend to all keys."""
        given = (self.query.flatten(1, 2), self.keys, self.values, self.scale)
        return full_attention(*given, **self.bounds, backend="auto")

    def decode(self) -> Tensor:
        """Run HATA's decode step: encode the queries and the newest key, score, select, attend."""
        states = (self.query, self.newest, self.hash_weight)
        codes = encode_step(*states, self.key_codes, self.ends, impl=self.impl)
        scores = hamming_score(codes, self.key_codes, **self.bounds, impl=self.impl)
        indices = topk_select(scores, self.shape.k, **self.bounds, impl=self.impl)
        attended = (self.query.flatten(1, 2), self.keys, self.values, indices, self.scale)
        return sparse_attention(*attended, **self.bounds, impl=self.impl)[0]

    def checks(self) -> dict[str, Callable[[], None]]:
        """Return what checks each operator: it raises WrongResult if a result is wrong.

        Full attention is our own kernel, where that is what runs.
        """
        found = {
            "hash_encode": self._check_encode,
            "hamming_score": self._check_hamming,
            "page_score": self._check_pages,
            "lowrank_score": self._check_lowrank,
            "channel_score": self._check_channels,
            "code_score": self._check_codes,
            "group_softmax": self._check_softmax,
            "topk_select": self._check_selection,
            "sparse_attention": self._check_attention,
        }
        if self.own_backend != "sdpa":
            found["full_attention"] = self._check_full
        return found

    @property
    def own_backend(self) -> Backend:
        """The backend of full attention that is checked: our own kernel, where there is one."""
        if self.impl == "triton":
            return "triton"
        return resolve_backend("auto", self.keys.device, self.keys.dtype)

    def check(self) -> None:
        """Check every operator against its reference, and the decode step.

        Raises:
            WrongResult: If a result is wrong; no time of it means anything then.
        """
        for checked in self.checks().values():
            checked()
        states = (self.query.flatten(1, 2), self.keys, self.values, self.indices, self.scale)
        assert_attended(self.decode(), None, *states, **self.bounds)

    def _row(self, row: int, bounds: Bounds) -> Bounds:
        start, end = bounds["kv_start"], bounds["kv_len"]
        if start is None or end is None:
            return bounds
        return Bounds(kv_start=start[row : row + 1], kv_len=end[row : row + 1])

    def _check_encode(self) -> None:
        assert_same_bits(self.encode(), self.query, self.hash_weight)
        for row in self.keys:  # one at a time: the check widens what it reads
            codes = hash_encode(row[None], self.hash_weight, impl=self.impl)
            assert_same_bits(codes, row[None], self.hash_weight)
        newest, ends = self.newest, self.ends
        rows, slots = torch.arange(len(ends), device=ends.device), ends.long() - 1
        written = torch.zeros_like(self.key_codes), torch.zeros_like(self.norms)
        given = (self.query, newest, self.hash_weight, written[0], ends, written[1])
        assert_same_bits(encode_step(*given, impl=self.impl), self.query, self.hash_weight)
        assert_same_bits(written[0][rows, :, slots][:, :, None], newest, self.hash_weight)
        exact = newest[:, :, 0].double().norm(dim=-1)
        bound = gamma(self.shape.head_dim) * exact
        assert_within_bound(written[1][rows, :, slots], exact, bound)
        written[0][rows, :, slots], written[1][rows, :, slots] = 0, 0.0
        untouched = not bool(written[0].any()) and not bool(written[1].any())
        require(untouched, "hash_encode writes to slots that are not the newest key's.")

    def _check_hamming(self) -> None:
        codes = (self.query_codes, self.key_codes)
        for name, norms in (("integer", None), ("norms", self.norms)):
            expected = hamming_score(*codes, norms, **self.bounds, impl="reference")
            found = hamming_score(*codes, norms, **self.bounds, impl=self.impl)
            require(torch.equal(found, expected), f"hamming_score is wrong with {name} scores.")

    def _check_pages(self) -> None:
        found = self.pages()
        for row in range(self.shape.batch_size):
            query, low, high = (
                states[row, None].double() for states in (self.query, self.page_min, self.page_max)
            )
            bounds = self._row(row, self.page_bounds)
            exact = page_score(query, low, high, **bounds, impl="reference")
            extreme = torch.maximum(low.abs(), high.abs())
            terms = page_score(query.abs(), extreme, extreme, **bounds, impl="reference")
            assert_within_bound(found[row, None], exact, gamma(self.shape.head_dim) * terms)

    def _check_lowrank(self) -> None:
        every = lowrank_score(self.query, self.keys, **self.bounds, impl=self.impl)
        found = ((self.lowrank(), self.reduced, _RANK), (every, self.keys, self.shape.head_dim))
        for scores, keys, rank in found:
            for row in range(self.shape.batch_size):
                states = (self.query[row, None, ..., :rank].double(), keys[row, None].double())
                bounds = self._row(row, self.bounds)
                exact = lowrank_score(*states, **bounds, impl="reference")
                sizes = (states[0].abs(), states[1].abs())
                terms = lowrank_score(*sizes, **bounds, impl="reference")
                assert_within_bound(scores[row, None], exact, gamma(rank) * terms)

    def _check_channels(self) -> None:
        found = self.channelled()
        for row in range(self.shape.batch_size):
            states = (
                self.query[row, None, ..., :_RANK].double(),
                self.channel_keys[row, None].double(),
            )
            channels, bounds = self.channels[row, None], self._row(row, self.bounds)
            exact = channel_score(*states, channels, **bounds, impl="reference")
            sizes = (states[0].abs(), states[1].abs())
            terms = channel_score(*sizes, channels, **bounds, impl="reference")
            assert_within_bound(found[row, None], exact, gamma(_RANK) * terms)

    def _check_codes(self) -> None:
        found, expected = self.looked_up(), self.looked_up("reference")
        require(torch.equal(found, expected), "code_score is wrong.")

    def _check_softmax(self) -> None:
        # exp's argument errs by a few roundings of the logit, its sum by those of its terms.
        finite = self.products[self.products.isfinite()]
        largest = 1 + finite.abs().max().item() * self.scale
        tolerance = 16 * largest * torch.finfo(torch.float32).eps
        for sinks in (None, self.sinks):
            given = (self.products, self.scale)
            weights = group_softmax(*given, sinks=sinks, impl="reference")
            found = group_softmax(*given, sinks=sinks, impl=self.impl)
            assert_within_bound(found, weights, tolerance * weights.double())

    def _check_selection(self) -> None:
        expected = topk_select(self.scores, self.shape.k, **self.bounds, impl="reference")
        require(torch.equal(self.select(), expected), "topk_select is wrong with whole numbers.")
        weighed = self.products[:, :, 0]
        forced = (self.shape.k, min(_SINK, self.shape.k // 4), min(_RECENT, self.shape.k // 2))
        for name, scores in (("real numbers", weighed), ("many ties", weighed.round())):
            expected = topk_select(scores, *forced, **self.bounds, impl="reference")
            found = topk_select(scores, *forced, **self.bounds, impl=self.impl)
            require(torch.equal(found, expected), f"topk_select is wrong with {name}.")

    def _check_attention(self) -> None:
        query = self.query.flatten(1, 2)
        entries = torch.arange(max(1, self.shape.k // _PAGE), device=self.query.device)
        spread = entries * (self.shape.kv_len // _PAGE) // len(entries)
        pages = spread.int().expand(*self.keys.shape[:2], -1).contiguous()
        slots = self._with_planted()
        for values, unit, indices, sinks in (
            (self.values, 1, slots, None),
            (self.values, _PAGE, pages, None),
            (self.narrow_values, 1, slots, self.sinks),
        ):
            given = (query, self.keys, values, indices, self.scale)
            rest: Any = {"unit_size": unit, "sinks": sinks, **self.bounds}
            out, lse = sparse_attention(*given, **rest, impl=self.impl)
            assert_attended(out, lse, *given, **rest)
            assert_near(out, sparse_attention(*given, **rest, impl="reference")[0])

    def _with_planted(self) -> Tensor:
        """Return the chosen slots, the first and the last of each row's among them."""
        start, end = self._ends()
        indices = self.indices.clone()
        if self.shape.k >= 2:
            indices[..., 0], indices[..., 1] = start[:, None], end[:, None] - 1
        return indices

    def _check_full(self) -> None:
        for values, sinks in ((self.values, None), (self.narrow_values, self.sinks)):
            given = (self.query.flatten(1, 2), self.keys, values, self.scale)
            out = full_attention(*given, **self.bounds, sinks=sinks, backend=self.own_backend)
            exact, bound = full_attention_bound(*given, **self.bounds, sinks=sinks)
            assert_within_bound(out, exact, bound)
            assert_near(out, exact)
