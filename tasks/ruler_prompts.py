"""RULER's 13 sub-tasks (arXiv:2404.06654), as NVIDIA's generator writes their prompts.

Source: github.com/NVIDIA/RULER, commit c3f5e3b: parameters, how lengths are filled, and the
wording, which is the benchmark's protocol and taken verbatim (Apache-2.0, see NOTICE).

Two things differ. A sample has random draws of its own, so it does not depend on how many others
there are, and needles, words and documents are shuffled anew for each (NVIDIA's generator shuffles
those of all samples in the same order). The sentences of an essay, between which needles are put,
are found by NLTK's Punkt after it has read the essay, not by its downloaded model of English.
"""

import functools
import itertools
import math
import random
import string
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from topkbench.harness.samples import TaskDoesNotFit
from topkbench.tasks.ruler_data import Essay, QuestionSet
from topkbench.tasks.words import listed_words

VERSION = 1
"""Counts the changes of these prompts: rows of different ones are not compared."""
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = tuple(round(100 * step / 39) for step in range(40))
"""Percentages of an essay's sentences after which a needle may stand."""
SHORT = 4096
"""Below this length haystacks grow in smaller steps, and cwe repeats its words less often."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt without the identity of a sample; see :class:`topkbench.harness.samples.Sample`."""

    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole prompt, with the beginning of the answer."""
        return self.context + self.question + self.answer_prefix


@dataclass(frozen=True, kw_only=True)
class Wording:
    """What surrounds the haystack of a sub-task: text before it, question, beginning of the answer.

    Words in braces are replaced by what a sample asks for.
    """

    before: str
    question: str
    answer_prefix: str

    def around(self, haystack: str, answers: Sequence[str], **asked: object) -> Prompt:
        """Return a prompt."""
        return Prompt(
            context=self.before.format(**asked) + haystack,
            question=self.question.format(**asked),
            answer_prefix=self.answer_prefix.format(**asked),
            answers=tuple(answers),
        )


NEEDLE = "One of the special magic {values} for {key} is: {value}."
ONE_VALUE = Wording(
    before="A special magic {value} is hidden within the following text. Make sure to memorize it."
    " I will quiz you about the {value} afterwards.\n",
    question="\nWhat is the special magic {value} for {query} mentioned in the provided text?",
    answer_prefix=" The special magic {value} for {query} mentioned in the provided text is",
)
MANY_VALUES = Wording(
    before="Some special magic {value}s are hidden within the following text. Make sure to memorize"
    " it. I will quiz you about the {value}s afterwards.\n",
    question="\nWhat are all the special magic {value}s for {query} mentioned in the provided"
    " text?",
    answer_prefix=" The special magic {value}s for {query} mentioned in the provided text are",
)
VARIABLES = Wording(
    before="Memorize and track the chain(s) of variable assignment hidden in the following text."
    "\n\n",
    question="\nQuestion: Find all variables that are assigned the value {value} in the text"
    " above.",
    answer_prefix=" Answer: According to the chain(s) of variable assignment in the text above,"
    " {count} variables are assigned the value {value}, they are: ",
)
COMMON = Wording(
    before="Below is a numbered list of words. In these words, some appear more often than others."
    " Memorize the ones that appear most often.\n",
    question="\nQuestion: What are the 10 most common words in the above list?",
    answer_prefix=" Answer: The top 10 words that appear most often in the list are:",
)
FREQUENT = Wording(
    before="Read the following coded text and track the frequency of each coded word. Find the"
    " three most frequently appeared coded words. ",
    question="\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are"
    " the three most frequently appeared words in the above coded text?",
    answer_prefix=" Answer: According to the coded text above, the three most frequently appeared"
    " words are:",
)
_ANSWER = (
    "Answer the question based on the given documents. Only give me the answer and do not output"
    " any other words."
)
DOCUMENTS = Wording(
    before=f"{_ANSWER}\n\nThe following are given documents.\n\n",
    # The haystack ends with _ANSWER and an empty line: the last line alone is the question.
    question="\nQuestion: {query}",
    answer_prefix=" Answer:",
)

# Haystacks ----------------------------------------------------------------------------------------


def needle(value_type: str, key: str, value: str) -> str:
    """Return the sentence that hides a value under a key."""
    return NEEDLE.format(values=f"{value_type}s", key=key, value=value)


def between_lines(lines: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> str:
    """Return lines with needles before those at the given places, which ascend, each a line."""
    mixed = list(lines)
    for place, one in zip(reversed(places), reversed(needles), strict=True):
        mixed.insert(place, one)
    return "\n".join(mixed)


def between_sentences(
    sentences: Sequence[str], needles: Sequence[str], depths: Sequence[int]
) -> str:
    """Return an essay with needles after the given percentages of its sentences.

    The needle of the lowest depth is the first.
    """
    ends = sorted(int(len(sentences) * (depth / 100)) for depth in depths)
    parts, begin = [], 0
    for end, one in zip(ends, needles, strict=True):
        parts += [" ".join(sentences[begin:end]), one]
        begin = end
    return " ".join([*parts, " ".join(sentences[begin:])])


def chain(names: Sequence[str], value: str) -> list[str]:
    """Return the assignments of one chain in order; the first assigns the value."""
    followers = (f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(names))
    return [f"VAR {names[0]} = {value}", *followers]


def numbered(words: Sequence[str]) -> str:
    """Return a numbered list in one line."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence lists them."""
    return f"{', '.join(names[:-1])}, and {names[-1]}" if len(names) > 1 else names[0]


