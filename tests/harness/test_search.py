"""A search runs its trials as cells, goes on after a kill as if nothing had been, and ends."""

import json
import shutil
import signal
import tomllib
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest

from topkbench.analysis.figures.pareto import front_of
from topkbench.analysis.record.files import locked
from topkbench.analysis.record.store import RecordError, Sweep
from topkbench.harness import search
from topkbench.harness.search import Choice, Search, Study

ROOT = Path(__file__).parents[2]
SMALL = (
    *("task.length=256", "num_samples=1", "task.subtasks=[niah_single,vt]"),
    *("task.judged_prompts=0", "task.timed_prompts=0", "tracker=none", "cache_dir=cache"),
)
OF_9 = (
    *("method=quest", "search.trials=9", "search.batch=3", "search.knobs.k='range(16,65,16)'"),
    *("+search.knobs.method.page_size=[8,16,32]", *SMALL),
)


class Searches:
    """Runs the command with ``experiment=search``, in a folder of its own."""

    def __init__(self, server: Any, folder: Path) -> None:
        self.server, self.folder = server, folder
        folder.mkdir(exist_ok=True)

    def run(self, *given: str, before: str = "") -> int:
        """Run a search; return its exit status.

        Args:
            given: Its settings.
            before: Code that its process runs first.
        """
        for name in ("out", "err", "forwards"):
            (self.folder / name).unlink(missing_ok=True)
        job = {
            "script": str(ROOT / "run.py"),
            "arguments": ["experiment=search", *given],
            "cwd": str(self.folder),
            "env": {"WANDB_MODE": "disabled", "TMPDIR": str(self.folder)},
            "before": before,
            "figures": False,
            **{name: str(self.folder / name) for name in ("out", "err", "forwards")},
        }
        self.server.start(job)
        return int(self.server.wait())

    def text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    @property
    def report(self) -> Path:
        return Path(self.text("out").strip().splitlines()[-1]).parent

    @property
    def rows(self) -> pd.DataFrame:
        """The rows of the cells as a whole, by cell."""
        rows = pd.read_parquet(self.report / "rows.parquet")
        return rows[rows["subtask"] == "mean"].set_index("run_id")

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.report / "search.json").read_text())
        return found

    @property
    def study(self) -> Path:
        (path,) = (self.folder / "results" / "studies").glob("search-*.db")
        return path

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        return optuna.load_study(storage=f"sqlite:///{self.study}", study_name="search").trials


