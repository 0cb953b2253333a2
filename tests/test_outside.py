"""A method or a task is two files, and they may stand outside the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]

MODULE = '''
from dataclasses import dataclass
from typing import ClassVar

import torch
from topkbench.methods.base import Index, ScoringMethod


@dataclass(kw_only=True)
class ToyIndex(Index):
    lengths: torch.Tensor


@dataclass(kw_only=True)
class Toy(ScoringMethod):
    """Keep the longest keys, whatever the query."""

    name: ClassVar[str] = "toy"
    power: float = 1.0

    def build_index(self, prefill):
        lengths = torch.zeros(*prefill.key_states.shape[:2], prefill.capacity)
        lengths[:, :, : prefill.n] = prefill.key_states.norm(dim=-1)
        return ToyIndex(lengths=lengths, **Index.counts(prefill))

    def append(self, index, key_states, value_states):
        rows, slot = torch.arange(len(key_states)), index.advance()
        index.lengths[rows, :, slot] = key_states[:, :, 0].norm(dim=-1)

    def score(self, encoded, index, context):
        return index.lengths[:, :, : index.length] ** self.power
'''

SETTINGS = """
_target_: toy.Toy
label: Longest
colour: "#123456"
power: 1.0  # of the length
impl: ${impl}
native:
  dense_layers: 1  # first layers
"""

TASK = '''
from dataclasses import dataclass

from topkbench.harness.generation import GenerationTask
from topkbench.harness.samples import Sample
from topkbench.tasks.words import word_pools


@dataclass(kw_only=True)
class Recite(GenerationTask):
    """Repeat the last words of a list."""

    name: str = "recite"
    num_words: int = 8

    def samples(self, loaded):
        words = word_pools()[0][: self.num_words]
        text = "".join(f" {word}" for word in words)
        return [
            Sample(
                sample_id=f"recite-{copies}",
                subtask="words",
                context=text * copies,
                question=text,
                answer_prefix=f" {words[0]}",
                answers=(words[1],),
                max_new_tokens=3,
                length=None,
            )
            for copies in (10, 20)
        ]
'''

TASK_SETTINGS = """
_target_: {}.Recite
name: recite
question: ${{question}}
num_words: 8  # in the list
timed_prompts: 0
judged_prompts: 1
"""

RETURNED = """
from hydra.experimental.callback import Callback


class Returned(Callback):
    def on_job_end(self, config, job_return, **kwargs):
        with open("returned", "a") as file:
            file.write(f"{job_return.return_value}\\n")
"""


SWEEPER = """
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper


class ValueSweeper(BasicSweeper):
    pass
