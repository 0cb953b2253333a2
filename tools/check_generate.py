"""Check that our loop with full attention is plain greedy decoding: transformers' ``generate``.

python tools/check_generate.py model=smollm2_135m task=ruler task.source=FOLDER --prompts 20

The model is loaded twice: one copy attends with torch's SDPA and decodes with ``generate``, the
other answers as in a measurement, with the question decoded and with it prefilled. Both get the
same token ids, the same end tokens and the same limit, one prompt at a time. The prompts are those
of the task; ``task.source`` reads RULER's own files, or a file of any prompts in their form. Where
two answers part, the logits of both tokens are compared. The exit status is 1 if answers in float32
part without a tie.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # lets the script run without installing the package
    sys.path[0] = str(ROOT / ".types")

import torch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

from topkbench.analysis.console import say, say_error  # noqa: E402
from topkbench.harness.decoding import (  # noqa: E402
    Decoder,
    Prompt,
    Question,
    spread_over_subtasks,
    tokenise,
)
from topkbench.harness.generation import GenerationTask, answer, score_of  # noqa: E402
from topkbench.harness.main import checked, sentence  # noqa: E402
from topkbench.harness.settings import Composed, Names, construct  # noqa: E402
from topkbench.harness.task import Context  # noqa: E402
from topkbench.methods.base import check_whole  # noqa: E402
from topkbench.models.encoding import answer_ends  # noqa: E402
from topkbench.models.load import LoadedModel  # noqa: E402
from topkbench.models.prefill_store import PrefillStore  # noqa: E402

QUESTIONS: tuple[Question, ...] = ("sparse", "dense")
TIE = 1e-4
"""In float32 two tokens tie if their logits differ by at most this share of the largest logit: a
logit is the end of thousands of additions, each rounded by up to 6e-8 of its sum."""
COLUMNS = "{:28} {:>6} {:8} {:>9} {:>6} {:>5}  {}"


@dataclass(frozen=True)
class Parting:
    """Where two answers to one prompt part.

    Attributes:
        step: The number of tokens that are the same.
        token: The token that ``generate`` chose there.
        own_token: The token that our loop chose there.
        gap: By how much ``generate``'s token is above ours in ``generate``'s logits.
        own_gap: By how much our token is above ``generate``'s in our logits.
        difference: The largest difference between a logit of ``generate`` and ours.
        largest: The largest absolute logit.
    """

    step: int
    token: int
    own_token: int
    gap: float
    own_gap: float
    difference: float
    largest: float

    @property
    def is_tie(self) -> bool:
        """Whether the rounding of float32 by itself can make either token the likelier one."""
        return max(abs(self.gap), abs(self.own_gap), self.difference) <= TIE * self.largest


@dataclass(frozen=True)
class Answers:
    """Two answers to one prompt.

    Attributes:
        sample_id: The sample.
        subtask: Its sub-task.
        dtype: The model's.
        question: How our loop read the question.
        prompt_tokens: Tokens of the prompt.
        generated: The tokens of ``generate``, without the end token.
        tokens: Ours.
        prediction: Our answer as text.
        references: The strings that a correct answer contains.
        generated_score: The score of ``generate``'s answer, 0 to 100.
        score: Our answer's.
        parting: Where the two part; None if all tokens are equal.
    """

    sample_id: str
    subtask: str
    dtype: str
    question: Question
    prompt_tokens: int
    generated: list[int]
    tokens: list[int]
    prediction: str
    references: list[str]
    generated_score: float
    score: float
    parting: Parting | None

    @property
    def is_wrong(self) -> bool:
        """Whether the answers part in float32, and rounding by itself cannot be why."""
        is_exact = self.dtype == "float32"
        return is_exact and self.parting is not None and not self.parting.is_tie

    def line(self) -> str:
        """Return the line of the printed table."""
        found = "equal"
        if self.parting is not None:
            one = self.parting
            found = (
                f"part at token {one.step + 1}: {one.token} is {one.gap:.2g} above {one.own_token}"
                f" in generate's logits, {one.own_gap:.2g} below it in ours; the logits, up to"
                f" {one.largest:.3g}, differ by up to {one.difference:.2g}"
            )
        cells = (self.sample_id, self.prompt_tokens, self.question, len(self.generated))
        return COLUMNS.format(*cells, f"{self.generated_score:.0f}", f"{self.score:.0f}", found)


class Check:
    """Our loop with full attention beside ``generate``.

    Args:
        context: The context of a cell with full attention.
        reference: The same model, loaded by itself.
    """

    def __init__(self, context: Context, reference: LoadedModel) -> None:
        self.context = context
        self.ends = answer_ends(context.loaded)
        self._model: Any = reference.model
        self._model.set_attn_implementation("sdpa")

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[Answers]:
        """Yield both answers to one sample, tokenised for each question in turn.

        Raises:
            ValueError: If the prompts do not have the same tokens.
        """
        ids = [*prompts[0].prefill_ids, *prompts[0].decode_ids]
        for prompt in prompts:
            if [*prompt.prefill_ids, *prompt.decode_ids] != ids:
                raise ValueError(
                    "question=sparse and question=dense must give the same tokens, but do not in"
                    f" sample {prompt.sample.sample_id}."
                )
        sample = prompts[0].sample
        chosen, logits = self.generate(ids, sample.max_new_tokens)
        generated = chosen[:-1] if chosen[-1] in self.ends else chosen
        text = str(self.context.loaded.tokenizer.decode(generated, skip_special_tokens=True))
        for prompt in prompts:
            (ours,) = answer(self.context, [prompt])["samples"]
            yield Answers(
                sample_id=sample.sample_id,
                subtask=sample.subtask,
                dtype=str(self._model.dtype).removeprefix("torch."),
                question="sparse" if prompt.decode_ids else "dense",
                prompt_tokens=len(ids),
                generated=generated,
                tokens=ours["tokens"],
                prediction=ours["prediction"],
                references=list(sample.answers),
                generated_score=score_of(sample, text),
                score=ours["score"],
                parting=self._parting(prompt, chosen, logits, ours["tokens"]),
            )
        self.context.store.release()

    def generate(self, ids: Sequence[int], limit: int) -> tuple[list[int], tuple[Tensor, ...]]:
        """Return ``generate``'s tokens, the end token included, and the logits behind each.

        Args:
            ids: The prompt.
            limit: At most this many tokens are generated.
        """
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=min(self.ends, default=0),
            return_dict_in_generate=True,
            output_logits=True,
        )
        # What these leave open would come from the model's own, such as a penalty on repetition.
        self._model.generation_config = settings
        prompt = torch.tensor([ids], device=self._model.device)
        found = self._model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
        )
        return found.sequences[0, len(ids) :].tolist(), found.logits

    def _parting(
        self, prompt: Prompt, chosen: list[int], logits: Sequence[Tensor], tokens: list[int]
    ) -> Parting | None:
        """Return where our tokens part from those that ``generate`` has chosen."""
        same = 0
        while same < min(len(chosen), len(tokens)) and chosen[same] == tokens[same]:
            same += 1
        has_ended = same == len(tokens) < prompt.sample.max_new_tokens
        if same == len(chosen) or (has_ended and chosen[same] in self.ends):
            return None
        theirs, ours = logits[same][0].float(), self._own_logits(prompt, tokens[:same]).float()
        own_token = tokens[same] if not has_ended else max(self.ends, key=lambda one: ours[one])
        token = chosen[same]
        return Parting(
            step=same,
            token=token,
            own_token=own_token,
            gap=(theirs[token] - theirs[own_token]).item(),
            own_gap=(ours[own_token] - ours[token]).item(),
            difference=(theirs - ours).abs().max().item(),
            largest=max(theirs.abs().max().item(), ours.abs().max().item()),
        )

    def _own_logits(self, prompt: Prompt, tokens: Sequence[int]) -> Tensor:
        """Return our loop's logits after a prompt and the given tokens, ``[vocabulary]``."""
        context = self.context
        decoder = Decoder(context.loaded, context.store, [prompt], len(tokens) + 1)
        with context.attached(decoder, context.method):
            logits = decoder.read_question()
            for token in tokens:
                logits = decoder.step(torch.tensor([token], device=decoder.device))
        return logits[0]


