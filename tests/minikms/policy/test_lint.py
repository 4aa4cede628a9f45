"""What the linter of policy files warns of."""

import pytest

from minikms.policy.lint import warnings
from minikms.policy.rules import parse_policy


def warned(*tables: str) -> list[str]:
    return warnings(parse_policy(("version = 1\n" + "\n".join(tables)).encode()))


def grant(principals: str, roles: str, threads: str | None = "*", more: str = "") -> str:
    def listed(text: str) -> str:
        return "[" + ", ".join(f'"{one}"' for one in text.split()) + "]"

    lines = [f"principals = {listed(principals)}", f"roles = {listed(roles)}"]
    lines += [] if threads is None else [f"threads = {listed(threads)}"]
    return "\n".join(["[[grant]]", *lines, more])


PROXY = """[[proxy]]
name = "g"
principals = ["uid:992"]
on_behalf_of = ["spiffe://prod/**"]
limits_total = { concurrent = 9 }"""
NAMED = 'name = "a"\nlimits = { decrypts_per_hour = 5 }'


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ([], "allows nothing"),
        ([grant("uid:1", "encrypt decrypt", "a-*"), grant("uid:1", "decrypt", "a-b*")], "grant 2 never decides"),
        (
            [grant("uid:1 spiffe://prod/**", "encrypt"), grant("spiffe://prod/a/*", "encrypt", "x"), PROXY],
            "grant 2 never",
        ),
        ([grant("spiffe://prod/a", "encrypt rotate"), PROXY], "grant 1, roles: rotate has no effect"),
        ([grant("spiffe://test/a", "encrypt")], "no proxy may ask on behalf of spiffe://test/a"),
        ([grant("spiffe://prod/**", "encrypt"), PROXY], "names everybody of spiffe://prod/"),
        ([grant("uid:1", "encrypt", more=NAMED)], "an hourly limit has no effect without the role decrypt"),
        ([grant("uid:1", "decrypt", more="limits = { decrypts_per_hour = 5 }")], "an hourly limit and no name"),
        ([grant("uid:1", "decrypt")], "without decrypts_per_hour"),
        ([grant("uid:1", "encrypt"), PROXY], "no grant names anybody that spiffe://prod/** matches"),
        ([grant("uid:1", "audit", None), PROXY.partition("\nlimits")[0]], "has no limits_total"),
        ([grant("uid:1", "audit", None), PROXY.replace('name = "g"\n', "")], "proxy 1 has limits and no name"),
    ],
)
def test_what_nobody_means_is_warned_of(tables: list[str], words: str) -> None:
    found = warned(*tables)
    assert [text for text in found if words in text], found


@pytest.mark.parametrize(
    "tables",
    [
        [grant("uid:1", "decrypt encrypt", "a-*", NAMED), grant("uid:1", "decrypt monitor", "b-*")],
        [grant("uid:1", "decrypt", "a", NAMED), grant("uid:1 uid:2", "decrypt", "a")],
        [grant("spiffe://prod/chat/*", "decrypt encrypt", more=NAMED), PROXY],
        [grant("uid:0", "rotate audit", None), grant("uid:1", "monitor", "")],
    ],
)
def test_a_file_that_makes_sense_is_not_warned_of(tables: list[str]) -> None:
    assert warned(*tables) == []
