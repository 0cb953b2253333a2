"""Whether queries can be speculated is checked on each layer's own input, before anything runs."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from topkbench.methods.base import Policy
from topkbench.methods.infinigen import InfiniGen
from topkbench.models import speculation
from topkbench.models.attach import attach

SIZE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What each family does to a query that Llama does not, and the layer in which it is found.
OTHERS = {
    "hunyuan_v1_dense": (1, "its norm follows the rotation"),
    "smollm3": (3, "every fourth layer has no rotary positions"),
    "cohere2": (3, "every fourth layer has no rotary positions"),
    "exaone4": (3, "every fourth layer has no rotary positions"),
    "olmo2": (1, "its norm is over all heads"),
    "olmoe": (1, "its norm is over all heads"),
    "stablelm": (1, "a part of a head is rotated"),
    "phi": (1, "a part of a head is rotated"),
    "llama4_text": (1, "its rotations are complex numbers"),
}


def make(family: str, **changes: Any) -> PreTrainedModel:
    if family == "olmoe":
        changes |= {"num_experts": 2, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZE, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "granite", "cohere", "glm4"])
def test_llamas_relatives_are_supported(family: str) -> None:
    assert speculation.unsupported_reason(make(family)) is None


@pytest.mark.parametrize("family", sorted(OTHERS))
def test_other_queries_are_refused(family: str) -> None:
    layer, _ = OTHERS[family]
    model = make(family)
    reason = speculation.unsupported_reason(model)
    assert reason is not None
    assert reason.startswith("a layer's queries must be those that Llama's attention would compute")
    assert f"in layer {layer} of {type(model).__name__} they are not (" in reason
    assert reason.endswith("; use another method.")


def test_layers_with_rotations_of_their_own_are_refused() -> None:
    """The next layer is given other positions than the one whose input is read."""
    kinds = ["sliding_attention", "full_attention"]
    same = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in kinds}
    other = {**same, "full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    reasons = [
        speculation.unsupported_reason(
            make("gemma3_text", layer_types=kinds * 2, sliding_window=16, rope_parameters=rope)
        )
        for rope in (same, other)
    ]
    assert reasons[0] is None
    assert reasons[1] is not None
    assert "in layer 1 of Gemma3ForCausalLM they are not (they differ by" in reasons[1]


def test_positions_at_the_windows_end_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs only far from the beginning, such as a scaling by position, is found."""
    model = make("llama", max_position_embeddings=9000)
    original = type(model.model.layers[0].self_attn).forward  # type: ignore[union-attr]

    def scaled(self: Any, hidden_states: Any, position_embeddings: Any, **kwargs: Any) -> Any:
        far = torch.arange(hidden_states.shape[1]) >= speculation.TOKENS
        hidden_states = hidden_states * (1 + far[None, :, None])
        return original(self, hidden_states, position_embeddings, **kwargs)

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", scaled)  # type: ignore[union-attr]
    reason = speculation.unsupported_reason(model)
    assert reason is not None
    assert "they differ by" in reason


def test_a_model_is_refused_before_it_runs_and_checked_once() -> None:
    model, forwards = make("smollm3"), []
    model.register_forward_pre_hook(lambda *given: forwards.append(1))
    method = InfiniGen()
    skew, strength = torch.eye(16).expand(4, 2, 16, 16), torch.ones(4, 2, 16)
    method.load_artifact({"skew": skew, "key_strength": strength})
    for _ in range(2):
        block = attach(model, method, Policy(k=16))
        with pytest.raises(ValueError, match="to be speculated"), block:
            pass
    assert forwards == [1]
