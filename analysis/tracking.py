"""Copy results to Weights & Biases; the results folder remains the original.

There is one run per cell, grouped by sweep, and one run for the sweep with its curves and figures.
``python -m topkbench.analysis.tracking dashboard`` builds the project's workspace.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import netrc
import os
import sys
import urllib.parse
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

import pandas as pd

from topkbench.analysis.metrics import METRICS
from topkbench.analysis.row import Row
from topkbench.analysis.stats import MEAN
from topkbench.analysis.training import loss_points
from topkbench.analysis.wandb_payload import (
    CURVES,
    cell_config,
    curves,
    run_name,
    summary,
    table_value,
    tags,
)

Mode = Literal["auto", "online", "offline", "disabled"]

_MOST_SAMPLES = 10_000


class Tracker(Protocol):
    """A destination that a sweep is copied to. No call raises an exception."""

    def log_cell(
        self,
        folder: str | Path,
        sweep: str,
        rows: Sequence[Row],
        samples: pd.DataFrame | Sequence[Mapping[str, Any]],
        config: Mapping[str, Any],
        attempt: int = 1,
    ) -> bool:
        """Copy a finished cell; return whether it was copied.

        Args:
            folder: The sweep's folder.
            sweep: Name of the sweep, the same for all its cells.
            rows: The cell's rows.
            samples: The cell's samples.
            config: The resolved configuration.
            attempt: Number of the attempt, from 1; part of the run's id.
        """

    def log_sweep(
        self, folder: str | Path, sweep: str, rows: pd.DataFrame, samples: pd.DataFrame
    ) -> None:
        """Copy the sweep's curves and the figures of its report.

        Args:
            folder: The sweep's folder, with its report.
            sweep: Name of the sweep.
            rows: The sweep's rows.
            samples: The sweep's samples.
        """


class NoTracker:
    """A tracker that copies nothing."""

    def log_cell(self, *arguments: Any, **keywords: Any) -> bool:
        """Do nothing."""
        return False

    def log_sweep(self, *arguments: Any, **keywords: Any) -> None:
        """Do nothing."""


def account_configured(environment: Mapping[str, str] | None = None) -> bool:
    """Return whether W&B would find an account: an API key, or a netrc entry for its host.

    Args:
        environment: Environment variables; None for those of the process.
    """
    known = os.environ if environment is None else environment
    if known.get("WANDB_API_KEY"):
        return True
    base = known.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = urllib.parse.urlparse(base).hostname or base
    home = Path(known.get("HOME", "~")).expanduser()
    named = known.get("NETRC")
    for path in [Path(named)] if named else [home / ".netrc", home / "_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if host in netrc.netrc(path).hosts:
                return True
    return False


class WandbTracker:
    """A tracker that copies cells and sweeps to W&B.

    Args:
        project: Name of the project.
        entity: Team or user; None for the account's default.
        mode: ``auto`` is online if an account is configured, else offline; WANDB_MODE overrides it.
    """

    def __init__(
        self, project: str = "topkbench", entity: str | None = None, mode: Mode = "auto"
    ) -> None:
        self.project = project
        self.entity = entity
        if mode not in get_args(Mode):
            words = ", ".join(get_args(Mode))
            raise ValueError(f"tracker.mode must be one of {words}, got {mode!r}.")
        self.mode = mode
        self._broken = False

    def _mode(self) -> Literal["online", "offline", "disabled"]:
        chosen = os.environ.get("WANDB_MODE") or self.mode
        if chosen == "auto":
            return "online" if account_configured() else "offline"
        if chosen not in ("online", "offline", "disabled"):
            raise ValueError(f"tracker mode must be auto, online, offline or disabled: {chosen!r}.")
        return cast(Literal["online", "offline", "disabled"], chosen)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn any exception into one warning, since what is tracked is only a copy."""
        try:
            yield
        # An exception of W&B must not end a run whose rows are safely on disk.
        except Exception as error:
            if not self._broken:
                self._broken = True
                warnings.warn(
                    f"W&B tracking stopped, the results folder has everything: {error}",
                    stacklevel=3,
                )

    def _start(self, folder: str | Path, **options: Any) -> Any:
        import wandb

        return wandb.init(
            project=self.project,
            entity=self.entity,
            dir=str(folder),
            mode=self._mode(),
            reinit="finish_previous",
            settings=wandb.Settings(
                console="off",
                quiet=True,
                silent=True,
                save_code=False,
                x_disable_stats=True,
                init_timeout=30,
            ),
            **options,
        )

    def log_cell(
        self,
        folder: str | Path,
        sweep: str,
        rows: Sequence[Row],
        samples: pd.DataFrame | Sequence[Mapping[str, Any]],
        config: Mapping[str, Any],
        attempt: int = 1,
    ) -> bool:
        """Copy a finished cell: configuration, summary, samples and training losses."""
        if self._broken or not rows:
            return False
        with self._guarded():
            import wandb

            top = next((row for row in rows if row.subtask == MEAN), rows[0])
            settled = all(row.status.settled for row in rows)
            run = self._start(
                folder,
                id=f"{top.run_id}-{attempt}",
                name=run_name(top),
                group=sweep,
                job_type=top.task,
                tags=tags(top),
                config=cell_config(top, config),
            )
            try:
                data = samples if isinstance(samples, pd.DataFrame) else pd.DataFrame(list(samples))
                if len(data):
                    shown = data.head(_MOST_SAMPLES).map(table_value)
                    run.log({"samples": wandb.Table(dataframe=shown)})
                run.define_metric("loss/*", step_metric="step")
                for point in loss_points(data):
                    run.log(point)
                run.summary.update(summary(rows))
            finally:
                run.finish(exit_code=0 if settled else 1)
        return not self._broken

    def log_sweep(
        self, folder: str | Path, sweep: str, rows: pd.DataFrame, samples: pd.DataFrame
    ) -> None:
        """Copy the sweep's curves over k and rbit, and the figures of its report."""
        if self._broken or not len(rows):
            return
        with self._guarded():
            import wandb

            run = self._start(
                folder, name=sweep, group=sweep, job_type="sweep", tags=["sweep"], config={}
            )
            try:
                for x in ("k", "rbit"):
                    run.define_metric(x, hidden=True)
                    run.define_metric(f"by_{x}/*", step_metric=x)
                for point in curves(rows, samples):
                    run.log(point)
                figures = sorted((Path(folder) / "figures").glob("*.png"))
                if figures:
                    run.log({f"figures/{one.stem}": wandb.Image(str(one)) for one in figures})
                counts = rows.drop_duplicates("run_id")["status"].value_counts()
                run.summary.update({f"cells/{name}": int(n) for name, n in counts.items()})
            finally:
                run.finish()


