"""RULER's generator: what its 13 sub-tasks hide and ask, lengths, essays, questions, the hub."""

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from topkbench.harness.cell import run_cell
from topkbench.harness.decoding import tokenise
from topkbench.harness.samples import TaskDoesNotFit
from topkbench.harness.task import Context
from topkbench.methods.base import Policy
from topkbench.methods.full import FullAttention
from topkbench.models.load import LoadedModel
from topkbench.models.prefill_store import PrefillStore
from topkbench.tasks.generated import _READ
from topkbench.tasks.hub import HubDataset, hub_rows, parse_hub
from topkbench.tasks.ruler import SUBTASKS, Ruler
from topkbench.tasks.ruler_data import (
    Essay,
    read_english_words,
    read_essay,
    read_hotpotqa,
    read_squad,
)
from topkbench.tasks.ruler_prompts import (
    DEPTHS,
    NOISE,
    CommonWords,
    FrequentWords,
    Niah,
    Prompt,
    QuestionAnswering,
    VariableTracking,
)
from topkbench.tasks.words import all_listed_words, listed_words

NOUNS = [word for word in listed_words("noun") if word.islower() and word.isalpha()]
ESSAY = Essay("test", " ".join(f"Here stands the {noun}." for noun in NOUNS))
NEEDLE = re.compile(r"One of the special magic (\w+)s for ([\w-]+) is: ([\w-]+)\.")
NUMBER, UUID = r"[1-9]\d{6}", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
WORDS = r"\S+-\S+"


def draw(subtask: Any, size: int, seed: object = 0, index: int = 0) -> Prompt:
    prompt: Prompt = subtask.draw(random.Random(str(seed)), size, index)
    return prompt


def words_of(prompt: Prompt) -> int:
    return len(prompt.text.split())


@pytest.fixture
def niah() -> Callable[[str], Niah]:
    """The needle sub-tasks as the task makes them, over an essay of sentences of four words."""
    task = Ruler(subtasks=SUBTASKS[:8])
    task._essay = ESSAY

    def made(name: str) -> Niah:
        found = task._subtask(None, name)  # type: ignore[arg-type]
        assert isinstance(found, Niah)
        return found

    return made


@pytest.mark.parametrize(
    ("name", "haystack", "key", "value", "needles", "answers"),
    [
        ("niah_single_1", "noise", WORDS, NUMBER, 1, 1),
        ("niah_single_2", "essay", WORDS, NUMBER, 1, 1),
        ("niah_single_3", "essay", WORDS, UUID, 1, 1),
        ("niah_multikey_1", "essay", WORDS, NUMBER, 4, 1),
        ("niah_multikey_2", "needles", WORDS, NUMBER, 101, 1),
        ("niah_multikey_3", "needles", UUID, UUID, 101, 1),
        ("niah_multivalue", "essay", WORDS, NUMBER, 4, 4),
        ("niah_multiquery", "essay", WORDS, NUMBER, 4, 4),
    ],
)
def test_the_needles_of_each_sub_task(
    niah: Callable[[str], Niah],
    name: str,
    haystack: str,
    key: str,
    value: str,
    needles: int,
    answers: int,
) -> None:
    prompt = draw(niah(name), 100 if haystack != "essay" else 800)
    kind = "uuid" if value == UUID else "number"
    found = NEEDLE.findall(prompt.context)
    assert len(found) == needles
    assert all(one[0] == kind for one in found)
    assert all(re.fullmatch(key, one[1]) and re.fullmatch(value, one[2]) for one in found)
    # Each answer stands once in the context, under a key that is asked for.
    assert len(prompt.answers) == answers
    asked = [one for one in found if one[2] in prompt.answers]
    assert len(asked) == answers
    assert {one[1] for one in asked} == {one[1] for one in found if one[1] in prompt.question}
    many = answers > 1
    assert (f"all the special magic {kind}s for" in prompt.question) == many
    assert prompt.answer_prefix.endswith(" are" if many else " is")
    lines = prompt.context.split("\n")[1:]
    if haystack == "noise":
        assert Counter(lines)[NOISE] == 100
    elif haystack == "needles":
        assert len(lines) == 101
    else:
        without = NEEDLE.sub("", prompt.context).split("\n")[1]
        assert without.split() == " ".join(ESSAY.words[:800]).split()


