"""Known answers of docs/spec/formats.md: the program reads and writes the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from minikms.crypto import aead, labels, roots, slots
from minikms.crypto.aead import NonceSource, XaesCipher
from minikms.custody import deks, kept_index
from minikms.keys import dek, keyring, tombstones
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena

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
    [file] = [one for one in KNOWN["keyrings"] if one["name"] == "three root keys"]
    unlocked, _ = UnlockedKeyring.open(
        arena, view(file["opens_under"][1]), file["file"].encode(), nonces=NonceSource().next
    )
    log = unlocked.body.tombstone_log
    assert bytes(unlocked.tombstone_key).hex() == known["key"]
    read = tombstones.read(
        content, keyring_id=unlocked.body.keyring_id, count=log.count, head=log.head, mac_key=unlocked.tombstone_key
    )
    assert (log.count, read.adopted, read.torn_bytes, read.content) == (known["counted"], 1, 0, content)
    chain = tombstones.TombstoneChain(unlocked.body.keyring_id)
    assert tombstones.HEADER + chain.append(unlocked.tombstone_key, read.stones()) == content


def test_a_kept_index_is_read_and_has_the_same_columns(arena: SecretArena, tmp_path: Path) -> None:
    known, file = KNOWN["key_index"], KNOWN["keyrings"][0]
    content = bytes.fromhex(known["file"])
    unlocked, _ = UnlockedKeyring.open(arena, view(file["opens_under"][0]), file["file"].encode(), nonces=bytes)
    (tmp_path / deks.DIRECTORY).mkdir()
    os.utime(tmp_path / deks.DIRECTORY, ns=(0, known["changed_ns"]))
    (tmp_path / kept_index.NAME).write_bytes(content)
    store, directory = deks.DekStore(str(tmp_path)), os.open(tmp_path, os.O_RDONLY)
    index = kept_index.take(directory, store, unlocked, epoch=known["epoch"], threads=True)
    assert content.endswith(b"".join(index.columns()))
    for thread_id, state in (("thread-a", "active"), ("thread-b", "retired")):
        [key_id] = index.page(after="", limit=2, thread_id=thread_id, state=None).key_ids
        entry = index.entry(key_id)
        assert entry is not None
        assert (entry.state, index.thread_near(key_id)) == (state, (thread_id, True))
    os.close(directory)
    store.close()


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
        dek.unwrap_into(record, XaesCipher(view(KNOWN["keks"][str(version)])), target)
        assert bytes(target).hex() == known["key"]
    numbered = dek.parse(known["numbered_file"].encode(), known["key_id"])
    assert dek.encode(numbered) == known["numbered_file"].encode()
    dek.unwrap_into(numbered, XaesCipher(view(KNOWN["keks"]["1"])), target)
    assert bytes(target).hex() == known["key"]


def test_retiring_a_key_makes_the_retired_file() -> None:
    known = KNOWN["dek"]
    record = dek.parse(known["files"][1].encode(), known["key_id"])
    assert dek.encode(dek.retired(record, at=known["retired_at"])) == known["retired_file"].encode()


def test_a_rewrap_makes_the_second_file_of_the_first() -> None:
    first, second = (dek.parse(text.encode(), KNOWN["dek"]["key_id"]) for text in KNOWN["dek"]["files"])
    key, again = (memoryview(bytearray(32)) for _ in range(2))
    rewrapper = dek.Rewrapper(lambda version: XaesCipher(view(KNOWN["keks"][str(version)])), 2, key=key, again=again)
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
