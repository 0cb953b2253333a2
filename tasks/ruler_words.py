"""Prompts in the manner of RULER over random words, on which the shipped model is trained."""

import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from topkbench.harness.decoding import count_tokens
from topkbench.harness.samples import Sample
from topkbench.models.encoding import beginning
from topkbench.models.load import LoadedModel
from topkbench.tasks.generated import Drawn, GeneratedPrompts, reserved
from topkbench.tasks.ruler_words_prompts import SUBTASKS, VERSION, Prompt, make_prompt
from topkbench.tasks.words import TEST_NAMES, word_pools

# Called with rng, budget and count; see ``make_prompt``.
WritePrompt = Callable[..., Prompt]


@dataclass(kw_only=True)
class RulerWords(GeneratedPrompts):
    """Seven sub-tasks in the manner of RULER (arXiv:2404.06654), one row each and their mean.

    The wording is our own, and keys, values and haystacks are random words: prompts for the shipped
    model, which is trained on words that no test uses. For other models ``task=ruler`` has RULER's
    own prompts.

    Attributes:
        example: Whether a solved example precedes the prompt where RULER has one (vt, cwe); None
            shows it to all models except those trained on prompts without it, as the shipped one.
    """

    name: str = "ruler_words"
    example: bool | None = None
    all_subtasks: ClassVar[Sequence[str]] = SUBTASKS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_subtasks()

    def prompts(self, loaded: LoadedModel) -> str:
        return f"topkbench {VERSION}"

    def draw(self, loaded: LoadedModel) -> Drawn:
        samples = []
        for subtask in self.chosen_subtasks:
            write = functools.partial(
                make_prompt,
                subtask,
                words=word_pools()[0],
                share=TEST_NAMES,
                example=self._example(loaded),
            )
            for index in range(self.num_samples):
                samples.append(self.make(loaded, subtask, self.prompt_length, index, write))
        return Drawn(samples)

    def content(self, loaded: LoadedModel) -> dict[str, Any]:
        return {
            "subtasks": list(self.chosen_subtasks),
            "length": self.prompt_length,
            "short_answers": loaded.short_answers,
            "example": self._example(loaded),
            "words": hashlib.sha256(" ".join(word_pools()[0]).encode()).hexdigest(),
        }

    def _example(self, loaded: LoadedModel) -> bool:
        return not loaded.short_answers if self.example is None else self.example

    def make(
        self, loaded: LoadedModel, subtask: str, length: int, index: int, write: WritePrompt
    ) -> Sample:
        """Return one sample of at most ``length`` tokens, its prompt written by ``write``."""

        def count(text: str) -> int:
            return len(loaded.tokenizer.encode(text, add_special_tokens=False))

        wrapping = sum(map(count, self.around(loaded)))
        if not loaded.chat:
            wrapping = len(beginning(loaded.tokenizer))
        for_answer = reserved(subtask, loaded.short_answers)
        budget = length - wrapping - for_answer
        while True:
            rng = random.Random(f"{self.seed}-{subtask}-{length}-{index}")
            prompt = write(rng=rng, budget=budget, count=count)
            new_tokens = for_answer
            if loaded.short_answers:
                new_tokens += count(prompt.reference)
            sample = Sample(
                sample_id=f"{subtask}-{length}-{self.seed}-{index}",
                subtask=subtask,
                context=prompt.context,
                question=prompt.question,
                answer_prefix=prompt.answer_prefix,
                answers=prompt.answers,
                max_new_tokens=new_tokens,
                length=None,
            )
            used = count_tokens(loaded, sample) + new_tokens
            if used <= length:
                return replace(sample, length=used)
            # Pieces of a text may have fewer tokens apart than together.
            budget -= used - length
