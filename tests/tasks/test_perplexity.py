"""Likelihood of text: which tokens are scored, what is compared, and whose steps predict."""

import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from topkbench.analysis.comparison.stats import window_columns
from topkbench.harness.samples import TaskDoesNotFit
from topkbench.harness.task import Context, Outcome
from topkbench.harness.texts import python_topics
from topkbench.methods.base import AnyMethod, Policy
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.quest import Quest
from topkbench.methods.spatten import SpAtten
from topkbench.models.load import LoadedModel
from topkbench.models.prefill_store import PrefillStore
from topkbench.tasks import perplexity
from topkbench.tasks.perplexity import Perplexity, compared

WORDS = [
    "the",
    "secret",
    "of",
    "word",
    "list",
    "every",
    "other",
    "value",
    "hidden",
    "text",
    "and",
    "facts",
    "below",
    "which",
    "answer",
]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A text of 1,338 tokens of the model's tokenizer."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(WORDS), (1200,), generator=generator).tolist()
    path = tmp_path / "book.txt"
    path.write_text("".join(f" {WORDS[one]}" for one in drawn))
    return path


def task(book: Path, **settings: Any) -> Perplexity:
    given = {"length": 100, "windows": 3, "scored_tokens": 20, "files": [str(book)]}
    return Perplexity(**{**given, **settings})


def run(
    made: Perplexity, loaded: LoadedModel, store: PrefillStore, method: AnyMethod, k: int = 24
) -> Outcome:
    return made.run(Context(loaded, store, method, Policy(k=k), FullAttention()))


def test_windows_do_not_overlap_and_begin_like_a_text(loaded: LoadedModel, book: Path) -> None:
    made = task(book)
    ids = loaded.tokenizer.encode(book.read_text(), add_special_tokens=False, verbose=False)
    assert len(ids) == 1338
    windows = made.tokenised(loaded)
    numbers = [int(one.sample.sample_id.rpartition("-")[2]) for one in windows]
    assert numbers == sorted(set(numbers))
    assert max(numbers) < 1338 // 99
    for number, window in zip(numbers, windows, strict=True):
        assert (len(window.prefill_ids), len(window.decode_ids)) == (79, 21)
        # The first token is the one that the tokenizer puts before a text.
        whole = [*window.prefill_ids, *window.decode_ids]
        assert whole == [1, *ids[99 * number : 99 * (number + 1)]]
    other = task(book, seed=1).tokenised(loaded)
    assert [one.sample.sample_id for one in other] != [one.sample.sample_id for one in windows]
    assert made.inputs_digest(loaded) != task(book, seed=1).inputs_digest(loaded)
    assert made.inputs_digest(loaded) != task(book, scored_tokens=19).inputs_digest(loaded)


def test_seeds_are_pooled_and_texts_are_not(loaded: LoadedModel, book: Path) -> None:
    """Rows are pooled where the column is equal: seeds draw from the same windows."""
    column = task(book).prompts(loaded)
    assert column == task(book, seed=1).prompts(loaded)
    others = [{"scored_tokens": 19}, {"windows": 4}, {"length": 99}]
    assert all(task(book, **other).prompts(loaded) != column for other in others)
    book.write_text(f" value{book.read_text()}")
    assert task(book).prompts(loaded) != column


def test_full_attention_has_the_likelihood_of_one_dense_forward(
    loaded: LoadedModel, store: PrefillStore, book: Path
) -> None:
    made = task(book)
    (row,) = run(made, loaded, store, FullAttention()).rows
    losses = []
    for window in made.tokenised(loaded):
        ids = torch.tensor([[*window.prefill_ids, *window.decode_ids]])
        with torch.no_grad():
            logits = loaded.model(ids).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits[79:99], ids[0, 80:]).item())
    assert row.values["nll"] == pytest.approx(sum(losses) / 3, abs=1e-4)
    assert row.values["scored_tokens"] == 60
    assert row.values["num_samples"] == 3
    assert "nll_delta" not in row.values
    assert row.values["density"] == 1.0


@pytest.mark.parametrize(
    ("method", "how"),
    [(ExactTopK(), "together"), (Quest(page_size=4), "in turn"), (SpAtten(), "one by one")],
)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_each_prediction_is_made_by_a_step_of_the_method(
    loaded: LoadedModel,
    store: PrefillStore,
    book: Path,
    method: AnyMethod,
    how: str,
    batch_size: int,
) -> None:
    outcome = run(task(book, batch_size=batch_size), loaded, store, method)
    values = outcome.rows[0].values
    assert values["known_tokens"] == how
    assert values["sparse_step_share"] == 1.0
    # 24 of 80 to 99 cached tokens.
    share = sum(24 / n for n in range(80, 100)) / 20
    assert values["density"] == pytest.approx(share, rel=0.1)
    assert values["kl_full"] > 1e-3
    assert 0 < values["top1_agreement"] < 1
    deltas = [one["nll"] - one["full_nll"] for one in outcome.samples]
    assert values["nll_delta"] == pytest.approx(sum(deltas) / 3)


