"""Run one cell: a model, a task and a method, whose artifact is fitted first if it is missing."""

import contextlib
import functools
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from topkbench.harness import artifact
from topkbench.harness.artifact import Artifact
from topkbench.harness.caching import cache_lock
from topkbench.harness.calibration import Calibration, CalibrationTexts, CapturedStates
from topkbench.harness.canary import check_acting
from topkbench.harness.fitting import KeptLayers, fit_layers, learning_devices
from topkbench.harness.huge_pages import has_huge_pages
from topkbench.harness.reads import layers_read
from topkbench.harness.sources import code_digest, modules_of
from topkbench.harness.sweep import outcome_of
from topkbench.harness.task import Context, Outcome, Task, TaskRow
from topkbench.kernels.timing import machine_name, versions
from topkbench.methods.base import PREVIOUS_QUERY, AnyMethod, Policy, TopKMethod
from topkbench.methods.learning import LearningMethod, Progress, check_artifact
from topkbench.models import speculation
from topkbench.models.attach import geometry_of
from topkbench.models.load import LoadedModel


def artifact_spec(
    loaded: LoadedModel, method: AnyMethod, texts: CalibrationTexts
) -> dict[str, Any] | None:
    """Return the settings that identify a method's artifact, or None if the method learns nothing.

    They are the model's weights and dtype, the tokens of the calibration texts, and the method's
    settings and fit version.
    """
    if not isinstance(method, LearningMethod):
        return None
    spec = method.artifact_spec(geometry_of(loaded.model, loaded.digest))
    if spec is None:
        return None
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return {**spec, "dtype": dtype, "calibration": Calibration.draw(loaded, method, texts).digest}


def layers_to_fit(loaded: LoadedModel, method: AnyMethod, policy: Policy | None) -> list[int]:
    """Return the layers in which a method selects; all global ones without a policy."""
    effective = None if policy is None else method.resolve(policy)[1]
    return geometry_of(loaded.model).sparse_layers(effective)


def fit_source(method: AnyMethod) -> str:
    """Return the digest of the code that fits a method, without the code that all methods share."""
    shared = [TopKMethod.__module__, LearningMethod.__module__]
    return code_digest(modules_of(method), folders=("methods",), without=shared)


def prepare_method(
    loaded: LoadedModel,
    method: AnyMethod,
    texts: CalibrationTexts,
    artifact_dir: str | Path,
    progress: Progress | None = None,
    memory_limit: int | None = None,
    refit: bool = False,
    policy: Policy | None = None,
    states: CapturedStates | None = None,
) -> Artifact | None:
    """Load the artifact that a method needs; what it lacks is fitted first, under a lock.

    Only the layers in which the method selects are fitted. Those that a later cell needs besides
    are added to the same file.

    Args:
        loaded: The model.
        method: The method into which the artifact is loaded.
        texts: The texts that the method is fitted on.
        artifact_dir: Folder of fitted artifacts; searched before the shipped ones.
        progress: Called with the units of work done and their total while fitting.
        memory_limit: Bytes of queries and keys that a fit may keep in memory; see ``Calibration``.
        refit: Fit even if there is an artifact, and replace the one in ``artifact_dir``.
        policy: The cell's policy, which may keep layers dense; None for one that keeps none.
        states: Keeps what the model's layers receive of the texts, for fits that follow.

    Returns:
        The artifact, of the layers in which the method selects; None if it learns nothing, or
        cannot run in the model.

    Raises:
        ValueError: If the artifact is damaged or was fitted with other settings.
    """
    spec = artifact_spec(loaded, method, texts)
    if spec is None or not isinstance(method, LearningMethod):
        return None
    geometry = geometry_of(loaded.model, loaded.digest)
    effective = None if policy is None else method.resolve(policy)[1]
    layers = layers_to_fit(loaded, method, policy)
    if not layers or method.unsupported_reason(geometry, effective) is not None:
        return None
    if _speculation_unsupported_reason(loaded, method) is not None:
        return None
    folder = Path(artifact_dir).expanduser()
    learned = None
    if not refit:
        learned = artifact.find(spec, (folder, *artifact.SHIPPED), layers)
    if learned is None:
        path = folder / artifact.file_name(spec)
        with cache_lock(path.with_suffix(".lock")):
            before = None if refit else artifact.find(spec, (folder,))
            if before is None or not before.layers.issuperset(layers):
                wanted = layers
                if before is not None and not _can_be_extended(before, method):
                    wanted, before = sorted({*layers, *before.layers}), None
                calibration = Calibration.draw(loaded, method, texts, memory_limit, wanted)
                fit_method(calibration, path, spec, texts.seed, before, progress, refit, states)
            learned = artifact.load(path, expect=spec)
            learned = replace(learned, fitted=before is None)
    learned = learned.of_layers(layers)
    method.load_artifact(learned.tensors, learned.digest)
    check_artifact(method, geometry, layers)
    return learned


