import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from topkbench.kernels import timing
from topkbench.kernels.timing import (
    Bandwidth,
    OtherLoad,
    Stages,
    Timing,
    Usage,
    cache_bytes,
    clock_mhz,
    copies_needed,
    measure,
    other_share,
    quantile,
    read_bandwidth,
    speed_columns,
    speedup_interval,
    unsteady,
    usage,
    versions,
)


def test_a_speed_up_over_sdpa_is_a_column_of_its_own() -> None:
    step, full, sdpa = [[2.0]] * 8, [[6.0]] * 8, [[10.0]] * 8
    columns = speed_columns(step, full, 0.0, sdpa)
    assert (columns["speedup_vs_full"], columns["speedup_vs_sdpa"]) == (3.0, 5.0)
    assert (columns["sdpa_ms_p50"], columns["full_ms_p50"]) == (10.0, 6.0)
    assert (columns["sdpa_ci_low"], columns["sdpa_ci_high"]) == (5.0, 5.0)
    assert "sdpa_ms_p50" not in speed_columns(step, full, 0.0)
    # Full attention's own row has no speed-up over itself, and one over SDPA.
    own = speed_columns(full, None, 0.0, sdpa)
    assert "speedup_vs_full" not in own
    assert own["speedup_vs_sdpa"] == pytest.approx(10 / 6)


def test_quantiles_are_interpolated() -> None:
    assert quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert quantile([7.0], 0.8) == 7.0
    found = Timing.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (found.p50_ms, found.p20_ms, found.p80_ms, found.trials) == (3.5, 2.0, 5.0, 6)
    assert found.taken_ms == (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    with pytest.raises(ValueError, match="at least one measured time, got none"):
        Timing.of([])


def test_functions_run_interleaved() -> None:
    calls: list[str] = []
    measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, 1)
    assert calls == ["a", "b", "a", "b", "a", "b"]


def test_a_rotation_calls_its_copies_one_after_the_other() -> None:
    calls: list[int] = []
    copies = [lambda i=i: calls.append(i) for i in range(3)]
    measure({"cold": copies}, trials=4, warmup=3)
    assert calls == [0, 1, 2, 0, 1, 2, 0]


def test_what_runs_before_each_call_is_not_timed() -> None:
    calls: list[str] = []

    def before() -> None:
        calls.append("before")
        time.sleep(0.05)

    found = measure({"a": lambda: calls.append("a")}, 2, 1, before=before)
    assert calls == ["a", "before", "a", "before", "a"]  # not before the warm-up
    assert found["a"].p50_ms < 25


def test_trials_go_on_where_the_warm_up_ended() -> None:
    calls: list[int] = []
    copies = [lambda i=i: calls.append(i) for i in range(5)]
    measure({"cold": copies}, trials=3, warmup=2)
    assert calls == [0, 1, 2, 3, 4]


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
    assert Bandwidth(20.0, 25.0).ceiling_gb_s == Bandwidth(25.0, 20.0).ceiling_gb_s == 25.0


