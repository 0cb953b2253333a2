"""Fields of a model's configuration that a user changes, such as the scaling of its positions."""

import copy
from collections.abc import Mapping
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def overridden(config: Any, overrides: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a configuration with some fields changed, and these fields as they are then.

    Raises:
        ValueError: If there is no such field, or it cannot have the value.
    """
    if not overrides:
        return config, {}
    changed = copy.deepcopy(config)
    text = changed.get_text_config(decoder=True)
    known = text.to_dict()
    for name in overrides:
        if name not in known:
            raise ValueError(
                "config_overrides must name fields of the model's configuration, got"
                f" {name!r}, which {type(text).__name__} has not."
            )
    try:
        for name, value in overrides.items():
            setattr(text, name, _merged(getattr(text, name), value))
        if "rope_parameters" in overrides:
            _check_rope(text)
    except Exception as error:  # of the classes that each field's own check raises
        raise ValueError(
            f"config_overrides must be values that the model's configuration can have, got"
            f" {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    return changed, {name: getattr(text, name) for name in overrides}


def _merged(present: Any, value: Any) -> Any:
    """Return a field's new value: of a mapping, the entries that are given are changed."""
    if not isinstance(present, Mapping) or not isinstance(value, Mapping):
        return value
    return {**present, **{name: _merged(present.get(name), one) for name, one in value.items()}}


def _check_rope(config: Any) -> None:
    """Check the scaling of a configuration's rotary positions.

    Raises:
        ValueError: If transformers has no such scaling, or it lacks an entry.
    """
    parameters = config.rope_parameters
    nested = [one for one in parameters.values() if isinstance(one, Mapping)]
    for one in nested or [parameters]:
        kind = one.get("rope_type")
        if kind not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ValueError(f"rope_type must be one of {', '.join(ROPE_INIT_FUNCTIONS)}: {kind!r}")
        if kind != "default" and "factor" not in one and kind != "longrope":
            raise ValueError(f"rope_parameters must have a factor with rope_type={kind}")
    config.standardize_rope_params()
    config.validate_rope()
