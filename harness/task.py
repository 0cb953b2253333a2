"""What a task is: what it gets to run a cell, and what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from topkbench.harness.artifact import Artifact
from topkbench.harness.decoding import Decoder, Prompt
from topkbench.methods.base import AnyMethod, Geometry, Observer, Policy
from topkbench.models.attach import Session, attach, geometry_of
from topkbench.models.load import LoadedModel, ModelShape
from topkbench.models.prefill_store import PrefillStore

Track = Callable[[Sequence[Any], str], Iterable[Any]]

TIMED = "speed"
"""The part of a cell in which time is measured."""


def no_progress(items: Sequence[Any], label: str) -> Iterable[Any]:
    """Return the items without showing progress."""
    return items


@dataclass
class Context:
    """What a task needs to run one cell.

    Attributes:
        loaded: The model.
        store: Stores the model's prefills.
        method: The method, its artifact loaded.
        policy: Budget and rules, as configured.
        full: Full attention, the baseline for answers and time.
        full_answers: Full attention's answer tokens by sample id, as far as they are known.
        bandwidth: The memory's bandwidth just before the timed prompts, bytes per second; None if
            it was not measured.
        track: Shows progress over a sequence.
        artifact: What the method has learned; None if it learns nothing or the task fits it.
    """

    loaded: LoadedModel
    store: PrefillStore
    method: AnyMethod
    policy: Policy
    full: AnyMethod
    full_answers: dict[str, list[int]] = field(default_factory=dict)
    bandwidth: float | None = None
    track: Track = no_progress
    artifact: Artifact | None = None

    @property
    def geometry(self) -> Geometry:
        """The model's shape."""
        return geometry_of(self.loaded.model, self.loaded.digest)

    def resolved(self, k: int | None = None) -> tuple[AnyMethod, Policy]:
        """Return the method and the policy as they act together, at another budget if given."""
        policy = self.policy if k is None else replace(self.policy, k=k)
        return self.method.resolve(policy)

    @property
    def effective_policy(self) -> Policy:
        """The policy with the method's published values under the native protocol."""
        return self.resolved()[1]

    @property
    def answering_full(self) -> AnyMethod:
        """Full attention as it answers: by its default backend, whichever one is timed."""
        return type(self.full)()

    @property
    def answering(self) -> AnyMethod:
        """The method that answers: the cell's, or full attention as it answers."""
        return self.method if self.method.selects else self.answering_full

    def full_answer(self, prompt: Prompt) -> list[int]:
        """Return full attention's answer tokens, decoded here if they are not known."""
        sample = prompt.sample
        if sample.sample_id not in self.full_answers:
            decoder = Decoder(self.loaded, self.store, [prompt], sample.max_new_tokens + 1)
            with self.attached(decoder, self.answering_full):
                self.full_answers[sample.sample_id] = decoder.generate("together")[0]
        return self.full_answers[sample.sample_id]

    @contextmanager
    def attached(
        self, decoder: Decoder, method: AnyMethod, observer: Observer | None = None
    ) -> Iterator[Session]:
        """Attach a method while a decoder runs, and check that every step went through the method.

        Args:
            decoder: Counts the steps that are run inside the block.
            method: The method.
            observer: Called at each stage and step.

        Raises:
            MethodBypassedError: When the block ends, if steps did not go through the method.
        """
        steps_before = len(decoder.lengths)
        with attach(self.loaded.model, method, self.policy, observer) as session:
            yield session
        session.require_steps(decoder.steps_over(session.policy.k, steps_before))


@dataclass
class TaskRow:
    """The columns of a row that the task fills in; the others come from the configuration."""

    subtask: str
    values: dict[str, Any] = field(default_factory=dict)
    status: str = "ok"
    reason: str = ""


@dataclass
class Outcome:
    """What a task returns.

    Attributes:
        rows: One row per sub-task, and their mean.
        samples: One mapping per sample, for paired statistics and re-scoring.
        kept: Which tokens the heads kept, one mapping per prompt, as ``record.kept_file`` says.
    """

    rows: list[TaskRow]
    samples: list[dict[str, Any]]
    kept: list[dict[str, Any]] = field(default_factory=list)


