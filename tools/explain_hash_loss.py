"""Show what HATA's published loss learns from a model's keys: its terms' gradients, and its bits.

python tools/explain_hash_loss.py OUT.csv model=smollm2_135m calibration=text rbit=128

The model reads the calibration texts as for a fit; settings are those of a run. For each layer that
the policy leaves to the method, and each KV head, a row of the CSV file says

- how the keys lie: which share of their energy is in their mean, how much longer the first token's
  key is (the attention sink) and how much attention it takes, and in how many directions the
  centred keys vary (the participation ratio of their covariance);
- what pulls at the projection: the norms of the gradients of the loss' three terms, at the Gaussian
  start and at an orthonormal projection, with all keys and without the first tokens' keys;
- how balanced the bits of an orthonormal projection are, of the keys as they are and centred: the
  mean over bits of ``|2 p - 1|``, where ``p`` is the share of ones; 0 is even, 1 says nothing.
"""

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # lets the script run without installing the package
    sys.path[0] = str(ROOT / ".types")

import torch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from torch import Tensor  # noqa: E402

from topkbench.analysis.console import say  # noqa: E402
from topkbench.harness.calibration import Calibration  # noqa: E402
from topkbench.harness.cell import layers_to_fit  # noqa: E402
from topkbench.harness.commit import git_state  # noqa: E402
from topkbench.harness.main import checked  # noqa: E402
from topkbench.harness.settings import Names, construct  # noqa: E402
from topkbench.kernels.timing import machine_name  # noqa: E402
from topkbench.methods.hash_training import HashPairs, PublishedRecipe  # noqa: E402
from topkbench.methods.hata import HATA  # noqa: E402
from topkbench.methods.learning import LayerStates  # noqa: E402

SINKS = 4
"""First tokens of a sequence that count as the sink."""
TERMS = {
    "similarity": "epsilon",
    "balance": "balance_weight",
    "decorrelation": "decorrelation_weight",
}


def geometry_of_keys(
    states: LayerStates, positions: Sequence[Sequence[int]]
) -> dict[str, list[float]]:
    """Return how each KV head's keys lie and what its sink takes; means over the sequences.

    Args:
        states: One layer's ``[Hq, m, d]`` queries and ``[Hkv, n, d]`` keys of each sequence.
        positions: The positions of each sequence's queries.
    """
    found: dict[str, list[Tensor]] = {}
    for (queries, keys), at in zip(states, positions, strict=True):
        own = keys.float()
        rest = own[:, SINKS:]
        centred = rest - rest.mean(1, keepdim=True)
        spread = torch.linalg.svdvals(centred).square()
        lengths = own.norm(dim=2)
        grouped = queries.float().unflatten(0, (len(keys), -1))
        logits = grouped @ own[:, None].mT * own.shape[2] ** -0.5
        past = torch.arange(own.shape[1]) <= torch.tensor(at)[:, None]
        logits = logits.masked_fill(~past, -torch.inf)
        values = {
            "mean_share": rest.mean(1).square().sum(1) / rest.square().sum(2).mean(1),
            "sink_length": lengths[:, 0] / lengths[:, SINKS:].median(1).values,
            "sink_attention": logits.softmax(-1)[..., :SINKS].sum(-1).mean((1, 2)),
            "directions": spread.sum(1).square() / spread.square().sum(1),
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: torch.stack(values).mean(0).tolist() for name, values in found.items()}


def imbalance(keys: Sequence[Tensor], weight: Tensor, centre: bool) -> list[float]:
    """Return each KV head's mean over bits of ``|2 p - 1|``; means over the sequences.

    Args:
        keys: ``[Hkv, n, d]`` of each sequence.
        weight: ``[Hkv, d, rbit]``.
        centre: Subtract the mean of a sequence's keys first.
    """
    found = []
    for one in keys:
        own = one.float() - one.float().mean(1, keepdim=True) if centre else one.float()
        ones = (own @ weight > 0).float().mean(1)
        found.append((2 * ones - 1).abs().mean(1))
    return torch.stack(found).mean(0).tolist()