def _can_be_extended(learned: Artifact, method: AnyMethod) -> bool:
    """Return whether layers may be added: those of a file are fitted by the same code and torch."""
    provenance = learned.provenance
    same_torch = provenance.get("versions", {}).get("torch") == torch.__version__
    return same_torch and provenance.get("source") == fit_source(method)


def fit_method(
    calibration: Calibration,
    path: Path,
    spec: Mapping[str, Any],
    seed: int | None,
    before: Artifact | None = None,
    progress: Progress | None = None,
    refit: bool = False,
    states: CapturedStates | None = None,
) -> None:
    """Fit a method on calibration texts and save the artifact of ``spec`` at ``path``.

    Each layer is kept beside it until the whole is there, so that a fit that is killed goes on.

    Args:
        calibration: The texts, the method and the layers to fit.
        path: The file.
        spec: The settings that identify the artifact.
        seed: Seed of the texts.
        before: What was learned of other layers, which the file keeps.
        progress: Called with the units of work done and their total.
        refit: Fit layers again that a fit that was killed has finished.
        states: See `CapturedStates`.
    """
    method, loaded = calibration.method, calibration.loaded
    source = fit_source(method)
    if before is not None:
        missing = [layer for layer in calibration.layers if layer not in before.layers]
        calibration = replace(calibration, layers=missing)
    kept = KeptLayers(path.with_suffix(".layers"), spec, source)
    if refit:
        kept.remove()
    devices = learning_devices(loaded.model.device)
    tensors, losses = fit_layers(method, calibration, devices, progress, kept, states)
    seconds = kept.seconds
    if before is not None:
        for layer in before.layers:
            losses[layer] = before.provenance["losses"][layer]
            for name, tensor in tensors.items():
                tensor[layer] = before.tensors[name][layer]
        seconds += before.provenance["seconds"]
    provenance = artifact.provenance(
        spec,
        calibration.description,
        seed,
        model=loaded.name,
        machine=machine_name(loaded.model.device),
        source=source,
        seconds=seconds,
        losses=losses,
    )
    artifact.save(path, tensors, provenance)
    kept.remove()


def run_cell(context: Context, task: Task) -> Outcome:
    """Run one cell; failures that are not program errors become rows.

    If the method does not support the model or the policy, the cell is ``skipped`` before the task
    computes anything. If decode steps did not all go through the method, it is ``wrong``; if memory
    runs out, ``out_of_memory``. Any other exception propagates.
    """
    reset_peak_memory(context.loaded.model.device)
    try:
        ready = checked_context(context, task)
        return ready if isinstance(ready, Outcome) else task.run(ready)
    except Exception as error:
        return outcome_of(error)


def checked_context(context: Context, task: Task) -> Context | Outcome:
    """Return a cell's context with the method as it acts, or its rows if it cannot run.

    Raises:
        MethodBypassedError: If what a method selects does not reach the model's logits.
    """
    reason = unsupported_reason(context, task)
    if reason is not None:
        return Outcome([TaskRow("mean", status="skipped", reason=reason)], [])
    context = replace(context, method=context.resolved()[0])
    check_acting(context)
    return context


def unsupported_reason(context: Context, task: Task) -> str | None:
    """Return why a method cannot run in a model under a policy, in one sentence; None if it can."""
    method, policy = context.method, context.effective_policy
    reason = method.unsupported_reason(context.geometry, policy)
    if reason is None and task.uses_model and method.selects and not layers_read(context, 1)[0]:
        reason = (
            f"at least one layer must be left to {method.name}, but the policy and the design of "
            f"{context.loaded.name} keep all of them dense."
        )
    if reason is None and task.uses_model:
        reason = _speculation_unsupported_reason(context.loaded, method)
    return reason


def _speculation_unsupported_reason(loaded: LoadedModel, method: AnyMethod) -> str | None:
    """Return why a model's queries cannot be speculated; None if they can or need not be."""
    if PREVIOUS_QUERY not in method.traits.needs:
        return None
    return speculation.unsupported_reason(loaded.model)


def environment(loaded: LoadedModel) -> dict[str, Any]:
    """Return the columns of a row that describe machine and libraries."""
    return {
        "device": machine_name(loaded.model.device),
        "threads": torch.get_num_threads(),
        "huge_pages": has_huge_pages(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "driver": versions()["driver"],
        **libraries(),
    }


@functools.cache
def libraries() -> Mapping[str, str | None]:
    """Return the versions of the libraries that results depend on; None if not installed."""
    installed: dict[str, str | None] = {}
    for name in ("torch", "numba", "triton", "transformers", "tokenizers", "numpy"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = None
    return installed


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory of the accelerator or process since ``reset_peak_memory``, in MiB."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    peak = re.search(r"VmHWM:\s*(\d+) kB", _read(Path("/proc/self/status")))
    if peak is not None:
        return int(peak[1]) / 1024
    windows = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if windows is not None:
        return int(windows) / 2**20
    import resource  # which Windows has not

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak memory, so that each cell reports its own peak.

    For a CPU this works on Linux only; elsewhere the peak is that of the whole process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets the peak


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
