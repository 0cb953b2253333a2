"""Compiles the CPU operators' entry points, and keeps their machine code between processes.

Numba's own cache knows a function by the file that it stands in: what that function calls in other
files is compiled into it, and an edit there goes unnoticed. Here machine code lies in a folder
named by a digest of everything that it is made from: the sources of all kernels, the versions of
Python, numba, llvmlite and numpy, and numba's settings. A file in it is named by the function, the
types of its arguments and the processor, and begins with a digest of its content.

Numba tells functions of one name and type apart (here: what a factory makes for one, two and four
queries) by a number that it counts up from 1 in every process, in the order of compilation. Where
code of two processes meets, the linker takes equal names for the same function, so a kernel would
call the helper of another. Hence each process counts from a random number on.

The folder is ``numba/`` in ``TOPKBENCH_CACHE`` or ``~/.cache/topkbench``, or ``topkbench/`` in
``NUMBA_CACHE_DIR`` where that is set.
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
# Numba's settings that change what it compiles; the processor is in each file's name.
_SETTINGS = (
    *("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "ENABLE_AVX", "USING_SVML"),
    *("BOUNDSCHECK", "DEBUGINFO_DEFAULT"),
)
FunctionIdentity._unique_ids = itertools.count(secrets.randbits(62))
_UNUSED_SECONDS = 30 * 24 * 3600  # after which the machine code of other sources is removed


def entry_point(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls: parallel, without the interpreter's lock, and kept."""
    compiled = njit(parallel=True, nogil=True)(function)
    compiled._cache = _MachineCode(f"{function.__module__}.{function.__qualname__}")
    return compiled


def _source_digest() -> str:
    """Return the digest of the kernels' sources as they are on disk."""
    digest = hashlib.sha256()
    for path in sorted(_KERNELS.rglob("*.py")):
        place = path.relative_to(_KERNELS).as_posix()
        digest.update(f"{place} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


_IMPORTED = _source_digest()  # what this process runs, whatever happens to the files meanwhile


class _MachineCode(NullCache):  # type: ignore[misc]  # numba is untyped
    """What numba asks for a function before it compiles it, and hands it to afterwards."""

    writable = True  # until a process finds out

    def __init__(self, function: str) -> None:
        self.function = function

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return the function for these types of arguments, or None where it must be compiled."""
        target_context.refresh()
        try:
            path = self._path(signature, target_context.codegen())
            digest, _, content = path.read_bytes().partition(b"\n")
            if digest != _digest(content) or _source_digest() != _IMPORTED:
                return None
        except OSError:
            return None
        with contextlib.suppress(OSError):  # it may be somebody else's
            os.utime(path.parent)
        return CompileResult._rebuild(target_context, *pickle.loads(content))

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep a function that was compiled, or say once that it cannot be kept."""
        # Not what holds addresses of this process.
        if not _MachineCode.writable or result.library.has_dynamic_globals:
            return
        content = dumps(result._reduce())
        try:
            if _source_digest() != _IMPORTED:
                return  # some modules may have been imported before the edit, and some after it
            path = self._path(signature, result.codegen)
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                _remove_unused(path.parent.parent)
            _write(path, _digest(content) + b"\n" + content)
        except OSError as error:
            _MachineCode.writable = False
            variable = "NUMBA_CACHE_DIR" if config.CACHE_DIR else "TOPKBENCH_CACHE"
            warnings.warn(
                f"compiled kernels cannot be kept, so each process compiles them anew: {error};"
                f" let {variable} name a folder that can be written.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _path(self, signature: Any, codegen: Any) -> Path:
        key = repr((signature, codegen.magic_tuple())).encode()
        return _folder() / f"{self.function}-{hashlib.sha256(key).hexdigest()[:32]}"


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _folder() -> Path:
    """Return the folder of the machine code that this process may run.

    Raises:
        OSError: If there is no home folder to put it into.
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
    """Write a file whole or not at all, whoever else writes it."""
    unfinished = path.with_name(f".{secrets.token_hex(16)}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def _remove_unused(folders: Path) -> None:
    """Remove what no process has used for long; one that does now compiles what is gone."""
    for folder in folders.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _UNUSED_SECONDS:
                shutil.rmtree(folder)
