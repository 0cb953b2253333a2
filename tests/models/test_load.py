"""Loading a model; every failure is one sentence."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from topkbench.methods.base import Policy
from topkbench.methods.exact import ExactTopK
from topkbench.models import load
from topkbench.models.attach import attach
from topkbench.models.compat import context_window, partial_layers, set_window
from topkbench.models.load import (
    ModelNotAvailable,
    load_model,
    load_without_weights,
    read_shape,
)
from topkbench.models.prefill import prefill
from topkbench.models.tiny_tokenizer import build_tokenizer

CONF = Path(__file__).parents[2] / "conf"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer([" word"], 64)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_folder_is_loaded_as_it_was_saved(folder: Path) -> None:
    loaded = load_model("mine", str(folder))
    assert (loaded.name, loaded.window, loaded.chat, loaded.short_answers) == (
        *("mine", 64),
        *(False, False),
    )
    assert not loaded.model.training
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    assert loaded.model.dtype == torch.float32
    assert loaded.tokenizer.encode(" word", add_special_tokens=False) != []
    assert load_model("mine", str(folder), dtype="bfloat16").model.dtype == torch.bfloat16


def test_the_shipped_model_is_known_by_name() -> None:
    loaded = load_model("tiny", "tiny", short_answers=True)
    assert (loaded.window, loaded.short_answers) == (16384, True)
    assert loaded.model.config.num_key_value_heads < loaded.model.config.num_attention_heads
    assert len(loaded.tokenizer) <= 4096


def assert_one_line_error(error: BaseException, *words: str) -> None:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 800
    assert all(word in text for word in words), text


def test_a_missing_folder_is_refused() -> None:
    with pytest.raises(ModelNotAvailable) as caught:
        load_model("mine", "/no/such/folder")
    assert_one_line_error(
        caught.value, "model.path must be", "found no folder /no/such/folder", "tiny"
    )


def test_a_hub_model_that_cannot_be_reached() -> None:
    with pytest.raises(ModelNotAvailable) as caught:
        load_model("mine", "nobody/no-such-model")
    assert_one_line_error(caught.value, "nobody/no-such-model must be a reachable")


def truncate(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])


def overwrite_header(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"\xff" * 256)


def lose_a_tensor(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def change_a_shape(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(17)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def pickle_instead(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


DAMAGES: dict[str, Damage] = {
    "truncated": truncate,
    "header": overwrite_header,
    "missing tensor": lose_a_tensor,
    "other shape": change_a_shape,
    "no weights": lambda path: (path / "model.safetensors").unlink(),
    "empty weights": lambda path: (path / "model.safetensors").write_bytes(b""),
    "pickle": pickle_instead,
    "no config": lambda path: (path / "config.json").unlink(),
    "bad config": lambda path: (path / "config.json").write_text("{"),
    "no tokenizer": lambda path: [file.unlink() for file in path.glob("tokenizer*")],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_model(copy: Path, damage: Damage) -> None:
    damage(copy)
    with pytest.raises(ModelNotAvailable) as caught:
        load_model("mine", str(copy))
    assert_one_line_error(
        caught.value, f"the model {copy} must be a reachable, whole safetensors model"
    )


def add(path: Path, **tensors: torch.Tensor) -> None:
    weights = load_file(path / "model.safetensors")
    save_file({**weights, **tensors}, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.k_proj.bias", "model.layers.1.mlp.up_proj.weight", "more"]
)
def test_weights_that_the_configuration_does_not_have_are_refused(copy: Path, name: str) -> None:
    add(copy, **{name: torch.ones(8)})
    with pytest.raises(ModelNotAvailable) as caught:
        load_model("mine", str(copy))
    assert_one_line_error(
        caught.value, "whole safetensors", f"no place in the configuration for {name}."
    )


def test_weights_that_transformers_ignores_are_accepted(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    spare = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),  # of old checkpoints
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),  # tied
    }
    add(copy, **spare)
    assert load_model("mine", str(copy)).window == 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused(folder: Path) -> None:
    with pytest.raises(ModelNotAvailable, match="device=cuda:0 needs a CUDA device, found none"):
        load_model("mine", str(folder), device="cuda:0")


@pytest.mark.parametrize("dtype", ["fp32", "float", "nn"])
def test_an_unknown_dtype(folder: Path, dtype: str) -> None:
    with pytest.raises(
        ModelNotAvailable, match=f"dtype must be one of auto, float32.*got '{dtype}'"
    ):
        load_model("mine", str(folder), dtype=dtype)


SMALL = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
PHI3 = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 48,
    "long_factor": [4.0] * 48,
}


@pytest.mark.parametrize(
    ("kind", "positions", "more", "window"),
    [
        ("llama", 512, {}, 512),
        # Qwen2.5 and Qwen3 with YaRN: the positions are those without it.
        (
            *("qwen2", 32768),
            {"rope_parameters": {**YARN, "original_max_position_embeddings": 32768}},
            131072,
        ),
        (
            *("qwen3", 40960),
            {"rope_parameters": {**YARN, "original_max_position_embeddings": 32768}},
            131072,
        ),
        ("qwen2", 32768, {"rope_parameters": YARN}, 131072),
        # DeepSeek's positions include it.
        (
            *("llama", 163840),
            {"rope_parameters": {**YARN, "factor": 40, "original_max_position_embeddings": 4096}},
            163840,
        ),
        # Llama 3.1's factor and training positions make more than the model is made for.
        (
            *("llama", 131072),
            {
                "rope_parameters": {
                    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
                    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
                    "original_max_position_embeddings": 8192,
                }
            },
            131072,
        ),
        (
            *("phi3", 131072),
            {"rope_parameters": PHI3, "original_max_position_embeddings": 4096},
            131072,
        ),
        # Llama-2-7B-32K names the extended positions; the factor alone does not extend them.
        (
            *("llama", 32768),
            {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}},
            32768,
        ),
        (
            *("llama", 4096),
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            8192,
        ),
        # As older configuration files have it.
        (
            *("llama", 4096),
            {
                "rope_scaling": {
                    **{"type": "yarn", "factor": 2.0},
                    "original_max_position_embeddings": 4096,
                }
            },
            8192,
        ),
        # Gemma 3 has an entry for each kind of layer.
        ("gemma3_text", 2048, {"sliding_window": 512}, 2048),
        ("gpt2", 1024, {}, 1024),
        ("bloom", None, {}, None),
    ],
)
def test_the_window_is_read_with_the_scaling_of_positions(
    kind: str, positions: int | None, more: dict[str, object], window: int | None
) -> None:
    given = {} if positions is None else {"max_position_embeddings": positions}
    assert context_window(AutoConfig.for_model(kind, **given, **more)) == window


@pytest.mark.parametrize(
    ("sliding", "positions", "slides"),
    [(2047, 4096, True), (4095, 4096, True), (4096, 4096, False), (262144, 131072, False)],
)
def test_a_sliding_window_of_all_positions_is_full_attention(
    sliding: int, positions: int, slides: bool
) -> None:
    """Phi-3's window is larger than its positions; Phi-3-mini's is smaller."""
    config = AutoConfig.for_model(
        **{**SMALL, "model_type": "phi3", "pad_token_id": 0},
        **{"sliding_window": sliding},
    )
    config.max_position_embeddings = positions
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sorted(partial_layers(model)) == ([0, 1] if slides else [])
    set_window(model, sliding + 1)
    assert sorted(partial_layers(model)) == [0, 1]
    set_window(model, sliding)  # whoever asks: no sequence is longer than what a layer sees
    assert partial_layers(model) == {}
    with attach(model, ExactTopK(), Policy(k=16)) as session:
        assert session.dense == {}


def test_capped_logits_are_capped_at_every_prefill(folder: Path, tmp_path: Path) -> None:
    """Transformers' SDPA function leaves them uncapped or refuses them, by its release."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=61, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        sliding_window=64, attn_logit_softcapping=2.0, query_pre_attn_scalar=16,
        initializer_range=0.5, attn_implementation="eager",
    )  # fmt: skip
    made = Gemma2ForCausalLM(config).eval()
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)  # the tokenizer
    made.save_pretrained(tmp_path)
    ids = torch.randint(61, (40,)).tolist()
    with torch.no_grad():
        wanted = made(torch.tensor([ids])).logits[0, -1]
    model = load_model("mine", str(tmp_path)).model
    for needs in (frozenset[str](), frozenset({"column_sums"})):
        found = prefill(model, ids, needs).logits
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_window_may_be_given(folder: Path) -> None:
    assert load_model("mine", str(folder), window=4096).window == 4096
    assert load_model("mine", "random", window=100, architecture=SMALL).window == 100
    shape = read_shape("mine", str(folder), window=32, chat=True)
    assert (shape.num_layers, shape.window, shape.has_tokenizer) == (1, 32, True)
    shape = read_shape("mine", "random", architecture=SMALL)
    assert (shape.num_layers, shape.window, shape.has_tokenizer) == (2, 512, False)


