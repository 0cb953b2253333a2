"""The prompts of the seven sub-tasks: their content, its frequencies, and their length."""

import random
import re
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topkbench.harness.samples import TaskDoesNotFit, string_match_all
from topkbench.tasks.ruler_words_prompts import (
    SUBTASKS,
    Prompt,
    ask_all_values,
    ask_many,
    ask_one,
    make_prompt,
    needle,
)
from topkbench.tasks.words import TEST_NAMES, word_pools

Count = Callable[[str], int]
# Made from the template, so that it matches needles whatever their wording is.
KEY, VALUE = r"([\w-]+)", r"(\w+ \w+)"
NEEDLE = re.compile(re.escape(needle("KEY", "VALUE")).replace("KEY", KEY).replace("VALUE", VALUE))


def draw(subtask: str, budget: int, count: Count, seed: int = 0) -> Prompt:
    rng = random.Random(f"test-{seed}")
    return make_prompt(subtask, rng, word_pools()[0], budget, count, TEST_NAMES)


def size(prompt: Prompt, count: Count) -> int:
    return count(prompt.context + prompt.question + prompt.answer_prefix + prompt.reference)


@pytest.mark.parametrize("subtask", SUBTASKS)
@pytest.mark.parametrize("budget", [300, 701, 4000])
def test_a_prompt_fills_its_budget(subtask: str, budget: int, count: Count) -> None:
    prompt = draw(subtask, budget, count)
    assert size(prompt, count) <= budget
    assert size(prompt, count) > 0.8 * budget


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_the_reference_contains_every_answer(subtask: str, count: Count) -> None:
    prompt = draw(subtask, 600, count)
    written = prompt.answer_prefix + prompt.reference
    assert string_match_all(prompt.reference, prompt.answers) == 100.0
    assert written.endswith(".")
    assert prompt.question.startswith("\n")
    assert prompt.question.endswith("?")
    # Neither the question nor the prefix contains an answer.
    assert string_match_all(prompt.question + prompt.answer_prefix, prompt.answers) == 0.0


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_a_solved_example_comes_first_where_ruler_has_one(subtask: str, count: Count) -> None:
    words, rngs = word_pools()[0], [random.Random("test-0") for _ in range(2)]
    plain, with_example = (
        make_prompt(subtask, rng, words, 4000, count, TEST_NAMES, example)
        for rng, example in zip(rngs, (False, True), strict=True)
    )
    if subtask not in ("vt", "cwe"):
        assert with_example == plain
        return
    assert 0.8 * 4000 < size(with_example, count) <= 4000
    example, prompt = with_example.context.split("\n\n")
    assert 150 < count(example) <= 500
    first_line = plain.context.splitlines()[0]
    assert (example.splitlines()[0], prompt.splitlines()[0]) == (first_line, first_line)
    solved = example.rpartition(":")[2]
    assert string_match_all(solved, with_example.answers) == 0.0  # another question's answers
    assert solved.endswith(".")
    assert solved.count(",") == len(with_example.answers) - 1


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_a_prompt_depends_only_on_its_own_random_generator(subtask: str, count: Count) -> None:
    random.seed(1)
    first = draw(subtask, 500, count)
    random.seed(2)
    assert draw(subtask, 500, count) == first
    assert draw(subtask, 500, count, seed=1) != first


def test_a_single_needle_is_hidden_once(count: Count) -> None:
    prompt = draw("niah_single", 800, count)
    found = NEEDLE.findall(prompt.context)
    assert len(found) == 1
    key, value = found[0]
    assert prompt.answers == (value,)
    assert (prompt.question, prompt.answer_prefix, prompt.reference) == ask_one(key, value)
    assert len(re.findall(rf"\b{key}\b", prompt.context)) == 1  # the filler does not use the key


def test_a_multikey_haystack_is_other_needles(count: Count) -> None:
    prompt = draw("niah_multikey", 800, count)
    found = NEEDLE.findall(prompt.context)
    keys = [key for key, _ in found]
    assert len(found) > 60
    assert len(set(keys)) == len(keys)
    (key,) = [key for key, value in found if value == prompt.answers[0]]
    assert prompt.question == ask_one(key, prompt.answers[0])[0]
    # The text after the instruction consists of needles only.
    assert NEEDLE.sub("", prompt.context.split("\n", 1)[1]).strip() == ""


def test_multivalue_has_four_values_of_one_key(count: Count) -> None:
    prompt = draw("niah_multivalue", 800, count)
    found = NEEDLE.findall(prompt.context)
    assert len({key for key, _ in found}) == 1
    assert sorted(value for _, value in found) == sorted(prompt.answers)
    assert len({value.split()[0] for value in prompt.answers}) == 4
    key = found[0][0]
    asked = ask_all_values(key, prompt.answers)
    assert (prompt.question, prompt.answer_prefix, prompt.reference) == asked


