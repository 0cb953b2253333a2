"""The needle task: all lengths and depths of the grid, with the needle at its depth."""

from pathlib import Path

import pytest

from topkbench.harness.samples import TaskDoesNotFit
from topkbench.models.load import LoadedModel
from topkbench.tasks.needle import Needle


def task(tmp_path: Path, **knobs: object) -> Needle:
    settings = {"lengths": (200, 400), "depths": (0, 50, 100), "num_samples": 2}
    return Needle(**{**settings, "cache_dir": str(tmp_path), **knobs})  # type: ignore[arg-type]


def test_the_grid_is_lengths_by_depths(loaded: LoadedModel, tmp_path: Path) -> None:
    samples = task(tmp_path).samples(loaded)
    assert list(dict.fromkeys(sample.subtask for sample in samples)) == [
        *("200 x 0%", "200 x 50%", "200 x 100%"),
        *("400 x 0%", "400 x 50%", "400 x 100%"),
    ]
    assert len({sample.sample_id for sample in samples}) == len(samples) == 12
    for sample in samples:
        length = int(sample.subtask.partition(" x ")[0])
        assert length - 20 < sample.length <= length


@pytest.mark.parametrize(("depth", "low", "high"), [(0, 0.0, 0.0), (25, 0.2, 0.3), (100, 1.0, 1.0)])
def test_the_needle_is_at_its_depth(
    loaded: LoadedModel, tmp_path: Path, depth: int, low: float, high: float
) -> None:
    (sample,) = task(tmp_path, lengths=(600,), depths=(depth,), num_samples=1).samples(loaded)
    sentences = sample.context.split("\n", 1)[1].removesuffix(".").split(".")
    positions = [i for i, text in enumerate(sentences) if "secret words" in text]
    assert len(positions) == 1
    assert low <= positions[0] / (len(sentences) - 1) <= high
    assert sentences[positions[0]].endswith(sample.answers[0])


def test_depths_give_different_prompts_and_more_samples_keep_the_first(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    few = task(tmp_path, lengths=(200,)).samples(loaded)
    more = task(tmp_path, lengths=(200,), num_samples=3).samples(loaded)
    assert {one.sample_id: one for one in few}.items() <= {
        one.sample_id: one for one in more
    }.items()
    assert len({sample.context for sample in few}) == 6


def test_a_length_past_the_window_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(TaskDoesNotFit, match=r"task\.lengths must be at most the window of 1024"):
        task(tmp_path, lengths=(200, 4096)).samples(loaded)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"lengths": ()}, "task.lengths must list at least one value"),
        ({"lengths": (0,)}, "task.lengths must be at least 1, got 0"),
        ({"lengths": (64, 64)}, "task.lengths must list each value once, got 64 twice"),
        ({"depths": ()}, "task.depths must list at least one value"),
        ({"depths": (0, 101)}, "task.depths must be at most 100 percent, got 101"),
    ],
)
def test_an_invalid_grid_is_refused(tmp_path: Path, knobs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(tmp_path, **knobs)
