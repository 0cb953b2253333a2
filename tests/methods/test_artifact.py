"""Artifacts: what is written is what is read, and anything else is one sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch

from topkbench.methods import artifact
from topkbench.methods.base import Geometry
from topkbench.methods.hata import HATA

GEOMETRY = Geometry(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, model_digest="abc")


@pytest.fixture
def spec() -> dict[str, Any]:
    found = HATA(rbit=32).artifact_spec(GEOMETRY)
    assert found is not None
    return found


@pytest.fixture
def path(tmp_path: Path, spec: dict[str, Any]) -> Path:
    tensors = {"hash_weight": torch.arange(2.0 * 2 * 16 * 32).reshape(2, 2, 16, 32)}
    told = artifact.provenance(spec, "thirteen prompts of noise", seed=3)
    return artifact.save(tmp_path / artifact.file_name(spec), tensors, told)


def test_round_trip(path: Path, spec: dict[str, Any]) -> None:
    loaded = artifact.load(path, expect=spec)
    assert loaded.tensors["hash_weight"].flatten()[:3].tolist() == [0.0, 1.0, 2.0]
    assert loaded.provenance["data"] == "thirteen prompts of noise"
    assert loaded.provenance["seed"] == 3
    assert set(loaded.provenance["versions"]) >= {"python", "torch", "transformers"}
    assert len(loaded.digest) == 64
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing unfinished is left


def test_digest_depends_on_contents_alone() -> None:
    one = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    assert artifact.digest_of(one) == artifact.digest_of(dict(reversed(one.items())))
    assert artifact.digest_of(one) != artifact.digest_of({**one, "a": torch.zeros(3, 2)})
    assert artifact.digest_of(one) != artifact.digest_of({**one, "b": torch.zeros(1)})


def test_is_found_by_its_settings(path: Path, spec: dict[str, Any], tmp_path: Path) -> None:
    assert path.name.startswith("hata-")
    assert artifact.find(spec, [tmp_path / "nowhere", path.parent]) == path
    assert artifact.find({**spec, "rbit": 64}, [path.parent]) is None


def test_other_settings_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="must have model_digest='xyz', got 'abc'"):
        artifact.load(path, expect={"model_digest": "xyz"})


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no file"):
        artifact.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("size", [0, 5, 300, 4000])
def test_a_truncated_file_is_refused(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="damaged or foreign file"):
        artifact.load(path)


def test_a_changed_value_is_refused(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[-2] ^= 1
    path.write_bytes(bytes(contents))
    with pytest.raises(ValueError, match="digest it was written with"):
        artifact.load(path)


def test_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="damaged or foreign file"):
        artifact.load(tmp_path / "x.safetensors")
