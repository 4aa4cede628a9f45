"""A backup archive with any change is refused; the register names the archives that may hold a key."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.api.errors import ConflictError
from minikms.archives import archive
from minikms.archives.archive import (
    MAGIC,
    TAG_BYTES,
    ArchiveError,
    ArchiveManifest,
    ArchiveReader,
    ArchiveWriter,
    AuditHead,
    TagKey,
    dek_entry_name,
)
from minikms.archives.restore import NewerKeyring, all_tombstones
from minikms.crypto import roots, slots
from minikms.custody.archive_register import ArchiveRegister, RegisteredArchive
from minikms.custody.keyring_file import NAME as KEYRING
from minikms.custody.tombstone_file import NAME as TOMBSTONES
from minikms.keys.dek import make_key_id
from minikms.keys.tombstones import Tombstone
from minikms.memory.arena import SecretArena
from tests.minikms.keys import keyrings

VECTORS = Path(__file__).parents[2] / "vectors"
ROOT, SPARE = memoryview(bytes(range(32))), memoryview(bytes(range(100, 132)))
KEY_ID = make_key_id(1_000_000, bytes(10))
MANIFEST = ArchiveManifest(
    archive_id="a_0123456789abcdef",
    created_at="2026-11-24T15:00:00Z",
    keyring_id="kr_1",
    epoch=3,
    root_fingerprint=roots.fingerprint(ROOT),
    keys=1,
    newest_key_id=KEY_ID,
    audit_head=AuditHead(7, "sig"),
)
ARENA = SecretArena(2, force_fallback=True)


def tag_key(slot_id: str, root: memoryview) -> TagKey:
    auth = memoryview(bytearray(32))
    slots.auth_key_into(root, MANIFEST.keyring_id, slot_id, auth)
    return TagKey(slot_id, roots.fingerprint(root), auth)


TAG_KEYS = [tag_key("s1", ROOT), tag_key("s5", SPARE)]


def made() -> bytes:
    file = io.BytesIO()
    writer = ArchiveWriter(file)
    writer.add(dek_entry_name(KEY_ID), b"{}")
    writer.add(KEYRING, b"keyring")
    writer.finish(MANIFEST, TAG_KEYS)
    return file.getvalue()


ARCHIVE = made()


def read(data: bytes, root: memoryview = ROOT) -> tuple[ArchiveManifest, dict[str, bytes]]:
    reader = ArchiveReader(io.BytesIO(data))
    content = {entry.name: entry.content for entry in reader.entries()}
    return reader.check_tag(root, ARENA), content


def test_an_archive_reads_back_as_written() -> None:
    assert read(ARCHIVE) == (MANIFEST, {dek_entry_name(KEY_ID): b"{}", KEYRING: b"keyring"})


def test_every_root_key_of_the_keyring_opens_an_archive() -> None:
    assert read(ARCHIVE, SPARE) == read(ARCHIVE, ROOT)


def test_a_changed_byte_in_the_tag_of_another_root_is_not_noticed() -> None:
    """Each root key judges by its own tag: the tags are not covered by one another."""
    changed = bytearray(ARCHIVE)
    changed[-1] ^= 1
    assert read(bytes(changed), ROOT) == read(ARCHIVE, ROOT)
    with pytest.raises(ArchiveError):
        read(bytes(changed), SPARE)


# The tag of SPARE, at the end, is not ROOT's.
@given(st.integers(0, len(ARCHIVE) - 1 - TAG_BYTES), st.integers(1, 255))
def test_a_changed_byte_anywhere_is_refused(place: int, change: int) -> None:
    changed = bytearray(ARCHIVE)
    changed[place] ^= change
    with pytest.raises(ArchiveError):
        read(bytes(changed))


@given(st.integers(0, len(ARCHIVE) - 1))
def test_an_archive_that_is_cut_short_anywhere_is_refused(length: int) -> None:
    with pytest.raises(ArchiveError):
        read(ARCHIVE[:length])


@given(st.binary(min_size=1, max_size=100))
def test_bytes_after_the_tag_are_refused(more: bytes) -> None:
    with pytest.raises(ArchiveError):
        read(ARCHIVE + more)


def test_an_archive_is_read_in_parts_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    for length in range(1, len(ARCHIVE) + 1):
        monkeypatch.setattr(archive, "PART_BYTES", length)
        assert read(ARCHIVE)[0] == MANIFEST
        for altered in (ARCHIVE[:-1], ARCHIVE + b"\0"):
            with pytest.raises(ArchiveError):
                read(altered)


def test_another_root_key_is_named() -> None:
    with pytest.raises(ArchiveError, match=r"opens under root key [0-9a-f]{16} or [0-9a-f]{16}, the given one is "):
        read(ARCHIVE, memoryview(bytes(32)))


@pytest.mark.parametrize(
    "name", ["../keyring.json", "kms-deks/../keyring.json", "kms-deks/k_1.json", "/etc/passwd", "lock", "kms-deks/"]
)
def test_no_archive_can_name_another_file(name: str) -> None:
    with pytest.raises(ArchiveError, match="names a file"):
        ArchiveWriter(io.BytesIO()).add(name, b"")
    encoded = name.encode()
    forged = MAGIC + len(encoded).to_bytes(2, "big") + encoded + bytes(8)
    with pytest.raises(ArchiveError, match="names a file"):
        read(forged)


def test_a_size_beyond_its_kind_is_refused_before_it_is_read() -> None:
    encoded = dek_entry_name(KEY_ID).encode()
    forged = MAGIC + len(encoded).to_bytes(2, "big") + encoded + (2**60).to_bytes(8, "big")
    with pytest.raises(ArchiveError, match="too large"):
        read(forged)


OTHER_KEY_ID = make_key_id(1_000_001, bytes(10))


@pytest.mark.parametrize(
    "names",
    [
        [KEYRING, KEYRING],
        [TOMBSTONES, KEYRING],
        [dek_entry_name(OTHER_KEY_ID), dek_entry_name(KEY_ID)],
        [dek_entry_name(KEY_ID), dek_entry_name(OTHER_KEY_ID), dek_entry_name(KEY_ID)],
        [KEYRING, dek_entry_name(KEY_ID)],
        ["manifest.json"],
    ],
)
def test_entries_in_another_order_or_twice_are_refused(names: list[str]) -> None:
    file = io.BytesIO()
    writer = ArchiveWriter(file)
    for name in names:
        writer.add(name, b"{}")
    writer.finish(MANIFEST, TAG_KEYS)
    with pytest.raises(ArchiveError, match="repeated"):
        read(file.getvalue())


def test_skipped_entries_are_authenticated_too() -> None:
    reader = ArchiveReader(io.BytesIO(ARCHIVE))
    assert [entry.name for entry in reader.entries(only=(KEYRING,))] == [KEYRING]
    assert reader.check_tag(ROOT, ARENA) == MANIFEST
    altered = ARCHIVE.replace(b"{}", b"[]")
    reader = ArchiveReader(io.BytesIO(altered))
    assert not list(reader.entries(only=()))
    with pytest.raises(ArchiveError):
        reader.check_tag(ROOT, ARENA)


def test_no_text_of_an_altered_archive_is_shown() -> None:
    """The text goes to a terminal."""
    named = roots.fingerprint(ROOT).encode()
    forged = ARCHIVE.replace(b'"%b"' % named, b'"\\u001b[2JCall me"')
    assert forged != ARCHIVE
    with pytest.raises(ArchiveError) as refused:
        read(forged)
    assert str(refused.value) == "the backup was altered"


# --- known answers ---------------------------------------------------------------------------------------------------


def test_the_known_archives_follow_from_the_page_alone() -> None:
    generator: list[str | Path] = [sys.executable, VECTORS / "make_archives.py", "--check"]
    assert subprocess.run(generator, check=False).returncode == 0


def test_a_known_archive_opens_under_each_of_its_roots() -> None:
    known = json.loads((VECTORS / "archives.json").read_text("ascii"))
    archive = bytes.fromhex(known["archive"])
    entries = {name: bytes.fromhex(content) for name, content in known["entries"].items()}
    for root in known["roots"].values():
        manifest, found = read(archive, memoryview(bytes.fromhex(root)))
        assert (found, manifest.archive_id) == (entries, MANIFEST.archive_id)
    with pytest.raises(ArchiveError, match="the given one is"):
        read(archive, memoryview(bytes(32)))


def test_an_archive_of_another_version_is_refused() -> None:
    for version in (3, 5):
        with pytest.raises(ArchiveError, match="another version"):
            read(MAGIC[:-1] + bytes([version]) + ARCHIVE[len(MAGIC) :])


# --- the register ---------------------------------------------------------------------------------------------------


def entry(number: int, newest: str = "") -> RegisteredArchive:
    """Finished if `newest` is given."""
    return RegisteredArchive(
        f"a_{number:016x}", f"/backup/{number}", number, 500_000 if newest else 0, newest_key_id=newest
    )


def test_an_archive_may_hold_the_keys_that_were_made_before_it_ended(tmp_path: Path) -> None:
    """Ids are compared, whatever the clock said at the end."""
    register = ArchiveRegister(str(tmp_path))
    assert register.may_hold([KEY_ID]) == [[]]
    for number, newest in enumerate((make_key_id(999_999, bytes(10)), KEY_ID, OTHER_KEY_ID, ""), start=1):
        register.put(entry(number, newest))
    assert register.may_hold([KEY_ID]) == [["/backup/2", "/backup/3", "/backup/4"]]
    register.forget("a_" + "0" * 15 + "3")
    assert register.may_hold([KEY_ID]) == [["/backup/2", "/backup/4"]]


def test_invalid_register_entries_are_not_listed(tmp_path: Path) -> None:
    register = ArchiveRegister(str(tmp_path))
    register.put(entry(1))
    (tmp_path / "kms-archives" / "a_00000000000000ff.json").write_text("{")
    os.link(
        tmp_path / "kms-archives" / "a_0000000000000001.json", tmp_path / "kms-archives" / "a_00000000000000aa.json"
    )
    (tmp_path / "kms-archives" / "notes").write_text("")
    assert register.listed() == [entry(1)]


@pytest.mark.parametrize("text", ["{", '{"":' + "[" * 10_000], ids=["cut", "nested"])
def test_a_receipt_says_which_entries_of_the_register_cannot_be_read(tmp_path: Path, text: str) -> None:
    register = ArchiveRegister(str(tmp_path))
    register.put(entry(1))
    (tmp_path / "kms-archives" / "a_00000000000000ff.json").write_text(text)
    assert register.may_hold([KEY_ID]) == [["/backup/1", "unknown: kms-archives/a_00000000000000ff.json can't be read"]]


def test_an_unreadable_register_does_not_fail_a_destruction(tmp_path: Path) -> None:
    """The key is destroyed already; only the list of archives is incomplete."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "kms-archives").symlink_to(tmp_path / "elsewhere")
    assert ArchiveRegister(str(tmp_path)).may_hold([KEY_ID]) == [
        ["unknown: kms-archives in the data directory can't be read"]
    ]


# --- destroyed keys -------------------------------------------------------------------------------------------------


def test_a_later_keyring_adds_its_tombstones() -> None:
    archived, later = [Tombstone(bytes(16), 1)], [Tombstone(bytes(16), 1), Tombstone(bytes([1] * 16), 2)]
    with keyrings.arena() as arena:
        newer = keyrings.fresh(arena)
        keyring_id = newer.body.keyring_id
        assert all_tombstones(keyring_id, archived, None) == archived
        assert all_tombstones(keyring_id, archived, NewerKeyring(newer, later)) == later
        assert all_tombstones(keyring_id, later, NewerKeyring(newer, archived)) == later


def test_a_keyring_of_another_installation_is_refused() -> None:
    with keyrings.arena() as arena, pytest.raises(ConflictError, match="not a later version"):
        all_tombstones("kr_1", [], NewerKeyring(keyrings.fresh(arena), []))
