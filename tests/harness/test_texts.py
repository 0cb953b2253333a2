"""Calibration texts from files: Python's documentation in two halves, or a user's files."""

import copy
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from tokenizers import processors

from topkbench.harness.calibration import Calibration
from topkbench.harness.texts import TextFiles, python_topics
from topkbench.methods.loki import Loki
from topkbench.models.load import LoadedModel
from topkbench.tasks.ruler_words_prompts import CalibrationPrompts, TextsAndPrompts


def test_every_topic_of_pythons_documentation_is_in_exactly_one_half() -> None:
    first, second = python_topics("first"), python_topics("second")
    assert len(first) + len(second) == sum(map(len, topics.values()))
    assert 0.4 < len(first) / (len(first) + len(second)) < 0.6
    for name, text in topics.items():
        assert (text in first) != (text in second), name


def test_texts_are_taken_at_even_distances(loaded: LoadedModel, tmp_path: Path) -> None:
    text = " ".join(["and are each list"] * 8)  # 32 words that the tokenizer knows
    (tmp_path / "one.txt").write_text(text)
    texts = TextFiles(files=[str(tmp_path / "one.txt")])
    ids = list(loaded.tokenizer.encode(text))
    found = texts.sequences(loaded, 10, 3)
    last = len(ids) - 10
    assert found == [ids[:10], ids[round(last / 2) : round(last / 2) + 10], ids[last:]]
    assert texts.sequences(loaded, 999, 2) == [ids, ids]  # no more than there is
    assert texts.sequences(loaded, 10, 1) == [ids[:10]]


def test_a_text_has_the_beginning_token_once_and_no_end(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    reader = replace(loaded, tokenizer=tokenizer)
    (tmp_path / "one.txt").write_text("and are each list")
    (found,) = TextFiles(files=[str(tmp_path / "one.txt")]).sequences(reader, 99, 1)
    assert found == loaded.tokenizer.encode("and are each list")
    for ids in CalibrationPrompts(num_sequences=3).sequences(reader, 300, 3):
        assert (ids[0], ids.count(1), ids.count(2)) == (1, 1, 0)
        assert len(ids) <= 300


def test_the_description_contains_the_digest_of_the_files(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("and are each list")
    texts = TextFiles(files=[str(file)])
    # printf 'and are each list' | sha256sum
    assert texts.describe(4096, 14).endswith("4096 tokens of mine.txt (ca0e005ce5ceef46)")
    before = Calibration.draw(loaded, Loki(), texts).digest
    file.write_text("and are each word")
    assert Calibration.draw(loaded, Loki(), texts).digest != before
    description = TextFiles().describe(4096, 14)
    assert description.startswith(
        "14 texts of at most 4096 tokens of Python's documentation topics, first"
    )


@pytest.mark.parametrize("files", [[], "notes.txt"])
def test_files_must_be_a_list(files: object) -> None:
    with pytest.raises(ValueError, match=r"calibration\.files must list at least one value"):
        TextFiles(files=files)  # type: ignore[arg-type]


def test_a_file_that_cannot_be_read_is_refused_in_one_line(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"calibration\.files must be files, found none at"):
        TextFiles(files=[str(tmp_path / "none.txt")])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"must be readable texts in UTF-8"):
        TextFiles(files=[str(tmp_path / "latin.txt")]).sequences(loaded, 10, 2)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"calibration\.files must hold a text, got 1 tokens"):
        TextFiles(files=[str(tmp_path / "empty.txt")]).sequences(loaded, 10, 2)


def test_mixed_texts_are_half_of_either_kind(loaded: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(" ".join(["and are each list"] * 30))
    mixed = TextsAndPrompts(files=[str(file)], num_sequences=5, max_length=260)
    plain = TextFiles(files=[str(file)]).sequences(loaded, 260, 3)
    assert mixed.sequences(loaded, 260, 5) == [
        *plain,
        *CalibrationPrompts().sequences(loaded, 260, 2),
    ]
    description = mixed.describe(260, 5)
    assert description.startswith("3 texts of at most 260 tokens of mine.txt (")
    assert "; 2 prompts of 260 tokens" in description
    assert TextsAndPrompts(num_sequences=2).seed == 90210
