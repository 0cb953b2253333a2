"""lm-eval's tasks through our loop: the same prompts, stops and scores as its own backend gives."""

import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from topkbench.analysis.record.row import same_under_each_seed
from topkbench.harness.cell import run_cell
from topkbench.harness.samples import TaskDoesNotFit
from topkbench.harness.task import Context
from topkbench.methods.base import AnyMethod, Policy
from topkbench.methods.full import FullAttention
from topkbench.models.load import LoadedModel, load_model
from topkbench.models.prefill_store import PrefillStore
from topkbench.tasks.lm_eval import LmEval
from topkbench.tasks.lm_eval_documents import index as index_of
from topkbench.tasks.lm_eval_documents import middle_out, question_place

lm_eval = pytest.importorskip("lm_eval")

COLOURS = ("red", "green", "blue", "black")
KEYS = ("cat", "dog", "house", "river", "stone", "apple", "table", "lamp")
GENERATE: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
    ],
}
CHOOSE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}
LIKELY: dict[str, Any] = {
    "output_type": "loglikelihood",
    "doc_to_target": " {{answer}}",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
    ],
}
FILTERED: dict[str, Any] = {
    **GENERATE,
    "filter_list": [
        {
            "name": "first",
            "filter": [
                {"function": "regex", "regex_pattern": "^ ?(\\w+)"},
                {"function": "take_first"},
            ],
        }
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, and tasks that ask something of them."""
    made = tmp_path_factory.mktemp("lm-eval")
    rng = random.Random(0)
    lines = []
    for number in range(8):
        keys = rng.sample(KEYS, 5)
        values = [rng.choice(COLOURS) for _ in keys]
        facts = [
            f"The magic word for {key} is {value}." for key, value in zip(keys, values, strict=True)
        ]
        gold = COLOURS.index(values[2])
        lines.append(
            {
                "context": " ".join(facts * (1 + number % 4)),
                "question": f"What is the magic word for {keys[2]}? It is",
                "answer": values[2],
                "choices": list(COLOURS),
                "gold": gold,
            }
        )
    (made / "documents.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    task(made, "made_generate", GENERATE)
    task(made, "made_choose", CHOOSE)
    task(made, "made_likely", LIKELY)
    task(made, "made_filtered", FILTERED)
    return made


def task(folder: Path, name: str, given: dict[str, Any], **more: Any) -> None:
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{context}}\n{{question}}",
        "metadata": {"version": 2.0},
        **given,
        **more,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("tiny", "tiny", short_answers=True)


def make(folder: Path, *names: str, **settings: Any) -> LmEval:
    given = {"num_samples": 5, "timed_prompts": 0, "judged_prompts": 2, **settings}
    return LmEval(names=list(names), include_path=str(folder), **given)


def run(task: LmEval, loaded: LoadedModel, method: AnyMethod, k: int = 16) -> Any:
    policy = Policy(k=k, num_sink=1, num_recent=2, dense_layers=0)
    context = Context(loaded, PrefillStore(loaded.model), method, policy, FullAttention())
    return run_cell(context, task)


def rows_of(found: Any) -> dict[str, Any]:
    assert [row.status for row in found.rows] == ["ok"] * len(found.rows)
    return {row.subtask: row.values for row in found.rows}


@pytest.mark.parametrize(
    ("name", "question"), [("tiny", "sparse"), ("tiny", "dense"), ("smollm2", "sparse")]
)
def test_full_attention_has_the_scores_of_lm_evals_own_backend(
    folder: Path, name: str, question: str, request: pytest.FixtureRequest
) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ("made_generate", "made_filtered", "made_choose", "made_likely")
    model = replace(request.getfixturevalue(name), chat=False)
    number = 5 if name == "tiny" else 1
    ours = make(folder, *names, question=question, num_fewshot=0, num_samples=number)
    found = run(ours, model, FullAttention())
    scores = {name: values["score"] for name, values in rows_of(found).items()}
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    documents = {
        name: sorted(int(one.rsplit("-", 1)[1]) for one in ids)
        for name, ids in (
            (name, [s["sample_id"] for s in found.samples if s["subtask"] == name])
            for name in names
        )
    }
    backend = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=1, max_length=2048)
    theirs = lm_eval.simple_evaluate(
        model=backend,
        tasks=list(names),
        task_manager=manager,
        samples=documents,
        bootstrap_iters=0,
        num_fewshot=0,
    )
    results, logged = theirs["results"], theirs["samples"]
    expected = {
        "made_generate": results["made_generate"]["exact_match,none"],
        "made_filtered": results["made_filtered"]["exact_match,first"],
        "made_choose": results["made_choose"]["acc,none"],
        "made_likely": results["made_likely"]["acc,none"],
    }
    assert {name: scores[name] for name in names} == {
        name: pytest.approx(100 * value) for name, value in expected.items()
    }
    # Not only the means: every answer, letter by letter.
    ours_said = [one["prediction"] for one in found.samples if one["subtask"] == names[0]]
    assert ours_said == [one["resps"][0][0] for one in logged["made_generate"]]
    assert len({one["prediction"] for one in found.samples}) >= 2


def test_likelihoods_are_those_of_lm_evals_own_backend(folder: Path, tiny: LoadedModel) -> None:
    from lm_eval.models.huggingface import HFLM

    ours = make(folder, "made_choose", num_samples=2)
    (prompts, context) = (
        ours.tokenised(tiny),
        Context(tiny, PrefillStore(tiny.model), FullAttention(), Policy(k=16), FullAttention()),
    )
    assert len(prompts) == 8  # four choices of two documents
    assert len({prompt.prefill_ids for prompt in prompts}) == 2  # which share a prefill
    plan = ours.plan(context, prompts)
    found = ours.measure(context, plan, "answers", prompts)["samples"]  # type: ignore[arg-type]
    backend = HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer, batch_size=1, max_length=2048)
    drawn = ours.drawn(tiny)
    instances = [
        one
        for _, document in drawn.documents.values()
        for one in ours._tasks[0]._instances[document.number]
    ]
    expected = backend.loglikelihood(instances, disable_tqdm=True)
    for one, (likelihood, is_likeliest) in zip(found, expected, strict=True):
        assert one["log_likelihood"] == pytest.approx(likelihood, abs=1e-3)
        assert one["is_likeliest"] == is_likeliest


def test_every_method_runs_and_reads_less(
    folder: Path, loaded: LoadedModel, make_method: Callable[..., AnyMethod]
) -> None:
    dense = rows_of(run(make(folder, "made_generate", "made_choose"), loaded, FullAttention()))
    task = make(folder, "made_generate", "made_choose")
    found = rows_of(run(task, loaded, make_method("exact")))
    assert set(found) == {"made_generate", "made_choose", "mean"}
    assert 0 < found["mean"]["density"] < 1
    assert found["mean"]["bytes_read_per_step"] < dense["mean"]["bytes_read_per_step"]
    assert found["mean"]["judged_prompts"] == 2
    assert found["mean"]["num_samples"] == 10  # documents, not choices
    assert task.sample_counts("made_choose") == {
        "wanted_samples": 5,
        "source_samples": 8,
        "skipped_samples": 0,
        "truncated_samples": 0,
    }
    skipped = run(
        make(folder, "made_choose", question="dense"), loaded, make_method("exact"), k=999
    )
    assert [row.status for row in skipped.rows] == ["skipped"]


def test_the_question_begins_where_its_field_does_and_else_is_counted(
    folder: Path, tiny: LoadedModel
) -> None:
    (sample, *_) = make(folder, "made_generate").samples(tiny)
    assert sample.question.startswith("What is the magic word")
    assert sample.context.endswith(".\n")
    (counted, *_) = make(
        folder, "made_generate", question_fields=["nothing"], question_tokens=4
    ).samples(tiny)
    assert (counted.question, counted.question_tokens) == ("", 4)
    with pytest.raises(ValueError, match=r"^question=sparse needs a question that is separate"):
        make(folder, "made_generate", question_fields=["nothing"]).samples(tiny)
    with pytest.raises(TaskDoesNotFit, match=r"^a document must have a question and fit"):
        make(folder, "made_generate", question_fields=["nothing"], skip_bad=True).samples(tiny)


@pytest.mark.parametrize(
    ("names", "place"),
    [
        (("question",), 8),
        (("text", "question"), 8),  # the last of the two
        (("text",), None),  # nothing would be before it
        (("blank", "number", "missing", "elsewhere"), None),
        (("repeated",), 15),  # the last time that it occurs
    ],
)
def test_where_a_question_begins(names: tuple[str, ...], place: int | None) -> None:
    fields = {
        "text": "context",
        "question": " Which? ",
        "blank": " ",
        "number": 3,
        "elsewhere": "not here",
        "repeated": "?",
    }
    assert question_place("context Which??? Answer:", fields, names) == place


def test_the_middle_is_left_out_of_prompts_that_are_too_long(
    folder: Path, tiny: LoadedModel
) -> None:
    assert middle_out([1, 2, 3, 4, 5], 4) == ([1, 2], [4, 5])
    assert middle_out([1, 2, 3, 4, 5], 3) == ([1], [5])
    assert middle_out([1, 2, 3], 1) == ([], [])
    whole = make(folder, "made_generate", num_samples=8)
    lengths = [prompt.num_tokens + 6 for prompt in whole.tokenised(tiny)]
    length = sorted(lengths)[3]
    with pytest.raises(
        TaskDoesNotFit, match=rf"must fit {length} tokens, got \d+; task\.truncate="
    ):
        make(folder, "made_generate", num_samples=8, length=length).samples(tiny)
    short = make(folder, "made_generate", num_samples=8, length=length, truncate="middle")
    cut = [prompt.num_tokens + 6 for prompt in short.tokenised(tiny)]
    assert all(one <= length for one in cut)
    assert [one for one in cut if one < length - 4] == [one for one in lengths if one < length - 4]
    assert short.sample_counts("mean")["truncated_samples"] == sum(one > length for one in lengths)
    assert all(one.question.startswith("What") for one in short.samples(tiny))
    left = make(folder, "made_generate", num_samples=8, length=length, skip_bad=True)
    assert len(left.samples(tiny)) == sum(one <= length for one in lengths)
    assert left.sample_counts("mean")["skipped_samples"] == sum(one > length for one in lengths)


def test_rows_say_which_documents_are_asked(folder: Path, tiny: LoadedModel) -> None:
    said = make(folder, "made_generate").prompts(tiny)
    pattern = r"lm-eval [\d.]+: made_generate 2\.0 \(([0-9a-f]{16}), raw\)"
    digest = re.fullmatch(pattern, said)
    assert digest is not None
    assert make(folder, "made_generate", seed=7, num_samples=2).prompts(tiny) == said
    # Seeds draw from the same documents, of which each counts once.
    assert same_under_each_seed(said)
    lines = (folder / "documents.jsonl").read_text().splitlines()
    other = folder / "other.jsonl"
    other.write_text("\n".join([*lines[:-1], lines[-1].replace("What", "Which")]) + "\n")
    task(folder, "made_generate_too", GENERATE,
         dataset_kwargs={"data_files": {"test": str(other)}})  # fmt: skip
    again = re.search(r"\(([0-9a-f]{16}), raw\)", make(folder, "made_generate_too").prompts(tiny))
    assert again is not None
    assert again[1] != digest[1]


def test_only_long_enough_documents_are_drawn_and_rows_say_so(
    folder: Path, tiny: LoadedModel
) -> None:
    every = make(folder, "made_generate", num_samples=8)
    lengths = {one.sample.sample_id: one.num_tokens for one in every.tokenised(tiny)}
    least = sorted(lengths.values())[4]
    long = make(folder, "made_generate", num_samples=8, min_length=least)
    enough = [name for name, length in lengths.items() if length >= least]
    assert [one.sample_id for one in long.samples(tiny)] == enough
    assert len(enough) == 4
    assert long.prompts(tiny).endswith(f", of at least {least:,} tokens")
    few = make(folder, "made_generate", num_samples=2, min_length=least)
    assert {one.sample_id for one in few.samples(tiny)} < set(enough)
    assert few.sample_counts("mean")["source_samples"] == 8
    with pytest.raises(
        TaskDoesNotFit, match=r"^a document must have 9,999 tokens, have a question"
    ):
        make(folder, "made_generate", min_length=9999).samples(tiny)


def test_a_limit_of_ones_own_replaces_the_tasks(folder: Path, tiny: LoadedModel) -> None:
    (sample, *_) = make(folder, "made_generate", max_new_tokens=3).samples(tiny)
    assert sample.max_new_tokens == 3
    sentence = (
        "answers of made_generate must leave room for a prompt in 50 tokens, got 50; set"
        " task.max_new_tokens."
    )
    with pytest.raises(TaskDoesNotFit, match=f"^{re.escape(sentence)}$"):
        make(folder, "made_generate", max_new_tokens=50, length=50).samples(tiny)


def test_some_tasks_are_asked_without_the_chat_template(folder: Path, smollm2: LoadedModel) -> None:
    assert smollm2.chat
    names = ("made_generate", "made_filtered")
    asked = make(folder, *names, num_samples=1, no_chat=["made_filtered"])
    texts = [
        smollm2.tokenizer.decode([*one.prefill_ids, *one.decode_ids])
        for one in asked.tokenised(smollm2)
    ]
    assert ["<|im_start|>" in text for text in texts] == [True, False]
    said = asked.prompts(smollm2)
    assert re.search(r"made_generate 2\.0 \([0-9a-f]{16}, chat template\)", said)
    assert re.search(r"made_filtered 2\.0 \([0-9a-f]{16}, raw\)", said)
    with pytest.raises(
        ValueError, match=r"^task\.no_chat must name tasks that are asked \(made_gen"
    ):
        make(folder, "made_generate", no_chat=["gsm8k"])


def test_data_sets_are_read_by_revision_and_tasks_are_told_what_to_make(
    folder: Path, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[tuple[str, str | None]] = []

    def read(path: str, *given: Any, revision: str | None = None, **settings: Any) -> Any:
        asked.append((path, revision))
        lines = [json.loads(one) for one in (folder / "documents.jsonl").read_text().splitlines()]
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(lines)})

    monkeypatch.setattr(datasets, "load_dataset", read)
    for name in ("one", "other"):
        task(folder, f"made_of_{name}", GENERATE,
             dataset_path=f"owner/{name}", dataset_kwargs={})  # fmt: skip
    both = ("made_of_one", "made_of_other")
    with pytest.raises(ValueError, match=r"read \(owner/one, owner/other\), got 'owner/two'\.$"):
        make(folder, *both, revisions={"owner/two": "0123abc"})
    asked.clear()
    make(folder, *both, revisions={"owner/one": "0123abc"})
    assert asked == [("owner/one", "0123abc"), ("owner/other", None)]
    assert datasets.load_dataset is read
    (folder / "making.py").write_text(
        "import datasets\n\n"
        "def made(length, **given):\n"
        "    fields = {'context': 'word ' * length, 'question': 'Which?', 'answer': 'word'}\n"
        "    return {'test': datasets.Dataset.from_list([fields])}\n"
    )
    task(folder, "made_to_length", GENERATE, dataset_path="none", dataset_kwargs={})
    config = (folder / "made_to_length.yaml").read_text()
    (folder / "made_to_length.yaml").write_text(f"{config}custom_dataset: !function making.made\n")
    (sample,) = make(folder, "made_to_length", metadata={"length": 7}).samples(tiny)
    assert sample.context.count("word") == 7


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts documents in the place of every data set of the hub."""
    import datasets

    def put(*documents: dict[str, Any]) -> None:
        found = datasets.DatasetDict({"test": datasets.Dataset.from_list(list(documents))})
        monkeypatch.setattr(datasets, "load_dataset", lambda *given, **settings: found)

    return put


QASPER = {
    "context": "The house by the river is red.",
    "question": "Which colour has the house?",
    "answers": ["dark red", "unanswerable"],
    "all_classes": None,
}


def test_longbench_is_scored_by_its_own_metrics(
    tiny: LoadedModel, hub: Callable[..., None]
) -> None:
    hub(QASPER)
    asked = LmEval(names="longbench_qasper_e", num_samples=1)
    (sample,) = asked.samples(tiny)
    assert sample.context.endswith("\n\nQuestion: ")
    assert sample.question == "Which colour has the house?\n\nAnswer:"
    # Red is the whole answer and half of the right one: F1 is 2 / 3.
    scores = [asked.score(sample, one) for one in ("The dark red.", "red", "blue")]
    assert scores == [100, pytest.approx(200 / 3), 0]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (r"The final answer is $\boxed{4}$.", 100),
        (r"$$\boxed{4}$$", 100),
        (
            r"<think>If $x=2$, is it $\boxed{5}$? No.</think>So $x^2=4$." "\n\n" r"$$\boxed{4}$$",
            100,
        ),
        (r"<think>If $x=2$, it is $\boxed{4}$.</think>" "\n\n" r"$$\boxed{5}$$", 0),
        (r"\boxed{\dfrac{8}{2}}", 0),  # written otherwise
        ("$4$", 100),
        ("5", 0),
        ("", 0),
    ],
)
def test_an_answer_to_math_500_is_what_its_last_box_holds(
    answer: str, score: float, tiny: LoadedModel, hub: Callable[..., None]
) -> None:
    solution = r"As $x=2$, $x^2=\boxed{4}$."
    hub({"problem": "If $x=2$, what is $x^2$?", "solution": solution, "answer": "4"})
    path = Path(__file__).parents[2] / "conf" / "experiment" / "math500.yaml"
    names = yaml.safe_load(path.read_text())["task"]["names"]
    asked = LmEval(names=names, num_samples=1, question="dense")
    (sample,) = asked.samples(tiny)
    assert sample.context == "Problem: If $x=2$, what is $x^2$?\nAnswer:"
    assert sample.answers == ("4",)
    assert asked.score(sample, answer) == score