def dashboard(entity: str, project: str) -> Any:
    """Return the project's workspace without saving it; needs neither account nor network.

    Args:
        entity: Team or user that owns the project.
        project: Name of the project.
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
        return panels.BarPlot(
            title=METRICS[metric].axis, metrics=[metric, *ends], groupby=panels.Config("method")
        )

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
                panels=[lines(x, metric) for x in ("k", "rbit") for metric in CURVES],
            ),
        ],
        runset_settings=spaces.RunsetSettings(
            groupby=[expressions.Metric("Group"), expressions.Metric("JobType")],
            pinned_columns=["summary:score", "summary:recall_at_k", "config:k", "config:rbit"],
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Save the project's workspace to W&B; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m topkbench.analysis.tracking")
    parser.add_argument("command", choices=["dashboard"], help="build the project's workspace")
    parser.add_argument("--entity", default="", help="team or user; default: the account's own")
    parser.add_argument("--project", default="topkbench")
    options = parser.parse_args(arguments)
    if not account_configured():
        print(
            "error: a workspace is saved to an account, but none is configured; "
            "run `wandb login` first.",
            file=sys.stderr,
        )
        return 2
    try:
        import wandb

        entity = options.entity or wandb.Api().default_entity or ""
        workspace = dashboard(entity, options.project)
        workspace.save()
    # Whether the network, the key or the server fails, the user gets one sentence.
    except Exception as error:
        print(f"error: the workspace could not be saved: {error}", file=sys.stderr)
        return 1
    print(workspace.url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
