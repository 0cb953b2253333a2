"""Checks a composed configuration before anything is loaded, and makes the objects it stands for.

What a setting must be is said where it is used: by the annotations of the class or function that
the configuration's ``_target_`` names, and by what its ``__post_init__`` refuses. An error names
the setting as the user writes it.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from topkbench.analysis.record.store import RecordError, check_experiment_name, named_values
from topkbench.harness.calibration import CalibrationTexts
from topkbench.harness.card import Card, ThisDevice
from topkbench.harness.decoding import Question
from topkbench.harness.sweep import message_of
from topkbench.harness.task import Task
from topkbench.kernels.dispatch import Impl, Operator, interpreted, missing
from topkbench.kernels.full_attention.api import Backend, missing_for
from topkbench.methods.base import AnyMethod, Geometry, Policy, check_multiple, check_whole
from topkbench.models.load import Dtype, ModelShape, load_model, read_shape

GROUPS = (
    *("model", "method", "protocol", "task", "calibration"),
    *("search", "launcher", "card", "tracker", "report"),
)
# Groups and settings that no cell depends on: where it runs, where things are kept.
OF_COMMAND = (
    *("search", "launcher", "tracker", "report", "force", "experiment_name", "results_dir"),
    *("cache_dir", "artifact_dir", "prefill_memory_gib", "calibration_memory_gib"),
)
# Settings of the run that only tasks read.
OF_TASKS = ("question", "num_samples")
# What a method's configuration holds for tables and figures; no setting of the method.
RECORDED_APPEARANCE = ("label", "colour")
APPEARANCE = (*RECORDED_APPEARANCE, "words")
# Keys of a node with a target that are Hydra's own.
_OF_HYDRA = {"_target_", "_convert_"}
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_MISSING = "???"
_NOTHING = object()  # where no setting stands
_TOO_LARGE = 2**63  # rows hold whole numbers in 64 bits


class SettingsError(ValueError):
    """A setting that cannot be used; one sentence names it as the user writes it."""


@dataclass(kw_only=True)
class RunSettings:
    """Settings of the whole run, at the top of ``conf/config.yaml``, which says what they mean."""

    k: int
    rbit: int
    seed: int
    question: Question
    num_samples: int
    device: str
    dtype: Dtype
    impl: Impl | Mapping[Operator, Impl]
    force: bool
    full_backend: Backend
    experiment_name: str
    results_dir: str
    cache_dir: str
    artifact_dir: str
    prefill_memory_gib: float
    calibration_memory_gib: float | None

    def __post_init__(self) -> None:
        check_whole("k", self.k)
        check_multiple("rbit", self.rbit, 32)
        check_whole("seed", self.seed, least=0)
        check_whole("num_samples", self.num_samples)
        check_experiment_name(self.experiment_name)
        for name in ("cache_dir", "artifact_dir"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} must not be empty.")
        if self.prefill_memory_gib < 0:
            raise ValueError(
                f"prefill_memory_gib must be at least 0, got {self.prefill_memory_gib}."
            )
        if self.calibration_memory_gib is not None and self.calibration_memory_gib <= 0:
            raise ValueError(
                f"calibration_memory_gib must be above 0, got {self.calibration_memory_gib}."
            )


@dataclass(frozen=True)
class Names:
    """The names of a configuration's settings, as the user writes them.

    Attributes:
        written: The configuration with its references, such as ``${k}``, unresolved.
    """

    written: Mapping[str, Any]

    def name(self, path: str) -> str:
        """Return the setting from which one gets its value: ``k`` for ``protocol.k``."""
        reference = _REFERENCE.fullmatch(str(self._at(path)))
        return path if reference is None else self.name(reference[1])

    def check_references(self) -> None:
        """Check that what a setting refers to is there.

        Raises:
            SettingsError: If it is not.
        """
        for place, value in _leaves(self.written, ""):
            for other in _REFERENCE.findall(value) if isinstance(value, str) else ():
                if other.startswith("."):  # relative to where it stands
                    continue
                found = self._at(other)
                is_ours = other in {one.name for one in dataclasses.fields(RunSettings)}
                if found == _MISSING or (found is _NOTHING and is_ours):
                    raise SettingsError(f"{other} must be given.")
                if found is _NOTHING:
                    raise SettingsError(
                        f"{place} must refer to a setting that there is, got {value!r}."
                    )

    def _at(self, path: str) -> Any:
        value: Any = self.written
        for part in path.split("."):
            value = value.get(part, _NOTHING) if isinstance(value, Mapping) else _NOTHING
        return value


@dataclass(frozen=True)
class Composed:
    """A composed configuration that was checked, and the objects that it stands for.

    Attributes:
        settings: All settings, references resolved, without the method's ``APPEARANCE``.
        appearance: The method's label and colour.
        origin: The arguments of ``of``, with which another process makes the same.
        card: The device that a plan is for.
    """

    settings: dict[str, Any]
    appearance: dict[str, Any]
    origin: tuple[Mapping[str, Any], dict[str, Any], Sequence[str]]
    method: AnyMethod
    policy: Policy
    task: Task
    texts: CalibrationTexts
    search: Any
    launcher: Any
    card: Card | ThisDevice
    tracker: Any
    report: Any

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle plain values alone: objects are made anew where they are used."""
        return Composed.of, self.origin

    @classmethod
    def of(
        cls, written: Mapping[str, Any], settings: dict[str, Any], given: Sequence[str]
    ) -> "Composed":
        """Check a configuration before anything is loaded, and make its objects.

        Args:
            written: The composed configuration, its references unresolved.
            settings: The same, references resolved.
            given: Names of the settings on the command line.

        Raises:
            SettingsError: If a setting is wrong.
        """
        names, origin = Names(written), (written, settings, given)
        check(names, settings)
        _check_effect(written["task"], given)
        appearance = {name: settings["method"].get(name) for name in RECORDED_APPEARANCE}
        settings = {**settings, "method": without_appearance(settings["method"])}
        # The model is loaded when everything else is known to be right.
        made = {
            group: construct(names, group, settings[group]) for group in GROUPS if group != "model"
        }
        # What a plan is for is no setting of the cell.
        settings = {name: value for name, value in settings.items() if name != "card"}
        composed = cls(settings, appearance, origin, *made.values())
        if "k" in given and composed.task.all_budgets:
            way_out = "leave it out"
            if "budget" in settings["task"]:
                way_out = "task.budget=null uses it"
            elif "budgets" in settings["task"]:
                way_out = f"task.budgets=[{settings['k']}] sets the task's own"
            raise SettingsError(
                f"k has no effect with task={composed.task.name} and these settings; {way_out}."
            )
        composed._check_together(names)
        return composed

    def _check_together(self, names: Names) -> None:
        """Check what the model, the task, the method and the policy ask of each other."""
        method, policy = self.method, self.policy
        with naming(names, "model", self.settings["model"]):
            shape = _model_shape(json.dumps(self.settings["model"]))
        with naming(names, "protocol", self.settings["protocol"]):
            policies = [replace(policy, k=k) for k in getattr(self.task, "budgets", [policy.k])]
            if shape is not None:
                policy.resolve_dense_layers(shape.num_layers)
        with naming(names, "method.native", method.native):
            native = method.native_policy(replace(policy, k=sys.maxsize))
            if shape is not None:
                native.resolve_dense_layers(shape.num_layers)
            for one in policies:
                method.resolve(one)
        if shape is not None:
            with naming(names, "task", self.settings["task"]):
                self.task.check_model(shape)
        geometry = self.task.attention(None if shape is None else shape.geometry)
        if geometry is not None:
            _check_supported(names, "method", method, geometry)
        if self.settings["model"].get("device_map") is None:  # else its devices are not known yet
            self._check_device(names)

    def _check_device(self, names: Names) -> None:
        """Check that the named kernels run on the device."""
        device, impl = self.settings["device"].split(":")[0], self.settings["impl"]
        named = (
            {f"impl.{op}": one for op, one in impl.items()}
            if isinstance(impl, dict)
            else {"impl": impl}
        )
        for name, one in named.items():
            needed = missing(one, device, interpreted())
            if needed is not None:
                raise SettingsError(f"{name}={one} needs {needed} use {name}=auto.")
        backend = self.settings["method"].get("backend")
        if not self.method.selects and backend is not None:  # full attention's
            name = names.name("method.backend")
            needed = missing_for(backend, device)
            if needed is not None:
                raise SettingsError(f"{name}={backend} needs {needed} use {name}=sdpa.")

    @property
    def calibration_bytes(self) -> int | None:
        """Limit on captured queries and keys while a method is fitted; None for the default."""
        gib = self.settings["calibration_memory_gib"]
        return None if gib is None else int(gib * 2**30)

    @property
    def named(self) -> dict[str, Any]:
        """The settings that a cell may depend on, by name, such as ``method.page_size``.

        A setting that refers to another one, as ``protocol.k`` to ``k``, is left out.
        """
        refers = {
            name
            for name, one in named_values(self.origin[0]).items()
            if _REFERENCE.fullmatch(str(one))
        }
        of_cell = {name: one for name, one in self.settings.items() if name not in OF_COMMAND}
        return {name: one for name, one in named_values(of_cell).items() if name not in refers}

    @property
    def given(self) -> Sequence[str]:
        """Names of the settings on the command line, and of those that are searched."""
        return [*self.origin[2], *self.search.knobs]

    def check_launcher(self) -> None:
        """Check that the launcher's engine is installed here.

        Raises:
            SettingsError: If it is not.
        """
        with naming(Names({}), "launcher", ()):
            self.launcher.check()

    def check_task_takes_method(self) -> None:
        """Check that the task can be run with the method, rather than compared with it.

        Raises:
            SettingsError: If it cannot.
        """
        shape = _model_shape(json.dumps(self.settings["model"]))
        if shape is not None and shape.geometry is not None:
            with naming(Names({}), "task", ()):
                self.task.check_method(self.method, shape.geometry)


