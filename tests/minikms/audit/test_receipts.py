"""The receipt of a destroyed key: signed by the log that has it, and refused if anything in it was changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minikms.api.base64 import decode_exact, encode_text
from minikms.audit import Event, chain, receipt, record, writer
from minikms.audit.chain import RECEIPT_LABEL, SIGNATURE_BYTES, signature_is_valid, signed_message
from minikms.audit.tree import ProofError
from minikms.cli import receipt as command
from tests.minikms.audit.logmaker import KEY1, KEY2, encrypt_event, events_of, lines_of, make_log, open_log, verify
from tests.minikms.audit.make_vectors import make_receipt

KEY_ID, OTHER = f"k_01jd{5:022}", f"k_01jd{6:022}"
LINE = make_receipt().decode("ascii")
GOOD: dict[str, Any] = {"version": 1, "line": LINE}
MANY_COUNT = 40


def check(tmp_path: Path, content: bytes | str | dict[str, Any], **flags: Any) -> int:
    """The exit status of `minikms receipt verify`."""
    path = tmp_path / "receipt"
    text = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return command.verify(str(path), **{"public_key": [encode_text(KEY1.public_key)], **flags})


def destroyed(key_id: str, archives: str = "") -> Event:
    facts = {**record.parse_line(make_receipt())[0].facts, "archives": archives}
    return Event(type="destroy_key", actor="peer_uid:1000", key_id=key_id, facts=facts)


def test_a_receipt_shows_what_was_signed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, GOOD, key=KEY_ID, json=True) == 0
    assert json.loads(capsys.readouterr().out) == {
        "key_id": KEY_ID,
        "destroyed_at": "2023-11-14T22:13:20Z",
        "tombstone": 7,
        "tombstone_tag": "00112233445566778899aabbccddeeff",
        "epoch": 4,
        "backups_removed": 2,
        "archives": "/backups/monday",
        "actor": "peer_uid:1000",
        "seq": 9,
        "tree": "the receipt has no proof",
    }


def test_one_of_several_audit_keys_has_signed(tmp_path: Path) -> None:
    both = [encode_text(key.public_key) for key in (KEY2, KEY1)]
    assert check(tmp_path, GOOD, public_key=both) == 0
    assert check(tmp_path, GOOD, public_key=both[:1]) == 1


def test_a_receipt_of_another_key_is_not_taken_for_this_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, GOOD, key=OTHER) == 1
    assert check(tmp_path, {**GOOD, "line": LINE.replace(KEY_ID, OTHER)}, key=OTHER) == 1
    assert f"one of {KEY_ID}, not of {OTHER}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        ("00112233", "00112234"),
        ('"tombstone":7', '"tombstone":8'),
        ('"epoch":4', '"epoch":5'),
        ("monday", "sunday"),
        ("peer_uid:1000", "peer_uid:1001"),
        ('"ts":17', '"ts":18'),
        ('"outcome":"ok"', '"outcome":"conflict"'),
        ("destroy_key", "retire_key"),
        ('"backups_removed":2', '"backups_removed":"2"'),
        ('"signature":"', '"signature":"A'),
        ('"sig":"', '"sig":"A'),
        ('"tombstone":7,', ""),
        ('"facts":{', '"facts":{"a":1,'),
        ("destroyed_at", "destroyed_on"),
        ('{"event"', '\x1b[31m{"event"'),
        ('{"event"', '\ud800{"event"'),
    ],
)
def test_an_altered_line_is_refused(
    tmp_path: Path, change: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = LINE.replace(*change)
    assert line != LINE
    assert check(tmp_path, {**GOOD, "line": line}) == 1
    output = capsys.readouterr()
    assert output.out == "" and "\x1b" not in output.err


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b"null",
        b'{"version":1}',
        b'{"version":1e400,"line":""}',
        b'{"version":1,"line":"\\ud800"}',
        b'{"version":1,"line":[]}',
        b'{"version":1,"line":"' + b"x" * record.LINE_BYTES_MAX + b'"}',
        b" " * (receipt.RECEIPT_BYTES_MAX + 1),
        json.dumps({**GOOD, "version": 99_999_999_999_999_999_999}),
        json.dumps({**GOOD, "key": 1}),
        json.dumps(GOOD)[:-30],
        json.dumps(GOOD) * 2,
    ],
    ids=range(14),
)
def test_a_file_that_is_no_receipt_is_refused(tmp_path: Path, content: bytes | str) -> None:
    assert check(tmp_path, content) == 1


@pytest.mark.parametrize(
    "flags",
    [
        {"public_key": ["missing"]},
        {"log_key": ["kms.example/audit+00000000+AQ=="]},
        {"quorum": 1},
        {"witness": ["kms.example/w1+00000000+AQ=="]},
    ],
)
def test_a_key_that_is_missing_ends_with_status_two(tmp_path: Path, flags: dict[str, Any]) -> None:
    assert check(tmp_path, GOOD, **flags) == 2
    assert command.verify(str(tmp_path / "none"), public_key=[encode_text(KEY1.public_key)]) == 2


def test_no_signature_of_a_log_is_one_of_a_receipt_or_back(tmp_path: Path) -> None:
    make_log(tmp_path / "log")
    [*_, checkpoint] = events_of(tmp_path / "log" / "minikms-audit.log")
    line = record.parse_line(make_receipt())[0]
    for event, label in ((checkpoint, RECEIPT_LABEL), (line, chain.SIGNED_LABEL)):
        signature = decode_exact(event.facts["signature"], SIGNATURE_BYTES) or b""
        valid = [signature_is_valid(KEY1.public_key, signature, signed_message(event, each))
                 for each in (chain.SIGNED_LABEL, RECEIPT_LABEL)]  # fmt: skip
        assert valid == [label == RECEIPT_LABEL, label != RECEIPT_LABEL]


def test_a_date_that_none_is_gets_no_further(tmp_path: Path) -> None:
    signed = make_receipt(destroyed_at=2**63 - 1).decode("ascii")
    assert check(tmp_path, {"version": 1, "line": signed}) == 1


@pytest.mark.parametrize("bytes_max", [writer.CHECKPOINT_BYTES, 2000])
def test_the_log_signs_a_receipt_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_max: int
) -> None:
    """In one turn with others, with checkpoints between them, and with texts that a line can't hold."""
    monkeypatch.setattr(writer, "CHECKPOINT_BYTES", bytes_max)
    log = open_log(tmp_path)
    for number in range(MANY_COUNT):
        log.add(destroyed(f"k_01jd{number:022}", 'a "path" in 100% Ω'))
        log.add(encrypt_event(number, thread_id="Ω"))
    log.commit()
    log.close()
    assert verify(tmp_path).intact
    lines = [line for line in lines_of(tmp_path) if b"destroy_key" in line]
    assert len(lines) == MANY_COUNT
    for line in lines:
        event = receipt.check(receipt.Receipt(1, line.decode("ascii")), [KEY1.public_key])
        assert event.facts["archives"] == "a %22path%22 in 100%25 %CE%A9"


def test_the_newest_receipt_of_a_key_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path)
    for key_id, archives in ((KEY_ID, "first"), (KEY_ID, "second"), (OTHER, "third")):
        log.add(Event(type="destroy_key", actor="peer_uid:0", key_id=key_id, detail="begun"))
        log.add(destroyed(key_id, archives))
    log.close()
    assert command.show(KEY_ID, data_dir=str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert check(tmp_path, printed, key=KEY_ID, json=True) == 0
    assert json.loads(capsys.readouterr().out)["archives"] == "second"
    assert command.show(f"k_01jd{7:022}", data_dir=str(tmp_path)) == 2
    assert "has no receipt" in capsys.readouterr().err


def test_a_receipt_of_a_later_version_names_it() -> None:
    with pytest.raises(ProofError, match="version 2"):
        receipt.parse(json.dumps({**GOOD, "version": 2}).encode())
