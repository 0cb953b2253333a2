"""Searches settings of a method: ``search=optuna`` asks optuna for trials, and each is a cell.

A trial has one value for each setting that is searched, called a knob. Trials are suggested and run
in batches, so that those of a batch share their prompts' prefills. They are cells like any other:
found if they were measured before, and compared with full attention. Which values were suggested,
and what came out, is in a study of optuna's in the results folder, from which a killed search goes
on. A suggestion depends on the study, the trial's number and the knob alone, so a search that was
killed has the trials of one that was not.
"""

import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from topkbench.analysis.comparison.metrics import METRICS
from topkbench.analysis.console import say
from topkbench.analysis.record.files import locked
from topkbench.analysis.record.store import (
    SPEED_COLUMNS,
    RecordError,
    Row,
    Status,
    Sweep,
    identity,
    named_values,
)
from topkbench.harness.cell import libraries
from topkbench.harness.run import NOT_CONTENT, code_of
from topkbench.harness.runner import Job, Refused, Runner
from topkbench.harness.settings import SettingsError
from topkbench.methods.base import check_whole

if TYPE_CHECKING:
    import optuna

OPTUNA = "optuna>=5.0,<5.1"
"""The extra ``[search]``."""

OBJECTIVES = tuple(
    name
    for name, metric in METRICS.items()
    if metric.better is not None
    and name in Row.__annotations__
    # Times, and memory of the process, differ between two runs of one cell.
    and name not in (*SPEED_COLUMNS, "peak_memory_mib", "fit_s")
)
"""The columns that may be an objective."""


@dataclass(frozen=True)
class Choice:
    """A knob that has one of several values.

    Attributes:
        name: The setting.
        values: The values, as they are written on a command line.
    """

    name: str
    values: tuple[str, ...]

    @property
    def ends(self) -> tuple[str, str]:
        """The first and the last value, as text."""
        return self.values[0], self.values[-1]

    @property
    def size(self) -> float:
        """The number of values."""
        return len(self.values)

    @property
    def words(self) -> str:
        """All values in words."""
        return ", ".join(self.values)

    def suggest(self, trial: "optuna.Trial") -> None:
        """Let a trial choose a value, unless it has one."""
        trial.suggest_categorical(self.name, self.values)

    def text(self, value: Any) -> str:
        """Return a trial's value as it is written on a command line."""
        return str(value)


@dataclass(frozen=True)
class Interval:
    """A knob that is a number between two ends, both included.

    Attributes:
        name: The setting.
        low: The lower end.
        high: The upper end, of the same type: whole numbers, or numbers with a fraction.
        step: Distance of whole numbers; of others None.
        log: Whether the logarithm is searched.
    """

    name: str
    low: int | float
    high: int | float
    step: int | None = None
    log: bool = False

    @property
    def values(self) -> Sequence[int]:
        """All values, of whole numbers."""
        return range(int(self.low), int(self.high) + 1, self.step or 1)

    @property
    def ends(self) -> tuple[str, str]:
        """The lower and the upper end, as text."""
        return self.text(self.low), self.text(self.high)

    @property
    def size(self) -> float:
        """The number of values; infinite of numbers with a fraction."""
        return math.inf if isinstance(self.low, float) else len(self.values)

    @property
    def words(self) -> str:
        """All values in words."""
        steps = "" if self.step in (None, 1) else f" in steps of {self.step}"
        return f"{self.low} to {self.high}{steps}{', logarithmic' if self.log else ''}"

    def suggest(self, trial: "optuna.Trial") -> None:
        """Let a trial choose a value, unless it has one."""
        if isinstance(self.low, float):
            trial.suggest_float(self.name, self.low, self.high, log=self.log)
        else:
            trial.suggest_int(
                self.name, self.low, int(self.high), step=self.step or 1, log=self.log
            )

    def text(self, value: Any) -> str:
        """Return a trial's value as it is written on a command line."""
        return repr(value)


Knob = Choice | Interval


class Composer(Protocol):
    """Composes further configurations of a command: its own settings, and others besides."""

    def knobs(self, values: Mapping[str, Any]) -> list[Knob]:
        """Read the values of knobs; those that the command line gives a value are left out.

        Args:
            values: By setting: text in the syntax of Hydra's sweeps, or a list.

        Raises:
            SettingsError: If they cannot be read.
        """

    def job(self, overrides: Sequence[str], trial: int | None = None) -> Job | Refused:
        """Compose and check a configuration.

        Args:
            overrides: ``NAME=VALUE`` of the settings that differ from the command's.
            trial: The trial that it is.
        """


