"""The words that prompts are made of, and which of them belong to whom.

Tests and calibration draw from disjoint pools, so that nothing a method is fitted on can be in a
prompt that it is tested on.
"""

import random
import string
from functools import cache

from wonderwords import RandomWord

# The prompts' own wording. A key or a value that is one of these would make a prompt ambiguous.
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
# Of the random names, as of the words, each has its own.
TEST_NAMES, CALIBRATION_NAMES = slice(0, None, 2), slice(1, None, 2)
# What calibration prompts assign to their variables; a test's prompts never do.
CALIBRATION_NUMBERS = frozenset({"83476", "47950"})


@cache
def word_pools() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the (test, calibration) pools: lower-case words of 3 to 9 letters, disjoint."""
    words = sorted(set(RandomWord().filter(regex="[a-z]{3,9}")) - TEMPLATE_WORDS)
    random.Random(ORDER_SEED).shuffle(words)
    end = NUM_TEST_WORDS + NUM_CALIBRATION_WORDS
    return tuple(words[:NUM_TEST_WORDS]), tuple(words[NUM_TEST_WORDS:end])


@cache
def random_names(letters: int, upper: bool, count: int = NUM_NAMES) -> tuple[str, ...]:
    """Return ``count`` distinct random letter strings: RULER's variables and coded words."""
    rng = random.Random(f"{ORDER_SEED}-{letters}-{upper}")
    alphabet = string.ascii_uppercase if upper else string.ascii_lowercase
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(alphabet, k=letters))] = None
    return tuple(names)
