"""Every claim of the threat model names a test, and each named test exists."""

import re
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
THREAT_MODEL = PROJECT / "docs" / "threat-model.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def test_each_test_that_a_claim_names_exists() -> None:
    named = NAMED.findall(THREAT_MODEL.read_text("utf-8"))
    assert len(named) > 30
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not (PROJECT / file).exists()
        or not re.search(rf"^(async )?def {test}\(", (PROJECT / file).read_text("utf-8"), re.MULTILINE)
    ]
    assert missing == []


def test_each_claim_names_a_test() -> None:
    """A claim is an item of a list in the sections from the keys in memory to the limits of Python."""
    claimed = re.search(r"\n## Keys in memory\n(.*)\n## Limits of Python\n", THREAT_MODEL.read_text("utf-8"), re.DOTALL)
    assert claimed
    claims = re.split(r"^- ", claimed[1], flags=re.MULTILINE)[1:]
    assert len(claims) > 100
    assert [claim for claim in claims if not NAMED.search(claim)] == []