@pytest.mark.parametrize("package", ["jieba", "fuzzywuzzy", "rouge"])
def test_a_package_that_a_task_lacks_is_named(
    package: str, hub: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(QASPER)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.longbench.metrics", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"^task\.names=longbench_qasper_e needs the package") as e:
        LmEval(names="longbench_qasper_e")
    assert f"the package {package}, which is not installed; install topkbench[lm-eval]" in str(
        e.value
    )


EXPERIMENTS = [
    path.stem
    for path in sorted((Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml"))
    if "task: lm_eval" in path.read_text()
]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_tasks_of_an_experiment_are_lm_evals(name: str) -> None:
    path = Path(__file__).parents[2] / "conf" / "experiment" / f"{name}.yaml"
    settings = yaml.safe_load(path.read_text())["task"]
    given = settings["names"]
    names = [given] if isinstance(given, str) else given
    index = index_of(names, None, {}).task_index
    assert set(names) <= set(index)
    assert set(settings.get("no_chat", ())) <= set(names)
    # Its files, as far as they can be read without data: the score is a mean.
    metric = settings.get("metric", "").partition(",")[0]
    for one in names:
        if index[one].yaml_path is not None and metric:
            assert metric in Path(index[one].yaml_path).read_text()


def test_there_is_an_experiment_for_each_benchmark() -> None:
    assert set(EXPERIMENTS) == {
        *("longbench", "longbench_e", "longbench_v2", "infinitebench", "babilong"),
        *("gsm8k", "math500", "aime"),
    }


def test_documents_are_drawn_by_seed_and_examples_are_the_tasks_own(
    folder: Path, tiny: LoadedModel
) -> None:
    def ids(**given: Any) -> list[str]:
        return [one.sample_id for one in make(folder, "made_generate", **given).samples(tiny)]

    assert ids(num_samples=3) == ids(num_samples=3)
    assert len({tuple(ids(num_samples=3, seed=seed)) for seed in range(5)}) > 1
    assert len(ids(num_samples=100)) == 8
    digests = {
        make(folder, "made_generate", **given).inputs_digest(tiny)
        for given in ({}, {"seed": 1}, {"num_samples": 8}, {"metric": "exact_match,none"})
    }
    assert len(digests) == 4


def test_a_document_has_the_same_examples_whenever_it_is_drawn(folder: Path) -> None:
    from lm_eval.tasks import TaskManager

    name = "made_with_examples"
    task(folder, name, GENERATE, fewshot_split="test", num_fewshot=2)
    (asked,) = make(folder, name)._tasks
    texts = [[one.requests[0].text for one in asked.documents(8, 0)] for _ in range(2)]
    assert texts[0] == texts[1]
    assert len({text.split("\n\n")[0] for text in texts[0]}) > 1
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    theirs = manager.load([name])["tasks"][name]
    theirs.set_fewshot_seed(seed=1234)
    theirs.build_all_requests()
    assert [one.args[0] for one in theirs.instances] == texts[0]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"names": None}, "task.names must name tasks or groups of lm-eval, such as"),
        ({"include_path": "/nowhere"}, "task.include_path must be a folder, got '/nowhere'."),
        ({"metric": "f1"}, "task.metric must be one of exact_match,none of made_"),
        ({"names": ["made_likely"], "metric": "perplexity"}, "task.metric must be a mean of which"),
        ({"names": ["made_rolling"]}, "task.names must name tasks of answers or choices, but"),
        ({"names": ["made_missing"]}, "task.names=made_missing must be a task of lm-eval"),
        ({"truncate": "left"}, "task.truncate must be middle or null, got 'left'."),
        ({"num_fewshot": -1}, "task.num_fewshot must be at least 0, got -1."),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_sentence(
    folder: Path, given: dict[str, Any], sentence: str
) -> None:
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_target": "{{context}}"}
    task(folder, "made_rolling", rolling, metric_list=[{"metric": "word_perplexity"}])
    task(folder, "made_missing", GENERATE,
         dataset_kwargs={"data_files": {"test": str(folder / "nothing.jsonl")}})  # fmt: skip
    settings = {"names": ["made_generate"], "include_path": str(folder), **given}
    with pytest.raises(ValueError, match=rf"^{re.escape(sentence)}") as error:
        LmEval(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("broken.jsonl", '{"answer": "a"}\n\n{"answer": "b"\n{"answer" "c"}\n', 3),
        ("broken.json", '{"answer": "a"}\n{"answer" "b"}\n{"answer": \n', 2),
        ("list.json", '[\n{"answer": "a"},\n{"answer": "b"},\n{"answer" "c"}]\n', 4),
    ],
)
def test_a_broken_line_is_named(folder: Path, name: str, text: str, line: int) -> None:
    (folder / name).write_text(text)
    files = {"train": str(folder / "documents.jsonl"), "test": [str(folder / name)]}
    task(folder, "made_broken", GENERATE, dataset_kwargs={"data_files": files})
    with pytest.raises(ValueError, match=r"^task\.names=made_broken must be a task of") as error:
        make(folder, "made_broken")
    assert f"{folder / name} must be JSON, but line {line} is not: " in str(error.value)


