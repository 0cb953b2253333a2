"""HashAttention: its networks, its training and its signatures, by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from topkbench.methods import hash_attention
from topkbench.methods.base import CacheView, Geometry, Policy, PrefillInputs, StepContext
from topkbench.methods.hash_attention import HashAttention

Score = Callable[..., Tensor]
SHAPE = Geometry(num_layers=1, num_heads=6, num_kv_heads=2, head_dim=16, dtype_bytes=4)


def prefill(keys: Tensor) -> PrefillInputs:
    return PrefillInputs(
        key_states=keys, value_states=keys, capacity=keys.shape[2] + 4, layer=0, num_layers=1
    )


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(**settings: object) -> HashAttention:
    """Return a method with randomly initialised networks."""
    method = HashAttention(impl="reference", **settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    method.load_artifact(
        {
            name: torch.randn(shape, generator=generator) / shape[2] ** 0.5
            for name, shape in method.artifact_layout(SHAPE).items()
        }
    )
    return method


def network(states: Tensor, layers: list[Tensor]) -> Tensor:
    """Return a head's network output for ``[n, d]`` states, computed layer by layer."""
    for i, weight in enumerate(layers):
        states = states @ weight[:-1] + weight[-1]
        if i < 2:
            states = states * torch.sigmoid(states)
    return states