def test_a_model_without_positions_needs_a_window() -> None:
    bloom = {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 2, "vocab_size": 99}
    with pytest.raises(ModelNotAvailable, match=r"model\.window must be given, since the config"):
        read_shape("mine", "random", architecture=bloom)
    # With a window it is refused for another reason.
    with pytest.raises(ModelNotAvailable, match="found 0 for 2 layers in BloomForCausalLM"):
        read_shape("mine", "random", architecture=bloom, window=64)


def test_random_weights_are_drawn_the_same_every_time() -> None:
    state = torch.get_rng_state()
    loaded = load_model("mine", "random", architecture=SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert (loaded.name, loaded.window, loaded.model.dtype) == ("mine", 512, torch.bfloat16)
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    projection = loaded.model.model.layers[1].mlp.up_proj.weight
    assert float(projection.float().std()) == pytest.approx(0.02, rel=0.05)
    again = load_model("mine", "random", architecture=SMALL)
    pairs = zip(loaded.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert again.digest == loaded.digest
    wide = load_model("mine", "random", dtype="float32", architecture=SMALL)
    assert wide.model.dtype == torch.float32
    assert wide.digest != loaded.digest
    assert load_model("mine", "random", architecture={**SMALL, "vocab_size": 999}).digest not in (
        *(loaded.digest, wide.digest),
    )


def test_a_model_of_random_weights_has_no_tokenizer() -> None:
    loaded = load_model("mine", "random", architecture=SMALL)
    with pytest.raises(ModelNotAvailable) as caught:
        loaded.tokenizer.encode("word")
    assert_one_line_error(
        caught.value, "needs text, and mine has random weights and no tokenizer", "task="
    )


@pytest.mark.parametrize(
    ("path", "architecture", "words"),
    [
        ("random", None, ("model.architecture must be given with model.path=random", "got none")),
        ("tiny", SMALL, ("with no other, got one with model.path=tiny",)),
        ("random", {"model_type": "lama"}, ("fields of a transformers configuration", "lama")),
        ("random", {"hidden_size": 8}, ("model_type among them",)),
        ("random", {**SMALL, "vocab_size": 10**12}, ("must fit the free memory of", "GiB")),
    ],
)
def test_bad_architectures(
    path: str, architecture: dict[str, object] | None, words: tuple[str, ...]
) -> None:
    with pytest.raises(ModelNotAvailable) as caught:
        load_model("mine", path, architecture=architecture)
    assert_one_line_error(caught.value, *words)


@pytest.mark.parametrize(
    ("name", "billions", "tied"),
    [("random_1b", 1.2358, True), ("random_3b", 3.2128, True), ("random_8b", 8.0303, False)],
)
def test_a_random_model_has_the_size_it_is_named_for(
    name: str, billions: float, tied: bool
) -> None:
    """Parameter counts equal those of the published models' cards; no weights are drawn."""
    config = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    architecture = OmegaConf.to_container(config.architecture)
    assert isinstance(architecture, dict)
    with torch.device("meta"):
        made = LlamaForCausalLM(AutoConfig.for_model(**architecture))
    assert sum(weight.numel() for weight in made.parameters()) / 1e9 == pytest.approx(
        billions, abs=1e-4
    )
    assert made.config.tie_word_embeddings == tied


LONGER: dict[str, Any] = {
    "rope_parameters": {
        **{"rope_type": "yarn", "factor": 4.0},
        "original_max_position_embeddings": 64,
    }
}


def test_fields_of_the_configuration_may_be_changed(folder: Path) -> None:
    """The window follows, and neither name nor digest is that of the model as it was saved."""
    plain, longer = (
        load_model("mine", str(folder), config_overrides=given) for given in (None, LONGER)
    )
    assert (plain.window, longer.window) == (64, 256)
    assert (plain.name, longer.name) == ("mine", "mine (other rope_parameters)")
    assert (
        plain.digest
        != longer.digest
        == load_model("a", str(folder), config_overrides=LONGER).digest
    )
    rope = longer.model.config.rope_parameters
    assert rope == {**plain.model.config.rope_parameters, **LONGER["rope_parameters"]}
    ids = torch.arange(50)[None]
    with torch.no_grad():
        assert not torch.allclose(plain.model(ids).logits, longer.model(ids).logits, atol=1e-4)
    shape = read_shape("mine", str(folder), config_overrides=LONGER)
    assert (shape.window, shape.name) == (256, longer.name)
    assert load_without_weights("mine", str(folder), config_overrides=LONGER).window == 256
    assert read_shape("mine", str(folder), config_overrides=LONGER, window=100).window == 100


def test_the_architecture_of_random_weights_may_be_changed() -> None:
    rope = {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    plain, changed = (
        load_model("mine", "random", architecture=SMALL, config_overrides=given)
        for given in (None, rope)
    )
    assert changed.name == "mine (other rope_parameters)"
    assert changed.digest != plain.digest


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"rope_scale": 2}, "config_overrides must name fields of the model's configuration, got"),
        ({"rope_parameters": {"rope_type": "yarm"}}, "rope_type must be one of"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "must have a factor"),
        ({"rope_parameters": 5}, "config_overrides must be values that the model's configuration"),
        ({"num_hidden_layers": 3}, "no weights for model.layers.1."),
    ],
)
def test_changes_that_a_configuration_cannot_have(
    folder: Path, overrides: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelNotAvailable) as caught:
        load_model("mine", str(folder), config_overrides=overrides)
    assert_one_line_error(caught.value, words)


