"""The command ``topkbench``: compose a model, a task and a method, run them, record the results.

``run.py`` calls it in a checkout. Everything here can be imported by name, so that a process that
was started by a parallel launcher finds it.
"""

import contextlib
import copy
import difflib
import functools
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import filelock
import hydra
import psutil
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from topkbench.analysis.console import console, say, say_error
from topkbench.analysis.files import NotWritableError, Place, translate_os_error
from topkbench.analysis.record import (
    Cell,
    PartStore,
    RecordError,
    Row,
    Status,
    Sweep,
    identity,
)
from topkbench.analysis.stats import full_note, paired_columns
from topkbench.harness.commit import git_state
from topkbench.models.files import is_of_this_user

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
TEMPORARY = Place("temporary", "the environment variable TMPDIR")
PREFILL_FOLDER = "TOPKBENCH_PREFILL"
PREFILL_PREFIX = "topkbench-prefill-"
# Settings of a method that have a column of their own, or are no parameter of it.
NOT_PARAMETERS = {"_target_", "rbit", "seed", "impl", "native", "backend"}
# Settings of the policy, besides k, that distinguish cells.
POLICY_PARAMETERS = ("num_sink", "num_recent", "dense_layers", "head_scope", "aggregation")
REFUSED_STATUS = 2
"""Exit status of a command whose settings are wrong, so that nothing was run."""
# Settings that say where things are kept, not what is computed.
NOT_CONTENT = {"cache_dir"}
# Hydra's options that are followed by a value.
OPTIONS_WITH_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun"),
}


def progress(items: Sequence[Any], label: str) -> Iterable[Any]:
    """Show a progress bar over a sequence, where standard error is a terminal."""
    return tqdm(items, desc=label, disable=None, leave=False)


@dataclass
class Kept:
    """What a process keeps between the cells of one sweep.

    Attributes:
        models: Loaded models with the stores of their prefills, by configuration.
        fitted: Artifacts that were fitted again, by identity.
        done: Cells that have ended.
        reported: Errors that were printed.
        refused: Rows and logs of jobs whose settings were refused before any other job ran.
        has_begun: Whether a job's settings were accepted.
    """

    models: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    fitted: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)
    reported: set[str] = field(default_factory=set)
    refused: list[tuple[Row, str]] = field(default_factory=list)
    has_begun: bool = False

    def model_and_store(
        self, model_config: str, cache_dir: str, memory_gib: float | None
    ) -> tuple[Any, Any]:
        """Return a model, loaded once, and the store of its prefills.

        A sweep over models comes back to each of them, so loaded models are kept as long as there
        is memory for one more; else all of them are dropped before the next is loaded.
        """
        if model_config not in self.models:
            sizes = [loaded.model.get_memory_footprint() for loaded, _ in self.models.values()]
            if sizes and 4 * max(sizes) > psutil.virtual_memory().available:
                self.models.clear()
            self.models[model_config] = _load(model_config, cache_dir, memory_gib)
        return self.models[model_config]


@functools.lru_cache(maxsize=1)
def kept_in(folder: Path) -> Kept:
    """Return what this process keeps for the sweep of a folder; another sweep starts anew."""
    return Kept()


def _load(model_config: str, cache_dir: str, memory_gib: float | None) -> tuple[Any, Any]:
    from topkbench.harness.cell import environment
    from topkbench.harness.settings import Names, construct
    from topkbench.harness.sources import code_digest
    from topkbench.models.digests import model_digest
    from topkbench.models.prefill import PrefillStore

    loaded = construct(Names({}), "model", json.loads(model_config), cache_dir=cache_dir)
    folder = Path(os.environ[PREFILL_FOLDER])
    limit = None if memory_gib is None else int(memory_gib * 2**30)
    made_by = {
        "model": model_digest(loaded),
        "code": code_digest([PrefillStore.__module__]),
        **environment(loaded),
    }
    return loaded, PrefillStore(loaded.model, folder, limit, identity(made_by))


@functools.cache
def bandwidth(device: str) -> float:
    """Measure the machine's memory bandwidth once a process, in bytes a second."""
    from topkbench.kernels.timing import read_bandwidth

    return read_bandwidth(device).ceiling_gb_s * 1e9


