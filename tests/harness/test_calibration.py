"""Calibration: its prompts share no words with tests, its states are the model's."""

import gc
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from topkbench.harness.calibration import Calibration
from topkbench.harness.fitting import fit_layers
from topkbench.harness.samples import Sample
from topkbench.methods.hata import HATA
from topkbench.methods.loki import Loki
from topkbench.models.load import LoadedModel
from topkbench.models.prefill import prefill
from topkbench.tasks.ruler_words import RulerWords
from topkbench.tasks.ruler_words_prompts import SUBTASKS, CalibrationPrompts
from topkbench.tasks.words import (
    CALIBRATION_NAMES,
    CALIBRATION_NUMBERS,
    TEMPLATE_WORDS,
    TEST_NAMES,
    random_names,
    word_pools,
)

CONF = Path(__file__).parents[2] / "conf"
SEED = CalibrationPrompts().seed
LENGTH = 260
PROMPTS = CalibrationPrompts(seed=3, num_sequences=7, max_length=LENGTH)


class Everything(HATA):
    """A method that asks for the queries of all positions."""

    def query_positions(self, layer: int, lengths: Sequence[int]) -> list[list[int]]:
        return [list(range(n)) for n in lengths]


@pytest.fixture(scope="module")
def calibration(loaded: LoadedModel) -> Calibration:
    return Calibration.draw(loaded, Everything(), PROMPTS)


@pytest.fixture(scope="module")
def captured(calibration: Calibration) -> dict[int, list[tuple[Tensor, Tensor]]]:
    return calibration.capture([0, 1])


# Disjoint from every test --------------------------------------------------------------------


def content(text: str) -> list[str]:
    """Return a text's words, names and numbers without the words of the prompt templates."""
    # The numbers of a list's entries are part of the template; a variable's has five digits.
    words = re.findall(r"[A-Za-z]+|\d{5,}", text)
    return [word for word in words if word.lower() not in WORDING]


# The templates also contain these words, which are not in TEMPLATE_WORDS.
WORDING = {*TEMPLATE_WORDS, "all", "do", "in", "is", "it", "of", "ones", "that", "to"}


def grams(words: list[str], size: int = 8) -> set[tuple[str, ...]]:
    return set(zip(*(words[start:] for start in range(size)), strict=False))


def axis(config: DictConfig, key: str, default: str) -> list[str]:
    """Return the values of one axis of a sweep."""
    text = config.hydra.sweeper.params.get(key)
    if text is None:
        return [default]
    (override,) = OverridesParser.create().parse_overrides([f"{key}={text}"])
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    return list(override.sweep_string_iterator())


def experiments_tasks(folder: Path) -> Iterator[RulerWords]:
    """Yield the RULER tasks of conf/experiment at each length and seed, with few samples."""
    for name in sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            overrides = [f"experiment={name}", f"cache_dir={folder}", "num_samples=2"]
            config = compose("config", overrides, return_hydra_config=True)
        if config.task.name == "lm_eval":  # its data are not at hand
            continue
        lengths = axis(config, "task.length", str(config.task.get("length") or "null"))
        for length, seed in product(lengths, axis(config, "seed", "0")):
            config.seed = int(seed)
            if "length" in config.task:
                config.task.length = None if length == "null" else int(length)
            task = instantiate(config.task)
            if isinstance(task, RulerWords):
                task.num_samples = 2
                yield task


@pytest.fixture(scope="module")
def reader(loaded: LoadedModel) -> LoadedModel:
    """The model with a window large enough for every length; only its tokenizer is used."""
    return replace(loaded, window=2**20)


@pytest.fixture(scope="module")
def texts(reader: LoadedModel) -> list[str]:
    """The texts that artifacts are fitted on by default."""
    return CalibrationPrompts().texts(reader, 4096, 14)


