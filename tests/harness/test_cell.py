"""A cell's status, artifact and peak memory, and the fit task."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from topkbench.harness import artifact
from topkbench.harness.cell import (
    artifact_spec,
    fit_source,
    peak_memory_mib,
    prepare_method,
    reset_peak_memory,
    run_cell,
)
from topkbench.harness.task import Context, Outcome, TaskRow
from topkbench.methods.base import AnyMethod
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.h2o import H2O
from topkbench.methods.hata import HATA
from topkbench.methods.infinigen import InfiniGen
from topkbench.methods.policy import Policy
from topkbench.methods.snapkv import SnapKV
from topkbench.methods.streaming_llm import StreamingLLM
from topkbench.models import speculation
from topkbench.models.attach import attach
from topkbench.models.load import LoadedModel
from topkbench.models.prefill_store import PrefillStore
from topkbench.tasks.decode_latency import DecodeLatency
from topkbench.tasks.decode_throughput import DecodeThroughput
from topkbench.tasks.fit import Fit
from topkbench.tasks.ruler_words import RulerWords
from topkbench.tasks.ruler_words_prompts import CalibrationPrompts
from topkbench.tasks.selection import SelectionTask

CPU = torch.device("cpu")
TEXTS = CalibrationPrompts(num_sequences=3, max_length=260)


def test_peak_memory_covers_only_what_ran_since_the_reset() -> None:
    reset_peak_memory(CPU)
    before = peak_memory_mib(CPU)
    large = torch.ones(128, 2**18)  # 128 MiB
    during = peak_memory_mib(CPU)
    assert during >= before + 120
    assert large.sum() == large.numel()
    del large
    reset_peak_memory(CPU)
    assert peak_memory_mib(CPU) < during - 100


# The status ----------------------------------------------------------------------------------


def run(loaded: LoadedModel, store: PrefillStore, tmp_path: Path, method: AnyMethod) -> Outcome:
    task = RulerWords(length=200, num_samples=1, subtasks=("vt",), cache_dir=str(tmp_path))
    policy = Policy(k=24, num_sink=0, num_recent=0)
    return run_cell(Context(loaded, store, method, policy, FullAttention()), task)


@pytest.mark.parametrize("task", [SelectionTask, DecodeLatency, DecodeThroughput])
def test_tasks_that_need_all_tokens_skip_a_method_that_frees_some(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path, task: Any
) -> None:
    settings = {
        DecodeThroughput: {},
        DecodeLatency: {},
        SelectionTask: {"length": 200, "subtasks": ("vt",)},
    }[task]
    folder = {} if task is DecodeThroughput else {"cache_dir": str(tmp_path)}
    made = task(**settings, **folder)
    context = Context(loaded, store, H2O(mode="compact"), Policy(k=24), FullAttention())
    for row in run_cell(context, made).rows:
        assert row.status == "skipped"
        assert f"task={made.name} needs all tokens in the cache at every step" in row.reason


@pytest.mark.parametrize("method", [SnapKV, StreamingLLM, H2O])
def test_a_method_that_frees_tokens_is_skipped_for_a_policy_per_query_head(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path, method: Any
) -> None:
    made = method(mode="compact", native={"head_scope": "query_head"})
    policy = Policy(k=24, num_sink=0, num_recent=0, protocol="native")
    task = RulerWords(length=200, num_samples=1, cache_dir=str(tmp_path))
    outcome = run_cell(Context(loaded, store, made, policy, FullAttention()), task)
    ((status, reason),) = ((row.status, row.reason) for row in outcome.rows)
    assert status == "skipped"
    assert reason.startswith(f"head_scope must be kv_head for {made.name}")
    assert store.forwards == 0
    with (
        pytest.raises(ValueError, match="head_scope must be kv_head for"),
        attach(loaded.model, made, policy),
    ):
        pass


def test_a_model_whose_queries_cannot_be_speculated_is_skipped_before_anything_is_fitted(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "a layer's queries must be those that Llama's attention would compute."
    monkeypatch.setattr(speculation, "unsupported_reason", lambda model: reason)
    method = InfiniGen()
    assert prepare_method(loaded, method, TEXTS, tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    outcome = run(loaded, store, tmp_path, method)
    assert outcome.rows == [TaskRow("mean", {}, "skipped", reason)]
    assert store.forwards == 0


def test_an_unsupported_model_is_skipped_with_a_reason(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = ExactTopK()
    monkeypatch.setattr(
        method, "unsupported_reason", lambda geometry, policy: "exact does not support this model."
    )
    outcome = run(loaded, store, tmp_path, method)
    assert outcome == Outcome(
        [TaskRow("mean", {}, "skipped", "exact does not support this model.")], []
    )


def test_running_out_of_memory_is_a_status(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = ExactTopK()

    def build(prefill: object) -> None:
        raise MemoryError("out of memory")

    monkeypatch.setattr(method, "build_index", build)
    (row,) = run(loaded, store, tmp_path, method).rows
    assert (row.status, row.reason) == ("out_of_memory", "out of memory")


def test_a_failed_cpu_allocation_is_out_of_memory_too(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch raises a plain RuntimeError for it; any other RuntimeError must propagate."""
    method = ExactTopK()
    monkeypatch.setattr(method, "build_index", lambda prefill: torch.empty(2**50))
    (row,) = run(loaded, store, tmp_path, method).rows
    assert row.status == "out_of_memory"

    def broken(prefill: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(method, "build_index", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(loaded, store, tmp_path, method)


# The artifact --------------------------------------------------------------------------------


def quick() -> HATA:
    return HATA(rbit=32, epochs=1, steps_per_epoch=4)


def fail(*_: Any) -> None:
    raise AssertionError("nothing must be fitted")


def test_an_artifact_is_fitted_once_and_found_again(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_method(loaded, quick(), TEXTS, tmp_path / "new")
    assert first is not None
    provenance = first.provenance
    assert (provenance["model"], provenance["seed"]) == ("random", 90210)
    assert provenance["seconds"] > 0
    assert [len(steps) for steps in provenance["losses"]] == [4, 4]
    assert provenance["data"].startswith("3 prompts of 260 tokens")
    monkeypatch.setattr("topkbench.harness.cell.fit_layers", fail)
    method = quick()
    again = prepare_method(loaded, method, TEXTS, tmp_path / "new")
    assert again is not None
    assert (again.digest, again.path, again.provenance) == (first.digest, first.path, provenance)
    assert method.artifact_digest == first.digest
    with pytest.raises(AssertionError, match="nothing must be fitted"):
        prepare_method(loaded, quick(), TEXTS, tmp_path / "new", refit=True)


def test_only_the_layers_that_a_policy_leaves_to_the_method_are_fitted(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    half = Policy(k=16, dense_layers=1)
    first = prepare_method(loaded, quick(), TEXTS, tmp_path, policy=half)
    assert first is not None
    assert first.layers == {1}
    assert [len(steps) for steps in first.provenance["losses"]] == [0, 4]
    assert (first.fitted, first.tensors["hash_weight"][0].any().item()) == (True, False)
    # The other layer is added to the same file, and what was there stays.
    whole = prepare_method(loaded, quick(), TEXTS, tmp_path, policy=Policy(k=16))
    assert whole is not None
    assert (whole.path, whole.layers, whole.fitted) == (first.path, {0, 1}, False)
    assert torch.equal(whole.tensors["hash_weight"][1], first.tensors["hash_weight"][1])
    assert [len(steps) for steps in whole.provenance["losses"]] == [4, 4]
    assert whole.provenance["seconds"] > first.provenance["seconds"]
    at_once = prepare_method(loaded, quick(), TEXTS, tmp_path / "other")
    assert at_once is not None
    assert at_once.digest == whole.digest
    # A cell's identity does not depend on the layers that other cells had fitted.
    again = prepare_method(loaded, quick(), TEXTS, tmp_path, policy=half)
    assert again is not None
    assert (again.digest, again.layers) == (first.digest, {1})


def test_layers_of_other_code_are_not_added_to(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_method(loaded, quick(), TEXTS, tmp_path, policy=Policy(k=16, dense_layers=[0]))
    monkeypatch.setattr("topkbench.harness.cell.fit_source", lambda _: "other code")
    # The layer that is there is fitted again, too.
    other = prepare_method(loaded, quick(), TEXTS, tmp_path, policy=Policy(k=16, dense_layers=[1]))
    assert other is not None
    assert (other.layers, other.fitted) == ({0}, True)
    whole = artifact.load(other.path)
    assert whole.layers == {0, 1}
    assert whole.provenance["source"] == "other code"
    assert [len(steps) for steps in whole.provenance["losses"]] == [4, 4]


def test_nothing_is_fitted_where_all_layers_are_dense(loaded: LoadedModel, tmp_path: Path) -> None:
    dense = Policy(k=16, dense_layers=2)
    assert prepare_method(loaded, quick(), TEXTS, tmp_path, policy=dense) is None
    assert not tmp_path.exists() or list(tmp_path.iterdir()) == []


def test_refitting_gives_the_same_digest(loaded: LoadedModel, tmp_path: Path) -> None:
    first = prepare_method(loaded, quick(), TEXTS, tmp_path)
    written = next(tmp_path.glob("*.safetensors")).stat().st_mtime_ns
    again = prepare_method(loaded, quick(), TEXTS, tmp_path, refit=True, memory_limit=2**20)
    assert next(tmp_path.glob("*.safetensors")).stat().st_mtime_ns > written
    assert first is not None
    assert again is not None
    assert (again.digest, again.provenance["losses"]) == (first.digest, first.provenance["losses"])


def test_an_artifact_depends_on_weights_dtype_calibration_and_fit_version(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_method(loaded, quick(), TEXTS, tmp_path)
    assert first is not None
    monkeypatch.setattr("topkbench.harness.cell.fit_layers", fail)

    class Later(HATA):
        """HATA with a later fit version."""

        fit_version = HATA.fit_version + 1

    half = replace(loaded, model=copy.deepcopy(loaded.model).to(torch.bfloat16))
    other = copy.deepcopy(loaded.tokenizer)
    assert other.add_tokens(["is"]) == 1  # also splits words that contain it
    settings = {"rbit": 32, "epochs": 1, "steps_per_epoch": 4}
    for changed, method in (
        (replace(loaded, digest="1" * 16), quick()),
        (half, quick()),
        (replace(loaded, tokenizer=other), quick()),
        (loaded, Later(**settings)),
        (loaded, HATA(**{**settings, "seed": 1})),
    ):
        with pytest.raises(AssertionError, match="nothing must be fitted"):
            prepare_method(changed, method, TEXTS, tmp_path)
    # The model's name and window do not matter.
    again = prepare_method(replace(loaded, name="other", window=900), quick(), TEXTS, tmp_path)
    assert again is not None
    assert again.digest == first.digest


def test_the_provenance_contains_the_digest_of_the_fitting_code(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    found = prepare_method(loaded, quick(), TEXTS, tmp_path)
    assert found is not None
    assert found.provenance["source"] == fit_source(quick())
    assert fit_source(quick()) != fit_source(ExactTopK())


def test_a_method_that_learns_nothing_has_no_artifact(loaded: LoadedModel, tmp_path: Path) -> None:
    assert prepare_method(loaded, ExactTopK(), TEXTS, tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def save_mismatched(loaded: LoadedModel, folder: Path, weight: torch.Tensor, **spec: Any) -> None:
    """Save an artifact with other contents under the name of the expected one."""
    expected = artifact_spec(loaded, quick(), TEXTS)
    assert expected is not None
    provenance = artifact.provenance({**expected, **spec}, "", 0)
    artifact.save(folder / artifact.file_name(expected), {"hash_weight": weight}, provenance)


@pytest.mark.parametrize(
    ("weight", "spec", "message"),
    [
        (
            torch.ones(2, 2, 16, 32),
            {"model_digest": "f" * 16},
            "must have model_digest='0000000000000000', got 'ffffffffffffffff'; fit one",
        ),
        (
            torch.ones(3, 2, 16, 32),
            {},
            r"float32 \[2, 2, 16, 32\] for this model, got torch.float32 \[3, 2, 16, 32\]; fit",
        ),
        (torch.ones(2, 2, 8, 32), {}, r"got torch.float32 \[2, 2, 8, 32\]; fit it on this model"),
        (
            torch.ones(2, 2, 16, 32, dtype=torch.float16),
            {},
            r"as torch.float32 \[2, 2, 16, 32\] for this model, got torch.float16",
        ),
    ],
    ids=["model", "layers", "channels", "dtype"],
)
def test_an_artifact_that_does_not_match_is_refused_in_one_line(
    loaded: LoadedModel, tmp_path: Path, weight: torch.Tensor, spec: dict[str, Any], message: str
) -> None:
    save_mismatched(loaded, tmp_path, weight, **spec)
    with pytest.raises(ValueError, match=message) as refused:
        prepare_method(loaded, quick(), TEXTS, tmp_path)
    assert "\n" not in str(refused.value)


# task=fit ------------------------------------------------------------------------------------


def context(loaded: LoadedModel, method: Any, folder: Path, found: Any) -> Context:
    store = PrefillStore(loaded.model)
    return Context(loaded, store, method, Policy(k=16), ExactTopK(), artifact=found)


def test_the_fit_task_has_a_row_for_every_layer_and_their_mean(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    found = artifact.Artifact(
        tensors={"hash_weight": torch.ones(2, 1)},
        provenance={"data": "noise", "seconds": 2.5, "losses": [[8.0, 4.0, 2.0], [6.0, 5.0, 1.0]]},
        digest="d",
        path=tmp_path / "here",
        fitted=True,
    )
    outcome = Fit().run(context(loaded, quick(), tmp_path, found))
    assert [row.subtask for row in outcome.rows] == ["layer 0", "layer 1", "mean"]
    ends = [(row.values["loss_first"], row.values["loss_last"]) for row in outcome.rows]
    assert ends == [(8.0, 2.0), (6.0, 1.0), (7.0, 1.5)]
    assert [row.values.get("fit_s") for row in outcome.rows] == [None, None, 2.5]
    assert {row.values["artifact_path"] for row in outcome.rows} == {str(tmp_path / "here")}
    assert {row.values["calibration"] for row in outcome.rows} == {"noise"}
    assert len(outcome.samples) == 6
    assert outcome.samples[4] == {"layer": 1, "step": 2, "loss": 5.0}


def test_an_artifact_that_was_found_has_no_fit_seconds(loaded: LoadedModel, tmp_path: Path) -> None:
    fitted = [
        prepare_method(loaded, quick(), TEXTS, tmp_path),
        prepare_method(loaded, quick(), TEXTS, tmp_path),
        prepare_method(loaded, quick(), TEXTS, tmp_path, refit=True),
    ]
    seconds = []
    for one in fitted:
        assert one is not None
        assert one.provenance["seconds"] > 0
        *_, mean = Fit().run(context(loaded, quick(), tmp_path, one)).rows
        seconds.append(mean.values["fit_s"])
    assert [one is None for one in seconds] == [False, True, False]


def test_an_artifact_without_losses_still_has_its_rows(loaded: LoadedModel, tmp_path: Path) -> None:
    found = artifact.Artifact({"hash_weight": torch.ones(2, 1)}, {"data": "noise"}, "d", tmp_path)
    outcome = Fit().run(context(loaded, quick(), tmp_path, found))
    assert [row.subtask for row in outcome.rows] == ["layer 0", "layer 1", "mean"]
    assert {row.values["loss_first"] for row in outcome.rows} == {None}
    assert outcome.samples == []


def test_the_fit_task_refuses_a_method_that_learns_nothing(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="a method that learns, but exact with these settings"):
        Fit().run(context(loaded, ExactTopK(), tmp_path, None))