def test_needles_stand_between_sentences_at_forty_depths() -> None:
    assert len(DEPTHS) == 40
    assert DEPTHS[:6] == (0, 3, 5, 8, 10, 13)
    assert DEPTHS[-3:] == (95, 97, 100)
    seen = set()
    for seed in range(200):
        prompt = draw(Niah(haystack=ESSAY, num_keys=4), 400, seed)
        body = prompt.context.split("\n")[1]
        before = [part.count("Here stands the") for part in NEEDLE.split(body)[::4]]
        places = [sum(before[: end + 1]) for end in range(4)]
        assert len(set(places)) == 4  # depths do not repeat
        seen |= set(places)
    assert seen == {int(100 * depth / 100) for depth in DEPTHS}


def test_sentences_end_where_the_text_says_and_a_short_essay_is_repeated() -> None:
    text = "Many words, e.g. these, are here. And more, e.g. those. Is it? It is! " * 3
    essay = Essay("test", " ".join(text.split()))
    once = ["Many words, e.g. these, are here.", "And more, e.g. those.", "Is it?", "It is!"]
    assert essay.sentences(14) == once
    assert essay.sentences(42 + 7) == [*(once * 3), once[0], "And"]


def test_a_chain_follows_a_solved_example_with_names_of_its_own() -> None:
    subtask = VariableTracking(count=lambda text: len(text.split()), seed=3)
    shapes = set()
    for seed in range(3):
        prompt = draw(subtask, 20, seed)
        example, main = prompt.context.split("Memorize")[1:]
        assigned = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", main)
        names, value = [one[0] for one in assigned], assigned[0][1]
        assert prompt.answers == tuple(names)
        assert [one[1] for one in assigned[1:]] == names[:-1]
        assert all(re.fullmatch("[A-Z]{5}", name) for name in names)
        assert 10000 <= int(value) <= 99998
        assert f"value {value} in the text above." in prompt.question
        assert prompt.answer_prefix.endswith(
            f" 5 variables are assigned the value {value}, they are: "
        )
        assert main.count(NOISE) == 20
        solved = re.findall(r"VAR ([A-Z]{3}) =", example)
        assert example.endswith(f"they are:  {' '.join(solved)}\n\n")
        size = len(f"Memorize{example}".split())
        assert 500 - len(NOISE.split()) <= size - 5 <= 500
        shapes.add(re.sub(r"[A-Z]{3}\b|\d{5}", "_", example))
    assert len(shapes) == 1  # the example differs in names and value alone


@pytest.mark.parametrize(
    ("length", "often", "seldom", "example"),
    [(2048, 6, 1, (20, 3, 1)), (4095, 6, 1, (20, 3, 1)), (4096, 30, 3, (40, 10, 3))],
)
def test_common_words_by_length(
    length: int, often: int, seldom: int, example: tuple[int, int, int]
) -> None:
    subtask = CommonWords(words=all_listed_words(), length=length)
    prompt = draw(subtask, 57)
    solved, main = prompt.context.split("Below is a numbered list")[1:]
    for text, answers, (size, most, least) in (
        (main, prompt.answers, (57, often, seldom)),
        (
            solved.split("\nQuestion")[0],
            tuple(re.findall(r"\d+\. (\S+)", solved.split("the list are:")[1])),
            example,
        ),
    ):
        counts = Counter(re.findall(r"\d+\. (\S+)", text))
        assert len(counts) == size
        assert len(answers) == 10
        assert {counts[answer] for answer in answers} == {most}
        assert {count for word, count in counts.items() if word not in answers} == {least}
    assert len(all_listed_words()) == 8166


