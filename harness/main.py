"""The command ``topkbench``: compose a model, a task and a method, run them, record the results.

``run.py`` calls it in a checkout. Hydra composes one configuration for each cell, and its job
function only collects them; they run when Hydra has returned.
"""

import contextlib
import difflib
import functools
import gc
import itertools
import json
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, RangeSweep
from hydra.errors import HydraException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from topkbench.analysis.console import console, say, say_error, visible
from topkbench.analysis.record.files import (
    RESULTS,
    NotWritableError,
    Place,
    check_writable,
    keep_off_read_only_home,
    remove_left_over,
)
from topkbench.analysis.record.store import (
    RecordError,
    Sweep,
    check_experiment_name,
    checked_results_dir,
)
from topkbench.harness.huge_pages import ask_for_huge_pages

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
REFUSED_STATUS = 2
"""Exit status of a command whose settings are wrong, so that nothing was run."""
ONE_PER_SWEEP = ("results_dir", "experiment_name", "launcher", "card", "tracker", "report")
"""Settings and groups that are those of a sweep, not of a cell."""
# Hydra's options that are followed by a value.
OPTIONS_WITH_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun"),
}


@dataclass
class Collected:
    """What Hydra composed: the jobs of a sweep, and those whose settings are wrong.

    Attributes:
        jobs: The jobs, as ``runner.Job``.
        refused: The configurations with a wrong setting, as ``runner.Refused``.
        composer: Composes further configurations, for a search; None before the first job.
        sweep: The sweep; None before the first job.
        report: Makes the report; None before the first job without a wrong setting.
        tracker: Where the sweep is copied to: the first job's; likewise.
        runner: Runs the jobs, as ``runner.Runner``; None before the first one runs.
        is_plan: Whether the command says what the jobs would cost, and runs none of them.
    """

    jobs: list[Any] = field(default_factory=list)
    refused: list[Any] = field(default_factory=list)
    composer: Any = None
    sweep: Sweep | None = None
    report: Any = None
    tracker: Any = None
    runner: Any = None
    is_plan: bool = False


@functools.cache
def collected() -> Collected:
    """Return what Hydra has composed in this command."""
    return Collected()


def checked(config: DictConfig, given: Sequence[str] | None = None) -> Any:
    """Check a configuration before anything is loaded, and return the objects it stands for.

    Args:
        config: The composed configuration, without Hydra's own part.
        given: Names of the settings on the command line; None for those that Hydra read.

    Raises:
        SettingsError: If a setting is wrong.
    """
    from topkbench.harness.settings import Composed, Names, SettingsError

    written: Any = OmegaConf.to_container(config)
    Names(written).check_references()
    try:
        settings: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:  # of a resolver, such as oc.env
        raise SettingsError(in_our_words(sentence(error))) from error
    return Composed.of(written, settings, names_given() if given is None else given)


def names_given() -> list[str]:
    """Return the names of the settings on the command line that Hydra read, without axes."""
    state = HydraConfig.get()
    given = [text.lstrip("+").split("=")[0] for text in state.overrides.task]
    if state.mode == RunMode.MULTIRUN:  # an axis is dropped where it has no effect
        given = [name for name in given if name not in (state.sweeper.get("params") or ())]
    return given


def make_method(config: DictConfig) -> Any:
    """Return the method of a configuration's node ``method``.

    Args:
        config: Its settings with ``_target_``, and its label and colour, which are no settings.
    """
    from topkbench.harness.settings import Names, construct

    resolved: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return construct(Names({}), "method", resolved)


def sentence(error: BaseException) -> str:
    """Return an error's message in one line; of its cause, where Hydra wrapped it."""
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return text or type(error).__name__


