"""Checkpoints with quantised weights: how they are stored, and what loading them here needs."""

import copy
from dataclasses import dataclass
from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer


@dataclass(frozen=True)
class Quantised:
    """How a checkpoint's weights are stored.

    Attributes:
        method: transformers' name of it: ``"fp8"``, ``"mxfp4"``, ``"bitsandbytes"``, ...
        dequantised: Whether transformers makes plain numbers of them when it loads them here.
    """

    method: str
    dequantised: bool

    def __str__(self) -> str:
        """The method as a row's model has it: ``fp8``, or ``fp8 dequantised``."""
        return self.method + " dequantised" * self.dequantised


def quantised(config: Any, device_map: Any) -> Quantised | None:
    """Return how a checkpoint's weights are stored; None if they are plain numbers.

    Args:
        config: The model's configuration.
        device_map: As it is passed to transformers.

    Raises:
        ValueError: If transformers does not know the method, or a package or a device that it
            needs is missing; one sentence says which.
    """
    given = stored_as(config)
    if given is None:
        return None
    method = str(given.get("quant_method", "unknown"))
    try:
        # Transformers skips what it does not know with a warning, and the weights would not fit.
        if not AutoHfQuantizer.supports_quant_method(given):
            raise ValueError("transformers has no such method")
        settings: Any = AutoHfQuantizer.merge_quantization_configs(copy.deepcopy(given), None)
        if device_map == {"": "cpu"} and hasattr(settings, "dequantize"):
            settings.dequantize = True  # whether or not there is a GPU besides
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantizer.validate_environment(device_map=device_map, weights_only=True)
    except Exception as error:  # of the classes that the methods raise
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ValueError(
            f"the weights are quantised by {method}, and cannot be loaded here: {reason}; do what"
            " it says, or name a model that is not quantised."
        ) from error
    # Some methods say it in their settings, once they have seen the device.
    return Quantised(method, bool(getattr(quantizer.quantization_config, "dequantize", False)))


def dequantising(config: Any) -> Any:
    """Return a configuration with which transformers makes plain numbers of quantised weights."""
    changed = copy.deepcopy(config)
    changed.quantization_config = {**(stored_as(config) or {}), "dequantize": True}
    return changed


def stored_as(config: Any) -> dict[str, Any] | None:
    """Return a configuration's settings of quantisation, or None."""
    for one in (config, config.get_text_config(decoder=True)):
        given = getattr(one, "quantization_config", None)
        if given is not None:
            return dict(given if isinstance(given, dict) else given.to_dict())
    return None
