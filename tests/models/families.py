"""The model families that topkbench serves: a tiny model of random weights of each.

``tools/make_families.py`` writes the table in docs/families.md from this list, and every line of it
is tested by ``test_families.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from topkbench.models.attach import IMPLEMENTATION

WINDOW = 8  # tokens that a layer with a sliding window sees; prompts are longer
VOCABULARY = 256


@dataclass(frozen=True, eq=False)
class Family:
    """One family of models.

    Attributes:
        name: Its ``model_type`` in transformers.
        models: Well-known models of it.
        layers: What its layers have beyond Llama's.
        config: Fields of the tiny model's configuration besides ``TINY``.
        global_layers: Layers of the tiny model that attend to the whole past.
        speculates: Whether InfiniGen can speculate its queries.
        vision: Fields of the configuration of a model that also sees images, around the text's.
        least: The lowest release of transformers that is known to make it with our attention.
    """

    name: str
    models: str
    layers: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    global_layers: tuple[int, ...] = (0, 1)
    speculates: bool = True
    vision: Mapping[str, Any] | None = None
    least: str = "5.5"

    @property
    def is_known(self) -> bool:
        """Whether the installed transformers has it."""
        is_new_enough = Version(transformers.__version__) >= Version(self.least)
        return self.name in CONFIG_MAPPING and is_new_enough

    def model(self, **config: Any) -> PreTrainedModel:
        """Return the tiny model in float32, as the loader prepares models."""
        torch.manual_seed(0)
        fields = {**TINY, **self.config, **config}
        if self.vision is not None:
            fields = {"text_config": fields, **self.vision}
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(self.name, **fields),
            dtype=torch.float32,
            attn_implementation=IMPLEMENTATION,
        )
        return made.eval().requires_grad_(False)


TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
_SHARED = {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}

SERVED = [
    Family("llama", "Llama 2 to 3.3, SmolLM2, Yi"),
    Family("mistral", "Mistral 7B, Mistral Small"),
    Family("mixtral", "Mixtral", "experts", _EXPERTS),
    Family("ministral", "Ministral 8B", "sliding windows", _SLIDING, (1,)),
    Family("qwen2", "Qwen2, Qwen2.5", "biases"),
    Family(
        "qwen2_moe",
        "Qwen1.5-MoE, Qwen2-57B-A14B",
        "biases, experts",
        {**_EXPERTS, "shared_expert_intermediate_size": 16},
    ),
    Family("qwen3", "Qwen3 0.6B to 32B", "norms of queries and keys"),
    Family("qwen3_moe", "Qwen3-30B-A3B", "norms of queries and keys, experts", _EXPERTS),
    Family(
        "qwen3_next",
        "Qwen3-Next-80B-A3B",
        "linear attention, gated output, experts",
        {**_EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 16},
        (1,),
        speculates=False,
    ),
    Family(
        "qwen3_5_text", "Qwen3.5", "linear attention, gated output", _LINEAR, (1,), speculates=False
    ),
    Family("phi3", "Phi-3, Phi-4", "joint projection"),
    Family(
        "phi3",
        "Phi-4-mini",
        "joint projection, partial rotary positions",
        {"partial_rotary_factor": 0.75, "head_dim": 16, "hidden_size": 64},
    ),
    Family("phimoe", "Phi-3.5-MoE", "biases, experts", _EXPERTS),
    Family("gemma", "Gemma"),
    Family("gemma2", "Gemma 2", "sliding windows, capped logits", _SLIDING, (1,)),
    Family(
        "gemma3_text",
        "Gemma 3 270M and 1B",
        "sliding windows, norms, two rotary bases",
        _SLIDING,
        (1,),
        speculates=False,
    ),
    Family(
        "gemma3",
        "Gemma 3 4B to 27B",
        "as Gemma 3 1B, beside a vision model that stays unused",
        _SLIDING,
        (1,),
        speculates=False,
        vision={
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": VOCABULARY + 1,
            "boi_token_index": VOCABULARY + 2,
            "eoi_token_index": VOCABULARY + 3,
        },
    ),
    Family(
        "gemma4_text",
        "Gemma 4 26B-A4B and 31B",
        "sliding windows, other head sizes in the layers between",
        {
            **_SLIDING,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        (1,),
        speculates=False,
    ),
    Family(
        "gpt_oss",
        "gpt-oss 20B and 120B",
        "sliding windows, learned sinks, experts",
        {**_EXPERTS, **_SLIDING},
        (1,),
    ),
    Family(
        "smollm3",
        "SmolLM3",
        "layers without positions",
        {"no_rope_layers": [1, 0]},
        speculates=False,
    ),
    Family("olmo", "OLMo"),
    Family("olmo2", "OLMo 2", "norms after the layers", speculates=False),
    Family("olmo3", "OLMo 3", "sliding windows", _SLIDING, (1,), speculates=False),
    Family("olmoe", "OLMoE", "norms, experts", _EXPERTS, speculates=False),
    Family("granite", "Granite 3, Granite 4 micro", "scaled logits"),
    Family("granitemoe", "Granite 3 MoE", "scaled logits, experts", _EXPERTS),
    Family(
        "granitemoehybrid",
        "Granite 4 h-tiny, h-small",
        "state-space layers, experts",
        {
            **_EXPERTS,
            **_MAMBA,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 16,
            "mamba_expand": 2,
        },
        (1,),
        speculates=False,
    ),
    Family(
        "falcon_h1",
        "Falcon-H1",
        "attention beside a state-space model in each layer",
        {**_MAMBA, "mamba_d_ssm": 64},
    ),
    Family(
        "lfm2",
        "LFM2",
        "short convolutions",
        {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
        (1,),
        speculates=False,
    ),
    Family(
        "bamba",
        "Bamba",
        "state-space layers",
        {**_MAMBA, "attn_layer_indices": [1]},
        (1,),
        speculates=False,
    ),
    Family(
        "jamba",
        "Jamba",
        "state-space layers, experts",
        {
            **_EXPERTS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
        (1,),
        speculates=False,
    ),
    Family(
        "deepseek_v2",
        "DeepSeek-V2, V2-Lite",
        "values narrower than keys (latent attention, expanded), experts",
        {**_EXPERTS, **_LATENT, "q_lora_rank": None, "topk_method": "greedy"},
        speculates=False,
    ),
    Family(
        "deepseek_v3",
        "DeepSeek-V3, R1, Kimi K2",
        "values narrower than keys (latent attention, expanded), experts",
        {**_EXPERTS, **_LATENT, "q_lora_rank": 16},
        speculates=False,
    ),
    Family("glm", "GLM-4 9B (2024)", "biases, partial rotary positions"),
    Family("glm4", "GLM-4 (0414)", "norms after the layers, partial rotary positions"),
    Family("glm4_moe", "GLM-4.5, 4.6", "experts", {**_EXPERTS, **_SHARED, "use_qk_norm": True}),
    Family("cohere", "Command R", "layers in parallel"),
    Family(
        "cohere2",
        "Command R7B, Command A",
        "sliding windows, layers without positions",
        _SLIDING,
        (1,),
        speculates=False,
    ),
    Family("starcoder2", "StarCoder2", "biases"),
    Family("stablelm", "StableLM 2", "partial rotary positions", speculates=False),
    Family("ernie4_5", "ERNIE 4.5 0.3B"),
    Family("exaone4", "EXAONE 4", "sliding windows, norms", _SLIDING, (1,), speculates=False),
    Family("nemotron", "Nemotron 4, Minitron", "partial rotary positions", least="5.24"),
    Family(
        "llama4_text",
        "Llama 4",
        "chunked attention, layers without positions, experts",
        {
            **_EXPERTS,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0],
            "intermediate_size_mlp": 48,
            "moe_layers": [1],
            "layer_types": ["chunked_attention", "full_attention"],
        },
        (1,),
        speculates=False,
    ),
    Family("hunyuan_v1_dense", "Hunyuan 0.5B to 7B", "norms after the rotation", speculates=False),
    Family("seed_oss", "Seed-OSS 36B", "biases"),
    Family("apertus", "Apertus", "norms of queries and keys"),
    Family("minimax_m2", "MiniMax-M2", "norms, experts", _EXPERTS, speculates=False),
]


@dataclass(frozen=True)
class Refused:
    """A family that topkbench does not serve.

    Attributes:
        family: The family.
        why: A part of the sentence that says why.
    """

    family: Family
    why: str


REFUSED = [
    Refused(
        Family("gpt2", "GPT-2", "attention modules that do not say how many heads share keys"),
        "found 0 for 2 layers in GPT2LMHeadModel",
    ),
    Refused(
        Family("gpt_neox", "Pythia", "attention modules that do not say how many heads share keys"),
        "found 0 for 2 layers in GPTNeoXForCausalLM",
    ),
    Refused(
        Family(
            "gemma3n_text",
            "Gemma 3n",
            "layers that use the keys and values of earlier ones",
            {
                "num_hidden_layers": 4,
                "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_kv_shared_layers": 2,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": VOCABULARY,
                "laurel_rank": 8,
                "activation_sparsity_pattern": [0.0] * 4,
            },
        ),
        "layer 2 of Gemma3nForCausalLM uses those of an earlier one",
    ),
]

OWN_STATES = Refused(
    Family(
        "recurrent_gemma",
        "RecurrentGemma",
        "states that are kept in its modules, not in its cache",
        {
            "num_hidden_layers": 3,
            "block_types": ["recurrent", "recurrent", "attention"],
            "attention_window_size": 512,
            "lru_width": 32,
        },
    ),
    "must (be those of transformers' forward|decode with topkbench's cache|go through canary)",
)
"""Is found when two prompts are decoded together."""
OWN_CACHE = Refused(
    Family(
        "minimax",
        "MiniMax-Text-01, M1",
        "linear attention in a cache of its own",
        {**_EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    ),
    "must decode with topkbench's cache.*MiniMax uses cache of its own",
)
"""Is found when its first tokens are decoded."""
