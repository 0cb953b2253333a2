"""Copy results to Weights & Biases; the results folder remains the original.

There is one run per cell, grouped by sweep, written with the cell's rows. The sweep has its own
run, live from its start: the console, how many samples are done, each cell's score so far, and at
the end curves and figures.
``python -m topkbench.analysis.tracking dashboard`` builds the project's workspace.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import re
import shlex
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args, get_origin

import pandas as pd

from topkbench.analysis.comparison.metrics import CURVES, METRICS
from topkbench.analysis.comparison.stats import MEAN
from topkbench.analysis.console import console, say, say_error
from topkbench.analysis.figures.search import outcome, values
from topkbench.analysis.figures.training import loss_points
from topkbench.analysis.record.row import MIB, Row
from topkbench.analysis.record.store import Sweep, frame, one_row_a_cell
from topkbench.analysis.tracking.wandb_payload import (
    SHOWN,
    Names,
    cell_config,
    curves,
    shown_of,
    summary,
    table_value,
    tag,
)

_MOST_LINES = 10_000  # of a table


class Tracker(Protocol):
    """A destination that a sweep is copied to. No call raises an exception."""

    def begin_sweep(
        self,
        folder: str | Path,
        sweep: str,
        command: str = "",
        settings: Sequence[Mapping[str, Any]] = (),
        given: Collection[str] = (),
    ) -> None:
        """Begin to copy a sweep.

        Args:
            folder: The sweep's folder.
            sweep: Name of the sweep.
            command: The command line that runs it.
            settings: Of each of its configurations, the settings by name.
            given: Names of the settings that the command gives.
        """

    def log_progress(self, done: int, total: int, cells: Sequence[Mapping[str, Any]]) -> None:
        """Copy how far the sweep is.

        Args:
            done: Samples measured.
            total: Samples to measure.
            cells: For each cell: its name, its samples done, and its score so far.
        """

    def log_cell(
        self,
        folder: str | Path,
        sweep: str,
        rows: Sequence[Row],
        samples: pd.DataFrame | Sequence[Mapping[str, Any]],
        config: Mapping[str, Any],
        attempt: int = 1,
        artifact: Path | None = None,
    ) -> bool:
        """Copy a finished cell; return whether it was copied.

        Args:
            folder: The sweep's folder.
            sweep: Name of the sweep, the same for all its cells.
            rows: The cell's rows.
            samples: The cell's samples.
            config: The resolved configuration.
            attempt: Number of the attempt, from 1; part of the run's id.
            artifact: The file of what the cell's method has learned, if it learns anything.
        """

    def log_sweep(
        self, folder: str | Path, sweep: str, rows: pd.DataFrame, samples: pd.DataFrame
    ) -> None:
        """Copy the sweep's rows and curves, and its report with its figures.

        Args:
            folder: The sweep's folder, with its report.
            sweep: Name of the sweep.
            rows: The sweep's rows.
            samples: The sweep's samples.
        """

    def where(self, folder: str | Path, rows: pd.DataFrame) -> str:
        """Say where the runs of a sweep are, and with which commands they are seen.

        Args:
            folder: The sweep's folder.
            rows: The sweep's rows.

        Returns:
            Lines to print; empty if there are no runs.
        """


class NoTracker:
    """A tracker that copies nothing."""

    def begin_sweep(self, *arguments: Any, **keywords: Any) -> None:
        """Do nothing."""

    def log_progress(self, *arguments: Any) -> None:
        """Do nothing."""

    def log_cell(self, *arguments: Any, **keywords: Any) -> bool:
        """Do nothing."""
        return False

    def log_sweep(self, *arguments: Any, **keywords: Any) -> None:
        """Do nothing."""

    def where(self, *arguments: Any) -> str:
        """Return nothing."""
        return ""


def check_setting(name: str, value: Any, setting: str, *also: str) -> None:
    """Let W&B check a value of one of its settings.

    Args:
        name: Name of W&B's setting.
        value: The value.
        setting: What a user knows it as, for the message.
        also: Words that are accepted besides.

    Raises:
        ValueError: If W&B does not accept the value.
    """
    import wandb

    if value in also:
        return
    try:
        wandb.Settings(**{name: value})
    except (ValueError, wandb.errors.UsageError) as error:
        kind = wandb.Settings.model_fields[name].annotation
        if get_origin(kind) is Literal:
            rule = f"must be one of {', '.join((*also, *get_args(kind)))}, got {value!r}."
        else:
            found: Any = error
            reason = found.errors()[0]["msg"] if isinstance(error, ValueError) else error
            rule = f"must be a name that W&B accepts, got {value!r}: {reason}."
        raise ValueError(f"{setting} {rule}") from None


class Session:
    """How the runs of this process reach W&B, which is asked once: an answer may take seconds.

    W&B says which mode its own settings ask for, whether there is an account, and whether its host
    answers. If it does not, or fails later, the process goes on with offline runs.

    Args:
        mode: The setting ``tracker.mode``; WANDB_MODE overrides it.

    Attributes:
        mode: W&B's mode of the next run; None if even offline runs have failed.
    """

    def __init__(self, mode: str) -> None:
        self.mode: str | None = None
        try:
            self.mode = self._ask(mode)
        except Exception as error:  # in W&B's settings files
            self.fall_back(error)

    def _ask(self, mode: str) -> str:
        import wandb

        given: Any = {} if mode == "auto" or "WANDB_MODE" in os.environ else {"mode": mode}
        # If silent, W&B does not ask for a key at the terminal.
        settings = wandb.setup(wandb.Settings(silent=True, quiet=True, **given)).settings
        self.mode = settings.mode
        if self.mode == "disabled" or settings.run_mode == "offline-run":
            return self.mode
        try:
            wandb.login()
        except wandb.errors.UsageError as error:  # there is no account
            if "mode" not in settings.model_fields_set:  # nobody asked for one
                return "offline"
            self.fall_back(error)
        except Exception as error:
            self.fall_back(error)
        return self.mode

    def fall_back(self, error: Exception) -> None:
        """Go on offline, or not at all if that has failed, and warn."""
        reason = " ".join(str(error).split())
        if self.mode in ("offline", None):
            self.mode = None
            said = f"W&B tracking stopped, the results folder has everything: {reason}"
        else:
            self.mode = "offline"
            said = f"W&B runs are offline from here on, `wandb sync` uploads them: {reason}"
        warnings.warn(said, stacklevel=2)

    def copy(self, write: Callable[[str], None]) -> bool:
        """Make a run; offline if it fails, since a run whose rows are on disk must not end.

        Args:
            write: Makes the run in a mode of W&B.

        Returns:
            Whether the run was made.
        """
        while self.mode not in ("disabled", None):
            try:
                write(self.mode)
                return True
            except Exception as error:
                self.fall_back(error)
        return False


session = functools.cache(Session)
"""Return the session of this process for a mode."""


class WandbTracker:
    """A tracker that copies cells and sweeps to W&B.

    Args:
        project: Name of the project.
        entity: Team or user; None for the account's default.
        mode: One of W&B's modes, or ``auto``: as W&B's settings say, and else online if there is an
            account and its host answers, offline if not. WANDB_MODE overrides it.
        artifact_mib: Files up to this size, MiB, are copied as artifacts; 0 for none.

    Raises:
        ValueError: If one of them is empty or negative, or W&B does not accept it or WANDB_MODE.
    """

    def __init__(
        self,
        project: str = "topkbench",
        entity: str | None = None,
        mode: str = "auto",
        artifact_mib: float = 256,
    ) -> None:
        check_setting("project", project, "tracker.project")
        check_setting("entity", entity, "tracker.entity")
        if not project.strip():
            raise ValueError("project must not be empty.")
        if entity is not None and not entity.strip():
            raise ValueError("entity must not be empty; null is the account's default.")
        if artifact_mib < 0:
            raise ValueError(f"artifact_mib must be at least 0, got {artifact_mib}.")
        check_setting("mode", mode, "tracker.mode", "auto")
        if "WANDB_MODE" in os.environ:
            check_setting("mode", os.environ["WANDB_MODE"], "the environment variable WANDB_MODE")
        self.project = project
        self.entity = entity
        self.mode = mode
        self.artifact_mib = artifact_mib
        self._live: Any = None  # the sweep's run, between its begin and its end
        self._live_mode: str | None = None
        self._command = ""
        self._names = Names()
        self._fitted: set[Path] = set()  # files that are artifacts already
        self._url: str | None = None  # of the sweep's run, if it is online

    def _start(self, folder: str | Path, mode: str, console: str = "off", **options: Any) -> Any:
        import wandb

        return wandb.init(
            project=self.project,
            entity=self.entity,
            dir=str(folder),
            reinit="create_new",  # a cell's run does not end the sweep's
            settings=wandb.Settings(
                mode=cast(Any, mode),
                console=cast(Any, console),
                quiet=True,
                silent=True,
                save_code=False,
                x_disable_stats=True,
                init_timeout=30,
                finish_timeout=120,
                finish_timeout_raises=True,
            ),
            **options,
        )

    def _start_sweep(self, folder: str | Path, sweep: str, mode: str) -> Any:
        return self._start(
            folder,
            mode,
            console="wrap",
            name=sweep,
            group=sweep,
            job_type="sweep",
            tags=["sweep"],
            notes=self._command,
            config={},
        )

    def begin_sweep(
        self,
        folder: str | Path,
        sweep: str,
        command: str = "",
        settings: Sequence[Mapping[str, Any]] = (),
        given: Collection[str] = (),
    ) -> None:
        """Start the sweep's run."""
        self._command, self._names = command, Names(settings, given)

        def start(mode: str) -> None:
            self._live, self._live_mode = self._start_sweep(folder, sweep, mode), mode

        session(self.mode).copy(start)

    def log_progress(self, done: int, total: int, cells: Sequence[Mapping[str, Any]]) -> None:
        """Copy the samples done and each cell's score so far to the sweep's run."""
        if self._live is None:
            return
        try:
            table = _table(pd.DataFrame(list(cells)))
            self._live.log({"samples/done": done, "samples/all": total, "cells/so far": table})
        except Exception as error:  # the end of the sweep makes a run of its own
            self._live = None
            if session(self.mode).mode == self._live_mode:  # else it has fallen back already
                session(self.mode).fall_back(error)

    def log_cell(
        self,
        folder: str | Path,
        sweep: str,
        rows: Sequence[Row],
        samples: pd.DataFrame | Sequence[Mapping[str, Any]],
        config: Mapping[str, Any],
        attempt: int = 1,
        artifact: Path | None = None,
    ) -> bool:
        """Copy a finished cell: configuration, summary, rows, samples, training losses, weights."""
        if not rows:
            return False
        top = next((row for row in rows if row.subtask == MEAN), rows[0])
        settled = all(row.status.settled for row in rows)
        data = samples if isinstance(samples, pd.DataFrame) else pd.DataFrame(list(samples))

        def write(mode: str) -> None:
            run = self._start(
                folder,
                mode,
                id=f"{top.run_id}-{attempt}",
                name=self._names.run_name(top, config),
                group=sweep,
                job_type=top.task,
                tags=self._names.tags(top, config),
                notes="\n".join(filter(None, [self._command, top.reason])),
                config=cell_config(top, config, self._names.configuration(top, config)),
            )
            try:
                run.log({"rows": _table(frame(rows))})
                if len(data):
                    run.log({"samples": _table(data)})
                if artifact is not None and artifact not in self._fitted:
                    self._log_files(run, artifact.stem, "weights", [artifact])
                run.define_metric("loss/*", step_metric="step")
                for point in loss_points(data):
                    run.log(point)
                run.summary.update(summary(rows))
            finally:
                run.finish(exit_code=0 if settled else 1)

        is_copied = session(self.mode).copy(write)
        if is_copied and artifact is not None:
            self._fitted.add(artifact)
        return is_copied

    def log_sweep(
        self, folder: str | Path, sweep: str, rows: pd.DataFrame, samples: pd.DataFrame
    ) -> None:
        """Copy the sweep's rows, its curves over k and rbit, and its report; end its run.

        Of a search, its best trials are copied too.
        """
        if not len(rows):
            return
        if session(self.mode).mode != self._live_mode:  # its host does not answer any more
            self._live = None

        def write(mode: str) -> None:
            import wandb

            run, self._live = self._live, None
            if run is None:  # it could not begin, or it failed
                run = self._start_sweep(folder, sweep, mode)
            try:
                for x in ("k", "rbit"):
                    run.define_metric(x, hidden=True)
                    run.define_metric(f"by_{x}/*", step_metric=x)
                for point in curves(rows, samples):
                    run.log(point)
                figures = sorted((Path(folder) / "figures").glob("*.png"))
                if figures:
                    run.log({f"figures/{one.stem}": wandb.Image(str(one)) for one in figures})
                found = outcome(Sweep.open(folder), rows)
                if found is not None:
                    run.log({"search/best": _table(values(found))})
                run.log({"rows": _table(rows)})
                name, *when = (part for part in sweep.rpartition("/")[::2] if part)
                data = [
                    Path(folder) / one for one in ("rows.parquet", "rows.csv", "samples.parquet")
                ]
                self._log_files(run, f"{name}-rows", "rows", data, when)
                page = [Path(folder) / one for one in ("report.html", "report.md")]
                self._log_files(run, f"{name}-report", "report", [*page, *figures], when)
                counts = one_row_a_cell(rows)["status"].value_counts()
                run.summary.update({f"cells/{name}": int(n) for name, n in counts.items()})
                several = (rows[name].dropna().astype(str).unique() for name in SHOWN)
                run.tags = ("sweep", *(tag(word) for words in several for word in words))
                self._url = run.url
            finally:
                run.finish()

        session(self.mode).copy(write)

    def _log_files(
        self, run: Any, name: str, kind: str, paths: Sequence[Path], aliases: Sequence[str] = ()
    ) -> None:
        """Copy files as an artifact, a new version if their content is new."""
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^\w.-]+", "-", name)[:128], kind)
        for path in paths:
            if path.is_file() and path.stat().st_size <= self.artifact_mib * MIB:
                folder = f"{path.parent.name}/" if path.parent.name == "figures" else ""
                artifact.add_file(str(path), name=folder + path.name)
        if len(artifact.manifest.entries):
            run.log_artifact(artifact, aliases=[*aliases, "latest"])

    def where(self, folder: str | Path, rows: pd.DataFrame) -> str:
        """Name the page of the sweep's run, or the commands to upload its runs and to see them."""
        lines = [f"W&B: {self._url}"] if self._url is not None else []
        runs = Path(folder) / "wandb"
        count = len(list(runs.glob("offline-run-*")))
        if count:
            place = shlex.quote(str(runs))
            lines += [
                f"W&B: offline runs: {count}.",
                f"  wandb sync {place}  # uploads them from this machine; --dry-run lists them",
                f"  wandb leet {place}  # shows them in the terminal",
            ]
        if lines:
            words = [f"--{name} {shlex.quote(one)}" for name, one in shown_of(rows).items()]
            words += [f"--project {shlex.quote(self.project)}"] * (self.project != "topkbench")
            words += [] if self.entity is None else [f"--entity {shlex.quote(self.entity)}"]
            command = " ".join(["python -m topkbench.analysis.tracking dashboard", *words])
            lines.append(f"  {command}  # then saves a workspace that shows them")
        return "\n".join(lines)


