"""The shipped artifacts are what the current code learns: a layer of each method is refitted.

HashAttention's 4,000 steps would take as long as all the others together several times: of them the
first 200 are taken, and what is shipped must still have the loss that it was left with.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from topkbench.harness import artifact
from topkbench.harness.calibration import Calibration
from topkbench.harness.cell import artifact_spec, fit_source
from topkbench.methods.double_sparsity import DoubleSparsity
from topkbench.methods.hash_attention import LINEAR_LAYERS, HashAttention, past_keys
from topkbench.methods.hata import HATA
from topkbench.methods.infinigen import InfiniGen
from topkbench.methods.learning import AnyLearningMethod, LayerStates
from topkbench.methods.loki import Loki
from topkbench.methods.policy import Policy
from topkbench.models.attach import geometry_of
from topkbench.models.load import LoadedModel, load_model
from topkbench.tasks.ruler_words_prompts import CalibrationPrompts, TextsAndPrompts

MODELS = Path(__file__).parents[2] / "models"
ARTIFACTS = MODELS / "tiny" / "artifacts"
RANKING = HATA(recipe="ranking", fit_rbit=128, centre_keys=True, use_norm=False)  # hata/ranking
LAYER = 0  # its states do not depend on other layers


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("tiny", "tiny")


@pytest.fixture(scope="module")
def first_layer(tiny: LoadedModel) -> LoadedModel:
    """The shipped model without the layers above the first."""
    model = copy.deepcopy(tiny.model)
    body: Any = model.base_model
    body.layers = body.layers[: LAYER + 1]
    return replace(tiny, model=model)


class Everything(HATA):
    """A method that asks for the queries of all positions."""

    def query_positions(self, layer: int, lengths: Sequence[int]) -> list[list[int]]:
        return [list(range(n)) for n in lengths]


@pytest.fixture(scope="module")
def captured(first_layer: LoadedModel) -> LayerStates:
    """The layer's states on the calibration prompts, of which each method takes its queries."""
    return Calibration.draw(first_layer, Everything(), CalibrationPrompts()).capture([LAYER])[LAYER]


def asked(captured: LayerStates, method: AnyLearningMethod) -> LayerStates:
    """Return the states with the queries that a method asks for."""
    positions = method.query_positions(LAYER, [keys.shape[1] for _, keys in captured])
    return [(queries[:, at], keys) for (queries, keys), at in zip(captured, positions, strict=True)]


def shipped(loaded: LoadedModel, method: AnyLearningMethod) -> artifact.Artifact:
    spec = artifact_spec(loaded, method, CalibrationPrompts())
    assert spec is not None
    found = artifact.find(spec, [ARTIFACTS])
    assert found is not None, f"no artifact of {method.name} ships under its current name"
    return found


@pytest.mark.parametrize(
    "method", [DoubleSparsity(), InfiniGen(), Loki()], ids=lambda method: method.name
)
def test_refitting_gives_the_shipped_artifact(
    tiny: LoadedModel, captured: LayerStates, method: AnyLearningMethod
) -> None:
    kept = shipped(tiny, method).tensors
    learned = method.fit_layer(LAYER, asked(captured, method))
    assert learned.keys() == kept.keys()
    for name, tensor in learned.items():
        size = float(kept[name][LAYER].abs().max())
        assert torch.allclose(tensor, kept[name][LAYER], rtol=0, atol=1e-4 * size), name


