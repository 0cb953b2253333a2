"""InfiniGen by hand: the skewing matrix, which queries are used, and the count shared by heads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from topkbench.methods.base import CacheView, Geometry, Policy, PrefillInputs, StepContext
from topkbench.methods.infinigen import InfiniGen

Score = Callable[..., Tensor]
LLAMA = Geometry(num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128)


class Drawn:
    """Queries strong along (3, 4) and weak along (4, -3); two query heads per KV head."""

    num_layers = 2
    sequences = 1

    def states(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        along, beside = torch.tensor([0.6, 0.8]), torch.tensor([0.8, -0.6])
        queries = torch.stack([10 * along + beside, 10 * along - beside])
        return [(torch.stack([queries, -queries]), torch.zeros(1, 2, 2))]


def fitted(**settings: Any) -> InfiniGen:
    method = InfiniGen(**settings)
    method.load_artifact(method.fit(Drawn()))
    return method


def prefill(keys: Tensor, capacity: int, **more: Any) -> PrefillInputs:
    return PrefillInputs(
        key_states=keys, value_states=keys, capacity=capacity, layer=1, num_layers=2, **more
    )


def test_the_skewing_matrix_is_the_queries_singular_vectors() -> None:
    skew = fitted().artifact["skew"]
    wanted = torch.tensor([[0.6, 0.8], [0.8, -0.6]])
    torch.testing.assert_close(skew, wanted.expand(2, 1, 2, 2), atol=1e-5, rtol=0)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 60, 8, generator=generator) * torch.arange(1, 9)
    skew = InfiniGen().fit_layer(0, [(queries, torch.zeros(2, 60, 8))])["skew"]
    torch.testing.assert_close(skew.mT @ skew, torch.eye(8).expand(2, 8, 8), atol=1e-5, rtol=0)
    for head in range(2):
        stacked = queries[2 * head : 2 * head + 2].flatten(0, 1)
        vectors = torch.linalg.svd(stacked.double()).Vh.float()
        # The same directions up to sign, the strongest first.
        cosines = (vectors @ skew[head]).abs()
        torch.testing.assert_close(cosines.amax(0), torch.ones(8), atol=1e-4, rtol=0)
        strength = (stacked @ skew[head]).abs().sum(0)
        assert (strength.diff() <= 0).all()


def test_all_channels_give_exact_logits(score: Score) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 9, 2, generator=generator)
    queries = torch.randn(1, 1, 2, 2, generator=generator)
    method = fitted(partial_ratio=1.0)
    index = method.build_index(prefill(keys, 9))
    found = score(method, index, queries, keys)
    torch.testing.assert_close(found, queries @ keys.mT, atol=1e-5, rtol=1e-5)


def test_three_in_ten_skewed_channels_find_most_of_the_top_keys(score: Score) -> None:
    """Queries span few directions; if the skewing matrix finds these, few channels suffice."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    strength = torch.exp(-torch.arange(64) / 6)

    def draw_queries(count: int) -> Tensor:
        return torch.randn(4, count, 64, generator=generator) * strength @ turn

    keys = torch.randn(1, 2, 1000, 64, generator=generator)
    queries = draw_queries(50).unflatten(0, (2, 2))[None].flatten(2, 3)  # of a group, 100 in a row
    exact = (queries @ keys.mT).topk(64).indices

    def recall(skew: Tensor) -> float:
        method = InfiniGen(partial_ratio=0.3)
        strength = torch.arange(64.0, 0.0, -1.0).expand(2, 2, 64)  # keys choose as queries do
        method.load_artifact({"skew": skew.expand(2, 2, 64, 64), "key_strength": strength})
        index = method.build_index(prefill(keys, 1000))
        found = score(method, index, queries, keys).topk(64).indices
        return (found[..., None] == exact[..., None, :]).any(-1).double().mean().item()

    learned = InfiniGen().fit_layer(1, [(draw_queries(200), torch.zeros(2, 200, 64))])["skew"]
    assert recall(learned) > 0.9
    assert recall(torch.eye(64)) < 0.6


@pytest.mark.parametrize(
    ("head_dim", "channels"), [(128, 25), (64, 12), (32, 6), (10, 2), (5, 1), (2, 1)]
)
def test_channels_are_rounded_down_to_at_least_one(head_dim: int, channels: int) -> None:
    assert InfiniGen().channels(head_dim) == channels


