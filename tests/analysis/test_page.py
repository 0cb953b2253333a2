"""The page of a report, used as a reader uses it, in headless Chromium."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from topkbench.tests.browser import MISSING, Browser, Page

RESULTS = "document.querySelector('#setting-1-1 table')"

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture
def page(browser: Browser, big_report: Path) -> Iterator[Page]:
    opened = browser.open(big_report)
    yield opened
    assert opened.errors == []


def column(page: Page, head: str) -> list[str]:
    """Return the texts of a column of the results, of the rows that are shown."""
    found: list[str] = page.run(
        f"""(() => {{
            const table = {RESULTS};
            const heads = [...table.tHead.rows[0].cells].map((one) => one.textContent);
            const place = heads.findIndex((one) => one.startsWith("{head}"));
            return [...table.tBodies[0].rows].filter((row) => !row.hidden)
                .map((row) => row.cells[place].textContent);
        }})()"""
    )
    return found


def click(page: Page, head: str) -> None:
    page.run(
        f"[...{RESULTS}.tHead.querySelectorAll('th')]"
        f".find((one) => one.textContent.startsWith('{head}')).click()"
    )


def numbers(texts: list[str]) -> list[float]:
    return [float(one.replace("−", "-").split()[0]) for one in texts if one != "–"]


def test_a_table_sorts_both_ways_with_what_is_missing_last_and_back(page: Page) -> None:
    as_written = list(zip(column(page, "Method"), column(page, "k"), strict=True))
    for head in ("Score", "k", "Δ full"):
        click(page, head)
        rising = column(page, head)
        assert numbers(rising) == sorted(numbers(rising))
        click(page, head)
        falling = column(page, head)
        assert numbers(falling) == sorted(numbers(falling), reverse=True)
        for texts in (rising, falling):
            missing = [one == "–" for one in texts]
            assert missing == sorted(missing)
        click(page, head)
        assert list(zip(column(page, "Method"), column(page, "k"), strict=True)) == as_written
    click(page, "Method")
    assert column(page, "Method") == sorted(column(page, "Method"), key=str.lower)
    heads = page.run(f"[...{RESULTS}.tHead.rows[0].cells].map((one) => one.ariaSort)")
    assert [one for one in heads if one is not None] == ["ascending"]


def test_rows_are_filtered_by_words_and_counted(page: Page) -> None:
    everything = len(column(page, "Method"))
    page.run(
        """(() => {
            const input = document.querySelector('#setting-1-1 input[type=search]');
            input.value = "hata 512";
            input.dispatchEvent(new Event("input"));
        })()"""
    )
    assert column(page, "Method") == ["HATA"] * 4
    assert set(column(page, "k")) == {"512"}
    count = page.run("document.querySelector('#setting-1-1 .tools [role=status]').textContent")
    assert count == f"4 of {everything} rows"


def test_a_filter_finds_what_is_seen(page: Page) -> None:
    """The density, 0.125 where an eighth is kept, is in a column that is hidden at first."""
    found = page.run(
        f"""(() => {{
            const tools = document.querySelector('#setting-1-1 .tools');
            const search = tools.querySelector("input[type=search]");
            const count = () => [...{RESULTS}.tBodies[0].rows].filter((one) => !one.hidden).length;
            const find = (words) => {{
                search.value = words;
                search.dispatchEvent(new Event("input"));
                return count();
            }};
            const heads = [...{RESULTS}.tHead.rows[0].cells];
            const place = heads.findIndex((one) => one.textContent.startsWith("Density"));
            const density = {RESULTS}.tBodies[0].rows[1].cells[place].textContent;
            const before = find(density);
            tools.querySelectorAll("input[type=checkbox]")[place].click();
            return [before, count(), find("hata512")];
        }})()"""
    )
    hidden, shown, across_cells = found
    assert (hidden, across_cells) == (0, 0)
    assert shown > 0


def test_without_its_script_a_page_shows_each_legend_once(
    browser: Browser, big_report: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "report.html"
    plain.write_text(re.sub(r"<script>.*?</script>", "", big_report.read_text(), flags=re.DOTALL))
    page = browser.open(plain, width=390)
    assert page.run("document.querySelectorAll('svg.legend').length") > 5
    assert page.run(
        "[...document.querySelectorAll('svg.legend')].every((o) => !o.checkVisibility())"
    )


def test_a_column_is_hidden_and_shown_again(page: Page) -> None:
    box = "document.querySelectorAll('#setting-1-1 .tools input[type=checkbox]')[3]"
    hidden = f"[...{RESULTS}.rows].map((row) => row.cells[3].hidden)"
    page.run(f"{box}.click()")
    assert set(page.run(hidden)) == {True}
    page.run(f"{box}.click()")
    assert set(page.run(hidden)) == {False}


def test_the_first_column_stays_in_sight(browser: Browser, big_report: Path) -> None:
    page = browser.open(big_report, width=390)
    place = page.run(
        f"""(() => {{
            const wide = {RESULTS}.closest(".wide");
            wide.scrollLeft = 400;
            const cell = {RESULTS}.tBodies[0].rows[1].cells[0].getBoundingClientRect();
            return [wide.scrollLeft, Math.round(cell.left - wide.getBoundingClientRect().left)];
        }})()"""
    )
    assert place == [400, 0]
    assert page.run("document.documentElement.scrollWidth") == 390  # the page itself stays put


def test_a_narrow_screen_shows_a_figure_whole_and_its_legend_below(
    browser: Browser, big_report: Path
) -> None:
    places = """[...document.querySelectorAll('#score_vs_k svg')].map((one) => {
        const box = one.getBoundingClientRect();
        return [Math.round(box.left), Math.round(box.right), box.height > 20, Math.round(box.top)];
    })"""
    wide = browser.open(big_report)
    (_, _, is_shown, _), (*_, is_below, _) = wide.run(places)
    assert (is_shown, is_below) == (True, False)
    narrow = browser.open(big_report, width=390)
    figure, legend = narrow.run(places)
    assert figure[0] == 14
    assert figure[1] == 390 - 14
    assert legend[2]
    assert legend[3] > figure[3]
    # What is drawn as the legend is no longer in the figure's own picture.
    hidden = """(() => {
        const picture = document.querySelector("#score_vs_k .picture").getBoundingClientRect();
        const legend = document.getElementById("score_vs_k-legend").getBoundingClientRect();
        return legend.left >= picture.right - 1;
    })()"""
    assert narrow.run(hidden) is True
    for page in (wide, narrow):
        assert page.errors == []


def test_what_a_narrow_screen_cannot_show_fades_out_until_it_is_scrolled_to(
    browser: Browser, big_report: Path
) -> None:
    page = browser.open(big_report, width=390)
    boxes = """Object.fromEntries([...document.querySelectorAll("figure .wide")].map((one) =>
        [one.closest("figure").id,
         [one.scrollWidth > one.clientWidth, getComputedStyle(one).maskImage !== "none"]]))"""
    page.wait_for("document.querySelector('#subtasks .goes-on')")
    found = page.run(boxes)
    assert found.pop("subtasks") == [True, True]
    assert found.keys() >= {"score_vs_k", "recall_vs_k", "score_vs_bytes", "stages"}
    assert set(map(tuple, found.values())) == {(False, False)}
    page.run("document.querySelector('#subtasks .wide').scrollLeft = 9999")
    page.wait_for("!document.querySelector('#subtasks .goes-on')")
    assert page.errors == []


@pytest.mark.parametrize("width", [390, 1280])
def test_letters_of_figures_can_be_read(browser: Browser, big_report: Path, width: int) -> None:
    """At least eight pixels, whatever is smallest in a figure."""
    page = browser.open(big_report, width=width)
    sizes = page.run(
        """[...document.querySelectorAll("svg.picture, svg.legend")].filter(
            (one) => one.checkVisibility()).map((one) => one.getBoundingClientRect().width /
            one.viewBox.baseVal.width * Number(one.style.getPropertyValue("--smallest")))"""
    )
    assert len(sizes) >= 9
    assert min(sizes) > 7.9
    assert page.run("document.documentElement.scrollWidth") == width


def test_what_is_printed_can_be_read_and_each_page_of_a_table_has_its_heads(
    big_report: Path, browser: Browser, tmp_path: Path
) -> None:
    page = browser.open(big_report)
    page.call("Emulation.setEmulatedMedia", media="print")
    page.call(
        "Emulation.setDeviceMetricsOverride",
        **{"width": 1032, "height": 700, "deviceScaleFactor": 1, "mobile": False},  # 273 mm
    )
    points = page.run(
        """[...document.querySelectorAll("svg.picture")].map((one) =>
            one.getBoundingClientRect().width / one.viewBox.baseVal.width * 72 / 96 *
            Number(one.style.getPropertyValue("--smallest")))"""
    )
    assert min(points) > 6
    file = tmp_path / "report.pdf"
    data = page.call("Page.printToPDF", preferCSSPageSize=True)["data"]
    file.write_bytes(base64.b64decode(data))
    if shutil.which("pdftotext") is None:
        pytest.skip("needs pdftotext, and there is none on this machine")
    command = ["pdftotext", "-layout", str(file), "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    row = re.compile(r"^ *[A-Z][\w -]* +\d+ +(?:\d+|–) +\d+\.\d \[", re.MULTILINE)
    of_results = [one for one in text.split("\f") if row.search(one)]
    assert len(of_results) > 1
    for one in of_results:
        assert re.search(r"Method +k +rbit +Score", one)


def test_the_contents_of_a_narrow_screen_follow_the_reader(
    browser: Browser, big_report: Path
) -> None:
    page = browser.open(big_report, width=390)
    page.run("document.querySelectorAll('nav ul ul a')[2].click()")
    page.wait_for("document.querySelector('nav [aria-current]')")
    page.wait_for(
        """(() => {
            const bar = document.querySelector("nav").getBoundingClientRect();
            const link = document.querySelector("nav [aria-current]").getBoundingClientRect();
            return link.left >= bar.left && link.right <= bar.right && link.top < bar.bottom;
        })()"""
    )
    # Of the parts of a setting, those of the one that is read are named.
    lists = page.run(
        """[...document.querySelectorAll("nav ul ul")].map((one) =>
            [one.getClientRects().length > 0, one.parentElement.matches(":has([aria-current])")])"""
    )
    assert [is_shown for is_shown, _ in lists] == [is_current for _, is_current in lists]
    assert sum(is_shown for is_shown, _ in lists) == 1
    assert page.errors == []


def test_a_point_says_what_is_behind_it_by_pointer_and_by_key(page: Page) -> None:
    tip = "document.getElementById('tip')"
    assert page.run(f"{tip}.hidden")
    points = page.run(
        "[...document.querySelectorAll('#score_vs_k circle')].map((one) => one.dataset.text)"
    )
    of_hata = [one for one in points if one.startswith("HATA") and "k = 512, rbit = 128" in one]
    assert len(of_hata) == 1
    assert re.search(r"^Score: [\d.]+ \[[\d.]+, [\d.]+\] 0–100$", of_hata[0], re.MULTILINE)
    page.run(
        """(() => {
            const picture = document.querySelector('#score_vs_k svg');
            const press = (key) => picture.dispatchEvent(new KeyboardEvent("keydown", {key}));
            press("ArrowRight"); press("ArrowRight"); press("ArrowLeft");
        })()"""
    )
    assert page.run(f"{tip}.textContent") == points[0]
    assert not page.run(f"{tip}.hidden")
    page.run(
        "document.querySelectorAll('#score_vs_k circle')[2]"
        ".dispatchEvent(new PointerEvent('pointerenter'))"
    )
    assert page.run(f"{tip}.textContent") == points[2]


def test_a_point_that_was_touched_stays_until_something_else_is(page: Page) -> None:
    hidden = page.run(
        """(() => {
            const tip = document.getElementById("tip"), found = [];
            const picture = document.querySelector("#score_vs_k svg");
            const send = (one, kind, type) => {
                one.dispatchEvent(new PointerEvent(kind, {pointerType: type, bubbles: true}));
                found.push(tip.hidden);
            };
            send(picture.querySelector("circle"), "pointerenter", "touch");
            send(picture, "pointerleave", "touch");
            send(document.querySelector("h1"), "pointerdown", "touch");
            send(picture.querySelector("circle"), "pointerenter", "mouse");
            send(picture, "pointerleave", "mouse");
            return found;
        })()"""
    )
    assert hidden == [False, False, True, False, True]


def test_the_results_fit_the_page_and_minor_columns_are_asked_for(page: Page) -> None:
    wide = f"{RESULTS}.closest('.wide')"
    assert page.run(f"{wide}.scrollWidth <= {wide}.clientWidth")
    heads = page.run(
        f"[...{RESULTS}.tHead.rows[0].cells].filter((one) => !one.hidden)"
        ".map((one) => one.textContent.split(' (')[0])"
    )
    assert heads == [
        *("Method", "k", "rbit", "Score", "Δ full", "Recall@k", "Read/step"),
        *("Decode step", "Full attention", "Speed-up"),
    ]
    words = "document.querySelector('#setting-1-1 .tools summary').textContent"
    assert page.run(words) == "Columns (3 hidden)"


def test_a_point_lies_where_its_marker_is_drawn(page: Page) -> None:
    """The circle over a point has the centre of one of the figure's own markers."""
    distance = page.run(
        """(() => {
            const picture = document.querySelector('#recall_vs_k svg');
            const middle = (one) => {
                const box = one.getBoundingClientRect();
                return [box.x + box.width / 2, box.y + box.height / 2];
            };
            const marks = [...picture.querySelectorAll("use")].map(middle);
            return Math.max(...[...picture.querySelectorAll(".points circle")].map(middle).map(
                ([x, y]) => Math.min(...marks.map(([u, v]) => Math.hypot(x - u, y - v)))));
        })()"""
    )
    assert distance < 1.5  # pixels; a triangle's box is not centred on its point


