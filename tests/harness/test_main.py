"""The command itself: rows appear, nothing runs twice, and what goes wrong is one sentence.

Most commands run in a process forked from one that has imported the libraries, since importing
them costs more than the tiny cells do; what depends on a fresh interpreter gets one. Few steps
are timed, and the figures of a report are empty files in tests that are not about them.
"""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers.utils.import_utils import KERNELS_MIN_VERSION

from topkbench.harness.main import job, settings_first

SMALL = ("num_hidden_layers=1", "hidden_size=64", "intermediate_size=64", "vocab_size=99")
ROOT = Path(__file__).parents[2]
RUN = ROOT / "run.py"
FEW_TEXTS = ("calibration.num_sequences=2", "calibration.max_length=256")


class Commands:
    """Runs the command, each time in a process of its own, with results in a folder."""

    def __init__(self, server: Any, folder: Path, model: Path) -> None:
        self.server = server
        self.folder = folder
        self.model = model
        self.results = folder / "results"
        self.number = 0
        self.mode = "disabled"
        self.extra: dict[str, str] = {}
        self.before = ""  # code that its process runs first
        self.figures = False  # whether figures are drawn; else they are empty files
        for name in ("tmp", "cwd"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "TOPKBENCH_CACHE": str(self.folder / "cache"),
            "TMPDIR": str(self.folder / "tmp"),
            "WANDB_MODE": self.mode,
            **self.extra,
        }

    def arguments(self, *given: str) -> list[str]:
        names = {one.split("=")[0] for one in given}
        settings = {
            "model.path": str(self.model),
            "task.length": "256",
            "num_samples": "1",
            "task.subtasks": "[niah_single]",
            "task.timed_prompts": "0",  # the tests that look at times measure them
            "tracker": "none",
            "results_dir": str(self.results),
        }
        if "task" in names:  # a task with knobs of its own
            of_ruler = ("task.", "num_samples")
            settings = {
                name: one for name, one in settings.items() if not name.startswith(of_ruler)
            }
        defaults = (f"{name}={value}" for name, value in settings.items() if name not in names)
        return [*defaults, *given]

    def start(self, *given: str, out: Path | None = None, words: Sequence[str] = ()) -> None:
        self.start_with(*words, *self.arguments(*given), out=out)

    def start_with(self, *arguments: str, out: Path | None = None) -> None:
        """Start the command with these arguments alone."""
        self.number += 1
        job = {
            "script": str(RUN),
            "arguments": arguments,
            "cwd": str(self.folder / "cwd"),
            "env": self.environment,
            "before": self.before,
            "figures": self.figures,
            "forwards": str(self.folder / f"forwards-{self.number}"),
            "out": str(out or self.folder / f"out-{self.number}"),
            "err": str(self.folder / f"err-{self.number}"),
        }
        self.process = self.server.start(job)

    def wait(self) -> int:
        return int(self.server.wait())

    def run(self, *given: str, out: Path | None = None) -> int:
        self.start(*given, out=out)
        return self.wait()

    def plan(self, *given: str) -> int:
        """Say what the command would cost."""
        self.start(*given, words=("plan",))
        return self.wait()

    def compare(self, before: Path, after: Path) -> int:
        """Compare two results."""
        self.start_with("compare", str(before), str(after))
        return self.wait()

    def text(self, kind: str) -> str:
        path = self.folder / f"{kind}-{self.number}"
        return path.read_text() if path.exists() else ""

    @property
    def forwards(self) -> list[str]:
        """The prompts that the last command prefilled."""
        return self.text("forwards").splitlines()

    @property
    def report(self) -> Path:
        return Path(self.text("out").strip().splitlines()[-1])

    @property
    def rows(self) -> pd.DataFrame:
        """The rows of the last command's report."""
        return pd.read_parquet(self.report.parent / "rows.parquet")

    @property
    def cells(self) -> dict[str, list[dict[str, Any]]]:
        """What every finished cell says, by identity."""
        found = {}
        for path in (self.results / "cells").glob("*/rows.json"):
            found[path.parent.name] = json.loads(path.read_text())["rows"]
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that the weights are the same ones throughout."""
    path = tmp_path_factory.mktemp("shipped") / "tiny"
    return Path(shutil.copytree(ROOT / "models" / "tiny", path))


@pytest.fixture
def commands(server: Any, tmp_path: Path, model: Path) -> Commands:
    return Commands(server, tmp_path, model)


TWO = "task.subtasks=[niah_single,vt]"
SWEEP = ("method=exact,quest", "k=16,32", "rbit=32", TWO, "task.timed_prompts=1", "-m")


@pytest.fixture(scope="module")
def swept(server: Any, tmp_path_factory: pytest.TempPathFactory, model: Path) -> Commands:
    """A sweep that nobody disturbed."""
    commands = Commands(server, tmp_path_factory.mktemp("swept"), model)
    commands.figures = True
    assert commands.run(*SWEEP) == 0, commands.text("err")
    return commands


@pytest.fixture(scope="module")
def undisturbed(swept: Commands) -> dict[str, list[tuple[Any, ...]]]:
    """The result of the undisturbed sweep alone, whatever else ran beside it since."""
    listed = json.loads((swept.report.parent / "cells.json").read_text())
    return result({name: rows for name, rows in swept.cells.items() if name in listed})


def result(cells: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[tuple[Any, ...]]]:
    """Return what must not depend on when and how often a sweep was interrupted."""
    columns = ("subtask", "status", "method", "k", "score", "delta_full", "num_samples", "density")
    columns = (*columns, "recall_at_k", "attention_mass", "output_rel_error", "config_digest")
    return {
        identity: [tuple(row.get(name) for name in columns) for row in rows]
        for identity, rows in cells.items()
    }


def test_a_sweep_leaves_its_rows_and_a_report(swept: Commands) -> None:
    rows = swept.rows
    assert len(rows) == 5 * 3  # full attention and four cells, of two sub-tasks and their mean
    assert set(rows["status"]) == {"ok"}
    assert set(rows["subtask"]) == {"niah_single", "vt", "mean"}
    assert not rows.duplicated(["run_id", "subtask"]).any()
    found = rows[rows["subtask"] == "mean"].set_index(["method", "k"]).sort_index()
    assert {(method, None if pd.isna(k) else int(k)) for method, k in found.index} == {
        ("full", None),
        *(("exact", 16), ("exact", 32), ("quest", 16), ("quest", 32)),
    }
    sparse = found[found["density"] < 1]
    assert len(sparse) == 4
    assert sparse[["recall_at_k", "attention_mass", "output_rel_error"]].notna().all(axis=None)
    assert sparse[["decode_ms_p50", "speedup_vs_full", "delta_full"]].notna().all(axis=None)
    assert set(found["question"]) == {"sparse"}
    assert (set(found["length"]), set(found["prompts"])) == ({256}, {"topkbench 1"})
    assert found["source_samples"].isna().all()
    assert (found["peak_memory_mib"] > 0).all()
    folder = swept.report.parent
    names = ("report.html", "report.md", "rows.csv", "samples.parquet", "kept.parquet")
    for name in (*names, "cells.json"):
        assert (folder / name).stat().st_size > 0
    assert {path.suffix for path in (folder / "figures").iterdir()} == {".png", ".svg", ".csv"}
    (command,) = (folder / "commands.txt").read_text().splitlines()
    assert command.startswith("python run.py model.path=")
    assert command.endswith(
        " method=exact,quest k=16,32 rbit=32 'task.subtasks=[niah_single,vt]'"
        " task.timed_prompts=1 -m"
    )
    assert f"- Command: {command}" in (folder / "report.md").read_text()
    assert swept.text("err") == ""


def test_every_prompt_is_prefilled_once_in_a_sweep(swept: Commands) -> None:
    prompts = (swept.folder / "forwards-1").read_text().splitlines()
    assert len(prompts) == 2  # one of each sub-task, for full attention and four cells
    assert len(set(prompts)) == 2


def left_over(folder: Path) -> dict[str, int]:
    """Return the names and sizes of our files in a folder for temporary ones."""
    files = [path for one in folder.glob("topkbench*") for path in (one, *one.rglob("*"))]
    return {path.name: path.stat().st_size for path in files if path.is_file()}


def test_only_the_empty_lock_of_the_device_is_left_in_the_temporary_folder(
    swept: Commands,
) -> None:
    assert left_over(swept.folder / "tmp") == {"cpu.lock": 0}


def test_the_same_command_again_runs_no_cell(swept: Commands) -> None:
    before = {path: path.stat().st_mtime_ns for path in swept.results.glob("cells/*/*.json")}
    expected = result(swept.cells)
    again = Commands(swept.server, swept.folder, swept.model)
    again.number = 50
    assert again.run(*SWEEP) == 0
    assert again.forwards == []
    assert {
        path: path.stat().st_mtime_ns for path in swept.results.glob("cells/*/*.json")
    } == before
    assert len(again.rows) == 15
    assert result(again.cells) == expected
    # One more budget is one more cell.
    assert again.run("method=exact", "k=24", TWO, SWEEP[4]) == 0
    assert len(again.cells) == 6
    assert set(expected) < set(again.cells)


def test_a_sweep_over_dtypes_prefills_each_prompt_once_for_each(commands: Commands) -> None:
    """Hydra lets the axes of the command line vary fastest, so the models alternate."""
    given = ("method=streaming_llm", "k=16,32,64", "rbit=32", "dtype=float32,bfloat16", "-m")
    assert commands.run(*given) == 0, commands.text("err")
    assert len(commands.forwards) == 2
    rows = commands.rows[commands.rows["subtask"] == "mean"]
    assert len(rows) == 2 * (1 + 3)
    full = rows[rows["method"] == "full"].set_index("p_dtype")["run_id"]
    sparse = rows[rows["method"] == "streaming_llm"]
    assert (sparse["full_run_id"] == sparse["p_dtype"].map(full)).all()


def test_rows_of_files_say_where_their_prompts_come_from(commands: Commands) -> None:
    context = "One of the secret words is blue. " * 20
    line = {"input": context + "\nWhich secret word is it?", "outputs": ["blue"]}
    bad = {**line, "outputs": [""]}
    path = commands.folder / "vt.jsonl"
    path.write_text("".join(f"{json.dumps(one)}\n" for one in (line, bad, line, line)))
    of_file = (
        "task=ruler",
        f"task.source={path}",
        "task.length=null",
        "task.subtasks=[vt]",
        "num_samples=2",
    )
    assert commands.run("method=exact", "k=16", *of_file) == 2
    one_sentence(commands, f"line 2 of {path}", "a reference in outputs must be a text", 'got "".')
    assert commands.forwards == []
    assert commands.run("method=exact", "k=16", *of_file, "task.skip_bad=true") == 0
    rows = commands.rows[commands.rows["status"] == "ok"]
    assert len(rows) == 2 * 2  # of full attention and the method, with their means
    assert rows["length"].isna().all()
    (prompts,) = rows["prompts"].unique()
    assert re.fullmatch(r"RULER [0-9a-f]{8} \(raw\)", prompts)
    assert set(rows["num_samples"]) == {2}
    assert set(rows["source_samples"]) == {3}
    said = f"ruler, prompts of {prompts}: task.skip_bad left out 1 bad line of the files"
    (report,) = commands.folder.rglob("report.md")
    assert said in commands.text("out")
    assert said in report.read_text()
    assert rows.groupby("subtask")["skipped_samples"].max().fillna(-1).to_dict() == {
        "mean": 1,
        "vt": -1,
    }


def test_axes_that_a_method_ignores_make_no_cells(commands: Commands) -> None:
    assert commands.run("method=streaming_llm,full", "k=16", "rbit=32,64", "-m") == 0
    assert (
        len(commands.rows) == 2 * 2
    )  # each once, with a row for its sub-task and one for the mean


def test_the_question_makes_another_cell_and_another_prefill(commands: Commands) -> None:
    arguments = ("method=full", "question=sparse,dense", "k=16", "rbit=32", "-m")
    assert commands.run(*arguments) == 0, commands.text("err")
    assert len(commands.cells) == 2
    assert len(set(commands.forwards)) == len(commands.forwards) == 2


def test_a_failing_cell_leaves_a_row_and_the_others_go_on(commands: Commands) -> None:
    # The default axis of rbit, which this method has not, leads to each cell four times.
    status = commands.run("method=exact", "k=16", "protocol.dense_layers=null,[99],1", "-m")
    assert status != 0
    rows = commands.rows
    means = rows[(rows["subtask"] == "mean") & (rows["method"] == "exact")]
    assert sorted(means["status"]) == ["failed", "ok", "ok"]
    (failed,) = means[means["status"] == "failed"].to_dict("records")
    assert failed["reason"] == "protocol.dense_layers must lie between 0 and 3, got 99."
    assert pd.isna(failed["decode_ms_p50"])
    one_sentence(commands, "dense_layers must lie between 0 and 3, got 99")
    # A failed cell is tried again, the finished ones are not.
    again = ("method=exact", "k=16", "rbit=32", "protocol.dense_layers=[99],1", "-m")
    assert commands.run(*again) != 0
    assert sorted(commands.rows["status"].unique()) == ["failed", "ok"]
    log = next(commands.results.glob(f"cells/{failed['run_id']}/log.txt"))
    assert "Traceback" in log.read_text()
    begun = json.loads((log.parent / "begun.json").read_text())
    assert begun["attempt"] == 2


def test_untrained_hashing_runs_over_its_bits(commands: Commands) -> None:
    arguments = ("method=hata", "method.weights=random", "k=32", "rbit=32,64", "-m")
    assert commands.run(*arguments) == 0, commands.text("err")
    rows = commands.rows
    hata = rows[(rows["method"] == "hata") & (rows["subtask"] == "mean")]
    assert sorted(hata["rbit"]) == [32, 64]
    assert set(hata["p_weights"]) == {"random"}
    assert len(commands.cells) == 3


def test_the_selection_task_runs(commands: Commands) -> None:
    status = commands.run(
        *("task=selection", "task.length=256", "task.subtasks=[niah_single]"),
        *("task.num_samples=1", "task.budgets=[16,64,1000]", "method=exact"),
    )
    assert status == 0, commands.text("err")
    (rows,) = commands.cells.values()  # of one cell, and full attention has none
    assert [(row["k"], row["status"]) for row in rows] == [
        *((16, "ok"), (64, "ok"), (1000, "skipped")),
    ]
    assert rows[0]["recall_at_k"] > 0.2  # sinks and recents take 12 of the 16
    assert rows[0]["recall_at_k"] < rows[1]["recall_at_k"] <= 1


def test_the_decode_latency_task_runs(commands: Commands) -> None:
    status = commands.run(
        *("task=decode_latency", "task.lengths=[128,256]", "task.num_heads=4", "task.trials=2"),
        *("task.num_kv_heads=2", "task.head_dim=32", "method=exact"),
    )
    assert status == 0, commands.text("err")
    rows = commands.rows.sort_values("kv_len")
    assert list(rows["kv_len"]) == [128, 256]
    assert set(rows["model"]) == {"4/2 heads of 32"}  # planted states are of no model
    assert set(rows["status"]) == {"ok"}


def test_the_decode_throughput_task_fits_and_prefills_nothing(commands: Commands) -> None:
    status = commands.run(
        *("task=decode_throughput", "task.lengths=[128,256,20000]", "task.trials=2"),
        *("method=loki", "task.budget=null", "k=32"),
    )
    assert status == 0, commands.text("err")
    rows = commands.rows.sort_values("kv_len")
    assert list(rows["status"]) == ["ok", "ok", "skipped"]
    assert set(rows["model"]) == {"tiny"}
    tokens = rows["tokens_per_s"][:2] * rows["decode_ms_p50"][:2]
    assert tokens.tolist() == pytest.approx([1000, 1000])
    assert commands.forwards == []


@pytest.mark.slow
def test_a_fit_is_kept_found_and_made_anew(commands: Commands) -> None:
    quick = ("method.epochs=1", "method.steps_per_epoch=3", *FEW_TEXTS, "task=fit")
    quick = (*quick, "method=hata", "rbit=32")
    commands.figures = True
    assert commands.run(*quick) == 0, commands.text("err")
    rows = commands.rows.set_index("subtask")
    assert list(rows.index) == [*(f"layer {layer}" for layer in range(4)), "mean"]
    assert rows["loss_last"].notna().all()
    assert rows.loc["mean", "fit_s"] > 0
    assert rows["artifact_digest"].nunique() == 1
    path = Path(rows.loc["mean", "artifact_path"])
    assert path.parent == commands.folder / "cache" / "artifacts"
    assert (commands.report.parent / "figures" / "fit_loss.png").exists()
    written = path.stat().st_mtime_ns
    # Another budget is the same fit; and a task that uses the method finds the artifact.
    assert commands.run(*quick, "k=16,32", "-m") == 0, commands.text("err")
    assert len(commands.cells) == 1
    said = "tiny fit method=hata rbit=32 protocol=unified: found, and not fitted again"
    assert commands.text("out").count(said) == 1
    assert commands.run(*quick[:4], "method=hata", "rbit=32", "k=16") == 0, commands.text("err")
    assert path.stat().st_mtime_ns == written
    assert commands.run(*quick, "k=16,32", "force=true", "-m") == 0, commands.text("err")
    assert path.stat().st_mtime_ns > written
    assert set(commands.rows["artifact_digest"]) == set(rows["artifact_digest"])


def one_sentence(commands: Commands, *words: str) -> None:
    err = commands.text("err")
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert "Traceback" not in err + commands.text("out")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["k=0"], ["k must be at least 1, got 0."]),
        (["k=-5"], ["k must be at least 1, got -5."]),
        (["k=0,-5", "rbit=32", "-m"], None),
        (["rbit=100"], ["rbit must be a positive multiple of 32, got 100."]),
        (["rbit=abc"], ["rbit must be a whole number, got 'abc'."]),
        (["num_samples=two"], ["num_samples must be a whole number, got 'two'."]),
        (
            ["method=quest", "method.page_size=16.5"],
            ["page_size must be a whole number, got 16.5."],
        ),
        (["tracker=wandb", "tracker.mode=foo"], ["tracker.mode must be one of auto", "got 'foo'."]),
        (
            ["full_backend=cuda"],
            ["backend must be one of auto, sdpa, cpu, triton, flash_attn, flash_attn_3, flashin"],
        ),
        (["method=hatta"], ["method must be one of", "did you mean hata"]),
        # Nothing runs though the first job is right.
        (["method=exact,hatta", "k=16", "rbit=32", "-m"], ["method must be one of", "mean hata"]),
        (["experiment=hatta"], ["experiment must be one of", "tiny_accuracy"]),
        (
            ["impl=gpu"],
            ["impl must be one of auto, reference, cpu, triton or a mapping, got 'gpu'"],
        ),
        (["impl=triton"], ["triton"]),
        (["question=open"], ["question must be one of sparse, dense, got 'open'."]),
        (["task.judged_prompts=-1"], ["task.judged_prompts must be at least 0, got -1."]),
        (["task.lenght=5"], ["there is no setting task.lenght; did you mean task.length."]),
        (["num_sample=5"], ["there is no setting num_sample; did you mean num_samples."]),
        (
            ["method=quest", "method.mode=compact"],
            [
                "there is no setting method.mode here; "
                "method=h2o or snapkv or streaming_llm has it.",
            ],
        ),
        (["method=twilight", "method.base=loki"], ["name one by method@method.base=quest"]),
        (["method.rbits=5"], ["method.rbits"]),
        (["model.path=/no/such/model"], ["found no folder /no/such/model"]),
        (["model.path=nobody/no-such-model"], ["nobody/no-such-model", "reachable"]),
        (["task.length=16385"], ["must be at most the window of 16384 tokens", "got 16385;"]),
        (["task.length=30"], ["use a larger task.length."]),
        (
            ["task=ruler", "task.source=/no/such/file", "task.length=null"],
            ["task.source must be", "/no/such/file"],
        ),
        (
            ["task=ruler", "task.source=/no/such/file", "task.length=256"],
            ["task.length must be null with task.source", "got 256"],
        ),
        (["task.source=/no/such/file"], ["there is no setting task.source", "ruler has it."]),
        (["task=ruler", "task.skip_bad=true"], ["task.skip_bad is a setting of task.source"]),
        (
            ["model=local", "model.name=mine", "model.chat=true"],
            ["model.chat=true needs a chat template", "use model.chat=false."],
        ),
        (
            ["model=local", "model.name=mine", "model.chat_template_kwargs={mood: good}"],
            ["model.chat_template_kwargs needs prompts in the chat template", "got mood"],
        ),
        (
            ["model=local", "model.name=mine", "model.chat_template_kwargs=good"],
            ["model.chat_template_kwargs must be a mapping or null", "got 'good'."],
        ),
        (["device=cuda:99"], ["cuda:99"]),
        (
            ["method=quest", "task=fit"],
            ["task=fit needs a method that learns, but quest with these settings learns nothing"],
        ),
        (
            ["method=loki", "task=fit", "calibration.seed=7", "calibration_memory_gib=0.0001"],
            ["a layer must fit calibration_memory_gib, got", "for 0.0001 GiB; raise it"],
        ),
        (
            [
                "model=random_1b",
                "model.path=random",
                *(f"model.architecture.{one}" for one in SMALL),
            ],
            ["random_1b has random weights and no tokenizer; use task=decode_throughput"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(
    commands: Commands, given: list[str], words: list[str] | None
) -> None:
    if given[0].startswith("rbit"):
        given = ["method.weights=random", *given]  # of hashing, and trained ones come before it
    elif not given[0].startswith("method"):
        given = ["method=exact", *given]
    status = commands.run(*given)
    assert status not in (0, None)
    if words is not None:
        one_sentence(commands, *words)
    else:  # a sweep says each once
        lines = commands.text("err").strip().splitlines()
        assert lines == [f"error: k must be at least 1, got {k}." for k in (0, -5)]
    assert commands.forwards == []


def test_a_corrupt_model_is_one_sentence(commands: Commands, tmp_path: Path) -> None:
    path = Path(shutil.copytree(commands.model, tmp_path / "corrupt"))
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert commands.run("method=exact", f"model.path={path}") != 0
    one_sentence(commands, f"the model {path} must be a reachable, whole safetensors model")


def test_a_results_folder_that_cannot_be_written_is_one_sentence(
    commands: Commands, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    for given in (["k=16"], ["k=16,32", "-m"]):
        assert commands.run("method=exact", f"results_dir={tmp_path}/file/results", *given) != 0
        one_sentence(commands, f"{tmp_path}/file")


def test_a_sweep_killed_again_and_again_ends_the_same(
    swept: Commands, undisturbed: dict[str, list[tuple[Any, ...]]], tmp_path: Path
) -> None:
    commands = Commands(swept.server, tmp_path, swept.model)
    moments = random.Random(7)
    finished: dict[Path, int] = {}
    kills = 0
    for most in (0.5, 1.5, 3.0, 3.0, 5.0, 5.0):
        commands.start(*SWEEP)
        time.sleep(moments.uniform(0.1, most))
        os.kill(commands.process, signal.SIGKILL)
        kills += commands.wait() == -signal.SIGKILL
        for path, written in finished.items():
            assert path.stat().st_mtime_ns == written  # what was finished is not run again
        finished = {
            path: path.stat().st_mtime_ns for path in commands.results.glob("cells/*/rows.json")
        }
    assert kills >= 2
    assert commands.run(*SWEEP) == 0, commands.text("err")
    assert len(undisturbed) == 5
    assert result(commands.cells) == undisturbed
    rows = commands.rows
    assert len(rows) == 15
    assert set(rows["status"]) == {"ok"}
    assert not rows.duplicated(["run_id", "subtask"]).any()
    for path, written in finished.items():
        assert path.stat().st_mtime_ns == written
    # What the killed ones had spilled is gone too.
    assert left_over(commands.folder / "tmp") == {"cpu.lock": 0}


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """A folder with a task of lm-eval's of the same name, and its documents."""
    pytest.importorskip("lm_eval")
    asked = tmp_path / "asked"
    asked.mkdir()
    lines = [
        {"context": "the red house is here " * 9, "question": f"which {word} ?", "answer": word}
        for word in ("red", "house", "river", "stone")
    ]
    data = asked / "documents.jsonl"
    data.write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    (asked / "asked.yaml").write_text(
        f"""task: asked
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}\\n{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
    return asked


def test_lm_evals_tasks_are_told_what_to_make_and_read_revisions(
    commands: Commands, asked: Path
) -> None:
    (asked / "making.py").write_text(
        "import datasets\n\n"
        "def made(max_seq_lengths, **given):\n"
        "    (length,) = max_seq_lengths\n"
        "    fields = {'context': 'house ' * length, 'question': 'which ?', 'answer': 'house'}\n"
        "    return {'test': datasets.Dataset.from_list([fields])}\n"
    )
    of_file = (asked / "asked.yaml").read_text().replace("task: asked", "task: made")
    (asked / "made.yaml").write_text(f"{of_file}custom_dataset: !function making.made\n")
    given = ("task=lm_eval", "task.names=[asked,made]", f"task.include_path={asked}")
    given += ("method=full", "question=dense", "task.timed_prompts=0", "task.judged_prompts=0")
    given += ("task.metadata={max_seq_lengths: [40]}", "num_samples=1")
    # The file's reader is a data set like those of the hub, whose revision is of no effect.
    assert commands.run(*given, "task.revisions={json: 0123abc}") == 0, commands.text("err")
    assert set(commands.rows["subtask"]) == {"asked", "made", "mean"}
    assert commands.run(*given, "task.revisions={openai/gsm8k: 0123abc}") == 2
    one_sentence(
        commands,
        "task.revisions must name data sets that the tasks read (json), got 'openai/gsm8k'.",
    )


def test_lm_evals_tasks_go_on_where_they_were_killed(
    commands: Commands, tmp_path: Path, server: Any, asked: Path
) -> None:
    given = ("task=lm_eval", "task.names=asked", f"task.include_path={asked}", "task.batch_size=1")
    given += ("method=exact,quest", "k=16", "rbit=32", "task.timed_prompts=0", "-m")
    commands.start(*given)
    while len(commands.forwards) < 2:  # all of the first prompt is then on disk
        time.sleep(0.01)
        assert Path(f"/proc/{commands.process}").exists(), commands.text("err")
    os.kill(commands.process, signal.SIGKILL)
    assert commands.wait() == -signal.SIGKILL
    assert len(commands.forwards) < 4
    assert commands.run(*given) == 0, commands.text("err")
    assert len(commands.forwards) < 4
    other = Commands(server, tmp_path / "other", commands.model)
    assert other.run(*given) == 0, other.text("err")
    assert len(other.forwards) == 4
    assert result(commands.cells) == result(other.cells)
    assert set(commands.rows["status"]) == {"ok"}
    assert commands.rows["generated_tokens"].notna().all()


def test_a_run_that_a_kill_kept_from_the_tracker_is_told_later(
    server: Any, tmp_path: Path, model: Path
) -> None:
    commands = Commands(server, tmp_path, model)
    given = ("method=full", "tracker=wandb", "tracker.mode=offline")
    commands.mode = "offline"

    def told() -> list[str]:
        return [path.name for path in commands.results.glob("sweep/*/wandb/offline-run-*")]

    assert commands.run(*given) == 0, commands.text("err")
    (cell,) = commands.cells
    before = sum(cell in name for name in told())
    assert commands.run(*given) == 0
    assert sum(cell in name for name in told()) == before == 1
    (commands.results / "cells" / cell / "tracked").unlink()  # what a kill before it would leave
    assert commands.run(*given) == 0
    assert sum(cell in name for name in told()) == 2
    assert commands.forwards == []


# How the command ends ----------------------------------------------------------------------------

PAIR = ("method=streaming_llm", "k=16,32", "rbit=32", "-m")  # three cells with full attention


def finished(commands: Commands) -> dict[Path, int]:
    """Return the cells' rows and when they were written; every one must be ok."""
    assert {row["status"] for rows in commands.cells.values() for row in rows} == {"ok"}
    return {path: path.stat().st_mtime_ns for path in commands.results.glob("cells/*/rows.json")}


def test_a_closed_pipe_ends_the_command_and_no_cell_fails(commands: Commands) -> None:
    """As in ``topkbench ... | head -1``; 141 is what a shell reports for SIGPIPE."""
    pipe = commands.folder / "pipe"
    os.mkfifo(pipe)
    commands.start(*PAIR, out=pipe)
    with pipe.open() as reader:
        assert any(line.startswith("2 configurations; results in ") for line in reader)
        assert any(line.startswith("tiny ruler_words method=full") for line in reader)
    assert commands.wait() == 141
    assert commands.text("err") == ""
    before = finished(commands)
    assert len(before) >= 1
    assert commands.run(*PAIR) == 0, commands.text("err")
    after = finished(commands)
    assert len(after) == 3
    assert before.items() <= after.items()  # what was finished is not run again


def test_a_console_that_lacks_a_sign_gets_another(swept: Commands) -> None:
    again = Commands(swept.server, swept.folder, swept.model)
    again.number = 60
    again.extra = {"PYTHONIOENCODING": "ascii"}
    assert again.run("method=exact", "k=16", TWO, SWEEP[4]) == 0, again.text("err")
    assert again.forwards == []
    out = again.text("out")
    assert out.isascii()
    assert "Score (0-100)" in out
    assert "\nFull attention    -  " in out
    assert again.text("err") == ""


def test_an_output_that_cannot_be_written_is_said(commands: Commands) -> None:
    assert commands.run("method=full", out=Path("/dev/full")) == 1
    one_sentence(commands, "the output must be writable, but is not (No space left on device).")
    assert list(commands.results.glob("cells/*/rows.json")) == []  # seen before anything is run


def test_a_full_disk_is_said_and_what_was_computed_is_kept(commands: Commands) -> None:
    commands.before = """
import errno
def full(descriptor):
    if "samples.parquet" in os.readlink(f"/proc/self/fd/{descriptor}"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
os.fsync = full
"""
    assert commands.run(*PAIR) == 1
    one_sentence(
        commands,
        "the results folder must be writable, but",
        "is not (No space left on device); choose another with results_dir=PATH.",
    )
    assert commands.cells == {}
    assert len(commands.forwards) == 1  # the sweep ended at the first cell that could not be kept
    assert [path for path in commands.results.rglob("*") if path.suffix == ".part"] == []
    commands.before = ""
    assert commands.run(*PAIR) == 0, commands.text("err")
    assert len(finished(commands)) == 3
    full = commands.rows[commands.rows["method"] == "full"]
    assert set(full["reused"]) == {"answers"}


def test_whatever_goes_wrong_with_a_report_keeps_the_rows(commands: Commands) -> None:
    commands.figures = True
    assert commands.run(*PAIR) == 0, commands.text("err")
    before = finished(commands)
    # It is killed.
    commands.before = """
import signal
import matplotlib.figure
matplotlib.figure.Figure.draw = lambda *given, **named: os.kill(os.getpid(), signal.SIGKILL)
"""
    assert commands.run(*PAIR) == -signal.SIGKILL
    assert commands.forwards == []
    # It cannot be drawn.
    commands.before = """
import matplotlib.figure
def fail(*given, **named):
    raise ValueError("no such font")
matplotlib.figure.Figure.draw = fail
"""
    assert commands.run(*PAIR) == 1
    one_sentence(commands, "the report could not be made (ValueError: no such font), but all rows")
    # Nothing but the report has to be made again.
    commands.before = ""
    assert commands.run(*PAIR) == 0, commands.text("err")
    assert commands.forwards == []
    assert len(commands.rows) == 6
    assert finished(commands) == before


def test_a_damaged_file_of_samples_makes_its_cell_run_again(commands: Commands) -> None:
    assert commands.run("method=full") == 0, commands.text("err")
    ((path, written),) = finished(commands).items()
    samples = path.parent / "samples.parquet"
    samples.write_bytes(samples.read_bytes()[:100])
    assert commands.run("method=full") == 0, commands.text("err")
    assert len(pd.read_parquet(samples)) == 1
    assert finished(commands)[path] > written
    assert means(commands, "full")["status"] == "ok"


def test_a_temporary_file_that_a_killed_command_left_is_removed(commands: Commands) -> None:
    commands.before = """
import signal
def kill(descriptor):
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = kill
"""
    assert commands.run("method=full") == -signal.SIGKILL
    commands.before = ""

    def left() -> list[Path]:
        return [path for path in commands.folder.rglob("*") if path.suffix == ".part"]

    assert len(left()) == 1
    assert commands.run("method=full") == 0, commands.text("err")
    assert left() == []


def test_cells_are_in_the_folder_of_results_whatever_the_sweeps_folder_is(
    commands: Commands,
) -> None:
    for given, folder in (
        (("experiment_name=a/b",), "results/a/b/*"),
        (("experiment_name=",), "results/2*"),
        (("hydra.job.chdir=true", "results_dir=../results"), "results/sweep/*"),
        (("-m", "hydra.sweep.dir=a/b/c", "hydra.sweep.subdir=d/e"), "cwd/a/b/c"),
    ):
        assert commands.run("method=full", "rbit=32", "k=16", *given) == 0, commands.text("err")
        assert len(commands.forwards) == (commands.number == 1)  # then the cell is found
        (report,) = commands.folder.glob(f"{folder}/report.html")
        assert commands.report.resolve() == report
        assert set(commands.rows["status"]) == {"ok"}
    assert len(finished(commands)) == 1
    assert len(list(commands.folder.rglob("cells"))) == 1
    assert len(list(commands.folder.rglob("parts"))) == 1


@pytest.mark.parametrize("multirun", [(), ("-m",)])
def test_a_folder_of_results_without_a_name_is_refused(
    commands: Commands, multirun: tuple[str, ...]
) -> None:
    assert commands.run("method=full", "results_dir=", *multirun) == 2
    one_sentence(commands, "results_dir must name a folder, got ''")
    assert list((commands.folder / "cwd").iterdir()) == []
    assert not (commands.folder / "cache").exists()


@pytest.mark.parametrize("given", ["results_dir=a,b", "experiment_name=x,y"])
def test_a_sweep_has_one_folder(commands: Commands, given: str) -> None:
    """Else its report would have no cell, and its status would hide those that failed."""
    assert commands.run("method=full", given, "-m") == 2
    name = given.split("=")[0]
    one_sentence(commands, f"{name} must be the same for all cells of a sweep, got {given}.")
    assert list((commands.folder / "cwd").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_sentence(commands: Commands) -> None:
    (commands.folder / "file").write_text("in the way")
    commands.extra = {"TOPKBENCH_CACHE": str(commands.folder / "file" / "cache")}
    assert commands.run(*PAIR) == 1
    one_sentence(
        commands,
        "the cache folder must be writable, but",
        "choose another with cache_dir=PATH or the environment variable TOPKBENCH_CACHE.",
    )


# What a finished cell depends on ---------------------------------------------------------------

ONE = ("method=exact", "k=16", "task.judged_prompts=1")
TIMED = (*ONE, "task.timed_prompts=1")


def means(commands: Commands, method: str = "exact") -> dict[str, Any]:
    """Return the mean's row of the last command."""
    rows = commands.rows
    (found,) = rows[(rows["subtask"] == "mean") & (rows["method"] == method)].to_dict("records")
    return {str(name): None if pd.isna(one) else one for name, one in found.items()}


@pytest.fixture
def own_model(commands: Commands, tmp_path: Path) -> Path:
    commands.model = Path(shutil.copytree(commands.model, tmp_path / "own-model"))
    return commands.model


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_model_that_changed_runs_again(commands: Commands, own_model: Path) -> None:
    """What ends an answer, the tokenizer, the template, a weight: each makes another cell."""
    digests, cells = [], 0

    def run_anew() -> None:
        nonlocal cells
        assert commands.run(*ONE) == 0, commands.text("err")
        cells += 2  # full attention and the method
        assert len(commands.cells) == cells
        row = means(commands)
        assert (row["status"], row["reused"]) == ("ok", None)
        digests.append((row["run_id"], row["model_digest"]))

    run_anew()
    edit(own_model / "generation_config.json", eos_token_id=[2, 1220])
    run_anew()
    (own_model / "chat_template.jinja").write_text("{{ messages }}")
    run_anew()
    edit(own_model / "tokenizer.json", normalizer={"type": "NFC"})
    run_anew()
    weights = bytearray((own_model / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (own_model / "model.safetensors").write_bytes(weights)
    run_anew()
    assert len(set(digests)) == len(digests) == 5
    assert commands.run(*ONE) == 0
    assert len(commands.cells) == cells
    assert commands.forwards == []


def test_parts_of_a_cell_are_found_and_the_others_computed(commands: Commands) -> None:
    assert commands.run(*TIMED) == 0, commands.text("err")
    first = means(commands)
    assert first["reused"] is None
    assert first["peak_memory_mib"] > 0
    quality = ("score", "recall_at_k", "attention_mass", "output_rel_error", "density")
    # More prompts are timed: only the speed is measured again.
    assert commands.run(*ONE, "task.timed_prompts=2") == 0, commands.text("err")
    second = means(commands)
    assert second["run_id"] != first["run_id"]
    assert second["reused"] == "answers, selections"
    assert second["peak_memory_mib"] is None  # of the parts that were found nobody knows it now
    assert [second[name] for name in quality] == [first[name] for name in quality]
    assert second["decode_ms_p50"] != first["decode_ms_p50"]
    # Without its folder a cell is made of its parts, and computes nothing.
    shutil.rmtree(commands.results / "cells")
    assert commands.run(*TIMED) == 0, commands.text("err")
    third = means(commands)
    assert commands.forwards == []
    assert third["reused"] == "answers, speed, selections"
    assert [third[name] for name in (*quality, "decode_ms_p50")] == [
        first[name] for name in (*quality, "decode_ms_p50")
    ]
    assert means(commands, "full")["reused"] == "answers, speed"
    # A part that was edited is computed again, and force=true computes all.
    (answers,) = (
        path
        for path in (commands.results / "parts").glob("answers-*.json")
        if '"taken": 0,' not in path.read_text()
    )
    answers.write_text(answers.read_text().replace("niah_single", "niah_simple"))
    shutil.rmtree(commands.results / "cells")
    assert commands.run(*TIMED) == 0, commands.text("err")
    assert means(commands)["reused"] == "speed, selections"
    assert commands.run(*TIMED, "force=true") == 0, commands.text("err")
    assert means(commands)["reused"] is None
    assert len(commands.forwards) == 1


def test_an_edited_cell_runs_again(commands: Commands) -> None:
    assert commands.run(*ONE) == 0, commands.text("err")
    first = means(commands)
    path = commands.results / "cells" / first["run_id"] / "rows.json"
    text = path.read_text()
    assert f'"score": {first["score"]}' in text
    path.write_text(text.replace(f'"score": {first["score"]}', '"score": 12.5'))
    assert commands.run(*ONE) == 0, commands.text("err")
    assert means(commands)["score"] == first["score"]
    assert "12.5" not in path.read_text()


# Beside Hugging Face's package of the name `kernels` ------------------------------------------

FAKE_KERNELS = """
import enum

class Mode(enum.Flag):
    INFERENCE = 1
    TRAINING = 2
    TORCH_COMPILE = 4

class _Fake:
    def __init__(self, *args, **kwargs):
        pass

CUDAProperties = ROCMProperties = Device = KernelizeFallback = _Fake
LayerRepository = LocalLayerRepository = FuncRepository = LocalFuncRepository = _Fake

def use_kernel_forward_from_hub(name):
    return lambda cls: cls

def use_kernelized_func(*names):
    return lambda cls: cls

def _nothing(*args, **kwargs):
    return None

register_kernel_mapping = replace_kernel_forward_from_hub = use_kernel_mapping = _nothing
get_kernel = kernelize = _nothing
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages with a `kernels` of a version that transformers accepts."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(FAKE_KERNELS)
    about = site / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
    )
    (about / "top_level.txt").write_text("kernels\n")
    (about / "RECORD").write_text(f"kernels/__init__.py,,\n{about.name}/METADATA,,\n")
    return site


def test_the_command_runs_beside_hugging_faces_kernels(
    commands: Commands, site: Path, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        **commands.environment,
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT / ".types")]),
        "HF_HUB_OFFLINE": "1",
    }
    arguments = commands.arguments("method=exact", "k=16")
    # From the checkout, whose own folder `kernels` is the first that Python finds.
    code = f"""
import runpy, sys
import transformers, transformers.modeling_utils, kernels
from transformers.integrations import hub_kernels
from transformers.models.llama import modeling_llama
from transformers.utils import is_kernels_available
import topkbench.kernels.topk_select.api as ours
assert is_kernels_available(), "the test must simulate an accepted version"
assert hub_kernels.CUDAProperties is kernels.CUDAProperties
print(kernels.__file__)
print(ours.__file__, flush=True)
sys.argv = ["run.py", *{arguments!r}]
runpy.run_path("run.py", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    theirs, ours, *_, report = done.stdout.split()
    assert Path(theirs) == site / "kernels" / "__init__.py"
    assert Path(ours).resolve() == ROOT / "kernels" / "topk_select" / "api.py"
    rows = pd.read_parquet(Path(report).parent / "rows.parquet")
    assert set(rows["method"]) == {"full", "exact"}
    assert set(rows["status"]) == {"ok"}


# The command -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "ordered"),
    [
        ("method=hata -m task.length=1024", "method=hata task.length=1024 -m"),
        ("-m --config-dir own method=mine k=3", "method=mine k=3 -m --config-dir own"),
        ("k=3 -cd own method=mine --cfg job", "k=3 method=mine -cd own --cfg job"),
        ("method=hata k=1", "method=hata k=1"),
        ("--multirun", "--multirun"),
        ("k=3 --cfg", "k=3 --cfg"),
    ],
)
def test_settings_come_before_options(given: str, ordered: str) -> None:
    assert settings_first(given.split()) == ordered.split()


def test_options_may_stand_between_settings(commands: Commands) -> None:
    assert commands.run("method=exact", "-m", "k=16,32", "rbit=32") == 0
    out = commands.text("out")
    assert "method=exact k=16" in out
    assert "method=exact k=32" in out


def test_help_is_the_projects_own(commands: Commands) -> None:
    assert commands.run("method=exact", "--help") == 0
    out = commands.text("out")
    assert out.startswith("topkbench measures top-k attention methods for LLM decoding")
    for example in ("topkbench method=hata k=512 -m", "question=dense -m", "experiment=league"):
        assert example in out
    for group in ("calibration", "experiment", "method", "model", "protocol", "task", "tracker"):
        assert f"\n{group}: " in out
    assert 'eval "$(topkbench -sc install=bash)"' in out
    assert "hydra.cc" not in out


def test_help_needs_neither_torch_nor_transformers() -> None:
    """Else each press of the tab key would wait for them."""
    code = """
import sys
sys.argv = ["topkbench", "--help"]
from topkbench.harness.main import main
try:
    main()
except SystemExit:  # Hydra's way to end a help text
    print({"torch", "transformers", "numba"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / ".types")},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_the_version_is_printed(commands: Commands) -> None:
    assert commands.run("--version") == 0
    assert commands.text("out").startswith("topkbench ")


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("mehtod=hata", "method"),
        ("exprimnt=league", "experiment"),
        ("calibraton=text", "calibration"),
    ],
)
def test_a_misspelt_group_gets_a_hint(commands: Commands, given: str, hint: str) -> None:
    assert commands.run(given) == 2
    one_sentence(commands, f"there is no setting {given.split('=')[0]}; did you mean {hint}.")


def test_the_job_is_found_by_name_in_another_process() -> None:
    """Launchers that run cells elsewhere pickle it, and must not pickle what it refers to."""
    pickled = pickle.dumps(job)
    assert len(pickled) < 100
    code = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).__module__)"
    done = subprocess.run(
        [sys.executable, "-c", code, pickled.hex()],
        env={**os.environ, "PYTHONPATH": str(ROOT / ".types")},
        capture_output=True,
        text=True,
    )
    assert (done.stdout.strip(), done.returncode) == ("topkbench.harness.main", 0), done.stderr


# A plan ------------------------------------------------------------------------------------------


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_plan_says_what_a_sweep_will_do_and_writes_nothing(commands: Commands) -> None:
    assert commands.run("plan", *SWEEP) == 2  # after settings it is none
    assert "a setting must be NAME=VALUE, got 'plan'" in commands.text("err")
    assert commands.plan(*SWEEP) == 0, commands.text("err")
    text = " ".join(commands.text("out").split())
    assert "tiny: 5 cells, 0 found, 0 without results" in text
    assert "cells 1 full, 2 exact, 2 quest" in text
    assert "prefills 2 of" in text
    assert "batches 2 of at most 1 prompts" in text
    for part in ("prefill", "answers", "selections", "speed", "all"):
        assert re.search(rf"{part} +[0-9.]+ +[0-9.]+", commands.text("out")), part
    assert len(commands.forwards) <= 2
    assert not commands.results.exists()


def test_a_plan_leaves_out_what_is_found(swept: Commands) -> None:
    before = files_in(swept.results)
    assert swept.plan(*SWEEP) == 0, swept.text("err")
    assert "tiny: 5 cells, 5 found, 0 without results" in swept.text("out")
    assert swept.plan(*SWEEP[:1], "k=16,64", *SWEEP[2:]) == 0, swept.text("err")
    assert "tiny: 5 cells, 3 found, 0 without results" in swept.text("out")
    assert "2 of" in swept.text("out")
    assert files_in(swept.results) == before


def test_a_plan_says_why_cells_have_no_results(commands: Commands) -> None:
    assert commands.plan("method=exact", "k=8,16,1000", "rbit=32", "-m") == 0, commands.text("err")
    text = commands.text("out")
    assert "tiny: 3 cells, 0 found, 1 without results" in text
    assert "  ruler_words method=exact k=1000" in text
    assert "no step had more than k=1000" in text
    assert "- a configuration will fail: protocol.num_sink + num_recent must be at most k=8" in text
    assert commands.plan("method=exact", "k=8") == 2
    assert commands.text("err").startswith("error: protocol.num_sink + num_recent must be at most")


def test_a_plan_fits_nothing(commands: Commands) -> None:
    assert commands.plan("method=hata", "k=16", "seed=7", *FEW_TEXTS) == 0, commands.text("err")
    fitted = r"hata is fitted first \(hata-\w+\.safetensors\): [0-9.,]+ processor seconds"
    assert re.search(fitted, commands.text("out"))
    assert list(commands.folder.rglob("hata-*")) == []


def test_a_plan_of_a_measurement_measures_its_smallest_rows(commands: Commands) -> None:
    lengths = "task.lengths=[128,256,512,1024]"
    given = ("task=decode_latency", "method=quest", lengths, "task.trials=2")
    assert commands.plan(*given) == 0, commands.text("err")
    text = commands.text("out")
    assert "decode_latency method=quest" in text
    assert re.search(r"all +[0-9.]+ +[0-9.]+", text)
    assert not commands.results.exists()


def test_a_plan_for_a_card_reads_no_weights(commands: Commands, tmp_path: Path) -> None:
    folder = tmp_path / "outline"
    shutil.copytree(commands.model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    given = ("card=h100_sxm", "device=cuda", f"model.path={folder}", *SWEEP)
    assert commands.plan(*given) == 0, commands.text("err")
    text = commands.text("out")
    assert "on H100 SXM: what it takes at least, by its published figures" in text
    assert "tiny: 5 cells, found ones unknown without the weights" in text
    assert "At least (s)" in text
    assert commands.forwards == []
    assert commands.plan("card=h100_sxm", "task=decode_latency", "method=exact") == 0
    assert "what task=decode_latency takes is not known for a card" in commands.text("out")


def test_a_card_without_a_plan_is_refused(commands: Commands) -> None:
    assert commands.run("card=l4", *SWEEP) == 2
    assert commands.text("err").startswith("error: card has an effect on topkbench plan alone;")
    assert not commands.results.exists()


NEGATED = """
from topkbench.methods.quest import Quest
score = Quest.score
Quest.score = lambda *given: -score(*given)
"""


def test_compare_finds_quest_with_negated_scores_and_nothing_without(commands: Commands) -> None:
    folders = []
    for place, before in enumerate(("", NEGATED)):
        commands.before, commands.results = before, commands.folder / f"results-{place}"
        given = ("method=quest", "k=64", "num_samples=10")
        assert commands.run(*given) == 0, commands.text("err")
        folders.append(commands.report.parent)
    commands.before = ""
    same, negated = folders
    assert commands.compare(same, same) == 0, commands.text("out")
    assert commands.text("out").splitlines()[-1].startswith("Nothing is worse")
    assert commands.compare(same, negated) == 1, commands.text("out")
    verdicts = {
        (words[0], words[-1].strip())
        for line in commands.text("out").splitlines()
        if len(words := line.partition("worse: ")) and words[1]
    }
    assert {name.split()[0] for name, _ in verdicts} == {"Quest"}
    assert {worse for _, worse in verdicts} == {"Score", "Score, Recall@k"}
    assert commands.compare(negated, same) == 0
    assert commands.compare(same, commands.folder) == 2