def test_channels_are_those_of_the_largest_queries_and_those_of_the_largest_keys(
    score: Score,
) -> None:
    """Two of four channels by each: the first KV head uses 0, 1 and 3, the second 0 and 1."""
    method = InfiniGen(partial_ratio=0.5)
    strength = torch.tensor([[1.0, 9.0, 2.0, 8.0], [5.0, 6.0, 1.0, 0.0]])
    method.load_artifact(
        {"skew": torch.eye(4).expand(2, 2, 4, 4), "key_strength": strength.expand(2, 2, 4)}
    )
    assert method.compared()[1].tolist() == [[True, True, False, True], [True, True, False, False]]
    keys = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]]).expand(1, 2, 2, 4)
    index = method.build_index(prefill(keys, 3))
    assert index.low_keys[0, :, :2].tolist() == [
        [[1.0, 2.0, 4.0], [4.0, 3.0, 1.0]],
        [[1.0, 2.0, 0.0], [4.0, 3.0, 0.0]],
    ]
    newest = torch.tensor([5.0, 6.0, 7.0, 8.0]).expand(1, 2, 1, 4)
    method.append(index, newest, newest)
    queries = torch.tensor([1.0, 10.0, 100.0, 1000.0]).expand(1, 2, 1, 4)
    # 1 + 20 + 4000, 4 + 30 + 1000, 5 + 60 + 8000; without the thousands in the second head.
    assert score(method, index, queries, keys).tolist() == [
        [[[4021.0, 1034.0, 8065.0]], [[21.0, 34.0, 65.0]]]
    ]
    # All KV heads keep as many channels as the first, three; without an artifact the upper bound.
    geometry = Geometry(num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4, dtype_bytes=4)
    assert method.index_bytes_per_token(geometry) == 2 * 3 * 4
    assert InfiniGen(partial_ratio=0.5).index_bytes_per_token(geometry) == 2 * 4 * 4
    assert InfiniGen(partial_ratio=0.25).index_bytes_per_token(geometry) == 2 * 2 * 4


def test_key_strength_is_of_skewed_keys_over_all_sequences() -> None:
    """Components along (3, 4) are 5 and -10, orthogonal 0 and 0; then 0 along and 30 orthogonal."""
    queries = Drawn().states(0)[0][0]
    first = torch.tensor([[[3.0, 4.0], [-6.0, -8.0]]])
    second = torch.tensor([[[24.0, -18.0]]])
    learned = InfiniGen().fit_layer(0, [(queries, first), (queries, second)])
    torch.testing.assert_close(learned["key_strength"], torch.tensor([[5.0, 10.0]]))


def test_speculated_queries_select_and_the_real_ones_attend() -> None:
    keys = torch.tensor([[3.0, 4.0], [-3.0, -4.0], [0.0, 0.0]])[None, None]
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])[None, None]
    query = torch.tensor([[[[0.6, 0.8], [0.6, 0.8]]]])
    method = fitted()
    index = method.build_index(prefill(keys, 3))
    policy = Policy(k=1, num_sink=0, num_recent=0)
    for speculated, wanted in ((None, 0), (-query, 1), (query, 0)):
        context = StepContext(
            query, CacheView(keys, values), policy, 1.0, previous_query=speculated
        )
        found = method.step(index, context)
        assert found.selection is not None
        assert found.selection.indices.tolist() == [[[wanted]]]
        torch.testing.assert_close(found.out[0, 0], values[0, 0, wanted])