def _table(data: pd.DataFrame) -> Any:
    """Return a W&B table of the columns that have a value."""
    import wandb

    some = data.dropna(axis=1, how="all").head(_MOST_LINES)
    return wandb.Table(dataframe=some.astype(object).map(table_value))


def dashboard(entity: str, project: str, shown: Mapping[str, str]) -> Any:
    """Return the project's workspace without saving it; needs neither account nor network.

    It shows runs of one model, task, protocol and question, so that none of its panels mixes them.

    Args:
        entity: Team or user that owns the project.
        project: Name of the project.
        shown: The value of each of ``SHOWN`` to filter by; one that is missing is not filtered by.
    """
    # Imported by name, since these modules build their exports at import.
    panels: Any = importlib.import_module("wandb_workspaces.reports.v2")
    spaces: Any = importlib.import_module("wandb_workspaces.workspaces")
    expressions: Any = importlib.import_module("wandb_workspaces.expr")

    def scatter(x: str, y: str, *, config: bool = False) -> Any:
        return panels.ScatterPlot(
            title=f"{METRICS[y].label} against {METRICS[x].label}",
            x=panels.Config(x) if config else panels.SummaryMetric(x),
            y=panels.SummaryMetric(y),
            log_x=METRICS[x].scale == "log",
        )

    def bars(metric: str, *ends: str) -> Any:
        return panels.BarPlot(  # a bar's runs differ in their seeds alone
            title=METRICS[metric].axis,
            metrics=[metric, *ends],
            groupby=panels.Config("configuration"),
        )

    def tagged(name: str, value: str) -> Any:
        # Full attention has no protocol, and is compared under each.
        return expressions.Tags().isin([value, "full"] if name == "protocol" else [value])

    def lines(x: str, metric: str) -> Any:
        return panels.LinePlot(
            title=f"{METRICS[metric].label} over {x}",
            x=x,
            metric_regex=f"by_{x}/{metric}/.*",
            title_x=METRICS[x].axis,
            title_y=METRICS[metric].axis,
            log_x=True,
        )

    coordinates = panels.ParallelCoordinatesPlot(
        title="From settings to outcome",
        columns=[
            *(panels.ParallelCoordinatesPlotColumn(panels.Config(x)) for x in ("k", "rbit")),
            *(
                panels.ParallelCoordinatesPlotColumn(panels.SummaryMetric(y))
                for y in ("recall_at_k", "bytes_read_per_step", "decode_ms_p50", "score")
            ),
        ],
    )
    return spaces.Workspace(
        entity=entity,
        project=project,
        name="topkbench",
        sections=[
            spaces.Section(
                name="Quality",
                is_open=True,
                panels=[
                    scatter("k", "score", config=True),
                    scatter("bytes_read_per_step", "score"),
                    bars("score"),
                    bars("delta_full"),
                ],
            ),
            spaces.Section(
                name="Why",
                is_open=True,
                panels=[
                    scatter("k", "recall_at_k", config=True),
                    scatter("rbit", "recall_at_k", config=True),
                    scatter("recall_at_k", "score"),
                    coordinates,
                ],
            ),
            spaces.Section(
                name="Cost",
                is_open=True,
                panels=[
                    scatter("k", "decode_ms_p50", config=True),
                    bars("speedup_vs_full", "speedup_ci_low", "speedup_ci_high"),
                    bars("peak_memory_mib"),
                ],
            ),
            spaces.Section(
                name="Training",
                panels=[
                    panels.LinePlot(
                        title=METRICS["loss"].axis,
                        x="step",
                        metric_regex="loss/.*",
                        title_x=METRICS["step"].axis,
                        title_y=METRICS["loss"].axis,
                        log_y=True,
                    )
                ],
            ),
            spaces.Section(
                name="Sweeps",
                panels=[
                    lines(x, metric)
                    for x in ("k", "rbit")
                    for metric, one in CURVES.items()
                    if x in one.over
                ],
            ),
        ],
        runset_settings=spaces.RunsetSettings(
            filters=[tagged(*one) for one in shown.items()],
            groupby=[expressions.Metric("Group"), expressions.Metric("JobType")],
            pinned_columns=[
                *("summary:score", "summary:recall_at_k", "config:k.value", "config:rbit.value"),
            ],
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Save the project's workspace to W&B; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m topkbench.analysis.tracking")
    parser.add_argument("command", choices=["dashboard"], help="build the project's workspace")
    parser.add_argument("--entity", default="", help="team or user; default: the account's own")
    parser.add_argument("--project", default="topkbench")
    for name, default in SHOWN.items():
        parser.add_argument(
            f"--{name}", default=default, help=f"show its runs; default: {default}; all: every one"
        )
    options = parser.parse_args(arguments)
    shown = {name: getattr(options, name) for name in SHOWN if getattr(options, name) != "all"}
    with console():
        return _save(options.entity, options.project, shown)


def _save(entity: str, project: str, shown: Mapping[str, str]) -> int:
    """Save the workspace of a project, of the account's own entity if none is given."""
    import wandb

    try:
        # If silent, W&B does not ask for a key at the terminal.
        mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
        if not wandb.login():
            say_error(
                f"a workspace is saved online, but W&B's mode is {mode}; run `wandb online` first."
            )
            return 2
        workspace = dashboard(entity or wandb.Api().default_entity or "", project, shown)
        workspace.save()
    except wandb.errors.UsageError:
        say_error(
            "a workspace is saved to an account, but none is configured; run `wandb login` first."
        )
        return 2
    # Whether the network, the key or the server fails, the user gets one sentence.
    except Exception as error:
        say_error(f"the workspace could not be saved: {' '.join(str(error).split())}")
        return 1
    say(workspace.url)
    return 0
