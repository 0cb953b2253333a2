"""The tokenizer of the shipped model: lossless, one token per known word."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from topkbench.models.tiny_tokenizer import build_tokenizer

TOKENIZER: PreTrainedTokenizerFast = build_tokenizer(
    [" zebra", "zebra", " secret", "The", " is", ".", "...", " VAR", " =", "\n", "naïve"], 128
)


def pieces(text: str) -> list[str]:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    return [str(TOKENIZER.decode([one])) for one in ids]


def test_known_words_are_one_token() -> None:
    assert pieces("The zebra is secret.") == ["The", " zebra", " is", " secret", "."]


def test_unknown_words_are_split_into_bytes() -> None:
    assert pieces("The xyz") == ["The", " ", "x", "y", "z"]


def test_numbers_are_cut_into_pairs_of_digits() -> None:
    assert pieces(" VAR = 90517") == [" VAR", " =", " 90", "51", "7"]


def test_every_prompt_begins_with_bos() -> None:
    assert TOKENIZER.encode("The")[0] == TOKENIZER.bos_token_id == 1
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id) == (0, 2)
    assert TOKENIZER.encode("") == [1]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_every_text_is_decoded_exactly(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n", "naïve déjà-vu", "日本 🙂", "\t a  b", "'s don't"]
)
def test_hard_texts_are_decoded_exactly(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids) == text


def test_ids_are_stable() -> None:
    again = build_tokenizer(
        [" zebra", "zebra", " secret", "The", " is", ".", "...", " VAR", " =", "\n", "naïve"], 128
    )
    assert again.get_vocab() == TOKENIZER.get_vocab()


def test_too_many_words_are_refused() -> None:
    words = [" " + "".join(letters) for letters in product("abcdefgh", repeat=4)]
    with pytest.raises(ValueError, match=r"at most 4096 entries, got \d+; pass fewer words\."):
        build_tokenizer(words, 128)