def test_answers_that_a_task_samples_are_refused(folder: Path, tiny: LoadedModel) -> None:
    settings = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 0.7}
    task(folder, "made_sampled", GENERATE, generation_kwargs=settings)
    with pytest.raises(ValueError, match=r"^answers are decoded greedily, but made_sampled"):
        make(folder, "made_sampled").samples(tiny)


def test_an_unknown_name_is_answered_with_near_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import tasks

    class Index(tasks.TaskManager):
        def __init__(self, include_defaults: bool = True, **given: Any) -> None:
            self.every = include_defaults  # the whole index takes 15 seconds

        @property
        def task_index(self) -> dict[str, Any]:
            return {"gsm8k": None, "longbench": None} if self.every else {}

    monkeypatch.setattr(tasks, "TaskManager", Index)
    sentence = r"^task\.names must name tasks.* got 'gsm8'; did you mean gsm8k\?$"
    with pytest.raises(ValueError, match=sentence):
        make(folder, "gsm8")


def test_an_answer_ends_at_its_stop_and_does_not_contain_it(
    folder: Path, loaded: LoadedModel
) -> None:
    def answers(name: str, until: list[str]) -> list[dict[str, Any]]:
        settings = {"until": until, "max_gen_toks": 12}
        task(folder, name, GENERATE, generation_kwargs=settings)
        found: list[dict[str, Any]] = run(
            make(folder, name, num_samples=8), loaded, FullAttention()
        ).samples
        return found

    whole = answers("made_long", [])
    place, longest = max(enumerate(whole), key=lambda one: len(one[1]["prediction"].split()))
    stop = longest["prediction"].split()[2]
    stopped = answers("made_stop", [stop])[place]
    assert stopped["prediction"] == longest["prediction"].split(stop)[0] != ""
    assert stopped["num_generated"] < longest["num_generated"]
    assert (stopped["is_cut"], longest["is_cut"]) == (False, longest["num_generated"] == 12)