def common_words(example: Sequence[str], solution: Sequence[str], words: Sequence[str]) -> str:
    """Return cwe's context after its first sentence: the solved example, then the list."""
    solved = COMMON.around(numbered(example), ()).text.removeprefix(COMMON.before)
    return f"{solved} {numbered(solution)}\n{COMMON.before}{numbered(words)}"


def documents(texts: Sequence[str]) -> str:
    """Return numbered documents and what stands between them and the question."""
    joined = "\n\n".join(
        f"Document {number}:\n{text}" for number, text in enumerate(texts, start=1)
    )
    return f"{joined}\n\n{_ANSWER}\n"


# Sub-tasks ----------------------------------------------------------------------------------------

CountTokens = Callable[[str], int]
Tokens = Callable[[Prompt], int]


class Subtask(ABC):
    """How one sub-task draws its prompts.

    A prompt's size counts what its haystack is made of: words of an essay, lines, words of a list,
    documents.
    """

    @abstractmethod
    def step(self, length: int) -> int:
        """Return by how much a size shrinks if a prompt exceeds ``length`` tokens."""

    @property
    def least(self) -> int:
        """The smallest size."""
        return 1

    @abstractmethod
    def draw(self, rng: random.Random, size: int, index: int) -> Prompt:
        """Return a prompt of a size."""

    def largest(self, seed: str, length: int, tokens: Tokens) -> int:
        """Return the largest size whose prompt and answer have at most ``length`` tokens.

        Args:
            seed: Seed of the prompts that are tried.
            length: Tokens of prompt and answer.
            tokens: Returns the number of tokens of a prompt and its answer.
        """

        def fits(size: int) -> bool:
            return tokens(self.draw(random.Random(seed), size, 0)) <= length

        least = self.step(length)
        most = least
        while fits(most):
            least, most = most, 2 * most
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if fits(middle) else (least, middle)
        return least

    def fitted(
        self, seed: str, size: int, index: int, length: int, tokens: Tokens
    ) -> tuple[Prompt, int]:
        """Return a prompt of at most ``length`` tokens with its answer, and their number.

        Raises:
            TaskDoesNotFit: If none of the sizes fits.
        """
        step = self.step(length)
        while True:
            prompt = self.draw(random.Random(seed), size, index)
            found = tokens(prompt)
            if found <= length:
                return prompt, found
            if size <= step or size - step < self.least:
                raise TaskDoesNotFit(
                    f"the smallest prompt and its answer must have at most task.length={length}"
                    f" tokens, got {found}; use a larger task.length."
                )
            size -= step


