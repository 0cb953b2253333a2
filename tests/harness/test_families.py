"""Models whose layers are unlike Llama's, through the tasks: what is measured, read and refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from topkbench.harness import pilot
from topkbench.harness.calibration import Calibration
from topkbench.harness.canary import check_acting
from topkbench.harness.cell import run_cell
from topkbench.harness.decoding import Decoder, Prompt, batches, tokenise
from topkbench.harness.fitting import fit_layers
from topkbench.harness.reads import accounting, density_of_all_layers
from topkbench.harness.samples import Sample, TaskDoesNotFit
from topkbench.harness.task import Context
from topkbench.methods.base import AnyMethod, Policy, cache_bytes
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.learning import artifact_spec, check_ready
from topkbench.models.attach import attach, geometry_of
from topkbench.models.compat import set_window
from topkbench.models.load import SHIPPED, LoadedModel
from topkbench.models.prefill_store import PrefillStore
from topkbench.models.recurrent import LayerState
from topkbench.models.step_count import MethodBypassedError
from topkbench.tasks.decode_throughput import DecodeThroughput
from topkbench.tasks.perplexity import Perplexity
from topkbench.tasks.ruler_words import RulerWords
from topkbench.tests.models.families import (
    OWN_CACHE,
    OWN_STATES,
    SERVED,
    WINDOW,
    Family,
    Refused,
)

TEXT = [[3, 4, 5, 6, 7, 8, 9] * 20, [9, 4, 7, 5, 3] * 20]
SIX = ("full", "hata", "quest", "loki", "snapkv", "streaming_llm")


def loaded_of(family: Family, **config: Any) -> LoadedModel:
    """Return a family's tiny model with the tokenizer of the shipped one."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED["tiny"])
    model = family.model(vocab_size=len(tokenizer), **config)
    return LoadedModel(family.name, model, tokenizer, "0" * 16, 512, short_answers=True)


def family(name: str) -> Family:
    (found,) = (one for one in SERVED if one.name == name)
    if not found.is_known:
        pytest.skip(f"this transformers has no {name}")
    return found


@pytest.fixture(scope="module")
def hybrid() -> LoadedModel:
    return loaded_of(family("qwen3_next"))


def context_of(
    loaded: LoadedModel, method: AnyMethod, k: int = 24, store: PrefillStore | None = None
) -> Context:
    policy = Policy(k=k, num_sink=0, num_recent=0, dense_layers=0)
    store = store or PrefillStore(loaded.model)
    return Context(loaded, store, method, policy, FullAttention())


def fitted(method: AnyMethod, loaded: LoadedModel) -> AnyMethod:
    """Return a method after fitting it on a text, if it learns."""
    if artifact_spec(method, geometry_of(loaded.model)) is not None:
        learned: Any = method
        layers = geometry_of(loaded.model).global_layers
        calibration = Calibration(loaded, learned, TEXT, 2**30, "made", layers)
        learned.load_artifact(fit_layers(learned, calibration, [torch.device("cpu")])[0])
    return method


def ruler(tmp_path: Path, **settings: Any) -> RulerWords:
    small = {"length": 256, "num_samples": 2, "subtasks": ("niah_single",)}
    return RulerWords(**{**small, "cache_dir": str(tmp_path), "timed_prompts": 0, **settings})


def test_states_of_layers_without_attention_are_taken_back_between_cells(
    hybrid: LoadedModel, tmp_path: Path, make_method: Callable[..., AnyMethod]
) -> None:
    """The answers of a cell are the same alone and after others on the same prompts."""
    methods = [
        FullAttention(),
        ExactTopK(),
        make_method("snapkv", fit=False),
        FullAttention(),
        ExactTopK(),
    ]
    store = PrefillStore(hybrid.model, kept_bytes=2**30)
    for method in methods:
        for question in ("sparse", "dense"):
            after, alone = (
                run_cell(context_of(hybrid, method, store=one), ruler(tmp_path, question=question))
                for one in (store, None)
            )
            assert [one["tokens"] for one in after.samples] == [
                one["tokens"] for one in alone.samples
            ], (method.name, question)
            assert all(row.status == "ok" for row in after.rows)
            assert after.rows[-1].values.get("known_tokens") in (None, "one by one")


