"""One decode step of each method, composed of the operators alone.

These are the steps of ``methods/`` without models, policies and padding, which
`topkbench.kernels.experiments` times. Sinks, recent tokens and aggregation over a group are those
of ``protocol=unified``.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from topkbench.kernels.dispatch import OPERATORS, Impl
from topkbench.kernels.full_attention.api import full_attention
from topkbench.kernels.group_softmax.api import group_softmax
from topkbench.kernels.hamming_score.api import hamming_score
from topkbench.kernels.hash_encode.api import encode_step, hash_encode
from topkbench.kernels.lowrank_score.api import lowrank_score
from topkbench.kernels.page_score.api import page_score
from topkbench.kernels.sparse_attention.api import sparse_attention
from topkbench.kernels.testing import WrongResult, assert_same, assert_same_bits, require
from topkbench.kernels.topk_select.api import topk_select

NUM_SINK, NUM_RECENT = 4, 8
PAGE_SIZE = 16
BUDGET = 1 / 64
LEAST_K = 64
_REFERENCE: Mapping[str, Impl] = dict.fromkeys(OPERATORS, "reference")


def budget(n: int) -> int:
    """Return how many of ``n`` cached tokens to select: 1.56%, but at least 64 if there are."""
    return min(n, max(LEAST_K, round(n * BUDGET)))


StageTimer = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Geometry:
    """The attention heads of a layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}"


@dataclass
class Layer:
    """One layer's random states at a decode step, with the newest token in the cache.

    Attributes:
        query: ``[B, Hkv, G, d]``.
        keys: ``[B, Hkv, n, d]``.
        values: ``[B, Hkv, n, d]``.
        rbit: Hash bits per key.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    rbit: int = 128

    @classmethod
    def draw(
        cls,
        shape: Geometry,
        batch_size: int,
        n: int,
        rbit: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Layer":
        """Draw normal states head by head, so that no temporary memory is needed."""
        generator = torch.Generator(device).manual_seed(0)
        heads, group = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads

        def normal(*sizes: int) -> Tensor:
            states = torch.empty(batch_size, heads, *sizes, dtype=dtype, device=device)
            for head in states.flatten(0, 1):
                head.normal_(generator=generator)
            return states

        query = normal(group, shape.head_dim)
        return cls(query, normal(n, shape.head_dim), normal(n, shape.head_dim), rbit)

    @property
    def n(self) -> int:
        """Cached tokens."""
        return self.keys.shape[2]

    @property
    def k(self) -> int:
        """Tokens to select."""
        return budget(self.n)

    def copy(self) -> "Layer":
        """Return a copy of the states in new memory."""
        return Layer(self.query.clone(), self.keys.clone(), self.values.clone(), self.rbit)


class Step:
    """A method's index over a layer, and its decode step, which changes neither.

    Args:
        layer: The states.
        impl: Implementation of each operator.
    """

    name: ClassVar[str]
    unit_size: ClassVar[int] = 1

    def __init__(self, layer: Layer, impl: Mapping[str, Impl]) -> None:
        self.layer, self.impl = layer, impl
        self.scale = layer.keys.shape[-1] ** -0.5
        self.read: list[Tensor] = []  # side information that a step reads
        self.build()

    def build(self) -> None:
        """Compute the side information of all keys."""

    def knobs(self) -> dict[str, Any]:
        """Return the settings that distinguish this step from others of the method, by column."""
        return {}

    def encode(self) -> Tensor:
        """Write the newest key's side information; return the queries in the form for scoring."""
        return self.layer.query

    def score(self, encoded: Tensor) -> Tensor | None:
        """Return ``[B, Hkv, U]``, higher is better; None if the selection ignores the query."""
        return None

    def select(self, scores: Tensor | None) -> Tensor:
        """Return the selected units ``[B, Hkv, m]``."""
        assert scores is not None
        forced = (NUM_SINK, NUM_RECENT)
        return topk_select(scores, self.layer.k, *forced, impl=self.impl["topk_select"])

    def attend(self, indices: Tensor) -> Tensor:
        """Return ``[B, Hq, d]``."""
        states = (self.layer.query.flatten(1, 2), self.layer.keys, self.layer.values)
        impl = self.impl["sparse_attention"]
        return sparse_attention(*states, indices, self.scale, unit_size=self.unit_size, impl=impl)[
            0
        ]

    def __call__(self, watch: StageTimer = nullcontext) -> Tensor:
        """Decode: encode, score, select, attend."""
        with watch("encode"):
            encoded = self.encode()
        with watch("score"):
            scores = self.score(encoded)
        with watch("select"):
            indices = self.select(scores)
        with watch("attend"):
            return self.attend(indices)

    def bytes_read(self) -> int:
        """Return the bytes that a step reads for one batch row."""
        batch_size, num_kv_heads, _, head_dim = self.layer.keys.shape
        chosen = 2 * self.layer.k * num_kv_heads * head_dim * self.layer.keys.element_size()
        return sum(one.nbytes for one in self.read) // batch_size + chosen

    def check(self) -> None:
        """Compare each stage with the reference on the same inputs.

        Raises:
            WrongResult: If one differs; its times are then meaningless.
        """
        encoded = self.encode()
        scores = self.score(encoded)
        exact = self._by_reference(lambda: self.score(encoded))
        if scores is not None and exact is not None:
            self._same("scores", scores, exact)
        indices = self._by_reference(lambda: self.select(exact))
        require(torch.equal(self.select(exact), indices), "the selection is not the reference's.")
        self._same("output", self.attend(indices), self._by_reference(lambda: self.attend(indices)))

    def _by_reference(self, stage: Callable[[], Any]) -> Any:
        impl, self.impl = self.impl, _REFERENCE
        try:
            return stage()
        finally:
            self.impl = impl

    def _same(self, what: str, found: Tensor, expected: Tensor) -> None:
        try:
            assert_same(found, expected)
        except WrongResult as error:
            raise WrongResult(f"the {what} of the step: {error}") from None

    def _softmaxed(self, products: Tensor) -> Tensor:
        """Sum the softmax of ``[B, Hkv, G, n]`` dot products over the group."""
        return group_softmax(products, self.scale, impl=self.impl["group_softmax"])