def test_heads_share_the_mean_count_and_k_is_its_cap() -> None:
    # Speculated logits are 5 (along) / sqrt(2) for the first query, a tenth of it for the second.
    along = torch.tensor([0.6, 0.8])
    places = torch.tensor([10.0, 9.0, 8.0, 3.0, 2.0, 1.0, 0.0, -1.0])
    keys = (places[:, None] * along)[None, None]
    query = torch.stack([5 * along, 0.5 * along])[None, None]
    method = fitted(alpha=5.0)
    index = method.build_index(prefill(keys, 8))
    view = CacheView(keys, keys)

    def kept(k: int, **more: Any) -> Any:
        policy = Policy(k=k, num_sink=0, head_scope="query_head", **more)
        found = method.step(index, StepContext(query, view, policy, 2**-0.5)).selection
        assert found is not None
        return [[slot for slot in head if slot >= 0] for head in found.indices[0].tolist()]

    # 7.07 below the largest product: 2 of the first query (50, 45), all 8 of the second; mean 5.
    native: dict[str, Any] = {"protocol": "native", "num_recent": 0}
    assert kept(7, **native) == [[0, 1, 2, 3, 4]] * 2
    assert kept(3, **native) == [[0, 1, 2]] * 2
    # The current token takes a place, regardless of its score.
    assert kept(7, protocol="native", num_recent=1) == [[0, 1, 2, 3, 7]] * 2
    assert kept(7, num_recent=0) == [[0, 1, 2, 3, 4, 5, 6]] * 2


@pytest.mark.parametrize(("softcap", "wanted"), [(None, 2), (4.0, 6)])
def test_alpha_is_a_distance_between_scaled_and_capped_logits(
    softcap: float | None, wanted: int
) -> None:
    along = torch.tensor([0.6, 0.8])
    places = torch.tensor([10.0, 9.0, 8.0, 3.0, 2.0, 1.0, -2.0, -3.0])
    keys = (places[:, None] * along)[None, None]
    query = torch.stack([5 * along, 0.5 * along])[None, None]
    method = fitted(alpha=5.0)
    index = method.build_index(prefill(keys, 8, scale=2.0, softcap=softcap))
    native: dict[str, Any] = {"protocol": "native", "num_sink": 0, "num_recent": 0}
    policy = Policy(k=7, head_scope="query_head", **native)
    found = method.step(
        index, StepContext(query, CacheView(keys, keys), policy, 2.0, softcap)
    ).selection
    assert found is not None
    # Twice the products are 100, 90, ... and 10, 9, 8, 3, ...: 1 and 3 lie within 5 of the first.
    # Below 4 all that are positive do: 6 tokens of each query, for -2 comes to -4 and -1.85.
    assert (found.indices[0] >= 0).sum(-1).tolist() == [wanted] * 2


def test_bytes_by_hand() -> None:
    """Half precision, 8 KV heads of 128 channels, at most 50 of them used, 32 query heads."""
    token = 2 * 8 * 128 * 2
    side, skew, projection = 32768 * 8 * 50 * 2, 8 * 128 * 50 * 4, 32 * 50 * 4096 * 2
    method = InfiniGen()
    wanted = side + skew + projection + 512 * token
    assert method.bytes_read(LLAMA, 32768, 512) == wanted
    # The formula equals the index's tensors: one channel, chosen by queries and keys alike.
    geometry = Geometry(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2, dtype_bytes=4)
    method = fitted()
    index = method.build_index(prefill(torch.zeros(1, 1, 9, 2), 9))
    assert index.low_keys.shape == (1, 1, 9, 1)
    touched = index.low_keys.nbytes + index.skew.nbytes
    rest = 2 * 1 * 4 * 4 + 3 * 2 * 2 * 4
    assert method.bytes_read(geometry, 9, 3) == touched + rest


def test_positions_are_spread_over_a_sequence() -> None:
    assert InfiniGen().query_positions(0, [3, 256, 1000]) == [
        [0, 1, 2],
        list(range(256)),
        list(range(0, 1000, 4)),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partial_ratio": 0.0}, "partial_ratio must be a share above 0 and up to 1, got 0.0"),
        ({"partial_ratio": 1.5}, "partial_ratio must be a share above 0 and up to 1, got 1.5"),
        ({"alpha": 0.0}, "alpha must be above 0, got 0.0"),
    ],
)
def test_bad_settings_are_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfiniGen(**settings)


def test_an_artifact_must_match_the_model() -> None:
    with pytest.raises(ValueError, match=r"skew .* = \[2, 1, 2, 2\], got none; fit it on this"):
        InfiniGen().build_index(prefill(torch.zeros(1, 1, 3, 2), 3))
    with pytest.raises(ValueError, match=r"= \[2, 2, 2, 2\], got \[2, 1, 2, 2\]; fit it"):
        fitted().build_index(prefill(torch.zeros(1, 2, 3, 2), 3))
