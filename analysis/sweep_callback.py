"""Start and end of a sweep: check the folder of results; report, and set the exit status."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from omegaconf import DictConfig

from topkbench.analysis.break_even import MODELS, model_sizes
from topkbench.analysis.console import say, say_error
from topkbench.analysis.files import NotWritableError, remove_left_over
from topkbench.analysis.record import RecordError, Sweep, checked_results_dir
from topkbench.analysis.report import build, summary_table
from topkbench.analysis.row import Status
from topkbench.analysis.tracking import NoTracker, Tracker

NO_REPORT_STATUS = 1
"""Exit status of a sweep whose report could not be made or shown."""

FAILED_STATUS = 3
"""Exit status of a sweep in which a cell failed, was wrong, out of memory or interrupted."""

ONE_PER_SWEEP = ("results_dir", "experiment_name")
"""Settings that name the folder of a sweep."""


class ReportCallback(Callback):
    """Builds the report of the folder that Hydra ran in, ``results/<experiment>/<name>/``.

    Hydra turns exceptions of a callback into warnings, but not SystemExit, which is therefore
    raised to report an error or a failed cell to the shell.

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

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check a sweep's folder before anything is computed."""
        given = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        for one in given:
            if one.is_sweep_override() and one.key_or_group in ONE_PER_SWEEP:
                say_error(
                    f"{one.key_or_group} must be the same for all cells of a sweep, got "
                    f"{one.input_line}."
                )
                raise SystemExit(2)
        self._begin(config)

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check a single run's folder before anything is computed."""
        self._begin(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Report on a sweep."""
        self._end(config.hydra.sweep.dir, config)

    def on_run_end(
        self, config: DictConfig, job_return: JobReturn | None = None, **kwargs: Any
    ) -> None:
        """Report on a single run."""
        if job_return is not None and job_return.status is JobStatus.FAILED:
            return  # Hydra raises the job's error next; a report must not hide it.
        self._end(config.hydra.run.dir, config)

    def _begin(self, config: DictConfig) -> None:
        try:
            folder = checked_results_dir(config.results_dir)
        except RecordError as error:
            say_error(error)
            raise SystemExit(1 if isinstance(error, NotWritableError) else 2) from None
        for place in (folder, Path(config.cache_dir).expanduser()):
            remove_left_over(place)

    def _end(self, folder: str, config: DictConfig) -> None:
        sweep = Sweep(folder, config.results_dir)
        with _said(sweep):
            if sweep.identities():
                status = self._report(sweep, self._tracker(config))
                if status:
                    raise SystemExit(status)

    def _report(self, sweep: Sweep, tracker: Tracker) -> int:
        """Build a sweep's report, copy it to the tracker and print it; return the exit status."""
        sweep.note_command(_command())
        path = build(sweep.folder, models=self.models, published=self.published)
        rows, samples = sweep.rows(), sweep.samples()
        tracker.log_sweep(sweep.folder, sweep.title, rows, samples)
        say(f"\n{summary_table(rows, samples)}\n")
        say(path)
        good = [status.value for status in Status if status.settled]
        return 0 if rows["status"].isin(good).all() else FAILED_STATUS

    def _tracker(self, config: DictConfig) -> Tracker:
        choice = config.get("tracker")
        if not isinstance(choice, DictConfig) or "_target_" not in choice:
            return NoTracker()
        with contextlib.suppress(InstantiationException):  # every cell has reported it already
            tracker: Tracker = instantiate(choice)
            return tracker
        return NoTracker()


@contextlib.contextmanager
def _said(sweep: Sweep) -> Iterator[None]:
    """Say in one sentence why a sweep has no report, whatever the reason, and exit."""
    try:
        yield
    except RecordError as error:
        say_error(error)
        raise SystemExit(NO_REPORT_STATUS) from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        say_error(
            f"the report could not be made ({type(error).__name__}: {reason}), but all rows are in "
            f"{sweep.store.folder}; `python -m topkbench.analysis.report {sweep.folder}` makes it."
        )
        raise SystemExit(NO_REPORT_STATUS) from None


def _command() -> str:
    """Return the command line as it was given, quoted for a shell."""
    program = Path(sys.argv[0])
    start = ["python", program.name] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])
