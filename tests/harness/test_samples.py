"""RULER's scoring functions, compared with what RULER's own give.

They are ``postprocess_pred``, ``string_match_all`` and ``string_match_part`` of NVIDIA/RULER,
commit c3f5e3b, in ``scripts/eval``; these round the mean over a sub-task's samples to two decimals.
"""

import pytest

from topkbench.harness.samples import clean_prediction, string_match_all, string_match_part


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("the secret is Blue Moon.", ("blue moon",), 100.0),
        ("the secret is blue", ("blue moon",), 0.0),
        ("a b, c d and e f", ("a b", "c d", "e f", "g h"), 75.0),
        ("", ("a", "b"), 0.0),
        ("QXZKV", ("qxzkv", "abcde", "fghij", "klmno"), 25.0),
        ("ÉTÉ", ("été", "hiver"), 50.0),
        ("123", ("1234", "12"), 50.0),  # also within a longer word
        ("one\x00two", ("one\ntwo",), 100.0),
    ],
)
def test_string_match_all_is_the_share_of_answers_found(
    prediction: str, answers: tuple[str, ...], score: float
) -> None:
    assert string_match_all(prediction, answers) == score


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("In Paris.", 100.0),
        ("the CITY of light", 100.0),
        ("Rome", 0.0),
        ("", 0.0),
        ("pa\x00ris", 0.0),
        ("\x1bPARIS\x00", 100.0),
    ],
)
def test_string_match_part_needs_any_answer(prediction: str, score: float) -> None:
    assert string_match_part(prediction, ("paris", "city of light")) == score


def test_control_characters_become_line_breaks() -> None:
    assert clean_prediction(" \x01a\tb\x1fc \n") == "a\nb\nc"
    assert clean_prediction("\x1b 12\x7f3\x80 \x00") == "12\x7f3\x80"  # only those below a space
