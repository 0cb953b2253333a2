"""Artifacts: they load as they were saved; any other file is refused in one line."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from topkbench.harness import artifact
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
    provenance = artifact.provenance(spec, "thirteen prompts of noise", seed=3)
    return artifact.save(tmp_path / artifact.file_name(spec), tensors, provenance)


def test_a_saved_artifact_loads_with_the_same_content(path: Path, spec: dict[str, Any]) -> None:
    loaded = artifact.load(path, expect=spec)
    assert loaded.tensors["hash_weight"].flatten()[:3].tolist() == [0.0, 1.0, 2.0]
    assert loaded.provenance["data"] == "thirteen prompts of noise"
    assert loaded.provenance["seed"] == 3
    assert loaded.path == path
    assert set(loaded.provenance["versions"]) >= {"python", "torch", "transformers"}
    assert len(loaded.digest) == 64
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_the_digest_depends_on_the_tensors_and_not_on_their_order() -> None:
    one = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    assert artifact.digest_of(one) == artifact.digest_of(dict(reversed(one.items())))
    assert artifact.digest_of(one) != artifact.digest_of({**one, "a": torch.zeros(3, 2)})
    assert artifact.digest_of(one) != artifact.digest_of({**one, "b": torch.zeros(1)})


def test_an_artifact_is_found_by_its_settings(
    path: Path, spec: dict[str, Any], tmp_path: Path
) -> None:
    assert path.name.startswith("hata-")
    found = artifact.find(spec, [tmp_path / "nowhere", path.parent])
    assert found is not None
    assert found.path == path
    assert artifact.find({**spec, "rbit": 64}, [path.parent]) is None


def test_other_settings_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="must have model_digest='xyz', got 'abc'"):
        artifact.load(path, expect={"model_digest": "xyz"})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no file"):
        artifact.load(tmp_path / "none.safetensors")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a complete artifact, small enough to truncate it at every byte."""
    provenance = artifact.provenance({"method": "hata"}, "noise", 0, losses=[[2.0, 1.0]])
    tensors = {"hash_weight": torch.arange(32.0), "second": torch.ones(3)}
    return artifact.save(tmp_path_factory.mktemp("small") / "a", tensors, provenance).read_bytes()


@pytest.mark.parametrize("part", range(8))
def test_a_file_truncated_at_any_byte_is_refused(small: bytes, part: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(small)
    assert artifact.load(path).tensors["hash_weight"][31] == 31
    for size in range(part, len(small), 8):
        path.write_bytes(small[:size])
        with pytest.raises(ValueError, match="damaged or foreign file") as refused:
            artifact.load(path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("extra", [b"\0", b"more"])
def test_a_file_with_extra_bytes_at_its_end_is_refused(
    small: bytes, extra: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(small + extra)
    with pytest.raises(ValueError, match="damaged or foreign file"):
        artifact.load(path)


KILLED = """
import os, pathlib, signal, sys
import torch
from topkbench.harness import artifact

def half(descriptor):
    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)

os.fsync = half
spec = {"method": "hata"}
path = pathlib.Path(sys.argv[1]) / artifact.file_name(spec)
artifact.save(path, {"hash_weight": torch.zeros(64)}, artifact.provenance(spec, "", 0))
"""


@pytest.mark.parametrize("before", [False, True], ids=["no file", "an older file"])
def test_a_killed_write_leaves_the_previous_file(tmp_path: Path, before: bool) -> None:
    spec = {"method": "hata"}
    path = tmp_path / artifact.file_name(spec)
    provenance = artifact.provenance(spec, "", 0)
    if before:
        artifact.save(path, {"hash_weight": torch.ones(2)}, provenance)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    found = artifact.find(spec, [tmp_path])
    if before:
        assert found is not None
        assert found.path == path
        assert found.tensors["hash_weight"].tolist() == [1.0, 1.0]
    else:
        assert found is None
    for other in tmp_path.iterdir():  # the unfinished file of the killed process does not load
        if other != path:
            with pytest.raises(ValueError, match="damaged or foreign file"):
                artifact.load(other)
    artifact.save(path, {"hash_weight": torch.zeros(1)}, provenance)
    assert artifact.load(path).tensors["hash_weight"].tolist() == [0.0]


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
