"""Answers side by side: what is shown of them, on the terminal and in a page."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import pytest

from topkbench.analysis.comparison.configurations import compare
from topkbench.analysis.record.store import Row, Sweep
from topkbench.analysis.report import samples_page
from topkbench.analysis.report.build import load
from topkbench.analysis.report.samples import (
    MOST_CHARACTERS,
    Prompt,
    beginning_of,
    chosen,
    differences,
    load_kept,
    prompts,
)
from topkbench.analysis.report.samples_command import in_colour, main, text_of
from topkbench.tests.analysis.hostile import END, ESCAPES, LONG, RIGHT_TO_LEFT, TEXTS, sweep_of
from topkbench.tests.browser import MISSING, Browser, Page

ANSWERS = {
    "full": [(100.0, "it is right."), (100.0, "yes"), (0.0, "no")],
    "exact": [(100.0, "it is right."), (50.0, "yes?"), (0.0, "no")],
    "quest": [(0.0, "it was so wrong."), (100.0, "yes"), (100.0, "right")],
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return sweep_of(tmp_path_factory.mktemp("answers"), ANSWERS)


def of(sweep: Sweep) -> list[Prompt]:
    return prompts(compare(sweep.rows()), sweep.samples())


# What is shown -----------------------------------------------------------------------------------


def test_a_prompt_has_all_answers_and_what_differs_in_each(sweep: Sweep) -> None:
    first, second, third = of(sweep)
    assert (first.seed, first.subtask, first.sample_id) == (0, "vt", "vt-0")
    assert (first.question, first.references) == ("Which?", ("right", "Which?"))
    assert first.full is not None
    assert (first.full.name, first.full.score, first.full.text) == (
        *("Full attention", 100.0, "it is right."),
    )
    exact, quest = first.answers
    assert (exact.name, exact.method, quest.name) == ("Exact top-k, k=64", "exact", "Quest, k=64")
    assert exact.parts == (("same", "it is right."),)
    assert quest.parts == (
        ("same", "it "),
        *(("missing", "is right"), ("other", "was so wrong")),
        ("same", "."),
    )
    assert [first.is_lost(one) for one in first.answers] == [False, True]
    assert [second.is_lost(one) for one in second.answers] == [True, False]
    assert not any(map(third.is_lost, third.answers))
    assert (first.setting.split(", ")[:2], third.differs) == (["tiny", "ruler"], True)


@pytest.mark.parametrize(
    ("full", "text", "parts"),
    [
        ("", "", ()),
        ("", "a", (("other", "a"),)),
        ("a b c", "a b c", (("same", "a b c"),)),
        ("a b c", "a c", (("same", "a "), ("missing", "b "), ("same", "c"))),
        ("x y", "p q", (("missing", "x y"), ("other", "p q"))),
        (" one.", "one.", (("missing", " "), ("same", "one."))),
    ],
)
def test_words_that_differ_are_marked_with_the_blanks_between_them(
    full: str, text: str, parts: tuple[tuple[str, str], ...]
) -> None:
    assert differences(full, text) == parts


def test_either_answer_can_be_put_together_from_the_parts() -> None:
    full, text = "the cat sat, on  the mat", "a cat\nsat on the hat the mat!"
    parts = differences(full, text)
    assert "".join(piece for kind, piece in parts if kind != "other") == full
    assert "".join(piece for kind, piece in parts if kind != "missing") == text


@pytest.mark.parametrize(
    ("full", "text", "same"),
    [
        ("! " * 2000, "!" * 3990, 0),
        ("0 1 " * 250, "1, 0, " * 166, 0),
        ("! " * 2000, "! " * 1999 + "?", 3998),
        ("a " * 1000, "b" + "a " * 990, 1978),
    ],
)
def test_texts_of_repeated_words_are_compared_in_a_second(full: str, text: str, same: int) -> None:
    begin = time.process_time()
    parts = differences(full, text)
    assert time.process_time() - begin < 2  # to find all matches takes 20 s or minutes
    assert "".join(piece for kind, piece in parts if kind != "other") == full
    assert "".join(piece for kind, piece in parts if kind != "missing") == text
    assert sum(len(piece) for kind, piece in parts if kind == "same") >= same


def test_prompts_are_chosen_by_method_sub_task_id_and_loss(sweep: Sweep) -> None:
    every = of(sweep)

    def names(**given: Any) -> list[tuple[str, list[str]]]:
        found = chosen(every, **given)
        return [(one.sample_id, [answer.method for answer in one.answers]) for one in found]

    assert names(only="lost") == [("vt-0", ["quest"]), ("vt-1", ["exact"])]
    assert names(only="lost", method="exact") == [("vt-1", ["exact"])]
    assert names(sample_id="vt-2", method="quest") == [("vt-2", ["quest"])]
    assert names(subtask="cwe") == []


def test_results_without_full_attention_or_without_texts_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = sweep_of(tmp_path, {"quest": [(0.0, "")]})
    (alone,) = of(sweep)
    assert alone.full is None
    assert not alone.is_lost(alone.answers[0])
    assert "full attention: not among these results" in text_of(alone)
    assert "Quest, k=64: 0  (empty)" in text_of(alone)
    older = sweep.samples().drop(columns="question_text")
    (asked,) = prompts(compare(sweep.rows()), older)
    assert "question: not recorded" in text_of(asked)
    samples = sweep.samples().drop(columns="prediction")
    assert prompts(compare(sweep.rows()), samples) == []
    assert samples_page.page(compare(sweep.rows()), samples, pd.DataFrame()) is None
    sweep.rows().to_parquet(tmp_path / "rows.parquet")
    assert main([str(tmp_path / "rows.parquet")]) == 2
    assert "must hold answers in words, but holds none." in capsys.readouterr().err


def test_a_wrong_answer_is_one_below_100_where_full_attention_has_100(tmp_path: Path) -> None:
    sweep = sweep_of(
        tmp_path,
        {
            "full": [(100.0, "all four"), (75.0, "three"), (0.0, "none"), (100.0, "all")],
            "quest": [(75.0, "three"), (50.0, "two"), (100.0, "all"), (100.0, "all")],
        },
    )
    found = [one.sample_id for one in chosen(of(sweep), only="wrong")]
    assert found == ["vt-0"]
    assert [one.sample_id for one in chosen(of(sweep), only="lost")] == ["vt-0", "vt-1"]


def test_scores_have_a_decimal_where_they_are_not_whole(tmp_path: Path) -> None:
    answers = {"full": [(100.0, "a"), (0.04, "b")], "quest": [(99.6, "c"), (100 / 3, "d")]}
    first, second = map(text_of, of(sweep_of(tmp_path, answers)))
    assert "Full attention: 100  a" in first
    assert "Quest, k=64: 99.6  lost  " in first
    assert "Full attention: 0  b" in second
    assert "Quest, k=64: 33.3  " in second


# The command -------------------------------------------------------------------------------------


def test_the_command_shows_what_is_lost(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep.folder), "--only", "lost", "--limit", "1"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("vt / vt-0, seed 0   (tiny, ruler, 4,096 tokens")
    assert lines == [
        "  question: Which?",
        "  references: right | Which?",
        "  Full attention: 100  it is right.",
        "  Quest, k=64: 0  lost  it [-is right-]{+was so wrong+}.",
        "",
        "1 of 2 prompts with an answer that scores lower than full attention's; --limit=N shows"
        " more.",
    ]


def test_the_command_says_that_a_sweep_has_not_finished(
    sweep: Sweep, row: Callable[..., Row], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(sweep.folder)]) == 0
    assert "incomplete" not in capsys.readouterr().out
    begun = sweep.store.cell("f" * 16)
    begun.begin(row(run_id="f" * 16, method="loki", k=64))
    sweep.append("f" * 16)
    assert main([str(sweep.folder)]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last == "These results are incomplete: 1 of 4 cells have not finished."


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--limit", "0"], "--limit must be at least 1, got 0."),
        (["--method", "hata"], "--method must be one of exact, quest, got 'hata'."),
        (["--subtask", "cwe"], "--subtask must be one of vt, got 'cwe'."),
        (["--id", "vt-9"], "--id must be one of vt-0, vt-1, vt-2, got 'vt-9'."),
    ],
)
def test_a_wrong_option_is_one_sentence(
    sweep: Sweep,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    assert main([str(sweep.folder), *arguments]) == 2
    assert capsys.readouterr() == ("", f"error: {sentence}\n")


def test_what_differs_has_colours_on_a_terminal_alone(
    sweep: Sweep,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main([str(sweep.folder), "--id", "vt-0", "--method", "quest"]) == 0
    assert "\x1b[32;1mwas so wrong\x1b[0m" in capsys.readouterr().out


def test_hostile_texts_stay_texts_on_a_terminal(tmp_path: Path) -> None:
    answers = {
        "full": [(100.0, "right") for _ in TEXTS],
        "quest": [(0.0, text) for text in TEXTS],
    }
    label = f"Quest{ESCAPES}"
    hostile = sweep_of(tmp_path, answers, ESCAPES, method_label=label, model=RIGHT_TO_LEFT)
    for prompt in of(hostile):
        text = text_of(prompt)
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200f]", text)
        coloured = text_of(prompt, in_colour).replace("\x1b[31;9m", "").replace("\x1b[32;1m", "")
        assert "\x1b" not in coloured.replace("\x1b[0m", "")
        assert "question: \\x1b[2J\\x1b]0;title\\x07\\x9b31m red \\x00\\x08" in text
        # A text of several lines cannot look like another field.
        assert all(line.startswith("  ") for line in text.splitlines()[1:])


def test_a_name_with_a_line_break_cannot_look_like_a_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forged = "x\n  Full attention: 100  forged"
    sweep = sweep_of(
        tmp_path,
        {"full": [(0.0, "no")], "own": [(0.0, "yes")]},
        subtasks=(f"task{forged}",),
        sample_id=f"id{forged}",
        method_label=f"Own{forged}",
        model=f"model{forged}",
    )
    escaped = r"x\n  Full attention: 100  forged"
    # The escaped name chooses the prompt, and its kept tokens are found.
    assert main([str(sweep.folder), "--id", f"id{escaped}-0"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith(f"task{escaped} / id{escaped}-0, seed 0   (model{escaped}, ")
    assert lines == [
        "  question: Which?",
        "  references: right | Which?",
        "  Full attention: 0  no",
        f"  Own{escaped}, k=64: 0  [-no-]{{+yes+}}",
        "",
        "1 of 1 prompts.",
    ]
    page = samples_page.page(compare(sweep.rows()), sweep.samples(), load_kept(sweep.folder))
    assert page is not None
    assert "texts" in page["data"]["prompts"][0]["kept"]


def test_a_long_text_says_how_much_of_it_is_left_out() -> None:
    assert beginning_of(LONG) == f"{LONG[:MOST_CHARACTERS]} […96,000 more characters]"


def test_answers_that_differ_in_what_is_not_shown_are_not_the_same(tmp_path: Path) -> None:
    begin = "a" * MOST_CHARACTERS
    answers = {
        "full": [(100.0, f"{begin}b"), (100.0, "\x1b"), (100.0, f"{begin}b")],
        "quest": [(0.0, f"{begin}c"), (0.0, r"\x1b"), (100.0, f"{begin}b")],
    }
    sweep = sweep_of(tmp_path, answers)
    late, control, same = of(sweep)
    shown = f"{begin} […1 more characters]"
    note = " [differs after 4,000 characters]"
    assert late.answers[0].parts == (("same", shown), ("other", note))
    assert f"Quest, k=64: 0  lost  {shown}{{+{note}+}}" in text_of(late)
    assert control.answers[0].parts[-1] == ("other", " [differs in control characters]")
    assert [one.differs for one in (late, control, same)] == [True, True, False]
    assert "Quest, k=64: 100  the same" in text_of(same)
    found = samples_page.page(compare(sweep.rows()), sweep.samples(), pd.DataFrame())
    assert found is not None
    parts = [one["answers"][0]["parts"] for one in found["data"]["prompts"]]
    assert (parts[0], parts[2]) == ([("same", shown), ("other", note)], None)


# The page ----------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Counts the elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.append(tag)


def write_page(folder: Path, sweep: Sweep, num_kept: int | None = None) -> Path:
    rows, samples = load(sweep.folder)
    kept = load_kept(sweep.folder)[:num_kept]
    found = samples_page.page(compare(rows), samples, kept)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(samples_page.__file__).parent), autoescape=True
    )
    head = (
        "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<style>:root { color-scheme: light dark }</style>"
    )
    text = environment.from_string(head + '{% include "samples.html" %}').render(samples=found)
    path = folder / "page.html"
    path.write_text(text, encoding="utf-8")
    return path


def test_hostile_texts_make_no_element(tmp_path: Path, sweep: Sweep) -> None:
    plain = write_page(tmp_path, sweep)
    expected = Tags(plain.read_text()).found
    answers = {"full": [(100.0, END) for _ in TEXTS], "quest": [(0.0, text) for text in TEXTS]}
    given = {"method_label": END, "model": END, "name": "second"}
    hostile = write_page(tmp_path, sweep_of(tmp_path, answers, END, **given))
    text = hostile.read_text()
    assert Tags(text).found == expected
    assert text.count("</script>") == 2
    assert not set("\u2028\u202e\x1b\x00") & set(text)


def test_a_page_has_at_most_so_many_bytes_and_says_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {
        "full": [(100.0, "yes")] * 120,
        "quest": [(0.0, "no") if place % 2 else (100.0, "yes") for place in range(120)],
    }
    many = sweep_of(tmp_path, answers, subtasks=("vt", "cwe", "fwe"))
    compared, samples = compare(many.rows()), many.samples()
    whole = samples_page.page(compared, samples, pd.DataFrame())
    assert whole is not None
    assert (len(whole["data"]["prompts"]), whole["words"]) == (120, [])
    monkeypatch.setattr(samples_page, "MOST_BYTES", 10_000)
    found = samples_page.page(compared, samples, pd.DataFrame())
    assert found is not None
    shown = found["data"]["prompts"]
    assert len(json.dumps(shown)) <= 10_000
    (sentence,) = found["words"]
    assert sentence.startswith(f"{len(shown)} of 120 prompts are in this page, those on which")
    assert "`topkbench samples RESULTS` shows all." in sentence
    # As many of each sub-task, as far as they go, and those that a method lost first; a smaller one
    # takes the room in which none of these fits.
    counts = pd.Series([one["subtask"] for one in shown]).value_counts()
    assert (len(counts), counts.max() - counts.min() <= 1) == (3, True)
    assert [one["answers"][0]["score"] for one in shown].count(100.0) <= 1


def test_a_prompt_that_does_not_fit_leaves_room_for_smaller_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "long " * 600
    answers = {
        "full": [(100.0, "yes")] * 6,
        "quest": [(0.0, long), (0.0, "no"), (0.0, "no"), (0.0, "no"), (0.0, long), (0.0, "no")],
    }
    sweep = sweep_of(tmp_path, answers, subtasks=("vt", "cwe"))
    monkeypatch.setattr(samples_page, "MOST_BYTES", 3_000)
    found = samples_page.page(compare(sweep.rows()), sweep.samples(), pd.DataFrame())
    assert found is not None
    assert [one["id"] for one in found["data"]["prompts"]] == ["vt-1", "vt-2", "vt-3", "vt-5"]
    assert found["words"][0].startswith("4 of 6 prompts are in this page")


def test_kept_tokens_that_do_not_fit_are_counted(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_page, "MOST_KEPT_BYTES", 100)
    kept = load_kept(sweep.folder)
    found = samples_page.page(compare(sweep.rows()), sweep.samples(), kept)
    assert found is not None
    assert found["data"]["prompts"][0]["kept"] == {"leftOut": True}
    assert found["words"][0].startswith("Which tokens the heads kept is left out for 1 prompt, as")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if MISSING:
        pytest.skip(MISSING)
    with Browser() as started:
        yield started


def ids(page: Page) -> list[str]:
    found: list[str] = page.run(
        "[...document.querySelectorAll('#samples .id')].map(e => e.innerText)"
    )
    return found


def test_the_page_filters_opens_and_compares(
    tmp_path: Path, sweep: Sweep, browser: Browser
) -> None:
    page = browser.open(write_page(tmp_path, sweep))
    assert ids(page) == ["vt-0", "vt-1", "vt-2"]
    pick = "(e => {{ e.value = '{}'; e.dispatchEvent(new Event('change')) }})"
    of_only = "(document.querySelector('#samples-only'))"
    page.run(pick.format("lost") + of_only)
    assert ids(page) == ["vt-0", "vt-1"]
    page.run("document.querySelectorAll('#samples summary')[0].click()")
    page.wait_for("document.querySelector('#samples .body')")
    heads = "[...document.querySelectorAll('#samples h4')].map(e => e.innerText)"
    assert page.run(heads) == ["Full attention: 100", "Quest, k=64: 0lost"]  # Exact top-k kept it
    page.run(pick.format("wrong") + of_only)
    assert ids(page) == ["vt-0", "vt-1"]
    change = "e.dispatchEvent(new Event('change'))"
    page.run(f"(e => {{ e.value = 'm:quest'; {change} }})(document.querySelectorAll('select')[2])")
    assert ids(page) == ["vt-0"]
    page.run(pick.format("") + of_only)
    search = "(e => {{ e.value = '{}'; e.dispatchEvent(new Event('input')) }})"
    of_search = "(document.querySelector('#samples input[type=search]'))"
    page.run(search.format("RIGHT") + of_search)
    assert page.run("document.querySelector('[role=status]').innerText") == "3 of 3 prompts"
    page.run(search.format("was so") + of_search)
    assert ids(page) == ["vt-0"]
    # By keyboard alone.
    page.run("document.querySelector('#samples summary').focus()")
    page.press("Enter")
    page.wait_for("document.querySelector('#samples .body')")
    cards = "[...document.querySelectorAll('#samples .card')].map(e => e.innerText)"
    assert page.run(cards) == [
        "Full attention: 100\nit is right.",
        "Quest, k=64: 0lost\nit is rightwas so wrong.",
    ]
    assert page.run("document.querySelector('#samples .body del').innerText") == "is right"
    assert page.errors == []


def test_the_page_shades_the_tokens_that_heads_kept(
    tmp_path: Path, sweep: Sweep, browser: Browser
) -> None:
    page = browser.open(write_page(tmp_path, sweep), width=390)
    page.run("document.querySelectorAll('#samples summary').forEach(e => e.click())")
    page.wait_for("document.querySelectorAll('#samples .body').length === 3")
    said = "[...document.querySelectorAll('p.kept')].map(e => e.innerText)"
    assert (
        page.run(said)
        == ["Which tokens each head kept was not recorded for this prompt (task.kept_prompts)."] * 2
    )
    page.run("document.querySelector('details.kept summary').click()")
    page.wait_for("document.querySelectorAll('.tokens').length === 2")
    shares = (
        "[...document.querySelectorAll('.tokens')[0].childNodes].map(e =>"
        " [e.textContent, e.style?.getPropertyValue('--share')])"
    )
    marks = "\\u202egpj.exe\\u2066\\u200f\\u061c"
    # Four heads kept a token each, and all of them the last.
    assert page.run(shares) == [
        [f"<b> one two{marks}", "0.25"],
        [END, None],
        [" six", "1"],
    ]
    assert "Not recorded" not in page.run("document.querySelector('details.kept').innerText")
    layer = "document.querySelector('details.kept select')"
    page.run(f"{layer}.value = '3'; {layer}.dispatchEvent(new Event('change'))")
    page.wait_for("document.querySelector('.tokens').childNodes.length === 4")
    assert page.run(shares)[1] == [f" two{marks}", "0.5"]
    assert page.run("document.documentElement.scrollWidth") == 390
    assert page.errors == []


def test_an_empty_answer_is_called_empty_without_full_attention(
    tmp_path: Path, browser: Browser
) -> None:
    page = browser.open(write_page(tmp_path, sweep_of(tmp_path, {"quest": [(0.0, "")]})))
    page.run("document.querySelector('#samples summary').click()")
    page.wait_for("document.querySelector('#samples .body')")
    cards = "[...document.querySelectorAll('#samples .card')].map(e => e.innerText)"
    assert page.run(cards)[1] == "Quest, k=64: 0\n(empty)"


def test_the_page_names_whose_tokens_were_not_recorded(
    tmp_path: Path, sweep: Sweep, browser: Browser
) -> None:
    page = browser.open(write_page(tmp_path, sweep, num_kept=1))
    page.run("document.querySelector('#samples summary').click()")
    page.wait_for("document.querySelector('details.kept summary')")
    page.run("document.querySelector('details.kept summary').click()")
    page.wait_for("document.querySelectorAll('.tokens').length === 1")
    text = page.run("document.querySelector('details.kept').innerText")
    assert "Not recorded at this step: Quest, k=64." in text


@pytest.mark.parametrize("dark", [False, True])
def test_hostile_texts_are_shown_as_texts(
    tmp_path: Path, sweep: Sweep, browser: Browser, dark: bool
) -> None:
    answers = {"full": [(100.0, "right") for _ in TEXTS], "quest": [(0.0, text) for text in TEXTS]}
    hostile = sweep_of(tmp_path, answers, TEXTS[0], method_label=END, model=END)
    page = browser.open(write_page(tmp_path, hostile), dark=dark)
    page.run("document.querySelectorAll('#samples summary').forEach(e => e.click())")
    page.wait_for(f"document.querySelectorAll('#samples .body').length === {len(TEXTS)}")
    assert page.run("window.harmed") is None
    assert page.run("document.querySelectorAll('#samples img, #samples-view script').length") == 0
    assert page.run("document.querySelector('#samples dd .text').innerText") == TEXTS[0]
    assert "96,000 more characters" in page.run("document.body.innerText")
    background = page.run("getComputedStyle(document.documentElement).colorScheme")
    assert (background, page.errors) == ("light dark", [])