class NoSearch:
    """Runs the configurations that were composed, and no others: ``search=none``."""

    knobs: ClassVar[Mapping[str, Any]] = {}

    def check(self, base: Job, composer: Composer) -> None:
        """Do nothing: there are no other settings."""

    def run(self, runner: Runner, jobs: Sequence[Job], composer: Composer) -> float | None:
        """Run a sweep's jobs; return the score of the last one's cell."""
        identities = jobs[0].composed.launcher.run(runner, jobs)
        return runner.score_of(identities[-1])


@dataclass(kw_only=True)
class Search:
    """Searches settings of a method: ``search=optuna``.

    Args:
        trials: Number of trials in all, those of earlier commands included.
        batch: Trials that are suggested at a time.
        objectives: One or two of ``OBJECTIVES``.
        knobs: The values of each setting that is searched: text in the syntax of Hydra's sweeps, or
            a list. Settings may be nested, as in ``{method: {page_size: [8, 16]}}``.
        seed: Seed of the suggestions.

    Raises:
        ValueError: If one of them is wrong, or optuna is not installed.
    """

    trials: int
    batch: int
    objectives: Sequence[str]
    knobs: Mapping[str, Any]
    seed: int

    def __post_init__(self) -> None:
        check_whole("trials", self.trials)
        check_whole("batch", self.batch)
        check_whole("seed", self.seed, least=0)
        given = list(self.objectives)
        if len(given) not in (1, 2) or len(set(given)) < len(given):
            raise ValueError(f"objectives must be one or two different columns, got {given}.")
        for name in given:
            if name not in OBJECTIVES:
                raise ValueError(f"objectives must be among {', '.join(OBJECTIVES)}, got {name!r}.")
        self.knobs = named_values(self.knobs)
        if not self.knobs:
            raise ValueError("knobs must have at least one setting, as in {k: range(16,513,16)}.")
        for name, values in self.knobs.items():
            if not isinstance(values, str | list):
                raise ValueError(
                    f"knobs.{name} must be values to search, as in 32,64 or range(16,513,16), or a"
                    f" list of them, got {values!r}."
                )
        if find_spec("optuna") is None:
            raise ValueError(
                "search=optuna needs the package optuna, which is not installed; install it with"
                f' pip install "{OPTUNA}".'
            )

    def check(self, base: Job, composer: Composer) -> None:
        """Check the knobs by the configurations at the ends of each.

        Args:
            base: The command's own configuration.
            composer: Composes the others.

        Raises:
            SettingsError: If one cannot be read, has no effect, or changes what trials must share.
        """
        for knob in composer.knobs(self.knobs):
            found = [composer.job([f"{knob.name}={end}"]) for end in knob.ends]
            jobs = [one for one in found if isinstance(one, Job)]
            refused = [one for one in found if isinstance(one, Refused)]
            if not jobs:  # else a trial with such a value has failed, and others have not
                raise refused[0].error
            for job in jobs:
                if _shared(job) != _shared(base):
                    raise SettingsError(
                        f"search.knobs.{knob.name} must be a setting of the method or its protocol:"
                        " all trials of a search have the same model, task and prompts."
                    )
            if len(jobs) == 2 and _searched(jobs[0]) == _searched(jobs[1]):
                raise SettingsError(
                    f"search.knobs.{knob.name} has no effect with"
                    f" method={base.composed.method.name}; ~search.knobs.{knob.name} takes it out."
                )

    def run(self, runner: Runner, jobs: Sequence[Job], composer: Composer) -> float | None:
        """Run the trials that are missing; their cells become those of the runner's sweep.

        Args:
            runner: Runs the cells.
            jobs: The command's own configuration alone, which is no trial.
            composer: Composes the trials.

        Raises:
            RecordError: If the study cannot be used; one sentence says why.
        """
        (base,) = jobs
        knobs, sweep = composer.knobs(self.knobs), runner.sweep
        path = self._study(base, knobs, sweep)
        with locked(path.with_suffix(".lock"), timeout_s=0), _said(path):
            if base.composed.settings["force"]:
                path.unlink(missing_ok=True)
            study = Study(self, knobs, path)
            study.add_cells(sweep)
            while batch := study.ask():
                first, last = batch[0].number, batch[-1].number
                say(f"search: trials {first} to {last} of {self.trials}")
                found = [composer.job(study.overrides(one), one.number) for one in batch]
                for refused in found:
                    if isinstance(refused, Refused):
                        runner.refuse(
                            refused.error, refused.choices, refused.settings, refused.trial
                        )
                ready = [one for one in found if isinstance(one, Job)]
                if ready:
                    base.composed.launcher.run(runner, ready)
                study.tell(batch, sweep)
                sweep.note_search(study.record())
            sweep.note_search(study.record())
            say(study.ending())
        return None

    def _study(self, base: Job, knobs: Sequence[Knob], sweep: Sweep) -> Path:
        """Return the file of the study, whose name has a digest of what its trials share."""
        name = str(base.composed.settings["experiment_name"])
        shared = {
            "experiment_name": name,
            **_shared(base),
            **_searched(base),
            "knobs": [asdict(knob) for knob in knobs],
            "objectives": list(self.objectives),
            "seed": self.seed,
            "code": code_of(base.composed, base.full.method),
            "libraries": libraries(),
        }
        readable = re.sub(r"[^\w-]+", "_", name)
        return sweep.results_dir.absolute() / "studies" / f"{readable}-{identity(shared)}.db"


