"""Artifacts on disk: a method's learned tensors as safetensors, with provenance and a digest."""

import functools
import hashlib
import json
import platform
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from topkbench.harness.caching import write_cached

SHIPPED = tuple(sorted((Path(__file__).resolve().parents[1] / "models").glob("*/artifacts")))
"""Folders with fitted artifacts that ship: an artifact names the weights that it is for."""

_PACKAGES = ("topkbench", "torch", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact.

    Attributes:
        tensors: The learned tensors, as ``fit`` returned them.
        provenance: How the artifact was made; see the function ``provenance``.
        digest: sha256 of the tensors, 64 hex digits.
        path: The file it was read from.
        fitted: Whether all of it was fitted in this run, nothing found on disk.
    """

    tensors: dict[str, Tensor]
    provenance: dict[str, Any]
    digest: str
    path: Path
    fitted: bool = False

    @functools.cached_property
    def layers(self) -> frozenset[int]:
        """The layers for which something was learned; the others have zeros."""
        return frozenset(
            layer
            for tensor in self.tensors.values()
            for layer, one in enumerate(tensor)
            if one.any()
        )

    def of_layers(self, layers: Collection[int]) -> "Artifact":
        """Return what was learned for some layers alone, with the digest of that."""
        if self.layers <= set(layers):
            return self
        left = {name: torch.zeros_like(tensor) for name, tensor in self.tensors.items()}
        for name, tensor in self.tensors.items():
            for layer in layers:
                left[name][layer] = tensor[layer]
        return replace(self, tensors=left, digest=digest_of(left))


def provenance(spec: Mapping[str, Any], data: str, seed: int | None, **fit: Any) -> dict[str, Any]:
    """Return a description of how an artifact was made; it does not enter the artifact's digest.

    Args:
        spec: The settings that identify it, from the method's ``artifact_spec``.
        data: Description of the texts it was fitted on.
        seed: The seed of the texts; None if nothing was drawn at random.
        fit: Further facts about the fit: ``model``, ``machine``, ``source``, ``seconds``, and
            ``losses`` at each step of each layer.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = ""
    return {"spec": dict(spec), "data": data, "seed": seed, "versions": versions, **fit}


def file_name(spec: Mapping[str, Any]) -> str:
    """Return an artifact's file name: the method and 12 hex digits of a digest of its settings."""
    text = json.dumps(spec, sort_keys=True, default=str)
    return f"{spec['method']}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"


def find(
    spec: Mapping[str, Any], folders: Iterable[str | Path], layers: Collection[int] = ()
) -> Artifact | None:
    """Return the artifact with these settings from the first folder that has it, or None.

    Args:
        spec: The settings that identify it.
        folders: Folders of artifacts.
        layers: The layers for which it must have learned something.

    Raises:
        ValueError: If a file is damaged or has other settings.
    """
    for folder in folders:
        path = Path(folder).expanduser() / file_name(spec)
        if path.is_file():
            found = load(path, expect=spec)
            if found.layers.issuperset(layers):
                return found
    return None


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names, dtypes, shapes and values, 64 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(path: str | Path, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> Path:
    """Write an artifact atomically, so that no reader sees a partial file.

    Args:
        path: The file; its folder is created if missing.
        tensors: The learned tensors, as ``fit`` returned them.
        provenance: From the function ``provenance``.

    Returns:
        The path.

    Raises:
        NotWritableError: If its folder cannot be written.
    """
    path = Path(path).expanduser()
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "provenance": json.dumps(provenance, sort_keys=True, default=str),
        "digest": digest_of(on_cpu),
    }
    write_cached(path, safetensors.torch.save(on_cpu, metadata=metadata))
    return path


def load(path: str | Path, expect: Mapping[str, Any] | None = None) -> Artifact:
    """Read an artifact, and check that it is undamaged and has the expected settings.

    Args:
        path: The file.
        expect: Settings that its ``spec`` must have; None to accept any.

    Raises:
        ValueError: If the file is missing, damaged, not an artifact, or has other settings.
    """
    path = Path(path).expanduser()
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        origin = json.loads(metadata["provenance"])
        spec = origin["spec"]
    except FileNotFoundError:
        raise ValueError(f"the artifact must exist, found no file {path}.") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the artifact {path} must be safetensors with its provenance, got a damaged or "
            f"foreign file ({type(error).__name__}: {error}); delete it and fit again."
        ) from None
    digest = digest_of(tensors)
    if digest != metadata.get("digest"):
        raise ValueError(
            f"the artifact {path} must have the digest it was written with, got other contents; "
            "delete it and fit again."
        )
    for key, expected in (expect or {}).items():
        if spec.get(key) != json.loads(json.dumps(expected, default=str)):
            raise ValueError(
                f"the artifact {path} must have {key}={expected!r}, got {spec.get(key)!r}; "
                "fit one for these settings."
            )
    return Artifact(tensors, origin, digest, path)
