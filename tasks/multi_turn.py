"""Several questions about one text, one after the other on the same cache."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

from topkbench.harness.decoding import Prompt, positions_of
from topkbench.harness.generation import GenerationTask
from topkbench.harness.samples import Sample, TaskDoesNotFit, check_window
from topkbench.harness.sweep import Plan, Record
from topkbench.harness.task import Context, Outcome
from topkbench.methods.base import check_whole
from topkbench.models.digests import tokenizer_digest
from topkbench.models.encoding import encode_split, template_around, template_between
from topkbench.models.load import LoadedModel, ModelShape
from topkbench.tasks.generated import DEFAULT_LENGTH, SPARE_TOKENS
from topkbench.tasks.multi_turn_documents import (
    VERSION,
    Document,
    Documents,
    Wording,
    asking_order,
    read_documents,
    write_document,
)


@dataclass(frozen=True)
class _Conversation:
    """A document with its questions and answers as one text.

    Attributes:
        text: The text.
        begins: Where each question begins, in characters, and
        ends: where the answer to it begins that the model is to give.
        is_complete: Whether the text has all special tokens, as a rendered chat template has.
    """

    text: str
    begins: list[int]
    ends: list[int]
    is_complete: bool


@dataclass
class _Drawn:
    """What is asked of a model.

    Attributes:
        prompts: One for each question, those of a document side by side.
        skipped: Number of documents that do not fit, which were left out.
    """

    prompts: list[Prompt] = field(default_factory=list)
    skipped: int = 0


# What this process has tokenised, since all cells of a sweep use the same prompts.
_DRAWN: dict[str, _Drawn] = {}


@dataclass(kw_only=True)
class MultiTurn(GenerationTask):
    """Several questions about one text, one after the other; a row for each turn and their mean.

    The text is prefilled, with ``question="dense"`` also the first question; everything after it
    is decoded with the method: the first question, its answer, the second question, and so on. Each
    turn's answer is generated, scored, and then replaced by the reference, so that all methods meet
    the same words before each question. SCBench (arXiv:2412.10319) does this by default, too. A row
    of a later turn has the change since the first, paired by document.

    Attributes:
        length: Tokens of text, questions and answers together; None for 4,096.
        num_samples: Documents.
        seed: Seed of the documents; document ``i`` does not depend on ``num_samples``.
        num_turns: Questions about each document.
        wording: Of what documents are made: ``"words"``, random words, on which the shipped model
            is trained; ``"ruler"``, RULER's needles in noise; None for the one that suits a model.
        new_tokens: Tokens of each answer, at most; None for those of the reference and 8 more.
        prefill_history: Prefill also the turns before each question, so that every turn begins from
            a prefill of its own: what a turn then scores is not lost from turn to turn.
        source: Documents with SCBench's columns instead of written ones; see ``read_documents``.
        skip_bad: With ``source``: leave out documents that are not as described, or too long,
            instead of refusing the file.
    """

    name: str = "multi_turn"
    length: int | None = None
    num_samples: int = 25
    seed: int = 0
    num_turns: int = 3
    wording: Wording | None = None
    new_tokens: int | None = None
    prefill_history: bool = False
    source: str | None = None
    skip_bad: bool = False
    # Read at once, so that a bad file fails before a model is loaded.
    _read: Documents | None = field(default=None, init=False, repr=False, compare=False)
    _skipped: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("num_samples", self.num_samples)
        check_whole("seed", self.seed, least=0)
        check_whole("length", self.prompt_length)
        check_whole("task.num_turns", self.num_turns, least=2)
        if self.wording not in (None, *get_args(Wording)):
            raise ValueError(f"task.wording must be words, ruler or null, got {self.wording!r}.")
        if self.new_tokens is not None:
            check_whole("task.new_tokens", self.new_tokens)
        if self.source is None:
            if self.skip_bad:
                raise ValueError(
                    "task.skip_bad is a setting of task.source, got True without one; set"
                    " task.source, or leave it out."
                )
            return
        for setting in ("length", "wording"):
            if getattr(self, setting) is not None:
                raise ValueError(
                    f"task.{setting} must be null with task.source, whose documents are written"
                    f" already, got {getattr(self, setting)!r}; use task.{setting}=null."
                )
        self._read = read_documents(self.source, self.num_samples, self.num_turns, self.skip_bad)

    @property
    def prompt_length(self) -> int:
        """Tokens of a document that is written here, with its questions and answers."""
        return DEFAULT_LENGTH if self.length is None else self.length

    def decided(self) -> dict[str, Any]:
        found = super().decided()
        return found if self._read is not None else {**found, "length": self.prompt_length}

    def check_model(self, shape: ModelShape) -> None:
        super().check_model(shape)
        if self._read is None:
            check_window("task.length", self.prompt_length, shape.name, shape.window)

    def prompts(self, loaded: LoadedModel) -> str:
        found = f"topkbench {VERSION}"
        if self._wording(loaded) == "ruler":
            found += ", RULER's wording"
        if self._read is not None:
            how = "chat template" if loaded.chat else "raw"
            found = f"files {self._read.label} ({how})"
        return f"{found}, history prefilled" if self.prefill_history else found

    def _wording(self, loaded: LoadedModel) -> Wording:
        """Return of what documents are made for a model."""
        return self.wording or ("words" if loaded.short_answers else "ruler")

    def sample_counts(self, subtask: str) -> dict[str, Any]:
        if self._read is None:
            return {}
        turns = self.num_turns if subtask == "mean" else 1
        counts = {
            "wanted_samples": self.num_samples * turns,
            "source_samples": self._read.count * turns,
        }
        if subtask == "mean":
            counts["skipped_samples"] = self._read.skipped + self._skipped
        return counts

    def inputs_digest(self, loaded: LoadedModel) -> str:
        prompts = self.tokenised(loaded)
        content = [
            self.prompts(loaded),
            [[asdict(one.sample), one.prefill_ids, one.decode_ids] for one in prompts],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def samples(self, loaded: LoadedModel) -> list[Sample]:
        return [prompt.sample for prompt in self.tokenised(loaded)]

    def tokenised(self, loaded: LoadedModel) -> list[Prompt]:
        settings = [
            *(
                self.length,
                self.num_samples,
                self._wording(loaded),
                self.seed,
                self.num_turns,
                self.new_tokens,
            ),
            *(self.prefill_history, self.question, self.source, self.skip_bad),
            *(loaded.name, loaded.window, loaded.chat, str(loaded.chat_template_kwargs)),
            *(self.prompts(loaded), tokenizer_digest(loaded.tokenizer)),
        ]
        key = json.dumps(settings)
        if key not in _DRAWN:
            _DRAWN[key] = self._draw(loaded)
        self._skipped = _DRAWN[key].skipped
        return _DRAWN[key].prompts

    def _draw(self, loaded: LoadedModel) -> _Drawn:
        drawn = _Drawn()
        if self._read is None:
            check_window("task.length", self.prompt_length, loaded.name, loaded.window)
            for index in range(self.num_samples):
                drawn.prompts += self._written(loaded, index)
            return drawn
        for document in self._read.documents:
            try:
                drawn.prompts += _fitting(loaded, self._prompts(loaded, document))
            except TaskDoesNotFit:
                if not self.skip_bad:
                    raise
                drawn.skipped += 1
        if not drawn.prompts:
            raise TaskDoesNotFit(
                f"a document of task.source and its turns must fit the window of {loaded.window}"
                f" tokens of {loaded.name}, but none does; use fewer turns or other documents."
            )
        return drawn

    def _written(self, loaded: LoadedModel, index: int) -> list[Prompt]:
        """Return the prompts of a document that is written here, of at most ``length`` tokens."""

        def count(text: str) -> int:
            return _count(loaded, text)

        name, length = f"{self.prompt_length}-{self.seed}-{index}", self.prompt_length
        order = asking_order(self.seed, index, self.num_turns)
        wording = self._wording(loaded)
        budget = length
        while True:
            rng = random.Random(f"{self.seed}-multi_turn-{length}-{index}")
            document = write_document(name, rng, order, budget, count, wording)
            prompts = self._prompts(loaded, document)
            used = _most(prompts)
            if used <= length:
                return [
                    replace(one, sample=replace(one.sample, length=used))
                    for one in _fitting(loaded, prompts)
                ]
            budget -= used - length

    def _prompts(self, loaded: LoadedModel, document: Document) -> list[Prompt]:
        """Return a document's questions as tokens, each after the turns before it.

        The conversation is encoded as a whole and cut, so all turns have the same tokens; a token
        that reaches over the end of a question belongs to its answer.
        """
        whole = _conversation(loaded, document)

        def tokens(cut: int) -> tuple[int, ...]:
            begin = not whole.is_complete
            return tuple(encode_split(loaded.tokenizer, whole.text, cut, begin)[0])

        cuts = whole.begins if self.question == "sparse" else whole.ends
        context = tokens(cuts[0])
        prompts = []
        for place, turn in enumerate(document.turns):
            given = tokens(whole.ends[place])
            prefilled = tokens(cuts[place]) if self.prefill_history and place else context
            new_tokens = self.new_tokens
            if new_tokens is None:
                new_tokens = _count(loaded, turn.reference) + SPARE_TOKENS
            sample = Sample(
                sample_id=f"{document.name} turn {place + 1}",
                subtask=f"turn_{place + 1}",
                context=document.context,
                question=turn.question,
                answer_prefix=turn.answer_prefix,
                answers=turn.answers,
                max_new_tokens=new_tokens,
                length=None,
                document=document.name,
            )
            prompts.append(Prompt(sample, prefilled, given[len(prefilled) :]))
        return prompts

    def outcome(
        self,
        context: Context,
        plan: Plan,
        prompts: Sequence[Prompt],
        records: Mapping[str, Sequence[Record]],
    ) -> Outcome:
        found = super().outcome(context, plan, prompts, records)
        documents = {one.sample.sample_id: one.sample.document for one in prompts}
        samples = [
            {
                **one,
                "document": documents[one["sample_id"]],
                "turn": int(one["subtask"].removeprefix("turn_")),
            }
            for one in found.samples
        ]
        return replace(found, samples=samples)


def _fitting(loaded: LoadedModel, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return a document's prompts with how their positions are rotated.

    Raises:
        TaskDoesNotFit: If they do not fit the model.
    """
    total, document = _most(prompts), prompts[0].sample.document
    if total > loaded.window:
        raise TaskDoesNotFit(
            f"a document and its turns must fit the window of {loaded.window} tokens of"
            f" {loaded.name}, got {total} in {document}; use a smaller task.num_turns, or"
            " task.skip_bad=true to leave it out."
        )
    return [
        replace(one, is_long=positions_of(loaded, len(one.prefill_ids), total, document))
        for one in prompts
    ]