def check(names: Names, settings: Mapping[str, Any]) -> None:
    """Check the names and types of all settings, and the ranges of those of the whole run.

    Args:
        names: The configuration's names.
        settings: The composed configuration, its references resolved, without Hydra's own part.

    Raises:
        SettingsError: If a setting is unknown, missing, or of another type than is declared where
            it is used.
    """
    declared = [one.name for one in dataclasses.fields(RunSettings)]
    run = {name: settings[name] for name in declared if name in settings}
    _check_arguments(names, "", RunSettings, run)
    # An experiment may have settings of its own, to which others refer.
    referred = re.findall(r"\$\{(\w+)", str(names.written))
    for name in settings:
        if name not in {*declared, *GROUPS, *referred}:
            raise _unknown(name, [*declared, *GROUPS], ", and none that refers to it")
    with naming(names, "", declared):
        RunSettings(**run)
    for group in GROUPS:
        node = settings.get(group)
        if not _has_target(node):
            raise SettingsError(f"{group} must be chosen, as in {group}=NAME, got {_shown(node)}.")
        check_node(names, group, node)


def check_node(names: Names, path: str, node: Any) -> None:
    """Check the names and types of the settings of a node with a target, and of those inside it.

    Raises:
        SettingsError: As ``check`` does.
    """
    given = {name: value for name, value in node.items() if name not in _OF_HYDRA}
    if path.startswith("method"):
        for name in RECORDED_APPEARANCE:
            _check_type(names, f"{path}.{name}", str | None, given.pop(name, None))
        _check_type(names, f"{path}.words", Mapping[str, str] | None, given.pop("words", None))
        if not re.fullmatch("#[0-9A-Fa-f]{6}", node.get("colour") or "#000000"):
            raise SettingsError(
                f"{path}.colour must be quoted as in '#D55E00', got {_shown(node['colour'])}."
            )
    _check_arguments(names, path, _target(path, node), given)


