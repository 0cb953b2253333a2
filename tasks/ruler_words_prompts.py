"""The prompts of the seven synthetic RULER sub-tasks, in our own words.

Source: RULER (arXiv:2404.06654), section 3, with the parameters of its released configuration:
4 keys, values or queries in the multi-* tasks, 1 chain of 4 hops, 10 common words 30 times and the
others 3 times, coded words with zeta-distributed frequencies (alpha 2.0). The haystack is random
words; niah_multikey's is other needles, the hard variant (multikey_2). Keys are single words
of one half of the pool while it lasts, values are two words of the other half.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from topkbench.harness.samples import TaskDoesNotFit
from topkbench.harness.texts import TextFiles
from topkbench.methods.base import check_whole
from topkbench.models.digests import tokenizer_digest
from topkbench.models.encoding import encode
from topkbench.models.load import LoadedModel
from topkbench.tasks.words import (
    CALIBRATION_NAMES,
    CALIBRATION_NUMBERS,
    random_names,
    word_pools,
)

VERSION = 1
"""Counts the changes of these prompts and of the needle task's: rows of different ones are not
compared."""
SUBTASKS = (
    "niah_single",
    "niah_multikey",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
)
NUM_NEEDLES = 4
VT_HOPS = 4
CWE_COMMON, CWE_FREQUENT, CWE_RARE = 10, 30, 3
FWE_ALPHA = 2.0
SENTENCE_WORDS = 12
WITH_EXAMPLE = ("vt", "cwe")
EXAMPLE_TOKENS = 500

FACTS = "Read the text below and remember the secret words in it.\n"
VARIABLES = "Read the text below and remember what is assigned to each variable.\n"
NUMBERED = "Read the numbered list of words below and remember the most common ones.\n"
CODED = "Read the coded text below and remember the most frequent coded words.\n"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt without the identity of a sample; see :class:`topkbench.harness.samples.Sample`.

    ``reference`` is the complete answer, as the shipped model is trained to write it.
    """

    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    reference: str


CountTokens = Callable[[str], int]


def needle(key: str, value: str) -> str:
    """Return the sentence that hides ``value`` under ``key``."""
    return f" The secret words: {key} {value}."


def filler(rng: random.Random, words: Sequence[str]) -> str:
    """Return one sentence of random words."""
    return " " + " ".join(rng.choices(words, k=SENTENCE_WORDS)) + "."


def ask_one(key: str, value: str) -> tuple[str, str, str]:
    """Return (question, answer prefix, reference) for one key with one value."""
    return f"\nWhat are the secret words of {key}?", f" The secret words: {key}", f" {value}."


def ask_all_values(key: str, values: Sequence[str]) -> tuple[str, str, str]:
    """Return (question, answer prefix, reference) for all values of one key."""
    answer = f", {key} ".join(values)
    return (
        f"\nWhat are all the secret words of {key}?",
        f" All the secret words: {key}",
        f" {answer}.",
    )


def ask_many(keys: Sequence[str], values: Sequence[str]) -> tuple[str, str, str]:
    """Return (question, answer prefix, reference) for several keys at once."""
    items = ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    return (
        f"\nWhat are the secret words of {', '.join(keys[:-1])} and {keys[-1]}?",
        f" The secret words: {keys[0]}",
        f"{items.removeprefix(keys[0])}.",
    )


def ask_variables(value: str, names: Sequence[str]) -> tuple[str, str, str]:
    """Return (question, answer prefix, reference) for the variables that hold ``value``."""
    return (
        f"\nWhich variables hold the value {value}?",
        f" The variables that hold {value}:",
        f" {', '.join(names)}.",
    )


def ask_common(words: Sequence[str]) -> tuple[str, str, str]:
    """Return (question, answer prefix, reference) for the most common words of a list."""
    return (
        "\nWhat are the ten most common words in the list?",
        " The ten most common words:",
        f" {', '.join(words)}.",
    )


