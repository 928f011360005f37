"""The site: it is built without a warning, every page is in it, every link leads somewhere, nothing is loaded from afar."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import bitfront as bf
from warm import Warm

ROOT = Path(__file__).parents[1]
OPTIONS = ["--builder", "html", "--conf-dir", "docs", "--fail-on-warning", "--keep-going", "--quiet"]
#: What a browser loads of a page by itself; `a` is for the reader to follow.
LOADING = {
    ("link", "href"),
    ("script", "src"),
    ("img", "src"),
    ("source", "src"),
    ("iframe", "src"),
    ("object", "data"),
}


#: Sphinx keeps what it reads; to look through it for garbage again and again is a quarter of its time.
SPHINX = "import gc, sys; gc.disable(); from sphinx.cmd.build import main; sys.exit(main(sys.argv[1:]))"


def build(warm: Warm, source: Path, folder: Path) -> tuple[int, str]:
    """(exit code of Sphinx, what it says on standard error)."""
    words = [*OPTIONS, "--doctree-dir", folder / "doctrees", ".", folder / "site"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = warm.start(["-c", SPHINX, *map(str, words)], source, environment)
    _, said = process.communicate(timeout=300)
    return process.returncode, said


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    """The folder of the site, built without a warning."""
    pytest.importorskip("sphinx")
    folder = tmp_path_factory.mktemp("built")
    code, said = build(warm, ROOT, folder)
    assert code == 0, said
    return folder / "site"


class Page(HTMLParser):
    """What a page loads, where it leads, and where in it one can be led."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if (tag, name) in LOADING and value:
                self.loads.append(value)
            elif (tag, name) == ("a", "href") and value:
                self.links.append(value)
            elif name == "id" and value:
                self.places.add(value)


def check_nothing_is_loaded(site: Path, pages: dict[Path, Page]) -> None:
    assert all(page.loads for page in pages.values()), "each page has a stylesheet"
    for path, page in pages.items():
        for load in page.loads:
            address = urlsplit(load)
            assert not address.scheme or address.scheme == "data", f"{path.relative_to(site)} loads {load}"
            assert not address.netloc, f"{path.relative_to(site)} loads {load}"
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.findall(r"(?:url\(\s*|@import\s+)['\"]?(?:https?:)?//", text), style


def check_links(site: Path, pages: dict[Path, Page]) -> None:
    assert all(page.links and page.places for path, page in pages.items() if path.parent == site / "docs")
    for path, page in pages.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            assert target.is_file(), f"{path.relative_to(site)}: {link} is nowhere"
            if address.fragment and target in pages:
                assert unquote(address.fragment) in pages[target].places, (
                    f"{path.relative_to(site)}: {link} is no heading"
                )


@pytest.mark.journey
def test_its_pages_in_a_browser(site: Path, browser: Any) -> None:
    """None asks for anything but files, complains, or is wider than its window, down to a phone's."""
    asked, trouble = [], []
    with browser.new_page() as page:
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("console", lambda said: trouble.append(said.text) if said.type in ("error", "warning") else None)
        for name in ("index", "docs/tutorial", "docs/configuration", "docs/metrics", "docs/api/search"):
            page.goto((site / f"{name}.html").as_uri())
            for width in (360, 1280, 1560):
                page.set_viewport_size({"width": width, "height": 800})
                wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                assert wide <= 0, f"{name} is {wide} pixels wider than a window of {width}"
        page.goto((site / "search.html").as_uri() + "?q=fine-tuning")
        page.wait_for_selector("#search-results li a")
    assert trouble == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


@pytest.mark.journey
def test_the_site(site: Path) -> None:
    assert (site / "index.html").read_bytes() == (site / "README.html").read_bytes()
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert {site / f"{page}.html" for part in navigation().values() for page in part} <= set(pages)
    check_nothing_is_loaded(site, pages)
    check_links(site, pages)


@pytest.mark.journey
def test_what_is_wrong_fails_the_build(tmp_path: Path, warm: Warm) -> None:
    pytest.importorskip("sphinx")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "docs", source / "docs", ignore=shutil.ignore_patterns("api", "*.png", "*.svg"))
    conf = source / "docs" / "conf.py"
    kept = conf.read_text(encoding="utf-8")
    start = kept.index("NAVIGATION = {")
    end = kept.index("\n}\n", start) + 3
    conf.write_text(kept[:start] + 'NAVIGATION = {"All": ["docs/here"]}\n' + kept[end:], encoding="utf-8")
    shutil.rmtree(source / "docs" / "howto")
    for page in (source / "docs").glob("*.md"):
        page.unlink()
    (source / "README.md").write_text("# Start\n\n[a](docs/here.md#there) [b](docs/here.md#gone) [c](docs/lost.md)\n")
    (source / "docs" / "here.md").write_text("# Here\n\n## There\n")
    (source / "docs" / "forgotten.md").write_text("# Forgotten\n")
    code, said = build(warm, source, tmp_path / "built")
    assert code != 0
    assert "gone" in said
    assert "docs/lost.md" in said
    assert re.search(r"forgotten\.md.*isn't included in any toctree", said)
    assert "there" not in said


def navigation() -> dict[str, list[str]]:
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("conf", ROOT / "docs" / "conf.py")
    assert spec is not None
    assert spec.loader is not None
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    return conf.NAVIGATION


def test_every_page_is_in_the_navigation_once() -> None:
    named = [page for part in navigation().values() for page in part]
    there = [p.relative_to(ROOT).with_suffix("") for p in (ROOT / "docs").rglob("*") if p.suffix in (".md", ".rst")]
    missing = sorted({str(p) for p in there} - set(named))
    assert not missing, f"{', '.join(missing)}: add to NAVIGATION in docs/conf.py, below the part it belongs to"
    assert len(named) == len(set(named))
    assert all((ROOT / f"{page}.md").is_file() or (ROOT / f"{page}.rst").is_file() for page in named)


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "api").glob("*.rst"))
    described = set(re.findall(r"^\.\. auto\w+:: (\w+)$", text, re.M))
    assert set(bf.__all__) - described == set(), "add them to a page of docs/api"
    assert described <= set(bf.__all__)


def test_links_of_the_readme_to_folders_and_files() -> None:
    """What the site does not show, a repository's browser does."""
    for page in ("README.md", "CONTRIBUTING.md"):
        targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
        assert targets or page != "README.md"
        for target in targets:
            assert (ROOT / target).exists(), f"{page}: {target}"