def _count(loaded: LoadedModel, text: str) -> int:
    return len(loaded.tokenizer.encode(text, add_special_tokens=False))


def _most(prompts: Sequence[Prompt]) -> int:
    """Return the tokens of the longest of a document's prompts and its answer."""
    return max(one.num_tokens + one.sample.max_new_tokens for one in prompts)


def _conversation(loaded: LoadedModel, document: Document) -> _Conversation:
    """Return a document with its turns as one text, in the chat template if the model has one.

    An answer stands in it as it does in the cache: after what the template writes before an answer.
    """
    before = after = between = ""
    if loaded.chat:
        before, after = template_around(loaded.tokenizer, loaded.chat_template_kwargs)
        between = template_between(loaded.tokenizer, loaded.chat_template_kwargs)
    bos = loaded.tokenizer.bos_token or ""
    text = before + (document.context.removeprefix(bos) if loaded.chat else document.context)
    begins, ends = [], []
    for place, turn in enumerate(document.turns):
        question, reference = turn.question, turn.reference
        if loaded.chat and place:
            question = question.lstrip()  # a message of its own
        if loaded.chat and not turn.answer_prefix:
            reference = reference.lstrip()
        text += between if place else ""
        begins.append(len(text))
        text += question + after + turn.answer_prefix
        ends.append(len(text))
        text += reference
    return _Conversation(text, begins, ends, is_complete=loaded.chat)