@dataclass(frozen=True, kw_only=True)
class Niah(Subtask):
    """Needles in a haystack.

    Attributes:
        haystack: An essay; ``"noise"``, five sentences over and over; ``"needles"``, other needles.
        key: What keys are: ``word`` (an adjective and a noun) or ``uuid``.
        value: What values are: ``number`` (7 digits) or ``uuid``.
        num_keys: Number of keys.
        num_values: Number of values of each key.
        num_queries: Number of keys that are asked for.
    """

    haystack: Essay | str
    key: str = "word"
    value: str = "number"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def step(self, length: int) -> int:
        if isinstance(self.haystack, Essay):
            return 500
        return 5 if length < SHORT else 25

    @property
    def least(self) -> int:
        return self.num_keys * self.num_values

    def draw(self, rng: random.Random, size: int, index: int) -> Prompt:
        # All keys and values of a prompt differ, or its question would have several answers.
        keys = distinct(lambda: drawn_text(rng, self.key), self.num_keys)
        drawn = distinct(lambda: drawn_text(rng, self.value), self.num_keys * self.num_values)
        values = [drawn[row * self.num_values :][: self.num_values] for row in range(self.num_keys)]
        needles = [
            needle(self.value, key, value)
            for key, of_key in zip(keys, values, strict=True)
            for value in of_key
        ]
        rng.shuffle(needles)
        if isinstance(self.haystack, Essay):
            sentences = self.haystack.sentences(size)
            haystack = between_sentences(sentences, needles, rng.sample(DEPTHS, len(needles)))
        else:
            lines = [self._line(rng, keys) for _ in range(size)]
            places = sorted(rng.sample(range(size), len(needles)))
            haystack = between_lines(lines, needles, places)
        asked = rng.sample(range(self.num_keys), self.num_queries)
        answers = [value for row in asked for value in values[row]]
        wording = ONE_VALUE if len(answers) == 1 else MANY_VALUES
        query = listed([keys[row] for row in asked])
        return wording.around(haystack, answers, value=self.value, query=query)

    def _line(self, rng: random.Random, keys: Sequence[str]) -> str:
        if self.haystack == "noise":
            return NOISE
        while (key := drawn_text(rng, self.key)) in keys:
            pass
        return needle(self.value, key, drawn_text(rng, self.value))


@dataclass(frozen=True, kw_only=True)
class VariableTracking(Subtask):
    """A chain of assignments among noise, after a solved example of at most 500 tokens.

    Attributes:
        count: Returns the number of tokens of a text, without special tokens.
        seed: Seed of the places of the example's assignments, the same in all samples.
    """

    count: CountTokens
    seed: int

    NUM_NAMES = 5
    EXAMPLE_TOKENS = 500

    @property
    def least(self) -> int:
        return self.NUM_NAMES

    def step(self, length: int) -> int:
        return 5 if length < SHORT else 10

    def draw(self, rng: random.Random, size: int, index: int) -> Prompt:
        size_of_example, places = self._example
        names, value = _names(rng, 3, self.NUM_NAMES), str(rng.randint(10000, 99998))
        solved = self._around(size_of_example, places, names, value)
        example = f"{solved.text} {' '.join(names)}\n\n"
        names, value = _names(rng, 5, self.NUM_NAMES), str(rng.randint(10000, 99998))
        places = sorted(rng.sample(range(size), self.NUM_NAMES))
        prompt = self._around(size, places, names, value)
        return Prompt(
            context=example + prompt.context,
            question=prompt.question,
            answer_prefix=prompt.answer_prefix,
            answers=prompt.answers,
        )

    @functools.cached_property
    def _example(self) -> tuple[int, list[int]]:
        """The number of lines of noise in the example, and the places of its assignments."""
        names = ["".join(letter * 3) for letter in "ABCDE"]

        def places(size: int) -> list[int]:
            rng = random.Random(f"{self.seed}-vt-example")
            return sorted(rng.sample(range(size), self.NUM_NAMES))

        size = self.NUM_NAMES
        while (
            self.count(self._around(size + 1, places(size + 1), names, "12345").text)
            <= self.EXAMPLE_TOKENS
        ):
            size += 1
        return size, places(size)

    def _around(self, size: int, places: Sequence[int], names: Sequence[str], value: str) -> Prompt:
        haystack = between_lines([NOISE] * size, chain(names, value), places)
        return VARIABLES.around(haystack, names, value=value, count=len(names))