def test_a_list_longer_than_the_words_needs_rulers_own_file(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    subtask = CommonWords(words=all_listed_words()[:200], length=4096)
    with pytest.raises(TaskDoesNotFit, match=r"cwe needs more than 200 words .*english_words"):
        subtask.largest("0", 4096, words_of)
    file = tmp_path / "english_words.json"
    file.write_text(json.dumps({str(n): f"word{n}" for n in range(9000)}))
    more = read_english_words(str(file))
    # As in RULER, only a list that wonderwords cannot fill is of the other words.
    subtask = CommonWords(words=all_listed_words(), more_words=more, length=4096)
    few, many = draw(subtask, 8166), draw(subtask, 8167)
    assert set(few.answers) <= set(all_listed_words())
    assert all(answer.startswith("word") for answer in many.answers)
    example = many.context.split("Below is")[1]
    assert set(re.findall(r"\d+\. (\S+)", example)) <= set(all_listed_words())
    labels = {Ruler(english_words=one).prompts(loaded) for one in (None, str(file))}
    assert len(labels) == 2
    for content, message in (
        ({"1": "one"}, r"more than the 8,166 words .* has 1\."),
        ({"1": None}, "have the fields"),
        ("version https://git-lfs.github.com/spec/v1", "is what Git LFS keeps in its place"),
    ):
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ValueError, match=rf"task\.english_words must .*{message}"):
            Ruler(english_words=str(file))


def test_frequencies_follow_the_zeta_distribution() -> None:
    prompt = draw(FrequentWords(limit=2000), 1000)
    words = prompt.context.split("coded words. ")[1].split()
    counts = Counter(words).most_common()
    # 1000 * rank**-2 / 1.644934, rounded down
    assert [count for _, count in counts[:7]] == [607, 151, 67, 37, 24, 16, 12]
    assert [word for word, _ in counts[:4]] == ["...", *prompt.answers]
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in counts[1:])
    assert len(counts) == 24  # of 2000 // 50 coded words, those that occur at all
    with pytest.raises(TaskDoesNotFit, match="fwe needs room for more than 20 words"):
        draw(FrequentWords(limit=400), 20)


# Lengths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subtask", "length"),
    [
        (Niah(haystack="noise"), 700),
        (Niah(haystack="needles"), 700),
        (Niah(haystack=ESSAY), 1900),
        (VariableTracking(count=lambda text: len(text.split()), seed=0), 1500),
        (CommonWords(words=all_listed_words(), length=2048), 2048),
        (FrequentWords(limit=2000), 2040),
    ],
)
def test_a_size_is_the_largest_that_fits(subtask: Any, length: int) -> None:
    size = subtask.largest("seed", length, words_of)
    assert words_of(draw(subtask, size, "seed")) <= length
    if isinstance(subtask, FrequentWords):  # it grows in steps
        assert words_of(draw(subtask, size + subtask.step(length), "seed")) >= length
    else:
        assert words_of(draw(subtask, size + 1, "seed")) > length
    prompt, used = subtask.fitted("0", size, 0, length, words_of)
    assert used == words_of(prompt) <= length


def test_a_prompt_that_is_too_long_shrinks_by_whole_steps() -> None:
    subtask = Niah(haystack=ESSAY)
    assert (subtask.step(2048), subtask.step(8192)) == (500, 500)
    prompt, used = subtask.fitted("0", 1100, 0, 700, words_of)
    assert used == words_of(prompt) == words_of(draw(subtask, 600))
    lines = Niah(haystack="noise")
    assert (lines.step(4095), lines.step(4096)) == (5, 25)
    chain = VariableTracking(count=len, seed=0)
    assert (chain.step(4095), chain.step(4096)) == (5, 10)
    with pytest.raises(TaskDoesNotFit, match=r"must have at most task.length=300 tokens, got \d+"):
        subtask.fitted("0", 500, 0, 300, words_of)
    # Nor below what a prompt needs: five assignments, ten common words and others.
    for smallest, size in ((chain, 7), (CommonWords(words=all_listed_words(), length=700), 19)):
        with pytest.raises(TaskDoesNotFit, match="the smallest prompt"):
            smallest.fitted("0", size, 0, 10, words_of)


