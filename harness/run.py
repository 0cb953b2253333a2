"""A cell of a sweep: its configuration on a loaded model, its identity and its rows."""

import copy
import functools
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from topkbench.analysis.comparison.stats import full_note, paired_columns, window_columns
from topkbench.analysis.record.store import Cell, Row, Status, identity
from topkbench.harness.artifact import Artifact
from topkbench.harness.cell import environment, fit_source, libraries
from topkbench.harness.commit import git_state
from topkbench.harness.settings import Composed
from topkbench.harness.sources import ROOT, code_digest, modules_of
from topkbench.harness.task import TIMED, Context, Outcome
from topkbench.kernels.dispatch import OPERATORS, resolve
from topkbench.methods.base import AnyMethod
from topkbench.models.attach import geometry_of
from topkbench.models.digests import model_digest
from topkbench.models.load import LoadedModel
from topkbench.models.prefill_store import PrefillStore

# Settings of a method that have a column of their own, or are no parameter of it.
NOT_PARAMETERS = {"_target_", "rbit", "seed", "impl", "native", "backend"}
# Settings of the policy, besides k, that distinguish cells.
POLICY_PARAMETERS = ("num_sink", "num_recent", "dense_layers", "head_scope", "aggregation")
# Settings that say where things are kept, not what is computed.
NOT_CONTENT = {"cache_dir"}


class Run:
    """A cell: one configuration on a loaded model, and the keys that identify its results."""

    def __init__(
        self,
        composed: Composed,
        full: AnyMethod,
        loaded: LoadedModel,
        artifact: Artifact | None,
        started_at: str | None = None,
    ) -> None:
        """Hold what a cell is made of.

        Args:
            composed: The checked configuration.
            full: Full attention, with which the method is compared and timed alternately.
            loaded: The model.
            artifact: What the method has learned, loaded into it; None if it learns nothing.
            started_at: When the cell began, ISO 8601 in UTC; None for when its row is first asked
                for.
        """
        self._started_at = started_at
        self.composed = composed
        self.settings = composed.settings
        self.policy, self.task = composed.policy, composed.task
        self.loaded, self.artifact = loaded, artifact
        place = (loaded.model.device, getattr(torch, self.dtype))
        self.full, self.method = full.on(*place), composed.method.on(*place)

    @property
    def full_backend(self) -> str | None:
        """The backend of the full attention that is timed; None if it has none."""
        return getattr(self.full if self.method.selects else self.method, "backend", None)

    @functools.cached_property
    def started_at(self) -> str:
        """When the cell began, ISO 8601 in UTC."""
        return self._started_at or now()

    @functools.cached_property
    def payload(self) -> dict[str, Any]:
        """The settings that a result depends on, and digests of model, inputs and artifact."""
        method = {**self.settings["method"]}
        channels = self.settings["task"].get("head_dim")  # of states that are of no model
        if self.task.uses_model:
            channels = geometry_of(self.loaded.model).head_dim
        read = (self.loaded.model.device, getattr(torch, self.dtype), channels)
        method["impl"] = {op: resolve(op, self.method.impl_for(op), *read) for op in OPERATORS}
        method["artifact"] = "" if self.artifact is None else self.artifact.digest
        if "backend" in method:
            method["backend"] = self.full_backend
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
            "full_backend": self.full_backend,
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
        return code_of(self.composed, self.full)

    @functools.cached_property
    def keys(self) -> dict[str, str]:
        """The key of each part of the cell (answers, selections, speed): a digest of its inputs."""
        keys = {}
        for part, unused in self.task.parts.items():
            known = copy.deepcopy(self.payload)
            known |= {"part": part, "code": self.code, "libraries": libraries()}
            known["task"] = {name: one for name, one in known["task"].items() if name not in unused}
            if part == TIMED:
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
        method, task = self.settings["method"], self.task_settings
        selects = self.method.selects
        fitted_on: dict[str, str | int] = {"dtype": self.dtype}
        if self.artifact is not None:
            texts = self.composed.texts
            fitted_on["calibration"] = texts.name
            fitted_on["calibration_sequences"] = texts.num_sequences
            fitted_on["calibration_length"] = min(texts.max_length, self.loaded.window)
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
            **{f"method_{name}": value for name, value in self.composed.appearance.items()},
            impl=implementations(self.payload["method"]["impl"]),
            full_backend=self.full_backend,
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
            config_digest=identity(comparable(self.payload)),
            full_run_id=full_run_id,
            prompts=self.prompts,
            **self.task.sample_counts("mean"),
            started_at=self.started_at,
            **environment(self.loaded),
            **git_state(ROOT),
        )

    def _artifact_code(self) -> str | None:
        """Compare the code that fitted the artifact with the present: same, other, unknown."""
        if self.artifact is None:
            return None
        recorded = self.artifact.provenance.get("source")
        if not recorded:
            return "unknown"
        return "same" if recorded == fit_source(self.method) else "other"

    def context(self, store: PrefillStore, full_answers: dict[str, list[int]]) -> Context:
        """Return what the task needs to run the cell.

        Args:
            store: The model's prefills.
            full_answers: Full attention's answer tokens by sample id, as far as they are known.
        """
        return Context(
            loaded=self.loaded,
            store=store,
            method=self.method,
            policy=self.policy,
            full=self.full,
            full_answers=full_answers,
            track=progress,
            artifact=self.artifact,
        )

    def rows(
        self,
        outcome: Outcome,
        full_cell: Cell | None,
        found: Sequence[str] = (),
        peak_memory_mib: float | None = None,
    ) -> list[Row]:
        """Return the rows of what a task returned.

        Args:
            outcome: The task's rows and samples.
            full_cell: Full attention's finished cell; None if this cell is full attention's, or is
                not compared.
            found: The parts that were not measured in this run.
            peak_memory_mib: Peak memory of the cell, if all of it was measured in this run.
        """
        known = self.row(full_cell.identity if full_cell is not None else None)
        compared = full_cell.samples() if full_cell is not None else None
        scored = [one for one in outcome.samples if "score" in one]
        paired = paired_columns(scored, compared)
        if self.method.selects and outcome.samples and "nll" in outcome.samples[0]:
            paired = {"mean": {**window_columns(outcome.samples)}}
        full_rows = full_cell.read() if full_cell is not None else []
        return [
            known.replace(
                status=part.status,
                reason=part.reason,
                subtask=part.subtask,
                reused=", ".join(found) or None,
                full_note=full_note(full_rows, part.subtask),
                **{
                    "peak_memory_mib": peak_memory_mib,
                    **dict.fromkeys(self.task.sample_counts("mean")),
                    **self.task.sample_counts(part.subtask),
                    **part.values,
                    **(paired.get(part.subtask, {}) if part.status == Status.OK else {}),
                },
            )
            for part in outcome.rows
        ]


