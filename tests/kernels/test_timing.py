import time

import pytest
import torch

from topkbench.kernels import bench
from topkbench.kernels.timing import Stages, Timing, measure, quantile, read_bandwidth


def test_quantiles_are_interpolated() -> None:
    assert quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert quantile([7.0], 0.8) == 7.0
    timing = Timing.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (timing.p50_ms, timing.p20_ms, timing.p80_ms, timing.trials) == (3.5, 2.0, 5.0, 6)
    with pytest.raises(ValueError, match="at least one measured time, got none"):
        Timing.of([])


def test_functions_run_in_turn() -> None:
    calls: list[str] = []
    measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, 1)
    assert calls == ["a", "b", "a", "b", "a", "b"]


def test_a_rotation_takes_its_copies_in_turn() -> None:
    calls: list[int] = []
    copies = [lambda i=i: calls.append(i) for i in range(3)]
    measure({"cold": copies}, trials=4, warmup=3)
    assert calls == [0, 1, 2, 0, 1, 2, 0]


def test_a_slower_function_is_measured_slower() -> None:
    timings = measure({"slow": lambda: time.sleep(0.01), "fast": lambda: None}, 3, 0)
    assert timings["slow"].p50_ms >= 10
    assert timings["fast"].p50_ms < timings["slow"].p50_ms


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="trials must be at least 1"):
        measure({"a": lambda: None}, trials=0)
    with pytest.raises(ValueError, match="cuda_graph needs a cuda device, got cpu"):
        measure({"a": lambda: None}, cuda_graph=True)
    with pytest.raises(ValueError, match=r"functions\['a'\] must hold at least one"):
        measure({"a": []})


def test_stages_collect_medians() -> None:
    stages = Stages()
    for _ in range(3):
        with stages("score"):
            time.sleep(0.002)
    with pytest.raises(RuntimeError), stages("select"):
        raise RuntimeError
    assert len(stages.times()["score"]) == 3
    assert stages.medians()["score"] >= 2
    assert "select" not in stages.times()


def test_bandwidth_is_positive() -> None:
    bandwidth = read_bandwidth(num_bytes=2**20, trials=2)
    assert bandwidth.read_gb_s > 0
    assert bandwidth.copy_gb_s > 0


def test_the_bench_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    shape = "--kv-len 700 --kv-heads 2 --group 2 --head-dim 64 --k 32 --trials 2"
    for dtype in ("float32", "bfloat16"):
        assert bench.main([*shape.split(), "--dtype", dtype]) == 0
        printed = capsys.readouterr().out
        for name in ("hash_encode", "sparse_attention", "full (sdpa)", "speedup"):
            assert name in printed


def test_the_bench_gives_no_time_for_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "topk_select", lambda scores, k, impl: torch.zeros(1, 8, k).int())
    assert bench.main(["--kv-len", "300", "--k", "8", "--trials", "1"]) == 1
    captured = capsys.readouterr()
    assert "wrong result, no times" in captured.err
    assert "speedup" not in captured.out
