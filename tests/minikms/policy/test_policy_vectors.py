"""Names, matches, identities and budget files as docs/spec/policy.md has them, from a script without our code."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minikms.policy.meters import Meters
from minikms.policy.names import PrincipalNameError, parse_name
from minikms.policy.patterns import PrincipalPattern, ThreadPattern
from minikms.policy.rules import parse_policy

PLACE = Path(__file__).parents[2] / "vectors"
VECTORS: dict[str, Any] = json.loads((PLACE / "policy.json").read_text("ascii"))


def test_the_script_makes_these_vectors() -> None:
    subprocess.run([sys.executable, PLACE / "make_policy.py", "--check"], check=True, timeout=60)


def test_names_are_names_and_others_are_not() -> None:
    for text in VECTORS["names"]:
        assert parse_name(text).text == text
    for text in VECTORS["no_names"]:
        with pytest.raises(PrincipalNameError):
            parse_name(text)


def test_patterns_match_what_the_page_says() -> None:
    assert {found for *_, found in VECTORS["matches"]} == {True, False}
    for kind, pattern, name, found in VECTORS["matches"]:
        matcher = ThreadPattern(pattern) if kind == "thread" else PrincipalPattern(pattern)
        assert matcher.matches(name) == found, (pattern, name)


@pytest.mark.parametrize("vector", VECTORS["identities"], ids=lambda vector: str(vector["identity"]))
def test_a_table_has_the_identity_of_the_page(vector: dict[str, Any]) -> None:
    others = (
        f"threads = {json.dumps(vector['others'])}\nroles = ['decrypt']" if vector["others"] else "roles = ['audit']"
    )
    if vector["kind"] == "proxy":
        others = f"on_behalf_of = {json.dumps(vector['others'])}"
    name = f"name = '{vector['name']}'" if vector["name"] else ""
    text = f"version = 1\n[[{vector['kind']}]]\n{name}\nprincipals = {json.dumps(vector['principals'])}\n{others}\n"
    rules = parse_policy(text.encode())
    found = [*(one.identity for one in rules.grants), *(one.identity for one in rules.proxies)]
    assert found == [vector["identity"]]


async def test_the_bucket_files_of_a_stop_and_of_a_crash_are_those_of_the_page() -> None:
    files = {when: content.encode() for when, content in VECTORS["buckets"].items()}
    kept: list[bytes] = []

    async def keep(content: bytes) -> None:
        kept.append(content)

    meters = Meters(files["stopped"], keep=keep, now_ns=lambda: 0)
    assert meters.save() == files["stopped"]
    meters.refresh()
    await asyncio.sleep(0)
    assert kept == [files["reserved"]]
    assert Meters(files["reserved"], keep=keep, now_ns=lambda: 0).save() == files["reserved"]
