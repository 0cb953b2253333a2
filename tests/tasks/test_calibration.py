"""What methods are fitted on: prompts of their own words, states of the model itself."""

import re
from types import SimpleNamespace

import pytest
import torch

from topkbench.methods.attach import geometry_of
from topkbench.models.load import LoadedModel
from topkbench.models.prefill import prefill
from topkbench.tasks.calibration import CapturedStates, calibration_texts, capture
from topkbench.tasks.ruler import Ruler
from topkbench.tasks.words import TEMPLATE_WORDS

LENGTH = 260


@pytest.fixture(scope="module")
def captured(loaded: LoadedModel) -> CapturedStates:
    return capture(loaded, num_sequences=7, max_length=LENGTH, seed=3)


def words(text: str) -> set[str]:
    return set(re.findall(r"\b(?:[a-z]{3,}|[A-Z]{5})\b", text)) - TEMPLATE_WORDS


def test_no_word_of_calibration_is_in_a_test(
    loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("samples")
    fitted = set().union(*map(words, calibration_texts(loaded, 500, 14, seed=3)))
    tested: set[str] = set()
    for sample in Ruler(length=500, num_samples=6, cache_dir=str(folder)).samples(loaded):
        tested |= words(sample.context + sample.question + " ".join(sample.answers))
    assert len(fitted) > 200
    assert len(tested) > 500
    assert fitted & tested <= {"all", "ones", "that"}  # wording beyond TEMPLATE_WORDS


def test_what_does_not_fit_into_memory_is_refused_before_it_is_read(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(available=2**20)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with pytest.raises(ValueError, match=r"fitting must hold .* GiB .* point artifact_dir at"):
        capture(loaded)


def test_texts_depend_on_the_seed_alone(loaded: LoadedModel) -> None:
    texts = calibration_texts(loaded, LENGTH, 7, seed=3)
    assert texts == calibration_texts(loaded, LENGTH, 7, seed=3)
    assert texts[:2] == calibration_texts(loaded, LENGTH, 2, seed=3)
    assert texts != calibration_texts(loaded, LENGTH, 7, seed=4)
    assert all(len(loaded.tokenizer.encode(text)) <= LENGTH for text in texts)


def test_captured_keys_are_the_caches(loaded: LoadedModel, captured: CapturedStates) -> None:
    texts = calibration_texts(loaded, LENGTH, 7, seed=3)
    assert (captured.num_layers, captured.sequences) == (2, 7)
    for place in (0, 6):
        own = prefill(loaded.model, loaded.tokenizer.encode(texts[place]))
        for layer in range(2):
            _, keys = captured.states(layer)[place]
            assert keys.dtype == torch.float32
            torch.testing.assert_close(keys, own.key_states[layer], rtol=1e-4, atol=1e-4)


def test_captured_queries_give_the_models_own_attention(
    loaded: LoadedModel, captured: CapturedStates
) -> None:
    model = loaded.model
    ids = torch.tensor([loaded.tokenizer.encode(calibration_texts(loaded, LENGTH, 1, seed=3)[0])])
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        attentions = model(ids, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    for layer in range(2):
        queries, keys = captured.states(layer)[0]
        assert queries.shape == (4, ids.shape[1], 16)
        logits = queries[:, -1:] @ keys.repeat_interleave(2, 0).mT * 16**-0.5
        expected = attentions[layer][0, :, -1:]
        torch.testing.assert_close(logits.softmax(-1), expected, rtol=1e-3, atol=1e-4)


def test_the_model_is_given_back_unchanged(loaded: LoadedModel, captured: CapturedStates) -> None:
    assert loaded.model.config._attn_implementation == "sdpa"


def test_the_description_says_what_was_read(captured: CapturedStates) -> None:
    assert captured.description.startswith("7 prompts of 260 tokens, niah_single, niah_multikey")
    assert captured.description.endswith("seed 3, 512 words that no test uses")


def test_a_small_window_shortens_the_prompts(loaded: LoadedModel) -> None:
    short = capture(loaded, num_sequences=1, max_length=99_999, seed=3)
    queries, _ = short.states(0)[0]
    assert queries.shape[1] <= loaded.window
    assert geometry_of(loaded.model).num_layers == short.num_layers