class Task(ABC):
    """What a cell runs.

    Attributes:
        name: The task's name in rows.
        all_budgets: Whether one cell covers every budget, so that ``k`` is not swept.
        needs_full: Whether full attention's answers are needed, to compare with or to force.
        uses_model: Whether the result depends on the model's weights.
        fits_methods: Whether a method that learns is fitted on the model before the task runs;
            otherwise the task fits it.
        refits: Whether ``force=true`` also fits the method again.
        subject: Shown in the row's model column if ``uses_model`` is false.
        parts: The parts of a cell that are stored separately (``answers``, ``selections``,
            ``speed``), each with the task settings that it does not depend on. Only ``speed``
            depends on the machine and on full attention's backend.
    """

    name: str
    all_budgets: bool = False
    needs_full: ClassVar[bool] = True
    uses_model: bool = True
    fits_methods: ClassVar[bool] = True
    refits: ClassVar[bool] = False
    subject: str = ""
    parts: ClassVar[Mapping[str, frozenset[str]]] = {"answers": frozenset()}

    def inputs_digest(self, loaded: LoadedModel) -> str:
        """Return a digest of all inputs that the configuration does not contain."""
        return ""

    def check_model(self, shape: ModelShape) -> None:
        """Check the task's settings against a model that is not loaded yet.

        Raises:
            ValueError: If the task cannot run with it; one sentence names the setting.
        """
        return

    def attention(self, model: Geometry | None) -> Geometry | None:
        """Return the attention that the method runs in: that of the model, None if not known."""
        return model

    def check_method(self, method: AnyMethod, geometry: Geometry) -> None:
        """Check a method against the task and a model that is not loaded yet.

        Raises:
            ValueError: If the task cannot run with it; one sentence says why.
        """
        return

    def decided(self) -> dict[str, Any]:
        """Return the values that the task uses where settings are None or auto."""
        return {}

    def prompts(self, loaded: LoadedModel) -> str | None:
        """Return where the prompts come from, in words; None for a task without prompts."""
        return None

    def sample_counts(self, subtask: str) -> dict[str, Any]:
        """Return a row's columns that count the samples of the files that were read."""
        return {}

    @abstractmethod
    def run(self, context: Context) -> Outcome:
        """Run one cell."""

    def fitted(self, context: Context) -> Context:
        """Return the context with the method fitted, if the task fits it on states of its own."""
        return context

    def known_rows(self, context: Context) -> list[TaskRow]:
        """Return the rows that are skipped, as far as it is known before anything has run."""
        return []

    def bytes_needed(self, context: Context) -> int:
        """Return the memory that the largest row takes, about; 0 if it is not known."""
        return 0

    def pilots(self, context: Context) -> list[tuple["Task", float]]:
        """Return smaller tasks that show how long this one takes.

        Returns:
            Tasks, each with a weight: this one takes the sum of their times by weight.
        """
        return [(self, 1.0)]


def pilot_sizes(sizes: Sequence[int]) -> list[tuple[int, float]]:
    """Return which of some rows to measure to know the time of all, if it grows with their size.

    Two are measured, the smallest and one of about a sixth of all together, and a straight line is
    drawn through their times. Of one or two rows all are measured.

    Args:
        sizes: Tokens of each row.

    Returns:
        Positions in ``sizes``, each with the weight of its time in that of all.
    """
    order = sorted(range(len(sizes)), key=lambda place: sizes[place])
    if len(set(sizes)) < 3:
        return [(place, 1.0) for place in order]
    first = order[0]
    larger = [place for place in order if sizes[place] > sizes[first]]
    # ``larger`` is in order of size.
    second = [larger[0], *(place for place in larger if sizes[place] <= sum(sizes) / 6)][-1]
    spread = sizes[second] - sizes[first]
    weight = (sum(sizes) - len(sizes) * sizes[first]) / spread
    return [(first, len(sizes) - weight), (second, weight)]


def compact_unsupported_reason(task: str) -> str:
    """Return why a task does not support a method that frees tokens (``mode=compact``)."""
    return (
        f"task={task} needs all tokens in the cache at every step, and mode=compact frees some; "
        "use mode=masked, which selects the same tokens."
    )