class Full(Step):
    """Attention to everything, by SDPA."""

    name = "full"

    def __call__(self, watch: StageTimer = nullcontext) -> Tensor:
        with watch("attend"):
            states = (self.layer.query.flatten(1, 2), self.layer.keys, self.layer.values)
            return full_attention(*states, self.scale)

    def bytes_read(self) -> int:
        return (self.layer.keys.nbytes + self.layer.values.nbytes) // len(self.layer.keys)

    def check(self) -> None:
        """Do nothing: SDPA is itself the reference."""


class Exact(Step):
    """The exact top-k: every key is read to select."""

    name = "exact"

    def build(self) -> None:
        self.read = [self.layer.keys]

    def score(self, encoded: Tensor) -> Tensor:
        impl = self.impl["lowrank_score"]
        return self._softmaxed(lowrank_score(encoded, self.layer.keys, impl=impl))


class Hata(Step):
    """Hash codes; the number of matching bits is weighted by the keys' norms."""

    name = "hata"
    use_norm: ClassVar[bool] = True

    def build(self) -> None:
        keys = self.layer.keys
        batch_size, num_heads, n, head_dim = keys.shape
        generator = torch.Generator(keys.device).manual_seed(1)
        shape = (num_heads, head_dim, self.layer.rbit)
        self.weight = torch.randn(shape, generator=generator, device=keys.device)
        self.codes = hash_encode(keys, self.weight, impl=self.impl["hash_encode"])
        self.norms = None
        if self.use_norm:
            self.norms = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
        self.kv_len = torch.full((batch_size,), n, dtype=torch.int32, device=keys.device)
        self.read = [self.codes] if self.norms is None else [self.codes, self.norms]

    def knobs(self) -> dict[str, Any]:
        return {"rbit": self.layer.rbit, "p_use_norm": self.use_norm}

    def encode(self) -> Tensor:
        newest = self.layer.keys[:, :, -1:]
        states = (self.layer.query, newest, self.weight)
        cached = (self.codes, self.kv_len, self.norms)
        return encode_step(*states, *cached, impl=self.impl["hash_encode"])

    def score(self, encoded: Tensor) -> Tensor:
        return hamming_score(encoded, self.codes, self.norms, impl=self.impl["hamming_score"])

    def check(self) -> None:
        assert_same_bits(self.encode(), self.layer.query, self.weight)
        super().check()