def construct(names: Names, path: str, node: Mapping[str, Any], **more: Any) -> Any:
    """Call a node's target with its settings; nodes with a target inside it are called first.

    Args:
        names: The configuration's names.
        path: Where the node stands, such as ``method``.
        node: Its settings, references resolved.
        more: Arguments that are no settings.

    Raises:
        SettingsError: If the target, or one inside it, refuses a setting.
    """
    given = {
        name: construct(names, f"{path}.{name}", value) if _has_target(value) else value
        for name, value in without_appearance(node).items()
        if name not in _OF_HYDRA
    }
    target = _target(path, node)
    with naming(names, path, given):
        return target(**given, **more)


@contextlib.contextmanager
def naming(names: Names, path: str, known: Iterable[str]) -> Iterator[None]:
    """Give errors about settings, raised inside the block, the settings' full names.

    Args:
        names: The configuration's names.
        path: Where the settings stand: empty at the top, else such as ``method.base``.
        known: Their names, with one of which an error may begin: ``rank must be at least 1.``

    Raises:
        SettingsError: Instead of a ValueError or an OSError.
    """
    try:
        yield
    except SettingsError:
        raise
    except (ValueError, OSError, RecordError) as error:
        text = message_of(error)
        first = re.match(r"\w+", text)
        if first is not None and first[0] in known:
            text = names.name(_join(path, first[0])) + text[first.end() :]
        raise SettingsError(text) from error


