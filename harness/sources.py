"""Digests of the code that a result was computed by: the files of a module and all it imports."""

import ast
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Collection, Iterable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

PACKAGE = "topkbench"
ROOT = Path(__file__).resolve().parents[1]
# The folders whose code computes; what reads results, or tests them, changes none.
FOLDERS = ("kernels", "methods", "models", "harness", "tasks")


def code_digest(
    modules: Iterable[str],
    folders: Collection[str] = FOLDERS,
    without: Collection[str] = (),
) -> str:
    """Return 16 hex digits of the sources of some modules and of whatever they import.

    Imports are followed into topkbench's own folders, and elsewhere into all that is no installed
    library: a method that stands in a user's folder, and what it imports from there, by whatever
    means. Files that are no code do not count. A file is read once a process.

    Args:
        modules: Dotted names of modules that are imported; of an installed package, all that it
            holds itself counts.
        folders: The folders of topkbench that are followed.
        without: Modules that are left out, with what they alone import.
    """
    waiting = list(modules)
    own = {name.partition(".")[0] for name in waiting}
    found: dict[str, Path] = {}
    while waiting:
        name = waiting.pop()
        path = (
            None
            if not name or name in found or name in without
            else _file(name, name.partition(".")[0] in own)
        )
        if path is None or (name.startswith(f"{PACKAGE}.") and name.split(".")[1] not in folders):
            continue
        found[name] = path
        # A package runs whenever a module in it is imported.
        waiting += [*_source(path, name)[1], name.rpartition(".")[0]]
    outside = {path.parent for path in found.values() if not path.is_relative_to(ROOT)}
    for name, path in _loaded_from(outside).items():
        found.setdefault(name, path)
    text = "".join(f"{name} {_source(found[name], name)[0]}\n" for name in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _loaded_from(folders: Collection[Path]) -> dict[str, Path]:
    """Return the files of modules that were loaded from some folders, however they were named."""
    loaded = [(name, getattr(one, "__file__", None)) for name, one in list(sys.modules.items())]
    files = {name: Path(file) for name, file in loaded if file}
    return {
        name: path
        for name, path in files.items()
        if path.suffix == ".py" and path.parent in folders
    }


def modules_of(*objects: object) -> set[str]:
    """Return the modules of methods, tasks and other objects of topkbench's, or derived from them.

    Those that such an object holds count, too: a method inside a method.
    """
    found: set[str] = set()
    waiting, seen = list(objects), dict[int, object]()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        if isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
        elif any(kind.__module__.startswith(f"{PACKAGE}.") for kind in type(one).__mro__):
            found.add(type(one).__module__)
            waiting += vars(one).values() if hasattr(one, "__dict__") else ()
    return found


@functools.cache
def _source(path: Path, name: str) -> tuple[str, tuple[str, ...]]:
    """Return the sha256 of a file, and the names of what it imports, wherever in it."""
    content = path.read_bytes()
    imports = tuple(_imports(content, path, name)) if path.suffix == ".py" else ()
    return hashlib.sha256(content).hexdigest(), imports


def _imports(content: bytes, path: Path, name: str) -> Iterator[str]:
    # The package that a relative import starts from.
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)  # it may be a module


@functools.cache
def _file(name: str, owned: bool) -> Path | None:
    """Return a module's file; None if there is none, or it is of Python or an installed library.

    Args:
        name: Dotted name.
        owned: Follow it even if it is installed.
    """
    top, *rest = name.split(".")
    if top in sys.stdlib_module_names:
        return None
    if top == PACKAGE:
        path = ROOT.joinpath(*rest).with_suffix(".py")
        return path if rest and path.is_file() else None
    try:
        spec: ModuleSpec | None = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or (not owned and _is_library(spec)):
        return None
    for place in range(len(rest)):  # without importing a package on the way
        if spec is None or spec.submodule_search_locations is None:
            return None
        inner = ".".join([top, *rest[: place + 1]])
        spec = PathFinder.find_spec(inner, spec.submodule_search_locations)
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _is_library(spec: ModuleSpec) -> bool:
    """Whether a package is where an installer puts packages, with notes on each beside them."""
    places = [Path(place).parent for place in spec.submodule_search_locations or ()]
    if spec.has_location and spec.origin and not places:
        places = [Path(spec.origin).parent]
    return not places or any(_has_installed(place) for place in places)


@functools.cache
def _has_installed(folder: Path) -> bool:
    return any(folder.glob("*.dist-info"))
