"""A backup archive with any change is refused; the register names the archives that may hold a key."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.custody.backup.archive import (
    MAGIC,
    ArchiveError,
    ArchiveReader,
    ArchiveWriter,
    AuditHead,
    Manifest,
    dek_entry_name,
)
from minikms.custody.backup.register import ArchiveRegister, Registered
from minikms.custody.backup.restore import newer_tombstones
from minikms.custody.lease_store import JOURNAL_NAME, SNAPSHOT_NAME
from minikms.errors import ConflictError
from minikms.keys.dek import make_key_id
from minikms.keys.keyring import Body, Tombstone

ROOT = memoryview(bytes(range(32)))
KEY_ID = make_key_id(1_000_000, bytes(10))
MANIFEST = Manifest(
    archive_id="a_0123456789abcdef",
    created_at="2026-11-24T15:00:00Z",
    keyring_id="kr_1",
    epoch=3,
    root_fingerprint="0" * 16,
    keys=1,
    newest_key_id=KEY_ID,
    audit_head=AuditHead(7, "sig"),
)


def made() -> bytes:
    file = io.BytesIO()
    writer = ArchiveWriter(file)
    writer.add(JOURNAL_NAME, b"journal")
    writer.add(dek_entry_name(KEY_ID), b"{}")
    writer.finish(MANIFEST, ROOT)
    return file.getvalue()


ARCHIVE = made()


def read(data: bytes, root: memoryview = ROOT) -> tuple[Manifest, dict[str, bytes]]:
    reader = ArchiveReader(io.BytesIO(data))
    content = {entry.name: entry.content for entry in reader.entries()}
    return reader.check_tag(root), content


def test_an_archive_reads_back_as_written() -> None:
    assert read(ARCHIVE) == (MANIFEST, {JOURNAL_NAME: b"journal", dek_entry_name(KEY_ID): b"{}"})


@given(st.integers(0, len(ARCHIVE) - 1), st.integers(1, 255))
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


def test_another_root_key_is_named() -> None:
    with pytest.raises(ArchiveError, match=r"was made under root key 0{16}, the given one is "):
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
        [JOURNAL_NAME, JOURNAL_NAME],
        [dek_entry_name(KEY_ID), JOURNAL_NAME],
        [SNAPSHOT_NAME, JOURNAL_NAME],
        [dek_entry_name(OTHER_KEY_ID), dek_entry_name(KEY_ID)],
        [dek_entry_name(KEY_ID), dek_entry_name(OTHER_KEY_ID), dek_entry_name(KEY_ID)],
        ["keyring.json", dek_entry_name(KEY_ID)],
        ["manifest.json"],
    ],
)
def test_entries_in_another_order_or_twice_are_refused(names: list[str]) -> None:
    file = io.BytesIO()
    writer = ArchiveWriter(file)
    for name in names:
        writer.add(name, b"{}")
    writer.finish(MANIFEST, ROOT)
    with pytest.raises(ArchiveError, match="repeated"):
        read(file.getvalue())


def test_skipped_entries_are_authenticated_too() -> None:
    reader = ArchiveReader(io.BytesIO(ARCHIVE))
    assert [entry.name for entry in reader.entries(only=(JOURNAL_NAME,))] == [JOURNAL_NAME]
    assert reader.check_tag(ROOT) == MANIFEST
    altered = ARCHIVE.replace(b"{}", b"[]")
    reader = ArchiveReader(io.BytesIO(altered))
    assert not list(reader.entries(only=()))
    with pytest.raises(ArchiveError):
        reader.check_tag(ROOT)


def test_no_text_of_an_altered_archive_is_shown() -> None:
    """The text goes to a terminal."""
    forged = ARCHIVE.replace(b'"%b"' % (b"0" * 16), b'"\\u001b[2JCall me"')
    assert forged != ARCHIVE
    with pytest.raises(ArchiveError) as refused:
        read(forged)
    assert str(refused.value) == "the backup was altered"


# --- the register ---------------------------------------------------------------------------------------------------


def entry(number: int, ended_ms: int) -> Registered:
    return Registered(f"a_{number:016x}", f"/backup/{number}", begun_ms=number, ended_ms=ended_ms)


def test_an_archive_may_hold_the_keys_that_were_made_before_it_ended(tmp_path: Path) -> None:
    register = ArchiveRegister(str(tmp_path))
    assert register.may_hold(KEY_ID) == []
    for number, ended_ms in ((1, 999_999), (2, 1_000_000), (3, 1_000_001), (4, 0)):
        register.put(entry(number, ended_ms))
    assert register.may_hold(KEY_ID) == ["/backup/2", "/backup/3", "/backup/4"]
    register.forget("a_" + "0" * 15 + "3")
    assert register.may_hold(KEY_ID) == ["/backup/2", "/backup/4"]


def test_an_archive_may_hold_a_key_made_before_a_clock_step_back(tmp_path: Path) -> None:
    register = ArchiveRegister(str(tmp_path))
    for number, newest in ((1, KEY_ID), (2, make_key_id(999_999, bytes(10))), (3, OTHER_KEY_ID)):
        register.put(Registered(f"a_{number:016x}", f"/backup/{number}", number, 500_000 + number, 1, 1, newest))
    assert register.may_hold(KEY_ID) == ["/backup/1", "/backup/3"]


def test_invalid_register_entries_are_not_listed(tmp_path: Path) -> None:
    register = ArchiveRegister(str(tmp_path))
    register.put(entry(1, 0))
    (tmp_path / "kms-archives" / "a_00000000000000ff.json").write_text("{")
    os.link(
        tmp_path / "kms-archives" / "a_0000000000000001.json", tmp_path / "kms-archives" / "a_00000000000000aa.json"
    )
    (tmp_path / "kms-archives" / "notes").write_text("")
    assert register.listed() == [entry(1, 0)]


def test_a_receipt_says_which_entries_of_the_register_cannot_be_read(tmp_path: Path) -> None:
    register = ArchiveRegister(str(tmp_path))
    register.put(entry(1, 0))
    (tmp_path / "kms-archives" / "a_00000000000000ff.json").write_text("{")
    assert register.may_hold(KEY_ID) == ["/backup/1", "unknown: kms-archives/a_00000000000000ff.json can't be read"]


def test_an_unreadable_register_does_not_fail_a_destruction(tmp_path: Path) -> None:
    """The key is destroyed already; only the list of archives is incomplete."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "kms-archives").symlink_to(tmp_path / "elsewhere")
    assert ArchiveRegister(str(tmp_path)).may_hold(KEY_ID) == [
        "unknown: kms-archives in the data directory can't be read"
    ]


