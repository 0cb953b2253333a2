"""The training sequences of the shipped model, and the recipe that training records."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from topkbench.models.load import load_model
from topkbench.models.tiny_tokenizer import build_tokenizer
from topkbench.tools import train_tiny
from topkbench.tools.train_tiny import WINDOW, Corpus, Phase, vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(vocabulary(), WINDOW)


@pytest.mark.parametrize("kind", ["copy", "recall", "lists", "variables", "mixed"])
@pytest.mark.parametrize("length", [320, 600])
def test_the_next_token_is_always_accepted(
    tokenizer: PreTrainedTokenizerFast, kind: str, length: int
) -> None:
    corpus = Corpus(tokenizer, seed=1)
    for _ in range(5):
        sequence = corpus.draw(kind, length)
        assert 0.6 * length < len(sequence.ids) <= length
        assert len(sequence.targets) > 5
        for position, accepted in sequence.targets:
            if position + 1 < len(sequence.ids):
                assert sequence.ids[position + 1] in accepted


def test_an_answer_already_given_is_no_longer_accepted(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = Corpus(tokenizer, seed=2)
    before: list[int] = []
    for _, accepted in corpus.draw("lists", 600).targets:
        if len(accepted) > 1:
            assert len(set(accepted)) == len(accepted) <= 4
            if len(accepted) < len(before):
                assert set(accepted) < set(before)
            before = accepted


def test_the_answer_is_the_keys_value_in_the_context(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = Corpus(tokenizer, seed=3)
    sequence = corpus.draw("recall", 600)
    text = tokenizer.decode(sequence.ids)
    context, _, questions = text.partition("\nWhat")
    asked = questions.split("What are the secret words of ")[1:]
    single = [one for one in asked if " and " not in one.partition("?")[0]]
    assert single
    for one in single[:-1]:  # the last may be cut
        key = one.partition("?")[0]
        answer = one.partition(f"The secret words: {key} ")[2].partition(".")[0]
        assert f"The secret words: {key} {answer}." in context


def test_the_recipe_records_the_phases_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = (Phase("copy", 32, 2, 2, 1e-3, 2.0), Phase("recall", 320, 1, 1, 1e-3, 2.0))
    monkeypatch.setattr(train_tiny, "CURRICULUM", short[:1])
    train_tiny.train(tmp_path, seed=0, first_phase=0, steps_scale=1.0)
    monkeypatch.setattr(train_tiny, "CURRICULUM", short)
    train_tiny.train(tmp_path, seed=5, first_phase=1, steps_scale=1.0)
    history = json.loads((tmp_path / "recipe.json").read_text())["history"]
    assert [(one["kind"], one["seed"], one["steps"]) for one in history] == [
        ("copy", 0, 2),
        ("recall", 5, 1),
    ]
    loaded = load_model("mine", str(tmp_path))
    assert loaded.model.config.num_hidden_layers == 4
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size