class Study:
    """The trials of a search, in a study of optuna's on disk.

    Args:
        search: The search.
        knobs: Its knobs.
        path: The file, made if it is not there.
    """

    def __init__(self, search: Search, knobs: Sequence[Knob], path: Path) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.search, self.knobs, self.path = search, knobs, path
        self.size = math.prod(knob.size for knob in knobs)
        of = optuna.study.StudyDirection
        directions = {"higher": of.MAXIMIZE, "lower": of.MINIMIZE}
        self._study = optuna.create_study(
            storage=f"sqlite:///{path}",
            study_name="search",
            directions=[directions[str(METRICS[name].better)] for name in search.objectives],
            load_if_exists=True,
        )

    def _trials(self) -> list["optuna.trial.FrozenTrial"]:
        return self._study.get_trials(deepcopy=False)

    def add_cells(self, sweep: Sweep) -> None:
        """Add the cells of finished trials to a sweep, with those that they are compared with."""
        for one in self._trials():
            if one.state.is_finished():
                cell = sweep.store.cell(one.user_attrs["cell"])
                for row in cell.read()[:1]:
                    if row.full_run_id is not None:
                        sweep.append(row.full_run_id)
                sweep.append(cell.identity)

    def ask(self) -> list["optuna.Trial"]:
        """Return the trials of a batch that have not ended; empty at the end of the search.

        Those that an earlier command had asked for, and had not ended when it was killed, are the
        first.
        """
        trials = self._trials()
        num_ended = sum(one.state.is_finished() for one in trials)
        batch = [self._suggested(one) for one in trials if not one.state.is_finished()]
        tried = {self._combination(one.params) for one in self._trials()}
        size, most = self.search.batch, self.search.trials
        end = min(most, (num_ended // size + 1) * size)
        more = max(0, int(min(end - len(trials), self.size - len(tried))))
        untried: Iterator[tuple[Any, ...]] = iter(())
        if self.size <= most:  # each combination is tried once, whatever it promises
            every = itertools.product(*(knob.values for knob in self.knobs))
            untried = (one for one in every if one not in tried)
        for _ in range(more):
            for values in itertools.islice(untried, 1):
                names = (knob.name for knob in self.knobs)
                self._study.enqueue_trial(dict(zip(names, values, strict=True)))
            batch.append(self._suggested())
        return batch

    def _combination(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(values.get(knob.name) for knob in self.knobs)

    def _suggested(self, begun: "optuna.trial.FrozenTrial | None" = None) -> "optuna.Trial":
        """Return a trial that has all of its values.

        Args:
            begun: A trial that was asked for, and may lack some of them; None for a new one.
        """
        from optuna import Trial
        from optuna.trial import TrialState

        number = len(self._trials()) if begun is None else begun.number
        self._study.sampler = self._sampler(number)
        if begun is not None and begun.state == TrialState.RUNNING:
            trial = Trial(self._study, begun._trial_id)
        else:  # the next one that waits, if there is any
            trial = self._study.ask()
        for knob in self.knobs:
            self._study.sampler = self._sampler(number, knob.name)
            knob.suggest(trial)
        return trial

    def _sampler(self, number: int, knob: str = "") -> "optuna.samplers.BaseSampler":
        """Return what suggests the value of one knob in one trial, whatever it suggested before."""
        from optuna.samplers import TPESampler

        seed = identity({"seed": self.search.seed, "trial": number, "knob": knob})[:8]
        return TPESampler(seed=int(seed, 16))

    def overrides(self, trial: "optuna.Trial") -> list[str]:
        """Return a trial's settings as they are written on a command line."""
        return [f"{knob.name}={knob.text(trial.params[knob.name])}" for knob in self.knobs]

    def tell(self, batch: Sequence["optuna.Trial"], sweep: Sweep) -> None:
        """Record what came out of trials, as the rows of their cells on disk say.

        Raises:
            RecordError: If a cell has not ended, or the cells lack an objective, or are of other
                weights than earlier ones.
        """
        from optuna.trial import TrialState

        rows = [_ended(sweep, trial.number) for trial in batch]
        found = [[getattr(row, name) for name in self.search.objectives] for row in rows]
        good = [one for row, one in zip(rows, found, strict=True) if row.status == Status.OK]
        for place, name in enumerate(self.search.objectives):
            if good and all(one[place] is None for one in good):
                raise RecordError(
                    "search.objectives must be columns that the task fills, and task="
                    f"{rows[0].task} leaves {name} empty."
                )
        for trial, row, values in zip(batch, rows, found, strict=True):
            trial.set_user_attr("cell", row.run_id)
            if row.status == Status.OK and None not in values:
                self._check_weights(row)
                self._study.tell(trial, values)
            else:
                self._study.tell(trial, state=TrialState.FAIL)

    def _check_weights(self, row: Row) -> None:
        known = self._study.user_attrs.get("model_digest", row.model_digest)
        if known != row.model_digest:
            raise RecordError(
                f"all trials of a search must have the same weights, and {self.path} has trials of"
                " other ones; delete it, or give another experiment_name."
            )
        self._study.set_user_attr("model_digest", known)

    def record(self) -> dict[str, Any]:
        """Return what the sweep's folder keeps of the search for its report."""
        return {
            "objectives": list(self.search.objectives),
            "trials": self.search.trials,
            "knobs": {knob.name: knob.words for knob in self.knobs},
            "ended": [
                {
                    "trial": one.number,
                    "run_id": one.user_attrs["cell"],
                    "knobs": {knob.name: knob.text(one.params[knob.name]) for knob in self.knobs},
                }
                for one in self._trials()
                if one.state.is_finished()
            ],
        }

    def ending(self) -> str:
        """Return in words why the search has ended."""
        num_trials = len(self._trials())
        if num_trials < self.search.trials:
            return (
                f"search: it ends after {num_trials} trials, which are all combinations of its"
                " knobs' values"
            )
        return f"search: it ends after {num_trials} trials; a higher search.trials goes on"


def _shared(job: Job) -> dict[str, Any]:
    """Return the settings that all trials of a search must share."""
    settings = job.composed.settings
    task = {name: value for name, value in settings["task"].items() if name not in NOT_CONTENT}
    return {"model": settings["model"], "task": task}


def _searched(job: Job) -> dict[str, Any]:
    """Return the settings among which a search may choose, as far as they have an effect."""
    settings = job.composed.settings
    names = ("method", "protocol", "calibration") if job.composed.method.selects else ("method",)
    return {name: settings[name] for name in names}


def _ended(sweep: Sweep, trial: int) -> Row:
    """Return the row of a trial's cell as a whole: the mean over its sub-tasks."""
    name = sweep.trials().get(str(trial))
    rows = [] if name is None else sweep.store.cell(name).read()
    found = [row for row in rows if row.status != Status.INTERRUPTED]
    if not found:
        raise RecordError(
            f"all cells of a batch must have ended, and that of trial {trial} has not; run the"
            " command again, which goes on."
        )
    return next((row for row in found if row.subtask == "mean"), found[0])


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """Say in one sentence why a study cannot be used."""
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (OptunaError, SQLAlchemyError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise RecordError(
            f"the study {path} must be one of optuna's that can be written, got: {reason}; delete"
            " it and run the command again, which finds finished cells."
        ) from error