@dataclass(frozen=True, kw_only=True)
class CommonWords(Subtask):
    """A list in which ten words stand more often than the others, after a solved example.

    Attributes:
        words: The words.
        more_words: The words of lists that need more of them; empty if there are none.
        length: Tokens of prompt and answer: short prompts repeat their words less often.
    """

    words: Sequence[str]
    more_words: Sequence[str] = ()
    length: int

    NUM_COMMON = 10

    @property
    def least(self) -> int:
        return self.NUM_COMMON + 1

    def step(self, length: int) -> int:
        return 10

    def largest(self, seed: str, length: int, tokens: Tokens) -> int:
        most = max(len(self.words), len(self.more_words))
        if tokens(self.draw(random.Random(seed), most, 0)) <= length:
            raise TaskDoesNotFit(
                f"cwe needs more than {most:,} words for task.length={length}; set"
                " task.english_words to the file english_words.json of RULER."
            )
        return super().largest(seed, length, tokens)

    def draw(self, rng: random.Random, size: int, index: int) -> Prompt:
        if self.length < SHORT:
            example, solution = self._list(rng, 20, 3, 1)
            words, answers = self._list(rng, size, 6, 1)
        else:
            example, solution = self._list(rng, 40, 10, 3)
            words, answers = self._list(rng, size, 30, 3)
        return COMMON.around(common_words(example, solution, words), answers)

    def _list(
        self, rng: random.Random, size: int, often: int, seldom: int
    ) -> tuple[list[str], list[str]]:
        """Return a list of ``size`` different words, ten of them ``often``, and those ten."""
        pool = self.words if size <= len(self.words) else self.more_words or self.words
        drawn = rng.sample(pool, min(size, len(pool)))
        common, others = drawn[: self.NUM_COMMON], drawn[self.NUM_COMMON :]
        words = common * often + others * seldom
        rng.shuffle(words)
        return words, common


@dataclass(frozen=True, kw_only=True)
class FrequentWords(Subtask):
    """Coded words whose frequencies follow a zeta distribution; the most frequent one is dots.

    Attributes:
        limit: Tokens for the prompt alone.
    """

    limit: int

    ALPHA = 2.0
    LETTERS = 6

    def step(self, length: int) -> int:
        return max(1, self.limit // 32)

    def largest(self, seed: str, length: int, tokens: Tokens) -> int:
        size = max(1, self.limit // self.LETTERS)
        while tokens(self.draw(random.Random(seed), size, 0)) < length:
            size += self.step(length)
        return max(1, size - self.step(length))

    def draw(self, rng: random.Random, size: int, index: int) -> Prompt:
        coded = functools.partial(rng.choices, string.ascii_lowercase, k=self.LETTERS)
        vocabulary = distinct(lambda: "".join(coded()), max(8, self.limit // 50))
        answers, vocabulary[0] = vocabulary[1:4], "..."
        zeta = math.pi**2 / 6  # of ALPHA
        times = [int(size * rank**-self.ALPHA / zeta) for rank in range(1, len(vocabulary) + 1)]
        if times[3] == times[4]:
            raise TaskDoesNotFit(
                f"fwe needs room for more than {size} words, or its third most frequent word is"
                " none; use a larger task.length."
            )
        words = [word for word, often in zip(vocabulary, times, strict=True) for _ in range(often)]
        rng.shuffle(words)
        return FREQUENT.around(" ".join(words), answers)


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Subtask):
    """A question, the documents that answer it, and others.

    Attributes:
        questions: SQuAD's or HotpotQA's.
        seed: 0 asks them in their order, as RULER does; another seed in an order of its own.
    """

    questions: QuestionSet
    seed: int = 0

    def step(self, length: int) -> int:
        return 10

    def draw(self, rng: random.Random, size: int, index: int) -> Prompt:
        asked = self.questions.questions[self._order[index]]
        texts = self.questions.documents
        if size >= len(texts):
            chosen = [texts[place % len(texts)] for place in range(size)]
        else:
            gold, related = list(asked.gold), list(asked.related)
            missing = size - len(gold)
            if missing > len(related):
                known = {*gold, *related}
                others = [place for place in range(len(texts)) if place not in known]
                places = gold + related + rng.sample(others, missing - len(related))
            else:
                places = gold + rng.sample(related, max(0, missing))
            chosen = [texts[place] for place in places]
        rng.shuffle(chosen)
        return DOCUMENTS.around(documents(chosen), asked.answers, query=asked.query)

    @functools.cached_property
    def _order(self) -> list[int]:
        order = list(range(len(self.questions.questions)))
        if self.seed:
            random.Random(self.seed).shuffle(order)
        return order


def distinct(draw: Callable[[], str], count: int) -> list[str]:
    """Return texts that differ, in the order in which they were drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def drawn_text(rng: random.Random, kind: str) -> str:
    """Return a random key or value: a ``number``, a ``uuid`` or a ``word``."""
    if kind == "number":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(listed_words('adjective'))}-{rng.choice(listed_words('noun'))}"


def _names(rng: random.Random, letters: int, count: int) -> list[str]:
    return distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)), count)
