"""Fit a method on all layers of a model: captured group by group, distributed over devices."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from topkbench.harness.calibration import Calibration
from topkbench.methods.learning import AnyLearningMethod, LayerStates, Progress, stack_layers


def learning_devices(model_device: torch.device) -> list[torch.device]:
    """Return the devices to fit layers on: all GPUs if the model is on a GPU, else the CPU."""
    if model_device.type != "cuda":
        return [torch.device("cpu")]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def fit_layers(
    method: AnyLearningMethod,
    calibration: Calibration,
    devices: Sequence[torch.device],
    progress: Progress | None = None,
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """Fit a method on every layer of a model.

    The layers of a group are assigned to the devices round-robin, and each device fits its layers
    one after another. A layer's fit does not depend on the other layers, so the result does not
    depend on the devices.

    Args:
        method: The method to fit; it is not changed.
        calibration: The prompts, drawn for the same method.
        devices: Devices to fit on; one may be listed several times.
        progress: Called with the units of work done and their total; a prompt read counts as 1, a
            fitted layer as 100.

    Returns:
        The artifact's tensors, and for each layer the loss at each training step; the losses are
        empty if the method is not trained in steps.

    Raises:
        ValueError: If a layer exceeds the memory limit, or a fitted tensor is not finite.
    """
    groups, num_layers = calibration.groups(), calibration.num_layers
    read, total = 0, len(groups) * len(calibration.prompts) + 100 * num_layers
    fitted: dict[int, dict[str, Tensor]] = {}
    losses: list[list[float]] = [[] for _ in range(num_layers)]
    shares = [0.0] * num_layers
    lock = threading.Lock()

    def report_progress(prompts: int = 0) -> None:
        if progress is not None:
            with lock:
                progress(read + prompts + round(100 * sum(shares)), total)

    def fit_one(captured: dict[int, LayerStates], layer: int, device: torch.device) -> None:
        def report_loss(step: int, steps: int, loss: float) -> None:
            losses[layer].append(loss)
            shares[layer] = step / steps
            report_progress()

        states = [(queries.to(device), keys.to(device)) for queries, keys in captured.pop(layer)]
        fitted[layer] = method.fit_layer(layer, states, report_loss)
        shares[layer] = 1.0
        report_progress()

    def fit_several(
        captured: dict[int, LayerStates], layers: Sequence[int], device: torch.device
    ) -> None:
        for layer in layers:
            fit_one(captured, layer, device)

    for group in groups:
        captured = calibration.capture(group, lambda done, _: report_progress(done))
        read += len(calibration.prompts)
        if len(devices) == 1:
            fit_several(captured, group, devices[0])
        else:
            assigned = [group[first :: len(devices)] for first in range(len(devices))]
            with ThreadPoolExecutor(len(devices)) as pool:
                list(pool.map(fit_several, [captured] * len(devices), assigned, devices))

    tensors = stack_layers([fitted[layer] for layer in range(num_layers)])
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{method.name} must learn finite values, got infinity or NaN in {name}; a smaller"
                " learning rate may help."
            )
    return tensors, losses
