"""When a sweep ends: the report, the tracker's sweep run, the table, the exit status."""

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
"""Exit status of a sweep in which a cell failed, was wrong, ran out of memory or was cut short."""


class ReportCallback(Callback):
    """Builds the report of the folder that Hydra ran in, ``results/<experiment>/<name>/``.

    Hydra turns an exception of a callback into a warning; SystemExit passes, so that is how a
    failed cell reaches the shell.

    Args:
        models: ``NAME=PARAMETERS/LAYERS`` of the whole models that the bound on a decode step is
            told for; None for the usual ones.
        published: Lay a paper's published numbers beside ours.
    """

    def __init__(self, models: Sequence[str] | None = None, published: bool = False) -> None:
        self.models = models
        self.published = published

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Report on a sweep."""
        self._end(Path(config.hydra.sweep.dir), config)

    def on_run_end(
        self, config: DictConfig, job_return: JobReturn | None = None, **kwargs: Any
    ) -> None:
        """Report on a single run."""
        if job_return is not None and job_return.status is JobStatus.FAILED:
            return  # Hydra raises the job's own error next; a report must not hide it.
        self._end(Path(config.hydra.run.dir), config)

    def _end(self, folder: Path, config: DictConfig) -> None:
        sweep = Sweep.open(folder)
        try:
            if not sweep.identities():
                return
            sweep.note_command(_command(config))
            models = MODELS if self.models is None else model_sizes(self.models)
            path = build(folder, models=models, published=self.published)
            rows, samples = sweep.rows(), sweep.samples()
        except RecordError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        with contextlib.suppress(InstantiationException):  # every cell has said it already
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


def _command(config: DictConfig) -> str:
    """Return the command line of a run or a sweep, as a shell takes it."""
    given = config.hydra.overrides
    words = ["-m" if word == "hydra.mode=MULTIRUN" else word for word in given.hydra]
    return shlex.join(["python", "run.py", *given.task, *words])
