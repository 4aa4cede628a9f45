"""The site, made once: what it loads, and how a reader finds a page without a network.

Needs the network once, for the libraries that make the site.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs
from tests.progressdb_server.api.browser import Browser

pytestmark = [pytest.mark.torture, pytest.mark.timeout(1800)]
PROJECT = Path(__file__).parents[2]
LOADED = re.compile(
    r"""<(?:script|img|iframe|object|embed|source|audio|video)\b[^>]*?\b(?:src|srcset|data)=["']?(?:https?:)?//"""
    r"""|<link\b(?![^>]*rel=["']?(?:canonical|next|prev))[^>]*?\bhref=["']?(?:https?:)?//"""
    r"""|url\(\s*["']?(?:https?:)?//|@import|xlink:href=["'](?:https?:)?//""",
    re.IGNORECASE,
)
"""What a browser loads from another host, without a click."""
CUT = (
    "[...document.querySelectorAll('article pre, .table-wrapper')]"
    ".filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent)"
)
"""Code and tables that are wider than their place."""


def make(site: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    needs.program("make")
    command = ["make", *flags, "site", f"VENV={sys.prefix}", f"SITE={site}", f"--old-file={sys.prefix}/.installed"]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("site")
    done = make(made)
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    assert LOADED.search('<script defer src="https://cdn.example/x.js">') and LOADED.search("url('//fonts.example/x')")
    texts = [path for path in (site / "html").rglob("*") if path.suffix in {".html", ".css", ".js", ".svg"}]
    assert len(texts) > 100
    foreign = {str(path): found[0] for path in texts if (found := LOADED.search(path.read_text("utf-8")))}
    assert foreign == {}


def test_a_reader_finds_pages_from_files_alone(site: Path) -> None:
    root = f"file://{site}/html"
    with Browser() as browser:  # resolves no name
        browser.go(f"{root}/index.html")
        assert "miniKMS" in browser.evaluate("document.querySelector('h1').textContent")
        captions = browser.evaluate("[...document.querySelectorAll('.caption-text')].map(e => e.textContent)")
        assert captions == ["Tutorials", "How to", "Reference", "Explanation"]
        browser.go(f"{root}/search.html?q=tombstone")
        found = browser.until("[...document.querySelectorAll('#search-results li a')].map(e => e.href).join(' ')")
        assert "/docs/spec/tombstones.html" in found
        browser.go(f"{root}/docs/benchmarks.html")
        widths = browser.evaluate("[...document.querySelectorAll('article img')].map(e => e.naturalWidth)")
        assert len(widths) > 5 and all(widths)
        browser.go(f"{root}/index.html")
        assert browser.evaluate(CUT) == []
        browser.size(380, 800)
        browser.go(f"{root}/docs/compared.html")
        assert browser.evaluate(CUT) == []
        assert browser.complaints == []
        assert {url.partition(":")[0] for url in browser.requested} <= {"file", "data"}


@pytest.mark.parametrize("link", ["[gone](sizing.md#gone)", "[gone](gone.md)", "![gone](gone.svg)"])
def test_a_broken_link_fails_the_build(site: Path, link: str) -> None:
    sphinx = make(site, "--dry-run").stdout.splitlines()[-1]
    page = site / "pages/docs/upgrade.md"
    whole = page.read_text("utf-8")
    page.write_text(f"{whole}\n{link}\n", "utf-8")
    try:
        done = subprocess.run(
            ["sh", "-c", sphinx], cwd=PROJECT, env={"PATH": os.defpath}, capture_output=True, text=True, check=False
        )
    finally:
        page.write_text(whole, "utf-8")
    assert done.returncode != 0 and "gone" in done.stderr, done.stderr
