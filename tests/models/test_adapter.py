"""LoRA adapters, merged into a model's weights."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from topkbench.models import adapter as adapters
from topkbench.models.digests import model_digest
from topkbench.models.load import (
    SHIPPED,
    ModelNotAvailable,
    load_model,
    load_without_weights,
    read_shape,
)

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs topkbench[peft]")
IDS = torch.arange(30)[None] + 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the shipped model, with weights that change its answers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(SHIPPED["tiny"], dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model: Any = get_peft_model(base, config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    path = tmp_path_factory.mktemp("adapter") / "words"
    model.save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "words"))


@needs_peft
def test_an_adapter_is_merged(folder: Path) -> None:
    from peft import PeftModel

    state = torch.get_rng_state()
    loaded = load_model("tiny", "tiny", "float32", adapter=str(folder))
    assert torch.equal(torch.get_rng_state(), state)
    plain = load_model("tiny", "tiny", "float32")
    base = AutoModelForCausalLM.from_pretrained(SHIPPED["tiny"], dtype=torch.float32)
    unmerged: Any = PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        logits = [model(IDS).logits for model in (loaded.model, unmerged, plain.model)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-3, rtol=1e-4)
    assert float((logits[0] - logits[2]).abs().max()) > 0.1
    assert type(loaded.model) is type(plain.model)
    assert not [name for name, _ in loaded.model.named_modules() if "lora" in name]
    assert not any(weight.requires_grad for weight in loaded.model.parameters())


@needs_peft
def test_a_row_and_a_digest_tell_an_adapted_model_from_its_base(folder: Path, copy: Path) -> None:
    weights = load_file(copy / adapters.WEIGHTS)
    save_file({name: one * 2 for name, one in weights.items()}, copy / adapters.WEIGHTS)
    loaded = [load_model("tiny", "tiny", adapter=given) for given in (None, str(folder), str(copy))]
    assert [one.name for one in loaded] == ["tiny", "tiny+words", "tiny+words"]
    assert len({one.digest for one in loaded}) == len({model_digest(one) for one in loaded}) == 3
    config = json.loads((copy / adapters.CONFIG).read_text())
    (copy / adapters.CONFIG).write_text(json.dumps({**config, "lora_alpha": 4}))
    assert load_model("tiny", "tiny", adapter=str(copy)).digest != loaded[2].digest
    assert read_shape("tiny", "tiny", adapter=str(folder)).name == "tiny+words"
    assert load_without_weights("tiny", "tiny", adapter=str(folder)).name == "tiny+words"


def lose_weights(folder: Path) -> None:
    (folder / adapters.WEIGHTS).unlink()


def lose_a_layer(folder: Path) -> None:
    weights = load_file(folder / adapters.WEIGHTS)
    kept = {name: one for name, one in weights.items() if ".layers.1." not in name}
    save_file(kept, folder / adapters.WEIGHTS)


def add_a_layer(folder: Path) -> None:
    weights = load_file(folder / adapters.WEIGHTS)
    more = {name.replace(".layers.1.", ".layers.9."): one.clone() for name, one in weights.items()}
    save_file({**weights, **more}, folder / adapters.WEIGHTS)


def truncate(folder: Path) -> None:
    path = folder / adapters.WEIGHTS
    path.write_bytes(path.read_bytes()[:-8])


def be_of_another_width(folder: Path) -> None:
    weights = load_file(folder / adapters.WEIGHTS)
    save_file({name: torch.ones(3, 5) for name in weights}, folder / adapters.WEIGHTS)


def name_other_modules(folder: Path) -> None:
    config = json.loads((folder / adapters.CONFIG).read_text())
    text = json.dumps({**config, "target_modules": ["query_key_value"]})
    (folder / adapters.CONFIG).write_text(text)


@needs_peft
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose_weights, "adapter_model.safetensors, got"),
        (lose_a_layer, "no weights for"),
        (add_a_layer, "no place in the model for"),
        (truncate, "must be a whole LoRA adapter"),
        (be_of_another_width, "must be a whole LoRA adapter of the model that model.path names"),
        (name_other_modules, "query_key_value"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    copy: Path, change: Callable[[Path], None], words: str
) -> None:
    change(copy)
    with pytest.raises(ModelNotAvailable) as caught:
        load_model("tiny", "tiny", adapter=str(copy))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model.adapter must be a ")
    assert words in str(caught.value)


@needs_peft
@pytest.mark.parametrize("config", ['{"peft_type": "IA3"}', "{}", "{"])
def test_what_is_no_lora_adapter_is_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / adapters.CONFIG).write_text(config)
    with pytest.raises(ModelNotAvailable, match=r"model\.adapter must be a LoRA adapter, got /"):
        read_shape("tiny", "tiny", adapter=str(tmp_path))


@needs_peft
def test_an_adapter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for given in (str(tmp_path), "nobody/no-such-adapter"):
        with pytest.raises(ModelNotAvailable, match=r"model\.adapter must be a folder or a hub id"):
            read_shape("tiny", "tiny", adapter=given)


@needs_peft
def test_the_revisions_of_model_and_adapter_are_passed_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def cached_file(path: str, name: str, revision: str | None = None) -> str:
        asked.append((path, name, revision))
        return str(folder / name)

    monkeypatch.setattr(adapters, "cached_file", cached_file)
    load_model("tiny", "tiny", adapter="owner/words", adapter_revision="v1")
    assert set(asked) == {
        ("owner/words", adapters.CONFIG, "v1"),
        ("owner/words", adapters.WEIGHTS, "v1"),
    }


def test_peft_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ModelNotAvailable) as caught:
        read_shape("tiny", "tiny", adapter="owner/words")
    assert str(caught.value) == (
        "model.adapter=owner/words needs the package peft, which is not installed; install"
        " topkbench[peft]."
    )


@needs_peft
def test_quantised_weights_take_no_adapter(folder: Path, tmp_path: Path) -> None:
    config = json.loads((SHIPPED["tiny"] / "config.json").read_text())
    text = json.dumps({**config, "quantization_config": {"quant_method": "fp8"}})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        ModelNotAvailable, match=r"needs weights that are plain numbers, into which"
    ):
        read_shape("mine", str(tmp_path), adapter=str(folder))
