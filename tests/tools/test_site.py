"""The site that mkdocs builds of docs/: its links lead somewhere, and nothing is fetched."""

import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    find_spec("mkdocs") is None, reason="needs mkdocs: pip install -e '.[docs]' -c constraints.txt"
)


class References(HTMLParser):
    """What a page refers to: (tag, address)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(tag, value) for name, value in attrs if name in ("href", "src") and value]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def references(site: Path) -> Iterator[tuple[Path, str, str]]:
    pages = [path for path in site.rglob("*.html") if path.name != "404.html"]
    assert len(pages) > 60
    for path in pages:
        parser = References()
        parser.feed(path.read_text(encoding="utf-8"))
        yield from ((path, *one) for one in parser.found)


@pytest.mark.slow
def test_pages_lead_to_files_that_are_there_and_fetch_nothing(site: Path) -> None:
    missing, fetched = [], []
    for page, tag, address in references(site):
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            if tag != "a":
                fetched.append((page.name, tag, address))
        elif parts.path and not (page.parent / unquote(parts.path)).is_file():
            missing.append((page.name, address))
    assert missing == []
    assert fetched == []


@pytest.mark.slow
def test_the_site_has_the_methods_the_code_that_is_linked_to_and_the_docstrings(site: Path) -> None:
    names = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")}
    assert {path.stem for path in (site / "methods").glob("*.html")} == names
    page = (site / "methods" / "quest.html").read_text(encoding="utf-8")
    assert 'href="../repository/methods/quest.py.html"' in page
    code = (site / "repository" / "methods" / "quest.py.html").read_text(encoding="utf-8")
    assert "class" in code
    assert "Quest" in code
    assert (site / "repository" / "analysis/measured/epyc_2_threads/league.csv").is_file()
    interface = (site / "api" / "models.html").read_text(encoding="utf-8")
    assert 'id="topkbench.models.attach.attach"' in interface
    assert "Replace" in interface
