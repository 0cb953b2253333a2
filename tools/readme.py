"""The parts of README that tools write, each between two marks."""


def with_table(text: str, tool: str, subject: str, table: str) -> str:
    """Return README's text with a table put between the marks of its subject.

    Args:
        text: README.
        tool: The script that makes the table, as the first mark names it.
        subject: What the table shows, as both marks name it.
        table: The table in Markdown.

    Raises:
        ValueError: If a mark is missing.
    """
    first, last = f"<!-- {subject}: made by tools/{tool} -->", f"<!-- end of {subject} -->"
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"README must contain the marks {first} and {last}, but lacks one.")
    return f"{before}{first}\n\n{table}\n\n{last}{after}"