def gradients(recipe: PublishedRecipe, pairs: HashPairs, weight: Tensor) -> dict[str, list[float]]:
    """Return the norms of the gradients of the loss' terms, for each KV head.

    Args:
        recipe: Its weights of the terms.
        pairs: All training pairs.
        weight: ``[Hkv, d, rbit]``.
    """
    found = {}
    for term, name in TERMS.items():
        others: dict[str, Any] = {other: 0.0 for other in TERMS.values() if other != name}
        _, gradient = replace(recipe, **others).loss_and_gradient(weight, pairs)
        found[term] = gradient.flatten(1).norm(dim=1).tolist()
    return found


def without_sink(states: LayerStates, positions: Sequence[Sequence[int]]) -> LayerStates:
    """Return the states without each sequence's first tokens, of which no query is one."""
    assert all(min(at) >= SINKS for at in positions)
    return [(queries, keys[:, SINKS:]) for queries, keys in states]


def rows_of(
    method: HATA, layer: int, states: LayerStates, lengths: Sequence[int]
) -> list[Mapping[str, object]]:
    """Return one row for each KV head of a layer."""
    recipe = PublishedRecipe(
        **{one.name: getattr(method, one.name) for one in fields(PublishedRecipe)}
    )
    positions = method.query_positions(layer, lengths)
    columns: dict[str, list[float]] = geometry_of_keys(states, positions)
    num_kv_heads, _, head_dim = states[0][1].shape
    shape = (layer, layer + 1, num_kv_heads, head_dim, torch.device("cpu"))
    starts = {
        "gaussian": replace(method, weights="random").hash_weight(*shape),
        "orthonormal": replace(method, weights="orthonormal").hash_weight(*shape),
    }
    for keys, own, shift in (
        ("all", states, 0),
        ("no_sink", without_sink(states, positions), SINKS),
    ):
        pairs = recipe.pair(own, [[one - shift for one in at] for at in positions])
        for start, weight in starts.items():
            for term, norms in gradients(recipe, pairs, weight).items():
                columns[f"{term}_{start}_{keys}"] = norms
    for centre, name in ((False, "imbalance"), (True, "imbalance_centred")):
        columns[name] = imbalance([keys for _, keys in states], starts["orthonormal"], centre)
    return [
        {"layer": layer, "kv_head": head, **{name: one[head] for name, one in columns.items()}}
        for head in range(num_kv_heads)
    ]


def main(arguments: Sequence[str]) -> None:
    """Write the file; the first argument is its path, the others are settings of a run."""
    path, *overrides = arguments
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = checked(compose("config", overrides=["method=hata", *overrides]), given=())
    method, settings = composed.method, composed.settings
    assert isinstance(method, HATA)
    loaded = construct(Names({}), "model", settings["model"], cache_dir=settings["cache_dir"])
    layers = layers_to_fit(loaded, method, composed.policy)
    calibration = Calibration.draw(
        loaded, method, composed.texts, composed.calibration_bytes, layers
    )
    shared = {
        "model": loaded.name,
        "calibration": composed.texts.name,
        "rbit": method.rbit,
        "device": machine_name(loaded.model.device),
        **git_state(ROOT),
    }
    with Path(path).open("w", newline="") as file:
        writer = None
        for group in calibration.groups():
            captured = calibration.capture(group)
            for layer in group:
                for row in rows_of(method, layer, captured.pop(layer), calibration.lengths):
                    line = {**shared, **row}
                    writer = writer or csv.DictWriter(file, list(line))
                    if file.tell() == 0:
                        writer.writeheader()
                    writer.writerow(line)
                say(f"layer {layer}")


if __name__ == "__main__":
    main(sys.argv[1:])
