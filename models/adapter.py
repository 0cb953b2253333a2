"""LoRA adapters: read with peft, and merged into a model's weights."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file  # type: ignore[attr-defined]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_adapter(adapter: str, revision: str | None) -> None:
    """Check that an adapter can be merged, as far as its configuration says.

    Args:
        adapter: A folder or a hub id.
        revision: Revision of a hub id.

    Raises:
        ValueError: If peft is not installed, or there is no LoRA adapter.
    """
    if find_spec("peft") is None:
        raise ValueError(
            f"model.adapter={adapter} needs the package peft, which is not installed; install"
            " topkbench[peft]."
        )
    try:
        found = json.loads(_file(adapter, CONFIG, revision).read_bytes())
    except json.JSONDecodeError:
        found = None
    kind = found.get("peft_type") if isinstance(found, dict) else None
    if kind != "LORA":
        raise ValueError(
            f"model.adapter must be a LoRA adapter, got {adapter}, whose {CONFIG} names"
            f" {'none' if kind is None else kind}."
        )


def merge_adapter(
    model: PreTrainedModel, adapter: str, revision: str | None
) -> tuple[PreTrainedModel, list[Path]]:
    """Merge a LoRA adapter into the weights of a model, which it changes.

    Args:
        model: The model that the adapter was trained on, with weights that are plain numbers.
        adapter: A folder or a hub id.
        revision: Revision of a hub id.

    Returns:
        The model, and the adapter's files.

    Raises:
        ValueError: If the adapter does not fit the model, or a file is missing or damaged.
    """
    from peft import PeftConfig, PeftModel

    files = [_file(adapter, name, revision) for name in (CONFIG, WEIGHTS)]
    folder = str(files[0].parent)
    try:
        # Weights of an adapter that does not fit are drawn, and peft only warns.
        with torch.random.fork_rng(devices=[]):
            config: Any = PeftConfig.from_pretrained(folder)
            merged: Any = PeftModel(model, config, autocast_adapter_dtype=False)
            loaded = merged.load_adapter(folder, "default", autocast_adapter_dtype=False)
        if loaded.missing_keys or loaded.unexpected_keys:
            kind, keys = "no weights", loaded.missing_keys
            if loaded.unexpected_keys:
                kind, keys = "no place in the model", loaded.unexpected_keys
            raise ValueError(f"{kind} for {', '.join(sorted(keys)[:3])}.")
        return merged.merge_and_unload(safe_merge=True), files
    except Exception as error:  # of any kind: peft's own, safetensors', and a module's
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"model.adapter must be a whole LoRA adapter of the model that model.path names, got"
            f" {type(error).__name__} with {adapter}: {reason}"
        ) from error


def _file(adapter: str, name: str, revision: str | None) -> Path:
    """Return the path of an adapter's file, which is fetched from the hub if it is not there.

    Raises:
        ValueError: If there is none.
    """
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        path = folder / name
        if path.is_file():
            return path
        reason = "it has no such file"
    else:
        try:
            return Path(str(cached_file(adapter, name, revision=revision)))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
    raise ValueError(
        f"model.adapter must be a folder or a hub id with {CONFIG} and {WEIGHTS}, got {adapter}:"
        f" {reason.rstrip('.')}."
    )