@pytest.mark.parametrize("bits", [32, 64])
def test_scores_are_equal_signs_minus_different_ones(bits: int, score: Score) -> None:
    method = drawn(bits=bits)
    queries, keys = random(2, 2, 3, 16), random(2, 2, 11, 16, seed=1)
    index = method.build_index(prefill(keys))
    scores = score(method, index, queries, keys)
    assert index.key_codes.shape == (2, 6, 15, bits // 32)
    for row in range(2):
        for head in range(6):
            own = [[layers[0, head] for layers in self_layers] for self_layers in sides(method)]
            query_signs = network(queries[row, head // 3, head % 3, None], own[0]).sign()
            key_signs = network(keys[row, head // 3], own[1]).sign()
            wanted = (query_signs @ key_signs.T)[0]
            assert scores[row, head // 3, head % 3].tolist() == wanted.tolist()
    assert len(scores.unique()) > 5


def sides(method: HashAttention) -> tuple[list[Tensor], list[Tensor]]:
    query, key = ([method.artifact[f"{side}_{i}"] for i in range(3)] for side in ("query", "key"))
    return query, key


def test_the_loss_by_hand() -> None:
    """One head, networks that pass a large state through: all 32 bits of a signature are equal."""
    method = HashAttention(positives=1)
    one = torch.zeros(1, 2, 1)
    one[0, 0, 0] = 1.0
    last = torch.zeros(1, 2, 32)
    last[0, 0] = 0.05
    layers = [one, one, last]
    # silu of 20 is 20, of -20 it is 0: signatures are tanh(1) and 0 in each bit.
    queries, keys = torch.tensor([[[20.0]]]), torch.tensor([[[20.0]] * 8 + [[-20.0]] * 8])
    keys = keys.reshape(1, 16, 1)
    keys[0, 3] = 21.0  # the top key; keys 4 to 7 are in the query's future
    past = torch.ones(1, 16, dtype=torch.bool)
    past[0, 4:8] = False
    low, high = math.tanh(1.0), math.tanh(1.05)
    beside = 3 * math.log1p(math.exp(32 * low * low)) + 8 * math.log(2)
    top = 20 * math.log1p(math.exp(-32 * low * high))
    loss = method.loss(layers, layers, queries, keys, past)
    assert loss.item() == pytest.approx((beside + top) / 12, rel=1e-4)


def test_training_leaves_out_forced_and_future_keys() -> None:
    past = hash_attention.past_keys(torch.tensor([0, 3, 4, 9, 12, 13]), torch.tensor([20, 12]))
    assert past.tolist() == [
        [False, False, True, True, True, False],
        [False, False, True] + [False] * 3,
    ]


def test_query_positions_are_evenly_spaced_and_at_the_end() -> None:
    method = HashAttention(queries_per_sequence=52)
    assert method.query_positions(0, [3, 100]) == [[0, 1, 2], [0, 13, 26, 39, *range(52, 100)]]


def test_training_improves_recall(score: Score) -> None:
    """Keys along a query's direction are its top keys; learned signatures find them."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(6, 16, generator=generator)

    def sequence() -> tuple[Tensor, Tensor]:
        kinds = torch.randint(6, (2, 400), generator=generator)
        keys = 2 * directions[kinds] + torch.randn(2, 400, 16, generator=generator)
        wanted = torch.randint(6, (6, 400), generator=generator)
        queries = 2 * directions[wanted] + torch.randn(6, 400, 16, generator=generator)
        return queries, keys

    class Texts:
        num_layers, sequences = 1, 2

        def states(self, layer: int) -> list[tuple[Tensor, Tensor]]:
            return [sequence(), sequence()]

    method = HashAttention(steps=150, step_keys=256, positives=16, learning_rate=3e-3)
    losses: list[float] = []
    texts = Texts().states(0)
    positions = method.query_positions(0, [400, 400])
    chosen = [(q[:, at], k) for (q, k), at in zip(texts, positions, strict=True)]
    fitted = method.fit_layer(0, chosen, lambda step, steps, loss: losses.append(loss))
    assert len(losses) == 150
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    again = method.fit_layer(0, chosen)
    assert all(torch.equal(again[name], fitted[name]) for name in fitted)

    def recall(artifact: dict[str, Tensor]) -> float:
        queries, keys = sequence()
        method.load_artifact({name: tensor[None] for name, tensor in artifact.items()})
        index = method.build_index(prefill(keys[None]))
        newest = queries[:, -1].view(1, 2, 3, 16)
        scores = score(method, index, newest, keys[None])
        found = scores.topk(40).indices
        true = (newest @ keys[None].mT).topk(40).indices
        return (found[..., None] == true[..., None, :]).any(-1).float().mean().item()

    assert recall(fitted) > 0.5  # chance is a tenth


def test_the_native_edges_count_towards_the_budget() -> None:
    method = HashAttention(native={"num_sink": 0, "num_recent": 0, "head_scope": "query_head"})
    for k, edge in ((2048, 128), (512, 128), (64, 16), (3, 0)):
        native = method.resolve(Policy(k=k, num_sink=0, num_recent=0, protocol="native"))[1]
        assert (native.num_sink, native.num_recent) == (edge, edge)
    unified = Policy(k=64)
    assert method.resolve(unified)[1] == unified


def test_bytes_equal_the_reads_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures of every query head, both networks and the selected tokens, counted in bytes."""
    queries, keys = random(1, 2, 3, 16), random(1, 2, 60, 16, seed=1)
    read = 0
    plain: Callable[..., Tensor] = hash_attention.hamming_score

    def counted(codes: Tensor, rows: Tensor, *args: object, **kwargs: object) -> Tensor:
        nonlocal read
        read += rows.nbytes
        return plain(codes, rows, *args, **kwargs)

    monkeypatch.setattr(hash_attention, "hamming_score", counted)
    method = drawn()
    index = method.build_index(prefill(keys))
    view = CacheView(keys, keys)
    step = method.step(index, StepContext(queries, view, Policy(k=16), 16**-0.5))
    assert step.selection is not None
    read += sum(layer.nbytes for layer in [*index.key_layers, *index.query_layers])
    read += int(step.selection.tokens_read(view).sum()) * 2 * 16 * 4
    assert method.bytes_read(SHAPE, 60, 16) == read


def test_bad_settings_and_artifacts_are_refused() -> None:
    with pytest.raises(ValueError, match="bits must be a positive multiple of 32, got 48"):
        HashAttention(bits=48)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        HashAttention(steps=0)
    with pytest.raises(ValueError, match="learning_rate must be above 0, got 0"):
        HashAttention(learning_rate=0)
    with pytest.raises(ValueError, match="got no artifact"):
        HashAttention().build_index(prefill(torch.zeros(1, 2, 3, 16)))
    method = drawn()
    with pytest.raises(ValueError, match=r"key_0 must be \[L, Hq, 9, 8\], got \[1, 6, 17, 16\]"):
        method.build_index(prefill(torch.zeros(1, 2, 3, 8)))
    with pytest.raises(ValueError, match="multiple of 4 heads, got 6"):
        method.build_index(prefill(torch.zeros(1, 4, 3, 16)))