def checked(config: DictConfig, given: Sequence[str] | None = None) -> Any:
    """Check a configuration before anything is loaded, and return the objects it stands for.

    Args:
        config: The composed configuration, without Hydra's own part.
        given: Names of the settings on the command line; None for those that Hydra read.

    Raises:
        SettingsError: If a setting is wrong.
    """
    from topkbench.harness.settings import Composed, SettingsError

    written: Any = OmegaConf.to_container(config)
    try:
        settings: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:  # a reference to what is not there
        raise SettingsError(sentence(error)) from error
    if given is None:
        given = [text.lstrip("+").split("=")[0] for text in HydraConfig.get().overrides.task]
    return Composed.of(written, settings, given)


class Run:
    """The objects of one composed configuration, and the keys that identify its results."""

    def __init__(self, config: DictConfig, composed: Any, kept: Kept) -> None:
        self.config, self.kept = config, kept
        self.settings = composed.settings
        self.appearance = composed.appearance
        self.method, self.policy = composed.method, composed.policy
        self.task, self.texts, self.tracker = composed.task, composed.texts, composed.tracker
        self.loaded, self.store = kept.model_and_store(
            json.dumps(self.settings["model"]),
            self.settings["cache_dir"],
            # Processes of a parallel launcher share prefills only through files.
            self.settings["prefill_memory_gib"] if runs_alone() else 0.0,
        )
        self.artifact = self._prepare(self.method)

    def _prepare(self, method: Any) -> Any:
        """Load the artifact that a method needs, fitted first if there is none, and return it."""
        from topkbench.harness.cell import prepare_method

        if not (self.task.uses_model and self.task.fits_methods):
            return None
        memory_gib = self.settings["calibration_memory_gib"]
        # Several cells use the same artifact; with force=true a process fits it once.
        name = identity({part: self.settings[part] for part in ("model", "method", "calibration")})
        refit = self.settings["force"] and self.task.refits and name not in self.kept.fitted
        self.kept.fitted.add(name)
        with tqdm(desc=f"{method.name} learns", disable=None, leave=False) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return prepare_method(
                self.loaded,
                method,
                self.texts,
                self.settings["artifact_dir"],
                show,
                None if memory_gib is None else int(memory_gib * 2**30),
                refit,
            )

    @functools.cached_property
    def payload(self) -> dict[str, Any]:
        """The settings that a result depends on, and digests of model, inputs and artifact."""
        import torch

        from topkbench.kernels.dispatch import OPERATORS, resolve
        from topkbench.models.attach import geometry_of
        from topkbench.models.digests import model_digest

        method = {**self.settings["method"]}
        channels = self.settings["task"].get("head_dim")  # of states that are of no model
        if self.task.uses_model:
            channels = geometry_of(self.loaded.model).head_dim
        read = (self.loaded.model.device, getattr(torch, self.dtype), channels)
        method["impl"] = {op: resolve(op, self.method.impl_for(op), *read) for op in OPERATORS}
        method["artifact"] = "" if self.artifact is None else self.artifact.digest
        protocol = {**self.settings["protocol"]} if self.method.selects else {}
        if protocol.get("protocol") != "native":
            method.pop("native", None)
        if self.task.all_budgets:
            protocol.pop("k", None)
        task = self.task_settings
        task["inputs"] = self.task.inputs_digest(self.loaded)
        model = {**self.settings["model"], "digest": model_digest(self.loaded)}
        if not self.task.uses_model:
            model = {"device": model["device"], "dtype": self.dtype}
        payload = {
            "model": model,
            "task": {name: value for name, value in task.items() if name not in NOT_CONTENT},
            "method": method,
            "protocol": protocol,
            "full_backend": self.settings["full_backend"],
        }
        if self.artifact is not None:
            payload["calibration"] = self.settings["calibration"]
        return payload

    @property
    def task_settings(self) -> dict[str, Any]:
        """The task's settings, with what the task uses where the configuration has null."""
        settings = dict(self.settings["task"])
        return settings | {
            name: value for name, value in self.task.decided().items() if name in settings
        }

    @functools.cached_property
    def prompts(self) -> str | None:
        """Where the task's prompts come from."""
        return self.task.prompts(self.loaded)

    @functools.cached_property
    def code(self) -> str:
        """Digest of the code that computes the cell: method, task, harness, models and kernels."""
        from topkbench.harness.sources import code_digest, modules_of

        # Every method is compared with full attention and timed alternately with it.
        full = OmegaConf.load(CONF / "method" / "full.yaml")._target_
        loader = self.settings["model"]["_target_"]
        named = {target.rpartition(".")[0] for target in (full, loader)}
        modules = {__name__, *named, *modules_of(self.method, self.policy, self.task)}
        return code_digest(modules)

    @functools.cached_property
    def keys(self) -> dict[str, str]:
        """The key of each part of the cell (answers, selections, speed): a digest of its inputs."""
        from topkbench.harness.cell import environment, libraries

        keys = {}
        for part, unused in self.task.parts.items():
            known = copy.deepcopy(self.payload)
            known |= {"part": part, "code": self.code, "libraries": libraries()}
            known["task"] = {name: one for name, one in known["task"].items() if name not in unused}
            if part == "speed":
                known["machine"] = environment(self.loaded)
            else:  # full attention's answers come from one backend, whichever one is timed
                known.pop("full_backend")
                known["method"].pop("backend", None)
            keys[part] = identity(known)
        return keys

    @property
    def dtype(self) -> str:
        """The dtype of the run's keys and values: the task's setting, or the model's dtype."""
        chosen = str(self.settings["task"].get("dtype", "auto"))
        return str(self.loaded.model.dtype).removeprefix("torch.") if chosen == "auto" else chosen

    @property
    def identity(self) -> str:
        """The cell's identity, the same in every process: a digest of its parts' keys."""
        return identity({"task": self.task.name, **self.keys})

    def row(self, full_run_id: str | None = None) -> Row:
        """Return a row with the columns that are known before anything has run."""
        from topkbench.harness.cell import environment

        method, task = self.settings["method"], self.task_settings
        selects = self.method.selects
        fitted_on = {"dtype": self.dtype}
        if self.artifact is not None:
            fitted_on["calibration"] = self.texts.name
        rules = {name: self.payload["protocol"].get(name) for name in POLICY_PARAMETERS}
        return Row(
            run_id=self.identity,
            status=Status.INTERRUPTED,
            reason="not ended.",
            model=self.loaded.name if self.task.uses_model else self.task.subject,
            task=self.task.name,
            subtask="mean",
            length=task.get("length"),
            method=self.method.name,
            **{f"method_{name}": value for name, value in self.appearance.items()},
            impl=implementations(self.payload["method"]["impl"]),
            full_backend=self.settings["full_backend"],
            protocol=self.policy.protocol if selects else None,
            question=task.get("question"),
            k=self.policy.k if selects and not self.task.all_budgets else None,
            rbit=method.get("rbit"),
            seed=self.settings["seed"],
            parameters={
                name: value if isinstance(value, str | int | float | None) else str(value)
                for name, value in {**rules, **fitted_on, **parameters(method)}.items()
            },
            artifact_digest=None if self.artifact is None else self.artifact.digest,
            artifact_code=self._artifact_code(),
            model_digest=self.payload["model"].get("digest"),
            code_digest=self.code,
            config_digest=identity(without_seeds(self.payload)),
            full_run_id=full_run_id,
            prompts=self.prompts,
            **self.task.sample_counts("mean"),
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            **environment(self.loaded),
            **git_state(ROOT),
        )

    def _artifact_code(self) -> str | None:
        """Compare the code that fitted the artifact with the present: same, other, unknown."""
        from topkbench.harness.cell import fit_source

        if self.artifact is None:
            return None
        recorded = self.artifact.provenance.get("source")
        if not recorded:
            return "unknown"
        return "same" if recorded == fit_source(self.method) else "other"

    def execute(
        self, full: "Run", full_cell: Cell | None, parts: PartStore
    ) -> tuple[list[Row], list[dict[str, Any]]]:
        """Run the cell; return its rows and samples."""
        from topkbench.harness.cell import peak_memory_mib, run_cell
        from topkbench.harness.task import Context

        known = self.row(full_cell.identity if full_cell is not None else None)
        compared = full_cell.samples() if full_cell is not None else None
        answers = None
        if compared is not None and "tokens" in compared:
            tokens = (json.loads(text) for text in compared["tokens"])
            answers = dict(zip(compared["sample_id"], tokens, strict=True))
        found: list[str] = []

        def keep(part: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            content = None if self.settings["force"] else parts.read(part, self.keys[part])
            if content is not None:
                found.append(part)
                return content
            content = compute()
            parts.write(part, self.keys[part], content)
            return content

        context = Context(
            loaded=self.loaded,
            store=self.store,
            method=self.method,
            policy=self.policy,
            full=full.method,
            full_answers=answers,
            bandwidth=bandwidth(str(self.loaded.model.device)),
            track=progress,
            artifact=self.artifact,
            keep=keep,
        )
        outcome = run_cell(context, self.task)
        scored = [one for one in outcome.samples if "score" in one]
        paired = paired_columns(scored, compared)
        full_rows = full_cell.read() if full_cell is not None else []
        # A part that was read from disk took no memory in this run.
        peak = None if found else peak_memory_mib(self.loaded.model.device)
        rows = [
            known.replace(
                status=part.status,
                reason=part.reason,
                subtask=part.subtask,
                reused=", ".join(found) or None,
                full_note=full_note(full_rows, part.subtask),
                **{
                    "peak_memory_mib": peak,
                    **dict.fromkeys(self.task.sample_counts("mean")),
                    **self.task.sample_counts(part.subtask),
                    **part.values,
                    **(paired.get(part.subtask, {}) if part.status == Status.OK else {}),
                },
            )
            for part in outcome.rows
        ]
        return rows, outcome.samples


def make_method(config: DictConfig) -> Any:
    """Return the method of a configuration's node ``method``.

    Args:
        config: Its settings with ``_target_``, and its label and colour, which are no settings.
    """
    from topkbench.harness.settings import Names, construct

    resolved: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return construct(Names({}), "method", resolved)


def parameters(method: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a method that have no column of their own.

    Those of a method inside a method are prefixed with its setting's name, as in ``base_rank``.
    """
    found: dict[str, Any] = {}
    for name, value in method.items():
        if isinstance(value, dict) and "_target_" in value:
            found[name] = value["_target_"].rpartition(".")[2]
            inner = {**parameters(value), **({"rbit": value["rbit"]} if "rbit" in value else {})}
            found |= {f"{name}_{key}": setting for key, setting in inner.items()}
        elif name not in NOT_PARAMETERS and not isinstance(value, dict):
            found[name] = value
    return found


def implementations(chosen: dict[str, str]) -> str:
    """Return the implementation of most operators, and which operators have another one."""
    kinds = list(chosen.values())
    common = max(sorted(set(kinds)), key=kinds.count)
    others = [op for op, kind in chosen.items() if kind != common]
    # Where an operator lacks the fast implementation, it runs the reference.
    return common + (f", {chosen[others[0]]}: {' '.join(others)}" if others else "")


def without_seeds(payload: dict[str, Any]) -> dict[str, Any]:
    """Return a payload without its seeds and what was drawn or fitted with them."""
    drawn = {"seed", "inputs", "artifact"}
    return {
        part: {name: value for name, value in settings.items() if name not in drawn}
        if isinstance(settings, dict)
        else settings
        for part, settings in payload.items()
    }


def compared_with(run: Run) -> Run:
    """Return full attention's run of the same model and task, with which every run is compared."""
    if not run.method.selects:
        return run
    config = copy.deepcopy(run.config)
    config.method = OmegaConf.load(CONF / "method" / "full.yaml")
    return Run(config, checked(config), run.kept)


def run_or_reuse(run: Run, sweep: Sweep) -> Cell:
    """Return a finished cell: found on disk or run now, one process at a time."""
    done = run.kept.done
    cell = sweep.store.cell(run.identity)
    sweep.append(cell.identity)
    full = compared_with(run)
    full_cell = None
    if run.task.needs_full and full is not run:
        full_cell = run_or_reuse(full, sweep)
    with cell.lock():
        # Several combinations of settings lead to one cell, which a process runs once, even if it
        # fails.
        ended = cell.identity in done or (cell.finished() and not run.settings["force"])
        if ended:
            if run.task.refits and cell.identity not in done:
                done.add(cell.identity)
                say(f"{describe(cell.read())}: found, and not fitted again")
            track(cell, run, sweep)
            return cell
        done.add(cell.identity)
        cell.begin(run.row())
        began = time.perf_counter()
        log: list[str] = []
        try:
            rows, samples = run.execute(full, full_cell, PartStore(sweep.results_dir))
        except (KeyboardInterrupt, NotWritableError):
            raise
        except Exception as error:  # the row says why the cell failed, and the sweep goes on
            log.append(traceback.format_exc())
            failed = run.row().replace(status=Status.FAILED, reason=sentence(error))
            rows, samples = [failed], []
        seconds = time.perf_counter() - began
        log.append(f"{describe(rows)}, {seconds:.1f} s")
        cell.write(rows, samples, run.settings, "\n".join(log))
        say(log[-1])
        for row in rows:
            if not row.status.settled:
                say_error(row.reason)
        track(cell, run, sweep)
    return cell


def track(cell: Cell, run: Run, sweep: Sweep) -> None:
    """Log a finished cell to the tracker, unless that was done; a killed process may not have."""
    if cell.tracked:
        return
    if run.tracker.log_cell(
        sweep.folder, sweep.title, cell.read(), cell.samples(), cell.config(), cell.attempt
    ):
        cell.mark_tracked()


def describe(rows: Sequence[Row]) -> str:
    """Return one line with a cell's settings and score or status."""
    top = next((row for row in rows if row.subtask == "mean"), rows[0])
    names = ("method", "k", "rbit", "protocol", "question")
    settings = [f"{name}={getattr(top, name)}" for name in names if getattr(top, name)]
    score = "" if top.score is None else f": score {top.score:.1f}"
    status = "" if top.status.value == "ok" else f": {top.status.value}"
    return " ".join((top.model, top.task, *settings)) + score + status


def sentence(error: BaseException) -> str:
    """Return an error's message in one line; of its cause, where Hydra wrapped it."""
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return text or type(error).__name__


def job(config: DictConfig) -> float | None:
    """Run one cell of a sweep, or the only one; return its score, for sweepers that ask."""
    from topkbench.harness.settings import SettingsError

    state = HydraConfig.get()
    folder = state.sweep.dir if state.mode == RunMode.MULTIRUN else state.run.dir
    # Hydra may have changed the working folder.
    sweep = Sweep(*map(hydra.utils.to_absolute_path, (folder, config.results_dir)))
    kept = kept_in(sweep.folder)
    try:
        composed = checked(config)
    except SettingsError as error:
        refuse(error, config, sweep, kept)
        return None
    kept.has_begun = True
    for row, log in kept.refused:
        write_refusal(row, log, sweep)
    kept.refused.clear()
    try:
        rows = run_or_reuse(Run(config, composed, kept), sweep).read()
    except NotWritableError as error:  # no other cell could be written either
        sys.exit(f"error: {error}")
    except Exception as error:
        # The model cannot be loaded, or the method not be fitted: a row says so, its log has the
        # traceback, and the sweep goes on.
        refuse(error, config, sweep, kept)
        return None
    return next((row.score for row in rows if row.subtask == "mean"), None)


def refuse(error: Exception, config: DictConfig, sweep: Sweep, kept: Kept) -> None:
    """Print once why a configuration cannot be run, and write a row with the same reason.

    The row waits for the first configuration that can be run, since a sweep without any leaves
    nothing behind. Processes of a parallel launcher know nothing of each other and do not wait.
    """
    reason = sentence(error)
    if reason not in kept.reported:
        kept.reported.add(reason)
        say_error(reason)
    written: Any = OmegaConf.to_container(config)
    whole: dict[str, Any] = {
        name: written.get(name) for name in ("k", "rbit") if type(written.get(name)) is int
    }
    choices = HydraConfig.get().runtime.choices
    chosen: dict[str, Any] = {name: str(choices[name]) for name in ("model", "task", "method")}
    # Axes of the sweep that the reason does not name make no rows of their own.
    run_id = identity({"refused": reason, "k": whole.get("k"), **chosen})
    row = Row(
        run_id=run_id,
        status=Status.FAILED,
        reason=reason,
        **chosen,
        subtask="mean",
        **whole,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        **git_state(ROOT),
    )
    log = "".join(traceback.format_exception(error))
    if kept.has_begun or not runs_alone():
        write_refusal(row, log, sweep)
    else:
        kept.refused.append((row, log))


def write_refusal(row: Row, log: str, sweep: Sweep) -> None:
    """Write the row of a configuration that cannot be run, once a sweep."""
    if row.run_id in sweep.identities():
        return
    cell = sweep.store.cell(row.run_id)
    with cell.lock():
        cell.begin(row)
        cell.write([row], [], {}, log)
    sweep.append(row.run_id)


def runs_alone() -> bool:
    """Return whether one process runs all jobs of the sweep."""
    target: str = HydraConfig.get().launcher._target_
    return target.endswith("BasicLauncher")


class NewFolders(Callback):
    """Notes which folders Hydra is about to make, to remove them if no cell was run."""

    noted: ClassVar[list[tuple[Path, Path]]] = []
    """Folders of runs and sweeps, each with the first of its parents that is there already."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note a single run's folder."""
        self._note(Path(config.hydra.run.dir).absolute())

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note a sweep's folder."""
        self._note(Path(config.hydra.sweep.dir).absolute())

    def _note(self, folder: Path) -> None:
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        self.noted.append((folder, there))

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


def unknown_option(text: str) -> str:
    """Return Hydra's message on an unknown setting, shortened, with the nearest name."""
    unknown = re.search(r"Key '(\w+)' is not in struct full_key: ([\w.]+)", text)
    if unknown is not None:
        key, place = unknown.groups()
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
    found = re.search(r"Could not find '(\w+)/([^']+)'", text)
    if found is None:
        return " ".join(text.split())
    group, name = found.groups()
    options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    near = difflib.get_close_matches(name, options, n=1)
    guess = f"; did you mean {near[0]}" if near else ""
    return f"{group} must be one of {', '.join(options)}, got {name!r}{guess}."


@contextlib.contextmanager
def prefill_folder() -> Iterator[None]:
    """Make a private temporary folder for prefills that do not fit into memory.

    All processes of a sweep use it. It is locked while the sweep runs, so that the next sweep can
    tell, and remove, the folder that a killed one left behind.
    """
    if PREFILL_FOLDER in os.environ:  # set by the parent process, or by the user
        yield
        return
    with translate_os_error(Path(os.environ.get("TMPDIR", "/tmp")), TEMPORARY):
        temporary = Path(tempfile.gettempdir())
    for left in temporary.glob(f"{PREFILL_PREFIX}*"):
        with contextlib.suppress(OSError, filelock.Timeout):
            if left.is_symlink() or not is_of_this_user(left.stat()):
                continue
            with filelock.FileLock(left / "in use", timeout=0):
                shutil.rmtree(left, ignore_errors=True)
    # It gets the name by which others find it once it is locked.
    made = Path(tempfile.mkdtemp(prefix=f".{PREFILL_PREFIX}", dir=temporary))
    with filelock.FileLock(made / "in use"):
        folder = made.rename(made.with_name(made.name[1:]))
        os.environ[PREFILL_FOLDER] = str(folder)
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


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


def main() -> None:
    """Run the command; a user's mistake ends it with one sentence instead of a traceback."""
    with console():
        run_command()


def run_command() -> None:
    """Run the command that ``sys.argv`` gives."""
    if "--version" in sys.argv[1:]:
        say(f"topkbench {own_version()}, Hydra {hydra.__version__}")
        return
    sys.argv[1:] = settings_first(sys.argv[1:])
    # Hydra then raises the original error, which is printed below in one line.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module="hydra")
    wrapped = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    try:
        with prefill_folder():
            wrapped(job)()
        if any(kept_in(folder).refused for folder, _ in NewFolders.noted):
            sys.exit(REFUSED_STATUS)  # each job said why
    except (HydraException, OmegaConfBaseException) as error:
        say_error(unknown_option(sentence(error)))
        sys.exit(REFUSED_STATUS)
    except BrokenPipeError:
        raise  # of a print: nobody reads the output any more
    except (OSError, RecordError) as error:
        sys.exit(f"error: {sentence(error)}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; what has ended is kept, and the same command goes on.")
    finally:
        NewFolders.remove_unused()
        kept_in.cache_clear()  # a second sweep of this process starts anew


def own_version() -> str:
    """Return topkbench's version, as it is installed."""
    try:
        return version("topkbench")
    except PackageNotFoundError:
        return "of a checkout that is not installed"
