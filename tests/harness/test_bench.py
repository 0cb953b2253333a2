"""The bench times only correct results, skips large shapes, and needs torch, numba and Triton."""

import csv
import subprocess
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from topkbench.harness import bench, experiments, layer, variants
from topkbench.harness.experiments import EXPERIMENTS, GEOMETRIES, chosen, faster_from
from topkbench.harness.layer import Layer, one_layer
from topkbench.harness.planted import PlantedStates, capture, drawn_capture
from topkbench.kernels import operators
from topkbench.kernels.full_attention.api import full_attention
from topkbench.kernels.timing import Bandwidth, MemoryProbe
from topkbench.methods.base import TopKMethod, with_impl
from topkbench.methods.exact import ExactTopK
from topkbench.methods.hata import HATA
from topkbench.methods.loki import Loki
from topkbench.methods.quest import Quest

ROOT = Path(__file__).parents[2]
YAMLS = sorted((ROOT / "conf" / "method").glob("*.yaml"))
SMALL = one_layer(6, 2, 32)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the experiments run quickly: a small geometry, and few copies."""
    monkeypatch.setitem(GEOMETRIES, "llama31", SMALL)
    monkeypatch.setitem(GEOMETRIES, "llama2", one_layer(4, 4, 32))
    monkeypatch.setattr(layer, "copies_needed", lambda num_bytes, device: 2)
    monkeypatch.setattr(MemoryProbe, "bandwidth", lambda _, __: Bandwidth(9.0, 10.0))


def layer_of(
    name: str, n: int, dtype: torch.dtype = torch.float32, impl: Any = "auto", **settings: Any
) -> Layer:
    geometry = replace(SMALL, dtype_bytes=dtype.itemsize)
    states = PlantedStates.draw(geometry, 2, n, dtype, 0, 0)
    method = with_impl(variants.make(name, **settings), impl)
    return variants.layer_of(method, geometry, states)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_bench_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    shape = "--kv-len 700 --kv-heads 2 --group 2 --head-dim 64 --k 32 --trials 2"
    for dtype in ("float32", "bfloat16"):
        assert bench.main([*shape.split(), "--dtype", dtype]) == 0
        printed = capsys.readouterr().out
        for name in ("hash_encode", "sparse_attention", "full_attention", "speedup", "of memory"):
            assert name in printed


def test_bytes_needed_by_hand() -> None:
    shape = operators.Geometry(
        batch_size=1, num_kv_heads=2, group=3, head_dim=64, rbit=96, kv_len=160, k=20
    )
    made = operators.Operators(shape, torch.device("cpu"), torch.bfloat16, "auto")
    assert made.bytes_needed() == {
        "hash_encode": 2 * 64 * 96 * 4,
        "hamming_score": 2 * 160 * (12 + 2),  # three words, and an int16 score
        "page_score": 2 * 10 * (2 * 64 * 2 + 3 * 4),
        "lowrank_score": 2 * 160 * (32 * 2 + 3 * 4),
        "channel_score": 2 * 160 * (32 * 2 + 3 * 4),
        "code_score": 2 * 160 * (2 + 3 * 4),
        "group_softmax": 2 * 160 * (3 + 1) * 4,
        "topk_select": 2 * (160 * 2 + 20 * 4),
        "sparse_attention": 2 * 20 * 2 * 64 * 2,
        "full_attention": 2 * 160 * 2 * 64 * 2,
    }


def test_the_bench_gives_no_time_for_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(operators.Operators, "select", lambda step: torch.zeros(1, 8, 8).int())
    assert bench.main(["--kv-len", "300", "--k", "8", "--trials", "1"]) == 1
    captured = capsys.readouterr()
    assert "wrong result, no times" in captured.err
    assert "speedup" not in captured.out


def test_the_bench_compares_hatas_operators_with_hatas_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shape = "--kv-len 300 --kv-heads 2 --group 2 --head-dim 64 --k 32 --trials 2"
    assert bench.main(shape.split()) == 0
    printed = capsys.readouterr().out
    for what in (
        "speedup of the decode step over full attention, timed alternately: ",
        "speedup of HATA's step over full attention, timed alternately: ",
        "speedup of the decode step over HATA's step, timed alternately: ",
    ):
        assert printed.count(what) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hatas_operators_and_hatas_step_compute_the_same(dtype: torch.dtype) -> None:
    shape = operators.Geometry(
        batch_size=2, num_kv_heads=2, group=3, head_dim=64, rbit=96, kv_len=160, k=20
    )
    made = operators.Operators(shape, torch.device("cpu"), dtype, "reference")
    step = bench.hata_layer(made, "reference").step()
    assert step.selection is not None
    assert step.selection.indices.shape == (2, 2, 20)
    assert torch.equal(step.selection.indices, made.indices)
    assert torch.equal(step.out, made.decode())


def test_the_decode_step_writes_the_newest_keys_code() -> None:
    shape = operators.Geometry(
        batch_size=2, num_kv_heads=2, group=3, head_dim=64, rbit=96, kv_len=160, k=20
    )
    for bounded in (False, True):
        made = operators.Operators(shape, torch.device("cpu"), torch.float32, "reference", bounded)
        before, expected = made.key_codes.clone(), made.decode()
        for row, end in enumerate(made.ends.tolist()):
            made.key_codes[row, :, end - 1] = 0
        assert torch.equal(made.decode(), expected)
        assert torch.equal(made.key_codes, before)


def test_the_methods_are_those_of_the_configuration() -> None:
    assert sorted(variants.classes()) == [path.stem for path in YAMLS]
    assert len(variants.classes()) == 18
    assert sorted(variants.names()) == sorted([*variants.classes(), "hata_integer"])


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_a_classs_defaults_are_the_settings_of_its_file(path: Path) -> None:
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    made = variants.classes()[path.stem]
    assert settings.pop("_target_") == f"{made.__module__}.{made.__name__}"
    assert isinstance(settings.pop("native"), dict)  # the bench runs the unified policy
    del settings["label"], settings["colour"]
    settings.pop("words", None)
    if "defaults" in settings:
        assert settings.pop("defaults")[0] == {"/method@base": variants.make(path.stem).base.name}
    root = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text(encoding="utf-8"))
    composed = {"${impl}": "auto", "${rbit}": 128, "${seed}": 0, "${full_backend}": "auto"}
    assert {name: root[name.strip("${}")] for name in composed} == composed
    found = {name: composed.get(value, value) for name, value in settings.items()}
    defaults = {one.name: one.default for one in fields(made) if one.init}
    if path.stem == "full":
        assert defaults.pop("impl") == "auto"  # full attention has a backend instead
        # Answers come from torch's own; what is timed is the fastest.
        assert (defaults.pop("backend"), found.pop("backend")) == ("sdpa", "auto")
    del defaults["native"]
    if defaults.get("base") is MISSING:
        del defaults["base"]
    assert found == defaults


def test_what_is_learned_is_made_up_where_learning_takes_long() -> None:
    assert (HATA().weights, variants.make("hata").weights) == ("trained", "random")
    assert variants.make("hata_integer", rbit=64) == HATA(weights="random", use_norm=False, rbit=64)
    assert variants.make("hash_attention").steps == 1
    assert variants.make("exact", rbit=64) == ExactTopK()
    assert variants.make("twilight").base == Quest()
    assert variants.columns(variants.make("hata_integer")) == {
        **{"method": "hata", "rbit": 128, "p_use_norm": False},
    }
    assert variants.columns(variants.make("loki")) == {"method": "loki"}


def test_what_is_made_up_of_a_prompt_has_the_size_of_what_is_captured() -> None:
    keys = torch.zeros(3, 2, 100, 32, dtype=torch.bfloat16)
    needs = frozenset({"query_tail", "column_sums"})
    made, captured = drawn_capture(needs, keys, 6), capture(needs, keys, 6, 1.0)
    for name in needs:
        one, other = getattr(made, name), getattr(captured, name)
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert made.milliseconds == {}
    assert made.column_sums is not None
    assert made.column_sums.min() >= 0
    none = drawn_capture(frozenset(), keys, 6)
    assert (none.query_tail, none.column_sums) == (None, None)


def test_states_without_needles_have_no_key_near_a_query() -> None:
    def largest(needles: int) -> float:
        made = PlantedStates.draw(SMALL, 1, 300, torch.float32, 0, needles)
        return (made.query_states @ made.key_states.mT).max().item() * 32**-0.5

    assert largest(8) > 8
    assert largest(0) < 6


def test_a_step_that_selects_every_token_equals_full_attention() -> None:
    for name in variants.names():
        made = layer_of(name, 64)
        assert made.context.policy.k == 64
        states = made.states
        queries, keys = states.query_states.flatten(1, 2), states.key_states
        full = full_attention(queries, keys, states.value_states, 32**-0.5)
        torch.testing.assert_close(made.step().out, full, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", variants.names())
def test_a_step_is_right_and_does_the_same_again(name: str) -> None:
    made = layer_of(name, 300, torch.bfloat16)
    if name != "full":
        assert made.mismatch() is None
    first = made.step()
    assert torch.equal(first.out, made.step().out)
    assert made.n == 300
    if made.index is not None:
        assert made.index.length == 299


def test_bytes_read_by_hand() -> None:
    names = ("full", "exact", "hata", "hata_integer", "quest", "loki", "streaming_llm")
    geometry = replace(SMALL, dtype_bytes=4)
    read = {name: layer_of(name, 512, rbit=64).reads(geometry)[0] for name in names}
    row, kept = 2 * 32 * 4, 64 * 2 * 2 * 32 * 4  # a token's keys; 64 tokens' keys and values
    weight = 4 * 2 * 32 * 64  # the hash projection
    assert read == {
        "full": 512 * 2 * row,
        "exact": 512 * row + kept,
        "hata": 512 * 2 * (8 + 4) + weight + kept,
        "hata_integer": 512 * 2 * 8 + weight + kept,
        "quest": 512 // 16 * 2 * row + kept,
        "loki": 512 * row // 4 + 4 * 2 * 32 * 8 + kept,
        "streaming_llm": kept,
    }


def spoil(monkeypatch: pytest.MonkeyPatch, made: type, stage: str, change: Callable) -> None:
    """Change what a method's stage returns, except of the reference implementation."""
    right = getattr(made, stage)

    def wrong(self: TopKMethod, *given: Any) -> Any:
        found = right(self, *given)
        return found if self.impl == "reference" else change(found)

    monkeypatch.setattr(made, stage, wrong)


