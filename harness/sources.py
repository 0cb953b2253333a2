"""Digests of the code that computed a result: the files of modules and all that they import."""

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
# The folders whose code affects results; analysis, tools and tests do not.
FOLDERS = ("kernels", "methods", "models", "harness", "tasks")


def code_digest(
    modules: Iterable[str],
    folders: Collection[str] = FOLDERS,
    without: Collection[str] = (),
) -> str:
    """Return a digest of the sources of modules and of all that they import; 16 hex digits.

    Imports are followed within topkbench's folders and into files that are not part of an installed
    library: a method in a user's folder, and all modules loaded from that folder, however they were
    imported. Data files do not count. Each file is read once per process.

    Args:
        modules: Dotted names of imported modules. If one is in an installed package, its imports
            within that package are followed, too.
        folders: The folders of topkbench that are followed.
        without: Modules to leave out, with all that only they import.
    """
    pending = list(modules)
    named_packages = {name.partition(".")[0] for name in pending}
    files: dict[str, Path] = {}
    while pending:
        name = pending.pop()
        path = (
            None
            if not name or name in files or name in without
            else _file(name, name.partition(".")[0] in named_packages)
        )
        if path is None or (name.startswith(f"{PACKAGE}.") and name.split(".")[1] not in folders):
            continue
        files[name] = path
        # Importing a module also runs its package.
        package = name.rpartition(".")[0]
        pending += [*_source(path, name)[1], package]
        if path.parent.parent == ROOT / "kernels" and path.name == "api.py":
            # The files beside an operator's api are its implementations: kernels/dispatch.py
            # imports the one that it chooses by a name computed at run time.
            pending += [f"{package}.{beside.stem}" for beside in path.parent.glob("*.py")]
    outside = {path.parent for path in files.values() if not path.is_relative_to(ROOT)}
    for name, path in _loaded_from(outside).items():
        files.setdefault(name, path)
    text = "".join(f"{name} {_source(files[name], name)[0]}\n" for name in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _loaded_from(folders: Collection[Path]) -> dict[str, Path]:
    """Return the files of all modules that were loaded from the folders, by module name."""
    if not folders:
        return {}
    loaded = [(name, getattr(one, "__file__", None)) for name, one in list(sys.modules.items())]
    files = {name: Path(file) for name, file in loaded if file}
    return {
        name: path
        for name, path in files.items()
        if path.suffix == ".py" and path.parent in folders
    }


def modules_of(*objects: object) -> set[str]:
    """Return the modules of objects whose class is, or derives from, a class of topkbench.

    Objects in their attributes are included, such as a method inside a method.
    """
    modules: set[str] = set()
    pending, visited = list(objects), dict[int, object]()
    while pending:
        one = pending.pop()
        if id(one) in visited:
            continue
        visited[id(one)] = one
        if isinstance(one, dict):
            pending += one.values()
        elif isinstance(one, list | tuple):
            pending += one
        elif any(kind.__module__.startswith(f"{PACKAGE}.") for kind in type(one).__mro__):
            modules.add(type(one).__module__)
            pending += vars(one).values() if hasattr(one, "__dict__") else ()
    return modules


@functools.cache
def _source(path: Path, name: str) -> tuple[str, tuple[str, ...]]:
    """Return the sha256 of a file, and the names that it imports, at any place in it."""
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
def _file(name: str, even_if_installed: bool) -> Path | None:
    """Return a module's file, or None if it has none or belongs to Python or an installed library.

    Args:
        name: Dotted name.
        even_if_installed: Return the file even if it belongs to an installed library.
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
    if spec is None or (not even_if_installed and _is_library(spec)):
        return None
    for depth in range(len(rest)):  # find_spec of a dotted name would import its packages
        if spec is None or spec.submodule_search_locations is None:
            return None
        inner = ".".join([top, *rest[: depth + 1]])
        spec = PathFinder.find_spec(inner, spec.submodule_search_locations)
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _is_library(spec: ModuleSpec) -> bool:
    """Return whether a package is installed, that is, lies beside ``*.dist-info`` folders."""
    folders = [Path(location).parent for location in spec.submodule_search_locations or ()]
    if spec.has_location and spec.origin and not folders:
        folders = [Path(spec.origin).parent]
    return not folders or any(_has_installed(folder) for folder in folders)


@functools.cache
def _has_installed(folder: Path) -> bool:
    return any(folder.glob("*.dist-info"))
