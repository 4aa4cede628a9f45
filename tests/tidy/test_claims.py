"""Every claim of the threat model names a test, and each named test exists."""

from __future__ import annotations

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
    """This applies to each table with a column `shown by`."""
    rows, in_claims = [], False
    for line in THREAT_MODEL.read_text("utf-8").splitlines():
        in_claims = line.startswith("|") and (in_claims or "shown by" in line)
        if in_claims and "shown by" not in line and not line.startswith("|---"):
            rows.append(line)
    assert len(rows) > 20
    assert [row for row in rows if not NAMED.search(row)] == []
