"""The shipped artifacts are what the current code learns: a layer of each method is refitted."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from topkbench.harness import artifact
from topkbench.harness.calibration import Calibration
from topkbench.harness.cell import artifact_spec, fit_source
from topkbench.methods.double_sparsity import DoubleSparsity
from topkbench.methods.hash_attention import HashAttention
from topkbench.methods.hata import HATA
from topkbench.methods.infinigen import InfiniGen
from topkbench.methods.learning import AnyLearningMethod
from topkbench.methods.loki import Loki
from topkbench.models.load import LoadedModel, load_model
from topkbench.tasks.ruler_words_prompts import CalibrationPrompts

ARTIFACTS = Path(__file__).parents[2] / "models" / "tiny" / "artifacts"
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


def shipped(loaded: LoadedModel, method: AnyLearningMethod) -> artifact.Artifact:
    spec = artifact_spec(loaded, method, CalibrationPrompts())
    assert spec is not None
    path = artifact.find(spec, [ARTIFACTS])
    assert path is not None, f"no artifact of {method.name} ships under its current name"
    return artifact.load(path, expect=spec)


def refitted(loaded: LoadedModel, method: AnyLearningMethod) -> dict[str, torch.Tensor]:
    states = Calibration.draw(loaded, method, CalibrationPrompts()).capture([LAYER])[LAYER]
    return method.fit_layer(LAYER, states)


@pytest.mark.parametrize(
    "method",
    [
        *(DoubleSparsity(), InfiniGen(), Loki()),
        pytest.param(HashAttention(), marks=pytest.mark.slow),  # 4,000 steps
    ],
    ids=lambda method: method.name,
)
def test_refitting_gives_the_shipped_artifact(
    tiny: LoadedModel, first_layer: LoadedModel, method: AnyLearningMethod
) -> None:
    kept = shipped(tiny, method).tensors
    learned = refitted(first_layer, method)
    assert learned.keys() == kept.keys()
    for name, tensor in learned.items():
        size = float(kept[name][LAYER].abs().max())
        assert torch.allclose(tensor, kept[name][LAYER], rtol=0, atol=1e-4 * size), name


@pytest.mark.slow
def test_refitting_gives_nearly_the_shipped_hash_weights(
    tiny: LoadedModel, first_layer: LoadedModel
) -> None:
    """Its 300 steps on a steep loss amplify rounding differences, so not all bits agree.

    Bits drawn with another seed or learned differently would have cosines within 0.5 of zero.
    """
    method = HATA(rbit=32)
    kept = shipped(tiny, method).tensors["hash_weight"][LAYER]
    learned = refitted(first_layer, method)["hash_weight"]
    cosines = torch.nn.functional.cosine_similarity(learned, kept, dim=1)
    assert learned.shape == kept.shape
    assert float((cosines > 0.9).float().mean()) > 0.8


@pytest.mark.parametrize("rbit", [32, 64, 128, 256])
def test_an_artifact_ships_for_every_number_of_hash_bits(tiny: LoadedModel, rbit: int) -> None:
    assert shipped(tiny, HATA(rbit=rbit)).tensors["hash_weight"].shape == (4, 2, 64, rbit)


def test_every_shipped_artifact_belongs_to_a_method(tiny: LoadedModel) -> None:
    found = {shipped(tiny, HATA(rbit=rbit)).path for rbit in (32, 64, 128, 256)}
    found |= {shipped(tiny, one).path for one in (DoubleSparsity(), InfiniGen(), Loki())}
    assert found | {shipped(tiny, HashAttention()).path} == set(ARTIFACTS.glob("*.safetensors"))


@pytest.mark.parametrize(
    "method", [DoubleSparsity(), HATA(), HashAttention(), InfiniGen(), Loki()], ids=lambda m: m.name
)
def test_shipped_artifacts_have_the_digest_of_the_current_code(
    tiny: LoadedModel, method: AnyLearningMethod
) -> None:
    """If the code has changed but fits the same, run python tools/restamp_artifacts.py."""
    assert shipped(tiny, method).provenance["source"] == fit_source(method)