def job_of(
    config: DictConfig,
    choices: Mapping[str, str],
    given: Sequence[str] | None = None,
    trial: int | None = None,
) -> Any:
    """Check a configuration; return it as ``runner.Job``, or as ``Refused`` if a setting is wrong.

    Args:
        config: The composed configuration, without Hydra's own part.
        choices: The option chosen in each group.
        given: As in `checked`.
        trial: Number of the trial that it is in a search.
    """
    from topkbench.harness.runner import Job, Refused
    from topkbench.harness.settings import SettingsError

    try:
        composed = full = checked(config, given)
        composed.check_task_takes_method()
        composed.check_launcher()
        if composed.method.selects:
            config.method = OmegaConf.load(CONF / "method" / "full.yaml")
            full = checked(config, given)
    except SettingsError as error:
        written: Any = OmegaConf.to_container(config)
        return Refused(error, choices, written, trial)
    return Job(composed, full, choices, trial)


def choices_among(chosen: Mapping[str, Any]) -> dict[str, str]:
    """Return the chosen model, task and method among all that Hydra has chosen."""
    # A group is no choice where a user's own configuration leaves it out.
    return {name: str(chosen.get(name)) for name in ("model", "task", "method")}


class Composer:
    """Composes further configurations while a command runs, as `search.Composer` describes it.

    It must be made while Hydra composes the command's own.
    """

    def __init__(self) -> None:
        state = HydraConfig.get()
        self._loader = GlobalHydra.instance().config_loader()
        self._name = state.job.config_name
        self._overrides = [*state.overrides.hydra, *state.overrides.task]
        self._given = names_given()
        self._chosen = choices_among(state.runtime.choices)

    def job(self, overrides: Sequence[str], trial: int | None = None) -> Any:
        from topkbench.harness.runner import Refused
        from topkbench.harness.settings import SettingsError

        try:
            config = self._loader.load_configuration(
                self._name, [*self._overrides, *overrides], RunMode.RUN, from_shell=False
            )
        except HydraException as error:
            return Refused(SettingsError(in_our_words(sentence(error))), self._chosen, {}, trial)
        chosen = choices_among(config.hydra.runtime.choices)
        with open_dict(config):
            del config["hydra"]
        names = [text.split("=")[0] for text in overrides]
        return job_of(config, chosen, [*self._given, *names], trial)

    def knobs(self, values: Mapping[str, Any]) -> list[Any]:
        from topkbench.harness.settings import SettingsError

        found = [self._knob(*one) for one in values.items() if one[0] not in self._given]
        if not found:
            raise SettingsError(
                "search.knobs must have a setting that the command line gives no value, got"
                f" {', '.join(values)}."
            )
        return found

    def _knob(self, name: str, values: Any) -> Any:
        from topkbench.harness.search import Choice, Interval
        from topkbench.harness.settings import SettingsError

        text = values if isinstance(values, str) else ",".join(map(json.dumps, values))
        try:
            override = OverridesParser.create(self._loader).parse_override(f"{name}={text}")
        except HydraException as error:
            raise SettingsError(
                f"search.knobs.{name} must be values that Hydra can read, as in 32,64 or"
                f" range(16,513,16), got {values!r}."
            ) from error
        sweep: Any = override.value()
        if isinstance(sweep, IntervalSweep):
            low, high, log = sweep.start or 0, sweep.end or 0, "log" in sweep.tags
            if log and low <= 0:
                raise SettingsError(
                    f"search.knobs.{name} must begin above 0 to be logarithmic, got {values!r}."
                )
            if low < high:
                return Interval(name, low, high, log=log)
        if override.is_discrete_sweep():
            several = list(dict.fromkeys(override.sweep_string_iterator()))
            if len(several) > 1 and isinstance(sweep, RangeSweep):
                whole: Any = sorted(override.sweep_iterator())
                if all(isinstance(one, int) for one in whole):
                    return Interval(name, whole[0], whole[-1], whole[1] - whole[0])
            if len(several) > 1:
                return Choice(name, tuple(several))
        raise SettingsError(f"search.knobs.{name} must be several values, got {values!r}.")


