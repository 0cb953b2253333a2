"""The parts of a report in order, which the page and the Markdown file show alike."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from topkbench.analysis.figures.plots import Drawn
from topkbench.analysis.tables.table import Table, in_markdown

Part = str | Table | Sequence[Drawn]
"""A paragraph, a table, or figures."""


@dataclass(frozen=True)
class Section:
    """A section of a report.

    Attributes:
        title: Its heading.
        slug: Its anchor in the page: letters, digits and hyphens.
        parts: Its paragraphs, tables and figures in order.
        sections: The sections within it.
        link: What the contents call it, where its title is long.
        folded: Whether the page shows its heading alone until it is opened.
    """

    title: str
    slug: str
    parts: Sequence[Part] = ()
    sections: Sequence[Section] = field(default=())
    link: str = ""
    folded: bool = False

    def markdown(self, level: int = 2) -> Iterator[str]:
        """Yield the blocks of the section in Markdown."""
        yield f"{'#' * level} {in_markdown(self.title)}"
        for part in self.parts:
            if isinstance(part, str):
                yield in_markdown(part)
            elif isinstance(part, Table):
                yield part.markdown()
            else:
                yield from map(_shown, part)
        for one in self.sections:
            yield from one.markdown(level + 1)


def _shown(one: Drawn) -> str:
    link = f"figures/{one.name}"
    title, caption = in_markdown(one.title), in_markdown(one.caption)
    words = f"**{title}.** {caption} [svg]({link}.svg), [data]({link}.csv)"
    return f"![{title}]({link}.png)\n\n{words}"


def markdown(
    title: str, ran: Sequence[str], notes: Sequence[str], sections: Sequence[Section]
) -> str:
    """Return a report in Markdown.

    Args:
        title: Its heading.
        ran: What ran, one sentence each.
        notes: What is mixed or could not be compared, one sentence each.
        sections: The sections in order.
    """
    parts = [f"# {in_markdown(title)}", "## What ran", *(f"- {in_markdown(one)}" for one in ran)]
    parts += [f"- **Note:** {in_markdown(one)}" for one in notes]
    for section in sections:
        parts += section.markdown()
    text = "\n\n".join(parts) + "\n"
    return re.sub(r"(\n- [^\n]*)\n(?=\n- )", r"\1", text)