# --- destroyed keys -------------------------------------------------------------------------------------------------


@pytest.fixture
def bodies() -> Iterator[tuple[Body, Body]]:
    archived = Body(
        format="", version=1, keyring_id="kr_1", epoch=1, created_at="", updated_at="", key_version=1, slots=(),
        keks=(), audit_keys=(), tombstones=(Tombstone("k_a", "1"),),
    )  # fmt: skip
    later = Body(
        format="", version=1, keyring_id="kr_1", epoch=2, created_at="", updated_at="", key_version=1, slots=(),
        keks=(), audit_keys=(), tombstones=(Tombstone("k_a", "1"), Tombstone("k_b", "2")),
    )  # fmt: skip
    yield archived, later


def test_a_later_keyring_adds_its_tombstones(bodies: tuple[Body, Body]) -> None:
    archived, later = bodies
    assert newer_tombstones(archived, None) == archived.tombstones
    assert newer_tombstones(archived, later) == later.tombstones
    assert newer_tombstones(later, archived) == later.tombstones


def test_a_keyring_of_another_installation_is_refused(bodies: tuple[Body, Body]) -> None:
    archived, later = bodies
    other = Body(**{name: getattr(later, name) for name in later.__struct_fields__} | {"keyring_id": "kr_2"})
    with pytest.raises(ConflictError, match="not a later version"):
        newer_tombstones(archived, other)
