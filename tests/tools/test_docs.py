"""README's list of methods and the pages that tools write match the code and the measured rows."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Literal

import pandas as pd
import pytest

from topkbench.analysis.record.row import DECLARED

ROOT = Path(__file__).parents[2]


LEAGUE = ROOT / "analysis" / "measured" / "epyc_2_threads" / "league.csv"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return script("make_methods")


@pytest.fixture(scope="module")
def pages(maker: ModuleType) -> dict[str, str]:
    return dict(maker.pages())


def test_the_league_on_smollm2_is_what_its_script_makes_from_the_rows() -> None:
    """Page and README's table are up to date; a mean is that of the four parts' scores."""
    league = script("make_real_league")
    page = (ROOT / "docs" / "real_league.md").read_text(encoding="utf-8")
    assert league.page() == page, "run python tools/make_real_league.py"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert league.readme(readme) == readme, "run python tools/make_real_league.py"
    scores = []
    for name in league.SUBTASKS:
        rows = pd.read_csv(league.FOLDER / f"{name}.csv")
        own = rows[rows["method"].eq("quest") & rows["k"].eq(256) & rows["subtask"].eq(name)]
        scores.append(own["score"].item())
    (line,) = [one for one in page.splitlines() if one.startswith("| Quest ")][:1]
    assert f"| {sum(scores) / 4:.1f} [" in re.sub(" +", " ", line)


def test_the_league_is_what_its_script_makes_from_the_rows() -> None:
    """The page is up to date, and a score read from the rows is in its first table and a later."""
    league = script("make_league")
    page = (ROOT / "docs" / "league.md").read_text(encoding="utf-8")
    assert league.page(LEAGUE) == page, "run python tools/make_league.py"
    rows = pd.read_csv(LEAGUE)
    hata = rows[(rows["method"] == "hata") & (rows["k"] == 64) & (rows["protocol"] == "unified")]
    (row,) = hata[(hata["question"] == "sparse") & (hata["subtask"] == "mean")].to_dict("records")
    score = f"{row['score']:.1f} [{row['score_ci_low']:.1f}, {row['score_ci_high']:.1f}]"
    first, *others = page.split("\n## ")[1:]
    assert first.startswith("Every method at a glance")
    assert score in first
    assert score in others[0]


def test_the_pages_of_methods_are_what_their_script_makes(pages: dict[str, str]) -> None:
    folder = ROOT / "docs" / "methods"
    committed = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    assert committed == pages, "run python tools/make_methods.py"
    drawn = {path.stem for path in folder.glob("*.svg")}
    assert drawn == {name for name, text in pages.items() if f"]({name}.svg)" in text}
    assert len(drawn) == 17  # all but full attention


def test_a_methods_page_shows_what_was_measured(pages: dict[str, str]) -> None:
    measured = pages["quest"].partition("## Measured")[2]
    assert "one thread of an AMD EPYC, commit 2c8cadd" in measured
    assert "| +0.9370 [+0.7474, +1.1265] | 0.8311 [0.7144, 0.9477] |        0.570 |" in measured
    assert "2 threads of an AMD EPYC, commit f244a86" in measured
    assert "|  64 | 30.1 [25.4, 37.5] |" in measured
    assert "commit e3cb3c3" in pages["infinigen"]
    assert "## Measured" not in pages["full"]


def test_readmes_list_of_methods_is_what_its_script_makes(maker: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert maker.readme(text) == text, "run python tools/make_methods.py"


def test_the_table_of_methods_is_what_its_script_makes(maker: ModuleType) -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert maker.page() == text, "run python tools/make_methods.py"
    (quest,) = [line for line in text.splitlines() if line.startswith("| [`quest`]")]
    assert quest == (
        "| [`quest`](methods/quest.md) | Keep the `k // page_size` pages, at least one, with the "
        "largest bounds on their logits | `page_size` | `2 d / page_size` values, the channel-wise "
        "minima and maxima of its page | [2406.10774](https://arxiv.org/abs/2406.10774) |"
    )


def test_the_table_has_the_settings_above_the_first_heading_and_their_choices(
    maker: ModuleType,
) -> None:
    class Example:
        base: object
        rank: int | None
        mode: Literal["fast", "exact"] | None
        steps: int

    text = (
        "# An example of a command\ndefaults:\n  - /method@base: quest  # another\n  - _self_\n\n"
        "_target_: a.B\nlabel: B\ncolour: '#000000'\n"
        "# Read to select, per token and KV head: nothing\n"
        "rank: null  # channels\nmode: fast  # fast | exact\n# Training\nsteps: 3  # of Adam\n"
    )
    assert maker.main_knobs(text, Example) == ["`base`", "`rank`", "`mode: fast, exact`"]


def test_a_table_goes_between_the_marks_of_its_subject() -> None:
    readme = script("readme")
    text = "a\n<!-- x: made by tools/y.py -->\nold\n<!-- end of x -->\nb\n"
    expected = "a\n<!-- x: made by tools/y.py -->\n\nnew\n\n<!-- end of x -->\nb\n"
    assert readme.with_table(text, "y.py", "x", "new") == expected
    with pytest.raises(ValueError, match="README must contain the marks"):
        readme.with_table("a\n", "y.py", "x", "new")


def test_every_method_has_a_page_with_its_source(pages: dict[str, str]) -> None:
    assert sorted(pages) == sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
    for name, text in pages.items():
        assert f"`method={name}`, [code](../../methods/{name}.py)" in text
    assert [name for name, text in pages.items() if "**Source.**" not in text] == ["full"]


def test_every_method_names_the_authors_code_that_it_was_compared_with(
    pages: dict[str, str],
) -> None:
    """The section names a file of a repository, or says that there is none to compare with."""
    for title, entry in pages.items():
        section = re.search(r"\*\*Compared with the authors' code\.\*\* (.*)", entry)
        assert section is not None, f"{title} must have a section Compared with the authors' code"
        names_a_file = re.search(r"`[\w./-]+`.*\([\w.-]+/[\w.-]+\)", section.group(1))
        assert names_a_file or section.group(1).startswith("None to compare with: "), title


def test_every_method_that_learns_has_its_calibration_on_its_page(pages: dict[str, str]) -> None:
    head = re.escape("**[Calibration](../methods.md#methods-that-learn).** ")
    sections = {name: re.search(f"{head}(.*)", text) for name, text in pages.items()}
    lines = {name: one.group(1) for name, one in sections.items() if one is not None}
    assert {name: line.rsplit(" and ", 1)[1] for name, line in lines.items()} == {
        "hata": "1 query of each head.",
        "loki": "no query.",
        "double_sparsity": "512 queries of each head.",
        "infinigen": "256 queries of each head.",
        "hash_attention": "256 queries of each head.",
    }
    for line in lines.values():
        assert line.startswith("14 prompts of 4,096 tokens, fewer if")
        assert "in turn, seed 90210; made of 512 words, and of the half of the random" in line


def test_a_docstring_is_split_into_its_sections(maker: ModuleType) -> None:
    class Example:
        """Keep ``k`` tokens
        or fewer.

        Why.

        Attributes:
            rank: Channels.

        Source:
            A paper
            (section 3).

            Its code differs: here, not there.

        The bytes are few.
        """

    assert maker.docstring(Example) == {
        "": "Keep `k` tokens or fewer.\n\nWhy.\n\nThe bytes are few.",
        "Attributes": "rank: Channels.",
        "Source": "A paper (section 3).\n\nIts code differs: here, not there.",
    }


def test_knobs_are_the_methods_own_settings(maker: ModuleType) -> None:
    settings = "rank: ${x}  # channels | more\n# Apart\nflag: true\n"
    defaults = "defaults:\n  - /method@base: quest  # another method\n  - _self_\n"
    text = f"{defaults}_target_: a.B\n{settings}impl: ${{impl}}\nnative:\n  num_sink: 0\n"
    assert maker.knobs(text, {"rank": None, "flag": True}) == [
        "| `base` | `quest` | another method |",
        "| `rank` | `null` | channels \\| more |",
        "| `flag` | `true` |  |",
    ]


def test_the_page_of_columns_is_what_its_script_makes_from_the_declarations() -> None:
    page = (ROOT / "docs" / "columns.md").read_text(encoding="utf-8")
    assert script("make_columns").page() == page, "run python tools/make_columns.py"
    assert (
        "| `recall_at_k` | Fraction of the exact top-k that was selected, 0 to 1; mean over "
        "layers, KV heads, steps. | Recall@k | higher |"
    ) in page
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == {*DECLARED, "decode_vs_full"}


def test_the_diagrams_are_what_their_script_draws() -> None:
    maker = script("make_diagrams")
    drawn = {make.__name__: make().svg() for make in maker.DIAGRAMS}
    folder = ROOT / "docs" / "diagrams"
    committed = {path.stem: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert committed == drawn, "run python tools/make_diagrams.py"


def test_the_gallery_has_every_figure_and_leads_to_a_page_that_shows_it() -> None:
    docs = ROOT / "docs"
    text = (docs / "gallery.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"\[!\[[^]]+\]\(([^)]+)\)\]\(([^)]+)\)", text))
    figures = [*docs.glob("*.png"), *docs.glob("diagrams/*.svg")]
    assert sorted(shown) == sorted(path.relative_to(docs).as_posix() for path in figures)
    for figure, page in shown.items():
        assert f"]({figure})" in (docs / page).read_text(encoding="utf-8")


def test_lists_in_lists_are_indented_as_the_site_needs() -> None:
    """By four spaces; GitHub takes fewer, but Python's Markdown makes one list of both."""
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "kernels/README.md"]
    assert len(pages) > 40
    found = {
        page.name: re.findall(r"^ {1,3}[-*] .*", page.read_text("utf-8"), re.M) for page in pages
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_every_test_named_in_trust_md_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "trust.md").read_text()))
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    found = set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))
    assert len(named) > 30
    assert named - found == set()


def test_the_page_of_families_is_what_its_script_makes_from_the_tests_list() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert script("make_families").page() == page, "run python tools/make_families.py"
    assert "| `gpt_oss` | gpt-oss 20B and 120B | sliding windows, learned sinks, experts |" in page
    (count,) = re.findall(r"## Served: (\d+) families", page)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"[{count} families](docs/families.md)" in readme


def test_the_page_of_options_has_every_option_but_those_of_methods_and_models() -> None:
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    groups = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir())
    assert groups == sorted(
        [
            *("calibration", "card", "experiment", "launcher", "method", "model", "protocol"),
            *("report", "search", "task", "tracker"),
        ]
    )
    for group in set(groups) - {"method", "model"}:
        assert f"`{group}=" in page
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            named = f"`{path.stem}`" in page or f"`{group}={path.stem}`" in page
            assert named, f"docs/options.md must name {group}={path.stem}"