@pytest.mark.parametrize(
    ("stage", "change", "reason"),
    [
        ("score", lambda scores: scores * 1.01, "the scores must be the reference's within"),
        ("encode", lambda codes: codes ^ 1, "the scores must be the reference's within"),
        (
            "select",
            lambda found: replace(found, indices=(found.indices - 1).clamp_min(0)),
            "the selection must be the reference's",
        ),
        (
            "attend",
            lambda found: (found[0] * 1.01, found[1]),
            "the output must be the reference's within 0.001",
        ),
    ],
)
def test_a_wrong_stage_is_detected(
    monkeypatch: pytest.MonkeyPatch, stage: str, change: Callable, reason: str
) -> None:
    made = layer_of("hata", 300, impl="cpu")
    assert made.mismatch() is None
    spoil(monkeypatch, HATA, stage, change)
    assert str(made.mismatch()).startswith(reason)


@pytest.mark.parametrize(
    ("name", "made", "change", "reason"),
    [
        ("hata_integer", HATA, 1, "the scores must be the reference's: whole numbers differ."),
        ("loki", Loki, 2e-3, "the scores must be the reference's within 0.001"),
    ],
)
def test_a_slightly_wrong_score_is_also_detected_in_16_bits(
    monkeypatch: pytest.MonkeyPatch, name: str, made: type, change: float, reason: str
) -> None:
    def slightly(scores: Tensor) -> Tensor:
        found = scores * (1 + change) if scores.is_floating_point() else scores.clone()
        found[0, 0, ..., 7] += change
        return found

    step = layer_of(name, 300, torch.bfloat16, "cpu")
    assert step.mismatch() is None
    spoil(monkeypatch, made, "score" if name == "hata_integer" else "aggregate", slightly)
    assert str(step.mismatch()).startswith(reason)


