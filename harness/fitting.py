"""Fit a method on all layers of a model: captured group by group, distributed over devices."""

import contextlib
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topkbench.harness import artifact
from topkbench.harness.calibration import Calibration, CapturedStates
from topkbench.methods.learning import AnyLearningMethod, LayerStates, Progress, stack_layers


def learning_devices(model_device: torch.device) -> list[torch.device]:
    """Return the devices to fit layers on: all GPUs if the model is on a GPU, else the CPU."""
    if model_device.type != "cuda":
        return [torch.device("cpu")]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


class KeptLayers:
    """The layers that a fit has finished, each a file, so that a killed fit goes on after them.

    Args:
        folder: The fit's own folder.
        spec: The settings that identify the artifact.
        source: Digest of the code that fits; layers of other code are not used.
    """

    def __init__(self, folder: Path, spec: Mapping[str, Any], source: str) -> None:
        self._folder = folder
        self._expect = {**spec, "source": source, "torch": torch.__version__}
        self._began = time.perf_counter()
        self._seconds_before = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the fit so far, those before it was killed included."""
        return self._seconds_before + time.perf_counter() - self._began

    def read(self, layer: int) -> tuple[dict[str, Tensor], list[float]] | None:
        """Return a layer's tensors and its losses; None if it is not there or damaged."""
        try:
            found = artifact.load(self._path(layer), self._expect)
            losses, seconds = found.provenance["losses"], float(found.provenance["seconds"])
        except (ValueError, KeyError, TypeError):
            return None
        self._seconds_before = max(self._seconds_before, seconds)
        return found.tensors, losses

    def write(self, layer: int, tensors: Mapping[str, Tensor], losses: Sequence[float]) -> None:
        """Keep a layer.

        Raises:
            NotWritableError: If the folder cannot be written.
        """
        fit = {"spec": self._expect, "losses": list(losses), "seconds": self.seconds}
        artifact.save(self._path(layer), tensors, fit)

    def remove(self) -> None:
        """Delete all layers."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._folder)

    def _path(self, layer: int) -> Path:
        return self._folder / f"layer_{layer}.safetensors"


def fit_layers(
    method: AnyLearningMethod,
    calibration: Calibration,
    devices: Sequence[torch.device],
    progress: Progress | None = None,
    kept: KeptLayers | None = None,
    states: CapturedStates | None = None,
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """Fit a method on the layers of a model that a calibration names.

    The layers of a group are assigned to the devices round-robin, and each device fits its layers
    one after another. A layer's fit does not depend on the other layers, so the result does not
    depend on the devices.

    Args:
        method: The method to fit; it is not changed.
        calibration: The prompts, drawn for the same method.
        devices: Devices to fit on; one may be listed several times.
        progress: Called with the units of work done and their total, when a prompt was read, which
            counts as none, and when a layer's fit goes on; a fitted layer counts as 100.
        kept: Keeps the layers as they are finished, and has those of a fit that was killed.
        states: Keeps what the model's layers receive of the prompts, for fits that follow.

    Returns:
        The artifact's tensors, and for each layer the loss at each training step; the losses are
        empty if the method is not trained in steps.

    Raises:
        ValueError: If a layer exceeds the memory limit, or a fitted tensor is not finite.
    """
    num_layers, layers = calibration.num_layers, calibration.layers
    fitted: dict[int, dict[str, Tensor]] = {}
    losses: list[list[float]] = [[] for _ in range(num_layers)]
    shares = [0.0] * num_layers
    for layer in layers:
        found = None if kept is None else kept.read(layer)
        if found is not None:
            (fitted[layer], losses[layer]), shares[layer] = found, 1.0
    to_fit = [[one for one in group if one not in fitted] for group in calibration.groups()]
    groups = [group for group in to_fit if group]
    lock = threading.Lock()

    def report_progress() -> None:
        if progress is not None:
            with lock:
                progress(round(100 * sum(shares)), 100 * len(layers))

    def fit_one(captured: dict[int, LayerStates], layer: int, device: torch.device) -> None:
        def report_loss(step: int, steps: int, loss: float) -> None:
            losses[layer].append(float(f"{loss:.6g}"))  # a file has thousands, as text
            shares[layer] = step / steps
            report_progress()

        states = [(queries.to(device), keys.to(device)) for queries, keys in captured.pop(layer)]
        fitted[layer] = method.fit_layer(layer, states, report_loss)
        if kept is not None:
            kept.write(layer, fitted[layer], losses[layer])
        shares[layer] = 1.0
        report_progress()

    def fit_several(
        captured: dict[int, LayerStates], layers: Sequence[int], device: torch.device
    ) -> None:
        for layer in layers:
            fit_one(captured, layer, device)

    for group in groups:
        captured = calibration.capture(group, lambda *_: report_progress(), states)
        if len(devices) == 1:
            fit_several(captured, group, devices[0])
        else:
            assigned = [group[first :: len(devices)] for first in range(len(devices))]
            with ThreadPoolExecutor(len(devices)) as pool:
                list(pool.map(fit_several, [captured] * len(devices), assigned, devices))

    tensors = stack_layers(fitted, num_layers)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            if kept is not None:  # it would not be finite the next time either
                kept.remove()
            raise ValueError(
                f"{method.name} must learn finite values, got infinity or NaN in {name}; a smaller"
                " learning rate may help."
            )
    return tensors, losses
