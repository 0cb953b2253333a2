"""Lets a method learn a model's layers: captured group by group, spread over the devices."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from topkbench.harness.calibration import Calibration
from topkbench.methods.base import LayerStates, Progress, TopKMethod, stack_layers


def learning_devices(model_device: torch.device) -> list[torch.device]:
    """Return where layers are learned: on every accelerator if the model runs on one, else here."""
    if model_device.type != "cuda":
        return [torch.device("cpu")]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def fit_layers(
    method: TopKMethod,
    calibration: Calibration,
    devices: Sequence[torch.device],
    progress: Progress | None = None,
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """Let a method learn every layer of a model.

    The layers of a group are dealt to the devices in turn, and each device learns its own one after
    another; what a layer learns does not depend on the others, so neither does the result.

    Args:
        method: Learns; it is not changed.
        calibration: The prompts, of the same method.
        devices: Where layers are learned; one may stand several times.
        progress: Called with units of work done and in all: prompts read, and hundredths of layers.

    Returns:
        The artifact's tensors, and the loss at each step of each layer; a method that takes no
        steps has no losses.

    Raises:
        ValueError: If a layer exceeds the memory limit, or what was learned is not finite.
    """
    groups, num_layers = calibration.groups(), calibration.num_layers
    read, total = 0, len(groups) * len(calibration.prompts) + 100 * num_layers
    fitted: dict[int, dict[str, Tensor]] = {}
    losses: list[list[float]] = [[] for _ in range(num_layers)]
    shares = [0.0] * num_layers
    turn = threading.Lock()

    def tell(prompts: int = 0) -> None:
        if progress is not None:
            with turn:
                progress(read + prompts + round(100 * sum(shares)), total)

    def learn(held: dict[int, LayerStates], layer: int, device: torch.device) -> None:
        def report(step: int, steps: int, loss: float) -> None:
            losses[layer].append(loss)
            shares[layer] = step / steps
            tell()

        states = [(queries.to(device), keys.to(device)) for queries, keys in held.pop(layer)]
        fitted[layer] = method.fit_layer(layer, states, report)
        shares[layer] = 1.0
        tell()

    def learn_all(
        held: dict[int, LayerStates], layers: Sequence[int], device: torch.device
    ) -> None:
        for layer in layers:
            learn(held, layer, device)

    for group in groups:
        held = calibration.capture(group, lambda done, _: tell(done))
        read += len(calibration.prompts)
        if len(devices) == 1:
            learn_all(held, group, devices[0])
        else:
            dealt = [group[place :: len(devices)] for place in range(len(devices))]
            with ThreadPoolExecutor(len(devices)) as pool:
                list(pool.map(learn_all, [held] * len(devices), dealt, devices))

    tensors = stack_layers([fitted[layer] for layer in range(num_layers)])
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{method.name} must learn finite values, got infinity or NaN in {name}; a smaller"
                " learning rate may help."
            )
    return tensors, losses
