"""Compile the CPU operators' entry points, and cache their machine code between processes.

Numba's own cache checks only the file that a function is defined in. Functions that it calls in
other files are compiled into it, and an edit to those goes unnoticed. Here machine code is kept in
a folder named by a digest of everything that it depends on: the sources of all kernels, the
versions of Python, numba, llvmlite and numpy, and numba's settings. Each file in it is named by the
function, the types of its arguments and the processor, and begins with a digest of its content.

Numba distinguishes functions of the same name and type (here: those that a factory makes for one,
two and four queries) by a number that counts up from 1 in every process, in the order of
compilation. If cached code of two processes is loaded into one, the linker takes equal names for
the same function, so that a kernel would call another one's helper. Therefore each process starts
to count at a random number, a forked one too.

The folder is ``numba/`` in ``TOPKBENCH_CACHE`` or ``~/.cache/topkbench``, or ``topkbench/`` in
``NUMBA_CACHE_DIR`` if that is set.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import secrets
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba import config, njit
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

_KERNELS = Path(__file__).parent
# Settings that change what numba compiles; the processor is part of each file's name.
_SETTINGS = (
    *("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "ENABLE_AVX", "USING_SVML"),
    *("BOUNDSCHECK", "DEBUGINFO_DEFAULT"),
)
_UNUSED_SECONDS = 30 * 24 * 3600  # after which unused machine code is removed


def _count_from_a_random_number() -> None:
    FunctionIdentity._unique_ids = itertools.count(secrets.randbits(62))


_count_from_a_random_number()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_count_from_a_random_number)


def entry_point(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls: parallel, without the GIL, and cached on disk."""
    compiled = njit(parallel=True, nogil=True)(function)
    compiled._cache = _MachineCode(f"{function.__module__}.{function.__qualname__}")
    return compiled


def are_cached() -> bool:
    """Return whether this machine has machine code of the present kernels."""
    try:
        return any(_folder().iterdir())
    except OSError:
        return False


def _source_digest() -> str:
    """Return the digest of the kernels' sources on disk."""
    digest = hashlib.sha256()
    for path in sorted(_KERNELS.rglob("*.py")):
        place = path.relative_to(_KERNELS).as_posix()
        digest.update(f"{place} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


_IMPORTED = _source_digest()  # of the code that this process runs, even if files change later


class _MachineCode(NullCache):  # type: ignore[misc]  # numba is untyped
    """The cache that numba reads before it compiles a function, and writes to afterwards."""

    writable = True  # until a write fails

    def __init__(self, function: str) -> None:
        self.function = function

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return the cached function for these argument types, or None if there is none."""
        target_context.refresh()
        try:
            path = self._path(signature, target_context.codegen())
            digest, _, content = path.read_bytes().partition(b"\n")
            if digest != _digest(content) or _source_digest() != _IMPORTED:
                return None
        except OSError:
            return None
        with contextlib.suppress(OSError):  # the folder may belong to another user
            os.utime(path.parent)
        return CompileResult._rebuild(target_context, *pickle.loads(content))

    def save_overload(self, signature: Any, result: Any) -> None:
        """Write a compiled function to the cache; warn once if that is impossible."""
        # Code that contains addresses of this process cannot be cached.
        if not _MachineCode.writable or result.library.has_dynamic_globals:
            return
        content = dumps(result._reduce())
        try:
            if _source_digest() != _IMPORTED:
                return  # edited meanwhile: modules may have been imported before and after the edit
            path = self._path(signature, result.codegen)
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                _remove_unused(path.parent.parent)
            _write(path, _digest(content) + b"\n" + content)
        except OSError as error:
            _MachineCode.writable = False
            variable = "NUMBA_CACHE_DIR" if config.CACHE_DIR else "TOPKBENCH_CACHE"
            warnings.warn(
                f"compiled kernels cannot be cached, so each process compiles them again: {error};"
                f" set {variable} to a writable folder.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _path(self, signature: Any, codegen: Any) -> Path:
        key = repr((signature, codegen.magic_tuple())).encode()
        return _folder() / f"{self.function}-{hashlib.sha256(key).hexdigest()[:32]}"


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _folder() -> Path:
    """Return the cache folder for the sources, versions and settings of this process.

    Raises:
        OSError: If there is no home folder.
    """
    versions = (sys.version, numba.__version__, llvmlite.__version__, np.__version__)
    settings = [str(getattr(config, name, None)) for name in _SETTINGS]
    name = _digest(json.dumps([_IMPORTED, *versions, *settings]).encode()).decode()[:32]
    if config.CACHE_DIR:
        return Path(config.CACHE_DIR) / "topkbench" / name
    try:
        cache = Path(os.environ.get("TOPKBENCH_CACHE") or "~/.cache/topkbench").expanduser()
    except RuntimeError as error:
        raise OSError(str(error)) from None
    return cache / "numba" / name


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically, also if other processes write it at the same time."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except FileNotFoundError:
        pass  # removed by a process that took it for the remains of a killed one
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def _remove_unused(folders: Path) -> None:
    """Remove folders that have not been used for long; a process that needs one recompiles."""
    for folder in folders.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _UNUSED_SECONDS:
                shutil.rmtree(folder)