def job(config: DictConfig) -> float | None:
    """Collect one composed configuration.

    A sweeper that asks for scores (``hydra/sweeper=`` another than basic) has each cell run at
    once, and gets its score.
    """
    from topkbench.harness.runner import Job, Refused
    from topkbench.harness.settings import SettingsError

    state, commanded = HydraConfig.get(), collected()
    if not state.launcher._target_.endswith("BasicLauncher"):
        say_error(own_launcher(state.runtime.choices["hydra/launcher"]))
        raise SystemExit(REFUSED_STATUS)  # Hydra prints lines of its own about an error
    is_basic = state.sweeper._target_.endswith("BasicSweeper")
    if commanded.is_plan and not is_basic:  # its next cells depend on the scores of the last
        say_error("topkbench plan needs hydra/sweeper=basic, which names all cells beforehand.")
        raise SystemExit(REFUSED_STATUS)
    folder = state.sweep.dir if state.mode == RunMode.MULTIRUN else state.run.dir
    # Hydra may have changed the working folder.
    commanded.sweep = Sweep(*map(hydra.utils.to_absolute_path, (folder, config.results_dir)))
    is_for_card = state.runtime.choices.get("card", "none") != "none"
    if is_for_card and not commanded.is_plan:
        say_error("card has an effect on topkbench plan alone; leave it out, or begin with plan.")
        raise SystemExit(REFUSED_STATUS)
    if commanded.is_plan and state.runtime.choices.get("search", "none") != "none":
        say_error(
            "a search chooses its trials as it goes, so they cannot be planned; plan the same"
            " command with search=none, which is one of them."
        )
        raise SystemExit(REFUSED_STATUS)
    if is_for_card:  # the device at hand and its kernels are not the card's
        config.device, config.impl, config.full_backend = "cpu", "auto", "auto"
    composed = job_of(config, choices_among(state.runtime.choices))
    gc.enable()
    if isinstance(composed, Job):
        commanded.composer = commanded.composer or Composer()
        try:
            composed.composed.search.check(composed, commanded.composer)
        except SettingsError as error:
            composed = Refused(error, composed.choices, composed.composed.settings)
    if isinstance(composed, Refused):
        commanded.refused.append(composed)
        return None
    commanded.jobs.append(composed)
    commanded.report = composed.composed.report
    if is_basic:
        return None
    return run_collected()


def run_collected() -> float | None:
    """Run the jobs collected so far; return the score of the last one's cell."""
    from topkbench.harness.runner import Runner

    commanded = collected()
    if commanded.sweep is None:
        return None
    sweep = commanded.sweep
    if commanded.tracker is None and commanded.jobs:
        composed = [job.composed for job in commanded.jobs]
        commanded.tracker = composed[0].tracker
        commanded.tracker.begin_sweep(
            sweep.folder,
            sweep.title,
            command_line(),
            [one.named for one in composed],
            composed[0].given,
        )
    if commanded.runner is None or commanded.runner.sweep.folder != sweep.folder:
        commanded.runner = Runner(sweep, commanded.tracker)
    runner = commanded.runner
    jobs, commanded.jobs = commanded.jobs, []
    refused, commanded.refused = commanded.refused, []
    if not jobs and commanded.report is None:  # no configuration of the command can run
        for one in refused:
            runner.say_once(one.error)
        commanded.refused = refused
        return None
    for one in refused:
        runner.refuse(one.error, one.choices, one.settings)
    if not jobs:
        return None
    score: float | None = jobs[0].composed.search.run(runner, jobs, commanded.composer)
    return score


def plan_collected() -> None:
    """Say what the collected jobs would cost."""
    from topkbench.harness.plan import Planner

    commanded = collected()
    if not commanded.jobs:
        for reason in dict.fromkeys(sentence(one.error) for one in commanded.refused):
            say_error(reason)
        sys.exit(REFUSED_STATUS)
    assert commanded.sweep is not None
    refused = [sentence(one.error) for one in commanded.refused]
    say(Planner(commanded.sweep, commanded.jobs, refused).plan())


