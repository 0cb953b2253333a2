"""Rows have no numbers if the method did not act or if a result is not finite."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Olmo3Config, Olmo3ForCausalLM

from topkbench.harness.canary import Canary, check_acting
from topkbench.harness.cell import run_cell
from topkbench.harness.decoding import NotFiniteError, tokenise_all
from topkbench.harness.quality import check_finite
from topkbench.harness.reads import density_of_all_layers
from topkbench.harness.speed import time_prompt
from topkbench.harness.task import Context, Outcome
from topkbench.methods.base import AnyMethod, Policy
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.quest import Quest
from topkbench.models.load import LoadedModel
from topkbench.models.prefill_store import PrefillStore
from topkbench.models.step_count import MethodBypassedError
from topkbench.tasks.decode_latency import DecodeLatency
from topkbench.tasks.decode_throughput import DecodeThroughput
from topkbench.tasks.ruler_words import RulerWords
from topkbench.tasks.selection import SelectionTask

MEASURED = ("score", "recall_at_k", "decode_ms_p50", "speedup_vs_full", "density")


def context_of(loaded: LoadedModel, tmp_path: Path, method: AnyMethod, k: int = 24) -> Context:
    policy = Policy(k=k, num_sink=0, num_recent=0)
    store = PrefillStore(loaded.model)
    return Context(loaded, store, method, policy, FullAttention(), {})


def ruler(tmp_path: Path, **knobs: Any) -> RulerWords:
    settings = {"length": 200, "num_samples": 1, "subtasks": ("niah_single",)}
    return RulerWords(**{**settings, "cache_dir": str(tmp_path), **knobs})


def run(loaded: LoadedModel, tmp_path: Path, method: AnyMethod, **knobs: Any) -> Outcome:
    return run_cell(context_of(loaded, tmp_path, method), ruler(tmp_path, **knobs))


@pytest.fixture
def breakable(loaded: LoadedModel) -> LoadedModel:
    """Return a copy of the model that a test may modify."""
    return replace(loaded, model=copy.deepcopy(loaded.model))


def bypass_method(loaded: LoadedModel, layer: int) -> None:
    """Make a layer use SDPA, whatever method is attached."""
    attention: Any = loaded.model.get_submodule(f"model.layers.{layer}.self_attn")
    forward = attention.forward

    def forward_by_sdpa(*args: Any, **kwargs: Any) -> Any:
        attached = attention.config._attn_implementation
        attention.config._attn_implementation = "sdpa"
        try:
            return forward(*args, **kwargs)
        finally:
            attention.config._attn_implementation = attached

    attention.forward = forward_by_sdpa


# Did the method act? --------------------------------------------------------------------------


def test_a_method_bypassed_in_one_layer_has_no_numbers(
    breakable: LoadedModel, tmp_path: Path
) -> None:
    context = context_of(breakable, tmp_path, ExactTopK())
    check_acting(context)  # passes before the layer is broken
    bypass_method(breakable, 1)
    (row,) = run_cell(context, ruler(tmp_path)).rows
    assert row.status == "wrong"
    assert "of 64 steps of single layers 32 attended to everything" in row.reason
    assert "in layer 1)" in row.reason
    assert not any(row.values.get(name) for name in MEASURED)


@pytest.mark.parametrize(
    "task", [SelectionTask, RulerWords, DecodeThroughput], ids=lambda task: task.__name__
)
def test_the_canary_refuses_a_model_that_bypasses_the_method(
    breakable: LoadedModel, tmp_path: Path, task: Any
) -> None:
    for layer in range(2):
        bypass_method(breakable, layer)
    made = DecodeThroughput(lengths=(100,)) if task is DecodeThroughput else ruler(tmp_path)
    (row,) = run_cell(context_of(breakable, tmp_path, ExactTopK()), made).rows
    assert row.status == "wrong"
    assert "must go through canary, but of 12 steps of single layers 12 attended" in row.reason


def test_the_canary_detects_that_a_selection_has_no_effect(
    breakable: LoadedModel, tmp_path: Path
) -> None:
    """With a zero output projection the logits are the same for any selection."""
    for layer in range(2):
        attention: Any = breakable.model.get_submodule(f"model.layers.{layer}.self_attn")
        torch.nn.init.zeros_(attention.o_proj.weight)
    with pytest.raises(
        MethodBypassedError, match=r"2 of 48 tokens selected .* got 0: what a method"
    ):
        check_acting(context_of(breakable, tmp_path, ExactTopK()))


def test_the_canary_compares_with_full_attention(
    breakable: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Halved(FullAttention):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            result = super().step(*args, **kwargs)
            return replace(result, out=result.out / 2)

    context = context_of(breakable, tmp_path, ExactTopK())
    with pytest.raises(ValueError, match="must be those of transformers' forward without one"):
        check_acting(replace(context, full=Halved()))
    monkeypatch.setattr(
        Canary, "attend", lambda self, *given: (given[0].query_states.flatten(1, 2), None)
    )
    with pytest.raises(MethodBypassedError, match="with every token selected the logits of random"):
        check_acting(context)


def test_the_canary_accepts_a_sound_model(loaded: LoadedModel, tmp_path: Path) -> None:
    check_acting(context_of(loaded, tmp_path, ExactTopK()))


# k at all tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [ExactTopK(), Quest()], ids=lambda one: one.name)
def test_k_at_all_tokens_is_skipped(loaded: LoadedModel, tmp_path: Path, method: AnyMethod) -> None:
    tasks: list[tuple[Any, int]] = [
        (ruler(tmp_path), 200),
        (ruler(tmp_path, question="dense"), 200),
        (DecodeLatency(lengths=(200,), batch_sizes=(), num_heads=4, num_kv_heads=2, head_dim=16,
                       dtype="float32", budget=None, cache_dir=str(tmp_path)), 200),
        (DecodeThroughput(lengths=(200,), budget=None), 200),
    ]  # fmt: skip
    for task, k in tasks:
        (row,) = run_cell(context_of(loaded, tmp_path, method, k), task).rows
        assert row.status == "skipped", task.name
        assert f"no step had more than k={k} (at most " in row.reason
        assert not any(row.values.get(name) for name in MEASURED)


def test_one_token_more_than_k_is_a_sparse_step(loaded: LoadedModel, tmp_path: Path) -> None:
    task = DecodeThroughput(lengths=(201,), budget=None, trials=1)
    (row,) = run_cell(context_of(loaded, tmp_path, ExactTopK(), 200), task).rows
    assert row.status == "ok"
    assert row.values["sparse_step_share"] == 1.0


def test_subtasks_of_at_most_k_tokens_are_skipped(loaded: LoadedModel, tmp_path: Path) -> None:
    from topkbench.tasks.needle import Needle

    task = Needle(lengths=(100, 300), depths=(50,), num_samples=1, cache_dir=str(tmp_path))
    outcome = run_cell(context_of(loaded, tmp_path, ExactTopK(), 100), task)
    short, long, mean = outcome.rows
    assert (short.status, short.values) == ("skipped", {})
    assert (long.status, long.values["sparse_step_share"]) == ("ok", 1.0)
    for name in ("score", "density", "num_samples", "sparse_step_share"):
        assert mean.values[name] == long.values[name]
    assert mean.values["kv_len"] > 250  # over the prompts on which the method acted
    assert {one["subtask"] for one in outcome.samples} == {"300 x 50%"}


# What is not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FullAttention(), ExactTopK()], ids=lambda one: one.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_weight_that_is_not_finite_fails(
    breakable: LoadedModel, tmp_path: Path, method: AnyMethod, value: float
) -> None:
    with torch.no_grad():
        breakable.model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = value  # type: ignore[union-attr, index, operator]
    with pytest.raises(NotFiniteError, match="must be finite, got infinity or NaN"):
        run(breakable, tmp_path, method)


def test_a_token_that_makes_a_step_infinite_fails(breakable: LoadedModel, tmp_path: Path) -> None:
    """The NaN weight belongs to a token of the question only: prefill and canary are finite."""
    task = ruler(tmp_path)
    (sample,) = task.samples(breakable)
    question_ids = set(breakable.tokenizer.encode(sample.question, add_special_tokens=False))
    (token,) = sorted(question_ids - set(breakable.tokenizer.encode(sample.context)))[:1]
    check_acting(context_of(breakable, tmp_path, ExactTopK()))
    with torch.no_grad():
        breakable.model.get_input_embeddings().weight[token] = float("nan")  # type: ignore[index, operator]
    with pytest.raises(NotFiniteError, match="must be finite, got infinity or NaN in layer 0"):
        run_cell(context_of(breakable, tmp_path, ExactTopK()), task)


def test_timed_steps_that_are_not_finite_have_no_time(
    breakable: LoadedModel, tmp_path: Path
) -> None:
    """Timed steps decode the most likely token after the context; only its weight is NaN."""
    task = ruler(tmp_path)
    context = context_of(breakable, tmp_path, ExactTopK())
    check_acting(context)
    (prompt,) = tokenise_all(breakable, task.samples(breakable), "sparse")
    token = int(context.store.get(prompt.prefill_ids).logits.argmax())
    assert token not in prompt.decode_ids
    with torch.no_grad():
        breakable.model.get_input_embeddings().weight[token] = float("nan")  # type: ignore[index, operator]
    with pytest.raises(NotFiniteError, match="must be finite"):
        time_prompt(context, prompt, 6)


def test_a_model_whose_layers_all_slide_is_skipped(olmo3: LoadedModel, tmp_path: Path) -> None:
    policy = Policy(k=24, num_sink=0, num_recent=0, dense_layers=(3,))
    context = replace(context_of(olmo3, tmp_path, ExactTopK()), policy=policy)
    (row,) = run_cell(context, DecodeThroughput(lengths=(320,), budget=None)).rows
    assert row.status == "skipped"
    assert row.reason.startswith("at least one layer must be left to exact")


class NanScores(ExactTopK):
    """Returns NaN scores although the output is finite."""

    def score(self, encoded: Any, index: Any, context: Any) -> Any:
        scores = super().score(encoded, index, context)
        scores[..., 0] = float("nan")
        return scores


def test_infinite_logits_are_reported_with_their_sample(
    breakable: LoadedModel, tmp_path: Path
) -> None:
    check_acting(context_of(breakable, tmp_path, ExactTopK()))
    with torch.no_grad():
        breakable.model.get_output_embeddings().weight[7] = float("inf")  # type: ignore[index, operator]
    with pytest.raises(NotFiniteError, match=r"float32 at sample niah_single-200-0-0, 0 tokens af"):
        run_cell(context_of(breakable, tmp_path, ExactTopK()), ruler(tmp_path))


def test_scores_that_are_nan_fail(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="a method's scores must be finite"):
        run(loaded, tmp_path, NanScores())


def test_slots_without_a_token_may_score_minus_infinity() -> None:
    from topkbench.methods.states import Ranking, StepResult

    scores = torch.tensor([[[0.5, -torch.inf]]])
    ranking = Ranking(None, scores, scores)
    check_finite(StepResult(torch.ones(1, 2, 4), None, None, ranking), 0)
    with pytest.raises(NotFiniteError, match="output must be finite"):
        check_finite(StepResult(torch.full((1, 2, 4), torch.inf), None, None, ranking), 0)


# Layers that the model's design leaves dense --------------------------------------------------


@pytest.fixture(scope="session")
def olmo3(loaded: LoadedModel) -> LoadedModel:
    """Four layers, all but the last with a sliding window of 32 tokens."""
    torch.manual_seed(0)
    config = Olmo3Config(
        vocab_size=len(loaded.tokenizer), hidden_size=64, intermediate_size=96,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, sliding_window=32,
        max_position_embeddings=1024, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    return replace(loaded, name="olmo3", model=Olmo3ForCausalLM(config).eval())


def test_sliding_layers_are_counted_with_their_window(olmo3: LoadedModel, tmp_path: Path) -> None:
    task = DecodeThroughput(lengths=(320,), budget=None, trials=1)
    (row,) = run_cell(context_of(olmo3, tmp_path, ExactTopK(), 40), task).rows
    assert row.status == "ok"
    values = row.values
    assert values["sparse_step_share"] == 0.25
    assert values["density"] == pytest.approx(40 / 320)
    assert values["density_all"] == pytest.approx((40 + 3 * 32) / (4 * 320))
    token = 2 * 2 * 16 * 4  # keys and values, 2 heads of 16 channels of 4 bytes
    assert values["bytes_read_per_step"] == 320 * token // 2 + 40 * token + 3 * 32 * token


def test_full_attention_reads_the_window_of_a_sliding_layer(
    olmo3: LoadedModel, tmp_path: Path
) -> None:
    context = context_of(olmo3, tmp_path, FullAttention())
    assert density_of_all_layers(context, 320, 1.0) == (320 + 3 * 32) / (4 * 320)


def test_our_cache_restricts_a_sliding_layer_to_its_window(olmo3: LoadedModel) -> None:
    from topkbench.models.cache import DecodeCache
    from topkbench.models.compat import token_logits
    from topkbench.models.prefill import prefill

    ids = torch.randint(3, 500, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    cache = DecodeCache([prefill(olmo3.model, ids[:50])], 10)
    from topkbench.models.attach import attach

    with attach(olmo3.model, FullAttention(), Policy(k=24)):
        for token in ids[50:]:
            cache.extend()
            decoded = token_logits(olmo3.model, torch.tensor([[token]]), cache, cache.positions)
    expected = token_logits(olmo3.model, torch.tensor([ids]))
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=1e-4)
