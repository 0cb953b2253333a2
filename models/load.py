"""Loads a model from a hub id, a local folder, the repository's own model, or random weights."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

import psutil
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from topkbench.models.compat import partial_layers
from topkbench.models.digests import weights_digest
from topkbench.models.encoding import check_template_arguments

SHIPPED = {"tiny": Path(__file__).resolve().parent / "tiny"}
RANDOM = "random"


class ModelNotAvailable(ValueError):
    """The model cannot be loaded; one sentence says why."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to decode, with its digest.

    Attributes:
        name: The model's name in rows and figures.
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer; for random weights an object that raises on any use.
        digest: 16 hex digits of all bytes of the weights and of the configuration. Everything else
            that an answer depends on is in ``digests.model_digest``.
        window: Longest sequence in tokens.
        chat: Whether prompts are wrapped in the tokenizer's chat template.
        chat_template_kwargs: Arguments of the chat template: ``{"enable_thinking": False}``.
        short_answers: Whether the model ends its answers itself, so that it is enough to generate
            as many tokens as the reference answer has, and a few more.
        artifact_folders: Folders with fitted artifacts that ship with the model.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    window: int
    chat: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    short_answers: bool = False
    artifact_folders: tuple[Path, ...] = field(default=())


def load_model(
    name: str,
    path: str,
    dtype: str = "auto",
    device: str = "cpu",
    device_map: str | None = None,
    revision: str | None = None,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    short_answers: bool = False,
    architecture: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Only safetensors are read, and no code that comes with a model is run.

    Args:
        name: The model's name in rows and figures.
        path: A hub id, a local folder, the name of a shipped model, or ``"random"``.
        dtype: ``"auto"`` (as saved; bfloat16 for random weights), ``"float32"``, ``"bfloat16"`` or
            ``"float16"``.
        device: Where the model runs, such as ``"cpu"`` or ``"cuda:0"``.
        device_map: Passed to transformers to spread a model over several GPUs; needs accelerate.
        revision: Revision of a hub id.
        chat: Wrap prompts in the chat template.
        chat_template_kwargs: Arguments of the chat template; None for none.
        short_answers: See ``LoadedModel``.
        architecture: With ``path="random"``: the fields of a transformers configuration,
            ``model_type`` among them. The weights are drawn on the device, with a fixed seed.
        cache_dir: Folder in which hashes of large weight files are kept; see ``weights_digest``.

    Raises:
        ModelNotAvailable: If it cannot be reached, is damaged, or does not fit the device.
    """
    if (path == RANDOM) != (architecture is not None):
        raise ModelNotAvailable(
            f"model.architecture must be given with model.path={RANDOM} and with no other, got"
            f" {'none' if architecture is None else 'one'} with model.path={path}."
        )
    folder = SHIPPED.get(path)
    source = str(folder or Path(path).expanduser()) if folder or _is_local(path) else path
    if architecture is None and _is_local(source) and not Path(source).is_dir():
        raise ModelNotAvailable(
            f"model.path must be a hub id, a folder or one of {', '.join(SHIPPED)}, found no"
            f" folder {source}; check the path."
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelNotAvailable(f"device={device} needs a CUDA device, found none; use device=cpu.")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ModelNotAvailable(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")
    if architecture is not None:
        return _draw(name, architecture, "bfloat16" if dtype == "auto" else dtype, device)
    if chat_template_kwargs is not None and not isinstance(chat_template_kwargs, Mapping):
        raise ModelNotAvailable(
            "model.chat_template_kwargs must be arguments by name, such as {enable_thinking:"
            f" false}}, or null, got {chat_template_kwargs!r}."
        )
    template_arguments = dict(chat_template_kwargs or {})
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
        if not set(tokenizer.encode("Hello, world 1")) - set(tokenizer.all_special_ids):
            # Some releases return an empty tokenizer if a folder has none.
            raise ValueError(f"a {type(tokenizer).__name__} with an empty vocabulary")
        # The tasks check lengths themselves; this silences the tokenizer's own warning.
        tokenizer.model_max_length = VERY_LARGE_INTEGER
        _check_template(tokenizer, chat, template_arguments)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=device_map,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
        model, info = loaded
        if partial_layers(model):
            raise ValueError(
                "layers with a sliding window, which the harness's cache does not support; use"
                " attach in your own script for such a model"
            )
        # Transformers only warns: it draws missing weights at random and drops unexpected ones.
        for kind, words in (
            ("missing", "no weights"),
            ("unexpected", "no place in the configuration"),
        ):
            if info[f"{kind}_keys"]:
                raise ValueError(f"{words} for {', '.join(sorted(info[f'{kind}_keys'])[:3])}.")
        digest = weights_digest(_snapshot(source, revision), cache_dir)
    except ModelNotAvailable:
        raise
    except (OSError, SafetensorError, ValueError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelNotAvailable(
            f"the model {path} must be a reachable, whole safetensors model without code of its"
            f" own, got {type(error).__name__}: {reason}"
        ) from error
    if device_map is None:
        model = model.to(device)
    return LoadedModel(
        name=name,
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        digest=digest,
        window=int(config.get_text_config(decoder=True).max_position_embeddings),
        chat=chat,
        chat_template_kwargs=template_arguments,
        short_answers=short_answers,
        artifact_folders=(folder / "artifacts",) if folder else (),
    )


class NoTokenizer:
    """Stands for the tokenizer of a model without one: any use raises one sentence."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> NoReturn:
        raise ModelNotAvailable(
            f"this task needs text, and {self._name} has random weights and no tokenizer; use"
            " task=decode_throughput, or a trained model."
        )


def _draw(name: str, architecture: Mapping[str, Any], dtype: str, device: str) -> LoadedModel:
    """Make a model with random weights, directly on its device and in its precision.

    Raises:
        ModelNotAvailable: If transformers has no such architecture, or memory is too small.
    """

    def make(target: torch.device) -> PreTrainedModel:
        with target:
            made: PreTrainedModel = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**architecture),
                dtype=getattr(torch, dtype),
                attn_implementation="sdpa",
            )
        return made

    target = torch.device(device)
    try:
        need = make(torch.device("meta")).get_memory_footprint()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelNotAvailable(
            f"model.architecture must be the fields of a transformers configuration, model_type"
            f" among them, got {type(error).__name__}: {reason}"
        ) from error
    free = free_bytes(target)
    if need > free:
        raise ModelNotAvailable(
            f"the weights of {name} must fit the free memory of {free / 2**30:.1f} GiB, got"
            f" {need / 2**30:.1f} GiB; use a smaller model or dtype=bfloat16."
        )
    with torch.random.fork_rng([target] if target.type == "cuda" else []):
        torch.manual_seed(0)
        model = make(target)
    text = json.dumps({**architecture, "dtype": dtype, "drawn on": target.type}, sort_keys=True)
    return LoadedModel(
        name=name,
        model=model.eval().requires_grad_(False),
        tokenizer=cast(PreTrainedTokenizerBase, NoTokenizer(name)),
        digest=hashlib.sha256(text.encode()).hexdigest()[:16],
        window=int(model.config.get_text_config(decoder=True).max_position_embeddings),
    )


def _check_template(
    tokenizer: PreTrainedTokenizerBase, chat: bool, arguments: Mapping[str, Any]
) -> None:
    """Refuse a chat template that cannot be used as set, before weights are loaded."""
    try:
        check_template_arguments(tokenizer, chat, arguments)
    except ValueError as error:
        raise ModelNotAvailable(str(error)) from error


def free_bytes(device: torch.device) -> int:
    """Return the free memory of the accelerator, or of the machine for the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _snapshot(source: str, revision: str | None) -> Path:
    """Return the folder a model was loaded from: the source itself, or a hub id's snapshot."""
    if _is_local(source):
        return Path(source)
    config = cached_file(source, "config.json", revision=revision, local_files_only=True)
    return Path(str(config)).parent


def _is_local(path: str) -> bool:
    """Return whether a path is a folder rather than a hub id, ``owner/name``."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).is_dir()
