"""The decoding loop that all methods share: prefill once, then decode step by step."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from topkbench.harness.samples import Sample, TaskDoesNotFit
from topkbench.methods.base import AnyMethod, KnownTokens
from topkbench.models.compat import has_recurrent_layers, length_change, token_logits
from topkbench.models.encoding import answer_ends, encode_split, has_template, render_chat
from topkbench.models.load import LoadedModel
from topkbench.models.prefill_store import PrefillStore

Question = Literal["sparse", "dense"]


class NotFiniteError(ValueError):
    """A model or a method computed infinity or NaN."""


@dataclass(frozen=True)
class Prompt:
    """A sample as token ids, split into a prefilled and a decoded part.

    Attributes:
        sample: The sample.
        prefill_ids: Tokens that are prefilled with dense attention, once for all methods.
        decode_ids: Question tokens that are decoded with the method, before the answer;
            empty under ``question="dense"``.
        is_long: Whether its positions are rotated by a model's frequencies for long sequences; see
            ``positions_of``.
    """

    sample: Sample
    prefill_ids: tuple[int, ...]
    decode_ids: tuple[int, ...]
    is_long: bool = False

    @property
    def num_tokens(self) -> int:
        """Number of tokens of context and question."""
        return len(self.prefill_ids) + len(self.decode_ids)

    @property
    def most_cached(self) -> int:
        """Cached tokens at the last decode step of the longest answer; 0 without decode steps."""
        if not self.decode_ids and self.sample.max_new_tokens < 2:
            return 0
        # The last token of an answer is never fed back.
        return self.num_tokens + max(self.sample.max_new_tokens - 1, 0)


def tokenise(loaded: LoadedModel, sample: Sample, question: Question) -> Prompt:
    """Encode a sample for a model and split it into a prefilled and a decoded part.

    The prompt is encoded as a whole, in the model's chat template if ``loaded.chat`` is true and
    the text is not wrapped in one already, so both settings of ``question`` give the same tokens.

    Args:
        loaded: The model.
        sample: The sample.
        question: ``"sparse"`` prefills the context and decodes the question with the method;
            ``"dense"`` prefills the whole prompt.

    Raises:
        TaskDoesNotFit: If prompt and answer exceed the model's window.
        ValueError: If the sample cannot be split as ``question`` asks, or the chat template cannot
            wrap it.
    """
    if question not in ("sparse", "dense"):
        raise ValueError(f"question must be sparse or dense, got {question!r}.")
    prefill_ids, decode_ids = _encode(loaded, sample)
    total = len(prefill_ids) + len(decode_ids) + sample.max_new_tokens
    if total > loaded.window:
        remedy = (
            "use shorter prompts in task.source" if sample.official else "use a smaller task.length"
        )
        raise TaskDoesNotFit(
            f"prompt and answer must fit the window of {loaded.window} tokens of {loaded.name}, got"
            f" {total} in sample {sample.sample_id}; {remedy}."
        )
    if sample.question_tokens >= len(prefill_ids):
        raise ValueError(
            f"task.question_tokens must leave a context, got {sample.question_tokens} with"
            f" {len(prefill_ids)} tokens in sample {sample.sample_id}."
        )
    if sample.question_tokens:
        cut = len(prefill_ids) - sample.question_tokens
        prefill_ids, decode_ids = prefill_ids[:cut], prefill_ids[cut:] + decode_ids
    if question == "sparse" and not decode_ids:
        raise ValueError(
            f"question=sparse needs a question that is separate from the context, but sample"
            f" {sample.sample_id} has none; set task.question_tokens or question=dense."
        )
    if question == "dense":
        prefill_ids, decode_ids = prefill_ids + decode_ids, []
    is_long = positions_of(loaded, len(prefill_ids), total, sample.sample_id)
    return Prompt(sample, tuple(prefill_ids), tuple(decode_ids), is_long)


def positions_of(loaded: LoadedModel, prefilled: int, total: int, sample_id: str) -> bool:
    """Return whether a prompt's positions are rotated by frequencies for long sequences.

    Some models attend otherwise beyond a length; see ``length_change``. Keys that were cached
    before it would then meet queries after it, and short prompts long ones of the same batch.

    Args:
        loaded: The model.
        prefilled: Tokens that are prefilled.
        total: Tokens of the prompt and the longest answer.
        sample_id: Names the prompt.

    Raises:
        TaskDoesNotFit: If that would change while it is decoded, or with the tokens beyond it.
    """
    change = length_change(loaded.model.config)
    if change is None:
        return False
    kind, at = change
    if total <= at or (kind == "longrope" and prefilled > at):
        return total > at
    other = f", or of which prompts have more than {at} tokens" if kind == "longrope" else ""
    raise TaskDoesNotFit(
        f"{loaded.name} attends otherwise from {at} tokens on ({kind}), so a prompt and its answer"
        f" must have fewer{' or begin beyond' if other else ''}, got {prefilled} prefilled tokens"
        f" and {total} in all in sample {sample_id}; use a task.length of at most {at}{other}."
    )


def count_tokens(loaded: LoadedModel, sample: Sample) -> int:
    """Return the number of tokens of a sample's prompt, the chat template included."""
    return sum(map(len, _encode(loaded, sample)))