def test_with_nearly_all_tokens_the_predictions_are_full_attentions(
    loaded: LoadedModel, store: PrefillStore, book: Path
) -> None:
    values = run(task(book), loaded, store, ExactTopK(), k=98).rows[0].values
    assert values["sparse_step_share"] == pytest.approx(1 / 20)  # the last step has 99 tokens
    assert abs(values["nll_delta"]) < 0.05
    assert values["kl_full"] < 0.05


def test_k_at_all_tokens_is_skipped(loaded: LoadedModel, store: PrefillStore, book: Path) -> None:
    (row,) = run(task(book), loaded, store, ExactTopK(), k=99).rows
    assert row.status == "skipped"
    assert "k=99 (at most 99 were cached)" in row.reason


def test_predictions_are_compared_token_by_token() -> None:
    full = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]]).log()
    found = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.7, 0.1]]).log()
    result = compared(found, full, torch.tensor([1, 0]))
    assert result["nll"] == pytest.approx([math.log(2), math.log(5)], rel=1e-6)
    assert result["full_nll"] == pytest.approx([math.log(4), math.log(5)], rel=1e-6)
    # 0.5 ln 2 + 0.25 ln 0.5 + 0
    assert result["kl_full"] == pytest.approx([0.25 * math.log(2), 0.0], abs=1e-6)
    assert result["top1_agreement"] == [0.0, 1.0]


def test_intervals_are_over_windows() -> None:
    samples = [
        {"nll": 2.0, "full_nll": 1.0, "kl_full": 0.1},
        {"nll": 2.5, "full_nll": 1.0, "kl_full": 0.3},
        {"nll": 3.0, "full_nll": 1.0, "kl_full": 0.2},
    ]
    found = window_columns(samples)
    half = 4.302653 * 0.5 / math.sqrt(3)  # Student's t with 2 degrees of freedom
    assert found["nll_delta_ci_low"] == pytest.approx(1.5 - half, abs=1e-4)
    assert found["nll_delta_ci_high"] == pytest.approx(1.5 + half, abs=1e-4)
    assert found["kl_full_ci_low"] == 0.0  # not negative
    assert window_columns(samples[:1]) == {}


def test_short_texts_are_joined_and_long_ones_are_not(loaded: LoadedModel, tmp_path: Path) -> None:
    rows = [" the secret" * 20] * 3 + [" hidden" * 130] + [None]
    table = pyarrow.table({"text": rows})
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "data" / "test-0.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "data" / "train-0.parquet")
    given: dict[str, Any] = {"length": 100, "dataset": str(tmp_path), "dataset_files": "*test*"}
    made = Perplexity(windows=2, scored_tokens=9, **given)
    first, second = (
        loaded.tokenizer.decode([*one.prefill_ids, *one.decode_ids], skip_special_tokens=True)
        for one in made.tokenised(loaded)
    )
    assert "hidden" not in first
    assert set(second.split()) == {"hidden"}
    with pytest.raises(TaskDoesNotFit, match=r"must fill task.windows=3 windows of 100 .* got 2"):
        Perplexity(windows=3, scored_tokens=9, **given).tokenised(loaded)
    with pytest.raises(ValueError, match=r"task.column must be one of text .* got 'story'"):
        Perplexity(column="story", **given).tokenised(loaded)
    with pytest.raises(ValueError, match="found none in"):
        Perplexity(**{**given, "dataset_files": "*dev*"}).tokenised(loaded)
    # All of a folder's files, if nothing says which.
    both = Perplexity(length=100, windows=4, scored_tokens=9, dataset=str(tmp_path))
    assert len(both.tokenised(loaded)) == 4


def test_a_data_set_of_the_hub_is_fetched(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [" the secret" * 90]}), tmp_path / "test-0.parquet"
    )
    asked: list[Any] = []

    def fetch(name: str, **given: Any) -> str:
        asked.append((name, given))
        return str(tmp_path)

    monkeypatch.setattr(perplexity, "snapshot_download", fetch)
    made = Perplexity(length=100, windows=1, scored_tokens=9, dataset="emozilla/pg19-test")
    assert len(made.tokenised(loaded)) == 1
    assert asked == [
        ("emozilla/pg19-test", {"repo_type": "dataset", "allow_patterns": ["*test*.parquet"]})
    ]
    assert made.prompts(loaded).startswith("emozilla/pg19-test (")

    def fail(name: str, **given: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(perplexity, "snapshot_download", fail)
    with pytest.raises(ValueError, match="can be reached, got 'a/b': no network"):
        Perplexity(length=100, dataset="a/b").tokenised(loaded)


def test_the_default_texts_are_those_that_no_method_is_fitted_on(loaded: LoadedModel) -> None:
    made = Perplexity()
    assert list(made._texts()) == [python_topics("second")]
    assert made.prompts(loaded).startswith("Python's documentation topics, second half (")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windows": 0}, "task.windows must be at least 1, got 0"),
        ({"scored_tokens": 2.5}, "task.scored_tokens must be a whole number"),
        ({"files": ["nowhere.txt"]}, "must be files, found none at 'nowhere.txt'"),
        ({"files": [__file__], "dataset": "x"}, "got both; leave one out"),
    ],
)
def test_bad_settings_are_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Perplexity(**settings)