def composed(settings: Sequence[str]) -> Composed:
    """Return the configuration of a cell with full attention.

    Args:
        settings: As on topkbench's command line.

    Raises:
        SettingsError: If one of them is wrong.
    """
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        own = ("method=full", "question=sparse", "tracker=none")
        config = compose("config", overrides=[*settings, *own])
    found: Composed = checked(config, given=())
    return found


def summary(found: Sequence[Answers]) -> list[str]:
    """Return what was found for each question, in one line each."""
    lines = []
    for question in QUESTIONS:
        part = [one for one in found if one.question == question]
        equal = sum(one.parting is None for one in part)
        ties = sum(one.parting is not None and one.parting.is_tie for one in part)
        means = (
            statistics.fmean(one.generated_score for one in part),
            statistics.fmean(one.score for one in part),
        )
        lines.append(
            f"{part[0].dtype}, question={question}: {equal} of {len(part)} answers are equal token"
            f" for token, {ties} part where float32's rounding decides, {len(part) - equal - ties}"
            f" elsewhere; mean score {means[0]:.2f} with generate, {means[1]:.2f} with our loop."
        )
    return lines


def compared(settings: Sequence[str], limit: int) -> Iterator[Answers]:
    """Yield the answers to each prompt and question as soon as they are decoded.

    Args:
        settings: As on topkbench's command line.
        limit: At most this many prompts, taken from the sub-tasks in turn.

    Raises:
        ValueError: If a setting is wrong, or the model or its prompts are.
    """
    made = composed(settings)
    task, full = made.task, made.method
    if not isinstance(task, GenerationTask) or "answers" not in task.parts:
        raise ValueError(f"task must be one whose prompts are answered, got task={task.name}.")
    loaded, reference = (construct(Names({}), "model", made.settings["model"]) for _ in range(2))
    # As a cell answers: by full attention's default backend, whichever one is timed.
    context = Context(loaded, PrefillStore(loaded.model), type(full)(), made.policy, full)
    check = Check(context, reference)
    for prompt in spread_over_subtasks(task.tokenised(loaded), limit):
        yield from check.answers([tokenise(loaded, prompt.sample, one) for one in QUESTIONS])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print each comparison; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=20, help="at most this many (20)")
    parser.add_argument("--out", type=Path, help="write the answers to a file of JSON lines")
    parser.add_argument("settings", nargs="*", help="as on topkbench's command line")
    options = parser.parse_args(arguments)
    found: list[Answers] = []
    say(COLUMNS.format("sample", "tokens", "question", "generated", "score", "ours", "answers"))
    try:
        check_whole("--prompts", options.prompts)
        for one in compared(options.settings, options.prompts):
            found.append(one)
            say(one.line())
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(one)) + "\n")
    except (ValueError, HydraException, OSError) as error:
        say_error(sentence(error))
        return 2
    for line in summary(found):
        say(line)
    return 1 if any(one.is_wrong for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
