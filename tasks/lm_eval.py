"""Tasks of lm-eval: its prompts, stops, limits and metrics, with our prefill and decoding."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from topkbench.harness.decoding import (
    Decoder,
    Prompt,
    count_tokens,
    known_tokens,
    tokenise,
)
from topkbench.harness.generation import GenerationTask
from topkbench.harness.reads import ReadCounter
from topkbench.harness.samples import Sample, TaskDoesNotFit, check_window, samples_digest
from topkbench.harness.sweep import Plan, Record
from topkbench.harness.task import Context, Outcome
from topkbench.methods.base import check_list, check_whole
from topkbench.models.load import LoadedModel, ModelShape
from topkbench.tasks.lm_eval_documents import (
    Document,
    EvalTask,
    Request,
    draw,
    load,
    middle_out,
    question_place,
)

QUESTION_FIELDS = ("question", "input")

_SHARED = ("sample_id", "subtask", "length", "tokens", "prefill_ms")
"""What a sample of a document has of its first choice."""


@dataclass(frozen=True)
class _Choice:
    """What is asked of a prompt whose continuation is known.

    Attributes:
        continuation: Its tokens.
        question: How many tokens before it are decoded with the method.
    """

    continuation: tuple[int, ...]
    question: int


@dataclass
class _Drawn:
    """What is asked of a model: samples, and the documents behind them.

    Attributes:
        samples: One for each request, a document's side by side.
        prompts: The samples as tokens, once they were asked for.
        requests: What lm-eval asks, by sample id.
        documents: The task and document of each first sample id, and
        members: the sample ids of all requests of that document.
        skipped: Documents left out, by task, as ``skip_bad`` says.
        truncated: Documents whose prompts were shortened, by task.
    """

    samples: list[Sample] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    requests: dict[str, Request] = field(default_factory=dict)
    documents: dict[str, tuple[EvalTask, Document]] = field(default_factory=dict)
    members: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class LmEval(GenerationTask):
    """Tasks of lm-eval (EleutherAI's lm-evaluation-harness, 0.4.13), a row for each and their mean.

    Prompts, examples, stops, limits and metrics are lm-eval's; a row's score is 100 times its
    metric. Prefill, decoding and everything that is counted are ours, so that all methods share a
    prompt's prefill. Of a task with choices each choice's likelihood is that of its tokens, which
    are decoded with the method after the question.

    Attributes:
        names: Names of tasks, groups or tags.
        include_path: A folder with YAML files of one's own.
        num_samples: Documents of each task, drawn without replacement.
        seed: Seed of the draw.
        num_fewshot: Examples before each question; None for each task's own number.
        metric: The metric that is the score, or ``METRIC,FILTER``; None for each task's first.
        max_new_tokens: Tokens that an answer may have; None for each task's own number.
        length: Tokens of prompt and answer, at most; None for the model's window.
        min_length: Only documents whose prompts have at least so many tokens are asked; None for
            all.
        truncate: ``"middle"`` leaves out the middle of longer prompts, as LongBench does; None
            refuses them.
        question_fields: Fields of a document that may hold the question; where the last of them
            begins that a prompt contains, the context ends.
        question_tokens: If a prompt contains none of them: how many of its last tokens are the
            question.
        no_chat: Tasks whose prompts are given without the chat template, to a model that has one.
        metadata: What lm-eval hands to tasks that make or choose their own data.
        revisions: The revision of data sets on the hub, by name; of others it is the newest.
        skip_bad: Leave out documents that are too long or without a question, instead of refusing
            the task.
    """

    name: str = "lm_eval"
    names: Sequence[str] | str | None = None
    include_path: str | None = None
    num_samples: int = 25
    seed: int = 0
    num_fewshot: int | None = None
    metric: str | None = None
    max_new_tokens: int | None = None
    length: int | None = None
    min_length: int | None = None
    truncate: Literal["middle"] | None = None
    question_fields: Sequence[str] = QUESTION_FIELDS
    question_tokens: int = 0
    no_chat: Sequence[str] = ()
    metadata: Mapping[str, Any] | None = None
    revisions: Mapping[str, str] | None = None
    skip_bad: bool = False
    _tasks: list[EvalTask] = field(default_factory=list, init=False, repr=False, compare=False)
    _drawn: dict[str, _Drawn] = field(default_factory=dict, init=False, repr=False, compare=False)
    _choices: dict[str, _Choice] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("num_samples", self.num_samples)
        check_whole("seed", self.seed, least=0)
        check_whole("question_tokens", self.question_tokens, least=0)
        for name in ("length", "min_length", "max_new_tokens"):
            if (value := getattr(self, name)) is not None:
                check_whole(f"task.{name}", value)
        if self.truncate not in (None, "middle"):
            raise ValueError(f"task.truncate must be middle or null, got {self.truncate!r}.")
        if not self.names:
            raise ValueError(
                "task.names must name tasks or groups of lm-eval, such as task.names=gsm8k or"
                f" task.names=[longbench_qasper_e,longbench_hotpotqa_e], got {self.names!r}."
            )
        check_list("task.names", self._names)
        check_list("task.question_fields", self.question_fields)
        if self.no_chat:
            check_list("task.no_chat", self.no_chat)
        self._tasks = load(
            self._names,
            self.include_path,
            self.num_fewshot,
            self.metric,
            self.max_new_tokens,
            self.metadata,
            self.revisions,
        )
        known = [one.name for one in self._tasks]
        for name in self.no_chat:
            if name not in known:
                raise ValueError(
                    f"task.no_chat must name tasks that are asked ({', '.join(known)}), got"
                    f" {name!r}."
                )

    @property
    def _names(self) -> list[str]:
        return [self.names] if isinstance(self.names, str) else list(self.names or ())

    def decided(self) -> dict[str, Any]:
        return {**super().decided(), "names": self._names}

    def check_model(self, shape: ModelShape) -> None:
        super().check_model(shape)
        if self.length is not None:
            check_window("task.length", self.length, shape.name, shape.window)

    def prompts(self, loaded: LoadedModel) -> str:
        names = ", ".join(
            f"{one.name} {one.version} ({one.digest},"
            f" {'chat template' if self._seen_by(loaded, one).chat else 'raw'})"
            for one in self._tasks
        )
        least = "" if self.min_length is None else f", of at least {self.min_length:,} tokens"
        return f"lm-eval {importlib.metadata.version('lm-eval')}: {names}{least}"

    def _seen_by(self, loaded: LoadedModel, task: EvalTask) -> LoadedModel:
        """Return the model as it sees a task: with its chat template, or without."""
        if task.name not in self.no_chat:
            return loaded
        return replace(loaded, chat=False, chat_template_kwargs={})

    def sample_counts(self, subtask: str) -> dict[str, Any]:
        own = [one for one in self._tasks if subtask in ("mean", one.name)]
        counts = {
            "wanted_samples": self.num_samples * len(own),
            "source_samples": sum(one.num_documents for one in own),
        }
        for drawn in list(self._drawn.values())[-1:]:
            counts["skipped_samples"] = sum(drawn.skipped.get(one.name, 0) for one in own)
            counts["truncated_samples"] = sum(drawn.truncated.get(one.name, 0) for one in own)
        return counts

    def inputs_digest(self, loaded: LoadedModel) -> str:
        drawn = self.drawn(loaded)
        asked = [[name, asdict(one)] for name, one in drawn.requests.items()]
        content = [samples_digest(drawn.samples), asked, self.prompts(loaded), self.metric]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def samples(self, loaded: LoadedModel) -> list[Sample]:
        return self.drawn(loaded).samples

    def drawn(self, loaded: LoadedModel) -> _Drawn:
        """Return what is asked of a model, drawn once."""
        if loaded.digest not in self._drawn:
            drawn = _Drawn()
            for task in self._tasks:
                seen = self._seen_by(loaded, task)
                for document in self._asked(seen, task):
                    self._add(drawn, seen, task, document)
            if not drawn.samples:
                least = "" if self.min_length is None else f" have {self.min_length:,} tokens,"
                raise TaskDoesNotFit(
                    f"a document must{least} have a question and fit {self._most(loaded)} tokens,"
                    f" but none of {', '.join(self._names)} does."
                )
            self._drawn[loaded.digest] = drawn
        return self._drawn[loaded.digest]

    def _asked(self, loaded: LoadedModel, task: EvalTask) -> list[Document]:
        """Return the documents that are drawn of a task, of those that are long enough."""
        if self.min_length is None:
            return task.documents(self.num_samples, self.seed)
        every = task.documents(task.num_documents, self.seed)
        enough = [
            one
            for one in every
            if self._count(loaded, task, one.requests[0], one.requests[0].text, task.name)
            >= self.min_length
        ]
        return draw(enough, self.num_samples, self.seed, task.name)

    def _most(self, loaded: LoadedModel) -> int:
        """Return the tokens of prompt and answer, at most."""
        return loaded.window if self.length is None else self.length

    def _add(self, drawn: _Drawn, loaded: LoadedModel, task: EvalTask, document: Document) -> None:
        """Add a document's requests to what is asked, or count it as left out."""
        first = f"{task.name}-{document.number}"
        made: list[tuple[Sample, Request]] = []
        was_cut = False
        for place, request in enumerate(document.requests):
            name = first if place == 0 else f"{first}-choice-{place}"
            try:
                sample, is_cut = self._sample(loaded, task, document, request, name)
            except ValueError:
                if not self.skip_bad:
                    raise
                drawn.skipped[task.name] = drawn.skipped.get(task.name, 0) + 1
                return
            made.append((sample, request))
            was_cut = was_cut or is_cut
        drawn.truncated[task.name] = drawn.truncated.get(task.name, 0) + was_cut
        drawn.documents[first] = (task, document)
        drawn.members[first] = [sample.sample_id for sample, _ in made]
        for sample, request in made:
            drawn.samples.append(sample)
            drawn.requests[sample.sample_id] = request

    def _sample(
        self,
        loaded: LoadedModel,
        task: EvalTask,
        document: Document,
        request: Request,
        name: str,
    ) -> tuple[Sample, bool]:
        """Return a request as a sample, and whether its prompt was shortened."""
        if request.max_new_tokens >= self._most(loaded):
            raise TaskDoesNotFit(
                f"answers of {task.name} must leave room for a prompt in {self._most(loaded)}"
                f" tokens, got {request.max_new_tokens}; set task.max_new_tokens."
            )
        most = self._most(loaded) - request.max_new_tokens
        if request.continuation is not None:
            most -= len(loaded.tokenizer.encode(request.continuation, add_special_tokens=False))
        text, is_cut = request.text, False
        if (count := self._count(loaded, task, request, text, name)) > most:
            if self.truncate is None:
                raise TaskDoesNotFit(
                    f"prompt and answer of document {document.number} of {task.name} must fit"
                    f" {self._most(loaded)} tokens, got {count + self._most(loaded) - most};"
                    " task.truncate=middle shortens such prompts, task.skip_bad=true leaves them"
                    " out."
                )
            text, is_cut = self._shortened(loaded, task, request, most, name), True
        context, question, tokens = text, "", 0
        if self.question == "sparse":
            place = question_place(text, document.fields, self.question_fields)
            if place is not None:
                context, question = text[:place], text[place:]
            elif self.question_tokens:
                tokens = self.question_tokens
            else:
                raise ValueError(
                    "question=sparse needs a question that is separate from the context, but"
                    f" document {document.number} of {task.name} has none of"
                    f" {', '.join(self.question_fields)} in its prompt; set task.question_fields or"
                    " task.question_tokens, or question=dense, or task.skip_bad=true to leave it"
                    " out."
                )
        sample = Sample(
            sample_id=name,
            subtask=task.name,
            context=context,
            question=question,
            answer_prefix=request.answer_prefix,
            answers=document.target,
            max_new_tokens=request.max_new_tokens,
            length=None,
            question_tokens=tokens,
            until=request.until,
        )
        return sample, is_cut

    def _count(
        self, loaded: LoadedModel, task: EvalTask, request: Request, text: str, name: str
    ) -> int:
        """Return the tokens of a prompt, its chat template included."""
        return count_tokens(
            loaded,
            Sample(
                sample_id=name,
                subtask=task.name,
                context=text,
                question="",
                answer_prefix=request.answer_prefix,
                answers=(),
                max_new_tokens=0,
                length=None,
            ),
        )

    def _shortened(
        self, loaded: LoadedModel, task: EvalTask, request: Request, most: int, name: str
    ) -> str:
        """Return a prompt without its middle, of ``most`` tokens at most."""
        tokenizer = loaded.tokenizer
        ids = tokenizer.encode(request.text, add_special_tokens=False)
        kept = most
        while kept > 1:
            parts = middle_out(ids, kept)
            text = "".join(str(tokenizer.decode(part)) for part in parts)
            excess = self._count(loaded, task, request, text, name) - most
            if excess <= 0:
                return text
            kept -= excess  # a template, and tokens that are others where two texts meet
        raise TaskDoesNotFit(
            f"task.length must leave room for a prompt beside the answer of {task.name}, got"
            f" {self._most(loaded)}."
        )

    def tokenised(self, loaded: LoadedModel) -> list[Prompt]:
        drawn = self.drawn(loaded)
        if not drawn.prompts:
            seen = {task.name: self._seen_by(loaded, task) for task in self._tasks}
            drawn.prompts = [
                self._prompt(seen[one.subtask], one, drawn.requests[one.sample_id])
                for one in drawn.samples
            ]
        return drawn.prompts

    def _prompt(self, loaded: LoadedModel, sample: Sample, request: Request) -> Prompt:
        """Return a sample as tokens, with the continuation whose likelihood is asked for."""
        prompt = tokenise(loaded, sample, self.question)
        if request.continuation is None:
            return prompt
        before = (*prompt.prefill_ids, *prompt.decode_ids)
        whole = tokenise(
            loaded,
            replace(
                sample,
                answer_prefix=sample.answer_prefix + request.continuation,
                question_tokens=0,
            ),
            "dense",
        ).prefill_ids
        continuation = whole[len(before) :]
        if not continuation:
            raise ValueError(
                f"a choice must have tokens, got {request.continuation!r} in {sample.sample_id}."
            )
        self._choices[sample.sample_id] = _Choice(continuation, len(prompt.decode_ids))
        # The last token is predicted alone, and never fed back.
        return replace(prompt, decode_ids=(*prompt.decode_ids, *continuation[:-1]))

    def plan(self, context: Context, prompts: Sequence[Prompt]) -> Plan | Outcome:
        planned = super().plan(context, prompts)
        if isinstance(planned, Outcome):
            return planned
        # Of a document's choices one is timed and judged: the others share its question.
        first = set(self.drawn(context.loaded).documents)
        parts = {
            part: names if part == "answers" else names & first
            for part, names in planned.parts.items()
        }
        return Plan({part: names for part, names in parts.items() if names}, planned.kept & first)

    def measure(self, context: Context, plan: Plan, part: str, prompts: Sequence[Prompt]) -> Record:
        if part == "answers" and prompts[0].sample.sample_id in self._choices:
            return self._likelihoods(replace(context, method=context.answering), prompts)
        return super().measure(context, plan, part, prompts)

    def score(self, sample: Sample, prediction: str) -> float:
        task, document = self._document(sample.sample_id)
        return task.score(document.number, [prediction])

    def _document(self, sample_id: str) -> tuple[EvalTask, Document]:
        return next(
            one.documents[sample_id] for one in self._drawn.values() if sample_id in one.documents
        )

    def _likelihoods(self, context: Context, prompts: Sequence[Prompt]) -> Record:
        """Return the log-likelihoods of the continuations of prompts, one prompt at a time."""
        counter, method = ReadCounter(), context.method
        samples: list[dict[str, Any]] = []
        used: set[str] = set()
        for prompt in prompts:
            choice = self._choices[prompt.sample.sample_id]
            decoder = Decoder(context.loaded, context.store, [prompt], 1, method.traits.needs)
            how = known_tokens(context.loaded, method, [len(prompt.decode_ids)])
            decode = decoder.one_by_one if how == "one by one" else decoder.forward
            logits = decoder.first_logits[:, None]
            with context.attached(decoder, method, counter) as session:
                if choice.question:
                    logits = decode([prompt.decode_ids[: choice.question]])[:, None]
                if len(choice.continuation) > 1:
                    rest = decode([choice.continuation[:-1]], every=True)
                    logits = torch.cat([logits.to(rest.dtype), rest], 1)
            counter.add_steps(session.count, decoder.lengths)
            used.add(how)
            predicted = logits[0].float().log_softmax(-1)
            tokens = torch.tensor(choice.continuation, device=predicted.device)
            found = predicted.gather(1, tokens[:, None])[:, 0]
            samples.append(
                {
                    "sample_id": prompt.sample.sample_id,
                    "subtask": prompt.sample.subtask,
                    "length": prompt.num_tokens,
                    "log_likelihood": float(found.sum()),
                    "is_likeliest": bool((predicted.argmax(-1) == tokens).all()),
                    "tokens": [],  # nothing is generated
                    "prefill_ms": decoder.prefill_ms[0],
                }
            )
        is_sparse = method.selects and any(prompt.decode_ids for prompt in prompts)
        return {
            "subtask": prompts[0].sample.subtask,
            "samples": samples,
            "count": asdict(counter.count),
            "known_tokens": ", ".join(sorted(used)) if is_sparse else None,
        }

    def outcome(
        self,
        context: Context,
        plan: Plan,
        prompts: Sequence[Prompt],
        records: Mapping[str, Sequence[Record]],
    ) -> Outcome:
        drawn = self.drawn(context.loaded)
        found = {one["sample_id"]: one for part in records["answers"] for one in part["samples"]}
        answers = []
        for record in records["answers"]:
            own = [one for one in record["samples"] if one["sample_id"] in drawn.documents]
            answers.append(
                {**record, "samples": [self._answered(drawn, one, found) for one in own]}
            )
        first = [one for one in prompts if one.sample.sample_id in drawn.documents]
        return super().outcome(context, plan, first, {**records, "answers": answers})

    def _answered(
        self, drawn: _Drawn, sample: dict[str, Any], found: Mapping[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """Return a document's answer: as generated, or the likeliest of its choices."""
        if "score" in sample:
            return sample
        name = sample["sample_id"]
        task, document = drawn.documents[name]
        own = [found[one] for one in drawn.members[name]]
        responses = [(one["log_likelihood"], one["is_likeliest"]) for one in own]
        best = max(range(len(own)), key=lambda place: responses[place][0])
        chosen = document.requests[best].continuation or ""
        return {
            **{key: sample[key] for key in _SHARED},
            "score": task.score(document.number, responses),
            "prediction": chosen.strip() if len(own) > 1 else "",
            "references": list(document.target),
            "num_generated": 0,
        }
