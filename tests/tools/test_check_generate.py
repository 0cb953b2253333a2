"""The check that our loop with full attention decodes as ``generate`` does."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from topkbench.harness.decoding import Prompt, tokenise
from topkbench.harness.generation import answer
from topkbench.harness.samples import Sample
from topkbench.harness.task import Context
from topkbench.methods.base import Policy
from topkbench.methods.full import FullAttention
from topkbench.models.load import LoadedModel
from topkbench.models.prefill_store import PrefillStore
from topkbench.tools import check_generate
from topkbench.tools.check_generate import QUESTIONS, Answers, Check, Parting, main

OTHER = 7
"""A token that the random model never chooses."""


def check_of(loaded: LoadedModel) -> Check:
    """Return a check of a model beside its copy."""
    full = FullAttention()
    context = Context(loaded, PrefillStore(loaded.model), full, Policy(k=64), full)
    return Check(context, replace(loaded, model=copy.deepcopy(loaded.model)))


def prompts(loaded: LoadedModel, new: int = 12) -> list[Prompt]:
    sample = Sample(
        sample_id="a",
        subtask="vt",
        context="the secret of word " * 17,
        question=" which word below",
        answer_prefix=" answer",
        answers=("x",),
        max_new_tokens=new,
        length=None,
    )
    return [tokenise(loaded, sample, question) for question in QUESTIONS]


def altered(change: Callable[[list[int]], list[int]]) -> Callable[..., dict[str, Any]]:
    """Return the harness's ``answer`` with other tokens."""

    def other(context: Context, batch: Sequence[Prompt]) -> dict[str, Any]:
        record = answer(context, batch)
        record["samples"][0]["tokens"] = change(record["samples"][0]["tokens"])
        return record

    return other


def test_the_loop_decodes_as_generate_does_on_the_shipped_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    GlobalHydra.instance().clear()
    subtasks = "task.subtasks=[niah_multikey,niah_multivalue,cwe]"
    settings = ["dtype=float32", "task.length=512", "num_samples=2", f"cache_dir={tmp_path}"]
    out = tmp_path / "answers.jsonl"
    assert main([*settings, subtasks, "--prompts", "4", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for question in QUESTIONS:
        assert f"float32, question={question}: 4 of 4 answers are equal token for token" in printed
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["question"] for one in lines] == ["sparse", "dense"] * 4
    assert [one["subtask"] for one in lines[::2]] == [
        *("niah_multikey", "niah_multivalue", "cwe", "niah_multikey")
    ]
    for one in lines:
        assert one["tokens"] == one["generated"]
        assert one["score"] == one["generated_score"]
        assert one["prompt_tokens"] > 350


def test_settings_of_the_models_own_generation_have_no_effect(loaded: LoadedModel) -> None:
    other = replace(loaded, model=copy.deepcopy(loaded.model))
    other.model.generation_config.repetition_penalty = 5.0
    other.model.generation_config.max_new_tokens = 1
    check = check_of(loaded)
    changed = Check(check.context, other)
    for one, another in zip(
        check.answers(prompts(loaded)), changed.answers(prompts(loaded)), strict=True
    ):
        assert one == another
        assert one.parting is None
        assert len(one.tokens) > 2


def test_where_answers_part_both_logits_are_compared(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = check_of(loaded)
    monkeypatch.setattr(check_generate, "answer", altered(lambda ids: [*ids[:2], OTHER, *ids[3:]]))
    for one in check.answers(prompts(loaded)):
        parting = one.parting
        assert parting is not None
        token = one.generated[2]
        assert (parting.step, parting.token, parting.own_token) == (2, token, OTHER)
        (prompt, _) = prompts(loaded)
        ids = torch.tensor([[*prompt.prefill_ids, *prompt.decode_ids, *one.generated[:2]]])
        logits = loaded.model(ids).logits[0, -1]
        assert parting.gap == pytest.approx((logits[token] - logits[OTHER]).item(), rel=1e-3)
        assert parting.own_gap == pytest.approx(-parting.gap, rel=1e-3)
        assert parting.largest == pytest.approx(logits.abs().max().item(), rel=1e-3)
        assert parting.difference < 1e-4
        assert one.is_wrong
        assert f"part at token 3: {token} is " in one.line()
        assert not replace(one, dtype="bfloat16").is_wrong


def test_an_answer_that_ends_too_early_parts_at_an_end_token(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = check_of(loaded)
    monkeypatch.setattr(check_generate, "answer", altered(lambda ids: ids[:1]))
    for one in check.answers(prompts(loaded)):
        assert one.parting is not None
        assert one.parting.step == 1
        assert one.parting.own_token in check.ends


@pytest.mark.parametrize(
    ("gap", "own_gap", "difference", "is_tie"),
    [
        (1e-6, 2e-6, 3e-6, True),
        (0.0, 0.0, 0.0, True),
        (3e-3, 1e-6, 3e-6, False),  # clear to generate
        (1e-6, 3e-3, 3e-6, False),  # clear to our loop
        (1e-6, 2e-6, 3e-3, False),  # computed differently, whatever these two tokens do
    ],
)
def test_a_tie_is_where_rounding_decides(
    gap: float, own_gap: float, difference: float, is_tie: bool
) -> None:
    parting = Parting(3, 1, 2, gap, own_gap, difference, largest=20.0)
    assert parting.is_tie is is_tie
    one = Answers("a", "vt", "float32", "dense", 9, [1], [2], "x", ["y"], 0.0, 0.0, parting)
    assert one.is_wrong is not is_tie


def test_an_answer_that_parts_without_a_tie_is_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    GlobalHydra.instance().clear()
    monkeypatch.setattr(check_generate, "answer", altered(lambda ids: [OTHER, *ids]))
    settings = ["task.length=512", "task.subtasks=[vt]", f"cache_dir={tmp_path}", "--prompts", "1"]
    assert main(["dtype=float32", *settings]) == 1
    printed = capsys.readouterr().out
    assert "question=sparse: 0 of 1 answers are equal token for token, 0 part where" in printed
    assert main(["dtype=bfloat16", *settings]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dtyp=float32"], "dtyp"),
        (["task=decode_latency"], "task must be one whose prompts are answered, got task=decode_"),
        (["task=selection"], "task must be one whose prompts are answered, got task=selection."),
        (["--prompts", "0"], "--prompts must be at least 1, got 0."),
        (
            ["task=ruler", "task.source=nowhere"],
            "task.source must be a file of JSON lines or Parquet",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    GlobalHydra.instance().clear()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_loop_decodes_a_real_model_as_generate_does(smollm2: LoadedModel) -> None:
    """In float32 token for token, but for ties; in a chat template, with its end of turn."""
    check = check_of(smollm2)
    for fact, asked in (("Paris is in France.", "Where is Paris?"), ("Ada is 9.", "Who is 9?")):
        sample = Sample(
            sample_id=asked,
            subtask="qa",
            context=f"{fact} " * 12,
            question=asked,
            answer_prefix="",
            answers=(fact.split()[0],),
            max_new_tokens=16,
            length=None,
        )
        both = [tokenise(smollm2, sample, question) for question in QUESTIONS]
        for one in check.answers(both):
            assert one.tokens
            assert not one.is_wrong