@pytest.fixture(scope="module")
def whole(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Searches:
    """A search of 9 trials that nobody disturbed."""
    searches = Searches(server, tmp_path_factory.mktemp("whole"))
    assert searches.run(*OF_9) == 0, searches.text("err")
    return searches


@pytest.fixture
def searches(server: Any, tmp_path: Path) -> Searches:
    return Searches(server, tmp_path)


def suggested(trials: list[optuna.trial.FrozenTrial]) -> list[tuple[Any, ...]]:
    return [(one.number, one.params, one.values, one.user_attrs["cell"]) for one in trials]


@pytest.mark.slow
def test_trials_are_cells_of_one_group_prefilled_once_a_batch(whole: Searches) -> None:
    trials = whole.trials
    assert [one.number for one in trials] == list(range(9))
    assert {one.state.name for one in trials} == {"COMPLETE"}
    assert {one.params["k"] for one in trials} <= set(range(16, 65, 16))
    # Each batch of 3 trials with a new cell prefills the two prompts.
    first = {one.user_attrs["cell"]: one.number // 3 for one in reversed(trials)}
    assert len(set(first.values())) > 1
    assert len(whole.text("forwards").splitlines()) == 2 * len(set(first.values()))
    rows = whole.rows
    for one in trials:
        row = rows.loc[one.user_attrs["cell"]]
        assert (row["k"], row["p_page_size"]) == (
            one.params["k"],
            int(one.params["method.page_size"]),
        )
        assert [row["score"], row["bytes_read_per_step"]] == one.values
        assert row["delta_full"] == row["score"] - rows.loc[row["full_run_id"], "score"]
    assert set(rows["status"]) == {"ok"}
    assert len(rows) == len({one.user_attrs["cell"] for one in trials}) + 1  # full attention's
    assert whole.text("err") == ""


@pytest.mark.slow
def test_the_studys_front_is_by_points_and_the_reports_by_intervals(
    whole: Searches,
) -> None:
    rows = whole.rows
    own = rows[rows["method"] == "quest"]
    points = {str(cell): (row["score"], row["bytes_read_per_step"]) for cell, row in own.iterrows()}
    front = {
        cell
        for cell, (score, read) in points.items()
        if not any(
            other_score >= score
            and other_read <= read
            and (other_score, other_read) != (score, read)
            for other_score, other_read in points.values()
        )
    }
    assert 1 < len(front) < len(points)
    of_study = optuna.load_study(storage=f"sqlite:///{whole.study}", study_name="search")
    assert {one.user_attrs["cell"] for one in of_study.best_trials} == front
    apart = front_of(own, "bytes_read_per_step")
    front = {str(cell) for cell, is_on in zip(own.index, apart, strict=True) if is_on}
    numbers: dict[str, list[str]] = {}
    for one in whole.record["ended"]:
        numbers.setdefault(one["run_id"], []).append(str(one["trial"]))
    text = (whole.report / "report.md").read_text()
    section = text[text.index("## Search") : text.index("![Trials of the search]")]
    table = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")]
    shown = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in table[2:]}
    assert set(shown) == {", ".join(numbers[cell]) for cell in front}
    for cell in front:
        k, page_size, score, _ = shown[", ".join(numbers[cell])]
        row = rows.loc[cell]
        assert (k, page_size) == (str(row["k"]), f"{row['p_page_size']:.0f}")
        low, high = row["score_ci_low"], row["score_ci_high"]
        assert score == f"{row['score']:.1f} [{low:.1f}, {high:.1f}]"
    assert "Pareto front" in (whole.report / "report.html").read_text()
    assert "Pareto front:" in whole.text("out")
    assert "9 of 9 trials" in section


KILL = """
import os, signal
from topkbench.harness import search
from topkbench.analysis.record import store as record
def killing(owner, name, number):
    real, calls = getattr(owner, name), iter(range(1, number))
    def call(*given, **named):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)
    setattr(owner, name, call)
"""


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_and_loses_no_trial(
    whole: Searches, searches: Searches
) -> None:
    code = KILL + "from optuna import Study, Trial\n"
    for before in (
        "killing(search.Choice, 'suggest', 3)",  # while it asks: the third trial lacks a knob
        "killing(record.Cell, 'write', 3)",  # while trials run
        "killing(Study, 'tell', 2)",  # while it tells what came out
        "killing(record.Cell, 'write', 2)",  # in a later batch
    ):
        assert searches.run(*OF_9, before=code + before) == -signal.SIGKILL
    states = [one.state.name for one in searches.trials]
    assert set(states) == {"COMPLETE", "RUNNING"}
    assert searches.run(*OF_9) == 0, searches.text("err")
    assert suggested(searches.trials) == suggested(whole.trials)
    assert searches.record == whole.record
    best = ["score", "bytes_read_per_step", "k", "p_page_size", "status"]
    assert searches.rows.sort_index()[best].equals(whole.rows.sort_index()[best])


@pytest.mark.slow
def test_a_finished_search_runs_nothing_and_goes_on_with_more_trials(
    whole: Searches, tmp_path: Path
) -> None:
    record, cells = whole.record, set(whole.rows.index)
    assert whole.run(*OF_9) == 0
    assert (whole.text("forwards"), whole.record) == ("", record)
    assert set(whole.rows.index) == cells
    # There are 12 combinations: those that are missing are tried.
    assert whole.run(*OF_9, "search.trials=40") == 0
    tried = {tuple(sorted(one.params.items())) for one in whole.trials}
    assert len(tried) == 12
    assert "which are all combinations of its knobs' values" in whole.text("out")
    assert whole.record["ended"][:9] == record["ended"]


def test_another_search_has_a_study_of_its_own(searches: Searches) -> None:
    few = ("method=quest", "search.knobs.k=[16,32]", "search.trials=2", *SMALL)
    assert searches.run(*few) == 0
    assert searches.run(*few, "search.objectives=[score]") == 0
    assert searches.text("forwards") == ""  # its cells are found
    assert searches.run(*few, "protocol.num_sink=2") == 0
    assert len(list((searches.folder / "results" / "studies").glob("*.db"))) == 3


def test_a_trial_that_fails_is_told_and_a_small_space_is_tried_once(searches: Searches) -> None:
    """With one objective; k must hold 12 sinks and recents."""
    given = ("search.knobs.k=[8,16,32]", "+search.knobs.method.page_size=[8,16]", *SMALL)
    given = ("method=quest", "search.objectives=[score]", "search.batch=4", *given)
    assert searches.run(*given) == 3
    states = {(one.params["k"], one.params["method.page_size"]): one for one in searches.trials}
    assert len(searches.trials) == len(states) == 6
    failed = {values for values, one in states.items() if one.state.name == "FAIL"}
    assert failed == {("8", "8"), ("8", "16")}
    assert "protocol.num_sink + num_recent must be at most k=8" in searches.text("err")
    out = searches.text("out")
    assert "it ends after 6 trials, which are all combinations of its knobs' values" in out
    assert "6 of 24 trials, 5 configurations, 1 of them without a result." in out
    assert "Best trials:" in out
    # Again, nothing runs, and it says the same.
    assert searches.run(*given) == 3
    assert searches.text("forwards") == ""
    assert "6 of 24 trials, 5 configurations, 1 of them without a result." in searches.text("out")


def test_a_method_outside_the_repository_is_searched(searches: Searches) -> None:
    folder = searches.folder / "own" / "method"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "conf" / "method" / "quest.yaml", folder / "mine.yaml")
    given = ("method=mine", "~search.knobs.k", "+search.knobs.method.page_size=[8,16]", *SMALL)
    assert searches.run(*given, "k=32", "--config-dir", str(folder.parent)) == 0
    assert sorted(one.params["method.page_size"] for one in searches.trials) == ["16", "8"]


