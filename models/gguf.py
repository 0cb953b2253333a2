"""What transformers leaves out when it reads a GGUF file: mended here, or refused.

Transformers reads a file's configuration by a table of keys for each architecture, and passes over
every other key and every tensor that it has no place for. A model that is read so computes
something else, without any message: Llama 3.2 without the scaling of its rotary positions, Phi-4
with all channels rotated. So each key of the architectures below is read here as well, keys that
are not known are refused, and so is a file with numbers that are not in the model.
"""

import copy
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from topkbench.models.encoding import beginning

PACKAGES = ("gguf", "accelerate")
"""What transformers reads every GGUF file with."""

# Keys below the architecture's name, and the fields of transformers' configuration they stand for.
_FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_CAPS = {one: one for one in ("attn_logit_softcapping", "final_logit_softcapping")}
_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
ARCHITECTURES: Mapping[str, Mapping[str, str]] = {
    "llama": _FIELDS,
    "qwen2": _FIELDS,
    "qwen3": _FIELDS,
    "qwen3moe": _FIELDS | _EXPERTS,
    "gemma2": _FIELDS | _WINDOW | _CAPS,
    "gemma3": _FIELDS | _WINDOW | _CAPS,
    "phi3": _FIELDS | _WINDOW,
}
# Read by functions of their own.
_HEAD_DIM = ("attention.key_length", "attention.value_length")
_ROPE = {
    *("rope.dimension_count", "rope.freq_base", "rope.freq_base_swa"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
    *("rope.scaling.attn_factor", "rope.scaling.finetuned", "rope.scale_linear"),
}
_PATTERN = "attention.sliding_window_pattern"
_OF_IMAGES = "mm.tokens_per_image"  # without a meaning for text
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_LOCAL_THETA = 10000.0  # of Gemma 3's layers with a sliding window, where the file does not say
# Layers of the models whose queries are divided by the root of something else than the head's
# channels: Gemma 2 and 3 with 27 B parameters. No key says it; llama.cpp tells them so, too.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
# Byte-level vocabularies that transformers splits as GPT-2's. SmolLM's splits digits besides, and
# has no merge across them.
_SPLIT_LIKE_GPT2 = ("gpt-2", "smollm")
# Those that begin every text with a token unless the file says otherwise, and take a word that is
# in the vocabulary as it is, without merges.
_BEGINNING_WORDS = ("llama3", "llama-v3", "llama-bpe", "tekken")


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says of its model.

    Attributes:
        architecture: Its name in GGUF's terms.
        values: The values of all keys but the vocabulary's; of a list of texts, their number.
        tensors: The names of the tensors.
        rope: The tensors that scale rotary frequencies, by name.
    """

    architecture: str
    values: Mapping[str, Any]
    tensors: frozenset[str]
    rope: Mapping[str, list[float]]

    def __getitem__(self, key: str) -> Any:
        """Return the value of a key below the architecture's name; None if there is none."""
        return self.values.get(f"{self.architecture}.{key}")

    @property
    def keys(self) -> list[str]:
        """The keys below the architecture's name."""
        prefix = f"{self.architecture}."
        return [key.removeprefix(prefix) for key in self.values if key.startswith(prefix)]


def read_file(path: Path) -> GgufFile:
    """Read the keys of a GGUF file and the names of its tensors.

    Raises:
        ValueError: If it is damaged.
    """
    status = path.stat()
    return _read_file(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _read_file(path: Path, size: int, changed_ns: int) -> GgufFile:
    from transformers.integrations.gguf.reader import read_gguf_metadata

    found, names = read_gguf_metadata(str(path))
    # The vocabulary's scores and kinds are long, and of no use here.
    values = {
        key: value
        for key, value in found.items()
        if not (key.startswith("tokenizer.") and isinstance(value, list))
    }
    rope = {}
    if set(names) & set(_ROPE_TENSORS):
        from gguf import GGUFReader  # reads the whole vocabulary, which takes seconds

        tensors: Any = GGUFReader(path).tensors
        rope = {one.name: one.data.tolist() for one in tensors if one.name in _ROPE_TENSORS}
    return GgufFile(str(values["general.architecture"]), values, frozenset(names), rope)


# The configuration --------------------------------------------------------------------------------


def mended(config: Any, file: GgufFile) -> tuple[Any, dict[str, Any]]:
    """Return the configuration as the file has it, and the fields that transformers read otherwise.

    Args:
        config: The configuration that transformers read; it is not changed.
        file: The file.

    Raises:
        ValueError: If the file says what cannot be expressed, or what is not known.
    """
    known = ARCHITECTURES.get(file.architecture)
    if known is None:
        raise ValueError(
            f"model.gguf_file must be of one of the architectures {', '.join(ARCHITECTURES)}, got"
            f" {file.architecture}; use the model's safetensors: model.gguf_file=null."
        )
    others = {
        *_HEAD_DIM,
        *_ROPE,
        _OF_IMAGES,
        *([_PATTERN] if file.architecture == "gemma3" else []),
    }
    for key in file.keys:
        if key not in known and key not in others and file[key]:
            raise _unknown(file, key)
    wanted = {field: file[key] for key, field in known.items() if file[key] is not None}
    if not wanted.get("sliding_window", 1):  # 0 stands for none
        wanted["sliding_window"] = None
    heads, hidden = wanted["num_attention_heads"], wanted["hidden_size"]
    channels = {int(file[key]) for key in _HEAD_DIM if file[key] is not None}
    if len(channels) > 1:
        raise _unknown(file, _HEAD_DIM[1])
    head_dim = channels.pop() if channels else _default_head_dim(file, heads, hidden)
    if (getattr(config, "head_dim", None) or hidden // heads) != head_dim:
        wanted["head_dim"] = head_dim
    if file.architecture in _LAYERS_OF_27B:
        is_largest = wanted["num_hidden_layers"] == _LAYERS_OF_27B[file.architecture]
        wanted["query_pre_attn_scalar"] = hidden // heads if is_largest else head_dim
    wanted["tie_word_embeddings"] = "output.weight" not in file.tensors
    wanted["rope_parameters"] = _rope_parameters(file, head_dim, wanted["max_position_embeddings"])
    if file.architecture == "phi3" and file["rope.scaling.original_context_length"]:
        wanted["original_max_position_embeddings"] = file["rope.scaling.original_context_length"]
    changed = copy.deepcopy(config)
    changes = {}
    for field, value in wanted.items():
        if not hasattr(config, field):
            raise ValueError(
                f"the GGUF file's {field} of {value} has no place in transformers'"
                f" {type(config).__name__}; use the model's safetensors: model.gguf_file=null."
            )
        if not _equal(getattr(config, field), value):
            changes[field] = value
            setattr(changed, field, value)
    _check_pattern(file, changed)
    return changed, changes


def _unknown(file: GgufFile, key: str) -> ValueError:
    return ValueError(
        f"the GGUF file's {file.architecture}.{key} must be one that transformers' reader and ours"
        f" understand, got {file[key]!r}; use the model's safetensors: model.gguf_file=null."
    )


def _default_head_dim(file: GgufFile, heads: int, hidden: int) -> int:
    """Return the channels of a head where no key says it, as GGUF defines them."""
    return int(file["rope.dimension_count"] or hidden // heads)


def _rope_parameters(file: GgufFile, head_dim: int, positions: int) -> dict[str, Any]:
    """Return the rotary positions as transformers' configurations have them."""
    theta = float(file["rope.freq_base"] or 10000.0)
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    rotated = int(file["rope.dimension_count"] or head_dim)
    if file.architecture == "phi3":
        plain["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim:
        raise _unknown(file, "rope.dimension_count")
    scaled = plain | _scaling(file, plain, head_dim, positions)
    if file.architecture != "gemma3":
        return scaled
    # Gemma 3 scales the positions of the layers that attend to the whole past.
    local = float(file["rope.freq_base_swa"] or _LOCAL_THETA)
    return {
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
        "full_attention": scaled,
    }


def _scaling(
    file: GgufFile, plain: Mapping[str, Any], head_dim: int, positions: int
) -> dict[str, Any]:
    """Return what a file says of the scaling of rotary positions, in transformers' terms."""
    kind = file["rope.scaling.type"] or "none"
    factor = file["rope.scaling.factor"] or file["rope.scale_linear"]
    original = file["rope.scaling.original_context_length"]
    attention = file["rope.scaling.attn_factor"]
    if "rope_freqs.weight" in file.rope:
        return _llama3(file, plain, head_dim)
    if "rope_factors_long.weight" in file.rope:
        if original is None or "rope_factors_short.weight" not in file.rope:
            raise _unknown(file, "rope.scaling.original_context_length")
        return {
            "rope_type": "longrope",
            "long_factor": file.rope["rope_factors_long.weight"],
            "short_factor": file.rope["rope_factors_short.weight"],
            "original_max_position_embeddings": original,
            "factor": positions / original,
        } | ({} if attention is None else {"attention_factor": attention})
    if attention not in (None, 0.0, 1.0):
        raise _unknown(file, "rope.scaling.attn_factor")
    if kind == "none" and factor in (None, 0.0, 1.0):
        return {}
    if kind in ("none", "linear") and factor:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor and original:
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    raise _unknown(file, "rope.scaling.type")


def _llama3(file: GgufFile, plain: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Return Llama 3's scaling, of which a file holds what each frequency is divided by."""
    divisors = torch.tensor(file.rope["rope_freqs.weight"])
    factor = round(float(divisors.max()), 3)
    if factor == 1.0 and float(divisors.min()) == 1.0:
        return {}
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        # The same in all of Meta's models.
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        head_dim=head_dim, max_position_embeddings=131072, rope_parameters={**plain, **scaling}
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    powers = torch.arange(0, head_dim, 2) / head_dim
    expected = 1 / plain["rope_theta"] ** powers / frequencies
    if len(expected) != len(divisors) or not torch.allclose(expected, divisors, rtol=1e-3):
        raise ValueError(
            "the GGUF file's rope_freqs.weight must be the scaling of Llama 3's rotary positions,"
            " got other numbers; use the model's safetensors: model.gguf_file=null."
        )
    return scaling


def _check_pattern(file: GgufFile, config: Any) -> None:
    """Check which layers have a sliding window, if the file says it."""
    pattern = file[_PATTERN]
    if pattern is None:
        return
    layers = range(config.num_hidden_layers)
    slides = pattern if isinstance(pattern, list) else [(i + 1) % pattern != 0 for i in layers]
    if [kind == "sliding_attention" for kind in config.layer_types] != [bool(i) for i in slides]:
        raise _unknown(file, _PATTERN)


def _equal(found: Any, wanted: Any) -> bool:
    """Return whether a field has a value, up to the rounding to 32 bits in a file."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(
            _equal(found.get(name), value) for name, value in wanted.items()
        )
    if isinstance(wanted, float) and isinstance(found, float | int):
        return abs(found - wanted) <= 1e-6 * abs(wanted)
    return bool(found == wanted)


def check_all_read(model: PreTrainedModel, file: GgufFile) -> None:
    """Check that all of a file's tensors are in a model, all of whose weights are from the file.

    Raises:
        ValueError: If transformers passed over a tensor.
    """
    # Two of a layer's experts' tensors become one.
    stored = [
        one for one in file.tensors - set(_ROPE_TENSORS) if not one.endswith("ffn_up_exps.weight")
    ]
    read = len(list(model.parameters()))  # tied ones once
    if len(stored) != read:
        raise ValueError(
            f"{len(stored)} tensors in the file, of which transformers' {type(model).__name__} has"
            f" {read}."
        )


# The tokenizer ------------------------------------------------------------------------------------


def check_release(name: str) -> None:
    """Check that what reads GGUF files is installed.

    Args:
        name: The file's name.

    Raises:
        ValueError: If a package is missing, or transformers too old.
    """
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise ValueError(
            f"model.gguf_file={name} needs the packages {', '.join(PACKAGES)}, found no"
            f" {' and no '.join(missing)}; install topkbench[gguf]."
        )
    if find_spec("transformers.integrations.gguf") is None:
        raise ValueError(
            f"model.gguf_file={name} needs a newer transformers than {transformers_version}, which"
            " reads the tokenizers of GGUF files as others; install transformers 5.24."
        )


def mend_tokenizer(tokenizer: PreTrainedTokenizerBase, file: GgufFile) -> None:
    """Make a tokenizer from a GGUF file split and begin texts as the model's own does.

    Raises:
        ValueError: If it is not known how its vocabulary splits texts.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kind = file.values.get("tokenizer.ggml.model")
    split = file.values.get("tokenizer.ggml.pre")
    known = {*GGUF_PRE_TOKENIZER_SPLITS, *_SPLIT_LIKE_GPT2}
    if kind == "gpt2" and split not in known:
        raise ValueError(
            f"the GGUF file's tokenizer.ggml.pre must be one of {', '.join(sorted(known))}, got"
            f" {split!r}; use the model's safetensors: model.gguf_file=null."
        )
    fast: Any = tokenizer
    if kind == "gpt2":
        rules = json.loads(fast.backend_tokenizer.to_str())
        # Transformers adds GPT-2's special tokens to vocabularies that have others.
        tokens = int(file.values["tokenizer.ggml.tokens"])
        rules["added_tokens"] = [one for one in rules["added_tokens"] if one["id"] < tokens]
        rules["model"]["ignore_merges"] = split in _BEGINNING_WORDS
        fast._tokenizer = Tokenizer.from_str(json.dumps(rules))
    begins = file.values.get("tokenizer.ggml.add_bos_token")
    if begins is None:
        begins = kind == "llama" or split in _BEGINNING_WORDS
    if begins != (tokenizer.bos_token_id in beginning(tokenizer)):
        fast.add_bos_token = bool(begins)
        fast.update_post_processor()
    if begins != (tokenizer.bos_token_id in beginning(tokenizer)):
        raise ValueError(
            f"the GGUF file's tokenizer must {'' if begins else 'not '}put its first token before"
            " every text, and transformers' does otherwise; use the model's safetensors:"
            " model.gguf_file=null."
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Check that transformers has read a GGUF file's tokenizer as it is.

    Some releases make it one of another kind, with tokens that the model lacks.

    Raises:
        ValueError: If the tokenizer has more tokens than the model.
    """
    tokens = int(config.get_text_config(decoder=True).vocab_size)
    if len(tokenizer) > tokens:
        raise ValueError(
            f"a GGUF file's tokenizer must have at most the model's {tokens} tokens, got"
            f" {len(tokenizer)} in a {type(tokenizer).__name__}, as which transformers"
            f" {transformers_version} reads it; install a newer transformers."
        )
