"""What ships is what its method learns today: a layer of each kind is learnt again and compared."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from topkbench.methods import artifact
from topkbench.methods.base import TopKMethod
from topkbench.models.load import LoadedModel, load_model
from topkbench.tasks.calibration import Calibration
from topkbench.tasks.cell import artifact_spec

ARTIFACTS = Path(__file__).parents[2] / "models" / "tiny" / "artifacts"
LAYER = 0  # whose states need no other layer


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


def shipped(loaded: LoadedModel, method: TopKMethod) -> artifact.Artifact:
    spec = artifact_spec(loaded, method)
    assert spec is not None
    path = artifact.find(spec, [ARTIFACTS])
    assert path is not None, f"no artifact of {method.name} ships under its name of today"
    return artifact.load(path, expect=spec)


def refitted(loaded: LoadedModel, method: TopKMethod) -> dict[str, torch.Tensor]:
    states = Calibration.draw(loaded, method).capture([LAYER])[LAYER]
    return method.fit_layer(LAYER, states)
