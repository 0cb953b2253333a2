"""``report.html``: one file without a library and without network.

A figure is its SVG file with a small script over it, not drawn again by a plotting library: it is
the same picture as the PNG, a library would add megabytes to the file, and each point says what is
behind it all the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from topkbench.analysis import style
from topkbench.analysis.figures.plots import Drawn
from topkbench.analysis.figures.points import LEGEND
from topkbench.analysis.report.section import Section
from topkbench.analysis.tables.table import Table

_BROAD = 61
"""Width of a figure, in sizes of its smallest letters, above which it needs the whole width."""
_SIZE = re.compile(r'viewBox="0 0 ([\d.]+) ([\d.]+)"')
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}\b")


def html(
    title: str,
    ran: Sequence[str],
    notes: Sequence[str],
    sections: Sequence[Section],
    samples: Mapping[str, Any] | None = None,
) -> str:
    """Return the page.

    Args:
        title: Its heading.
        ran: What ran, one sentence each.
        notes: What is mixed or could not be compared, one sentence each.
        sections: The sections in order.
        samples: What `samples_page.page` returned.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["picture"] = _picture
    environment.tests["broad"] = _is_broad
    environment.tests["table"] = lambda part: isinstance(part, Table)
    return environment.get_template("report.html").render(
        title=title,
        ran=ran,
        notes=notes,
        sections=sections,
        stylesheet=Markup((Path(__file__).with_name("report.css")).read_text(encoding="utf-8")),
        script=Markup((Path(__file__).with_name("report.js")).read_text(encoding="utf-8")),
        samples=samples,
    )


def _is_broad(drawn: Drawn) -> bool:
    """Return whether a figure needs the page's whole width."""
    found = _SIZE.search(drawn.svg.read_text(encoding="utf-8")[:2000])
    return found is not None and float(found[1]) / drawn.smallest_text > _BROAD


def _picture(drawn: Drawn) -> Markup:
    """Return a figure as an element of the page, with what is behind its points."""
    text = drawn.svg.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    size = _SIZE.search(text)
    assert size is not None, f"{drawn.svg} has no size"
    # Identifiers are of one file, and a page has many.
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{drawn.name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    assert "<image" not in text, f"{drawn.svg} has an image, whose colours dark paper cannot change"
    text = _COLOUR.sub(lambda found: _on_both(found[0]), text)
    points = "".join(
        f'<circle cx="{one.x:g}" cy="{one.y:g}" r="7" data-text="{escape(one.text)}"/>'
        for one in drawn.points
    )
    head = (
        f'<svg class="picture" viewBox="0 0 {size[1]} {size[2]}"'
        f' style="--units: {float(size[1]):.0f}; --smallest: {drawn.smallest_text:g}" role="img"'
        f' aria-label="{escape(drawn.title)}"{" tabindex=0" if points else ""}'
        ' xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    # A narrow screen shows the legend below: its place in the figure is all that it leaves out.
    box, below = drawn.legend, ""
    if box is not None:
        where = f"{box.x:g} {box.y:g} {box.width:g} {box.height:g}"
        head = head.replace("<svg", f'<svg data-plot="{box.x:g}"', 1)
        below = (
            f'<svg class="legend" viewBox="{where}"'
            f' style="--units: {box.width:.0f}; --smallest: {drawn.smallest_text:g}"'
            f' aria-hidden="true"><use href="#{drawn.name}-{LEGEND}"/></svg>'
        )
    body = text[text.index(">") + 1 : text.rindex("</svg>")]
    # What a figure's file says has been written by matplotlib, which escapes every text in it.
    return Markup(f'{head}{body}<g class="points">{points}</g></svg>{below}')


def _on_both(colour: str) -> str:
    """Return a colour of a figure on white paper, with one that is as clear on dark paper."""
    colour = colour.lower()
    if colour == style.WHITE_PAPER.lower():
        return "var(--paper)"
    return f"light-dark({colour}, {style.on_dark(colour).lower()})"