def test_hash_attention_learns_in_its_first_steps_what_it_did(
    tiny: LoadedModel, captured: LayerStates
) -> None:
    """The expected losses are those of the fit of which all 4,000 steps gave what is shipped."""
    method = HashAttention(steps=200)
    states = asked(captured, method)
    reported: dict[int, float] = {}
    learned = method.fit_layer(
        LAYER, states, lambda step, steps, loss: reported.update({step: loss})
    )
    expected = {1: 2.010356, 2: 2.097849, 50: 1.606243, 100: 1.288613, 150: 1.166841, 200: 1.025966}
    assert {step: reported[step] for step in expected} == pytest.approx(expected, rel=1e-4)
    norms = {"key_0": 10.082839, "key_1": 10.650842, "key_2": 7.826984}
    norms |= {"query_0": 10.158210, "query_1": 10.655471, "query_2": 7.851016}
    assert {name: float(one.norm()) for name, one in learned.items()} == pytest.approx(
        norms, rel=1e-4
    )

    def loss(networks: dict[str, torch.Tensor], sequence: int) -> float:
        """Return the loss of a sequence's last 48 queries over its last 1,024 keys."""
        queries, keys = states[sequence]
        n = keys.shape[1]
        (positions,) = method.query_positions(LAYER, [n])
        query_layers, key_layers = (
            [networks[f"{side}_{i}"] for i in range(LINEAR_LAYERS)] for side in ("query", "key")
        )
        past = past_keys(torch.arange(n - 1024, n), torch.tensor(positions[-48:]))
        late = queries[:, -48:].float(), keys[:, -1024:].float()
        return float(method.loss(query_layers, key_layers, *late, past))

    kept = {name: one[LAYER] for name, one in shipped(tiny, HashAttention()).tensors.items()}
    assert [loss(learned, one) for one in range(3)] == pytest.approx(
        [0.723372, 0.713315, 0.714109], rel=1e-4
    )
    assert [loss(kept, one) for one in range(3)] == pytest.approx(
        [0.408696, 0.386568, 0.400646], rel=1e-4
    )


@pytest.mark.slow
def test_refitting_gives_nearly_the_shipped_hash_weights(
    tiny: LoadedModel, captured: LayerStates
) -> None:
    """Its 300 steps on a steep loss amplify rounding differences, so not all bits agree.

    Bits drawn with another seed or learned differently would have cosines within 0.5 of zero.
    """
    method = HATA(rbit=32)
    kept = shipped(tiny, method).tensors["hash_weight"][LAYER]
    learned = method.fit_layer(LAYER, asked(captured, method))["hash_weight"]
    cosines = torch.nn.functional.cosine_similarity(learned, kept, dim=1)
    assert learned.shape == kept.shape
    assert float((cosines > 0.9).float().mean()) > 0.8


@pytest.mark.parametrize("rbit", [32, 64, 128, 256])
def test_an_artifact_ships_for_every_number_of_hash_bits(tiny: LoadedModel, rbit: int) -> None:
    assert shipped(tiny, HATA(rbit=rbit)).tensors["hash_weight"].shape == (4, 2, 64, rbit)


def test_every_shipped_artifact_belongs_to_a_method(tiny: LoadedModel) -> None:
    found = {shipped(tiny, HATA(rbit=rbit)).path for rbit in (32, 64, 128, 256)}
    found |= {shipped(tiny, one).path for one in (RANKING, DoubleSparsity(), InfiniGen(), Loki())}
    assert found | {shipped(tiny, HashAttention()).path} == set(ARTIFACTS.glob("*.safetensors"))


@pytest.mark.parametrize(
    "method",
    [DoubleSparsity(), HATA(), RANKING, HashAttention(), InfiniGen(), Loki()],
    ids=lambda m: m.name,
)
def test_shipped_artifacts_have_the_digest_of_the_current_code(
    tiny: LoadedModel, method: AnyLearningMethod
) -> None:
    """If the code has changed but fits the same, run python tools/restamp_artifacts.py."""
    assert shipped(tiny, method).provenance["source"] == fit_source(method)


def test_what_ships_for_smollm2_is_what_its_league_needs(smollm2: LoadedModel) -> None:
    """Fitted on the texts of experiment=real_league, by the current code, in all layers but two."""
    texts = TextsAndPrompts(num_sequences=7, max_length=4096)
    folder = MODELS / "smollm2" / "artifacts"
    selecting = set(range(2, 30))
    assert set(geometry_of(smollm2.model).sparse_layers(Policy(k=64))) == selecting
    found = set()
    for method in (HATA(rbit=128), RANKING, Loki(), DoubleSparsity()):
        spec = artifact_spec(smollm2, method, texts)
        assert spec is not None
        if spec["calibration"] != "8c13cf4462ecfad1":
            pytest.skip("the texts are the documentation of another release of Python")
        one = artifact.find(spec, [folder], selecting)
        assert one is not None, f"{method.name} does not ship under its current name"
        assert one.layers == selecting
        assert one.provenance["source"] == fit_source(method)
        found.add(one.path)
    assert found == set(folder.glob("*"))
    assert sum(path.stat().st_size for path in found) < 8 * 2**20
