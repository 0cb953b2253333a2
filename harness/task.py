"""What a task is made of: samples with their parts apart, and the score of a prediction."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


class TaskDoesNotFit(ValueError):
    """The task cannot be built at the wanted length."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt with its parts apart, because which part is decoded sparsely decides results.

    Attributes:
        sample_id: Unique within a task's samples, stable between runs.
        subtask: The row that the sample counts for.
        context: What is read before the question is known.
        question: The question, beginning where the context ends.
        answer_prefix: The beginning of the answer, given to the model.
        answers: Strings that a right answer contains.
        max_new_tokens: Tokens that the model may generate.
        length: Tokens of the whole, generated ones included; None where it was not made for a
            model's tokenizer.
        question_tokens: Where a flat prompt is split by count: tokens of ``context`` that belong
            to the question. 0 where question and context are already apart.
        as_is: The text has all the wrapping that its maker wanted; no chat template is put around.
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
    as_is: bool = False


def samples_digest(samples: Sequence[Sample]) -> str:
    """Return the hex digest of the samples' content, the same in every process."""
    payload = json.dumps([asdict(sample) for sample in samples], sort_keys=True)
    return hashlib.sha256(payload.encode()).hexdigest()[:16]


def clean_prediction(prediction: str) -> str:
    """Strip a prediction and turn its control characters into line breaks, as RULER does."""
    return "".join(c if ord(c) >= 32 else "\n" for c in prediction).strip()


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """Return the percentage of ``answers`` found in ``prediction``, ignoring case (RULER)."""
    text = clean_prediction(prediction).lower()
    return 100.0 * sum(answer.lower() in text for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """Return 100 if any of ``answers`` is found in ``prediction``, else 0 (RULER's qa tasks)."""
    text = clean_prediction(prediction).lower()
    return 100.0 * any(answer.lower() in text for answer in answers)
