"""The words and names that prompts are made of, in disjoint pools for tests and for calibration.

Since the pools are disjoint, no test prompt contains a word or name that a method was fitted on.
"""

import random
import re
import string
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

# The words of the prompt templates. A key or value among them would make a prompt ambiguous.
TEMPLATE_WORDS = frozenset(
    {"and", "answer", "are", "assigned", "below", "coded", "common", "each", "every"}
    | {"facts", "following", "frequent", "hidden", "hold", "its", "list", "most", "numbered"}
    | {"other", "read", "remember", "secret", "secrets", "ten", "text", "the", "them"}
    | {"these", "three", "value", "var", "variable", "variables", "what", "which", "word"}
    | {"words"}
)
NUM_TEST_WORDS = 2048
NUM_CALIBRATION_WORDS = 512
NUM_NAMES = 256
ORDER_SEED = 20260601
# Tests and calibration use disjoint halves of the random names.
TEST_NAMES, CALIBRATION_NAMES = slice(0, None, 2), slice(1, None, 2)
# The values that calibration prompts assign to variables; test prompts never use them.
CALIBRATION_NUMBERS = frozenset({"83476", "47950"})
_LISTS = ("noun", "verb", "adjective")


@cache
def word_pools() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the disjoint (test, calibration) pools of lower-case words of 3 to 9 letters."""
    listed = {word for word in all_listed_words() if re.fullmatch("[a-z]{3,9}", word)}
    words = sorted(listed - TEMPLATE_WORDS)
    random.Random(ORDER_SEED).shuffle(words)
    end = NUM_TEST_WORDS + NUM_CALIBRATION_WORDS
    return tuple(words[:NUM_TEST_WORDS]), tuple(words[NUM_TEST_WORDS:end])


@cache
def listed_words(kind: str) -> tuple[str, ...]:
    """Return the distinct words of one of wonderwords' lists: noun, verb or adjective.

    Its module is not imported: it opens them in the encoding of the locale, and they are UTF-8.
    """
    file = Path(str(distribution("wonderwords").locate_file(f"wonderwords/assets/{kind}list.txt")))
    return tuple(dict.fromkeys(line.rstrip() for line in file.read_text("utf-8").splitlines()))


@cache
def all_listed_words() -> tuple[str, ...]:
    """Return the distinct words of all three lists, sorted."""
    return tuple(sorted({word for kind in _LISTS for word in listed_words(kind)}))


@cache
def random_names(letters: int, upper: bool, count: int = NUM_NAMES) -> tuple[str, ...]:
    """Return ``count`` distinct random letter strings, for RULER's variables and coded words."""
    rng = random.Random(f"{ORDER_SEED}-{letters}-{upper}")
    alphabet = string.ascii_uppercase if upper else string.ascii_lowercase
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(alphabet, k=letters))] = None
    return tuple(names)
