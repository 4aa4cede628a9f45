"""The lease files match docs/spec/leases.md, as a script makes them that shares no code with the program."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minikms.custody.lease_format import (
    Floors,
    Snapshot,
    SpentRange,
    Step,
    encode_record,
    journal_header,
    parse_journal,
    snapshot_chunks,
)

PLACE = Path(__file__).parents[2] / "vectors"
VECTORS: dict[str, Any] = json.loads((PLACE / "leases.json").read_text("ascii"))


def whole_records(numbers: list[tuple[int, int]]) -> bytes:
    made = [hashlib.sha256(b"lease vector key %d" % number).digest()[:16] for number, _ in numbers]
    return b"".join(encode_record(one, count) for one, (_, count) in zip(made, numbers, strict=True))


def test_a_journal_of_version_1_is_written_in_version_2() -> None:
    [vector] = [vector for vector in VECTORS["journals"] if vector["name"] == "version 1"]
    read = parse_journal(bytes.fromhex(vector["content"]))
    assert bytes(read.image) == journal_header() + whole_records([(1, 2 << 16), (2, 2 << 16), (1, 3 << 16)])


def named(kind: str) -> list[Any]:
    return [pytest.param(vector, id=vector["name"]) for vector in VECTORS[kind]]


def test_the_script_makes_these_vectors() -> None:
    assert subprocess.run([sys.executable, PLACE / "make_leases.py", "--check"], check=False).returncode == 0


@pytest.mark.parametrize("vector", named("journals"))
def test_a_journal_is_read_as_specified(vector: dict[str, Any]) -> None:
    read = parse_journal(bytes.fromhex(vector["content"]))
    assert {one.hex(): count for one, count in read.totals.items()} == vector["counts"]
    assert read.lost_leases == vector["lost_leases"]


def test_a_journal_is_written_as_specified() -> None:
    one, other = (hashlib.sha256(b"lease vector key %d" % number).digest()[:16] for number in (1, 2))
    records = [encode_record(one, 2 << 16), encode_record(other, 2 << 16), encode_record(one, 3 << 16)]
    assert (journal_header() + b"".join(records)).hex() == VECTORS["journals"][1]["content"]


@pytest.mark.parametrize("vector", named("snapshots"))
def test_a_snapshot_is_written_and_read_as_specified(vector: dict[str, Any], tmp_path: Path) -> None:
    counts = {
        hashlib.sha256(b"lease vector key %d" % number).digest()[:16]: (number + 2) << 16
        for number in range(vector["keys"])
    }
    floors = Floors(
        tuple(Step(bytes.fromhex(last), uses) for last, uses in vector["steps"]),
        tuple(SpentRange(bytes.fromhex(first), bytes.fromhex(last)) for first, last in vector["spent"]),
        bytes.fromhex(vector["exhausted"]),
    )
    content = b"".join(snapshot_chunks(None, counts, floors))
    assert len(content) == vector["bytes"]
    if vector["name"] == "version 1":  # which is read, and not written any more
        content = content[: -len(vector["tail"]) // 2] + bytes.fromhex(vector["tail"])
    assert content[-4096:].hex().startswith(vector["footer"][:400])
    assert hashlib.sha256(content).hexdigest() == vector["sha256"]
    (tmp_path / "snapshot").write_bytes(content)
    with (tmp_path / "snapshot").open("rb") as file:
        snapshot = Snapshot(file.fileno())
        assert snapshot.floors == floors
        assert all(snapshot.find(one) == count for one, count in counts.items())
        assert snapshot.find(bytes(16)) is None
