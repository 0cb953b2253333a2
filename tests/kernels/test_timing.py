import time
from pathlib import Path

import pytest
import torch

from topkbench.kernels import timing
from topkbench.kernels.timing import (
    Bandwidth,
    Stages,
    Timing,
    cache_bytes,
    clock_mhz,
    copies_needed,
    measure,
    quantile,
    read_bandwidth,
    versions,
)


def test_quantiles_are_interpolated() -> None:
    assert quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert quantile([7.0], 0.8) == 7.0
    found = Timing.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (found.p50_ms, found.p20_ms, found.p80_ms, found.trials) == (3.5, 2.0, 5.0, 6)
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


def test_what_runs_before_each_call_is_not_timed() -> None:
    calls: list[str] = []

    def before() -> None:
        calls.append("before")
        time.sleep(0.05)

    found = measure({"a": lambda: calls.append("a")}, 2, 1, before=before)
    assert calls == ["a", "before", "a", "before", "a"]  # the warm-up goes without
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
    """Let the stopwatch read a system's files from a folder."""
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
    assert copies_needed(2**26) == 2  # 64 MiB are assumed
    assert copies_needed(2**26 + 1) == 1


def test_clock_and_versions_are_the_systems(
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