def is_wrapped(loaded: LoadedModel, sample: Sample) -> bool:
    """Return whether a sample reaches the model in a chat template, the model's or its own."""
    return loaded.chat or _has_template(loaded, sample)


def _has_template(loaded: LoadedModel, sample: Sample) -> bool:
    text = sample.context + sample.question
    return sample.official and has_template(loaded.tokenizer, text, loaded.chat_template_kwargs)


def _encode(loaded: LoadedModel, sample: Sample) -> tuple[list[int], list[int]]:
    """Return the tokens of a sample's prompt up to the end of its context, and the others."""
    text, cut = sample.context + sample.question, len(sample.context)
    wrap = loaded.chat and not _has_template(loaded, sample)
    if wrap:
        # What a template writes is complete: it contains the special tokens, and no second ones.
        context = sample.context.removeprefix(loaded.tokenizer.bos_token or "")
        text, cut = render_chat(
            loaded.tokenizer, context, sample.question, loaded.chat_template_kwargs
        )
    return encode_split(loaded.tokenizer, text + sample.answer_prefix, cut, begin=not wrap)


def tokenise_all(
    loaded: LoadedModel, samples: Sequence[Sample], question: Question
) -> list[Prompt]:
    """Encode samples for a model."""
    return [tokenise(loaded, sample, question) for sample in samples]


def batches(prompts: Sequence[Prompt], batch_size: int) -> list[list[Prompt]]:
    """Group prompts by sub-task, and by how positions are rotated, to ``batch_size`` at most.

    The prompts of a document, which are of different sub-tasks, are in one batch and count once.
    """
    groups: dict[tuple[str, bool], dict[str, list[Prompt]]] = {}
    for prompt in prompts:
        sample = prompt.sample
        kind = "" if sample.document else sample.subtask
        group = groups.setdefault((kind, prompt.is_long), {})
        group.setdefault(sample.document or sample.sample_id, []).append(prompt)
    found = []
    for group in groups.values():
        members = list(group.values())
        for begin in range(0, len(members), batch_size):
            found.append([one for some in members[begin : begin + batch_size] for one in some])
    return found