@pytest.mark.usefixtures("small")
def test_an_experiment_prints_and_writes_a_row_for_each_method_and_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.csv"
    given = "--experiment layer_latency --geometry llama31 --lengths 128 300 --batch-sizes 1 3"
    methods = "--methods full hata quest --trials 2"
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setitem(EXPERIMENTS, "layer_latency", experiments.Experiment(batch_length=128))
        assert bench.main([*given.split(), *methods.split(), "--out", str(file)]) == 0
    rows = rows_of(file)
    assert [(row["subtask"], row["method"]) for row in rows] == [
        (shape, method)
        for shape in ("128", "300", "128 x 3")
        for method in ("full", "hata", "quest")
    ]
    assert {row["model"] for row in rows} == {"6/2 heads of 32"}
    assert len({row["run_id"] for row in rows}) == 9
    hata = rows[4]
    assert (hata["length"], hata["batch_size"], hata["k"], hata["rbit"]) == (
        "300",
        "1",
        "64",
        "128",
    )
    timed = ("decode_ms_p50", "decode_ms_warm_p50", "speedup_vs_full", "encode_ms", "score_ms")
    assert all(float(hata[name]) > 0 for name in (*timed, "append_ms", "select_ms", "attend_ms"))
    read = 300 * 2 * (16 + 4) + 4 * 2 * 32 * 128 + 64 * 2 * 2 * 32 * 4
    assert float(hata["bytes_read_per_step"]) == read
    assert float(hata["bandwidth_gb_s"]) == 10.0
    assert float(hata["bandwidth_fraction"]) > 0
    assert float(hata["speedup_vs_full"]) == pytest.approx(
        float(hata["full_ms_p50"]) / float(hata["decode_ms_p50"])
    )
    assert rows[3]["speedup_vs_full"] == ""
    assert rows[3]["full_ms_p50"] == rows[3]["decode_ms_p50"]
    printed = capsys.readouterr().out
    assert "llama31 (6/2 heads of 32), 128 tokens, batch 3" in printed
    assert "speed-up" in printed