def test_a_link_into_a_folded_section_opens_it(page: Page) -> None:
    folded = page.run("document.querySelector('main > section > details').id")
    assert not page.run(f"document.getElementById('{folded}').open")
    page.run(f"document.querySelector('nav a[href=\"#{folded}\"]').click()")
    page.wait_for(f"document.getElementById('{folded}').open")


def test_figures_come_first_and_every_link_of_the_contents_leads_somewhere(page: Page) -> None:
    first = "document.querySelector('#setting-1 > section').id"
    assert page.run(first) == "setting-1-figures"
    assert page.run(
        "[...document.querySelectorAll('nav a, figure[id]')].length > 8"
        " && [...document.querySelectorAll('nav a')]"
        ".every((one) => document.querySelector(one.hash))"
    )
    assert page.run(
        "new Set([...document.querySelectorAll('[id]')].map((one) => one.id)).size"
    ) == page.run("document.querySelectorAll('[id]').length")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_and_figures_are_clear_on_either_paper(
    browser: Browser, big_report: Path, dark: bool
) -> None:
    page = browser.open(big_report, dark=dark)
    ink, paper = page.run(
        "['color', 'backgroundColor'].map((one) => getComputedStyle(document.body)[one])"
    )
    assert (ink, paper) == (
        ("rgb(232, 234, 237)", "rgb(21, 24, 28)")
        if dark
        else ("rgb(29, 33, 37)", "rgb(255, 255, 255)")
    )
    colours = page.run(
        """[...document.querySelectorAll("#score_vs_k svg [style*=stroke]")]
            .map((one) => getComputedStyle(one).stroke).filter((one) => one !== "none")"""
    )
    assert ("rgb(0, 0, 0)" in colours) is not dark
    # A heat map's cells, of which the lowest score has the paper's colour.
    assert page.run("document.querySelectorAll('svg.picture image').length") == 0
    cells = page.run(
        """[...document.querySelectorAll("#subtasks [id*=QuadMesh] path")]
            .map((one) => getComputedStyle(one).fill)"""
    )
    assert ("rgb(8, 69, 126)" in cells) is not dark  # the best score on white paper
    assert len(set(cells)) > 5


def test_what_is_printed_has_everything_and_no_tools(page: Page) -> None:
    page.call("Emulation.setEmulatedMedia", media="print")
    page.run("dispatchEvent(new Event('beforeprint'))")
    shown = "getComputedStyle(document.querySelector('{}')).display"
    assert page.run(shown.format("nav")) == "none"
    assert page.run(shown.format(".tools")) == "none"
    assert page.run("[...document.querySelectorAll('main section > details')].every((o) => o.open)")
