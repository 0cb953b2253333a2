"""The one loop: prefill once, decode many."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from topkbench.methods.compat import token_logits
from topkbench.models.cache import DecodeCache, layer_devices
from topkbench.models.load import LoadedModel
from topkbench.models.prefill import PrefillStore
from topkbench.tasks.base import Sample, TaskDoesNotFit

Question = Literal["sparse", "dense"]
_SPLIT = "\u241e"  # marks where the context ends inside a chat template; in no prompt of ours


@dataclass(frozen=True)
class Prompt:
    """A sample in tokens, split where dense reading ends.

    Attributes:
        sample: The sample.
        prefill_ids: Read densely, once for all methods.
        decode_ids: Decoded one by one with the method, before the answer; empty under
            ``question="dense"``.
    """

    sample: Sample
    prefill_ids: tuple[int, ...]
    decode_ids: tuple[int, ...]


def tokenise(loaded: LoadedModel, sample: Sample, question: Question) -> Prompt:
    """Encode a sample for a model, and split it for an evaluation setup.

    Args:
        loaded: The model.
        sample: The sample.
        question: ``"sparse"`` prefills the context and decodes the question with the method;
            ``"dense"`` prefills the whole prompt.

    Raises:
        TaskDoesNotFit: If prompt and answer exceed the model's window.
    """
    if question not in ("sparse", "dense"):
        raise ValueError(f"question must be sparse or dense, got {question!r}.")
    context, rest = sample.context, sample.question + sample.answer_prefix
    chat = loaded.chat and not sample.as_is
    if chat:
        message = [{"role": "user", "content": f"{context}{_SPLIT}{sample.question}"}]
        text = loaded.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
        context, rest = str(text).split(_SPLIT)
        rest += sample.answer_prefix
    # A rendered chat template holds its special tokens as text already, ours or a file's.
    begun = bool(loaded.tokenizer.bos_token) and context.startswith(loaded.tokenizer.bos_token)
    first = loaded.tokenizer.encode(context, add_special_tokens=not chat and not begun)
    last = loaded.tokenizer.encode(rest, add_special_tokens=False) if rest else []
    total = len(first) + len(last) + sample.max_new_tokens
    if total > loaded.window:
        raise TaskDoesNotFit(
            f"prompt and answer must fit the window of {loaded.window} tokens of {loaded.name}, got"
            f" {total}; use a smaller task.length."
        )
    if sample.question_tokens >= len(first):
        raise ValueError(
            f"task.question_tokens must leave a context, got {sample.question_tokens} with"
            f" {len(first)} tokens in sample {sample.sample_id}."
        )
    if sample.question_tokens:
        cut = len(first) - sample.question_tokens
        first, last = first[:cut], first[cut:] + last
    if question == "sparse" and not last:
        raise ValueError(
            f"question=sparse needs the question apart from the context, and sample"
            f" {sample.sample_id} has none; set task.question_tokens or question=dense."
        )
    if question == "dense":
        first, last = first + last, []
    return Prompt(sample, tuple(first), tuple(last))


def batches(prompts: Sequence[Prompt], batch_size: int) -> list[list[Prompt]]:
    """Group prompts that decode as many question tokens, in order, at most ``batch_size`` each."""
    groups: dict[tuple[str, int], list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault((prompt.sample.subtask, len(prompt.decode_ids)), []).append(prompt)
    return [
        group[begin : begin + batch_size]
        for group in groups.values()
        for begin in range(0, len(group), batch_size)
    ]


class Decoder:
    """Decodes a batch of prompts from their prefills; whatever method is attached is used.

    Args:
        loaded: The model.
        store: Where the prompts' prefills are.
        prompts: A batch that decodes as many question tokens in each row.
        new_tokens: Room for tokens after the question.
        needs: What the method needs beyond keys and values.
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
        room = len(prompts[0].decode_ids) + new_tokens
        self.cache = DecodeCache(prefills, room, layer_devices(loaded.model))
        self.first_logits = torch.stack([states.logits for states in prefills]).to(self.device)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Decode one token a row, ``[B]``; return the logits ``[B, vocabulary]``."""
        self.cache.extend()
        return token_logits(self.loaded.model, tokens[:, None], self.cache, self.cache.positions)

    def read_question(self) -> Tensor:
        """Decode the question's tokens; return the logits after the last, ``[B, vocabulary]``."""
        logits = self.first_logits
        question = torch.tensor([prompt.decode_ids for prompt in self.prompts], device=self.device)
        for column in range(question.shape[1]):
            logits = self.step(question[:, column])
        return logits

    def generate(self) -> list[list[int]]:
        """Read the question and answer greedily; return each row's tokens, without the EOS."""
        eos = eos_ids(self.loaded)
        limits = [prompt.sample.max_new_tokens for prompt in self.prompts]
        answers: list[list[int]] = [[] for _ in self.prompts]
        done = [limit == 0 for limit in limits]
        tokens = self.read_question().argmax(-1)
        while True:
            for row, token in enumerate(tokens.tolist()):
                if not done[row] and token in eos:
                    done[row] = True
                elif not done[row]:
                    answers[row].append(token)
                    done[row] = len(answers[row]) >= limits[row]
            if all(done):
                return answers
            tokens = self.step(tokens).argmax(-1)

    def follow(self, answers: Sequence[Sequence[int]]) -> None:
        """Read the question, then given answers of equal length, whatever is predicted."""
        self.read_question()
        forced = torch.tensor([list(answer) for answer in answers], device=self.device)
        for column in range(forced.shape[1]):
            self.step(forced[:, column].long())


def eos_ids(loaded: LoadedModel) -> frozenset[int]:
    """Return the tokens that end an answer."""
    config = getattr(loaded.model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    if found is None:
        found = loaded.tokenizer.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or [])
