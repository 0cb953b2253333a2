"""Hostile texts in names and results stay texts in a report's tables, and on the terminal."""

from __future__ import annotations

import csv
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from topkbench.analysis.console import say, say_error
from topkbench.analysis.record.csv_file import as_written, csv_bytes
from topkbench.analysis.record.rows_file import read_rows
from topkbench.analysis.record.store import Row, frame
from topkbench.analysis.report.build import build
from topkbench.analysis.tables.table import Table, in_markdown
from topkbench.tests.analysis.hostile import (
    END,
    ESCAPES,
    FORMULA,
    MARKDOWN,
    RIGHT_TO_LEFT,
    SCRIPT,
    TEXTS,
    sweep_of,
)

TERMINAL = "\\x1b[2J\\x1b]0;title\\x07\\x9b31m red \\x00\\x08"
"""``ESCAPES`` as it is shown."""


def test_what_is_printed_does_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"model {ESCAPES}\nnext − line")
    say_error(RIGHT_TO_LEFT)
    out, err = capsys.readouterr()
    assert out == f"model {TERMINAL}\nnext − line\n"
    assert err == "error: \\u202egpj.exe\\u2066\\u200f\\u061c\n"


@pytest.mark.parametrize(
    "text", [*TEXTS, "+1", "-1", "@a", "\tx", "'=1", "''+1", "'quoted'", "plain", "x=1"]
)
def test_a_text_is_no_formula_in_a_csv_and_is_read_back_unchanged(text: str) -> None:
    data = pd.DataFrame({"name": [text, None], "number": [-1.5, 2.0]})
    (_, head), (field, number), _ = (
        list(csv.reader(csv_bytes(data).decode().splitlines(True)))
        if ("\r" not in text)
        else ([], [], [])
    )
    assert (head, number) == ("number", "-1.5")
    assert not field.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    assert as_written(pd.DataFrame({"name": [field]}))["name"].tolist() == [text]


def test_rows_with_hostile_texts_are_the_same_after_a_csv(
    tmp_path: Path, row: Callable[..., Row]
) -> None:
    rows = frame(
        [
            row(run_id="a" * 16, method_label=FORMULA, model="'=1", parameters={"note": "-1"}),
            row(run_id="b" * 16, method_label=MARKDOWN, model=SCRIPT, parameters={"note": "'"}),
        ]
    )
    path = tmp_path / "rows.csv"
    path.write_bytes(csv_bytes(rows))
    assert f",'{FORMULA}" in path.read_text()
    pd.testing.assert_frame_equal(read_rows(path), rows)


def test_markdown_shows_a_text_as_it_is() -> None:
    assert in_markdown("HATA (use_norm=True) −0.7 [−2.4, +1.2]") == (
        "HATA (use_norm=True) −0.7 [−2.4, +1.2]"
    )
    assert in_markdown(MARKDOWN) == (
        r"a\|b # head \`\`\` [x\](javascript:1) ![y\](http://z) \*\*b\*\* &lt;b>&amp;lt;\\u2028"
    )
    assert in_markdown("_a_ __b") == r"\_a\_ \_\_b"
    assert in_markdown(SCRIPT).startswith("&lt;script>")
    table = Table([MARKDOWN, "b"], [[MARKDOWN, FORMULA]], strong={(0, 1)}, notes=[SCRIPT])
    lines = table.markdown().splitlines()
    assert len(lines) == 5
    assert all(line.count("|") - line.count("\\|") == 3 for line in lines[:3])
    assert "<" not in table.markdown()


class Elements(HTMLParser):
    """Collects the elements of a page and its title."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.append(tag)


def test_a_report_of_hostile_names_is_one_of_texts(tmp_path: Path) -> None:
    answers = {"full": [(100.0, "yes")], "quest": [(0.0, "no")]}
    plain = sweep_of(tmp_path, answers, method_label="Mine")
    name = f"<b>{RIGHT_TO_LEFT[:1]}`x` ## {ESCAPES.strip(chr(0) + chr(8))[:4]}"
    hostile = sweep_of(*(tmp_path, answers, END, name), **{"method_label": MARKDOWN, "model": END})
    hostile.note_command(f"python run.py model.name={SCRIPT} {MARKDOWN.splitlines()[0]}")
    pages = [build(one.folder) for one in (plain, hostile)]
    counts = [Elements(one.read_text(encoding="utf-8")).found for one in pages]
    added = counts[1].copy()
    for tag in counts[0]:
        added.remove(tag)
    assert added == ["li"]  # of the command
    text = pages[1].with_name("report.md").read_text(encoding="utf-8")
    assert "<" not in text
    assert not set("\u202e\x1b\x07\u2028") & set(text)
    assert text.startswith("# topkbench: default/&lt;b>\\\\u202e\\`x\\` ## \\\\x1b[2J\n")
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert "# head" not in heads
    assert "```" not in text.replace("\\`", "")
