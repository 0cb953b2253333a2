"""What the tests of methods share: every method as its YAML makes it, fitted on small states."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn.functional import pad

from topkbench.methods.base import CacheView, Geometry, PrefillInputs, TopKMethod
from topkbench.methods.capture import column_sums

CONF = Path(__file__).parents[2] / "conf" / "method"
# Thousands of steps are taken once; that they lead to the same again, its own tests say.
SLOW = ("hash_attention",)
LEARNT: dict[str, dict[str, Tensor]] = {}
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))

HEAD_DIM, GROUP, KV_HEADS, LAYERS = 32, 3, 2, 2
TAIL = 16  # queries of the prompt's end
GEOMETRY = Geometry(
    num_layers=LAYERS,
    num_heads=GROUP * KV_HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    dtype_bytes=4,
)


class Calibration:
    """Random states of short sequences."""

    num_layers = LAYERS
    sequences = 3

    def states(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(layer)
        return [
            (
                torch.randn(GROUP * KV_HEADS, n, HEAD_DIM, generator=generator),
                torch.randn(KV_HEADS, n, HEAD_DIM, generator=generator),
            )
            for n in (240, 251, 264)
        ]


def make(name: str, fit: bool = True, **overrides: Any) -> TopKMethod:
    """Make a method from its YAML, with its artifact where it needs one."""
    root = OmegaConf.create(
        {"rbit": 64, "seed": 0, "impl": "auto", "full_backend": "sdpa", "k": 16}
    )
    node = OmegaConf.load(CONF / f"{name}.yaml")
    assert isinstance(node, DictConfig)
    for option in node.pop("defaults", []):  # a method inside a method: /method@PLACE: NAME
        if option != "_self_":
            ((place, inner),) = option.items()
            node[place.removeprefix("/method@")] = OmegaConf.load(CONF / f"{inner}.yaml")
    root["method"] = OmegaConf.merge(node, overrides)
    method: TopKMethod = instantiate(root["method"])
    spec = method.artifact_spec(GEOMETRY) if fit else None
    if spec is not None:
        learnt = LEARNT.get(str(spec)) or method.fit(Calibration())
        if name in SLOW:
            LEARNT[str(spec)] = learnt
        method.load_artifact(learnt)
    return method


@pytest.fixture(scope="session")
def make_method() -> Callable[..., TopKMethod]:
    return make


@pytest.fixture(scope="session")
def methods() -> dict[str, TopKMethod]:
    """Every method of conf/method, made once."""
    return {name: make(name) for name in NAMES}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes ``name`` over every method of conf/method."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", NAMES)


@pytest.fixture
def states() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def draw(batch_size: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries ``[B, Hkv, G, d]``, keys and values ``[B, Hkv, n, d]``."""
        generator = torch.Generator().manual_seed(seed)
        queries = torch.randn(batch_size, KV_HEADS, GROUP, HEAD_DIM, generator=generator)
        keys = torch.randn(batch_size, KV_HEADS, n, HEAD_DIM, generator=generator)
        values = torch.randn(batch_size, KV_HEADS, n, HEAD_DIM, generator=generator)
        return queries, keys, values

    return draw


@pytest.fixture
def build() -> Callable[..., Any]:
    def build_index(
        method: TopKMethod,
        keys: Tensor,
        values: Tensor,
        kv_start: Tensor | None = None,
        kv_len: Tensor | None = None,
        capacity: int | None = None,
        captured: int | None = None,
    ) -> Any:
        """Build layer 1's index and bind it to the same states.

        The prompt's queries are its keys, once for each query head of a group. Of slots from
        ``captured`` on nothing was captured: they were decoded.
        """
        room = keys.shape[2] + 8 if capacity is None else capacity
        batch_size, _, n, _ = keys.shape
        starts = [0] * batch_size if kv_start is None else kv_start.tolist()
        ends = [n] * batch_size if kv_len is None else kv_len.tolist()
        tails, sums = [], []
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            end = end if captured is None else min(end, captured)
            own = keys[row : row + 1, :, start:end]
            asked = own.repeat_interleave(GROUP, 1)
            tail = asked[:, :, -TAIL:]
            tails.append(pad(tail, (0, 0, TAIL - tail.shape[2], 0), value=7.0))  # no token's
            sums.append(pad(column_sums(asked, own, HEAD_DIM**-0.5), (start, n - end)))
        index = method.build_index(
            PrefillInputs(
                key_states=keys,
                value_states=values,
                capacity=room,
                layer=1,
                num_layers=LAYERS,
                kv_start=kv_start,
                kv_len=kv_len,
                query_tail=torch.cat(tails) if "query_tail" in method.needs else None,
                column_sums=torch.cat(sums) if "column_sums" in method.needs else None,
            )
        )
        method.bind(index, CacheView(keys, values, kv_start, kv_len))
        return index

    return build_index


@pytest.fixture(scope="session")
def geometry() -> Geometry:
    return GEOMETRY
