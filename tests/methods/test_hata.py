"""HATA: its weights, its scores, and that training improves them."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from topkbench.methods.base import Geometry, PrefillInputs, copy_of
from topkbench.methods.hata import HATA

Score = Callable[..., Tensor]
GEOMETRY = Geometry(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4)


def with_weight(weight: Tensor, **settings: object) -> HATA:
    """Return a method whose only layer projects by ``weight [d, rbit]``."""
    method = HATA(rbit=weight.shape[1], **settings)  # type: ignore[arg-type]
    method.load_artifact({"hash_weight": weight[None, None]})
    return method


def signs() -> Tensor:
    """Return ``[2, 32]``: 16 bits are the sign of the first channel, 16 of the second."""
    weight = torch.zeros(2, 32)
    weight[0, :16] = 1.0
    weight[1, 16:] = 1.0
    return weight


def scores(method: HATA, score: Score) -> Tensor:
    keys = torch.tensor([[3.0, 4.0], [-1.0, 0.5], [-6.0, -8.0]])[None, None]
    queries = torch.tensor([[1.0, 1.0], [2.0, -1.0]])[None, None]
    index = method.build_index(
        PrefillInputs(key_states=keys, value_states=keys, capacity=4, layer=0, num_layers=1)
    )
    return score(method, index, queries, keys)


def test_scores_by_hand(score: Score) -> None:
    # Equal minus different bits of 32: query (+,+) with keys (+,+), (-,+), (-,-) gives
    # 32, 0, -32; query (+,-) gives 0, -32, 0.
    assert scores(with_weight(signs(), use_norm=False), score).tolist() == [[[32, -32, -32]]]
    # As shares of 32 bits, times the keys' norms 5, sqrt(1.25) and 10.
    found = scores(with_weight(signs(), use_norm=True), score)
    wanted = torch.tensor([[[5.0, -math.sqrt(1.25), -10.0]]])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("rbit", [0, 16, 100, -32])
def test_rbit_is_a_multiple_of_32(rbit: int) -> None:
    with pytest.raises(ValueError, match=f"rbit must be a positive multiple of 32, got {rbit}"):
        HATA(rbit=rbit)


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="one of trained, random, orthonormal, got 'learned'"):
        HATA(weights="learned")  # type: ignore[arg-type]


def test_orthonormal_weights_are_orthonormal_in_blocks() -> None:
    weight = HATA(rbit=96, weights="orthonormal").hash_weight(0, 1, 2, 64, torch.device("cpu"))
    assert weight.shape == (2, 64, 96)
    for head in range(2):
        first, second = weight[head, :, :64], weight[head, :, 64:]
        torch.testing.assert_close(first.T @ first, torch.eye(64), atol=1e-5, rtol=0)
        torch.testing.assert_close(second.T @ second, torch.eye(32), atol=1e-5, rtol=0)
        assert (first.T @ second).abs().max() > 0.01  # two different draws


def test_untrained_weights_differ_by_layer_head_and_seed() -> None:
    cpu = torch.device("cpu")
    for kind in ("random", "orthonormal"):
        method = HATA(rbit=32, weights=kind)  # type: ignore[arg-type]
        first, second = (method.hash_weight(layer, 2, 2, 32, cpu) for layer in (0, 1))
        other = HATA(rbit=32, weights=kind, seed=1)  # type: ignore[arg-type]
        assert not torch.equal(first, second)
        assert not torch.equal(first[0], first[1])
        assert not torch.equal(first, other.hash_weight(0, 2, 2, 32, cpu))


def test_share_of_differing_bits_follows_the_angle(score: Score) -> None:
    """The chance that a random bit differs is angle / pi; 4096 bits, 60 and 90 degrees."""
    method = HATA(rbit=4096, weights="random", use_norm=False)
    keys = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)], [0.0, 1.0]])[None, None]
    index = method.build_index(
        PrefillInputs(key_states=keys, value_states=keys, capacity=3, layer=0, num_layers=1)
    )
    found = score(method, index, keys[:, :, :1], keys)[0, 0] / 4096
    wanted = torch.tensor([1.0, 1 - 2 / 3, 0.0])
    assert (found - wanted).abs().max() < 4 / math.sqrt(4096)


def test_a_trained_weight_must_be_loaded_and_fit_the_model() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="got no artifact"):
        HATA().hash_weight(0, 1, 1, 4, cpu)
    with pytest.raises(ValueError, match="with rbit=64, got \\[1, 1, 2, 32\\]"):
        HATA(rbit=64).load_artifact({"hash_weight": torch.zeros(1, 1, 2, 32)})
    with pytest.raises(ValueError, match=r"= \[1, 1, 4, 32\], got \[1, 1, 2, 32\]; train it"):
        with_weight(signs()).hash_weight(0, 1, 1, 4, cpu)


def test_only_trained_weights_have_an_artifact() -> None:
    assert HATA(weights="random").artifact_spec(GEOMETRY) is None
    spec = HATA(rbit=64).artifact_spec(GEOMETRY)
    assert spec is not None
    assert spec["rbit"] == 64
    # Settings of decoding do not change the artifact.
    assert spec == HATA(rbit=64, use_norm=False, impl="reference").artifact_spec(GEOMETRY)


class Skewed:
    """Queries and keys of which 4 of 16 channels decide dot products; the others are noise."""

    num_layers = 1
    sequences = 6

    def states(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(11)
        return [self.draw(256, generator) for _ in range(self.sequences)]

    @staticmethod
    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        queries = torch.randn(2, n, 16, generator=generator)
        keys = torch.randn(1, n, 16, generator=generator)
        queries[..., 4:] *= 0.05
        keys[..., 4:] *= 3.0
        return queries, keys


def recall(method: HATA, score: Score) -> float:
    """Return the recall of the true top 32 of 512 keys, averaged over 40 queries."""
    generator = torch.Generator().manual_seed(99)
    queries, keys = Skewed.draw(512, generator)
    keys = keys[None]
    index = method.build_index(
        PrefillInputs(key_states=keys, value_states=keys, capacity=512, layer=0, num_layers=1)
    )
    found = 0.0
    for query in queries[:1, :40].unsqueeze(2).unbind(1):
        group = query[None]
        kept = score(method, index, group, keys)[0, 0].topk(32).indices
        exact = (group @ keys.mT)[0, 0, 0].topk(32).indices
        found += len(set(kept.tolist()) & set(exact.tolist())) / 32 / 40
    return found


def test_training_beats_random_weights(score: Score) -> None:
    trained = HATA(rbit=64, use_norm=False)
    tensors = trained.fit(Skewed())
    assert tensors["hash_weight"].shape == (1, 1, 16, 64)
    trained.load_artifact(tensors)
    untrained = HATA(rbit=64, use_norm=False, weights="random")
    assert recall(trained, score) > recall(untrained, score) + 0.05


def test_training_repeats_itself_by_its_seed() -> None:
    first, second, other = (HATA(rbit=32, epochs=1, seed=s).fit(Skewed()) for s in (0, 0, 1))
    assert torch.equal(first["hash_weight"], second["hash_weight"])
    assert not torch.equal(first["hash_weight"], other["hash_weight"])


def test_bytes_by_hand() -> None:
    geometry = Geometry(num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128)
    method = HATA(rbit=128)
    assert method.index_bytes_per_token(geometry) == 8 * (16 + 4)
    # Codes and norms of 32,768 tokens, the projection, and 512 keys and values in half precision.
    wanted = 32768 * 160 + 8 * 128 * 128 * 4 + 512 * 8 * 128 * 2 * 2
    assert method.bytes_read(geometry, 32768, 512) == wanted


def test_a_copy_of_a_method_has_the_weights_of_its_own_artifact() -> None:
    place = (0, 1, 2, 8, torch.device("cpu"))
    original = HATA(rbit=32)
    copies = []
    for value in (1.0, 2.0):
        copied = copy_of(original)
        assert isinstance(copied, HATA)
        copied.load_artifact({"hash_weight": torch.full((1, 2, 8, 32), value)})
        assert (copied.hash_weight(*place) == value).all()
        copies.append(copied)
    assert (copies[0].hash_weight(*place) == 1.0).all()
    with pytest.raises(ValueError, match="got no artifact"):
        original.hash_weight(*place)