def test_a_folder_with_an_adapter_is_no_model(copy: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelNotAvailable) as caught:
        load_model("mine", str(copy))
    assert_one_line_error(
        caught.value, "model.path must be a whole model", f"model.path=BASE model.adapter={copy}"
    )


def test_revision_and_device_map_are_passed_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To whatever reads from the hub, of which there is none here."""
    asked: dict[str, list[Any]] = {"revision": [], "device_map": []}

    def reading(kind: Any) -> Any:
        read = kind.from_pretrained

        def from_folder(source: str, **given: Any) -> Any:
            if source != "owner/mine":  # by what is read here
                return read(source, **given)
            for name in asked.keys() & given.keys():
                asked[name].append(given[name])
            return read(folder, **{**given, "revision": None, "device_map": None})

        return from_folder

    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        kind = getattr(load, name)
        monkeypatch.setattr(kind, "from_pretrained", reading(kind))
    monkeypatch.setattr(load, "find_spec", lambda name: name)
    monkeypatch.setattr(
        load, "cached_file", lambda path, name, revision, **more: f"{folder}/{revision and name}"
    )
    loaded = load_model("mine", "owner/mine", revision="v1", device_map="auto")
    assert loaded.window == 64
    assert asked == {"revision": ["v1"] * 3, "device_map": ["auto"]}


def test_gguf_files_are_named_where_they_are_found(tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    file.touch()
    with pytest.raises(ModelNotAvailable, match=r"no config\.json, got none; use model\."):
        read_shape("mine", str(tmp_path))
    wanted = f"it is a file: use model.path={tmp_path} model.gguf_file=small.gguf"
    with pytest.raises(ModelNotAvailable, match=re.escape(wanted)):
        read_shape("mine", str(file))
