"""What a method learns beforehand, and what that took."""

import statistics
from dataclasses import dataclass
from typing import Any, ClassVar

from topkbench.harness.evaluation import Context, Outcome, Task, TaskRow


@dataclass(kw_only=True)
class Fit(Task):
    """The artifact of a method: its seconds, its losses, one row a layer and one for their mean.

    A cell's method comes fitted, here as for every task: the artifact is found where it was fitted
    before, or its seconds are recorded if it was fitted now. ``force=true`` fits it again.
    """

    name: str = "fit"
    all_budgets: bool = True
    needs_full: ClassVar[bool] = False
    refits: ClassVar[bool] = True

    def run(self, context: Context) -> Outcome:
        found = context.artifact
        if found is None:
            raise ValueError(
                f"task={self.name} needs a method that learns, and {context.method.name} as it is"
                " set here learns nothing; choose another."
            )
        told = found.provenance
        num_layers = context.geometry.num_layers
        # What was fitted before losses were kept has none.
        losses: list[list[float]] = told.get("losses") or [[] for _ in range(num_layers)]
        shared: dict[str, Any] = {
            "calibration": told["data"],
            "artifact_path": str(found.path),
            "peak_memory_mib": None,  # the fit is over when the cell begins
        }
        rows = [
            TaskRow(f"layer {layer}", {**shared, **ends(steps)})
            for layer, steps in enumerate(losses)
        ]
        mean = [statistics.fmean(step) for step in zip(*losses, strict=True)]
        seconds = told.get("seconds") if found.fitted else None
        rows.append(TaskRow("mean", {**shared, **ends(mean), "fit_s": seconds}))
        samples = [
            {"layer": layer, "step": step, "loss": loss}
            for layer, steps in enumerate(losses)
            for step, loss in enumerate(steps, start=1)
        ]
        return Outcome(rows, samples)


def ends(losses: list[float]) -> dict[str, float | None]:
    """Return the columns of the first and the last loss, empty where there were no steps."""
    first, last = (losses[0], losses[-1]) if losses else (None, None)
    return {"loss_first": first, "loss_last": last}
