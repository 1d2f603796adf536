"""`make docs`: complete, without a broken link, and readable without network."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.pages import CHECKOUT, DOCS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Elements that a browser loads by itself, and where their address stands.
_LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class _Page(HTMLParser):
    """Addresses and anchors of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if "id" in found:
            self.anchors.add(found["id"])
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in _LOADS and found.get(_LOADS[tag]):
            self.loads.append(found[_LOADS[tag]])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built by the command of the Makefile."""
    recipe = re.search(r"-m sphinx (.*) docs docs/_build/html", (CHECKOUT / "Makefile").read_text())
    assert recipe is not None
    assert {"--fail-on-warning", "--nitpicky"} <= set(recipe[1].split())
    out = tmp_path_factory.mktemp("docs") / "html"
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *recipe[1].split(), "docs", str(out)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def pages(built: Path) -> dict[Path, _Page]:
    found = {}
    for path in built.rglob("*.html"):
        found[path] = _Page()
        found[path].feed(path.read_text())
    return found


def test_every_page_is_built_and_in_the_contents(built: Path, pages: dict[Path, _Page]) -> None:
    index = {urlsplit(link).path for link in pages[built / "index.html"].links}
    sources = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.glob("**/*.md")}
    for page in sources - {Path("index.html")}:
        assert (built / page).is_file()
        assert str(page) in index


def test_links_inside_lead_somewhere(pages: dict[Path, _Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in (*page.links, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = pages[target].anchors if target in pages else set()
            if not target.exists() or (
                parts.fragment and target in pages and unquote(parts.fragment) not in known
            ):
                broken.append(f"{path.name}: {link}")
    assert not broken


def test_nothing_is_loaded_from_the_network(built: Path, pages: dict[Path, _Page]) -> None:
    foreign = [
        f"{path.name}: {address}"
        for path, page in pages.items()
        for address in page.loads
        if urlsplit(address).scheme not in ("", "data") or urlsplit(address).netloc
    ]
    assert not foreign
    for path in built.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text()), path.name


def test_a_broken_link_or_a_forgotten_page_fails_the_build(built: Path, tmp_path: Path) -> None:
    """The same settings on two small pages, without the reference."""
    settings, call = (DOCS / "conf.py").read_text(), "reference_pages.write("
    assert call in settings
    settings = settings.replace("HERE = Path(__file__)", f"HERE = Path({str(DOCS / 'conf.py')!r})")
    (tmp_path / "conf.py").write_text(settings.replace(call, "print("))
    (tmp_path / "_static").mkdir()
    index = "# Page\n\n[there](other.md)\n\n```{toctree}\nother\n```\n"
    for name, text, status in (
        ("whole", index, 0),
        ("link", index.replace("[there](other.md)", "[there](no-page.md)"), 1),
        ("anchor", index.replace("other.md", "other.md#nowhere"), 1),
        ("forgotten", "# Page\n", 1),
    ):
        (tmp_path / "index.md").write_text(text)
        (tmp_path / "other.md").write_text("# Other\n")
        command = [sys.executable, "-m", "sphinx", "-W", "-q", "-n", "-E", str(tmp_path)]
        done = subprocess.run(
            [*command, str(tmp_path / "out")], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == status, f"{name}: {done.stderr}"
