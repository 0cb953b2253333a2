"""The published recipe: its pairs and labels, its loss and gradient, and its steps."""

from typing import Any

import pytest
import torch
from torch import Tensor

from topkbench.methods.hash_training import HashPairs, PublishedRecipe


def recipe(**settings: Any) -> PublishedRecipe:
    defaults: dict[str, Any] = {
        "rbit": 32,
        "sigma": 0.1,
        "epsilon": 0.01,
        "balance_weight": 1.0,
        "decorrelation_weight": 2.0,
        "balance_queries": True,
        "optimiser": "sgd",
        "learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-6,
        "epochs": 2,
        "steps_per_epoch": 3,
        "chunks_per_epoch": 3,
        "chunk_size": 32768,
        "positive_ratio": 0.1,
        "positive_label": 20.0,
        "queries_per_sequence": 1,
        "late_share": 0.0,
    }
    return PublishedRecipe(**defaults | settings)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_labels_by_hand() -> None:
    logits = torch.tensor([[[0.0, 9.0, 3.0, -2.0, 5.0, 1.0, 8.0, 2.0, 4.0, 7.0]]])
    made = recipe(positive_ratio=0.3, positive_label=21.0)
    wanted = [-1.0, 21.0, -1.0, -1.0, -1.0, -1.0, 11.0, -1.0, -1.0, 1.0]
    assert made.labels(logits).tolist() == [[wanted]]


def test_pairs_join_a_query_with_the_keys_of_its_prefix() -> None:
    queries = torch.arange(20.0)[None, :, None].expand(2, -1, 4)
    keys = torch.arange(20.0)[None, :, None].expand(1, -1, 4)
    drawn = set()
    for seed in range(60):
        positions = recipe().positions([20, 20], seeded(seed))
        states = [(queries[:, at], keys) for at in positions]
        pairs = recipe().draw_pairs(states, seeded(seed))
        ends = [int(pairs.queries[0, 0, i, 0]) for i in (0, 1)]
        drawn |= set(ends)
        assert pairs.queries.shape == (1, 2, 2, 4)
        assert pairs.keys[0, :, 0].tolist() == [*range(ends[0] + 1), *range(ends[1] + 1)]
        assert pairs.query_of.tolist() == [0] * (ends[0] + 1) + [1] * (ends[1] + 1)
    assert drawn == set(range(10, 20))


@pytest.mark.parametrize("balance_queries", [True, False])
@pytest.mark.parametrize("block", [1, 2, 1024])
def test_loss_and_gradient_equal_the_definition(
    balance_queries: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published sums written as loops, in float64, with their derivative by autograd."""
    monkeypatch.setattr("topkbench.methods.hash_training.BLOCK", block)
    generator = seeded(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, queries, keys = draw(2, 4, 32), draw(2, 3, 2, 4), draw(2, 5, 4)
    labels, query_of = draw(2, 3, 5), torch.tensor([0, 0, 1, 1, 1])
    made = recipe(
        sigma=0.7,
        epsilon=0.3,
        balance_weight=5.0,
        decorrelation_weight=0.2,
        balance_queries=balance_queries,
    )
    loss, gradient = made.loss_and_gradient(weight, HashPairs(queries, keys, labels, query_of))
    weight.requires_grad_()

    def hashed(states: Tensor, head: int) -> Tensor:
        return 2 * torch.sigmoid(0.7 * states @ weight[head]) - 1

    similarity = balance = squares = torch.zeros((), dtype=torch.float64)
    for head in range(2):
        for member in range(3):
            bits = torch.zeros(32, dtype=torch.float64)
            for pair in range(5):
                query = hashed(queries[head, member, query_of[pair]], head)
                key = hashed(keys[head, pair], head)
                label = labels[head, member, pair]
                similarity = similarity + label * (query - key).square().sum() / 5
                bits = bits + (query + key if balance_queries else key) / (5 * 32)
            balance = balance + bits.square().sum()
        squares = squares + (weight[head].T @ weight[head] - torch.eye(32)).square().sum()
    wanted = 0.3 * similarity + 5.0 * balance + 0.2 * squares.sqrt()
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, weight)[0])


def test_chunks_are_drawn_without_replacement() -> None:
    keys = torch.arange(10.0)[None, :, None].expand(1, -1, 4)
    pairs = HashPairs(
        torch.zeros(1, 1, 1, 4), keys, torch.zeros(1, 1, 10), torch.zeros(10, dtype=torch.long)
    )
    made = recipe(chunk_size=4, chunks_per_epoch=2)
    seen = set()
    for seed in range(20):
        batch = made.draw(pairs, seeded(seed))
        seen.add(tuple(batch.keys[0, :, 0].int().tolist()))
    assert seen == {(0, 1, 2, 3, 4, 5, 6, 7), (0, 1, 2, 3, 8, 9), (4, 5, 6, 7, 8, 9)}


def test_every_step_reports_its_loss() -> None:
    made, generator = recipe(), seeded(11)
    queries = torch.randn(6, 2, 256, 16, generator=generator)
    keys = torch.randn(6, 1, 256, 16, generator=generator)
    positions = made.positions([256] * 6, seeded(0))
    states = [(queries[i, :, at], keys[i]) for i, at in enumerate(positions)]
    reported: list[tuple[int, int, float]] = []
    fitted = made.fit_layer(states, seeded(0), lambda *one: reported.append(one))
    assert {name: weight.shape for name, weight in fitted.items()} == {"hash_weight": (1, 16, 32)}
    assert [(step, steps) for step, steps, _ in reported] == [(step, 6) for step in range(1, 7)]
    # The first loss is that of the initial weights on all pairs, as one epoch's chunks cover them.
    generator = seeded(0)
    pairs = made.draw_pairs(states, generator)
    start = torch.randn(1, 16, 32, generator=generator)
    assert reported[0][2] == pytest.approx(made.loss_and_gradient(start, pairs)[0].item())
    assert reported[-1][2] < reported[0][2]


def test_a_share_of_the_queries_is_drawn_from_the_end() -> None:
    made = recipe(queries_per_sequence=8, late_share=0.25)
    early, late = set(), set()
    for seed in range(40):
        (positions,) = made.positions([400], seeded(seed))
        early |= set(positions[:6])
        late |= set(positions[6:])
    assert min(early) < 210
    assert max(early) > 390
    assert late <= set(range(352, 400))
    assert len(late) > 30
    # In a short sequence the last 48 tokens are its second half.
    assert {one for (found,) in [made.positions([20], seeded(0))] for one in found} <= {
        *range(10, 20)
    }


def test_adam_learns_by_its_own_steps() -> None:
    generator = seeded(5)
    states = [
        (torch.randn(2, 1, 8, generator=generator), torch.randn(1, 60, 8, generator=generator))
    ]
    losses: list[float] = []
    made = recipe(optimiser="adam", learning_rate=0.15, epochs=60, steps_per_epoch=1)
    fitted = made.fit_layer(states, seeded(1), lambda _, __, loss: losses.append(loss))
    by_sgd = recipe(epochs=60, steps_per_epoch=1).fit_layer(states, seeded(1))
    assert len(losses) == 60
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(fitted["hash_weight"], by_sgd["hash_weight"])
