"""A prompt split into context, question and answer, and string-match scoring of predictions."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


class TaskDoesNotFit(ValueError):
    """The task cannot be built at the requested length."""


def check_window(setting: str, length: int, name: str, window: int) -> None:
    """Check that prompts fit a model's window.

    Args:
        setting: The setting that says how long they are.
        length: Its value, in tokens.
        name: The model's name.
        window: Its window, in tokens.

    Raises:
        TaskDoesNotFit: If they do not.
    """
    if length > window:
        raise TaskDoesNotFit(
            f"{setting} must be at most the window of {window} tokens of {name}, got {length};"
            " model.window=TOKENS sets another window."
        )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt, with context and question separate: results depend on which is decoded sparsely.

    Attributes:
        sample_id: Unique within a task's samples, stable between runs.
        subtask: The sub-task, whose row the sample counts for.
        context: The text before the question.
        question: The question, which directly follows the context.
        answer_prefix: The beginning of the answer, given to the model.
        answers: Strings that a correct answer contains.
        max_new_tokens: Number of tokens that the model may generate.
        length: Tokens of prompt and answer together; None if the sample was not made for the
            model's tokenizer.
        question_tokens: Number of last tokens of ``context`` that are the question, for a prompt
            that is split by count; 0 if question and context are already separate.
        official: Whether the text comes from a file, which may have wrapped it in a chat template.
        until: Strings at which an answer ends; they are not part of it.
        document: Names the text that several samples ask about, each of another sub-task; empty if
            no other sample does.
    """

    sample_id: str
    subtask: str
    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    max_new_tokens: int
    length: int | None
    question_tokens: int = 0
    official: bool = False
    until: tuple[str, ...] = ()
    document: str = ""

    def answer_of(self, text: str) -> str:
        """Return a generated text up to the first of ``until``."""
        for stop in self.until:
            text = text.split(stop)[0]
        return text


def samples_digest(samples: Sequence[Sample]) -> str:
    """Return a digest of the samples' content, the same in every process; 16 hex digits."""
    # Without what a sample does not have, so that digests of the others stay as they were.
    content = [
        {
            name: value
            for name, value in asdict(one).items()
            if name not in ("until", "document") or value
        }
        for one in samples
    ]
    payload = json.dumps(content, sort_keys=True)
    return hashlib.sha256(payload.encode()).hexdigest()[:16]


def clean_prediction(prediction: str) -> str:
    """Return a prediction stripped, its control characters replaced by line breaks, as in RULER."""
    return "".join(c if ord(c) >= 32 else "\n" for c in prediction).strip()


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """Return the percentage of ``answers`` found in ``prediction``, ignoring case (RULER)."""
    text = clean_prediction(prediction).lower()
    return 100.0 * sum(answer.lower() in text for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """Return 100 if any of ``answers`` is found in ``prediction``, else 0 (RULER's qa tasks)."""
    text = clean_prediction(prediction).lower()
    return 100.0 * any(answer.lower() in text for answer in answers)