@pytest.fixture(scope="module")
def samples(reader: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Samples of every length, seed and sub-task that an experiment uses."""
    folder = tmp_path_factory.mktemp("samples")
    drawn = [task.samples(reader) for task in experiments_tasks(folder)]
    every = {one.sample_id: one for samples in drawn for one in samples}
    assert {one.subtask for one in every.values()} >= set(SUBTASKS)
    return list(every.values())


def whole(sample: Sample) -> str:
    return f"{sample.context} {sample.question} {sample.answer_prefix} {' '.join(sample.answers)}"


def test_the_words_and_names_of_calibration_and_tests_are_disjoint() -> None:
    test_words, calibration_words = map(set, word_pools())
    assert not test_words & calibration_words
    for letters, upper in ((5, True), (6, False)):
        # A larger count extends the same sequence, so the halves are disjoint for any count.
        names = random_names(letters, upper, count=999)
        assert not set(names[TEST_NAMES]) & set(names[CALIBRATION_NAMES])


def test_calibration_uses_only_its_own_words_and_names(texts: list[str]) -> None:
    names = [random_names(5, True)[CALIBRATION_NAMES], random_names(6, False)[CALIBRATION_NAMES]]
    allowed = {*word_pools()[1], *names[0], *names[1], *CALIBRATION_NUMBERS}
    found = set().union(*map(content, texts))
    assert found <= allowed
    assert found >= CALIBRATION_NUMBERS  # all reserved numbers are used
    assert len(found) > 400


def test_test_samples_use_only_their_own_words_and_names(samples: list[Sample]) -> None:
    names = [random_names(5, True)[TEST_NAMES], random_names(6, False, 999)[TEST_NAMES]]
    allowed = {*word_pools()[0], *names[0], *names[1]}
    found = set().union(*(content(whole(sample)) for sample in samples))
    numbers = {word for word in found if word.isdigit()}
    assert numbers
    assert not numbers & CALIBRATION_NUMBERS
    assert found - numbers <= allowed
    assert len(found) > 1000


def test_no_key_value_or_run_of_words_of_calibration_is_in_a_test(
    texts: list[str], samples: list[Sample]
) -> None:
    fitted = [content(text) for text in texts]
    tested = [content(whole(sample)) for sample in samples]
    # Content includes keys, values, variables and coded words, so none of them is shared.
    assert not set().union(*map(set, fitted)) & set().union(*map(set, tested))
    runs = set().union(*map(grams, fitted))
    assert len(runs) > 2000
    assert not runs & set().union(*map(grams, tested))


def test_a_test_sample_never_uses_a_number_of_calibration(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def number(folder: str) -> str:
        task = RulerWords(
            length=300, num_samples=1, subtasks=["vt"], cache_dir=str(tmp_path / folder)
        )
        (sample,) = task.samples(loaded)
        return re.findall(r"\d{5}", sample.question)[0]

    first = number("first")
    monkeypatch.setattr(
        "topkbench.tasks.ruler_words_prompts.CALIBRATION_NUMBERS", frozenset({first})
    )
    assert number("second") != first


def test_no_random_seed_is_shared_by_tests_and_calibration(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random generators are seeded by strings; only calibration's begin with "calibration-"."""
    used: list[str] = []

    class RecordingRandom(random.Random):
        def __init__(self, seed: str) -> None:
            used.append(seed)
            super().__init__(seed)

    monkeypatch.setattr("random.Random", RecordingRandom)
    CalibrationPrompts().texts(loaded, 300, 7)
    RulerWords(length=300, num_samples=1, seed=SEED, cache_dir=str(tmp_path)).samples(loaded)
    calibration, test = used[:7], used[7:]
    assert calibration[0] == f"calibration-{SEED}-0"
    assert test[0] == f"{SEED}-niah_single-300-0"
    assert len(test) == 7
    assert all(seed.startswith("calibration-") for seed in calibration)
    assert all(seed.split("-")[0] == str(SEED) for seed in test)


# The captured states -------------------------------------------------------------------------


def test_texts_depend_on_the_seed_alone(loaded: LoadedModel) -> None:
    texts = CalibrationPrompts(seed=3).texts(loaded, LENGTH, 7)
    assert texts == CalibrationPrompts(seed=3).texts(loaded, LENGTH, 7)
    assert texts[:2] == CalibrationPrompts(seed=3).texts(loaded, LENGTH, 2)
    assert texts != CalibrationPrompts(seed=4).texts(loaded, LENGTH, 7)
    assert all(len(loaded.tokenizer.encode(text)) <= LENGTH for text in texts)


def test_captured_keys_equal_those_of_the_cache(
    loaded: LoadedModel, captured: dict[int, list[tuple[Tensor, Tensor]]]
) -> None:
    texts = CalibrationPrompts(seed=3).texts(loaded, LENGTH, 7)
    assert [len(states) for states in captured.values()] == [7, 7]
    for number in (0, 6):
        prefilled = prefill(loaded.model, loaded.tokenizer.encode(texts[number]))
        for layer in range(2):
            _, keys = captured[layer][number]
            assert keys.dtype == loaded.model.dtype
            torch.testing.assert_close(keys, prefilled.key_states[layer], rtol=1e-4, atol=1e-4)


def test_captured_queries_give_the_models_own_attention(
    loaded: LoadedModel, captured: dict[int, list[tuple[Tensor, Tensor]]]
) -> None:
    model = loaded.model
    ids = torch.tensor(
        [loaded.tokenizer.encode(CalibrationPrompts(seed=3).texts(loaded, LENGTH, 1)[0])]
    )
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        attentions = model(ids, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    for layer in range(2):
        queries, keys = captured[layer][0]
        assert queries.shape == (4, ids.shape[1], 16)
        logits = queries[:, -1:] @ keys.repeat_interleave(2, 0).mT * 16**-0.5
        expected = attentions[layer][0, :, -1:]
        torch.testing.assert_close(logits.softmax(-1), expected, rtol=1e-3, atol=1e-4)


def test_only_the_queries_that_a_method_asks_for_are_captured(
    loaded: LoadedModel,
    calibration: Calibration,
    captured: dict[int, list[tuple[Tensor, Tensor]]],
) -> None:
    method = HATA(queries_per_sequence=3)
    states = Calibration.draw(loaded, method, PROMPTS).capture([1])
    assert list(states) == [1]
    positions = method.query_positions(1, calibration.lengths)
    assert all(len(at) == 3 and min(at) >= 100 for at in positions)
    for (queries, keys), at, (every, same) in zip(states[1], positions, captured[1], strict=True):
        assert torch.equal(queries, every[:, at])
        assert torch.equal(keys, same)
    for queries, _ in Calibration.draw(loaded, Loki(), replace(PROMPTS, num_sequences=2)).capture(
        [0]
    )[0]:
        assert queries.shape == (4, 0, 16)


def test_capturing_leaves_the_model_unchanged(
    loaded: LoadedModel, captured: dict[int, list[tuple[Tensor, Tensor]]]
) -> None:
    assert loaded.model.config._attn_implementation == "sdpa"


def test_the_description_names_prompts_seed_and_words(calibration: Calibration) -> None:
    assert calibration.description.startswith("7 prompts of 260 tokens, niah_single, niah_multikey")
    assert calibration.description.endswith("seed 3, 512 words that no test uses")


def test_a_small_window_shortens_the_prompts(loaded: LoadedModel) -> None:
    (length,) = Calibration.draw(
        loaded, Loki(), CalibrationPrompts(seed=3, num_sequences=1, max_length=99_999)
    ).lengths
    assert loaded.window - 50 < length <= loaded.window


# The bound on memory -------------------------------------------------------------------------


def test_layers_are_grouped_by_the_memory_limit(loaded: LoadedModel) -> None:
    def groups(limit: int) -> list[list[int]]:
        prompts = [list(range(1, 11)), list(range(1, 21))]
        return Calibration(loaded, HATA(rbit=32), prompts, limit, "", [0, 1]).groups()

    # 2 KV heads of 30 keys and 4 query heads of 1 query a sequence, 16 channels of 4 bytes.
    layer = (2 * 30 + 4 * 2) * 16 * 4
    assert groups(2 * layer) == [[0, 1]]
    assert groups(2 * layer - 1) == [[0], [1]]
    assert groups(layer) == [[0], [1]]
    with pytest.raises(ValueError, match=r"a layer must fit calibration_memory_gib, got 4.05e-06"):
        groups(layer - 1)


class MeasuredHATA(HATA):
    """Measures the memory in use when the fit of a layer begins."""

    def fit_layer(self, layer, states, report=None):  # type: ignore[no-untyped-def]
        self.measure()
        return super().fit_layer(layer, states, report)


@pytest.mark.parametrize("layers_at_once", [1, 2])
def test_queries_and_keys_never_exceed_the_memory_limit(
    loaded: LoadedModel, layers_at_once: int
) -> None:
    """Counts the bytes of all tensors that were created since the test began."""

    def tensors() -> list[Tensor]:
        return [one for one in gc.get_objects() if type(one) is Tensor and one.numel()]

    def storages(tensors: list[Tensor]) -> dict[int, int]:
        return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}

    method = MeasuredHATA(rbit=32, epochs=1, steps_per_epoch=1)
    calibration = Calibration.draw(loaded, method, replace(PROMPTS, num_sequences=4))
    calibration.memory_limit = layers_at_once * calibration.num_bytes(0)
    learned = 4 * 2 * 16 * 32  # the weights of the layers fitted before, float32
    # A reference keeps older tensors alive: if one were freed, a new tensor at its address would
    # not be counted.
    older, used = tensors(), []
    before = storages(older)

    def measure(*_: object) -> None:
        new = [size for address, size in storages(tensors()).items() if address not in before]
        used.append(sum(new))

    method.measure = measure  # type: ignore[attr-defined]
    hook = loaded.model.base_model.register_forward_pre_hook(measure)
    try:
        fit_layers(method, calibration, [torch.device("cpu")])
    finally:
        hook.remove()
    groups = 2 // layers_at_once
    assert len(used) == 4 * groups + 2  # before each prompt, and before each layer is fitted
    ids = 8 * LENGTH  # the token ids of the current prompt
    assert max(used) <= calibration.memory_limit + learned + ids
    # When the first layer is fitted, its whole group is in memory: the measurement works.
    assert used[4] >= calibration.memory_limit
    # When the next group begins, nothing of the previous one is left.
    assert used[5] <= (learned + ids if layers_at_once == 1 else calibration.num_bytes(1) + learned)
