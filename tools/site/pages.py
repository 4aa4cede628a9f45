"""Lays out the pages of the site in a directory: `python -m tools.site.pages DIRECTORY`, which `make site` runs.

Owns: which documents are pages, their order, and the pages that the two OpenAPI documents and the folders of pages
become. The order is that of the links in docs/README.md, under its headings. A folder that is linked there stands for
all its pages. Invariants: the documents are only read; nothing is fetched from another host.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).resolve().parents[2]
ORDER: Final = "docs/README.md"
PLACES: Final = ("docs", "deploy")
"""The folders that pages are in."""
API: Final = "docs/api"
KEY_SERVICE, MESSAGE_SERVER = f"{API}/minikms.md", f"{API}/progressdb.md"
IN_PLACE_OF: Final = {"README.md": "index.md", "docs/minikms-openapi.yaml": KEY_SERVICE}
"""A document → its page."""
TITLES: Final = {"docs/spec": "Formats and protocols"}
"""Of the page of a folder, where its name is none."""
LINK: Final = re.compile(r"(?<=\]\()([^)#\s]+)")
FENCED: Final = re.compile(r"(^```.*?^```\n)", re.MULTILINE | re.DOTALL)


def order() -> dict[str, list[str]]:
    """Each heading of docs/README.md, with the documents and folders that its section links to."""
    _, *sections = re.split(r"^## ", (PROJECT / ORDER).read_text("utf-8"), flags=re.MULTILINE)
    return {section.partition("\n")[0]: [linked(ORDER, link) for link in LINK.findall(section)] for section in sections}


def linked(page: str, link: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(page), link))


def lay_out(target: Path) -> None:
    from tools.site import openapi

    for place in PLACES:
        shutil.copytree(PROJECT / place, target / place)
    for path in PROJECT.glob("*.md"):
        shutil.copy(path, target)
    (target / "README.md").rename(target / "index.md")
    folders = {place for places in order().values() for place in places if (PROJECT / place).is_dir()}
    for folder in folders:
        pages = sorted(str(path.relative_to(target)) for path in (target / folder).glob("*.md"))
        title = TITLES.get(folder) or Path(folder).name.capitalize()
        (target / folder / "index.md").write_text(f"# {title}\n{contents(pages, ':maxdepth: 1')}", "utf-8")
    (target / API).mkdir()
    key_service = (PROJECT / "docs/minikms-openapi.yaml").read_bytes()
    for place, document in ((KEY_SERVICE, key_service), (MESSAGE_SERVER, served_document())):
        (target / place).with_suffix(".yaml").write_bytes(document)
        (target / place).write_text(openapi.page(document, Path(place).stem), "utf-8")
    for path in list(target.rglob("*.md")):
        page, text = str(path.relative_to(target)), path.read_text("utf-8")
        for file in {linked(page, link) for link in LINK.findall(text)} - IN_PLACE_OF.keys():
            if (PROJECT / file).is_file() and not (target / file).exists():  # no page, but one links to it
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(PROJECT / file, target / file)
        path.write_text(with_links_of_the_site(page, text, folders), "utf-8")
    with (target / "index.md").open("a", encoding="utf-8") as index:
        index.write(contents([ORDER], ":hidden:"))
        for heading, places in order().items():
            pages = [page_of(place, folders) for place in places if place != "README.md"]
            if KEY_SERVICE in pages:
                pages.insert(pages.index(KEY_SERVICE) + 1, MESSAGE_SERVER)
            index.write(contents(pages, f":caption: {heading}", ":hidden:"))


def page_of(document: str, folders: set[str]) -> str:
    return IN_PLACE_OF.get(document) or (f"{document}/index.md" if document in folders else document)


def contents(pages: list[str], *options: str) -> str:
    """A directive that lists pages, for Sphinx."""
    return "\n".join(("", "```{toctree}", *options, "", *(f"/{page}" for page in pages), "```", ""))


def with_links_of_the_site(page: str, text: str, folders: set[str]) -> str:
    """The page with its links to documents that have another place in the site."""
    original = next((document for document, place in IN_PLACE_OF.items() if place == page), page)

    def replaced(found: re.Match[str]) -> str:
        document = linked(original, found[0])
        place = page_of(document, folders)
        return found[0] if place == document else os.path.relpath(place, os.path.dirname(page) or ".")

    parts = FENCED.split(text)
    parts[::2] = [LINK.sub(replaced, part) for part in parts[::2]]
    return "".join(parts)


def served_document() -> bytes:
    """The OpenAPI document of a message server, which runs for this only."""
    from tests.progressdb_server.api.real_server import real_server

    with tempfile.TemporaryDirectory(prefix="site-") as directory, real_server(Path(directory)) as server:
        return server("GET", "/openapi.yaml").body


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
