"""Every option of every group composes, and becomes the object that it stands for."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from topkbench.harness.main import checked, make_method
from topkbench.harness.settings import GROUPS, without_appearance
from topkbench.harness.task import Task
from topkbench.methods.base import Policy, TopKMethod
from topkbench.models.load import LoadedModel
from topkbench.tasks import lm_eval

CONF = Path(__file__).parents[2] / "conf"
SHIPPED_MODELS = {"tiny"}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def resolved(*overrides: str) -> DictConfig:
    config = compose("config", overrides=list(overrides))
    OmegaConf.resolve(config)
    assert OmegaConf.missing_keys(config) == set()
    return config


def test_every_folder_is_a_group_that_is_tested() -> None:
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert groups == {
        *("model", "task", "method", "protocol", "calibration"),
        *("search", "launcher", "card", "tracker", "report", "experiment"),
    }
    assert all(options(group) for group in groups)


def test_the_defaults_are_the_main_job() -> None:
    config = resolved()
    assert config.model.path == "tiny"
    assert (config.task.name, config.task.num_samples) == ("ruler_words", 25)
    task = instantiate(config.task)
    assert task.prompt_length == 4096
    assert list(task.chosen_subtasks) == [
        *("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery"),
        *("vt", "cwe", "fwe"),
    ]
    assert (config.task.question, config.protocol.protocol) == ("sparse", "unified")
    assert (config.protocol.num_sink, config.protocol.num_recent) == (4, 8)
    assert (config.k, config.protocol.k, config.method.rbit) == (512, 512, 128)


def test_the_default_axes_of_a_sweep_are_k_and_rbit() -> None:
    config = compose("config", return_hydra_config=True)
    axes = OmegaConf.to_container(config.hydra.sweeper.params)
    assert axes == {"k": "32,64,128,256,512", "rbit": "32,64,128,256"}


@pytest.mark.parametrize("name", options("method"))
@pytest.mark.parametrize("protocol", options("protocol"))
def test_a_method_becomes_an_object(name: str, protocol: str) -> None:
    config = resolved(f"method={name}", f"protocol={protocol}", "k=96", "rbit=64", "seed=3")
    method, policy = make_method(config.method), instantiate(config.protocol)
    assert isinstance(method, TopKMethod)
    assert method.name == name
    assert method.impl_for("topk_select") == "auto"
    assert getattr(method, "rbit", 64) == 64
    assert getattr(method, "seed", 3) == 3
    assert isinstance(policy, Policy)
    assert (policy.k, policy.protocol) == (96, protocol)
    _, in_force = method.resolve(policy)
    assert in_force.k == 96
    if protocol == "unified":
        assert in_force == policy


def test_a_method_inside_a_method_is_chosen_by_name() -> None:
    config = resolved("method=twilight", "k=64")
    assert make_method(config.method).base.name == "quest"
    chosen = ["method@method.base=hata", "method.base.use_norm=false", "rbit=64", "seed=3"]
    base = make_method(resolved("method=twilight", *chosen).method).base
    assert (base.name, base.rbit, base.seed, base.use_norm) == ("hata", 64, 3, False)


@cache
def settings_of_method(name: str) -> Any:
    return OmegaConf.to_container(resolved(f"method={name}").method)


@pytest.mark.parametrize("name", options("method"))
def test_label_and_colour_are_no_settings_of_a_method(name: str) -> None:
    settings = settings_of_method(name)
    assert settings["label"]
    assert settings["colour"].startswith("#")
    kept = without_appearance(settings)
    assert {"label", "colour"} <= set(settings) - set(kept) <= {"label", "colour", "words"}
    assert {"label", "colour", "words"} & set(kept.get("base", {})) == set()


@pytest.mark.parametrize("name", options("method"))
def test_every_boolean_setting_has_words_for_both_values(name: str) -> None:
    """They are what tables and figures call a variant of the method."""
    settings = settings_of_method(name)
    words = settings.get("words") or {}
    for setting, value in without_appearance(settings).items():
        for one in ("true", "false") if isinstance(value, bool) else ():
            assert words.get(f"{setting}={one}"), (setting, one)
    for one in words:  # and words are of settings that the method has
        assert one.partition("=")[0] in settings


def test_native_values_are_the_papers() -> None:
    config = resolved("method=hata", "protocol=native", "k=64")
    _, policy = make_method(config.method).resolve(instantiate(config.protocol))
    assert (policy.num_sink, policy.num_recent, policy.dense_layers) == (0, 0, 2)
    assert (policy.head_scope, policy.aggregation) == ("kv_head", "native")
    config = resolved("method=loki", "protocol=native", "k=64")
    _, policy = make_method(config.method).resolve(instantiate(config.protocol))
    assert (policy.dense_layers, policy.head_scope) == (0, "query_head")


def test_impl_may_differ_between_operators() -> None:
    config = resolved("method=hata", "impl={hamming_score:reference}")
    method = make_method(config.method)
    assert method.impl_for("hamming_score") == "reference"
    assert method.impl_for("topk_select") == "auto"


@pytest.mark.parametrize("name", options("task"))
def test_a_task_becomes_an_object(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval, "load", lambda *given: [])  # reads the tasks that it names
    given = ["task.names=gsm8k"] if name == "lm_eval" else []
    config = resolved(f"task={name}", "seed=5", "dtype=float32", *given)
    task = instantiate(config.task)
    assert isinstance(task, Task)
    assert task.name == name
    assert getattr(task, "seed", 5) == 5


@pytest.mark.parametrize("name", options("model"))
def test_a_model_composes(name: str) -> None:
    given = ["model.name=local", "model.path=owner/repository"] if name == "local" else []
    config = resolved(f"model={name}", "device=cpu", *given)
    assert config.model._target_ == "topkbench.models.load.load_model"
    assert config.model.name == name
    assert config.model.device == "cpu"
    if name in SHIPPED_MODELS:
        assert isinstance(instantiate(config.model), LoadedModel)
    elif name.startswith("random"):
        assert config.model.path == "random"
        assert config.model.architecture.model_type == "llama"
    elif not config.model.path.startswith("package:"):
        owner, _, repository = config.model.path.partition("/")
        assert owner
        assert repository
        assert "/" not in repository


@pytest.mark.parametrize("name", options("tracker"))
def test_a_tracker_becomes_an_object(name: str) -> None:
    tracker = instantiate(resolved(f"tracker={name}").tracker)
    assert callable(tracker.log_cell)
    assert callable(tracker.log_sweep)


@dataclass
class Named:
    """A task of lm-eval, of which no more is known than its name."""

    name: str


@pytest.mark.parametrize("name", [one for one in options("experiment") if one != "search"])
def test_every_cell_of_an_experiment_becomes_objects(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is not at hand: lm-eval's data, and the configurations of models on the hub.
    monkeypatch.setattr(lm_eval, "load", lambda names, *given: list(map(Named, names)))
    whole = compose("config", overrides=[f"experiment={name}"], return_hydra_config=True)
    assert whole.experiment_name == name
    assert whole.hydra.mode.name == "MULTIRUN"
    # With a loader it knows what glob(*) stands for.
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    texts = [f"{key}={values}" for key, values in whole.hydra.sweeper.params.items()]
    axes: list[list[str]] = []
    for override in parser.parse_overrides(texts):
        if override.is_sweep_override():
            values = list(override.sweep_string_iterator())
        else:
            values = [override.get_value_element_as_str()]
        axes.append([f"{override.get_key_element()}={value}" for value in values])
    given = [f"experiment={name}"]
    if whole.model.name not in ("tiny", "smollm2_135m"):
        given += ["model.path=tiny", "model.window=131072"]
    if name == "ruler_13":  # it leaves the model to the user, and the shipped one's is shorter
        given.append("model.window=131072")

    @cache
    def chosen(*options: str) -> DictConfig:
        return compose("config", overrides=[*given, *options])

    # First and last value of each axis: the product of all says nothing more.
    for cell in product(*({axis[0], axis[-1]} for axis in axes)):
        options_of_cell = [one for one in cell if one.partition("=")[0] in GROUPS]
        values = [one for one in cell if one not in options_of_cell]
        config = copy.deepcopy(chosen(*options_of_cell))
        for override in parser.parse_overrides(values):
            OmegaConf.update(config, override.key_or_group, override.value(), merge=False)
        composed = checked(config, [])
        assert isinstance(composed.method, TopKMethod)
        assert isinstance(composed.task, Task)
        assert isinstance(composed.policy, Policy)


@pytest.mark.parametrize("name", ["league", "matched_bytes"])
def test_what_compares_all_methods_names_none(name: str) -> None:
    whole = compose("config", overrides=[f"experiment={name}"], return_hydra_config=True)
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    (axis,) = parser.parse_overrides([f"method={whole.hydra.sweeper.params.method}"])
    assert sorted(axis.sweep_string_iterator()) == options("method")


@pytest.mark.parametrize("group", ["method", "task", "model", "protocol", "tracker", "experiment"])
def test_an_option_that_is_not_there_is_refused(group: str) -> None:
    with pytest.raises(MissingConfigException, match=f"{group}/hatta"):
        compose("config", overrides=[f"{group}=hatta"])


def test_the_ladder_has_five_seeds_where_hashes_are_compared_and_two_elsewhere() -> None:
    whole = compose("config", overrides=["experiment=hash_ladder"], return_hydra_config=True)
    # The sweeper is made from resolved settings, and reading its axes resolves them once more.
    OmegaConf.resolve(whole.hydra.sweeper)
    params = whole.hydra.sweeper.params
    override = OverridesParser.create().parse_override(f"point={params.point}")
    seeds: dict[int, list[int]] = {}
    for text in override.sweep_string_iterator():
        config = resolved("experiment=hash_ladder", f"rbit={params.rbit}", f"point={text}")
        assert config.method.rbit == config.rbit
        assert config.method.seed == config.task.seed == config.seed
        seeds.setdefault(config.rbit, []).append(config.seed)
    few, many = [0, 1], [0, 1, 2, 3, 4]
    assert seeds == {32: few, 64: many, 96: few, 128: many, 192: few, 256: few}


@pytest.mark.parametrize(
    ("experiment", "usual", "changes", "of_several"),
    [
        (
            "loss_ablation",
            ["method.chunk_size=5461"],
            {
                *("epsilon", "balance_weight", "decorrelation_weight", "balance_queries", "sigma"),
                *("positive_ratio", "chunk_size", "queries_per_sequence", "epochs"),
            },
            1,
        ),
        (
            "recipe_ablation",
            ["method.recipe=ranking", "method.use_norm=false", "rbit=64"],
            {
                *("query_codes", "use_norm", "centre_keys", "ranking_late_share", "ranking_steps"),
                *("ranking_learning_rate", "ranking_keys", "ranking_queries"),
            },
            1,
        ),
    ],
)
def test_the_arms_of_an_ablation_change_what_they_say(
    experiment: str, usual: list[str], changes: set[str], of_several: int
) -> None:
    """The first arm is as usual; all but so many of the others change one setting of it."""
    whole = compose("config", overrides=[f"experiment={experiment}"], return_hydra_config=True)
    params = whole.hydra.sweeper.params
    override = OverridesParser.create().parse_override(f"method={params.method}")
    first, *changed = [
        dict(resolved(f"experiment={experiment}", f"rbit={params.rbit}", f"method={text}").method)
        for text in override.sweep_string_iterator()
    ]
    assert first == dict(resolved("method=hata", *usual).method)
    differences = [{name for name, value in arm.items() if value != first[name]} for arm in changed]
    assert {name for names in differences for name in names} == changes
    assert [len(names) for names in differences].count(1) == len(differences) - of_several