class SweepFolders(Callback):
    """Checks the folders that are written, and removes Hydra's folders if no cell was run."""

    noted: ClassVar[list[tuple[Path, Path]]] = []
    """Folders of runs and sweeps, each with the first of its parents that is there already."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check and note a single run's folder."""
        self._begin(config, "hydra.run.dir", config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check and note a sweep's folder."""
        if OmegaConf.select(config, "hydra.runtime.choices.search", default="none") != "none":
            say_error("a search starts from one configuration, and -m makes several; leave -m out.")
            raise SystemExit(REFUSED_STATUS)
        for text in config.hydra.overrides.task:
            name, _, value = str(text).lstrip("+").partition("=")
            if name in ONE_PER_SWEEP and "," in value:
                say_error(f"{name} must be the same for all cells of a sweep, got {text}.")
                raise SystemExit(REFUSED_STATUS)
        self._begin(config, "hydra.sweep.dir", config.hydra.sweep.dir)

    def _begin(self, config: DictConfig, setting: str, named: str) -> None:
        folder = Path(named).absolute()
        try:
            results = checked_results_dir(config.results_dir)
            check_experiment_name(str(config.experiment_name))  # its type is checked later
            if not named.strip():  # it would be the working folder
                raise RecordError(f"{setting} must name a folder, got {named!r}.")
            inside = results.absolute() in folder.parents
            check_writable(folder, RESULTS if inside else Place("sweep", f"{setting}=PATH"))
            Sweep(folder, results).identities()  # a list of cells that is there can be read
        except RecordError as error:
            say_error(error)
            status = 1 if isinstance(error, NotWritableError) else REFUSED_STATUS
            raise SystemExit(status) from None
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        self.noted.append((folder, there))
        cache = Path(config.cache_dir).expanduser()
        for written in (results, cache):
            remove_left_over(written)
        keep_off_read_only_home(cache)

    @classmethod
    def remove_unused(cls) -> None:
        """Remove noted folders in which no cell was run; whatever else is in them stays."""
        while cls.noted:
            folder, there = cls.noted.pop()
            if (folder / "cells.json").exists():
                continue
            with contextlib.suppress(OSError):
                if folder != there:
                    (folder / "multirun.yaml").unlink()  # Hydra's
            with contextlib.suppress(OSError):
                (folder / "jobs").rmdir()
            with contextlib.suppress(OSError):  # not empty
                while folder != there:
                    folder.rmdir()
                    folder = folder.parent


_validate_batch = Sweeper.validate_batch_is_legal


def validate_batch(sweeper: Sweeper, batch: Sequence[Sequence[str]]) -> None:
    """Compose the jobs of a batch to find a mistake before the first one runs, as Hydra does.

    They are then composed again to run. With Hydra's own sweeper none runs before all are composed,
    so that once is enough.
    """
    if type(sweeper).__name__ != "BasicSweeper":
        _validate_batch(sweeper, batch)


def own_launcher(name: str) -> str:
    """Return in one sentence what to use in place of a launcher of Hydra's."""
    options = ", ".join(sorted(path.stem for path in (CONF / "launcher").glob("*.yaml")))
    return (
        f"hydra/launcher must be basic, got {name!r}: cells share prompts, and Hydra's launchers"
        f" run each by itself; launcher= says where a sweep runs ({options})."
    )


def in_our_words(text: str) -> str:
    """Return a message of Hydra's in the command's words, with the nearest name if there is one."""
    resolved = re.search(r"raised while resolving interpolation: (.+) full_key: ([\w.]+)", text)
    if resolved is not None:
        return f"{resolved[2]} must refer to what is there, got: {resolved[1]}."
    missing = re.search(r"Interpolation key '([\w.]+)' not found", text)
    missing = missing or re.search(r"Missing mandatory value: ([\w.]+)", text)
    if missing is not None:
        return f"{missing[1]} must be given, as other settings refer to it."
    merged = re.search(r"Cannot merge .* full_key: ([\w.]+) object_type=(\w+)", text)
    if merged is not None:
        words = "a mapping", "a list"
        wanted, got = words if merged[2] == "dict" else words[::-1]
        return f"{merged[1]} must be {wanted}, got {got}."
    unknown = re.search(r"Key '([\w.]+)' is not in struct full_key: ([\w.]+)", text)
    if unknown is not None:
        key, place = unknown.groups()
        if place.startswith("search.knobs."):
            return (
                f"{place} is not among the knobs; + adds a setting, as in"
                " '+search.knobs.NAME=[VALUE,VALUE]'."
            )
        group, _, _ = place.rpartition(".")
        files = sorted((CONF / group).glob("*.yaml"))
        names = {file.stem: {str(name) for name in OmegaConf.load(file)} for file in files}
        if not group:  # the groups themselves stand in no file
            names["groups"] = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
        owners = [option for option, known in names.items() if key in known]
        if owners:
            return f"there is no setting {place} here; {group}={' or '.join(owners)} has it."
        near = difflib.get_close_matches(key, sorted(set().union(*names.values())), n=1)
        guess = f"; did you mean {f'{group}.' if group else ''}{near[0]}" if near else ""
        return f"there is no setting {place}{guess}."
    found = re.search(r"Could not find '([\w/]+)/([^']*)'", text)
    if found is None:
        return " ".join(text.split())
    group, name = found.groups()
    options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    if group == "hydra/launcher":
        return own_launcher(name)
    if not options:  # a group of Hydra's
        return f"there is no option {group}={name}."
    near = difflib.get_close_matches(name, options, n=1)
    guess = f"; did you mean {near[0]}" if near else ""
    return f"{group} must be one of {', '.join(options)}, got {name!r}{guess}."


def check_overrides(arguments: Sequence[str]) -> None:
    """Check the settings of a command line that Hydra would refuse in words of its own.

    Args:
        arguments: The settings and options, settings first.

    Raises:
        ValueError: If a setting cannot be read, or names anything but one option of a group.
    """
    known = set(get_args_parser()._option_string_actions)
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("-") and name not in known:
            raise ValueError(
                f"there is no option {name}; a setting has no dashes (NAME=VALUE), and --help lists"
                " the options."
            )
    groups = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
    is_sweep = any(one in ("-m", "--multirun") or "hydra.mode=" in one for one in arguments)
    for text in itertools.takewhile(lambda one: not one.startswith("-"), arguments):
        name, equals, value = text.partition("=")
        if name in ("", "~") or not (equals or text.startswith("~")):
            raise ValueError(f"a setting must be NAME=VALUE, got {text!r}.")
        try:
            (one,) = OverridesParser.create().parse_overrides([text])
        except OverrideParseException as error:
            raise ValueError(
                f"{name} must be NAME=VALUE with a value that Hydra can read, got"
                f" {text!r}; quotes inside quotes make any value text: '{name}=\"{value}\"'."
            ) from error
        if one.is_sweep_override() and not is_sweep:
            raise ValueError(
                f"{name} must be one value, got {text}; -m runs a sweep over several values, and"
                f" brackets make a list: '{name}=[{value}]'."
            )
        if one.key_or_group not in groups:
            continue
        chosen = list(one.sweep_iterator()) if one.is_sweep_override() else [one.value()]
        if one.is_delete() or not all(isinstance(option, str) and option for option in chosen):
            raise ValueError(
                f"{one.key_or_group} must name one option, as in {one.key_or_group}=NAME, got"
                f" {text}; with -m, commas separate several."
            )


def settings_first(arguments: Sequence[str]) -> list[str]:
    """Put settings before options: Hydra's parser allows no option between two settings.

    Args:
        arguments: What follows the command's name.
    """
    settings: list[str] = []
    options: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith("-"):
            settings.append(argument)
            continue
        options.append(argument)
        if argument in OPTIONS_WITH_VALUE:
            options += itertools.islice(waiting, 1)
    return settings + options


class Terminated(KeyboardInterrupt):
    """The process was asked to end, as a batch system does before it takes a machine back.

    Args:
        number: The signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number  # as a shell reports it


def _terminate(number: int, frame: object) -> None:
    raise Terminated(number)


def main() -> None:
    """Run the command; a user's mistake ends it with one sentence instead of a traceback."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _terminate)
    with console():
        run_command()


def run_command() -> None:
    """Run the command that ``sys.argv`` gives."""
    if "--version" in sys.argv[1:]:
        say(f"topkbench {own_version()}, Hydra {hydra.__version__}")
        return
    reads_results = command_on_results(sys.argv[1] if sys.argv[1:] else "")
    if reads_results is not None:
        sys.exit(reads_results(sys.argv[2:]))
    is_plan = sys.argv[1:2] == ["plan"]
    sys.argv[1:] = settings_first(sys.argv[2:] if is_plan else sys.argv[1:])
    # Hydra then raises the original error, which is printed below in one line.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    ask_for_huge_pages()
    gc.disable()  # until the first job has imported all that runs it, of which nothing is garbage
    warnings.filterwarnings("ignore", module="hydra")
    Sweeper.validate_batch_is_legal = validate_batch  # type: ignore[assignment, method-assign]
    wrapped = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    collected.cache_clear()  # a second command of this process starts anew
    collected().is_plan = is_plan
    try:
        try:
            check_overrides(sys.argv[1:])
            wrapped(job)()
        except (HydraException, OmegaConfBaseException, RecordError):
            raise
        except ValueError as error:  # a setting of Hydra's own
            say_error(sentence(error))
            sys.exit(REFUSED_STATUS)
        if is_plan:
            plan_collected()
            return
        run_collected()
        commanded = collected()
        if commanded.report is not None:
            status = commanded.report.finish(commanded.sweep, command_line(), commanded.tracker)
            if status:
                sys.exit(status)
        elif commanded.refused:
            sys.exit(REFUSED_STATUS)  # each job said why
    except (HydraException, OmegaConfBaseException) as error:
        say_error(in_our_words(sentence(error)))
        sys.exit(REFUSED_STATUS)
    except BrokenPipeError:
        raise  # of a print: nobody reads the output any more
    except (OSError, RecordError) as error:
        sys.exit(f"error: {visible(sentence(error))}")
    except KeyboardInterrupt as error:
        if is_plan:
            say_error("interrupted; a plan measures anew each time.")
            sys.exit(error.status if isinstance(error, Terminated) else 1)
        how = " without force=true" if re.search(r"(?i)\bforce=true", " ".join(sys.argv)) else ""
        say_error(f"interrupted; what was measured is kept, and the same command{how} goes on.")
        sys.exit(error.status if isinstance(error, Terminated) else 1)
    finally:
        gc.enable()
        SweepFolders.remove_unused()


def command_on_results(name: str) -> Callable[[Sequence[str]], int] | None:
    """Return the command of a name that reads results alone, or None if there is none.

    It needs neither Hydra nor torch, and returns the exit status.
    """
    if name == "samples":
        from topkbench.analysis.report.samples_command import main as show_samples

        return show_samples
    if name == "compare":
        from topkbench.analysis.report.compare_command import main as compare_results

        return compare_results
    if name == "export":
        from topkbench.analysis.export.export_command import main as export_results

        return export_results
    return None


def command_line() -> str:
    """Return the command line as it was given, quoted for a shell."""
    program = Path(sys.argv[0])
    start = ["python", program.name] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])


def own_version() -> str:
    """Return topkbench's version, as it is installed."""
    try:
        return version("topkbench")
    except PackageNotFoundError:
        return "of a checkout that is not installed"