def by_subtask(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Return the prompts of each sub-task, which decode together, of a batch."""
    found: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        found.setdefault(prompt.sample.subtask, []).append(prompt)
    return list(found.values())


def prefilled_once(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return one prompt for each prefill of a batch: those of a document may share one."""
    return list({prompt.prefill_ids: prompt for prompt in reversed(prompts)}.values())[::-1]


def spread_over_subtasks(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """Return at most ``limit`` prompts, taken from the sub-tasks in turn; deterministic."""
    remaining: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        remaining.setdefault(prompt.sample.subtask, []).append(prompt)
    chosen: list[Prompt] = []
    while remaining and len(chosen) < limit:
        for subtask in list(remaining):
            chosen.append(remaining[subtask].pop(0))
            if not remaining[subtask]:
                del remaining[subtask]
    return chosen[:limit]


def known_tokens(loaded: LoadedModel, method: AnyMethod, counts: Sequence[int]) -> KnownTokens:
    """Return how tokens that are known beforehand go through a model with a method.

    Args:
        loaded: The model. In a hybrid one each token, padding too, changes the states of the layers
            without attention, so that its tokens are decoded one by one.
        method: The method; see ``TopKMethod.known_tokens``.
        counts: How many tokens each row has.
    """
    if has_recurrent_layers(loaded.model):
        return "one by one"
    return method.known_tokens(counts)


class Decoder:
    """Decodes a batch of prompts from their prefills, with the method that is attached.

    Args:
        loaded: The model.
        store: Stores the prompts' prefills.
        prompts: A batch.
        new_tokens: Cache slots for tokens after the longest question.
        needs: What the method needs beyond keys and values.

    Attributes:
        lengths: For each token of each row so far, the cached tokens at its step, its own included:
            of the longest row if all rows decode a token, of its own row if several are known.

    Raises:
        NotFiniteError: If the prefill's logits, or later a step's, are not finite.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        store: PrefillStore,
        prompts: Sequence[Prompt],
        new_tokens: int,
        needs: frozenset[str] = frozenset(),
    ) -> None:
        prefills = [store.get(prompt.prefill_ids, needs) for prompt in prompts]
        self.loaded = loaded
        self.device = loaded.model.device
        self.prompts = prompts
        self.prefill_ms = [states.milliseconds for states in prefills]
        self.needs_ms = [states.needs_ms(needs) for states in prefills]
        free_slots = max(len(prompt.decode_ids) for prompt in prompts) + new_tokens
        self.cache = store.cache([prompt.prefill_ids for prompt in prompts], free_slots, needs)
        self.first_logits = torch.stack([states.logits for states in prefills]).to(self.device)
        self.lengths: list[int] = []
        self.check(self.first_logits)

    def steps_over(self, k: int, since: int = 0) -> int:
        """Return the number of steps over more than ``k`` cached tokens, one for each row.

        Args:
            k: The budget.
            since: Steps that are not counted, the first ones.
        """
        return sum(n > k for n in self.lengths[since:])

    def check(self, logits: Tensor, done: Sequence[bool] | None = None) -> Tensor:
        """Return a step's logits after checking that they are finite in rows that are not done.

        Raises:
            NotFiniteError: If they are not; the message names the sample.
        """
        finite = logits.isfinite().all(-1)
        if done is not None:
            finite = finite | torch.tensor(done, device=finite.device)
        if not finite.all():
            row = int(finite.int().argmin())
            raise NotFiniteError(
                f"the logits must be finite, got infinity or NaN from {self.loaded.name} in "
                f"{str(self.loaded.model.dtype).removeprefix('torch.')} at sample "
                f"{self.prompts[row].sample.sample_id}, {self._decoded(row)} tokens after its "
                "prefill; use dtype=float32, or check the weights."
            )
        return logits

    def _decoded(self, row: int) -> int:
        return self.cache.ends[row] - len(self.prompts[row].prefill_ids)

    def step(self, tokens: Tensor) -> Tensor:
        """Decode one token per row, ``[B]``; return the logits ``[B, vocabulary]``."""
        self.cache.extend()
        self.lengths += [self.cache.n] * len(self.prompts)
        return token_logits(self.loaded.model, tokens[:, None], self.cache, self.cache.positions)

    def forward(self, given: Sequence[Sequence[int]], every: bool = False) -> Tensor:
        """Decode known tokens in one forward of the model.

        Args:
            given: Each row's tokens; rows may have different numbers of them, one row at least one.
            every: Return the logits after every token; rows must then have equally many.

        Returns:
            The logits after each row's last token, ``[B, vocabulary]``, of a row without tokens
            those of its prefill; with ``every`` ``[B, tokens, vocabulary]``.
        """
        counts = [len(tokens) for tokens in given]
        if self.cache.is_recurrent:
            return self.one_by_one(given, every)
        before, most = list(self.cache.ends), max(counts)
        self.cache.extend(counts)
        # Padding behind a row's tokens is decoded too, at the position of its last one.
        padded = [[*tokens, *[0] * (most - len(tokens))] for tokens in given]
        last = torch.tensor(
            [[end + max(count, 1) - 1] for end, count in zip(before, counts, strict=True)],
            device=self.device,
        )
        kept = range(most) if every else sorted({max(count, 1) - 1 for count in counts})
        logits = token_logits(
            self.loaded.model,
            torch.tensor(padded, device=self.device),
            self.cache,
            torch.minimum(self.cache.positions, last),
            torch.tensor(kept, device=self.device),
        )
        self.cache.drop_padding()
        for end, count in zip(before, counts, strict=True):
            self.lengths += range(end + 1, end + count + 1)
        if every:
            self.check(logits.flatten(1))
            return logits
        place = {token: kept.index(token) for token in kept}
        rows = [
            logits[row, place[count - 1]] if count else self.first_logits[row].to(logits.dtype)
            for row, count in enumerate(counts)
        ]
        return self.check(torch.stack(rows))

    def one_by_one(self, given: Sequence[Sequence[int]], every: bool = False) -> Tensor:
        """Do what ``forward`` does in a forward of the model for each token.

        Raises:
            ValueError: If the rows differ in the number of tokens.
        """
        if len(set(map(len, given))) > 1:
            raise ValueError(
                "rows that are forced must have the same number of known tokens, got"
                f" {list(map(len, given))}."
            )
        columns = torch.tensor(given, dtype=torch.long, device=self.device).unbind(1)
        if every:
            return torch.stack([self.check(self.step(column)) for column in columns], 1)
        logits = self.first_logits
        for column in columns:
            logits = self.check(self.step(column))
        return logits

    def read_question(self) -> Tensor:
        """Decode the question's tokens in one forward; return the logits ``[B, vocabulary]``."""
        questions = [prompt.decode_ids for prompt in self.prompts]
        return self.forward(questions) if any(questions) else self.first_logits

    def teacher_force(self, answers: Sequence[Sequence[int]]) -> Tensor:
        """Decode the questions, then the given answers instead of predictions, step by step.

        Returns:
            The logits after the last token, ``[B, vocabulary]``.

        Raises:
            ValueError: If the rows differ in the number of tokens.
        """
        given = [
            [*prompt.decode_ids, *answer]
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]
        return self.one_by_one(given)

    def _has_stopped(self, sample: Sample, answer: Sequence[int]) -> bool:
        """Return whether the last token of an answer completes one of the strings that end it."""
        if not sample.until:
            return False
        # A character has at most four tokens; a string may begin inside the first of them.
        recent = list(answer[-4 * max(map(len, sample.until)) - 1 :])
        text = self.loaded.tokenizer.decode(recent, skip_special_tokens=True)
        return any(stop in text for stop in sample.until)

    def is_cut(self, sample: Sample, answer: Sequence[int]) -> bool:
        """Return whether an answer, as `generate` returned it, was cut off at its longest."""
        return len(answer) >= sample.max_new_tokens > 0 and not self._has_stopped(sample, answer)

    def generate(self, known: KnownTokens = "one by one") -> list[list[int]]:
        """Decode the questions, then answer greedily; return each row's tokens, without the end.

        Args:
            known: How the attached method takes the questions, see ``known_tokens``. If
                one by one, a row whose question is shorter begins its answer earlier.
        """
        ends = answer_ends(self.loaded)
        answers: list[list[int]] = [[] for _ in self.prompts]
        done = [prompt.sample.max_new_tokens == 0 for prompt in self.prompts]
        questions = [prompt.decode_ids for prompt in self.prompts]
        logits = self.first_logits
        if known != "one by one":
            logits, questions = self.read_question(), [()] * len(self.prompts)
        for position in itertools.count():
            tokens = logits.argmax(-1).tolist()
            is_asking = False
            for row, (prompt, question) in enumerate(zip(self.prompts, questions, strict=True)):
                if position < len(question):
                    tokens[row], is_asking = question[position], True
                elif not done[row] and tokens[row] in ends:
                    done[row] = True
                elif not done[row]:
                    answers[row].append(tokens[row])
                    is_whole = len(answers[row]) >= prompt.sample.max_new_tokens
                    done[row] = is_whole or self._has_stopped(prompt.sample, answers[row])
            if all(done) and not is_asking:
                break
            step = self.step(torch.tensor(tokens, device=self.device))
            logits = self.check(step, done)
        return answers