def fake_system(monkeypatch: pytest.MonkeyPatch, folder: Path, files: dict[str, str]) -> None:
    """Let the timing module read system files from a folder."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(timing, "Path", lambda path: folder / path.lstrip("/"))


CACHES = {
    "sys/devices/system/cpu/cpu0/cache/index0/level": "1\n",
    "sys/devices/system/cpu/cpu0/cache/index0/size": "48K\n",
    "sys/devices/system/cpu/cpu0/cache/index2/level": "2\n",
    "sys/devices/system/cpu/cpu0/cache/index2/size": "2M\n",
}


def test_the_cache_is_the_last_level_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_system(monkeypatch, tmp_path, CACHES)
    assert cache_bytes() == 2 * 2**20
    (tmp_path / "sys/devices/system/cpu/cpu0/cache/index2/size").write_text("unknown\n")
    assert cache_bytes() == 48 * 2**10


def test_copies_exceed_twice_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_system(monkeypatch, tmp_path, CACHES)
    mib = 2**20
    assert [copies_needed(size) for size in (mib // 2, mib, 2 * mib, 2 * mib + 1)] == [8, 4, 2, 1]
    assert copies_needed(3 * mib // 2) == 3
    with pytest.raises(ValueError, match="num_bytes must be at least 1, got 0"):
        copies_needed(0)


def test_an_unknown_machine_has_no_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_system(monkeypatch, tmp_path, {})
    assert cache_bytes() is None
    assert clock_mhz() is None
    assert versions()["driver"] is None
    assert copies_needed(2**26) == 2  # a cache of 64 MiB is assumed
    assert copies_needed(2**26 + 1) == 1


def test_clock_and_versions_come_from_the_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build"
    clocks = "cpu MHz\t\t: 1200.000\nbogomips\t: 5192.2\ncpu MHz\t\t: 2596.138\n"
    fake_system(
        monkeypatch, tmp_path, {"proc/cpuinfo": clocks, "proc/driver/nvidia/version": module}
    )
    assert clock_mhz() == 2596.138
    found = versions()
    assert list(found) == ["python", "torch", "numba", "triton", "cuda", "driver"]
    assert found["driver"] == "570.86.15"
    assert found["torch"] == torch.__version__
    assert found["cuda"] == torch.version.cuda


def alone(*milliseconds: float) -> list[list[float]]:
    return [[one] for one in milliseconds]


def test_a_speed_up_is_the_ratio_of_the_rows_own_medians() -> None:
    found = speed_columns(alone(1, 2, 3, 4, 5, 6), alone(10, 11, 12, 13, 14, 15), 0.02)
    assert (found["decode_ms_p20"], found["decode_ms_p50"], found["decode_ms_p80"]) == (2, 3.5, 5)
    assert (found["full_ms_p20"], found["full_ms_p50"], found["full_ms_p80"]) == (11, 12.5, 14)
    assert found["speedup_vs_full"] == 12.5 / 3.5
    assert found["speedup_ci_low"] < 12.5 / 3.5 < found["speedup_ci_high"]
    assert found["other_load"] == 0.02


def test_full_attentions_row_has_its_time_and_no_speed_up() -> None:
    found = speed_columns(alone(1, 2, 3), None)
    assert (found["decode_ms_p50"], found["full_ms_p50"]) == (2, 2)
    assert not {"speedup_vs_full", "speedup_ci_low", "speedup_ci_high"} & set(found)


def test_an_interval_over_pairs_ignores_drift_that_both_share() -> None:
    slow = [1, 1, 1, 1, 1, 7, 7, 7, 7, 7, 7]
    step, full = alone(*slow), alone(*(3 * one for one in slow))
    assert speedup_interval(full, step) == (3, 3)
    # The same times, but not slowed together: the ratio may be anything from 3/7 to 21.
    assert speedup_interval(full[::-1], step) == (pytest.approx(3 / 7), 21)


def test_the_times_of_a_turn_are_drawn_together() -> None:
    # Six turns of four steps: a disturbed turn does not count as four independent slow steps.
    step = [[1.0] * 4, [1.0] * 4, [5.0] * 4, [1.0] * 4, [1.0] * 4, [1.0] * 4]
    full = [[2.0] * 4] * 6
    assert speedup_interval(full, step) == (pytest.approx(2 / 3), 2)
    apart_full = [[one] for turn in full for one in turn]
    apart_step = [[one] for turn in step for one in turn]
    assert speedup_interval(apart_full, apart_step) == (2, 2)


def test_too_few_pairs_have_no_interval_and_odd_ones_are_refused() -> None:
    assert speedup_interval(alone(2, 2, 2, 2, 2), alone(1, 1, 1, 1, 1)) is None
    assert "speedup_ci_low" not in speed_columns(alone(1, 1, 1), alone(2, 2, 2))
    with pytest.raises(ValueError, match="turns must come in pairs, got 2 and 3"):
        speedup_interval(alone(1, 2), alone(1, 2, 3))
    with pytest.raises(ValueError, match="the same number of times, got several"):
        speedup_interval([[1.0], [1.0, 2.0]], [[1.0], [1.0]])


@pytest.mark.parametrize("pairs", [6, 9, 15])
@pytest.mark.parametrize("kind", ["noise", "bursts", "drift"])
def test_the_interval_covers_the_true_ratio(pairs: int, kind: str) -> None:
    generator = np.random.default_rng(0)
    hit = 0
    for seed in range(200):
        full, step = np.exp(0.1 * generator.standard_normal((2, pairs)))
        if kind == "bursts":
            full *= 1 + 5 * (generator.random(pairs) < 0.2)
            step *= 1 + 5 * (generator.random(pairs) < 0.2)
        if kind == "drift":
            shared = np.exp(np.linspace(0, 0.7, pairs))
            full, step = shared * full, shared * step
        ends = speedup_interval(alone(*(2 * full)), alone(*step), seed)
        assert ends is not None
        hit += ends[0] <= 2 <= ends[1]
    assert hit >= 180  # of 190; three standard deviations of 200 draws are 9


def test_unsteady_times_say_why() -> None:
    calm = Timing.of([1.0, 1.1, 1.2, 1.3])
    wild = Timing.of([0.58, 0.58, 0.58, 0.58, 0.58, 12.95, 12.95, 12.95])
    assert unsteady(calm, calm, None) is None
    assert unsteady(calm, calm, 0.1) is None
    assert unsteady(wild, calm, None) == "the step took 0.58 to 12.9 ms (20th to 80th percentile)"
    assert unsteady(calm, wild, 0.381) == (
        "full attention's step took 0.58 to 12.9 ms (20th to 80th percentile); others took 38% of "
        "the processors' time"
    )
    twice = Timing(p50_ms=1.5, p20_ms=1.0, p80_ms=2.0, trials=9, taken_ms=())
    assert unsteady(twice, None, None) is None  # exactly at the limit
    assert speed_columns(alone(1, 1, 1, 1), None, 0.5)["timing_note"] == (
        "others took 50% of the processors' time"
    )


def test_other_load_is_the_busy_time_minus_this_process() -> None:
    before = Usage(wall_s=10, own_s=3, busy_s=50, processors=2)
    # 2 s of 2 processors are 4 s; 3.5 s were busy, 1.5 s of them by this process.
    assert other_share(before, Usage(12, 4.5, 53.5, 2)) == 0.5
    assert other_share(before, Usage(12, 6.9, 53.5, 2)) == 0  # the clocks differ slightly
    assert other_share(before, Usage(10.2, 3.1, 50.4, 2)) is None  # too short to measure
    assert other_share(None, before) is None
    assert other_share(before, None) is None


def test_usage_is_read_of_the_processors_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "cpu 1 1\ncpu0 100 10 40 900 7 3 2 5 50 0\ncpu1 9 9 9 9 9 9 9 9\ncpu2 100 0 0 1 1 0 0 0"
    monkeypatch.setattr(timing, "_read", lambda path: text)
    monkeypatch.setattr(timing.os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    monkeypatch.setattr(timing.os, "sysconf", lambda _: 100)
    found = usage()
    assert found is not None
    # Idle and waiting times are not busy; a guest's time is part of the user's.
    assert (found.busy_s, found.processors) == (2.6, 2)
    for nothing in ("", "cpu0 0 0 0 0 0 0 0 0"):
        monkeypatch.setattr(timing, "_read", lambda path, text=nothing: text)
        assert usage() is None
        assert OtherLoad().share() is None


def test_other_load_is_measured_only_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([Usage(0, 0, 0, 4), Usage(1, 1, 3, 4)])
    monkeypatch.setattr(timing, "usage", lambda: next(moments))
    assert OtherLoad().share() == 0.5
    assert OtherLoad("cuda").share() is None
    assert not math.isnan(speed_columns(alone(1), None, 0.5)["other_load"])
