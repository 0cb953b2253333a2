"""Checkpoints with quantised weights: loaded as they are, or refused in one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from topkbench.models.load import (
    ModelNotAvailable,
    load_model,
    load_without_weights,
    read_shape,
)
from topkbench.models.tiny_tokenizer import build_tokenizer

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
IDS = torch.arange(20)[None] + 5
# The numbers of the format E2M1, by their four bits.
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 += [-one for one in E2M1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model of plain numbers."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = build_tokenizer([" word"], 64)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantise(folder: Path, into: Path, quantization: Any, weights: dict[str, Any]) -> Path:
    """Write a model's folder with quantised weights."""
    into.mkdir()
    for path in folder.glob("token*"):
        (into / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps({**config, "quantization_config": quantization})
    (into / "config.json").write_text(text)
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    return into


METHODS = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "optimum|gptqmodel|GPU"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128}, "gptqmodel"),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
        "compressed.tensors",
    ),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, "GPU|fbgemm"),
    "nothing": ({"quant_method": "nothing"}, "transformers has no such method"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_needs_is_said_before_weights_are_read(
    llama: Path, tmp_path: Path, method: str
) -> None:
    settings, needed = METHODS[method]
    folder = quantise(llama, tmp_path / "model", settings, {"none": torch.ones(1)})
    with pytest.raises(ModelNotAvailable, match=needed) as caught:
        read_shape("mine", str(folder))
    assert str(caught.value).startswith(
        f"the model {folder} cannot be loaded: the weights are quantised by {method}, and"
    )
    assert "\n" not in str(caught.value)


def test_fp8_becomes_plain_numbers_on_a_cpu(llama: Path, tmp_path: Path) -> None:
    weights, plain = {}, {}
    for name, weight in load_file(llama / "model.safetensors").items():
        if "proj" not in name:
            weights[name] = plain[name] = weight
            continue
        rows, columns = weight.shape
        scales = weight.view(rows // 128, 128, columns // 128, 128).abs().amax((1, 3)) / 448
        spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        weights[name] = (weight / spread).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scales
        plain[name] = weights[name].float() * spread
    folder = quantise(llama, tmp_path / "model", FP8, weights)
    loaded = load_model("mine", str(folder), dtype="float32")
    assert (loaded.name, loaded.model.dtype) == ("mine (fp8 dequantised)", torch.float32)
    assert read_shape("mine", str(folder)).name == loaded.name
    reference = LlamaForCausalLM.from_pretrained(llama)
    reference.load_state_dict(plain, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS).logits, reference(IDS).logits)
    with pytest.raises(ModelNotAvailable, match=r"plain numbers for a plan .* got .* by fp8;"):
        load_without_weights("mine", str(folder))


def test_the_digest_covers_weights_and_how_they_are_quantised(llama: Path, tmp_path: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    settings = {**FP8, "modules_to_not_convert": ["model", "lm_head"]}
    one = quantise(llama, tmp_path / "one", settings, weights)
    other = quantise(llama, tmp_path / "other", {**settings, "fmt": "e4m3"}, weights)
    digests = {load_model("mine", str(path), dtype="float32").digest for path in (one, other)}
    assert len(digests) == 2


def test_mxfp4_becomes_plain_numbers_on_a_cpu(llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=json.loads((llama / "config.json").read_text())["vocab_size"], hidden_size=64,
        intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=64,
        max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        pad_token_id=None,
    )  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "plain")
    for path in llama.glob("token*"):
        (tmp_path / "plain" / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    for name in [one for one in weights if one.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = weights.pop(name).shape
        blocks = torch.randint(256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, outer, inner // 32), dtype=torch.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        pairs = torch.tensor(E2M1)[torch.stack([blocks & 15, blocks >> 4], -1).long()]
        numbers = pairs.flatten(-2) * 2.0 ** (scales[..., None].float() - 127)
        model.get_parameter(name).data = numbers.flatten(-2).transpose(1, 2).contiguous()
    folder = quantise(tmp_path / "plain", tmp_path / "model", {"quant_method": "mxfp4"}, weights)
    loaded = load_model("mine", str(folder), dtype="float32")
    assert loaded.name == "mine (mxfp4 dequantised)"
    for name, weight in model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name).float(), weight), name
