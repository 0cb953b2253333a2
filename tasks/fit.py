"""Report how a method was fitted: its losses and the time it took."""

import statistics
from dataclasses import dataclass
from typing import Any, ClassVar

from topkbench.harness.task import Context, Outcome, Task, TaskRow
from topkbench.methods.base import AnyMethod, Geometry
from topkbench.methods.learning import artifact_spec


@dataclass(kw_only=True)
class Fit(Task):
    """The losses and the seconds of a method's fit: one row per layer, and one for their mean.

    The method is fitted before the task runs, as for every task. The seconds are recorded only if
    it was fitted in this run, not if its artifact was found. ``force=true`` fits it again.
    """

    name: str = "fit"
    all_budgets: bool = True
    needs_full: ClassVar[bool] = False
    refits: ClassVar[bool] = True

    def check_method(self, method: AnyMethod, geometry: Geometry) -> None:
        if artifact_spec(method, geometry) is None:
            raise self._learns_nothing(method)

    def _learns_nothing(self, method: AnyMethod) -> ValueError:
        return ValueError(
            f"task={self.name} needs a method that learns, but {method.name} with these settings"
            " learns nothing; choose another."
        )

    def pilots(self, context: Context) -> list[tuple[Task, float]]:
        return []  # the method is fitted before the task runs, which only reads the artifact

    def run(self, context: Context) -> Outcome:
        artifact = context.artifact
        if artifact is None:
            raise self._learns_nothing(context.method)
        provenance = artifact.provenance
        found = provenance.get("losses")  # artifacts of older versions have none
        losses: dict[int, list[float]] = {
            layer: found[layer] if found else [] for layer in sorted(artifact.layers)
        }
        shared: dict[str, Any] = {
            "calibration": provenance["data"],
            "artifact_path": str(artifact.path),
            "peak_memory_mib": None,  # the fit has ended before the cell begins
        }
        rows = [
            TaskRow(f"layer {layer}", {**shared, **first_and_last(steps)})
            for layer, steps in losses.items()
        ]
        mean = [statistics.fmean(step) for step in zip(*losses.values(), strict=True)]
        seconds = provenance.get("seconds") if artifact.fitted else None
        rows.append(TaskRow("mean", {**shared, **first_and_last(mean), "fit_s": seconds}))
        samples = [
            {"layer": layer, "step": step, "loss": loss}
            for layer, steps in losses.items()
            for step, loss in enumerate(steps, start=1)
        ]
        return Outcome(rows, samples)


def first_and_last(losses: list[float]) -> dict[str, float | None]:
    """Return the columns of the first and the last loss; None if there were no steps."""
    first, last = (losses[0], losses[-1]) if losses else (None, None)
    return {"loss_first": first, "loss_last": last}
