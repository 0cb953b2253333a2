"""The named benchmarks through their real loaders, on made data with the columns of the hub's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

from topkbench.models.load import LoadedModel, load_model
from topkbench.tasks.lm_eval import LmEval

pytest.importorskip("lm_eval")

CONF = Path(__file__).parents[2] / "conf"
CONTEXT = "The red house stands by the river. Nobody has lived there for years."
QUESTION = "Which colour has the house?"
OPTIONS = ["green", "red", "blue", "black"]

LONGBENCH = {
    "question": QUESTION,
    "context": CONTEXT,
    "answers": ["red"],
    "length": 13,
    "dataset": "any",
    "language": "en",
    "all_classes": None,
    "_id": "0",
}
# What the columns hold where it is something else, by the data set's name without _e.
OF_LONGBENCH = {
    "passage_count": {"question": "", "answers": ["3"]},
    "passage_retrieval_en": {"answers": ["Paragraph 3"]},
    "trec": {"answers": ["Colour"], "all_classes": ["Colour", "Number", "Place"]},
    "lcc": {"question": "", "answers": ["return red"]},
    "repobench-p": {"question": "def colour():\n", "answers": ["return red"]},
    "gov_report": {"question": "", "answers": ["A red house stands empty."]},
    "multi_news": {"question": "", "answers": ["A red house stands empty."]},
    "qmsum": {"answers": ["The house is red."]},
    "samsum": {"answers": ["The house is red."]},
}
INFINITEBENCH = {
    "id": 0,
    "context": CONTEXT,
    "input": QUESTION,
    "answer": ["red"],
    "options": [""],
}
OF_INFINITEBENCH = {
    "longbook_choice_en": {"options": OPTIONS},
    "code_debug": {"options": OPTIONS},
    "passkey": {"answer": ["71432"]},
    "number_string": {"answer": ["1222345678"]},
    "math_find": {"input": "The largest number of", "answer": ["9"]},
}
BABILONG = {"input": CONTEXT, "question": QUESTION, "target": "red"}
LONGBENCH_V2 = {
    "context": CONTEXT,
    "question": QUESTION,
    "choices": OPTIONS,
    "answer": 1,
    "_id": "0",
    "difficulty": "easy",
    "length": "short",
}
OF_OTHERS = {
    "openai/gsm8k": {"question": QUESTION, "answer": "It is 4.\n#### 4"},
    "Maxwell-Jia/AIME_2024": {"ID": "1", "Problem": QUESTION, "Solution": "It is 4.", "Answer": 4},
    "math-ai/aime25": {"problem": QUESTION, "answer": "4", "id": "0"},
    "HuggingFaceH4/MATH-500": {
        "problem": QUESTION,
        "solution": r"It is $\boxed{4}$.",
        "answer": "4",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "0",
    },
}


def document(path: str, name: str | None, split: str) -> dict[str, Any]:
    if path == "Xnhyacinth/LongBench":
        assert name is not None
        return {**LONGBENCH, **OF_LONGBENCH.get(name.removesuffix("_e"), {})}
    if path == "xinrongzhang2022/InfiniteBench":
        return {**INFINITEBENCH, **OF_INFINITEBENCH.get(split, {})}
    if path == "recursal/longbench-v2":
        return LONGBENCH_V2
    if path == "RMT-team/babilong-1k-samples":
        return BABILONG
    return OF_OTHERS[path]


class Splits(dict[str, Any]):
    """The splits of a data set, each made when it is asked for."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, split: str) -> Any:
        self[split] = self.make(split)
        return self[split]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Puts made documents in the place of the hub's; which were asked for, by path and name."""
    import datasets

    found: list[tuple[str, str | None]] = []

    def read(path: str, name: str | None = None, split: str | None = None, **settings: Any) -> Any:
        found.append((path, name))
        number = 6 if path == "openai/gsm8k" else 2  # five are examples

        def make(split: str) -> Any:
            return datasets.Dataset.from_list([document(path, name, split)] * number)

        return Splits(make) if split is None else make(split)

    monkeypatch.setattr(datasets, "load_dataset", read)
    return found


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return replace(load_model("tiny", "tiny", short_answers=True), window=131072)


def make(experiment: str) -> LmEval:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[f"experiment={experiment}"])
    config.task.update(num_samples=1, length=None, min_length=None, batch_size=1)
    task = instantiate(config.task)
    assert isinstance(task, LmEval)
    return task


def right(sample: Any, experiment: str) -> str:
    """Return an answer that is right, as a model would write it."""
    if sample.subtask in ("infinitebench_longbook_choice_en", "infinitebench_code_debug"):
        return "B"
    if experiment == "gsm8k":
        return "Two and two are 4.\n#### 4"
    if experiment in ("math500", "aime"):
        return r"It is $\boxed{4}$."
    if experiment == "babilong":
        return "The most recent location of the house is red."
    return str(sample.answers[0])


@pytest.mark.parametrize(
    ("experiment", "number", "path"),
    [
        ("longbench", 16, "Xnhyacinth/LongBench"),
        ("longbench_e", 13, "Xnhyacinth/LongBench"),
        ("infinitebench", 9, "xinrongzhang2022/InfiniteBench"),
        ("babilong", 5, "RMT-team/babilong-1k-samples"),
        ("gsm8k", 1, "openai/gsm8k"),
        ("math500", 1, "HuggingFaceH4/MATH-500"),
        ("aime", 2, None),
    ],
)
def test_each_task_of_a_benchmark_reads_its_data_and_scores_answers(
    experiment: str,
    number: int,
    path: str | None,
    tiny: LoadedModel,
    asked: list[tuple[str, str | None]],
) -> None:
    task = make(experiment)
    if path is not None:
        assert {one for one, _ in asked} == {path}
    if experiment == "babilong":
        assert {name for _, name in asked} == {"32k"}
    samples = task.samples(tiny)
    assert len({one.subtask for one in samples}) == len(samples) == number
    for sample in samples:
        prompt = sample.context + sample.question
        assert CONTEXT in prompt or QUESTION in prompt
        assert sample.max_new_tokens >= 1
        if experiment == "babilong":  # after the facts, not in the worked examples
            assert sample.question.startswith(QUESTION)
            assert CONTEXT in sample.context
        answer = right(sample, experiment)
        assert task.score(sample, answer) == pytest.approx(100), sample.subtask
        assert task.score(sample, "It is 58163, perhaps.") < 30, sample.subtask


def test_each_task_of_longbench_v2_reads_its_data_and_scores_choices(
    tiny: LoadedModel, asked: list[tuple[str, str | None]]
) -> None:
    task = make("longbench_v2")
    assert {path for path, _ in asked} == {"recursal/longbench-v2"}
    samples = task.samples(tiny)
    names = {one.subtask for one in samples}
    assert len(names) == len({name for _, name in asked}) == 20
    assert len(samples) == 4 * len(names)  # a request for each letter
    for one in task._tasks:
        (found,) = one.documents(1, 0)
        assert found.target == ("B",)
        assert [request.continuation for request in found.requests] == [" A", " B", " C", " D"]
        assert CONTEXT in found.requests[0].text
        likelihoods = [(-3.0, False), (-1.0, True), (-2.0, False), (-4.0, False)]
        assert one.score(found.number, likelihoods) == 100
        assert one.score(found.number, likelihoods[::-1]) == 0
