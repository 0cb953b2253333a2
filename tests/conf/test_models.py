"""The models of ``conf/model`` have the shapes that their owners publish; nothing is fetched."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from topkbench.models.attach import geometry_of
from topkbench.models.compat import (
    attention_modules,
    context_window,
    layer_of,
    partial_layers,
)
from topkbench.models.overrides import overridden

CONF = Path(__file__).parents[2] / "conf"


class Shape(NamedTuple):
    """What a model is, in its owner's words."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    sliding: int = 0
    without_attention: int = 0


def llama(hidden: int, inner: int, layers: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    """The fields that most families share, under the names of ``config.json``."""
    return {
        **{"model_type": "llama", "hidden_size": hidden, "intermediate_size": inner},
        **{"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv},
        **{"vocab_size": 512, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2},
        **more,
    }


def llama3(factor: float) -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"max_position_embeddings": 131072, "rope_theta": 5e5, "rope_scaling": scaling}


def qwen3(hidden: int, inner: int, layers: int, heads: int, kv: int = 8) -> dict[str, Any]:
    more = {"model_type": "qwen3", "head_dim": 128, "max_position_embeddings": 40960}
    more |= {"sliding_window": None, "use_sliding_window": False, "max_window_layers": layers}
    return llama(hidden, inner, layers, heads, kv, **more, rope_theta=1e6)


def qwen25(hidden: int, inner: int, layers: int, heads: int, kv: int, **more: Any) -> Any:
    sliding = {"use_sliding_window": False, "max_window_layers": layers, "sliding_window": 131072}
    given = {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1e6}
    return llama(hidden, inner, layers, heads, kv, **{**given, **sliding, **more})


def gemma3(hidden: int, inner: int, layers: int, heads: int, kv: int, **more: Any) -> Any:
    given = {"model_type": "gemma3_text", "head_dim": 256, "rope_theta": 1e6}
    given |= {"rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    return llama(hidden, inner, layers, heads, kv, **{**given, **more})


def with_images(text: dict[str, Any]) -> dict[str, Any]:
    """The larger Gemma 3 also read images, of which nothing is read here."""
    scaling = {"rope_type": "linear", "factor": 8.0}
    text |= {"sliding_window": 1024, "rope_scaling": scaling, "max_position_embeddings": 131072}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return {"model_type": "gemma3", "text_config": text, "vision_config": vision}


def yarn(factor: float, original: int) -> dict[str, Any]:
    return {
        **{"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original},
        **{"beta_fast": 32.0, "beta_slow": 1.0},
    }


def granite(hidden: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    """Of the hybrid ones, layers 5, 15, 25 and 35 have attention."""
    kinds = ["attention" if layer % 10 == 5 else "mamba" for layer in range(40)]
    mamba = {"mamba_n_heads": hidden // 32, "mamba_d_head": 64, "mamba_n_groups": 1}
    given = {"model_type": "granitemoehybrid", "max_position_embeddings": 131072}
    given |= {"layer_types": kinds, "shared_intermediate_size": 64, "num_local_experts": 0}
    return llama(hidden, 64, 40, heads, kv, **{**given, **mamba, **more})


EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
PUBLISHED: dict[str, tuple[dict[str, Any], Shape]] = {
    "smollm2_360m": (
        llama(960, 2560, 32, 15, 5, max_position_embeddings=8192),
        Shape(32, 15, 5, 64, 8192),
    ),
    "smollm2_1_7b": (
        llama(2048, 8192, 24, 32, 32, max_position_embeddings=8192),
        Shape(24, 32, 32, 64, 8192),
    ),
    "smollm3_3b": (
        llama(
            *(2048, 11008, 36, 16, 4),
            **{"model_type": "smollm3", "max_position_embeddings": 65536, "rope_theta": 5e6},
            no_rope_layers=[1, 1, 1, 0] * 9,
        ),
        Shape(36, 16, 4, 128, 65536),
    ),
    "llama31_8b": (llama(4096, 14336, 32, 32, 8, **llama3(8.0)), Shape(32, 32, 8, 128, 131072)),
    "llama32_1b": (
        llama(2048, 8192, 16, 32, 8, head_dim=64, **llama3(32.0)),
        Shape(16, 32, 8, 64, 131072),
    ),
    "llama32_3b": (
        llama(3072, 8192, 28, 24, 8, head_dim=128, **llama3(32.0)),
        Shape(28, 24, 8, 128, 131072),
    ),
    "llama2_7b_32k": (
        llama(
            *(4096, 11008, 32, 32, 32),
            **{"max_position_embeddings": 32768, "rope_scaling": {"type": "linear", "factor": 8.0}},
        ),
        Shape(32, 32, 32, 128, 32768),
    ),
    "qwen25_7b": (qwen25(3584, 18944, 28, 28, 4), Shape(28, 28, 4, 128, 32768)),
    "qwen25_14b_1m": (
        qwen25(5120, 13824, 48, 40, 8, max_position_embeddings=1010000, rope_theta=1e7),
        Shape(48, 40, 8, 128, 1010000),
    ),
    "qwen25_32b": (qwen25(5120, 27648, 64, 40, 8), Shape(64, 40, 8, 128, 32768)),
    "qwen3_0_6b": (qwen3(1024, 3072, 28, 16), Shape(28, 16, 8, 128, 40960)),
    "qwen3_1_7b": (qwen3(2048, 6144, 28, 16), Shape(28, 16, 8, 128, 40960)),
    "qwen3_4b": (qwen3(2560, 9728, 36, 32), Shape(36, 32, 8, 128, 40960)),
    "qwen3_8b": (qwen3(4096, 12288, 36, 32), Shape(36, 32, 8, 128, 40960)),
    "qwen3_14b": (qwen3(5120, 17408, 40, 40), Shape(40, 40, 8, 128, 40960)),
    "qwen3_32b": (qwen3(5120, 25600, 64, 64), Shape(64, 64, 8, 128, 40960)),
    "qwen3_30b_a3b": (
        qwen3(2048, 6144, 48, 32, 4) | EXPERTS | {"model_type": "qwen3_moe"},
        Shape(48, 32, 4, 128, 40960),
    ),
    "qwen3_next_80b_a3b": (
        llama(
            *(2048, 5120, 48, 16, 2),
            **{"model_type": "qwen3_next", "head_dim": 256, "partial_rotary_factor": 0.25},
            **{"max_position_embeddings": 262144, "rope_theta": 1e7, "full_attention_interval": 4},
            **{"linear_num_key_heads": 16, "linear_num_value_heads": 32, **EXPERTS},
            shared_expert_intermediate_size=8,
        ),
        Shape(48, 16, 2, 256, 262144, without_attention=36),
    ),
    "gemma3_270m": (
        gemma3(640, 2048, 18, 4, 1, sliding_window=512, max_position_embeddings=32768),
        Shape(18, 4, 1, 256, 32768, sliding=15),
    ),
    "gemma3_1b": (
        gemma3(1152, 6912, 26, 4, 1, sliding_window=512, max_position_embeddings=32768),
        Shape(26, 4, 1, 256, 32768, sliding=22),
    ),
    "gemma3_4b": (
        with_images(gemma3(2560, 10240, 34, 8, 4)),
        Shape(34, 8, 4, 256, 131072, sliding=29),
    ),
    "gemma3_12b": (
        with_images(gemma3(3840, 15360, 48, 16, 8)),
        Shape(48, 16, 8, 256, 131072, sliding=40),
    ),
    "gemma3_27b": (
        with_images(gemma3(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168)),
        Shape(62, 32, 16, 128, 131072, sliding=52),
    ),
    "gpt_oss_20b": (
        llama(
            *(2880, 2880, 24, 64, 8),
            **{"model_type": "gpt_oss", "head_dim": 64, "num_local_experts": 2},
            **{"num_experts_per_tok": 1, "sliding_window": 128, "max_position_embeddings": 131072},
            layer_types=["sliding_attention", "full_attention"] * 12,
            rope_scaling=yarn(32.0, 4096),
            rope_theta=150000.0,
        ),
        Shape(24, 64, 8, 64, 131072, sliding=12),
    ),
    "mistral_7b": (
        llama(
            *(4096, 14336, 32, 32, 8),
            **{"model_type": "mistral", "max_position_embeddings": 32768, "rope_theta": 1e6},
            sliding_window=None,
        ),
        Shape(32, 32, 8, 128, 32768),
    ),
    "mistral_small_24b": (
        llama(
            *(5120, 32768, 40, 32, 8),
            **{"model_type": "mistral", "max_position_embeddings": 32768, "rope_theta": 1e8},
            **{"sliding_window": None, "head_dim": 128},
        ),
        Shape(40, 32, 8, 128, 32768),
    ),
    "phi4_mini": (
        llama(
            *(3072, 8192, 32, 24, 8),
            **{"model_type": "phi3", "max_position_embeddings": 131072, "sliding_window": 262144},
            **{"original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75},
            rope_scaling={
                "type": "longrope",
                "short_factor": [1.0] * 48,
                "long_factor": [2.0] * 48,
            },
        ),
        Shape(32, 24, 8, 128, 131072),
    ),
    "glm4_9b": (
        llama(
            *(4096, 13696, 40, 32, 2),
            **{"model_type": "glm4", "max_position_embeddings": 32768, "head_dim": 128},
            partial_rotary_factor=0.5,
        ),
        Shape(40, 32, 2, 128, 32768),
    ),
    "olmo3_7b": (
        llama(
            *(4096, 11008, 32, 32, 32),
            **{"model_type": "olmo3", "max_position_embeddings": 65536, "sliding_window": 4096},
            layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 8,
            rope_scaling=yarn(8.0, 8192),
            rope_theta=500000,
        ),
        Shape(32, 32, 32, 128, 65536, sliding=24),
    ),
    "granite4_micro": (
        granite(2560, 40, 8, layer_types=["attention"] * 40, position_embedding_type="rope"),
        Shape(40, 40, 8, 64, 131072),
    ),
    "granite4_h_micro": (
        granite(2048, 32, 8, position_embedding_type="nope"),
        Shape(40, 32, 8, 64, 131072, without_attention=36),
    ),
    "granite4_h_tiny": (
        granite(1536, 12, 4, position_embedding_type="nope"),
        Shape(40, 12, 4, 128, 131072, without_attention=36),
    ),
    # Its keys have 192 channels and its values 128, of which what is cached is a projection.
    "deepseek_v2_lite": (
        llama(
            *(2048, 10944, 27, 16, 16),
            **{"model_type": "deepseek_v2", "max_position_embeddings": 163840, "q_lora_rank": None},
            **{"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128},
            **{"v_head_dim": 128, "n_routed_experts": 2, "num_experts_per_tok": 1},
            **{"moe_intermediate_size": 8, "n_shared_experts": 1, "first_k_dense_replace": 1},
            rope_scaling={**yarn(40.0, 4096), "mscale": 0.707, "mscale_all_dim": 0.707},
        ),
        Shape(27, 16, 16, 192, 163840),
    ),
}


def config_of(name: str) -> Any:
    """A model's configuration, as transformers reads the published fields."""
    return AutoConfig.for_model(**copy.deepcopy(PUBLISHED[name][0]))


def test_every_model_of_the_hub_has_its_published_shape_here() -> None:
    models = {path.stem: OmegaConf.load(path) for path in (CONF / "model").glob("*.yaml")}
    hub = {name for name, one in models.items() if "/" in str(OmegaConf.to_container(one)["path"])}  # type: ignore[call-overload,index]
    assert hub == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_is_read_with_its_published_shape(name: str) -> None:
    config, expected = config_of(name), PUBLISHED[name][1]
    text = config.get_text_config(decoder=True)
    layers = text.num_hidden_layers
    if not expected.sliding and not expected.without_attention:
        text.num_hidden_layers = 2  # all are alike
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    geometry = geometry_of(model)
    found = Shape(
        layers,
        geometry.num_heads,
        geometry.num_kv_heads,
        geometry.head_dim,
        context_window(config) or 0,
        len(partial_layers(model)),
        geometry.num_layers - len({layer_of(one) for one in attention_modules(model)}),
    )
    assert found == expected


@pytest.mark.parametrize(
    ("name", "window"),
    [
        *((name, 131072) for name in ("qwen25_7b", "qwen25_32b", "qwen3_4b", "qwen3_8b")),
        *((name, 131072) for name in ("qwen3_14b", "qwen3_32b", "qwen3_30b_a3b", "smollm3_3b")),
        ("qwen3_next_80b_a3b", 1048576),
    ],
)
def test_the_longer_window_that_a_file_names_is_what_its_overrides_give(
    name: str, window: int
) -> None:
    text = (CONF / "model" / f"{name}.yaml").read_text()
    words, _, overrides = text.partition("config_overrides: null  # ")[2].partition(" {")
    assert words.endswith(f"for {window:,} tokens")
    given = OmegaConf.to_container(OmegaConf.create("{" + overrides.splitlines()[0]))
    assert isinstance(given, dict)
    changed, _ = overridden(config_of(name), given)  # type: ignore[arg-type]
    assert context_window(changed) == window
    assert changed.rope_parameters["rope_theta"] == config_of(name).rope_parameters["rope_theta"]
