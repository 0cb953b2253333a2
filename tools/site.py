"""What ``mkdocs.yml`` leaves to code: links to files outside ``docs/``, and the list of methods.

A link such as ``../methods/hata.py`` works in a checkout. The site has such a file as a page below
``repository/``: Markdown as it is, a folder as a list, code and settings as text; what is neither,
such as rows, is a file to download.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BELOW = "repository/"
"""Where the site has files that are not in ``docs/``."""
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")
"""The path of a link in Markdown: not an anchor alone, and not an address with a scheme."""
TEXT = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".bib": "bibtex", ".cff": "yaml"}
"""Files that are shown as text, and their language."""
UNLISTED = "---\nsearch:\n  exclude: true\n---\n\n"
"""Above pages that the search leaves out: code would hide the answers of other pages."""


def on_config(config: Any) -> Any:
    """Replace patterns in the navigation by the pages that they match, in order of their names."""

    def listed(items: list[Any]) -> Iterator[Any]:
        for item in items:
            if isinstance(item, dict):
                yield {
                    name: list(listed(one)) if isinstance(one, list) else one
                    for name, one in item.items()
                }
            elif "*" in item:
                yield from sorted(path.relative_to(DOCS).as_posix() for path in DOCS.glob(item))
            else:
                yield item

    config["nav"] = list(listed(config["nav"]))
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the repository that pages link to, and those that the latter link to."""
    paths = [Path(str(one.abs_src_path)) for one in files.documentation_pages()]
    paths += [ROOT / name.removeprefix(BELOW) for name in named(config["nav"])]
    seen: set[Path] = set()
    while paths:
        path = paths.pop()
        if path in seen:
            continue
        seen.add(path)
        if not path.is_relative_to(DOCS):
            files.append(added(path, config))
        if path.suffix == ".md":
            paths += linked(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Let links to files of the repository lead to their places in the site."""
    uri = page.file.src_uri
    source = ROOT / uri.removeprefix(BELOW) if uri.startswith(BELOW) else DOCS / uri
    if not source.exists():
        return markdown  # a list or code, which was made a page here

    def moved(found: re.Match[str]) -> str:
        target = (source.parent / found[1]).resolve()
        if not target.exists() or not target.is_relative_to(ROOT):
            return found[1]  # which mkdocs reports
        return posixpath.relpath(place(target), posixpath.dirname(uri) or ".")

    return LINK.sub(moved, markdown)


def named(items: Any) -> Iterator[str]:
    """Yield the pages of the navigation that are files of the repository outside ``docs/``."""
    for item in items.values() if isinstance(items, dict) else items:
        if isinstance(item, dict | list):
            yield from named(item)
        elif item.startswith(BELOW):
            yield item


def linked(page: Path) -> list[Path]:
    """Return the existing files and folders of the repository that a page links to."""
    found = [(page.parent / one).resolve() for one in LINK.findall(page.read_text("utf-8"))]
    return [one for one in found if one.exists() and one.is_relative_to(ROOT)]


def place(path: Path) -> str:
    """Return where the site's sources have a file or a folder of the repository."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = f"{BELOW}{path.relative_to(ROOT).as_posix()}"
    if path.is_dir():
        return f"{name}/index.md"
    return f"{name}.md" if path.suffix in TEXT else name


def added(path: Path, config: Any) -> File:
    """Return a file of the site that shows a file or a folder of the repository."""
    name, content = path.relative_to(ROOT).as_posix(), {"abs_src_path": str(path)}
    if path.is_dir():
        lines = [f"- `{one.name}`" for one in sorted(path.iterdir()) if one.name != "__pycache__"]
        content = {"content": "\n".join([f"{UNLISTED}# `{name}/`", "", *lines, ""])}
    elif path.suffix in TEXT:
        code = path.read_text("utf-8").rstrip()
        fenced = f"````{TEXT[path.suffix]}\n{code}\n````"
        content = {"content": f"{UNLISTED}# `{name}`\n\n{fenced}\n"}
    return File.generated(config, place(path), inclusion=InclusionLevel.NOT_IN_NAV, **content)
