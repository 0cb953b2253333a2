"""The end of a sweep: build its report, copy it to the tracker, and print it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from topkbench.analysis.console import say, say_error
from topkbench.analysis.figures.break_even import MODELS, model_sizes
from topkbench.analysis.figures.search import outcome, text
from topkbench.analysis.record.row import Status
from topkbench.analysis.record.store import RecordError, Sweep
from topkbench.analysis.report.build import write
from topkbench.analysis.tables.overview import summary_table
from topkbench.analysis.tracking.tracker import Tracker

NO_REPORT_STATUS = 1
"""Exit status of a sweep whose report could not be made or shown."""

FAILED_STATUS = 3
"""Exit status of a sweep in which a cell failed, was wrong, out of memory or interrupted."""


class SweepReport:
    """Builds the report of a sweep's folder, ``results/<experiment>/<name>/``.

    Args:
        models: ``NAME=PARAMETERS/LAYERS`` of the whole models for which the bound on a decode step
            is shown; None for ``MODELS``.
        published: Show a paper's published numbers beside ours.
        methods: Methods to highlight in figures of many; None for the references and the best.

    Raises:
        RecordError: If a model is not of that form.
    """

    def __init__(
        self,
        models: Sequence[str] | None = None,
        published: bool = False,
        methods: Sequence[str] | None = None,
    ) -> None:
        try:
            self.models = MODELS if models is None else model_sizes(models)
        except RecordError as error:
            raise RecordError(
                "models must be NAME=PARAMETERS/LAYERS, such as 8B=8.03e9/32, got"
                f" {list(models or ())}."
            ) from error
        self.published = published
        self.methods = methods

    def finish(self, sweep: Sweep, command: str, tracker: Tracker) -> int:
        """Build a sweep's report, copy it to the tracker and print it; return the exit status.

        Args:
            sweep: The sweep.
            command: The command line that ran it.
            tracker: Where it is copied to.

        Raises:
            SystemExit: If the report cannot be made; one sentence said why.
        """
        with _said(sweep):
            sweep.note_command(command)
            report = write(
                sweep.folder,
                models=self.models,
                published=self.published,
                methods=self.methods,
                progress=say,
            )
            rows = report.rows
            tracker.log_sweep(sweep.folder, sweep.title, rows, report.samples)
            say(f"\n{summary_table(report.compared)}\n")
            found = outcome(sweep, rows)
            if found is not None:
                say(f"{text(found)}\n")
            where = tracker.where(sweep.folder, rows)
            if where:
                say(f"{where}\n")
            say(report.page)
            good = [status.value for status in Status if status.settled]
            return 0 if rows["status"].isin(good).all() else FAILED_STATUS


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