def without_appearance(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method's settings without its ``APPEARANCE``, and those of a method inside it."""
    return {
        name: without_appearance(value) if _has_target(value) else value
        for name, value in method.items()
        if name not in APPEARANCE
    }


def _check_effect(task: Mapping[str, Any], given: Sequence[str]) -> None:
    """Check that each setting of the run on the command line has an effect on the task."""
    for name in given:
        if name in OF_TASKS and name not in task:
            raise SettingsError(
                f"{name} has no effect with task={task['name']}, which has no such setting; leave"
                " it out."
            )
        own = task.get(name)
        if own not in (None, f"${{{name}}}") and f"task.{name}" not in given:
            raise SettingsError(
                f"{name} has no effect with task={task['name']}, which has a {name} of its own;"
                f" give task.{name} instead."
            )


def _check_supported(names: Names, path: str, method: AnyMethod, geometry: Geometry) -> None:
    """Check the settings of a method, and of one inside it, against a model's geometry.

    What a method cannot do in a model whatever its settings makes a skipped row instead.
    """
    known = [one.name for one in dataclasses.fields(method)]
    reason = method.unsupported_reason(geometry)
    with naming(names, path, known):
        if reason is not None and reason.split()[0] in known:
            raise ValueError(reason)
    base = getattr(method, "base", None)
    if base is not None:
        _check_supported(names, f"{path}.base", base, geometry)


@functools.lru_cache(maxsize=64)
def _model_shape(model: str) -> ModelShape | None:
    """Return a model's shape without loading it; None for a loader outside the repository.

    Args:
        model: Its settings as JSON.
    """
    settings = json.loads(model)
    if settings["_target_"] != f"{load_model.__module__}.{load_model.__name__}":
        return None
    return read_shape(**{name: one for name, one in settings.items() if name not in _OF_HYDRA})


def _has_target(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the values inside mappings and lists, each with the name of its setting."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _leaves(value, _join(path, name))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, path)
    else:
        yield path, node


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _target(path: str, node: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the class or function that a node names."""
    dotted = node["_target_"]
    try:
        module, _, name = dotted.rpartition(".")
        target: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(
            f"{path}._target_ must name a class or function that can be imported, got"
            f" {_shown(dotted)}: {error}."
        ) from error
    return target


@functools.cache
def _declared(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """Return a target's parameters, and their annotations where they can be read."""
    annotated: Any = target
    if isinstance(target, type) and not dataclasses.is_dataclass(target):
        annotated = vars(target).get("__init__", target)
    try:
        hints = typing.get_type_hints(annotated, include_extras=True)
    except (NameError, TypeError, AttributeError):
        hints = {}
    return dict(inspect.signature(target).parameters), hints


def _check_arguments(
    names: Names, path: str, target: Callable[..., Any], given: Mapping[str, Any]
) -> None:
    """Check settings against the parameters of the target that gets them."""
    parameters, hints = _declared(target)
    takes_any = inspect.Parameter.VAR_KEYWORD in {one.kind for one in parameters.values()}
    for name, value in given.items():
        if name not in parameters and not takes_any:
            raise _unknown(_join(path, name), parameters)
        _check_type(names, _join(path, name), hints.get(name, Any), value)
    for name, parameter in parameters.items():
        variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if parameter.default is parameter.empty and not variable and name not in given:
            raise SettingsError(f"{_join(path, name)} must be given.")


def _unknown(name: str, known: Iterable[str], note: str = "") -> SettingsError:
    """Return the error about a setting's full name, given the last parts of those that exist."""
    path, _, last = name.rpartition(".")
    near = difflib.get_close_matches(last, known, n=1)
    guess = f"; did you mean {_join(path, near[0])}" if near else ""
    return SettingsError(f"there is no setting {name}{note}{guess}.")


# Types --------------------------------------------------------------------------------------------


def _check_type(names: Names, path: str, hint: Any, value: Any) -> None:
    """Check a value against an annotation; an object's class is left to whoever gets the object."""
    name = names.name(path)
    if value == _MISSING:
        raise SettingsError(f"{name} must be given.")
    if _has_target(value):
        check_node(names, path, value)
        return
    options = _options(hint)
    for option in options:
        if _fits(option, value):
            if isinstance(value, Mapping):
                _check_entries(names, path, option, value)
            return
    way_out = ""
    if str in options and isinstance(value, int | float):
        way_out = f"""; quotes inside quotes make it text: '{name}="{value}"'"""
    elif int in options and isinstance(value, int) and abs(value) >= _TOO_LARGE:
        way_out = "; rows hold whole numbers in 64 bits"
    elif not isinstance(value, list) and any(_fits(option, [value]) for option in options):
        way_out = f"; brackets make a list: '{name}=[{value}]'"
    words = " or ".join(dict.fromkeys(map(_words, options)))
    raise SettingsError(f"{name} must be {words}, got {_shown(value)}{way_out}.")


def _check_entries(names: Names, path: str, hint: Any, value: Mapping[str, Any]) -> None:
    """Check the names and the values of a mapping."""
    if typing.is_typeddict(hint):
        known = typing.get_type_hints(hint)
    else:
        key, entry = (*typing.get_args(hint), Any, Any)[:2]
        is_closed = typing.get_origin(key) is Literal
        known = dict.fromkeys(typing.get_args(key) if is_closed else value, entry)
    for name, one in value.items():
        place = f"{names.name(path)}.{name}"
        if name not in known:
            raise _unknown(place, known)
        _check_type(names, place, known[name], one)


def _options(hint: Any) -> list[Any]:
    """Return the members of a union, or the annotation itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [one for member in typing.get_args(hint) for one in _options(member)]
    return [hint]


def _item(hint: Any) -> Any:
    """Return the annotation of a sequence's items; None for what is no sequence."""
    origin = typing.get_origin(hint)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return typing.get_args(hint)[0]
    return None


def _is_mapping(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    return typing.is_typeddict(hint) or (isinstance(origin, type) and issubclass(origin, Mapping))


def _fits(hint: Any, value: Any) -> bool:
    """Return whether a plain value is of an annotation's type: true is no 1, and 1.0 is no 1."""
    if typing.get_origin(hint) is Annotated:
        return _fits(typing.get_args(hint)[0], value)
    if typing.get_origin(hint) is Literal:
        return any(type(value) is type(one) and value == one for one in typing.get_args(hint))
    if _is_mapping(hint):
        return isinstance(value, Mapping)
    item = _item(hint)
    if item is not None:
        return isinstance(value, list) and all(
            any(_fits(option, one) for option in _options(item)) for one in value
        )
    if hint in (None, types.NoneType):
        return value is None
    if hint in (bool, str):
        return isinstance(value, hint)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return number and isinstance(value, int) and abs(value) < _TOO_LARGE
    if hint is float:
        return number and math.isfinite(value)
    return True


def _words(hint: Any, plural: bool = False) -> str:
    """Say what an annotation asks for."""
    if typing.get_origin(hint) is Annotated:
        return str(typing.get_args(hint)[1])
    if typing.get_origin(hint) is Literal:
        words = list(map(str, typing.get_args(hint)))
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    if _is_mapping(hint):
        return "a mapping"
    item = _item(hint)
    if item is not None:
        return f"a list of {' or '.join(_words(option, True) for option in _options(item))}"
    names = {
        int: ("a whole number", "whole numbers"),
        float: ("a finite number", "finite numbers"),
        bool: ("true or false", "true or false"),
        str: ("text", "texts"),
    }
    return names[hint][plural] if hint in names else "null"


def _shown(value: Any) -> str:
    """Return a value as YAML has it, shortened."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
