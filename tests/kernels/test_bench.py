"""The bench times only correct results, skips large shapes, and needs only the kernels folder."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from topkbench.kernels import bench, experiments, operators
from topkbench.kernels.dispatch import OPERATORS
from topkbench.kernels.experiments import EXPERIMENTS, GEOMETRIES, chosen, faster_from
from topkbench.kernels.full_attention.api import full_attention
from topkbench.kernels.steps import METHODS, Geometry, Layer, Step
from topkbench.kernels.testing import WrongResult
from topkbench.kernels.timing import Bandwidth
from topkbench.methods.base import AnyMethod, CacheView, Policy, PrefillInputs, StepContext
from topkbench.methods.exact import ExactTopK
from topkbench.methods.quest import Quest
from topkbench.methods.streaming_llm import StreamingLLM

SMALL = Geometry(6, 2, 32)
AUTO = dict.fromkeys(OPERATORS, "auto")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the experiments run quickly: a small geometry, and few copies."""
    monkeypatch.setitem(GEOMETRIES, "llama31", SMALL)
    monkeypatch.setitem(GEOMETRIES, "llama2", Geometry(4, 4, 32))
    monkeypatch.setattr(experiments, "copies_needed", lambda num_bytes, device: 2)
    monkeypatch.setattr(experiments, "read_bandwidth", lambda device: Bandwidth(9.0, 10.0))


def layer(n: int, batch_size: int = 2, dtype: torch.dtype = torch.float32) -> Layer:
    return Layer.draw(SMALL, batch_size, n, 64, dtype, torch.device("cpu"))


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


@pytest.mark.parametrize("name", METHODS)
def test_a_step_that_selects_every_token_equals_full_attention(name: str) -> None:
    drawn = layer(64)
    assert drawn.k == 64
    full = full_attention(drawn.query.flatten(1, 2), drawn.keys, drawn.values, 32**-0.5)
    torch.testing.assert_close(METHODS[name](drawn, AUTO)(), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [300, 512])
@pytest.mark.parametrize("method", [ExactTopK(), Quest(), StreamingLLM()], ids=lambda one: one.name)
def test_a_step_agrees_with_the_methods_decode_step(method: AnyMethod, n: int) -> None:
    drawn = layer(n)
    index = method.build_index(
        PrefillInputs(
            key_states=drawn.keys[:, :, :-1],
            value_states=drawn.values[:, :, :-1],
            capacity=n,
            layer=0,
            num_layers=1,
        )
    )
    method.append(index, drawn.keys[:, :, -1:], drawn.values[:, :, -1:])
    cache = CacheView(drawn.keys, drawn.values)
    expected = method.step(index, StepContext(drawn.query, cache, Policy(k=drawn.k), 32**-0.5)).out
    torch.testing.assert_close(METHODS[method.name](drawn, AUTO)(), expected)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_does_not_change_its_index(name: str) -> None:
    step = METHODS[name](layer(300, dtype=torch.bfloat16), AUTO)
    before = [one.clone() for one in step.read]
    first = step()
    assert torch.equal(first, step())
    for one, was in zip(step.read, before, strict=True):
        torch.testing.assert_close(one, was)
    step.check()


def test_bytes_read_by_hand() -> None:
    drawn = layer(512)
    read = {name: METHODS[name](drawn, AUTO).bytes_read() for name in METHODS}
    row, kept = 2 * 32 * 4, 64 * 2 * 2 * 32 * 4  # a token's keys; 64 tokens' keys and values
    assert read == {
        "full": 512 * 2 * row,
        "exact": 512 * row + kept,
        "hata": 512 * 2 * (8 + 4) + kept,
        "hata_integer": 512 * 2 * 8 + kept,
        "quest": 512 // 16 * 2 * row + kept,
        "loki": 512 * row // 4 + kept,
        "streaming_llm": kept,
    }


@pytest.mark.parametrize("stage", ["score", "select", "attend"])
def test_a_wrong_stage_is_detected(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    step = METHODS["hata"](layer(300), dict.fromkeys(AUTO, "cpu"))
    right = getattr(Step if stage != "score" else METHODS["hata"], stage)

    def wrong(self: Step, given: Tensor) -> Tensor:
        found = right(self, given)
        if self.impl["topk_select"] == "reference":
            return found
        return (found - 1).clamp_min(0) if stage == "select" else found * 1.01

    monkeypatch.setattr(METHODS["hata"], stage, wrong)
    with pytest.raises(AssertionError, match=r"must be at most|selection is not the reference"):
        step.check()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [("hata_integer", 1, "whole numbers"), ("loki", 2e-3, "norm must be at most 0.001")],
)
def test_a_slightly_wrong_score_is_also_detected_in_16_bits(
    monkeypatch: pytest.MonkeyPatch, name: str, change: float, message: str
) -> None:
    step = METHODS[name](layer(300, dtype=torch.bfloat16), dict.fromkeys(AUTO, "cpu"))
    right = METHODS[name].score

    def wrong(self: Step, encoded: Tensor) -> Tensor | None:
        found = right(self, encoded)
        if found is not None and self.impl["topk_select"] != "reference":
            found = found * (1 + change) if found.is_floating_point() else found.clone()
            found[0, 0, 7] += change
        return found

    step.check()
    monkeypatch.setattr(METHODS[name], "score", wrong)
    with pytest.raises(WrongResult, match=f"the scores of the step: .*{message}"):
        step.check()


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
    assert all(float(hata[name]) > 0 for name in (*timed, "select_ms", "attend_ms"))
    seconds = float(hata["decode_ms_p50"]) * 1e-3
    read = 300 * 2 * (16 + 4) + 64 * 2 * 2 * 32 * 4
    assert float(hata["bytes_read_per_step"]) == read
    assert float(hata["bandwidth_fraction"]) == pytest.approx(read / seconds / 10e9)
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
    def raise_wrong_result(step: Step) -> None:
        raise WrongResult("the output differ by 1, more than 0.001.")

    monkeypatch.setattr(METHODS["quest"], "check", raise_wrong_result)
    file = tmp_path / "rows.csv"
    given = "--experiment stage_breakdown --lengths 128 --trials 1 --methods exact quest --out"
    assert bench.main([*given.split(), str(file)]) == 1
    exact, quest = rows_of(file)
    assert (exact["status"], quest["status"]) == ("ok", "wrong")
    assert quest["reason"].startswith("the output differ by 1")
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
    # 512 bytes a token: two copies, 0.3 of each for indices and one more are 230 KiB of 128 tokens.
    assert (fits["status"], skipped["status"]) == ("ok", "skipped")
    assert skipped["reason"].endswith("GiB of states exceed half of the free memory.")
    assert "skipped: " in capsys.readouterr().out


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


def test_the_bench_needs_no_library_of_the_other_folders() -> None:
    refused = ("hydra", "omegaconf", "wandb", "pandas", "transformers", "psutil", "matplotlib")
    code = (
        f"import sys; sys.modules |= dict.fromkeys({refused!r})\n"
        "from topkbench.kernels import bench, experiments, steps\n"
        "rooms = {name.split('.')[1] for name in sys.modules if name.startswith('topkbench.')}\n"
        "assert rooms == {'kernels'}, rooms"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
