"""The methods as the bench and the GPU check time them: found in ``methods/``, at their defaults.

These are the classes' own defaults, so that neither Hydra nor a YAML file is needed; the tests hold
them equal to ``conf/method/``.
"""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from topkbench.harness.layer import Layer, budget, fitted_on
from topkbench.harness.outcome import Unavailable
from topkbench.harness.planted import PlantedCalibration, PlantedStates, drawn_capture
from topkbench.methods import base
from topkbench.methods.base import PREFILL_NEEDS, AnyMethod, Geometry, Policy, TopKMethod

# A step takes the same time whatever was learned, so nothing is trained for long: HATA's weights
# are drawn, and HashAttention's networks take one step. What others learn takes no time.
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "hata": {"weights": "random"},
    "hash_attention": {"steps": 1},
}
_BASES = {"twilight": "quest"}
_VARIANTS = {"hata_integer": ("hata", {"use_norm": False})}
FIRST = ("hata_integer", "hata", "exact", "quest", "loki", "streaming_llm")
"""The methods that are timed first, most important first."""


@cache
def classes() -> dict[str, type[AnyMethod]]:
    """Return the class of every method in ``methods/``, by the method's name."""
    found: dict[str, type[AnyMethod]] = {}
    for path in sorted(Path(base.__file__).parent.glob("*.py")):
        module = import_module(f"topkbench.methods.{path.stem}")
        for value in vars(module).values():
            if not inspect.isclass(value) or not issubclass(value, TopKMethod):
                continue
            is_own = value.__module__ == module.__name__
            # An abstract class is no method, nor is one without a name of its own.
            if is_own and not inspect.isabstract(value) and "name" in vars(value):
                found[value.name] = value
    return found


@cache
def names() -> tuple[str, ...]:
    """Return the names of the methods that are timed, in that order.

    They are all that have a default for every setting, and HATA with integer scores.
    """
    first = ("full", *FIRST)
    made = {name for name, kind in classes().items() if name in _BASES or _has_defaults(kind)}
    return (*first, *sorted({*made, *_VARIANTS} - {*first}))


def _has_defaults(kind: type[AnyMethod]) -> bool:
    settings = [one for one in fields(kind) if one.init]
    return all(one.default_factory is not MISSING or one.default is not MISSING for one in settings)


def make(name: str, **settings: Any) -> AnyMethod:
    """Return a method, or HATA with integer scores, with the class's defaults.

    Args:
        name: One of `names`.
        settings: Other values than the defaults; those that the method does not have are ignored.
    """
    method_name, own = _VARIANTS.get(name, (name, {}))
    made = classes()[method_name]
    settings = {one: settings[one] for one in settings if one in {f.name for f in fields(made)}}
    if method_name in _BASES:
        settings["base"] = make(_BASES[method_name])
    return made(**{**_SETTINGS.get(method_name, {}), **own, **settings})


def columns(method: AnyMethod) -> dict[str, Any]:
    """Return a row's columns that distinguish a method from its variants."""
    found = {"method": method.name}
    for column, setting in (("rbit", "rbit"), ("p_use_norm", "use_norm")):
        if hasattr(method, setting):
            found[column] = getattr(method, setting)
    return found


def layer_of(method: AnyMethod, geometry: Geometry, states: PlantedStates) -> Layer:
    """Return a method's layer over drawn states, on which it is fitted if it must be.

    The policy is that of ``protocol=unified``, with the budget of `budget`.

    Raises:
        Unavailable: If the method does not support the geometry or the policy.
    """
    method = fitted_on(method, geometry, PlantedCalibration.of(states))
    method, policy = method.resolve(Policy(k=budget(states.key_states.shape[2])))
    reason = method.unsupported_reason(geometry, policy)
    if reason is not None:
        raise Unavailable(reason)
    needs = method.traits.needs & PREFILL_NEEDS
    captured = drawn_capture(needs, states.key_states[:, :, :-1], geometry.num_heads)
    return Layer(method, policy, states, captured=captured)
