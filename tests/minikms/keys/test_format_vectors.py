"""Known answers of docs/spec/formats.md: the program reads and writes the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from minikms.crypto import aead, labels, roots
from minikms.crypto.aead import NonceSource
from minikms.keys import dek, keyring
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena
from tests.minikms.keys import keyrings
from tests.minikms.keys.keyrings import AT

VECTORS = Path(__file__).parents[2] / "vectors"
KNOWN: dict[str, Any] = json.loads((VECTORS / "formats.json").read_text())


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


def test_a_rewrap_makes_the_second_file_of_the_first() -> None:
    first, second = (dek.parse(text.encode(), KNOWN["dek"]["key_id"]) for text in KNOWN["dek"]["files"])
    nonce = second.wrapped[: aead.NONCE_BYTES]
    assert dek.rewrap(first, view(KNOWN["dek"]["key"]), view(KNOWN["keks"]["2"]), 2, nonce) == second


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


def test_the_changes_after_a_rotation_match_the_specification(arena: SecretArena) -> None:
    """After promotion and without the older slot, the same KEKs open under the new root alone."""
    old, new = KNOWN["keyrings"][1]["opens_under"]
    data = KNOWN["keyrings"][1]["file"].encode()
    unlocked, _ = UnlockedKeyring.open(arena, view(old), data, nonces=NonceSource().next)
    keyrings.adopt(unlocked, keyring.promote(unlocked.body, at=AT))
    keyrings.adopt(unlocked, keyring.drop_slots_except(unlocked.body, "s7", at=AT))
    written = unlocked.encode(unlocked.body)
    again, slot = UnlockedKeyring.open(arena, view(new), written, nonces=NonceSource().next)
    assert slot.slot_id == "s7"
    assert bytes(again.kek(2)).hex() == KNOWN["keks"]["2"]
    assert json.loads(written)["body"]["retired_roots"] == [
        {"fingerprint": KNOWN["roots"][0]["fingerprint"], "rotated_at": AT}
    ]
