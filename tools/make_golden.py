"""Measure every method on the shipped model and write the golden file.

python tools/make_golden.py

The file in ``tests/golden`` holds, for every method, question and protocol, the results for two
prompts of 512 tokens at ``k=64`` in float32 on one thread: the answer tokens, densities, bytes,
selection quality, and which tokens each head attended to at each decode step.
``tests/test_golden.py`` compares new results with it. Make it again after a change that is meant to
change results, and describe the change in the commit message.
"""

import functools
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # lets the script run without installing the package
    sys.path[0] = str(ROOT / ".types")

import llvmlite.binding  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.utils import instantiate  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from topkbench.harness.cell import prepare_method, run_cell  # noqa: E402
from topkbench.harness.decoding import Decoder, Question, tokenise_all  # noqa: E402
from topkbench.harness.generation import selection_means  # noqa: E402
from topkbench.harness.main import make_method  # noqa: E402
from topkbench.harness.quality import SelectionMeter  # noqa: E402
from topkbench.harness.task import Context  # noqa: E402
from topkbench.methods.base import StepContext, StepResult  # noqa: E402
from topkbench.models.attach import attach  # noqa: E402
from topkbench.models.prefill_store import PrefillStore  # noqa: E402

FOLDER = ROOT / "tests" / "golden"
METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
QUESTIONS: tuple[Question, ...] = ("sparse", "dense")
CELLS = list(itertools.product(METHODS, QUESTIONS, ("unified", "native")))
K = 64
SETTINGS = (
    *("task.length=512", "task.subtasks=[niah_multikey,niah_multivalue]", "num_samples=1"),
    *("task.timed_prompts=0", "task.judged_prompts=0"),
    *(f"k={K}", "rbit=128", "dtype=float32", "tracker=none"),
)
COUNTED = ("density", "density_all", "bytes_read_per_step", "index_bytes_per_token")
QUALITY = ("recall_at_k", "attention_mass", "output_rel_error")


@functools.cache  # composing takes as long as decoding several tokens
def settings(*overrides: str) -> DictConfig:
    """Return the settings of all cells, with those of one of its parts."""
    return compose("config", overrides=[*SETTINGS, *overrides])


class Recorder(SelectionMeter):
    """Measures selection quality, and records which tokens each head of each layer attended to."""

    def __init__(self) -> None:
        super().__init__()
        self.attended: list[np.ndarray] = []

    def on_step(self, context: StepContext, result: StepResult) -> None:
        super().on_step(context, result)
        if result.selection is not None:
            (slots,) = result.selection.slots(context.cache)  # the batch has one row
            self.attended.append(slots.numpy().ravel())


class Machine:
    """The shipped model on one thread of this machine.

    Attributes:
        kind: What determines the rounding of sums: the processor, as identified by LLVM and torch,
            and the version of torch.
    """

    def __init__(self, folder: Path) -> None:
        self.kind = {
            "processor": llvmlite.binding.get_host_cpu_name(),
            "vectors": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__.partition("+")[0],
        }
        self._folder = folder
        self._loaded = instantiate(settings().model)
        self._store = PrefillStore(self._loaded.model, kept_bytes=2**30)  # of the two prompts
        self._full = make_method(settings("method=full").method)
        self._answers: dict[str, dict[str, list[int]]] = {}  # its answers by question

    def run(
        self, name: str, question: Question, protocol: str
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Run one cell; return its numbers, and the attended tokens of all steps as one row."""
        method = make_method(settings(f"method={name}").method)
        policy = instantiate(settings(f"protocol={protocol}").protocol)
        task = instantiate(settings(f"task.question={question}").task)
        prepare_method(self._loaded, method, instantiate(settings().calibration), self._folder)
        context = Context(
            loaded=self._loaded,
            store=self._store,
            method=method,
            policy=policy,
            full=self._full,
            full_answers=self._answers.get(question, {}),
        )
        outcome = run_cell(context, task)
        mean = outcome.rows[-1]
        tokens = {one["sample_id"]: one["tokens"] for one in outcome.samples}
        numbers = {
            "status": mean.status,
            "tokens": tokens,
            **{column: mean.values.get(column) for column in COUNTED},
        }
        prompts = tokenise_all(self._loaded, task.samples(self._loaded), question)
        if question not in self._answers:
            self._answers[question] = {
                prompt.sample.sample_id: context.full_answer(prompt) for prompt in prompts
            }
        recorders = []
        for prompt in prompts if method.selects else ():
            recorders.append(Recorder())
            answer = self._answers[question][prompt.sample.sample_id]
            new_tokens = len(answer) + 1
            decoder = Decoder(self._loaded, self._store, [prompt], new_tokens, method.traits.needs)
            with attach(self._loaded.model, method, policy, recorders[-1]):
                decoder.teacher_force([answer])
        numbers |= selection_means([one.values() for one in recorders])
        attended = [slots for one in recorders for slots in one.attended]
        return numbers, np.concatenate(attended or [np.zeros(0, dtype=bool)])


def main() -> None:
    """Write the golden file."""
    torch.set_num_threads(1)
    cells, selections = {}, {}
    with (
        initialize_config_dir(str(ROOT / "conf"), version_base="1.3"),
        tempfile.TemporaryDirectory() as folder,
    ):
        machine = Machine(Path(folder))
        for cell in CELLS:
            name = "/".join(cell)
            numbers, slots = machine.run(*cell)
            cells[name] = {**numbers, "slots": len(slots)}
            selections[name] = np.packbits(slots)
            print(f"{name}: {numbers['status']}, {len(slots)} slots", flush=True)
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps({"made_on": machine.kind, "cells": cells}, indent=1)
    (FOLDER / "numbers.json").write_text(text + "\n")
    np.savez_compressed(FOLDER / "selections.npz", allow_pickle=False, **selections)


if __name__ == "__main__":
    main()