"""


def run_command(
    folder: Path, path: Path, *arguments: str, checkout: Path = ROOT
) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    """Run a checkout's command in a folder; return the report's folder and what it printed.

    Args:
        folder: Where it runs, and where its results and its cache are.
        path: Where Python finds modules outside the repository.
        arguments: Settings and options.
        checkout: The checkout.
    """
    done = subprocess.run(
        [
            *(sys.executable, str(checkout / "run.py"), *arguments),
            *("tracker=none", f"results_dir={folder / 'results'}"),
        ],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(path),
            "TOPKBENCH_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.split()[-1]).parent, done


def run_forked(server: Any, folder: Path, path: Path, *arguments: str) -> Path:
    """Do what `run_command` does in a forked process; return the report's folder.

    The checkout is the tested one, and the report has no figures.
    """
    job = {
        "script": str(ROOT / "run.py"),
        "arguments": [*arguments, "tracker=none", f"results_dir={folder / 'results'}"],
        "cwd": str(folder),
        "env": {"TOPKBENCH_CACHE": str(folder / "cache")},
        "before": f"sys.path.insert(1, {str(path)!r})",  # after the script's folder
        "figures": False,
        **{name: str(folder / name) for name in ("out", "err", "forwards")},
    }
    server.start(job)
    assert server.wait() == 0, (folder / "err").read_text()
    return Path((folder / "out").read_text().split()[-1]).parent


@pytest.mark.slow
def test_a_method_outside_the_repository_takes_two_files(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "method").mkdir(parents=True)
    (mine / "toy.py").write_text(MODULE)
    (mine / "method" / "toy.yaml").write_text(SETTINGS)
    (mine / "returned.py").write_text(RETURNED)
    (mine / "hydra_plugins").mkdir()
    (mine / "hydra_plugins" / "values.py").write_text(SWEEPER)
    assert len(MODULE.strip().splitlines()) == 30
    folder, done = run_command(
        *(tmp_path, mine, "--config-dir", str(mine)),
        *("method=toy", "k=16,32", "rbit=32", "method.power=0.5"),
        *("task.length=256", "task.subtasks=[niah_single]", "num_samples=1"),
        *("task.timed_prompts=1", "task.judged_prompts=1", "-m"),
        "+hydra.callbacks.returned._target_=returned.Returned",
        "hydra.sweeper._target_=hydra_plugins.values.ValueSweeper",
    )
    rows = pd.read_parquet(folder / "rows.parquet")
    found = rows[(rows["method"] == "toy") & (rows["subtask"] == "mean")]
    assert set(found["status"]) == {"ok"}
    assert sorted(found["k"]) == [16, 32]
    # A sweeper that looks for values has each cell run at once, and gets its score.
    returned = (tmp_path / "returned").read_text().split()
    assert [float(one) for one in returned] == found.sort_values("k")["score"].tolist()
    assert found[["score", "delta_full", "decode_ms_p50", "recall_at_k"]].notna().all(axis=None)
    assert {"p_label", "p_colour"} & set(rows.columns) == set()
    # Its label and colour are recorded with its rows, where every report finds them.
    assert set(found["method_label"]) == {"Longest"}
    assert set(found["method_colour"]) == {"#123456"}
    assert "Longest" in done.stdout
    assert "| Longest " in (folder / "report.md").read_text()
    figure = folder / "figures" / "score_vs_k.svg"
    assert "#123456" in figure.read_text()
    assert "toy" in set(pd.read_csv(figure.with_suffix(".csv"))["method"])


@pytest.mark.slow
def test_an_edited_method_outside_the_repository_runs_again(server: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "method").mkdir(parents=True)
    module = MODULE.replace("self.power", "self.power * sign()")
    (mine / "toy.py").write_text(f"from signs import sign\n{module}")
    (mine / "signs.py").write_text("def sign():\n    return 1.0\n")
    (mine / "method" / "toy.yaml").write_text(SETTINGS)

    def run(*more: str) -> dict[str, object]:
        folder = run_forked(
            *(server, tmp_path, mine, "--config-dir", str(mine), "method=toy", "k=32"),
            *("task.length=256", "task.subtasks=[niah_single]", "num_samples=1"),
            *("task.timed_prompts=1", "task.judged_prompts=1", *more),
        )
        rows = pd.read_parquet(folder / "rows.parquet")
        (row,) = rows[(rows["method"] == "toy") & (rows["subtask"] == "mean")].to_dict("records")
        return {str(name): value for name, value in row.items()}

    first, again = run(), run("method.label=Renamed", "method.colour=null")
    assert again["run_id"] == first["run_id"]
    (mine / "signs.py").write_text("def sign():\n    return -1.0\n")
    edited = run()
    assert edited["run_id"] != first["run_id"]
    assert edited["code_digest"] != first["code_digest"]
    assert edited["recall_at_k"] != first["recall_at_k"]
    # Full attention and its code are as they were: its cell is found.
    assert edited["full_run_id"] == first["full_run_id"]


RECITE = ("task=recite", "method=exact", "k=16", "task.num_words=7")


def check_task(folder: Path) -> None:
    rows = pd.read_parquet(folder / "rows.parquet")
    rows = rows[rows["method"] == "exact"].set_index("subtask")
    assert list(rows.index) == ["words", "mean"]
    assert set(rows["status"]) == {"ok"}
    assert set(rows["num_samples"]) == {2}
    mean = rows.loc["mean"]
    assert mean[["score", "delta_full", "recall_at_k", "density"]].notna().all()
    assert pd.isna(mean["decode_ms_p50"])  # no prompt was timed
    # Of about 7 * 15 + 7 tokens, 16 are read.
    assert mean["density"] == pytest.approx(16 / 112, abs=0.07)


@pytest.mark.slow
def test_a_task_outside_the_repository_takes_two_files(server: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "task").mkdir(parents=True)
    (mine / "recite.py").write_text(TASK)
    (mine / "task" / "recite.yaml").write_text(TASK_SETTINGS.format("recite"))
    folder = run_forked(server, tmp_path, mine, "--config-dir", str(mine), *RECITE)
    check_task(folder)


@pytest.mark.slow
def test_a_task_in_the_repository_takes_two_files(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for folder in ("conf", "harness", "tasks"):  # those that find their root, and the new files
        shutil.copytree(ROOT / folder, checkout / folder)
    for folder in ("analysis", "kernels", "methods", "models"):
        (checkout / folder).symlink_to(ROOT / folder, target_is_directory=True)
    (checkout / ".types").mkdir()
    (checkout / ".types" / "topkbench").symlink_to("..", target_is_directory=True)
    shutil.copy(ROOT / "run.py", checkout)
    (checkout / "tasks" / "recite.py").write_text(TASK)
    settings = TASK_SETTINGS.format("topkbench.tasks.recite")
    (checkout / "conf" / "task" / "recite.yaml").write_text(settings)
    folder, _ = run_command(tmp_path, checkout / ".types", *RECITE, checkout=checkout)
    check_task(folder)