def test_a_study_that_cannot_be_used_is_one_sentence(searches: Searches) -> None:
    few = ("method=quest", "search.knobs.k=[16,32]", "search.trials=2", *SMALL)
    assert searches.run(*few) == 0
    path = searches.study
    with locked(path.with_suffix(".lock"), 0):
        assert searches.run(*few) == 1
    (error,) = searches.text("err").strip().splitlines()
    assert error.endswith("but another process holds it; wait for that one to end.")
    path.write_text("text" * 500)
    assert searches.run(*few) == 1
    (error,) = searches.text("err").strip().splitlines()
    assert error.startswith(f"error: the study {path} must be one of optuna's that can be written,")
    assert error.endswith("delete it and run the command again, which finds finished cells.")
    # As does force=true, which begins a new one.
    assert searches.run(*few, "force=true") == 0
    assert len(searches.trials) == 2
    assert searches.text("forwards") != ""


def test_an_objective_that_the_task_leaves_empty_is_one_sentence(searches: Searches) -> None:
    assert searches.run("method=quest", "search.objectives=[nll]", "search.batch=2", *SMALL) == 1
    (error,) = searches.text("err").strip().splitlines()
    assert error == (
        "error: search.objectives must be columns that the task fills, and task=ruler_words leaves"
        " nll empty."
    )


def test_a_trial_whose_cell_has_not_ended_is_not_told(tmp_path: Path) -> None:
    """As where the machine that ran it was taken away."""
    settings = Search(trials=8, batch=2, objectives=["score"], knobs={"k": "16,32,64"}, seed=0)
    study = Study(settings, [Choice("k", ("16", "32", "64"))], tmp_path / "study.db")
    batch = study.ask()
    with pytest.raises(RecordError, match=r"that of trial 0 has not; run the command again"):
        study.tell(batch, Sweep(tmp_path / "sweep", tmp_path))
    assert [one.number for one in study.ask()] == [one.number for one in batch] == [0, 1]


def test_without_optuna_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["search"] == [search.OPTUNA]
    monkeypatch.setattr(search, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package optuna, which is not installed") as no:
        Search(trials=1, batch=1, objectives=["score"], knobs={"k": "1,2"}, seed=0)
    assert f'pip install "{search.OPTUNA}"' in str(no.value)
