"""What a method has learned, on disk: safetensors with where it came from and a digest."""

import hashlib
import json
import platform
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_PACKAGES = ("topkbench", "torch", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact.

    Attributes:
        tensors: What ``fit`` returned.
        provenance: How it came about; see ``provenance``.
        digest: sha256 of the tensors, 64 hex digits.
        path: Where it was read.
        fitted: Whether it was fitted just now, and not found.
    """

    tensors: dict[str, Tensor]
    provenance: dict[str, Any]
    digest: str
    path: Path
    fitted: bool = False


def provenance(spec: Mapping[str, Any], data: str, seed: int | None, **fit: Any) -> dict[str, Any]:
    """Describe how an artifact came about.

    Args:
        spec: The settings that identify it, from the method's ``artifact_spec``.
        data: What it was fitted on, in words.
        seed: The seed of the data, None if nothing was drawn.
        fit: What else is known of the fit: ``model``, ``machine``, ``seconds``, and ``losses`` at
            each step of each layer. The digest is of what was learned, and not of this.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = ""
    return {"spec": dict(spec), "data": data, "seed": seed, "versions": versions, **fit}


def file_name(spec: Mapping[str, Any]) -> str:
    """Return the file's name: the method and 12 hex digits of its settings."""
    text = json.dumps(spec, sort_keys=True, default=str)
    return f"{spec['method']}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"


def find(spec: Mapping[str, Any], folders: Iterable[str | Path]) -> Path | None:
    """Return the first folder's file with these settings, or None."""
    for folder in folders:
        path = Path(folder).expanduser() / file_name(spec)
        if path.is_file():
            return path
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
    """Write an artifact so that no reader ever sees half of it.

    Args:
        path: The file; its folder is made.
        tensors: What ``fit`` returned.
        provenance: From ``provenance``.

    Returns:
        The path.
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "provenance": json.dumps(provenance, sort_keys=True, default=str),
        "digest": digest_of(kept),
    }
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        save_file(kept, unfinished, metadata=metadata)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def load(path: str | Path, expect: Mapping[str, Any] | None = None) -> Artifact:
    """Read an artifact and make sure that it is whole and the one that is wanted.

    Args:
        path: The file.
        expect: Settings that its ``spec`` must have, or None to take any.

    Raises:
        ValueError: If the file is missing, damaged, not an artifact, or of other settings.
    """
    path = Path(path).expanduser()
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = json.loads(metadata["provenance"])
        spec = found["spec"]
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
    for key, wanted in (expect or {}).items():
        if spec.get(key) != json.loads(json.dumps(wanted, default=str)):
            raise ValueError(
                f"the artifact {path} must have {key}={wanted!r}, got {spec.get(key)!r}; "
                "fit one for these settings."
            )
    return Artifact(tensors, found, digest, path)
