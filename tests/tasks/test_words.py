"""The words and names of tests and calibration: the same in every process, and disjoint."""

import os
import random
import subprocess
import sys

import pytest
from wonderwords import RandomWord

from topkbench.tasks.words import (
    CALIBRATION_NAMES,
    ORDER_SEED,
    TEMPLATE_WORDS,
    TEST_NAMES,
    random_names,
    word_pools,
)


def test_the_pools_are_disjoint_and_of_plain_words() -> None:
    test, calibration = word_pools()
    assert (len(set(test)), len(set(calibration))) == (2048, 512)
    assert set(test) & set(calibration) == set()
    assert (set(test) | set(calibration)) & TEMPLATE_WORDS == set()
    assert all(word.isalpha() and word.islower() and 3 <= len(word) <= 9 for word in test)


def test_the_halves_of_the_names_are_disjoint_and_cover_all() -> None:
    names = random_names(5, upper=True)
    test, calibration = names[TEST_NAMES], names[CALIBRATION_NAMES]
    assert len(set(names)) == 256
    assert set(test) & set(calibration) == set()
    assert set(test) | set(calibration) == set(names)
    assert all(len(name) == 5 and name.isupper() for name in names)
    assert all(len(name) == 6 and name.islower() for name in random_names(6, upper=False))


def test_more_names_extend_the_same_sequence() -> None:
    few, many = random_names(6, upper=False, count=20), random_names(6, upper=False, count=300)
    assert many[:20] == few


def test_the_pools_are_made_of_all_words_that_wonderwords_knows() -> None:
    known = set(RandomWord().filter(regex="[a-z]{3,9}")) - TEMPLATE_WORDS
    words = sorted(known)
    random.Random(ORDER_SEED).shuffle(words)
    assert word_pools() == (tuple(words[:2048]), tuple(words[2048:2560]))


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONHASHSEED": "7"},
        # The lists are UTF-8, whatever the locale's encoding is.
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_the_pools_are_the_same_in_every_process(environment: dict[str, str]) -> None:
    code = (
        "from topkbench.tasks.words import *;"
        "print([pool[:3] for pool in word_pools()], random_names(5, upper=True)[:3])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    expected = [pool[:3] for pool in word_pools()]
    assert printed == f"{expected} {random_names(5, upper=True)[:3]}\n"