class HataInteger(Hata):
    """Hash codes, ranked by Hamming distance alone."""

    use_norm = False


class Quest(Step):
    """Pages of 16 tokens, selected by an upper bound on their logits."""

    name = "quest"
    unit_size = PAGE_SIZE

    def build(self) -> None:
        keys = self.layer.keys
        padded = torch.nn.functional.pad(keys, (0, 0, 0, -keys.shape[2] % PAGE_SIZE))
        last = keys.shape[2] // PAGE_SIZE * PAGE_SIZE
        padded[:, :, keys.shape[2] :] = keys[:, :, last : last + 1] if last < keys.shape[2] else 0
        pages = padded.unflatten(2, (-1, PAGE_SIZE))
        self.low, self.high = pages.amin(3), pages.amax(3)
        self.read = [self.low, self.high]

    def encode(self) -> Tensor:
        newest = self.layer.keys[:, :, -1]
        torch.minimum(self.low[:, :, -1], newest, out=self.low[:, :, -1])
        torch.maximum(self.high[:, :, -1], newest, out=self.high[:, :, -1])
        return self.layer.query

    def score(self, encoded: Tensor) -> Tensor:
        return page_score(encoded, self.low, self.high, impl=self.impl["page_score"]).sum(2)

    def select(self, scores: Tensor | None) -> Tensor:
        assert scores is not None
        budget = max(1, self.layer.k // PAGE_SIZE)
        forced = (min(1, budget - 1), 1)
        return topk_select(scores, budget, *forced, impl=self.impl["topk_select"])


class Loki(Step):
    """A quarter of the keys' channels after a rotation."""

    name = "loki"

    def build(self) -> None:
        keys = self.layer.keys
        head_dim = keys.shape[-1]
        generator = torch.Generator().manual_seed(2)
        drawn = torch.randn(keys.shape[1], head_dim, head_dim, generator=generator)
        # A random rotation takes as long as one to the principal components.
        rotation = torch.linalg.qr(drawn).Q[:, :, : max(1, head_dim // 4)]
        self.rotation = rotation.to(keys.device, keys.dtype)
        self.reduced = keys @ self.rotation
        self.read = [self.reduced]

    def encode(self) -> Tensor:
        self.reduced[:, :, -1:] = self.layer.keys[:, :, -1:] @ self.rotation
        return self.layer.query @ self.rotation

    def score(self, encoded: Tensor) -> Tensor:
        impl = self.impl["lowrank_score"]
        return self._softmaxed(lowrank_score(encoded, self.reduced, impl=impl))


class Streaming(Step):
    """The first tokens and the most recent ones."""

    name = "streaming_llm"

    def build(self) -> None:
        layer = self.layer
        first = torch.arange(NUM_SINK, dtype=torch.int32, device=layer.keys.device)
        last = torch.arange(layer.n - layer.k + NUM_SINK, layer.n, device=layer.keys.device)
        kept = torch.cat([first, last.int()])
        self.kept = kept.expand(*layer.keys.shape[:2], -1).contiguous()

    def select(self, scores: Tensor | None) -> Tensor:
        return self.kept


METHODS: dict[str, type[Step]] = {
    "full": Full,
    "exact": Exact,
    "hata": Hata,
    "hata_integer": HataInteger,
    "quest": Quest,
    "loki": Loki,
    "streaming_llm": Streaming,
}