def test_multiquery_has_and_asks_for_four_keys(count: Count) -> None:
    prompt = draw("niah_multiquery", 800, count)
    found = dict(NEEDLE.findall(prompt.context))
    assert sorted(found.values()) == sorted(prompt.answers)
    key_of = {value: key for key, value in found.items()}
    asked = ask_many([key_of[value] for value in prompt.answers], prompt.answers)
    assert (prompt.question, prompt.answer_prefix, prompt.reference) == asked


def test_distractor_needles_do_not_run_out(count: Count) -> None:
    # The calibration pool is used up long before the budget; then keys are pairs of words.
    rng = random.Random(0)
    prompt = make_prompt("niah_multikey", rng, word_pools()[1], 6000, count)
    keys = [key for key, _ in NEEDLE.findall(prompt.context)]
    assert len(keys) > 500
    assert len(set(keys)) == len(keys)
    # The same if a needle's number of tokens varies: here letters are counted.
    letters = make_prompt("niah_multikey", random.Random(1), word_pools()[0], 20_000, len)
    assert 19_900 < size(letters, len) <= 20_000


def test_needles_are_at_any_depth(count: Count) -> None:
    depths = []
    for seed in range(60):
        context = draw("niah_single", 400, count, seed).context
        depths += [found.start() / len(context) for found in NEEDLE.finditer(context)]
    assert len(depths) == 60
    assert min(depths) < 0.2
    assert max(depths) > 0.8


def test_variables_are_one_chain_of_four_hops_in_order(count: Count) -> None:
    prompt = draw("vt", 600, count)
    names = prompt.answers
    assert len(set(names)) == 5
    statements = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", prompt.context)
    value = statements[0][1]
    assert 10000 <= int(value) <= 99999
    assert statements == [
        (names[0], value),
        *((names[hop + 1], names[hop]) for hop in range(4)),
    ]
    assert prompt.question == f"\nWhich variables hold the value {value}?"


def test_common_words_occur_30_times_and_others_3(count: Count) -> None:
    prompt = draw("cwe", 4000, count)
    entries = re.findall(r"(\d+)\. (\w+)", prompt.context)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    times = Counter(word for _, word in entries)
    assert {word for word, often in times.items() if often == 30} == set(prompt.answers)
    assert len(prompt.answers) == 10
    assert set(times.values()) == {30, 3}
    assert len(times) > 200


def test_a_short_list_still_has_ten_most_common_words(count: Count) -> None:
    prompt = draw("cwe", 300, count)
    times = Counter(re.findall(r"\d+\. (\w+)", prompt.context))
    assert {word for word, _ in times.most_common(10)} == set(prompt.answers)
    assert times.most_common(10)[-1][1] > times.most_common(11)[-1][1]


def test_coded_words_follow_the_zeta_distribution(count: Count) -> None:
    # RULER: the word of rank r occurs floor(N * r**-2 / zeta(2)) times; the first is noise.
    prompt = draw("fwe", 4000, count)
    words = re.findall(r"[a-z]{6}|\.\.\.", prompt.context.split("\n", 1)[1])
    ranked = Counter(words).most_common()
    assert ranked[0][0] == "..."
    assert [word for word, _ in ranked[1:4]] == list(prompt.answers)
    num_words = ranked[0][1] * 1.6449
    for rank, (_, often) in enumerate(ranked[:6], start=1):
        assert often == pytest.approx(num_words * rank**-2 / 1.6449, abs=1.01)


@pytest.mark.parametrize("budget", range(93, 160, 3))
def test_the_third_most_frequent_word_is_never_a_tie(budget: int, count: Count) -> None:
    prompt = draw("fwe", budget, count)
    times = Counter(re.findall(r"\b[a-z]{6}\b", prompt.context.split("\n", 1)[1]))
    others = [often for word, often in times.items() if word not in prompt.answers]
    assert min(times[word] for word in prompt.answers) > max(others, default=0)


@pytest.mark.parametrize("subtask", SUBTASKS)
@pytest.mark.parametrize("budget", [-3, 0, 1, 25])
def test_too_small_a_budget_is_refused(subtask: str, budget: int, count: Count) -> None:
    with pytest.raises(TaskDoesNotFit, match=r"use a larger task\.length\.$"):
        draw(subtask, budget, count)


@settings(max_examples=40, deadline=None)
@given(subtask=st.sampled_from(SUBTASKS), budget=st.integers(26, 420), seed=st.integers(0, 9))
def test_a_prompt_fits_its_budget_or_raises(
    count: Count, subtask: str, budget: int, seed: int
) -> None:
    try:
        prompt = draw(subtask, budget, count, seed)
    except TaskDoesNotFit:
        return
    assert size(prompt, count) <= budget
    assert string_match_all(prompt.context, prompt.answers) == 100.0
