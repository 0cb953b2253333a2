"""The shipped model: it has the artifacts that the defaults need, and k >= n is full attention."""

import functools
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from topkbench.harness import artifact
from topkbench.harness.calibration import Calibration
from topkbench.harness.cell import artifact_spec, prepare_method
from topkbench.harness.decoding import Decoder, Prompt, tokenise
from topkbench.harness.main import make_method
from topkbench.methods.base import AnyMethod, Policy, TopKMethod
from topkbench.methods.learning import LearningMethod
from topkbench.models.attach import attach
from topkbench.models.load import LoadedModel, load_model
from topkbench.models.prefill_store import PrefillStore
from topkbench.tasks.ruler_words import RulerWords
from topkbench.tasks.ruler_words_prompts import CalibrationPrompts

CONF = Path(__file__).parents[2] / "conf"
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("tiny", "tiny", "float32", short_answers=True)


@functools.cache
def settings(*overrides: str) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("config", overrides=[*overrides])


def method_of(name: str, *overrides: str) -> AnyMethod:
    method = make_method(settings(f"method={name}", *overrides).method)
    assert isinstance(method, TopKMethod)
    return method


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        *((name, ()) for name in ("loki", "double_sparsity", "infinigen", "hash_attention")),
        *(("hata", (f"rbit={rbit}",)) for rbit in (32, 64, 128, 256)),
        *(("hata/ranking", (f"rbit={rbit}",)) for rbit in (32, 64, 128)),
    ],
)
def test_a_fresh_checkout_has_every_artifact_that_the_defaults_ask_for(
    tiny: LoadedModel, name: str, overrides: tuple[str, ...]
) -> None:
    spec = artifact_spec(tiny, method_of(name, *overrides), CalibrationPrompts())
    assert spec is not None
    found = artifact.find(spec, artifact.SHIPPED)
    assert found is not None, f"models/tiny/artifacts must hold {artifact.file_name(spec)}"
    assert found.layers == {0, 1, 2, 3}


@pytest.mark.slow
def test_all_layers_would_be_fitted_within_five_minutes_and_a_layer_again_is_the_same(
    tiny: LoadedModel,
) -> None:
    method = method_of("hata", "rbit=128", "method.epochs=1")  # of 15
    assert isinstance(method, LearningMethod)
    calibration = Calibration.draw(tiny, method, CalibrationPrompts(), memory_limit=2**25)
    assert calibration.groups() == [[0], [1], [2], [3]]
    states = calibration.capture([2])[2]
    began = time.process_time()
    method.fit_layer(2, states)
    # Processor time, scaled to four layers and 15 epochs: at most five minutes on two cores.
    assert (time.process_time() - began) * 15 * 4 < 2 * 300
    few = Calibration.draw(tiny, method, CalibrationPrompts(num_sequences=2, max_length=512))
    first, second = (method.fit_layer(2, few.capture([2])[2])["hash_weight"] for _ in range(2))
    assert torch.equal(first, second)


@pytest.fixture(scope="module", params=["sparse", "dense"])
def full_answers(
    tiny: LoadedModel, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PrefillStore, list[tuple[Prompt, list[list[int]]]]]:
    """A store of prefills, and prompts with full attention's answers."""
    folder = tmp_path_factory.mktemp("full")
    task = RulerWords(length=400, num_samples=1, cache_dir=str(folder), question=request.param)
    store = PrefillStore(tiny.model)
    # A needle among others, and several needles.
    prompts = [tokenise(tiny, sample, request.param) for sample in task.samples(tiny)[1:3]]
    full = method_of("full")
    return store, [(prompt, answer(tiny, store, full, prompt)) for prompt in prompts]


def answer(
    tiny: LoadedModel, store: PrefillStore, method: AnyMethod, prompt: Prompt
) -> list[list[int]]:
    new_tokens = prompt.sample.max_new_tokens + 1
    decoder = Decoder(tiny, store, [prompt], new_tokens, method.traits.needs)
    with attach(tiny.model, method, Policy(k=9999)):
        return decoder.generate()


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_of_all_tokens_gives_full_attentions_answers(
    tiny: LoadedModel,
    name: str,
    full_answers: tuple[PrefillStore, list[tuple[Prompt, list[list[int]]]]],
    tmp_path: Path,
) -> None:
    store, prompts = full_answers
    method = method_of(name, "rbit=32")
    prepare_method(tiny, method, CalibrationPrompts(), tmp_path)
    for prompt, expected in prompts:
        assert answer(tiny, store, method, prompt) == expected