def test_prompt_and_answer_fill_the_length(loaded: LoadedModel, tmp_path: Path) -> None:
    subtasks = ["niah_single_1", "niah_multikey_2", "fwe"]
    task = Ruler(length=900, num_samples=3, subtasks=subtasks, cache_dir=str(tmp_path))
    for sample in task.samples(loaded):
        prompt = tokenise(loaded, sample, "sparse")
        assert prompt.num_tokens + sample.max_new_tokens == sample.length
        assert 700 < prompt.num_tokens + sample.max_new_tokens <= 900
    few = Ruler(length=900, num_samples=1, subtasks=subtasks, cache_dir=str(tmp_path))
    assert few.samples(loaded) == task.samples(loaded)[::3]
    new_tokens = [one.max_new_tokens for one in few.samples(loaded)]
    assert new_tokens == [128, 128, 50]


def test_a_sub_task_that_does_not_fit_is_skipped(loaded: LoadedModel, tmp_path: Path) -> None:
    knobs: dict[str, Any] = {"num_samples": 1, "cache_dir": str(tmp_path)}
    for again in range(2):  # written, and read from the cache
        task = Ruler(length=900, subtasks=["niah_single_1", "niah_single_2", "qa_1"], **knobs)
        if again:
            _READ.clear()
        found = task.drawn(loaded)
        assert [one.subtask for one in found.samples] == ["niah_single_1"]
        assert list(found.skipped) == ["qa_1", "niah_single_2"]
        assert re.fullmatch(
            r"niah_single_2 does not fit: the smallest prompt and its answer must have at most"
            r" task\.length=900 tokens, got \d+; use a larger task\.length\.",
            found.skipped["niah_single_2"],
        )
    with pytest.raises(TaskDoesNotFit, match=r"^niah_single_2 does not fit: .*larger task"):
        Ruler(length=900, subtasks=["niah_single_2"], **knobs).samples(loaded)


# Questions ----------------------------------------------------------------------------------------

SQUAD = {
    "data": [
        {
            "title": f"article {article}",
            "paragraphs": [
                {
                    "context": f"Paragraph {article}.{number} is here.",
                    "qas": [
                        {
                            "question": f"What is {article}.{number}?",
                            "answers": [{"text": f"a{article}.{number}"}, {"text": "it"}],
                            "is_impossible": False,
                        },
                        {"question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
                for number in range(3)
            ],
        }
        for article in range(8)
    ]
}
HOTPOTQA = [
    {
        "question": f"Who is {one}?",
        "answer": f"person {one}",
        "context": [[f"title {one}.{n}", ["First. ", f"Second {n}."]] for n in range(3)],
    }
    for one in range(6)
]


def hub_squad() -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "title": article["title"],
                "context": paragraph["context"],
                "question": one["question"],
                "answers": {"text": [answer["text"] for answer in one["answers"]]},
            }
            for article in SQUAD["data"]
            for paragraph in article["paragraphs"]
            for one in paragraph["qas"]
        ]
    )


def hub_hotpotqa() -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                **row,
                "context": {
                    "title": [title for title, _ in row["context"]],
                    "sentences": [sentences for _, sentences in row["context"]],
                },
            }
            for row in HOTPOTQA
        ]
    )


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    made = {"squad": SQUAD, "hotpotqa": HOTPOTQA}
    for name, content in made.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return {name: str(tmp_path / f"{name}.json") for name in made}


def test_questions_of_squad_come_with_their_paragraph_first_of_all(files: dict[str, str]) -> None:
    found = read_squad(files["squad"])
    assert len(found.questions) == 24  # those without an answer are left out
    assert len(found.documents) == 24
    (one,) = [one for one in found.questions if one.query == "What is 2.1?"]
    assert [found.documents[place] for place in one.gold] == ["Paragraph 2.1 is here."]
    assert {found.documents[place] for place in one.related} == {
        "Paragraph 2.0 is here.",
        "Paragraph 2.2 is here.",
    }
    subtask, index = QuestionAnswering(questions=found), found.questions.index(one)
    two = draw(subtask, 2, index=index)  # its own paragraph and one of the same article
    assert "Paragraph 2.1 is here." in two.context
    assert len(re.findall(r"Paragraph 2\.[02]", two.context)) == 1
    many = draw(subtask, 10, index=index)
    documents = re.findall(r"Document (\d+):\n(Paragraph \S+ is here\.)", many.context)
    assert [int(number) for number, _ in documents] == list(range(1, 11))
    assert len({text for _, text in documents}) == 10
    assert {f"Paragraph 2.{n} is here." for n in range(3)} < {text for _, text in documents}
    assert many.question == "\nQuestion: What is 2.1?"
    assert many.answers == ("a2.1", "it")
    assert len(re.findall("Document", draw(subtask, 50, index=index).context)) == 50