def test_all_tokens_selected_answer_as_full_attention(hybrid: LoadedModel, tmp_path: Path) -> None:
    task = ruler(tmp_path)
    full = run_cell(context_of(hybrid, FullAttention()), task).samples
    store = PrefillStore(hybrid.model)
    for prompt, expected in zip(task.tokenised(hybrid), full, strict=True):
        context = context_of(hybrid, ExactTopK(), 400, store)
        assert context.full_answer(prompt) == expected["tokens"]


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        ("qwen3_next", "unified"),
        ("gpt_oss", "unified"),
        ("gpt_oss", "native"),
        ("gemma3_text", "native"),
        ("qwen3_moe", "native"),
        ("smollm3", "unified"),
        ("olmo3", "unified"),
    ],
)
def test_six_methods_answer_and_are_judged(
    name: str, protocol: str, tmp_path: Path, make_method: Callable[..., AnyMethod]
) -> None:
    chosen = family(name)
    by_layer = {
        key: [*value, *value] for key, value in chosen.config.items() if isinstance(value, list)
    }
    loaded = loaded_of(chosen, num_hidden_layers=4, **by_layer)
    for method in SIX:
        made = fitted(make_method(method, fit=False), loaded)
        policy = Policy(k=32, num_sink=1, num_recent=4, dense_layers=0)
        context = replace(context_of(loaded, made), policy=replace(policy, protocol=protocol))
        row = run_cell(context, ruler(tmp_path, num_samples=1)).rows[-1]
        assert row.status == "ok", (method, row.reason)
        if method != "full":
            assert row.values["density"] < 0.6
            assert 0 < row.values["recall_at_k"] <= 1


def test_windows_and_heads_of_each_layer_are_counted() -> None:
    """Gemma 4: two KV heads of 8 channels in a window of 8 tokens, one of 16 in the whole past."""
    loaded = loaded_of(family("gemma4_text"))
    context = context_of(loaded, FullAttention())
    local, whole = 2 * 2 * 8 * 4, 2 * 1 * 16 * 4  # keys and values of a token, in float32
    found = accounting(context, 100, None)
    assert found["bytes_read_per_step"] == 8 * local + 100 * whole
    assert density_of_all_layers(context, 100, 1.0) == (8 + 100) / 200
    assert cache_bytes(context.geometry, 100) == 100 * (local + whole)
    cache = DecodeThroughput(lengths=(100,)).random_cache(context, 100)[0]
    assert cache.num_bytes == 100 * (local + whole)


def test_layers_without_attention_read_no_keys(hybrid: LoadedModel) -> None:
    context = context_of(hybrid, FullAttention())
    assert accounting(context, 100, None)["bytes_read_per_step"] == 100 * 2 * 2 * 8 * 4
    assert density_of_all_layers(context, 100, 0.5) == 0.5
    task = DecodeThroughput(lengths=(100,), budget=None, trials=1)
    (row,) = run_cell(context_of(hybrid, ExactTopK()), task).rows
    assert (row.status, row.values["sparse_step_share"]) == ("ok", 1.0)


def test_likelihoods_of_a_hybrid_model(hybrid: LoadedModel, tmp_path: Path) -> None:
    """Tokens in a forward each give what one forward over the whole window gives."""
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 60)
    task = Perplexity(length=120, windows=1, scored_tokens=20, files=[str(text)])
    row = run_cell(context_of(hybrid, ExactTopK(), 100), task).rows[-1]
    assert row.status == "ok"
    assert row.values["known_tokens"] == "one by one"
    assert abs(row.values["nll_delta"]) < 0.05


def test_a_fit_learns_the_layers_that_attend_to_the_whole_past(
    hybrid: LoadedModel, make_method: Callable[..., AnyMethod]
) -> None:
    method: Any = make_method("loki", fit=False)
    for tensor in fitted(method, hybrid).artifact.values():  # type: ignore[attr-defined]
        assert len(tensor) == 2
        assert not tensor[0].any()
        assert tensor[1].any()


class Text:
    """Two short texts."""

    name, seed, num_sequences, max_length = "made", None, 2, 100

    def sequences(self, loaded: LoadedModel, length: int, count: int) -> list[list[int]]:
        return [one[:length] for one in TEXT[:count]]

    def describe(self, length: int, count: int) -> str:
        return self.name


def test_a_plan_tries_a_fit_on_a_layer_that_attends_to_the_whole_past(
    hybrid: LoadedModel, make_method: Callable[..., AnyMethod]
) -> None:
    method: Any = make_method("loki", fit=False)
    layers = geometry_of(hybrid.model).global_layers
    assert pilot.fit(hybrid, method, Text(), None, layers).wall_s > 0


