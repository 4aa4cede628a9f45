"""The order of the pages, and the pages that the site makes itself."""

from __future__ import annotations

from pathlib import Path

from tests.tidy.project_tree import PROJECT, documents, name, none, text_of
from tools.site import openapi, pages

KINDS = ["Tutorials", "How to", "Reference", "Explanation"]


def test_the_order_names_every_page_once() -> None:
    """A folder stands for all pages in it."""
    order = pages.order()
    assert list(order) == KINDS
    listed = [place for places in order.values() for place in places]
    folders = {place for place in listed if (PROJECT / place).is_dir()}
    named = [*listed, *(name(page) for page in documents() if str(Path(name(page)).parent) in folders)]
    none(place for place in named if named.count(place) > 1)
    written = {name(page) for page in documents() if not name(page).startswith("tools/")}
    none(written - {*named, pages.ORDER})
    linked = [
        (page, pages.linked(name(page), link)) for page in documents() for link in pages.LINK.findall(text_of(page))
    ]
    unlisted = [(page, place) for page, place in linked if (PROJECT / place).is_dir() and place not in folders]
    none(f"{name(page)} → {place}, a folder that has no page" for page, place in unlisted)


def test_a_link_leads_to_the_page_of_its_document() -> None:
    text = "[a](../README.md#use-it) [b](decisions) [c](sizing.md)\n```sh\necho '[d](decisions)'\n```\n"
    linked = pages.with_links_of_the_site("docs/client.md", text, {"docs/decisions"})
    assert linked == text.replace("(../README.md", "(../index.md").replace("[b](decisions", "[b](decisions/index.md")


def test_the_page_of_an_api_has_each_operation_and_each_schema() -> None:
    page = openapi.page((PROJECT / "docs/minikms-openapi.yaml").read_bytes(), "minikms")
    assert "## POST `/decrypt`\n\nDecrypt one ciphertext.\n\nRole: decrypt." in page
    assert "Request, `application/json`: [DecryptItem](#decryptitem)" in page
    assert "### DecryptItem\n" in page and "| `ciphertext` | base64. nonce(24) \\| ciphertext \\| tag(16). |" in page
    assert "| 403 | `forbidden`, `wrong_thread` | `application/json` [ErrorAnswer](#erroranswer) |" in page
