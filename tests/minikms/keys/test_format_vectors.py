"""Known answers of docs/spec/formats.md: the program reads and writes the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minikms.crypto import aead, labels, roots, slots
from minikms.crypto.aead import NonceSource
from minikms.errors import ConflictError, StartError
from minikms.keys import dek, keyring, tombstones
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena, fill_random
from tests.minikms.keys import keyrings
from tests.minikms.keys.keyrings import AT

VECTORS = Path(__file__).parents[2] / "vectors"
KNOWN: dict[str, Any] = json.loads((VECTORS / "formats.json").read_text())
KEYRING_ID = "kr_00112233445566ff"


def view(text: str) -> memoryview:
    return memoryview(bytes.fromhex(text))


def test_the_script_reproduces_the_vectors() -> None:
    subprocess.run([sys.executable, str(VECTORS / "make_formats.py"), "--check"], check=True)


def test_the_names_and_commitments_of_root_keys() -> None:
    for root in KNOWN["roots"]:
        assert roots.fingerprint(view(root["key"])) == root["fingerprint"]
        assert roots.commitment(view(root["key"]), root["slot_id"]).hex() == root["commitment"]


def test_each_keyring_opens_under_each_of_its_roots_and_gives_every_key(arena: SecretArena) -> None:
    for known in KNOWN["keyrings"]:
        for root in known["opens_under"]:
            unlocked, _ = UnlockedKeyring.open(arena, view(root), known["file"].encode(), nonces=NonceSource().next)
            for kek in unlocked.body.keks:
                assert bytes(unlocked.kek(kek.version)).hex() == KNOWN["keks"][str(kek.version)]
            mac_key, seed = unlocked.audit_key(1)
            assert (bytes(mac_key).hex(), bytes(seed).hex()) == (KNOWN["audit_key"], KNOWN["audit_seed"])
            unlocked.release()


def test_counted_tombstones_are_read_and_the_next_one_is_adopted(arena: SecretArena) -> None:
    known = KNOWN["tombstones"]
    content = bytes.fromhex(known["file"])
    [file] = [one for one in KNOWN["keyrings"] if one["name"] == "rotating, format 2"]
    unlocked, _ = UnlockedKeyring.open(
        arena, view(file["opens_under"][1]), file["file"].encode(), nonces=NonceSource().next
    )
    log = unlocked.body.tombstone_log
    assert log is not None
    assert unlocked.tombstone_key is not None
    assert bytes(unlocked.tombstone_key).hex() == known["key"]
    read = tombstones.read(
        content, keyring_id=unlocked.body.keyring_id, count=log.count, head=log.head, mac_key=unlocked.tombstone_key
    )
    assert (log.count, read.adopted, read.torn_bytes, read.content) == (known["counted"], 1, 0, content)
    chain = tombstones.Chain(unlocked.body.keyring_id)
    assert tombstones.HEADER + chain.append(unlocked.tombstone_key, read.stones()) == content


def test_a_keyring_that_was_read_is_written_in_the_same_bytes() -> None:
    """Everything but the tag, which has a new nonce each time."""
    for known in KNOWN["keyrings"]:
        body, body_bytes, tag = keyring.parse_file(known["file"].encode())
        assert keyring.encode_body(body) == body_bytes
        assert keyring.encode_file(body_bytes, tag) == known["file"].encode()


def test_dek_files_parse_unwrap_and_are_written_in_the_same_bytes() -> None:
    known = KNOWN["dek"]
    for version, text in enumerate(known["files"], 1):
        record = dek.parse(text.encode(), known["key_id"])
        assert dek.encode(record) == text.encode()
        assert record.aad(version).hex() == known["associated_data"][version - 1]
        target = memoryview(bytearray(32))
        dek.unwrap_into(record, view(KNOWN["keks"][str(version)]), target)
        assert bytes(target).hex() == known["key"]


def test_a_dek_file_of_before_is_read_and_written_anew_with_padding() -> None:
    known = KNOWN["dek"]
    record = dek.parse(known["file_of_before"].encode(), known["key_id"])
    assert len(known["file_of_before"]) < dek.FILE_BYTES
    assert dek.encode(record) == known["files"][0].encode()


def test_retiring_a_key_makes_the_retired_file() -> None:
    known = KNOWN["dek"]
    record = dek.parse(known["files"][1].encode(), known["key_id"])
    assert dek.encode(dek.retired(record, at=known["retired_at"])) == known["retired_file"].encode()


def test_a_rewrap_makes_the_second_file_of_the_first() -> None:
    first, second = (dek.parse(text.encode(), KNOWN["dek"]["key_id"]) for text in KNOWN["dek"]["files"])
    key, again = (memoryview(bytearray(32)) for _ in range(2))
    rewrapper = dek.Rewrapper(lambda version: view(KNOWN["keks"][str(version)]), 2, key=key, again=again)
    assert rewrapper.rewrap(first, second.wrapped[: aead.NONCE_BYTES]) == second
    assert bytes(key).hex() == KNOWN["dek"]["key"]


def test_records_open_and_are_sealed_in_the_same_bytes() -> None:
    key = view(KNOWN["dek"]["key"])
    record = dek.parse(KNOWN["dek"]["files"][0].encode(), KNOWN["dek"]["key_id"])
    prefix = labels.record_aad_prefix(key_id=record.id, thread_id=record.thread_id)
    for known in KNOWN["records"]:
        sealed, plaintext = bytes.fromhex(known["sealed"]), bytes.fromhex(known["plaintext"])
        associated = labels.record_aad(prefix, bytes.fromhex(known["aad"]))
        assert associated.hex() == known["associated_data"]
        assert aead.open_sealed(key, sealed, associated) == plaintext
        assert aead.seal(key, sealed[: aead.NONCE_BYTES], plaintext, associated) == sealed


def test_the_keys_of_a_slot_are_derived_from_its_root_key() -> None:
    for known in KNOWN["slot_keys"]:
        assert slots.public_key(view(known["root"]), KEYRING_ID, known["slot_id"]).hex() == known["public_key"]
        target = memoryview(bytearray(32))
        slots.auth_key_into(view(known["root"]), KEYRING_ID, known["slot_id"], target)
        assert bytes(target).hex() == known["auth_key"]


@pytest.mark.parametrize("name", ["first", "rotating", "first, format 2", "rotating, format 2"])
def test_a_former_format_becomes_format_4_under_its_newest_root(arena: SecretArena, name: str) -> None:
    """The same keys open, and where there was an older root key, it opens nothing."""
    unlocked, slot, root = keyrings.former(arena, name)
    before = unlocked.body
    unlocked.seal_slots(memoryview(root), fill_random, at=AT)
    if unlocked.body.tombstone_log is None:
        unlocked.make_tombstone_key(fill_random)
        chain = tombstones.Chain(KEYRING_ID)
        keyrings.adopt(unlocked, keyring.with_tombstone_log(unlocked.body, unlocked.tombstone_log(chain)))
    keyring.check(unlocked.body)
    again, opened = keyrings.reopened(arena, unlocked, root)
    assert (again.body.version, again.body.epoch, len(again.body.slots)) == (4, before.epoch, 1)
    assert (opened.slot_id, opened.created_at, opened.tested_at) == (slot.slot_id, slot.created_at, AT)
    for kek in before.keks:
        assert bytes(again.kek(kek.version)).hex() == KNOWN["keks"][str(kek.version)]
    assert [root.slot_id for root in again.body.revoking] == [old.slot_id for old in before.slots[:-1]]
    assert again.body.key_version == before.key_version + (len(before.slots) > 1)
    for old in before.slots[:-1]:
        with pytest.raises(StartError, match="rotated away"):
            keyrings.reopened(arena, unlocked, keyrings.former(arena, name, 0)[2])
        assert old.slot_id == "s1"


def test_a_former_format_under_an_older_root_stays_as_it_is(arena: SecretArena) -> None:
    unlocked, _, root = keyrings.former(arena, "rotating, format 2", 0)
    before = unlocked.body
    unlocked.seal_slots(memoryview(root), fill_random, at=AT)
    assert unlocked.body is before
    promoted = keyrings.promote(unlocked)
    assert keyrings.reopened(arena, unlocked, root)[0].body == promoted
    with pytest.raises(ConflictError, match="under the newest root key"):
        keyrings.add(unlocked, bytes(32))
