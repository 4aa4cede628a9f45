"""The known answers of docs/spec/store.md: records are written and read as that page says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from progressdb_server.store import record
from progressdb_server.store.model import Message

VECTORS = Path(__file__).resolve().parents[2] / "vectors"
MADE: dict[str, Any] = json.loads((VECTORS / "records.json").read_text(encoding="utf-8"))
SEALED = bytes.fromhex(MADE["sealed"])
RECORDS: dict[str, Any] = {one["name"]: one for one in MADE["records"]}
VERSIONS = sorted(set(RECORDS) - {"metadata"})


def test_the_answers_are_those_of_the_script_that_makes_them() -> None:
    made = subprocess.run([sys.executable, str(VECTORS / "make_records.py"), "--check"], check=False)
    assert made.returncode == 0


def test_metadata_of_a_thread_is_written_and_read_as_the_answer() -> None:
    known = RECORDS["metadata"]
    header, sealed = record.unpack_thread(bytes.fromhex(known["record"]))
    assert sealed == SEALED
    assert record.pack(header, sealed).hex() == known["record"]
    thread = record.open_thread(header, MADE["thread"], known["plaintext"].encode())
    assert (thread.title, thread.author, thread.updated_ts) == ("Title", "ann", 5)
    assert record.thread_secret(thread).decode() == known["plaintext"]


def opened(name: str) -> tuple[record.MessageHeader, record.OpenedVersion]:
    known = RECORDS[name]
    header, sealed = record.unpack_message(bytes.fromhex(known["record"]))
    assert sealed == SEALED
    plaintext = known["plaintext"].encode()
    return header, record.open_message(header, known["key"].encode(), MADE["thread"], MADE["first"], plaintext)


@pytest.mark.parametrize("name", VERSIONS)
def test_a_version_is_written_and_read_as_the_answer(name: str) -> None:
    known = RECORDS[name]
    header, found = opened(name)
    assert record.pack(header, SEALED).hex() == known["record"]
    if isinstance(header, record.LaterHeader):
        assert found.before is not None
        plaintext = record.later_secret(found.message, MADE["first"], found.content, found.before)
    else:
        plaintext = record.message_secret(found.message, MADE["first"])
    assert plaintext.decode() == known["plaintext"]


def test_a_version_without_content_gets_that_of_the_version_that_it_names() -> None:
    edit = opened("edit")[1]
    for name, deleted in (("change of reactions", False), ("tombstone", True)):
        change = opened(name)[1]
        assert (change.message.role, change.message.value) == ("", None)
        whole: Message = record.with_content(change, edit)
        assert (whole.role, whole.value, whole.reply_to) == ("user", [1, None, "new"], "msg-1-000000")
        assert (whole.ts, whole.deleted, whole.reactions) == (change.message.ts, deleted, {"bob": "+1", "cid": "ü"})
        with pytest.raises(record.RecordFormatError):
            record.with_content(edit, change)
