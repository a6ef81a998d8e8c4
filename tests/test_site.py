"""The site as a reader gets it: built from what lies here, looked at in a browser, wide and narrow, light and dark."""

import functools
import http.server
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY_FILE = "https://github.com/libragrad/libragrad-minimal/blob/main/"
CUT_TABLES = """[...document.querySelectorAll('article table')].filter(table => {
    let box = table
    while (box.scrollWidth <= box.clientWidth && box.tagName != 'ARTICLE') box = box.parentElement
    return box.tagName != 'ARTICLE' && getComputedStyle(box).overflowX != 'auto'
}).map(table => table.innerText.slice(0, 80))"""
pytestmark = pytest.mark.slow


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-q",
        "-f",
        ROOT / "site" / "mkdocs.yml",
        "-d",
        folder,
    ]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def pages_of(site: Path) -> list[str]:
    return sorted(path.parent.relative_to(site).as_posix() for path in site.rglob("index.html"))


def test_every_notebook_is_a_page_and_every_link_leads_somewhere(site):
    assert {f"notebooks/{path.stem}" for path in ROOT.glob("notebooks/*.ipynb")} <= set(pages_of(site))
    for name in pages_of(site):
        page = BeautifulSoup((site / name / "index.html").read_text(encoding="utf-8"), "html.parser")
        for tag, attribute in (("a", "href"), ("img", "src"), ("script", "src"), ("link", "href")):
            for target in (element[attribute] for element in page.find_all(tag, **{attribute: True})):
                where = target.partition("#")[0]
                if where.startswith(REPOSITORY_FILE):
                    assert (ROOT / where.removeprefix(REPOSITORY_FILE)).exists(), f"{name}: {target}"
                if ":" in where:
                    assert tag == "a" or where.startswith("data:") or "canonical" in str(page.find(tag, href=target))
                elif where:
                    path = (site / name / where).resolve()
                    assert path.is_file() or (path / "index.html").is_file(), f"{name}: {target}"


def test_the_pictures_of_start_and_gallery_are_there(site):
    """One that isn't found becomes a link elsewhere, which is no picture."""
    for name, source in (("", ROOT / "README.md"), ("gallery", ROOT / "site" / "pages" / "gallery.md")):
        wanted = re.findall(r"!\[[^\]]*\]\((?!https:)(?:[^)]*/)?([^/)]+)\)", source.read_text(encoding="utf-8"))
        page = BeautifulSoup((site / name / "index.html").read_text(encoding="utf-8"), "html.parser")
        assert wanted and [image["src"].rpartition("/")[2] for image in page.article.find_all("img")] == wanted


def test_formulas_are_set_without_a_script(site):
    for name in pages_of(site):
        page = BeautifulSoup((site / name / "index.html").read_text(encoding="utf-8"), "html.parser")
        for code in page.select("pre, code, script, style, .clipboard-copy-txt"):
            code.decompose()
        for math in page.find_all("math"):
            assert "merror" not in str(math) and "\\" not in math.get_text(), math.get_text()
            raised = [part.get_text() for part in math.select("msup > :last-child, msubsup > :last-child")]
            assert "′" not in raised, f"a prime that shrinks to a dot: {math.get_text()}"
            math.decompose()
        assert not re.search(r"\$|\\[(\[]", page.get_text().replace("\\$", "")), name


@pytest.mark.parametrize("width, scheme", [(1200, "light"), (390, "dark")])
def test_in_a_browser(site, address, browser, width, scheme):
    for name in pages_of(site):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        faults, fetched = [], []
        page.on("console", lambda message, faults=faults: message.type == "error" and faults.append(message.text))
        page.on("pageerror", lambda error, faults=faults: faults.append(str(error)))
        page.on("request", lambda request, fetched=fetched: fetched.append(request.url))
        page.goto(address + name, wait_until="load")
        assert not faults, name
        assert all(url.startswith((address, "data:", "blob:")) for url in fetched), "something comes from elsewhere"
        assert page.evaluate("[...document.images].filter(i => !i.naturalWidth || !i.alt).map(i => i.src)") == [], name
        page.evaluate("document.querySelectorAll('details').forEach(folded => folded.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} scrolls sideways"
        assert page.evaluate(CUT_TABLES) == [], f"{name}: tables of which a part can't be reached"
        page.close()


@pytest.mark.parametrize("width, scheme", [(1200, "light"), (390, "dark")])
def test_axe_finds_nothing_serious(site, address, browser, width, scheme):
    for name in pages_of(site):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.goto(address + name, wait_until="load")
        found = Axe().run(page).response["violations"]
        serious = [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]
        page.close()
        assert serious == [], name