def ask_frequent(words: Sequence[str]) -> tuple[str, str, str]:
    """Return (question, answer prefix, reference) for the most frequent coded words."""
    return (
        "\nWhat are the three most frequent coded words in the text?",
        " The three most frequent coded words:",
        f" {', '.join(words)}.",
    )


def halves(words: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Split a pool into the words for keys and the words for values."""
    return words[::2], words[1::2]


def two_words(rng: random.Random, words: Sequence[str]) -> str:
    """Return a value: two different words."""
    return " ".join(rng.sample(words, 2))


def spare_keys(rng: random.Random, words: Sequence[str]) -> Iterator[str]:
    """Yield distinct keys forever: all single words of the pool, then pairs of words."""
    yield from rng.sample(words, len(words))
    pairs: set[str] = set()
    while True:
        pair = "-".join(rng.sample(words, 2))
        if pair not in pairs:
            pairs.add(pair)
            yield pair


def assignment_chain(rng: random.Random, names: Sequence[str], value: str) -> list[str]:
    """Return the assignments of one chain in order; the first assigns the value."""
    statements = [f" VAR {names[0]} = {value}."]
    statements += [f" VAR {new} = VAR {old}." for old, new in itertools.pairwise(names)]
    return statements


def scatter(rng: random.Random, haystack: list[str], needles: Sequence[str], ordered: bool) -> str:
    """Return the haystack with the needles inserted at random positions between its sentences."""
    positions = sorted(rng.choices(range(len(haystack) + 1), k=len(needles)))
    order = list(needles) if ordered else rng.sample(list(needles), len(needles))
    for position, sentence in zip(reversed(positions), reversed(order), strict=True):
        haystack.insert(position, sentence)
    return "".join(haystack)


def fill(
    budget: int, count: CountTokens, draw_sentence: Callable[[], str], minimum: int = 1
) -> list[str]:
    """Return random sentences, drawn until the next one would exceed ``budget`` tokens in total.

    Raises:
        TaskDoesNotFit: If fewer than ``minimum`` sentences fit.
    """
    sentences: list[str] = []
    used = 0
    while True:
        sentence = draw_sentence()
        used += count(sentence)
        if used > budget:
            break
        sentences.append(sentence)
    if len(sentences) < minimum:
        raise TaskDoesNotFit(
            f"the haystack must hold at least {minimum} sentences, but {budget} tokens are left for"
            " it; use a larger task.length."
        )
    return sentences


def _niah(
    rng: random.Random, words: Sequence[str], budget: int, count: CountTokens, subtask: str
) -> Prompt:
    num_keys = NUM_NEEDLES if subtask == "niah_multiquery" else 1
    num_values = NUM_NEEDLES if subtask == "niah_multivalue" else 1
    key_words, value_words = halves(words)
    keys = rng.sample(key_words, num_keys)
    values = [two_words(rng, value_words) for _ in range(num_keys * num_values)]
    if len({value.split()[0] for value in values}) < len(values):
        # Values must differ in their first word, or an answer would be ambiguous: draw again.
        return _niah(rng, words, budget, count, subtask)
    if subtask == "niah_multivalue":
        question, prefix, reference = ask_all_values(keys[0], values)
        needles = [needle(keys[0], value) for value in values]
    else:
        needles = [needle(key, value) for key, value in zip(keys, values, strict=True)]
        ask = ask_one(keys[0], values[0]) if num_keys == 1 else ask_many(keys, values)
        question, prefix, reference = ask
    others = [word for word in words if word not in keys]
    left = budget - sum(map(count, (FACTS, question, prefix, reference, *needles)))
    if subtask == "niah_multikey":
        spare = spare_keys(rng, [word for word in key_words if word not in keys])
        haystack = fill(left, count, lambda: needle(next(spare), two_words(rng, value_words)))
    else:
        haystack = fill(left, count, lambda: filler(rng, others))
    context = FACTS + scatter(rng, haystack, needles, ordered=False)
    return Prompt(
        context=context,
        question=question,
        answer_prefix=prefix,
        answers=tuple(values),
        reference=reference,
    )


def _vt(
    rng: random.Random, words: Sequence[str], budget: int, count: CountTokens, share: slice
) -> Prompt:
    names = rng.sample(random_names(5, upper=True)[share], VT_HOPS + 1)
    reserved = () if share == CALIBRATION_NAMES else CALIBRATION_NUMBERS
    numbers = (str(rng.randint(10000, 99999)) for _ in itertools.count())
    value = next(number for number in numbers if number not in reserved)
    statements = assignment_chain(rng, names, value)
    question, prefix, reference = ask_variables(value, names)
    left = budget - sum(map(count, (VARIABLES, question, prefix, reference, *statements)))
    haystack = fill(left, count, lambda: filler(rng, words))
    return Prompt(
        context=VARIABLES + scatter(rng, haystack, statements, ordered=True),
        question=question,
        answer_prefix=prefix,
        answers=tuple(names),
        reference=reference,
    )


def numbered_list(
    rng: random.Random, common: Sequence[str], rare: Sequence[str], frequent: int, seldom: int
) -> list[str]:
    """Return shuffled, numbered entries: common words ``frequent`` times, rare ones ``seldom``."""
    entries = list(common) * frequent + list(rare) * seldom
    rng.shuffle(entries)
    return [f" {number}. {word}" for number, word in enumerate(entries, start=1)]


def _cwe(rng: random.Random, words: Sequence[str], budget: int, count: CountTokens) -> Prompt:
    order = rng.sample(words, len(words))
    common, others = order[:CWE_COMMON], order[CWE_COMMON:]
    question, prefix, reference = ask_common(common)
    left = budget - sum(map(count, (NUMBERED, question, prefix, reference)))
    # All entries have nearly the same number of tokens, so one of them gives a first estimate of
    # the number of entries, which then shrinks until the list fits.
    frequent = CWE_FREQUENT if budget >= 2048 else max(4, CWE_FREQUENT * budget // 2048)
    per_entry = max(1, count(f" 1000. {common[0]}"))
    num_entries = max(0, left // per_entry)
    # If the pool has too few words for the budget, all words are repeated proportionally more.
    repeat = 1 + num_entries // (CWE_COMMON * frequent + CWE_RARE * len(others))
    num_rare = min(len(others), max(1, (num_entries // repeat - CWE_COMMON * frequent) // CWE_RARE))
    while num_rare > 0:
        entries = numbered_list(
            rng, common, others[:num_rare], frequent * repeat, CWE_RARE * repeat
        )
        if count("".join(entries)) <= left:
            return Prompt(
                context=NUMBERED + "".join(entries),
                question=question,
                answer_prefix=prefix,
                answers=tuple(common),
                reference=reference,
            )
        num_rare -= 1 + num_rare // 50
    raise TaskDoesNotFit(
        f"cwe must hold {CWE_COMMON} common words {frequent} times and at least one other word,"
        f" but {left} tokens are left for them; use a larger task.length."
    )


def _fwe(rng: random.Random, budget: int, count: CountTokens, share: slice) -> Prompt:
    num_coded = max(8, budget // 50)
    # Twice as many as needed, since ``share`` may select half of them.
    coded = random_names(6, upper=False, count=max(256, 2 * num_coded))[share]
    vocabulary = rng.sample(coded, num_coded)
    answers = vocabulary[1:4]
    question, prefix, reference = ask_frequent(answers)
    left = budget - sum(map(count, (CODED, question, prefix, reference)))
    ranks = range(1, len(vocabulary) + 1)
    zeta = sum(rank**-FWE_ALPHA for rank in range(1, 100_000))
    num_words = left // max(1, count(f" {vocabulary[0]}"))
    while num_words > 16:
        times = [int(num_words * rank**-FWE_ALPHA / zeta) for rank in ranks]
        if times[3] == times[4]:  # the third answer would tie with the next word
            num_words -= 1
            continue
        text = [
            "..." if rank == 1 else word  # the most frequent one is noise, as in RULER
            for rank, word in zip(ranks, vocabulary, strict=True)
            for _ in range(times[rank - 1])
        ]
        rng.shuffle(text)
        body = "".join(f" {word}" for word in text) + "."
        if count(body) <= left:
            return Prompt(
                context=CODED + body,
                question=question,
                answer_prefix=prefix,
                answers=tuple(answers),
                reference=reference,
            )
        num_words -= 1 + num_words // 50
    raise TaskDoesNotFit(
        f"fwe must hold more than 16 coded words, but {left} tokens are left for them;"
        " use a larger task.length."
    )


def needle_prompt(
    rng: random.Random, words: Sequence[str], budget: int, count: CountTokens, depth: float
) -> Prompt:
    """Return a prompt with one needle at a given depth of its haystack.

    Args:
        rng: The sample's own random generator.
        words: The pool that key, value and fillers are drawn from.
        budget: Tokens for the context, the question, the prefix and the reference answer.
        count: Returns the number of tokens of a text, without special tokens.
        depth: Share of the haystack's sentences that precede the needle, 0 to 1.

    Raises:
        TaskDoesNotFit: If no sentence fits besides the needle.
    """
    key_words, value_words = halves(words)
    key, value = rng.choice(key_words), two_words(rng, value_words)
    question, prefix, reference = ask_one(key, value)
    hidden = needle(key, value)
    others = [word for word in words if word != key]
    left = budget - sum(map(count, (FACTS, question, prefix, reference, hidden)))
    haystack = fill(left, count, lambda: filler(rng, others))
    haystack.insert(round(depth * len(haystack)), hidden)
    return Prompt(
        context=FACTS + "".join(haystack),
        question=question,
        answer_prefix=prefix,
        answers=(value,),
        reference=reference,
    )


def make_prompt(
    subtask: str,
    rng: random.Random,
    words: Sequence[str],
    budget: int,
    count: CountTokens,
    share: slice = slice(None),
    example: bool = False,
) -> Prompt:
    """Return one prompt of ``subtask`` that fills, but does not exceed, ``budget`` tokens.

    Args:
        subtask: One of ``SUBTASKS``.
        rng: The sample's own random generator.
        words: The pool that keys, values and fillers are drawn from.
        budget: Tokens for the context, the question, the prefix and the reference answer.
        count: Returns the number of tokens of a text, without special tokens.
        share: The part of the random names (variables and coded words) that the prompt may use.
        example: Whether a short solved prompt of the same sub-task comes first, for the sub-tasks
            where RULER has one (vt and cwe).

    Raises:
        TaskDoesNotFit: If the smallest prompt of the sub-task needs more than ``budget``.
    """
    if not example or subtask not in WITH_EXAMPLE:
        return _make(subtask, rng, words, budget, count, share)
    solved = _make(subtask, rng, words, min(EXAMPLE_TOKENS, budget // 4), count, share)
    text = solved.context + solved.question + solved.answer_prefix + solved.reference + "\n\n"
    while True:
        prompt = _make(subtask, rng, words, budget - count(text), count, share)
        if not set(prompt.answers) & set(solved.answers):
            return replace(prompt, context=text + prompt.context)


def _make(
    subtask: str,
    rng: random.Random,
    words: Sequence[str],
    budget: int,
    count: CountTokens,
    share: slice,
) -> Prompt:
    if subtask == "vt":
        return _vt(rng, words, budget, count, share)
    if subtask == "cwe":
        return _cwe(rng, words, budget, count)
    if subtask == "fwe":
        return _fwe(rng, budget, count, share)
    return _niah(rng, words, budget, count, subtask)


@dataclass(kw_only=True)
class CalibrationPrompts:
    """Calibration texts: prompts with their answers, made of words that no test uses.

    Attributes:
        seed: Seed of the prompts.
        num_sequences: Number of prompts.
        max_length: Tokens per prompt, at most; no more than the model's window.
    """

    seed: int = 90210
    num_sequences: int = 14
    max_length: int = 4096

    name = "ruler_words"

    def __post_init__(self) -> None:
        for setting in ("num_sequences", "max_length"):
            check_whole(f"calibration.{setting}", getattr(self, setting))
        check_whole("calibration.seed", self.seed, least=0)

    def sequences(self, loaded: LoadedModel, length: int, count: int) -> list[list[int]]:
        """Return the token ids of ``count`` texts of at most ``length`` tokens each."""
        key = (tokenizer_digest(loaded.tokenizer), length, count, self.seed)
        if key not in _CALIBRATION:
            _CALIBRATION[key] = [
                encode(loaded.tokenizer, text)[:length]
                for text in self.texts(loaded, length, count)
            ]
        return _CALIBRATION[key]

    def texts(self, loaded: LoadedModel, length: int, count: int) -> list[str]:
        """Return prompts with their answers, cycling through the sub-tasks."""

        def count_tokens(text: str) -> int:
            return len(loaded.tokenizer.encode(text, add_special_tokens=False))

        words, texts = word_pools()[1], []
        for index in range(count):
            rng = random.Random(f"calibration-{self.seed}-{index}")
            subtask = SUBTASKS[index % len(SUBTASKS)]
            try:
                prompt = make_prompt(
                    subtask, rng, words, length - 2, count_tokens, CALIBRATION_NAMES
                )
            except TaskDoesNotFit as error:
                raise TaskDoesNotFit(
                    f"calibration.max_length must leave room for a prompt of {subtask}, got"
                    f" {length}; use a larger calibration.max_length."
                ) from error
            texts.append(prompt.context + prompt.question + prompt.answer_prefix + prompt.reference)
        return texts

    def describe(self, length: int, count: int) -> str:
        """Return a description of the prompts."""
        return (
            f"{count} prompts of {length} tokens, {', '.join(SUBTASKS)} in turn, seed"
            f" {self.seed}, {len(word_pools()[1])} words that no test uses"
        )


@dataclass(kw_only=True)
class TextsAndPrompts:
    """Calibration texts of both kinds: the first half plain texts, the second half prompts.

    Weights learned on one kind find less in the other, see ``docs/hata.md``.

    Attributes:
        files: As in `TextFiles`.
        seed: Seed of the prompts.
        num_sequences: Number of texts and prompts together, at least 2; if odd, one text more.
        max_length: Tokens of each, at most; no more than the model's window.
    """

    files: Sequence[str] | None = None
    seed: int = 90210
    num_sequences: int = 14
    max_length: int = 4096

    name = "mixed"

    def __post_init__(self) -> None:
        check_whole("calibration.num_sequences", self.num_sequences, least=2)
        prompts = self.num_sequences // 2
        texts = self.num_sequences - prompts
        self._texts = TextFiles(files=self.files, num_sequences=texts, max_length=self.max_length)
        self._prompts = CalibrationPrompts(
            seed=self.seed, num_sequences=prompts, max_length=self.max_length
        )

    def sequences(self, loaded: LoadedModel, length: int, count: int) -> list[list[int]]:
        """Return the token ids of ``count`` texts of at most ``length`` tokens each."""
        prompts = count // 2
        return [
            *self._texts.sequences(loaded, length, count - prompts),
            *self._prompts.sequences(loaded, length, prompts),
        ]

    def describe(self, length: int, count: int) -> str:
        """Return a description of the texts and the prompts."""
        prompts = count // 2
        texts = self._texts.describe(length, count - prompts)
        return f"{texts}; {self._prompts.describe(length, prompts)}"


# Cached per process, since every cell of a sweep needs the digest of the prompts' tokens.
_CALIBRATION: dict[tuple[str, int, int, int], list[list[int]]] = {}
