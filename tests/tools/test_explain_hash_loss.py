"""What the tool says of keys, by hand, and of the loss, whose gradient its terms make up."""

import csv
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from topkbench.methods.hash_training import PublishedRecipe
from topkbench.methods.hata import HATA
from topkbench.tools.explain_hash_loss import SINKS, geometry_of_keys, imbalance, rows_of

ROOT = Path(__file__).parents[2]


def test_how_keys_lie_by_hand() -> None:
    # Behind four first keys of length 6, keys (3, 1, 0), (3, -1, 0), (3, 0, 1), (3, 0, -1).
    rest = torch.tensor([[3.0, 1.0, 0.0], [3.0, -1.0, 0.0], [3.0, 0.0, 1.0], [3.0, 0.0, -1.0]])
    first = torch.tensor([[6.0, 0.0, 0.0]]).expand(SINKS, 3)
    keys = torch.cat([first, rest])[None]
    found = geometry_of_keys([(torch.zeros(1, 2, 3), keys)], [[7, 4]])
    assert found["mean_share"] == pytest.approx([9 / 10])
    assert found["sink_length"] == pytest.approx([6 / 10**0.5])
    # Queries that attend evenly to 8 and to 5 keys, 4 of them first ones.
    assert found["sink_attention"] == pytest.approx([(4 / 8 + 4 / 5) / 2])
    assert found["directions"] == pytest.approx([2.0])


def test_bits_say_nothing_if_all_keys_lie_on_one_side() -> None:
    keys = torch.tensor([[[5.0, 1.0], [5.0, -1.0], [6.0, 1.0], [4.0, -1.0]]])
    weight = torch.eye(2)[None]
    assert imbalance([keys], weight, centre=False) == pytest.approx([0.5])  # 1 and 0
    # Centred, the first channel is 0, 0, 1 and -1: one of four is a one.
    assert imbalance([keys], weight, centre=True) == pytest.approx([0.25])


def test_the_gradients_of_the_terms_are_those_of_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    method = HATA(rbit=32, chunk_size=1000)
    lengths = [60, 80]
    positions = method.query_positions(0, lengths)
    states = [
        (
            torch.randn(4, len(at), 8, generator=generator),
            torch.randn(2, n, 8, generator=generator),
        )
        for n, at in zip(lengths, positions, strict=True)
    ]
    rows = rows_of(method, 0, states, lengths)
    assert [(row["layer"], row["kv_head"]) for row in rows] == [(0, 0), (0, 1)]
    recipe = PublishedRecipe(
        **{one.name: getattr(method, one.name) for one in fields(PublishedRecipe)}
    )
    weight = HATA(rbit=32, weights="random").hash_weight(0, 1, 2, 8, torch.device("cpu"))
    _, whole = recipe.loss_and_gradient(weight, recipe.pair(states, positions))
    for head, row in enumerate(rows):
        terms = [row[f"{term}_gaussian_all"] for term in ("similarity", "balance", "decorrelation")]
        assert all(isinstance(one, float) and one > 0 for one in terms)
        norm = whole[head].norm().item()
        assert max(terms) - sum(sorted(terms)[:2]) <= norm <= sum(terms)  # type: ignore[type-var]
        assert row["similarity_gaussian_no_sink"] != row["similarity_gaussian_all"]


def test_the_tool_writes_a_row_for_each_head(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    settings = ("rbit=32", "calibration.num_sequences=2", "calibration.max_length=300")
    command = [sys.executable, "tools/explain_hash_loss.py", str(path), "model=tiny", *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], row["kv_head"]) for row in rows] == [
        (str(layer), str(head)) for layer in range(4) for head in range(2)
    ]
    for row in rows:  # the similarity term is far weaker than the decorrelation term
        assert float(row["similarity_gaussian_all"]) < 0.01 * float(
            row["decorrelation_gaussian_all"]
        )
