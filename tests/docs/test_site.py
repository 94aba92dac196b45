"""The site: it builds without a warning, its pages ask no other server for anything, and commands are in it."""

import functools
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from docs.site_extension import help_of
from tests.helpers.documents import REPOSITORY

pytestmark = pytest.mark.slow

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")

# What a browser fetches by itself, unlike the target of a link.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=["']?(?P<src>https?:|//)"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preconnect|preload|icon|dns-prefetch))[^>]*\bhref=["']?(?P<href>https?:|//)"""
    r"""|(?:@import\s+|url\()["']?(?P<url>https?:|//)""",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("documents")
    shutil.copytree(REPOSITORY / "docs", folder / "docs")  # Zensical follows no link to it
    for name in ("finelip_sdxl", "training", "demo"):
        (folder / name).symlink_to(REPOSITORY / name)
    shutil.copy(REPOSITORY / "zensical.toml", folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_no_page_names_a_file_of_another_server(site: Path) -> None:
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 20
    for page in pages:
        found = FETCHED.search(page.read_text(encoding="utf-8"))
        assert found is None, f"{page.relative_to(site)}: {found[0]}"


def test_examples_of_docstrings_are_code(site: Path) -> None:
    text = (site / "api" / "pipelines" / "index.html").read_text(encoding="utf-8")
    assert '<span class="gp">&gt;&gt;&gt; </span>' in text
    for page in (site / "api").rglob("*.html"):
        assert "<blockquote>" not in page.read_text(encoding="utf-8"), page.name


@pytest.mark.skipif(CHROMIUM is None, reason="THE SITE IS NOT TESTED IN A BROWSER: there is no Chromium")
@pytest.mark.parametrize("width", [1360, 390], ids=["wide", "phone"])
def test_a_browser_fetches_nothing_elsewhere_and_scrolls_no_page_sideways(site: Path, address: str, width: int) -> None:
    pages = sorted(page.parent.relative_to(site).as_posix() for page in site.rglob("index.html"))
    elsewhere: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.on("request", lambda request: elsewhere.append(request.url) if address not in request.url else None)
        for name in pages:
            page.goto(address + ("" if name == "." else f"{name}/"))
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        browser.close()
    assert not [url for url in elsewhere if not url.startswith(("data:", "blob:"))]


def test_the_page_of_commands_holds_their_help(site: Path) -> None:
    page = unescape(re.sub(r"<[^>]+>", "", (site / "command-line/index.html").read_text(encoding="utf-8")))
    for command in ("finelip-sdxl generate", "finelip-sdxl evaluate images", "training/align_adapter.py"):
        assert " ".join(help_of(command).split()) in " ".join(page.split()), command


def test_no_page_names_a_path_of_this_machine(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert str(REPOSITORY) not in page.read_text(encoding="utf-8"), page


def test_scripts_are_no_part_of_the_site(site: Path) -> None:
    assert not list(site.rglob("*.py"))


def test_equations_are_drawn_without_a_script(site: Path) -> None:
    assert "<math" in (site / "how-it-works/method/index.html").read_text(encoding="utf-8")