def test_questions_of_hotpotqa_come_with_their_ten_paragraphs(files: dict[str, str]) -> None:
    found = read_hotpotqa(files["hotpotqa"])
    assert len(found.questions) == 6
    assert found.documents[0] == "title 0.0\nFirst. Second 0."
    prompt = draw(QuestionAnswering(questions=found), 5, index=4)
    assert prompt.context.count("title 4.") == 3
    assert prompt.answers == ("person 4",)


def test_questions_of_the_hub_are_those_of_the_files(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through ``datasets``, which reads a folder as it reads what it has fetched from the hub."""
    for name, table in (("squad_v2", hub_squad()), ("hotpot_qa", hub_hotpotqa())):
        (tmp_path / "owner" / name).mkdir(parents=True)
        table.to_parquet(tmp_path / "owner" / name / "validation-00000.parquet")
    monkeypatch.chdir(tmp_path)
    squad, hotpotqa = read_squad("hub:owner/squad_v2"), read_hotpotqa("hub:owner/hotpot_qa")
    of_files = read_squad(files["squad"]), read_hotpotqa(files["hotpotqa"])
    for mine, theirs in zip((squad, hotpotqa), of_files, strict=True):
        assert (mine.questions, mine.documents) == (theirs.questions, theirs.documents)
    assert squad.label == f"owner/squad_v2 {of_files[0].label.split()[-1]}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"task\.squad must be JSON, but .*squad\.json is not"),
        ("[]", r"task\.squad must have the fields .*squad\.json has not: TypeError"),
        ('{"data": [{"paragraphs": [{}]}]}', r"squad\.json has not: KeyError 'qas'"),
        (
            json.dumps(SQUAD).replace('"What is 3.1?"', "null"),
            r"squad\.json has not: TypeError a text must not be empty, got None",
        ),
        (json.dumps(SQUAD).replace('"a3.1"', '" "'), "a text must not be empty, got ' '"),
        (json.dumps(SQUAD).replace('"a3.1"', '"\\ud800"'), "surrogates not allowed"),
    ],
)
def test_a_file_of_other_questions_is_refused(
    files: dict[str, str], content: str, message: str
) -> None:
    Path(files["squad"]).write_text(content)
    with pytest.raises(ValueError, match=message):
        Ruler(squad=files["squad"])


def test_each_seed_asks_in_an_order_of_its_own(files: dict[str, str]) -> None:
    found = read_squad(files["squad"])
    asked = {
        seed: [
            draw(QuestionAnswering(questions=found, seed=seed), 3, index=index).question
            for index in range(24)
        ]
        for seed in range(3)
    }
    in_order = [f"\nQuestion: {one.query}" for one in found.questions]
    assert asked[0] == in_order
    assert len({tuple(questions) for questions in asked.values()}) == 3
    assert all(sorted(questions) == sorted(in_order) for questions in asked.values())


def test_more_samples_than_questions_are_refused(files: dict[str, str]) -> None:
    message = r"num_samples must be at most the 6 questions of task\.hotpotqa, got 7"
    with pytest.raises(ValueError, match=message):
        Ruler(hotpotqa=files["hotpotqa"], num_samples=7)


def test_sub_tasks_without_questions_are_skipped_and_the_mean_is_of_the_others(
    loaded: LoadedModel, tmp_path: Path, files: dict[str, str]
) -> None:
    knobs: dict[str, Any] = {
        "length": 900,
        "num_samples": 1,
        "timed_prompts": 0,
        "judged_prompts": 0,
        "cache_dir": str(tmp_path),
    }
    task = Ruler(subtasks=["niah_single_1", "qa_1", "qa_2"], hotpotqa=files["hotpotqa"], **knobs)
    full = FullAttention()
    context = Context(loaded, PrefillStore(loaded.model), full, Policy(k=16), full)
    rows = {row.subtask: row for row in run_cell(context, task).rows}
    assert list(rows) == ["qa_1", "niah_single_1", "qa_2", "mean"]
    assert rows["qa_1"].status == "skipped"
    assert rows["qa_1"].reason == (
        "qa_1 needs the questions of SQuAD 2.0: set task.squad to their file or to hub:OWNER/NAME."
    )
    assert [rows[name].status for name in ("niah_single_1", "qa_2", "mean")] == ["ok"] * 3
    assert rows["mean"].values["num_samples"] == 2
    # Without times the cell's own backend stands, in sub-tasks as in the mean.
    assert all("full_backend" not in row.values for row in rows.values())
    with pytest.raises(TaskDoesNotFit, match=r"^qa_1 needs the questions of SQuAD 2\.0: set task"):
        Ruler(subtasks=["qa_1"], **knobs)


# Essays and the hub -------------------------------------------------------------------------------


def test_an_essay_is_pythons_prose_or_the_users(tmp_path: Path) -> None:
    default = read_essay(None)
    assert len(default.words) > 5000
    assert not re.search(r"\s\s|\n", default.text)
    assert ">>>" not in default.text
    mine, json_file = tmp_path / "mine.txt", tmp_path / "PaulGrahamEssays.json"
    mine.write_text("One  sentence.\n\nAnother\tone.\n")
    json_file.write_text(json.dumps({"text": "One sentence. Another one."}))
    assert read_essay(str(mine)).text == read_essay(str(json_file)).text
    assert read_essay(str(mine)).text == "One sentence. Another one."
    labels = {read_essay(one).label for one in (None, str(mine), str(json_file))}
    assert len(labels) == 3
    assert any(re.fullmatch(r"mine\.txt [0-9a-f]{8}", one) for one in labels)
    mine.write_bytes(b"\xef\xbb\xbfOne sentence.\r\nAnother one.")
    assert read_essay(str(mine)).text == "One sentence. Another one."
    for content in ({"text": None}, {"text": ["a", "b"]}, {"other": "a"}):
        json_file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"task\.haystack must have the fields"):
            read_essay(str(json_file))
    mine.write_text(" \n")
    with pytest.raises(ValueError, match=r"task\.haystack must hold a text, found no word in"):
        Ruler(haystack=str(mine))
    with pytest.raises(ValueError, match=r"task\.haystack must be a file .* or hub:OWNER/NAME"):
        Ruler(haystack=str(tmp_path / "none.txt"))


def test_an_essay_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "essays").mkdir(parents=True)
    table = pd.DataFrame({"text": ["One sentence.", "Another  one."]})
    table.to_parquet(tmp_path / "owner" / "essays" / "train-00000.parquet")
    monkeypatch.chdir(tmp_path)
    assert read_essay("hub:owner/essays").text == "One sentence. Another one."


def test_a_data_set_is_named_with_configuration_and_revision() -> None:
    assert parse_hub("s", "hub:simonjegou/ruler/4096@0f1e2d") == HubDataset(
        "simonjegou/ruler", "4096", "0f1e2d"
    )
    assert parse_hub("s", "hub:rajpurkar/squad_v2") == HubDataset("rajpurkar/squad_v2")
    assert str(HubDataset("a/b", "c", "d")) == "a/b/c@d"
    for wrong in ("hub:ruler", "hub:", "hub:a/b/c/d", "hub:a/b c", "hub:../../etc", "hub:a/."):
        with pytest.raises(ValueError, match=r"^task\.x must name a data set as hub:OWNER/NAME"):
            parse_hub("task.x", wrong)


def test_prompts_of_the_hub_reach_the_model_as_those_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {"context": "A long text.", "question": "What is it?\n", "answer_prefix": "It is"}
    lines = [
        {**columns, "answer": [f"a{n}", "text"], "task": task, "max_new_tokens": 9}
        for n, task in enumerate(["vt", "vt", "niah_single_1"])
    ]
    folder = tmp_path / "owner" / "ruler"
    (folder / "4096").mkdir(parents=True)
    (folder / "8192").mkdir()
    head = "---\nconfigs:\n" + "".join(
        f"- config_name: '{n}'\n  data_files:\n  - split: test\n    path: {n}/test.parquet\n"
        for n in (4096, 8192)
    )
    (folder / "README.md").write_text(f"{head}---\n")
    pd.DataFrame(lines).to_parquet(folder / "4096" / "test.parquet")
    pd.DataFrame(lines[:1]).to_parquet(folder / "8192" / "test.parquet")
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    task = Ruler(source="hub:owner/ruler/4096", num_samples=1)
    read = Ruler(source=str(file), num_samples=1)
    assert task._official is not None
    assert read._official is not None
    assert task._official.counts == {"vt": 2, "niah_single_1": 1}
    assert [one.sample_id for one in task._official.samples] == [
        "owner/ruler/4096:1",
        "owner/ruler/4096:3",
    ]
    of_hub, of_file = task._official.samples, read._official.samples
    assert [one.answers for one in of_hub] == [("a0", "text"), ("a2", "text")]
    assert [(one.context, one.question, one.max_new_tokens) for one in of_hub] == [
        (one.context, one.question, one.max_new_tokens) for one in of_file
    ]
    assert re.fullmatch(r"owner/ruler/4096 [0-9a-f]{8}", task._official.label)
    with pytest.raises(ValueError, match=r"task\.source must name a data set .* got owner/ruler:"):
        Ruler(source="hub:owner/ruler")  # it has two configurations


def test_splits_named_after_sub_tasks_are_read_as_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "owner" / "splits"
    folder.mkdir(parents=True)
    head = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    for name in ("vt", "cwe"):
        line = {"input": f"Text of {name}.\nWhat is it?", "outputs": [name], "max_new_tokens": 3}
        rows = pd.DataFrame([line, {**line, "max_new_tokens": None}])  # a column of floats
        rows.to_parquet(folder / f"{name}.parquet")
        head += f"  - split: {name}\n    path: {name}.parquet\n"
    (folder / "README.md").write_text(f"{head}---\n")
    monkeypatch.chdir(tmp_path)
    official = Ruler(source="hub:owner/splits", num_samples=2)._official
    assert official is not None
    assert official.counts == {"vt": 2, "cwe": 2}
    found = [(one.subtask, one.answers, one.max_new_tokens) for one in official.samples]
    assert found == [
        *(("vt", ("vt",), 3), ("vt", ("vt",), 30)),
        *(("cwe", ("cwe",), 3), ("cwe", ("cwe",), 120)),
    ]


def test_what_the_hub_cannot_give_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"^task\.haystack must name a data set of the hub") as no:
        read_essay("hub:nobody/no-such-data-set")
    assert "\n" not in str(no.value)
    (tmp_path / "owner" / "two").mkdir(parents=True)
    for split in ("one", "two"):
        table = pd.DataFrame({"text": ["words"]})
        table.to_json(tmp_path / "owner" / "two" / f"{split}.jsonl", orient="records", lines=True)
    head = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    head += "".join(f"  - split: {name}\n    path: {name}.jsonl\n" for name in ("one", "two"))
    (tmp_path / "owner" / "two" / "README.md").write_text(f"{head}---\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"with the split train, .* but owner/two has one, two"):
        read_essay("hub:owner/two")
    monkeypatch.setitem(sys.modules, "datasets", None)
    hub_rows.cache_clear()
    with pytest.raises(ValueError, match=r"needs the package datasets, .*topkbench\[datasets\]"):
        read_essay("hub:owner/two")


def test_the_words_of_keys_are_wonderwords() -> None:
    assert (len(listed_words("adjective")), len(listed_words("noun"))) == (910, 6782)
    adjectives, nouns = set(listed_words("adjective")), set(listed_words("noun"))
    prompt = draw(Niah(haystack="needles"), 50)
    for _, key, _ in NEEDLE.findall(prompt.context):
        cuts = [place for place, sign in enumerate(key) if sign == "-"]
        assert any(key[:cut] in adjectives and key[cut + 1 :] in nouns for cut in cuts)