def code_of(composed: Composed, full: AnyMethod) -> str:
    """Return a digest of the code that computes a cell, as ``Run.code`` describes it.

    Args:
        composed: The cell's configuration.
        full: Full attention, with which every method is compared and timed alternately.
    """
    loader = composed.settings["model"]["_target_"].rpartition(".")[0]
    made = modules_of(composed.method, composed.policy, composed.task, full)
    return code_digest({__name__, loader, *made})


def answers_in(samples: pd.DataFrame) -> dict[str, list[int]]:
    """Return the answer tokens of a cell's samples by sample id; empty if it has none."""
    if "tokens" not in samples:
        return {}
    return dict(zip(samples["sample_id"], samples["tokens"], strict=True))


def progress(items: Sequence[Any], label: str) -> Iterable[Any]:
    """Show a progress bar over a sequence, where standard error is a terminal."""
    return tqdm(items, desc=label, disable=None, leave=False)


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


def comparable(payload: dict[str, Any]) -> dict[str, Any]:
    """Return a payload without its seeds, what was drawn or fitted with them, and its sub-tasks.

    Cells that differ in no more are pooled, or parts of one sweep.
    """
    left_out = {"seed", "inputs", "artifact", "subtasks"}
    return {
        part: {name: value for name, value in settings.items() if name not in left_out}
        if isinstance(settings, dict)
        else settings
        for part, settings in payload.items()
    }


def now() -> str:
    """Return the time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def describe(rows: Sequence[Row]) -> str:
    """Return one line with a cell's settings and score or status."""
    top = next((row for row in rows if row.subtask == "mean"), rows[0])
    score = "" if top.score is None else f": score {top.score:.1f}"
    score += "" if top.nll is None else f": {top.nll:.4f} nats per token"
    status = "" if top.status.value == "ok" else f": {top.status.value}"
    return describe_settings(top) + score + status


def describe_settings(row: Row) -> str:
    """Return a cell's model, task and settings in one line."""
    names = ("method", "k", "rbit", "protocol", "question")
    settings = [f"{name}={getattr(row, name)}" for name in names if getattr(row, name)]
    return " ".join((row.model, row.task, *settings))
