"""Name the artifacts that ship again, where what names them has changed and what they hold has not.

python tools/restamp_artifacts.py

An artifact is found by its model, settings, calibration and the version of its fit. When one of
these is told in another way, nothing has to be learned anew: this writes each file of
models/tiny/artifacts under its new name, with the digest of the code as it is now, and checks that
its tensors are the same to the last bit. Run ``pytest tests/tools/test_refit.py`` beside it, which
learns a layer of each kind again and compares.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # a bare checkout works too
    sys.path[0] = str(ROOT / ".types")

from hydra.utils import get_class  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from topkbench.harness import artifact  # noqa: E402
from topkbench.harness.cell import artifact_spec, fit_source  # noqa: E402
from topkbench.methods.base import TopKMethod  # noqa: E402
from topkbench.models.load import LoadedModel, load_model  # noqa: E402
from topkbench.tasks.ruler_prompts import CalibrationPrompts  # noqa: E402

ARTIFACTS = ROOT / "models" / "tiny" / "artifacts"
# What an artifact is told by that is no setting of its method.
FACTS = {"method", "model_digest", "fit_version", "dtype", "calibration"}


def method_of(spec: dict[str, Any]) -> TopKMethod:
    """Return the method that learned an artifact, as it was set then."""
    target = OmegaConf.load(ROOT / "conf" / "method" / f"{spec['method']}.yaml")._target_
    kind: Any = get_class(target)
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    return kind(**{name: spec[name] for name in spec.keys() & fields})


def restamp(path: Path, loaded: LoadedModel) -> Path:
    """Write one artifact under the name that it has now; return its path.

    Raises:
        ValueError: If the file is damaged, or was learned with other settings than it would be now.
    """
    old = artifact.load(path)
    told = old.provenance
    method = method_of(told["spec"])
    spec = artifact_spec(loaded, method, CalibrationPrompts()) or {}
    for name in told["spec"].keys() - FACTS:
        if told["spec"][name] != spec.get(name):
            raise ValueError(
                f"{path.name} must be of the settings of now, got {name}={told['spec'][name]!r}"
                f" for {spec.get(name)!r}; fit it again."
            )
    told |= {"spec": spec, "source": fit_source(method)}
    new = artifact.save(ARTIFACTS / artifact.file_name(spec), old.tensors, told)
    if artifact.load(new, expect=spec).digest != old.digest:
        raise ValueError(f"{new.name} must hold the tensors of {path.name}, got others.")
    if new != path:
        path.unlink()
    return new


def main() -> None:
    """Restamp every artifact that ships."""
    loaded = load_model("tiny", "tiny")
    for path in sorted(ARTIFACTS.glob("*.safetensors")):
        new = restamp(path, loaded)
        print(f"{path.name} -> {new.name}: tensors {artifact.load(new).digest[:16]}, unchanged")


if __name__ == "__main__":
    main()