@pytest.mark.usefixtures("small")
def test_a_wrong_method_has_no_speed_and_others_keep_theirs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, Quest, "attend", lambda found: (found[0] * 1.01, found[1]))
    file = tmp_path / "rows.csv"
    given = "--experiment stage_breakdown --lengths 128 --trials 1 --methods exact quest --out"
    assert bench.main([*given.split(), str(file)]) == 1
    exact, quest = rows_of(file)
    assert (exact["status"], quest["status"]) == ("ok", "wrong")
    assert quest["reason"].startswith("the output must be the reference's within 0.001")
    assert [name for name, value in quest.items() if name.endswith("_p50") and value] == []
    assert "quest: wrong result, no times" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_shapes_that_exceed_half_of_the_memory_are_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiments, "free_bytes", lambda device: 2**19)
    file = tmp_path / "rows.csv"
    given = "--experiment stage_breakdown --lengths 128 1000 --trials 1 --methods exact --out"
    assert bench.main([*given.split(), str(file)]) == 0
    fits, skipped = rows_of(file)
    # 512 bytes a token of keys and values: two copies and one more are 192 KiB of 128 tokens.
    assert (fits["status"], skipped["status"]) == ("ok", "skipped")
    assert skipped["reason"].endswith("GiB of states exceed half of the free memory.")
    assert "exact: skipped: " in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_the_ablation_says_what_ran_in_torch(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    given = "--experiment optimisation_ablation --lengths 128 --trials 1 --out"
    assert bench.main([*given.split(), str(file)]) == 0
    assert [row["impl"] for row in rows_of(file)] == [
        "reference",
        "cpu, reference: hash_encode topk_select sparse_attention",
        "cpu, reference: hash_encode topk_select",
        "cpu, reference: topk_select",
        "cpu",
    ]


def test_the_length_from_which_a_method_is_faster() -> None:
    def row(
        length: int,
        speedup: float | None,
        method: str = "hata",
        batch: int = 1,
        width: float | None = 0.05,
        note: str | None = None,
    ) -> dict:
        known = {"model": "m", "method": method, "length": length, "batch_size": batch}
        if speedup is not None and width is not None:
            known |= {"speedup_ci_low": speedup - width, "speedup_ci_high": speedup + width}
        return {**known, "speedup_vs_full": speedup, "timing_note": note}

    rows = [row(512, 1.2), row(1024, 0.9), row(2048, 1.1), row(4096, 3.0), row(8192, 0.1, batch=2)]
    rows += [row(512, 0.5, "loki"), row(1024, 0.9, "loki"), row(512, None, "full")]
    assert faster_from(rows) == [
        "m, hata: faster than full attention from 2,048 tokens on",
        "m, loki: faster than full attention nowhere up to 1,024",
    ]
    rows = [row(512, 0.9, width=0.2), row(1024, 3.0, width=2.5), row(2048, 4.0, note="others")]
    rows += [row(512, 1.3, "quest", width=None), row(512, 32.8, "exact", width=32.3)]
    assert faster_from(rows) == [
        "m, hata: faster than full attention from 1,024 tokens on (95% interval: from 512 tokens "
        "on, to from 2,048 tokens on); unsteady at 2,048",
        "m, quest: faster than full attention from 512 tokens on, no interval",
        "m, exact: faster than full attention from 512 tokens on (95% interval: from 512 tokens "
        "on, to nowhere up to 512)",
    ]


def test_the_named_experiments_are_those_of_the_configuration() -> None:
    folder = Path(__file__).parents[2] / "conf" / "experiment"
    assert set(EXPERIMENTS) <= {path.stem for path in folder.glob("*.yaml")}
    for name, experiment in EXPERIMENTS.items():
        text = (folder / f"{name}.yaml").read_text()
        assert f"lengths: {list(experiment.lengths)}" in text
        if experiment.batch_sizes:
            assert f"batch_sizes: {list(experiment.batch_sizes)}" in text
            assert f"batch_length: {experiment.batch_length}" in text


def test_invalid_lengths_and_batch_sizes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert chosen("break_even", lengths=[100], methods=None).shapes == [(100, 1)]
    assert chosen("layer_latency", lengths=[100]).shapes == [(100, 1)]
    for wrong in (["--lengths", "64"], ["--batch-sizes", "0"]):
        assert bench.main(["--experiment", "layer_latency", *wrong]) == 2
        assert "lengths must be more than 64 tokens and batch" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_a_method_that_fails_has_a_row_with_the_reason_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> Tensor:
        raise NotImplementedError("no such operator on this device.")

    monkeypatch.setattr(Quest, "score", fail)
    monkeypatch.setattr(
        Loki, "unsupported_reason", lambda *arguments: "head_dim must be odd for loki, got 32."
    )
    file = tmp_path / "rows.csv"
    given = "--experiment stage_breakdown --lengths 128 --trials 1 --methods quest loki exact --out"
    assert bench.main([*given.split(), str(file)]) == 1
    quest, loki, exact = rows_of(file)
    assert (quest["status"], loki["status"], exact["status"]) == ("failed", "skipped", "ok")
    assert quest["reason"] == "NotImplementedError: no such operator on this device."
    assert loki["reason"] == "head_dim must be odd for loki, got 32."
    assert "quest: failed: NotImplementedError" in capsys.readouterr().err


def test_a_method_may_run_some_operators_in_torch() -> None:
    seen: list[str] = []

    class Recorded(dict[str, Any]):
        def get(self, op: str, default: Any = None) -> Any:
            seen.append(op)
            return super().get(op, default)

    made = layer_of("twilight", 300, impl=Recorded(page_score="reference", topk_select="cpu"))
    made.step()
    assert {"page_score", "topk_select", "sparse_attention"} <= set(seen)
    assert made.mismatch() is None


def test_the_bench_times_every_method_where_only_torch_numba_and_triton_are(
    bare_machine: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "rows.csv"
    toy = f"""
from topkbench.harness import bench, experiments, layer
from topkbench.harness.layer import one_layer
from topkbench.kernels.timing import Bandwidth, MemoryProbe
experiments.GEOMETRIES["llama31"] = one_layer(4, 2, 32)
MemoryProbe.bandwidth = lambda _, __: Bandwidth(9.0, 10.0)
layer.copies_needed = lambda num_bytes, device: 1
given = "--experiment stage_breakdown --lengths 128 --trials 1 --out"
raise SystemExit(bench.main([*given.split(), {str(file)!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", toy], capture_output=True, text=True, env=bare_machine, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(file)
    assert {row["status"] for row in rows} == {"ok"}
    assert sorted(row["method"] for row in rows) == sorted([*variants.classes(), "hata"])
    assert all(float(row["decode_ms_p50"]) > 0 for row in rows)
    full = rows[0]
    assert (full["method"], full["speedup_vs_full"], full["k"]) == ("full", "", "")
    assert {row["k"] for row in rows[1:]} == {"64"}
    # The share of tokens that are read is the budget's, but for methods that may read fewer.
    assert {float(row["density"]) for row in rows[1:8]} == {0.5}