@pytest.mark.parametrize("refused", [OWN_CACHE, OWN_STATES], ids=lambda one: one.family.name)
def test_a_model_with_a_cache_or_states_of_its_own_is_refused(refused: Refused) -> None:
    if not refused.family.is_known:
        pytest.skip("this transformers has no such model")
    with pytest.raises((ValueError, MethodBypassedError), match=refused.why):
        check_acting(context_of(loaded_of(refused.family), ExactTopK()))


def test_a_fit_for_other_layers_is_another_and_is_refused(
    make_method: Callable[..., AnyMethod],
) -> None:
    """With a window of at most the layers' own, a layer with sliding attention is a global one."""
    method: Any = make_method("loki", fit=False)
    loaded = loaded_of(family("gemma3_text"))
    slides = geometry_of(loaded.model)
    fitted(method, loaded)
    check_ready(method, slides)
    set_window(loaded.model, WINDOW)
    whole = geometry_of(loaded.model)
    assert (slides.global_layers, whole.global_layers) == ([1], [0, 1])
    assert method.artifact_spec(slides) != method.artifact_spec(whole)
    with pytest.raises(ValueError, match="only zeros for layer 0; fit it on this model with"):
        check_ready(method, whole)


def test_states_that_are_not_the_models_are_refused(
    hybrid: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_of(family("qwen3_next"))
    batch = LayerState.batch

    def halved(rows: Any) -> Any:
        found = batch(rows)
        states = found["recurrent_states"]  # several in later releases of transformers
        halves = {at: one / 2 for at, one in states.items()} if type(states) is dict else states / 2
        return {**found, "recurrent_states": halves}

    monkeypatch.setattr(LayerState, "batch", halved)
    with pytest.raises(ValueError, match="must be those of transformers' forward without one"):
        check_acting(context_of(loaded, ExactTopK()))


def sample_of(prompt: str) -> Sample:
    return Sample(
        sample_id="0",
        subtask="made",
        context=prompt,
        question="?",
        answer_prefix="",
        answers=("",),
        max_new_tokens=2,
        length=None,
    )


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_change_with_the_length_are_on_one_side(kind: str) -> None:
    """As beyond 4,096 tokens of Phi-4-mini."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    loaded = loaded_of(
        family("llama"), rope_parameters={**rope, "original_max_position_embeddings": 16}
    )
    word = len(loaded.tokenizer.encode(" the apple", add_special_tokens=False))
    prompts = {at: " the apple" * (at // word) for at in (6, 14, 40)}
    assert not tokenise(loaded, sample_of(prompts[6]), "sparse").is_long
    with pytest.raises(TaskDoesNotFit, match=f"attends otherwise from 16 tokens on .{kind}."):
        tokenise(loaded, sample_of(prompts[14]), "sparse")
    if kind == "dynamic":
        with pytest.raises(TaskDoesNotFit, match=r"use a task\.length of at most 16"):
            tokenise(loaded, sample_of(prompts[40]), "sparse")
        return
    short, long = (tokenise(loaded, sample_of(prompts[at]), "sparse") for at in (6, 40))
    assert long.is_long
    assert batches([short, long, short], 4) == [[short, short], [long]]


def test_a_draft_of_several_tokens_over_a_hybrid_cache_is_not_padded(hybrid: LoadedModel) -> None:
    prompts = [Prompt(sample_of(""), (3, 4, 5), ask) for ask in ((6, 7), (8,))]
    decoder = Decoder(hybrid, PrefillStore(hybrid.model), prompts, 4)
    with (
        attach(hybrid.model, FullAttention(), Policy(k=24)),
        pytest.raises(ValueError, match="same number of known tokens, got \\[2, 1\\]"),
    ):
        decoder.read_question()


def test_the_density_of_all_layers_is_at_the_tokens_of_its_steps(tmp_path: Path) -> None:
    """A layer that slides over k tokens reads as much of the cache as one that selects k."""
    loaded = loaded_of(family("gemma3_text"), sliding_window=24)
    row = run_cell(context_of(loaded, ExactTopK(), 24), ruler(tmp_path)).rows[-1]
    assert row.values["density"] == pytest.approx(row.values["density_all"], rel=0.01)
