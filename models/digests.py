"""Digests of a model: of the bytes of its weights, and of all that its answers depend on."""

import contextlib
import functools
import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from topkbench.models.encoding import answer_ends, template_around
from topkbench.models.files import is_of_this_user

if TYPE_CHECKING:
    from topkbench.models.load import LoadedModel

# Hashes are cached for files of at least this size; smaller ones are faster to read again.
CACHE_FROM_BYTES = 64 * 2**20
# A file that changed less than this ago may change again with the same timestamp.
SETTLED_S = 2.0


def weights_digest(
    source: str | Path,
    cache_dir: str | Path | None = None,
    gguf_file: str | None = None,
    adapter: Sequence[Path] = (),
    changes: Mapping[str, Any] | None = None,
) -> str:
    """Return 16 hex digits of all bytes of a model's weight files and configuration.

    Included is everything that transformers may load weights from: all safetensors files of the
    folder, those that an index file names elsewhere, and an adapter's configuration.

    Args:
        source: The model's folder; for a hub id, its snapshot's folder.
        cache_dir: Hashes of large files are cached in its folder ``hashes``; None reads every file.
        gguf_file: The name of the file in the folder that holds the whole model, if there is one.
        adapter: The files of an adapter that is merged into the weights.
        changes: Fields of the configuration that are others than in the files.
    """
    folder = Path(source)
    files = _weight_files(folder) if gguf_file is None else {folder / gguf_file}
    named = sorted((path.relative_to(folder).as_posix(), path) for path in files)
    cache = None if cache_dir is None else Path(cache_dir).expanduser() / "hashes"
    hashed = functools.partial(_file_hash, cache=cache)
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(hashed, [path for _, path in named]))
    digest = _short([(name, one) for (name, _), one in zip(named, hashes, strict=True)])
    if adapter or changes:
        merged = [(path.name, hashed(path)) for path in adapter]
        digest = _short({"model": digest, "adapter": merged, "changes": changes})
    return digest


def _weight_files(folder: Path) -> set[Path]:
    """Return the files with weights and configuration in a folder of safetensors."""
    files = {*folder.glob("*.safetensors"), folder / "config.json"}
    files |= {path for path in [folder / "adapter_config.json"] if path.exists()}
    for index in folder.glob("*.safetensors.index.json"):
        files.add(index)
        names = json.loads(index.read_bytes()).get("weight_map", {}).values()
        files |= {folder / name for name in names}
    return files


def model_digest(loaded: "LoadedModel") -> str:
    """Return 16 hex digits of everything that a loaded model's answers depend on.

    That is its weights, configuration, dtype, tokenizer, chat template and generation settings,
    what the template writes around a prompt, and the tokens that end an answer. A hub snapshot and
    a folder of the same files have one digest.
    """
    template = loaded.chat_template_kwargs
    config, generation = loaded.model.config, getattr(loaded.model, "generation_config", None)
    return _short(
        {
            "weights": loaded.digest,
            "config": _settings(config.to_dict()),
            "dtype": str(loaded.model.dtype),
            "generation": _settings(generation.to_dict()) if generation is not None else None,
            "tokenizer": tokenizer_digest(loaded.tokenizer),
            "window": loaded.window,
            "chat": loaded.chat,
            "around prompts": template_around(loaded.tokenizer, template) if loaded.chat else None,
            "answer ends": sorted(answer_ends(loaded)),
            "short_answers": loaded.short_answers,
        }
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 16 hex digits of a tokenizer's rules, chat template and settings; "" without one."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return ""
    return _short(
        {
            "rules": _rules(tokenizer),
            "class": type(tokenizer).__name__,
            "template": tokenizer.chat_template,
            "special": tokenizer.special_tokens_map,
            "settings": {
                name: value
                for name, value in _settings(tokenizer.init_kwargs).items()
                if isinstance(value, str | int | float | None)
            },
        }
    )


def _rules(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return a tokenizer's rules; for one written in Python its tokens and digests of its files."""
    fast: Any = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        return fast.to_str()
    with TemporaryDirectory() as folder, contextlib.suppress(NotImplementedError):
        tokenizer.save_vocabulary(folder)  # merges among them, which are not in the tokens
        files = {path.name: _read_hash(path) for path in Path(folder).iterdir()}
        return {"tokens": tokenizer.get_vocab(), "files": files}
    return {"tokens": tokenizer.get_vocab()}


# Settings that say where a model was loaded from and by which release; answers do not depend on
# them.
_PLACES = {"_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "cache_dir"}
_PLACES |= {"is_local", "local_files_only", "vocab_file", "merges_file", "tokenizer_file"}


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in _PLACES}


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file_hash(path: Path, cache: Path | None) -> str:
    """Return the sha256 of a file, from the cache if the file has not changed since."""
    status = _status(path)
    if cache is None or status["size"] < CACHE_FROM_BYTES:
        return _read_hash(path)
    note = cache / f"{_short(status['path'])}.json"
    cached = _cached_hash(note, status)
    if cached is not None:
        return cached
    fresh = _read_hash(path)
    settled = time.time() - max(status["mtime_ns"], status["ctime_ns"]) / 1e9 > SETTLED_S
    if settled and _status(path) == status:
        with contextlib.suppress(OSError):  # if it cannot be written, the file is read again
            _cache_hash(note, {**status, "sha256": fresh})
    return fresh


def _status(path: Path) -> dict[str, Any]:
    """Return what identifies a file's state; ctime changes with it and cannot be set back."""
    stat = path.stat()
    times = {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    location = {"path": str(path.resolve()), "device": stat.st_dev, "inode": stat.st_ino}
    return {**location, "size": stat.st_size, **times}


def _read_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cached_hash(note: Path, status: dict[str, Any]) -> str | None:
    """Return the hash that this user cached for a file in exactly this state, else None."""
    try:
        note_status = note.lstat()
        if not is_of_this_user(note_status) or note_status.st_mode & 0o022:
            return None
        content = json.loads(note.read_bytes())
        noted, check = content["noted"], content["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    intact = isinstance(noted, dict) and check == _short(noted)
    return (
        str(noted["sha256"]) if intact and noted == {**status, "sha256": noted["sha256"]} else None
    )


def _cache_hash(note: Path, noted: dict[str, Any]) -> None:
    note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = note.with_name(f".{note.name}.{secrets.token_hex(8)}.part")
    # Readable by this user only.
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"noted": noted, "digest": _short(noted)}, file)
    unfinished.replace(note)
