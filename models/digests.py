"""What identifies a model: the bytes of its weights, and all that decides what it answers."""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from topkbench.models.load import LoadedModel

# A file's hash is kept from this size on; reading a smaller one costs less than looking it up.
KEPT_FROM_BYTES = 64 * 2**20
# A file that changed this shortly ago may change once more without another time of change.
SETTLED_S = 2.0


def weights_digest(source: str | Path, cache_dir: str | Path | None = None) -> str:
    """Return 16 hex digits of every byte of a model's weights and of the configuration beside them.

    Whatever transformers may read weights from counts: all safetensors files of the folder, those
    that an index names elsewhere, and an adapter's configuration.

    Args:
        source: The model's folder; of a hub id, the snapshot's.
        cache_dir: Hashes of large files are kept in its folder ``hashes``; None reads every file.
    """
    folder = Path(source)
    files = {*folder.glob("*.safetensors"), folder / "config.json"}
    files |= {path for path in [folder / "adapter_config.json"] if path.exists()}
    for index in folder.glob("*.safetensors.index.json"):
        files.add(index)
        names = json.loads(index.read_bytes()).get("weight_map", {}).values()
        files |= {folder / name for name in names}
    named = sorted((path.relative_to(folder).as_posix(), path) for path in files)
    kept = None if cache_dir is None else Path(cache_dir).expanduser() / "hashes"
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(functools.partial(_file_hash, kept=kept), [p for _, p in named]))
    return _short([(name, found) for (name, _), found in zip(named, hashes, strict=True)])


def model_digest(loaded: "LoadedModel") -> str:
    """Return 16 hex digits of all that decides what a model answers, as it was loaded.

    That is its weights, configuration, dtype, tokenizer, chat template and generation settings, and
    how prompts are wrapped for it. A hub snapshot is the same model as a folder of the same files.
    """
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
            "short_answers": loaded.short_answers,
        }
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 16 hex digits of how a tokenizer cuts, wraps and joins a text; of none, nothing."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return ""
    fast: Any = getattr(tokenizer, "backend_tokenizer", None)
    return _short(
        {
            "rules": fast.to_str() if fast is not None else tokenizer.get_vocab(),
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


def states_digest(model: PreTrainedModel) -> str:
    """Return 16 hex digits of a model's configuration and of all that it holds in memory."""
    digest = hashlib.sha256(_short(_settings(model.config.to_dict())).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(plain.numpy().tobytes())
    return digest.hexdigest()[:16]


# Where a model or tokenizer was found, and by which release: nothing that an answer depends on.
_PLACES = {"_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "cache_dir"}
_PLACES |= {"is_local", "local_files_only", "vocab_file", "merges_file", "tokenizer_file"}


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in _PLACES}


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file_hash(path: Path, kept: Path | None) -> str:
    """Return the sha256 of a file, from what was kept if the file has not been touched since."""
    status = _status(path)
    if kept is None or status["size"] < KEPT_FROM_BYTES:
        return _read_hash(path)
    note = kept / f"{_short(status['path'])}.json"
    found = _kept_hash(note, status)
    if found is not None:
        return found
    fresh = _read_hash(path)
    settled = time.time() - max(status["mtime_ns"], status["ctime_ns"]) / 1e9 > SETTLED_S
    if settled and _status(path) == status:
        with contextlib.suppress(OSError):  # without a place for it, it is read again next time
            _keep_hash(note, {**status, "sha256": fresh})
    return fresh


def _status(path: Path) -> dict[str, Any]:
    """Return what changes whenever a file does: the time of its last change cannot be set back."""
    found = path.stat()
    times = {"mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}
    place = {"path": str(path.resolve()), "device": found.st_dev, "inode": found.st_ino}
    return {**place, "size": found.st_size, **times}


def _read_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_of_this_user(status: os.stat_result) -> bool:
    """Return whether a file belongs to the user who runs this; True where files have no user."""
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()


def _kept_hash(note: Path, status: dict[str, Any]) -> str | None:
    """Return the hash that this user noted for a file in just this state, else None."""
    try:
        about = note.lstat()
        if not is_of_this_user(about) or about.st_mode & 0o022:
            return None
        content = json.loads(note.read_bytes())
        noted, check = content["noted"], content["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = isinstance(noted, dict) and check == _short(noted)
    return (
        str(noted["sha256"]) if whole and noted == {**status, "sha256": noted["sha256"]} else None
    )


def _keep_hash(note: Path, noted: dict[str, Any]) -> None:
    note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(dir=note.parent)  # for this user's eyes alone
    with os.fdopen(descriptor, "w") as file:
        json.dump({"noted": noted, "digest": _short(noted)}, file)
    Path(unfinished).replace(note)
