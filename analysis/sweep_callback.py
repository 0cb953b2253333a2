"""The end of a sweep: build the report, copy it to the tracker, print a table, set exit status."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from omegaconf import DictConfig

from topkbench.analysis.break_even import MODELS, model_sizes
from topkbench.analysis.record import RecordError, Sweep
from topkbench.analysis.report import build, summary_table
from topkbench.analysis.row import Status
from topkbench.analysis.tracking import NoTracker, Tracker

FAILED_STATUS = 3
"""Exit status of a sweep in which a cell failed, was wrong, out of memory or interrupted."""


class ReportCallback(Callback):
    """Builds the report of the folder that Hydra ran in, ``results/<experiment>/<name>/``.

    Hydra turns exceptions of a callback into warnings, but not SystemExit, which is therefore
    raised to report a failed cell to the shell.

    Args:
        models: ``NAME=PARAMETERS/LAYERS`` of the whole models for which the bound on a decode step
            is shown; None for ``MODELS``.
        published: Show a paper's published numbers beside ours.
    """

    def __init__(self, models: Sequence[str] | None = None, published: bool = False) -> None:
        if isinstance(models, str | int | float):
            raise RecordError(
                "hydra.callbacks.report.models must be a list of NAME=PARAMETERS/LAYERS or null,"
                f" got {models!r}."
            )
        if not isinstance(published, bool):
            raise RecordError(
                f"hydra.callbacks.report.published must be true or false, got {published!r}."
            )
        self.models = MODELS if models is None else model_sizes(models)
        self.published = published

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Report on a sweep."""
        self._end(Path(config.hydra.sweep.dir), config)

    def on_run_end(
        self, config: DictConfig, job_return: JobReturn | None = None, **kwargs: Any
    ) -> None:
        """Report on a single run."""
        if job_return is not None and job_return.status is JobStatus.FAILED:
            return  # Hydra raises the job's error next; a report must not hide it.
        self._end(Path(config.hydra.run.dir), config)

    def _end(self, folder: Path, config: DictConfig) -> None:
        sweep = Sweep.open(folder)
        try:
            if not sweep.identities():
                return
            sweep.note_command(_command())
            path = build(folder, models=self.models, published=self.published)
            rows, samples = sweep.rows(), sweep.samples()
        except RecordError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        with contextlib.suppress(InstantiationException):  # every cell has reported it already
            self._tracker(config).log_sweep(folder, sweep.title, rows, samples)
        print(f"\n{summary_table(rows, samples)}\n")
        print(path, flush=True)
        good = [status.value for status in Status if status.settled]
        if not rows["status"].isin(good).all():
            raise SystemExit(FAILED_STATUS)

    def _tracker(self, config: DictConfig) -> Tracker:
        choice = config.get("tracker")
        if not isinstance(choice, DictConfig) or "_target_" not in choice:
            return NoTracker()
        tracker: Tracker = instantiate(choice)
        return tracker


def _command() -> str:
    """Return the command line as it was given, quoted for a shell."""
    program = Path(sys.argv[0])
    start = ["python", program.name] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])
